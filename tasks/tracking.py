"""MLflow runs: one parent for a pipeline run, one child for each router.

The active run of MLflow is a thing of the thread, so every call here names its run. A child is
found again by its parent and router, so that a retried task goes on in the same run.
"""

import json
import math
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

from conf.llms import Pair
from conf.schema import AnyExperiment, Benchmark, Store
from tasks.processes import is_gone, this_process
from tasks.warehouse import Snapshot

if TYPE_CHECKING:
    from mlflow import MlflowClient

# One run of this experiment at a time in a process; how a run that nobody closed is recognised.
PROCESS_TAG = "turnout.process"
PARENT_TAG = "mlflow.parentRunId"
ROUTER_TAG = "turnout.router"
PAIR_TAG = "turnout.pair"
CHAMPION_TAG = "turnout.champion"
COMMIT_TAG = "mlflow.source.git.commit"
FLOW_RUN_TAG = "turnout.flow_run"
ERROR_TAG = "turnout.error"
URI_VARIABLE = "MLFLOW_TRACKING_URI"

# Where MLflow's database keeps paths of artifacts: column by table.
ARTIFACT_PATHS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}

# What MLflow's page of the experiment says, and the view of its runs that its "Views" offer: a tag
# in which MLflow's own pages keep such views (name, times in ms, state as JSON).
NOTE_TAG = "mlflow.note.content"
UI_MODE = "workflowType=machine_learning"  # else MLflow shows its pages for LLM applications
VIEW = "turnout-routers"
VIEW_COLUMNS = (
    *(f"tags.`turnout.{name}`" for name in ("champion", "pair", "evaluated")),
    *(f"metrics.`{name}`" for name in ("apgr", "apgr_low", "apgr_high", "cpt_50", "cpt_80")),
    *(f"metrics.`{name}_at_20`" for name in ("quality_drop_pct", "saved_usd_per_1000")),
    "metrics.`latency_ms`",
)
VIEW_STATE = {
    "searchFilter": f"tags.`{ROUTER_TAG}` != 'oracle'",
    "orderByKey": "metrics.`apgr`",
    "orderByAsc": False,
    "selectedColumns": VIEW_COLUMNS,
    "columnOrder": VIEW_COLUMNS,
}
EXPERIMENT_NOTE = """\
Each run is one `turnout run`, `retrain` or `benchmark`; under it (⊞) stands one run for each router
and control of each pair. All of them have the same metric names, so any of them can be compared.

- **All routers, best first**: the view *Routers, best first* under Views. Only runs with equal \
`turnout.test_digest` were judged on the same queries; `turnout compare` puts others on the \
queries they share, and with `--open` prints the address of MLflow's own comparison.
- **The champion** is the run with a tag `turnout.champion`, and the alias `champion` of the \
pair's registered model; the version's description is the gate's receipt.
- **In a run**: its artifacts hold, for each pair, `comparison.html`, the figures, and `win_rates` \
(every query with both qualities and each router's win rate).

| metric | meaning |
|---|---|
| `apgr` | average share of the quality gap recovered over all costs; 0.5 is chance |
| `cpt_50`, `cpt_80` | share of strong calls at which half, or 80 %, of the gap is recovered |
| `quality_drop_pct_at_20` | quality lost, % of all-strong, with 20 % of queries on the weak LLM |
| `saved_usd_per_1000_at_20` | US dollars saved per 1,000 queries against all-strong, same split |
| `…_low`, `…_high` | ends of its paired-bootstrap interval |
"""


