"""Retention: what a store may forget, found first, shown, and only then deleted.

Superseded responses: those of a question that the given experiments now put to the same LLM in
another way. The `prompts` table has every address that was ever asked, so for one question (its
`query_id`) and LLM it has the address of each template, decoding and wording there was; the one
that an experiment would ask today is kept, the others have been superseded. An address of an LLM or
a question that no given experiment knows is not superseded but another experiment's, and is kept:
responses cost money. So is what is younger than `keep_days`, and every sample of what is kept.

Orphaned files: snapshots and training folders that no registered version and none of the last runs
refers to, and that no stage has come to for `keep_days`. They can be made anew.

Rows go in one transaction, files after it; a prune that is killed is finished by the next one.
"""

import json
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from conf.errors import ConfigError, StoreError
from conf.schema import Experiment, PreferenceExperiment, Store
from router_models.packaged import file_digest
from tasks import tracking
from tasks.generation import prompt_table
from tasks.queries import query_table
from tasks.tables import size
from tasks.training import PREDICTIONS, TRAINING_TAG
from tasks.warehouse import Snapshot, Warehouse

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DAY_S = 86_400
WANTED = pa.schema([(name, pa.string()) for name in ("query_id", "llm", "prompt_id")])
DOOMED = ".pruned"  # ending of a training folder that is being deleted

# $wanted are the prompts of the experiments: query_id, llm, prompt_id.
SUPERSEDED = """
    CREATE TEMP TABLE superseded AS
    SELECT r.prompt_id, r.sample_index, r.llm, coalesce(strlen(r.text), 0) AS bytes
    FROM responses r
    WHERE r.created_at < $before
    AND r.prompt_id NOT IN (SELECT prompt_id FROM wanted)
    AND r.prompt_id IN (
        SELECT p.prompt_id
        FROM prompts p LEFT JOIN queries q USING (query_key)
        LEFT JOIN (SELECT DISTINCT query_id, llm FROM wanted) w
        ON w.query_id = q.query_id AND w.llm = p.llm
        GROUP BY p.prompt_id
        -- equal texts share an address: it goes only if all who asked it ask otherwise now
        HAVING count(*) = count(w.query_id)
    )
"""
FORGET = (
    "DELETE FROM responses WHERE (prompt_id, sample_index) IN "
    "(SELECT prompt_id, sample_index FROM superseded)",
    "DELETE FROM scores WHERE (prompt_id, sample_index) IN "
    "(SELECT prompt_id, sample_index FROM superseded)",
    "DELETE FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM superseded) "
    "AND prompt_id NOT IN (SELECT prompt_id FROM responses)",
)


@dataclass(frozen=True)
class Freed:
    """One kind of thing that a prune takes away."""

    what: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Pruned:
    """What a prune took away, or in a dry run would have."""

    dry_run: bool
    freed: tuple[Freed, ...]

    def rows(self) -> list[dict[str, str]]:
        """Return it as text, one row for each kind of thing that there is any of."""
        return [
            {"what": one.what, "count": f"{one.count:,}", "size": size(one.bytes)}
            for one in self.freed
            if one.count
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"dry_run": self.dry_run, "freed": [asdict(one) for one in self.freed]}


def prune(
    experiments: Sequence[Experiment | PreferenceExperiment],
    *,
    keep_days: float = 30.0,
    keep_runs: int = 10,
    dry_run: bool = False,
) -> Pruned:
    """Take from the store of ``experiments`` what none of them would use again.

    Raises ConfigError for bad bounds and experiments with different stores, StoreError while a run
    is under way or another process has the warehouse.
    """
    store = _common_store(experiments)
    if keep_days < 0 or keep_runs < 0:
        raise ConfigError(
            f"keep_days is {keep_days:g} and keep_runs {keep_runs}. Expected numbers from 0 on. "
            "Leave them out for 30 days and 10 runs."
        )
    warehouse = Warehouse(store.directory)
    with warehouse.reading():
        pass  # says so if there is none, instead of making one
    _refuse_during_run(store)
    before = time.time() - keep_days * DAY_S
    wanted = wanted_prompts(experiments)
    files = _orphans(store, before=before, keep_runs=keep_runs)
    freed = _forget(warehouse, wanted, before=before, dry_run=dry_run)
    freed += [_summary(what, paths) for what, paths in files.items()]
    if not dry_run:
        for path in (path for paths in files.values() for path in paths):
            if path.suffix == DOOMED or _last_touched(path) < before:  # still, by now
                _delete(path)
    return Pruned(dry_run=dry_run, freed=tuple(freed))


