"""What a threshold is chosen on: a logged router, and queries with its win rates and qualities.

A promise about new queries needs queries that the router has not seen. Its own run has logged some;
of a file, those that it was trained on are left out. Longer than most files here, since files that
cannot be used are met here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from conf.errors import ArtifactError, ConfigError, DataError, StoreError, unknown_name
from conf.llms import Pair
from conf.schema import Store
from router_models.catalog import load_router
from router_models.packaged import file_digest
from router_models.training_data import prompt_groups
from serving.score import win_rates_in_clean_process
from tasks import tracking
from tasks.benchmark import METRIC
from tasks.controls import CONTROL_TAG, PROMPTS, prompt_hashes
from tasks.evaluation import ORACLE
from tasks.judged_runs import KIND_TAG, logged_table
from tasks.progress import stage
from tasks.registry import CHAMPION, POOL_TAG, Version
from tasks.training import TRAINING_TAG

TEXT_COLUMNS = ("prompt", "text")
QUALITY_COLUMNS = ("weak_quality", "strong_quality")
# Lowest and highest quality by the definition of the metric; BARTScore has no lowest one.
QUALITY_RANGES = {"gold_match": (0.0, 1.0), "correct": (0.0, 1.0)}
PIPELINE, BENCHMARK = "pipeline", "benchmark"
JUDGED = "win_rates"
BLOCK_BYTES = 64 << 20  # PyArrow infers a column's type from the first block


@dataclass(frozen=True)
class LoggedRouter:
    """A trained router as MLflow knows it."""

    name: str
    pair: Pair
    metric: str
    run_id: str
    parent_id: str
    version: Version | None
    """Its registered version, where it has one."""
    quality_range: tuple[float, float] | None = None
    """Lowest and highest quality that the metric can give, where its definition says so."""
    judged_on: str = ""
    """Folder in the parent's artifacts of all routers' win rates; by default the pair's."""


@dataclass(frozen=True, eq=False)
class CalibrationRows:
    """Queries to choose a threshold on: (N,) win rates and, where known, both qualities."""

    source: str
    win_rate: np.ndarray
    weak_quality: np.ndarray | None
    strong_quality: np.ndarray | None
    left_out: int = 0
    """Rows of the file that the router was trained on."""
    condition: str = ""
    """What must hold besides the assumption of the bound."""
    quality_range: tuple[float, float] | None = None
    """Lowest and highest possible quality; None where it is not known."""


def logged_router(
    store: Store, name: str, *, pair: str | None = None, kinds: Sequence[str] = (PIPELINE,)
) -> LoggedRouter:
    """Return a router of the last finished run, or by the name "champion" the promoted one.

    The run is of the first of the ``kinds`` of which there is one: beside routers that may be
    served, a benchmark's are not meant. Raises StoreError without a finished run, ConfigError for
    names that are unknown or fit twice.
    """
    if store.is_local() and not (store.directory / "mlflow.db").exists():
        raise _no_run(store)
    if name == CHAMPION:
        return _champion(store, pair)
    client, experiment = tracking.client(store), tracking.experiment_id(store)
    found_runs = (
        client.search_runs(
            [experiment],
            f"tags.`{KIND_TAG}` = '{kind}' AND attributes.status = 'FINISHED'",
            order_by=["attributes.end_time DESC"],
            max_results=1,
        )
        for kind in kinds
    )
    finished = next(filter(None, found_runs), None)
    if finished is None:
        raise _no_run(store)
    parent = finished[0].info.run_id
    children = [
        (run.data.tags[tracking.ROUTER_TAG], run.data.tags[tracking.PAIR_TAG], run.info.run_id)
        for run in client.search_runs([experiment], f"tags.`{tracking.PARENT_TAG}` = '{parent}'")
        if {tracking.ROUTER_TAG, tracking.PAIR_TAG} <= run.data.tags.keys()
        and run.data.tags[tracking.ROUTER_TAG] != ORACLE
        and CONTROL_TAG not in run.data.tags
    ]
    pairs = {child[1] for child in children}
    if pair is not None and pair not in pairs:
        raise ConfigError(unknown_name("pair", pair, pairs) + " Name a pair of the last run.")
    children = [child for child in children if pair in (None, child[1])]
    found = [child for child in children if child[0] == name]
    if not found:
        known = {*(child[0] for child in children), CHAMPION}
        raise ConfigError(
            unknown_name("router", name, known) + f" Name a router of the last run, {parent[:8]}."
        )
    if len(found) > 1:
        raise _several(f"The router {name!r} was trained", [child[1] for child in found])
    return _described(store, found[0][2])


