"""The gate: what a candidate must show before it becomes the champion, and the receipt it gets.

A check is a plain function that returns a `Check`. Rejecting is a normal outcome: the receipt says
which check failed, with its value and its bound.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from conf.schema import Gate
from tasks.evaluation import Comparison


@dataclass(frozen=True)
class Check:
    """One requirement, what was measured for it, and whether it is met."""

    name: str
    value: str
    bound: str
    passed: bool


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

    def passed(self) -> bool:
        """Tell whether every check is met."""
        return all(check.passed for check in self.checks)

    def verdict(self) -> str:
        """Return the outcome in one word."""
        return "promoted" if self.passed() else "rejected"

    def failures(self) -> list[str]:
        """Return the names of the checks that are not met."""
        return [check.name for check in self.checks if not check.passed]

    def to_json(self) -> str:
        """Return the receipt as JSON, with its verdict."""
        return json.dumps({**asdict(self), "verdict": self.verdict()}, indent=2)

    def to_markdown(self) -> str:
        """Return the receipt as a page for people."""
        why = "" if self.passed() else f", for: {', '.join(self.failures())}"
        lines = [
            f"# {self.model} version {self.version}: {self.verdict()}{why}",
            "",
            f"Router `{self.router}`, judged by `{self.metric}` on {self.queries} queries "
            f"(test digest `{self.test_digest}`).",
            "",
            "| check | value | bound | verdict |",
            "|---|---|---|---|",
        ]
        for check in self.checks:
            verdict = "met" if check.passed else "**not met**"
            lines.append(f"| {check.name} | {check.value} | {check.bound} | {verdict} |")
        return "\n".join(lines) + "\n"


def above_chance(comparison: Comparison, settings: Gate) -> Check:
    """Check that the APGR interval lies above that of a random router."""
    apgr = comparison.estimates[comparison.best]["apgr"]
    value = f"{apgr.value:.3f} [{apgr.interval.low:.3f}, {apgr.interval.high:.3f}]"
    return Check(
        name="APGR above chance",
        value=value if apgr.reason is None else f"undefined: {apgr.reason}",
        bound=f"interval above {settings.min_apgr:g}",
        passed=bool(apgr.interval.low > settings.min_apgr),
    )


def reproduces(logged: Sequence[float], loaded: Sequence[float], settings: Gate) -> Check:
    """Check that the registered version, loaded in a clean process, gives the logged win rates."""
    difference = float(np.max(np.abs(np.subtract(logged, loaded))))
    return Check(
        name="reproduces its win rates",
        value=f"{difference:.2g} at most",
        bound=f"at most {settings.reproduce_tolerance:g}",
        passed=difference <= settings.reproduce_tolerance,
    )
