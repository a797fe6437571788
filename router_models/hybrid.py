"""Hybrid LLM's router: an encoder fine-tuned to tell when the weak LLM will do.

Ding et al., "Hybrid LLM: Cost-Efficient and Quality-Aware Query Routing", arXiv 2404.14618.
The network, an encoder with a layer on top, is also that of `bert`; how it is fitted and asked
stands in `fine_tuned`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from conf.errors import ConfigError
from conf.routers import Hybrid
from conf.settings import Settings
from router_models.encoders import ENCODER_FOLDER
from router_models.fine_tuned import FineTunedRouter, Objective, Tokens
from router_models.lightning_loop import decaying
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.transformer import (
    layer_stack,
    load_transformer,
    save_transformer,
    token_ids,
    token_limit,
)


class EncoderRouter(FineTunedRouter):
    """An encoder, mean-pooled, with dropout and a linear layer on top (`network_["head"]`)."""

    settings: ClassVar[type[Settings]]

    def save(self, directory: Path) -> None:
        """Save the encoder, its tokenizer and the layer on top; nothing else is needed to load."""
        if self.network_ is None:
            raise not_fitted(self.config.name)
        save_transformer(self.network_["encoder"], self.tokenizer_, directory / ENCODER_FOLDER)
        head = self.network_["head"].state_dict()
        write_state(
            directory,
            router=self.kind,
            config=settings_json(self.config),
            values={"history": self.history_},
            arrays={name: weight.cpu().numpy() for name, weight in head.items()},
            folders=[ENCODER_FOLDER],
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """
        import torch

        state = read_state(
            directory, router=cls.kind, config=cls.settings, arrays=["weight", "bias"]
        )
        router = cls(state.config)
        encoder, router.tokenizer_ = load_transformer(str(directory / ENCODER_FOLDER))
        router.network_ = router._with_head(encoder)
        weights = {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        router.network_["head"].load_state_dict(weights)
        router.network_.eval()
        router.history_ = state.values["history"]
        return router

    def _pretrained(self) -> tuple[Any, Any]:
        return load_transformer(self.config.encoder)

    def _with_head(self, encoder: Any) -> Any:
        import torch

        head = torch.nn.Linear(encoder.config.hidden_size, self.objective.outputs)
        dropout = torch.nn.Dropout(self.config.dropout)
        return torch.nn.ModuleDict({"encoder": encoder, "dropout": dropout, "head": head})

    def _network(self, model: Any, *, mean: np.ndarray) -> Any:
        """Return encoder and head; the head starts at the mean target, whatever the query."""
        import torch

        network = self._with_head(model)
        with torch.no_grad():
            network["head"].weight.zero_()
            network["head"].bias.copy_(torch.from_numpy(self.objective.logits(mean)))
        freeze(network, trained_layers=self.config.trained_layers)
        return network

    def _tokens(self, network: Any, tokenizer: Any, prompts: Sequence[str]) -> Tokens:
        limit = token_limit(network["encoder"], tokenizer)
        return token_ids(tokenizer, prompts, max_length=min(self.config.max_length, limit))

    def _logits(self, network: Any, ids: Any, mask: Any) -> Any:
        return network["head"](network["dropout"](pooled(network["encoder"], ids, mask)))

    def _weight_groups(self, network: Any) -> list[dict[str, Any]]:
        trainer = self.config.trainer
        rates = {"encoder": trainer.learning_rate, "head": trainer.head_learning_rate}
        return [
            group
            for part, rate in rates.items()
            for group in decaying(
                network[part].parameters(), rate=rate, weight_decay=trainer.weight_decay
            )
        ]


def _loss(logits: Any, targets: Any) -> Any:
    import torch

    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)


def _start(mean: np.ndarray) -> np.ndarray:
    share = np.clip(mean, 0.01, 0.99)
    return np.log(share / (1 - share))


def _mean_loss(win_rate: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean binary cross-entropy."""
    likely = np.clip(win_rate, 1e-7, 1 - 1e-7)
    return float(-np.mean(labels * np.log(likely) + (1 - labels) * np.log1p(-likely)))


# One output, the logit of the win rate; the labels are win rates themselves.
SHARE = Objective(
    outputs=1,
    targets=lambda win_rate: win_rate[:, None],
    loss=_loss,
    probabilities=lambda logits: logits.sigmoid(),
    logits=_start,
    mean_loss=_mean_loss,
    win_rate=lambda shares, config: shares[:, 0],
)


class HybridRouter(EncoderRouter):
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

    >>> HybridRouter(Hybrid(name="example")).config.labels
    'transformed'
    """

    kind = "hybrid"
    settings = Hybrid
    objective = SHARE


def pooled(encoder: Any, ids: Any, mask: Any) -> Any:
    """Return the mean of each row's last hidden states, (B, d), of (B, length) tokens."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


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
