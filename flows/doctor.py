"""`turnout doctor`: what is installed, reachable and configured, and what to do about the rest."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

from conf.errors import TurnoutError
from conf.schema import LLM, Experiment
from tasks import tracking
from tasks.endpoints import weights_file
from tasks.warehouse import Warehouse

PACKAGES = ("prefect", "mlflow", "torch", "lightning", "datasets", "evaluate", "duckdb")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


def findings(experiment: Experiment) -> list[Finding]:
    """Look at packages, store, tracking server and every configured LLM."""
    return [
        *_packages(),
        _warehouse(experiment),
        _tracking(experiment),
        _orchestrator(),
        *_llms(experiment),
    ]


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, "not installed", "make install")


def _warehouse(experiment: Experiment) -> Finding:
    directory = experiment.store.directory
    try:
        count = Warehouse(directory).query("SELECT count(*) AS n FROM responses")["n"][0].as_py()
    except (TurnoutError, OSError) as error:
        return Finding("warehouse", False, str(error), f"see to {directory}")
    return Finding("warehouse", True, f"{count} responses in {directory}")


def _tracking(experiment: Experiment) -> Finding:
    uri = experiment.store.mlflow_uri()
    if uri.startswith("http") and not _answers(uri):
        return Finding("MLflow", False, f"{uri} does not answer", "start it, or correct store")
    client = tracking.client(experiment.store)
    found = client.get_experiment_by_name(experiment.store.experiment)
    runs = len(client.search_runs([found.experiment_id])) if found else 0
    return Finding("MLflow", True, f"{runs} runs at {uri}")


def _orchestrator() -> Finding:
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return Finding("Prefect", True, "no server configured: each run starts a temporary one")
    if not _answers(url):
        return Finding("Prefect", False, f"{url} does not answer", "prefect server start")
    return Finding("Prefect", True, url)


def _llms(experiment: Experiment) -> Iterator[Finding]:
    for llm in experiment.llms:
        yield _embedded(llm) if llm.endpoint.kind == "embedded" else _remote(llm)


def _embedded(llm: LLM) -> Finding:
    try:
        return Finding(llm.name, True, str(weights_file(llm)))
    except TurnoutError as error:
        return Finding(llm.name, False, str(error), "make install, or correct endpoint.weights")


def _remote(llm: LLM) -> Finding:
    key, url = llm.endpoint.api_key_env, str(llm.endpoint.url)
    if key and not os.environ.get(key):
        return Finding(llm.name, False, f"${key} is not set", f"export {key}=…")
    if not _answers(url):
        return Finding(llm.name, False, f"{url} does not answer", "start it, or correct the url")
    return Finding(llm.name, True, url)


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((str(parts.hostname), port), timeout=3):
            return True
    except OSError:
        return False
