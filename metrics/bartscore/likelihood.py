"""Score a text by how likely a language model finds it after another text (BARTScore).

The score of a target y given a source x is (1/m) Σ_t log p(y_t | y_<t, x) over its m tokens
(Yuan, Neubig and Liu, arXiv 2106.11520, equation 1, equal weights). Under a sequence-to-sequence
model it equals the published ``BARTScorer.score`` on the same checkpoint. Under a causal model x is
put into a prompt and y follows it. What pairs share is computed once: see seq2seq.py, causal.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from conf.errors import ConfigError, DataError, unknown_name
from metrics.bartscore.causal import causal_batches, check_tree_attention
from metrics.bartscore.checkpoint import Checkpoint, loaded_model
from metrics.bartscore.seq2seq import Group, Scored, seq2seq_batches
from router_models.packaged import file_digest

# Part of every fingerprint: raise it when the same inputs would get other scores.
SCORING_VERSION = 1
CAUSAL_TEMPLATE = "{source}\nIn other words:\n"
ARCHITECTURES = ("seq2seq", "causal")
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("reference_to_response", "response_to_reference", "f")
# Tokens in a pass. Fast on two cores without holding much memory; a GPU wants more at once.
CPU_TOKENS = {"seq2seq": 2048, "causal": 512}
GPU_TOKENS = {"seq2seq": 16384, "causal": 2048}

Progress = Callable[[int], None]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class ScorerSpec:
    """What determines a score, and how to compute it on this machine."""

    checkpoint: str
    """A hub name, a local folder, or (causal only) a GGUF file."""
    architecture: Literal["seq2seq", "causal"] = "seq2seq"
    direction: Literal["reference_to_response", "response_to_reference", "f"] = (
        "reference_to_response"
    )
    """What is scored given what; ``f`` is the mean of both."""
    max_length: int = 1024
    """Most tokens kept of a source, and of a target."""
    template: str = CAUSAL_TEMPLATE
    """The prompt of a causal model; holds ``{source}`` once. The target follows it directly."""
    overlay: str | None = None
    """A state dict (``.pth``) laid over the checkpoint, such as BARTScore's ParaBank weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    tokens_per_batch: int | None = None
    """Most tokens in one forward pass, padding included; by default what suits the device."""

    def __post_init__(self) -> None:
        for kind, known in (
            ("architecture", ARCHITECTURES),
            ("direction", DIRECTIONS),
            ("dtype", DTYPES),
        ):
            if vars(self)[kind] not in known:
                raise ConfigError(unknown_name(kind, vars(self)[kind], known))
        for kind, value in (
            ("max_length", self.max_length),
            ("tokens_per_batch", self.tokens_per_batch),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{kind} is {value}. Expected at least 1. Raise it.")
        if self.template.count("{source}") != 1:
            raise ConfigError(
                f"The template {self.template!r} does not hold {{source}} exactly once. Expected a "
                f"prompt such as {CAUSAL_TEMPLATE!r}. Put {{source}} where the text goes."
            )

    def fingerprint(self) -> str:
        """Name what the scores depend on: equal fingerprints, comparable scores.

        Hashes the checkpoint's files, downloading them if need be. The device and the size of
        batches are left out, for they move a score by rounding only.
        """
        parts: dict[str, Any] = {
            "version": SCORING_VERSION,
            "checkpoint": Checkpoint(self.checkpoint).digest(),
            "overlay": file_digest(self.overlay) if self.overlay else None,
            "template": self.template if self.architecture == "causal" else None,
            "dtype": self.dtype,
        }
        code = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return f"bartscore:{self.architecture}:{self.direction}:{self.max_length}:{code}"


def load_likelihood(spec: ScorerSpec) -> "Likelihood":
    """Load the checkpoint that ``spec`` names, and no other.

    Raises ArtifactError if it is missing, damaged or incomplete, ConfigError if it is of another
    architecture, cannot read ``max_length`` tokens, or cannot read several texts in one pass.
    """
    import torch

    model, tokenizer = loaded_model(
        spec.checkpoint,
        architecture=spec.architecture,
        max_length=spec.max_length,
        dtype=spec.dtype,
        overlay=spec.overlay,
    )
    device = spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    if spec.architecture == "causal":
        check_tree_attention(model, spec.checkpoint)
    return Likelihood(spec, model, tokenizer)


class Likelihood:
    """A loaded scorer: ``score`` for any pairs, ``quality`` for responses in the spec's direction.

    A score does not depend on which other pairs are scored with it, beyond rounding. Errors of the
    device, such as running out of memory, are raised: no partial result is ever returned.
    """

    def __init__(self, spec: ScorerSpec, model: Any, tokenizer: Any) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer

    def quality(
        self,
        responses: Sequence[str],
        references: Sequence[str],
        *,
        on_progress: Progress | None = None,
    ) -> Scores:
        """Score each response against its reference, shape (n,), in the spec's direction.

        ``on_progress`` is told how many of the n are done; for ``f`` each counts half twice.
        """
        passes = {
            "reference_to_response": [(references, responses)],
            "response_to_reference": [(responses, references)],
            "f": [(references, responses), (responses, references)],
        }[self.spec.direction]
        totals = np.zeros(len(responses))
        for earlier, (sources, targets) in enumerate(passes):

            def report(done: int, earlier: int = earlier) -> None:
                if on_progress is not None:
                    on_progress((earlier * len(responses) + done) // len(passes))

            totals += self.score(sources, targets, on_progress=report)
        return totals / len(passes)

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        on_progress: Progress | None = None,
    ) -> Scores:
        """Return the mean log-likelihood per token of each target given its source, shape (n,).

        Under a sequence-to-sequence model the target's special tokens count, as published. Under a
        causal model prompt and target are tokenised apart and joined as token numbers, so that the
        border never moves; white space around the target is dropped, since the template says how
        an answer begins; only the target's own tokens count. An empty target gets the
        log-likelihood of the end token alone, which is what the model gives to saying nothing.

        ``on_progress`` is told how many of the n pairs are done. Raises DataError for lists of
        different lengths, values that are not text, and scores that are not finite.
        """
        _check_texts(sources, targets)
        numbers: dict[tuple[str, str], list[int]] = {}
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            text = target if self.spec.architecture == "seq2seq" else target.strip()
            numbers.setdefault((source, text), []).append(number)
        places = list(numbers.values())
        groups: dict[str, list[tuple[int, str]]] = {}
        for number, (source, target) in enumerate(numbers):
            groups.setdefault(source, []).append((number, target))
        scores = np.full(len(sources), np.nan)
        done = 0
        for batch in self._batches(list(groups.items())):
            for number, value in batch:
                scores[places[number]] = value
                done += len(places[number])
            if on_progress is not None:
                on_progress(done)
        _check_scores(scores, sources, targets)
        return scores

    def _batches(self, groups: list[Group]) -> Iterator[Scored]:
        spec = self.spec
        on_cpu = self.model.device.type == "cpu"
        usual = (CPU_TOKENS if on_cpu else GPU_TOKENS)[spec.architecture]
        budget = spec.tokens_per_batch or usual
        if not groups:
            return iter(())
        if spec.architecture == "seq2seq":
            return seq2seq_batches(
                self.model, self.tokenizer, groups, max_length=spec.max_length, budget=budget
            )
        return causal_batches(
            self.model,
            self.tokenizer,
            groups,
            max_length=spec.max_length,
            template=spec.template,
            budget=budget,
        )


def _check_texts(sources: Sequence[str], targets: Sequence[str]) -> None:
    if len(sources) != len(targets):
        raise DataError(
            f"There are {len(sources)} sources and {len(targets)} targets. Expected one source for "
            "each target. Pair them before scoring."
        )
    for kind, texts in (("source", sources), ("target", targets)):
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(
                    f"{kind.capitalize()} {number} is {text!r}. Expected text. "
                    "Leave out rows whose response is missing; an empty response is ''."
                )


def _check_scores(scores: Scores, sources: Sequence[str], targets: Sequence[str]) -> None:
    for number in np.flatnonzero(~np.isfinite(scores))[:1]:
        raise DataError(
            f"Pair {number} scored {scores[number]}: source {sources[number]!r}, target "
            f"{targets[number]!r}. Expected a finite log-likelihood. Check the checkpoint."
        )
