"""Find, hash and load exactly the checkpoint that was named, or fail.

A score means nothing without its checkpoint: LLM-Blender's BARTScore replaces a missing one by
another with only a printed notice. Here a name that cannot be found, a file that lacks a weight
(which transformers would fill with random numbers) and a model of the wrong kind are errors.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.errors import ArtifactError, ConfigError
from router_models.packaged import dequantised_directory, file_digest

SMALL_FILES = ["*.json", "*.txt", "*.model"]
# In the order transformers looks; other frameworks' copies on the hub are left where they are.
WEIGHT_FILES = ["*.safetensors", "pytorch_model*.bin"]


@dataclass(frozen=True)
class Checkpoint:
    """The files of a hub name, a local folder or a GGUF file."""

    name: str

    def is_gguf(self) -> bool:
        return self.name.endswith(".gguf")

    @cached_property
    def path(self) -> Path:
        """Where the files are. A hub name is downloaded unless the hub's cache has it."""
        path = Path(self.name).expanduser()
        if path.is_file() if self.is_gguf() else path.is_dir():
            return path
        if self.is_gguf() or path.is_absolute() or self.name.startswith((".", "~")):
            raise ArtifactError(
                f"There is no checkpoint at {self.name}. Expected a folder with config.json and "
                "weights, or a GGUF file. Check the path; no other checkpoint is used instead."
            )
        return _downloaded(self.name)

    def digest(self) -> str:
        """Return a hash of every file that loading would read: weights, config, tokenizer."""
        if self.is_gguf():
            return file_digest(self.path)
        small = [path for pattern in SMALL_FILES for path in self.path.glob(pattern)]
        digests = {path.name: file_digest(path) for path in small + self._weights()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    def _weights(self) -> list[Path]:
        for pattern in WEIGHT_FILES:
            if found := list(self.path.glob(pattern)):
                return found
        raise ArtifactError(
            f"{self.path} holds no weights. Expected *.safetensors or pytorch_model*.bin beside "
            "config.json. Copy the whole checkpoint; no other one is used instead."
        )

    def directory(self) -> Path:
        """Return the folder that transformers can load; a GGUF file is dequantised once."""
        if self.is_gguf():
            return dequantised_directory(self.path)
        self._weights()
        return self.path


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for weights in WEIGHT_FILES:
            directory = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, weights]))
            if any(directory.glob(weights)):
                break
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"Checkpoint {name!r} is neither a local folder nor on a hub within reach: {error} "
            "Expected a hub name, a folder or a GGUF file. Download it where there is a network "
            "(hf download) and name its folder; no other checkpoint is used instead."
        ) from error
    return directory


def loaded_model(
    name: str, *, architecture: str, max_length: int, dtype: str, overlay: str | None
) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a checkpoint, on the CPU and ready to score.

    Raises ArtifactError if anything is missing or damaged, ConfigError if the model is of another
    architecture than stated or reads fewer than ``max_length`` tokens.
    """
    import torch
    import transformers

    classes = {
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "causal": transformers.AutoModelForCausalLM,
    }
    directory = Checkpoint(name).directory()
    with _loading(name):
        config = transformers.AutoConfig.from_pretrained(directory)
        _check_config(config, name, architecture=architecture, max_length=max_length)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        model, report = classes[architecture].from_pretrained(
            directory, dtype=getattr(torch, dtype), output_loading_info=True
        )
        if lacking := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
            raise ValueError(f"{len(lacking)} weights are not in its files, such as {lacking[0]}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer of {name!r} has no end token. Expected one, for it is what an empty "
            "target is scored by. Set eos_token in its tokenizer_config.json."
        )
    if overlay is not None:
        _lay_over(model, overlay)
    return model.eval(), tokenizer


def check_checkpoint(name: str, *, architecture: str, max_length: int) -> None:
    """Raise what `loaded_model` would for files or settings that do not suit; load no weights."""
    import transformers

    directory = Checkpoint(name).directory()
    with _loading(name):
        config = transformers.AutoConfig.from_pretrained(directory)
        _check_config(config, name, architecture=architecture, max_length=max_length)


def longest_path(config: Any) -> int:
    """Return the longest sequence in which every token can see all the earlier ones."""
    values = config.to_dict()
    limits = [values.get(key) for key in ("max_position_embeddings", "sliding_window")]
    return min([limit for limit in limits if limit] or [2**31])


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Give one error for all the ways a checkpoint can fail to load, and keep the bars away."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # each file format stumbles over damage in its own way
        raise ArtifactError(
            f"Cannot load checkpoint {name!r}: {error}. Expected a complete model and tokenizer. "
            "Copy or download it again; no other checkpoint is used instead."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_config(config: Any, name: str, *, architecture: str, max_length: int) -> None:
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    if kind != architecture:
        raise ConfigError(
            f"Checkpoint {name!r} is a {config.model_type} model, which is {kind}. "
            f"Expected {architecture}. Set architecture to {kind!r}, or name another checkpoint."
        )
    limit = longest_path(config)
    if max_length > limit:
        raise ConfigError(
            f"max_length is {max_length}. Expected at most the {limit} tokens that {name!r} reads. "
            "Lower max_length."
        )


def _lay_over(model: Any, overlay: str) -> None:
    import torch

    digest = file_digest(overlay)  # says so when the file is missing
    try:
        weights = torch.load(overlay, map_location="cpu", weights_only=True)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = sorted(set(missing) - model.all_tied_weights_keys.keys())
        if missing or unexpected:
            raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    except Exception as error:  # unpickling reports damage as almost any exception
        raise ArtifactError(
            f"Cannot lay {overlay} (sha256 {digest[:16]}) over the checkpoint: {error}. Expected a "
            "plain state dict of the same model. Download it again or leave the overlay out."
        ) from error
    model.tie_weights()
