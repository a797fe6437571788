"""The gate: what a candidate must show before it becomes the champion, and the receipt it gets.

A check is a plain function of what was measured that returns a `Check`; `tasks.registry.judge`
does the measuring. Rejecting is a normal outcome: the receipt says which check failed, with its
value and its bound. What is undefined (no quality gap, a missing number) never passes.

The candidate is the best of several routers on the very queries it is judged on. So its intervals
are widened as if each of those routers had been tested (Bonferroni): `two_sided_level`,
`promotion_level`. How often the rule against the champion errs is simulated by
benchmarks/gate_error_rates.py.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from conf.schema import Gate
from router_models.frontier import RankedQueries
from router_models.statistics import Estimate, interval, resamples

# Shares of strong calls at which a router is held against random; all of 0 and 1 cost the same.
MATCHED_COSTS = np.arange(1, 10) / 10


@dataclass(frozen=True)
class Check:
    """One requirement, what was measured for it, and whether it is met."""

    name: str
    value: str
    bound: str
    passed: bool
    complaint: str = ""
    """What the verdict says where it is not met; by default the name."""


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

    def passed(self) -> bool:
        """Tell whether every check is met."""
        return all(check.passed for check in self.checks)

    def verdict(self) -> str:
        """Return the outcome in one word."""
        return "promoted" if self.passed() else "rejected"

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
        """Return the receipt as a page for people."""
        against = f"version {self.champion}" if self.champion else "no champion yet"
        lines = [
            f"# {self.title()}",
            "",
            f"Router `{self.router}`, judged by `{self.metric}` on {self.queries} queries "
            f"(test digest `{self.test_digest}`), against {against}.",
            "",
            "| check | value | bound | verdict |",
            "|---|---|---|---|",
        ]
        for check in self.checks:
            verdict = "met" if check.passed else "**not met**"
            lines.append(f"| {check.name} | {check.value} | {check.bound} | {verdict} |")
        if self.arms:
            lines += ["", "| on the same queries | APGR |", "|---|---|"]
            lines += [f"| {name} | {apgr} |" for name, apgr in self.arms.items()]
        if self.challenger:
            lines += ["", "It is sound and may yet prove better: it becomes the challenger."]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def two_sided_level(settings: Gate, tried: int) -> float:
    """Return the level of an interval of the best of ``tried`` routers.

    >>> two_sided_level(Gate(confidence=0.9), 4)
    0.975
    """
    return 1.0 - (1.0 - settings.confidence) / tried


def promotion_level(settings: Gate, tried: int) -> float:
    """Return the level of the gain's interval at which `max_false_promotions` holds.

    The lower end alone errs half as often as that. Percentile intervals of few queries are a
    little too narrow, and what is stated has to hold.

    >>> promotion_level(Gate(max_false_promotions=0.05), 2)
    0.975
    """
    return 1.0 - settings.max_false_promotions / tried


def above_chance(apgr: Estimate, settings: Gate) -> Check:
    """Check that the APGR interval lies above that of a random router."""
    return Check(
        name="APGR above chance",
        value=shown(apgr),
        bound=f"interval above {settings.min_apgr:g}",
        passed=bool(apgr.interval.low > settings.min_apgr),
        complaint="not above chance",
    )


def beats_random(gain: Estimate) -> Check:
    """Check that the quality above random's at matched cost (`matched_cost_gain`) is sure."""
    return Check(
        name="beats random at matched cost",
        value=shown(gain, sign="+", digits=4),
        bound="interval above 0, in quality",
        passed=bool(gain.interval.low > 0),
        complaint="does not beat random",
    )


def not_beaten_by_knn(advantage: Estimate | None, settings: Gate) -> Check:
    """Check that kNN is not surely better by more than the tolerance.

    ``advantage`` is kNN's APGR − the candidate's, None where the candidate is kNN itself. Only a
    lower end above the tolerance rejects: a candidate on a par with kNN is no worse a choice.
    """
    return Check(
        name="not beaten by kNN",
        value="it is kNN itself" if advantage is None else f"kNN {shown(advantage, sign='+')}",
        bound=f"interval reaches {settings.knn_tolerance:g} or below",
        passed=advantage is None or bool(advantage.interval.low <= settings.knn_tolerance),
        complaint="beaten by kNN",
    )


def chance_on_shuffled(apgr: Estimate) -> Check:
    """Check that the router's twin, which learned shuffled outcomes, predicts them by chance.

    If it does better, what it is tested on was in its training data.
    """
    return Check(
        name="chance on shuffled outcomes",
        value=shown(apgr),
        bound="interval reaches 0.5 or below",
        passed=bool(apgr.interval.low <= 0.5),
        complaint="leak: shuffled outcomes are predicted better than by chance",
    )


