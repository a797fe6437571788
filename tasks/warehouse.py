"""The warehouse: one DuckDB file for every intermediate table, one writer, Parquet for readers.

While one process writes a DuckDB file no other can open it, not even to read. So connections are
short, and what is handed from stage to stage is a `Snapshot`: an immutable Parquet file named by
the digest of its rows.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
)


@dataclass(frozen=True)
class Snapshot:
    """An immutable table on disk: what tasks pass to each other."""

    table: str
    digest: str
    rows: int
    path: Path

    def read(self) -> pa.Table:
        """Return the rows; raises StoreError when the file is gone or damaged."""
        try:
            return pq.read_table(self.path)
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(
                f"The snapshot {self.path} cannot be read: {error}. Expected the Parquet file "
                "that an earlier stage wrote. Delete it and run again: it is made anew from the "
                "warehouse."
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

    def _open(self) -> duckdb.DuckDBPyConnection:
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                return duckdb.connect(str(self.file()))
            except duckdb.IOException as error:
                locked = "lock" in str(error).lower()
                if locked and time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                if locked:
                    raise StoreError(
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
            before = _count(con, table)
            con.execute(f"INSERT OR IGNORE INTO {table} BY NAME SELECT * FROM rows")
            return _count(con, table) - before

    def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> pa.Table:
        """Return the result of a SELECT; it names its parameters as $name."""
        with self.connection() as con:
            return con.sql(sql, params=dict(parameters or {})).to_arrow_table()

    def write_snapshot(self, table: str, rows: pa.Table) -> Snapshot:
        """Write ``rows`` to a Parquet file named by their digest, atomically."""
        digest = table_digest(rows)
        path = self.directory / "snapshots" / f"{table}-{digest}.parquet"
        if not path.exists():
            unfinished = path.with_suffix(f".{time.time_ns()}.tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(rows, unfinished)
                unfinished.rename(path)
            except OSError as error:
                with suppress(OSError):
                    unfinished.unlink()
                raise StoreError(
                    f"The snapshot {path} cannot be written: {error}. Expected room on the disk "
                    "and a folder that may be written. See to it and run again; what was stored "
                    "before is intact."
                ) from error
        return Snapshot(table=table, digest=digest, rows=rows.num_rows, path=path.resolve())


def _migrate(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER)")
    row = con.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchall()[0]
    for version, statements in enumerate(MIGRATIONS[row[0] :], start=row[0] + 1):
        con.execute("BEGIN")
        con.execute(statements)
        con.execute("INSERT INTO schema_version VALUES (?)", [version])
        con.execute("COMMIT")


def _count(con: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(con.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])


def table_digest(rows: pa.Table) -> str:
    """Return a hash of column names, types and values; the same however the rows are chunked."""
    digest = hashlib.sha256(str(rows.schema.remove_metadata()).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema.remove_metadata()) as stream:
        for batch in rows.replace_schema_metadata(None).combine_chunks().to_batches():
            stream.write_batch(batch)
    digest.update(sink.getvalue())
    return digest.hexdigest()[:16]
