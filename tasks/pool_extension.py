"""One more LLM for a pool that is in service: its vector is learnt, and nothing else changes.

The champion's own weights stay as they are, bit for bit; `MatrixFactorizationRouter.add_llm` learns
the new LLM's vector from its battles against the LLMs that are known. What comes of it is a version
like any other, judged on queries that neither the champion nor the new vector has seen. Where the
champion has seen them, which out of fold is the rule, its twins stand in: trained without the
queries they are to choose for, and then taught the new LLM as it is. (An LLM that the champion was
taught this way earlier is one of those that its twins are trained on.)
"""

from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from prefect import task

from conf.errors import ConfigError, StoreError, unknown_name
from conf.schema import AnyExperiment, Experiment, Store
from router_models.catalog import Router, load_router
from router_models.mf import MatrixFactorizationRouter
from router_models.pool import expected_quality
from router_models.training_data import Comparisons
from tasks import tracking
from tasks.controls import learnt_prompts, prompt_hashes
from tasks.pool import (
    Learnt,
    PoolQueries,
    PoolReport,
    judged_pool,
    pool_battles,
    pool_lessons,
    pool_model,
    rated_pool,
)
from tasks.progress import progress
from tasks.registry import CHAMPION, Version, aliased
from tasks.training import EMBEDDINGS, Fold
from tasks.warehouse import Snapshot


@dataclass(frozen=True, eq=False)
class Extendable:
    """A pool's champion, and the LLM that it is to learn."""

    llm: str
    version: Version
    router: MatrixFactorizationRouter

    def tags(self) -> dict[str, str]:
        """Return what says on a run and a version where they come from."""
        return {"extends": self.version.version, "extends.llm": self.llm}

    def notes(self, *, battles: int, twins: int) -> tuple[str, str]:
        """Return how the new version came about, and by what it is judged."""
        version = f"version {self.version.version}"
        how = (
            f"The choices judged are those of twins of {version}, {twins} in all: each trained "
            f"without the queries that it chooses for, and then taught {self.llm!r} without them."
            if twins
            else f"Neither {version} nor what it was taught has seen the queries judged."
        )
        return (
            f"It is {version} with one more LLM: {self.llm!r}, learnt from {battles} battles with "
            f"{', '.join(self.router.llms_)}. What it knows of those is unchanged.",
            how,
        )


@task(task_run_name="teach the pool {llm}")
def extend_pool(
    experiment: Experiment,
    queries: Snapshot,
    responses: Snapshot,
    scores: Snapshot,
    run_id: str,
    *,
    llm: str,
) -> PoolReport:
    """Teach the pool's champion one more LLM, judge what it chooses then, and promote it if it
    earns it."""
    rated = rated_pool(experiment, queries, responses, scores)
    base = extendable(experiment, llm)
    learn = partial(extended_pool, base, rated, experiment)
    return judged_pool(experiment, queries, rated, [(base.router.config, learn)], run_id)


def with_pool(experiment: AnyExperiment, llm: str) -> Experiment:
    """Return an experiment that has a pool and the LLM. Raises ConfigError for one that has not."""
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"The experiment {experiment.name!r} learns from battles and asks no LLM. Expected one "
            "with llms and a pool: such a pool can learn one more. Name it with --config."
        )
    if experiment.pool is None:
        raise ConfigError(
            f"The experiment {experiment.name!r} has no pool. Expected one: only a router that "
            f"chooses among all LLMs can learn one more. Set pool, such as pool={{margin: 0.05}}, "
            "and train it with `turnout run`."
        )
    names = [one.name for one in experiment.llms]
    if llm not in names:
        raise ConfigError(
            unknown_name("LLM", llm, names) + " Expected one of the experiment. List it under "
            "llms, with its endpoint and prices, and add it then."
        )
    return experiment


