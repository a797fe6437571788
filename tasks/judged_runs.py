"""Runs whose routers were judged, as MLflow keeps them: what `turnout compare` reads.

A run logs, for each pair, a table of its evaluated queries with both LLMs' qualities and every
router's win rate. That table is all that a comparison needs: no router is loaded, so code of two
versions never meets in one interpreter.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import ArtifactError, ConfigError, StoreError, unknown_name
from conf.llms import Pair
from conf.schema import Store
from tasks import tracking
from tasks.controls import CONTROL_TAG
from tasks.receipt import Check, Receipt
from tasks.registry import CHAMPION, aliased

if TYPE_CHECKING:
    from mlflow.entities import Run

KINDS = ("pipeline", "benchmark")
KIND_TAG = "turnout.kind"
EVALUATED_TAG = "turnout.evaluated"


@dataclass(frozen=True, eq=False)
class JudgedRun:
    """One pair's routers in one run."""

    run_id: str
    name: str
    started: str
    pair: Pair
    metric: str
    evaluated: str
    """On how many queries, and how, in words."""
    table: pa.Table
    """query_key, text, domain, weak_quality, strong_quality, and a column for each router."""
    labels: pa.Table | None
    """query_key and a column for each kind of label, where labels were made."""
    routers: Mapping[str, str]
    """Router → its own run's id."""
    kinds: Mapping[str, str]
    """Router → what kind of router it is."""
    label_kinds: Mapping[str, str]
    """Router → the kind of labels it was trained on, where it was."""


def judged_run(store: Store, run_id: str, pair: str | None = None) -> JudgedRun:
    """Read one pair of a run. Raises ConfigError for a pair that is unknown, or not named though
    there are several; ArtifactError where the run logged no win rates."""
    client = tracking.client(store)
    run = client.get_run(run_id)
    children = [
        child
        for child in client.search_runs(
            [run.info.experiment_id],
            f"tags.`{tracking.PARENT_TAG}` = '{run_id}'",
            order_by=["attributes.start_time ASC"],
        )
        if {tracking.ROUTER_TAG, tracking.PAIR_TAG} <= child.data.tags.keys()
        and CONTROL_TAG not in child.data.tags
    ]
    pair = _chosen_pair({child.data.tags[tracking.PAIR_TAG] for child in children}, pair, run)
    table = logged_table(store, run_id, f"{pair}/win_rates", "win_rates")
    if table is None:
        raise ArtifactError(
            f"Run {run_id[:8]} ({run.info.run_name}, {run.info.status}) has no table of win rates "
            f"for {pair}. Expected what a finished `turnout run` logs. Compare another run."
        )
    own = {
        child.data.tags[tracking.ROUTER_TAG]: child
        for child in children
        if child.data.tags[tracking.PAIR_TAG] == pair
        and child.data.tags[tracking.ROUTER_TAG] in table.column_names
    }
    described, metric = _settings(store, run_id, pair)
    tags = [child.data.tags for child in own.values()]
    evaluated = next((tag[EVALUATED_TAG] for tag in tags if EVALUATED_TAG in tag), None)
    started = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    return JudgedRun(
        run_id=run_id,
        name=str(run.info.run_name),
        started=started.isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC"),
        pair=described,
        metric=metric,
        evaluated=evaluated or f"{table.num_rows} queries",
        table=table,
        labels=logged_table(store, run_id, f"{pair}/labels"),
        routers={name: child.info.run_id for name, child in own.items()},
        kinds={name: child.data.tags.get(KIND_TAG, "") for name, child in own.items()},
        label_kinds={
            name: child.data.params["labels"]
            for name, child in own.items()
            if "labels" in child.data.params
        },
    )


def _chosen_pair(known: Collection[str], pair: str | None, run: "Run") -> str:
    which = f"run {run.info.run_id[:8]} ({run.info.run_name})"
    if not known:
        raise ArtifactError(
            f"No router was trained in {which}. Expected a finished `turnout run`. Compare another."
        )
    if pair is None and len(known) > 1:
        raise ConfigError(
            f"The pairs of {which} are {', '.join(sorted(known))}. Expected one to compare "
            "routers of. Choose it with --pair."
        )
    if pair is not None and pair not in known:
        raise ConfigError(unknown_name("pair", pair, known) + f" These are of {which}.")
    return pair or next(iter(known))


def _settings(store: Store, run_id: str, pair: str) -> tuple[Pair, str]:
    """Return the pair's LLMs and the quality metric from the settings that the run logged."""
    with TemporaryDirectory() as folder:
        path = Path(tracking.client(store).download_artifacts(run_id, "config.json", folder))
        settings = json.loads(path.read_text(encoding="utf-8"))
    pairs = [Pair(weak=one["weak"], strong=one["strong"]) for one in settings.get("pairs", ())]
    found = next((one for one in pairs if one.name() == pair), None)
    if found is None:  # a benchmark may find its pair in the columns of the files
        weak, _, strong = pair.partition("--")
        found = Pair(weak=weak or "weak", strong=strong or "strong")
    return found, settings.get("quality", {}).get("label_metric", "correct")


