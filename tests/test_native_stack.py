"""The stack of docs/operations.md, natively: Postgres, Prefect, MLflow, a worker, one fired run.

Everything is a real process on loopback with a folder of its own, and nothing of it is left.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psycopg2
import pytest
import yaml

ROOT = Path(__file__).parent.parent
QUERIES, SAMPLES = 60, 2


def postgres_programs() -> Path | None:
    """Return the folder of Postgres' server programs, the newest; Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: path.parts)
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


POSTGRES = postgres_programs()

pytestmark = [
    pytest.mark.stack,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        POSTGRES is None, reason="Postgres is not installed: apt-get install postgresql"
    ),
]


@dataclass(frozen=True)
class Stack:
    """Where the servers of the stack answer, and the environment of what talks to them."""

    prefect_url: str
    mlflow_url: str
    databases: dict[str, str]
    environment: dict[str, str]
    directory: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], Any], *, seconds: float, what: str, log: Path | None = None) -> Any:
    """Wait until ``holds`` returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.3)
    said = "" if log is None else log.read_text()[-3000:]
    pytest.fail(f"{what} within {seconds:.0f} s did not come about\n{said}")


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@contextmanager
def process(
    command: Sequence[str], *, environment: dict[str, str], directory: Path, log: Path
) -> Iterator[None]:
    """Run a server in a session of its own, so that its children end with it."""
    with log.open("w") as stream:
        running = subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(running.pid, sign)
                    running.wait(timeout=10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """Start a Postgres of its own, as `postgres` if we are root; yield its two databases' URLs."""
    assert POSTGRES is not None
    # Not below pytest's folders, which only we may enter.
    directory = Path(tempfile.mkdtemp(prefix="turnout-postgres-"))
    account: list[str] = []
    if os.geteuid() == 0:  # Postgres refuses to run as root
        shutil.chown(directory, "postgres", "postgres")
        account = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    password, port, data = secrets.token_hex(16), free_port(), directory / "data"
    secret = directory / "password"
    secret.write_text(password)
    secret.chmod(0o644)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [*account, str(POSTGRES / program), *arguments],
            cwd=directory,
            check=True,
            capture_output=True,
            timeout=60,
        )

    try:
        run(
            *("initdb", "--pgdata", str(data), "--username", "postgres", "--encoding", "UTF8"),
            *("--auth", "scram-sha-256", "--pwfile", str(secret)),
        )
        # fsync would only guard these databases against a power cut.
        options = f"-p {port} -k {directory} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(directory / "log")
        run("pg_ctl", "start", "--wait", "--pgdata", str(data), "-o", options, "--log", log)
        address = f"{{user}}:{password}@127.0.0.1:{port}/{{database}}"
        admin = psycopg2.connect(
            "postgresql://" + address.format(user="postgres", database="postgres")
        )
        admin.autocommit = True
        with admin.cursor() as cursor:
            for name in ("prefect", "mlflow"):
                cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
                cursor.execute(f"CREATE DATABASE {name} OWNER {name}")
        admin.close()
        yield {name: address.format(user=name, database=name) for name in ("prefect", "mlflow")}
    finally:
        if (data / "postmaster.pid").exists():
            run("pg_ctl", "stop", "--pgdata", str(data), "--mode", "immediate")
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Postgres, and on it a Prefect server and an MLflow server."""
    directory = tmp_path_factory.mktemp("stack")
    prefect_port, mlflow_port = free_port(), free_port()
    prefect, mlflow = (f"http://127.0.0.1:{port}" for port in (prefect_port, mlflow_port))
    hidden = ("PREFECT_", "MLFLOW_")
    base = {
        **{key: value for key, value in os.environ.items() if not key.startswith(hidden)},
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(directory / "prefect-home"),
    }
    # Servers as docs/operations.md starts them.
    with ExitStack() as running:
        databases = running.enter_context(postgres())
        running.enter_context(
            process(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                    *("--port", str(mlflow_port), "--workers", "1", "--allowed-hosts"),
                    *(f"127.0.0.1:{mlflow_port}", "--serve-artifacts"),
                    *("--artifacts-destination", str(directory / "served-artifacts")),
                ],
                environment=base
                | {
                    "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{databases['mlflow']}",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
                directory=directory,
                log=directory / "mlflow.log",
            )
        )
        url = f"postgresql+asyncpg://{databases['prefect']}"
        running.enter_context(
            process(
                [
                    *(sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"),
                    *("--port", str(prefect_port)),
                ],
                environment=base | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url},
                directory=directory,
                log=directory / "prefect.log",
            )
        )
        for name, health in (("prefect", f"{prefect}/api/health"), ("mlflow", f"{mlflow}/health")):
            log = directory / f"{name}.log"
            until(partial(answers, health), seconds=120, what=f"an answer of {name}", log=log)
        yield Stack(
            prefect_url=f"{prefect}/api",
            mlflow_url=mlflow,
            databases=databases,
            environment=base | {"PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow},
            directory=directory,
        )


def experiment_file(directory: Path, llm_url: str) -> Path:
    """Write an experiment whose strong LLM reads the answer in its prompt and repeats it."""
    settings = {
        "name": "stack",
        "queries": {"source": "bundled", "limit": QUERIES},
        "llms": [
            {"name": name, "model": name, "endpoint": {"url": llm_url}, "template": template}
            for name, template in {"weak": "{text}", "strong": "{text} {context}"}.items()
        ],
        "pairs": [{"weak": "weak", "strong": "strong"}],
        "generation": {"samples": SAMPLES},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [{"router": "knn"}],
        "evaluation": {"replicates": 200, "folds": 2},
    }
    path = directory / "stack.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rows(database: str, query: str) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(f"postgresql://{database}")
    try:
        with connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())
    finally:
        connection.close()


@contextmanager
def scripted_llm(directory: Path) -> Iterator[str]:
    port_file = directory / "port"
    command = [
        *(sys.executable, str(ROOT / "tests" / "scripted_llm.py")),
        *("--port-file", str(port_file), "--log", str(directory / "asked.jsonl")),
    ]
    log = directory / "llm.log"
    with process(command, environment=dict(os.environ), directory=directory, log=log):
        until(port_file.exists, seconds=20, what="the scripted LLM", log=log)
        yield f"http://127.0.0.1:{port_file.read_text()}/v1"


def test_a_schedule_fires_and_a_worker_retrains_with_postgres_behind_both(stack: Stack) -> None:
    worker_log = stack.directory / "worker.log"
    with scripted_llm(stack.directory) as llm_url:
        deployed = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "flows.cli",
                    "deploy",
                    "--cron",
                    "* * * * *",
                    "--timezone",
                    "UTC",
                ),
                *("--config", str(experiment_file(stack.directory, llm_url))),
            ],
            env=stack.environment,
            cwd=stack.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert deployed.returncode == 0, deployed.stderr
        assert "work pool turnout (process) created" in deployed.stdout
        worker = [
            *(sys.executable, "-m", "prefect", "worker", "start", "--pool", "turnout"),
            *("--type", "process", "--limit", "1"),
        ]
        with process(
            worker, environment=stack.environment, directory=stack.directory, log=worker_log
        ):

            def ended() -> list[tuple[Any, ...]]:
                return rows(
                    stack.databases["prefect"],
                    "SELECT r.state_type::text, r.state_name, r.auto_scheduled, r.created_by::text,"
                    " r.work_queue_name FROM flow_run r JOIN flow f ON f.id = r.flow_id"
                    " WHERE f.name = 'retrain' AND r.end_time IS NOT NULL ORDER BY r.end_time",
                )

            state, name, auto_scheduled, created_by, _ = until(
                ended, seconds=200, what="a scheduled run that ended", log=worker_log
            )[0]
    said = worker_log.read_text()[-3000:]
    assert (state, name, auto_scheduled) == ("COMPLETED", "Rejected", True), said
    assert "schedule" in created_by.lower()

    # Its run is in MLflow's database, its router in the registry, its artifacts on the server.
    mlflow = stack.databases["mlflow"]
    assert rows(mlflow, "SELECT status FROM runs WHERE name = 'stack'")[0] == ("FINISHED",)
    versions = rows(mlflow, "SELECT name, version FROM model_versions")
    assert versions == [("weak--strong", 1)]
    assert list((stack.directory / "served-artifacts").rglob("receipt.json"))
    # Relative paths meant the folder in which `turnout deploy` was called.
    assert (stack.directory / ".turnout" / "warehouse.duckdb").exists()
    assert not (stack.directory / ".turnout" / "mlflow.db").exists()
