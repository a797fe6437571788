"""Training labels of the Hybrid LLM router, and the relaxation t* that spreads them best.

A label is the probability that the *weak* LLM suffices for a query: the share of pairs of its
answers (one of the weak, one of the strong LLM) with q(S) ≥ q(L) − t. The relaxation t ≥ 0 that
maximises the mean absolute difference of the labels of two queries,
f(t) = (1/N²) Σ_{i,j} |y_i(t) − y_j(t)|, is found exactly, without a grid and without N².

Source: Hybrid LLM, arXiv 2404.14618, section 3 (deterministic, probabilistic and transformed
labels, and the choice of t*).

One condition everywhere: a pair holds at t when its gap d = q(L) − q(S), computed once in float64,
is ≤ t. In real numbers this is q(S) ≥ q(L) − t; in floating point the two may differ in the last
bit, so the sweep and `transformed_labels` both use d ≤ t and agree bit for bit.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.errors import ConfigError, DataError, unknown_name

FloatArray = NDArray[np.float64]
Pairing = Literal["all", "matched"]


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The relaxation t* that spreads the labels most, its labels, and the whole curve of f."""

    t: float
    """t*, in quality units: the smallest t ≥ 0 at which f attains its maximum. At 0 the labels are
    the probabilistic ones, y(0)."""
    objective: float
    """f(t*), in [0, 1/2]."""
    labels: FloatArray
    """(N,) the transformed labels at t*: the probability that the weak LLM suffices."""
    degenerate: bool
    """True if no relaxation t > 0 could have done anything: every t that changes a label makes all
    labels equal. So it is for binary quality and for gaps without spread; t* is then 0."""
    breakpoints: FloatArray
    """(B,) 0 and every distinct positive gap, ascending; f is constant from one to the next."""
    values: FloatArray
    """(B,) f at each breakpoint."""

    def thinned_curve(self, points: int = 500) -> tuple[FloatArray, FloatArray]:
        """Return at most ``points`` vertices (t, f) for a figure or a table, t* and ends kept."""
        if points < 3:
            raise ConfigError(
                f"A thinned curve of {points} points was asked for; expected at least 3 (both ends "
                "and t*). Ask for more points."
            )
        last = len(self.breakpoints) - 1
        if last < points:
            return self.breakpoints, self.values
        best = int(np.searchsorted(self.breakpoints, self.t))
        even = np.linspace(0, last, points - 1).round().astype(np.int64)
        keep = np.unique(np.append(even, best))
        return self.breakpoints[keep], self.values[keep]


def optimal_relaxation(
    weak: ArrayLike, strong: ArrayLike, *, pairing: Pairing = "all"
) -> Relaxation:
    """Find the exact t* ≥ 0 that maximises the spread f of the transformed labels.

    ``weak`` is (N, S) and ``strong`` (N, L): the quality of every sampled answer, higher is better;
    (N,) counts as one sample each. ``pairing`` is "all" (P = S·L pairs a query) or "matched"
    (equal sample indices, P = S = L). Takes O(NP log NP) time and O(NP) memory.

    With C_k(t) the number of queries with label ≤ k/P, f(t) = (2 / (P·N²)) Σ_{k<P} C_k (N − C_k).
    C_k falls by one where the (k+1)-th smallest gap of a query is reached, so the sorted k-th
    smallest gaps of all queries give each step of f in closed form: the m-th of them changes
    C_k (N − C_k) by N + 1 − 2m. The sums are exact integers, so that ties of f are true ties.

    Raises `DataError` for empty, non-finite or mismatched arrays.

    >>> weak, strong = [0.2, 0.1, 0.9], [0.9, 0.3, 0.8]
    >>> found = optimal_relaxation(weak, strong)
    >>> found.t, round(found.objective, 4), found.labels.tolist(), found.degenerate
    (0.0, 0.4444, [0.0, 0.0, 1.0], False)
    """
    weak_quality, strong_quality = _checked(weak, strong, pairing)
    breakpoints, sums, pairs = _sweep(_gaps(weak_quality, strong_quality, pairing))
    # argmax returns the first maximum, hence the smallest t.
    best = int(np.argmax(sums))
    t = float(breakpoints[best])
    queries = len(weak_quality)
    scale = 2.0 / (pairs * float(queries) ** 2)
    return Relaxation(
        t=t,
        objective=float(sums[best]) * scale,
        labels=_labels(weak_quality, strong_quality, t, pairing),
        degenerate=bool(not sums[1:].any()),
        breakpoints=breakpoints,
        values=np.multiply(sums, scale, dtype=np.float64),
    )


def transformed_labels(
    weak: ArrayLike, strong: ArrayLike, t: float, *, pairing: Pairing = "all"
) -> FloatArray:
    """Return y(t), (N,): the share of pairs with q(L) − q(S) ≤ t. arXiv 2404.14618, section 3.3.

    Shapes, ``pairing`` and errors as in `optimal_relaxation`; a negative or non-finite ``t`` is a
    `DataError` too.

    >>> transformed_labels([[0.5, 0.8]], [[0.9, 0.7]], 0.25).tolist()
    [0.75]
    """
    if not (np.isfinite(t) and t >= 0):
        raise DataError(
            f"The relaxation t is {t}; expected a finite number ≥ 0, in quality units. Use t = 0 "
            "for the probabilistic labels, or the t of optimal_relaxation."
        )
    weak_quality, strong_quality = _checked(weak, strong, pairing)
    return _labels(weak_quality, strong_quality, t, pairing)


