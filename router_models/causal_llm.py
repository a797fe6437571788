"""RouteLLM's causal LLM router: a language model is asked who wins, and its next token is read.

Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data", arXiv 2406.18665, section 4.2.
The model learns through LoRA (Hu et al., arXiv 2106.09685), so that what is trained and saved is
small. Longer than most files here: the prompt, the adapter and the base are this router's alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from conf.errors import ArtifactError, ConfigError
from conf.routers import CausalLLM
from router_models.bert import VERDICTS
from router_models.fine_tuned import FineTunedRouter, Tokens
from router_models.lightning_loop import decaying
from router_models.packaged import dequantised_directory, file_digest, smollm2_gguf
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.transformer import (
    CHARACTERS_PER_TOKEN,
    quiet_transformers,
    save_transformer,
    token_limit,
)

PACKAGED = "smollm2-135m"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FOLDER = "model"


class CausalLLMRouter(FineTunedRouter):
    """Tune a causal language model to answer a question about the query with one label token.

    Idea: put the query into a prompt that asks whose answer will be better, and take the softmax
    of the next token's logits over three label tokens: strong wins, tie, weak wins. Minimise its
    cross-entropy with the verdicts of the routed pair's own battles, through low-rank updates of
    all linear layers. The win rate is P(strong wins) + P(tie) / 2, for the reason given in `bert`.
    Source: arXiv 2406.18665, section 4.2, which tunes all weights of Llama-3-8B and adds label
    tokens to its vocabulary. Tokens that the model knows already take the place of new ones here,
    for new ones have nothing to start from, and LoRA that of full tuning, so that the same code
    serves a laptop and a GPU.
    Requirements: battles of the routed pair (or of its tiers), and a model in float32 that
    `transformers.AutoModelForCausalLM` loads. The packaged SmolLM2-135M takes 0.2 s of one CPU
    core for a short query, and 0.65 s for each query in each epoch of training.
    Relations: `bert` predicts the same three verdicts from an encoder, and is much quicker.

    >>> CausalLLMRouter(CausalLLM(name="example")).config.label_tokens
    ('A', 'B', 'C')
    """

    kind = "causal_llm"
    objective = VERDICTS

    def __init__(self, config: CausalLLM) -> None:
        super().__init__(config)
        self.prompt_: Any = None
        """What stands around a query, and the labels' token numbers."""
        self.adapter_: dict[str, np.ndarray] = {}
        """LoRA's weights under PEFT's names, float32."""
        self.base_: dict[str, str] = {}
        """Of a packaged base, its name and sha256; else empty, and the merged weights are saved."""

    def save(self, directory: Path) -> None:
        """Save the adapter in PEFT's format, and the tuned model too unless its base is packaged.

        Every installation has the packaged base, whose digest is saved; nothing else is needed.
        """
        if self.network_ is None:
            raise not_fitted(self.config.name)
        _save_adapter(self.adapter_, self.config, directory / ADAPTER_FOLDER)
        folders = [ADAPTER_FOLDER]
        if not self.base_:
            save_transformer(self.network_, self.tokenizer_, directory / MODEL_FOLDER)
            folders.append(MODEL_FOLDER)
        write_state(
            directory,
            router="causal_llm",
            config=settings_json(self.config),
            values={"base": self.base_, "history": self.history_},
            arrays={},
            folders=folders,
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format, and when the
        packaged base is no longer the same.
        """
        from safetensors.numpy import load_file

        state = read_state(directory, router="causal_llm", config=CausalLLM, arrays=[])
        router = cls(state.config)
        router.adapter_ = load_file(directory / ADAPTER_FOLDER / ADAPTER_FILE)
        router.base_ = state.values["base"]
        if router.base_:
            _check_base(router.base_)
            model, router.tokenizer_ = _language_model(PACKAGED)
            router.network_ = _tuned(model, router.adapter_, state.config)
        else:
            folder = str(directory / MODEL_FOLDER)
            router.network_, router.tokenizer_ = _language_model(folder)
        router.network_.eval()
        router.prompt_ = _prompt(router.network_, router.tokenizer_, state.config)
        router.history_ = state.values["history"]
        return router

    def _pretrained(self) -> tuple[Any, Any]:
        model, tokenizer = _language_model(self.config.model)
        self.prompt_ = _prompt(model, tokenizer, self.config)
        return model, tokenizer

    def _network(self, model: Any, *, mean: np.ndarray) -> Any:
        """Return the model with LoRA; it starts from what it knows, whatever the ``mean``."""
        return _with_lora(model, self.config).train()

    def _tokens(self, network: Any, tokenizer: Any, prompts: Sequence[str]) -> Tokens:
        return self.prompt_.token_ids(tokenizer, prompts)

    def _logits(self, network: Any, ids: Any, mask: Any) -> Any:
        return _label_logits(network, ids, mask, labels=list(self.prompt_.labels))

    def _weight_groups(self, network: Any) -> list[dict[str, Any]]:
        trainer = self.config.trainer
        return decaying(
            network.parameters(), rate=trainer.learning_rate, weight_decay=trainer.weight_decay
        )

    def _finished(self, network: Any) -> Any:
        """Return the model, its update merged into its weights."""
        self.adapter_ = _adapter(network)
        self.base_ = _packaged_base() if self.config.model == PACKAGED else {}
        return network.merge_and_unload()


@dataclass(frozen=True)
class _Prompt:
    """Token numbers around the query, those of the three labels, and the room for the query."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    labels: tuple[int, ...]
    max_length: int

    def token_ids(self, tokenizer: Any, queries: Sequence[str]) -> list[list[int]]:
        """Return each query's whole prompt. A long query is cut; the question after it never is."""
        longest = self.max_length * CHARACTERS_PER_TOKEN
        # JSON can carry half of a surrogate pair, which is no text that a tokenizer takes.
        readable = [text[:longest].encode("utf-8", "replace").decode("utf-8") for text in queries]
        found = tokenizer(
            readable,
            add_special_tokens=False,
            split_special_tokens=True,  # a query that spells <|im_end|> must not end the turn
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
        )
        return [[*self.before, *ids, *self.after] for ids in found["input_ids"]]


def _prompt(model: Any, tokenizer: Any, config: CausalLLM) -> _Prompt:
    """Return the prompt's fixed parts. Raises ConfigError for one that the model cannot read.

    Its parts and the query are tokenised apart, so that the borders never move.
    """
    text, start = config.template, _start(tokenizer)
    if config.chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start = []  # chat templates write it themselves
    first, _, second = text.partition("{query}")
    before = [*start, *_plain_ids(tokenizer, first)]
    after = _plain_ids(tokenizer, second)
    limit = token_limit(model, tokenizer)
    room = limit - len(before) - len(after)
    if config.max_length > room:
        raise ConfigError(
            f"max_length is {config.max_length}, the template takes {len(before) + len(after)} "
            f"tokens, and {config.model!r} reads {limit}. Expected a max_length of at most {room}. "
            "Lower it, shorten template, or choose another model."
        )
    if not before and not after:
        raise ConfigError(
            f"The template {config.template!r} is the query alone. Expected a question about it. "
            "Write one into template."
        )
    return _Prompt(
        before=tuple(before),
        after=tuple(after),
        labels=_label_ids(tokenizer, config),
        max_length=config.max_length,
    )


def _start(tokenizer: Any) -> list[int]:
    """Return the start token where the tokenizer puts one before a text."""
    added = tokenizer("a")["input_ids"][:1] != _plain_ids(tokenizer, "a")[:1]
    return [tokenizer.bos_token_id] if added and tokenizer.bos_token_id is not None else []


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _label_ids(tokenizer: Any, config: CausalLLM) -> tuple[int, ...]:
    found = [_plain_ids(tokenizer, label) for label in config.label_tokens]
    for label, ids in zip(config.label_tokens, found, strict=True):
        if len(ids) != 1 or ids == [tokenizer.unk_token_id]:
            raise ConfigError(
                f"The label {label!r} is {len(ids)} tokens of {config.model!r}, or an unknown one. "
                "Expected a single known token. Choose another in label_tokens."
            )
    labels = tuple(ids[0] for ids in found)
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"The labels {config.label_tokens} are the tokens {labels} of {config.model!r}. "
            "Expected three different ones. Correct label_tokens."
        )
    return labels


