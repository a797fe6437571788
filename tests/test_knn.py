"""The weights against a loop, the choice of settings against training without each row."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.routers import Knn
from router_models.knn import (
    KnnRouter,
    _best_rating_settings,
    _best_settings,
    _local_ratings,
    _nearest,
    _OutcomeTable,
    _smoothed,
)
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
    ((rows, cosines, near),) = _nearest(queries, vectors, count=k + 1)
    found = _smoothed(cosines, labels[near], base=0.3, neighbours=k, temperature=t, prior_count=c)
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


def drawn_battles(seed: int, *, count: int = 150, llms: int = 5, strength: float = 1.5) -> Any:
    """Draw battles between LLMs of which the first is the best, and two of which never meet."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, llms, count)
    b = (a + rng.integers(1, llms, count)) % llms
    apart = np.minimum(a, b) + np.maximum(a, b) == 2 * llms - 3  # the last two
    a, b = a[~apart], b[~apart]
    likely = 1 / (1 + np.exp(strength * (a - b)))
    names = [f"llm-{number}" for number in range(llms)]
    return Comparisons(
        prompts=tuple(PROMPTS[row] for row in rng.integers(0, 60, len(a))),
        llm_a=tuple(names[number] for number in a),
        llm_b=tuple(names[number] for number in b),
        a_wins=np.where(rng.random(len(a)) < 0.1, 0.5, rng.random(len(a)) < likely),
        weak=names[-1],
        strong=names[0],
    )


