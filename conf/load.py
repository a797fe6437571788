"""Read an experiment: a YAML file, `key=value` overrides, one validated model.

What the file holds says which kind it is: `llms` to be asked (`Experiment`), or `preferences` and
`benchmarks` (`PreferenceExperiment`).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import yaml
from pydantic import ValidationError

from conf.errors import ConfigError, unknown_name
from conf.schema import Benchmark, Experiment, Gate, PreferenceExperiment, experiment_kind

EXPERIMENTS = Path(__file__).parent / "experiments"
GATE = Path(__file__).parent / "gate.yaml"
DEFAULT: Literal["embedded"] = "embedded"


@overload
def load_experiment(
    config: Literal["embedded", "hybrid_llm_paper"] = DEFAULT, overrides: tuple[str, ...] = ()
) -> Experiment: ...


@overload
def load_experiment(
    config: Literal["routellm_paper"], overrides: tuple[str, ...] = ()
) -> PreferenceExperiment: ...


@overload
def load_experiment(
    config: str | Path, overrides: tuple[str, ...] = ()
) -> Experiment | PreferenceExperiment: ...


def load_experiment(
    config: str | Path = DEFAULT, overrides: tuple[str, ...] = ()
) -> Experiment | PreferenceExperiment:
    """Return the experiment called ``config``, or in that file, with ``overrides`` applied.

    An override is `dotted.key=value`, its value read as YAML. List entries are addressed by their
    name or position: `llms.smollm2.decoding.max_tokens=32`, `pairs.0.weak=smollm2`.

    Raises ConfigError for a file that is missing or no YAML, and for unknown or bad settings.
    """
    path = experiment_path(config)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not readable as YAML: {error}. Expected UTF-8 YAML. Correct the file."
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path} holds {type(settings).__name__}. Expected a mapping of settings. "
            f"Start from {EXPERIMENTS / 'embedded.yaml'}."
        )
    settings = _unshared(settings)
    if isinstance(settings.setdefault("gate", {}), dict):
        settings["gate"] = _gate_file() | settings["gate"]
    for override in overrides:
        apply_override(settings, override)
    if experiment_kind(settings) == "preferences":
        return validated(settings, where=str(path), model=PreferenceExperiment)
    return validated(settings, where=str(path))


def standard_gate() -> Gate:
    """Return the gate of conf/gate.yaml: that of every experiment which says nothing else."""
    return Gate.model_validate(_gate_file())


def _gate_file() -> dict[str, Any]:
    return dict(yaml.safe_load(GATE.read_text(encoding="utf-8")))


def _unshared(node: Any) -> Any:
    """Copy settings so that no part is shared: a YAML anchor makes two names for one mapping."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def experiment_path(config: str | Path) -> Path:
    """Return the file of an experiment given by name or by path."""
    path = Path(config)
    if path.suffix in {".yaml", ".yml"}:
        if not path.exists():
            raise ConfigError(
                f"There is no file {path}. Expected an experiment in YAML. Correct the path, or "
                f"name one of the bundled experiments: {', '.join(bundled())}."
            )
        return path
    if str(config) not in bundled():
        raise ConfigError(unknown_name("experiment", str(config), bundled()))
    return EXPERIMENTS / f"{config}.yaml"


