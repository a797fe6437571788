"""The warehouse: migrations, one writer, nothing lost, immutable snapshots."""

import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from conf.errors import StoreError
from tasks.warehouse import MIGRATIONS, Warehouse, table_digest


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


def test_locked_file_is_reported(warehouse: Warehouse) -> None:
    warehouse.query("SELECT 1")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_OPEN, str(warehouse.file())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match="open in another process"):
        warehouse.query("SELECT 1")
    holder.communicate("\n")
    assert warehouse.query("SELECT 1 AS one").to_pylist() == [{"one": 1}]