def _champion(store: Store, pair: str | None) -> LoggedRouter:
    client = tracking.client(store)
    champions = {
        model.name: str(model.aliases[CHAMPION])
        for model in client.search_registered_models()
        if CHAMPION in model.aliases and POOL_TAG not in model.tags  # a pool has no threshold
    }
    if not champions:
        raise StoreError(
            f"No registered model of {store.mlflow_uri()} has the alias {CHAMPION!r}. Expected a "
            "promoted router. Name a router of the last run instead, or promote one."
        )
    if pair is not None and pair not in champions:
        raise ConfigError(unknown_name("pair", pair, champions) + " Name a pair with a champion.")
    if pair is None and len(champions) > 1:
        raise _several("A champion is there", list(champions))
    model = pair or next(iter(champions))
    run_id = client.get_model_version(model, champions[model]).run_id
    if run_id is None:
        raise StoreError(
            f"The champion of {model} names no run. Expected a version that `turnout run` has "
            "registered. Name a router of the last run instead."
        )
    return replace(_described(store, run_id), version=Version(model, champions[model], run_id))


def _described(store: Store, run_id: str) -> LoggedRouter:
    """Read from a router's run, and from its parent's settings, what it is."""
    client = tracking.client(store)
    tags = client.get_run(run_id).data.tags
    parent = tags[tracking.PARENT_TAG]
    if client.get_run(parent).data.tags.get(KIND_TAG) == BENCHMARK:
        pairs, metric, judged_on = [_logged_json(store, parent, "benchmark.json")], METRIC, JUDGED
        quality: dict[str, Any] = {}
    else:
        settings = _logged_json(store, parent, "config.json")
        pairs, quality, judged_on = settings["pairs"], settings["quality"], ""
        metric = quality["label_metric"]
    found = (Pair(weak=each["weak"], strong=each["strong"]) for each in pairs)
    kinds = {each["name"]: each["metric"] for each in quality.get("metrics", ())}
    router = LoggedRouter(
        name=tags[tracking.ROUTER_TAG],
        pair=next(pair for pair in found if pair.name() == tags[tracking.PAIR_TAG]),
        metric=metric,
        run_id=run_id,
        parent_id=parent,
        version=None,
        quality_range=QUALITY_RANGES.get(kinds.get(metric, metric)),
        judged_on=judged_on,
    )
    return replace(router, version=_version(store, router))


def _logged_json(store: Store, run_id: str, path: str) -> Any:
    with TemporaryDirectory() as folder:
        file = Path(tracking.client(store).download_artifacts(run_id, path, folder))
        return json.loads(file.read_text(encoding="utf-8"))


def _version(store: Store, router: LoggedRouter) -> Version | None:
    """Return the newest version that came of the router's run, or of the same training before."""
    client = tracking.client(store)
    found = list(client.search_model_versions(f"run_id = '{router.run_id}'"))
    if not found and (digest := _training(store, router)) is not None:
        found = client.search_model_versions(
            f"name = '{router.pair.name()}' AND tags.training_digest = '{digest}'"
        )
    newest = max(found, key=lambda version: int(version.version), default=None)
    if newest is None:
        return None
    return Version(newest.name, str(newest.version), str(newest.run_id))


def _no_run(store: Store) -> StoreError:
    return StoreError(
        f"{store.mlflow_uri()} holds no finished run of the experiment {store.experiment!r}. "
        "Expected one with trained routers. Run `turnout run` first, or set store.directory."
    )


def _several(what: str, pairs: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{what} for several pairs: {', '.join(sorted(pairs))}. Expected one to calibrate. "
        "Choose it with --pair."
    )


def logged_rows(store: Store, router: LoggedRouter, *, labelled: bool = True) -> CalibrationRows:
    """Return the queries of the router's run that it had not seen when it predicted them.

    labelled: for a promise about quality, where a prompt counts once; else they are traffic.
    """
    folder = router.judged_on or f"{router.pair.name()}/{JUDGED}"
    table = needed_table(store, router.parent_id, folder)
    predicted = needed_table(store, router.run_id, "win_rates")
    served = "served_win_rate" in predicted.column_names
    held_out = served and predicted["win_rate"].equals(predicted["served_win_rate"])
    # Taking the best of several routers takes some luck along, and no bound here knows of it.
    condition = "the router was not picked for these very queries (fresh ones: --data)"
    if not held_out and served:
        condition += "; the served form, trained on all of them, rates new ones as its folds did"
    elif not held_out:
        condition += "; it rates new ones as its folds did: a benchmark registers no router"
    names = (router.name, "weak_quality", "strong_quality")
    (rate, weak, strong), repeated = [table[name].to_numpy() for name in names], ""
    if labelled:
        (rate, weak, strong), repeated = _once(table["text"].to_pylist(), rate, weak, strong)
    return CalibrationRows(
        source=f"run {router.parent_id[:8]}",
        win_rate=rate,
        weak_quality=weak,
        strong_quality=strong,
        condition=condition + repeated,
        quality_range=router.quality_range,
    )


