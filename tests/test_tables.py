"""`turnout tables`: what there is, its rows, read-only queries, and while a run is writing."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from test_warehouse import held_open, prompts

from conf.errors import ConfigError, StoreError
from tasks.tables import ROW_IS, first_rows, selected, summaries
from tasks.warehouse import LockedError, Warehouse


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    made = Warehouse(tmp_path / "store", wait_s=0.3)
    made.ingest("prompts", prompts(*((f"q{k}", "a", f"p{k}") for k in range(9))))
    return made


def test_every_table_is_listed_with_what_a_row_is(warehouse: Warehouse) -> None:
    found = {table.name: table for table in summaries(warehouse)}
    assert list(found) == list(ROW_IS)
    assert all(table.row_is for table in found.values())
    assert found["prompts"].rows == 9
    assert found["prompts"].bytes > 0
    assert found["scores"].rows == found["scores"].bytes == 0


def test_the_first_rows_of_a_table(warehouse: Warehouse) -> None:
    rows = first_rows(warehouse, "prompts", limit=2)
    there = [{"query_key": f"q{k}", "llm": "a", "prompt_id": f"p{k}"} for k in range(9)]
    assert len(rows.records()) == 2
    assert all(record in there for record in rows.records())
    assert not rows.note


def test_a_select_is_run(warehouse: Warehouse) -> None:
    sql = "WITH few AS (SELECT * FROM prompts LIMIT 4) SELECT count(*) AS n, now() AS at FROM few;"
    (row,) = selected(warehouse, sql, limit=5).records()
    assert row["n"] == 4
    assert isinstance(row["at"], str)
    assert selected(warehouse, "FROM prompts", limit=3).table.num_rows == 3


@pytest.mark.parametrize(
    ("sql", "held"),
    [
        ("DELETE FROM prompts", "DELETE"),
        ("SELECT 1; DROP TABLE prompts", "SELECT, DROP"),
        ("COPY prompts TO '/tmp/prompts.csv'", "COPY"),
        ("ATTACH 'other.duckdb'", "ATTACH"),
        ("SET threads = 1", "SET"),
        ("", "no statement"),
    ],
)
def test_anything_but_one_select_is_refused(warehouse: Warehouse, sql: str, held: str) -> None:
    with pytest.raises(ConfigError, match=f"holds {held}. Expected one SELECT"):
        selected(warehouse, sql, limit=5)
    assert first_rows(warehouse, "prompts", limit=20).table.num_rows == 9


@pytest.mark.parametrize(
    "sql", ["SELECT promt_id FROM prompts", "SELEC 1", "SELECT * FROM nowhere"]
)
def test_a_mistake_in_sql_is_explained(warehouse: Warehouse, sql: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)cannot be run: .*Expected one SELECT"):
        selected(warehouse, sql, limit=5)


def test_an_unknown_table_and_a_bad_limit(warehouse: Warehouse) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'prompts'"):
        first_rows(warehouse, "promts", limit=5)
    with pytest.raises(ConfigError, match="above 0"):
        first_rows(warehouse, "prompts", limit=0)


def test_no_warehouse_is_said_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no"):
        summaries(Warehouse(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_while_a_run_writes_the_newest_snapshot_stands_in(warehouse: Warehouse) -> None:
    warehouse.write_snapshot("prompts", prompts(("old", "a", "p")))
    newest = warehouse.write_snapshot("prompts", prompts(("new", "a", "p")))
    newest.path.touch()
    with held_open(warehouse):
        rows = first_rows(warehouse, "prompts", limit=5)
        assert rows.records() == [{"query_key": "new", "llm": "a", "prompt_id": "p"}]
        assert str(newest.path.name) in rows.note
        with pytest.raises(LockedError, match="Meanwhile the Parquet files"):
            first_rows(warehouse, "scores", limit=5)
        with pytest.raises(LockedError, match="Meanwhile the Parquet files"):
            selected(warehouse, "SELECT 1", limit=5)


def test_what_a_killed_writer_left_in_the_log_is_seen(warehouse: Warehouse) -> None:
    code = (
        "import sys, os\nfrom pathlib import Path\nimport pyarrow as pa\n"
        "from tasks.warehouse import Warehouse\n"
        "with Warehouse(Path(sys.argv[1])).connection() as con:\n"
        "    con.execute(\"INSERT INTO prompts VALUES ('kept', 'a', 'p')\")\n"
        "    con.execute('COMMIT')\n    con.execute('BEGIN')\n"
        "    con.execute(\"INSERT INTO prompts VALUES ('lost', 'a', 'p')\")\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(warehouse.directory)], check=False)
    assert warehouse.file().with_suffix(".duckdb.wal").exists()
    found = selected(warehouse, "SELECT query_key FROM prompts WHERE query_key > 'a'", limit=20)
    keys = pa.chunked_array(found.table["query_key"]).to_pylist()
    assert "kept" in keys
    assert "lost" not in keys


def turnout(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "tables", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_command_line(warehouse: Warehouse, tmp_path: Path) -> None:
    here = f"store.directory={warehouse.directory}"
    listed = turnout(here, cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "what one LLM is asked for one question" in listed.stdout
    assert "…" not in listed.stdout  # nothing is cut off
    assert max(map(len, listed.stdout.splitlines())) <= 80
    rows = turnout("prompts", here, "--limit", "1", "--json", cwd=tmp_path)
    assert json.loads(rows.stdout)["rows"] == [{"query_key": "q0", "llm": "a", "prompt_id": "p0"}]
    refused = turnout(here, "--sql", "DROP TABLE prompts", cwd=tmp_path)
    assert refused.returncode == 1
    assert "Expected one SELECT" in refused.stderr
    twice = turnout("prompts", here, "--prune", cwd=tmp_path)
    assert twice.returncode == 1
    assert "Expected one of them" in twice.stderr
