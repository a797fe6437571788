"""MLflow runs: closed on exceptions, reopened on retries, tied to their parent everywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from conf.load import load_experiment
from conf.schema import Experiment, Store
from tasks import tracking
from tasks.warehouse import Warehouse


@pytest.fixture
def experiment(store_directory: Path) -> Experiment:
    return load_experiment(overrides=(f"store.directory={store_directory}",))


def run_of(store: Store, run_id: str) -> tuple[str, dict[str, str]]:
    run = MlflowClient(store.mlflow_uri()).get_run(run_id)
    return run.info.status, run.data.tags


def test_parent_run_holds_the_resolved_settings(experiment: Experiment) -> None:
    with tracking.parent_run(experiment) as run_id:
        assert run_of(experiment.store, run_id)[0] == "RUNNING"
    assert run_of(experiment.store, run_id)[0] == "FINISHED"
    path = MlflowClient().download_artifacts(run_id, "config.json")
    assert Experiment.model_validate_json(Path(path).read_text()) == experiment


def test_runs_are_closed_when_something_raises(experiment: Experiment) -> None:
    ids = []

    def fail() -> None:
        with tracking.parent_run(experiment) as parent:
            ids.append(parent)
            with tracking.child_run(experiment.store, parent, "knn", tags={}) as child:
                ids.append(child)
                raise ValueError("scorer out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        fail()
    for run_id in ids:
        status, tags = run_of(experiment.store, run_id)
        assert status == "FAILED"
        assert tags["turnout.error"] == "ValueError: scorer out of memory"


def test_a_retry_reopens_the_same_child(experiment: Experiment) -> None:
    store = experiment.store
    with tracking.parent_run(experiment) as parent:
        with (
            pytest.raises(RuntimeError),
            tracking.child_run(store, parent, "knn", tags={"turnout.pair": "a--b"}) as first,
        ):
            raise RuntimeError
        with tracking.child_run(store, parent, "knn", tags={"turnout.pair": "a--b"}) as second:
            assert run_of(store, second)[0] == "RUNNING"
        with tracking.child_run(store, parent, "knn", tags={"turnout.pair": "b--c"}) as other:
            pass
    assert first == second
    assert other != first
    assert run_of(store, first)[0] == "FINISHED"


def test_a_child_in_another_process_knows_its_parent(experiment: Experiment) -> None:
    script = (
        "import sys\nfrom conf.schema import Store\nfrom tasks import tracking\n"
        "store = Store(directory=sys.argv[1])\n"
        "with tracking.child_run(store, sys.argv[2], 'mf', tags={}) as run:\n    print(run)\n"
    )
    with tracking.parent_run(experiment) as parent:
        done = subprocess.run(
            [sys.executable, "-c", script, str(experiment.store.directory), parent],
            capture_output=True,
            text=True,
            check=True,
        )
    _, tags = run_of(experiment.store, done.stdout.strip())
    assert tags["mlflow.parentRunId"] == parent


def test_runs_of_a_killed_process_are_closed_by_the_next(experiment: Experiment) -> None:
    script = (
        "import os, sys\nfrom conf.load import load_experiment\nfrom tasks import tracking\n"
        "experiment = load_experiment(overrides=(f'store.directory={sys.argv[1]}',))\n"
        "with tracking.parent_run(experiment) as parent, "
        "tracking.child_run(experiment.store, parent, 'knn', tags={}) as child:\n"
        "    print(parent, child, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(experiment.store.directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -9
    left_open = killed.stdout.split()
    assert [run_of(experiment.store, run_id)[0] for run_id in left_open] == ["RUNNING"] * 2
    with tracking.parent_run(experiment) as own:
        assert [run_of(experiment.store, run_id)[0] for run_id in left_open] == ["KILLED"] * 2
        assert tracking.close_abandoned_runs(experiment.store) == 0
        assert run_of(experiment.store, own)[0] == "RUNNING"


def test_prefect_learns_of_a_killed_process(experiment: Experiment, prefect_server: None) -> None:
    """Its page would say for ever that the flow runs."""
    script = (
        "import os, sys\nfrom prefect import flow\nfrom prefect.runtime import flow_run\n"
        "from conf.load import load_experiment\nfrom tasks import tracking\n"
        "experiment = load_experiment(overrides=(f'store.directory={sys.argv[1]}',))\n"
        "@flow\ndef dies():\n    with tracking.parent_run(experiment):\n"
        "        print(flow_run.id, flush=True)\n        os.kill(os.getpid(), 9)\ndies()\n"
    )
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    killed = subprocess.run(
        [sys.executable, "-c", script, str(experiment.store.directory)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    with get_client(sync_client=True) as client:
        left = UUID(killed.stdout.strip())
        assert client.read_flow_run(left).state_name == "Running"
        assert tracking.close_abandoned_runs(experiment.store) == 1
        assert client.read_flow_run(left).state_name == "Crashed"


def test_metrics_params_and_datasets_arrive(experiment: Experiment) -> None:
    store = experiment.store
    snapshot = Warehouse(store.directory).write_snapshot("labels", pa.table({"label": [0.5, 1.0]}))
    with tracking.parent_run(experiment) as run_id:
        tracking.log_metrics(store, run_id, {"apgr": 0.6, "cpt_50": float("nan")})
        tracking.log_params(store, run_id, {"trainer": {"max_epochs": 5}})
        tracking.log_dataset(store, run_id, snapshot, name="labels")
    run = MlflowClient(store.mlflow_uri()).get_run(run_id)
    assert run.data.metrics == {"apgr": 0.6}
    assert run.data.params == {"trainer.max_epochs": "5"}
    assert run.inputs is not None
    assert [found.dataset.digest for found in run.inputs.dataset_inputs] == [snapshot.digest]


def test_using_a_store_leaves_the_environment_as_it_was(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow writes its tracking URI there, which the next store would take for the user's wish."""
    here = Store(directory=store_directory)
    tracking.client(here)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert Store(directory=store_directory / "other").mlflow_uri() != here.mlflow_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here.mlflow_uri())
    elsewhere = Store(directory=store_directory / "other")
    assert tracking.client(elsewhere).tracking_uri == here.mlflow_uri()
    assert os.environ["MLFLOW_TRACKING_URI"] == here.mlflow_uri()


