"""Drift: are recent queries drawn from where the training queries came from?

Idea: two two-sample tests, by permutation. If nothing has changed, which query is recent and which
is known is an arbitrary label, so the observed statistic is one of equally likely ones: its rank
among those of relabelled data is a p-value that is valid at any sample size, ties included. Queries
are compared by their embeddings (energy distance: 0 exactly for equal distributions, without a
bandwidth to choose) and by their win rates (Kolmogorov-Smirnov: the largest difference in the share
of queries that a threshold sends to the strong LLM, which is what drift costs).

Sources: energy distance, Székely and Rizzo (2013), equation 6; it is a maximum mean discrepancy
(Gretton et al. 2012) with the distance kernel, Sejdinovic et al. (2013). Permutation p-values that
count the observed labelling: Phipson and Smyth (2010). Two tests at once: Holm (1979).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.errors import DataError

FloatArray = NDArray[np.float64]
# Relabellings in one matrix product: bounds memory at 8 MB for 2,000 queries.
CHUNK = 500
# Equal statistics of different relabellings may differ by rounding; they count as equal.
ROUNDING = 1e-9
POWER = 0.8
POWER_QUANTILE = 0.8416  # of the standard normal distribution, at POWER


@dataclass(frozen=True)
class TwoSample:
    """What one test of recent against known queries found."""

    statistic: float
    p_value: float
    known: int
    recent: int


def energy_test(known: ArrayLike, recent: ArrayLike, *, permutations: int, seed: int) -> TwoSample:
    """Test whether two samples of vectors, (n, d) and (m, d), have one distribution.

    The statistic is 2 E|X − Y| − E|X − X'| − E|Y − Y'| over all pairs (V-statistic, ≥ 0).
    Takes O((n + m)² (d + permutations)) time: about 2 s for 1,000 and 1,000 at 1,999 permutations.

    >>> near = np.arange(20.0)[:, None]
    >>> energy_test(near, near + 100, permutations=199, seed=0).p_value
    0.005
    """
    x, y = _vectors(known, "known"), _vectors(recent, "recent")
    if x.shape[1] != y.shape[1]:
        raise DataError(
            f"Known vectors have {x.shape[1]} dimensions, recent ones {y.shape[1]}. Expected the "
            "same. Embed both with one encoder."
        )
    n, m = len(x), len(y)
    distance = _distances(np.concatenate([x, y]))
    per_row, total = distance.sum(axis=1), distance.sum()

    def energy(is_known: FloatArray) -> FloatArray:
        within_known = np.einsum("nb,nb->b", is_known, distance @ is_known)
        across = per_row @ is_known - within_known
        within_recent = total - within_known - 2 * across
        return 2 * across / (n * m) - within_known / n**2 - within_recent / m**2

    return _permuted(energy, n, m, permutations=permutations, seed=seed)


def ks_test(known: ArrayLike, recent: ArrayLike, *, permutations: int, seed: int) -> TwoSample:
    """Test whether two samples of numbers, (n,) and (m,), have one distribution.

    The statistic is the largest difference of their distribution functions (Kolmogorov-Smirnov).
    The p-value stays valid where values are equal, as the win rates of several routers are.

    >>> ks_test([0.1, 0.2, 0.3], [0.3, 0.7, 0.9], permutations=19, seed=0).statistic
    0.6666666666666667
    """
    x, y = (_vectors(sample, name) for sample, name in ((known, "known"), (recent, "recent")))
    n, m = len(x), len(y)
    pooled = np.concatenate([x[:, 0], y[:, 0]])
    order = np.argsort(pooled, kind="stable")
    last_of_its_value = np.append(np.diff(pooled[order]) > 0, True)
    ends = np.flatnonzero(last_of_its_value)

    def largest_difference(is_known: FloatArray) -> FloatArray:
        below_known = np.cumsum(is_known[order], axis=0)[ends]
        below_recent = (ends + 1)[:, None] - below_known
        found: FloatArray = np.abs(below_known / n - below_recent / m).max(axis=0)
        return found

    return _permuted(largest_difference, n, m, permutations=permutations, seed=seed)


def holm(p_values: Mapping[str, float], rate: float) -> dict[str, tuple[float, bool]]:
    """Return each test's bound and whether it rejects, at most ``rate`` false rejections in all.

    The smallest of k p-values is held against rate/k, the next one against rate/(k − 1), and so on;
    the first that is not below its bound ends it.

    >>> holm({"embedding": 0.004, "win rate": 0.009}, 0.01)
    {'embedding': (0.005, True), 'win rate': (0.01, True)}
    >>> holm({"embedding": 0.006, "win rate": 0.009}, 0.01)
    {'embedding': (0.005, False), 'win rate': (0.01, False)}
    """
    found, going = {}, True
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        bound = rate / (len(p_values) - place)
        going = going and p_values[name] <= bound
        found[name] = (bound, going)
    return {name: found[name] for name in p_values}


def permutations_for(rate: float) -> int:
    """Return how many relabellings resolve a p-value of ``rate``: at least ten below it.

    >>> permutations_for(0.005)
    1999
    """
    return max(999, ceil(10 / rate) - 1)


def queries_needed(known: int, *, shift: float, rate: float) -> int | None:
    """Return how many recent queries show a shift of the win rates with a chance of 80 %.

    shift: the difference of the two distribution functions, at some win rate, that is to be seen:
    such a share of the traffic has moved across a threshold. rate: level of the Kolmogorov-Smirnov
    test. None where the known queries are too few for it, however many are recent.

    With n_e = n·m/(n + m), the test rejects above c/√n_e, c = √(−ln(rate/2)/2) (Smirnov's limit),
    and the difference at that win rate varies by at most 1/(2√n_e): so n_e ≥ ((c + z/2)/shift)².

    >>> queries_needed(600, shift=0.25, rate=0.005), queries_needed(50, shift=0.25, rate=0.005)
    (85, None)
    """
    critical = sqrt(-log(rate / 2) / 2)
    effective = ((critical + POWER_QUANTILE / 2) / shift) ** 2
    return None if known <= effective else ceil(effective * known / (known - effective))


def _vectors(sample: ArrayLike, name: str) -> FloatArray:
    values = np.asarray(sample, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) == 0 or not np.isfinite(values).all():
        raise DataError(
            f"The {name} sample has the shape {values.shape}, "
            f"{int((~np.isfinite(values)).sum())} of its values are not finite. Expected at least "
            "one row of finite numbers. Leave the others out."
        )
    return values


def _distances(points: FloatArray) -> FloatArray:
    """Return the Euclidean distance of every two points, (N, N)."""
    norms = np.einsum("nd,nd->n", points, points)
    squared = norms[:, None] + norms[None, :] - 2 * points @ points.T
    # What is left of equal points is rounding: its square root would be far from 0.
    squared[squared < 1e-12 * max(float(norms.max()), 1e-300)] = 0.0
    distance: FloatArray = np.sqrt(squared)
    return (distance + distance.T) / 2


def _permuted(
    statistic: Callable[[FloatArray], FloatArray], n: int, m: int, *, permutations: int, seed: int
) -> TwoSample:
    """Return the statistic of the first n of n + m rows, and its rank under relabelling.

    statistic: from (N, B) indicators of the known rows to (B,) values.
    """
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.ones(n), np.zeros(m)])
    observed = float(statistic(labels[:, None])[0])
    bound = observed - ROUNDING * max(abs(observed), 1e-3)
    as_large = 1  # the observed labelling is one of them
    for start in range(0, permutations, CHUNK):
        size = min(CHUNK, permutations - start)
        relabelled = generator.permuted(np.repeat(labels[:, None], size, axis=1), axis=0)
        as_large += int((statistic(relabelled) >= bound).sum())
    return TwoSample(observed, as_large / (permutations + 1), n, m)
