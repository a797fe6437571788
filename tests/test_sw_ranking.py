"""Ratings for every query: equal to a plain weighted logistic fit on the raw battles."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from conf.errors import ConfigError, DataError
from conf.routers import SimilarityWeighted
from router_models import sw_ranking
from router_models.encoders import load_encoder
from router_models.persistence import VectorCache
from router_models.sw_ranking import (
    SimilarityWeightedRouter,
    _wins_between_tiers,
    similarity_weights,
)
from router_models.tiers import PRIOR_WINS
from router_models.training_data import Comparisons

WIDTH = 8
ASKED = [f"asked {row}" for row in range(6)]


def drawn_vectors(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)) + 0.4
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def keep(folder: Path, vectors: dict[str, np.ndarray]) -> Path:
    """Put vectors of our own choice into the packaged encoder's cache."""
    cache = VectorCache(folder, load_encoder("minilm").digest)
    cache.write(list(vectors), np.stack(list(vectors.values())))
    return folder


def drawn_battles(seed: int, *, count: int = 400, llms: int = 9) -> Comparisons:
    """Draw battles, with ties and uncertain outcomes, and queries that come up several times."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, llms, count)
    b = (a + rng.integers(1, llms, count)) % llms
    strength = np.linspace(-1.5, 1.5, llms)
    likely = 1 / (1 + np.exp(strength[b] - strength[a]))
    a_wins = np.where(rng.random(count) < likely, 1.0, 0.0)
    a_wins[rng.random(count) < 0.2] = 0.5
    a_wins[rng.random(count) < 0.1] = 0.7
    prompts = tuple(f"query {row}" for row in rng.integers(0, count // 2, count))
    names = [f"m{number}" for number in range(llms)]
    return Comparisons(
        prompts, tuple(names[n] for n in a), tuple(names[n] for n in b), a_wins, "m2", "m7"
    )


def fitted(
    folder: Path, data: Comparisons, *, seed: int = 0, tiers: int = 4
) -> tuple[SimilarityWeightedRouter, dict[str, np.ndarray]]:
    texts = [*dict.fromkeys(data.prompts), *ASKED]
    vectors = dict(zip(texts, drawn_vectors(seed, len(texts)), strict=True))
    config = SimilarityWeighted(tiers=tiers, encoder_cache=keep(folder, vectors))
    return SimilarityWeightedRouter(config).fit(data, seed=0), vectors


def plain_win_rate(
    router: SimilarityWeightedRouter,
    data: Comparisons,
    vectors: dict[str, np.ndarray],
    asked: str,
) -> float:
    """Fit a weighted logistic regression to the raw battles, one row each, for one query."""
    tier_a, tier_b = ([router.tiers_[llm] for llm in side] for side in (data.llm_a, data.llm_b))
    between = np.array(tier_a) != np.array(tier_b)
    cosines = np.array([vectors[p].astype(float) @ vectors[asked] for p in data.prompts])
    weights = 10 ** (1 + np.clip(cosines / cosines[between].max(), -1, 1))
    design = np.eye(router.tier_count())[tier_a] - np.eye(router.tier_count())[tier_b]
    design = design[:, 1:]  # the first tier's rating is fixed at 0

    def loss(ratings: np.ndarray) -> float:
        logit = design @ ratings
        return float((weights * (np.logaddexp(0, logit) - data.a_wins * logit)).sum())

    def gradient(ratings: np.ndarray) -> np.ndarray:
        return design.T @ (weights * (1 / (1 + np.exp(-design @ ratings)) - data.a_wins))

    def curvature(ratings: np.ndarray) -> np.ndarray:
        share = 1 / (1 + np.exp(-design @ ratings))
        return (design * (weights * share * (1 - share))[:, None]).T @ design

    start = np.zeros(design.shape[1])
    found = minimize(
        loss, start, jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-9}
    )
    ratings = np.append(0.0, found.x)
    gap = ratings[router.tiers_[data.strong]] - ratings[router.tiers_[data.weak]]
    return float(1 / (1 + np.exp(-gap)))


@pytest.mark.parametrize("tiers", [2, 4, 20])
def test_it_agrees_with_a_plain_weighted_fit_on_the_raw_battles(tiers: int, tmp_path: Path) -> None:
    data = drawn_battles(1)
    router, vectors = fitted(tmp_path, data, tiers=tiers)
    assert router.tier_count() == min(tiers, 9)
    expected = [plain_win_rate(router, data, vectors, asked) for asked in ASKED]
    assert np.allclose(router.win_rate(ASKED), expected, rtol=0, atol=1e-6)
    assert np.ptp(expected) > 0.01


def test_battles_within_a_tier_change_nothing(tmp_path: Path) -> None:
    data = drawn_battles(2)
    tiers = fitted(tmp_path, data)[0].tiers_
    between = np.array([tiers[a] != tiers[b] for a, b in zip(data.llm_a, data.llm_b, strict=True)])
    assert 0 < between.sum() < len(between)
    prompts, wins = _wins_between_tiers(data, tiers)
    same_prompts, same_wins = _wins_between_tiers(data.take(np.flatnonzero(between)), tiers)
    assert prompts == same_prompts
    assert np.array_equal(wins.toarray(), same_wins.toarray())


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_wins_between_tiers_are_counted_once_each(seed: int) -> None:
    data = drawn_battles(seed, count=60)
    tiers = {f"m{number}": number // 3 for number in range(9)}
    prompts, wins = _wins_between_tiers(data, tiers)
    expected = np.zeros((9, len(prompts)))
    rows = zip(data.prompts, data.llm_a, data.llm_b, data.a_wins, strict=True)
    for prompt, a, b, a_wins in rows:
        if tiers[a] != tiers[b]:
            expected[tiers[a] * 3 + tiers[b], prompts.index(prompt)] += a_wins
            expected[tiers[b] * 3 + tiers[a], prompts.index(prompt)] += 1 - a_wins
    assert np.allclose(wins.toarray(), expected)


def test_weights_follow_the_formula() -> None:
    known = np.eye(3, dtype=np.float32)
    query = np.array([[0.8, 0.4, -0.4]], dtype=np.float32)
    weights = similarity_weights(known, query)
    assert np.allclose(weights[:, 0], [10**2, 10**1.5, 10**0.5], rtol=1e-6)


def test_a_query_that_resembles_nothing_weighs_all_battles_alike() -> None:
    known = np.eye(3, dtype=np.float32)
    opposite = -np.ones((1, 3), dtype=np.float32) / np.sqrt(np.float32(3))
    assert np.allclose(similarity_weights(known, opposite), 1.0)
    orthogonal = np.zeros((1, 3), dtype=np.float32)
    assert np.allclose(similarity_weights(known, orthogonal), 10.0)


def test_similar_queries_decide(tmp_path: Path) -> None:
    east, north = np.eye(WIDTH, dtype=np.float32)[:2]
    vectors = {"easy": east, "hard": north, "easy?": east, "hard?": north}
    prompts = ("easy",) * 10 + ("hard",) * 10
    a_wins = np.array([0.4] * 10 + [0.9] * 10)
    data = Comparisons(prompts, ("s",) * 20, ("w",) * 20, a_wins, "w", "s")
    config = SimilarityWeighted(encoder_cache=keep(tmp_path, vectors))
    win_rate = SimilarityWeightedRouter(config).fit(data, seed=0).win_rate(["easy?", "hard?"])
    # Weights are 100 for the same topic and 10 for the other.
    assert win_rate == pytest.approx([(100 * 0.4 + 10 * 0.9) / 110, (100 * 0.9 + 10 * 0.4) / 110])


def test_llms_that_never_met_are_compared_through_others(tmp_path: Path) -> None:
    data = Comparisons(
        ("query 0",) * 4, ("s", "m", "m", "w"), ("m", "s", "w", "m"),
        np.array([0.9, 0.1, 0.8, 0.2]), "w", "s",
    )  # fmt: skip
    router, _ = fitted(tmp_path, data, tiers=10)
    odds = (0.9 / 0.1) * (0.8 / 0.2)
    assert np.allclose(router.win_rate(ASKED), odds / (1 + odds), atol=1e-6)


def test_a_tier_that_never_lost_has_a_finite_rating(tmp_path: Path) -> None:
    data = Comparisons(("query 0",) * 9, ("s",) * 9, ("w",) * 9, np.ones(9), "w", "s")
    router, _ = fitted(tmp_path, data)
    assert np.allclose(router.win_rate(ASKED), (9 + PRIOR_WINS) / (9 + 2 * PRIOR_WINS), atol=1e-6)


def test_any_two_known_llms_can_be_compared(tmp_path: Path) -> None:
    router, _ = fitted(tmp_path, drawn_battles(3))
    best = router.win_rate_between(ASKED, strong="m8", weak="m0")
    assert np.allclose(best + router.win_rate_between(ASKED, strong="m0", weak="m8"), 1.0)
    assert np.all(best > router.win_rate_between(ASKED, strong="m8", weak="m5"))
    by_tier: dict[int, str] = {}
    equal = next(
        (by_tier[tier], llm)
        for llm, tier in router.tiers_.items()
        if tier in by_tier or by_tier.setdefault(tier, llm) != llm
    )
    assert np.all(router.win_rate_between(ASKED, strong=equal[0], weak=equal[1]) == 0.5)
    with pytest.raises(ConfigError, match=r"Unknown LLM 'm44'. Did you mean 'm4'.*Choose one"):
        router.win_rate_between(ASKED, strong="m44", weak="m0")


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router, _ = fitted(tmp_path, drawn_battles(4))
    expected = router.win_rate(ASKED)
    monkeypatch.setattr(sw_ranking, "BLOCK", 4)
    assert np.allclose(router.win_rate(ASKED), expected, rtol=0, atol=1e-7)


def test_other_prompts_move_a_number_by_rounding_only(tmp_path: Path) -> None:
    router, _ = fitted(tmp_path, drawn_battles(6))
    together = router.win_rate(ASKED)
    alone = np.concatenate([router.win_rate([asked]) for asked in ASKED])
    assert np.ptp(together) > 0.01
    assert np.allclose(alone, together, rtol=0, atol=1e-5)


def test_a_saved_ranking_knows_all_its_llms(tmp_path: Path) -> None:
    router = SimilarityWeightedRouter(SimilarityWeighted(tiers=4)).fit(drawn_battles(5), seed=0)
    router.save(tmp_path)
    loaded = SimilarityWeightedRouter.load(tmp_path)
    assert loaded.tiers_ == router.tiers_
    expected = router.win_rate_between(ASKED, strong="m8", weak="m1")
    assert np.array_equal(loaded.win_rate_between(ASKED, strong="m8", weak="m1"), expected)


def test_a_pair_without_a_link_is_refused() -> None:
    data = Comparisons(("a", "b"), ("s", "w"), ("x", "y"), np.array([1.0, 0.0]), "w", "s")
    with pytest.raises(DataError, match="never compared, not even through other LLMs"):
        SimilarityWeightedRouter(SimilarityWeighted()).fit(data, seed=0)
