"""Quality: every response gets a score under every configured metric, once per fingerprint.

A score is stored with the fingerprint of what made it (checkpoint, direction, lengths, code), so
scores of two scorers never mix. What is scored is not scored again.
"""

import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task

from conf.errors import DataError
from conf.load import config_digest
from conf.schema import LOCAL, BartScore, Compute, GoldMatch, QualityMetric
from router_models.packaged import smollm2_gguf
from tasks.progress import progress
from tasks.warehouse import Snapshot, Warehouse

BARTSCORE = Path(__file__).parent.parent / "metrics" / "bartscore"
CHUNK = 1000  # responses scored in one call
# Scores are written once so much time has passed: what a killed run may have to redo. A write takes
# a tenth of a second, whether of ten scores or ten thousand.
WRITE_S = 5.0
GOLD_MATCH_VERSION = 1

# From rows with text, query, reference and gold to one score each.
Scorer = Callable[[pa.Table], Sequence[float] | np.ndarray]


@task(task_run_name="score responses")
def score_responses(
    warehouse: Warehouse,
    queries: Snapshot,
    responses: Snapshot,
    settings: Sequence[QualityMetric],
    compute: Compute = LOCAL,
) -> Snapshot:
    """Score every response under every metric; return query_key, llm, sample_index, metric, value.

    Raises DataError when a query lacks what a metric compares with: a metric that made labels from
    some of the queries only would say nothing about the others.
    """
    for metric in settings:
        fingerprint = metric_fingerprint(metric)
        with _unscored(warehouse, queries, responses, fingerprint) as missing:
            _score(warehouse, missing, metric, fingerprint, compute)
    scores = (part for metric in settings for part in _scores(warehouse, responses, metric))
    return warehouse.write_snapshot("scores", scores)


def _scores(warehouse: Warehouse, responses: Snapshot, metric: QualityMetric) -> Iterator[pa.Table]:
    return warehouse.parts(
        """
        SELECT r.query_key, r.llm, r.sample_index, $metric AS metric, s.value
        FROM read_parquet($responses) r JOIN scores s ON s.fingerprint = $fingerprint
        AND s.query_key = r.query_key AND s.prompt_id = r.prompt_id
        AND s.sample_index = r.sample_index
        ORDER BY r.query_key, r.llm, r.sample_index
        """,
        {
            "responses": str(responses.path),
            "fingerprint": metric_fingerprint(metric),
            "metric": metric.name,
        },
    )


@contextmanager
def _unscored(
    warehouse: Warehouse, queries: Snapshot, responses: Snapshot, fingerprint: str
) -> Iterator[Path]:
    """Yield a Parquet file of what has no score yet: all its texts need not fit in memory."""
    with TemporaryDirectory(dir=warehouse.directory) as folder:
        path = Path(folder, "unscored.parquet")
        warehouse.write_query(
            path,
            """
            SELECT r.query_key, r.prompt_id, r.sample_index, r.text, q.query_id, q.reference,
                   q.gold, q.text AS query
            FROM read_parquet($responses) r JOIN read_parquet($queries) q USING (query_key)
            ANTI JOIN scores s ON s.fingerprint = $fingerprint AND s.query_key = r.query_key
            AND s.prompt_id = r.prompt_id AND s.sample_index = r.sample_index
            ORDER BY q.position, r.prompt_id, r.sample_index
            """,
            {
                "responses": str(responses.path),
                "queries": str(queries.path),
                "fingerprint": fingerprint,
            },
        )
        yield path


def _score(
    warehouse: Warehouse, missing: Path, metric: QualityMetric, fingerprint: str, compute: Compute
) -> None:
    rows = pq.read_metadata(missing).num_rows
    if rows == 0:
        return
    compared_with = "gold" if isinstance(metric, GoldMatch) else "reference"
    _refuse_missing(warehouse, missing, compared_with, metric)
    with progress(f"Scoring with {metric.name}", rows) as advance:
        if compute.kind == "ray":
            from tasks.scoring_shards import score_in_shards

            score_in_shards(warehouse, compute, missing, metric, fingerprint, advance)
            return
        scorer = metric_scorer(metric)
        with _written_in_time(warehouse, "scores") as write:
            for chunk in _chunks(missing):
                write(scored(chunk, scorer, metric, fingerprint))
                advance(chunk.num_rows)


def scored(chunk: pa.Table, scorer: Scorer, metric: QualityMetric, fingerprint: str) -> pa.Table:
    """Return rows of the scores table for a chunk of responses."""
    values = np.asarray(scorer(chunk), dtype=np.float64)
    scores = chunk.select(["query_key", "prompt_id", "sample_index"])
    for name, column in {
        "fingerprint": [fingerprint] * len(values),
        "metric": [metric.name] * len(values),
        "value": values,
    }.items():
        scores = scores.append_column(name, pa.array(column))
    return scores


