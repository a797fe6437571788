"""Preflight: what would stop a run later is found before the first request costs money.

Prompts are rendered, keys and addresses looked up, scorers and encoders found and their settings
read, and every query is held against what the metrics compare with. No LLM is asked and no weights
are loaded. An LLM whose responses are all in the warehouse needs neither key nor address.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from string import Formatter
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from conf.errors import ArtifactError, ConfigError, DataError, EndpointError, TurnoutError
from conf.llms import LLM
from conf.preferences import Preferences, PreferenceSource
from conf.schema import (
    BartScore,
    BenchmarkFolder,
    Experiment,
    GoldMatch,
    PreferenceExperiment,
    QualityMetric,
)
from router_models.encoders import check_encoder
from router_models.packaged import smollm2_gguf
from router_models.transformer import PACKAGED
from tasks.endpoints import api_key, weights_file
from tasks.generation import missing_requests, prompt_table, rendered_prompts
from tasks.journal import recover_journals
from tasks.preference_sources import FORMATS
from tasks.scoring import metric_fingerprint, scorer_checkpoint
from tasks.shards import recover_shards
from tasks.warehouse import Snapshot, Warehouse

# More characters than a token has in any ordinary text: what is too long even so is so for sure.
CHARACTERS_PER_TOKEN = 8
EXAMPLES = 3  # query ids that an error message quotes


def preflight(experiment: Experiment, queries: Snapshot) -> None:
    """Raise one error with everything that stands in the way of this run.

    Raises ConfigError, DataError, ArtifactError or EndpointError, whichever comes first.
    """
    warehouse = Warehouse(experiment.store.directory)
    recover_journals(warehouse)
    recover_shards(warehouse, experiment.compute)
    _raise_all(_checks(experiment, queries))


def preference_preflight(experiment: PreferenceExperiment) -> None:
    """Raise one error with everything that stands in the way of a run without LLMs; as above."""
    _raise_all(_preference_checks(experiment))


def _raise_all(checks: Iterable[Callable[[], None]]) -> None:
    problems: list[TurnoutError] = []
    for check in checks:
        try:
            check()
        except TurnoutError as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise type(problems[0])(
            f"{len(problems)} things stand in the way of this run, and nothing was asked yet:\n"
            f"{listed}"
        )


def _checks(experiment: Experiment, queries: Snapshot) -> Iterator[Callable[[], None]]:
    for llm in experiment.llms:
        yield partial(check_prompts, llm, queries)
        yield partial(_check_access_if_asked, experiment, queries, llm)
    for metric in experiment.quality.metrics:
        yield partial(check_compared_with, metric, queries)
        yield partial(check_scorer, metric)
    for name in base_models(experiment):
        yield partial(check_base_model, name)
    if experiment.preferences is not None:
        yield from _source_checks(experiment.preferences)


def _preference_checks(experiment: PreferenceExperiment) -> Iterator[Callable[[], None]]:
    for folder in experiment.benchmarks:
        yield partial(check_benchmark, folder)
    yield from _source_checks(experiment.preferences)
    for name in base_models(experiment):
        yield partial(check_base_model, name)


def _source_checks(preferences: Preferences) -> Iterator[Callable[[], None]]:
    for source in preferences.sources:
        yield partial(check_source, source)
    if preferences.judge is not None:
        yield partial(check_access, preferences.judge.llm)


def check_benchmark(folder: BenchmarkFolder) -> None:
    """Find a benchmark's folder and CSVs, and its list of contaminated prompts if it has one."""
    if not any(folder.directory.glob("*.csv")):
        raise DataError(
            f"The benchmark {folder.name!r} has no CSV in {folder.directory}. Expected a folder of "
            "answers in RouteLLM's layout. Fetch it, or set benchmarks."
            f"{folder.name}.directory."
        )
    if folder.contaminated is not None and not folder.contaminated.exists():
        raise DataError(
            f"The benchmark {folder.name!r} has no file {folder.contaminated}. Expected a list of "
            f"contaminated prompts. Set benchmarks.{folder.name}.contaminated, to null for none."
        )


def check_source(source: PreferenceSource) -> None:
    """Find what battles are read from; a name on a hub is left to the run."""
    if source.path is None or (source.kind == "arena" and _is_hub_name(source.path)):
        return
    path, expected = Path(source.path), "a file or a folder"
    found = path.exists()
    if source.kind == "alpaca":
        expected = "a folder with queries.parquet and preferences.parquet"
        found = all((path / name).exists() for name in ("queries.parquet", "preferences.parquet"))
    if not found:
        raise DataError(
            f"The {source.kind} source of preferences is not at {path}. Expected {expected}. "
            "Fetch it, correct preferences.sources.path, or take the source out."
        )


def _is_hub_name(path: str) -> bool:
    """Tell whether a path is no local one, and of the form owner/name.

    >>> _is_hub_name("lmsys/lmsys-arena-human-preference-55k"), _is_hub_name("data/battles.jsonl")
    (True, False)
    """
    suffix = Path(path).suffix.lower()
    return suffix not in FORMATS and len(Path(path).parts) == 2 and not Path(path).exists()


