"""The gate: what a candidate must show before it becomes the champion, and the receipt it gets.

A check is a plain function of what was measured that returns a `Check`; `tasks.registry.judge`
does the measuring. Rejecting is a normal outcome: the receipt says which check failed, with its
value and its bound, what that means, and what to do. What is undefined (no quality gap, a missing
number) never passes.

The candidate is the best of several routers on the very queries it is judged on. So its intervals
are widened as if each of those routers had been tested (Bonferroni): `two_sided_level`,
`promotion_level`. How often the rule against the champion errs is simulated by
benchmarks/gate_error_rates.py.

A long file: what a check says to people stands beside what it decides. The receipt that holds them
is in receipt.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from conf.schema import Gate
from router_models.frontier import RankedQueries
from router_models.statistics import Estimate, interval, resamples
from tasks.receipt import FIND_THE_LEAK, KEEP_THE_CHAMPION, Check, capital

# Shares of strong calls at which a router is held against random; all of 0 and 1 cost the same.
MATCHED_COSTS = np.arange(1, 10) / 10

# What to do about checks that are not met, where several have the same cause.
LEARN_MORE = (
    "Train on more queries, or ask for more answers to each. Where the strong LLM is hardly any "
    "better, no router helps."
)
REGISTER_ANEW = "Compare the installed packages with the version's requirements, and retrain."


def two_sided_level(settings: Gate, tried: int) -> float:
    """Return the level of an interval of the best of ``tried`` routers.

    >>> two_sided_level(Gate(confidence=0.9), 4)
    0.975
    """
    return 1.0 - (1.0 - settings.confidence) / tried


def promotion_level(settings: Gate, tried: int, nth: int = 1) -> float:
    """Return the level of the gain's interval at which `max_false_promotions` holds.

    The lower end alone errs half as often as that. Percentile intervals of few queries are a
    little too narrow, and what is stated has to hold.

    ``nth``: the candidate is the nth version held against a champion on these test queries. Each
    may err by 1/n² of the first's share (alpha spending), and the first of a new test loses
    nothing. Exact intervals would keep all of them together, however many, at π²/12 of what is
    stated. The bootstrap's do not: its tails are too short with few queries, and past what the
    replicates can tell apart the lowest of them decides. Simulated
    (`benchmarks/gate_error_rates.py`), 30 versions as good as the champion on the same 150 queries:
    one or more is promoted in 9 of 100 months, without this in 31; where each is the best of four,
    in 6 and 16. The rate that is stated is each retrain's.

    >>> promotion_level(Gate(max_false_promotions=0.05), 2)
    0.975
    >>> promotion_level(Gate(max_false_promotions=0.08), 2, nth=2)
    0.99
    """
    return 1.0 - settings.max_false_promotions / (tried * nth**2)


def above_chance(apgr: Estimate, settings: Gate) -> Check:
    """Check that the APGR interval lies above that of a random router."""
    return Check(
        name="APGR above chance",
        value=shown(apgr),
        bound=f"interval above {settings.min_apgr:g}",
        passed=bool(apgr.interval.low > settings.min_apgr),
        complaint="not above chance",
        because="It is not sure that it chooses better than a coin.",
        advice=LEARN_MORE,
    )


def beats_random(gain: Estimate) -> Check:
    """Check that the quality above random's at matched cost (`matched_cost_gain`) is sure."""
    return Check(
        name="beats random at matched cost",
        value=shown(gain, sign="+"),
        bound="interval above 0, in quality",
        passed=bool(gain.interval.low > 0),
        complaint="does not beat random",
        because="For as many strong calls, it is not sure that answers are better than random's.",
        advice=LEARN_MORE,
    )


def not_beaten_by_knn(advantage: Estimate | None, settings: Gate) -> Check:
    """Check that kNN is not surely better by more than the tolerance.

    ``advantage`` is kNN's APGR − the candidate's, None where the candidate is kNN itself. Only a
    lower end above the tolerance rejects: a candidate on a par with kNN is no worse a choice.
    """
    return Check(
        name="not beaten by kNN",
        value="it is kNN" if advantage is None else f"kNN ahead by {shown(advantage, sign='+')}",
        bound=f"interval reaches {settings.knn_tolerance:g} or below",
        passed=advantage is None or bool(advantage.interval.low <= settings.knn_tolerance),
        complaint="beaten by kNN",
        because="Looking up a query's nearest neighbours chooses surely better than this router.",
        advice="Add a router of kind knn to the experiment: it is judged next time.",
    )


