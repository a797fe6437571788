"""The fine-tuned router: what it learns and keeps, and that it repeats itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.errors import ArtifactError, ConfigError
from conf.routers import Hybrid, Trainer
from router_models import hybrid
from router_models.fine_tuned import TokenBatches
from router_models.hybrid import HybridRouter
from router_models.training_data import Comparisons

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
RECORDS = [json.loads(line) for line in LINES]
# What the tiny encoder below learned in three epochs, here, with torch 2.13 on one thread.
GOLDEN = [(0.713706, 0.688460), (0.684145, 0.680693), (0.670263, 0.676526)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other processes share the cores; threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_tiny_encoder(folder: Path, *, kind: str = "bert") -> Path:
    """Save a random two-layer encoder with a real WordPiece tokenizer of the bundled words."""
    from transformers import BertConfig, BertModel, BertTokenizer, DebertaV2Config
    from transformers import DebertaV2Model as Deberta

    words = sorted({word for record in RECORDS for word in record["text"].lower().split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz?", *words]
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "bert":
            model = BertModel(BertConfig(**shape), add_pooling_layer=False)
        else:
            model = Deberta(
                DebertaV2Config(
                    **shape, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
                )
            )
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("tiny")))


def settings(encoder: str, **trainer: Any) -> Hybrid:
    """Return settings that suit the tiny encoder."""
    fast = {"learning_rate": 2e-3, "head_learning_rate": 1e-2, "max_epochs": 3, "patience": 9}
    return Hybrid(encoder=encoder, trained_layers=None, trainer=Trainer(**(fast | trainer)))


def data(count: int = 60, *, start: int = 0) -> Comparisons:
    """Return questions whose domain decides whether the weak LLM will do."""
    order = np.random.default_rng(1).permutation(len(RECORDS))[start : start + count]
    hard = {"capital", "region", "river"}
    win_rate = [0.9 if RECORDS[row]["domain"] in hard else 0.1 for row in order]
    prompts = [RECORDS[row]["text"] for row in order]
    return Comparisons.from_win_rates(prompts, np.array(win_rate), weak="small", strong="large")


def area_under_curve(win_rate: np.ndarray, positive: np.ndarray) -> float:
    above = win_rate[positive][:, None] - win_rate[~positive][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def cross_entropy(win_rate: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.mean(labels * np.log(win_rate) + (1 - labels) * np.log(1 - win_rate)))


def test_it_learns_which_questions_are_hard() -> None:
    test = data(150, start=150)
    config = Hybrid(trainer=Trainer(max_epochs=2))
    router = HybridRouter(config).fit(data(120), data(30, start=120), seed=0)
    prompts, labels = test.labels()
    assert area_under_curve(router.win_rate(prompts), labels > 0.5) > 0.9


def test_shuffled_labels_teach_nothing() -> None:
    train = data(120)
    shuffled = Comparisons.from_win_rates(
        train.prompts,
        np.random.default_rng(2).permutation(train.a_wins),
        weak="small",
        strong="large",
    )
    prompts, labels = data(150, start=150).labels()
    router = HybridRouter(Hybrid(trainer=Trainer(max_epochs=2))).fit(shuffled, seed=0)
    assert abs(area_under_curve(router.win_rate(prompts), labels > 0.5) - 0.5) < 0.2


def test_the_trajectory_is_the_committed_one(tiny: str) -> None:
    router = HybridRouter(settings(tiny)).fit(data(), data(20, start=60), seed=0)
    found = [(entry["train_loss"], entry["validation_loss"]) for entry in router.history_]
    assert np.allclose(np.array(found, dtype=float), GOLDEN, rtol=0, atol=1e-4)


def test_the_best_epoch_is_kept(tiny: str) -> None:
    validation = data(20, start=60)
    # Labels that nothing can be learned from: the better the fit, the worse the validation.
    labels = np.random.default_rng(0).permutation(validation.a_wins)
    validation = Comparisons.from_win_rates(validation.prompts, labels, weak="w", strong="s")
    config = settings(tiny, learning_rate=3e-2, max_epochs=6)
    router = HybridRouter(config).fit(data(), validation, seed=0)
    losses = [float(entry["validation_loss"] or 0) for entry in router.history_]
    assert len(losses) == 6
    assert min(losses) < losses[-1]
    prompts, labels = validation.labels()
    assert cross_entropy(router.win_rate(prompts), labels) == pytest.approx(min(losses), abs=1e-9)


def test_training_stops_when_patience_is_spent(tiny: str) -> None:
    config = settings(tiny, learning_rate=3e-2, max_epochs=30, patience=2)
    router = HybridRouter(config).fit(data(), data(20, start=60), seed=0)
    losses = [float(entry["validation_loss"] or 0) for entry in router.history_]
    assert len(losses) == int(np.argmin(losses)) + 1 + 2 < 30


def test_without_validation_the_last_epoch_is_kept(tiny: str) -> None:
    router = HybridRouter(settings(tiny)).fit(data(), seed=0)
    assert [entry["validation_loss"] for entry in router.history_] == [None] * 3
    assert router.history_[-1]["learning_rate"] == 0.0


def test_another_seed_gives_other_numbers(tiny: str) -> None:
    prompts = list(data().prompts)
    first, second = (
        HybridRouter(settings(tiny)).fit(data(), seed=seed).win_rate(prompts) for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_the_callers_random_state_is_left_alone(tiny: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    HybridRouter(settings(tiny, max_epochs=1)).fit(data(), seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_says_nothing(tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    HybridRouter(settings(tiny, max_epochs=1)).fit(data(), seed=0)
    assert capfd.readouterr() == ("", "")


def test_progress_counts_steps(tiny: str) -> None:
    seen: list[tuple[int, int]] = []
    HybridRouter(settings(tiny)).fit(
        data(), seed=0, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(step, 12) for step in range(1, 13)]


def test_a_training_killed_after_its_last_epoch_does_not_go_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny, learning_rate=3e-2, max_epochs=30, patience=1)
    with monkeypatch.context() as patch:
        patch.setattr(hybrid.Path, "unlink", lambda path, missing_ok: None)
        whole = HybridRouter(config).fit(data(), data(20, start=60), seed=0, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    steps: list[int] = []
    resumed = HybridRouter(config).fit(
        data(),
        data(20, start=60),
        seed=0,
        directory=tmp_path,
        on_progress=lambda done, total: steps.append(done),
    )
    prompts = [record["text"] for record in RECORDS[:40]]
    assert steps == []
    assert resumed.history_ == whole.history_
    assert np.array_equal(resumed.win_rate(prompts), whole.win_rate(prompts))


def test_a_checkpoint_of_another_training_is_not_used(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hybrid.Path, "unlink", lambda path, missing_ok: None)
        HybridRouter(settings(tiny)).fit(data(), seed=0, directory=tmp_path)
    left = set(tmp_path.iterdir())
    steps: list[int] = []
    HybridRouter(settings(tiny)).fit(
        data(), seed=1, directory=tmp_path, on_progress=lambda done, total: steps.append(done)
    )
    assert len(steps) == 12
    assert set(tmp_path.iterdir()) == left


def test_a_damaged_checkpoint_is_set_aside(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hybrid.Path, "unlink", lambda path, missing_ok: None)
        whole = HybridRouter(settings(tiny)).fit(data(), seed=0, directory=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.warns(RuntimeWarning, match="damaged .* training starts"):
        again = HybridRouter(settings(tiny)).fit(data(), seed=0, directory=tmp_path)
    prompts = list(data().prompts)
    assert np.array_equal(again.win_rate(prompts), whole.win_rate(prompts))


@pytest.mark.parametrize("layers", [1, None])
def test_deberta_is_trained_by_the_same_code(layers: int | None, tmp_path: Path) -> None:
    encoder = str(save_tiny_encoder(tmp_path / "deberta", kind="deberta"))
    config = settings(encoder, max_epochs=2).model_copy(update={"trained_layers": layers})
    router = HybridRouter(config).fit(data(), data(20, start=60), seed=0)
    assert router.history_[-1]["train_loss"] < router.history_[0]["train_loss"]  # type: ignore[operator]
    prompts = list(data().prompts)
    router.save(tmp_path / "router")
    for path in (tmp_path / "deberta").iterdir():
        path.unlink()  # the saved router must not need it
    loaded = HybridRouter.load(tmp_path / "router")
    assert np.array_equal(loaded.win_rate(prompts), router.win_rate(prompts))


def test_only_the_asked_for_layers_change(tiny: str) -> None:
    config = settings(tiny).model_copy(update={"trained_layers": 1})
    trained = HybridRouter(config).fit(data(), seed=0).network_["encoder"]
    before, _ = hybrid.load_transformer(tiny)
    changed = {
        name.split(".layer.")[-1].split(".")[0] if ".layer." in name else "embeddings"
        for (name, old), new in zip(before.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {"1"}


def test_bad_settings_are_explained(tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"trained_layers is 9.*2 layers.*Correct"):
        HybridRouter(settings(tiny).model_copy(update={"trained_layers": 9})).fit(data(), seed=0)
    with pytest.raises(ConfigError, match=r"'./nowhere' is no folder.*Correct the path"):
        HybridRouter(settings("./nowhere")).fit(data(), seed=0)
    with pytest.raises(
        ArtifactError, match=r"(?s)'nobody/nothing' cannot be loaded.*Check the name"
    ):
        HybridRouter(settings("nobody/nothing")).fit(data(), seed=0)
    with pytest.raises(ConfigError, match=r"diverged.*Lower"):
        HybridRouter(settings(tiny, learning_rate=1e30)).fit(data(), seed=0)
    # With a single step, the training loss is that of the weights before it.
    config = settings(tiny, learning_rate=1e30, max_epochs=1, batch_size=64)
    with pytest.raises(ConfigError, match=r"diverged.*nan in validation.*Lower"):
        HybridRouter(config).fit(data(), data(20, start=60), seed=0)
    with pytest.raises(ConfigError, match=r"strategy 'nonsense'.*Correct trainer"):
        HybridRouter(settings(tiny, strategy="nonsense")).fit(data(), seed=0)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"accelerator 'gpu'.*what this machine has"):
            HybridRouter(settings(tiny, accelerator="gpu")).fit(data(), seed=0)


@pytest.mark.parametrize(("rows", "size", "ranks"), [(1, 4, 1), (50, 4, 1), (50, 4, 3), (3, 8, 4)])
def test_every_device_makes_the_same_steps_and_no_query_is_lost(
    rows: int, size: int, ranks: int
) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, rows)
    ids = [[row + 1] * length for row, length in enumerate(lengths)]
    seen: list[int] = []
    for rank in range(ranks):
        batches = TokenBatches(ids, np.arange(rows) / rows, size=size, padding=0, seed=0)
        batches.rank, batches.ranks = rank, ranks
        made = list(batches)
        assert len(made) == len(batches) == -(-rows // (size * ranks))
        for tokens, mask, labels in made:
            assert torch.equal(mask, (tokens > 0).long())
            assert np.allclose(labels.numpy(), (tokens[:, 0].numpy() - 1) / rows)
            seen += tokens[:, 0].tolist()
    assert set(seen) == set(range(1, rows + 1))
    if ranks == 1:
        assert len(seen) == rows
