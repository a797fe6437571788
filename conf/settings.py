"""What all settings share: frozen, strict models, and names that tables can carry."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from conf.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]


# Columns of Turnout's own tables, beside which routers' and LLMs' names stand.
RESERVED_NAMES = frozenset(
    {"query_key", "query_id", "text", "reference", "gold", "context", "domain", "split", "position"}
    | {"weak_quality", "strong_quality", "win_rate", "served_win_rate", "oracle"}
    | {"deterministic", "probabilistic", "transformed"}
)


SAFE_NAME = re.compile(r"[\w.\-]([\w.\- ]{0,98}[\w.\-])?")


def checked_name(kind: str, name: str) -> str:
    """Return ``name`` if tables, metrics, folders and MLflow's filters can all carry it.

    >>> checked_name("LLM", "gpt-3.5-turbo")
    'gpt-3.5-turbo'
    """
    if not SAFE_NAME.fullmatch(name) or not name.strip("."):
        raise ConfigError(
            f"The {kind} name {name!r} cannot be used. Expected up to 100 letters, digits and "
            "_ . - with spaces at most between them (no slash, colon or quote): it becomes part of "
            f"column, metric and file names. Rename the {kind}; its model may be called anything."
        )
    if name in RESERVED_NAMES:
        raise ConfigError(
            f"The {kind} name {name!r} is that of a column of Turnout's own tables. Expected none "
            f"of {', '.join(sorted(RESERVED_NAMES))}. Rename the {kind}."
        )
    return name


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