def client(store: Store) -> "MlflowClient":
    """Return an MLflow client on this store, creating its directory and experiment if needed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    store.directory.mkdir(parents=True, exist_ok=True)
    wished = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(store.mlflow_uri())
    mlflow.set_registry_uri(store.mlflow_uri())
    # MLflow also writes it into the environment, where the next store would take it for a wish.
    if wished is None:
        os.environ.pop(URI_VARIABLE, None)
    else:
        os.environ[URI_VARIABLE] = wished
    return mlflow.MlflowClient()


def experiment_id(store: Store) -> str:
    """Return the id of the store's MLflow experiment, creating it on first use."""
    mlflow_client = client(store)
    location = None
    if store.is_local():
        location = (store.directory.resolve() / "artifacts").as_uri()
    found = mlflow_client.get_experiment_by_name(store.experiment)
    if found is not None:
        if location not in (None, found.artifact_location):
            _follow_move(store, found.artifact_location, location)
        return str(found.experiment_id)
    return str(
        mlflow_client.create_experiment(
            store.experiment,
            artifact_location=location,
            tags=_experiment_tags(),
        )
    )


def _follow_move(store: Store, before: str, now: str) -> None:
    """Let a local store that was copied or moved find its artifacts: MLflow keeps absolute paths.

    Otherwise a copy would read and write the artifacts of the original.
    """
    with sqlite3.connect(store.directory / "mlflow.db", timeout=60) as database:
        for table, column in ARTIFACT_PATHS.items():
            database.execute(
                f"UPDATE {table} SET {column} = :now || substr({column}, length(:before) + 1) "
                f"WHERE substr({column}, 1, length(:before)) = :before",
                {"before": before, "now": now},
            )
    database.close()


def describe_experiment(store: Store) -> None:
    """Describe an experiment that has no description yet; a user's own words are kept."""
    mlflow_client, experiment = client(store), experiment_id(store)
    tags = mlflow_client.get_experiment(experiment).tags
    for key, value in _experiment_tags().items():
        if not tags.get(key):
            mlflow_client.set_experiment_tag(experiment, key, value)


def _experiment_tags() -> dict[str, str]:
    now = int(time.time() * 1000)
    view = {"name": "Routers, best first", "createdAt": now, "updatedAt": now}
    return {
        NOTE_TAG: EXPERIMENT_NOTE,
        f"mlflow.sharedViewState.{VIEW}": json.dumps({**view, "state": json.dumps(VIEW_STATE)}),
    }


def mark_champion(store: Store, model: str, run_id: str | None) -> None:
    """Put the champion's tag on the router's run it came from, and take it off every other.

    ``run_id`` is that of the champion's version; None where there is no champion any more. The
    tag's value names the registered model, so that pairs do not take each other's mark away. A run
    that was deleted is not marked: a mark must never stop a promotion.
    """
    from mlflow.exceptions import MlflowException

    mlflow_client, mark = client(store), f"★ {model}"
    marked = mlflow_client.search_runs(
        [experiment_id(store)], f"tags.`{CHAMPION_TAG}` = '{mark}'", max_results=1000
    )
    for run in marked:
        if run.info.run_id != run_id:
            mlflow_client.delete_tag(run.info.run_id, CHAMPION_TAG)
    if run_id is not None:
        with suppress(MlflowException):
            mlflow_client.set_tag(run_id, CHAMPION_TAG, mark)


def run_url(store: Store, run_id: str) -> str:
    """Return where MLflow's UI shows a run: its server, or the one that `turnout ui` starts."""
    return f"{_ui(store)}/#/experiments/{experiment_id(store)}/runs/{run_id}?{UI_MODE}"


def artifact_url(store: Store, run_id: str, path: str) -> str:
    """Return where MLflow's UI shows a run's artifact."""
    page = f"{_ui(store)}/#/experiments/{experiment_id(store)}/runs/{run_id}"
    return f"{page}/artifacts/{quote(path)}?{UI_MODE}"


def routers_url(store: Store) -> str:
    """Return MLflow's list of all routers' runs, the best first, with the columns that matter."""
    page = f"{_ui(store)}/#/experiments/{experiment_id(store)}/runs"
    return f"{page}?viewStateShareKey={VIEW}&{UI_MODE}"


