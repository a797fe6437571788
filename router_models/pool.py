"""The pool policy: of any number of LLMs, the cheapest that is nearly as good as the best.

Idea: a router that compares any two LLMs on a query also ranks all of them. The expected quality of
an LLM is its mean win rate against the others of the pool,

    Q_m(x) = 1/(M − 1) Σ_{m' ≠ m} Pr[m beats m' | x],

a number in [0, 1], 0.5 on average over the pool. The query goes to the cheapest LLM whose Q is at
most ``margin`` below the highest: margin 0 buys the best, margin 1 the cheapest. With two LLMs,
Q_strong is the win rate and Q_weak its complement, so margin g is the threshold (1 + g) / 2.

Sources: Q is Borda's score for uncertain comparisons (Shah and Wainwright 2018, "Simple, robust and
optimal ranking from pairwise comparisons", where its ranking is optimal without assuming that
ratings exist). It is used rather than ratings because a margin on it means something: a share of
comparisons. What a pool has to beat is its best LLM, and two of them mixed by a coin: the "zero
router" of RouterBench, arXiv 2403.12031.

A long file: the exact curve and the intervals walk in the policy's own order, and are read with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.errors import ConfigError, DataError
from router_models.statistics import LEVEL, REPLICATES, Estimate, interval, resamples

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@runtime_checkable
class ComparesLLMs(Protocol):
    """A router that compares any two LLMs it knows."""

    def win_rate_between(self, prompts: Sequence[str], *, strong: str, weak: str) -> np.ndarray:
        """Return the probability that ``strong`` beats ``weak``, (n,)."""


@runtime_checkable
class ScoresLLMs(Protocol):
    """A router whose win rates are σ(score − score), so that all LLMs are scored in one pass."""

    def scores(self, prompts: Sequence[str], *, llms: Sequence[str]) -> np.ndarray:
        """Return the scores of ``llms``, (n, len(llms)), natural log-odds."""


# Of a difference of two mean qualities.
ROUNDING = 1e-12


@dataclass(frozen=True)
class PoolPolicy:
    """What each LLM costs, and how much expected quality may be given up to spend less.

    >>> PoolPolicy({"small": 0.001, "large": 0.03}, margin=0.1).llms()
    ['large', 'small']
    """

    cost_usd: Mapping[str, float]
    """LLM → expected US dollars for one query."""
    margin: float

    def __post_init__(self) -> None:
        if len(self.cost_usd) < 2:
            raise ConfigError(
                f"The pool is {list(self.cost_usd)}. Expected at least two LLMs, each with its "
                "cost. Add LLMs."
            )
        bad = [llm for llm, usd in self.cost_usd.items() if not (np.isfinite(usd) and usd >= 0)]
        if bad:
            raise ConfigError(
                f"{bad[0]!r} costs {self.cost_usd[bad[0]]} USD. Expected a finite amount for one "
                "query, 0 or more. Correct its price."
            )
        _checked_margin(self.margin)

    def llms(self) -> list[str]:
        """Return the pool's LLMs by name."""
        return sorted(self.cost_usd)

    def choose(self, router: object, prompts: Sequence[str]) -> list[str]:
        """Return the LLM that each prompt goes to.

        Raises ConfigError for a router that cannot compare, or does not know, the pool's LLMs.
        """
        llms = self.llms()
        expected = expected_quality(router, prompts, llms=llms)
        costs = [self.cost_usd[llm] for llm in llms]
        return [llms[column] for column in choices(expected, costs, margin=self.margin)]