def base_models(experiment: Experiment | PreferenceExperiment) -> list[str]:
    """Return the encoders and language models that the configured routers start from."""
    settings = [router.model_dump() for router in experiment.routers]
    names = [found.get("encoder", found.get("model")) for found in settings]
    names += [name for found in settings for name in found.get("encoders", ())]
    return list(dict.fromkeys(str(name) for name in names if name))


def check_prompts(llm: LLM, queries: Snapshot) -> None:
    """Render every prompt; refuse those that an embedded server can have no room for."""
    prompts = rendered_prompts(queries, llm)
    if llm.endpoint.kind != "embedded":
        return
    room, system = llm.endpoint.context_tokens - llm.decoding.max_tokens, len(llm.system or "")
    least = {key: (len(prompt) + system) // CHARACTERS_PER_TOKEN for key, prompt in prompts.items()}
    if too_long := [key for key, tokens in least.items() if tokens > room]:
        rows = queries.read().select(["query_key", "query_id"]).to_pylist()
        ids = [row["query_id"] for row in rows if row["query_key"] in set(too_long)]
        raise DataError(
            f"{len(ids)} of {len(rows)} prompts for {llm.name!r} are too long, such as those of "
            f"{_some(ids)}: the longest has at least {max(least.values())} tokens. Expected at "
            f"most {llm.endpoint.context_tokens} with the answer, for which "
            f"{llm.decoding.max_tokens} are kept. Raise llms.{llm.name}.endpoint.context_tokens, "
            "or drop the queries."
        )


def _check_access_if_asked(experiment: Experiment, queries: Snapshot, llm: LLM) -> None:
    try:
        prompts = prompt_table(queries, llm)
    except DataError:
        return  # check_prompts has told
    warehouse = Warehouse(experiment.store.directory)
    if missing_requests(warehouse, prompts, experiment.generation.samples):
        check_access(llm)


def check_access(llm: LLM) -> None:
    """Look up the key and the address of a remote LLM, or the weights of an embedded one."""
    if llm.endpoint.kind == "openai":
        api_key(llm)
        _check_address(llm.name, str(llm.endpoint.url))
        return
    weights_file(llm)
    if find_spec("xllamacpp") is None:
        raise ArtifactError(
            f"The Python package xllamacpp, which serves {llm.name!r}, is not installed. Expected "
            "it beside Turnout. Install it: pip install xllamacpp"
        )


def check_compared_with(metric: QualityMetric, queries: Snapshot) -> None:
    """Refuse queries without the reference or gold answers that ``metric`` compares with."""
    if not isinstance(metric, BartScore | GoldMatch):
        return
    column = "gold" if isinstance(metric, GoldMatch) else "reference"
    rows = queries.read().select(["query_id", column]).to_pylist()
    if lacking := [row["query_id"] for row in rows if not row[column]]:
        raise DataError(
            f"{len(lacking)} of {len(rows)} queries have no {column}, such as {_some(lacking)}: "
            f"{metric.name!r} compares responses with it. Expected one for every query. Add them, "
            f"or take {metric.name!r} out of quality.metrics."
        )


def check_scorer(metric: QualityMetric) -> None:
    """Find a scorer's checkpoint and read its settings; from a hub, this downloads it."""
    if not isinstance(metric, BartScore):
        return
    from metrics.bartscore.checkpoint import check_checkpoint

    try:
        fields = {name for _, name, _, _ in Formatter().parse(metric.source_form) if name}
        metric.source_form.format(query="", text="")
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"The source_form of {metric.name!r} cannot be filled: {error}. Expected {{text}} and, "
            "if wanted, {query}, and other braces doubled. Correct it in quality.metrics."
        ) from error
    if "text" not in fields:
        raise ConfigError(
            f"The source_form of {metric.name!r} is {metric.source_form!r}, without {{text}}. "
            "Expected {text} where the source goes. Correct it in quality.metrics."
        )
    metric_fingerprint(metric)
    check_checkpoint(
        scorer_checkpoint(metric), architecture=metric.architecture, max_length=metric.max_length
    )


def check_base_model(name: str) -> None:
    """Find a model and read its settings, or look up the address of its endpoint."""
    if name.partition("@")[0] == "smollm2-135m":
        smollm2_gguf()
        return
    check_encoder(name)
    if name.startswith("openai:"):
        _check_address(name, name.removeprefix("openai:").partition("#")[0])


def is_to_be_downloaded(name: str) -> bool:
    """Tell whether ``name`` is that of a hub's model whose files are not on this machine."""
    if name.partition("@")[0] in PACKAGED or Path(name).expanduser().exists():
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return not isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _check_address(what: str, url: str) -> None:
    """Look up a host's name, unless a proxy does that."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        socket.getaddrinfo(host, parts.port or parts.scheme)
    except (OSError, UnicodeError) as error:
        raise EndpointError(
            f"The host {host!r} of {what!r} is not known here: {error}. Expected a name that "
            f"resolves, or an address. Correct {url}, or see to the network."
        ) from error


def _some(ids: list[str]) -> str:
    return ", ".join(map(repr, ids[:EXAMPLES]))
