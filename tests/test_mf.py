"""Matrix factorisation: it learns from any battles, repeats itself, and takes in new LLMs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.errors import ConfigError, DataError
from conf.routers import MatrixFactorization, Trainer
from router_models import mf
from router_models.encoders import load_encoder
from router_models.mf import MatrixFactorizationRouter, _Batches, _Battles
from router_models.persistence import VectorCache
from router_models.training_data import Comparisons

ROOT = Path(__file__).parent.parent
WIDTH = 12
QUERIES = [f"query {row}" for row in range(300)]
LLMS = ("all-round", "coder", "poet", "tiny")
# How good each LLM is at code (even queries) and at verse (odd ones), in log-odds.
SKILLS = np.array([[2.0, 2.0], [2.0, -1.0], [-1.0, 2.0], [-2.0, -2.0]])
# What `fitted` learned in its epochs, here, with torch 2.13 on one thread.
GOLDEN = [(0.487326, 0.372938), (0.389531, 0.362413), (0.379877, 0.367893)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other processes share the cores; threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_vectors(folder: Path) -> Path:
    """Put vectors of our own choice into the packaged encoder's cache: two topics and noise."""
    vectors = 0.5 * np.random.default_rng(0).normal(size=(len(QUERIES), WIDTH))
    vectors[::2, 0] += 3.0
    vectors[1::2, 1] += 3.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cache = VectorCache(folder, load_encoder("minilm").digest)
    cache.write(QUERIES, vectors.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_vectors(tmp_path_factory.mktemp("vectors")))


def settings(vectors: str, *, noise: float = 0.3, **trainer: Any) -> MatrixFactorization:
    fast = {"learning_rate": 2e-2, "max_epochs": 3, "patience": 9, "weight_decay": 0.1}
    return MatrixFactorization(
        dimension=8, noise=noise, encoder_cache=Path(vectors), trainer=Trainer(**(fast | trainer))
    )


