"""The warehouse: migrations, one writer, nothing lost, immutable snapshots."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import StoreError
from tasks.warehouse import (
    MIGRATIONS,
    Digest,
    LockedError,
    Warehouse,
    read_snapshot,
    table_digest,
)


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path, wait_s=0.5)


def prompts(*rows: tuple[str, str, str]) -> pa.Table:
    keys, llms, ids = zip(*rows, strict=True)
    return pa.table({"query_key": keys, "llm": llms, "prompt_id": ids})


def test_ingest_adds_each_key_once(warehouse: Warehouse) -> None:
    assert warehouse.ingest("prompts", prompts(("q1", "a", "p1"), ("q2", "a", "p2"))) == 2
    assert warehouse.ingest("prompts", prompts(("q2", "a", "p2"), ("q3", "a", "p3"))) == 1
    assert warehouse.query("SELECT count(*) AS n FROM prompts").to_pylist() == [{"n": 3}]


def test_schema_is_migrated_once(warehouse: Warehouse) -> None:
    for _ in range(2):
        versions = warehouse.query("SELECT version FROM schema_version ORDER BY version")
        assert versions["version"].to_pylist() == list(range(1, len(MIGRATIONS) + 1))


def test_a_failed_block_leaves_nothing(warehouse: Warehouse) -> None:
    statements = "INSERT INTO prompts VALUES ('q', 'a', 'p'); SELECT * FROM no_such_table"
    with pytest.raises(duckdb.CatalogException), warehouse.connection() as con:
        con.execute(statements)
    assert warehouse.query("SELECT * FROM prompts").num_rows == 0


def test_snapshot_is_named_by_content(warehouse: Warehouse) -> None:
    first = warehouse.write_snapshot("prompts", prompts(("q1", "a", "p1")))
    again = warehouse.write_snapshot("prompts", prompts(("q1", "a", "p1")))
    other = warehouse.write_snapshot("prompts", prompts(("q1", "a", "p2")))
    assert first == again
    assert other.path != first.path
    assert first.read().to_pylist() == [{"query_key": "q1", "llm": "a", "prompt_id": "p1"}]


def test_digest_ignores_chunks() -> None:
    whole = prompts(("q1", "a", "p1"), ("q2", "a", "p2"))
    assert table_digest(whole) == table_digest(pa.concat_tables([whole[:1], whole[1:]]))


def test_damaged_snapshot_is_reported(warehouse: Warehouse) -> None:
    snapshot = warehouse.write_snapshot("prompts", prompts(("q1", "a", "p1")))
    snapshot.path.write_bytes(b"not parquet")
    with pytest.raises(StoreError, match="Delete it and run again"):
        snapshot.read()


@pytest.mark.parametrize("damage", ["bytes", "cut", "gone"])
def test_a_damaged_snapshot_read_in_sql_is_named(warehouse: Warehouse, damage: str) -> None:
    snapshot = warehouse.write_snapshot("prompts", prompts(("q1", "a", "p1")))
    if damage == "gone":
        snapshot.path.unlink()
    else:
        whole = snapshot.path.read_bytes()
        snapshot.path.write_bytes(b"not parquet" if damage == "bytes" else whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=rf"{snapshot.path} cannot be read.*Delete it and run"):
        warehouse.query("SELECT * FROM read_parquet($path)", {"path": str(snapshot.path)})


def test_a_mistake_in_sql_is_not_taken_for_damage(warehouse: Warehouse) -> None:
    snapshot = warehouse.write_snapshot("prompts", prompts(("q1", "a", "p1")))
    with pytest.raises(duckdb.BinderException, match="no_such_column"):
        warehouse.query(
            "SELECT no_such_column FROM read_parquet($path)", {"path": str(snapshot.path)}
        )


def test_damaged_file_is_reported_and_left_alone(warehouse: Warehouse) -> None:
    warehouse.file().write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="Expected a DuckDB file"):
        warehouse.query("SELECT 1")
    assert warehouse.file().read_bytes() == b"no database" * 1000


def test_an_unwritable_folder_is_reported(warehouse: Warehouse) -> None:
    (warehouse.directory / "snapshots").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot be written: .* Expected room on the disk"):
        warehouse.write_snapshot("prompts", prompts(("q1", "a", "p1")))


HOLD_OPEN = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
print("open", flush=True)
input()
"""


