"""Kernel ridge against plain formulas: the solution, its leave-one-out errors, its views."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from conf.errors import ConfigError, DataError
from conf.routers import KernelRidge
from router_models.encoders import load_encoder
from router_models.kernel_ridge import KernelRidgeRouter, _kernel, _leave_one_out_errors
from router_models.training_data import Comparisons

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
PROMPTS = [json.loads(line)["text"] for line in LINES[::7]][:64]
HARD = np.array(["river" in prompt or "capital" in prompt for prompt in PROMPTS])
QUICK = KernelRidge(encoders=("minilm",), weights=(1.0,), gamma=0.5, ridges=(0.5, 4.0))


def labelled(prompts: list[str], win_rate: np.ndarray) -> Comparisons:
    return Comparisons.from_win_rates(prompts, win_rate, weak="small", strong="large")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.3, 2.0]), ridge=st.floats(0.05, 20.0))
def test_leave_one_out_errors_are_those_of_refitting(seed: int, gamma: float, ridge: float) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(12, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    target = rng.normal(size=12)
    kernel = _kernel([features], [features], gamma, (1.0,))
    squares = []
    for row in range(12):
        rest = np.delete(np.arange(12), row)
        solved = np.linalg.solve(kernel[np.ix_(rest, rest)] + ridge * np.eye(11), target[rest])
        squares.append((target[row] - kernel[row, rest] @ solved) ** 2)
    found = _leave_one_out_errors(eigh(kernel), target, (ridge, 2 * ridge))
    assert found[0] == pytest.approx(np.mean(squares))
    assert found[1] != found[0]


def test_of_too_many_queries_a_sample_is_learnt_from(caplog: pytest.LogCaptureFixture) -> None:
    few = QUICK.model_copy(update={"max_queries": 20})
    win_rate = np.where(HARD, 0.9, 0.1)
    router = KernelRidgeRouter(few).fit(labelled(PROMPTS, win_rate), seed=0)
    assert len(router.coefficients_) == 20
    assert f"learns from 20 of {len(PROMPTS)} queries" in caplog.text
    # Which ones does not depend on their order.
    backwards = KernelRidgeRouter(few).fit(labelled(PROMPTS[::-1], win_rate[::-1]), seed=0)
    assert backwards.win_rate(PROMPTS) == pytest.approx(router.win_rate(PROMPTS), abs=1e-9)


def test_the_win_rate_is_the_plain_solution() -> None:
    rng = np.random.default_rng(1)
    win_rate = np.clip(np.where(HARD, 0.8, 0.2) + rng.normal(0, 0.1, len(HARD)), 0, 1)
    router = KernelRidgeRouter(QUICK).fit(labelled(PROMPTS[:48], win_rate[:48]), seed=0)
    vectors = load_encoder("minilm").encode(PROMPTS).astype(np.float64)
    train = vectors[:48]
    scales = train.std(axis=0)
    assert scales.min() < 1e-6  # MiniLM has a dimension that is always 0
    scales = np.maximum(scales, 1e-3 * np.median(scales))
    standard = (vectors - train.mean(axis=0)) / scales
    standard /= np.linalg.norm(standard, axis=1, keepdims=True)
    distance = ((standard[:, None] - standard[None]) ** 2).sum(axis=2)
    kernel = np.exp(-QUICK.gamma * distance)
    target = win_rate[:48] - win_rate[:48].mean()
    solved = np.linalg.solve(kernel[:48, :48] + router.ridge_ * np.eye(48), target)
    expected = np.clip(win_rate[:48].mean() + kernel[48:, :48] @ solved, 0, 1)
    assert np.allclose(router.win_rate(PROMPTS[48:]), expected, rtol=0, atol=1e-9)
    hard = HARD[48:]
    assert expected[hard].mean() > expected[~hard].mean() + 0.05


def test_validation_is_trained_on_too() -> None:
    win_rate = np.where(HARD, 0.9, 0.1)
    parts = labelled(PROMPTS[:32], win_rate[:32]), labelled(PROMPTS[32:48], win_rate[32:48])
    both = KernelRidgeRouter(QUICK).fit(*parts, seed=0)
    whole = KernelRidgeRouter(QUICK).fit(labelled(PROMPTS[:48], win_rate[:48]), seed=0)
    assert np.array_equal(both.win_rate(PROMPTS[48:]), whole.win_rate(PROMPTS[48:]))


def test_repeated_prompts_count_once_with_their_mean() -> None:
    win_rate = np.where(HARD, 0.9, 0.1)
    twice = labelled([*PROMPTS[:40], PROMPTS[0]], np.append(win_rate[:40], 1 - win_rate[0]))
    once = labelled(PROMPTS[:40], np.append(0.5, win_rate[1:40]))
    found = [KernelRidgeRouter(QUICK).fit(data, seed=0) for data in (twice, once)]
    assert np.array_equal(found[0].win_rate(PROMPTS), found[1].win_rate(PROMPTS))


def test_a_second_view_changes_the_win_rates_by_its_weight() -> None:
    data = labelled(PROMPTS[:48], np.where(HARD, 0.9, 0.1)[:48])

    def win_rate(*weights: float) -> np.ndarray:
        views = ("minilm", "minilm@2")[: len(weights)]
        fixed = KernelRidge(encoders=views, weights=weights, gamma=1.0, ridges=(1.0,))
        return KernelRidgeRouter(fixed).fit(data, seed=0).win_rate(PROMPTS[48:])

    alone = win_rate(1.0)
    assert np.allclose(win_rate(1.0, 1e-9), alone, atol=1e-6)
    assert np.abs(win_rate(1.0, 1.0) - alone).max() > 0.01


def test_shuffled_labels_teach_nothing() -> None:
    rng = np.random.default_rng(0)
    win_rate = rng.permutation(np.where(HARD, 0.9, 0.1))
    router = KernelRidgeRouter(KernelRidge(encoders=("minilm",), weights=(1.0,)))
    found = router.fit(labelled(PROMPTS[:48], win_rate[:48]), seed=0).win_rate(PROMPTS[48:])
    # The strongest penalty is chosen, and nothing strays far from the mean.
    assert np.abs(found - win_rate[:48].mean()).max() < 0.2


def test_mistakes_are_named() -> None:
    assert KernelRidge(encoders=("minilm", "smollm2-135m@18")).weights == (1.0, 1.0)
    with pytest.raises(ConfigError, match="2 encoders and 1 weights"):
        KernelRidge(encoders=("minilm", "smollm2-135m@18"), weights=(1.0,))
    strangers = Comparisons(("x",), ("a",), ("b",), np.array([1.0]), weak="c", strong="d")
    with pytest.raises(DataError, match="never compared"):
        KernelRidgeRouter(QUICK).fit(strangers, seed=0)