def test_the_store_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store().mlflow_uri() == f"sqlite:///{tmp_path / '.turnout' / 'mlflow.db'}"
    assert Store(tracking_uri="http://mlflow:5000").mlflow_uri() == "http://mlflow:5000"
    assert os.listdir(tmp_path) == []


def test_a_copied_store_reads_and_writes_its_own_artifacts(
    experiment: Experiment, tmp_path: Path
) -> None:
    """MLflow keeps absolute paths, so a backup would write into the original."""
    with tracking.parent_run(experiment) as run_id:
        tracking.client(experiment.store).log_text(run_id, "before", "note.txt")
    copied = Store(directory=tmp_path / "copy")
    shutil.copytree(experiment.store.directory, copied.directory)
    shutil.rmtree(experiment.store.directory / "artifacts")
    with tracking.parent_run(experiment.model_copy(update={"store": copied})) as new_id:
        tracking.client(copied).log_text(new_id, "after", "note.txt")
    kept = sorted((copied.directory / "artifacts").rglob("note.txt"))
    assert sorted(path.read_text() for path in kept) == ["after", "before"]
    assert not list(experiment.store.directory.rglob("note.txt"))
    client = MlflowClient(copied.mlflow_uri())
    assert Path(client.download_artifacts(run_id, "note.txt")).read_text() == "before"


@pytest.mark.parametrize("directory", ["project", "elsewhere"])
def test_the_revision_is_that_of_the_code_not_of_where_it_was_started(
    directory: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(tracking.__file__).parent.parent
    monkeypatch.chdir(root if directory == "project" else tmp_path)
    with tracking.parent_run(experiment) as run_id:
        _, tags = run_of(experiment.store, run_id)
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert tags.get(tracking.COMMIT_TAG, "") == head.stdout.strip()
    monkeypatch.setenv("TURNOUT_REVISION", "abc123")
    with tracking.parent_run(experiment) as run_id:
        _, tags = run_of(experiment.store, run_id)
    assert tags[tracking.COMMIT_TAG] == "abc123"