def file_rows(store: Store, router: LoggedRouter, path: Path, *, labelled: bool) -> CalibrationRows:
    """Return a file's queries with the win rates that the served router gives them.

    labelled: qualities are needed too, and rows that the router was trained on are left out, for
    on those it is better than on new ones. Raises DataError for files that cannot be used.
    """
    table = file_table(path)
    prompts = _prompts(table, path)
    if not labelled:
        rates = win_rates(store, router, prompts)
        return CalibrationRows(str(path), rates, None, None)
    weak, strong = _qualities(table, path, router.pair)
    seen = _trained_on(store, router)
    new = np.array([prompt not in seen for prompt in prompt_hashes(prompts)])
    if not new.any():
        raise DataError(
            f"{router.name} was trained on all {len(prompts)} queries of {path}. Expected queries "
            "that it has not seen. Give others, or leave --data out."
        )
    own = [prompts[row] for row in np.flatnonzero(new)]
    rates = win_rates(store, router, own)
    (rate, weak, strong), repeated = _once(own, rates, weak[new], strong[new])
    return CalibrationRows(
        source=str(path),
        win_rate=rate,
        weak_quality=weak,
        strong_quality=strong,
        left_out=int((~new).sum()),
        condition=repeated.removeprefix("; "),
    )


def _once(prompts: Sequence[str], *columns: np.ndarray) -> tuple[list[np.ndarray], str]:
    """Return the columns with rows of the same prompt averaged, and a condition that says so.

    The bounds are for independent draws; the same query ten times is one draw.
    """
    group = prompt_groups(prompts)
    size = np.bincount(group)
    means = [np.bincount(group, weights=column) / size for column in columns]
    repeats = len(group) - len(size)
    return means, f"; every prompt counts once ({repeats} rows repeat another)" if repeats else ""


def win_rates(store: Store, router: LoggedRouter, prompts: Sequence[str]) -> np.ndarray:
    """Return the win rates that the served form of the router gives, (N,)."""
    with stage(f"Scoring {len(prompts)} queries"):
        if router.version is None:
            return load_router(_saved_router(store, router)).win_rate(prompts)
        return np.array(
            win_rates_in_clean_process(
                router.version.uri(), prompts, tracking_uri=store.mlflow_uri()
            )
        )


def _saved_router(store: Store, router: LoggedRouter) -> Path:
    """Return the folder of a router that was never registered."""
    digest = _training(store, router)
    directory = store.directory / "training" / (digest or "unknown")
    if not (directory / "router").is_dir():
        raise ArtifactError(
            f"{router.name} is no registered version, and {store.directory / 'training'} does not "
            "hold it. Expected the router itself, to score new queries. Calibrate the champion, "
            "leave --data out, or run `turnout run` here."
        )
    return directory / "router"


def _training(store: Store, router: LoggedRouter) -> str | None:
    """Return the digest of the training that the router's run is about, its folder's name.

    A run of an earlier release has no tag that names it: it is known by its predictions, if they
    are here.
    """
    client = tracking.client(store)
    tags = client.get_run(router.run_id).data.tags
    if TRAINING_TAG in tags:
        return tags[TRAINING_TAG]
    with TemporaryDirectory() as folder:
        logged = client.download_artifacts(router.run_id, "win_rates/predictions.parquet", folder)
        digest = file_digest(Path(logged))
    for predictions in sorted((store.directory / "training").glob("*/predictions.parquet")):
        if file_digest(predictions) == digest:
            return predictions.parent.name
    return None


