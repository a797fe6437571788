"""The weights against a loop, the choice of settings against training without each row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Knn
from router_models.knn import KnnRouter, _best_settings, _nearest, _smoothed
from router_models.training_data import Comparisons

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
PROMPTS = [json.loads(line)["text"] for line in LINES[::6]][:80]


def unit_vectors(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_hand(
    query: np.ndarray, vectors: np.ndarray, labels: np.ndarray, *, base: float, k: int, t: float,
    c: float,
) -> float:  # fmt: skip
    """Follow the docstring's formula for one query."""
    cosines = vectors.astype(float) @ query.astype(float)
    order = sorted(range(len(cosines)), key=lambda row: -cosines[row])
    edge = np.exp(cosines[order[k]] / t)
    weights = [np.exp(cosines[row] / t) - edge for row in order[:k]]
    mean = sum(w * labels[row] for w, row in zip(weights, order, strict=False)) / sum(weights)
    count = sum(weights) ** 2 / sum(w * w for w in weights)
    return float((count * mean + c * base) / (count + c))


@given(
    seed=st.integers(0, 1000),
    count=st.integers(3, 30),
    t=st.sampled_from([0.05, 0.3, 2.0]),
    c=st.sampled_from([0.5, 4.0]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_win_rate_follows_the_formula(
    seed: int, count: int, t: float, c: float, data: Any
) -> None:
    k = data.draw(st.integers(1, count - 1))
    vectors, queries = unit_vectors(seed, count), unit_vectors(seed + 1, 4)
    labels = np.random.default_rng(seed).random(count)
    ((rows, cosines, near),) = _nearest(queries, vectors, labels, count=k + 1)
    found = _smoothed(cosines, near, base=0.3, neighbours=k, temperature=t, prior_count=c)
    expected = [by_hand(query, vectors, labels, base=0.3, k=k, t=t, c=c) for query in queries]
    assert np.allclose(found[rows], expected, rtol=1e-9)


@given(seed=st.integers(0, 1000), count=st.integers(4, 20))
@settings(max_examples=20, deadline=None)
def test_settings_have_the_best_loss_when_each_row_is_left_out(seed: int, count: int) -> None:
    vectors, labels = unit_vectors(seed, count), np.random.default_rng(seed).random(count)
    config = Knn(neighbours=(1, 2, 50), temperatures=(0.1, 1.0), prior_counts=(1.0, 8.0))
    best = _best_settings(vectors, labels, config, on_progress=None)
    losses = {}
    for k in sorted({min(size, count - 2) for size in config.neighbours}):
        for t in config.temperatures:
            for c in config.prior_counts:
                loss = 0.0
                for row in range(count):
                    rest = np.delete(np.arange(count), row)
                    base = (labels[rest].sum() + 0.5) / count
                    share = by_hand(
                        vectors[row], vectors[rest], labels[rest], base=base, k=k, t=t, c=c
                    )
                    loss -= labels[row] * np.log(share) + (1 - labels[row]) * np.log(1 - share)
                losses[k, t, c] = loss
    assert losses[best] == pytest.approx(min(losses.values()), rel=1e-9)


def test_equally_near_neighbours_do_not_decide_by_rounding() -> None:
    cosines = np.full((1, 4), 0.7) + np.array([[3e-16, 2e-16, 1e-16, 0.0]])
    found = _smoothed(
        cosines,
        np.array([[1.0, 1.0, 0.0, 0.0]]),
        base=0.25,
        neighbours=3,
        temperature=0.1,
        prior_count=1.0,
    )
    assert found == pytest.approx([0.25])


def test_a_neighbour_fades_out_at_the_edge() -> None:
    # The second neighbour is overtaken by the third: the win rate must not jump.
    def win_rate(second: float, third: float, labels: list[float]) -> float:
        return float(
            _smoothed(
                np.array([[0.9, second, third]]),
                np.array([labels]),
                base=0.5,
                neighbours=2,
                temperature=0.1,
                prior_count=1.0,
            )[0]
        )

    before = win_rate(0.5 + 1e-9, 0.5, [0.2, 1.0, 0.0])
    after = win_rate(0.5, 0.5 - 1e-9, [0.2, 0.0, 1.0])
    assert before == pytest.approx(after, abs=1e-6)


def test_repeated_prompts_count_once() -> None:
    once = Comparisons.from_win_rates(
        PROMPTS[:40], np.linspace(0, 1, 40), weak="small", strong="large"
    )
    rows = np.concatenate([np.arange(40), np.arange(40)])
    labels = np.concatenate([once.a_wins - 0.0, once.a_wins])
    twice = Comparisons.from_win_rates(
        [PROMPTS[row] for row in rows], labels, weak="small", strong="large"
    )
    config = Knn(neighbours=(3, 6))
    first = KnnRouter(config).fit(once, seed=0).win_rate(PROMPTS)
    second = KnnRouter(config).fit(twice, seed=1).win_rate(PROMPTS)
    assert np.allclose(first, second, rtol=0, atol=1e-12)


def test_win_rates_are_never_certain_and_hardly_ever_tied() -> None:
    labels = np.array([float("river" in prompt) for prompt in PROMPTS])
    train = Comparisons.from_win_rates(PROMPTS, labels, weak="small", strong="large")
    win_rate = KnnRouter(Knn()).fit(train, seed=0).win_rate(PROMPTS)
    assert np.all((win_rate > 0) & (win_rate < 1))
    assert len(np.unique(win_rate)) > 75
    assert win_rate[labels == 1].min() > np.median(win_rate[labels == 0])


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Comparisons.from_win_rates(
        PROMPTS, np.linspace(0, 1, len(PROMPTS)), weak="small", strong="large"
    )
    whole = KnnRouter(Knn(neighbours=(4, 9))).fit(train, seed=0)
    expected = whole.win_rate(PROMPTS)
    monkeypatch.setattr("router_models.knn.BLOCK", 7)
    blocks = KnnRouter(Knn(neighbours=(4, 9))).fit(train, seed=0)
    assert blocks.neighbours_ == whole.neighbours_
    assert np.allclose(blocks.win_rate(PROMPTS), expected, rtol=0, atol=1e-12)


def test_progress_ends_at_the_number_of_rows() -> None:
    seen: list[tuple[int, int]] = []
    train = Comparisons.from_win_rates(PROMPTS[:20], np.linspace(0, 1, 20), weak="s", strong="l")
    KnnRouter(Knn()).fit(train, seed=0, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20)
