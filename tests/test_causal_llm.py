"""The language model router: its prompt, its exact probabilities, what it learns and keeps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hybrid import RECORDS, area_under_curve, data

from conf.errors import ArtifactError, ConfigError
from conf.routers import CausalLLM, Trainer
from router_models import causal_llm
from router_models.causal_llm import CausalLLMRouter
from router_models.training_data import Comparisons
from router_models.transformer import quiet_transformers

PROMPTS = [record["text"] for record in RECORDS[:40]]
CHAT = "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}<|turn|>"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Other processes share the cores; threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_tiny_llm(folder: Path, *, kind: str = "llama", chat: str | None = None) -> Path:
    """Save a random two-layer language model whose tokens are bytes, common words and `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    special = ["<s>", "<pad>", "<|turn|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*special, *letters])}
    merges: list[tuple[str, str]] = []
    for word in ("Ġcapital", "Ġregion", "Ġriver", "Ġcurrency", "Ġlanguage"):
        for length in range(1, len(word)):
            merge = (word[:length], word[length])
            if merge not in merges:
                merges.append(merge)
                vocabulary.setdefault("".join(merge), len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # A tokenizer that closes every text: the prompt must not be closed before the answer.
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|turn|>"],
    )
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 160,
        "initializer_range": 0.2,
        "pad_token_id": 1,
    }
    grouped: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, **grouped))
        elif kind == "gemma":
            capped: dict[str, Any] = {
                "head_dim": 8,
                "final_logit_softcapping": 0.5,
                "query_pre_attn_scalar": 8,
            }
            model = Gemma2ForCausalLM(Gemma2Config(**shape, **grouped, **capped))
        else:
            model = GPT2LMHeadModel(GPT2Config(**shape))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llm(tmp_path_factory.mktemp("tiny")))


def settings(model: str, *, changes: dict[str, Any] | None = None, **trainer: Any) -> CausalLLM:
    """Return settings that suit the tiny model."""
    fast = {"learning_rate": 1e-2, "max_epochs": 3, "patience": 9, "batch_size": 16}
    own: dict[str, Any] = {"template": "Q:{query}\nA:", "max_length": 96, "rank": 4, "alpha": 8}
    return CausalLLM(model=model, trainer=Trainer(**(fast | trainer)), **(own | (changes or {})))


def fitted(model: str, **trainer: Any) -> CausalLLMRouter:
    return CausalLLMRouter(settings(model, **trainer)).fit(data(), data(20, start=60), seed=0)


def test_it_learns_which_questions_are_hard(tiny: str) -> None:
    router = CausalLLMRouter(settings(tiny, max_epochs=8)).fit(data(150), seed=0)
    prompts, labels = data(150, start=150).labels()
    assert area_under_curve(router.win_rate(prompts), labels > 0.5) > 0.85
    assert router.history_[-1]["train_loss"] < router.history_[0]["train_loss"]  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_verdicts_are_those_of_the_model_itself(kind: str, tmp_path: Path) -> None:
    """Against a plain loop: one prompt at a time, the whole logits, no padding, no hook."""
    folder = str(save_tiny_llm(tmp_path / "model", kind=kind))
    router = fitted(folder, max_epochs=1)
    labels = [router.tokenizer_.convert_tokens_to_ids(label) for label in "ABC"]
    for prompt, found in zip(PROMPTS[:8], router.predictions(PROMPTS[:8]), strict=True):
        ids = router.tokenizer_(f"Q:{prompt}\nA:", return_tensors="pt").input_ids[:, :-1]
        with torch.inference_mode():
            logits = router.network_(input_ids=ids).logits[0, -1, labels]
        assert np.allclose(found, logits.softmax(0).numpy(), atol=1e-6)
    if kind == "gemma":  # the cap on logits is part of the model
        assert found.max() / found.min() < np.exp(1.0)


def test_padding_changes_no_loss(tiny: str) -> None:
    from router_models.fine_tuned import TokenBatches

    router = fitted(tiny, max_epochs=1)
    ids = router._tokens(router.network_, router.tokenizer_, PROMPTS[:6])
    assert len({len(tokens) for tokens in ids}) > 1
    batches = TokenBatches(ids, np.zeros((6, 3)), size=6, padding=1, seed=0)
    batch, mask, _ = batches.batch(np.arange(6))
    padded = router._logits(router.network_, batch, mask).softmax(dim=1).detach().numpy()
    assert np.allclose(padded, router.predictions(PROMPTS[:6]), atol=1e-6)


def test_the_win_rate_counts_half_a_tie(tiny: str) -> None:
    router = fitted(tiny, max_epochs=1)
    strong, tie, weak = router.predictions(PROMPTS).T
    assert np.allclose(strong + tie + weak, 1)
    assert np.allclose(router.win_rate(PROMPTS), strong + tie / 2)
    router.config = router.config.model_copy(update={"tie_share": 0.0})
    assert np.allclose(router.win_rate(PROMPTS), strong)


def test_the_prompt_is_whole_whatever_the_query(tmp_path: Path) -> None:
    folder = str(save_tiny_llm(tmp_path, chat=CHAT))
    model, tokenizer = causal_llm._language_model(folder)
    prompt = causal_llm._prompt(model, tokenizer, settings(folder))
    (ids,) = prompt.token_ids(tokenizer, ["Hi"])
    assert tokenizer.decode(ids) == "<|turn|>Q:Hi\nA:<|end|><|turn|>"
    long, spelled = prompt.token_ids(tokenizer, ["x" * 500, "<|end|><|turn|>A"])
    assert len(long) == len(ids) - 2 + 96
    assert long[-len(prompt.after) :] == list(prompt.after)
    assert spelled.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1
    plain = causal_llm._prompt(model, tokenizer, settings(folder, changes={"chat": False}))
    assert tokenizer.decode(plain.token_ids(tokenizer, ["Hi"])[0]) == "<s>Q:Hi\nA:"


def test_only_the_adapter_is_trained_and_kept(tiny: str, tmp_path: Path) -> None:
    router = fitted(tiny, max_epochs=1)
    assert all(".lora_A." in name or ".lora_B." in name for name in router.adapter_)
    before, _ = causal_llm._language_model(tiny)
    changed = {
        name.split(".")[-2]
        for name, weight in before.state_dict().items()
        if not torch.equal(weight, router.network_.state_dict()[name])
    }
    blocks = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == blocks
    router.save(tmp_path)
    # What is saved is an adapter as PEFT knows it.
    from peft import PeftModel

    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == tiny
    with quiet_transformers():
        theirs: Any = PeftModel.from_pretrained(before, str(tmp_path / "adapter"))
    theirs = theirs.merge_and_unload()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, router.network_.state_dict()[name])


def test_a_saved_router_needs_no_base_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny_llm(tmp_path / "model", chat=CHAT)
    router = fitted(str(folder), max_epochs=1)
    router.save(tmp_path / "router")
    for path in folder.iterdir():
        path.unlink()
    loaded = CausalLLMRouter.load(tmp_path / "router")
    assert np.array_equal(loaded.win_rate(PROMPTS), router.win_rate(PROMPTS))
    loaded.save(tmp_path / "router")  # over the files that it was loaded from
    again = CausalLLMRouter.load(tmp_path / "router")
    assert np.array_equal(again.win_rate(PROMPTS), router.win_rate(PROMPTS))
    assert np.array_equal(loaded.win_rate(PROMPTS), router.win_rate(PROMPTS))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_packaged_base_is_verified(
    precision: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model in the packaged one's place; its "GGUF file" is whatever file has a digest."""
    gguf = tmp_path / "packaged.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(causal_llm, "smollm2_gguf", lambda: gguf)
    monkeypatch.setattr(causal_llm, "dequantised_directory", lambda path: Path(tiny))
    router = fitted("smollm2-135m", max_epochs=1, precision=precision)
    router.save(tmp_path / "router")
    assert not (tmp_path / "router" / "model").exists()
    loaded = CausalLLMRouter.load(tmp_path / "router")
    assert np.array_equal(loaded.win_rate(PROMPTS), router.win_rate(PROMPTS))
    gguf.write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match=r"smollm2-135m is \w+ here.*Install the same package"):
        CausalLLMRouter.load(tmp_path / "router")


def test_training_leaves_no_trace(tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(tiny, max_epochs=1).win_rate(PROMPTS)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert capfd.readouterr() == ("", "")


def test_bad_settings_are_explained(tiny: str) -> None:
    def refusal(**changes: Any) -> CausalLLMRouter:
        config = settings(tiny, changes=changes)
        return CausalLLMRouter(config).fit(data(), seed=0)

    with pytest.raises(ConfigError, match=r"max_length is 500.*reads 160.*at most 154. Lower it"):
        refusal(max_length=500)
    with pytest.raises(ConfigError, match=r"'strong' is 6 tokens.*single known token.*Choose"):
        refusal(label_tokens=("strong", "tie", "weak"))
    with pytest.raises(ConfigError, match=r"'' is 0 tokens.*single known token"):
        refusal(label_tokens=("A", "", "C"))
    with pytest.raises(ConfigError, match=r"three different ones. Correct label_tokens"):
        refusal(label_tokens=("A", "B", "A"))
    with pytest.raises(ConfigError, match=r"holds \{query\} 0 times.*Correct template"):
        refusal(template="Who wins?")
    with pytest.raises(ConfigError, match=r"diverged.*Lower trainer.learning_rate"):
        fitted(tiny, learning_rate=1e30)
    for nowhere in ("./nowhere", "nobody/nothing", ""):
        with pytest.raises(ArtifactError, match=r"(?s)cannot be loaded:.*Check the name"):
            fitted(nowhere)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_llm(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 weights are not in its files.*up_proj"):
        fitted(str(tmp_path))


@pytest.mark.slow
def test_the_packaged_model_is_tuned_and_found_again(tmp_path: Path) -> None:
    config = CausalLLM(trainer=Trainer(max_epochs=2, batch_size=4), max_length=32)
    train = data(8)
    router = CausalLLMRouter(config).fit(train, seed=0)
    first, last = router.history_[0]["train_loss"], router.history_[-1]["train_loss"]
    assert last < first  # type: ignore[operator]
    router.save(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 20e6
    loaded = CausalLLMRouter.load(tmp_path)
    prompts = list(train.prompts)
    assert np.array_equal(loaded.win_rate(prompts), router.win_rate(prompts))


def test_own_defaults_stay_where_nothing_is_set() -> None:
    assert CausalLLM(trainer=Trainer(max_epochs=1)).trainer.batch_size == 8
    read = CausalLLM.model_validate({"trainer": {"patience": 1}})
    assert CausalLLM.model_validate_json(read.model_dump_json()) == read


def test_a_battle_between_others_teaches_nothing(tiny: str) -> None:
    own = data(20)
    others = Comparisons.from_win_rates(own.prompts, 1 - own.a_wins, weak="cheap", strong="costly")
    mixed = Comparisons(
        own.prompts + others.prompts,
        own.llm_a + others.llm_a,
        own.llm_b + others.llm_b,
        np.concatenate([own.a_wins, others.a_wins]),
        weak=own.weak,
        strong=own.strong,
    )
    config = settings(tiny, max_epochs=1)
    with_others = CausalLLMRouter(config).fit(mixed, seed=0).win_rate(PROMPTS)
    assert np.array_equal(with_others, CausalLLMRouter(config).fit(own, seed=0).win_rate(PROMPTS))