def table_by_hand(
    router: KnnRouter, data: Comparisons, query: np.ndarray, vectors: dict[str, np.ndarray]
) -> np.ndarray:
    """Follow the docstring for one query: the weighted wins of each LLM against each."""
    prompts = list(dict.fromkeys(data.prompts))
    count = len(router.llms_)
    wins, met = (np.zeros((len(prompts), count, count)) for _ in range(2))
    for prompt, a, b, share in zip(data.prompts, data.llm_a, data.llm_b, data.a_wins, strict=True):
        at, i, j = prompts.index(prompt), router.llms_.index(a), router.llms_.index(b)
        wins[at, i, j] += share
        wins[at, j, i] += 1 - share
        met[at, i, j] += 1
        met[at, j, i] += 1
    wins = wins / np.maximum(met, 1)
    k, t = router.neighbours_, router.temperature_
    cosines = np.array([vectors[prompt].astype(float) @ query for prompt in prompts])
    order = np.argsort(-cosines, kind="stable")
    weights = np.exp(cosines[order[:k]] / t) - np.exp(cosines[order[k]] / t)
    weights *= weights.sum() / (weights**2).sum()
    pairs = [(i, j) for i in range(count) for j in range(count) if met[:, i, j].any()]
    base = wins.sum(axis=0)
    for i, j in pairs:
        base[i, j] += (count - 1) / len(pairs)
    battles = (met > 0).sum() / 2 / len(prompts)
    prior = router.prior_count_ * (count - 1) / min(battles, count - 1)
    local = np.einsum("q,qij->ij", weights, wins[order[:k]])
    return np.asarray(local + prior * base / (len(prompts) + 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_ratings_are_the_most_likely_ones_for_the_neighbours_battles(seed: int) -> None:
    data = drawn_battles(seed)
    router = KnnRouter(Knn(neighbours=(4, 20), temperatures=(0.1, 0.3))).fit(data, seed=0)
    vectors = dict(zip(dict.fromkeys(data.prompts), router.embeddings_, strict=True))
    assert router.encoder_ is not None
    asked = PROMPTS[60:66]
    found = router.scores(asked, llms=router.llms_)
    for row, query in enumerate(router.encoder_.encode(asked).astype(float)):
        wins = table_by_hand(router, data, query, vectors)
        gaps = found[row][:, None] - found[row][None, :]
        # At the maximum every LLM wins exactly as often as its ratings say.
        said = (wins + wins.T) / (1 + np.exp(-gaps))
        assert np.allclose(wins.sum(axis=1), said.sum(axis=1), rtol=0, atol=1e-9)


def test_any_two_llms_are_compared_even_if_they_never_met() -> None:
    data = drawn_battles(3, count=400)
    router = KnnRouter(Knn(neighbours=(10, 30))).fit(data, seed=0)
    assert {"llm-3", "llm-4"} not in map(set, zip(data.llm_a, data.llm_b, strict=True))
    never_met = router.win_rate_between(PROMPTS, strong="llm-3", weak="llm-4")
    assert never_met.mean() > 0.6
    own = router.win_rate_between(PROMPTS, strong="llm-0", weak="llm-4")
    assert np.array_equal(own, router.win_rate(PROMPTS))
    for a in router.llms_:
        for b in router.llms_:
            both = [
                router.win_rate_between(PROMPTS[:9], strong=first, weak=second)
                for first, second in ((a, b), (b, a))
            ]
            assert np.allclose(sum(both), 1, rtol=0, atol=1e-15)
            assert a != b or np.all(both[0] == 0.5)


def test_two_llms_have_the_same_win_rate_by_ratings() -> None:
    rng = np.random.default_rng(2)
    prompts = [*PROMPTS, *PROMPTS[:15]]
    train = Comparisons.from_win_rates(prompts, rng.random(95), weak="small", strong="large")
    router = KnnRouter(Knn()).fit(train, seed=0)
    table = _OutcomeTable(router.shares_, 2)
    assert router.encoder_ is not None
    by_ratings = np.empty(80)
    for rows, cosines, near in _nearest(
        router.encoder_.encode(PROMPTS), router.embeddings_, count=router.neighbours_ + 1
    ):
        ratings = _local_ratings(
            cosines,
            near,
            table,
            base=table.base(),
            neighbours=router.neighbours_,
            temperature=router.temperature_,
            prior_count=router.prior_count_,
        )
        by_ratings[rows] = 1 / (1 + np.exp(ratings[:, 1] - ratings[:, 0]))
    assert np.allclose(by_ratings, router.win_rate(PROMPTS), rtol=0, atol=1e-12)
    between = router.win_rate_between(PROMPTS, strong="large", weak="small")
    assert np.allclose(between, router.win_rate(PROMPTS), rtol=0, atol=1e-15)
    chosen = _best_rating_settings(
        router.embeddings_, router.shares_, Knn(), llms=2, on_progress=None
    )
    assert chosen == (router.neighbours_, router.temperature_, router.prior_count_)


def test_a_router_of_many_llms_is_saved_whole(tmp_path: Path) -> None:
    router = KnnRouter(Knn(neighbours=(10,))).fit(drawn_battles(4), seed=0)
    router.save(tmp_path)
    loaded = KnnRouter.load(tmp_path)
    assert loaded.llms_ == router.llms_
    for strong, weak in (("llm-0", "llm-4"), ("llm-3", "llm-1")):
        found, expected = (
            one.win_rate_between(PROMPTS, strong=strong, weak=weak) for one in (loaded, router)
        )
        assert np.array_equal(found, expected)


def test_an_llm_without_battles_is_named() -> None:
    router = KnnRouter(Knn(neighbours=(10,))).fit(drawn_battles(4), seed=0)
    with pytest.raises(ConfigError, match=r"Unknown LLM 'llm_3'. Did you mean 'llm-3'.*Choose one"):
        router.win_rate_between(PROMPTS, strong="llm_3", weak="llm-0")


def test_the_routed_pair_need_not_have_met() -> None:
    data = replace(drawn_battles(5, count=400), strong="llm-3", weak="llm-4")
    win_rate = KnnRouter(Knn(neighbours=(10, 30))).fit(data, seed=0).win_rate(PROMPTS)
    assert win_rate.mean() > 0.6
    assert np.all((win_rate > 0) & (win_rate < 1))


def test_battles_decide_where_their_queries_are_near() -> None:
    """On rivers the second LLM is the best, elsewhere the first; the third loses everywhere."""
    rivers = np.array(["river" in prompt for prompt in PROMPTS])
    pairs = [("a", "b", ~rivers), ("a", "c", np.ones(80)), ("b", "c", np.ones(80))]
    data = Comparisons(
        prompts=tuple(PROMPTS * 3),
        llm_a=tuple(a for a, _, _ in pairs for _ in PROMPTS),
        llm_b=tuple(b for _, b, _ in pairs for _ in PROMPTS),
        a_wins=np.concatenate([won.astype(float) for _, _, won in pairs]),
        weak="c",
        strong="a",
    )
    router = KnnRouter(Knn()).fit(data, seed=0)
    share = router.win_rate_between(PROMPTS, strong="b", weak="a")
    assert share[rivers].mean() > 0.6 > 0.4 > share[~rivers].mean()
    assert router.win_rate(PROMPTS).min() > 0.7
