"""The exact curve against a walk over every threshold, and each metric against its definition."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from router_models.frontier import (
    METRICS,
    FloatArray,
    aiq,
    apgr,
    apgr_10,
    apgr_routellm,
    cost_quality_curve,
    cpt,
    oracle_win_rate,
    pgr_at,
    quality_at,
    quality_drop_at,
    summary,
    upper_hull,
)

Columns = tuple[FloatArray, FloatArray, FloatArray]


@st.composite
def columns(draw: Any) -> Columns:
    """Draw win rates with ties, and binary or continuous (negative too) qualities."""
    size = draw(st.integers(1, 14))
    quality = draw(st.sampled_from([st.integers(0, 1), st.floats(-5, 5)]))
    rates = st.integers(0, 6).map(lambda k: k / 6)
    return tuple(  # type: ignore[return-value]
        np.array(draw(st.lists(kind, min_size=size, max_size=size)), dtype=float)
        for kind in (rates, quality, quality)
    )


def enumerated(rate: FloatArray, weak: FloatArray, strong: FloatArray) -> list[tuple[float, float]]:
    """Return (cost, quality) of every threshold, by routing each query, costs ascending."""
    points = []
    for threshold in [np.inf, *sorted(set(rate.tolist()), reverse=True)]:
        to_strong = rate >= threshold
        points.append((to_strong.mean(), np.where(to_strong, strong, weak).mean()))
    return points


@settings(max_examples=150, deadline=None)
@given(columns())
def test_curve_is_the_enumeration_of_all_thresholds(data: Columns) -> None:
    rate = data[0]
    curve = cost_quality_curve(*data)
    points = enumerated(*data)
    assert curve.cost == pytest.approx([cost for cost, _ in points])
    assert curve.quality == pytest.approx([quality for _, quality in points])
    for threshold, cost in zip(curve.threshold, curve.cost, strict=True):
        assert (rate >= threshold).mean() == pytest.approx(cost)


@settings(max_examples=150, deadline=None)
@given(columns())
def test_metrics_are_those_of_the_enumerated_curve(data: Columns) -> None:
    points = enumerated(*data)
    cost, quality = np.array(points).T
    gap = quality[-1] - quality[0]
    found = summary(*data)
    assert list(found) == list(METRICS)
    assert found["quality_gap"] == pytest.approx(gap, abs=1e-12)
    if gap <= 1e-9:
        if gap < -1e-9:
            undefined = [name for name in METRICS if name.startswith(("apgr", "cpt", "pgr"))]
            assert all(np.isnan(found[name]) for name in undefined)
        return
    tenths = (np.interp(np.arange(11) / 10, cost, quality) - quality[0]) / gap
    area = np.trapezoid((quality - quality[0]) / gap, cost)
    assert found["apgr"] == pytest.approx(area, rel=1e-6, abs=1e-6)
    assert found["apgr_10"] == pytest.approx(tenths[1:].mean(), rel=1e-6, abs=1e-6)
    assert found["pgr_at_20"] == pytest.approx(tenths[2], rel=1e-6, abs=1e-6)
    assert found["quality_drop_at_40"] == pytest.approx(
        quality[-1] - np.interp(0.6, cost, quality), abs=1e-9
    )


def routellm_points(rate: FloatArray, weak: FloatArray, strong: FloatArray) -> FloatArray:
    """Return (cost, quality) of each threshold as RouteLLM's evaluation finds them, (·, 2)."""
    _, thresholds = pd.qcut(rate, 10, retbins=True, duplicates="drop")
    to_strong = [rate >= threshold for threshold in thresholds[:-1]]
    to_strong.append(rate > thresholds[-1])
    points = [(routed.mean(), np.where(routed, strong, weak).mean()) for routed in to_strong]
    return np.array(sorted(points))


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 130), st.integers(2, 200), st.integers(0, 10_000))
def test_routellms_apgr_is_their_procedure(size: int, distinct: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Close to each other: else a decile that falls on a win rate differs from it in the last bit.
    rate = 1 + rng.integers(0, distinct, size) / distinct / 1000
    weak = rng.integers(0, 2, size).astype(float)
    strong = (rng.integers(0, 2, size) * 0.5 + 0.75).astype(np.float64)
    if strong.mean() - weak.mean() < 0.05 or len(set(rate)) == 1:
        return
    cost, quality = routellm_points(rate, weak, strong).T
    area = np.trapezoid(quality - weak.mean(), cost)
    expected = area / np.trapezoid(np.full(len(cost), strong.mean() - weak.mean()), cost)
    assert apgr_routellm(rate, weak, strong) == pytest.approx(expected)


def test_routellms_metrics_by_hand() -> None:
    """Ten queries, three tied at the top, two in the middle; one that the strong LLM spoils.

    Deciles by linear interpolation at positions 0, 0.9 … 9 of the sorted win rates .1 .2 .3 .5 .5
    .6 .7 .9 .9 .9: .1 .19 .28 .44 .5 .55 .64 .76 .9 .9 .9, of which the last three are one. Strong
    calls: 10 9 8 7 7 5 4 3, and none above .9.
    strong − weak, from the highest win rate on: (1 1 0) 0 −1 (1 1) 0 1 0; all in all 4, which is 1.
    cost 0   .3   .4   .5    .7    .8    .9   1
    PGR  0   2/4  2/4  1/4   3/4   3/4   1    1
    APGR .3·.25 + .1·.5 + .1·.375 + .2·.5 + .1·.75 + .1·.875 + .1·1 = .525
    Ten queries have so few win rates that these are all points of the exact curve: both agree.

    CPT50: PGR first reaches 1/2 at cost .3. RouteLLM interpolates cost over PGR, which falls in
    between; a binary search ends in the step from 1/4 to 3/4, half way from .5 to .7: .6.
    CPT80: 3/4 at .8 and 1 at .9: .8 + .1 · (.05 / .25) = .82 for both.
    """
    rate = np.array([0.9, 0.9, 0.9, 0.7, 0.6, 0.5, 0.5, 0.3, 0.2, 0.1])
    weak = np.array([0, 0, 1, 1, 1, 0, 0, 1, 0, 1.0])
    strong = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1.0])
    assert apgr_routellm(rate, weak, strong) == pytest.approx(0.525)
    assert apgr(rate, weak, strong) == pytest.approx(0.525)
    cost, quality = routellm_points(rate, weak, strong).T
    pgr = (quality - weak.mean()) / (strong.mean() - weak.mean())
    assert pgr == pytest.approx([0, 0.5, 0.5, 0.25, 0.75, 0.75, 0.75, 1, 1])
    assert cost == pytest.approx([0, 0.3, 0.4, 0.5, 0.7, 0.7, 0.8, 0.9, 1])
    # Without rounding errors, which would decide where the search ends; 7 calls come up twice.
    theirs = [0.0, 0.5, 0.5, 0.25, 0.75, 0.75, 0.75, 1.0, 1.0]
    assert np.interp(0.5, theirs, cost) == pytest.approx(0.6)
    assert cpt(rate, weak, strong, 0.5) == pytest.approx(0.3)
    assert np.interp(0.8, theirs, cost) == pytest.approx(0.82)
    assert cpt(rate, weak, strong, 0.8) == pytest.approx(0.82)


