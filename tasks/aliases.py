"""What a promotion is about: where the aliases of a registered model point, and the note of a move.

Values only; `tasks.promotion` reads and writes them in MLflow.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import uuid4

from tasks.processes import is_gone, this_process
from tasks.registry import CHALLENGER, CHAMPION, PREVIOUS

ABANDONED = timedelta(hours=1)  # a note so old is nobody's; a promotion takes minutes


Kind = Literal["promotion", "forced", "rollback"]


@dataclass(frozen=True)
class Aliases:
    """Which version each alias of a registered model points to; None for none."""

    model: str
    champion: str | None = None
    previous: str | None = None
    challenger: str | None = None

    def of(self, alias: str) -> str | None:
        """Return the version of one alias."""
        return {
            CHAMPION: self.champion,
            PREVIOUS: self.previous,
            CHALLENGER: self.challenger,
        }[alias]

    def promoted(self, version: str) -> "Aliases":
        """Return them after the promotion of a version: previous ← champion ← version."""
        if version == self.champion:
            return self
        challenger = None if self.challenger == version else self.challenger
        kept = None if self.previous == version else self.previous
        return Aliases(self.model, version, self.champion or kept, challenger)

    def swapped(self) -> "Aliases":
        """Return them with champion and previous in each other's place."""
        return Aliases(self.model, self.previous, self.champion, self.challenger)


@dataclass(frozen=True)
class Note:
    """What is under way, written before the first alias moves."""

    before: Aliases
    after: Aliases
    why: str
    kind: Kind = "promotion"
    process: str = field(default_factory=this_process)
    """Who is at it."""
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    nonce: str = field(default_factory=lambda: uuid4().hex)
    """Tells two notes of one process apart."""
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What both champions' versions said of promotions before: version → tag → value."""

    def to_json(self) -> str:
        """Return the note as the text of a tag."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Note":
        """Return the note that `to_json` wrote."""
        kept = {"nonce": "", **json.loads(text)}  # an earlier release wrote none
        before, after = Aliases(**kept.pop("before")), Aliases(**kept.pop("after"))
        return cls(before, after, **kept)

    def is_abandoned(self) -> bool:
        """Tell whether nobody is at it any more."""
        age = datetime.now(UTC) - datetime.fromisoformat(self.at)
        return self.process == this_process() or is_gone(self.process) or age > ABANDONED
