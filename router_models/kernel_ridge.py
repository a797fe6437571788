"""Kernel ridge regression on what a small LLM makes of a query, frozen.

Saunders, Gammerman and Vovk, "Ridge Regression Learning Algorithm in Dual Variables", ICML 1998;
leave-one-out errors in closed form: Rasmussen and Williams, Gaussian Processes for Machine
Learning (2006), equation 5.12.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from scipy.linalg import eigh

from conf.routers import KernelRidge
from router_models.encoders import (
    ENCODER_FOLDER,
    Encoder,
    encode_views,
    load_encoder,
    load_saved_encoder,
    save_encoder,
)
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.training_data import Comparisons

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)

# Distances held at once: 512 × 15,000 in float64 are 60 MB.
BLOCK = 512


class KernelRidgeRouter:
    """Regress the win rate on the hidden states of a small LLM.

    Idea: a small LLM cannot answer a hard query, but its middle layers know what the query is
    about, how it is asked and how far it is from common text, more than the vector of a sentence
    encoder, which is made to tell meanings apart. What it would say next, the last token's state
    after its last layer, adds a little (docs/results.md). Each view x_v is an encoder's vector,
    standardised in every dimension by the training queries and brought to length 1. With
    k(x, z) = Σ_v w_v exp(−γ |x_v − z_v|²) the win rate is m + Σ_i c_i k(x, x_i), with
    (K + λI) c = y − m, held to [0, 1]. λ has the smallest leave-one-out squared error on the
    training queries. γ is fixed: unrelated queries are at |x − z|² ≈ 2, so γ = 2 makes them e⁻⁴
    alike; chosen by leave-one-out too, it was as often worse.
    Least squares on soft outcomes estimates the expected outcome, whose order is the order of the
    expected quality gap, which is what the curve rewards.
    Source: see the module.
    Requirements: n² floats of 8 bytes and n³ steps in training, 0.8 GB and a minute for 7,000
    queries on two cores; of more than `max_queries`, a sample is learnt from.
    Relations: `knn` averages the neighbours' labels instead; `hybrid` and `causal_llm` train the
    language model itself, at a hundred times the cost.

    >>> KernelRidgeRouter(KernelRidge(name="example")).config.encoders
    ('smollm2-135m@18', 'smollm2-135m@30:last')
    """

    def __init__(self, config: KernelRidge) -> None:
        self.config = config
        self.encoders_: list[Encoder] = []
        self.means_: list[np.ndarray] = []
        """Per view: (d,) mean of the training queries' vectors, float64."""
        self.scales_: list[np.ndarray] = []
        """Per view: (d,) their standard deviations."""
        self.features_: list[np.ndarray] = []
        """Per view: (n, d) unit vectors of the distinct training queries, float64."""
        self.coefficients_ = np.zeros(0)
        """(n,) the c_i."""
        self.mean_, self.ridge_ = 0.5, 1.0
        self.error_ = float("nan")
        """Mean squared leave-one-out error with the chosen λ: by it, settings can be compared on
        the training queries alone."""
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
        """Embed all queries, choose λ, and solve; validation is trained on too.

        Raises DataError when the pair was never compared, ArtifactError for an unusable encoder.
        """
        prompts, labels = _mean_by_prompt(*train.joined(validation).labels())
        if len(prompts) > self.config.max_queries:
            kept = _drawn(prompts, self.config.max_queries, seed=seed)
            text = "%s learns from %d of %d queries: raise max_queries for more, at n³ the time."
            _log.warning(text, self.config.name, len(kept), len(prompts))
            prompts, labels = [prompts[row] for row in kept], labels[kept]
        encoders = [
            load_encoder(name, cache=self.config.encoder_cache) for name in self.config.encoders
        ]
        views = _views(encoders, prompts)
        if on_progress is not None:
            on_progress(1, 2)
        self.encoders_ = encoders
        self.means_ = [view.mean(axis=0) for view in views]
        self.scales_ = [_scales(view) for view in views]
        self.features_ = self._standardised(views)
        self.mean_ = float(labels.mean())
        target = labels - self.mean_
        kernel = self._kernel(self.features_)
        spectrum = eigh(kernel, overwrite_a=True)
        errors = _leave_one_out_errors(spectrum, target, self.config.ridges)
        best = int(np.argmin(errors))
        self.ridge_, self.error_ = self.config.ridges[best], float(errors[best])
        self.coefficients_ = _coefficients(spectrum, target, self.ridge_)
        if on_progress is not None:
            on_progress(2, 2)
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in [0, 1].

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        if not self.encoders_:
            raise not_fitted(self.config.name)
        win_rate = np.empty(len(prompts), dtype=np.float64)
        views = _views(self.encoders_, prompts)
        features = self._standardised(views)
        for start in range(0, len(prompts), BLOCK):
            rows = slice(start, start + BLOCK)
            block = [view[rows] for view in features]
            win_rate[rows] = self.mean_ + (self._kernel(block) * self.coefficients_).sum(axis=1)
        return np.clip(win_rate, 0.0, 1.0)

    def save(self, directory: Path) -> None:
        """Save the training queries' vectors, their coefficients, and what encodes a query."""
        if not self.encoders_:
            raise not_fitted(self.config.name)
        folders = []
        for number, encoder in enumerate(self.encoders_):
            folder = f"view-{number}"
            folders += [f"{folder}/{part}" for part in save_encoder(encoder, directory / folder)]
        write_state(
            directory,
            router="kernel_ridge",
            config=settings_json(self.config),
            values={
                "encoders": [encoder.description() for encoder in self.encoders_],
                "mean": self.mean_,
                "ridge": self.ridge_,
            },
            arrays={
                "features": np.concatenate(self.features_, axis=1),
                "coefficients": self.coefficients_,
                "means": np.concatenate(self.means_),
                "scales": np.concatenate(self.scales_),
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
            router="kernel_ridge",
            config=KernelRidge,
            arrays=["features", "coefficients", "means", "scales"],
        )
        router = cls(state.config)
        router.encoders_ = [
            load_saved_encoder(directory / f"view-{number}" / ENCODER_FOLDER, description=saved)
            for number, saved in enumerate(state.values["encoders"])
        ]
        ends = np.cumsum([encoder.dimension for encoder in router.encoders_])[:-1]
        router.means_ = np.split(state.arrays["means"], ends)
        router.scales_ = np.split(state.arrays["scales"], ends)
        features = np.split(state.arrays["features"], ends, axis=1)
        router.features_ = [np.ascontiguousarray(view) for view in features]
        router.coefficients_ = state.arrays["coefficients"]
        router.mean_, router.ridge_ = float(state.values["mean"]), float(state.values["ridge"])
        return router

    def _kernel(self, queries: Sequence[np.ndarray]) -> np.ndarray:
        """Return k(x, x_i) to all training queries, (queries, n)."""
        return _kernel(queries, self.features_, self.config.gamma, self.config.weights)

    def _standardised(self, views: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return views as vectors of length 1 whose dimensions count alike."""
        found = []
        for view, mean, scale in zip(views, self.means_, self.scales_, strict=True):
            standard = (view - mean) / scale
            length = np.linalg.norm(standard, axis=1, keepdims=True)
            found.append(standard / np.maximum(length, 1e-9))
        return found


def _views(encoders: Sequence[Encoder], prompts: Sequence[str]) -> list[np.ndarray]:
    return [vectors.astype(np.float64) for vectors in encode_views(encoders, prompts)]


def _mean_by_prompt(prompts: list[str], win_rate: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Merge repeated prompts: one left out would be known from its double."""
    distinct = list(dict.fromkeys(prompts))
    position = {prompt: at for at, prompt in enumerate(distinct)}
    rows = np.array([position[prompt] for prompt in prompts])
    return distinct, np.bincount(rows, weights=win_rate) / np.bincount(rows)


def _drawn(prompts: Sequence[str], count: int, *, seed: int) -> np.ndarray:
    """Return positions of ``count`` prompts, the same ones in whatever order they come."""
    digests = [hashlib.sha256(f"{seed} {one}".encode("utf-8", "replace")) for one in prompts]
    return np.argsort([digest.hexdigest() for digest in digests])[:count]


def _scales(view: np.ndarray) -> np.ndarray:
    """Return standard deviations, (d,); a dimension that says nothing must not become noise."""
    scales = view.std(axis=0)
    return np.maximum(scales, max(1e-3 * float(np.median(scales)), 1e-9))


def _kernel(
    queries: Sequence[np.ndarray],
    known: Sequence[np.ndarray],
    gamma: float,
    weights: Sequence[float],
) -> np.ndarray:
    """Return Σ_v w_v exp(−γ |x_v − z_v|²), (queries, known), of views of length 1; Σw is made 1."""
    total = np.zeros((len(queries[0]), len(known[0])))
    for query, other, weight in zip(queries, known, weights, strict=True):
        # A product of one row takes another path through the library, with other last bits.
        rows = np.repeat(query, 2, axis=0) if len(query) == 1 else query
        kernel = (rows @ other.T)[: len(query)]
        kernel -= 1.0
        kernel *= 2.0 * gamma
        total += weight / sum(weights) * np.exp(kernel, out=kernel)
    return total


def _coefficients(
    spectrum: tuple[np.ndarray, np.ndarray], target: np.ndarray, ridge: float
) -> np.ndarray:
    """Return (K + λI)⁻¹ target, (n,), from the eigenvalues and eigenvectors of K."""
    values, vectors = spectrum
    return vectors @ ((vectors.T @ target) / (np.maximum(values, 0.0) + ridge))


def _leave_one_out_errors(
    spectrum: tuple[np.ndarray, np.ndarray], target: np.ndarray, ridges: Sequence[float]
) -> np.ndarray:
    """Return the mean squared leave-one-out error for each λ: c_i / (K + λI)⁻¹_ii is query i's."""
    values, vectors = spectrum
    squares = vectors**2
    return np.array(
        [
            np.mean(
                (
                    _coefficients(spectrum, target, ridge)
                    / (squares @ (1.0 / (np.maximum(values, 0.0) + ridge)))
                )
                ** 2
            )
            for ridge in ridges
        ]
    )
