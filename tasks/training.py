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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task

from conf.errors import DataError, StoreError
from conf.load import config_digest
from conf.routers import Router as RouterSettings
from conf.schema import Evaluation, Store
from router_models.catalog import Router, build_router
from router_models.encoders import encoder_fingerprint
from router_models.training_data import Comparisons, same_prompt
from tasks import tracking
from tasks.labelling import RatedQueries
from tasks.preferences import comparisons
from tasks.progress import progress
from tasks.warehouse import Snapshot, Warehouse

SPLITS = ("train", "validation", "test")
VALIDATION_PERCENT = 15
NOTES = "training.json"
EMBEDDINGS = "embeddings"
PREDICTIONS = "predictions.parquet"
# On a router's run: the digest of the training it describes, which its folder is called after.
TRAINING_TAG = "turnout.training_digest"
# Stands for the kind of label where there is none.
BATTLES = "battles"
# Column of queries: the text that a near copy of it counts as when queries are divided.
COPY = "copy_of"


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
    labels: str
    """The kind of label it learnt from, or `BATTLES`."""


@task(task_run_name="train {settings.name}")
def train_router(
    store: Store,
    queries: RatedQueries,
    settings: RouterSettings,
    *,
    evaluation: Evaluation,
    seed: int,
    parent_id: str,
    battles: Snapshot | None = None,
    served: bool = True,
) -> TrainedRouter:
    """Train a router, or take it up as it was trained on the same data, and log it.

    battles: preference rows to learn from; by default the labels of ``queries`` themselves.
    served: whether, out of fold, the form trained on everything is wanted too.
    """
    tags = {"turnout.pair": queries.pair.name(), "turnout.kind": settings.router}
    with tracking.child_run(store, parent_id, settings.name, tags=tags) as run_id:
        digest = training_digest(queries, settings, evaluation, seed, battles, served)
        tracking.set_tags(store, run_id, {TRAINING_TAG: digest})
        directory = store.directory / "training" / digest
        reused = directory.exists()
        if not reused:
            data = training_data(queries, settings, battles)
            lessons = _lessons(queries, data, battles, evaluation)
            _train_into(directory, queries, settings, lessons, seed=seed, served=served)
        predictions = Warehouse(store.directory).write_snapshot(
            "predictions", _kept_predictions(directory)
        )
        labels = settings.labels if battles is None else BATTLES
        params = settings.model_dump(mode="json") | {"labels": labels}
        _log(store, run_id, directory, queries, params)
        if battles is not None:
            tracking.log_dataset(store, run_id, battles, name=f"battles {queries.pair.name()}")
    return TrainedRouter(
        name=settings.name,
        settings=settings,
        run_id=run_id,
        directory=(directory / "router").resolve(),
        predictions=predictions,
        digest=digest,
        reused=reused,
        labels=labels,
    )


def training_digest(
    queries: RatedQueries,
    settings: RouterSettings,
    evaluation: Evaluation,
    seed: int,
    battles: Snapshot | None = None,
    served: bool = True,
) -> str:
    """Return the address of a training: equal digests would train bit-identical routers."""
    given = settings.model_dump(mode="json")
    encoders = [given["encoder"]] if "encoder" in given else given.get("encoders", [])
    return config_digest(
        [
            given,
            [encoder_fingerprint(name) for name in encoders],
            queries.pair.name(),
            queries.labels.digest,
            None if battles is None else battles.digest,
            [evaluation.min_test_queries, evaluation.folds, evaluation.fold_seed, served],
            seed,
            _code_digest(),
        ]
    )


