"""The journal: responses are on disk the moment they arrive, and in the warehouse a little later.

One JSON line for each request's responses, in one write. A journal is deleted only after its rows
are committed; one that a living process still writes to is locked and left alone.
"""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf.errors import StoreError
from tasks.warehouse import Warehouse

Row = dict[str, Any]
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("llm", pa.string(), nullable=False),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("billed_usd", pa.float64()),
        ("latency_ms", pa.float64()),
        ("seed", pa.int64()),
        ("error", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
BATCH_ROWS = 20_000

_log = logging.getLogger(__name__)


@contextmanager
def open_journal(warehouse: Warehouse) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yield a function that writes down rows of the responses table, durable when it returns.

    Durable against the end of this process in any way; raises StoreError when the disk is full.
    """
    with new_journal(_directory(warehouse)) as file:
        yield partial(append, file)


@contextmanager
def new_journal(directory: Path, prefix: str = "") -> Iterator[FileIO]:
    """Yield a new file in ``directory``, locked: as long as it is open, nobody recovers it."""
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        path = directory / f"{prefix}{time.time_ns()}-{os.getpid()}.jsonl"
        with FileIO(path, "x") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Between opening and locking another process may have recovered and deleted it.
            if path.exists():
                yield file
                return


def append(file: FileIO, rows: Sequence[Row]) -> None:
    """Write down ``rows`` as one line of a journal; raises StoreError when the disk is full."""
    line = json.dumps(list(rows)).encode() + b"\n"
    start = file.tell()
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        file.truncate(start)  # so that a later line does not continue half of this one
        file.seek(start)
        raise StoreError(
            f"Writing {file.name} failed: {error}. Expected room on the disk. Free some "
            "space and run again; what was received before is kept."
        ) from error


def recover_journals(warehouse: Warehouse, directory: Path | None = None) -> int:
    """Ingest every journal that no process is writing; return how many rows were new.

    directory: where the journals lie; by default the warehouse's own.
    """
    folder = _directory(warehouse) if directory is None else directory
    return sum(_recover(warehouse, path) for path in sorted(folder.glob("*.jsonl")))


def response_table(rows: Sequence[Row]) -> pa.Table:
    """Return rows as a journal is given them as rows of the responses table, latest ones only."""
    dated = [{**row, "created_at": datetime.fromisoformat(row["created_at"])} for row in rows]
    return _latest(dated)


def written_table(paths: Sequence[Path]) -> pa.Table:
    """Return what journals hold so far, damaged lines left out; the files stay as they are."""
    lines = (line for path in paths for line in path.read_bytes().splitlines(keepends=True))
    parsed = (_parsed(line) for line in lines if line.endswith(b"\n"))
    return _latest([row for rows in parsed if rows is not None for row in rows])


def _recover(warehouse: Warehouse, path: Path) -> int:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the with statement below
    except FileNotFoundError:
        return 0  # another process was quicker
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        new = 0
        batch: list[Row] = []
        damaged = []
        for line in file:
            if not line.endswith(b"\n"):
                break  # cut off by a kill, before anyone was told that it was kept
            rows = _parsed(line)
            if rows is None:
                damaged.append(line)
                continue
            batch += rows
            if len(batch) >= BATCH_ROWS:
                new += _ingest(warehouse, batch)
                batch = []
        new += _ingest(warehouse, batch)
        if damaged:
            _set_aside(path, damaged)
        path.unlink(missing_ok=True)
    return new


def _ingest(warehouse: Warehouse, rows: Sequence[Row]) -> int:
    return ingest_responses(warehouse, _latest(rows))


def _latest(rows: Sequence[Row]) -> pa.Table:
    """Return one row for each address: what comes after a failure, or else the first."""
    latest: dict[tuple[str, int], Row] = {}
    for row in rows:
        address = row["prompt_id"], row["sample_index"]
        if address not in latest or latest[address].get("error") is not None:
            latest[address] = row
    return pa.Table.from_pylist(list(latest.values()), schema=SCHEMA)


def ingest_responses(warehouse: Warehouse, arrived: pa.Table) -> int:
    """Add responses, one for each address; return how many were new.

    What comes after a failure takes its place, and nothing that of an answer.
    """
    if arrived.num_rows == 0:
        return 0
    with warehouse.connection() as con:
        con.register("arrived", arrived)
        con.execute(
            "DELETE FROM responses WHERE error IS NOT NULL AND (prompt_id, sample_index) IN "
            "(SELECT prompt_id, sample_index FROM arrived)"
        )
        added = con.execute("INSERT OR IGNORE INTO responses BY NAME SELECT * FROM arrived")
        return int(added.fetchall()[0][0])


def _parsed(line: bytes) -> list[Row] | None:
    """Return the line's rows, or None if it does not hold rows of the table."""
    try:
        rows = [
            {**row, "created_at": datetime.fromisoformat(row["created_at"])}
            for row in json.loads(line)
        ]
        pa.Table.from_pylist(rows, schema=SCHEMA).validate(full=True)
    except (ValueError, TypeError, LookupError, pa.ArrowException):
        return None
    required = [field.name for field in SCHEMA if not field.nullable]
    complete = all(row.get(name) is not None for row in rows for name in required)
    return rows if rows and complete else None


def _set_aside(path: Path, damaged: Sequence[bytes]) -> None:
    aside = path.with_suffix(".damaged")
    aside.write_bytes(b"".join(damaged))
    _log.warning("%d lines of %s are no responses; they lie in %s", len(damaged), path, aside)


def _directory(warehouse: Warehouse) -> Path:
    return warehouse.directory / "journal"
