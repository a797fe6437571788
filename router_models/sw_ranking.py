"""RouteLLM's similarity-weighted ranking: every query has its own ratings of the LLMs.

Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data", arXiv 2406.18665, section 4.2.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from scipy.sparse import csr_array

from conf.errors import ConfigError, unknown_name
from conf.routers import SimilarityWeighted
from router_models.encoders import (
    ENCODER_FOLDER,
    Encoder,
    load_encoder,
    load_saved_encoder,
    save_encoder,
)
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.tiers import (
    bradley_terry,
    connected_battles,
    llm_numbers,
    llm_tiers,
    virtual_wins,
)
from router_models.training_data import Comparisons

Progress = Callable[[int, int], None]

GAMMA = 10.0
# Queries weighed at once: 64 × 55,000 float32 are 14 MB, which caches still help with.
BLOCK = 64
# A query that resembles nothing has no meaningful ratio of similarities.
MIN_SIMILARITY = 0.01


class SimilarityWeightedRouter:
    """Rate the LLMs anew for every query, by the battles on similar queries.

    Idea: battle i weighs 10^(1 + S_i), where S_i is the cosine between its query and the one
    asked, divided by the largest such cosine. LLMs are grouped into tiers, so the weighted battles
    reduce to a table of wins between tiers, (tiers, tiers), for all queries of a batch in one
    matrix product. The Bradley-Terry ratings of that table are the exact weighted logistic fit to
    the battles, ties counted as half a win for either, and take a few Newton steps. Battles within
    one tier cannot tell tiers apart and are left out.
    Source: arXiv 2406.18665, equations 6 to 8, γ = 10, 10 tiers. Ratings exist unless some tiers
    never lost to the others; only then `virtual_wins` are added, at the query's mean weight.
    S is held to [−1, 1], and the largest cosine taken as at least 0.01.
    Requirements: battles that link the routed pair, through other LLMs too; memory for all
    distinct training queries' vectors.
    Relations: `knn` weighs the battles on the nearest queries only; `mf` learns from the same
    battles and needs none of them afterwards.

    >>> SimilarityWeightedRouter(SimilarityWeighted(name="example")).config.tiers
    10
    """

    def __init__(self, config: SimilarityWeighted) -> None:
        self.config = config
        self.encoder_: Encoder | None = None
        self.embeddings_ = np.zeros((0, 0), dtype=np.float32)
        """(n, d) unit vectors of the distinct training queries."""
        self.wins_ = csr_array((0, 0))
        """(tiers², n) what tier i won against tier j on each query, in row i · tiers + j."""
        self.tiers_: dict[str, int] = {}
        """Tier of each LLM, 0 for the strongest."""
        self.weak_, self.strong_ = "", ""
        self.history_: list[dict[str, float | None]] = []
        """Empty: nothing is trained in epochs."""

    def fit(
        self,
        train: Comparisons,
        validation: Comparisons | None = None,
        *,
        seed: int,
        directory: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Group the LLMs into tiers and count; validation is counted too.

        Raises DataError when no chain of battles links the routed pair.
        """
        train = train.joined(validation)
        tiers = llm_tiers(train, self.config.tiers)
        encoder = load_encoder(self.config.encoder, cache=self.config.encoder_cache)
        prompts, wins = _wins_between_tiers(connected_battles(train), tiers)
        self.embeddings_ = encoder.encode(prompts)
        self.encoder_, self.wins_, self.tiers_ = encoder, wins, tiers
        self.weak_, self.strong_ = train.weak, train.strong
        if on_progress is not None:
            on_progress(1, 1)
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in (0, 1).

        A prompt's number depends on the others by rounding only, by less than 1e-5: cosines are
        float32 products, whose last bits change with how many queries are multiplied together, and
        float64 would halve the speed. Raises ArtifactError before `fit`.
        """
        return self.win_rate_between(prompts, strong=self.strong_, weak=self.weak_)

    def save(self, directory: Path) -> None:
        """Save queries' vectors, wins and tiers, and the encoder unless it is packaged."""
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        folders = save_encoder(self.encoder_, directory)
        write_state(
            directory,
            router="sw_ranking",
            config=settings_json(self.config),
            values={
                "encoder": self.encoder_.description(),
                "tiers": self.tiers_,
                "weak": self.weak_,
                "strong": self.strong_,
            },
            arrays={
                "embeddings": self.embeddings_,
                "wins": self.wins_.data,
                "queries": self.wins_.indices,
                "starts": self.wins_.indptr,
            },
            folders=folders,
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """
        state = read_state(
            directory,
            router="sw_ranking",
            config=SimilarityWeighted,
            arrays=["embeddings", "wins", "queries", "starts"],
        )
        router = cls(state.config)
        router.encoder_ = load_saved_encoder(
            directory / ENCODER_FOLDER, description=state.values["encoder"]
        )
        router.tiers_ = state.values["tiers"]
        router.weak_, router.strong_ = state.values["weak"], state.values["strong"]
        router.embeddings_ = state.arrays["embeddings"]
        router.wins_ = csr_array(
            tuple(state.arrays[name] for name in ("wins", "queries", "starts")),
            shape=(router.tier_count() ** 2, len(router.embeddings_)),
        )
        return router

    def tier_count(self) -> int:
        """Return how many tiers there are."""
        return len(set(self.tiers_.values()))

    def win_rate_between(self, prompts: Sequence[str], *, strong: str, weak: str) -> np.ndarray:
        """Return the probability that ``strong`` beats ``weak``, (n,): any two known LLMs.

        It is 0.5 for two LLMs of one tier. Raises ConfigError for an LLM without battles.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        scores = self.scores(prompts, llms=[strong, weak])
        return 0.5 * (1 + np.tanh((scores[:, 0] - scores[:, 1]) / 2))

    def scores(self, prompts: Sequence[str], *, llms: Sequence[str]) -> np.ndarray:
        """Return each query's ratings of ``llms``, (n, len(llms)), natural log-odds.

        LLMs of one tier have the same; only differences within a row mean something. Raises
        ConfigError for an LLM without battles.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        for llm in llms:
            if llm not in self.tiers_:
                raise ConfigError(
                    unknown_name("LLM", llm, self.tiers_)
                    + " Expected LLMs with battles in the training data. Choose one of them."
                )
        return self.tier_ratings(prompts)[:, [self.tiers_[llm] for llm in llms]]

    def tier_ratings(self, prompts: Sequence[str]) -> np.ndarray:
        """Return each query's ratings of the tiers, (n, tiers), natural log-odds of mean 0."""
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        count = self.tier_count()
        queries = self.encoder_.encode(prompts)
        overall = np.asarray(self.wins_.sum(axis=1)).reshape(count, count)
        prior = virtual_wins(overall)
        start = bradley_terry((overall + prior)[None])[0]
        ratings = np.empty((len(prompts), count))
        for first in range(0, len(prompts), BLOCK):
            weights = similarity_weights(self.embeddings_, queries[first : first + BLOCK])
            wins = (self.wins_ @ weights).T.reshape(-1, count, count)
            # The prior is a number of battles, so it weighs what the query's battles weigh.
            mean_weight = wins.sum(axis=(1, 2)) / overall.sum()
            wins += mean_weight[:, None, None] * prior
            ratings[first : first + BLOCK] = bradley_terry(wins, start=start)
        return ratings


def similarity_weights(embeddings: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the weight 10^(1 + S) of each training query, (n, B), for unit vectors (·, d)."""
    weights = embeddings @ queries.T
    # In place: at 55,000 queries a new array costs as much as the arithmetic.
    weights /= np.maximum(weights.max(axis=0), MIN_SIMILARITY)
    np.clip(weights, -1.0, 1.0, out=weights)
    weights += 1.0
    weights *= np.float32(np.log(GAMMA))
    return np.exp(weights, out=weights)


def _wins_between_tiers(battles: Comparisons, tiers: dict[str, int]) -> tuple[list[str], csr_array]:
    """Return the distinct queries, and what tier i won against tier j on each, (tiers², n)."""
    names, count = list(tiers), len(set(tiers.values()))
    number = np.array(list(tiers.values()))
    a, b = (number[side] for side in llm_numbers(battles, names))
    # Queries stand in the order of the rows they belong to: `tier_ratings` then multiplies ten
    # times as fast, because it reads their weights one after the other.
    useful = np.flatnonzero(a != b)
    useful = useful[np.argsort(a[useful] * count + b[useful], kind="stable")]
    a, b, a_wins = a[useful], b[useful], battles.a_wins[useful]
    position: dict[str, int] = {}
    query = [position.setdefault(battles.prompts[row], len(position)) for row in useful]
    rows = np.concatenate([a * count + b, b * count + a])
    wins = csr_array(
        (np.concatenate([a_wins, 1 - a_wins]), (rows, np.tile(query, 2))),
        shape=(count * count, len(position)),
    )
    wins.eliminate_zeros()
    return list(position), wins
