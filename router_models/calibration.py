"""Choosing the threshold α: with a guarantee on the quality drop, or for a wanted strong share.

Sending the queries with win rate < α to the weak LLM loses, on a query, ℓ(α) = strong − weak if it
goes to the weak one, else 0; its mean is the quality drop against all-strong. Picking the cheapest
α whose drop is small *on the calibration queries* (`threshold_naive`, Hybrid LLM's choice) picks
lucky noise as well, and breaks its promise about every other time.

`threshold_with_guarantee`: Learn then Test, arXiv 2110.01052, with fixed-sequence testing. From
all-strong downwards, each set {win rate ≤ v} is tested for "mean loss ≥ ε"; the walk stops at the
first set whose p-value exceeds δ. Testing every observed win rate v is the same as testing every
real v, because nothing changes in between, so the sequence does not depend on the data. The first
true hypothesis v† exists, since the mean loss is right-continuous in v, and to go past it its own
p-value must be ≤ δ: P(drop > ε) ≤ δ, whatever the number of tests.

p-values of "mean ≥ ε" for losses that may be negative:
- `betting` (arXiv 2010.09686, section 4, with its predictable plug-in bets): exact for any n, and
  adapts to the variance. Assumes independent queries and strong − weak ≤ a known bound. With 0/1
  quality, Hoeffding-Bentkus has to treat losses as filling [−1, 1] and certifies next to nothing.
- `clt`: one-sided t-test. Any range, but only approximate: a few hundred queries, no heavy tails.

A promise about the mean of all queries to come is checked on a finite holdout, which has noise of
its own. The t-test leaves room for a holdout as large as the calibration set: its deviation is that
of the difference of two samples. Betting is proven for the mean itself. That it keeps its promise
on such a holdout as well was seen in simulations only: wealth counts at the end, and not at its
best moment, which gives some away.

`drop_upper_bound` inverts the same tests at one threshold that was chosen without a look at the
qualities: the largest mean loss that is not refuted.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.errors import ConfigError, DataError, unknown_name
from router_models.frontier import checked_columns, checked_qualities

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
PValue = Literal["auto", "betting", "clt"]

ALL_STRONG = 0.0
# Win rates end at 1, and the strong LLM is called iff win rate ≥ α.
ALL_WEAK = 1.1

# Bets stay under this share of the largest that cannot lose everything.
_BOLDNESS = 0.75
_PRECISION = 1e-6  # of a bound, as a share of the largest possible loss
# The t-test promises nothing for a handful of queries, and its p-value does not show it.
FEWEST_FOR_T_TEST = 30
APPROXIMATE = "independent queries, enough of them for a t-test (approximate)"
_CELLS = 25_000  # of the (thresholds, queries) matrices: few beyond the last one that passes


@dataclass(frozen=True)
class Calibration:
    """A threshold, what it did on the calibration queries, and what its promise rests on."""

    threshold: float
    """α: the strong LLM is called iff win rate ≥ α. `ALL_STRONG` if nothing could be certified."""
    strong_share: float
    """Share of the calibration queries that go to the strong LLM at this threshold."""
    drop: float
    """Mean quality lost against all-strong on the calibration queries, in quality units."""
    max_drop: float
    """ε, in quality units."""
    confidence: float | None
    """1 − δ; None where nothing is promised."""
    p_value: float | None
    """Of "the drop is at least ε" at the last certified set; None where nothing was tested."""
    assumption: str
    """What must hold for the promise to hold."""
    queries: int
    """Number of calibration queries."""


@dataclass(frozen=True)
class DropBound:
    """What the mean drop is at most, and what must hold for it; NaN where nothing can be said."""

    upper: float
    """In quality units."""
    assumption: str


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often the strong LLM was needed among queries of about equal win rate; B bins."""

    edges: FloatArray
    """(bins + 1,) of [0, 1]."""
    mean_win_rate: FloatArray
    """(B,) of the B bins that hold a query."""
    mean_outcome: FloatArray
    """(B,)"""
    count: IntArray
    """(B,)"""

    def ece(self) -> float:
        """Return the expected calibration error: the count-weighted mean absolute difference."""
        error = np.abs(self.mean_win_rate - self.mean_outcome)
        return float((error * self.count).sum() / self.count.sum())


