"""BARTScore against a plain loop: one pair at a time, no batches, no cache, no padding."""

import math
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from conf.errors import ArtifactError, ConfigError, DataError
from metrics.bartscore.likelihood import Likelihood, ScorerSpec, load_likelihood
from router_models.packaged import smollm2_gguf

ROOT = Path(__file__).resolve().parents[1]
TEXT = "the a of is was capital city river in to and not Paris Rome Bonn Oslo Lima"
WORDS = TEXT.split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEMPLATE = "the {source} is"

SOURCES = ["the capital of Rome", "Paris", "the river in Bonn is not a city and was not in Lima"]
PAIRS = [
    (source, target)
    for source in SOURCES
    for target in ["Paris", "", "a city in Oslo", "a city in Oslo", "a city", "the " * 9 + "Rome"]
]


def _tokenizer(*, adds_special: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _saved(model: Any, directory: Path, *, adds_special: bool) -> Path:
    model.save_pretrained(directory)
    _tokenizer(adds_special=adds_special).save_pretrained(directory)
    return directory


def _bart(seed: int) -> BartForConditionalGeneration:
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=len(SPECIAL + WORDS),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.5,  # far from uniform, so that a mistake shows
    )
    return BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep tiny matrices on one thread: a second one spends its time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=32)
def _loaded(spec: ScorerSpec) -> Likelihood:
    """Load once for all tests that leave the model as it is."""
    return load_likelihood(spec)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(_bart(1), tmp_path_factory.mktemp("bart"), adds_special=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    # A tokenizer that closes every text: the prompt must not be closed before the target.
    return _saved(model, tmp_path_factory.mktemp("llama"), adds_special=True)


@pytest.fixture(params=["seq2seq", "causal"])
def spec_of(request: pytest.FixtureRequest, bart: Path, llama: Path) -> Callable[..., ScorerSpec]:
    checkpoint = {"seq2seq": bart, "causal": llama}[request.param]

    def spec(**settings: Any) -> ScorerSpec:
        return ScorerSpec(
            str(checkpoint),
            architecture=request.param,
            **{"max_length": 24, "template": TEMPLATE, "device": "cpu", **settings},
        )

    return spec


def _plain_seq2seq(scorer: Likelihood, source: str, target: str, max_length: int) -> float:
    """Score one pair as the published code does: full log-softmax, padding ignored, length all."""
    given = scorer.tokenizer([source], truncation=True, max_length=max_length, return_tensors="pt")
    wanted = scorer.tokenizer([target], truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        logits = scorer.model(**given, labels=wanted.input_ids).logits[0]
    loss = torch.nn.NLLLoss(reduction="none", ignore_index=scorer.model.config.pad_token_id)
    return -float(
        loss(logits.log_softmax(-1), wanted.input_ids[0]).sum() / wanted.input_ids.numel()
    )


def _plain_causal(scorer: Likelihood, source: str, target: str, max_length: int) -> float:
    source = " ".join(source.split()[:max_length])  # a token is a word here
    prompt = [0, *scorer.tokenizer.convert_tokens_to_ids(f"the {source} is".split())]
    words = target.split()[:max_length] or ["</s>"]
    tokens = prompt + scorer.tokenizer.convert_tokens_to_ids(words)
    with torch.no_grad():
        table = scorer.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(tokens))
    return sum(float(table[place - 1, tokens[place]]) for place in places) / len(places)


def _plain(scorer: Likelihood, pairs: list[tuple[str, str]]) -> np.ndarray:
    way = {"seq2seq": _plain_seq2seq, "causal": _plain_causal}[scorer.spec.architecture]
    return np.array([way(scorer, *pair, scorer.spec.max_length) for pair in pairs])


def _score(scorer: Likelihood, pairs: list[tuple[str, str]]) -> np.ndarray:
    return scorer.score([source for source, _ in pairs], [target for _, target in pairs])


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 200, None])
@pytest.mark.parametrize("max_length", [5, 24])
def test_scores_agree_with_one_pair_at_a_time(
    spec_of: Callable[..., ScorerSpec], tokens_per_batch: int | None, max_length: int
) -> None:
    scorer = _loaded(spec_of(tokens_per_batch=tokens_per_batch, max_length=max_length))
    scores = _score(scorer, PAIRS)
    np.testing.assert_allclose(scores, _plain(scorer, PAIRS), atol=1e-4)
    assert len(set(scores.round(6))) > len(PAIRS) / 2


