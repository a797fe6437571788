"""The receipt: what the gate says of one registered version, as JSON and as a page for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

# What to do about a check that is not met, where it decides what is said of the others.
FIND_THE_LEAK = (
    "Find how evaluated queries came into the training data, take them out and retrain. Until then "
    "believe no figure of this version."
)
KEEP_THE_CHAMPION = (
    "Nothing has to be done: the champion serves on. To replace it, train on more queries, or on "
    "kinds of queries that were missing."
)
WHAT_IS_APGR = (
    "APGR is the share of the quality gap between weak and strong LLM that a router recovers, "
    "averaged over all shares of strong calls. Random has 0.5; the oracle knows the outcomes, and "
    "no router can have more."
)


@dataclass(frozen=True)
class Check:
    """One requirement, what was measured for it, and whether it is met."""

    name: str
    value: str
    bound: str
    passed: bool
    complaint: str = ""
    """What the verdict says where it is not met; by default the name."""
    because: str = ""
    """What it means, in a sentence, that it is not met."""
    advice: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Receipt:
    """The verdict on one registered version, with every check behind it."""

    model: str
    version: str
    router: str
    metric: str
    test_digest: str
    queries: int
    checks: tuple[Check, ...]
    champion: str | None = None
    """The version it was held against."""
    arms: Mapping[str, str] = field(default_factory=dict)
    """Candidate, champion and references → APGR with its interval."""
    notes: tuple[str, ...] = ()
    """What a reader must know to weigh the checks."""
    challenger: bool = False
    """Whether it is sound and may yet prove better than the champion."""
    figure: str = ""
    """Where MLflow shows the curves of all arms."""
    pending: bool = False
    """Whether its promotion, if it passed, is still to be carried out."""

    def passed(self) -> bool:
        """Tell whether every check is met."""
        return all(check.passed for check in self.checks)

    def verdict(self) -> str:
        """Return the outcome in one word."""
        if not self.passed():
            return "rejected"
        return "passed" if self.pending else "promoted"

    def but(self, check: Check) -> "Receipt":
        """Return the receipt with one more check, which turned out when it was carried out."""
        return replace(self, checks=(*self.checks, check))

    def failures(self) -> list[str]:
        """Return the names of the checks that are not met."""
        return [check.name for check in self.checks if not check.passed]

    def summary(self) -> str:
        """Return the verdict and, for a rejection, what was not met."""
        complaints = [check.complaint or check.name for check in self.checks if not check.passed]
        return self.verdict() + (f": {', '.join(complaints)}" if complaints else "")

    def title(self) -> str:
        """Return which version came out how."""
        return f"{self.model} version {self.version}: {self.summary()}"

    def to_json(self) -> str:
        """Return the receipt as JSON, with its verdict."""
        return json.dumps(
            {**asdict(self), "verdict": self.verdict(), "summary": self.summary()}, indent=2
        )

    def to_markdown(self) -> str:
        """Return the receipt as a page for people: the verdict, why, what to do, the evidence."""
        none = "no champion yet" if self.passed() else "no champion"
        against = f"version {self.champion}" if self.champion else none
        rows = [
            (check.name, check.value, check.bound, "met" if check.passed else "**not met**")
            for check in self.checks
        ]
        parts = [
            f"# {self.verdict().capitalize()}: {self.model} version {self.version}",
            self._why(),
            f"**Next:** {' '.join(self.next_steps())}",
            f"Router `{self.router}` against {against}, judged by `{self.metric}` on "
            f"{self.queries} queries (test digest `{self.test_digest}`).",
            _table(("check", "measured", "needed", "verdict"), rows),
        ]
        if self.arms:
            parts += [_table(("on the same queries", "APGR"), [*self.arms.items()]), WHAT_IS_APGR]
        if self.figure:
            parts.append(f"[Cost-quality curves of all of them]({self.figure})")
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def _why(self) -> str:
        """Return what the verdict changes and, for a rejection, what each failed check means."""
        if self.passed():
            place = f" in place of version {self.champion}" if self.champion else ""
            becomes = "may become" if self.pending else "becomes"
            return f"All {len(self.checks)} checks are met. It {becomes} the champion{place}."
        failed = [check for check in self.checks if not check.passed]
        if self.is_champion():
            stays = "It is the champion already, and stays it."
        elif self.champion:
            stays = f"Version {self.champion} stays the champion."
        else:
            stays = "There is no champion."
        if self.challenger:
            stays += " It is sound and may yet prove better: it becomes the challenger."
        lines = [
            f"- **{capital(check.complaint or check.name)}.** {check.because}".rstrip()
            for check in failed
        ]
        counted = f"{len(failed)} of {len(self.checks)} checks {_is_or_are(len(failed))} not met. "
        return f"{counted}{stays}\n\n" + "\n".join(lines)

    def next_steps(self) -> list[str]:
        """Return what to do now."""
        if self.passed() and self.pending:
            return [
                "The alias `champion` tells whether it has. If not, and its run ended, run again."
            ]
        if self.passed():
            back = f" `turnout rollback --pair {self.model}` brings version {self.champion} back."
            return [f"Load it as `models:/{self.model}@champion`.{back if self.champion else ''}"]
        failed = [check for check in self.checks if not check.passed]
        if self.is_champion() and len(failed) == 1:
            return ["Nothing has to be done. Retrain when there are new queries or answers."]
        found = list(dict.fromkeys(check.advice for check in failed if check.advice))
        if FIND_THE_LEAK in found:  # nothing else can be judged before
            return [FIND_THE_LEAK]
        if len(found) > 1 and KEEP_THE_CHAMPION in found:  # there is something to be done
            found.remove(KEEP_THE_CHAMPION)
        return found or ["Correct what is not met, and retrain."]

    def is_champion(self) -> bool:
        """Tell whether it was held against itself: training gave the champion again."""
        return self.champion == self.version


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _is_or_are(count: int) -> str:
    return "is" if count == 1 else "are"
