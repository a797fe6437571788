"""Thresholds that promise something: the promise is kept over many draws, the naive one is not."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from router_models.calibration import (
    ALL_STRONG,
    ALL_WEAK,
    Calibration,
    FloatArray,
    drop_upper_bound,
    reliability,
    threshold_for_strong_share,
    threshold_naive,
    threshold_with_guarantee,
)

Sample = tuple[FloatArray, FloatArray, FloatArray]


def traffic(size: int, rng: np.random.Generator, *, binary: bool = True) -> Sample:
    """Draw (win rate, weak, strong); the weak LLM loses more, the higher the win rate."""
    rate = rng.random(size)
    strong_ok, weak_ok = 0.85, 0.85 - 0.5 * rate
    if binary:
        chance = rng.random((2, size))
        return rate, (chance[0] < weak_ok).astype(float), (chance[1] < strong_ok).astype(float)
    noise = rng.gumbel(size=(2, size)) - 3.0
    return rate, (noise[0] + weak_ok).astype(float), (noise[1] + strong_ok).astype(float)


def true_drop(threshold: float) -> float:
    """Return E[strong − weak; rate < α] of `traffic`: ∫ 0.5 r dr over [0, α]."""
    return 0.25 * min(threshold, 1.0) ** 2


def violations(
    draws: int, size: int, *, binary: bool = True, **options: Any
) -> tuple[float, float]:
    """Return the share of draws that break max_drop = 0.04, and the mean strong share."""
    rng = np.random.default_rng(1)
    broken, shares = 0, []
    for seed in range(draws):
        data = traffic(size, rng, binary=binary)
        found = threshold_with_guarantee(*data, max_drop=0.04, confidence=0.9, seed=seed, **options)
        broken += true_drop(found.threshold) > 0.04
        shares.append(found.strong_share)
    return broken / draws, float(np.mean(shares))


def allowed(delta: float, draws: int) -> float:
    return delta + 2 * np.sqrt(delta * (1 - delta) / draws)


def test_exact_guarantee_holds_over_many_draws_and_still_saves() -> None:
    broken, strong_share = violations(200, 800)
    assert broken <= allowed(0.1, 200)
    # The best threshold with perfect knowledge is α = 0.4, a strong share of 0.6.
    assert 0.6 < strong_share < 0.85


def test_approximate_guarantee_holds_for_unbounded_quality() -> None:
    broken, strong_share = violations(200, 3_000, binary=False)
    assert broken <= allowed(0.1, 200)
    assert strong_share < 0.95


def test_guarantee_survives_a_holdout_of_the_same_size() -> None:
    rng = np.random.default_rng(2)
    broken = 0
    for seed in range(200):
        found = threshold_with_guarantee(
            *traffic(800, rng), max_drop=0.04, confidence=0.9, seed=seed
        )
        rate, weak, strong = traffic(800, rng)
        broken += ((strong - weak) * (rate < found.threshold)).mean() > 0.04
    assert broken / 200 <= allowed(0.1, 200)


def test_naive_choice_breaks_its_promise_about_every_other_time() -> None:
    rng = np.random.default_rng(3)
    found = [threshold_naive(*traffic(800, rng), max_drop=0.04) for _ in range(200)]
    assert all(calibration.drop <= 0.04 for calibration in found)
    broken = np.mean([true_drop(calibration.threshold) > 0.04 for calibration in found])
    assert broken > 0.4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_shares_and_drops_are_those_of_the_threshold(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    rate, weak, strong = traffic(size, rng)
    rate = rate.round(1)
    for found in (
        threshold_with_guarantee(rate, weak, strong, max_drop=0.3),
        threshold_naive(rate, weak, strong, max_drop=0.3),
    ):
        to_strong = rate >= found.threshold
        assert found.strong_share == pytest.approx(to_strong.mean())
        assert found.drop == pytest.approx(((strong - weak) * ~to_strong).mean())
        assert found.queries == size


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25))
def test_naive_is_the_cheapest_of_all_thresholds(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    rate, weak, strong = traffic(size, rng)
    rate = rate.round(1)
    kept = [
        (rate >= alpha).mean()
        for alpha in [ALL_STRONG, *rate, ALL_WEAK]
        if ((strong - weak) * (rate < alpha)).mean() <= 0.1
    ]
    assert threshold_naive(rate, weak, strong, max_drop=0.1).strong_share == pytest.approx(
        min(kept)
    )


def test_too_few_queries_certify_nothing() -> None:
    found = threshold_with_guarantee(*traffic(20, np.random.default_rng(6)), max_drop=0.01)
    assert (found.threshold, found.strong_share, found.p_value) == (ALL_STRONG, 1.0, None)


def test_weak_llm_that_never_loses_gets_everything() -> None:
    rate = np.random.default_rng(7).random(500)
    found = threshold_with_guarantee(rate, np.ones(500), np.ones(500), max_drop=0.05)
    assert (found.threshold, found.strong_share, found.drop) == (ALL_WEAK, 0.0, 0.0)
    assert found.p_value is not None
    assert found.p_value < 0.05


def test_more_confidence_and_less_drop_cost_more() -> None:
    data = traffic(2_000, np.random.default_rng(8))

    def share(max_drop: float, confidence: float) -> float:
        return threshold_with_guarantee(
            *data, max_drop=max_drop, confidence=confidence
        ).strong_share

    assert share(0.1, 0.9) <= share(0.05, 0.9) <= share(0.02, 0.9)
    assert share(0.05, 0.8) <= share(0.05, 0.95) <= share(0.05, 0.99)


def test_result_says_what_it_rests_on() -> None:
    data = traffic(400, np.random.default_rng(9))
    scaled = (data[0], 10 * data[1], 10 * data[2])
    exact = threshold_with_guarantee(*data, max_drop=0.1)
    assert "≤ 1 (exact" in exact.assumption
    assert "approximate" in threshold_with_guarantee(*scaled, max_drop=1.0).assumption
    ranged = threshold_with_guarantee(*scaled, max_drop=1.0, quality_range=(0, 10))
    assert "≤ 10 (exact" in ranged.assumption
    # Ten times the quality with ten times the range and drop is the same problem.
    assert ranged.threshold == exact.threshold
    assert isinstance(exact, Calibration)


def test_a_range_that_was_only_read_from_the_data_is_an_assumption() -> None:
    # A metric from 0 to 10 whose rows happen to lie in [0, 1].
    data = traffic(400, np.random.default_rng(9))
    found = threshold_with_guarantee(*data, max_drop=0.1)
    assert "quality cannot leave [0, 1], so strong − weak ≤ 1" in found.assumption
    known = threshold_with_guarantee(*data, max_drop=0.1, quality_range=(0, 1))
    assert "cannot leave" not in known.assumption
    ten = threshold_with_guarantee(*data, max_drop=0.1, quality_range=(0, 10))
    assert ten.strong_share > known.strong_share
    bound = drop_upper_bound(*data, threshold=0.4)
    assert "cannot leave [0, 1]" in bound.assumption
    wider = drop_upper_bound(*data, threshold=0.4, quality_range=(0, 10))
    assert wider.upper > bound.upper > true_drop(0.4) > 0


def lossy(size: int, rng: np.random.Generator) -> Sample:
    """Draw traffic of which half goes to the weak LLM at 0.5 and 5 % of that half is lost."""
    rate = rng.random(size)
    return rate, (rng.random(size) >= 0.05).astype(float), np.ones(size)


@pytest.mark.parametrize("size", [60, 300])
def test_the_bound_of_a_rare_loss_lies_above_it(size: int) -> None:
    rng = np.random.default_rng(3)
    bounds = [
        drop_upper_bound(*lossy(size, rng), threshold=0.5, quality_range=(0, 1), seed=seed).upper
        for seed in range(200)
    ]
    assert np.mean(np.array(bounds) < 0.025) <= allowed(0.05, 200)
    assert np.mean(bounds) < {60: 0.14, 300: 0.065}[size]  # and says something


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_more_confidence_gives_a_higher_bound(seed: int, threshold: float) -> None:
    rate, weak, strong = traffic(120, np.random.default_rng(seed))
    low, high = (
        drop_upper_bound(rate, weak, strong, threshold=threshold, confidence=level, seed=seed).upper
        for level in (0.8, 0.99)
    )
    assert low < high <= 1.0
    assert ((strong - weak) * (rate < threshold)).mean() < high


def test_an_unbounded_quality_gets_a_t_bound_or_none() -> None:
    rate, weak, strong = traffic(400, np.random.default_rng(4), binary=False)
    found = drop_upper_bound(rate, weak, strong, threshold=0.4)
    assert "approximate" in found.assumption
    assert true_drop(0.4) < found.upper < 1.0
    assert np.isnan(drop_upper_bound(rate[:29], weak[:29], strong[:29], threshold=0.4).upper)
    assert np.isnan(drop_upper_bound(rate, strong - 3, strong - 3, threshold=0.4).upper)


def test_same_seed_same_threshold() -> None:
    data = traffic(500, np.random.default_rng(10))
    first, again = (threshold_with_guarantee(*data, max_drop=0.08, seed=3) for _ in range(2))
    assert first == again


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.floats(0, 1))
def test_strong_share_is_the_largest_that_is_allowed(values: list[int], share: float) -> None:
    rate = np.array(values) / 8
    found = (rate >= threshold_for_strong_share(rate, share)).mean()
    assert found <= share + 1e-8
    larger = [s for s in ((rate >= a).mean() for a in rate) if s <= share - 1e-8]
    assert found >= max(larger, default=0.0)


def test_strong_share_at_its_ends() -> None:
    assert threshold_for_strong_share([0.2, 0.4], 1.0) == ALL_STRONG
    assert threshold_for_strong_share([0.2, 0.4], 0.0) == ALL_WEAK
    assert threshold_for_strong_share(np.arange(100) / 100, 0.29) == pytest.approx(0.71)


def test_reliability_of_a_calibrated_router_is_near_zero_error() -> None:
    rng = np.random.default_rng(11)
    rate = rng.random(20_000)
    honest = reliability(rate, rng.random(20_000) < rate)
    assert honest.ece() < 0.02
    assert honest.count.sum() == 20_000
    assert reliability(rate, rng.random(20_000) < rate**3).ece() > 0.1
    edge = reliability([0.0, 1.0], [0.0, 1.0], bins=4)
    assert edge.count.tolist() == [1, 1]
    assert edge.ece() == 0.0


GOOD = ([0.2, 0.8], [0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.0}, "drop is 0.0; expected a finite number > 0"),
        ({"max_drop": 5.0}, "no drop can exceed 1"),
        ({"max_drop": 0.1, "confidence": 95}, "confidence is 95"),
        ({"max_drop": 0.1, "p_value": "bets"}, "Unknown p-value 'bets'"),
        ({"max_drop": 0.1, "quality_range": (0.5, 1.0)}, "expected a range that holds them all"),
    ],
)
def test_bad_settings_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        threshold_with_guarantee(*GOOD, **options)


def test_unbounded_quality_is_refused_where_a_bound_is_needed() -> None:
    data = ([0.2, 0.8], [-3.0, -2.0], [-1.0, -1.0])
    with pytest.raises(ConfigError, match="Pass quality_range, or use p_value"):
        threshold_with_guarantee(*data, max_drop=0.1, p_value="betting")


def test_bad_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"win rate goes from 0\.2 to 1\.5"):
        threshold_with_guarantee([0.2, 1.5], *GOOD[1:], max_drop=0.1)
    with pytest.raises(DataError, match="differ in length"):
        threshold_naive([0.2], *GOOD[1:], max_drop=0.1)
    with pytest.raises(ConfigError, match="strong share is 30"):
        threshold_for_strong_share([0.2], 30)
    with pytest.raises(DataError, match="outcome goes from 0 to 2"):
        reliability([0.1, 0.2], [0, 2])
    with pytest.raises(ConfigError, match="0 bins"):
        reliability([0.1], [1], bins=0)
