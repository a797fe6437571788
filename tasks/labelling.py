"""Labels: from the scores of two LLMs' samples to how often the weak one suffices.

Labels are kept in Hybrid LLM's orientation (the probability that the weak LLM suffices); routers
are trained on the complement, the win rate.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from prefect import task

from conf.errors import DataError
from conf.llms import Pair
from conf.load import config_digest
from conf.schema import Labels
from router_models.relaxation import (
    Relaxation,
    deterministic_labels,
    optimal_relaxation,
    probabilistic_labels,
    transformed_labels,
)
from tasks.warehouse import Snapshot, Warehouse

KINDS = ("deterministic", "probabilistic", "transformed")


@dataclass(frozen=True)
class RatedQueries:
    """The queries on which a pair's routers are compared."""

    pair: Pair
    labels: Snapshot
    """query_key, query_id, text, domain, split, weak_quality, strong_quality, ordered by query_id;
    of a `LabelSet` also one column for each kind of label."""


@dataclass(frozen=True)
class LabelSet(RatedQueries):
    """The labels of one pair, and how they came about."""

    curve: Snapshot
    """t and objective: f(t) of the transformed labels."""
    t: float
    objective: float
    degenerate: bool
    unlabelled: int
    """Queries left out because a response or its score is missing."""


@task(task_run_name="label {pair.weak} against {pair.strong}")
def label_queries(
    warehouse: Warehouse,
    queries: Snapshot,
    scores: Snapshot,
    *,
    pair: Pair,
    metric: str,
    settings: Labels,
) -> LabelSet:
    """Turn the scores of a pair's responses into labels, and store them."""
    rows, weak, strong = paired_qualities(warehouse, queries, scores, pair=pair, metric=metric)
    # t* is chosen as training would choose it: without a look at the test queries.
    train = np.array([split != "test" for split in rows["split"].to_pylist()])
    relaxation = optimal_relaxation(weak[train], strong[train], pairing=settings.pairing)
    labels = _label_table(rows, weak, strong, relaxation, settings)
    snapshot = warehouse.write_snapshot("labels", labels)
    label_set = config_digest(
        [snapshot.digest, pair.name(), metric, relaxation.t, relaxation.objective]
    )
    _store(warehouse, label_set, labels, relaxation, pair=pair, metric=metric, settings=settings)
    t, objective = relaxation.thinned_curve()
    return LabelSet(
        pair=pair,
        labels=snapshot,
        curve=warehouse.write_snapshot("relaxation", pa.table({"t": t, "objective": objective})),
        t=relaxation.t,
        objective=relaxation.objective,
        degenerate=relaxation.degenerate,
        unlabelled=queries.rows - labels.num_rows,
    )


def paired_qualities(
    warehouse: Warehouse, queries: Snapshot, scores: Snapshot, *, pair: Pair, metric: str
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Return the completely scored queries and the qualities (N, S) and (N, L) of their samples.

    Raises DataError when no query has all its samples scored for both LLMs.
    """
    rows = warehouse.query(
        """
        WITH side AS (
            SELECT query_key, llm, list(value ORDER BY sample_index) AS quality
            FROM read_parquet($scores) WHERE metric = $metric AND llm IN ($weak, $strong)
            GROUP BY query_key, llm
        ),
        samples AS (SELECT llm, max(len(quality)) AS samples FROM side GROUP BY llm)
        SELECT q.query_key, query_id, text, domain, split, w.quality AS weak, s.quality AS strong
        FROM read_parquet($queries) q
        JOIN side w ON w.query_key = q.query_key AND w.llm = $weak
        JOIN side s ON s.query_key = q.query_key AND s.llm = $strong
        WHERE len(w.quality) = (SELECT samples FROM samples WHERE llm = $weak)
          AND len(s.quality) = (SELECT samples FROM samples WHERE llm = $strong)
        ORDER BY query_id
        """,
        {
            "scores": str(scores.path),
            "queries": str(queries.path),
            "metric": metric,
            "weak": pair.weak,
            "strong": pair.strong,
        },
    )
    if rows.num_rows == 0:
        raise DataError(
            f"No query has all its {metric!r} scores for both {pair.weak!r} and {pair.strong!r}. "
            "Expected every sample of both scored. Look at the failed responses (error column of "
            "the responses table) and run again."
        )

    def matrix(column: str) -> np.ndarray:
        values = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(rows.num_rows, -1)

    return rows, matrix("weak"), matrix("strong")


def _label_table(
    rows: pa.Table,
    weak: np.ndarray,
    strong: np.ndarray,
    relaxation: Relaxation,
    settings: Labels,
) -> pa.Table:
    labels = {
        "weak_quality": weak.mean(axis=1),
        "strong_quality": strong.mean(axis=1),
        "deterministic": deterministic_labels(weak, strong),
        "probabilistic": probabilistic_labels(weak, strong, pairing=settings.pairing),
        "transformed": transformed_labels(weak, strong, relaxation.t, pairing=settings.pairing),
    }
    table = rows.drop_columns(["weak", "strong"])
    for name, values in labels.items():
        table = table.append_column(name, pa.array(values))
    return table


def _store(
    warehouse: Warehouse,
    label_set: str,
    labels: pa.Table,
    relaxation: Relaxation,
    *,
    pair: Pair,
    metric: str,
    settings: Labels,
) -> None:
    kept = labels.select(["query_key", "weak_quality", "strong_quality", *KINDS])
    warehouse.ingest(
        "labels", kept.append_column("label_set", pa.array([label_set] * kept.num_rows))
    )
    found = {
        "label_set": label_set,
        "weak": pair.weak,
        "strong": pair.strong,
        "metric": metric,
        "pairing": settings.pairing,
        "t": relaxation.t,
        "objective": relaxation.objective,
        "degenerate": relaxation.degenerate,
    }
    warehouse.ingest("relaxations", pa.Table.from_pylist([found]))
