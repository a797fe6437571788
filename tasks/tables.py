"""A look into the warehouse: what tables there are, their first rows, and read-only queries.

The file is opened for reading only. While a run writes it nobody else can open it; the rows of a
table are then those of the newest snapshot that the run has made of it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import ConfigError, StoreError, unknown_name
from tasks.warehouse import LockedError, Warehouse

ROW_IS = {
    "queries": "a question, its reference, its gold answers",
    "query_sets": "a question's place and split in a set",
    "prompts": "what one LLM is asked for one question",
    "responses": "one answer: text, tokens, price, or error",
    "scores": "one answer's quality under one scorer",
    "labels": "how often the weak LLM does for a question",
    "relaxations": "a label set: its pair, metric and t*",
    "preferences": "a battle of two LLMs on one prompt",
    "schema_version": "a migration of these tables",
}


@dataclass(frozen=True)
class TableSummary:
    """One table: how much is in it, and what a row of it is."""

    name: str
    rows: int
    bytes: int
    """Of the blocks that hold its columns; indexes are not counted."""
    row_is: str


@dataclass(frozen=True)
class Rows:
    """Rows to look at."""

    source: str
    """The table or snapshot that they are from."""
    table: pa.Table
    note: str = ""

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as plain JSON values; times in ISO 8601."""
        return list(json.loads(json.dumps(self.table.to_pylist(), default=str)))

    def to_json(self) -> dict[str, Any]:
        """Return rows, source and note as plain JSON values."""
        return {"source": self.source, "note": self.note, "rows": self.records()}


def summaries(warehouse: Warehouse) -> list[TableSummary]:
    """Return every table of the warehouse, in the order in which a run fills them."""
    with warehouse.reading() as con:
        names = _names(con)
        block = int(con.sql("SELECT block_size FROM pragma_database_size()").fetchall()[0][0])
        found = []
        for name in names:
            rows = con.sql(f"SELECT count(*) FROM {name}").fetchall()[0][0]
            blocks = con.sql(
                "SELECT count(DISTINCT block_id) FROM pragma_storage_info($table) "
                "WHERE block_id >= 0",
                params={"table": name},
            ).fetchall()[0][0]
            found.append(TableSummary(name, int(rows), int(blocks) * block, ROW_IS.get(name, "")))
    return found


def _names(con: duckdb.DuckDBPyConnection) -> list[str]:
    there = {row[0] for row in con.sql("SELECT table_name FROM duckdb_tables()").fetchall()}
    return [name for name in ROW_IS if name in there] + sorted(there - ROW_IS.keys())


def first_rows(warehouse: Warehouse, name: str, *, limit: int) -> Rows:
    """Return the first rows of a table, or of its newest snapshot while the file is being written.

    Raises ConfigError for an unknown table, LockedError when no snapshot can stand in.
    """
    _check_limit(limit)
    try:
        with warehouse.reading() as con:
            if name not in _names(con):
                raise ConfigError(
                    unknown_name("table", name, _names(con)) + " Name one of these, or leave the "
                    "name out to see them all."
                )
            rows = con.sql(f"SELECT * FROM {name} LIMIT {limit}").to_arrow_table()
            return Rows(source=name, table=rows)
    except LockedError as error:
        newest = newest_snapshot(warehouse, name)
        if newest is None:
            raise _locked(warehouse, error) from error
        note = f"The warehouse is being written; these rows are from the snapshot {newest}."
        return Rows(source=str(newest), table=_head(newest, limit), note=note)


def newest_snapshot(warehouse: Warehouse, name: str) -> Path | None:
    """Return the snapshot of a table that a stage made or came to last, if there is one."""
    found = (warehouse.directory / "snapshots").glob(f"{name}-*.parquet")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _head(path: Path, limit: int) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            batch = next(file.iter_batches(limit), None)
            return file.schema_arrow.empty_table() if batch is None else pa.table(batch)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"The snapshot {path} cannot be read: {error}. Expected Parquet. Delete it: the next "
            "run makes it anew."
        ) from error


def selected(warehouse: Warehouse, sql: str, *, limit: int) -> Rows:
    """Return the first rows that one SELECT gives.

    Raises ConfigError for anything but one SELECT, and for one that DuckDB refuses.
    """
    _check_limit(limit)
    try:
        with warehouse.reading() as con:
            _check_select(con, sql)
            return Rows(source=sql, table=con.sql(sql).limit(limit).to_arrow_table())
    except LockedError as error:
        raise _locked(warehouse, error) from error
    except duckdb.Error as error:
        raise ConfigError(
            f"--sql {sql!r} cannot be run: {error} Expected one SELECT over the tables that "
            "`turnout tables` lists. Correct it."
        ) from error


def _check_select(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    kinds = [statement.type.name for statement in con.extract_statements(sql)]
    if kinds != ["SELECT"]:
        raise ConfigError(
            f"--sql {sql!r} holds {', '.join(kinds) or 'no statement'}. Expected one SELECT: the "
            "warehouse is only looked into here. Ask for rows, or change them in a copy."
        )


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ConfigError(
            f"--limit is {limit}. Expected a number of rows above 0. Leave it out for 5."
        )


def _locked(warehouse: Warehouse, error: LockedError) -> LockedError:
    folder = warehouse.directory / "snapshots"
    return LockedError(f"{error} Meanwhile the Parquet files in {folder} can be read, by any tool.")


def as_json(found: Sequence[TableSummary]) -> dict[str, Any]:
    """Return the summaries as plain JSON values."""
    return {"tables": [asdict(table) for table in found]}


def as_text(found: Sequence[TableSummary]) -> list[dict[str, str]]:
    """Return the summaries as text, one row each."""
    return [
        {
            "table": table.name,
            "rows": f"{table.rows:,}",
            "size": size(table.bytes),
            "a row is": table.row_is,
        }
        for table in found
    ]


def size(count: float) -> str:
    """Return a number of bytes for people.

    >>> size(0), size(262144), size(3 * 2**30)
    ('0 B', '256 KiB', '3 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
