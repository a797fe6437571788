"""Ratings against a general optimiser, tiers against trying every grouping."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from conf.errors import DataError
from router_models.tiers import (
    PRIOR_WINS,
    bradley_terry,
    connected_battles,
    davidson,
    llm_ratings,
    llm_tiers,
    tier_numbers,
    virtual_wins,
)
from router_models.training_data import Comparisons

few = settings(max_examples=25, deadline=None)


def drawn_wins(seed: int, count: int) -> np.ndarray:
    """Draw a table in which everybody has beaten everybody at least once."""
    wins = 1.0 + np.random.default_rng(seed).poisson(3.0, (count, count))
    np.fill_diagonal(wins, 0.0)
    return wins


def battles(*rows: tuple[str, str, float], weak: str = "w", strong: str = "s") -> Comparisons:
    a, b, a_wins = zip(*rows, strict=True)
    return Comparisons(("q",) * len(rows), a, b, np.array(a_wins, dtype=float), weak, strong)


@given(seed=st.integers(0, 1000), count=st.integers(2, 6))
@few
def test_ratings_are_the_most_likely_ones(seed: int, count: int) -> None:
    wins = drawn_wins(seed, count)

    def loss(ratings: np.ndarray) -> float:
        return float((wins * np.logaddexp(0, ratings[None, :] - ratings[:, None])).sum())

    expected = minimize(loss, np.zeros(count), tol=1e-10).x
    found = bradley_terry(wins[None])[0]
    assert np.allclose(found, expected - expected.mean(), atol=1e-4)
    share = 1 / (1 + np.exp(found[None, :] - found[:, None]))
    assert np.allclose((wins - (wins + wins.T) * share).sum(axis=1), 0, atol=1e-9)


def test_two_llms_have_their_log_odds() -> None:
    ratings = bradley_terry(np.array([[[0.0, 30.0], [10.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]))
    assert np.allclose(ratings[:, 0] - ratings[:, 1], [np.log(3), 0.0])


def test_ratings_do_not_depend_on_the_start_or_on_the_scale() -> None:
    wins = drawn_wins(3, 5)
    expected = bradley_terry(wins[None])[0]
    far = np.array([40.0, -40.0, 0.0, 20.0, -20.0])
    assert np.allclose(bradley_terry(wins[None], start=far)[0], expected, atol=1e-9)
    assert np.allclose(bradley_terry(1e-6 * wins[None])[0], expected, atol=1e-9)


def test_very_unequal_llms_are_rated_exactly() -> None:
    wins = np.array([[0.0, 1e3, 0.0], [1e-2, 0.0, 1e3], [0.0, 1e-2, 0.0]])
    ratings = bradley_terry(wins[None])[0]
    assert np.allclose(np.diff(ratings), -np.log(1e5), atol=1e-6)


@given(seed=st.integers(0, 1000), count=st.integers(2, 5))
@few
def test_ratings_with_ties_are_the_most_likely_ones(seed: int, count: int) -> None:
    wins = drawn_wins(seed, count)
    ties = np.triu(1.0 + np.random.default_rng(seed + 1).poisson(2.0, (count, count)), 1)
    ties = ties + ties.T

    def loss(values: np.ndarray) -> float:
        half = (values[:count, None] - values[None, :count]) / 2
        log_whole = np.logaddexp(np.logaddexp(half, -half), values[count])
        return float(-(wins * (half - log_whole) + ties / 2 * (values[count] - log_whole)).sum())

    expected = minimize(loss, np.zeros(count + 1), tol=1e-10).x[:count]
    assert np.allclose(davidson(wins, ties), expected - expected.mean(), atol=1e-4)


def test_two_llms_with_ties_have_the_odds_of_their_decided_battles() -> None:
    wins = np.array([[0.0, 9.0], [3.0, 0.0]])
    ties = np.array([[0.0, 8.0], [8.0, 0.0]])
    assert np.ptp(davidson(wins, ties)) == pytest.approx(np.log(3))
    assert np.ptp(davidson(wins, 0 * ties)) == pytest.approx(np.log(3))
    assert np.allclose(davidson(0 * wins, ties), 0.0, atol=1e-9)


def test_a_tie_with_a_strong_llm_speaks_for_strength() -> None:
    wins = np.array([[0.0, 8.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    ties = np.zeros((3, 3))
    ties[0, 2] = ties[2, 0] = 6.0
    ratings = davidson(wins, ties)
    assert ratings[0] > ratings[2] > ratings[1]


@given(seed=st.integers(0, 1000), count=st.integers(2, 5))
@few
def test_virtual_wins_are_added_only_where_some_group_never_lost(seed: int, count: int) -> None:
    wins = np.random.default_rng(seed).integers(0, 2, (count, count)).astype(float)
    np.fill_diagonal(wins, 0.0)
    groups = [set(group) for size in range(1, count) for group in combinations(range(count), size)]
    unbeaten = any(
        not any(wins[other, one] for one in group for other in range(count) if other not in group)
        for group in groups
    )
    added = virtual_wins(wins)
    assert bool(added.any()) == unbeaten
    assert np.array_equal(added, added.T)
    assert added.sum(axis=1).max() <= PRIOR_WINS + 1e-12
    assert np.isfinite(bradley_terry((wins + added)[None])).all()


def test_an_unbeaten_llm_has_a_finite_rating_that_grows_with_its_wins() -> None:
    gaps = [np.ptp(davidson(np.array([[0.0, n], [0.0, 0.0]]), np.zeros((2, 2)))) for n in (1, 9)]
    assert gaps[0] == pytest.approx(np.log(1.5 / 0.5))
    assert gaps[1] == pytest.approx(np.log(9.5 / 0.5))


@given(
    ratings=st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    tiers=st.integers(1, 9),
    data=st.data(),
)
@few
def test_tiers_vary_as_little_as_possible(
    ratings: list[float], tiers: int, data: st.DataObject
) -> None:
    values = np.array(ratings)
    apart = None
    if len(values) > 1 and tiers > 1 and data.draw(st.booleans()):
        apart = (0, len(values) - 1)
    found = tier_numbers(values, tiers, apart=apart)
    ordered = np.sort(values)[::-1]

    def spread(numbers: np.ndarray) -> float:
        return sum(float(((p - p.mean()) ** 2).sum()) for p in _parts(values, numbers))

    wanted = min(tiers, len(values))
    assert len(np.unique(found)) == wanted
    assert np.all(np.diff(found[np.argsort(-values, kind="stable")]) >= 0)  # 0 is the strongest
    best = np.inf
    for cuts in combinations(range(1, len(values)), wanted - 1):
        numbers = np.zeros(len(values), dtype=int)
        for cut in cuts:
            numbers[cut:] += 1
        candidate = numbers[np.argsort(np.argsort(-values, kind="stable"))]
        if apart is None or candidate[apart[0]] != candidate[apart[1]]:
            parts = np.split(ordered, list(cuts))
            best = min(best, sum(float(((p - p.mean()) ** 2).sum()) for p in parts))
    assert spread(found) == pytest.approx(best, abs=1e-9)
    if apart is not None:
        assert found[apart[0]] != found[apart[1]]


def _parts(values: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    return [values[numbers == number] for number in np.unique(numbers)]


def test_strength_is_recovered_from_many_battles() -> None:
    rng = np.random.default_rng(0)
    strength = np.array([-2.0, -1.9, 0.0, 0.1, 1.9, 2.0])
    a = rng.integers(0, 6, 6000)
    b = (a + rng.integers(1, 6, 6000)) % 6
    gap = strength[a] - strength[b]
    first, second, tie = np.exp(gap / 2), np.exp(-gap / 2), 0.5
    drawn = rng.random(6000) * (first + second + tie)
    a_wins = np.where(drawn < first, 1.0, np.where(drawn < first + second, 0.0, 0.5))
    data = Comparisons(
        ("q",) * 6000, tuple(f"m{n}" for n in a), tuple(f"m{n}" for n in b), a_wins, "m0", "m5"
    )
    rated = llm_ratings(data)
    assert np.allclose([rated[f"m{n}"] for n in range(6)], strength - strength.mean(), atol=0.2)
    assert llm_tiers(data, 3) == {"m0": 2, "m1": 2, "m2": 1, "m3": 1, "m4": 0, "m5": 0}


def test_the_routed_pair_is_never_in_one_tier() -> None:
    rows = [("s", "w", 0.5), ("s", "x", 1.0), ("w", "x", 1.0), ("x", "s", 1.0), ("x", "w", 1.0)]
    assert llm_tiers(battles(*rows), 2)["s"] != llm_tiers(battles(*rows), 2)["w"]


def test_battles_that_say_nothing_about_the_pair_are_left_out() -> None:
    data = battles(("w", "m", 1), ("m", "s", 0), ("x", "y", 1), ("m", "m", 0.5))
    assert connected_battles(data).llm_a == ("w", "m")
    linked = data.take(np.array([0, 1]))
    assert connected_battles(linked) is linked


def test_a_pair_that_battles_do_not_link_is_refused() -> None:
    with pytest.raises(DataError, match=r"'strnog' is never compared in 1 rows.*mean 'strong'"):
        connected_battles(battles(("strong", "w", 1), strong="strnog"))
    with pytest.raises(DataError, match=r"not even through other LLMs, in 2 rows.*Add battles"):
        connected_battles(battles(("w", "x", 1), ("s", "y", 1)))
