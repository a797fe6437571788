"""Frozen text encoders: texts in, unit vectors out, cached on disk.

Idea: mean-pool a transformer's last hidden states, as sentence-transformers does (cosine ≥ 0.999
with it on the same weights), but never pad. Texts of one token length share a batch, so nothing is
computed for padding, attention needs no mask, and a text's vector does not depend on its
neighbours. Each distinct text is encoded once, and once per cache.

A causal LLM is an encoder too, cut off after a layer (`smollm2-135m@18`): its middle layers know
what a text is about and how hard it is, its last ones are busy with the next word
(docs/results.md: what each layer is worth).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import ArtifactError, ConfigError, EndpointError
from router_models.packaged import file_digest
from router_models.persistence import VectorCache
from router_models.transformer import (
    PACKAGED,
    LocalModel,
    Precision,
    native_precision,
    save_transformer,
    split_name,
    unloadable,
    weights_source,
)

# What a folder's encoder is made of: weights, vocabulary, settings (pooling has a folder below).
ENCODER_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*/config.json")
# Where a router keeps its own copy of an encoder.
ENCODER_FOLDER = "encoder"
OPENAI_CHARACTERS = 8_000
OPENAI_BATCH = 256


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
    packaged = split_name(name)[0] in PACKAGED
    local = _packaged(name, chosen) if packaged else LocalModel(name, precision=chosen)
    return Encoder(name, digest=local.digest, vectors=local.vectors, cache=cache, local=local)


def save_encoder(encoder: Encoder, directory: Path) -> list[str]:
    """Save weights and tokenizer under ``directory`` and return the subfolders written.

    Packaged encoders and endpoints are not copied: every installation has the ones, and nobody has
    the others. Raises ArtifactError when nothing can be written.
    """
    if encoder.local is None or split_name(encoder.name)[0] in PACKAGED:
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
    folder = Path(weights_source(split_name(name)[0]))
    if not folder.is_dir():
        return name
    files = [path for pattern in ENCODER_FILES for path in folder.glob(pattern)]
    digests = {str(path.relative_to(folder)): file_digest(path) for path in sorted(files)}
    found = json.dumps([digests, split_name(name)[1:]], sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:32]


def check_encoder(name: str) -> None:
    """Raise what `load_encoder` would for a name or a folder without a model; load no weights.

    Of a hub model only the configuration is fetched, of an endpoint nothing.
    """
    if name.startswith("openai:"):
        _endpoint(name)
        return
    from transformers import AutoConfig

    source = weights_source(split_name(name)[0])
    try:
        AutoConfig.from_pretrained(source)
        if Path(source).is_dir() and not any(
            path for pattern in ("*.safetensors", "*.bin") for path in Path(source).glob(pattern)
        ):
            raise OSError(f"{source} holds no weights.")
    except (OSError, ValueError) as error:
        raise unloadable(name, error) from error


def load_saved_encoder(folder: Path, *, description: dict[str, Any]) -> Encoder:
    """Return the encoder that a router was trained with, from ``folder`` where it was copied.

    description: `Encoder.description()` of the saved one. Raises ArtifactError when the packaged
    encoder is no longer the same.
    """
    name, digest, precision = (description.get(key) for key in ("name", "digest", "precision"))
    if precision is not None and split_name(str(name))[0] not in PACKAGED:
        source = str(name)
        copied = f"{folder}{source.removeprefix(split_name(source)[0])}"
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


@lru_cache(maxsize=4)
def _packaged(name: str, precision: Precision) -> "LocalModel":
    # Folds and routers of one run share it; a folder or hub model may change and is loaded anew.
    return LocalModel(name, precision=precision)


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