def data(
    count: int = 1200, *, seed: int = 0, llms: tuple[str, ...] = LLMS, first: int = 0
) -> Comparisons:
    """Draw battles between the LLMs on the first 200 queries, or on those from ``first`` on."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, len(llms), count)
    b = (a + rng.integers(1, len(llms), count)) % len(llms)
    query = rng.integers(first, first + (200 if first == 0 else 100), count)
    skills = np.array([SKILLS[LLMS.index(llm)] for llm in llms])
    likely = 1 / (1 + np.exp(skills[b, query % 2] - skills[a, query % 2]))
    a_wins = (rng.random(count) < likely).astype(float)
    a_wins[rng.random(count) < 0.1] = 0.5
    return Comparisons(
        tuple(QUERIES[row] for row in query),
        tuple(llms[n] for n in a),
        tuple(llms[n] for n in b),
        a_wins,
        weak=llms[-1],
        strong=llms[0],
    )


def fitted(vectors: str, **changes: Any) -> MatrixFactorizationRouter:
    config = settings(vectors, **changes)
    return MatrixFactorizationRouter(config).fit(data(), data(300, seed=1, first=200), seed=0)


def cross_entropy(router: MatrixFactorizationRouter, battles: Comparisons) -> float:
    win_rate = np.array(
        [
            router.win_rate_between([prompt], strong=a, weak=b)[0]
            for prompt, a, b in zip(battles.prompts, battles.llm_a, battles.llm_b, strict=True)
        ]
    )
    y = battles.a_wins
    return float(-np.mean(y * np.log(win_rate) + (1 - y) * np.log(1 - win_rate)))


def test_it_learns_what_each_llm_is_good_at(vectors: str) -> None:
    router = fitted(vectors, max_epochs=8)
    code, verse = QUERIES[200::2], QUERIES[201::2]
    assert np.mean(router.win_rate_between(code, strong="coder", weak="poet")) > 0.8
    assert np.mean(router.win_rate_between(verse, strong="coder", weak="poet")) < 0.2
    assert router.win_rate(code).min() > 0.8
    assert abs(np.mean(router.win_rate_between(code, strong="coder", weak="all-round")) - 0.5) < 0.2


def test_a_pair_is_learned_from_battles_against_others_only(vectors: str) -> None:
    battles = data(2000)
    sides = zip(battles.llm_a, battles.llm_b, strict=True)
    others = battles.take(
        np.array([row for row, side in enumerate(sides) if set(side) != {"coder", "poet"}])
    )
    router = MatrixFactorizationRouter(settings(vectors, max_epochs=6)).fit(others, seed=0)
    assert np.mean(router.win_rate_between(QUERIES[200::2], strong="coder", weak="poet")) > 0.75
    assert np.mean(router.win_rate_between(QUERIES[201::2], strong="coder", weak="poet")) < 0.25


def test_scores_follow_the_formula(vectors: str) -> None:
    router = fitted(vectors, max_epochs=1)
    found = router.scores(QUERIES[:3], llms=LLMS)
    weights = {name: array.astype(float) for name, array in router.weights_.items()}
    assert router.encoder_ is not None
    for row, query in enumerate(router.encoder_.encode(QUERIES[:3]).astype(float)):
        for column, llm in enumerate(LLMS):
            v_m = weights["vectors"][router.llms_.index(llm)]
            projected = weights["projection"].T @ query + weights["bias"]
            assert found[row, column] == pytest.approx(weights["output"] @ (v_m * projected))
    expected = 1 / (1 + np.exp(found[:, 3] - found[:, 0]))
    assert np.allclose(router.win_rate(QUERIES[:3]), expected)


def test_either_order_of_a_pair_says_the_same(vectors: str) -> None:
    router = fitted(vectors)
    there = router.win_rate_between(QUERIES, strong="coder", weak="tiny")
    back = router.win_rate_between(QUERIES, strong="tiny", weak="coder")
    assert np.allclose(there + back, 1.0)
    assert np.all(router.win_rate_between(QUERIES, strong="poet", weak="poet") == 0.5)


def test_an_unknown_llm_is_named(vectors: str) -> None:
    with pytest.raises(ConfigError, match=r"Unknown LLM 'codr'. Did you mean 'coder'.*add_llm"):
        fitted(vectors).win_rate_between(QUERIES, strong="codr", weak="tiny")


def test_ties_alone_make_llms_equal(vectors: str) -> None:
    battles = data(300)
    tied = Comparisons(
        battles.prompts, battles.llm_a, battles.llm_b, np.full(300, 0.5), "tiny", "all-round"
    )
    win_rate = MatrixFactorizationRouter(settings(vectors)).fit(tied, seed=0).win_rate(QUERIES)
    assert np.allclose(win_rate, 0.5, atol=0.05)


def test_noise_is_for_training_only(vectors: str) -> None:
    router = fitted(vectors, noise=3.0)
    validation = data(300, seed=1, first=200)
    losses = [float(entry["validation_loss"] or 0) for entry in router.history_]
    # The loss that was watched is the one that win rates have, which repeat themselves.
    assert cross_entropy(router, validation) == pytest.approx(min(losses), abs=1e-5)
    assert np.array_equal(router.win_rate(QUERIES), router.win_rate(QUERIES))
    assert not np.array_equal(router.win_rate(QUERIES), fitted(vectors).win_rate(QUERIES))


def test_the_best_epoch_is_kept_and_patience_ends_the_training(vectors: str) -> None:
    config = settings(vectors, noise=0.0, learning_rate=0.3, max_epochs=30, patience=2)
    few = data(60, seed=2)
    validation = data(300, seed=1, first=200)
    router = MatrixFactorizationRouter(config).fit(few, validation, seed=0)
    losses = [float(entry["validation_loss"] or 0) for entry in router.history_]
    assert len(losses) == int(np.argmin(losses)) + 1 + 2 < 30
    assert cross_entropy(router, validation) == pytest.approx(min(losses), abs=1e-5)


def test_the_trajectory_is_the_committed_one(vectors: str) -> None:
    found = [(entry["train_loss"], entry["validation_loss"]) for entry in fitted(vectors).history_]
    assert np.allclose(np.array(found, dtype=float), GOLDEN, rtol=0, atol=1e-4)


def test_validation_with_unknown_llms_is_no_validation(vectors: str) -> None:
    strangers = Comparisons(("query 0",), ("x",), ("y",), np.array([1.0]), "x", "y")
    router = MatrixFactorizationRouter(settings(vectors)).fit(data(), strangers, seed=0)
    assert [entry["validation_loss"] for entry in router.history_] == [None] * 3


def test_llms_that_nothing_links_to_the_pair_stay_unknown(vectors: str) -> None:
    battles = data(300)
    mixed = Comparisons(
        (*battles.prompts, "query 0"), (*battles.llm_a, "x"), (*battles.llm_b, "y"),
        np.append(battles.a_wins, 1.0), "tiny", "all-round",
    )  # fmt: skip
    router = MatrixFactorizationRouter(settings(vectors, max_epochs=1)).fit(mixed, seed=0)
    assert router.llms_ == sorted(LLMS)


def test_settings_that_are_not_given_keep_their_own_defaults() -> None:
    own = MatrixFactorization().trainer
    assert MatrixFactorization(trainer=Trainer(max_epochs=2)).trainer == own.model_copy(
        update={"max_epochs": 2}
    )
    read = MatrixFactorization.model_validate({"trainer": {"patience": 1}})
    assert read.trainer.batch_size == own.batch_size != Trainer().batch_size
    assert MatrixFactorization.model_validate_json(read.model_dump_json()) == read


def test_another_seed_gives_other_numbers(vectors: str) -> None:
    first, second = (
        MatrixFactorizationRouter(settings(vectors)).fit(data(300), seed=seed).win_rate(QUERIES)
        for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_training_leaves_no_trace(vectors: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    fitted(vectors, max_epochs=1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert capfd.readouterr() == ("", "")


def test_a_training_that_diverges_is_explained(vectors: str) -> None:
    with pytest.raises(ConfigError, match=r"diverged.*Lower trainer.learning_rate"):
        fitted(vectors, learning_rate=1e30)


def test_a_new_llm_is_added_and_nothing_else_changes(vectors: str, tmp_path: Path) -> None:
    before = fitted(vectors, max_epochs=6)
    known = before.win_rate(QUERIES)
    # Another coder: the coder's own battles under a new name.
    battles = data(1500, seed=3)
    twin = Comparisons(
        battles.prompts,
        tuple("twin" if llm == "coder" else llm for llm in battles.llm_a),
        tuple("twin" if llm == "coder" else llm for llm in battles.llm_b),
        battles.a_wins,
        "tiny",
        "all-round",
    )
    router = before.add_llm("twin", twin)
    assert router is before
    assert np.array_equal(router.win_rate(QUERIES), known)
    ours = router.win_rate_between(QUERIES, strong="twin", weak="poet")
    theirs = router.win_rate_between(QUERIES, strong="coder", weak="poet")
    assert np.abs(ours - theirs).mean() < 0.06
    router.save(tmp_path)
    loaded = MatrixFactorizationRouter.load(tmp_path)
    assert loaded.llms_ == [*sorted(LLMS), "twin"]
    assert all(np.array_equal(loaded.weights_[name], router.weights_[name]) for name in mf.WEIGHTS)


def test_an_added_llm_has_the_most_likely_vector(
    vectors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mf, "PRIOR_WIDTHS", (1,))
    router = fitted(vectors)
    known = router.weights_["vectors"].astype(float)
    newcomer = data(400, seed=4, llms=("coder", "poet", "tiny"))
    renamed = Comparisons(
        newcomer.prompts,
        tuple("new" if llm == "coder" else llm for llm in newcomer.llm_a),
        tuple("new" if llm == "coder" else llm for llm in newcomer.llm_b),
        newcomer.a_wins, "tiny", "new",
    )  # fmt: skip
    mean, variance = known.mean(axis=0), known.var(axis=0).mean()
    names = [*router.llms_, "new"]
    router.add_llm("new", renamed)
    features = router._features(renamed.prompts)
    a, b = (np.array([names.index(llm) for llm in side]) for side in (renamed.llm_a, renamed.llm_b))

    def loss(vector: np.ndarray) -> float:
        vectors = np.vstack([known, vector])
        logit = (features * (vectors[a] - vectors[b])).sum(axis=1)
        penalty = ((vector - mean) ** 2).sum() / (2 * variance)
        return float((np.logaddexp(0, logit) - renamed.a_wins * logit).sum() + penalty)

    found = router.weights_["vectors"][-1].astype(float)
    for axis in np.eye(len(found)):
        slope = (loss(found + 1e-4 * axis) - loss(found - 1e-4 * axis)) / 2e-4
        assert abs(slope) < 1e-2


def test_bad_additions_are_explained(vectors: str) -> None:
    router = fitted(vectors, max_epochs=1)
    with pytest.raises(ConfigError, match=r"knows an LLM called 'coder'.*Choose another"):
        router.add_llm("coder", data(10))
    with pytest.raises(DataError, match=r"'new' has no battle against a known LLM in 10 rows"):
        router.add_llm("new", data(10))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
from test_mf import data, settings
from router_models.mf import MatrixFactorizationRouter

def die(done, total):
    if done == 40:  # in the second of three epochs
        os.kill(os.getpid(), signal.SIGKILL)

MatrixFactorizationRouter(settings({vectors!r})).fit(
    data(), data(300, seed=1, first=200), seed=0, directory=Path({directory!r}), on_progress=die
)
"""