def no_duplicates(duplicates: Sequence[str], evaluated: int, settings: Gate) -> Check:
    """Check that few of the distinct evaluated prompts stand in the training data too."""
    share = len(duplicates) / evaluated if evaluated else float("nan")
    example = f", such as {_cell(duplicates[0])}" if duplicates else ""
    return Check(
        name="no test prompt in training",
        value=f"{len(duplicates)} of {evaluated} ({share:.1%}){example}",
        bound=f"at most {settings.max_duplicate_share:.1%}",
        passed=share <= settings.max_duplicate_share,
        complaint="leak: test prompts in the training data",
    )


def better_than_champion(gain: Estimate, settings: Gate, *, queries: int) -> Check:
    """Check that the APGR gain on the champion is worth it, and surely above −margin.

    ``gain`` is the paired difference, its interval of `promotion_level`.
    """
    met = promotes(gain, settings) and queries >= settings.min_champion_queries
    few = "" if queries >= settings.min_champion_queries else f", on {queries} queries only"
    return Check(
        name="better than the champion",
        value=shown(gain, sign="+") + few,
        bound=f"at least {settings.min_gain:+g}, interval above {0 - settings.margin:g}, "
        f"{settings.min_champion_queries} queries or more",
        passed=met,
        complaint="not better than champion",
    )


def champion_check(value: str, *, passed: bool) -> Check:
    """Return the champion's check where there is nothing to compare, with ``value`` as the why."""
    return Check(
        name="better than the champion",
        value=_cell(value),
        bound="a champion, and queries new to both",
        passed=passed,
        complaint="not better than champion",
    )


def promotes(gain: Estimate, settings: Gate) -> bool:
    """Tell whether an APGR gain is enough: large enough, and its lower end above −margin.

    >>> from router_models.statistics import Interval
    >>> [promotes(Estimate(0.02, Interval(low, 0.05)), Gate()) for low in (0.001, -0.001)]
    [True, False]
    """
    return bool(gain.value >= settings.min_gain and gain.interval.low > -settings.margin)


def may_challenge(gain: Estimate, checks: Sequence[Check], settings: Gate) -> bool:
    """Tell whether only the champion's check failed, and `min_gain` is still within reach."""
    failed = [check.name for check in checks if not check.passed]
    return failed == ["better than the champion"] and gain.interval.high >= settings.min_gain


def fast_enough(latency_ms: float, settings: Gate) -> Check:
    """Check the median time that the win rate of one query takes."""
    return Check(
        name="latency within budget",
        value=f"{latency_ms:.1f} ms",
        bound=f"at most {settings.max_latency_ms:g} ms",
        passed=latency_ms <= settings.max_latency_ms,
        complaint="too slow",
    )


def reproduces(logged: Sequence[float], loaded: Sequence[float], settings: Gate) -> Check:
    """Check that the registered version, loaded in a clean process, gives the logged win rates."""
    difference = float("nan")
    if len(logged) == len(loaded) > 0:
        difference = float(np.max(np.abs(np.subtract(logged, loaded))))
    return Check(
        name="reproduces its win rates",
        value=f"differs by {difference:.2g} at most",
        bound=f"at most {settings.reproduce_tolerance:g}",
        passed=difference <= settings.reproduce_tolerance,
        complaint="does not reproduce its win rates",
    )


def does_not_load(error: Exception, settings: Gate) -> Check:
    """Return the reproduction check of a version that cannot even be scored."""
    check = reproduces([], [], settings)
    return Check(check.name, _cell(str(error)), check.bound, passed=False, complaint="does not run")


def matched_cost_gain(
    win_rate: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    replicates: int,
    seed: int,
    level: float,
) -> Estimate:
    """Return the mean quality above random at costs 0.1 … 0.9, with its paired interval.

    Random is its expectation over all draws, which is exactly the straight line from all-weak to
    all-strong, and not one draw with its luck. Unlike APGR this is defined without a quality gap.

    >>> matched_cost_gain([1, 0], [0, 1], [1, 1], replicates=50, seed=0, level=0.9).value > 0.1
    True
    """
    ranked = RankedQueries(win_rate, weak, strong)

    def gain(counts: np.ndarray | None) -> float:
        curve = ranked.curve(counts)
        above = curve.quality_at(MATCHED_COSTS) - curve.weak_quality
        return float(np.mean(above - MATCHED_COSTS * curve.gain[-1]))

    draws = resamples(len(ranked.order), replicates=replicates, seed=seed)
    return Estimate(gain(None), interval([gain(counts) for counts in draws], level=level))


def shown(estimate: Estimate, *, sign: str = "", digits: int = 3) -> str:
    """Return a value with its interval, and the level of that, or why there is none."""
    if math.isnan(estimate.value):
        return f"undefined: {estimate.reason or 'no value'}"
    low, high = estimate.interval.low, estimate.interval.high
    number = f"{sign}.{digits}f"
    ends = f"[{low:{number}}, {high:{number}}]"
    return f"{estimate.value:{number}} {ends} at {100 * estimate.interval.level:.4g} %"


def _cell(text: str) -> str:
    """Return text that fits a Markdown table's cell."""
    return " ".join(text.split()).replace("|", "/")[:300]