@pytest.mark.parametrize("direction", ["reference_to_response", "response_to_reference", "f"])
def test_directions_agree_with_one_pair_at_a_time(
    spec_of: Callable[..., ScorerSpec], direction: str
) -> None:
    scorer = _loaded(spec_of(direction=direction))
    references, responses = [source for source, _ in PAIRS], [target for _, target in PAIRS]
    forwards = _plain(scorer, PAIRS)
    backwards = _plain(scorer, [(target, source) for source, target in PAIRS])
    expected = {
        "reference_to_response": forwards,
        "response_to_reference": backwards,
        "f": (forwards + backwards) / 2,
    }[direction]
    np.testing.assert_allclose(scorer.quality(responses, references), expected, atol=1e-4)


def test_a_spelled_out_padding_token_counts_as_published(bart: Path) -> None:
    scorer = _loaded(ScorerSpec(str(bart), max_length=24))
    pairs = [("Paris", "a city <pad> in Oslo"), ("Paris", "<pad>"), ("<pad> Rome", "Rome")]
    np.testing.assert_allclose(_score(scorer, pairs), _plain(scorer, pairs), atol=1e-4)


texts = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=12),
    budget=st.integers(1, 120),
    data=st.data(),
)
def test_company_does_not_change_a_score(
    spec_of: Callable[..., ScorerSpec], pairs: list[tuple[str, str]], budget: int, data: Any
) -> None:
    scorer = _loaded(spec_of(tokens_per_batch=budget))
    order = data.draw(st.permutations(range(len(pairs))))
    scores = _score(scorer, pairs)
    shuffled = _score(scorer, [pairs[number] for number in order] + pairs[:2])
    np.testing.assert_allclose(shuffled[: len(pairs)], scores[list(order)], atol=1e-5)
    np.testing.assert_allclose(scores, _plain(scorer, pairs), atol=1e-4)


def test_an_empty_target_scores_as_the_end_token(llama: Path) -> None:
    scorer = _loaded(ScorerSpec(str(llama), "causal", max_length=24, template=TEMPLATE))
    scores = scorer.score(["Paris"] * 4, ["", " \n", "</s>", " Rome\n"])
    assert scores[0] == scores[1] == scores[2]
    assert math.isfinite(scores[0])
    assert scores[3] == scorer.score(["Paris"], ["Rome"])[0]


def test_no_pairs_no_scores(spec_of: Callable[..., ScorerSpec]) -> None:
    assert _loaded(spec_of()).quality([], []).shape == (0,)


def test_each_source_is_encoded_once(bart: Path) -> None:
    scorer = load_likelihood(ScorerSpec(str(bart), max_length=24, tokens_per_batch=30))
    rows: list[int] = []
    scorer.model.get_encoder().register_forward_hook(
        lambda module, args, output: rows.append(output.last_hidden_state.shape[0])
    )
    _score(scorer, PAIRS)
    assert sum(rows) == len(SOURCES)


def test_shared_beginnings_are_read_once(llama: Path) -> None:
    scorer = load_likelihood(ScorerSpec(str(llama), "causal", max_length=24, template=TEMPLATE))
    read: list[int] = []
    scorer.model.model.register_forward_hook(
        lambda module, args, output: read.append(output.last_hidden_state.shape[1])
    )
    targets = ["a city in Oslo", "a city in Oslo", "a city in Lima", "a river"]
    _score(scorer, [("Paris", target) for target in targets])
    # <s> the Paris is, then "a city in": a target's last token is predicted, never read
    assert read == [4 + 3]


def test_progress_counts_responses_up_to_all(spec_of: Callable[..., ScorerSpec]) -> None:
    seen: list[int] = []
    scorer = _loaded(spec_of(direction="f", tokens_per_batch=20))
    scorer.quality(
        [target for _, target in PAIRS], [source for source, _ in PAIRS], on_progress=seen.append
    )
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert seen[-1] == len(PAIRS)


