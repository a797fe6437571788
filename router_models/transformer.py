"""A local transformer read without padding: its weights, tokens and pooled hidden states.

`benchmarks/encoding.py` compares the speed with sentence-transformers' defaults. What pays (CPU
seconds for 1,500 MMLU prompts on one thread, 57 for sentence-transformers): equal-length batches
(41), bfloat16 weights where the CPU multiplies bfloat16 natively (25, cosine ≥ 0.9999). Tried and
left out, for no gain: eager attention, larger batches, float32 products rounded to bfloat16.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conf.errors import ArtifactError, ConfigError
from router_models.packaged import (
    dequantised_directory,
    minilm_directory,
    smollm2_gguf,
)

Precision = Literal["float32", "bfloat16"]
Pooling = Literal["mean", "cls", "last"]
# A text is cut to so many characters per allowed token before it is tokenised: far more than real
# text needs, and a pasted book costs no more than a page.
CHARACTERS_PER_TOKEN = 64
# Below so many rows a matrix product takes another path, whose last bits differ.
MIN_ROWS = 16
BATCH_TOKENS = 2048
# Where neither the encoder's own files nor its tokenizer name a limit.
DEFAULT_MAX_TOKENS = 512
PACKAGED = {
    "minilm": minilm_directory,
    "smollm2-135m": lambda: dequantised_directory(smollm2_gguf()),
}


def native_precision() -> Precision:
    """Return bfloat16 on a CPU with instructions for it, else float32."""
    import torch

    able = torch.cpu.get_capabilities()
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


class LocalModel:
    """A transformer whose states are averaged, or of which one token's is taken, on the CPU."""

    def __init__(self, name: str, *, precision: Precision) -> None:
        import torch

        self.source, self.layers, last = split_name(name)
        self.model, self.tokenizer = load_transformer(self.source)
        if self.layers is not None:
            cut_off(self.model, layers=self.layers, name=name)
        self.pooling, limit = _sentence_settings(self.source)
        """Mean over all tokens, or the state of the first or the last one."""
        if last:
            self.pooling = "last"
        self.max_length = min(limit or DEFAULT_MAX_TOKENS, token_limit(self.model, self.tokenizer))
        self.precision = precision
        self.digest = self._digest()
        self.model.to(getattr(torch, precision))

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Return the pooled hidden states, (n, d) float32, not yet of unit length."""
        return self.views(texts, [self])[0]

    def views(self, texts: list[str], views: Sequence["LocalModel"]) -> list[np.ndarray]:
        """Return the `vectors` of each of ``views``: this model, or fewer layers of it."""
        import torch

        ids = token_ids(self.tokenizer, texts, max_length=self.max_length)
        shape = len(texts), self.model.config.hidden_size
        found = [np.empty(shape, dtype=np.float32) for _ in views]
        earlier = any(view.layers != self.layers for view in views)
        with torch.inference_mode():
            for rows, batch in equal_length_batches(ids):
                states = self.model(input_ids=torch.from_numpy(batch), output_hidden_states=earlier)
                for view, vectors in zip(views, found, strict=True):
                    last = view.layers == self.layers
                    hidden = states.last_hidden_state if last else states.hidden_states[view.layers]
                    vectors[rows] = view._pooled(hidden[: len(rows)].float())
        return found

    def _pooled(self, hidden: Any) -> np.ndarray:
        if self.pooling == "mean":
            return hidden.mean(dim=1).numpy()
        return hidden[:, 0 if self.pooling == "cls" else -1].numpy()

    def _digest(self) -> str:
        """Hash the weights (before they are rounded), the tokenizer and what else matters."""
        digest = hashlib.sha256(weights_digest(self.model).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        config = self.model.config.to_diff_dict()
        settings = [config, self.pooling, self.max_length, self.precision]
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]


def load_transformer(name: str) -> tuple[Any, Any]:
    """Return the float32 transformer (in evaluation mode, without pooler) and its fast tokenizer.

    name: `minilm` or `smollm2-135m`, a local folder or a hub name.
    Raises ConfigError or ArtifactError.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = weights_source(name)
    try:
        # Weights that a checkpoint lacks are drawn at random; the caller's random state stays.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    except Exception as error:  # transformers lets through whatever a damaged file raises
        raise unloadable(name, error) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer of {name!r} has no fast version. Expected a tokenizer.json or a "
            "tokenizer that transformers can convert. Choose another encoder."
        )
    # tokenizer.json may carry padding to a fixed length and a truncation of its own.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    if "pooler" in dict(model.named_children()):
        model.pooler = None  # unused, and often not even trained
    return model, tokenizer


def unloadable(name: str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"The encoder {name!r} cannot be loaded: {error} Expected a transformer with its "
        "tokenizer, in a local folder or on the hub. Check the name, the folder's files, and "
        "the network."
    )


