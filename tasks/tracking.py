"""MLflow runs: one parent for a pipeline run, one child for each router.

The active run of MLflow is a thing of the thread, so every call here names its run. A child is
found again by its parent and router, so that a retried task goes on in the same run.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from conf.schema import Experiment, Store
from tasks.warehouse import Snapshot

if TYPE_CHECKING:
    from mlflow import MlflowClient

# One run of this experiment at a time in a process; how a run that nobody closed is recognised.
PROCESS_TAG = "turnout.process"
PARENT_TAG = "mlflow.parentRunId"
ROUTER_TAG = "turnout.router"
PAIR_TAG = "turnout.pair"


def client(store: Store) -> "MlflowClient":
    """Return an MLflow client on this store, creating its directory and experiment if needed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    store.directory.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(store.mlflow_uri())
    mlflow.set_registry_uri(store.mlflow_uri())
    return mlflow.MlflowClient()


def experiment_id(store: Store) -> str:
    """Return the id of the store's MLflow experiment, creating it on first use."""
    mlflow_client = client(store)
    found = mlflow_client.get_experiment_by_name(store.experiment)
    if found is not None:
        return str(found.experiment_id)
    local = store.tracking_uri is None
    location = (store.directory.resolve() / "artifacts").as_uri() if local else None
    return str(mlflow_client.create_experiment(store.experiment, artifact_location=location))


def run_url(store: Store, run_id: str) -> str:
    """Return where MLflow's UI shows a run: its server, or the one that `turnout ui` starts."""
    uri = store.mlflow_uri()
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment_id(store)}/runs/{run_id}"


@contextmanager
def parent_run(experiment: Experiment) -> Iterator[str]:
    """Open the run of one pipeline run and yield its id; it is closed whatever happens."""
    import mlflow

    close_abandoned_runs(experiment.store)
    tags = {PROCESS_TAG: _this_process(), "turnout.kind": "pipeline", **_revision()}
    run = client(experiment.store).create_run(
        experiment_id(experiment.store), run_name=experiment.name, tags=tags
    )
    with _closing(run.info.run_id):
        mlflow.MlflowClient().log_dict(
            run.info.run_id, experiment.model_dump(mode="json"), "config.json"
        )
        yield run.info.run_id


@contextmanager
def child_run(store: Store, parent_id: str, name: str, *, tags: Mapping[str, str]) -> Iterator[str]:
    """Open, or after a retry reopen, the child of ``parent_id`` for one router; yield its id."""
    mlflow_client = client(store)
    own = {**tags, ROUTER_TAG: name}
    clauses = [f"tags.`{tag}` = '{value}'" for tag, value in {PARENT_TAG: parent_id, **own}.items()]
    found = mlflow_client.search_runs([experiment_id(store)], " AND ".join(clauses))
    if found:
        run_id = found[0].info.run_id
        mlflow_client.update_run(run_id, status="RUNNING")
    else:
        run = mlflow_client.create_run(
            experiment_id(store), run_name=name, tags={PARENT_TAG: parent_id, **own}
        )
        run_id = run.info.run_id
    with _closing(run_id):
        yield run_id


@contextmanager
def _closing(run_id: str) -> Iterator[None]:
    """End the run as FINISHED, or as FAILED with the reason when the block raises."""
    from mlflow import MlflowClient

    try:
        yield
    except BaseException as error:
        MlflowClient().set_tag(run_id, "turnout.error", f"{type(error).__name__}: {error}"[:5000])
        MlflowClient().set_terminated(run_id, "FAILED")
        raise
    MlflowClient().set_terminated(run_id, "FINISHED")


def close_abandoned_runs(store: Store) -> int:
    """Mark as KILLED the runs that a process of this machine, now gone, left open; count them."""
    mlflow_client = client(store)
    abandoned = 0
    for run in mlflow_client.search_runs([experiment_id(store)], "attributes.status = 'RUNNING'"):
        owner = run
        if PARENT_TAG in run.data.tags:
            owner = mlflow_client.get_run(run.data.tags[PARENT_TAG])
        if _is_gone(owner.data.tags.get(PROCESS_TAG, "")):
            mlflow_client.set_terminated(run.info.run_id, "KILLED")
            abandoned += 1
    return abandoned


def _this_process() -> str:
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())}"


def _is_gone(process: str) -> bool:
    """Tell whether a process of this machine has ended; of other machines nothing is known."""
    host, _, rest = process.partition(" ")
    pid, _, started = rest.partition(" ")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    return _started(int(pid)) != started


def _started(pid: int) -> str:
    """Return when a process started, so that a reused process id is not mistaken for it."""
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return "ended"


def _revision() -> dict[str, str]:
    """Return the git revision of the working directory as a tag, where there is one."""
    if shutil.which("git") is None:
        return {}
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}


def log_dataset(store: Store, run_id: str, snapshot: Snapshot, *, name: str) -> None:
    """Attach a snapshot (name, digest, rows) to a run as a dataset input."""
    from mlflow.entities import Dataset, DatasetInput

    dataset = Dataset(
        name=name,
        digest=snapshot.digest,
        source_type="local",
        source=json.dumps({"uri": str(snapshot.path)}),
        profile=json.dumps({"num_rows": snapshot.rows}),
    )
    client(store).log_inputs(run_id, [DatasetInput(dataset)])


def log_metrics(store: Store, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Log metrics in one call; NaN values are left out, for MLflow cannot order by them."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entries = [
        Metric(name, float(value), now, step)
        for name, value in metrics.items()
        if math.isfinite(value)
    ]
    client(store).log_batch(run_id, metrics=entries)


def log_params(store: Store, run_id: str, settings: Mapping[str, Any]) -> None:
    """Log settings as parameters, nested ones under dotted names."""
    from mlflow.entities import Param

    params = [Param(key, str(value)[:6000]) for key, value in flattened(settings).items()]
    client(store).log_batch(run_id, params=params)


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names.

    >>> flattened({"trainer": {"max_epochs": 5}, "name": "knn"})
    {'trainer.max_epochs': 5, 'name': 'knn'}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
