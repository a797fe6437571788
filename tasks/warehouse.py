"""The warehouse: one DuckDB file for every intermediate table, one writer, Parquet for readers.

While one process writes a DuckDB file no other can open it, not even to read. So connections are
short, and what is handed from stage to stage is a `Snapshot`: an immutable Parquet file named by
the digest of its rows.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import StoreError

# One entry per schema version, oldest first; never edit an entry that has been released.
MIGRATIONS = (
    """
    CREATE TABLE queries (
        query_key VARCHAR PRIMARY KEY,  -- hash of everything else in the row
        query_id VARCHAR NOT NULL, text VARCHAR NOT NULL, reference VARCHAR, gold VARCHAR[],
        context VARCHAR, domain VARCHAR
    );
    CREATE TABLE query_sets (
        query_set VARCHAR, position INTEGER, query_key VARCHAR, split VARCHAR NOT NULL,
        PRIMARY KEY (query_set, query_key)
    );
    CREATE TABLE prompts (
        query_key VARCHAR, llm VARCHAR,
        prompt_id VARCHAR,  -- hash of model, template, decoding and rendered prompt
        PRIMARY KEY (query_key, llm, prompt_id)
    );
    CREATE TABLE responses (
        prompt_id VARCHAR, sample_index INTEGER, llm VARCHAR NOT NULL, text VARCHAR,
        finish_reason VARCHAR, prompt_tokens INTEGER, completion_tokens INTEGER, billed_usd DOUBLE,
        latency_ms DOUBLE, seed BIGINT, error VARCHAR, created_at TIMESTAMPTZ,
        PRIMARY KEY (prompt_id, sample_index)
    );
    CREATE TABLE scores (
        fingerprint VARCHAR, query_key VARCHAR, prompt_id VARCHAR, sample_index INTEGER,
        metric VARCHAR NOT NULL, value DOUBLE NOT NULL,
        PRIMARY KEY (fingerprint, query_key, prompt_id, sample_index)
    );
    CREATE TABLE labels (
        label_set VARCHAR, query_key VARCHAR, weak_quality DOUBLE, strong_quality DOUBLE,
        deterministic DOUBLE, probabilistic DOUBLE, transformed DOUBLE,
        PRIMARY KEY (label_set, query_key)
    );
    CREATE TABLE relaxations (
        label_set VARCHAR PRIMARY KEY, weak VARCHAR, strong VARCHAR, metric VARCHAR,
        pairing VARCHAR, t DOUBLE, objective DOUBLE, degenerate BOOLEAN
    );
    """,
    """
    CREATE TABLE preferences (
        preference_key VARCHAR PRIMARY KEY,  -- hash of everything else in the row
        source VARCHAR NOT NULL CHECK (source IN ('arena', 'gold', 'judge')),
        dataset VARCHAR NOT NULL, battle_id VARCHAR NOT NULL,
        prompt VARCHAR NOT NULL, llm_a VARCHAR NOT NULL, llm_b VARCHAR NOT NULL,
        verdict VARCHAR NOT NULL CHECK (verdict IN ('a', 'tie', 'b')),
        a_wins DOUBLE NOT NULL,  -- the verdict as a probability, or the judge's own
        a_quality DOUBLE, b_quality DOUBLE, domain VARCHAR
    );
    """,
    # Battles from the scores of responses too. DuckDB cannot alter a CHECK.
    """
    ALTER TABLE preferences RENAME TO earlier_preferences;
    CREATE TABLE preferences (
        preference_key VARCHAR PRIMARY KEY,  -- hash of everything else in the row
        source VARCHAR NOT NULL CHECK (source IN ('arena', 'gold', 'judge', 'responses')),
        dataset VARCHAR NOT NULL, battle_id VARCHAR NOT NULL,
        prompt VARCHAR NOT NULL, llm_a VARCHAR NOT NULL, llm_b VARCHAR NOT NULL,
        verdict VARCHAR NOT NULL CHECK (verdict IN ('a', 'tie', 'b')),
        a_wins DOUBLE NOT NULL,  -- the verdict as a probability, or the judge's own
        a_quality DOUBLE, b_quality DOUBLE, domain VARCHAR
    );
    INSERT INTO preferences BY NAME SELECT * FROM earlier_preferences;
    DROP TABLE earlier_preferences;
    """,
)

MEMORY_LIMIT = "1GiB"  # of DuckDB; past it, sorts and joins go on in files beside the warehouse
PART_ROWS = ROW_GROUP = 122_880  # rows of a Parquet file that are read as one; DuckDB's own number
DIGEST_ROWS = 16_384  # rows hashed as one: their texts must fit a buffer of 2 GB


class LockedError(StoreError):
    """Another process has the DuckDB file open."""


@dataclass(frozen=True)
class Snapshot:
    """An immutable table on disk: what tasks pass to each other."""

    table: str
    digest: str
    rows: int
    path: Path

    def read(self) -> pa.Table:
        """Return the rows; raises StoreError when the file is gone or damaged."""
        return read_snapshot(self.path)


def read_snapshot(path: Path) -> pa.Table:
    """Return the rows of a snapshot's file; raises StoreError when it is gone or damaged."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"The snapshot {path} cannot be read: {error}. Expected the Parquet file that an "
            "earlier stage wrote. Delete it and run again: it is made anew from the warehouse."
        ) from error