def test_out_of_memory_is_raised(spec_of: Callable[..., ScorerSpec]) -> None:
    scorer = load_likelihood(spec_of(tokens_per_batch=20))
    calls: list[int] = []

    def fail_late(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no room for the fourth batch")

    scorer.model.register_forward_pre_hook(fail_late)
    with pytest.raises(torch.OutOfMemoryError, match="fourth batch"):
        _score(scorer, PAIRS)


def test_scores_that_are_not_finite_are_refused(spec_of: Callable[..., ScorerSpec]) -> None:
    scorer = load_likelihood(spec_of())
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[SPECIAL.index("</s>") + 2] = math.nan
    with pytest.raises(DataError, match=r"scored nan.*finite log-likelihood"):
        _score(scorer, [("the", "the the")])


def test_bfloat16_comes_close(spec_of: Callable[..., ScorerSpec]) -> None:
    exact = _score(_loaded(spec_of()), PAIRS)
    rough = _score(_loaded(spec_of(dtype="bfloat16")), PAIRS)
    assert 0 < np.abs(exact - rough).max() < 0.5


def test_fingerprints_tell_apart_what_changes_scores(
    spec_of: Callable[..., ScorerSpec], tmp_path: Path
) -> None:
    spec = spec_of()
    copy = shutil.copytree(spec.checkpoint, tmp_path / "copy")
    known = spec.fingerprint()
    assert known.startswith(f"bartscore:{spec.architecture}:reference_to_response:24:")
    assert spec_of(tokens_per_batch=3, device="meta").fingerprint() == known
    moved = ScorerSpec(str(copy), spec.architecture, max_length=24, template=TEMPLATE)
    assert moved.fingerprint() == known
    others = [spec_of(direction="f"), spec_of(max_length=23), spec_of(dtype="bfloat16")]
    others.append(spec_of(overlay=str(copy / "model.safetensors")))
    assert len({known, *(other.fingerprint() for other in others)}) == 5
    same_template = spec_of(template="{source} so").fingerprint() == known
    assert same_template == (spec.architecture == "seq2seq")
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert moved.fingerprint() != known


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "reference_to_respons"}, "Did you mean 'reference_to_response'"),
        ({"architecture": "casual"}, "Did you mean 'causal'"),
        ({"dtype": "float16"}, "Did you mean 'bfloat16'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"template": "no place"}, "exactly once"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScorerSpec("anything", **settings)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "/no/such/model.gguf"])
def test_a_missing_checkpoint_is_never_replaced(name: str) -> None:
    for action in (load_likelihood, ScorerSpec.fingerprint):
        with pytest.raises(ArtifactError, match=r"no checkpoint at.*no other checkpoint"):
            action(ScorerSpec(name))


def test_an_unreachable_hub_checkpoint_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"'some/model' is neither.*no other checkpoint"):
        load_likelihood(ScorerSpec("some/model"))


def test_a_folder_without_weights_is_refused(bart: Path, tmp_path: Path) -> None:
    shutil.copy(bart / "config.json", tmp_path)
    for action in (load_likelihood, ScorerSpec.fingerprint):
        with pytest.raises(ArtifactError, match="holds no weights"):
            action(ScorerSpec(str(tmp_path)))


