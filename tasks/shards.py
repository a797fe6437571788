"""Shards of a stage on a Ray cluster: the folder that all nodes share, and what lies in it.

A shard is a slice of what is missing, under a hash of its content. Its task runs on any node, is
given its rows by value, and leaves a Parquet file under its address in the shared folder. Only the
run's own process opens the warehouse: it ingests a shard's file as the shard ends, and deletes it
then; what a killed run left there is ingested by the next.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import ArtifactError, StoreError
from conf.schema import Compute
from tasks.journal import ingest_responses, recover_journals
from tasks.warehouse import Warehouse


def shard_folder(warehouse: Warehouse, compute: Compute) -> Path:
    """Return the folder that all nodes share."""
    return (compute.directory or warehouse.directory / "shards").resolve()


def recover_shards(warehouse: Warehouse, compute: Compute) -> None:
    """Ingest and delete what the shards of a killed run left, unless a run is still at work."""
    folder = shard_folder(warehouse, compute)
    if not folder.is_dir():
        return
    with locked(folder, alone=True) as alone:
        if not alone:
            return
        for path in sorted(folder.glob("responses/*.parquet")):
            ingest_responses(warehouse, left(path))
            path.unlink()
        recover_journals(warehouse, folder / "responses")
        for path in sorted(folder.glob("scores/*.parquet")):
            warehouse.ingest("scores", left(path))
            path.unlink()
        for path in (*folder.glob("*/*.tmp"), *folder.glob("*/*.stop")):
            path.unlink()


@contextmanager
def locked(folder: Path, *, alone: bool = False) -> Iterator[bool]:
    """Yield whether the folder could be locked: for this run among others, or for it alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
        else:
            yield True


def left(path: Path) -> pa.Table:
    """Return the rows that a shard left; raises StoreError where they are not to be seen here."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"The shard's file {path} cannot be read: {error}. Expected a folder that this machine "
            "and all nodes of the Ray cluster share under one path. Set compute.directory to one, "
            "and run again: what is finished is kept."
        ) from error


def leave(path: Path, rows: pa.Table) -> None:
    """Write a shard's file so that it is there whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}-{time.time_ns()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, unfinished)
        unfinished.rename(path)
    except OSError as error:
        raise StoreError(
            f"The shard's file {path} cannot be written: {error}. Expected room, and a folder that "
            "all nodes of the Ray cluster share under one path. Set compute.directory to one, and "
            "run again: what is finished is kept."
        ) from error


def other_weights(name: str) -> ArtifactError:
    return ArtifactError(
        f"The weights of {name!r} on the node {os.uname().nodename} are others than where the run "
        "was started. Expected the same on every node of the Ray cluster. Copy them there."
    )
