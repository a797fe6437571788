"""Retention: what is superseded or orphaned goes, what an experiment would use again stays."""

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.errors import ConfigError, StoreError
from conf.llms import Pair
from conf.load import validated
from conf.schema import Experiment
from tasks import retention, tracking
from tasks.generation import collect_responses, prompt_table
from tasks.queries import ingest_queries
from tasks.retention import Pruned, prune
from tasks.warehouse import Snapshot, Warehouse

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=60)
SPLITS = ("train", "validation", "test")


def experiment(directory: Path, *, template: str = "{text}", **changes: Any) -> Experiment:
    llm = {"endpoint": {"url": "http://127.0.0.1:9/v1"}, "template": template}
    return validated(
        {
            "store": {"directory": str(directory)},
            "llms": [{"name": name, "model": name, **llm} for name in ("small", "large")],
            "pairs": [{"weak": "small", "strong": "large"}],
            "generation": {"samples": 2},
            "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
            "routers": [{"router": "length"}],
            "queries": {"limit": 20},
            **changes,
        },
        where="test",
    )


def asked(of: Experiment, *, at: datetime = OLD) -> Snapshot:
    """Store what a run of the experiment would have: prompts, responses, scores."""
    warehouse = Warehouse(of.store.directory)
    queries = ingest_queries.fn(warehouse, of.queries)
    for llm in of.llms:
        prompts = prompt_table(queries, llm).drop_columns(["prompt"])
        warehouse.ingest("prompts", prompts)
        with warehouse.connection() as con:
            con.register("asked", prompts)
            con.execute(
                "INSERT OR IGNORE INTO responses BY NAME SELECT prompt_id, unnest([0, 1]) AS "
                "sample_index, llm, 'é' || prompt_id AS text, $at AS created_at FROM asked",
                {"at": at},
            )
            con.execute(
                "INSERT OR IGNORE INTO scores SELECT 'f', query_key, prompt_id, unnest([0, 1]), "
                "'gold', 1 FROM asked"
            )
    return queries


def count(store: Path, table: str) -> int:
    return int(Warehouse(store).query(f"SELECT count(*) AS n FROM {table}")["n"][0].as_py())


def freed(pruned: Pruned) -> dict[str, int]:
    return {one.what: one.count for one in pruned.freed if one.count}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_responses_asked_in_another_way_go_and_none_that_would_be_used(store: Path) -> None:
    before, after = experiment(store, template="Q: {text}"), experiment(store)
    asked(before)
    queries = asked(after)
    warehouse = Warehouse(store)
    wanted = collect_responses.fn(warehouse, queries, after.llms, after.generation)
    dry = prune([after], dry_run=True)
    expected = {
        "superseded responses of large": 40,
        "superseded responses of small": 40,
        "scores of these": 80,
    }
    assert freed(dry) == expected
    assert dry.freed[0].bytes == 40 * (32 + len("é".encode()))
    assert count(store, "responses") == 160
    assert freed(prune([after])) == expected
    assert count(store, "responses") == count(store, "scores") == 80
    assert count(store, "prompts") == 40
    assert collect_responses.fn(warehouse, queries, after.llms, after.generation) == wanted
    assert freed(prune([after])) == {}


def test_young_responses_stay(store: Path) -> None:
    asked(experiment(store, template="Q: {text}"), at=NOW - timedelta(days=3))
    asked(experiment(store))
    assert freed(prune([experiment(store)])) == {}
    assert freed(prune([experiment(store)], keep_days=2))["scores of these"] == 80


def test_what_another_given_experiment_asks_stays(store: Path) -> None:
    other = experiment(store, template="Q: {text}")
    asked(other)
    asked(experiment(store))
    assert freed(prune([experiment(store), other])) == {}


def test_what_the_experiment_does_not_know_stays(store: Path) -> None:
    known = experiment(store)
    asked(experiment(store, template="Q: {text}", queries={"limit": 40}))
    renamed = {"name": "another", "model": "another", "endpoint": {"url": "http://127.0.0.1:9/v1"}}
    asked(
        experiment(
            store,
            llms=[renamed, renamed | {"name": "third", "template": "{text}!"}],
            pairs=[{"weak": "another", "strong": "third"}],
        )
    )
    # A judge's prompts are in `prompts` and nobody's questions.
    with Warehouse(store).connection() as con:
        con.execute("INSERT INTO prompts VALUES ('judged', 'small', 'by judge')")
        con.execute(
            "INSERT INTO responses BY NAME SELECT 'by judge' AS prompt_id, 0 AS sample_index, "
            "'small' AS llm, $at AS created_at",
            {"at": OLD},
        )
    found = freed(prune([known]))
    # Of the forty questions asked in the old way, twenty are the experiment's own.
    assert found == {
        "superseded responses of large": 40,
        "superseded responses of small": 40,
        "scores of these": 80,
    }
    assert count(store, "responses") == 160 + 80 + 1 - 80