@contextmanager
def held_open(warehouse: Warehouse) -> Iterator[None]:
    """Let another process have the file."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_OPEN, str(warehouse.file())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    try:
        yield
    finally:
        holder.communicate("\n")


def test_locked_file_is_reported(warehouse: Warehouse) -> None:
    warehouse.query("SELECT 1")
    with held_open(warehouse), pytest.raises(StoreError, match="open in another process"):
        warehouse.query("SELECT 1")
    assert warehouse.query("SELECT 1 AS one").to_pylist() == [{"one": 1}]


def test_a_reader_is_told_while_another_process_writes(warehouse: Warehouse) -> None:
    warehouse.query("SELECT 1")
    with held_open(warehouse), pytest.raises(LockedError, match="Expected one writer at a time"):
        warehouse.reading().__enter__()


def test_a_second_writer_waits_for_the_first(warehouse: Warehouse) -> None:
    patient = Warehouse(warehouse.directory, wait_s=60)
    patient.query("SELECT 1")
    with ThreadPoolExecutor(1) as other:
        with held_open(warehouse):
            added = other.submit(patient.ingest, "prompts", prompts(("q1", "a", "p1")))
            time.sleep(0.5)
            assert not added.done()
        assert added.result() == 1


def test_readers_share_the_file(warehouse: Warehouse) -> None:
    warehouse.ingest("prompts", prompts(("q1", "a", "p1")))
    with warehouse.reading() as con:
        code = "import duckdb, sys; duckdb.connect(sys.argv[1], read_only=True).sql('SELECT 1')"
        command = [sys.executable, "-c", code, str(warehouse.file())]
        assert subprocess.run(command, check=False).returncode == 0
        with pytest.raises(duckdb.InvalidInputException, match="read-only"):
            con.execute("DELETE FROM prompts")


def test_reading_makes_no_file(warehouse: Warehouse) -> None:
    with pytest.raises(StoreError, match=r"There is no .*warehouse.duckdb.*run `turnout run`"):
        warehouse.reading().__enter__()
    assert not warehouse.file().exists()


def at_version(warehouse: Warehouse, version: int) -> None:
    """Make the file as an earlier Turnout left it, with a row of each table."""
    with duckdb.connect(str(warehouse.file())) as con:
        con.execute("CREATE TABLE schema_version (version INTEGER)")
        for number, statements in enumerate(MIGRATIONS[:version], start=1):
            con.execute(statements)
            con.execute("INSERT INTO schema_version VALUES (?)", [number])
        for table, values in {
            "queries": "'k', 'q1', 'a text', 'reference', ['gold'], NULL, 'domain'",
            "query_sets": "'set', 0, 'k', 'train'",
            "prompts": "'k', 'a', 'p'",
            "responses": "'p', 0, 'a', 'answer', 'stop', 3, 4, 0.5, 9.0, 7, NULL, now()",
            "scores": "'f', 'k', 'p', 0, 'quality', 0.25",
            "labels": "'l', 'k', 0.1, 0.2, 0, 0.5, 0.75",
            "relaxations": "'l', 'a', 'b', 'quality', 'all', 0.125, 0.25, false",
            "preferences": "'p', 'arena', 'd', 'b', 'a text', 'x', 'y', 'tie', 0.5, NULL, 1, NULL",
        }.items():
            if table != "preferences" or version >= 2:
                con.execute(f"INSERT INTO {table} VALUES ({values})")


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_an_earlier_schema_is_brought_up_to_date_with_its_rows(
    warehouse: Warehouse, version: int
) -> None:
    at_version(warehouse, version)
    with duckdb.connect(str(warehouse.file())) as con:
        tables = [row[0] for row in con.execute("SHOW TABLES").fetchall()]
        before = {name: con.execute(f"SELECT * FROM {name}").fetchall() for name in tables}
    columns = {name: warehouse.query(f"SELECT * FROM {name}").schema for name in before}
    with duckdb.connect(str(warehouse.file())) as con:
        for name, rows in before.items():
            if name != "schema_version":
                assert con.execute(f"SELECT * FROM {name}").fetchall() == rows
    fresh = Warehouse(warehouse.directory / "fresh")
    assert columns == {name: fresh.query(f"SELECT * FROM {name}").schema for name in before}
    assert fresh.query("SHOW TABLES") == warehouse.query("SHOW TABLES")


def test_a_migration_that_is_cut_short_leaves_the_earlier_schema(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_version(warehouse, len(MIGRATIONS))
    broken = "ALTER TABLE scores RENAME TO gone; SELECT * FROM no_such_table"
    monkeypatch.setattr("tasks.warehouse.MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(duckdb.CatalogException):
        warehouse.query("SELECT 1")
    monkeypatch.undo()
    assert warehouse.query("SELECT value FROM scores").to_pylist() == [{"value": 0.25}]


texts = st.none() | st.text(max_size=3)


@given(
    columns=st.lists(
        st.tuples(texts, st.none() | st.booleans(), st.lists(texts, max_size=2) | st.none()),
        min_size=1,
        max_size=40,
    ),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    rows_hashed=st.sampled_from([1, 3, 8, 16_384]),
)
@settings(max_examples=60, deadline=None)
def test_a_digest_is_of_values_alone(
    columns: list[tuple[str | None, bool | None, list[str | None] | None]],
    cuts: list[int],
    rows_hashed: int,
) -> None:
    kinds = {"text": pa.string(), "flag": pa.bool_(), "many": pa.list_(pa.string())}
    whole = pa.table(
        {
            name: pa.array(values, kinds[name])
            for name, values in zip(kinds, zip(*columns, strict=True), strict=True)
        }
    )
    longer = pa.concat_tables([whole, whole, whole]).combine_chunks()
    ends = [0, *sorted(min(cut, whole.num_rows) for cut in cuts), whole.num_rows]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tasks.warehouse.DIGEST_ROWS", rows_hashed)
        expected = table_digest(whole)
        # A slice has the bits of its neighbours in its last byte.
        assert table_digest(longer.slice(whole.num_rows, whole.num_rows)) == expected
        digest = Digest(whole.schema)
        for start, end in pairwise(ends):
            digest.update(whole.slice(start, end - start))
        assert digest.hexdigest() == expected
        if whole.num_rows > 1 and columns[0] != columns[-1]:
            assert table_digest(whole.take(list(range(whole.num_rows))[::-1])) != expected


def test_what_lies_behind_a_null_does_not_count() -> None:
    def table(behind: float) -> pa.Table:
        present = pa.py_buffer(bytes([0b101]))
        values = pa.py_buffer(np.array([1.0, behind, 3.0]))
        return pa.table({"value": pa.Array.from_buffers(pa.float64(), 3, [present, values])})

    assert table(5.0) == table(7.0)
    assert table_digest(table(5.0)) == table_digest(table(7.0))
    assert table_digest(table(5.0)) != table_digest(pa.table({"value": [1.0, 5.0, 3.0]}))
    assert table_digest(table(5.0)) != table_digest(pa.table({"value": [1.0, 3.0, None]}))


def test_a_snapshot_of_parts_is_that_of_the_whole(warehouse: Warehouse) -> None:
    rows = prompts(*((f"q{k}", "a", f"p{k}") for k in range(10)))
    warehouse.ingest("prompts", rows)
    whole = warehouse.write_snapshot("prompts", rows)
    sql = "SELECT * FROM prompts WHERE llm = $llm ORDER BY prompt_id"
    assert warehouse.write_snapshot("prompts", warehouse.parts(sql, {"llm": "a"})) == whole
    nothing = warehouse.write_snapshot("prompts", warehouse.parts(sql, {"llm": "b"}))
    assert nothing.read().num_rows == nothing.rows == 0
    assert nothing.read().schema == rows.schema


def test_a_snapshot_that_fails_half_way_leaves_nothing(warehouse: Warehouse) -> None:
    def parts() -> Iterator[pa.Table]:
        yield prompts(("q1", "a", "p1"))
        raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        warehouse.write_snapshot("prompts", parts())
    assert list((warehouse.directory / "snapshots").iterdir()) == []


def test_a_query_is_written_to_a_file(warehouse: Warehouse, tmp_path: Path) -> None:
    warehouse.ingest("prompts", prompts(("q1", "a", "p1"), ("q2", "b", "p2")))
    path = tmp_path / "found.parquet"
    warehouse.write_query(path, "SELECT llm FROM prompts WHERE llm = $llm", {"llm": "b"})
    assert read_snapshot(path).to_pylist() == [{"llm": "b"}]