def layer_stack(model: Any) -> Any:
    """Return a transformer's layers, a ModuleList. Raises ConfigError where there is not one."""
    import torch

    depth = model.config.num_hidden_layers
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        raise ConfigError(
            f"The model has {len(stacks)} stacks of {depth} layers. Expected one, as encoders and "
            "causal LLMs have. Name no layer, or choose another model."
        )
    return stacks[0]


def cut_off(model: Any, *, layers: int, name: str) -> None:
    """Leave out all layers after the first ``layers``, and the normalisation that follows them.

    Raises ConfigError for a number of layers that the model does not have.
    """
    import torch

    stack = layer_stack(model)
    if not 1 <= layers <= len(stack):
        raise ConfigError(
            f"The encoder {name!r} asks for layer {layers}. Expected one of 1 to {len(stack)}. "
            "Correct the number after the @."
        )
    del stack[layers:]
    model.config.num_hidden_layers = layers
    if "norm" in dict(model.named_children()):
        model.norm = torch.nn.Identity()


def save_transformer(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save what `load_transformer` loads. Raises ArtifactError when it cannot be written."""
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise ArtifactError(
            f"The encoder cannot be saved in {folder}: {error}. Expected a writable folder with "
            "enough free space. Free some, or choose another folder."
        ) from error


def weights_digest(model: Any) -> str:
    """Return the SHA-256 of a model's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def token_limit(model: Any, tokenizer: Any) -> int:
    """Return the most tokens that positions and tokenizer allow, special tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_TOKENS
    # RoBERTa and its kin number positions from padding_idx + 1 on.
    offset = 2 if "roberta" in model.config.model_type else 0
    return int(min(positions - offset, tokenizer.model_max_length))


def token_ids(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Return the token numbers of each text, special tokens included, cut to ``max_length``.

    A text of which no token is left, such as the empty one, becomes one token that says nothing.
    """
    longest = max_length * CHARACTERS_PER_TOKEN
    # JSON can carry half of a surrogate pair, which is no text that a tokenizer takes.
    readable = [text[:longest].encode("utf-8", "replace").decode("utf-8") for text in texts]
    found = tokenizer(
        readable,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    nothing = next(
        (
            token
            for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
            if token is not None
        ),
        0,
    )
    return [list(tokens) or [nothing] for tokens in found["input_ids"]]


def equal_length_batches(
    ids: list[list[int]], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, batch): positions of texts of one length, and their (B, length) int64 tokens.

    Very small batches are filled up with copies of their last text, so B may exceed len(rows).
    """
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        if len(group) == 0:
            continue
        length = int(lengths[group[0]])
        size = max(1, batch_tokens // length)
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            least = -(-MIN_ROWS // length)
            filled = np.append(rows, np.repeat(rows[-1:], max(0, least - len(rows))))
            yield rows, np.array([ids[row] for row in filled], dtype=np.int64)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def split_name(name: str) -> tuple[str, int | None, bool]:
    """Return the model's name, the number of layers after an @ if any, and whether :last follows.

    >>> split_name("smollm2-135m@30:last"), split_name("minilm")
    (('smollm2-135m', 30, True), ('minilm', None, False))
    """
    found = re.fullmatch(r"(.+)@(\d+)(:last)?", name)
    return (found[1], int(found[2]), found[3] is not None) if found else (name, None, False)


def weights_source(name: str) -> str:
    """Return what transformers loads: a folder, or a hub name as it is."""
    if name in PACKAGED:
        return str(PACKAGED[name]())
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ConfigError(
            f"The encoder {name!r} is no folder. Expected minilm, smollm2-135m, an existing folder,"
            " a hub name such as microsoft/deberta-v3-large, or openai:<base_url>#<model>. Correct "
            "the path."
        )
    return name


def _sentence_settings(name: str) -> tuple[Pooling, int | None]:
    """Return pooling and token limit as sentence-transformers' own files state them."""
    modules = _sentence_file(name, "modules.json") or []
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    pooling = _sentence_file(name, "1_Pooling/config.json") or {"pooling_mode": "mean"}
    modes = [pooling.get("pooling_mode")] if "pooling_mode" in pooling else []
    modes += [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    known = {"mean": "mean", "pooling_mode_mean_tokens": "mean"}
    known |= {"cls": "cls", "pooling_mode_cls_token": "cls"}
    if unknown or len(modes) != 1 or str(modes[0]) not in known:
        raise ConfigError(
            f"The encoder {name!r} pools by {modes} and has the further modules {unknown}. "
            "Expected mean or first-token pooling and nothing after it but normalisation. "
            "Choose another encoder."
        )
    limit = (_sentence_file(name, "sentence_bert_config.json") or {}).get("max_seq_length")
    return ("cls" if known[str(modes[0])] == "cls" else "mean"), limit


def _sentence_file(name: str, file: str) -> Any:
    from transformers.utils.hub import cached_file

    found = cached_file(weights_source(name), file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
