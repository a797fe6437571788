"""The errors a user can meet. Each message says what was wrong, what was expected, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class TurnoutError(Exception):
    """Root of every error that Turnout raises on purpose."""


class ConfigError(TurnoutError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(TurnoutError):
    """Input rows or arrays cannot be used as they are."""


class EndpointError(TurnoutError):
    """An LLM endpoint cannot be reached or keeps failing."""


class BudgetError(TurnoutError):
    """A run would spend more than it was allowed to."""


class StoreError(TurnoutError):
    """The warehouse cannot be opened, is locked, or is damaged."""


class ArtifactError(TurnoutError):
    """A saved router, cache file or registered version is missing or damaged."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that ``name`` is no known ``kind``, and suggest the nearest one.

    >>> unknown_name("router", "knm", ["knn", "mf"])
    "Unknown router 'knm'. Did you mean 'knn'? Known: knn, mf."
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{guess} Known: {', '.join(names)}."