def expected_quality(router: object, prompts: Sequence[str], *, llms: Sequence[str]) -> FloatArray:
    """Return Q_m(x) of the module's docstring, (n, len(llms)), each row with mean 0.5.

    Raises ConfigError for a router that only knows its own pair, and for unknown LLMs.
    """
    count = len(llms)
    if len(set(llms)) != count or count < 2:
        raise ConfigError(
            f"The pool is {list(llms)}. Expected at least two different LLMs. Correct the names."
        )
    total = np.empty((len(prompts), count))
    if isinstance(router, ScoresLLMs):
        scores = router.scores(prompts, llms=llms)
        for column in range(count):
            shares = 0.5 * (1 + np.tanh((scores[:, column, None] - scores) / 2))
            # The LLM's half against itself is in the sum, which is then the same, to the last bit,
            # for LLMs with the same score.
            total[:, column] = shares.sum(axis=1) - 0.5
        return total / (count - 1)
    if isinstance(router, ComparesLLMs):
        total[:] = 0.0
        for first in range(count):
            for second in range(first + 1, count):
                pair = {"strong": llms[first], "weak": llms[second]}
                share = router.win_rate_between(prompts, **pair)
                total[:, first] += share
                total[:, second] += 1 - share
        return total / (count - 1)
    raise ConfigError(
        f"A {type(router).__name__} decides between the two LLMs it was trained for and cannot "
        "compare others. Expected a router that can: knn, mf or sw_ranking. Train one of them."
    )