def bundled() -> list[str]:
    """Return the names of the experiments that come with Turnout."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in ``settings``, in place.

    >>> settings = {"llms": [{"name": "small", "decoding": {}}]}
    >>> apply_override(settings, "llms.small.decoding.max_tokens=32")
    >>> settings
    {'llms': [{'name': 'small', 'decoding': {'max_tokens': 32}}]}
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"{override!r} is no override. Expected key=value, such as generation.samples=4. "
            "Write it so."
        )
    node: Any = settings
    part, rest = _first_part(node, key)
    while rest:
        node = _child(node, part, key)
        part, rest = _first_part(node, rest)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The value of {override!r} is not readable as YAML: {error}. Expected a number, a "
            "word, or a [list]. Quote it."
        ) from error
    if isinstance(node, list):
        node[_position(node, part, key)] = parsed
    else:
        node[part] = parsed


def _first_part(node: Any, key: str) -> tuple[str, str]:
    """Split a key after its first part; the name of a list's entry may hold dots (gpt-3.5)."""
    for name in sorted(_names(node), key=len, reverse=True) if isinstance(node, list) else ():
        if key == name or key.startswith(f"{name}."):
            return name, key[len(name) + 1 :]
    part, _, rest = key.partition(".")
    return part, rest


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, key)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"{key!r} goes through {part!r}, which is the plain value {child!r}. Expected a group "
            "of settings there. Correct the key."
        )
    return child


def _names(entries: list[Any]) -> list[str]:
    return [
        str(entry.get("name", index)) if isinstance(entry, dict) else str(index)
        for index, entry in enumerate(entries)
    ]


def _position(entries: list[Any], part: str, key: str) -> int:
    names = _names(entries)
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    raise ConfigError(unknown_name(f"entry of {key!r}", part, names))


def load_benchmark(
    routers: Sequence[str], settings: dict[str, Any], overrides: tuple[str, ...] = ()
) -> Benchmark:
    """Return the benchmark of ``settings`` with these kinds of routers, and random beside them.

    Overrides are as in `load_experiment`; a router is addressed by its kind: `routers.mf.noise=0`.
    Raises ConfigError for an unknown kind, and for unknown or bad settings.
    """
    named = [name.strip() for name in routers]
    if not named or not all(named):
        raise ConfigError(
            f"The routers are {','.join(routers)!r}: a name is empty. Expected kinds of routers "
            "with a comma between them. Give --routers kernel_ridge,knn, for instance."
        )
    kinds = list(dict.fromkeys([*named, "random"]))
    settings = {**settings, "routers": [{"router": kind, "name": kind} for kind in kinds]}
    for override in overrides:
        apply_override(settings, override)
    found = validated(settings, where="the benchmark's options", model=Benchmark)
    if labelled := [one.name for one in found.routers if "labels" in one.model_fields_set]:
        raise ConfigError(
            f"routers.{labelled[0]}.labels is set. Expected no kind of label: a benchmark's "
            "routers learn from who was right, a tie counting half. Leave it out."
        )
    return found


@overload
def validated(settings: dict[str, Any], *, where: str) -> Experiment: ...


@overload
def validated(settings: dict[str, Any], *, where: str, model: type[Benchmark]) -> Benchmark: ...


@overload
def validated(
    settings: dict[str, Any], *, where: str, model: type[PreferenceExperiment]
) -> PreferenceExperiment: ...


def validated(
    settings: dict[str, Any],
    *,
    where: str,
    model: type[Experiment | Benchmark | PreferenceExperiment] = Experiment,
) -> Experiment | Benchmark | PreferenceExperiment:
    """Return the model that ``settings`` describe, or say what is wrong with them."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_readable(error, where)) from error


def _readable(error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{location}: no such setting (got {problem['input']!r})")
        elif problem["type"] == "union_tag_invalid":
            tag = problem["ctx"]
            kinds = [kind.strip("'") for kind in tag["expected_tags"].split(", ")]
            unknown = unknown_name(tag["discriminator"].strip("'"), tag["tag"], kinds)
            lines.append(f"{location}: {unknown}")
        else:
            lines.append(f"{location}: {problem['msg']} (got {problem['input']!r})")
    return (
        f"{len(lines)} setting(s) in {where} cannot be used:\n  "
        + "\n  ".join(lines)
        + "\nExpected the settings that the models in conf describe. Correct them and run again."
    )


def config_digest(settings: Any) -> str:
    """Return a short hash of settings (a model or plain JSON values), the same on every machine."""
    plain = settings.model_dump(mode="json") if hasattr(settings, "model_dump") else settings
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