def _common_store(experiments: Sequence[Experiment | PreferenceExperiment]) -> Store:
    directories = {experiment.store.directory.resolve() for experiment in experiments}
    if len(directories) != 1:
        raise ConfigError(
            f"The experiments keep {len(directories)} stores: "
            f"{', '.join(sorted(map(str, directories)))}. Expected one, whose responses they "
            "share. Prune each store by itself."
        )
    return experiments[0].store


def _refuse_during_run(store: Store) -> None:
    """Raise StoreError if a run of this machine is under way: it may use any file."""
    if not _has_runs(store):
        return
    tracking.close_abandoned_runs(store)
    found = tracking.client(store).search_runs(
        [tracking.experiment_id(store)], "attributes.status = 'RUNNING'"
    )
    for run in found:
        if run.data.tags.get(tracking.PROCESS_TAG, "").startswith(f"{socket.gethostname()} "):
            raise StoreError(
                f"Run {run.info.run_id[:8]} ({run.info.run_name}) is under way. Expected a store "
                "at rest, for a run may come back to any file. Prune again when it has ended."
            )


def wanted_prompts(experiments: Iterable[Experiment | PreferenceExperiment]) -> pa.Table:
    """Return what the experiments would ask now: query_id, llm, prompt_id."""
    tables = [WANTED.empty_table()]
    for experiment in experiments:
        if isinstance(experiment, PreferenceExperiment):
            continue  # it asks no LLM
        rows = query_table(experiment.queries)
        ids = dict(zip(rows["query_key"].to_pylist(), rows["query_id"].to_pylist(), strict=True))
        with TemporaryDirectory() as folder:
            queries: Snapshot = Warehouse(Path(folder)).write_snapshot("queries", rows)
            for llm in experiment.llms:
                prompts = prompt_table(queries, llm)
                named = pa.array([ids[key] for key in prompts["query_key"].to_pylist()])
                named_prompts = prompts.append_column("query_id", named)
                tables.append(named_prompts.select(WANTED.names).cast(WANTED))
    return pa.concat_tables(tables)


def _forget(warehouse: Warehouse, wanted: pa.Table, *, before: float, dry_run: bool) -> list[Freed]:
    """Delete superseded responses and what hangs on them, in one transaction; count them by LLM."""
    with warehouse.connection() as con:
        con.register("wanted", wanted)
        con.execute(SUPERSEDED, {"before": datetime.fromtimestamp(before, UTC)})
        freed = [
            Freed(f"superseded responses of {llm}", int(count), int(size))
            for llm, count, size in con.sql(
                "SELECT llm, count(*), sum(bytes) FROM superseded GROUP BY llm ORDER BY llm"
            ).fetchall()
        ]
        scores = _count(
            con,
            "SELECT count(*) FROM scores SEMI JOIN superseded USING (prompt_id, sample_index)",
        )
        if not dry_run:
            for statement in FORGET:
                con.execute(statement)
        con.execute("DROP TABLE superseded")
    return [*freed, Freed("scores of these", scores, 0)] if freed else []


