"""What the routers that fine-tune a transformer share; each says only what its paper says.

A router brings an `Objective` (what is learned from a win rate, and how far off a network is), the
network, and the way from a prompt to its tokens; fitting and asking are the same for all. The loop
over epochs is `lightning_loop.train`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from conf.routers import Trainer
from conf.settings import Settings
from router_models import lightning_loop
from router_models.lightning_loop import History, Progress
from router_models.persistence import not_fitted
from router_models.training_data import Comparisons
from router_models.transformer import equal_length_batches, weights_digest

Tokens = list[list[int]]

# Queries are sorted by length within pools of so many batches.
POOL_BATCHES = 32


@dataclass(frozen=True)
class Objective:
    """What a network's k outputs mean, and what its training minimises."""

    outputs: int
    """k"""
    targets: Callable[[np.ndarray], np.ndarray]
    """From win rates (n,) to what is to be predicted, (n, k)."""
    loss: Callable[[Any, Any], Any]
    """Mean loss of logits and targets, (B, k) float32 tensors each."""
    probabilities: Callable[[Any], Any]
    """From a tensor of logits (B, k) to predictions (B, k)."""
    logits: Callable[[np.ndarray], np.ndarray]
    """The logits (k,) that predict the mean target (k,): where training starts."""
    mean_loss: Callable[[np.ndarray, np.ndarray], float]
    """`loss` again, of predictions (n, k) and targets (n, k)."""
    win_rate: Callable[[np.ndarray, Any], np.ndarray]
    """From predictions (n, k) and the router's settings to win rates (n,)."""


