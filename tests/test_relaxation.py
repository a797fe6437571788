"""The exact t* against a brute-force search, and the labels against their definition."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conf.errors import ConfigError, DataError
from router_models.relaxation import (
    FloatArray,
    deterministic_labels,
    label_spread,
    optimal_relaxation,
    probabilistic_labels,
    transformed_labels,
)

# The article's worked example: x1, x2, x3.
ARTICLE_WEAK = [0.85, 0.60, 0.95]
ARTICLE_STRONG = [0.90, 0.85, 0.95]

# A coarse lattice makes many ties; quarters are exact in binary, tenths are not.
lattice = st.integers(-8, 8).map(lambda k: k / 4) | st.integers(-8, 8).map(lambda k: k / 10)
reals = st.floats(-5, 5)


@st.composite
def quality_pair(draw: Any, *, matched: bool = False) -> tuple[FloatArray, FloatArray]:
    queries = draw(st.integers(1, 7))
    weak_samples = draw(st.integers(1, 3))
    strong_samples = weak_samples if matched else draw(st.integers(1, 3))
    values = draw(st.sampled_from([lattice, reals]))
    return (
        draw(arrays(np.float64, (queries, weak_samples), elements=values)),
        draw(arrays(np.float64, (queries, strong_samples), elements=values)),
    )


def counted_labels(
    weak: FloatArray, strong: FloatArray, t: float, pairing: str
) -> tuple[list[int], int]:
    """Count, one pair at a time, the pairs of each query that hold at t."""
    samples = list(product(range(weak.shape[1]), range(strong.shape[1])))
    if pairing == "matched":
        samples = [(k, k) for k in range(weak.shape[1])]
    counts = [sum(strong[i, b] - weak[i, a] <= t for a, b in samples) for i in range(len(weak))]
    return counts, len(samples)


def brute_force(weak: FloatArray, strong: FloatArray, pairing: str) -> tuple[float, int, int]:
    """Return (t*, Σ_{i,j} |difference of counts|, P) over t = 0 and every positive gap."""
    gaps = (strong[:, None, :] - weak[:, :, None]).ravel()
    best, best_sum, pairs = 0.0, -1, 0
    for t in [0.0, *sorted({float(gap) for gap in gaps if gap > 0})]:
        counts, pairs = counted_labels(weak, strong, t, pairing)
        total = sum(abs(a - b) for a in counts for b in counts)
        if total > best_sum:
            best, best_sum = t, total
    return best, best_sum, pairs


@settings(max_examples=150, deadline=None)
@given(quality_pair())
def test_optimum_over_all_pairs_is_the_brute_force_one(pair: tuple[FloatArray, FloatArray]) -> None:
    check_against_brute_force(*pair, "all")


@settings(max_examples=100, deadline=None)
@given(quality_pair(matched=True))
def test_optimum_over_matched_pairs_is_the_brute_force_one(
    pair: tuple[FloatArray, FloatArray],
) -> None:
    check_against_brute_force(*pair, "matched")


def check_against_brute_force(weak: FloatArray, strong: FloatArray, pairing: Any) -> None:
    found = optimal_relaxation(weak, strong, pairing=pairing)
    t, total, pairs = brute_force(weak, strong, pairing)
    assert found.t == t
    assert found.objective == pytest.approx(total / (pairs * len(weak) ** 2), abs=1e-12)
    counts, _ = counted_labels(weak, strong, t, pairing)
    assert found.labels.tolist() == [count / pairs for count in counts]


@settings(max_examples=100, deadline=None)
@given(quality_pair())
def test_curve_and_labels_agree_bit_for_bit(pair: tuple[FloatArray, FloatArray]) -> None:
    weak, strong = pair
    found = optimal_relaxation(weak, strong)
    assert np.array_equal(found.labels, transformed_labels(weak, strong, found.t))
    assert found.breakpoints[0] == 0.0
    assert (np.diff(found.breakpoints) > 0).all()
    for t, value in zip(found.breakpoints, found.values, strict=True):
        spread = label_spread(transformed_labels(weak, strong, float(t)))
        assert value == pytest.approx(spread, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e3, 1e3)))
def test_label_spread_is_the_mean_absolute_difference(labels: FloatArray) -> None:
    naive = np.abs(labels[:, None] - labels[None, :]).mean()
    assert label_spread(labels) == pytest.approx(naive, abs=1e-9)


@pytest.mark.parametrize(("t", "average"), [(0.1, 2 / 3), (0.2, 2 / 3), (0.3, 0.0)])
def test_article_example(t: float, average: float) -> None:
    labels = transformed_labels(ARTICLE_WEAK, ARTICLE_STRONG, t)
    # f divides by N² = 9 and counts each of the 3 distinct pairs twice.
    assert label_spread(labels) * 9 / 6 == pytest.approx(average)


def test_article_example_optimum_is_as_good_as_its_two_answers() -> None:
    found = optimal_relaxation(ARTICLE_WEAK, ARTICLE_STRONG)
    at_02 = label_spread(transformed_labels(ARTICLE_WEAK, ARTICLE_STRONG, 0.2))
    assert found.objective == pytest.approx(at_02)
    # y(0) = (0, 0, 1) spreads the labels just as well, and the smallest t is taken.
    assert found.t == 0.0
    assert not found.degenerate


def test_relaxation_balances_a_much_stronger_llm() -> None:
    rng = np.random.default_rng(3)
    weak, strong = rng.normal(0.0, 1.0, (300, 10)), rng.normal(2.0, 1.0, (300, 10))
    found = optimal_relaxation(weak, strong)
    assert found.t > 1.0
    assert not found.degenerate
    assert found.objective > label_spread(probabilistic_labels(weak, strong))


def test_binary_quality_is_degenerate() -> None:
    rng = np.random.default_rng(4)
    weak = rng.integers(0, 2, (50, 10)).astype(float)
    strong = rng.integers(0, 2, (50, 10)).astype(float)
    found = optimal_relaxation(weak, strong)
    assert found.degenerate
    assert found.t == 0.0
    assert np.array_equal(found.labels, probabilistic_labels(weak, strong))


@pytest.mark.parametrize("gap", [-0.5, 0.0, 0.5])
def test_gaps_without_spread_are_degenerate(gap: float) -> None:
    weak = np.arange(12.0).reshape(6, 2)[:, :1]
    found = optimal_relaxation(weak, weak + gap)
    assert (found.t, found.objective, found.degenerate) == (0.0, 0.0, True)


def test_optimum_at_zero_need_not_be_degenerate() -> None:
    found = optimal_relaxation([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0])
    assert found.t == 0.0
    assert not found.degenerate


def test_one_query_has_no_spread() -> None:
    found = optimal_relaxation([[0.1, 0.2]], [[0.3, 0.1]])
    assert (found.t, found.objective, found.degenerate) == (0.0, 0.0, True)


def test_inputs_are_unchanged_and_may_be_integers_or_vectors() -> None:
    weak, strong = np.array([3, 1, 2]), np.array([2, 2, 4])
    found = optimal_relaxation(weak, strong)
    assert weak.tolist() == [3, 1, 2]
    assert (
        found.labels.tolist() == optimal_relaxation(weak[:, None], strong[:, None]).labels.tolist()
    )


def test_deterministic_labels_use_the_first_sample_only() -> None:
    weak, strong = [[0.5, 9.0], [0.7, 0.0]], [[0.6, 0.0], [0.7, 9.0]]
    assert deterministic_labels(weak, strong).tolist() == [0.0, 1.0]
    assert probabilistic_labels(weak, strong).tolist() == [0.75, 0.25]
    assert transformed_labels(weak, strong, 0.2, pairing="matched").tolist() == [1.0, 0.5]


def test_thinned_curve_keeps_the_ends_and_the_optimum() -> None:
    rng = np.random.default_rng(5)
    found = optimal_relaxation(rng.normal(0, 1, (100, 5)), rng.normal(1, 1, (100, 5)))
    t, values = found.thinned_curve(40)
    assert len(t) <= 40
    assert (t[0], t[-1]) == (0.0, found.breakpoints[-1])
    assert values.max() == found.objective
    assert t[np.argmax(values)] == found.t
    assert len(found.thinned_curve(10**6)[0]) == len(found.breakpoints)
    with pytest.raises(ConfigError, match="2 points was asked for"):
        found.thinned_curve(2)


@pytest.mark.parametrize(
    ("weak", "strong", "message"),
    [
        ([], [], "at least one query"),
        (np.empty((3, 0)), np.ones((3, 1)), "shape \\(3, 0\\)"),
        ([1.0, np.nan], [1.0, 2.0], "weak quality holds 1 NaN or infinite values of 2"),
        ([1.0, 2.0], [np.inf, 2.0], "strong quality holds 1 NaN"),
        ([1.0, 2.0], [1.0], "2 queries with weak quality and 1"),
        ([[1.0], [1.0, 2.0]], [1.0, 2.0], "not a rectangular array"),
        (["good"], [1.0], "not a rectangular array of numbers"),
        ([-1e308], [1e308], "overflows"),
        (np.ones((2, 2, 2)), np.ones((2, 2)), "shape \\(2, 2, 2\\)"),
    ],
)
def test_bad_quality_is_refused(weak: Any, strong: Any, message: str) -> None:
    for function in (optimal_relaxation, probabilistic_labels, deterministic_labels):
        with pytest.raises(DataError, match=message):
            function(weak, strong)


def test_bad_settings_are_refused() -> None:
    weak, strong = np.ones((2, 2)), np.ones((2, 3))
    with pytest.raises(DataError, match="2 weak and 3 strong samples"):
        optimal_relaxation(weak, strong, pairing="matched")
    with pytest.raises(ConfigError, match="Did you mean 'matched'"):
        optimal_relaxation(weak, strong, pairing="match")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"relaxation t is -0\.1"):
        transformed_labels(weak, strong, -0.1)
    with pytest.raises(DataError, match="labels have shape"):
        label_spread([])


def test_two_hundred_queries_with_ten_samples_each() -> None:
    """The size at which N × N differences can still be formed for every candidate t."""
    generator = np.random.default_rng(200)
    weak = np.round(generator.normal(-2, 0.5, (200, 10)), 1)
    strong = np.round(generator.normal(-1.5, 0.7, (200, 10)), 1)
    gaps = (strong[:, None, :] - weak[:, :, None]).reshape(200, -1)
    candidates = np.unique(np.append(gaps[gaps > 0], 0.0))

    def spread(t: float) -> float:
        labels = (gaps <= t).mean(axis=1)
        return float(np.abs(labels[:, None] - labels[None, :]).mean())

    values = np.array([spread(t) for t in candidates])
    found = optimal_relaxation(weak, strong)
    np.testing.assert_allclose(found.objective, values.max(), rtol=1e-12)
    assert found.t == candidates[np.flatnonzero(values >= values.max() - 1e-12)[0]]
    np.testing.assert_array_equal(found.labels, (gaps <= found.t).mean(axis=1))