def test_a_lacking_weight_is_not_made_up(bart: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bart, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 weights are not in its files.*layers\.1\.fc1"):
        load_likelihood(ScorerSpec(str(copy), max_length=24))


def test_damaged_weights_are_refused(bart: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bart, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes((bart / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ArtifactError, match="Copy or download it again"):
        load_likelihood(ScorerSpec(str(copy), max_length=24))


def test_a_model_of_the_other_kind_is_refused(bart: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"which is seq2seq\. Expected causal"):
        load_likelihood(ScorerSpec(str(bart), "causal", max_length=24))
    with pytest.raises(ConfigError, match=r"which is causal\. Expected seq2seq"):
        load_likelihood(ScorerSpec(str(llama), max_length=24))


def test_longer_than_the_model_reads_is_refused(bart: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 65\. Expected at most the 64"):
        load_likelihood(ScorerSpec(str(bart), max_length=65))
    scorer = load_likelihood(ScorerSpec(str(llama), "causal", max_length=60, template=TEMPLATE))
    with pytest.raises(ConfigError, match="have 83 tokens together"):
        scorer.score(["the " * 40], ["a " * 40])


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    _saved(MambaForCausalLM(config), tmp_path, adds_special=False)
    with pytest.raises(ConfigError, match="attention-only"):
        load_likelihood(ScorerSpec(str(tmp_path), "causal", max_length=24))


def test_an_overlay_replaces_the_weights(bart: Path, tmp_path: Path) -> None:
    other = _bart(5)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    _saved(other, tmp_path / "whole", adds_special=True)
    laid = _loaded(ScorerSpec(str(bart), max_length=24, overlay=str(tmp_path / "other.pth")))
    whole = _loaded(ScorerSpec(str(tmp_path / "whole"), max_length=24))
    np.testing.assert_array_equal(_score(laid, PAIRS), _score(whole, PAIRS))


def test_an_overlay_that_does_not_fit_is_refused(bart: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    state = _bart(5).state_dict()
    torch.save({name: state[name] for name in list(state)[:9]}, path)
    with pytest.raises(ArtifactError, match=r"Cannot lay .*missing"):
        load_likelihood(ScorerSpec(str(bart), max_length=24, overlay=str(path)))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ArtifactError, match="Cannot lay"):
        load_likelihood(ScorerSpec(str(bart), max_length=24, overlay=str(path)))
    with pytest.raises(ArtifactError, match="Cannot read"):
        load_likelihood(ScorerSpec(str(bart), max_length=24, overlay=str(tmp_path / "none.pth")))


def test_texts_must_be_texts_and_pair_up(spec_of: Callable[..., ScorerSpec]) -> None:
    scorer = load_likelihood(spec_of())
    with pytest.raises(DataError, match="2 sources and 1 targets"):
        scorer.score(["a", "b"], ["c"])
    with pytest.raises(DataError, match="Target 1 is None"):
        scorer.score(["a", "b"], ["c", None])  # type: ignore[list-item]


def test_evaluate_loads_and_computes(spec_of: Callable[..., ScorerSpec], tmp_path: Path) -> None:
    spec = spec_of(direction="f")
    metric = evaluate.load(str(ROOT / "metrics" / "bartscore"), cache_dir=str(tmp_path))
    references, responses = [source for source, _ in PAIRS], [target for _, target in PAIRS]
    result = metric.compute(
        predictions=responses,
        references=references,
        checkpoint=spec.checkpoint,
        architecture=spec.architecture,
        direction="f",
        max_length=24,
        template=TEMPLATE,
    )
    expected = _loaded(spec).quality(responses, references)
    np.testing.assert_allclose(result["scores"], expected, atol=1e-6)
    assert result["mean"] == pytest.approx(expected.mean())
    assert result["fingerprint"] == spec.fingerprint()


@pytest.mark.slow
def test_the_packaged_scorer_prefers_what_is_right() -> None:
    template = "{source}\nIn other words:\n"
    scorer = _loaded(ScorerSpec(str(smollm2_gguf()), "causal", max_length=200))
    facts = {"France": "Paris", "Norway": "Oslo", "Peru": "Lima", "Japan": "Tokyo"}
    cities = list(facts.values())
    pairs = [
        (f"Question: What is the capital of {land}?\nAnswer: {city}", f"The capital is {guess}.")
        for land, city in facts.items()
        for guess in cities
    ]
    scores = _score(scorer, pairs)
    assert scores.reshape(4, 4).argmax(axis=1).tolist() == [0, 1, 2, 3]
    assert scorer.score([pairs[0][0]], [""])[0] < scores.min()
    source, target = pairs[7]
    prompt = scorer.tokenizer(template.replace("{source}", source)).input_ids
    tokens = scorer.tokenizer(target).input_ids
    with torch.no_grad():
        logits = scorer.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    alone = logits[range(len(prompt) - 1, len(prompt + tokens) - 1), tokens].mean()
    assert scores[7] == pytest.approx(float(alone), abs=1e-4)