@dataclass(frozen=True)
class ShuffledApgr(Estimate):
    """What the control came to: its APGR, of several shuffles that of the middle one."""

    shuffles: tuple[float, ...] = ()
    """The APGR of each shuffle."""


def chance_on_shuffled(apgr: Estimate) -> Check:
    """Check that the router's twin, which learned shuffled outcomes, predicts them by chance.

    If it does better, what it is tested on was in its training data. One shuffle in forty looks so
    by luck (at level 0.95), and would on every night of the same seed. Hence the middle one of
    three where the first does: 0.025 · (1 - 0.975²), about one clean data set in 800, is rejected.
    """
    of_several = ""
    if isinstance(apgr, ShuffledApgr) and len(apgr.shuffles) > 1:
        each = ", ".join(f"{value:.3f}" for value in apgr.shuffles)
        of_several = f", the middle one of {len(apgr.shuffles)} shuffles ({each})"
    return Check(
        name="chance on shuffled outcomes",
        value=shown(apgr) + of_several,
        bound="interval reaches 0.5 or below, in the first shuffle or in two of three",
        passed=bool(apgr.interval.low <= 0.5),
        complaint="leak: shuffled outcomes are predicted better than by chance",
        because="Its twin was trained on outcomes dealt out at random, which nobody can predict. "
        "It predicts them in the test all the same, so it has met the test in training.",
        advice=FIND_THE_LEAK,
    )


@dataclass(frozen=True)
class Copies:
    """Evaluated prompts, each once, that training knows too."""

    exact: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    """Those of which training has a near copy only (`near_copy_groups`)."""


def no_duplicates(copies: Copies, evaluated: int, settings: Gate) -> Check:
    """Check that few of the distinct evaluated prompts stand in the training data too.

    Near copies are counted but not bounded: traffic made from templates is full of them and may be
    routed well. Where remembering them pays, the shuffled control shows it.
    """
    share = len(copies.exact) / evaluated if evaluated else float("nan")
    example = f', such as "{_cell(copies.exact[0])[:80]}"' if copies.exact else ""
    if copies.near:
        example += f'; {len(copies.near)} more nearly, such as "{_cell(copies.near[0])[:80]}"'
    return Check(
        name="no test prompt in training",
        value=f"{len(copies.exact) or 'none'} of {evaluated} prompts ({share:.1%}){example}",
        bound=f"at most {settings.max_duplicate_share:.1%}",
        passed=share <= settings.max_duplicate_share,
        complaint="leak: test prompts in the training data",
        because="It has seen queries that it is judged on, and may only remember them.",
        advice=FIND_THE_LEAK,
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
        bound=f"{settings.min_gain:+g} APGR or more, interval above {0 - settings.margin:g}, on "
        f"{settings.min_champion_queries} queries or more",
        passed=met,
        complaint="not better than champion",
        because="What it gains on the champion is too little, or not sure.",
        advice=KEEP_THE_CHAMPION,
    )


def judged_alike(metric: str, champions: str | None) -> Check:
    """Check that the candidate is judged by the metric that the champion became it by."""
    known = champions or "not recorded"
    return Check(
        name="judged as the champion was",
        value=f"by {metric}, the champion by {known}" if metric != champions else f"by {metric}",
        bound="by the same quality metric",
        passed=metric == champions,
        complaint="judged by another metric than the champion",
        because="A gain by one metric does not make up for a loss by the other.",
        advice="Set quality.label_metric back, or accept the new one: "
        "`turnout promote VERSION --force REASON`.",
    )


def champion_check(value: str, *, passed: bool) -> Check:
    """Return the champion's check where there is nothing to compare, with ``value`` as the why."""
    return Check(
        name="better than the champion",
        value=_cell(value),
        bound="better on queries new to both, if there is a champion",
        passed=passed,
        complaint="not better than champion",
        because=f"{capital(_cell(value)).rstrip('.')}.",
        advice=KEEP_THE_CHAMPION,
    )