def compare_url(store: Store, run_ids: Sequence[str]) -> str:
    """Return MLflow's page that compares runs, its lists as JSON in the query string."""
    lists = {"runs": list(run_ids), "experiments": [experiment_id(store)]}
    query = "&".join(
        f"{name}={quote(json.dumps(ids, separators=(',', ':')))}" for name, ids in lists.items()
    )
    return f"{_ui(store)}/#/compare-runs?{query}&{UI_MODE}"


def _ui(store: Store) -> str:
    uri = store.mlflow_uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


@contextmanager
def parent_run(
    experiment: AnyExperiment | Benchmark, *, kind: str = "pipeline", name: str | None = None
) -> Iterator[str]:
    """Open the run of one flow run and yield its id; it is closed whatever happens.

    name: the experiment's, unless another one is given. A flow run that Prefect retries goes on in
    the run it had.
    """
    from prefect.runtime import flow_run

    store = experiment.store
    root = None if flow_run.id is None else str(flow_run.root_flow_run_id)
    close_abandoned_runs(store, flow_run_id=root)
    describe_experiment(store)
    tags = {PROCESS_TAG: this_process(), "turnout.kind": kind, **_revision()}
    run_id = None
    if root is not None:
        tags[FLOW_RUN_TAG] = root
        run_id = _unfinished(store, name or experiment.name, root)
    if run_id is None:
        run = client(store).create_run(experiment_id(store), run_name=name or experiment.name)
        run_id = run.info.run_id
    _reopen(store, run_id)
    set_tags(store, run_id, tags)
    with _closing(run_id):
        client(store).log_dict(run_id, experiment.model_dump(mode="json"), "config.json")
        yield run_id


def _reopen(store: Store, run_id: str) -> None:
    """Let a run go on, without the error of an earlier attempt."""
    client(store).update_run(run_id, status="RUNNING")
    if ERROR_TAG in client(store).get_run(run_id).data.tags:
        client(store).delete_tag(run_id, ERROR_TAG)


def _unfinished(store: Store, name: str, flow_run_id: str) -> str | None:
    """Return the run of this name that an earlier attempt of the flow run left unfinished."""
    runs = client(store).search_runs(
        [experiment_id(store)], f"tags.`{FLOW_RUN_TAG}` = '{flow_run_id}'"
    )
    left = [run for run in runs if run.info.run_name == name and run.info.status != "FINISHED"]
    return left[0].info.run_id if left else None


@contextmanager
def child_run(store: Store, parent_id: str, name: str, *, tags: Mapping[str, str]) -> Iterator[str]:
    """Open, or after a retry reopen, the child of ``parent_id`` for one router; yield its id."""
    mlflow_client = client(store)
    own = {**tags, ROUTER_TAG: name}
    clauses = [f"tags.`{tag}` = '{value}'" for tag, value in {PARENT_TAG: parent_id, **own}.items()]
    found = mlflow_client.search_runs([experiment_id(store)], " AND ".join(clauses))
    if found:
        run_id = found[0].info.run_id
        _reopen(store, run_id)
    else:
        run = mlflow_client.create_run(
            experiment_id(store), run_name=name, tags={PARENT_TAG: parent_id, **own}
        )
        run_id = run.info.run_id
    with _closing(run_id):
        yield run_id


@contextmanager
def _closing(run_id: str) -> Iterator[None]:
    """End the run as FINISHED, or as FAILED with the reason when the block raises."""
    from mlflow import MlflowClient

    try:
        yield
    except BaseException as error:
        MlflowClient().set_tag(run_id, ERROR_TAG, f"{type(error).__name__}: {error}"[:5000])
        MlflowClient().set_terminated(run_id, "FAILED")
        raise
    MlflowClient().set_terminated(run_id, "FINISHED")