def logged_table(store: Store, run_id: str, *folders: str) -> pa.Table | None:
    """Return the Parquet table in the first of the folders of a run that has one."""
    client = tracking.client(store)
    for folder in folders:
        paths = [item.path for item in client.list_artifacts(run_id, folder)]
        paths = [path for path in paths if path.endswith(".parquet")]
        if paths:
            with TemporaryDirectory() as target:
                return pq.read_table(client.download_artifacts(run_id, paths[-1], target))
    return None


def champion_run(store: Store, model: str) -> str | None:
    """Return the router's run that the champion of a registered model came from, if any."""
    found = aliased(store, model, CHAMPION)
    return None if found is None or not found.run_id else str(found.run_id)


def parent_of(store: Store, router_run: str | None) -> str | None:
    """Return the run that trained a router, by the router's own run; None where that is gone."""
    from mlflow.exceptions import MlflowException

    if router_run is None:
        return None
    try:
        tags = tracking.client(store).get_run(router_run).data.tags
    except MlflowException:
        return None
    return tags.get(tracking.PARENT_TAG)


def last_run(store: Store) -> str:
    """Return the pipeline run that finished last; raises StoreError where there is none."""
    if store.is_local() and not (store.directory / "mlflow.db").exists():
        raise _no_run(store)
    found = tracking.client(store).search_runs(
        [tracking.experiment_id(store)],
        f"tags.`{KIND_TAG}` = 'pipeline' AND attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
    )
    if not found:
        raise _no_run(store)
    return str(found[0].info.run_id)


def named_run(store: Store, asked: str) -> str:
    """Return the run with this name (the last finished one of it), or whose id begins so.

    The run of a router stands for the run that trained it. Raises ConfigError for none or several.
    """
    if store.is_local() and not (store.directory / "mlflow.db").exists():
        raise _no_run(store)
    runs = _all_runs(store)
    named = [run for run in runs if run.info.run_name == asked and _is_parent(run)]
    if named:
        finished = [run for run in named if run.info.status == "FINISHED"]
        return str((finished or named)[0].info.run_id)
    found = {
        run.data.tags.get(tracking.PARENT_TAG, run.info.run_id)
        for run in runs
        if run.info.run_id.startswith(asked.lower())
    }
    if len(found) == 1:
        return str(found.pop())
    known = [f"{run.info.run_id[:8]} ({run.info.run_name})" for run in runs if _is_parent(run)]
    if found:
        raise ConfigError(
            f"{len(found)} runs have ids that begin with {asked!r}. Expected one. Give more of it."
        )
    raise ConfigError(
        unknown_name("run", asked, known[:10]) + " Give a run's name or the beginning of its id."
    )


def _is_parent(run: "Run") -> bool:
    return run.data.tags.get(KIND_TAG) in KINDS and tracking.PARENT_TAG not in run.data.tags


def _all_runs(store: Store) -> "list[Run]":
    """Return all runs of the experiment, the last started first."""
    client, experiment = tracking.client(store), tracking.experiment_id(store)
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment], order_by=["attributes.start_time DESC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _no_run(store: Store) -> StoreError:
    return StoreError(
        f"{store.mlflow_uri()} holds no finished run of the experiment {store.experiment!r}. "
        "Expected one with judged routers. Run `turnout run` first, or set store.directory."
    )


def receipts(store: Store, run_ids: Sequence[str]) -> list[Receipt]:
    """Return the gate's receipts that these routers' runs hold."""
    client, found = tracking.client(store), []
    for run_id in run_ids:
        for item in client.list_artifacts(run_id, "gate"):
            if item.path.endswith("receipt.json"):
                with TemporaryDirectory() as folder:
                    path = Path(client.download_artifacts(run_id, item.path, folder))
                    found.append(_receipt(json.loads(path.read_text(encoding="utf-8"))))
    return [receipt for receipt in found if receipt is not None]


def _receipt(kept: dict[str, object]) -> Receipt | None:
    """Return a receipt from its JSON; None for one of a release that wrote other fields."""
    known = {field.name for field in fields(Receipt)}
    values = {key: value for key, value in kept.items() if key in known}
    checks = values.pop("checks", ())
    assert isinstance(checks, list | tuple)
    try:
        made = tuple(Check(**check) for check in checks)
        return Receipt(**{**values, "checks": made})  # type: ignore[arg-type]
    except TypeError:
        return None