def threshold_with_guarantee(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    *,
    max_drop: float,
    confidence: float = 0.95,
    p_value: PValue = "auto",
    quality_range: tuple[float, float] | None = None,
    seed: int = 0,
) -> Calibration:
    """Return the cheapest α with a guarantee: P(quality drop ≤ max_drop) ≥ confidence.

    All arrays are (N,), of labelled queries that the router was not trained on; ``max_drop`` is in
    quality units. ``quality_range`` is (lowest, highest) possible quality, from the metric's
    definition; left out, it is taken to be [0, 1] if all qualities are in it, which
    `Calibration.assumption` then says, and unknown otherwise. ``p_value`` "auto" is "betting" with
    a range and "clt" without one. ``seed`` shuffles the queries for "betting".

    Raises `DataError` for bad arrays, `ConfigError` for settings out of range.

    >>> weak = [1.0] * 900 + [0.0] * 100
    >>> rate = [0.2] * 900 + [0.9] * 100
    >>> found = threshold_with_guarantee(rate, weak, [1.0] * 1000, max_drop=0.02)
    >>> found.threshold, found.strong_share, found.drop
    (0.9, 0.1, 0.0)
    """
    rate, gap, bound = _checked(win_rate, weak_quality, strong_quality, quality_range)
    _check_settings(max_drop, confidence, p_value, bound)
    sets = _WeakSets(rate, gap)
    delta = 1.0 - confidence
    if bound is None or p_value == "clt":
        values = _t_test(sets, max_drop)
        assumption = APPROXIMATE
    else:
        values = _betting(sets, max_drop, bound, delta, np.random.default_rng(seed))
        assumption = _exact(bound, quality_range)
    failed = np.flatnonzero(values > delta)
    # A set with the losses of its predecessor has its p-value; the walk ends at a changed one.
    certified = int(sets.changed[failed[0]]) if len(failed) else len(sets.sizes)
    last = values[np.searchsorted(sets.changed, certified) - 1] if certified else None
    return sets.calibration(
        certified,
        max_drop,
        confidence=confidence,
        p_value=None if last is None else float(last),
        assumption=assumption,
    )


def threshold_naive(
    win_rate: ArrayLike, weak_quality: ArrayLike, strong_quality: ArrayLike, *, max_drop: float
) -> Calibration:
    """Return the cheapest α whose drop on these very queries is ≤ max_drop: no guarantee.

    Hybrid LLM's choice (arXiv 2404.14618, section 4), for comparison.

    >>> found = threshold_naive([0.1, 0.5, 0.9], [1, 0, 0], [1, 1, 1], max_drop=0.4)
    >>> found.threshold, round(found.drop, 3)
    (0.9, 0.333)
    """
    rate, gap, _ = _checked(win_rate, weak_quality, strong_quality, None)
    _check_settings(max_drop, 0.95, "auto", None)
    sets = _WeakSets(rate, gap)
    drop = np.concatenate(([0.0], np.cumsum(sets.gap)))[sets.sizes] / len(rate)
    cheapest = int(np.flatnonzero(drop <= max_drop)[-1])
    return sets.calibration(
        cheapest + 1, max_drop, assumption="none: it promises nothing for new queries"
    )


def drop_upper_bound(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    *,
    threshold: float,
    confidence: float = 0.95,
    quality_range: tuple[float, float] | None = None,
    seed: int = 0,
) -> DropBound:
    """Return what the mean drop at ``threshold`` is at most, with the confidence.

    The threshold must not have been chosen by these qualities. Arrays, range and seed are as in
    `threshold_with_guarantee`: with a range the betting test is inverted, without one it is the end
    of a one-sided t interval, which says nothing (NaN) for fewer than `FEWEST_FOR_T_TEST` queries
    or where all losses are equal: rare losses may be missing.

    >>> bound = drop_upper_bound([0.1] * 60, [1.0] * 60, [1.0] * 60, threshold=0.5)
    >>> 0.03 < bound.upper < 0.1  # no loss in 60 queries does not mean that there is none
    True
    """
    rate, gap, bound = _checked(win_rate, weak_quality, strong_quality, quality_range)
    loss = np.where(rate < threshold, gap, 0.0)
    if bound is None:
        return DropBound(_t_bound(loss, confidence), APPROXIMATE)
    drawn = loss[np.newaxis, np.random.default_rng(seed).permutation(len(loss))]
    # Wealth grows with the tested mean, so what is refuted begins at one point.
    low, high = -bound, bound
    while high - low > _PRECISION * bound:
        tested = (low + high) / 2
        refuted = _log_wealth(drawn, tested, bound, 1.0 - confidence)[0] >= -np.log(1 - confidence)
        low, high = (low, tested) if refuted else (tested, high)
    return DropBound(high, _exact(bound, quality_range))