def test_a_killed_training_goes_on_to_the_same_numbers(vectors: str, tmp_path: Path) -> None:
    script = KILLED.format(
        root=str(ROOT), tests=str(ROOT / "tests"), vectors=vectors, directory=str(tmp_path)
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".ckpt"]

    steps: list[int] = []
    resumed = MatrixFactorizationRouter(settings(vectors)).fit(
        data(),
        data(300, seed=1, first=200),
        seed=0,
        directory=tmp_path,
        on_progress=lambda done, total: steps.append(done),
    )
    whole = fitted(vectors)
    assert steps[0] == 1 + 30  # the first epoch's steps were not repeated
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(resumed.win_rate(QUERIES), whole.win_rate(QUERIES))
    assert resumed.history_ == whole.history_


def test_a_damaged_checkpoint_is_set_aside(
    vectors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(vectors, max_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(mf.Path, "unlink", lambda path, missing_ok: None)
        whole = MatrixFactorizationRouter(config).fit(data(300), seed=0, directory=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.warns(RuntimeWarning, match="damaged .* training starts"):
        again = MatrixFactorizationRouter(config).fit(data(300), seed=0, directory=tmp_path)
    assert np.array_equal(again.win_rate(QUERIES), whole.win_rate(QUERIES))


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (500, 1), (500, 3), (17, 4)])
def test_every_device_makes_the_same_steps_and_no_battle_is_lost(count: int, ranks: int) -> None:
    rows = np.arange(count)
    outcome = (rows / count).astype(np.float32)
    battles = _Battles(np.eye(count, 4, dtype=np.float32), rows, rows, rows, outcome)
    seen: list[int] = []
    for rank in range(ranks):
        batches = _Batches(battles, size=64, seed=0)
        batches.rank, batches.ranks = rank, ranks
        made = list(batches)
        assert len(made) == len(batches)
        for _, a, b, a_wins in made:
            assert torch.equal(a, b)
            assert np.allclose(a_wins.numpy(), a.numpy() / count)
            seen += a.tolist()
    assert set(seen) == set(range(count))
    if ranks == 1:
        assert len(seen) == count
