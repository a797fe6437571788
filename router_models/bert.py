"""RouteLLM's BERT classifier: an encoder fine-tuned to name the winner, ties included.

Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data", arXiv 2406.18665, section 4.2.
Encoder, pooling and frozen layers are those of `hybrid`; the head and the loss are this file's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from conf.routers import Bert
from router_models.encoders import (
    ENCODER_FOLDER,
    equal_length_batches,
    load_transformer,
    save_transformer,
    token_ids,
    token_limit,
)
from router_models.hybrid import freeze, pooled, training_digest
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


class BertRouter:
    """Fine-tune a BERT-style encoder on three verdicts: strong wins, tie, weak wins.

    Idea: mean-pool the last hidden states, put a linear layer and a softmax on top, and minimise
    the cross-entropy with the verdicts of the routed pair's own battles. An outcome between the
    three (a share of wins) is split between its two neighbours, so that no battle is thrown away.
    The win rate is P(strong wins) + P(tie) / 2.
    Source: arXiv 2406.18665, section 4.2, which writes one sigmoid on the first token's state.
    RouteLLM's released code has the three classes and counts every tie for the weak LLM
    (`tie_share: 0`). Half a tie is better for ranking: with outcomes 1, ½ and 0, P(strong) +
    P(tie) / 2 is the expected outcome, hence in the order of the expected gap, which is what APGR
    rewards. Without the tie, a query on which either LLM wins half of the time (gap 0) would come
    before one where the strong LLM wins four in ten and loses none.
    Requirements: battles of the routed pair (or of its tiers), and an encoder that
    `transformers.AutoModel` loads. The paper's run is BERT-base, all layers.
    Relations: `hybrid` predicts a share instead of three verdicts; `causal_llm` asks a language
    model for the same three.

    >>> BertRouter(Bert(name="example")).config.tie_share
    0.5
    """

    def __init__(self, config: Bert) -> None:
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

        encoder, tokenizer = load_transformer(self.config.encoder)
        max_length = min(self.config.max_length, token_limit(encoder, tokenizer))
        data = []
        for part in (train, validation):
            if part is not None:
                prompts, outcomes = part.labels()
                ids = token_ids(tokenizer, prompts, max_length=max_length)
                data.append((ids, verdict_shares(outcomes)))
        # The caller's random state is none of our business, before and after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(encoder, dropout=self.config.dropout, shares=data[0][1].mean(axis=0))
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
        """Return the expected share of battles that the strong LLM wins, (n,) float64 in [0, 1].

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        return win_rate_of(self.verdicts(prompts), tie_share=self.config.tie_share)

    def save(self, directory: Path) -> None:
        """Save the encoder, its tokenizer and the layer on top; nothing else is needed to load."""
        if self.network_ is None:
            raise not_fitted(self.config.name)
        save_transformer(self.network_["encoder"], self.tokenizer_, directory / ENCODER_FOLDER)
        head = self.network_["head"]
        write_state(
            directory,
            router="bert",
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

        state = read_state(directory, router="bert", config=Bert, arrays=["weight", "bias"])
        router = cls(state.config)
        encoder, router.tokenizer_ = load_transformer(str(directory / ENCODER_FOLDER))
        router.network_ = _network(encoder, dropout=state.config.dropout, shares=np.full(3, 1 / 3))
        router.network_["head"].load_state_dict(
            {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        )
        router.network_.eval()
        router.history_ = state.values["history"]
        return router

    def verdicts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probabilities of strong wins, tie and weak wins, (n, 3) float64."""
        if self.network_ is None:
            raise not_fitted(self.config.name)
        limit = token_limit(self.network_["encoder"], self.tokenizer_)
        max_length = min(self.config.max_length, limit)
        ids = token_ids(self.tokenizer_, prompts, max_length=max_length) if len(prompts) else []
        self.network_.to(scoring_device(self.config.trainer))
        return _verdicts(self.network_, ids)

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
        """Train in place; data: (token numbers, verdicts) of training and maybe validation."""
        import torch

        settings = self.config.trainer

        def loss(batch: Any) -> Any:
            ids, mask, shares = batch
            return torch.nn.functional.cross_entropy(_logits(network, ids, mask).float(), shares)

        def validation_loss() -> float:
            ids, shares = data[1]
            return cross_entropy(_verdicts(network, ids), shares)

        return train(
            network,
            TokenBatches(*data[0], size=settings.batch_size, padding=padding, seed=seed),
            loss=loss,
            validation_loss=validation_loss if data[1:] else None,
            weight_groups=lambda: encoder_and_head(network, settings),
            settings=settings,
            name=self.config.name,
            checkpoint=f"bert-{training_digest(network, data, self.config, seed)}",
            seed=seed,
            directory=directory,
            on_progress=on_progress,
        )


def verdict_shares(win_rate: np.ndarray) -> np.ndarray:
    """Return strong wins, tie and weak wins, (n, 3), for outcomes (n,) in [0, 1].

    1, ½ and 0 are one verdict each; what lies between is split between its two neighbours, which
    keeps the expected outcome: `win_rate_of` gives back the win rate.

    >>> verdict_shares(np.array([1.0, 0.5, 0.25])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]
    """
    lead = 2 * np.asarray(win_rate, dtype=np.float64) - 1
    return np.stack([np.maximum(lead, 0), 1 - np.abs(lead), np.maximum(-lead, 0)], axis=1)


def win_rate_of(verdicts: np.ndarray, *, tie_share: float) -> np.ndarray:
    """Return P(strong wins) + tie_share · P(tie), (n,), of verdicts (n, 3)."""
    return np.clip(verdicts[:, 0] + tie_share * verdicts[:, 1], 0.0, 1.0)


def cross_entropy(verdicts: np.ndarray, shares: np.ndarray) -> float:
    """Return the mean cross-entropy of predicted verdicts (n, 3) with what they were, (n, 3)."""
    return float(-np.mean((shares * np.log(np.clip(verdicts, 1e-7, 1.0))).sum(axis=1)))


def _network(encoder: Any, *, dropout: float, shares: np.ndarray) -> Any:
    """Return encoder and head; the head starts at the mean verdicts, whatever the query."""
    import torch

    head = torch.nn.Linear(encoder.config.hidden_size, 3)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.from_numpy(np.log(np.clip(shares, 0.01, 0.99))))
    return torch.nn.ModuleDict(
        {"encoder": encoder, "dropout": torch.nn.Dropout(dropout), "head": head}
    )


def _logits(network: Any, ids: Any, mask: Any) -> Any:
    """Return three logits per row, (B, 3), of (B, length) tokens; mask: None for all of them."""
    return network["head"](network["dropout"](pooled(network["encoder"], ids, mask)))


def _verdicts(network: Any, ids: list[list[int]]) -> np.ndarray:
    import torch

    network.eval()
    device = network["head"].weight.device
    verdicts = np.empty((len(ids), 3), dtype=np.float64)
    with torch.inference_mode():
        for rows, batch in equal_length_batches(ids):
            logits = _logits(network, torch.from_numpy(batch).to(device), None)
            verdicts[rows] = logits.double().softmax(dim=1)[: len(rows)].cpu().numpy()
    return verdicts