def close_abandoned_runs(store: Store, *, flow_run_id: str | None = None) -> int:
    """Mark as KILLED the runs that a process of this machine, now gone, left open; count them.

    Prefect is told too, but for ``flow_run_id``: that one has been started again and is at work.
    """
    mlflow_client = client(store)
    abandoned = 0
    for run in mlflow_client.search_runs([experiment_id(store)], "attributes.status = 'RUNNING'"):
        owner = run
        if PARENT_TAG in run.data.tags:
            owner = mlflow_client.get_run(run.data.tags[PARENT_TAG])
        if is_gone(owner.data.tags.get(PROCESS_TAG, "")):
            mlflow_client.set_terminated(run.info.run_id, "KILLED")
            abandoned += 1
            if run.data.tags.get(FLOW_RUN_TAG, flow_run_id) != flow_run_id:
                _report_crash(run.data.tags[FLOW_RUN_TAG])
    return abandoned


def _report_crash(flow_run_id: str) -> None:
    """Tell Prefect, which would say for ever that the flow runs, if its server knows of it."""
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException
    from prefect.states import Crashed

    with suppress(PrefectException, HTTPError, OSError), get_client(sync_client=True) as prefect:
        state = prefect.read_flow_run(UUID(flow_run_id)).state
        if state is not None and state.is_running():
            prefect.set_flow_run_state(
                UUID(flow_run_id), Crashed(message="Its process ended before it did."), force=True
            )


def _revision() -> dict[str, str]:
    """Return which code ran as tags: `TURNOUT_REVISION`, or the git revision of this checkout."""
    commit = os.environ.get("TURNOUT_REVISION", "").strip()
    if commit:
        return {COMMIT_TAG: commit}
    root = str(Path(__file__).resolve().parent.parent)
    # Installed as a package, this file may lie within somebody else's repository.
    if shutil.which("git") is None or _git(root, "rev-parse", "--show-toplevel") != root:
        return {}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        COMMIT_TAG: _git(root, "rev-parse", "HEAD"),
        "turnout.uncommitted_changes": str(bool(changed)).lower(),
    }


def _git(root: str, *words: str) -> str:
    command = ["git", "-C", root, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def log_dataset(store: Store, run_id: str, snapshot: Snapshot, *, name: str) -> None:
    """Attach a snapshot (name, digest, rows) to a run as a dataset input."""
    from mlflow.entities import Dataset, DatasetInput

    dataset = Dataset(
        name=name,
        digest=snapshot.digest,
        source_type="local",
        source=json.dumps({"uri": str(snapshot.path)}),
        profile=json.dumps({"num_rows": snapshot.rows}),
    )
    client(store).log_inputs(run_id, [DatasetInput(dataset)])


def log_metrics(store: Store, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Log metrics in one call; NaN values are left out, for MLflow cannot order by them."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entries = [
        Metric(name, float(value), now, step)
        for name, value in metrics.items()
        if math.isfinite(value)
    ]
    client(store).log_batch(run_id, metrics=entries)


def log_params(store: Store, run_id: str, settings: Mapping[str, Any]) -> None:
    """Log settings as parameters, nested ones under dotted names."""
    from mlflow.entities import Param

    params = [Param(key, str(value)[:6000]) for key, value in flattened(settings).items()]
    client(store).log_batch(run_id, params=params)


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run in one call."""
    from mlflow.entities import RunTag

    client(store).log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def describe_model(store: Store, pair: Pair) -> None:
    """Describe a pair's registered model, unless somebody has."""
    mlflow_client, name = client(store), pair.name()
    if not mlflow_client.get_registered_model(name).description:
        mlflow_client.update_registered_model(
            name,
            f"Routers between **{pair.weak}** (weak, cheap) and **{pair.strong}** (strong). A "
            "router gives a query its win rate: how likely the strong LLM is needed.\n\n"
            f"- `champion` is served: `models:/{name}@champion`\n"
            "- `previous` is what `turnout rollback` returns to\n"
            "- `challenger` is sound and may yet prove better\n\n"
            "A version's description is the gate's receipt; its source run has the router's "
            "metrics, and that run's parent the comparison with all others.",
        )


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names.

    >>> flattened({"trainer": {"max_epochs": 5}, "name": "knn"})
    {'trainer.max_epochs': 5, 'name': 'knn'}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
