"""Ratings and tiers: how strong each LLM is overall, and which LLMs are about equally strong.

Idea: battles are reduced to a table of wins between LLMs, from which Bradley-Terry ratings follow
by Newton's method; neighbouring ratings are then grouped so that the tiers vary as little as
possible inside. Arena data pair any two LLMs only rarely, tiers meet often.

Sources: Bradley and Terry 1952; ties as in Davidson 1970 ("On extending the Bradley-Terry model to
accommodate ties"); when ratings exist, Ford 1957; the step length, Sun and Tran-Dinh 2019
("Generalized self-concordant functions"); optimal groups on a line, Fisher 1958; tiers for
routing, RouteLLM (arXiv 2406.18665), sections 3.2 and 4.1.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from conf.errors import DataError, unknown_name
from router_models.training_data import Comparisons

# Half a win and half a loss, as in Jeffreys' prior, and only where ratings would be infinite.
PRIOR_WINS = 0.5
MAX_STEPS = 200
TOLERANCE = 1e-12


def llm_tiers(comparisons: Comparisons, tiers: int) -> dict[str, int]:
    """Return each LLM's tier, 0 for the strongest; the routed pair is never in one tier.

    With fewer LLMs than tiers, each LLM is a tier of its own. Raises DataError when the routed
    pair is not connected by battles.
    """
    rated = llm_ratings(connected_battles(comparisons))
    names = list(rated)
    apart = (names.index(comparisons.weak), names.index(comparisons.strong))
    numbers = tier_numbers(np.array(list(rated.values())), tiers, apart=apart)
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def llm_ratings(comparisons: Comparisons) -> dict[str, float]:
    """Return each LLM's rating, in natural log-odds of mean 0.

    An outcome of exactly 0.5 is a tie; any other is that share of a win for either side.
    """
    names = sorted(set(comparisons.llm_a) | set(comparisons.llm_b))
    a, b = llm_numbers(comparisons, names)
    tied = comparisons.a_wins == 0.5
    decided = np.where(tied, 0.0, comparisons.a_wins), np.where(tied, 0.0, 1 - comparisons.a_wins)
    wins = np.zeros((len(names), len(names)))
    ties = np.zeros_like(wins)
    np.add.at(wins, (a, b), decided[0])
    np.add.at(wins, (b, a), decided[1])
    np.add.at(ties, (a, b), tied)
    np.add.at(ties, (b, a), tied)
    return dict(zip(names, davidson(wins, ties).tolist(), strict=True))


def llm_numbers(comparisons: Comparisons, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in ``names`` of both sides of every battle, (n,) each."""
    position = {name: at for at, name in enumerate(names)}
    a = np.array([position[name] for name in comparisons.llm_a], dtype=np.int64)
    b = np.array([position[name] for name in comparisons.llm_b], dtype=np.int64)
    return a, b


def connected_battles(comparisons: Comparisons) -> Comparisons:
    """Return the battles between LLMs that can be compared with the routed pair.

    Battles of an LLM with itself, and of LLMs that no chain of battles links to the pair, are left
    out: they say nothing about it. Raises DataError when the pair itself is not linked.
    """
    names = sorted(set(comparisons.llm_a) | set(comparisons.llm_b))
    for name in (comparisons.weak, comparisons.strong):
        if name not in names:
            raise DataError(
                f"{name!r} is never compared in {len(comparisons.prompts)} rows. "
                + unknown_name("LLM", name, names)
                + " Expected battles of both routed LLMs. Choose LLMs that were compared."
            )
    a, b = llm_numbers(comparisons, names)
    met = coo_array((np.ones(len(a)), (a, b)), shape=(len(names), len(names)))
    _, component = connected_components(met.tocsr(), directed=False)
    weak, strong = names.index(comparisons.weak), names.index(comparisons.strong)
    if component[weak] != component[strong]:
        raise DataError(
            f"{comparisons.strong!r} and {comparisons.weak!r} are never compared, not even through "
            f"other LLMs, in {len(comparisons.prompts)} rows. Expected a chain of battles between "
            "them. Add battles, or choose a pair that was compared."
        )
    useful = (component[a] == component[weak]) & (a != b)
    return comparisons if useful.all() else comparisons.take(np.flatnonzero(useful))


def bradley_terry(wins: np.ndarray, *, start: np.ndarray | None = None) -> np.ndarray:
    """Return maximum-likelihood ratings, (B, K), each row of mean 0, of B tables of wins.

    wins: (B, K, K), [·, i, j] how much i won against j, a tie being half a win for either; start:
    (K,) ratings near the answer. Ratings are finite only if `virtual_wins` is 0 for the table.
    """
    wins = np.asarray(wins, dtype=np.float64)
    count = wins.shape[-1]
    met = wins + wins.swapaxes(-1, -2)
    total = np.maximum(met.sum(axis=(-1, -2)), 1e-300)
    ratings = np.zeros(wins.shape[:-1]) if start is None else np.tile(start, (len(wins), 1))
    for _ in range(MAX_STEPS):
        # P(i beats j), in a form that no difference overflows.
        share = 0.5 * (1 + np.tanh((ratings[:, :, None] - ratings[:, None, :]) / 2))
        gradient = (wins - met * share).sum(axis=-1)
        if np.all(np.abs(gradient).max(axis=-1) <= TOLERANCE * total):
            break
        curvature = _laplacian(met * share * (1 - share))
        # Only differences are determined: this pins the mean without touching them.
        curvature += (total / count)[:, None, None] / count
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        ratings = ratings + _safe_length(np.ptp(step, axis=-1))[:, None] * step
    return ratings - ratings.mean(axis=-1, keepdims=True)