def test_a_corrected_question_supersedes_the_earlier_wording(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    rows = ["id,text,split"] + [f"q{k},word {k},{s}" for k, s in enumerate(SPLITS)]
    file.write_text("\n".join(rows))
    settings = experiment(store, queries={"source": "file", "path": str(file)})
    asked(settings)
    file.write_text("\n".join([*rows[:-1], rows[-1].replace("word", "words")]))
    asked(settings)
    assert freed(prune([settings]))["superseded responses of small"] == 2
    assert count(store, "responses") == 12


def test_a_corrected_reference_keeps_the_responses(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    rows = [f"q{k},word {k},{s}" for k, s in enumerate(SPLITS)]
    settings = experiment(store, queries={"source": "file", "path": str(file)})
    for reference in ("wrong", "right"):
        lines = ["id,text,split,reference", *(f"{row},{reference}" for row in rows)]
        file.write_text("\n".join(lines))
        asked(settings)
    assert freed(prune([settings])) == {}


def test_a_prune_that_fails_has_deleted_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(experiment(store, template="Q: {text}"))
    asked(experiment(store))
    (old,) = aged(store / "snapshots" / "old-0.parquet")
    broken = (*retention.FORGET, "DELETE FROM no_such_table")
    monkeypatch.setattr(retention, "FORGET", broken)
    with pytest.raises(duckdb.CatalogException):
        prune([experiment(store)])
    assert count(store, "responses") == 160
    assert old.exists()


def aged(*paths: Path, days: float = 60) -> list[Path]:
    """Make files, or folders with a file in each, and date them back."""
    for path in paths:
        file = path if path.suffix in (".parquet", ".tmp") else path / "predictions.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"of": [path.name]}), file)
        then = time.time() - days * 86_400
        for each in (file, path):
            os.utime(each, (then, then))
    return list(paths)


def test_orphaned_files_go_and_young_ones_stay(store: Path) -> None:
    Warehouse(store).query("SELECT 1")
    gone = aged(
        store / "snapshots" / "labels-0.parquet",
        store / "snapshots" / "labels-1.tmp",
        store / "training" / "0",
        store / "training" / "1.unfinished",
        store / "training" / "2.pruned",
    )
    kept = aged(store / "snapshots" / "labels-3.parquet", store / "training" / "3", days=1)
    assert freed(prune([experiment(store)], dry_run=True)) == {
        "orphaned snapshots": 1,
        "orphaned trainings": 1,
        "leftovers of killed processes": 3,
    }
    assert all(path.exists() for path in gone)
    prune([experiment(store)])
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)
    assert not (store / "mlflow.db").exists()


def test_a_prune_that_is_killed_is_finished_by_the_next(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Warehouse(store).query("SELECT 1")
    (folder,) = aged(store / "training" / "0")

    rmtree = shutil.rmtree

    def killed(path: Path | str, **options: Any) -> None:
        if Path(path).suffix == ".pruned":
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune([experiment(store)])
    assert not folder.exists()  # not to be mistaken for a whole training
    monkeypatch.undo()
    prune([experiment(store)], keep_days=10_000)
    assert list(folder.parent.iterdir()) == []


@pytest.fixture
def logged(store_directory: Path) -> Experiment:
    """A store with one finished run whose router was trained on a snapshot."""
    settings = experiment(store_directory)
    warehouse = Warehouse(store_directory)
    snapshot = warehouse.write_snapshot("labels", pa.table({"text": ["a"]}))
    aged(store_directory / "training" / "first")
    with tracking.parent_run(settings) as parent:
        pair = Pair(weak="small", strong="large")
        tags = {"turnout.pair": pair.name()}
        with tracking.child_run(settings.store, parent, "length", tags=tags) as run_id:
            predictions = store_directory / "training" / "first" / "predictions.parquet"
            tracking.log_dataset(settings.store, run_id, snapshot, name="labels")
            tracking.client(settings.store).log_artifact(run_id, str(predictions), "win_rates")
    aged(snapshot.path, store_directory / "training" / "second")
    warehouse.query("SELECT 1")
    return settings


def test_what_the_last_runs_refer_to_stays(logged: Experiment) -> None:
    training = logged.store.directory / "training"
    assert freed(prune([logged])) == {"orphaned trainings": 1}
    assert [path.name for path in training.iterdir()] == ["first"]
    assert freed(prune([logged], keep_runs=0)) == {
        "orphaned snapshots": 1,
        "orphaned trainings": 1,
    }


def test_what_a_registered_version_came_from_stays(logged: Experiment) -> None:
    client = tracking.client(logged.store)
    (run,) = client.search_runs(
        [tracking.experiment_id(logged.store)], "tags.`turnout.router` = 'length'"
    )
    client.create_registered_model("small--large")
    client.create_model_version(
        "small--large",
        source=f"{run.info.artifact_uri}/router",
        run_id=run.info.run_id,
        tags={"training_digest": "second"},
    )
    assert freed(prune([logged], keep_runs=0)) == {}


def test_nothing_is_pruned_during_a_run(logged: Experiment) -> None:
    with (
        tracking.parent_run(logged),
        pytest.raises(StoreError, match=r"is under way. Expected a store at rest"),
    ):
        prune([logged])
    assert (logged.store.directory / "training" / "second").exists()


def test_bounds_and_stores_are_checked(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no"):
        prune([experiment(store)])
    with pytest.raises(ConfigError, match="numbers from 0 on"):
        prune([experiment(store)], keep_days=-1)
    with pytest.raises(ConfigError, match="Expected one, whose responses they share"):
        prune([experiment(store), experiment(tmp_path / "other")])
