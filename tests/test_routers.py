"""One contract for every router of the catalogue. A new router joins with a line in QUICK."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_causal_llm import save_tiny_llm

from conf.errors import ArtifactError, ConfigError, DataError
from conf.routers import (
    Bert,
    CausalLLM,
    Hybrid,
    KernelRidge,
    Knn,
    Length,
    MatrixFactorization,
    Random,
    SimilarityWeighted,
    Trainer,
)
from router_models.catalog import ROUTERS, build_router, load_router
from router_models.training_data import Comparisons

# Settings name it before a test can make it, so its place is fixed here and filled below.
TINY_LLM = Path(tempfile.gettempdir()) / f"turnout-tiny-llm-{os.getpid()}"
QUICK: dict[str, Any] = {
    "hybrid": Hybrid(trained_layers=1, max_length=64, trainer=Trainer(max_epochs=2, batch_size=32)),
    "knn": Knn(neighbours=(5, 10)),
    "kernel_ridge": KernelRidge(encoders=("minilm@4", "minilm"), weights=(2, 1)),
    "length": Length(),
    "random": Random(),
    "mf": MatrixFactorization(dimension=16, trainer=Trainer(max_epochs=2, learning_rate=3e-3)),
    "sw_ranking": SimilarityWeighted(),
    "bert": Bert(trained_layers=1, max_length=64, trainer=Trainer(max_epochs=2, batch_size=32)),
    "causal_llm": CausalLLM(
        model=str(TINY_LLM), template="{query}?", max_length=64, trainer=Trainer(max_epochs=2)
    ),
}
ROOT = Path(__file__).parent.parent
LINES = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
PROMPTS = [json.loads(line)["text"] for line in LINES[::8]][:60]
ODD = ["", " ", "Hi", "¿Qué? 東京 🦜 \u0000 \ud800", "word " * 50_000, "x" * 200_000]

# Fine-tuned routers, and a part of the names of weights that these settings do not train.
FROZEN = {"hybrid": "embeddings", "bert": "embeddings", "causal_llm": "base_layer"}

every_router = pytest.mark.parametrize("kind", sorted(ROUTERS))
every_fine_tuned = pytest.mark.parametrize("kind", sorted(FROZEN))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other processes share the cores, and threads that wait for each other take ten times as long.

    Without it the module is only slower.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def tiny_llm() -> Iterator[None]:
    """A small language model where QUICK looks for it."""
    save_tiny_llm(TINY_LLM)
    yield
    shutil.rmtree(TINY_LLM)


def comparisons(start: int = 0, stop: int = 48) -> Comparisons:
    """Return some of the bundled questions; those about cities and rivers are the hard ones."""
    random = np.random.default_rng(5)
    hard = np.array(["river" in prompt or "capital" in prompt for prompt in PROMPTS])
    win_rate = np.clip(np.where(hard, 0.8, 0.2) + random.normal(0, 0.1, len(PROMPTS)), 0, 1)
    return Comparisons.from_win_rates(
        PROMPTS[start:stop], win_rate[start:stop], weak="small", strong="large"
    )


@cache
def fitted(kind: str) -> Any:
    """Return the router, trained once for all tests that only ask it."""
    return build_router(QUICK[kind]).fit(comparisons(), comparisons(48, 60), seed=3)


def test_every_router_is_under_contract() -> None:
    assert set(QUICK) == set(ROUTERS)


@every_router
def test_a_win_rate_is_a_probability_per_prompt(kind: str) -> None:
    win_rate = fitted(kind).win_rate(PROMPTS)
    assert win_rate.shape == (60,)
    assert win_rate.dtype == np.float64
    assert np.all((win_rate >= 0) & (win_rate <= 1))
    assert len(np.unique(win_rate)) > 15  # ties cannot be split by a threshold


@every_router
def test_fit_returns_self_and_changes_no_input(kind: str) -> None:
    train = comparisons()
    before = train.a_wins.copy()
    router = build_router(QUICK[kind])
    assert router.fit(train, seed=3) is router
    assert np.array_equal(train.a_wins, before)
    assert train.prompts == comparisons().prompts


@every_router
def test_the_same_seed_gives_the_same_numbers(kind: str) -> None:
    again = build_router(QUICK[kind]).fit(comparisons(), comparisons(48, 60), seed=3)
    assert np.array_equal(again.win_rate(PROMPTS), fitted(kind).win_rate(PROMPTS))


@every_router
def test_order_and_company_do_not_matter(kind: str) -> None:
    router = fitted(kind)
    together = router.win_rate(PROMPTS)
    order = np.random.default_rng(0).permutation(60)
    shuffled = router.win_rate([PROMPTS[row] for row in order])
    assert np.allclose(shuffled, together[order], rtol=0, atol=1e-6)
    alone = [router.win_rate([prompt])[0] for prompt in PROMPTS[:12]]
    assert np.allclose(alone, together[:12], rtol=0, atol=1e-6)
    among_odd = router.win_rate([*ODD, *PROMPTS[:5], *PROMPTS[:5]])
    assert np.allclose(among_odd[len(ODD) :], np.tile(together[:5], 2), rtol=0, atol=1e-6)


@every_router
def test_odd_prompts_have_win_rates(kind: str) -> None:
    win_rate = fitted(kind).win_rate(ODD)
    assert win_rate.shape == (len(ODD),)
    assert np.all((win_rate >= 0) & (win_rate <= 1))


@every_router
def test_no_prompts_give_no_win_rates(kind: str) -> None:
    assert fitted(kind).win_rate([]).shape == (0,)
    assert fitted(kind).win_rate([]).dtype == np.float64


@every_router
def test_odd_prompts_can_be_trained_on(kind: str) -> None:
    train = Comparisons.from_win_rates(
        [*ODD, *PROMPTS[:4]], np.linspace(0, 1, len(ODD) + 4), weak="small", strong="large"
    )
    assert np.isfinite(build_router(QUICK[kind]).fit(train, seed=0).win_rate(PROMPTS)).all()


@every_router
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_that_are_all_alike_can_be_trained_on(kind: str, label: float) -> None:
    train = Comparisons.from_win_rates(PROMPTS[:3], np.full(3, label), weak="small", strong="large")
    win_rate = build_router(QUICK[kind]).fit(train, seed=0).win_rate(PROMPTS)
    assert np.all((win_rate >= 0) & (win_rate <= 1))


@every_router
def test_one_row_is_enough_to_train_on(kind: str) -> None:
    train = Comparisons.from_win_rates(PROMPTS[:1], np.array([0.5]), weak="a", strong="b")
    assert np.isfinite(build_router(QUICK[kind]).fit(train, seed=0).win_rate(PROMPTS)).all()


@every_router
def test_a_router_that_learned_nothing_says_so(kind: str, tmp_path: Path) -> None:
    router = build_router(QUICK[kind])
    with pytest.raises(ArtifactError, match=r"learned nothing yet.*Call one of them first"):
        router.win_rate(["a question"])
    with pytest.raises(ArtifactError, match="learned nothing yet"):
        router.save(tmp_path)


@every_router
def test_a_saved_router_gives_the_same_numbers(kind: str, tmp_path: Path) -> None:
    fitted(kind).save(tmp_path / "router")
    loaded = load_router(tmp_path / "router")
    assert type(loaded) is ROUTERS[kind]
    assert loaded.config == QUICK[kind]
    assert loaded.history_ == fitted(kind).history_
    expected = fitted(kind).win_rate(PROMPTS)
    assert np.allclose(loaded.win_rate(PROMPTS), expected, rtol=0, atol=1e-6)
    loaded.save(tmp_path / "router")  # over itself
    assert np.allclose(load_router(tmp_path / "router").win_rate(PROMPTS), expected, atol=1e-6)


@every_router
def test_nothing_saved_is_a_pickle(kind: str, tmp_path: Path) -> None:
    fitted(kind).save(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".model"}


@every_router
def test_damage_is_noticed(kind: str, tmp_path: Path) -> None:
    fitted(kind).save(tmp_path)
    listed = json.loads((tmp_path / "router.json").read_text())["files"]
    for name in listed:
        original = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(original[:-1] + b"#")
        with pytest.raises(ArtifactError, match="missing or was changed"):
            load_router(tmp_path)
        (tmp_path / name).write_bytes(original)
    load_router(tmp_path)


@every_router
def test_another_routers_folder_is_refused(kind: str, tmp_path: Path) -> None:
    other = "random" if kind != "random" else "length"
    fitted(other).save(tmp_path)
    with pytest.raises(ArtifactError, match=f"holds a '{other}' router"):
        ROUTERS[kind].load(tmp_path)


@every_router
def test_a_pair_that_never_met_is_refused(kind: str) -> None:
    if kind == "random":
        pytest.skip("looks at no comparison")
    train = Comparisons(("a", "b"), ("x", "y"), ("y", "x"), np.array([0.5, 0.5]), "s", "l")
    with pytest.raises(DataError, match="never compared"):
        build_router(QUICK[kind]).fit(train, seed=0)


@every_router
def test_nothing_is_left_in_the_working_directory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_router(QUICK[kind]).fit(comparisons(0, 8), comparisons(8, 12), seed=0)
    assert list(tmp_path.iterdir()) == []


@every_router
def test_training_history_can_be_logged(kind: str) -> None:
    for epoch, entry in enumerate(fitted(kind).history_):
        assert set(entry) == {"epoch", "train_loss", "validation_loss", "learning_rate"}
        assert entry["epoch"] == epoch


@every_router
def test_the_docstring_answers_the_same_questions(kind: str) -> None:
    text = ROUTERS[kind].__doc__ or ""
    for heading in ("Idea:", "Source:", "Requirements:", "Relations:", ">>>"):
        assert heading in text


@every_router
def test_methods_stand_in_the_same_order(kind: str) -> None:
    classes = [vars(part) for part in reversed(ROUTERS[kind].__mro__)]
    public = [
        name for name in dict.fromkeys(chain(*classes)) if callable(getattr(ROUTERS[kind], name))
    ]
    public = [name for name in public if not name.startswith("_")]
    assert public[:4] == ["fit", "win_rate", "save", "load"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path[:0] = sys.argv[4:]
torch.set_num_threads(1)
from test_routers import QUICK, build_router, comparisons

def die(done, total):
    if done == total // 2 + 1:  # in the second of two epochs
        os.kill(os.getpid(), signal.SIGKILL)

kind, config, directory = sys.argv[1:4]
build_router(type(QUICK[kind]).model_validate_json(config)).fit(
    comparisons(), comparisons(48, 60), seed=3, directory=Path(directory), on_progress=die
)
"""


