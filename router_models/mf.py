"""RouteLLM's matrix factorisation: what each LLM is good at, learned from any battles.

Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data", arXiv 2406.18665, section 4.2.
What is particular to its training stands here; the loop itself is `lightning_loop.train`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from conf.errors import ConfigError, DataError, unknown_name
from conf.routers import MatrixFactorization
from router_models.encoders import (
    ENCODER_FOLDER,
    Encoder,
    load_encoder,
    load_saved_encoder,
    save_encoder,
)
from router_models.lightning_loop import History, Progress, decaying, train
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.tiers import connected_battles, llm_numbers
from router_models.training_data import Comparisons, prompt_groups

WEIGHTS = ("vectors", "projection", "bias", "output")
# With few battles, batches shrink until an epoch has so many steps, but not below MIN_BATCH.
STEPS_PER_EPOCH = 30
MIN_BATCH = 16
# How often the known LLMs' own variance that of a new LLM's prior may be, and the parts of the
# prompts that decide it. Weight decay and few epochs keep trained vectors closer to each other than
# a vector must be that knows a kind of queries which no other knows.
PRIOR_WIDTHS = (1, 4, 16, 64, 256, 1024)
PRIOR_PARTS = 4


class MatrixFactorizationRouter:
    """Learn a vector for every LLM, whose product with the query's says how well it answers.

    Idea: s(M, q) = w2ᵀ(v_M ⊙ (W1ᵀ v_q + b)) scores LLM M on query q, v_q being a frozen embedding,
    and P(a beats b) = σ(s(a, q) − s(b, q)). One low-dimensional space serves all LLMs, so battles
    between any of them teach what makes a query hard. A tie is the outcome 0.5. Noise is added to
    embeddings in training, and in training only; its length is in units of the embedding's own.
    Source: arXiv 2406.18665, equations 9 and 10; the loss is binary cross-entropy.
    Requirements: battles that link the routed pair, through other LLMs too.
    Relations: `sw_ranking` keeps the battles and weighs them for each query; `knn` does so with
    those of its neighbours only.

    >>> MatrixFactorizationRouter(MatrixFactorization(name="example")).config.dimension
    128
    """

    def __init__(self, config: MatrixFactorization) -> None:
        self.config = config
        self.encoder_: Encoder | None = None
        self.llms_: list[str] = []
        self.weights_: dict[str, np.ndarray] = {}
        """v (LLMs, m), W1 (d, m), b (m,) and w2 (m,): as in WEIGHTS, float32."""
        self.weak_, self.strong_ = "", ""
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
        Raises DataError when no chain of battles links the routed pair, ConfigError for unusable
        settings.
        """
        import torch

        battles = connected_battles(train)
        llms = sorted(set(battles.llm_a) | set(battles.llm_b))
        encoder = load_encoder(self.config.encoder, cache=self.config.encoder_cache)
        data = [_embedded(battles, llms, encoder)]
        if validation is not None:
            known = _battles_among(validation, llms)
            data += [_embedded(known, llms, encoder)] if known is not None else []
        # The caller's random state is none of our business, before and after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(len(llms), data[0].embeddings.shape[1], self.config.dimension)
            self.history_ = self._train(
                network, data, seed=seed, directory=directory, on_progress=on_progress
            )
        self.encoder_, self.llms_, self.weights_ = encoder, llms, _arrays(network)
        self.weak_, self.strong_ = train.weak, train.strong
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in (0, 1).

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        return self.win_rate_between(prompts, strong=self.strong_, weak=self.weak_)

    def save(self, directory: Path) -> None:
        """Save the weights and the LLMs' names, and the encoder unless it is packaged."""
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        folders = save_encoder(self.encoder_, directory)
        write_state(
            directory,
            router="mf",
            config=settings_json(self.config),
            values={
                "encoder": self.encoder_.description(),
                "llms": self.llms_,
                "weak": self.weak_,
                "strong": self.strong_,
                "history": self.history_,
            },
            arrays=self.weights_,
            folders=folders,
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """
        state = read_state(directory, router="mf", config=MatrixFactorization, arrays=WEIGHTS)
        router = cls(state.config)
        router.encoder_ = load_saved_encoder(
            directory / ENCODER_FOLDER, description=state.values["encoder"]
        )
        router.llms_, router.weights_ = state.values["llms"], state.arrays
        router.weak_, router.strong_ = state.values["weak"], state.values["strong"]
        router.history_ = state.values["history"]
        return router

    def win_rate_between(self, prompts: Sequence[str], *, strong: str, weak: str) -> np.ndarray:
        """Return the probability that ``strong`` beats ``weak``, (n,): any two known LLMs.

        Raises ConfigError for an LLM without battles.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        scores = self.scores(prompts, llms=[strong, weak])
        return 0.5 * (1 + np.tanh((scores[:, 0] - scores[:, 1]) / 2))

    def scores(self, prompts: Sequence[str], *, llms: Sequence[str]) -> np.ndarray:
        """Return s(M, q), (n, len(llms)) float64; only differences within a row mean something.

        Raises ConfigError for an LLM without battles.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        for llm in llms:
            if llm not in self.llms_:
                raise ConfigError(
                    unknown_name("LLM", llm, self.llms_)
                    + " Expected LLMs with battles in the training data. Choose one of them, or "
                    "teach the router a new one: `turnout add-llm NAME`, from Python add_llm."
                )
        vectors = self.weights_["vectors"][[self.llms_.index(llm) for llm in llms]]
        return self._features(prompts) @ vectors.T.astype(np.float64)

    def add_llm(self, name: str, comparisons: Comparisons) -> Self:
        """Learn the vector of one more LLM from its battles with known ones; change nothing else.

        With everything else fixed this is a logistic regression, solved exactly. Its prior has the
        known LLMs' mean vector, so that few battles give an average LLM; its variance is that of
        `PRIOR_WIDTHS` which predicts the battles on left-out prompts best.
        Raises ConfigError for a known name, DataError without battles against known LLMs.
        """
        if self.encoder_ is None:
            raise not_fitted(self.config.name)
        if name in self.llms_:
            raise ConfigError(
                f"The router knows an LLM called {name!r}. Expected a new name. Choose another, or "
                "train the router again to learn from new battles."
            )
        battles = _battles_among(comparisons, [*self.llms_, name], of=name)
        if battles is None:
            raise DataError(
                f"{name!r} has no battle against a known LLM in {len(comparisons.prompts)} rows. "
                f"Expected some against {', '.join(self.llms_)}. Add battles."
            )
        a, b = llm_numbers(battles, [*self.llms_, name])
        new_is_a = a == len(self.llms_)
        known = self.weights_["vectors"].astype(np.float64)
        features = self._features(battles.prompts)
        mean = known.mean(axis=0)
        offset = (features * (mean - known[np.where(new_is_a, b, a)])).sum(axis=1)
        wins = np.where(new_is_a, battles.a_wins, 1 - battles.a_wins)
        variance = _prior_variance(
            features,
            wins,
            offset=offset,
            prompts=battles.prompts,
            least=max(float(known.var(axis=0).mean()), 1e-6),
        )
        vector = mean + _logistic_weights(features, wins, offset=offset, variance=variance)
        # Nothing is changed in place: a shallow copy of this router is a router of its own.
        vectors = np.vstack([known, vector]).astype(np.float32)
        self.weights_ = {**self.weights_, "vectors": vectors}
        self.llms_ = [*self.llms_, name]
        return self

    def _train(
        self,
        network: Any,
        data: list["_Battles"],
        *,
        seed: int,
        directory: Path | None,
        on_progress: Progress | None,
    ) -> History:
        """Train in place; data: the training and, if there is one, the validation part."""
        import torch

        settings = self.config.trainer
        noise = self.config.noise * data[0].embeddings.shape[1] ** -0.5

        def loss(batch: Any) -> Any:
            embeddings, a, b, a_wins = batch
            noisy = embeddings + noise * torch.randn_like(embeddings)
            logits = _logits(network, noisy, a, b).float()
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, a_wins)

        def weight_groups() -> list[dict[str, Any]]:
            return decaying(
                network.parameters(),
                rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
            )

        with _one_thread():
            return train(
                network,
                _Batches(data[0], size=settings.batch_size, seed=seed),
                loss=loss,
                validation_loss=(lambda: _loss(network, data[1])) if data[1:] else None,
                weight_groups=weight_groups,
                settings=settings,
                name=self.config.name,
                checkpoint=f"mf-{_training_digest(data, self.config, seed)}",
                seed=seed,
                directory=directory,
                on_progress=on_progress,
            )

    def _features(self, prompts: Sequence[str]) -> np.ndarray:
        """Return w2 ⊙ (W1ᵀ v_q + b), (n, m) float64, whose product with v_M is the score."""
        assert self.encoder_ is not None
        exact = {name: self.weights_[name].astype(np.float64) for name in WEIGHTS[1:]}
        embeddings = self.encoder_.encode(prompts).astype(np.float64)
        return (embeddings @ exact["projection"] + exact["bias"]) * exact["output"]


@dataclass(frozen=True, eq=False)
class _Battles:
    """Battles as numbers: rows of distinct embeddings (q, d), LLMs' positions, outcomes, (n,)."""

    embeddings: np.ndarray
    query: np.ndarray
    a: np.ndarray
    b: np.ndarray
    a_wins: np.ndarray


def _embedded(battles: Comparisons, llms: Sequence[str], encoder: Encoder) -> _Battles:
    position: dict[str, int] = {}
    query = [position.setdefault(prompt, len(position)) for prompt in battles.prompts]
    a, b = llm_numbers(battles, llms)
    return _Battles(
        embeddings=encoder.encode(list(position)),
        query=np.array(query),
        a=a,
        b=b,
        a_wins=battles.a_wins.astype(np.float32),
    )


def _battles_among(
    comparisons: Comparisons, llms: Sequence[str], *, of: str | None = None
) -> Comparisons | None:
    """Return the battles between two of ``llms`` (and ``of`` one of them), None without any."""
    known = set(llms)
    rows = [
        row
        for row, pair in enumerate(zip(comparisons.llm_a, comparisons.llm_b, strict=True))
        if pair[0] != pair[1] and known.issuperset(pair) and (of is None or of in pair)
    ]
    return comparisons.take(np.array(rows)) if rows else None


def _prior_variance(
    features: np.ndarray,
    wins: np.ndarray,
    *,
    offset: np.ndarray,
    prompts: Sequence[str],
    least: float,
) -> float:
    """Return the variance, ``least`` times one of `PRIOR_WIDTHS`, by cross-validated log loss.

    All battles on one prompt are left out together. With one prompt it is ``least``.
    """
    part = prompt_groups(prompts) % PRIOR_PARTS
    variances = [least * width for width in PRIOR_WIDTHS]
    losses = np.zeros(len(variances))
    for left_out in (part == one for one in np.unique(part)):
        if left_out.all():
            return least
        for at, variance in enumerate(variances):
            weights = _logistic_weights(
                features[~left_out], wins[~left_out], offset=offset[~left_out], variance=variance
            )
            logits = offset[left_out] + features[left_out] @ weights
            losses[at] += (np.logaddexp(0, logits) - wins[left_out] * logits).sum()
    return variances[int(losses.argmin())]


def _logistic_weights(
    features: np.ndarray, wins: np.ndarray, *, offset: np.ndarray, variance: float
) -> np.ndarray:
    """Return the w, (m,), most likely under wins ~ σ(offset + features w), w ~ N(0, variance)."""
    weights = np.zeros(features.shape[1])
    for _ in range(100):
        share = 0.5 * (1 + np.tanh((offset + features @ weights) / 2))
        gradient = features.T @ (wins - share) - weights / variance
        curvature = (features * (share * (1 - share))[:, None]).T @ features
        step = np.linalg.solve(curvature + np.eye(len(weights)) / variance, gradient)
        # The same safe step as in `tiers`: a share of Newton's that always gains.
        reach = float(np.abs(features @ step).max())
        weights = weights + step * (np.log1p(reach) / reach if reach > 1e-12 else 1.0)
        if reach < 1e-10:
            break
    return weights


def _network(llms: int, width: int, dimension: int) -> Any:
    """Return v, W1 with b, and w2; at first every LLM is about as good as any other."""
    import torch

    vectors = torch.nn.Embedding(llms, dimension)
    projection = torch.nn.Linear(width, dimension)
    output = torch.nn.Linear(dimension, 1, bias=False)
    torch.nn.init.normal_(vectors.weight, std=0.1)
    torch.nn.init.normal_(projection.weight)
    torch.nn.init.ones_(projection.bias)
    torch.nn.init.constant_(output.weight, dimension**-0.5)
    return torch.nn.ModuleDict({"vectors": vectors, "projection": projection, "output": output})


def _logits(network: Any, embeddings: Any, a: Any, b: Any) -> Any:
    """Return s(a, q) − s(b, q), (B,), of embeddings (B, d) and LLMs' positions (B,)."""
    difference = network["vectors"](a) - network["vectors"](b)
    return network["output"](difference * network["projection"](embeddings)).squeeze(-1)


def _arrays(network: Any) -> dict[str, np.ndarray]:
    found = (
        network["vectors"].weight,
        network["projection"].weight.T,
        network["projection"].bias,
        network["output"].weight[0],
    )
    return {
        name: weight.detach().contiguous().numpy().copy()
        for name, weight in zip(WEIGHTS, found, strict=True)
    }


class _Batches:
    """Shuffled batches of embeddings, LLMs and outcomes; the order follows from seed and epoch."""

    def __init__(self, battles: _Battles, *, size: int, seed: int) -> None:
        import torch

        self.embeddings = torch.from_numpy(battles.embeddings)
        columns = (battles.query, battles.a, battles.b, battles.a_wins)
        self.query, self.a, self.b, self.a_wins = (torch.from_numpy(part) for part in columns)
        count = len(battles.query)
        self.size = min(size, max(MIN_BATCH, count // STEPS_PER_EPOCH))
        self.seed = seed
        self.epoch, self.rank, self.ranks = 0, 0, 1

    def __len__(self) -> int:
        return -(-len(self.query) // (self.size * self.ranks))

    def __iter__(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        import torch

        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.query))
        # All devices must make the same number of steps: the last ones start from the front again.
        order = np.resize(order, max(len(order), (len(self) - 1) * self.size * self.ranks + 1))
        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.size
            rows = order[start : start + self.size]
            yield self.batch(torch.from_numpy(rows if len(rows) else order[: self.size]))

    def batch(self, rows: Any) -> tuple[Any, Any, Any, Any]:
        """Return embeddings (B, d), the LLMs' positions and the outcomes, (B,) each."""
        return self.embeddings[self.query[rows]], self.a[rows], self.b[rows], self.a_wins[rows]


def _loss(network: Any, battles: _Battles) -> float:
    """Return the mean binary cross-entropy without noise, as `win_rate` would have it."""
    import torch

    device = network["output"].weight.device
    whole = _Batches(battles, size=len(battles.query), seed=0)
    with torch.inference_mode():
        embeddings, a, b, a_wins = (
            part.to(device) for part in whole.batch(torch.arange(len(battles.query)))
        )
        logits = _logits(network, embeddings, a, b).double()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, a_wins.double())
        return float(loss)


def _training_digest(data: list[_Battles], config: MatrixFactorization, seed: int) -> str:
    """Hash what determines the trained weights."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"name", "encoder_cache"}).encode())
    for battles in data:
        for column in (battles.embeddings, battles.query, battles.a, battles.b, battles.a_wins):
            digest.update(np.ascontiguousarray(column).data)
    digest.update(str(seed).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core, and leave the caller's setting as it was.

    Steps are so short that threads mostly wait for each other. Measured on two cores that others
    use as well, 55,000 battles: 8 s with one thread, 60 s with two.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