@contextmanager
def _written_in_time(warehouse: Warehouse, table: str) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that stores rows, those of quick calls together, and all in the end."""
    waiting: list[pa.Table] = []
    written = time.monotonic()

    def flush() -> None:
        nonlocal written
        if waiting:
            warehouse.ingest(table, pa.concat_tables(waiting))
            waiting.clear()
        written = time.monotonic()

    def write(rows: pa.Table) -> None:
        waiting.append(rows)
        if time.monotonic() - written >= WRITE_S:
            flush()

    try:
        yield write
    finally:
        flush()


def _chunks(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK):
            yield pa.Table.from_batches([batch])


def _refuse_missing(
    warehouse: Warehouse, missing: Path, column: str, metric: QualityMetric
) -> None:
    found = warehouse.query(
        f"SELECT query_id FROM read_parquet($missing) WHERE coalesce(len({column}), 0) = 0 LIMIT 1",
        {"missing": str(missing)},
    )
    for query_id in found["query_id"].to_pylist():
        raise DataError(
            f"Query {query_id!r} has no {column}, which {metric.name!r} compares responses "
            f"with. Expected one for every query. Add it, or take {metric.name!r} out of "
            "quality.metrics."
        )


def metric_fingerprint(metric: QualityMetric) -> str:
    """Return what two scores must share to be comparable."""
    if isinstance(metric, GoldMatch):
        return f"gold_match:{GOLD_MATCH_VERSION}"
    from metrics.bartscore.likelihood import ScorerSpec

    spec = ScorerSpec(direction=metric.direction, **_scorer_options(metric))
    return f"{spec.fingerprint()}:{config_digest([metric.source_form])}"


def metric_scorer(metric: QualityMetric) -> Scorer:
    """Return the scorer of a metric."""
    return gold_scorer if isinstance(metric, GoldMatch) else bartscorer(metric)


def gold_scorer(rows: pa.Table) -> list[float]:
    """Score responses by their gold answers."""
    return gold_match(rows["text"].to_pylist(), rows["gold"].to_pylist())


def bartscorer(settings: BartScore) -> Scorer:
    """Return BARTScore under these settings; it keeps its checkpoint loaded between calls."""
    import evaluate

    module = evaluate.load(str(BARTSCORE), keep_in_memory=True)
    options = _scorer_options(settings)

    def score(rows: pa.Table) -> np.ndarray:
        queries = rows["query"].to_pylist()
        plain = {"response": rows["text"].to_pylist(), "reference": rows["reference"].to_pylist()}

        def one_way(source: str, target: str) -> np.ndarray:
            formed = [
                settings.source_form.format(query=query, text=text)
                for query, text in zip(queries, plain[source], strict=True)
            ]
            texts = {**plain, source: formed}
            found = module.compute(
                predictions=texts["response"],
                references=texts["reference"],
                direction=f"{source}_to_{target}",
                **options,
            )
            return np.array(found["scores"])

        if settings.direction != "f":
            source, _, target = settings.direction.partition("_to_")
            return one_way(source, target)
        return (one_way("reference", "response") + one_way("response", "reference")) / 2

    return score


def _scorer_options(settings: BartScore) -> dict[str, Any]:
    """Return the metric's own arguments, packaged weights as their file."""
    options = settings.model_dump(exclude={"metric", "name", "direction", "source_form"})
    return options | {"checkpoint": scorer_checkpoint(settings)}


def scorer_checkpoint(settings: BartScore) -> str:
    """Return the checkpoint as the metric takes it, packaged weights as their file."""
    packaged = settings.checkpoint == "smollm2-135m"
    return str(smollm2_gguf()) if packaged else settings.checkpoint


def gold_match(responses: Sequence[str], gold: Sequence[Sequence[str]]) -> list[float]:
    """Return 1.0 where the response holds one of its gold answers as whole words, else 0.0.

    Case, accents and punctuation are ignored.

    >>> gold_match(["It is São Paulo!", "Rio"], [["Sao Paulo"], ["Rio Branco"]])
    [1.0, 0.0]
    """
    return [
        float(any(f" {_words(answer)} " in f" {_words(response)} " for answer in answers))
        for response, answers in zip(responses, gold, strict=True)
    ]


def _words(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(char for char in decomposed if not unicodedata.combining(char))
    return " ".join(re.findall(r"[^\W_]+", plain))
