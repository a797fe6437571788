"""The bootstrap against naive recomputation, its pairing, and what it says of an unsure gap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from router_models.frontier import METRICS, FloatArray, summary
from router_models.statistics import (
    GAP_UNSURE,
    Interval,
    auc,
    auc_interval,
    bootstrap_metrics,
    interval,
    mean_interval,
    resamples,
)


def outcomes(
    size: int, seed: int, strong: float = 0.9
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return (win rate, weak, strong) of a router that knows something, on 0/1 quality."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=size)
    weak = (rng.normal(size=size) > difficulty).astype(float)
    good = (rng.random(size) < strong).astype(float)
    return 1 / (1 + np.exp(-difficulty - rng.normal(size=size))), weak, good


@pytest.mark.parametrize("kind", ["binary", "continuous", "tied"])
def test_replicates_are_the_metrics_of_the_resampled_queries(kind: str) -> None:
    rate, weak, strong = outcomes(80, seed=1)
    if kind == "continuous":
        weak = weak - np.random.default_rng(2).random(80)
    if kind == "tied":
        rate = rate.round(1)
    found = bootstrap_metrics({"r": rate}, weak, strong, replicates=40, seed=7)
    for index, counts in enumerate(resamples(80, replicates=40, seed=7)):
        drawn = np.repeat(np.arange(80), counts)
        assert len(drawn) == 80
        naive = summary(rate[drawn], weak[drawn], strong[drawn])
        replicate = {metric: found.replicates["r"][metric][index] for metric in METRICS}
        assert replicate == pytest.approx(naive, nan_ok=True)
    assert found.point["r"] == summary(rate, weak, strong)


def test_routers_share_their_draws() -> None:
    rate, weak, strong = outcomes(200, seed=3)
    worse = np.clip(rate + np.random.default_rng(4).normal(0, 0.1, 200), 0, 1)
    both = bootstrap_metrics({"a": rate, "b": worse}, weak, strong, replicates=300)
    alone = bootstrap_metrics({"b": worse}, weak, strong, replicates=300)
    assert np.array_equal(both.replicates["b"]["apgr"], alone.replicates["b"]["apgr"])
    difference = both.difference("a", "b", "apgr").interval
    separate = both.estimate("a", "apgr").interval
    assert difference.high - difference.low < separate.high - separate.low
    same = both.difference("a", "a", "apgr")
    assert (same.value, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0)


def test_seed_decides_the_draws() -> None:
    data = outcomes(50, seed=5)
    first, again, other = (
        bootstrap_metrics({"r": data[0]}, *data[1:], replicates=20, seed=seed).replicates["r"]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first["apgr"], again["apgr"])
    assert not np.array_equal(first["apgr"], other["apgr"])


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # A random router's APGR is 0.5 over the population.
    rng = np.random.default_rng(6)
    covered = 0
    for seed in range(60):
        _, weak, strong = outcomes(150, seed=seed)
        found = bootstrap_metrics({"r": rng.random(150)}, weak, strong, replicates=200, seed=seed)
        covered += not found.estimate("r", "apgr").interval.excludes(0.5)
    # 95 % of 60 is 57 ± 1.7; percentile intervals of a ratio fall a little short.
    assert covered >= 51


def test_unsure_gap_has_no_pgr_but_still_has_qualities() -> None:
    rate, weak, strong = outcomes(60, seed=8, strong=0.52)
    found = bootstrap_metrics({"r": rate}, weak, strong, replicates=400)
    gap = found.estimate("r", "quality_gap")
    assert not gap.interval.excludes(0.0)
    for metric in ("apgr", "cpt_50", "pgr_at_20"):
        estimate = found.estimate("r", metric)
        assert np.isnan(estimate.value)
        assert estimate.reason in (GAP_UNSURE, METRICS[metric].undefined)
        assert not estimate.interval.excludes(0.5)
    assert found.estimate("r", "quality_drop_at_20").reason is None
    assert list(found.estimates("r")) == list(METRICS)


def test_gap_that_points_the_wrong_way_says_so() -> None:
    found = bootstrap_metrics({"r": [0.1, 0.2, 0.3]}, [1, 1, 1], [0, 0, 0], replicates=10)
    assert found.estimate("r", "apgr").reason == "strong is not better than weak"
    assert found.estimate("r", "quality_drop_pct_at_10").reason == "all-strong quality is 0"


def test_few_undefined_replicates_are_left_out_and_many_are_not() -> None:
    values = np.arange(200.0)
    values[:5] = np.nan
    assert interval(values).low == pytest.approx(np.quantile(values[5:], 0.025))
    values[5] = np.nan
    assert interval(values).reason == GAP_UNSURE
    assert np.isnan(interval(values).low)


def test_mean_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(9).normal(2.0, 3.0, 900)
    found = mean_interval(values, replicates=1500)
    half = 1.96 * values.std() / 30
    assert found.value == pytest.approx(values.mean())
    assert found.interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_repeated_prompts_are_one_observation() -> None:
    rng = np.random.default_rng(5)
    weak, rate = rng.integers(0, 2, 60).astype(float), rng.random(60)
    once = bootstrap_metrics({"r": rate}, weak, np.ones(60), replicates=400, seed=3)
    five = {"r": np.tile(rate, 5)}
    found = bootstrap_metrics(
        five, np.tile(weak, 5), np.ones(300), replicates=400, seed=3, groups=np.tile(range(60), 5)
    )
    assert np.array_equal(found.replicates["r"]["apgr"], once.replicates["r"]["apgr"])
    naive = bootstrap_metrics(five, np.tile(weak, 5), np.ones(300), replicates=400, seed=3)
    width = [each.estimate("r", "apgr").interval for each in (naive, once)]
    assert width[0].high - width[0].low < 0.6 * (width[1].high - width[1].low)


def test_groups_of_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"groups of 3 queries; expected 2"):
        next(resamples(2, replicates=1, seed=0, groups=[0, 1, 1]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=25))
def test_auc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, labels = zip(*rows, strict=True)
    wins = [
        (a > b) + 0.5 * (a == b)
        for a, positive in rows
        if positive
        for b, other in rows
        if not other
    ]
    found = auc(scores, labels)
    assert np.isnan(found) if not wins else found == pytest.approx(np.mean(wins))


def test_auc_interval_resamples_rows() -> None:
    rng = np.random.default_rng(11)
    labels = rng.random(120) < 0.4
    scores = (labels + rng.normal(0, 1, 120)).round(1)
    found = auc_interval(scores, labels, replicates=300, seed=5)
    naive = []
    for counts in resamples(120, replicates=300, seed=5):
        drawn = np.repeat(np.arange(120), counts)
        naive.append(auc(scores[drawn], labels[drawn]))
    assert found.interval == interval(naive)
    assert found.interval.excludes(0.5)
    assert auc_interval([1, 2], [1, 1], replicates=5).reason == "all labels are equal"


def test_intervals_exclude_what_lies_outside() -> None:
    assert Interval(0.1, 0.2).excludes(0.0)
    assert not Interval(0.1, 0.2).excludes(0.2)


def test_bad_input_is_refused() -> None:
    data = ([0.5, 0.2], [0, 0], [1, 1])
    with pytest.raises(DataError, match="no router to evaluate"):
        bootstrap_metrics({}, *data[1:])
    with pytest.raises(ConfigError, match="0 bootstrap replicates"):
        bootstrap_metrics({"r": data[0]}, *data[1:], replicates=0)
    with pytest.raises(ConfigError, match="level is 95"):
        interval([1.0, 2.0], level=95)
    with pytest.raises(DataError, match="replicates have shape"):
        interval([])
    with pytest.raises(DataError, match="expected 0 and 1 only"):
        auc([0.1, 0.2], [0, 2])
    found = bootstrap_metrics({"knn": data[0]}, *data[1:], replicates=5)
    with pytest.raises(ConfigError, match="Did you mean 'knn'"):
        found.estimate("knm", "apgr")
    with pytest.raises(ConfigError, match="Did you mean 'apgr'"):
        found.estimate("knn", "apg")