@cache
def _code_digest() -> str:
    models = Path(__file__).parent.parent / "router_models"
    sources = [*sorted(models.glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def training_data(
    queries: RatedQueries, settings: RouterSettings, battles: Snapshot | None
) -> Comparisons:
    """Return the battles, or the labelled queries of the router's own kind of label.

    The win rate is 1 − label.
    """
    pair = queries.pair
    if battles is not None:
        return comparisons(battles.read(), weak=pair.weak, strong=pair.strong)
    labels = queries.labels.read()
    return Comparisons.from_win_rates(
        labels["text"].to_pylist(),
        1.0 - labels[settings.labels].to_numpy(),
        weak=pair.weak,
        strong=pair.strong,
        weak_quality=labels["weak_quality"].to_numpy(),
        strong_quality=labels["strong_quality"].to_numpy(),
    )


@dataclass(frozen=True)
class Lesson:
    """What a router learns from, watches for early stopping, and is to predict (label rows)."""

    train: Comparisons
    validation: Comparisons
    predicted: np.ndarray


def _lessons(
    queries: RatedQueries, data: Comparisons, battles: Snapshot | None, evaluation: Evaluation
) -> list[Lesson]:
    """Return one lesson for each evaluation fold and, out of fold, a last one on everything."""
    labels = queries.labels.read()
    folds = evaluation_folds(labels, evaluation)
    if len(folds) > 1:
        folds.append(everything(labels))
    if battles is None:
        return [
            Lesson(data.take(fold.train), data.take(fold.validation), fold.predicted)
            for fold in folds
        ]
    query_texts, battle_texts = (
        [same_prompt(text) for text in texts]
        for texts in (labels["text"].to_pylist(), data.prompts)
    )
    watched = _watched(battle_texts)
    lessons = []
    for fold in folds:
        hidden = {query_texts[row] for row in fold.predicted}
        seen = np.array([text not in hidden for text in battle_texts])
        parts = [np.flatnonzero(seen & ~watched), np.flatnonzero(seen & watched)]
        if min(map(len, parts)) == 0:
            raise DataError(
                f"Of {len(battle_texts)} battles {seen.sum()} are on prompts that are not evaluated"
                ", too few to train on and to watch. Expected some of both. Add battles on other "
                "prompts."
            )
        lessons.append(Lesson(data.take(parts[0]), data.take(parts[1]), fold.predicted))
    return lessons


def _train_into(
    directory: Path,
    queries: RatedQueries,
    settings: RouterSettings,
    lessons: Sequence[Lesson],
    *,
    seed: int,
    served: bool,
) -> None:
    """Train into ``directory``, which appears only when everything in it is complete.

    The last lesson makes the router that is kept; with one lesson it makes the predictions too.
    """
    labels = queries.labels.read()
    texts = labels["text"].to_pylist()
    *folds, final = lessons
    # Folds and routers embed the same texts. Where the cache lies is nothing that a router keeps.
    cache = {"encoder_cache": directory.parent.parent / EMBEDDINGS}
    embeds = settings.model_dump().get("encoder_cache", "") is None
    with_cache = settings.model_copy(update=cache) if embeds else settings
    holdout = not folds
    unfinished = directory.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)

    def fitted(lesson: Lesson, name: str) -> Router:
        router = build_router(with_cache)
        return router.fit(lesson.train, lesson.validation, seed=seed, directory=unfinished / name)

    def predicted(router: Router, rows: np.ndarray) -> np.ndarray:
        return router.win_rate([texts[row] for row in rows])

    rows = np.concatenate([lesson.predicted for lesson in lessons])
    with progress(f"Training {settings.name}", len(folds) + (served or holdout)) as advance:
        unseen = []
        for number, fold in enumerate(folds):
            kept = unfinished / f"unseen-{number}.npy"
            if not kept.exists():  # a killed training goes on with the fold it was in
                partial = unfinished / f"partial-{number}.npy"
                started = time.monotonic()
                router = fitted(fold, f"fold-{number}")
                seconds = time.monotonic() - started
                notes = {"fit_seconds": seconds, "latency_ms": latency_ms(router, texts)}
                _write_notes(unfinished, {**notes, "history": router.history_})
                np.save(partial, predicted(router, fold.predicted))
                partial.rename(kept)
            unseen.append(np.load(kept))
            advance(1)
        columns = {} if holdout else {"win_rate": np.concatenate(unseen)}
        if served or holdout:
            started = time.monotonic()
            router = fitted(final, "final")
            notes = {"fit_seconds": time.monotonic() - started}
            advance(1)
            router.config = settings
            router.save(unfinished / "router")
            columns["served_win_rate"] = predicted(router, rows)
            columns.setdefault("win_rate", columns["served_win_rate"])
            notes["latency_ms"] = latency_ms(router, texts)
            _write_notes(unfinished, {**notes, "history": router.history_})
    predictions = pa.table({"query_key": labels["query_key"].take(rows), **columns})
    pq.write_table(predictions, unfinished / PREDICTIONS)
    for leftover in [*unfinished.glob("unseen-*.npy"), *unfinished.glob("fold-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    unfinished.rename(directory)


def _write_notes(directory: Path, notes: dict[str, Any]) -> None:
    (directory / NOTES).write_text(json.dumps(notes, indent=2))


def _kept_predictions(directory: Path) -> pa.Table:
    try:
        json.loads((directory / NOTES).read_text())
        return pq.read_table(directory / PREDICTIONS)
    except (OSError, ValueError) as error:  # pyarrow's errors and JSON's are ValueErrors
        raise StoreError(
            f"The trained router in {directory} cannot be read: {error}. Expected what an earlier "
            "run wrote. Delete the folder and run again: it is trained anew."
        ) from error


def evaluation_folds(labels: pa.Table, evaluation: Evaluation) -> list[Fold]:
    """Return one fold that predicts the test split, or, where that is small, one for each part.

    A query's part comes from a hash of its text, as does whether it is watched for early stopping,
    so that equal prompts are never on both sides; where the column `COPY` says of which text it is
    a copy, of that. Raises DataError when a part would be empty.
    """
    split = np.array(labels["split"].to_pylist())
    if np.sum(split == "test") >= evaluation.min_test_queries:
        return [Fold(*(np.flatnonzero(split == name) for name in SPLITS))]
    column = COPY if COPY in labels.column_names else "text"
    texts = [same_prompt(text) for text in labels[column].to_pylist()]
    part = _hashed(texts, f"fold {evaluation.fold_seed}") % evaluation.folds
    watched = _watched(texts)
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
    watched = _watched([same_prompt(text) for text in labels["text"].to_pylist()])
    return Fold(np.flatnonzero(~watched), np.flatnonzero(watched), np.array([], dtype=np.int64))


def _watched(texts: Sequence[str]) -> np.ndarray:
    return _hashed(texts, "validation") % 100 < VALIDATION_PERCENT


def _hashed(texts: Sequence[str], purpose: str) -> np.ndarray:
    digests = [hashlib.sha256(f"{purpose} {text}".encode()).digest()[:4] for text in texts]
    return np.frombuffer(b"".join(digests), dtype=">u4").astype(np.int64)


def latency_ms(router: Router, prompts: Sequence[str], *, calls: int = 20) -> float:
    """Return the median time that a win rate for one new query takes, in milliseconds."""
    times = []
    for prompt in prompts[:calls]:
        unseen = f"{prompt} {time.time_ns()}"  # no cache may know it
        started = time.perf_counter()
        router.win_rate([unseen])
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def timings(router: TrainedRouter) -> dict[str, float]:
    """Return fit_seconds of the last fit, and latency_ms of a query by itself."""
    notes = json.loads((router.directory.parent / NOTES).read_text())
    return {key: notes[key] for key in ("fit_seconds", "latency_ms")}


def _log(
    store: Store, run_id: str, directory: Path, queries: RatedQueries, params: dict[str, Any]
) -> None:
    notes = json.loads((directory / NOTES).read_text())
    tracking.log_params(store, run_id, params)
    tracking.log_dataset(store, run_id, queries.labels, name=f"labels {queries.pair.name()}")
    tracking.log_metrics(store, run_id, {key: notes[key] for key in ("fit_seconds", "latency_ms")})
    tracking.client(store).log_artifact(run_id, str(directory / PREDICTIONS), "win_rates")
    for step in notes["history"]:
        known = {name: value for name, value in step.items() if value is not None}
        tracking.log_metrics(store, run_id, known, step=int(known.pop("epoch")))