def _count(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(con.sql(sql).fetchall()[0][0])


def _orphans(store: Store, *, before: float, keep_runs: int) -> dict[str, list[Path]]:
    """Return snapshots, training folders and leftovers that nothing refers to any more."""
    used = _used(store, keep_runs)
    snapshots = store.directory / "snapshots"
    training = store.directory / "training"

    def old(paths: Iterable[Path]) -> list[Path]:
        return [path for path in sorted(paths) if _last_touched(path) < before]

    folders = [path for path in training.glob("*") if path.is_dir() and not path.suffix]
    return {
        "orphaned snapshots": [
            path for path in old(snapshots.glob("*.parquet")) if path.resolve() not in used.files
        ],
        "orphaned trainings": [path for path in old(folders) if not used.training(path)],
        "leftovers of killed processes": [
            *old([*snapshots.glob("*.tmp"), *training.glob("*.unfinished")]),
            *sorted(training.glob(f"*{DOOMED}")),
        ],
    }


@dataclass(frozen=True)
class Used:
    """What registered versions and the last runs refer to."""

    files: frozenset[Path]
    """Snapshots that are inputs of their runs."""
    trainings: frozenset[str]
    """Digests of trainings that were registered, or that the runs are about."""
    predictions: frozenset[str]
    """Hashes of the predictions that runs of an earlier release logged, which name no training."""

    def training(self, folder: Path) -> bool:
        """Tell whether a training folder is among them."""
        predictions = folder / PREDICTIONS
        return folder.name in self.trainings or (
            bool(self.predictions)
            and predictions.exists()
            and file_digest(predictions) in self.predictions
        )


def _used(store: Store, keep_runs: int) -> Used:
    if not _has_runs(store):
        return Used(frozenset(), frozenset(), frozenset())
    client = tracking.client(store)
    versions = list(client.search_model_versions())
    runs = _last_runs(client, tracking.experiment_id(store), keep_runs)
    runs += [client.get_run(version.run_id) for version in versions if version.run_id]
    named = [version.tags.get("training_digest") for version in versions]
    named += [run.data.tags.get(TRAINING_TAG) for run in runs]
    unnamed = [run for run in runs if TRAINING_TAG not in run.data.tags]
    return Used(
        files=frozenset(path for run in runs for path in _inputs(run)),
        trainings=frozenset(digest for digest in named if digest is not None),
        predictions=frozenset(
            digest for run in unnamed for digest in _logged_predictions(client, run.info.run_id)
        ),
    )


def _has_runs(store: Store) -> bool:
    """Tell whether there may be runs, without making a database to look into."""
    return not store.is_local() or (store.directory / "mlflow.db").exists()


def _last_runs(client: "MlflowClient", experiment: str, keep_runs: int) -> "list[Run]":
    """Return the last runs of each kind and their children."""
    parents: dict[str, list[Run]] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment], order_by=["attributes.start_time DESC"], page_token=token
        )
        for run in page:
            if tracking.PARENT_TAG not in run.data.tags:
                parents.setdefault(run.data.tags.get("turnout.kind", ""), []).append(run)
        token = page.token
        if not token:
            break
    runs = [run for of_kind in parents.values() for run in of_kind[:keep_runs]]
    clauses = [f"tags.`{tracking.PARENT_TAG}` = '{run.info.run_id}'" for run in runs]
    return runs + [
        child for clause in clauses for child in client.search_runs([experiment], clause)
    ]


def _inputs(run: "Run") -> list[Path]:
    found = run.inputs.dataset_inputs if run.inputs else []
    return [Path(json.loads(one.dataset.source)["uri"]).resolve() for one in found]


def _logged_predictions(client: "MlflowClient", run_id: str) -> list[str]:
    path = f"win_rates/{PREDICTIONS}"
    if path not in [item.path for item in client.list_artifacts(run_id, "win_rates")]:
        return []
    with TemporaryDirectory() as folder:
        return [file_digest(Path(client.download_artifacts(run_id, path, folder)))]


def _last_touched(path: Path) -> float:
    """Return when a file, or the newest thing in a folder, was last written (Unix seconds)."""
    inside = path.rglob("*") if path.is_dir() else ()
    return max(each.stat().st_mtime for each in (path, *inside))


def _summary(what: str, paths: Sequence[Path]) -> Freed:
    files = [
        each
        for path in paths
        for each in (path.rglob("*") if path.is_dir() else [path])
        if each.is_file()
    ]
    return Freed(what, len(paths), sum(each.stat().st_size for each in files))


def _delete(path: Path) -> None:
    """Delete a file or folder; a folder that is half deleted is never taken for a whole one."""
    if path.is_dir():
        doomed = path if path.suffix == DOOMED else path.with_name(path.name + DOOMED)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
