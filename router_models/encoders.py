"""Frozen text encoders: texts in, unit vectors out, cached on disk.

Idea: mean-pool a transformer's last hidden states, as sentence-transformers does (cosine ≥ 0.999
with it on the same weights), but never pad. Texts of one token length share a batch, so nothing is
computed for padding, attention needs no mask, and a text's vector does not depend on its
neighbours. Each distinct text is encoded once, and once per cache.

A causal LLM is an encoder too, cut off after a layer (`smollm2-135m@18`): its middle layers know
what a text is about and how hard it is, its last ones are busy with the next word
(docs/results.md: what each layer is worth).

`benchmarks/encoding.py` compares the speed with sentence-transformers' defaults. What pays (CPU
seconds for 1,500 MMLU prompts on one thread, 57 for sentence-transformers): equal-length batches
(41), bfloat16 weights where the CPU multiplies bfloat16 natively (25, cosine ≥ 0.9999). Tried and
left out, for no gain: eager attention, larger batches, float32 products rounded to bfloat16.

Longer than most files here: loading, batching, pooling and the endpoint are one subject, and the
routers that train an encoder share the first two.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conf.errors import ArtifactError, ConfigError, EndpointError
from router_models.packaged import (
    dequantised_directory,
    file_digest,
    minilm_directory,
    smollm2_gguf,
)
from router_models.persistence import VectorCache

Precision = Literal["float32", "bfloat16"]
Pooling = Literal["mean", "cls", "last"]

# A text is cut to so many characters per allowed token before it is tokenised: far more than real
# text needs, and a pasted book costs no more than a page.
CHARACTERS_PER_TOKEN = 64
# Below so many rows a matrix product takes another path, whose last bits differ.
MIN_ROWS = 16
BATCH_TOKENS = 2048
# What a folder's encoder is made of: weights, vocabulary, settings (pooling has a folder below).
ENCODER_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*/config.json")
# Where a router keeps its own copy of an encoder.
ENCODER_FOLDER = "encoder"
# Where neither the encoder's own files nor its tokenizer name a limit.
DEFAULT_MAX_TOKENS = 512
OPENAI_CHARACTERS = 8_000
OPENAI_BATCH = 256


PACKAGED = {
    "minilm": minilm_directory,
    "smollm2-135m": lambda: dequantised_directory(smollm2_gguf()),
}


class Encoder:
    """Texts to unit vectors; made by `load_encoder`."""

    def __init__(
        self,
        name: str,
        *,
        digest: str,
        vectors: Callable[[list[str]], np.ndarray],
        cache: Path | None = None,
        local: "LocalModel | None" = None,
    ) -> None:
        self.name = name
        self.local = local
        """The model behind the vectors, unless they come from an endpoint."""
        self.digest = digest
        """Hash of what determines the vectors: weights, tokenizer and limits, or URL and model."""
        self._vectors = vectors
        self._cache = None if cache is None else VectorCache(cache, digest)
        self._dimension: int | None = None

    @property
    def dimension(self) -> int:
        """Return d, the length of a vector (an endpoint is asked for one the first time)."""
        if self._dimension is None:
            self._dimension = self.encode(["dimension"]).shape[1]
        return self._dimension

    def description(self) -> dict[str, Any]:
        """Return what `load_saved_encoder` needs to know, as plain JSON."""
        saved: dict[str, Any] = {"name": self.name, "digest": self.digest}
        if self.local is not None:
            saved |= {
                "precision": self.local.precision,
                "pooling": self.local.pooling,
                "max_length": self.local.max_length,
            }
        return saved

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return one unit vector per text, (n, d) float32; the same whatever else is in ``texts``.

        Raises EndpointError when an embeddings endpoint fails.
        """
        return encode_views([self], texts)[0]

    def _known(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Return the vectors that the cache has."""
        return {} if self._cache is None else self._cache.read(texts)

    def _kept(self, texts: list[str], vectors: np.ndarray) -> dict[str, np.ndarray]:
        """Return new vectors at unit length by text, in the cache from now on."""
        made = _unit(vectors)
        if self._cache is not None:
            self._cache.write(texts, made)
        return dict(zip(texts, made, strict=True))


def encode_views(encoders: Sequence[Encoder], texts: Sequence[str]) -> list[np.ndarray]:
    """Return each encoder's vectors of the same texts, as its `encode` would.

    Of layers of one transformer the deepest is computed, and the others on the way.
    """
    if len(texts) == 0:
        return [np.zeros((0, encoder.dimension), dtype=np.float32) for encoder in encoders]
    distinct = list(dict.fromkeys(texts))
    found = [encoder._known(distinct) for encoder in encoders]
    for group in _sharing_a_pass(encoders):
        missing = [text for text in distinct if any(text not in found[at] for at in group)]
        if not missing:
            continue
        if len(group) == 1:
            vectors = [encoders[group[0]]._vectors(missing)]
        else:
            views = [local for at in group if (local := encoders[at].local) is not None]
            vectors = max(views, key=lambda view: view.layers or 0).views(missing, views)
        for at, made in zip(group, vectors, strict=True):
            found[at] |= encoders[at]._kept(missing, made)
    result = []
    for encoder, known in zip(encoders, found, strict=True):
        result.append(np.stack([known[text] for text in texts]))
        encoder._dimension = result[-1].shape[1]
    return result


def _sharing_a_pass(encoders: Sequence[Encoder]) -> list[list[int]]:
    """Return the positions of encoders that are layers of one transformer, group by group."""
    groups: dict[object, list[int]] = {}
    for at, encoder in enumerate(encoders):
        local: LocalModel | None = encoder.local
        key: object = at
        if local is not None and local.layers is not None:
            key = local.source, local.precision, local.max_length
        groups.setdefault(key, []).append(at)
    return list(groups.values())


def load_encoder(
    name: str, *, cache: Path | None = None, precision: Precision | None = None
) -> Encoder:
    """Return the encoder called ``name``.

    name: `minilm` or `smollm2-135m` (packaged), a local folder, a hub name, or
    `openai:<base_url>#<model>`, an OpenAI-compatible embeddings endpoint whose key is in
    $OPENAI_API_KEY. All but an endpoint may end in `@18`: states after layer 18 are pooled; or in
    `@18:last`: of these, the last token's is taken.
    cache: folder for computed vectors; safe to share between processes.
    precision: of the weights; by default bfloat16 where the CPU multiplies it natively.

    Raises ConfigError for a name that cannot be one, ArtifactError for weights that cannot be
    loaded.
    """
    if name.startswith("openai:"):
        url, model = _endpoint(name)
        digest = hashlib.sha256(f"openai {url} {model}".encode()).hexdigest()[:32]

        def ask(texts: list[str]) -> np.ndarray:
            return _openai_vectors(texts, url=url, model=model)

        return Encoder(name, digest=digest, vectors=ask, cache=cache)
    chosen = precision or native_precision()
    packaged = _split(name)[0] in PACKAGED
    local = _packaged(name, chosen) if packaged else LocalModel(name, precision=chosen)
    return Encoder(name, digest=local.digest, vectors=local.vectors, cache=cache, local=local)


def save_encoder(encoder: Encoder, directory: Path) -> list[str]:
    """Save weights and tokenizer under ``directory`` and return the subfolders written.

    Packaged encoders and endpoints are not copied: every installation has the ones, and nobody has
    the others. Raises ArtifactError when nothing can be written.
    """
    if encoder.local is None or _split(encoder.name)[0] in PACKAGED:
        return []
    save_transformer(encoder.local.model, encoder.local.tokenizer, directory / ENCODER_FOLDER)
    return [ENCODER_FOLDER]


def encoder_fingerprint(name: str) -> str:
    """Return what tells an encoder from another without loading it; takes names as `load_encoder`.

    For the packaged one and for a folder, a hash of weights, tokenizer and settings; a hub or
    endpoint name stands for itself. Raises ConfigError for a name that cannot be one, ArtifactError
    for files that cannot be read.
    """
    if name.startswith("openai:"):
        _endpoint(name)
        return name
    folder = Path(_source(_split(name)[0]))
    if not folder.is_dir():
        return name
    files = [path for pattern in ENCODER_FILES for path in folder.glob(pattern)]
    digests = {str(path.relative_to(folder)): file_digest(path) for path in sorted(files)}
    found = json.dumps([digests, _split(name)[1:]], sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:32]


def check_encoder(name: str) -> None:
    """Raise what `load_encoder` would for a name or a folder without a model; load no weights.

    Of a hub model only the configuration is fetched, of an endpoint nothing.
    """
    if name.startswith("openai:"):
        _endpoint(name)
        return
    from transformers import AutoConfig

    source = _source(_split(name)[0])
    try:
        AutoConfig.from_pretrained(source)
        if Path(source).is_dir() and not any(
            path for pattern in ("*.safetensors", "*.bin") for path in Path(source).glob(pattern)
        ):
            raise OSError(f"{source} holds no weights.")
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error


def load_saved_encoder(folder: Path, *, description: dict[str, Any]) -> Encoder:
    """Return the encoder that a router was trained with, from ``folder`` where it was copied.

    description: `Encoder.description()` of the saved one. Raises ArtifactError when the packaged
    encoder is no longer the same.
    """
    name, digest, precision = (description.get(key) for key in ("name", "digest", "precision"))
    if precision is not None and _split(str(name))[0] not in PACKAGED:
        source = str(name)
        copied = f"{folder}{source.removeprefix(_split(source)[0])}"
        model = LocalModel(copied, precision=precision)
        model.pooling, model.max_length = description["pooling"], description["max_length"]
        return Encoder(str(name), digest=str(digest), vectors=model.vectors, local=model)
    encoder = load_encoder(str(name), precision=precision)
    if encoder.digest != digest:
        raise ArtifactError(
            f"The encoder {name!r} is {encoder.digest} here. Expected {digest}, with which the "
            "router was trained. Install the same weights and tokenizer, or train the router again."
        )
    return encoder


def native_precision() -> Precision:
    """Return bfloat16 on a CPU with instructions for it, else float32."""
    import torch

    able = torch.cpu.get_capabilities()
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


@lru_cache(maxsize=4)
def _packaged(name: str, precision: Precision) -> "LocalModel":
    # Folds and routers of one run share it; a folder or hub model may change and is loaded anew.
    return LocalModel(name, precision=precision)


class LocalModel:
    """A transformer with mean (or first-token) pooling, on the CPU."""

    def __init__(self, name: str, *, precision: Precision) -> None:
        import torch

        self.source, self.layers, last = _split(name)
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

    name: `minilm`, a local folder or a hub name. Raises ConfigError or ArtifactError.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = _source(name)
    try:
        # Weights that a checkpoint lacks are drawn at random; the caller's random state stays.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    except Exception as error:  # transformers lets through whatever a damaged file raises
        raise _unloadable(name, error) from error
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


def _unloadable(name: str, error: Exception) -> ArtifactError:
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


def _split(name: str) -> tuple[str, int | None, bool]:
    """Return the model's name, the number of layers after an @ if any, and whether :last follows.

    >>> _split("smollm2-135m@30:last"), _split("minilm")
    (('smollm2-135m', 30, True), ('minilm', None, False))
    """
    found = re.fullmatch(r"(.+)@(\d+)(:last)?", name)
    return (found[1], int(found[2]), found[3] is not None) if found else (name, None, False)


def _source(name: str) -> str:
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

    found = cached_file(_source(name), file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _unit(vectors: np.ndarray) -> np.ndarray:
    values = np.asarray(vectors, dtype=np.float32)
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(norm, 1e-12)


def _endpoint(name: str) -> tuple[str, str]:
    url, _, model = name.removeprefix("openai:").partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise ConfigError(
            f"The encoder {name!r} names no endpoint. Expected openai:<base_url>#<model>, such as "
            "openai:https://api.openai.com/v1#text-embedding-3-small. Write it so."
        )
    return url, model


def _openai_vectors(texts: list[str], *, url: str, model: str) -> np.ndarray:
    import openai

    # Local servers want no key, but the client insists on one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    # An endpoint refuses an empty text, and text beyond its limit.
    readable = [text[:OPENAI_CHARACTERS].strip() or " " for text in texts]
    readable = [text.encode("utf-8", "replace").decode("utf-8") for text in readable]
    rows: list[list[float]] = []
    try:
        with openai.OpenAI(base_url=url, api_key=key, max_retries=5) as client:
            for start in range(0, len(readable), OPENAI_BATCH):
                part = readable[start : start + OPENAI_BATCH]
                answer = client.embeddings.create(input=part, model=model, encoding_format="float")
                ordered = sorted(answer.data, key=lambda item: item.index)
                rows += [item.embedding for item in ordered]
    except openai.OpenAIError as error:
        # Some servers repeat the key that they refuse.
        reason = str(error).replace(key, "$OPENAI_API_KEY") if key != "none" else str(error)
        raise EndpointError(
            f"The embeddings endpoint {url} failed for model {model!r}: {reason} Expected vectors. "
            "Check that it runs, the model's name, and $OPENAI_API_KEY."
        ) from error
    vectors = np.asarray(rows, dtype=np.float32) if len({len(row) for row in rows}) == 1 else None
    if vectors is None or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        raise EndpointError(
            f"The embeddings endpoint {url} answered {len(rows)} vectors for {len(texts)} texts, "
            "or unequal or non-finite ones. Expected one vector of numbers per text. Check that "
            f"{model!r} is an embedding model."
        )
    return vectors
