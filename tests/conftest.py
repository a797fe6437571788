"""Shared fixtures: private directories, a ready MLflow store, one Prefect server."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ |= {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Two workers, or other processes, share the cores: threads that wait for each other spin, and take
# ten times as long. Before torch is imported, and so for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take long when several workers share them, a file at a time.

    Last, one of them would keep one worker busy and leave the other without work.
    """
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from a tracking server of the developer's, or of an earlier test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its schema and nothing in it: making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store_directory(tmp_path: Path, empty_mlflow_database: Path) -> Path:
    """A store's directory with an empty MLflow database of its own."""
    directory = tmp_path / "store"
    directory.mkdir()
    shutil.copy(empty_mlflow_database, directory / "mlflow.db")
    return directory


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server for the session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