def extendable(experiment: Experiment, llm: str) -> Extendable:
    """Return the pool's champion if it can learn just this LLM.

    Raises StoreError where there is no champion, and ConfigError where it cannot.
    """
    store, model = experiment.store, pool_model(experiment)
    found = aliased(store, model, CHAMPION)
    if found is None:
        raise StoreError(
            f"The registered model {model} has no champion. Expected one that can learn {llm!r}. "
            "Train the pool, with all its LLMs at once, by `turnout run`; or make a version the "
            f"champion: `turnout promote VERSION --pair {model}`."
        )
    version = Version(model, str(found.version), str(found.run_id))
    champion = f"Version {version.version} of {model}, the champion,"
    metric, used = experiment.quality.label_metric, found.tags.get("metric")
    if used != metric:
        raise ConfigError(
            f"{champion} learnt from qualities by {used}, and the experiment's are by {metric}. "
            "Expected the same, or the LLMs could not be compared. Set quality.label_metric to "
            f"{used}, or train the pool again with `turnout run`."
        )
    router = _loaded(store, version)
    if not isinstance(router, MatrixFactorizationRouter):
        raise ConfigError(
            f"{champion} is a router of kind {router.config.router}. Expected mf, the kind that "
            f"can learn an LLM by itself. `turnout run` trains the pool with {llm!r}; the champion "
            "will be an mf with pool.routers=[mf]."
        )
    if llm in router.llms_:
        raise ConfigError(
            f"{champion} knows {llm!r} already. Expected an LLM that is new to it: it knows "
            f"{', '.join(router.llms_)}. Name another, or learn anew from all responses with "
            "`turnout run`."
        )
    names = {one.name for one in experiment.llms}
    if others := sorted(names - {llm, *router.llms_}):
        raise ConfigError(
            f"{champion} does not know {', '.join(others)} either. Expected {llm!r} to be the only "
            f"LLM under llms that is new to it; it knows {', '.join(router.llms_)}. Take the other "
            "out for now and add one after the other, or learn all at once with `turnout run`."
        )
    return Extendable(llm, version, router)


def _loaded(store: Store, version: Version) -> Router:
    """Return a version's router, read by today's code: as a model, it would bring its own."""
    import mlflow

    tracking.client(store)
    with TemporaryDirectory() as scratch:
        weights = f"{version.uri()}/artifacts/router"
        return load_router(Path(mlflow.artifacts.download_artifacts(weights, dst_path=scratch)))


def extended_pool(base: Extendable, rated: PoolQueries, experiment: Experiment) -> Learnt:
    """Return the champion with the new LLM, and what routers like it expect of unseen queries.

    The new LLM is learnt from all queries but those predicted: unlike a training, that needs none
    to be watched.
    """
    champion = base.router
    # A fit names a routed pair, which a pool does not use: any two LLMs that are still asked.
    others = [llm for llm in rated.llms if llm != base.llm]
    data, query = pool_battles(rated, weak=others[0], strong=others[-1])
    is_new = np.array([base.llm in pair for pair in zip(data.llm_a, data.llm_b, strict=True)])
    texts = rated.table["text"].to_pylist()
    hashes = np.array(prompt_hashes(texts))
    seen = learnt_prompts(tracking.client(experiment.store), base.version.run_id)
    # A version that did not record it may have learnt from any of them.
    known = np.isin(hashes, list(hashes if seen is None else seen))

    def battles(rows: np.ndarray, which: np.ndarray) -> Comparisons:
        return data.take(np.flatnonzero(np.isin(query, rows) & which))

    def twin(fold: Fold) -> MatrixFactorizationRouter:
        cache = {"encoder_cache": experiment.store.directory / EMBEDDINGS}
        train, watched = fold.train[known[fold.train]], fold.validation[known[fold.validation]]
        return MatrixFactorizationRouter(champion.config.model_copy(update=cache)).fit(
            battles(train, ~is_new),
            battles(watched, ~is_new) if len(watched) else None,
            seed=experiment.seed,
        )

    def taught(router: MatrixFactorizationRouter, fold: Fold) -> MatrixFactorizationRouter:
        return router.add_llm(base.llm, battles(_rows(fold), is_new))

    lessons = pool_lessons(rated, experiment)
    folds = [fold for fold in lessons if len(fold.predicted)]
    expected = np.full((len(texts), len(rated.llms)), np.nan)
    twins = 0
    with progress(f"Teaching the pool {base.llm}", len(folds)) as advance:
        for fold in folds:
            has_seen = bool(known[fold.predicted].any())
            router = taught(twin(fold) if has_seen else copy(champion), fold)
            prompts = [texts[row] for row in fold.predicted]
            expected[fold.predicted] = expected_quality(router, prompts, llms=rated.llms)
            twins += has_seen
            advance(1)
    learnt = _rows(lessons[-1])
    judged = np.sort(np.concatenate([fold.predicted for fold in folds]))
    return Learnt(
        expected=expected[judged],
        router=taught(copy(champion), lessons[-1]),
        prompts=frozenset(hashes[learnt]) | frozenset(hashes if seen is None else seen),
        tags=base.tags(),
        notes=base.notes(battles=int((np.isin(query, learnt) & is_new).sum()), twins=twins),
    )


def _rows(fold: Fold) -> np.ndarray:
    return np.concatenate([fold.train, fold.validation])