def _label_logits(network: Any, ids: Any, mask: Any, *, labels: list[int]) -> Any:
    """Return the labels' logits after each row's last token, (B, 3).

    ids: (B, length), padded to the right as ``mask`` (or None) says. A causal model does not look
    there, and so is not given the mask.
    """
    import torch

    rows = torch.arange(len(ids), device=ids.device)
    last = ids.shape[1] - 1 if mask is None else mask.sum(dim=1) - 1

    def only_last(head: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0][rows, last].unsqueeze(1),)

    # In front of the output layer, so that (B, length, vocabulary) is never made, while whatever
    # the model does to its logits afterwards (Gemma caps them, Cohere scales them) is done.
    with network.get_output_embeddings().register_forward_pre_hook(only_last):
        logits = network(input_ids=ids, use_cache=False).logits
    return logits[:, 0, labels]


def _language_model(name: str) -> tuple[Any, Any]:
    """Return the float32 model, in evaluation mode, and its tokenizer.

    name: `smollm2-135m`, a local folder or a hub name. Raises ArtifactError when it cannot be
    loaded, or lacks a weight (transformers would draw it at random).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(name).expanduser()
    if name == PACKAGED:
        source = dequantised_directory(smollm2_gguf())
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            found = str(source) if source.is_dir() else name
            tokenizer = AutoTokenizer.from_pretrained(found)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                found, dtype=torch.float32, output_loading_info=True
            )
        model, report = loaded
        if lacking := sorted(report["missing_keys"]):
            raise ValueError(f"{len(lacking)} weights are not in its files, such as {lacking[0]}")
    except Exception as error:  # transformers lets through whatever a damaged file raises
        raise ArtifactError(
            f"The language model {name!r} cannot be loaded: {error} Expected {PACKAGED}, or a "
            "causal language model with its tokenizer, in a local folder or on the hub. Check the "
            "name, the folder's files, and the network."
        ) from error
    return model.eval(), tokenizer


def _packaged_base() -> dict[str, str]:
    return {"name": PACKAGED, "sha256": file_digest(smollm2_gguf())}


def _check_base(base: dict[str, str]) -> None:
    here = _packaged_base()
    if base != here:
        raise ArtifactError(
            f"The packaged model {PACKAGED} is {here['sha256']} here. Expected "
            f"{base.get('sha256')} ({base.get('name')}), on which the router was trained. Install "
            "the same package, or train the router again."
        )


def _lora_config(config: CausalLLM) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",  # not the output layer, which PEFT leaves out
        task_type="CAUSAL_LM",
    )


def _with_lora(model: Any, config: CausalLLM) -> Any:
    from peft import get_peft_model

    with quiet_transformers():  # PEFT still asks for what transformers 5.23 calls deprecated
        return get_peft_model(model, _lora_config(config))


def _adapter(network: Any) -> dict[str, np.ndarray]:
    from peft import get_peft_model_state_dict

    # PEFT would ask the hub whether the vocabulary had grown; it cannot have.
    weights = get_peft_model_state_dict(network, save_embedding_layers=False)
    return {name: weight.detach().cpu().numpy().copy() for name, weight in weights.items()}


def _tuned(model: Any, adapter: dict[str, np.ndarray], config: CausalLLM) -> Any:
    """Return the model with the adapter merged into its weights."""
    import torch
    from peft import set_peft_model_state_dict

    with torch.random.fork_rng(devices=[]):
        network = _with_lora(model, config)
    weights = {name: torch.from_numpy(array) for name, array in adapter.items()}
    set_peft_model_state_dict(network, weights)
    return network.merge_and_unload()


def _save_adapter(adapter: dict[str, np.ndarray], config: CausalLLM, folder: Path) -> None:
    from safetensors.numpy import save_file

    described = _lora_config(config)
    described.base_model_name_or_path, described.inference_mode = config.model, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter, folder / ADAPTER_FILE, metadata={"format": "pt"})
        described.save_pretrained(str(folder))
    except OSError as error:
        raise ArtifactError(
            f"The adapter cannot be saved in {folder}: {error}. Expected a writable folder with "
            "enough free space. Free some, or choose another folder."
        ) from error
