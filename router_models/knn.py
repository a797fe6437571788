"""Nearest neighbours on frozen embeddings: the baseline that every trained router must beat."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np

from conf.schema import Knn
from router_models.encoders import (
    ENCODER_FOLDER,
    Encoder,
    load_encoder,
    load_saved_encoder,
    save_encoder,
)
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.training_data import Comparisons

Progress = Callable[[int, int], None]

# Rows of similarities held at once: 512 × 15,000 in float64 are 60 MB.
BLOCK = 512


class KnnRouter:
    """Average the labels of the most similar training queries.

    Idea: with s_1 ≥ s_2 ≥ … the cosines to the training queries, the j-th of the k nearest weighs
    exp(s_j / T) − exp(s_{k+1} / T). The weight falls to zero where a query would leave the
    neighbourhood, so the win rate is continuous in the query and near-ties cannot flip it. The
    weighted mean is drawn towards the overall mean as if by c more neighbours, so it is never 0 or
    1. k, T and c have the best leave-one-out log loss on the training queries.
    Source: kernel-weighted nearest neighbours (Cover and Hart 1967; Hechenbichler and Schliep
    2004); recent router benchmarks find them hard to beat.
    Requirements: none beyond an encoder; exact search, 2 GFLOP per query at 15,000 × 384 × batch.
    Relations: `mf` and `sw_ranking` read the same embeddings; `hybrid` trains the encoder itself.

    >>> KnnRouter(Knn(name="example")).config.encoder
    'minilm'
    """

    def __init__(self, config: Knn) -> None:
        self.config = config
        self.encoder_: Encoder | None = None
        self.embeddings_ = np.zeros((0, 0), dtype=np.float32)
        """(n, d) unit vectors of the distinct training queries."""
        self.labels_ = np.zeros(0)
        """(n,) their mean win rates."""
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
        """Embed the training queries and choose k, T and c; validation, seed are not needed.

        Raises DataError when the pair was never compared, ArtifactError for an unusable encoder.
        """
        prompts, win_rate = train.labels()
        distinct, labels = _mean_by_prompt(prompts, win_rate)
        encoder = load_encoder(self.config.encoder, cache=self.config.encoder_cache)
        embeddings = encoder.encode(distinct)
        chosen = _best_settings(embeddings, labels, self.config, on_progress=on_progress)
        self.neighbours_, self.temperature_, self.prior_count_ = chosen
        self.encoder_, self.embeddings_, self.labels_ = encoder, embeddings, labels
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in (0, 1).

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        win_rate = np.empty(len(prompts), dtype=np.float64)
        queries = self.encoder_.encode(prompts)
        for rows, cosines, labels in _nearest(
            queries, self.embeddings_, self.labels_, count=self.neighbours_ + 1
        ):
            win_rate[rows] = _smoothed(
                cosines,
                labels,
                base=_base(self.labels_),
                neighbours=self.neighbours_,
                temperature=self.temperature_,
                prior_count=self.prior_count_,
            )
        return win_rate

    def save(self, directory: Path) -> None:
        """Save the training queries' vectors and labels, and the encoder unless it is packaged."""
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        folders = save_encoder(self.encoder_, directory)
        write_state(
            directory,
            router="knn",
            config=settings_json(self.config),
            values={
                "encoder": self.encoder_.description(),
                "neighbours": self.neighbours_,
                "temperature": self.temperature_,
                "prior_count": self.prior_count_,
            },
            arrays={"embeddings": self.embeddings_, "labels": self.labels_},
            folders=folders,
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """
        state = read_state(directory, router="knn", config=Knn, arrays=["embeddings", "labels"])
        router = cls(state.config)
        router.encoder_ = load_saved_encoder(
            directory / ENCODER_FOLDER, description=state.values["encoder"]
        )
        router.embeddings_, router.labels_ = state.arrays["embeddings"], state.arrays["labels"]
        router.neighbours_ = int(state.values["neighbours"])
        router.temperature_ = float(state.values["temperature"])
        router.prior_count_ = float(state.values["prior_count"])
        return router


def _mean_by_prompt(prompts: list[str], win_rate: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Merge repeated prompts: left in, they would be each other's perfect neighbours."""
    distinct = list(dict.fromkeys(prompts))
    position = {prompt: at for at, prompt in enumerate(distinct)}
    rows = np.array([position[prompt] for prompt in prompts])
    counts = np.bincount(rows, minlength=len(distinct))
    return distinct, np.bincount(rows, weights=win_rate, minlength=len(distinct)) / counts


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
        embeddings, embeddings, labels, count=sizes[-1] + 1, leave_one_out=True
    ):
        # The row's own label must not reach it through the overall mean either.
        base = (labels.sum() - labels[rows] + 0.5) / (others + 1)
        for at, (size, temperature, prior_count) in enumerate(settings):
            share = _smoothed(
                cosines,
                near,
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
    queries: np.ndarray,
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    count: int,
    leave_one_out: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (rows, cosines, labels) per block: the ``count`` nearest, (b, count), nearest first.

    leave_one_out: query i is embedding i, which is not its own neighbour.
    """
    count = min(count, len(embeddings) - int(leave_one_out))
    # float64: in float32 a row's last bits depend on how many rows are multiplied together.
    known = embeddings.astype(np.float64).T
    for start in range(0, len(queries), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(queries)))
        cosines = queries[rows].astype(np.float64) @ known
        if leave_one_out:
            cosines[np.arange(len(rows)), rows] = -np.inf
        near = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosines, near, axis=1), axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        yield rows, np.take_along_axis(cosines, near, axis=1), labels[near]


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
    nearest = cosines[:, :1]
    edge = np.exp((cosines[:, neighbours : neighbours + 1] - nearest) / temperature)
    weights = np.exp((cosines[:, :neighbours] - nearest) / temperature) - edge
    total = weights.sum(axis=1)
    # Where all of them are equally near, rounding alone would choose among them.
    clear = total > 1e-9
    total = np.where(clear, total, 1.0)
    mean = (weights * labels[:, :neighbours]).sum(axis=1) / total
    count = np.where(clear, total**2 / np.maximum((weights**2).sum(axis=1), 1e-300), 0.0)
    return (count * mean + prior_count * base) / (count + prior_count)
