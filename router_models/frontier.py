"""The exact cost-quality curve of a router, and every metric that is read off it.

Queries sorted by win rate, highest first: at cost k/N the top k go to the strong LLM, and the mean
quality is mean(weak) + (1/N) Σ_{top k} (strong − weak). No threshold can split equal win rates, so
vertices lie only between distinct win rates, and straight lines join them (what a coin toss among
the tied queries gives on average). Nothing is sampled at quantiles.

Sources: PGR, APGR, CPT: RouteLLM, arXiv 2406.18665, section 3. Quality drop at a cost advantage:
Hybrid LLM, arXiv 2404.14618, section 4. AIQ: RouterBench, arXiv 2403.12031.

Cost is always the share of queries sent to the strong LLM, in [0, 1]. Where the strong LLM is not
better than the weak one there is no gap to recover, and PGR, APGR and CPT are NaN (`Frontier.gap`
says so), never the quotient of two roundings.

Longer than most files here, since every metric of the contract has its own public function; all
the mathematics is in `Frontier` and `RankedQueries`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]

NO_GAP = "strong is not better than weak"
_NO_PERCENT = "all-strong quality is 0"
# Of the mean absolute quality: a smaller difference of means is rounding.
_ROUNDING = 1e-12
_TENTHS = np.arange(11) / 10


@dataclass(frozen=True)
class Metric:
    """What a number says, which way is better, and the version of its definition."""

    description: str
    higher_is_better: bool
    undefined: str = ""
    """When it is NaN; empty if never."""
    version: int = 1


METRICS: dict[str, Metric] = {
    "apgr": Metric(
        "average performance gap recovered, ∫ PGR dcost over the exact curve", True, NO_GAP
    ),
    "apgr_10": Metric("mean of PGR at costs 0.1, 0.2 … 1.0 (the article's sum)", True, NO_GAP),
    "apgr_routellm": Metric(
        "PGR by the trapezoid rule over what the win rate's deciles cost", True, NO_GAP, version=2
    ),
    "cpt_50": Metric("smallest cost at which PGR reaches 0.5", False, NO_GAP),
    "cpt_80": Metric("smallest cost at which PGR reaches 0.8", False, NO_GAP),
    "pgr_at_20": Metric("PGR with 20 % of the queries on the strong LLM", True, NO_GAP),
    "pgr_at_50": Metric("PGR with 50 % of the queries on the strong LLM", True, NO_GAP),
    "pgr_at_80": Metric("PGR with 80 % of the queries on the strong LLM", True, NO_GAP),
    "quality_drop_at_10": Metric("quality lost with 10 % of the queries on the weak LLM", False),
    "quality_drop_at_20": Metric("quality lost with 20 % of the queries on the weak LLM", False),
    "quality_drop_at_40": Metric("quality lost with 40 % of the queries on the weak LLM", False),
    "quality_drop_pct_at_10": Metric(
        "quality lost in % of all-strong, 10 % on the weak LLM", False, _NO_PERCENT
    ),
    "quality_drop_pct_at_20": Metric(
        "quality lost in % of all-strong, 20 % on the weak LLM", False, _NO_PERCENT
    ),
    "quality_drop_pct_at_40": Metric(
        "quality lost in % of all-strong, 40 % on the weak LLM", False, _NO_PERCENT
    ),
    "aiq": Metric("area under the non-decreasing hull of the cost-quality curve", True),
    "weak_quality": Metric("mean quality with every query on the weak LLM", True),
    "strong_quality": Metric("mean quality with every query on the strong LLM", True),
    "quality_gap": Metric("strong_quality − weak_quality", True),
}


@dataclass(frozen=True)
class QualityDrop:
    """Quality lost against all-strong; negative where the router is better than all-strong."""

    absolute: float
    """In quality units."""
    percent: float
    """Of |all-strong quality|, since log-likelihoods are negative. NaN where that is 0."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """A router's cost-quality curve: V vertices from all-weak to all-strong, costs ascending."""

    cost: FloatArray
    """(V,) share of queries sent to the strong LLM, from 0 to 1."""
    gain: FloatArray
    """(V,) mean quality above all-weak."""
    threshold: FloatArray
    """(V,) the threshold α that attains the vertex: strong iff win rate ≥ α. First is +inf."""
    weak_quality: float
    """Mean quality at cost 0."""
    rounding: float = 0.0
    """A gap up to this size is a rounding error of the means, not a gap."""
    queries: float = 1.0
    """N, or the sum of the weights."""

    @property
    def quality(self) -> FloatArray:
        """(V,) mean quality at each vertex."""
        return self.weak_quality + self.gain

    def gap(self) -> float:
        """Return mean(strong) − mean(weak), or NaN where the strong LLM is not better."""
        gap = float(self.gain[-1])
        return gap if gap > self.rounding else float("nan")

    def quality_at(self, cost: ArrayLike) -> FloatArray:
        """Return the mean quality at each cost in [0, 1]."""
        return self.weak_quality + self._gain_at(cost)

    def pgr_at(self, cost: ArrayLike) -> FloatArray:
        """Return the performance gap recovered at each cost in [0, 1]; NaN without a gap."""
        return self._gain_at(cost) / self.gap()

    def apgr(self) -> float:
        """Return ∫ PGR dcost over [0, 1], exactly: the curve is piecewise linear."""
        return _trapezoid(self.cost, self.gain) / self.gap()

    def apgr_routellm(self) -> float:
        """Return APGR as RouteLLM's evaluation computes it; see the function of this name.

        Found by rank: a decile that falls on a win rate is that win rate. Interpolated numbers may
        differ from it in the last bit, and then the metric would when win rates are only rescaled.
        """
        positions = np.arange(10) * (self.queries - 1) / 10  # in ascending order, the first is 0
        # A decile between two win rates routes the upper one to the strong LLM, and all above it.
        above, below = (
            self._vertex_of(found) for found in (np.ceil(positions), np.floor(positions))
        )
        top = self._vertex_of(np.array([self.queries - 1]))
        # Deciles that equal the largest win rate are one threshold with it, which routes nothing.
        vertices = np.unique(np.append(above[below != top], 0))
        if len(vertices) == 1:  # all win rates are equal
            vertices = np.array([0, len(self.cost) - 1])
        return _trapezoid(self.cost[vertices], self.gain[vertices]) / self.gap()

    def _vertex_of(self, position: FloatArray) -> NDArray[np.int64]:
        """Return the vertices at which the queries at these ascending positions become strong."""
        # Half a query off, so that rounding decides nothing.
        return np.searchsorted(self.cost, (self.queries - position - 0.5) / self.queries)

    def cpt(self, pgr: float) -> float:
        """Return the smallest cost at which PGR reaches ``pgr``; NaN if it never does.

        The curve need not be monotone: the first crossing counts. Within a straight segment of
        tied win rates the cost is interpolated.
        """
        gap = self.gap()
        target = pgr * gap
        # A mark that a vertex meets exactly must not be missed by the last bit of pgr · gap.
        reached = self.gain >= target - _ROUNDING * gap
        first = int(np.argmax(reached))
        if not reached[first]:
            return float("nan")
        if first == 0:
            return 0.0
        low, high = float(self.gain[first - 1]), float(self.gain[first])
        share = min((target - low) / (high - low), 1.0)
        return float(self.cost[first - 1] + share * (self.cost[first] - self.cost[first - 1]))

    def quality_drop_at(self, cost_advantage: float) -> QualityDrop:
        """Return what is lost against all-strong when this share goes to the weak LLM."""
        strong = self.weak_quality + float(self.gain[-1])
        drop = float(self.gain[-1] - self._gain_at(1.0 - cost_advantage))
        percent = 100.0 * drop / abs(strong) if strong != 0.0 else float("nan")
        return QualityDrop(absolute=drop, percent=percent)

    def aiq(self) -> float:
        """Return the area under the non-decreasing upper hull of the curve, over costs [0, 1].

        RouterBench, arXiv 2403.12031: mixing two thresholds at random attains every
        point between them, hence the hull; and more money never has to buy less quality, hence
        non-decreasing. Their costs are scaled to [0, 1], so c_max − c_min = 1.
        """
        cost, gain = upper_hull(self.cost, self.gain)
        return self.weak_quality + _trapezoid(cost, np.maximum.accumulate(gain))

    def metrics(self) -> dict[str, float]:
        """Return every metric of `METRICS` by name; one pass, since a bootstrap does it often."""
        at_tenths = np.interp(_TENTHS, self.cost, self.gain)
        pgr = at_tenths / self.gap()
        drop = {share: float(self.gain[-1] - at_tenths[10 - share // 10]) for share in (10, 20, 40)}
        strong = self.weak_quality + float(self.gain[-1])
        to_percent = 100.0 / abs(strong) if strong != 0.0 else float("nan")
        return {
            "apgr": self.apgr(),
            "apgr_10": float(pgr[1:].mean()),
            "apgr_routellm": self.apgr_routellm(),
            "cpt_50": self.cpt(0.5),
            "cpt_80": self.cpt(0.8),
            **{f"pgr_at_{share}": float(pgr[share // 10]) for share in (20, 50, 80)},
            **{f"quality_drop_at_{share}": lost for share, lost in drop.items()},
            **{f"quality_drop_pct_at_{share}": lost * to_percent for share, lost in drop.items()},
            "aiq": self.aiq(),
            "weak_quality": self.weak_quality,
            "strong_quality": strong,
            "quality_gap": float(self.gain[-1]),
        }

    def _gain_at(self, cost: ArrayLike) -> FloatArray:
        costs = np.asarray(cost, dtype=np.float64)
        if not ((costs >= 0.0) & (costs <= 1.0)).all():
            raise ConfigError(
                f"The cost is {costs}; expected a share of strong calls between 0 and 1. Divide a "
                "percentage by 100."
            )
        return np.asarray(np.interp(costs, self.cost, self.gain), dtype=np.float64)


class RankedQueries:
    """Queries sorted once by one router's win rate; draws its curve under any query weights.

    A bootstrap replicate is a vector of query counts, so `curve(counts)` is its exact curve, by
    the same code as the point estimate.
    """

    def __init__(self, win_rate: ArrayLike, weak: ArrayLike, strong: ArrayLike) -> None:
        rate, self.weak, strong_quality = checked_columns(win_rate, weak, strong)
        self.order = np.argsort(-rate, kind="stable")
        ranked = rate[self.order]
        is_first = np.append(True, ranked[1:] != ranked[:-1])
        self.starts = np.flatnonzero(is_first)
        gap = (strong_quality - self.weak)[self.order]
        # Right or wrong answers: integer sums are exact, and several times as fast to accumulate.
        whole = gap.astype(np.int64) if np.abs(gap).max() < 2**31 else gap
        self.gap = whole if (whole == gap).all() else gap
        self.threshold = np.append(np.inf, ranked[is_first])
        self.rounding = _ROUNDING * float(np.abs(self.weak).mean() + np.abs(strong_quality).mean())

    def curve(self, weights: NDArray[np.float64 | np.int64] | None = None) -> Frontier:
        """Return the curve under query weights (N,), in the order of the input; None is 1 each."""
        if weights is None:
            weights = np.ones(len(self.gap), dtype=np.int64)
        ranked = weights[self.order]
        gained = ranked * self.gap
        if len(self.starts) < len(self.gap):
            ranked = np.add.reduceat(ranked, self.starts)
            gained = np.add.reduceat(gained, self.starts)
        cost = np.zeros(len(self.threshold), dtype=ranked.dtype)
        gain = np.zeros(len(self.threshold), dtype=gained.dtype)
        np.cumsum(ranked, out=cost[1:])
        np.cumsum(gained, out=gain[1:])
        total = cost[-1]
        return Frontier(
            cost=cost / total,
            gain=gain / total,
            threshold=self.threshold,
            weak_quality=float((weights * self.weak).sum() / total),
            rounding=self.rounding,
            queries=float(total),
        )


def cost_quality_curve(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    *,
    weights: ArrayLike | None = None,
) -> Frontier:
    """Return the exact curve over every distinct win rate.

    All arrays are (N,); ``weights`` are non-negative and count a query that many times. Raises
    `DataError` for empty, non-finite or mismatched arrays.

    >>> curve = cost_quality_curve([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1], [1, 1, 1, 1])
    >>> curve.cost.tolist(), curve.quality.tolist(), curve.threshold.tolist()
    ([0.0, 0.25, 0.75, 1.0], [0.5, 0.75, 1.0, 1.0], [inf, 0.9, 0.5, 0.1])
    """
    queries = RankedQueries(win_rate, weak_quality, strong_quality)
    return queries.curve(None if weights is None else _weights(weights, len(queries.gap)))


def quality_at(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    cost: float,
) -> float:
    """Return the mean quality when the top ``cost`` share of queries goes to the strong LLM.

    >>> quality_at([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1], [1, 1, 1, 1], 0.5)
    0.875
    """
    curve = cost_quality_curve(win_rate, weak_quality, strong_quality)
    return float(curve.quality_at(cost))


def pgr_at(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    cost: float,
) -> float:
    """Return the performance gap recovered at ``cost``; NaN where strong is not better than weak.

    (quality at cost − all-weak) / (all-strong − all-weak): arXiv 2406.18665, section 3.

    >>> pgr_at([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1], [1, 1, 1, 1], 0.5)
    0.75
    """
    curve = cost_quality_curve(win_rate, weak_quality, strong_quality)
    return float(curve.pgr_at(cost))


def apgr(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
) -> float:
    """Return ∫ PGR dcost over the exact curve: 0.5 for a constant or (on average) random router.

    NaN where strong is not better than weak. arXiv 2406.18665, section 3.

    >>> apgr([0.5, 0.5], [0, 0], [1, 0]), apgr([0.9, 0.1], [0, 0], [1, 0])
    (0.5, 0.75)
    """
    return cost_quality_curve(win_rate, weak_quality, strong_quality).apgr()


def apgr_10(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
) -> float:
    """Return the article's (1/10) Σ PGR at costs 0.1, 0.2 … 1.0, 0.55 for a random router.

    >>> round(apgr_10([0.5, 0.5], [0, 0], [1, 0]), 6)
    0.55
    """
    return cost_quality_curve(win_rate, weak_quality, strong_quality).metrics()["apgr_10"]


def apgr_routellm(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
) -> float:
    """Return APGR as RouteLLM's evaluation computes it, which differs from the exact `apgr`.

    Thresholds are the eleven deciles of the win rate, interpolated between queries; a query goes
    to the strong LLM from the threshold on, and above the last one only. Quality is integrated
    over the costs that this gives by the trapezoid rule, less all-weak, over the same for
    all-strong. Where deciles coincide, as with ties, their code stops; here they are merged, as
    pandas.qcut does on demand (duplicates="drop"). Where all win rates are equal no area would be
    left; all-strong is kept as the other end.

    >>> round(apgr_routellm([0.5, 0.5], [0, 0], [1, 0]), 6)
    0.5
    """
    return cost_quality_curve(win_rate, weak_quality, strong_quality).metrics()["apgr_routellm"]


def cpt(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    pgr: float,
) -> float:
    """Return the smallest cost in [0, 1] at which PGR reaches ``pgr`` (0.8 for CPT(80 %)).

    NaN where strong is not better than weak, or where a mark above 1 is never reached.

    >>> cpt([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1], [1, 1, 1, 1], 0.75)
    0.5
    """
    if not np.isfinite(pgr):
        raise ConfigError(
            f"The PGR mark is {pgr}; expected a finite share such as 0.5. Give 0.8 for CPT(80 %)."
        )
    curve = cost_quality_curve(win_rate, weak_quality, strong_quality)
    return curve.cpt(pgr)


def quality_drop_at(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
    cost_advantage: float,
) -> QualityDrop:
    """Return what is lost against all-strong with ``cost_advantage`` of the queries on the weak.

    arXiv 2404.14618, section 4: absolute, and in % of |all-strong|.

    >>> quality_drop_at([0.9, 0.6, 0.5, 0.1], [-4, -3, -3, -2], [-2, -2, -2, -2], 0.5)
    QualityDrop(absolute=0.25, percent=12.5)
    """
    curve = cost_quality_curve(win_rate, weak_quality, strong_quality)
    return curve.quality_drop_at(cost_advantage)


def aiq(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
) -> float:
    """Return RouterBench's average improvement in quality; see `Frontier.aiq`.

    >>> aiq([0.1, 0.9], [0, 0], [1, 0])
    0.25
    """
    return cost_quality_curve(win_rate, weak_quality, strong_quality).aiq()


def summary(
    win_rate: ArrayLike,
    weak_quality: ArrayLike,
    strong_quality: ArrayLike,
) -> dict[str, float]:
    """Return every metric of `METRICS` for one router, under the same names for every router.

    >>> sorted(summary([0.9, 0.1], [0, 0], [1, 0])) == sorted(METRICS)
    True
    """
    return cost_quality_curve(win_rate, weak_quality, strong_quality).metrics()


def oracle_win_rate(weak_quality: ArrayLike, strong_quality: ArrayLike) -> FloatArray:
    """Return the win rates of the best possible order: by strong − weak, equal gaps tied.

    (N,), evenly spaced over [0, 1] by rank; 0.5 where all gaps are equal.

    >>> oracle_win_rate([1, 0, 0], [0, 0, 1]).tolist()
    [0.0, 0.5, 1.0]
    """
    weak, strong = checked_qualities(weak_quality, strong_quality)
    distinct, rank = np.unique(strong - weak, return_inverse=True)
    if len(distinct) == 1:
        return np.full(len(weak), 0.5)
    return np.asarray(rank / (len(distinct) - 1), dtype=np.float64)


def _trapezoid(x: FloatArray, y: FloatArray) -> float:
    # Not a dot product: BLAS would start threads for these lengths, far slower on busy cores.
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1])).sum() / 2.0)


def upper_hull(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the vertices of the upper convex hull of points with ascending ``x``, in O(n).

    The hull is the least concave majorant; its slopes are the decreasing isotonic regression of
    the points' slopes (Barlow et al. 1972), whose blocks end at its vertices.

    >>> upper_hull(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.0, 2.0, 1.0]))
    (array([0., 2., 3.]), array([0., 2., 1.]))
    """
    from scipy.optimize import isotonic_regression

    # Weighted curves repeat a point where a weight is 0.
    keep = np.append(True, x[1:] > x[:-1])
    x, y = x[keep], y[keep]
    if len(x) == 1:
        return x, y
    width = x[1:] - x[:-1]
    slopes = (y[1:] - y[:-1]) / width
    vertices = isotonic_regression(slopes, weights=width, increasing=False).blocks
    return x[vertices], y[vertices]


def checked_qualities(weak: ArrayLike, strong: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return both as (N,) float64, or raise `DataError`."""
    names = ("weak quality", "strong quality")
    weak_quality, strong_quality = _columns(dict(zip(names, (weak, strong), strict=True)))
    return weak_quality, strong_quality


def checked_columns(
    win_rate: ArrayLike, weak: ArrayLike, strong: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return win rate, weak and strong quality as (N,) float64, or raise `DataError`."""
    rate, weak_quality, strong_quality = _columns(
        {"win rate": win_rate, "weak quality": weak, "strong quality": strong}
    )
    return rate, weak_quality, strong_quality


def _columns(columns: dict[str, ArrayLike]) -> list[FloatArray]:
    arrays = []
    for name, column in columns.items():
        values = np.asarray(column, dtype=np.float64)
        if values.ndim != 1 or len(values) == 0:
            raise DataError(
                f"The {name} has shape {values.shape}; expected one number a query, (N,), and at "
                "least one query. Average the samples of a query first; check the split."
            )
        bad = int(len(values) - np.isfinite(values).sum())
        if bad:
            raise DataError(
                f"The {name} holds {bad} NaN or infinite values of {len(values)}; expected finite "
                "numbers. Score those queries again, or drop them."
            )
        arrays.append(values)
    lengths = {name: len(values) for name, values in zip(columns, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"The columns differ in length: {lengths}; expected the same queries in the same "
            "order. Join them on the query id first."
        )
    return arrays


def _weights(weights: ArrayLike, queries: int) -> FloatArray:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (queries,) or not np.isfinite(values).all() or values.min() < 0:
        raise DataError(
            f"The weights have shape {values.shape} or hold a negative or non-finite value; "
            f"expected ({queries},) numbers ≥ 0. Give one weight a query."
        )
    if not values.any():
        raise DataError("All weights are 0; expected a positive one. Weigh some query in.")
    return values
