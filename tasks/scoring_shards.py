"""Scoring as shards on a Ray cluster: each is some whole calls of the scorer."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from conf.errors import StoreError
from conf.load import config_digest
from conf.schema import Compute, QualityMetric
from tasks.cluster import Lost, Resources, Shard, connected
from tasks.scoring import CHUNK, Scorer, metric_fingerprint, metric_scorer, scored
from tasks.shards import leave, left, locked, other_weights, shard_folder
from tasks.warehouse import Warehouse, table_digest

if TYPE_CHECKING:
    from prefect_ray.task_runners import PrefectRayFuture


@task(
    task_run_name="score with {metric.name}, shard {address}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def score_shard(
    address: str, rows: pa.Table, metric: QualityMetric, fingerprint: str, folder: Path
) -> None:
    """Score ``rows`` on this node, unless the shard's file is there already."""
    path = folder / f"{address}.parquet"
    if path.exists():
        return
    if metric_fingerprint(metric) != fingerprint:
        raise other_weights(metric.name)
    scorer = _scorer(metric)
    parts = [rows.slice(k, CHUNK) for k in range(0, rows.num_rows, CHUNK)]
    leave(path, pa.concat_tables(scored(part, scorer, metric, fingerprint) for part in parts))


@lru_cache(maxsize=1)
def _scorer(metric: QualityMetric) -> Scorer:
    """Return a metric's scorer, whose checkpoint stays loaded for the process's next shard."""
    return metric_scorer(metric)


def score_in_shards(
    warehouse: Warehouse,
    compute: Compute,
    missing: Path,
    metric: QualityMetric,
    fingerprint: str,
    advance: Callable[[int], None],
) -> None:
    """Score the responses in the Parquet file ``missing`` on the cluster, and ingest the scores.

    Raises TurnoutError when a shard's process keeps ending, and whatever the scorer raises.
    """
    root = shard_folder(warehouse, compute)
    folder = root / "scores"
    again: deque[Shard] = deque()
    with locked(root), connected(compute) as cluster:
        needed = cluster.with_gpu() if metric.metric == "bartscore" else Resources()

        def submit(shard: Shard, slot: int) -> "PrefectRayFuture[None]":
            parameters: dict[str, Any] = {"address": shard.address, "rows": shard.rows}
            parameters |= {"metric": metric, "fingerprint": fingerprint, "folder": folder}
            return cluster.submit(score_shard, parameters, needed)

        shards = _unscored_shards(missing, compute.shard_responses, fingerprint)
        for shard, outcome in cluster.work_through(
            submit, needed, slots=cluster.slots(needed), shards=shards, again=again
        ):
            path = folder / f"{shard.address}.parquet"
            if isinstance(outcome, Lost) and not path.exists():
                again.append(cluster.another_try(shard, outcome))
                continue
            scores = left(path)
            if scores.num_rows != shard.rows.num_rows:
                raise StoreError(
                    f"The shard's file {path} holds {scores.num_rows} scores. Expected "
                    f"{shard.rows.num_rows}. Delete it and run again."
                )
            warehouse.ingest("scores", scores)
            path.unlink()
            advance(scores.num_rows)


def _unscored_shards(missing: Path, size: int, fingerprint: str) -> Iterator[Shard]:
    """Yield the rows in shards of whole calls of the scorer: it is called as in one process."""
    calls = -(-size // CHUNK)
    with pq.ParquetFile(missing) as file:
        for batch in file.iter_batches(calls * CHUNK):
            rows = pa.Table.from_batches([batch])
            yield Shard(f"{table_digest(rows)}-{config_digest([fingerprint])}", rows)