def probabilistic_labels(
    weak: ArrayLike, strong: ArrayLike, *, pairing: Pairing = "all"
) -> FloatArray:
    """Return y(0), (N,): the share of pairs with q(S) ≥ q(L). arXiv 2404.14618, section 3.2.

    >>> probabilistic_labels([[0.5, 0.8]], [[0.9, 0.7]]).tolist()
    [0.25]
    """
    return transformed_labels(weak, strong, 0.0, pairing=pairing)


def deterministic_labels(weak: ArrayLike, strong: ArrayLike) -> FloatArray:
    """Return 1[q(S) ≥ q(L)] of the first sample of each, (N,). arXiv 2404.14618, section 3.1.

    >>> deterministic_labels([[0.5, 0.8], [0.7, 0.1]], [[0.9, 0.7], [0.7, 0.7]]).tolist()
    [0.0, 1.0]
    """
    weak_quality, strong_quality = _checked(weak, strong, "all")
    return _labels(weak_quality[:, :1], strong_quality[:, :1], 0.0, "all")


def label_spread(labels: ArrayLike) -> float:
    """Return f of any labels: (1/N²) Σ_{i,j} |y_i − y_j|, Gini's mean difference, in O(N log N).

    >>> label_spread([1.0, 0.0, 1.0]) * 9 / 6  # over the 3 distinct pairs: the article's 0.67
    0.6666666666666666
    """
    values = np.asarray(labels, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise DataError(
            f"The labels have shape {values.shape} or hold NaN or infinite values; expected a "
            "non-empty (N,) array of finite numbers. Drop the queries that have no label."
        )
    # Sorted, the i-th value stands above i others and below N − 1 − i.
    weight = 2.0 * np.arange(len(values)) - (len(values) - 1)
    return float(2.0 * (weight @ np.sort(values)) / len(values) ** 2)


def _checked(weak: ArrayLike, strong: ArrayLike, pairing: Pairing) -> tuple[FloatArray, FloatArray]:
    if pairing not in ("all", "matched"):
        raise ConfigError(
            f"{unknown_name('pairing', pairing, ['all', 'matched'])} Choose one of the known ones."
        )
    weak_quality = _samples("weak", weak)
    strong_quality = _samples("strong", strong)
    if len(weak_quality) != len(strong_quality):
        raise DataError(
            f"There are {len(weak_quality)} queries with weak quality and {len(strong_quality)} "
            "with strong quality; expected the same queries in the same order. Join the two on the "
            "query id first."
        )
    if pairing == "matched" and weak_quality.shape != strong_quality.shape:
        raise DataError(
            f"Matched pairing got {weak_quality.shape[1]} weak and {strong_quality.shape[1]} "
            'strong samples a query; expected equally many. Use pairing="all", or drop the surplus.'
        )
    largest = float(strong_quality.max()) - float(weak_quality.min())
    smallest = float(strong_quality.min()) - float(weak_quality.max())
    if not (np.isfinite(largest) and np.isfinite(smallest)):
        raise DataError(
            f"A quality gap between {smallest} and {largest} overflows; expected qualities whose "
            "difference is a finite float64. Check the quality metric."
        )
    return weak_quality, strong_quality


def _samples(name: str, quality: ArrayLike) -> FloatArray:
    try:
        values = np.asarray(quality, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The {name} quality is not a rectangular array of numbers ({error}); expected (N, "
            "samples). Give every query the same number of samples, without gaps."
        ) from error
    if values.ndim == 1:
        values = values[:, np.newaxis]
    if values.ndim != 2 or values.size == 0:
        raise DataError(
            f"The {name} quality has shape {values.shape}; expected (N, samples) or (N,), with at "
            "least one query and one sample. Check that the split is not empty."
        )
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise DataError(
            f"The {name} quality holds {bad} NaN or infinite values of {values.size}; expected "
            "finite scores. Score the missing answers again, or drop their queries."
        )
    return values


def _gaps(weak: FloatArray, strong: FloatArray, pairing: Pairing) -> FloatArray:
    """Return d = q(L) − q(S) of every pair, (N, P)."""
    if pairing == "matched":
        return strong - weak
    return (strong[:, np.newaxis, :] - weak[:, :, np.newaxis]).reshape(len(weak), -1)


def _labels(weak: FloatArray, strong: FloatArray, t: float, pairing: Pairing) -> FloatArray:
    return (_gaps(weak, strong, pairing) <= t).mean(axis=1)


def _sweep(gaps: FloatArray) -> tuple[FloatArray, NDArray[np.int64], int]:
    """Return the breakpoints from 0 on, Σ_k C_k (N − C_k) at each as an exact integer, and P."""
    queries, pairs = gaps.shape
    gaps.sort(axis=1)
    # Row k: the (k+1)-th smallest gap of every query, sorted. Contiguous, for the sort's sake.
    levels = np.ascontiguousarray(gaps.T)
    levels.sort(axis=1)
    ahead = levels > 0.0
    reached = queries - ahead.sum(axis=1)
    start = int((reached * (queries - reached)).sum())
    step = queries + 1 - 2 * np.arange(1, queries + 1, dtype=np.int64)
    steps = np.broadcast_to(step, levels.shape)[ahead]
    gap = levels[ahead]
    order = np.argsort(gap)
    gap = gap[order]
    sums = np.cumsum(steps[order])
    # Equal gaps move together: only the last of a group is a state that some t can have.
    last = np.append(gap[1:] != gap[:-1], True)[: len(gap)]
    breakpoints = np.concatenate(([0.0], gap[last]))
    return breakpoints, np.concatenate(([start], start + sums[last])), pairs
