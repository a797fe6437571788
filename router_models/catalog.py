"""Which routers there are. A new one: one file, its settings in conf/routers.py, a line here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from conf.errors import ArtifactError, ConfigError, unknown_name
from router_models.bert import BertRouter
from router_models.causal_llm import CausalLLMRouter
from router_models.controls import LengthRouter, RandomRouter
from router_models.hybrid import HybridRouter
from router_models.kernel_ridge import KernelRidgeRouter
from router_models.knn import KnnRouter
from router_models.mf import MatrixFactorizationRouter
from router_models.persistence import saved_kind
from router_models.sw_ranking import SimilarityWeightedRouter
from router_models.training_data import Comparisons


class Router(Protocol):
    """What all routers have in common; tests/test_routers.py holds each of them to it."""

    config: Any
    history_: list[dict[str, float | None]]

    def fit(
        self,
        train: Comparisons,
        validation: Comparisons | None = None,
        *,
        seed: int,
        directory: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Learn from comparisons and return self."""

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) in [0, 1]."""

    def save(self, directory: Path) -> None:
        """Write everything that `load` needs."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the router that `save` wrote."""


ROUTERS: dict[str, Any] = {
    "hybrid": HybridRouter,
    "knn": KnnRouter,
    "kernel_ridge": KernelRidgeRouter,
    "length": LengthRouter,
    "random": RandomRouter,
    "mf": MatrixFactorizationRouter,
    "sw_ranking": SimilarityWeightedRouter,
    "bert": BertRouter,
    "causal_llm": CausalLLMRouter,
}


def build_router(config: Any) -> Router:
    """Return the untrained router that ``config`` (one of conf.routers' settings) asks for.

    >>> from conf.routers import Random
    >>> type(build_router(Random())).__name__
    'RandomRouter'
    """
    if config.router not in ROUTERS:
        raise ConfigError(unknown_name("router", config.router, ROUTERS) + " Set router to one.")
    router: Router = ROUTERS[config.router](config)
    return router


def load_router(directory: Path) -> Router:
    """Return the router saved in ``directory``, of whatever kind.

    Raises ArtifactError for files that are missing, damaged, or of a router unknown here.
    """
    kind = saved_kind(directory)
    if kind not in ROUTERS:
        raise ArtifactError(
            unknown_name("router", kind, ROUTERS)
            + f" {directory} was saved by another release; load it with that one."
        )
    router: Router = ROUTERS[kind].load(directory)
    return router