@dataclass(frozen=True)
class Warehouse:
    """The DuckDB file under ``directory``, opened only while it is used."""

    directory: Path
    wait_s: float = 20.0

    def file(self) -> Path:
        """Return the path of the DuckDB file."""
        return self.directory / "warehouse.duckdb"

    @contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the file for writing, with its schema up to date, in one transaction.

        Waits up to ``wait_s`` seconds for another process to let go of it. What the block did is
        kept only if it ends without an exception. Raises StoreError when the file is locked,
        damaged, or the disk is full.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        con = self._open()
        try:
            _migrate(con)
            con.execute("BEGIN")
            yield con
            con.execute("COMMIT")
        except duckdb.IOException as error:
            raise StoreError(
                f"Writing {self.file()} failed: {error}. Expected room on the disk and a healthy "
                "file. Free some space and run again; what was stored before is intact."
            ) from error
        finally:
            con.close()

    @contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the file for reading only, as it is; other readers may do so at the same time.

        Raises LockedError while another process writes, StoreError when there is no file.
        """
        if not self.file().exists():
            raise StoreError(
                f"There is no {self.file()}. Expected the warehouse of an earlier run. Set "
                "store.directory to its folder, or run `turnout run` first."
            )
        con = self._open(read_only=True)
        try:
            yield con
        finally:
            con.close()

    def _open(self, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                return duckdb.connect(
                    str(self.file()), read_only=read_only, config={"memory_limit": MEMORY_LIMIT}
                )
            except duckdb.IOException as error:
                locked = "lock" in str(error).lower()
                if locked and time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                if locked:
                    raise LockedError(
                        f"{self.file()} is open in another process: {error}. Expected one writer "
                        "at a time. Wait for the other run to end, or close the DuckDB shell."
                    ) from error
                raise self._damaged(error) from error
            except duckdb.Error as error:
                raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.file()} cannot be opened: {error}. Expected a DuckDB file. Move it aside and "
            "run again: responses still in the journal beside it are taken in anew, the rest has "
            "to be restored from a copy."
        )

    def ingest(self, table: str, rows: pa.Table) -> int:
        """Add the rows whose primary key is not yet there; return how many were new."""
        if rows.num_rows == 0:
            return 0
        with self.connection() as con:
            added = con.execute(f"INSERT OR IGNORE INTO {table} BY NAME SELECT * FROM rows")
            return int(added.fetchall()[0][0])

    def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> pa.Table:
        """Return the result of a SELECT; it names its parameters as $name.

        Raises StoreError naming the file when a snapshot among the parameters is gone or damaged.
        """
        with self._selected(sql, parameters) as found:
            return found.to_arrow_table()

    def parts(
        self,
        sql: str,
        parameters: Mapping[str, object] | None = None,
        *,
        tables: Mapping[str, pa.Table] | None = None,
    ) -> Iterator[pa.Table]:
        """Yield the result of a SELECT in parts, the first without rows.

        tables: further tables that the SELECT may name. The file is held open until the last part.
        """
        with self._selected(sql, parameters, tables) as found:
            reader = found.to_arrow_reader(PART_ROWS)
            yield reader.schema.empty_table()
            for batch in reader:
                yield pa.Table.from_batches([batch])

    def write_query(
        self, path: Path, sql: str, parameters: Mapping[str, object] | None = None
    ) -> None:
        """Write the result of a SELECT to a Parquet file, whose rows need not fit in memory."""
        with self._selected(sql, parameters) as found:
            found.write_parquet(str(path))

    @contextmanager
    def _selected(
        self,
        sql: str,
        parameters: Mapping[str, object] | None,
        tables: Mapping[str, pa.Table] | None = None,
    ) -> Iterator[duckdb.DuckDBPyRelation]:
        given = dict(parameters or {})
        with self.connection() as con:
            for name, rows in (tables or {}).items():
                con.register(name, rows)
            try:
                yield con.sql(sql, params=given)
            except (duckdb.Error, pa.ArrowException, OSError):
                for value in map(str, given.values()):
                    if value.endswith(".parquet"):
                        read_snapshot(Path(value))  # says so if this file is why
                raise

    def write_snapshot(self, table: str, rows: pa.Table | Iterable[pa.Table]) -> Snapshot:
        """Write ``rows`` to a Parquet file named by their digest, atomically.

        Of tables that come one after the other, only one is held in memory at a time.
        """
        parts = iter([rows] if isinstance(rows, pa.Table) else rows)
        first = next(parts)
        folder = self.directory / "snapshots"
        unfinished = folder / f"{table}-{os.getpid()}-{time.time_ns()}.tmp"
        digest, count = Digest(first.schema), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(unfinished, first.schema) as file:
                for part in chain([first], parts):
                    digest.update(part)
                    if part.num_rows:
                        file.write_table(part, row_group_size=ROW_GROUP)
                        count += part.num_rows
            path = folder / f"{table}-{digest.hexdigest()}.parquet"
            if path.exists():
                path.touch()  # its age is the time since a stage last came to it
            else:
                unfinished.rename(path)
        except OSError as error:
            raise StoreError(
                f"A snapshot of {table} in {folder} cannot be written: {error}. Expected room on "
                "the disk and a folder that may be written. See to it and run again; what was "
                "stored before is intact."
            ) from error
        finally:
            with suppress(OSError):
                unfinished.unlink()
        return Snapshot(table=table, digest=digest.hexdigest(), rows=count, path=path.resolve())


def _migrate(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER)")
    row = con.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchall()[0]
    for version, statements in enumerate(MIGRATIONS[row[0] :], start=row[0] + 1):
        con.execute("BEGIN")
        con.execute(statements)
        con.execute("INSERT INTO schema_version VALUES (?)", [version])
        con.execute("COMMIT")


class Digest:
    """A hash of column names, types and values; the same in whatever parts the rows come."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema.remove_metadata()
        self._hash = hashlib.sha256(str(self._schema).encode())
        self._rest = self._schema.empty_table()

    def update(self, rows: pa.Table) -> None:
        """Take in further rows, of the same schema."""
        waiting = pa.concat_tables([self._rest, rows.replace_schema_metadata(None)])
        whole = waiting.num_rows - waiting.num_rows % DIGEST_ROWS
        for start in range(0, whole, DIGEST_ROWS):
            self._hash.update(_canonical(waiting.slice(start, DIGEST_ROWS)))
        self._rest = waiting.slice(whole)

    def hexdigest(self) -> str:
        """Return the hash of all rows so far."""
        ended = self._hash.copy()
        ended.update(_canonical(self._rest))
        return ended.hexdigest()[:16]


def table_digest(rows: pa.Table) -> str:
    """Return the `Digest` of a table."""
    digest = Digest(rows.schema)
    digest.update(rows)
    return digest.hexdigest()


def _canonical(rows: pa.Table) -> bytes:
    """Return the rows as bytes that depend on nothing but their values.

    Arrow's own may not: behind a null lies whatever was there before (so it does in what DuckDB
    returns), and a slice carries bits of the rows after it.
    """
    parts = [part for column in rows.columns for part in _dense(column.combine_chunks())]
    batches = [pa.RecordBatch.from_arrays([part], names=[""]) for part in parts]
    return b"".join(batch.serialize() for batch in batches)


def _dense(values: pa.Array) -> Iterator[pa.Array]:
    """Yield arrays without nulls, copied, that together say what ``values`` do."""
    valid = values.is_valid()
    values = values.drop_null()
    found = [valid]
    if pa.types.is_list(values.type):
        found.append(values.value_lengths())
        yield from _dense(values.flatten())
    else:
        found.append(values)
    for one in found:
        yield pa.concat_arrays([pa.array([], type=one.type), one])
