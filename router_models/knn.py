"""Nearest neighbours on frozen embeddings: the baseline that every trained router must beat.

Of two LLMs the neighbours' outcomes are averaged (`_smoothed`); of more, ratings are fitted to
their battles (`_local_ratings`), which for two LLMs is the same number. Both stand here, so that
one file is the whole router.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np
from scipy.sparse import csr_array

from conf.errors import ConfigError, unknown_name
from conf.routers import Knn
from router_models.encoders import (
    ENCODER_FOLDER,
    Encoder,
    load_encoder,
    load_saved_encoder,
    save_encoder,
)
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.tiers import bradley_terry, connected_battles, llm_numbers
from router_models.training_data import Comparisons

Progress = Callable[[int, int], None]

# Rows of similarities held at once: 512 × 15,000 in float64 are 60 MB.
BLOCK = 512
# With more than two LLMs every setting is tried on at most so many queries, fewer of many LLMs:
# the time for one query's ratings grows with the square of their number, and faster.
TRIED, TRIED_AT_LEAST, TRIED_TABLES = 1000, 200, 50_000


class KnnRouter:
    """Average the labels of the most similar training queries.

    Idea: with s_1 ≥ s_2 ≥ … the cosines to the training queries, the j-th of the k nearest weighs
    exp(s_j / T) − exp(s_{k+1} / T). The weight falls to zero where a query would leave the
    neighbourhood, so the win rate is continuous in the query and near-ties cannot flip it. The
    weighted mean is drawn towards the overall mean as if by c more neighbours, so it is never 0 or
    1. k, T and c have the best leave-one-out log loss on the training queries.
    With more than two LLMs the neighbours' battles between any of them, weighed the same, are a
    table of wins, drawn towards the table of all battles, and the win rate is that of the table's
    Bradley-Terry ratings: so two LLMs that never met are compared through those that both met.
    Source: kernel-weighted nearest neighbours (Cover and Hart 1967; Hechenbichler and Schliep
    2004), local likelihood (Tibshirani and Hastie 1987) for the ratings; recent router benchmarks
    find them hard to beat.
    Requirements: battles that link the routed pair, through other LLMs too; exact search, 2 GFLOP
    per query at 15,000 × 384 × batch.
    Relations: `mf` and `sw_ranking` read the same embeddings and battles, `sw_ranking` weighs all
    of them for every query; `hybrid` trains the encoder itself.

    >>> KnnRouter(Knn(name="example")).config.encoder
    'minilm'
    """

    def __init__(self, config: Knn) -> None:
        self.config = config
        self.encoder_: Encoder | None = None
        self.embeddings_ = np.zeros((0, 0), dtype=np.float32)
        """(n, d) unit vectors of the distinct training queries."""
        self.llms_: list[str] = []
        """The strong LLM, the weak one, and then the others."""
        self.shares_ = csr_array((0, 0))
        """(n, LLMs²) how often the first of two LLMs won on each query, in column first · LLMs +
        second, first < second; pairs that did not meet there have no entry."""
        self.neighbours_, self.temperature_, self.prior_count_ = 0, 1.0, 1.0
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
        """Embed the training queries and choose k, T and c; validation is learnt from too.

        Raises DataError when no chain of battles links the routed pair, ArtifactError for an
        unusable encoder.
        """
        battles = connected_battles(train.joined(validation))
        others = {*battles.llm_a, *battles.llm_b} - {train.strong, train.weak}
        llms = [train.strong, train.weak, *sorted(others)]
        distinct, shares = _shares_by_prompt(battles, llms)
        encoder = load_encoder(self.config.encoder, cache=self.config.encoder_cache)
        embeddings = encoder.encode(distinct)
        if others:
            chosen = _best_rating_settings(
                embeddings, shares, self.config, llms=len(llms), on_progress=on_progress
            )
        else:
            chosen = _best_settings(
                embeddings, _pair_labels(shares), self.config, on_progress=on_progress
            )
        self.neighbours_, self.temperature_, self.prior_count_ = chosen
        self.encoder_, self.embeddings_ = encoder, embeddings
        self.llms_, self.shares_ = llms, shares
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in (0, 1).

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        if len(self.llms_) > 2:
            return self.win_rate_between(prompts, strong=self.llms_[0], weak=self.llms_[1])
        labels, win_rate = _pair_labels(self.shares_), np.empty(len(prompts), dtype=np.float64)
        queries = self.encoder_.encode(prompts)
        for rows, cosines, near in _nearest(queries, self.embeddings_, count=self.neighbours_ + 1):
            win_rate[rows] = _smoothed(
                cosines,
                labels[near],
                base=_base(labels),
                neighbours=self.neighbours_,
                temperature=self.temperature_,
                prior_count=self.prior_count_,
            )
        return win_rate

    def save(self, directory: Path) -> None:
        """Save the queries' vectors and outcomes, and the encoder unless it is packaged."""
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        folders = save_encoder(self.encoder_, directory)
        write_state(
            directory,
            router="knn",
            config=settings_json(self.config),
            values={
                "encoder": self.encoder_.description(),
                "llms": self.llms_,
                "neighbours": self.neighbours_,
                "temperature": self.temperature_,
                "prior_count": self.prior_count_,
            },
            arrays={
                "embeddings": self.embeddings_,
                "shares": self.shares_.data,
                "pairs": self.shares_.indices,
                "starts": self.shares_.indptr,
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
            router="knn",
            config=Knn,
            arrays=["embeddings", "shares", "pairs", "starts"],
        )
        router = cls(state.config)
        router.encoder_ = load_saved_encoder(
            directory / ENCODER_FOLDER, description=state.values["encoder"]
        )
        router.embeddings_, router.llms_ = state.arrays["embeddings"], state.values["llms"]
        router.shares_ = csr_array(
            tuple(state.arrays[name] for name in ("shares", "pairs", "starts")),
            shape=(len(router.embeddings_), len(router.llms_) ** 2),
        )
        router.neighbours_ = int(state.values["neighbours"])
        router.temperature_ = float(state.values["temperature"])
        router.prior_count_ = float(state.values["prior_count"])
        return router

    def win_rate_between(self, prompts: Sequence[str], *, strong: str, weak: str) -> np.ndarray:
        """Return the probability that ``strong`` beats ``weak``, (n,): any two known LLMs.

        That of b against a is 1 − that of a against b, and an LLM against itself has 0.5.
        Raises ConfigError for an LLM without battles.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        scores = self.scores(prompts, llms=[strong, weak])
        return 0.5 * (1 + np.tanh((scores[:, 0] - scores[:, 1]) / 2))

    def scores(self, prompts: Sequence[str], *, llms: Sequence[str]) -> np.ndarray:
        """Return each query's ratings of ``llms``, (n, len(llms)), natural log-odds.

        Only differences within a row mean something: σ(a's − b's) is the probability that a beats
        b. Raises ConfigError for an LLM without battles.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        for llm in llms:
            if llm not in self.llms_:
                raise ConfigError(
                    unknown_name("LLM", llm, self.llms_)
                    + " Expected LLMs with battles in the training data. Choose one of them."
                )
        columns = [self.llms_.index(llm) for llm in llms]
        if len(self.llms_) == 2:
            win_rate = self.win_rate(prompts)
            ratings = np.stack([np.log(win_rate), np.log1p(-win_rate)], axis=1)
            return ratings[:, columns]
        table = _OutcomeTable(self.shares_, len(self.llms_))
        ratings = np.empty((len(prompts), len(self.llms_)))
        queries = self.encoder_.encode(prompts)
        for rows, cosines, near in _nearest(queries, self.embeddings_, count=self.neighbours_ + 1):
            ratings[rows] = _local_ratings(
                cosines,
                near,
                table,
                base=table.base(),
                neighbours=self.neighbours_,
                temperature=self.temperature_,
                prior_count=self.prior_count_,
            )
        return ratings[:, columns]


def _shares_by_prompt(battles: Comparisons, llms: Sequence[str]) -> tuple[list[str], csr_array]:
    """Return the distinct queries, and how often the first of two LLMs won on each, (n, LLMs²).

    A query's battles between the same two LLMs are averaged, as repeated prompts are merged: left
    in, they would be each other's perfect neighbours.
    """
    distinct = list(dict.fromkeys(battles.prompts))
    position = {prompt: at for at, prompt in enumerate(distinct)}
    query = np.array([position[prompt] for prompt in battles.prompts])
    a, b = llm_numbers(battles, llms)
    share = np.where(a < b, battles.a_wins, 1 - battles.a_wins)
    pair = np.minimum(a, b) * len(llms) + np.maximum(a, b)
    cells, cell = np.unique(query * len(llms) ** 2 + pair, return_inverse=True)
    mean = np.bincount(cell, weights=share) / np.bincount(cell)
    rows, columns = np.divmod(cells, len(llms) ** 2)
    starts = np.searchsorted(rows, np.arange(len(distinct) + 1))
    return distinct, csr_array(
        (mean, columns.astype(np.int64), starts.astype(np.int64)),
        shape=(len(distinct), len(llms) ** 2),
    )


def _pair_labels(shares: csr_array) -> np.ndarray:
    """Return the mean win rate on each query, (n,), of the only two LLMs."""
    return np.asarray(shares.data, dtype=np.float64)


def _base(labels: np.ndarray) -> float:
    """Return the mean label, kept off 0 and 1."""
    return float((labels.sum() + 0.5) / (len(labels) + 1))


def _best_settings(
    embeddings: np.ndarray, labels: np.ndarray, config: Knn, *, on_progress: Progress | None
) -> tuple[int, float, float]:
    """Return the (k, T, c) with the smallest leave-one-out log loss; the first of equals."""
    others = len(labels) - 1
    # One neighbour beyond the k-th is needed, and one row is left out.
    sizes = sorted({min(size, others - 1) for size in config.neighbours})
    if sizes[-1] < 1:
        return 0, config.temperatures[0], config.prior_counts[0]
    settings = list(product(sizes, config.temperatures, config.prior_counts))
    losses = np.zeros(len(settings))
    done = 0
    for rows, cosines, near in _nearest(
        embeddings, embeddings, count=sizes[-1] + 1, own=np.arange(len(labels))
    ):
        # The row's own label must not reach it through the overall mean either.
        base = (labels.sum() - labels[rows] + 0.5) / (others + 1)
        for at, (size, temperature, prior_count) in enumerate(settings):
            share = _smoothed(
                cosines,
                labels[near],
                base=base,
                neighbours=size,
                temperature=temperature,
                prior_count=prior_count,
            )
            losses[at] -= (
                labels[rows] * np.log(share) + (1 - labels[rows]) * np.log1p(-share)
            ).sum()
        done += len(rows)
        if on_progress is not None:
            on_progress(done, len(labels))
    return settings[int(np.argmin(losses))]


def _nearest(
    queries: np.ndarray, embeddings: np.ndarray, *, count: int, own: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (rows, cosines, positions) per block: ``count`` nearest, (b, count), nearest first.

    own: (n,) the position in ``embeddings`` of each query itself, which is not its own neighbour.
    """
    count = min(count, len(embeddings) - int(own is not None))
    # float64: in float32 a row's last bits depend on how many rows are multiplied together.
    known = embeddings.astype(np.float64).T
    for start in range(0, len(queries), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(queries)))
        cosines = queries[rows].astype(np.float64) @ known
        if own is not None:
            cosines[np.arange(len(rows)), own[rows]] = -np.inf
        near = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosines, near, axis=1), axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        yield rows, np.take_along_axis(cosines, near, axis=1), near


def _smoothed(
    cosines: np.ndarray,
    labels: np.ndarray,
    *,
    base: np.ndarray | float,
    neighbours: int,
    temperature: float,
    prior_count: float,
) -> np.ndarray:
    """Return the smoothed mean of sorted neighbours, (b,); see the class for the weights.

    The neighbourhood counts as (Σw)² / Σw² queries, the prior as ``prior_count``.
    """
    if neighbours < 1:
        return np.broadcast_to(base, len(cosines)).copy()
    weights, total, count = _neighbourhood(cosines, neighbours, temperature)
    mean = (weights * labels[:, :neighbours]).sum(axis=1) / total
    return (count * mean + prior_count * base) / (count + prior_count)


def _neighbourhood(
    cosines: np.ndarray, neighbours: int, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the neighbours' weights, (b, k), their sum, and how many queries they count as.

    That is (Σw)² / Σw²; 0, and the sum 1, where nothing but rounding tells them apart.
    """
    nearest = cosines[:, :1]
    edge = np.exp((cosines[:, neighbours : neighbours + 1] - nearest) / temperature)
    weights = np.exp((cosines[:, :neighbours] - nearest) / temperature) - edge
    total = weights.sum(axis=1)
    # Where all of them are equally near, rounding alone would choose among them.
    clear = total > 1e-9
    total = np.where(clear, total, 1.0)
    count = np.where(clear, total**2 / np.maximum((weights**2).sum(axis=1), 1e-300), 0.0)
    return weights, total, count


class _OutcomeTable:
    """The outcomes on all training queries, from which tables of wins between LLMs are summed."""

    def __init__(self, shares: csr_array, llms: int) -> None:
        self.llms = llms
        self.shares = shares
        self.met = csr_array((np.ones(shares.nnz), shares.indices, shares.indptr), shares.shape)
        self.queries = shares.shape[0]
        everything = csr_array(np.ones((1, self.queries)))
        self.total = self.wins(everything)[0]
        linked = (self.total + self.total.T) > 0
        # Half a win and half a loss for each LLM but one, spread over the pairs that met: no LLM
        # then has won everything, so ratings exist. Of two LLMs, this is what `_base` adds.
        self.virtual = (llms - 1) * linked / linked.sum()
        # c average queries of a pair are c outcomes that bear on its one unknown. With more LLMs
        # there are more unknowns; where a query tells of fewer, as many more queries are needed.
        pairs = shares.nnz / self.queries
        self.prior_scale = (llms - 1) / min(pairs, llms - 1)

    def wins(self, weights: csr_array) -> np.ndarray:
        """Return what each LLM won against each, (b, LLMs, LLMs), on queries weighed (b, n)."""
        shape = (weights.shape[0], self.llms, self.llms)
        first = (weights @ self.shares).toarray().reshape(shape)
        met = (weights @ self.met).toarray().reshape(shape)
        return first + np.maximum(met - first, 0.0).swapaxes(1, 2)

    def base(self) -> np.ndarray:
        """Return the wins on an average query, (LLMs, LLMs), 0 only where a pair never met."""
        return (self.total + self.virtual) / (self.queries + 1)

    def base_without(self, rows: np.ndarray) -> np.ndarray:
        """Return the same, (b, LLMs, LLMs), with each of ``rows`` left out in turn."""
        single = np.ones(len(rows)), rows, np.arange(len(rows) + 1)
        own = self.wins(csr_array(single, shape=(len(rows), self.queries)))
        return (np.maximum(self.total - own, 0.0) + self.virtual) / self.queries


def _local_wins(
    cosines: np.ndarray,
    near: np.ndarray,
    table: _OutcomeTable,
    *,
    neighbours: int,
    temperature: float,
) -> np.ndarray:
    """Return the neighbours' table of wins, (b, LLMs, LLMs), in units of one query."""
    if neighbours < 1:
        return np.zeros((len(cosines), table.llms, table.llms))
    weights, total, count = _neighbourhood(cosines, neighbours, temperature)
    weights = weights * (count / total)[:, None]
    starts = np.arange(len(weights) + 1) * neighbours
    rows = (weights.ravel(), near[:, :neighbours].ravel(), starts)
    return table.wins(csr_array(rows, shape=(len(weights), table.queries)))


def _local_ratings(
    cosines: np.ndarray,
    near: np.ndarray,
    table: _OutcomeTable,
    *,
    base: np.ndarray,
    neighbours: int,
    temperature: float,
    prior_count: float,
) -> np.ndarray:
    """Return the Bradley-Terry ratings, (b, LLMs), of the neighbours' battles and the prior's."""
    wins = _local_wins(cosines, near, table, neighbours=neighbours, temperature=temperature)
    start = bradley_terry(table.base()[None])[0]
    return bradley_terry(wins + prior_count * table.prior_scale * base, start=start)


def _best_rating_settings(
    embeddings: np.ndarray,
    shares: csr_array,
    config: Knn,
    *,
    llms: int,
    on_progress: Progress | None,
) -> tuple[int, float, float]:
    """Return the (k, T, c) with the smallest leave-one-out log loss of all battles."""
    queries = len(embeddings)
    # As in `_best_settings`: a neighbour beyond the k-th, and the query itself, are left over.
    sizes = sorted({min(size, queries - 2) for size in config.neighbours})
    if sizes[-1] < 1:
        return 0, config.temperatures[0], config.prior_counts[0]
    table = _OutcomeTable(shares, llms)
    start = bradley_terry(table.base()[None])[0]
    count = min(queries, TRIED, max(TRIED_AT_LEAST, TRIED_TABLES // llms**2))
    tried = np.linspace(0, queries - 1, count).astype(np.int64)
    settings = list(product(sizes, config.temperatures, config.prior_counts))
    losses = np.zeros(len(settings))
    done = 0
    for rows, cosines, near in _nearest(
        embeddings[tried], embeddings, count=sizes[-1] + 1, own=tried
    ):
        base = table.prior_scale * table.base_without(tried[rows])
        own = shares[tried[rows]]
        row, pair = np.repeat(np.arange(len(rows)), np.diff(own.indptr)), own.indices
        first, second = np.divmod(pair, llms)
        for at, (size, temperature) in enumerate(product(sizes, config.temperatures)):
            wins = _local_wins(cosines, near, table, neighbours=size, temperature=temperature)
            for number, prior_count in enumerate(config.prior_counts):
                ratings = bradley_terry(wins + prior_count * base, start=start)
                gap = ratings[row, first] - ratings[row, second]
                # −log σ(gap) for a win and −log σ(−gap) for a loss, without overflow.
                loss = own.data * np.logaddexp(0, -gap) + (1 - own.data) * np.logaddexp(0, gap)
                losses[at * len(config.prior_counts) + number] += loss.sum()
        done += len(rows)
        if on_progress is not None:
            on_progress(done, count)
    return settings[int(np.argmin(losses))]