def test_routellms_apgr_misses_what_lies_between_deciles() -> None:
    """Twenty queries; the strong LLM is better on the one with the highest win rate only.

    The exact curve rises to 1 at cost 1/20: 1 − 1/40 = .975. Their deciles see every second query,
    the first at cost 2/20: 1 − 2/40 = .95.
    """
    rate, weak = np.arange(20) / 20, np.zeros(20)
    strong = (rate == rate.max()).astype(float)
    assert apgr(rate, weak, strong) == pytest.approx(0.975)
    assert apgr_routellm(rate, weak, strong) == pytest.approx(0.95)


@settings(max_examples=150, deadline=None)
@given(columns(), st.floats(0.05, 1.0))
def test_cpt_is_the_first_crossing(data: Columns, mark: float) -> None:
    curve = cost_quality_curve(*data)
    if not curve.gap() > 1e-6:
        return
    found = cpt(*data, mark)
    before = np.linspace(0.0, found, 200)[:-1]
    assert (curve.pgr_at(before) <= mark + 1e-6).all()
    assert float(curve.pgr_at(found)) == pytest.approx(mark, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(columns())
def test_order_of_queries_and_monotone_transforms_change_nothing(data: Columns) -> None:
    rate, weak, strong = data
    turned = summary(rate[::-1], weak[::-1], strong[::-1])
    assert summary(*data) == pytest.approx(turned, nan_ok=True)
    assert summary(*data) == pytest.approx(summary(np.exp(3 * rate), weak, strong), nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(columns(), st.randoms(use_true_random=False))
def test_weights_are_repetitions(data: Columns, random: Any) -> None:
    weights = np.array([random.randint(0, 3) for _ in data[0]])
    weights[0] += 1
    weighted = cost_quality_curve(*data, weights=weights)
    repeated = summary(*(np.repeat(column, weights) for column in data))
    found = weighted.metrics()
    # Rounding may see a gap of 1e-17 in one and none in the other.
    if abs(found["quality_gap"]) > 1e-9:
        assert found == pytest.approx(repeated, rel=1e-6, abs=1e-6, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(columns())
def test_oracle_is_not_beaten_and_hull_is_not_below(data: Columns) -> None:
    weak, strong = data[1:]
    best = cost_quality_curve(oracle_win_rate(weak, strong), weak, strong)
    curve = cost_quality_curve(*data)
    assert (best.quality_at(curve.cost) >= curve.quality - 1e-9).all()
    assert best.aiq() >= curve.aiq() - 1e-9
    assert curve.aiq() >= np.trapezoid(curve.quality, curve.cost) - 1e-9


def cubic_hull_area(cost: FloatArray, quality: FloatArray) -> float:
    """Integrate the non-decreasing hull by its definition: the best chord at every cost."""

    def height(at: float) -> float:
        best = -np.inf
        for a in range(len(cost)):
            for b in range(len(cost)):
                if cost[a] <= at <= cost[b] and cost[a] < cost[b]:
                    share = (at - cost[a]) / (cost[b] - cost[a])
                    best = max(best, quality[a] + share * (quality[b] - quality[a]))
        return best

    heights = np.maximum.accumulate([height(at) for at in cost])
    return float(np.trapezoid(heights, cost))


@settings(max_examples=60, deadline=None)
@given(columns())
def test_aiq_is_the_area_under_the_best_chords(data: Columns) -> None:
    curve = cost_quality_curve(*data)
    assert aiq(*data) == pytest.approx(cubic_hull_area(curve.cost, curve.quality), abs=1e-9)


def test_hull_of_a_long_walk_is_concave_and_on_top() -> None:
    rng = np.random.default_rng(1)
    x = np.sort(rng.random(3_000))
    y = np.cumsum(rng.normal(size=3_000))
    hull_x, hull_y = upper_hull(x, y)
    assert (np.interp(x, hull_x, hull_y) >= y - 1e-9).all()
    assert (np.diff(np.diff(hull_y) / np.diff(hull_x)) < 0).all()
    assert set(hull_y) <= set(y)


def test_known_curve() -> None:
    rate, weak, strong = [0.8, 0.6, 0.4, 0.2], [0, 0, 1, 1], [1, 0, 1, 1]
    assert apgr(rate, weak, strong) == pytest.approx(0.875)
    assert cpt(rate, weak, strong, 0.5) == pytest.approx(0.125)
    assert pgr_at(rate, weak, strong, 0.125) == pytest.approx(0.5)
    assert quality_at(rate, weak, strong, 1.0) == pytest.approx(0.75)
    assert quality_drop_at(rate, weak, strong, 0.75).absolute == pytest.approx(0.0)


def test_constant_router_is_chance() -> None:
    rng = np.random.default_rng(2)
    weak, strong = rng.random(101), rng.random(101) + 0.3
    constant = np.full(101, 0.5)
    assert apgr(constant, weak, strong) == pytest.approx(0.5)
    assert apgr_10(constant, weak, strong) == pytest.approx(0.55)
    assert apgr_routellm(constant, weak, strong) == pytest.approx(0.5)
    assert cpt(constant, weak, strong, 0.8) == pytest.approx(0.8)


def test_non_monotone_curve_takes_the_first_crossing() -> None:
    # Up to PGR 1, down to 0, up to 1 again.
    rate, weak, strong = [0.9, 0.7, 0.5], [0, 1, 0], [1, 0, 1]
    assert cpt(rate, weak, strong, 0.5) == pytest.approx(1 / 6)
    assert cpt(rate, weak, strong, 1.0) == pytest.approx(1 / 3)
    assert np.isnan(cpt(rate, weak, strong, 1.01))


def test_a_mark_met_exactly_at_a_vertex_is_not_missed() -> None:
    # 0.8 · 35 is 28.000000000000004 in floating point; the next rise is far away.
    gains = np.array([1] * 28 + [-1] * 20 + [1] * 27)
    weak, strong = (gains < 0).astype(float), (gains > 0).astype(float)
    rate = np.linspace(1, 0, len(gains))
    assert cpt(rate, weak, strong, 0.8) == pytest.approx(28 / len(gains))


def test_better_than_all_strong_has_a_negative_drop() -> None:
    drop = quality_drop_at([0.9, 0.1], [-3.0, -1.0], [-2.0, -2.0], 0.5)
    assert (drop.absolute, drop.percent) == (-0.5, -25.0)
    assert np.isnan(quality_drop_at([0.9, 0.1], [0, 0], [1, -1], 0.5).percent)


@pytest.mark.parametrize("strong", [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.0, 0.1, 0.2]])
def test_without_a_gap_pgr_is_nan_and_never_huge(strong: list[float]) -> None:
    weak, rate = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]
    assert np.isnan(apgr(rate, weak, strong))
    assert np.isnan(cpt(rate, weak, strong, 0.5))
    assert np.isnan(pgr_at(rate, weak, strong, 0.5))
    assert np.isfinite(summary(rate, weak, strong)["quality_drop_at_20"])


def test_oracle_ranks_gaps_and_ties_equal_ones() -> None:
    assert oracle_win_rate([0.0, 0.0, 1.0, 0.0], [0.5, 2.0, 0.0, 0.5]).tolist() == [0.5, 1, 0, 0.5]
    assert oracle_win_rate([0.0, 1.0], [1.0, 2.0]).tolist() == [0.5, 0.5]


def test_every_metric_says_its_direction() -> None:
    assert METRICS["apgr"].higher_is_better
    assert not METRICS["cpt_50"].higher_is_better
    assert all(metric.description and metric.version >= 1 for metric in METRICS.values())


@pytest.mark.parametrize(
    ("rate", "weak", "strong", "message"),
    [
        ([], [], [], "at least one query"),
        ([0.5], [[0.5]], [0.5], "weak quality has shape"),
        ([0.5, np.nan], [0, 0], [1, 1], "win rate holds 1 NaN or infinite values of 2"),
        ([0.5, 0.1], [0, -np.inf], [1, 1], "weak quality holds 1"),
        ([0.5, 0.1], [0, 0], [1, 1, 1], "differ in length: .*'strong quality': 3"),
    ],
)
def test_bad_columns_are_refused(rate: Any, weak: Any, strong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cost_quality_curve(rate, weak, strong)


def test_bad_settings_are_refused() -> None:
    data = ([0.9, 0.1], [0, 0], [1, 1])
    with pytest.raises(ConfigError, match="cost is 50"):
        pgr_at(*data, 50)
    with pytest.raises(ConfigError, match="cost is -1"):
        quality_drop_at(*data, 2.0)
    with pytest.raises(ConfigError, match="PGR mark is nan"):
        cpt(*data, float("nan"))
    for weights in ([1.0], [1.0, -1.0], [np.nan, 1.0]):
        with pytest.raises(DataError, match="weights have shape"):
            cost_quality_curve(*data, weights=weights)
    with pytest.raises(DataError, match="All weights are 0"):
        cost_quality_curve(*data, weights=[0, 0])
