"""Uncertainty of every metric: the paired bootstrap over queries.

A replicate draws N of the N queries with replacement. Rows with the same prompt are one
observation, not several: given their groups, G of the G groups are drawn, each with all its rows
(the cluster bootstrap). The same draws serve every router, so the
difference of two routers has an interval of its own, far narrower than their two intervals
suggest. A draw is a vector of query counts, and the metrics under it are those of the weighted
exact curve (`frontier.RankedQueries`): nothing is sorted again, and point estimate and replicates
are one piece of code.

Where the gap is not sure. PGR divides by the strong-weak quality gap; a replicate whose gap is not
positive has no PGR, APGR or CPT (NaN). If more than (1 − level)/2 of the replicates are such, the
percentile interval of the gap itself includes 0: these metrics then have no interval, and their
estimate is NaN with the reason `GAP_UNSURE`. Otherwise the few NaN replicates, at most 2.5 % at
level 0.95, are left out.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile
intervals); Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8
(groups). Mann-Whitney AUC with ties: Hanley and McNeil (1982).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.errors import ConfigError, DataError, unknown_name
from router_models.frontier import METRICS, RankedQueries, checked_qualities

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

REPLICATES = 2_000
LEVEL = 0.95
GAP_UNSURE = "gap interval includes 0"


@dataclass(frozen=True)
class Interval:
    """A percentile interval; NaN at both ends, with the reason, where there is none."""

    low: float
    high: float
    level: float = LEVEL
    reason: str | None = None

    def excludes(self, value: float) -> bool:
        """Tell whether ``value`` lies outside; an undefined interval excludes nothing.

        >>> Interval(0.52, 0.61).excludes(0.5), Interval(float("nan"), float("nan")).excludes(0.5)
        (True, False)
        """
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval; NaN, with the reason, where it means nothing."""

    value: float
    interval: Interval
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Metrics of several routers on the same queries, and their paired replicates."""

    point: dict[str, dict[str, float]]
    """Router → metric → value on the queries themselves."""
    replicates: dict[str, dict[str, FloatArray]]
    """Router → metric → (R,) values; entry r of every router is from the same draw."""

    def estimate(self, router: str, metric: str, *, level: float = LEVEL) -> Estimate:
        """Return one metric of one router with its interval."""
        values = self._values(router, metric)
        return _estimate(metric, self.point[router][metric], values, level)

    def difference(
        self, router: str, baseline: str, metric: str, *, level: float = LEVEL
    ) -> Estimate:
        """Return ``router`` − ``baseline`` with its paired interval."""
        paired = self._values(router, metric) - self._values(baseline, metric)
        value = self.point[router][metric] - self.point[baseline][metric]
        return _estimate(metric, value, paired, level)

    def estimates(self, router: str, *, level: float = LEVEL) -> dict[str, Estimate]:
        """Return every metric of one router with its interval."""
        return {metric: self.estimate(router, metric, level=level) for metric in METRICS}

    def _values(self, router: str, metric: str) -> FloatArray:
        if router not in self.replicates:
            message = unknown_name("router", router, self.replicates)
            raise ConfigError(f"{message} Name a router that was evaluated here.")
        if metric not in METRICS:
            raise ConfigError(f"{unknown_name('metric', metric, METRICS)} Name a known metric.")
        return self.replicates[router][metric]


def bootstrap_metrics(
    win_rates: Mapping[str, ArrayLike],
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Bootstrap:
    """Return every metric of `frontier.METRICS` of every router, with paired replicates.

    ``win_rates`` maps a router's name to its (N,) win rates; the qualities are (N,), and so are
    the ``groups``, numbers that queries of the same prompt share (`prompt_groups`). Raises
    `DataError` for no router and for empty, non-finite or mismatched arrays.

    >>> weak, strong = [0, 0, 1, 1] * 5, [1] * 20
    >>> both = {"good": [0.9, 0.8, 0.1, 0.3] * 5, "coin": [0.5] * 20}
    >>> found = bootstrap_metrics(both, weak, strong, replicates=200)
    >>> found.estimate("good", "apgr").value, found.estimate("coin", "apgr").value
    (0.75, 0.5)
    >>> found.difference("good", "coin", "apgr").interval.low > 0
    True
    """
    if not win_rates:
        raise DataError(
            "There is no router to evaluate; expected win rates of at least one. Name routers in "
            "the config."
        )
    ranked = {
        name: RankedQueries(win_rate, weak_quality, strong_quality)
        for name, win_rate in win_rates.items()
    }
    queries = len(next(iter(ranked.values())).order)
    values = {name: np.empty((len(METRICS), replicates)) for name in ranked}
    draws = resamples(queries, replicates=replicates, seed=seed, groups=groups)
    for index, counts in enumerate(draws):
        for name, router in ranked.items():
            values[name][:, index] = list(router.curve(counts).metrics().values())
    return Bootstrap(
        point={name: router.curve().metrics() for name, router in ranked.items()},
        replicates={name: dict(zip(METRICS, rows, strict=True)) for name, rows in values.items()},
    )


def resamples(
    queries: int, *, replicates: int, seed: int, groups: ArrayLike | None = None
) -> Iterator[IntArray]:
    """Yield ``replicates`` vectors (N,) of how often each query is drawn; the same for a seed.

    ``groups``: (N,) numbers; queries of one number are drawn together.

    >>> [counts] = resamples(4, replicates=1, seed=0, groups=[0, 0, 1, 1])
    >>> bool((counts[::2] == counts[1::2]).all())
    True
    """
    if replicates < 1:
        raise ConfigError(
            f"{replicates} bootstrap replicates were asked for; expected at least 1. Use 2000 for "
            "95 % intervals."
        )
    rng = np.random.default_rng(seed)
    numbers = np.arange(queries) if groups is None else np.asarray(groups)
    if len(numbers) != queries:
        raise DataError(
            f"There are groups of {len(numbers)} queries; expected {queries}, one number for each. "
            "Take them from the same rows."
        )
    distinct, group = np.unique(numbers, return_inverse=True)
    size = len(distinct)
    for _ in range(replicates):
        yield np.bincount(rng.integers(0, size, size), minlength=size)[group]


def interval(replicates: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Return the percentile interval of (R,) replicates; see the module on NaN among them.

    >>> interval([0, 1, 2, 3, 4], level=0.5)
    Interval(low=1.0, high=3.0, level=0.5, reason=None)
    """
    if not 0.0 < level < 1.0:
        raise ConfigError(
            f"The level is {level}; expected a share between 0 and 1. Use 0.95 for a 95 % interval."
        )
    values = np.asarray(replicates, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(
            f"The replicates have shape {values.shape}; expected (R,), one number a replicate. "
            "Take one metric of one router."
        )
    defined = values[~np.isnan(values)]
    tail = (1.0 - level) / 2.0
    if len(values) - len(defined) > tail * len(values):
        return Interval(float("nan"), float("nan"), level, GAP_UNSURE)
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Interval(float(low), float(high), level)


def mean_interval(
    values: ArrayLike,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
    groups: ArrayLike | None = None,
) -> Estimate:
    """Return the mean of (N,) values with its interval; ``groups`` as for `resamples`.

    >>> mean_interval([1.0, 1.0, 1.0]).interval
    Interval(low=1.0, high=1.0, level=0.95, reason=None)
    """
    column, _ = checked_qualities(values, values)
    means = [
        float((counts * column).sum() / counts.sum())
        for counts in resamples(len(column), replicates=replicates, seed=seed, groups=groups)
    ]
    return Estimate(float(column.mean()), interval(means, level=level))


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return P(score of a positive > score of a negative) + half of ties; NaN with one class.

    ``scores`` (N,) finite, ``labels`` (N,) of 0 and 1 (or False and True).

    >>> auc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    0.875
    """
    return _RankedLabels(scores, labels).auc(None)


def auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """Return `auc` with its bootstrap interval over the N rows."""
    ranked = _RankedLabels(scores, labels)
    draws = resamples(len(ranked.order), replicates=replicates, seed=seed)
    values = np.array([ranked.auc(counts) for counts in draws])
    point = ranked.auc(None)
    if np.isnan(point):
        reason = "all labels are equal"
        return Estimate(point, Interval(point, point, level, reason), reason)
    # A draw of one class only has no AUC; with both classes present that is rare and harmless.
    return Estimate(point, interval(values[~np.isnan(values)], level=level))


class _RankedLabels:
    """Labels sorted once by score, for the AUC under any row counts."""

    def __init__(self, scores: ArrayLike, labels: ArrayLike) -> None:
        score, label = checked_qualities(scores, labels)
        if not np.isin(label, (0.0, 1.0)).all():
            raise DataError(
                f"The labels hold {np.unique(label)[:5]}; expected 0 and 1 only. Compare them with "
                "a bound first."
            )
        self.order = np.argsort(score, kind="stable")
        ranked = score[self.order]
        self.starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        self.label = label[self.order].astype(np.int64)

    def auc(self, counts: IntArray | None) -> float:
        ranked = np.ones(len(self.order), np.int64) if counts is None else counts[self.order]
        positive = np.add.reduceat(ranked * self.label, self.starts)
        negative = np.add.reduceat(ranked * (1 - self.label), self.starts)
        pairs = float(positive.sum()) * float(negative.sum())
        if pairs == 0.0:
            return float("nan")
        below = 2 * np.cumsum(negative) - negative
        return float((positive * below).sum()) / (2.0 * pairs)


def _estimate(metric: str, value: float, replicates: FloatArray, level: float) -> Estimate:
    nan = float("nan")
    if np.isnan(value):
        reason = METRICS[metric].undefined
        return Estimate(nan, Interval(nan, nan, level, reason), reason)
    found = interval(replicates, level=level)
    return Estimate(value if found.reason is None else nan, found, found.reason)
