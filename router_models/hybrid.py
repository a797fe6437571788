"""Hybrid LLM's router: an encoder fine-tuned to tell when the weak LLM will do.

Ding et al., "Hybrid LLM: Cost-Efficient and Quality-Aware Query Routing", arXiv 2404.14618.
What is particular to its training stands here; the loop itself is `lightning_loop.train`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from conf.errors import ConfigError
from conf.routers import Hybrid
from conf.settings import Settings
from router_models.encoders import (
    ENCODER_FOLDER,
    equal_length_batches,
    layer_stack,
    load_transformer,
    save_transformer,
    token_ids,
    token_limit,
    weights_digest,
)
from router_models.lightning_loop import (
    History,
    Progress,
    TokenBatches,
    encoder_and_head,
    scoring_device,
    train,
)
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.training_data import Comparisons


class HybridRouter:
    """Fine-tune a BERT-style encoder on soft labels.

    Idea: mean-pool the encoder's last hidden states, put a linear layer and a sigmoid on top, and
    minimise the binary cross-entropy between its output and the labels. The label decides what the
    router learns: one sampled comparison (deterministic), the share of sample pairs that the
    strong LLM wins (probabilistic), or that share after relaxing the comparison by t*
    (transformed). All three come in as the win rates of `Comparisons`.
    Source: arXiv 2404.14618, equations 1 to 4; the loss there is on Pr[weak suffices], which is
    1 − win rate, and has the same value for both orientations.
    Requirements: an encoder that `transformers.AutoModel` loads. The paper's own run is
    `encoder: microsoft/deberta-v3-large`, 5 epochs, all layers.
    Relations: `knn` uses the same encoder frozen and needs no training; `bert` predicts three
    verdicts instead of a share.

    >>> from router_models.training_data import Comparisons
    >>> HybridRouter(Hybrid(name="example")).config.labels
    'transformed'
    """

    def __init__(self, config: Hybrid) -> None:
        self.config = config
        self.network_: Any = None
        """torch ModuleDict of `encoder` and `head`."""
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
        from it, to the same numbers, when data, settings, encoder and seed are the same.
        on_progress: called with steps done and steps in all.
        Raises DataError when the pair was never compared, ConfigError for unusable settings.
        """
        import torch

        prompts, win_rate = train.labels()
        encoder, tokenizer = load_transformer(self.config.encoder)
        max_length = min(self.config.max_length, token_limit(encoder, tokenizer))
        data = [(token_ids(tokenizer, prompts, max_length=max_length), win_rate)]
        if validation is not None:
            prompts, win_rate = validation.labels()
            data.append((token_ids(tokenizer, prompts, max_length=max_length), win_rate))
        # The caller's random state is none of our business, before and after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(encoder, dropout=self.config.dropout, mean=data[0][1].mean())
            freeze(network, trained_layers=self.config.trained_layers)
            self.history_ = self._train(
                network,
                data,
                padding=tokenizer.pad_token_id or 0,
                seed=seed,
                directory=directory,
                on_progress=on_progress,
            )
        self.network_, self.tokenizer_ = network, tokenizer
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in [0, 1].

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        if self.network_ is None:
            raise not_fitted(self.config.name)
        max_length = min(
            self.config.max_length, token_limit(self.network_["encoder"], self.tokenizer_)
        )
        ids = token_ids(self.tokenizer_, prompts, max_length=max_length) if len(prompts) else []
        self.network_.to(scoring_device(self.config.trainer))
        return _win_rates(self.network_, ids)

    def save(self, directory: Path) -> None:
        """Save the encoder, its tokenizer and the layer on top; nothing else is needed to load."""
        if self.network_ is None:
            raise not_fitted(self.config.name)
        save_transformer(self.network_["encoder"], self.tokenizer_, directory / ENCODER_FOLDER)
        head = self.network_["head"]
        write_state(
            directory,
            router="hybrid",
            config=settings_json(self.config),
            values={"history": self.history_},
            arrays={
                "weight": head.weight.detach().cpu().numpy(),
                "bias": head.bias.detach().cpu().numpy(),
            },
            folders=[ENCODER_FOLDER],
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """
        import torch

        state = read_state(directory, router="hybrid", config=Hybrid, arrays=["weight", "bias"])
        router = cls(state.config)
        encoder, router.tokenizer_ = load_transformer(str(directory / ENCODER_FOLDER))
        router.network_ = _network(encoder, dropout=state.config.dropout, mean=0.5)
        router.network_["head"].load_state_dict(
            {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        )
        router.network_.eval()
        router.history_ = state.values["history"]
        return router

    def _train(
        self,
        network: Any,
        data: list[tuple[list[list[int]], np.ndarray]],
        *,
        padding: int,
        seed: int,
        directory: Path | None,
        on_progress: Progress | None,
    ) -> History:
        """Train in place; data: (token numbers, win rates) of training and maybe validation."""
        import torch

        settings = self.config.trainer

        def loss(batch: Any) -> Any:
            ids, mask, labels = batch
            logits = _logits(network, ids, mask).float()
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

        def validation_loss() -> float:
            ids, labels = data[1]
            return _loss(_win_rates(network, ids), labels)

        return train(
            network,
            TokenBatches(*data[0], size=settings.batch_size, padding=padding, seed=seed),
            loss=loss,
            validation_loss=validation_loss if data[1:] else None,
            weight_groups=lambda: encoder_and_head(network, settings),
            settings=settings,
            name=self.config.name,
            checkpoint=f"hybrid-{training_digest(network, data, self.config, seed)}",
            seed=seed,
            directory=directory,
            on_progress=on_progress,
        )


def _network(encoder: Any, *, dropout: float, mean: float) -> Any:
    """Return encoder and head; the head starts at the mean label, whatever the query."""
    import torch

    head = torch.nn.Linear(encoder.config.hidden_size, 1)
    share = float(np.clip(mean, 0.01, 0.99))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, float(np.log(share / (1 - share))))
    return torch.nn.ModuleDict(
        {"encoder": encoder, "dropout": torch.nn.Dropout(dropout), "head": head}
    )


def _logits(network: Any, ids: Any, mask: Any) -> Any:
    """Return one logit per row, (B,), of (B, length) tokens; mask: (B, length), or None for all."""
    return network["head"](network["dropout"](pooled(network["encoder"], ids, mask))).squeeze(-1)


def pooled(encoder: Any, ids: Any, mask: Any) -> Any:
    """Return the mean of each row's last hidden states, (B, d); ids and mask as in `_logits`."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def _win_rates(network: Any, ids: list[list[int]]) -> np.ndarray:
    import torch

    network.eval()
    device = network["head"].weight.device
    win_rate = np.empty(len(ids), dtype=np.float64)
    with torch.inference_mode():
        for rows, batch in equal_length_batches(ids):
            logits = _logits(network, torch.from_numpy(batch).to(device), None)
            win_rate[rows] = torch.sigmoid(logits.double())[: len(rows)].cpu().numpy()
    return win_rate


def freeze(network: Any, *, trained_layers: int | None) -> None:
    """Leave only the encoder's last layers, and the head, to be trained."""

    encoder = network["encoder"]
    network.train()
    if trained_layers is None:
        return
    stack = layer_stack(encoder)
    if trained_layers > len(stack):
        raise ConfigError(
            f"trained_layers is {trained_layers}, and the encoder has {len(stack)} layers. "
            f"Expected at most {len(stack)}. Correct trained_layers, or leave it out."
        )
    # Frozen layers stay in evaluation mode: their dropout would be noise that nothing learns from.
    encoder.requires_grad_(False).eval()
    for layer in stack[len(stack) - trained_layers :]:
        layer.requires_grad_(True).train()


def _loss(win_rate: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean binary cross-entropy."""
    likely = np.clip(win_rate, 1e-7, 1 - 1e-7)
    return float(-np.mean(labels * np.log(likely) + (1 - labels) * np.log1p(-likely)))


def training_digest(
    network: Any,
    data: list[tuple[list[list[int]], np.ndarray]],
    config: Settings,
    seed: int,
) -> str:
    """Hash what determines the trained weights."""
    digest = hashlib.sha256(weights_digest(network).encode())
    digest.update(config.model_dump_json(exclude={"name"}).encode())
    for ids, labels in data:
        digest.update(repr(ids).encode() + labels.tobytes())
    digest.update(str(seed).encode())
    return digest.hexdigest()[:16]