def davidson(wins: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Return the ratings θ, (K,) of mean 0, of the Bradley-Terry model with ties.

    P(i wins) : P(tie) : P(j wins) = exp(d/2) : ν : exp(−d/2), with d = θ_i − θ_j and one ν for all.
    wins: (K, K), [i, j] how often i beat j; ties: (K, K), symmetric. Where one LLM never lost, say,
    `virtual_wins` are added, so that its rating is finite. Ties alone do not bound it: the larger
    ν, the less a tie speaks for equal strength.
    """
    wins = wins + virtual_wins(wins)
    if not ties.any():
        return bradley_terry(wins[None])[0]
    count = len(wins)
    met, total = wins + wins.T + ties, float(wins.sum() + ties.sum())
    tied = ties.sum() / 2
    ratings, log_nu = np.zeros(count), 0.0
    for _ in range(MAX_STEPS):
        half = (ratings[:, None] - ratings[None, :]) / 2
        top = np.maximum(np.abs(half), log_nu)
        first, second, tie = np.exp(half - top), np.exp(-half - top), np.exp(log_nu - top)
        whole = first + second + tie
        first, second, tie = first / whole, second / whole, tie / whole
        lead = (first - second) / 2
        gradient = np.append(
            ((wins - wins.T) / 2 - met * lead).sum(axis=1), tied - (met * tie).sum() / 2
        )
        if np.abs(gradient).max() <= TOLERANCE * total:
            break
        curvature = np.zeros((count + 1, count + 1))
        spread = _laplacian((met * ((first + second) / 4 - lead**2))[None])[0]
        curvature[:count, :count] = spread + total / count**2
        curvature[:count, count] = curvature[count, :count] = -(met * tie * lead).sum(axis=1)
        curvature[count, count] = (met * tie * (1 - tie)).sum() / 2
        step = np.linalg.solve(curvature, gradient)
        reach = np.ptp(step[:count])
        step = step * _safe_length(np.array(max(reach, reach / 2 + abs(step[count]))))
        ratings, log_nu = ratings + step[:count], log_nu + step[count]
    return ratings - ratings.mean()


def virtual_wins(wins: np.ndarray) -> np.ndarray:
    """Return the wins that have to be added for finite ratings to exist, (K, K); usually zeros.

    Ratings exist if and only if every group of LLMs has lost to some LLM outside it (Ford), that
    is, if the graph of wins is strongly connected. Where it is not, LLMs of different components
    are given virtual draws, all in all at most `PRIOR_WINS` wins and as many losses for each LLM.
    """
    _, component = connected_components(wins > 0, directed=True, connection="strong")
    apart = component[:, None] != component[None, :]
    return PRIOR_WINS * apart / max(1, len(wins) - 1)


def tier_numbers(
    ratings: np.ndarray, tiers: int, *, apart: tuple[int, int] | None = None
) -> np.ndarray:
    """Return the tier of each rating, (K,), 0 for the highest: min(tiers, K) groups.

    The squared deviations from the groups' means sum to the smallest value possible, by dynamic
    programming over the sorted ratings, O(tiers · K²). apart: two positions that must not share a
    group.
    """
    count = len(ratings)
    tiers = min(tiers, count)
    order = np.argsort(-ratings, kind="stable")
    cost = _spread_within(ratings[order])
    if apart is not None:
        low, high = sorted(int(np.flatnonzero(order == at)[0]) for at in apart)
        cost[: low + 1, high + 1 :] = np.inf
    best = cost[0]  # best[j]: the first j ratings in one group
    splits = []
    for _ in range(1, tiers):
        through = best[:, None] + cost  # [i, j]: the last group holds ratings i to j − 1
        splits.append(np.argmin(through, axis=0))
        best = through.min(axis=0)
    numbers = np.zeros(count, dtype=np.int64)
    end = count
    for number in range(tiers - 1, 0, -1):
        begin = int(splits[number - 1][end])
        numbers[order[begin:end]] = number
        end = begin
    return numbers


def _spread_within(ratings: np.ndarray) -> np.ndarray:
    """Return the squared deviations within ratings[i:j], (K + 1, K + 1); infinite where empty."""
    centred = ratings - ratings.mean()  # or the difference of sums below would cancel
    sums = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(centred**2)])
    size = np.arange(len(sums))[None, :] - np.arange(len(sums))[:, None]
    inside = size > 0
    total = sums[None, :] - sums[:, None]
    spread = squares[None, :] - squares[:, None] - total**2 / np.where(inside, size, 1)
    return np.where(inside, np.maximum(spread, 0.0), np.inf)


def _laplacian(weights: np.ndarray) -> np.ndarray:
    """Return diag(row sums) − weights for symmetric weights, (B, K, K)."""
    laplacian = -weights
    at = np.arange(weights.shape[-1])
    laplacian[:, at, at] += weights.sum(axis=-1)
    return laplacian


def _safe_length(reach: np.ndarray) -> np.ndarray:
    """Return how much of a Newton step to take; → 1 near the answer.

    reach: the step's largest change in any log-odds. With this share the likelihood never falls,
    wherever the step starts, because its third derivative is at most ``reach`` times its second.
    """
    return np.where(reach > 1e-12, np.log1p(reach) / np.maximum(reach, 1e-12), 1.0)
