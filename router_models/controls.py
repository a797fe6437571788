"""References that every comparison shows: what chance, and what mere length, would achieve.

The third reference, the oracle, needs the answers' qualities and is therefore no router:
`router_models.frontier.oracle_win_rate`.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from conf.routers import Length, Random
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.training_data import Comparisons

Progress = Callable[[int, int], None]


class RandomRouter:
    """Draw a win rate from a hash of seed and query.

    Idea: uniform on [0, 1) and unrelated to the query, yet the same for the same query, on every
    machine and in every batch. Its expected APGR is 0.5.
    Source: the random baseline of RouteLLM, arXiv 2406.18665, section 5.
    Requirements: none.
    Relations: the floor; `length` is the next step up.

    >>> RandomRouter(Random()).config.name
    'random'
    """

    def __init__(self, config: Random) -> None:
        self.config = config
        self.seed_: int | None = None
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
        """Remember the seed; nothing else is learned."""
        self.seed_ = seed
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return a number that has nothing to do with the prompt's difficulty, (n,) in [0, 1).

        Raises ArtifactError before `fit`.
        """
        if self.seed_ is None:
            raise not_fitted(self.config.name)
        return np.array([_uniform(self.seed_, prompt) for prompt in prompts], dtype=np.float64)

    def save(self, directory: Path) -> None:
        """Save the seed."""
        if self.seed_ is None:
            raise not_fitted(self.config.name)
        write_state(
            directory,
            router="random",
            config=settings_json(self.config),
            values={"seed": self.seed_},
            arrays={},
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router. Raises ArtifactError for missing or damaged files."""
        state = read_state(directory, router="random", config=Random, arrays=[])
        router = cls(state.config)
        router.seed_ = int(state.values["seed"])
        return router


class LengthRouter:
    """Fit a logistic curve to the logarithm of the query's length.

    Idea: win rate = σ(a + b · log(1 + characters)). The sign of b is learned: in some data the long
    queries are the hard ones, in others the short. A router that does no better has learned length.
    Source: logistic regression on soft labels by Newton's method.
    Requirements: none.
    Relations: a one-feature `hybrid`; equal lengths give equal win rates.

    >>> LengthRouter(Length()).config.name
    'length'
    """

    def __init__(self, config: Length) -> None:
        self.config = config
        self.intercept_: float | None = None
        self.slope_ = 0.0
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
        """Fit intercept and slope; validation and seed are not needed.

        Raises DataError when the pair was never compared.
        """
        prompts, win_rate = train.labels()
        self.intercept_, self.slope_ = _logistic_line(_log_length(prompts), win_rate)
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in (0, 1).

        Raises ArtifactError before `fit`.
        """
        if self.intercept_ is None:
            raise not_fitted(self.config.name)
        return _sigmoid(self.intercept_ + self.slope_ * _log_length(prompts))

    def save(self, directory: Path) -> None:
        """Save intercept and slope."""
        if self.intercept_ is None:
            raise not_fitted(self.config.name)
        write_state(
            directory,
            router="length",
            config=settings_json(self.config),
            values={"intercept": self.intercept_, "slope": self.slope_},
            arrays={},
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router. Raises ArtifactError for missing or damaged files."""
        state = read_state(directory, router="length", config=Length, arrays=[])
        router = cls(state.config)
        router.intercept_ = float(state.values["intercept"])
        router.slope_ = float(state.values["slope"])
        return router


def _uniform(seed: int, text: str) -> float:
    digest = hashlib.blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=8)
    # 53 bits: as many as a float64 in [0, 1) holds without rounding up to 1.
    return (int.from_bytes(digest.digest()) >> 11) / 2.0**53


def _log_length(prompts: Sequence[str]) -> np.ndarray:
    return np.log1p(np.array([len(prompt) for prompt in prompts], dtype=np.float64))


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * logit))


def _logistic_line(feature: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return intercept and slope of the soft-label logistic fit, by Newton's method.

    A prior of one query's weight on both, on the standardised feature, keeps them finite when
    the labels can be separated.
    """
    centre, spread = float(feature.mean()), float(feature.std()) or 1.0
    design = np.stack([np.ones_like(feature), (feature - centre) / spread], axis=1)
    line = np.zeros(2)
    for _ in range(50):
        share = _sigmoid(design @ line)
        gradient = design.T @ (labels - share) - line
        curvature = (design * (share * (1 - share))[:, np.newaxis]).T @ design + np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        line = line + step
        if np.abs(step).max() < 1e-12:
            break
    slope = float(line[1]) / spread
    return float(line[0]) - slope * centre, slope
