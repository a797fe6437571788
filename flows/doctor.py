"""`turnout doctor`: what is installed, reachable and configured, and what to do about the rest.

The stages are imported only once the packages are known to be there: a missing one is a finding.
"""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from conf.errors import TurnoutError
from conf.llms import LLM
from conf.preferences import Preferences, PreferenceSource
from conf.schema import (
    BartScore,
    BenchmarkFolder,
    Compute,
    Experiment,
    PreferenceExperiment,
    QualityMetric,
)

if TYPE_CHECKING:
    from tasks.warehouse import Snapshot

PACKAGES = ("prefect", "mlflow", "torch", "lightning", "datasets", "evaluate", "duckdb")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


def findings(experiment: Experiment | PreferenceExperiment) -> list[Finding]:
    """Look at packages, store, servers, and every LLM, scorer, source and base model configured.

    Where a package is missing, only the packages are looked at: the rest needs them.
    """
    packages = list(_packages())
    if not all(package.ok for package in packages):
        return packages
    found = [*packages, _warehouse(experiment), _tracking(experiment), _orchestrator()]
    if isinstance(experiment, Experiment):
        found += _cluster(experiment.compute)
        asked, queries = _queries(experiment)
        found.append(asked)
        found += [_llm(llm, queries) for llm in experiment.llms]
        found += [_metric(metric, queries) for metric in experiment.quality.metrics]
    else:
        found += [_benchmark(folder) for folder in experiment.benchmarks]
    if experiment.preferences is not None:
        found += _sources(experiment.preferences)
    return [*found, *_base_models(experiment)]


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, "not installed", "make install")


def _warehouse(experiment: Experiment | PreferenceExperiment) -> Finding:
    from tasks.warehouse import Warehouse

    directory = experiment.store.directory
    try:
        count = Warehouse(directory).query("SELECT count(*) AS n FROM responses")["n"][0].as_py()
    except (TurnoutError, OSError) as error:
        return Finding("warehouse", False, str(error), f"see to {directory}")
    return Finding("warehouse", True, f"{count} responses in {directory}")


def _tracking(experiment: Experiment | PreferenceExperiment) -> Finding:
    from tasks import tracking

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


def _cluster(compute: Compute) -> Iterator[Finding]:
    def look() -> str:
        from tasks.cluster import check_cluster

        return check_cluster(compute)

    if compute.kind == "ray":
        yield _looked_at("ray", look)


def _queries(experiment: Experiment) -> "tuple[Finding, Snapshot | None]":
    """Read the configured queries, unless they would have to be downloaded."""
    from tasks.queries import query_table
    from tasks.warehouse import Warehouse

    settings = experiment.queries
    if settings.source == "mixinstruct" and not Path(settings.path).exists():
        return Finding("queries", True, f"{settings.path}, from the hub when a run needs it"), None
    try:
        rows = query_table(settings)
        snapshot = Warehouse(experiment.store.directory).write_snapshot("queries", rows)
    except TurnoutError as error:
        return _explained("queries", error), None
    return Finding("queries", True, f"{rows.num_rows} from {settings.source}"), snapshot


def _llm(llm: LLM, queries: "Snapshot | None") -> Finding:
    key, url = llm.endpoint.api_key_env, str(llm.endpoint.url)
    remote = llm.endpoint.kind == "openai"
    if remote and key and not os.environ.get(key):
        return Finding(llm.name, False, f"${key} is not set", f"export {key}=…")
    if remote and not _answers(url):
        return Finding(llm.name, False, f"{url} does not answer", "start it, or correct the url")

    def look() -> str:
        from tasks.endpoints import weights_file
        from tasks.preflight import check_access, check_prompts

        check_access(llm)
        if queries is not None:
            check_prompts(llm, queries)
        return url if remote else str(weights_file(llm))

    return _looked_at(llm.name, look)


def _metric(metric: QualityMetric, queries: "Snapshot | None") -> Finding:
    def look() -> str:
        from tasks.preflight import check_compared_with, check_scorer, is_to_be_downloaded
        from tasks.scoring import scorer_checkpoint

        if queries is not None:
            check_compared_with(metric, queries)
        if not isinstance(metric, BartScore):
            return metric.metric
        checkpoint = scorer_checkpoint(metric)
        if is_to_be_downloaded(checkpoint):
            return f"{checkpoint}, from the hub when a run needs it"
        check_scorer(metric)
        return checkpoint

    return _looked_at(f"metric {metric.name}", look)


def _benchmark(folder: BenchmarkFolder) -> Finding:
    def look() -> str:
        from tasks.preflight import check_benchmark

        check_benchmark(folder)
        return f"{len(list(folder.directory.glob('*.csv')))} files in {folder.directory}"

    return _looked_at(f"benchmark {folder.name}", look)


def _sources(preferences: Preferences) -> Iterator[Finding]:
    from tasks.preflight import check_source

    for source in preferences.sources:

        def look(source: PreferenceSource = source) -> str:
            check_source(source)
            if source.path is None:
                return "made from the run's responses"
            local = Path(source.path).exists()
            return source.path if local else f"{source.path}, from the hub when a run needs it"

        yield _looked_at(f"battles {source.path or source.kind}", look)
    if preferences.judge is not None:
        yield _llm(preferences.judge.llm, None)


def _base_models(experiment: Experiment | PreferenceExperiment) -> Iterator[Finding]:
    from tasks.preflight import base_models, check_base_model, is_to_be_downloaded

    for name in base_models(experiment):

        def look(name: str = name) -> str:
            if is_to_be_downloaded(name):
                return f"{name}, from the hub when a run needs it"
            check_base_model(name)
            return name

        yield _looked_at(f"model {name}", look)


def _looked_at(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except TurnoutError as error:
        return _explained(what, error)


def _explained(what: str, error: TurnoutError) -> Finding:
    """Return a finding from a message's three parts: what is wrong, expected, to be done."""
    wrong, _, rest = str(error).partition(" Expected ")
    return Finding(what, False, wrong, rest.partition(". ")[2] or rest)


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((str(parts.hostname), port), timeout=3):
            return True
    except OSError:
        return False