def choices(expected: ArrayLike, cost_usd: ArrayLike, *, margin: float) -> IntArray:
    """Return the column of the LLM that each query goes to, (n,).

    expected: (n, m) expected qualities; cost_usd: (m,). Of several equally cheap LLMs within the
    margin the one of the highest expected quality is taken, and then the first.

    >>> choices([[0.7, 0.6, 0.2], [0.9, 0.4, 0.2]], [3.0, 2.0, 1.0], margin=0.1).tolist()
    [1, 0]
    """
    quality, costs = _checked_pool(expected, cost_usd)
    order = _cheapest_first(quality, costs)
    allowed = np.take_along_axis(_deficit(quality), order, axis=1) <= _checked_margin(margin)
    first = allowed.argmax(axis=1)[:, None]
    return np.asarray(np.take_along_axis(order, first, axis=1)[:, 0], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class PoolCurve:
    """Mean quality and cost at every margin at which a choice changes, margins ascending."""

    margin: FloatArray
    """(V,) distinct; the first is 0. A vertex holds up to the next one."""
    quality: FloatArray
    """(V,) mean quality of the chosen LLMs' responses."""
    cost_usd: FloatArray
    """(V,) mean cost of a query, US dollars."""

    def at(self, margin: float) -> tuple[float, float]:
        """Return mean quality and cost at ``margin``."""
        vertex = int(np.searchsorted(self.margin, _checked_margin(margin), side="right")) - 1
        return float(self.quality[vertex]), float(self.cost_usd[vertex])


def pool_curve(
    expected: ArrayLike,
    quality: ArrayLike,
    cost_usd: ArrayLike,
    *,
    expected_cost_usd: ArrayLike | None = None,
) -> PoolCurve:
    """Return the policy's mean quality and cost over all margins, exactly.

    expected and quality: (n, m); cost_usd: (m,), or (n, m) for what each response did cost. Costs
    are not known before a response is, so the choice goes by expected_cost_usd, (m,), by default
    the mean costs. As the margin grows a query moves to ever cheaper LLMs, at those deficits that
    are smaller than all of cheaper LLMs: these moves, sorted, are summed. O(n m log(n m)).

    >>> curve = pool_curve([[0.7, 0.3], [0.6, 0.4]], [[1, 0], [1, 1]], [2.0, 1.0])
    >>> curve.margin.round(9).tolist(), curve.quality.tolist(), curve.cost_usd.tolist()
    ([0.0, 0.2, 0.4], [1.0, 1.0, 0.5], [2.0, 1.5, 1.0])
    """
    believed, actual, costs, prior_costs = _checked_outcomes(
        expected, quality, cost_usd, expected_cost_usd
    )
    order = _cheapest_first(believed, prior_costs)
    deficit, actual, costs = (
        np.take_along_axis(values, order, axis=1) for values in (_deficit(believed), actual, costs)
    )
    cheaper = np.minimum.accumulate(deficit, axis=1)
    chosen = deficit < np.hstack([np.full((len(deficit), 1), np.inf), cheaper[:, :-1]])
    row, _ = np.nonzero(chosen)
    margins, values = deficit[chosen], np.stack([actual[chosen], costs[chosen]], axis=1)
    # The last one of a row has deficit 0: where the query goes without a margin.
    last = np.append(row[1:] != row[:-1], True)
    moves = np.flatnonzero(~last)
    moves = moves[np.argsort(margins[moves], kind="stable")]
    steps = np.vstack([values[last].sum(axis=0), values[moves] - values[moves + 1]])
    totals = np.cumsum(steps, axis=0) / len(deficit)
    margins = np.append(0.0, margins[moves])
    complete = np.append(margins[1:] != margins[:-1], True)
    return PoolCurve(margins[complete], totals[complete, 0], totals[complete, 1])


@dataclass(frozen=True)
class PoolOutcome:
    """What the policy does at one margin, against what the same money buys without a router."""

    margin: float
    quality: Estimate
    cost_usd: Estimate
    """Of one query."""
    over_single: Estimate
    """Quality above that of the best single LLM that is not dearer on average."""
    over_mix: Estimate
    """Quality above that of the best coin toss between two LLMs at the same average cost."""
    shares: tuple[float, ...]
    """The share of queries that each LLM, in the columns' order, is sent."""


def pool_outcomes(
    expected: ArrayLike,
    quality: ArrayLike,
    cost_usd: ArrayLike,
    *,
    margins: Sequence[float],
    expected_cost_usd: ArrayLike | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
    groups: ArrayLike | None = None,
) -> list[PoolOutcome]:
    """Return the policy's outcome at each margin, with paired bootstrap intervals over queries.

    Arguments as for `pool_curve`; ``groups`` as for `resamples`. A replicate draws queries; what
    the policy and the single LLMs give and cost on them, and which LLM or mixture is the best at
    that cost, follow anew.
    """
    believed, actual, costs, prior_costs = _checked_outcomes(
        expected, quality, cost_usd, expected_cost_usd
    )
    queries, count = actual.shape
    chosen = [choices(believed, prior_costs, margin=margin) for margin in margins]
    rows = np.arange(queries)
    columns = np.hstack(
        [actual, costs] + [np.stack([actual[rows, at], costs[rows, at]], axis=1) for at in chosen]
    )
    drawn = resamples(queries, replicates=replicates, seed=seed, groups=groups)
    # The first line is the queries themselves, so that estimates and replicates are one code.
    means = np.stack([columns.mean(axis=0), *(counts @ columns / counts.sum() for counts in drawn)])
    single_quality, single_cost = means[:, :count], means[:, count : 2 * count]
    found = []
    for number, (margin, at) in enumerate(zip(margins, chosen, strict=True)):
        gained, spent = means[:, 2 * (count + number)], means[:, 2 * (count + number) + 1]
        single = best_single(single_quality, single_cost, spent)
        over_coin = gained - best_mix(single_quality, single_cost, spent)
        over_coin[np.abs(over_coin) < ROUNDING] = 0.0  # an LLM is a mixture with itself
        quality_estimate, cost_estimate, over_single, over_mix = (
            Estimate(float(values[0]), interval(values[1:], level=level))
            for values in (gained, spent, gained - single, over_coin)
        )
        found.append(
            PoolOutcome(
                margin=margin,
                quality=quality_estimate,
                cost_usd=cost_estimate,
                over_single=over_single,
                over_mix=over_mix,
                shares=tuple((np.bincount(at, minlength=count) / queries).tolist()),
            )
        )
    return found


def best_single(quality: FloatArray, cost_usd: FloatArray, at_usd: FloatArray) -> FloatArray:
    """Return the highest quality among LLMs that cost at most ``at_usd``, (R,).

    quality and cost_usd: (R, m); at_usd: (R,). Below all costs, the cheapest LLM stands in.
    """
    affordable = cost_usd <= np.maximum(at_usd * (1 + 1e-12), cost_usd.min(axis=1))[:, None]
    return np.asarray(np.where(affordable, quality, -np.inf).max(axis=1), dtype=np.float64)


def best_mix(quality: FloatArray, cost_usd: FloatArray, at_usd: FloatArray) -> FloatArray:
    """Return the highest quality that tossing a coin between two LLMs gives at ``at_usd``, (R,).

    It is the non-decreasing upper hull of the LLMs at this cost; shapes as for `best_single`.
    """
    best = best_single(quality, cost_usd, at_usd)
    for low in range(quality.shape[1]):
        for high in range(quality.shape[1]):
            width = cost_usd[:, high] - cost_usd[:, low]
            share = (at_usd - cost_usd[:, low]) / np.where(width > 0, width, 1.0)
            mixed = quality[:, low] + share * (quality[:, high] - quality[:, low])
            best = np.where(
                (width > 0) & (share >= 0) & (share <= 1), np.maximum(best, mixed), best
            )
    return best


def _deficit(expected: FloatArray) -> FloatArray:
    return np.asarray(expected.max(axis=1, keepdims=True, initial=-np.inf) - expected)


def _cheapest_first(expected: FloatArray, cost_usd: FloatArray) -> IntArray:
    """Return each row's columns by cost, of equal costs the better first, then as they stand."""
    costs = np.broadcast_to(cost_usd, expected.shape)
    return np.asarray(np.lexsort((-expected, costs), axis=1), dtype=np.int64)


def _checked_margin(margin: float) -> float:
    if not 0 <= margin <= 1:
        raise ConfigError(
            f"The margin is {margin}. Expected expected quality to give up, from 0 (always the "
            "best LLM) to 1 (always the cheapest). Set it to 0.05, say."
        )
    return margin


def _checked_pool(expected: ArrayLike, cost_usd: ArrayLike) -> tuple[FloatArray, FloatArray]:
    quality = np.asarray(expected, dtype=np.float64)
    costs = np.asarray(cost_usd, dtype=np.float64)
    if quality.ndim != 2 or costs.shape != quality.shape[1:] or quality.shape[1] < 1:
        raise DataError(
            f"Expected qualities have shape {quality.shape} and costs {costs.shape}. Expected "
            "(queries, LLMs) and (LLMs,). Give one cost for each LLM."
        )
    if not (np.isfinite(quality).all() and np.isfinite(costs).all()):
        raise DataError(
            "An expected quality or a cost is NaN or infinite. Expected finite numbers. Drop those "
            "queries, or set the missing price."
        )
    return quality, costs


def _checked_outcomes(
    expected: ArrayLike,
    quality: ArrayLike,
    cost_usd: ArrayLike,
    expected_cost_usd: ArrayLike | None,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return expected and actual quality and costs, (n, m), and the costs to choose by, (m,)."""
    actual = np.asarray(quality, dtype=np.float64)
    costs = np.asarray(cost_usd, dtype=np.float64)
    if actual.ndim != 2 or 0 in actual.shape or costs.shape not in (actual.shape, actual.shape[1:]):
        raise DataError(
            f"Qualities have shape {actual.shape} and costs {costs.shape}. Expected at least one "
            "query, (queries, LLMs), and (LLMs,) or (queries, LLMs). Check the query set."
        )
    if not (np.isfinite(actual).all() and np.isfinite(costs).all()):
        raise DataError(
            "A quality or a cost is NaN or infinite. Expected finite numbers. Score those queries "
            "again, or drop them."
        )
    costs = np.broadcast_to(costs, actual.shape)
    prior_costs = costs.mean(axis=0) if expected_cost_usd is None else expected_cost_usd
    believed, chosen_by = _checked_pool(expected, prior_costs)
    if believed.shape != actual.shape:
        raise DataError(
            f"Expected qualities have shape {believed.shape}, qualities {actual.shape}. Expected "
            "the same queries and LLMs in the same order. Join them first."
        )
    return believed, actual, costs, chosen_by