@every_fine_tuned
def test_a_killed_training_goes_on_to_the_same_numbers(kind: str, tmp_path: Path) -> None:
    import torch

    given = [kind, QUICK[kind].model_dump_json(), str(tmp_path), str(ROOT), str(ROOT / "tests")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *given], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    (checkpoint,) = tmp_path.iterdir()
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert kept
    assert not any(FROZEN[kind] in name for name in kept)  # an LLM has gigabytes of these

    steps: list[tuple[int, int]] = []
    resumed = build_router(QUICK[kind]).fit(
        comparisons(),
        comparisons(48, 60),
        seed=3,
        directory=tmp_path,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[0][0] == steps[0][1] // 2 + 1  # the first epoch was not repeated
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(resumed.win_rate(PROMPTS), fitted(kind).win_rate(PROMPTS))
    assert resumed.history_ == fitted(kind).history_


@every_fine_tuned
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_for_training_only(kind: str, precision: str, tmp_path: Path) -> None:
    trainer = QUICK[kind].trainer.model_copy(update={"precision": precision, "max_epochs": 1})
    router = build_router(QUICK[kind].model_copy(update={"trainer": trainer}))
    router.fit(comparisons(), comparisons(48, 60), seed=3)
    win_rate = router.win_rate(PROMPTS)
    assert np.isfinite(win_rate).all()
    assert len(np.unique(win_rate)) > 15
    router.save(tmp_path)
    assert np.array_equal(load_router(tmp_path).win_rate(PROMPTS), win_rate)


@pytest.mark.parametrize("kind", ["hybrid", "bert"])
def test_an_empty_text_is_read_where_no_token_is_put_around_it(kind: str, tmp_path: Path) -> None:
    save_tiny_llm(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    router = build_router(QUICK[kind].model_copy(update={"encoder": str(tmp_path)}))
    router.fit(comparisons(0, 8), seed=0)
    assert np.isfinite(router.win_rate(["", "Hi"])).all()


def test_saved_routers_load_in_a_clean_process_without_network(tmp_path: Path) -> None:
    for kind in ROUTERS:
        fitted(kind).save(tmp_path / kind)
    script = """
import json, socket, sys
from pathlib import Path
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
from router_models.catalog import load_router
prompts = json.loads(sys.argv[2])
found = {p.name: load_router(p).win_rate(prompts).tolist() for p in Path(sys.argv[1]).iterdir()}
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), json.dumps(PROMPTS[:10])],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert done.stderr == ""
    for kind in ROUTERS:
        assert np.allclose(found[kind], fitted(kind).win_rate(PROMPTS[:10]), rtol=0, atol=1e-6)


def test_the_catalogue_is_cheap_to_import() -> None:
    script = (
        "import sys, router_models.catalog;"
        "print([name for name in ('torch', 'lightning', 'transformers', 'prefect', 'mlflow',"
        " 'evaluate') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_router_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown router 'knm'. Did you mean 'knn'"):
        build_router(Knn.model_construct(router="knm"))
    fitted("random").save(tmp_path)
    manifest = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps(manifest | {"router": "mystery"}))
    with pytest.raises(ArtifactError, match="Unknown router 'mystery'"):
        load_router(tmp_path)