def _trained_on(store: Store, router: LoggedRouter) -> set[str]:
    """Return hashes of the queries that the served form of the router was trained on."""
    if router.version is not None:
        folder, _, _ = PROMPTS.rpartition("/")
        return set(needed_table(store, router.version.run_id, folder)["prompt"].to_pylist())
    labels = logged_table(store, router.parent_id, f"{router.pair.name()}/labels")
    battles = _battle_files(store, router)
    texts: list[str] = []
    if labels is None and not battles:  # a run on battles has no labels
        raise ArtifactError(
            f"What {router.name} learnt from is no longer in {store.directory / 'snapshots'}. "
            "Expected its battles: queries among them are no test of it. Calibrate the champion, "
            "leave --data out, or run `turnout run` here."
        )
    if labels is not None:
        predicted = needed_table(store, router.run_id, "win_rates")
        # Out of fold, every query was trained on in the end.
        held_out = set(predicted["query_key"].to_pylist())
        held_out = held_out if predicted.num_rows < labels.num_rows else set()
        rows = zip(labels["query_key"].to_pylist(), labels["text"].to_pylist(), strict=True)
        texts += [text for key, text in rows if key not in held_out]
    for file in battles:
        texts += pq.read_table(file)["prompt"].to_pylist()
    return set(prompt_hashes(texts))


def _battle_files(store: Store, router: LoggedRouter) -> list[Path]:
    """Return the snapshots of battles that the router was trained on, where they are still here."""
    inputs = tracking.client(store).get_run(router.run_id).inputs
    datasets = [found.dataset for found in inputs.dataset_inputs] if inputs else []
    battles = [found for found in datasets if found.name.startswith("battles ")]
    paths = [Path(json.loads(found.source)["uri"]) for found in battles]
    return [path for path in paths if path.exists()]


def needed_table(store: Store, run_id: str, folder: str) -> pa.Table:
    """Return the Parquet table that a run has logged under ``folder``; ArtifactError for none."""
    table = logged_table(store, run_id, folder)
    if table is None:
        raise ArtifactError(
            f"Run {run_id} has no table under {folder}. Expected what `turnout run` logs there. "
            "Run it again."
        )
    return table


def file_table(path: Path) -> pa.Table:
    """Return the rows of a Parquet, CSV or JSONL file."""
    readers = {
        ".parquet": pq.read_table,
        ".csv": lambda file: pa.csv.read_csv(
            file,
            read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        ),
        ".jsonl": lambda file: pa.json.read_json(
            file, read_options=pa.json.ReadOptions(block_size=BLOCK_BYTES)
        ),
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataError(
            f"{path} ends in {suffix!r}. Expected one of {', '.join(readers)}. Convert the file."
        )
    try:
        table = readers[suffix](path)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {path}. Expected queries as Parquet, CSV or JSONL. Correct --data."
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Expected UTF-8 {suffix[1:].upper()} with the same "
            "columns in every row. Correct the file."
        ) from error
    if bytes_in := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
        raise DataError(
            f"{path} is not UTF-8 in column {bytes_in[0]}. Expected UTF-8 text. Save it so."
        )
    if table.num_rows == 0:
        raise DataError(f"{path} holds no rows. Expected one for each query. Fill it.")
    return table


def _prompts(table: pa.Table, path: Path) -> list[str]:
    name = next((name for name in TEXT_COLUMNS if name in table.column_names), None)
    if name is None:
        raise DataError(
            f"{path} has the columns {', '.join(table.column_names)}. Expected the query text in "
            "'prompt' or 'text'. Rename its column."
        )
    prompts = table[name].to_pylist()
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                f"Row {row} of {path} has the {name} {prompt!r}. Expected a non-empty string. "
                "Correct or drop it."
            )
    return prompts


def _qualities(table: pa.Table, path: Path, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return both LLMs' qualities, from columns of our names or of the LLMs' own."""
    for names in (QUALITY_COLUMNS, (pair.weak, pair.strong)):
        if set(names) <= set(table.column_names):
            weak, strong = (_numbers(table, name, path) for name in names)
            return weak, strong
    raise DataError(
        f"{path} has the columns {', '.join(table.column_names)}. Expected weak_quality and "
        f"strong_quality, or {pair.weak} and {pair.strong}. Add them, or use --strong-share, which "
        "needs none."
    )


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    column = table[name]
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    try:
        values = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"Column {name} of {path} holds {column.type}: {error}. Expected numbers. Correct it."
        ) from error
    if bad := np.flatnonzero(~np.isfinite(values)).tolist():
        raise DataError(
            f"{len(bad)} of {len(values)} rows of {path} have no finite {name}, the first is row "
            f"{bad[0]}. Expected a number in each. Score these queries, or drop them."
        )
    return values