def champion_gone() -> Check:
    """Return the champion's check where there was one, and no alias points to it any more."""
    return replace(
        champion_check("the champion is gone", passed=False),
        complaint="the champion is gone",
        because="Versions were promoted before, but the alias `champion` points to none of them: "
        "there is nothing to be better than.",
        advice="Set the alias, roll back (`turnout rollback`), or promote a version by hand.",
    )


def champion_unchanged(problem: Exception) -> Check:
    """Return the check that the verdict is carried out against the champion it is about."""
    return Check(
        name="the same champion until promotion",
        value=_cell(str(problem)),
        bound="the champion it was held against, and no other promotion under way",
        passed=False,
        complaint="the champion changed meanwhile",
        because="The verdict is about another champion than the one that serves now.",
        advice="Run again: what was trained is kept, and held against the new champion.",
    )


def answers_at_promotion(problem: Exception) -> Check:
    """Return the check that a version answers in a clean process when it is promoted."""
    return Check(
        name="answers when promoted",
        value=_cell(str(problem)),
        bound="a win rate or a name for every query of the smoke test",
        passed=False,
        complaint="fails its smoke test",
        because="It passed the gate, but did not answer when it was to be the champion.",
        advice="Look for what it lacks (disk, memory, an endpoint), and run again.",
    )


def not_rolled_back(rolled_back: str | None) -> Check:
    """Check that nobody has rolled this version back; ``rolled_back`` is when and why."""
    return Check(
        name="not rolled back",
        value=_cell(rolled_back or "never rolled back"),
        bound="never rolled back, or promoted by force since",
        passed=rolled_back is None,
        complaint="rolled back",
        because="A person has taken this version out of service. Figures do not overrule that.",
        advice="Find out what was wrong, and retrain on other data or settings. If nothing was, "
        "`turnout promote VERSION --force REASON` brings it back.",
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
        because="Routing one query takes longer than what it may.",
        advice="Choose a router with a smaller encoder, or allow more by gate.max_latency_ms.",
    )


def reproduces(logged: Sequence[float], loaded: Sequence[float], settings: Gate) -> Check:
    """Check that the registered version, loaded in a clean process, gives the logged win rates."""
    difference = float("nan")
    if len(logged) == len(loaded) > 0:
        difference = float(np.max(np.abs(np.subtract(logged, loaded))))
    return Check(
        name="reproduces its win rates",
        value=f"apart by {difference:.2g} at most",
        bound=f"at most {settings.reproduce_tolerance:g}, loaded in a clean process",
        passed=difference <= settings.reproduce_tolerance,
        complaint="does not reproduce its win rates",
        because="The registered version gives other win rates than those it is judged by here.",
        advice=REGISTER_ANEW,
    )


def does_not_load(error: Exception, settings: Gate) -> Check:
    """Return the reproduction check of a version that cannot even be scored."""
    return replace(
        reproduces([], [], settings),
        value=_cell(str(error)),
        complaint="does not run",
        because="The registered version does not load or answer in a process of its own.",
    )


def matched_cost_gain(
    win_rate: ArrayLike,
    weak: ArrayLike,
    strong: ArrayLike,
    *,
    replicates: int,
    seed: int,
    level: float,
    groups: ArrayLike | None = None,
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

    draws = resamples(len(ranked.order), replicates=replicates, seed=seed, groups=groups)
    return Estimate(gain(None), interval([gain(counts) for counts in draws], level=level))


def shown(estimate: Estimate, *, sign: str = "", digits: int = 3) -> str:
    """Return a value with its interval, and the level of that, or why there is none.

    >>> from router_models.statistics import Interval
    >>> shown(Estimate(0.6123, Interval(0.55, 0.67)))
    '0.612 (0.550 to 0.670 at 95 %)'
    """
    if math.isnan(estimate.value):
        return f"undefined: {estimate.reason or 'no value'}"
    low, high = estimate.interval.low, estimate.interval.high
    number = f"{sign}.{digits}f"
    if low == high == estimate.value:
        return f"{low:{number}}"
    level = f"{100 * estimate.interval.level:.4g} %"
    return f"{estimate.value:{number}} ({low:{number}} to {high:{number}} at {level})"


def _cell(text: str) -> str:
    """Return text that fits a Markdown table's cell."""
    return " ".join(text.split()).replace("|", "/")[:300]
