"""Training: one router, its predictions on queries it has not seen, its final form on disk.

With enough test queries the router is trained on the train split and predicts the test split. With
few, a tiny holdout would say little: it is trained once per fold and predicts the fold it has not
seen, and then once more on everything, which is the form that is served.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task

from conf.errors import DataError
from conf.load import config_digest
from conf.schema import Evaluation, Store
from conf.schema import Router as RouterSettings
from router_models.catalog import Router, build_router
from router_models.training_data import Comparisons
from tasks import tracking
from tasks.labelling import LabelSet
from tasks.progress import progress
from tasks.warehouse import Snapshot, Warehouse

SPLITS = ("train", "validation", "test")
VALIDATION_PERCENT = 15


@dataclass(frozen=True)
class Fold:
    """Row positions: what is trained on, watched for early stopping, and predicted."""

    train: np.ndarray
    validation: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class TrainedRouter:
    """A trained router: where it lies, what it predicted, in which MLflow run it is described."""

    name: str
    settings: RouterSettings
    run_id: str
    directory: Path
    predictions: Snapshot
    """query_key, win_rate (of a router that has not seen the query) and served_win_rate (of the
    final router, which may have), for every query that is evaluated."""
    digest: str
    reused: bool


@task(task_run_name="train {settings.name}")
def train_router(
    store: Store,
    label_set: LabelSet,
    settings: RouterSettings,
    *,
    evaluation: Evaluation,
    seed: int,
    parent_id: str,
) -> TrainedRouter:
    """Train a router, or take it up as it was trained on the same data, and log it."""
    tags = {"turnout.pair": label_set.pair.name(), "turnout.kind": settings.router}
    with tracking.child_run(store, parent_id, settings.name, tags=tags) as run_id:
        digest = training_digest(label_set, settings, evaluation, seed)
        directory = store.directory / "training" / digest
        reused = directory.exists()
        if not reused:
            _train_into(directory, label_set, settings, evaluation=evaluation, seed=seed)
        predictions = Warehouse(store.directory).write_snapshot(
            "predictions", pq.read_table(directory / "predictions.parquet")
        )
        _log(store, run_id, directory, label_set, settings)
    return TrainedRouter(
        name=settings.name,
        settings=settings,
        run_id=run_id,
        directory=(directory / "router").resolve(),
        predictions=predictions,
        digest=digest,
        reused=reused,
    )


def training_digest(
    label_set: LabelSet, settings: RouterSettings, evaluation: Evaluation, seed: int
) -> str:
    """Return the address of a training: equal digests would train bit-identical routers."""
    return config_digest(
        [
            settings.model_dump(mode="json"),
            label_set.labels.digest,
            [evaluation.min_test_queries, evaluation.folds],
            seed,
            _code_digest(),
        ]
    )


@cache
def _code_digest() -> str:
    models = Path(__file__).parent.parent / "router_models"
    sources = [*sorted(models.glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _train_into(
    directory: Path,
    label_set: LabelSet,
    settings: RouterSettings,
    *,
    evaluation: Evaluation,
    seed: int,
) -> None:
    """Train into ``directory``, which appears only when everything in it is complete."""
    labels = label_set.labels.read()
    data = comparisons(label_set, settings.labels)
    folds = evaluation_folds(labels, evaluation)
    holdout = len(folds) == 1
    unfinished = directory.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)

    def fitted(fold: Fold, name: str) -> Router:
        router = build_router(settings)
        return router.fit(
            data.take(fold.train),
            data.take(fold.validation),
            seed=seed,
            directory=unfinished / name,
        )

    def predicted(router: Router, rows: np.ndarray) -> np.ndarray:
        return router.win_rate([data.prompts[row] for row in rows])

    rows = np.concatenate([fold.predicted for fold in folds])
    with progress(f"Training {settings.name}", 1 if holdout else len(folds) + 1) as advance:
        unseen = []
        for number, fold in enumerate([] if holdout else folds):
            kept = unfinished / f"unseen-{number}.npy"
            if not kept.exists():  # a killed training goes on with the fold it was in
                partial = unfinished / f"partial-{number}.npy"
                np.save(partial, predicted(fitted(fold, f"fold-{number}"), fold.predicted))
                partial.rename(kept)
            unseen.append(np.load(kept))
            advance(1)
        started = time.monotonic()
        router = fitted(folds[0] if holdout else everything(labels), "final")
        fit_seconds = time.monotonic() - started
        advance(1)
    router.save(unfinished / "router")
    served = predicted(router, rows)
    predictions = pa.table(
        {
            "query_key": labels["query_key"].take(rows),
            "win_rate": served if holdout else np.concatenate(unseen),
            "served_win_rate": served,
        }
    )
    pq.write_table(predictions, unfinished / "predictions.parquet")
    notes = {
        "fit_seconds": fit_seconds,
        "latency_ms": latency_ms(router, data.prompts),
        "history": router.history_,
    }
    (unfinished / "training.json").write_text(json.dumps(notes, indent=2))
    for leftover in [*unfinished.glob("unseen-*.npy"), *unfinished.glob("fold-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    unfinished.rename(directory)


def comparisons(label_set: LabelSet, kind: str) -> Comparisons:
    """Return the labelled queries as training data; the win rate is 1 − label."""
    labels = label_set.labels.read()
    return Comparisons.from_win_rates(
        labels["text"].to_pylist(),
        1.0 - labels[kind].to_numpy(),
        weak=label_set.pair.weak,
        strong=label_set.pair.strong,
        weak_quality=labels["weak_quality"].to_numpy(),
        strong_quality=labels["strong_quality"].to_numpy(),
    )


def evaluation_folds(labels: pa.Table, evaluation: Evaluation) -> list[Fold]:
    """Return one fold that predicts the test split, or, where that is small, one for each part.

    A query's part comes from a hash of its key, as does whether it is watched for early stopping.
    Raises DataError when a part would be empty.
    """
    split = np.array(labels["split"].to_pylist())
    if np.sum(split == "test") >= evaluation.min_test_queries:
        return [Fold(*(np.flatnonzero(split == name) for name in SPLITS))]
    part = _hashed(labels, "fold") % evaluation.folds
    watched = _hashed(labels, "validation") % 100 < VALIDATION_PERCENT
    folds = [
        Fold(
            train=np.flatnonzero((part != number) & ~watched),
            validation=np.flatnonzero((part != number) & watched),
            predicted=np.flatnonzero(part == number),
        )
        for number in range(evaluation.folds)
    ]
    if any(min(map(len, (fold.train, fold.validation, fold.predicted))) == 0 for fold in folds):
        raise DataError(
            f"{labels.num_rows} labelled queries do not fill {evaluation.folds} folds. Expected "
            "queries in every one. Add queries, or lower evaluation.folds."
        )
    return folds


def everything(labels: pa.Table) -> Fold:
    """Return all queries as training data, but for those watched for early stopping."""
    watched = _hashed(labels, "validation") % 100 < VALIDATION_PERCENT
    return Fold(np.flatnonzero(~watched), np.flatnonzero(watched), np.array([], dtype=np.int64))


def _hashed(labels: pa.Table, purpose: str) -> np.ndarray:
    digests = [
        hashlib.sha256(f"{purpose} {key}".encode()).digest()[:4]
        for key in labels["query_key"].to_pylist()
    ]
    return np.frombuffer(b"".join(digests), dtype=">u4").astype(np.int64)


def latency_ms(router: Router, prompts: Sequence[str], *, calls: int = 20) -> float:
    """Return the median time that a win rate for one query takes, in milliseconds."""
    times = []
    for prompt in prompts[:calls]:
        started = time.perf_counter()
        router.win_rate([prompt])
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def _log(
    store: Store, run_id: str, directory: Path, label_set: LabelSet, settings: RouterSettings
) -> None:
    notes = json.loads((directory / "training.json").read_text())
    tracking.log_params(store, run_id, settings.model_dump(mode="json"))
    tracking.log_dataset(store, run_id, label_set.labels, name=f"labels {label_set.pair.name()}")
    tracking.log_metrics(store, run_id, {key: notes[key] for key in ("fit_seconds", "latency_ms")})
    tracking.client(store).log_artifact(run_id, str(directory / "predictions.parquet"), "win_rates")
    for step in notes["history"]:
        known = {name: value for name, value in step.items() if value is not None}
        tracking.log_metrics(store, run_id, known, step=int(known.pop("epoch")))
