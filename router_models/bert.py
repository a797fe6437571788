"""RouteLLM's BERT classifier: an encoder fine-tuned to name the winner, ties included.

Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data", arXiv 2406.18665, section 4.2.
The network, and how it is saved, are those of `hybrid`; the verdicts are this file's.
"""

from typing import Any

import numpy as np

from conf.routers import Bert
from router_models.fine_tuned import Objective
from router_models.hybrid import EncoderRouter


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


def _loss(logits: Any, shares: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits, shares)


# Three outputs: strong wins, tie, weak wins, in this order.
VERDICTS = Objective(
    outputs=3,
    targets=verdict_shares,
    loss=_loss,
    probabilities=lambda logits: logits.softmax(dim=1),
    logits=lambda mean: np.log(np.clip(mean, 0.01, 0.99)),
    mean_loss=cross_entropy,
    win_rate=lambda verdicts, config: win_rate_of(verdicts, tie_share=config.tie_share),
)


class BertRouter(EncoderRouter):
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

    kind = "bert"
    settings = Bert
    objective = VERDICTS
