"""The study of kept promises: its truth, its counts and its table, on a population drawn here."""

import numpy as np
import pytest

from benchmarks.threshold_guarantee import (
    METHODS,
    Outcome,
    Population,
    drawing,
    outcomes,
    table,
    unseen_win_rates,
)
from router_models.calibration import threshold_naive


def people(size: int = 2_000) -> Population:
    rng = np.random.default_rng(0)
    rate = rng.random(size).round(3)
    strong = (rng.random(size) < 0.9).astype(float)
    weak = strong * (rng.random(size) > 0.5 * rate)
    return Population("drawn", rate, weak, strong)


def test_guarantees_are_kept_where_the_naive_choice_is_not() -> None:
    found = {each.method: each for each in outcomes(people(), size=300, max_drop=0.06, draws=60)}
    assert found.keys() == METHODS.keys()
    assert found["betting"].kept()
    assert found["t-test"].kept()
    assert not found["naive"].kept()
    # A guarantee costs strong calls, and perfect knowledge needs none more than it must.
    assert found["naive"].strong_share < found["t-test"].strong_share
    assert found["betting"].best_strong_share < found["betting"].strong_share < 1


def test_truth_is_that_of_the_population() -> None:
    population = people(300)
    # Certain enough of a very large sample, the naive choice is the best one.
    (naive,) = [
        each
        for each in outcomes(population, size=60_000, max_drop=0.06, draws=1)
        if each.method == "naive"
    ]
    best = threshold_naive(population.win_rate, population.weak, population.strong, max_drop=0.06)
    assert naive.best_strong_share == best.strong_share
    assert naive.strong_share == pytest.approx(best.strong_share, abs=0.02)


def test_the_best_threshold_on_the_population_breaks_nothing() -> None:
    constant = Population("flat", np.full(50, 0.5), np.zeros(50), np.full(50, 0.04))
    for each in outcomes(constant, size=20, max_drop=0.04, draws=3):
        assert each.broken == 0.0


def test_the_verdict_allows_two_standard_errors() -> None:
    def outcome(broken: float) -> Outcome:
        return Outcome("p", 200, 0.02, "betting", 1000, broken, 0.0, 0.5, 0.4, 0.1)

    assert outcome(0.118).kept()
    assert not outcome(0.12).kept()
    assert outcome(0.1).error() == pytest.approx(0.0095, abs=1e-4)


def test_win_rates_are_of_routers_that_have_not_seen_the_query() -> None:
    # Labels without any pattern: only a router that has seen a query could do better than chance.
    rng = np.random.default_rng(1)
    needed = (rng.random(60) < 0.5).astype(float)
    rate = unseen_win_rates([f"question number {row}" for row in range(60)], needed)
    assert rate[needed == 1].mean() - rate[needed == 0].mean() < 0.1


def test_the_table_and_the_figure_show_every_setting() -> None:
    found = outcomes(people(400), size=100, max_drop=0.1, draws=5)
    lines = table(found).splitlines()
    assert len(lines) == 1 + len(METHODS)
    assert all(("kept" in line) or ("BROKEN" in line) for line in lines[1:])
    assert len(drawing(found).axes) == 2