def threshold_for_strong_share(win_rate: ArrayLike, share: float) -> float:
    """Return the α that sends at most ``share`` of this traffic to the strong LLM, and no less.

    Equal win rates stay together, so the share may fall short of the wanted one; never above.

    >>> threshold_for_strong_share([0.1, 0.2, 0.3, 0.4], 0.5)
    0.3
    """
    rate, _ = checked_qualities(win_rate, win_rate)
    if not 0.0 <= share <= 1.0:
        raise ConfigError(
            f"The strong share is {share}; expected one between 0 and 1. Divide a percentage by "
            "100."
        )
    # 0.29 · 100 is 28.999999999999996.
    allowed = int(np.floor(share * len(rate) + 1e-9))
    if allowed == len(rate):
        return ALL_STRONG
    ascending = np.sort(rate)
    too_low = ascending[len(rate) - allowed - 1]
    above = ascending[ascending > too_low]
    return float(above[0]) if len(above) else ALL_WEAK


def reliability(win_rate: ArrayLike, outcome: ArrayLike, *, bins: int = 10) -> Reliability:
    """Return mean win rate and mean outcome in equal bins of win rate; empty bins are left out.

    ``win_rate`` and ``outcome`` are (N,) in [0, 1]; the outcome is 1 where the strong LLM was
    needed (1 − label), and may be a share of samples.

    >>> found = reliability([0.1, 0.15, 0.9], [0, 1, 1], bins=2)
    >>> found.mean_outcome.tolist(), found.count.tolist(), round(found.ece(), 3)
    ([0.5, 1.0], [2, 1], 0.283)
    """
    rate, observed = checked_qualities(win_rate, outcome)
    _check_shares("win rate", rate)
    _check_shares("outcome", observed)
    if bins < 1:
        raise ConfigError(f"There are {bins} bins; expected at least 1. Use 10.")
    bin_of = np.minimum((rate * bins).astype(np.int64), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    used = count > 0
    return Reliability(
        edges=np.linspace(0.0, 1.0, bins + 1),
        mean_win_rate=np.bincount(bin_of, rate, bins)[used] / count[used],
        mean_outcome=np.bincount(bin_of, observed, bins)[used] / count[used],
        count=count[used],
    )


class _WeakSets:
    """The nested sets {win rate ≤ v} that can go to the weak LLM, from none to all queries."""

    def __init__(self, rate: FloatArray, gap: FloatArray) -> None:
        order = np.argsort(rate, kind="stable")
        self.rate, self.gap = rate[order], gap[order]
        starts = np.flatnonzero(np.append(True, self.rate[1:] != self.rate[:-1]))
        self.sizes = np.append(starts, len(rate))
        # Set k adds group k − 1; where all its gaps are 0 the losses, hence p, stay the same.
        adds = np.logical_or.reduceat(self.gap != 0.0, starts)
        self.changed = np.flatnonzero(np.append(True, adds))

    def calibration(
        self,
        certified: int,
        max_drop: float,
        *,
        assumption: str,
        confidence: float | None = None,
        p_value: float | None = None,
    ) -> Calibration:
        """Describe the threshold of the last of the first ``certified`` sets."""
        queries = len(self.rate)
        size = int(self.sizes[certified - 1]) if certified else 0
        threshold = float(self.rate[size]) if size < queries else ALL_WEAK
        return Calibration(
            # α at the next win rate: any v below it was certified, and only these are < α.
            threshold=threshold if certified else ALL_STRONG,
            strong_share=(queries - size) / queries,
            drop=float(self.gap[:size].sum() / queries),
            max_drop=max_drop,
            confidence=confidence,
            p_value=p_value,
            assumption=assumption,
            queries=queries,
        )


def _t_test(sets: _WeakSets, max_drop: float) -> FloatArray:
    """Return the p-value of "mean loss ≥ max_drop" of each changed set, by a one-sided t-test.

    The deviation is that of calibration mean − mean of as many new queries, √2 times the usual.
    """
    from scipy.stats import t as student

    queries = len(sets.gap)
    sizes = sets.sizes[sets.changed]
    mean = np.concatenate(([0.0], np.cumsum(sets.gap)))[sizes] / queries
    square = np.concatenate(([0.0], np.cumsum(sets.gap**2)))[sizes] / queries
    deviation = np.sqrt(2.0 * np.maximum(square - mean**2, 0.0) / max(queries - 1, 1))
    score = np.full(len(sizes), np.inf)
    np.divide(max_drop - mean, deviation, out=score, where=deviation > 0.0)
    score[(deviation == 0.0) & (mean >= max_drop)] = -np.inf
    return np.asarray(student.sf(score, max(queries - 1, 1)), dtype=np.float64)


def _betting(
    sets: _WeakSets, max_drop: float, bound: float, delta: float, rng: np.random.Generator
) -> FloatArray:
    """Return the p-value of "mean loss ≥ max_drop" of the changed sets, up to the first above δ.

    A gambler bets a share of his wealth, fixed before each query, that its loss is below max_drop:
    wealth ← wealth · (1 + bet · (max_drop − loss)). If the mean loss is at least max_drop, its
    expectation stays ≤ 1, so the final wealth exceeds 1/p with probability ≤ p (Markov).
    """
    queries = len(sets.gap)
    drawn = rng.permutation(queries)
    gap = sets.gap[drawn]
    chunk = max(1, _CELLS // queries)
    found: list[FloatArray] = []
    for start in range(0, len(sets.changed), chunk):
        sizes = sets.sizes[sets.changed[start : start + chunk]]
        loss = np.where(drawn < sizes[:, np.newaxis], gap, 0.0)
        wealth = _log_wealth(loss, max_drop, bound, delta)
        found.append(np.exp(-np.maximum(wealth, 0.0)))
        if (found[-1] > delta).any():
            break
    return np.concatenate(found)


def _log_wealth(loss: FloatArray, max_drop: float, bound: float, delta: float) -> FloatArray:
    """Return the logarithm of the gambler's final wealth on each sequence of losses, (S, N) → (S,).

    It grows with ``max_drop``, since a bet's cap grows with it and nothing else depends on it.
    """
    queries = loss.shape[1]
    seen = np.arange(1, queries + 1)
    mean = np.cumsum(loss, axis=1) / (seen + 1)
    spread = bound**2 / 4 + np.cumsum((loss - mean) ** 2, axis=1)
    # The variance before each query: the bet must not know the loss it is placed on.
    before = np.concatenate((np.full((len(loss), 1), bound**2 / 4), spread[:, :-1]), axis=1)
    bet = np.sqrt(2.0 * np.log(1.0 / delta) / (queries * (before / seen)))
    np.minimum(bet, _BOLDNESS / (bound - max_drop), out=bet)
    return np.asarray(np.log1p(bet * (max_drop - loss)).sum(axis=1), dtype=np.float64)


def _t_bound(loss: FloatArray, confidence: float) -> float:
    from scipy.stats import t as student

    queries = len(loss)
    if queries < FEWEST_FOR_T_TEST or np.ptp(loss) == 0.0:
        return float("nan")
    error = loss.std(ddof=1) / np.sqrt(queries)
    return float(loss.mean() + student.ppf(confidence, queries - 1) * error)


def _exact(bound: float, quality_range: tuple[float, float] | None) -> str:
    """Say what the bound rests on; a range that was read from the data is an assumption."""
    assumed = "quality cannot leave [0, 1], so " if quality_range is None else ""
    return f"independent queries; {assumed}strong − weak ≤ {bound:g} (exact for any number)"


def _checked(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    quality_range: tuple[float, float] | None,
) -> tuple[FloatArray, FloatArray, float | None]:
    """Return win rate, strong − weak, and the largest possible strong − weak if it is known."""
    rate, weak, strong = checked_columns(win_rate, weak_quality, strong_quality)
    _check_shares("win rate", rate)
    lowest = min(float(weak.min()), float(strong.min()))
    highest = max(float(weak.max()), float(strong.max()))
    if quality_range is None:
        bound = 1.0 if lowest >= 0.0 and highest <= 1.0 else None
        return rate, strong - weak, bound
    low, high = quality_range
    if not (low < high and low <= lowest and highest <= high):
        raise ConfigError(
            f"The quality range is {quality_range}, while qualities go from {lowest:g} to "
            f"{highest:g}; expected a range that holds them all. Give the metric's own bounds."
        )
    return rate, strong - weak, float(high - low)


def _check_shares(name: str, values: FloatArray) -> None:
    if values.min() < 0.0 or values.max() > 1.0:
        raise DataError(
            f"The {name} goes from {values.min():g} to {values.max():g}; expected values in "
            "[0, 1]. Give probabilities, not scores."
        )


def _check_settings(max_drop: float, confidence: float, p_value: str, bound: float | None) -> None:
    if p_value not in ("auto", "betting", "clt"):
        known = unknown_name("p-value", p_value, ["auto", "betting", "clt"])
        raise ConfigError(f"{known} Choose one of them.")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(
            f"The confidence is {confidence}; expected a share between 0 and 1. Use 0.95 for 95 %."
        )
    if not (np.isfinite(max_drop) and max_drop > 0.0):
        raise ConfigError(
            f"The largest quality drop is {max_drop}; expected a finite number > 0, in quality "
            "units. Allow a small drop such as 0.01: none at all cannot be certified."
        )
    if bound is not None and max_drop >= bound:
        raise ConfigError(
            f"The largest quality drop is {max_drop}, but no drop can exceed {bound:g}; expected "
            "less. Give it in quality units, not in percent."
        )
    if p_value == "betting" and bound is None:
        raise ConfigError(
            'The p-value "betting" got qualities outside [0, 1] and no range; expected the lowest '
            'and highest possible quality. Pass quality_range, or use p_value "clt".'
        )