class FineTunedRouter(ABC):
    """A transformer whose outputs for a prompt give its win rate."""

    kind: ClassVar[str]
    objective: ClassVar[Objective]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.network_: Any = None
        self.tokenizer_: Any = None
        self.history_: History = []
        """Per epoch: epoch, train_loss, validation_loss, learning_rate."""

    def fit(
        self,
        train: Comparisons,
        validation: Comparisons | None = None,
        *,
        seed: int,
        directory: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Train and keep the epoch with the best validation loss (without validation, the last).

        directory: where a checkpoint is kept after each epoch; a training that was killed goes on
        from it, to the same numbers, when data, settings, model and seed are the same.
        on_progress: called with steps done and steps in all.
        Raises DataError when the pair was never compared, ConfigError for unusable settings,
        ArtifactError for a model that cannot be loaded.
        """
        import torch

        parts = [part.labels() for part in (train, validation) if part is not None]
        targets = [self.objective.targets(win_rate) for _, win_rate in parts]
        model, tokenizer = self._pretrained()
        # The caller's random state is none of our business, before and after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._network(model, mean=targets[0].mean(axis=0))
            tokens = [self._tokens(network, tokenizer, prompts) for prompts, _ in parts]
            self.history_ = self._train(
                network,
                list(zip(tokens, targets, strict=True)),
                padding=tokenizer.pad_token_id or 0,
                seed=seed,
                directory=directory,
                on_progress=on_progress,
            )
        self.network_, self.tokenizer_ = self._finished(network), tokenizer
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in [0, 1].

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        return self.objective.win_rate(self.predictions(prompts), self.config)

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Save what `load` needs, which is all that answering needs."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """

    def predictions(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the objective's probabilities, (n, k) float64; each prompt's are its own.

        Raises ArtifactError before `fit`.
        """
        if self.network_ is None:
            raise not_fitted(self.config.name)
        tokens: Tokens = []
        if len(prompts):
            tokens = self._tokens(self.network_, self.tokenizer_, prompts)
        self.network_.to(scoring_device(self.config.trainer))
        return self._predictions(self.network_, tokens)

    @abstractmethod
    def _pretrained(self) -> tuple[Any, Any]:
        """Return the model that training starts from, float32, and its tokenizer."""

    @abstractmethod
    def _network(self, model: Any, *, mean: np.ndarray) -> Any:
        """Return what is trained, in its training modes; mean: of the targets, (k,)."""

    @abstractmethod
    def _tokens(self, network: Any, tokenizer: Any, prompts: Sequence[str]) -> Tokens:
        """Return each prompt's token numbers, at least one and not more than the model reads."""

    @abstractmethod
    def _logits(self, network: Any, ids: Any, mask: Any) -> Any:
        """Return logits (B, k) of tokens (B, length); mask: (B, length), None where all count."""

    @abstractmethod
    def _weight_groups(self, network: Any) -> list[dict[str, Any]]:
        """Return AdamW's groups of weights, with their rates."""

    def _finished(self, network: Any) -> Any:
        """Return what answers, of what was trained."""
        return network

    def _train(
        self,
        network: Any,
        data: list[tuple[Tokens, np.ndarray]],
        *,
        padding: int,
        seed: int,
        directory: Path | None,
        on_progress: Progress | None,
    ) -> History:
        """Train in place; data: tokens and targets of training and maybe validation."""
        settings = self.config.trainer

        def loss(batch: Any) -> Any:
            ids, mask, targets = batch
            return self.objective.loss(self._logits(network, ids, mask).float(), targets)

        def validation_loss() -> float:
            tokens, targets = data[1]
            return self.objective.mean_loss(self._predictions(network, tokens), targets)

        return lightning_loop.train(
            network,
            TokenBatches(*data[0], size=settings.batch_size, padding=padding, seed=seed),
            loss=loss,
            validation_loss=validation_loss if data[1:] else None,
            weight_groups=lambda: self._weight_groups(network),
            settings=settings,
            name=self.config.name,
            checkpoint=f"{self.kind}-{training_digest(network, data, self.config, seed)}",
            seed=seed,
            directory=directory,
            on_progress=on_progress,
        )

    def _predictions(self, network: Any, tokens: Tokens) -> np.ndarray:
        import torch

        network.eval()
        device = next(network.parameters()).device
        found = np.empty((len(tokens), self.objective.outputs), dtype=np.float64)
        with torch.inference_mode():
            for rows, batch in equal_length_batches(tokens):
                logits = self._logits(network, torch.from_numpy(batch).to(device), None).double()
                found[rows] = self.objective.probabilities(logits)[: len(rows)].cpu().numpy()
        return found


def training_digest(
    network: Any, data: list[tuple[Tokens, np.ndarray]], config: Settings, seed: int
) -> str:
    """Hash what determines the trained weights."""
    digest = hashlib.sha256(weights_digest(network).encode())
    digest.update(config.model_dump_json(exclude={"name"}).encode())
    for tokens, targets in data:
        digest.update(repr(tokens).encode() + targets.tobytes())
    digest.update(str(seed).encode())
    return digest.hexdigest()[:16]


def scoring_device(settings: Trainer) -> str:
    """Return where a trained network answers: on a GPU if it may train on one and there is one."""
    import torch

    wanted = settings.accelerator in ("gpu", "auto") and torch.cuda.is_available()
    return "cuda" if wanted else "cpu"


class TokenBatches:
    """Batches of padded token numbers, masks and labels; their order follows from seed and epoch.

    Queries of like length share a batch, which saves a third of the time on short questions.
    Padding stands to the right.
    """

    def __init__(
        self, ids: list[list[int]], labels: np.ndarray, *, size: int, padding: int, seed: int
    ) -> None:
        self.ids, self.labels = ids, labels
        self.size, self.padding, self.seed = size, padding, seed
        self.epoch, self.rank, self.ranks = 0, 0, 1

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.size * self.ranks))

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.ids))
        # Sorted within pools, not as a whole, so that large data still mix; ties stay shuffled.
        lengths = np.array([len(tokens) for tokens in self.ids])
        pool = np.arange(len(order)) // (POOL_BATCHES * self.size)
        order = order[np.lexsort((lengths[order], pool))]
        batches = np.split(order, np.arange(self.size, len(order), self.size))
        batches = [batches[at] for at in random.permutation(len(batches))]
        # All devices must make the same number of steps: the last ones start from the front again.
        for step in range(len(self)):
            yield self.batch(batches[(step * self.ranks + self.rank) % len(batches)])

    def batch(self, rows: np.ndarray) -> tuple[Any, Any, Any]:
        """Return tokens (B, longest), mask (B, longest) and labels (B, …) as tensors."""
        import torch

        longest = max(len(self.ids[row]) for row in rows)
        ids = np.full((len(rows), longest), self.padding, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(self.ids[row])] = self.ids[row]
            mask[at, : len(self.ids[row])] = 1
        labels = self.labels[rows].astype(np.float32)
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)
