"""The three-verdict encoder: what its classes mean, what it learns, and that it repeats itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_hybrid import RECORDS, area_under_curve, data, save_tiny_encoder

from conf.errors import ArtifactError, ConfigError
from conf.routers import Bert, Trainer
from router_models.bert import BertRouter, cross_entropy, verdict_shares, win_rate_of
from router_models.training_data import Comparisons

PROMPTS = [record["text"] for record in RECORDS[:40]]
# What the tiny encoder learned in three epochs, here, with torch 2.13 on one thread.
GOLDEN = [(1.104036, 1.051927), (1.038424, 1.028929), (1.006425, 1.019959)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other processes share the cores; threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("tiny")))


def settings(encoder: str, **trainer: Any) -> Bert:
    """Return settings that suit the tiny encoder."""
    fast = {"learning_rate": 2e-3, "head_learning_rate": 1e-2, "max_epochs": 3, "patience": 9}
    return Bert(encoder=encoder, trained_layers=None, trainer=Trainer(**(fast | trainer)))


def fitted(encoder: str, **trainer: Any) -> BertRouter:
    return BertRouter(settings(encoder, **trainer)).fit(data(), data(20, start=60), seed=0)


def three_kinds(count: int, *, start: int = 0) -> tuple[Comparisons, np.ndarray]:
    """Return questions whose domain decides the verdict, and which verdict it is, (n,)."""
    order = np.random.default_rng(1).permutation(len(RECORDS))[start : start + count]
    verdict = {"capital": 0, "region": 0, "river": 0, "currency": 1, "language": 1}
    kinds = np.array([verdict.get(RECORDS[row]["domain"], 2) for row in order])
    prompts = [RECORDS[row]["text"] for row in order]
    win_rate = np.array([1.0, 0.5, 0.0])[kinds]
    return Comparisons.from_win_rates(prompts, win_rate, weak="small", strong="large"), kinds


@hypothesis_settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_verdicts_keep_the_expected_outcome(outcomes: list[float]) -> None:
    shares = verdict_shares(np.array(outcomes))
    assert np.all(shares >= 0)
    assert np.allclose(shares.sum(axis=1), 1)
    assert np.all((shares > 0).sum(axis=1) <= 2)  # neighbours only: never both LLMs as winners
    assert np.allclose(win_rate_of(shares, tie_share=0.5), outcomes)


def test_half_a_tie_ranks_by_the_expected_gap() -> None:
    even, ahead = verdicts = np.array([[0.5, 0.0, 0.5], [0.4, 0.6, 0.0]])
    assert ahead[0] - ahead[2] > even[0] - even[2]
    half, none = (win_rate_of(verdicts, tie_share=share) for share in (0.5, 0.0))
    assert half[1] > half[0]
    assert none[1] < none[0]


def test_it_learns_which_questions_are_hard() -> None:
    train, _ = three_kinds(120)
    test, kinds = three_kinds(100, start=150)
    router = BertRouter(Bert(trainer=Trainer(max_epochs=2))).fit(train, seed=0)
    prompts, labels = test.labels()
    assert area_under_curve(router.win_rate(prompts), labels > 0.5) > 0.85
    verdicts = router.predictions(prompts)
    for kind in np.unique(kinds):  # each class is told from the other two, the tie as well
        assert area_under_curve(verdicts[:, kind], kinds == kind) > 0.75


def test_the_trajectory_is_the_committed_one(tiny: str) -> None:
    found = [(entry["train_loss"], entry["validation_loss"]) for entry in fitted(tiny).history_]
    assert np.allclose(np.array(found, dtype=float), GOLDEN, rtol=0, atol=1e-4)


def test_the_best_epoch_is_kept_and_patience_ends_the_training(tiny: str) -> None:
    validation = data(20, start=60)
    router = fitted(tiny, learning_rate=3e-2, max_epochs=30, patience=2)
    losses = [float(entry["validation_loss"] or 0) for entry in router.history_]
    assert len(losses) == int(np.argmin(losses)) + 1 + 2 < 30
    prompts, labels = validation.labels()
    found = cross_entropy(router.predictions(prompts), verdict_shares(labels))
    assert found == pytest.approx(min(losses), abs=1e-9)


def test_the_win_rate_counts_half_a_tie(tiny: str) -> None:
    router = fitted(tiny, max_epochs=1)
    strong, tie, weak = router.predictions(PROMPTS).T
    assert np.allclose(strong + tie + weak, 1)
    assert np.allclose(router.win_rate(PROMPTS), strong + tie / 2)
    router.config = router.config.model_copy(update={"tie_share": 0.0})
    assert np.allclose(router.win_rate(PROMPTS), strong)


def test_another_seed_gives_other_numbers(tiny: str) -> None:
    first, second = (
        BertRouter(settings(tiny)).fit(data(), seed=seed).win_rate(PROMPTS) for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_training_leaves_no_trace(tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(tiny, max_epochs=1)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert capfd.readouterr() == ("", "")


def test_a_saved_router_needs_no_encoder_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    router = fitted(str(folder), max_epochs=1)
    router.save(tmp_path / "router")
    for path in folder.iterdir():
        path.unlink()
    loaded = BertRouter.load(tmp_path / "router")
    assert np.array_equal(loaded.win_rate(PROMPTS), router.win_rate(PROMPTS))
    assert loaded.history_ == router.history_


def test_bad_settings_are_explained(tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"trained_layers is 9.*2 layers.*Correct"):
        BertRouter(settings(tiny).model_copy(update={"trained_layers": 9})).fit(data(), seed=0)
    with pytest.raises(ArtifactError, match=r"(?s)'nobody/nothing' cannot be loaded.*Check"):
        fitted("nobody/nothing")
    with pytest.raises(ConfigError, match=r"'bert' diverged.*Lower trainer.learning_rate"):
        fitted(tiny, learning_rate=1e30)
