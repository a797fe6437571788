"""The pool: routers that choose among all LLMs of an experiment, not between two.

The scored responses of every two LLMs are battles; routers that compare any two LLMs learn from
them, and `router_models/pool.py` turns their win rates into a choice for each query. Judged on
queries the router has not seen, against every single LLM and the best mixture of two at its cost.

Every router becomes a version of the pool's registered model, which chooses an LLM by name. The one
with the most quality for its money is judged, and promoted under a simple rule: loaded in a clean
process it makes the logged choices, and it is surely not worse than the best coin toss between two
LLMs at its cost. (Not: than the best LLM that costs no more. A coin that saves a cent on the best
LLM would be compared with the second best, and win.) There is no comparison with the champion: the
newest version that passes is the champion. A long file: the pool is learnt, judged and registered
here.
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task

from conf.errors import ArtifactError, DataError
from conf.schema import Experiment, Gate, Store
from router_models.catalog import Router, build_router
from router_models.frontier import upper_hull
from router_models.pool import (
    PoolCurve,
    PoolOutcome,
    PoolPolicy,
    expected_quality,
    pool_curve,
    pool_outcomes,
)
from router_models.statistics import Estimate, Interval, mean_interval
from router_models.training_data import Comparisons
from serving.score import win_rates_in_clean_process
from tasks import gate, promotion, tracking
from tasks.controls import log_learnt_prompts, prompt_hashes
from tasks.evaluation import flat, groups_of
from tasks.figures import COLOURS, GREY
from tasks.progress import progress, stage
from tasks.receipt import Check, Receipt
from tasks.registry import (
    POOL_TAG,
    ROOT,
    Version,
    champion,
    ever_promoted,
    log_receipt,
    registered,
    requirements,
    rolled_back,
    tag_verdict,
)
from tasks.training import Fold, evaluation_folds, everything
from tasks.warehouse import Snapshot, Warehouse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PoolQueries:
    """The queries that all LLMs answered, with every sample's quality."""

    table: pa.Table
    """query_key, query_id, text, domain, split; ordered by query_id."""
    llms: tuple[str, ...]
    samples: Mapping[str, np.ndarray]
    """LLM → (n, samples) qualities."""
    cost_usd: np.ndarray
    """(n, LLMs) mean cost of one response."""

    def quality(self) -> np.ndarray:
        """Return mean qualities, (n, LLMs)."""
        return np.stack([self.samples[llm].mean(axis=1) for llm in self.llms], axis=1)


@dataclass(frozen=True)
class SingleLLM:
    """Sending every query to one LLM."""

    llm: str
    quality: Estimate
    cost_usd_per_1000: float


@dataclass(frozen=True)
class RoutedPool:
    """Sending every query to the LLM that a router's policy chooses."""

    router: str
    run_id: str
    model: str
    """Name and version of the registered model, as MLflow's URI."""
    outcome: PoolOutcome


@dataclass(frozen=True)
class PoolReport:
    """Every single LLM, cheapest first, and every router's policy, on the same queries."""

    metric: str
    queries: int
    out_of_fold: bool
    unscored: int
    """Queries left out because some LLM's response or its score is missing."""
    margin: float
    singles: tuple[SingleLLM, ...]
    routers: tuple[RoutedPool, ...]
    receipt: Receipt
    """What the gate said of the best of the routers."""


@dataclass(frozen=True, eq=False)
class Learnt:
    """A pool's router, and what was expected of queries by routers that have not seen them."""

    expected: np.ndarray
    """(judged, LLMs) expected qualities, in the order of the queries."""
    router: Router
    """The final one, which is registered."""
    prompts: frozenset[str]
    """Hashes of the prompts that it has learnt from: it must not be judged on them."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of its run and its version."""
    notes: tuple[str, ...] = ()
    """What a reader of its receipt must know."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One router's version, and what the gate asks of it."""

    routed: RoutedPool
    version: Version
    over_mix: Estimate
    """As in the outcome, its interval at the gate's level."""
    queries: pa.Table
    """query_key, text and `served`, the LLM that the final router chooses."""
    digest: str
    """Of the table of judged queries."""
    notes: tuple[str, ...] = ()


@task(task_run_name="route among all LLMs")
def route_pool(
    experiment: Experiment, queries: Snapshot, responses: Snapshot, scores: Snapshot, run_id: str
) -> PoolReport:
    """Train the pool's routers, judge what they choose for queries they have not seen, and promote
    the best one if it earns it."""
    rated = rated_pool(experiment, queries, responses, scores)
    learners = [
        (settings, partial(trained_pool, settings, rated, experiment))
        for settings in experiment.pool_routers()
    ]
    return judged_pool(experiment, queries, rated, learners, run_id)


def judged_pool(
    experiment: Experiment,
    queries: Snapshot,
    rated: PoolQueries,
    learners: Sequence[tuple[Any, Callable[[], Learnt]]],
    run_id: str,
) -> PoolReport:
    """Let each router learn, judge the best one's choices, and promote it if it earns it.

    learners: for each router its settings and what gives it, called within a run of its own.
    """
    assert experiment.pool is not None
    folds = evaluation_folds(rated.table, experiment.evaluation)
    judged = np.sort(np.concatenate([fold.predicted for fold in folds]))
    quality, cost_usd = rated.quality()[judged], rated.cost_usd[judged]
    singles = [
        SingleLLM(
            llm,
            mean_interval(
                quality[:, column],
                replicates=experiment.evaluation.replicates,
                seed=experiment.seed,
                level=experiment.evaluation.confidence,
                groups=groups_of(rated.table.take(judged)),
            ),
            float(1e3 * cost_usd[:, column].mean()),
        )
        for column, llm in enumerate(rated.llms)
    ]
    singles.sort(key=lambda single: (single.cost_usd_per_1000, single.llm))
    candidates = [
        _routed(experiment, settings, learn, rated, judged, singles, run_id, tried=len(learners))
        for settings, learn in learners
    ]
    best = max(candidates, key=lambda one: one.over_mix.value)
    receipt = judge_pool(experiment, best)
    receipt = promotion.carry_out.fn(
        experiment.store, best.version, receipt, run_id=best.routed.run_id
    )
    return PoolReport(
        metric=experiment.quality.label_metric,
        queries=len(judged),
        out_of_fold=len(folds) > 1,
        unscored=queries.rows - rated.table.num_rows,
        margin=experiment.pool.margin,
        singles=tuple(singles),
        routers=tuple(one.routed for one in candidates),
        receipt=receipt,
    )


def judge_pool(experiment: Experiment, best: Candidate) -> Receipt:
    """Hold a pool's version against the rule of the module's docstring and log its receipt."""
    store, model = experiment.store, best.version.model
    current = champion(store, model)
    receipt = Receipt(
        model=model,
        version=best.version.version,
        router=best.routed.router,
        metric=experiment.quality.label_metric,
        test_digest=best.digest,
        queries=best.queries.num_rows,
        checks=(
            reproduces_choices(store, best),
            no_worse_than_a_coin(best.over_mix),
            gate.not_rolled_back(rolled_back(store, best.version)),
            *replaces_nothing(store, best.version, current),
        ),
        champion=current,
        notes=(
            *best.notes,
            "A pool's version is not compared with the champion, which it replaces.",
        ),
        pending=True,
    )
    log_receipt(store, best.routed.run_id, receipt)
    tag_verdict(store, best.version, receipt)
    return receipt


def replaces_nothing(store: Store, version: Version, current: str | None) -> tuple[Check, ...]:
    """Return the check that stops a version where it is the champion, or where that is gone."""
    if version.version == current:
        return (gate.champion_check("it is the champion: nothing changed", passed=False),)
    if current is None and ever_promoted(store, version.model):
        return (gate.champion_gone(),)
    return ()


def reproduces_choices(store: Store, best: Candidate) -> Check:
    """Check that the registered version, in a clean process, makes the logged choices."""
    logged = best.queries["served"].to_pylist()
    try:
        with stage("Choosing in a clean process"):
            # Without parameters, a pool's version answers with the names of LLMs.
            found: list[Any] = [
                *win_rates_in_clean_process(
                    best.version.uri(),
                    best.queries["text"].to_pylist(),
                    tracking_uri=store.mlflow_uri(),
                )
            ]
        same = sum(one == other for one, other in zip(logged, found, strict=False))
        value = f"{same} of {len(logged)} queries go to the logged LLM"
    except ArtifactError as error:
        same, value = 0, gate.does_not_load(error, Gate()).value
    return Check(
        name="reproduces its choices",
        value=value,
        bound="all of them",
        passed=same == len(logged),
        complaint="does not reproduce its choices",
        because="The registered version sends queries elsewhere than the router that was judged.",
        advice=gate.REGISTER_ANEW,
    )


def no_worse_than_a_coin(over_mix: Estimate) -> Check:
    """Check that a pool gives at least what tossing a coin between two LLMs gives at its cost.

    ``over_mix`` is the paired difference in quality, its interval of `gate.two_sided_level`.

    >>> no_worse_than_a_coin(Estimate(0.1, Interval(-0.01, 0.2))).passed
    False
    """
    return Check(
        name="not worse than a coin toss",
        value=gate.shown(over_mix, sign="+", digits=4),
        bound="interval at 0 or above, in quality, between any two LLMs at equal cost",
        passed=bool(over_mix.interval.low >= 0),
        complaint="not shown to be as good as a coin toss between two LLMs",
        because="For its money, sending queries to one of two LLMs at random, or all to one, may "
        "give answers that are as good.",
        advice="Ask more queries, or set another pool.margin. Until then serve one LLM.",
    )


def pool_model(experiment: Experiment) -> str:
    """Return the name of the pool's registered model."""
    return "pool-" + re.sub(r"[^\w.\-]", "-", experiment.name)


def rated_pool(
    experiment: Experiment, queries: Snapshot, responses: Snapshot, scores: Snapshot
) -> PoolQueries:
    """Return the queries that all of the experiment's LLMs answered, by its label metric."""
    return pool_queries(
        Warehouse(experiment.store.directory),
        queries,
        responses,
        scores,
        llms=[llm.name for llm in experiment.llms],
        metric=experiment.quality.label_metric,
    )


def pool_queries(
    warehouse: Warehouse,
    queries: Snapshot,
    responses: Snapshot,
    scores: Snapshot,
    *,
    llms: Sequence[str],
    metric: str,
) -> PoolQueries:
    """Return the queries with all samples of all ``llms`` scored.

    Raises DataError when there is none.
    """
    rows = warehouse.query(
        """
        WITH side AS (
            SELECT query_key, llm, list(value ORDER BY sample_index) AS quality
            FROM read_parquet($scores) WHERE metric = $metric AND list_contains($llms, llm)
            GROUP BY query_key, llm
        ),
        price AS (
            SELECT query_key, llm, avg(cost_usd) AS usd FROM read_parquet($responses)
            GROUP BY query_key, llm
        ),
        complete AS (
            SELECT *, max(len(quality)) OVER (PARTITION BY llm) AS samples FROM side
        )
        SELECT q.query_key, query_id, text, domain, split, llm, quality, usd
        FROM read_parquet($queries) q JOIN complete USING (query_key)
        JOIN price USING (query_key, llm)
        WHERE len(quality) = samples
        QUALIFY count(*) OVER (PARTITION BY q.query_key) = len($llms)
        ORDER BY query_id, llm
        """,
        {
            "scores": str(scores.path),
            "responses": str(responses.path),
            "queries": str(queries.path),
            "metric": metric,
            "llms": list(llms),
        },
    )
    if rows.num_rows == 0:
        raise DataError(
            f"No query has all its {metric!r} scores for all of {', '.join(llms)}. Expected every "
            "sample of every LLM scored. Look at the failed responses (error column of the "
            "responses table) and run again."
        )
    names = sorted(llms)
    sides = {name: rows.filter(pc.equal(rows["llm"], name)).combine_chunks() for name in names}
    return PoolQueries(
        table=sides[names[0]].drop_columns(["llm", "quality", "usd"]),
        llms=tuple(names),
        samples={
            name: np.array(side["quality"].to_pylist(), dtype=np.float64)
            for name, side in sides.items()
        },
        cost_usd=np.stack([side["usd"].to_numpy() for side in sides.values()], axis=1),
    )


def pool_battles(rated: PoolQueries, *, weak: str, strong: str) -> tuple[Comparisons, np.ndarray]:
    """Return one battle of every two LLMs for each query, and each battle's row of the queries.

    The outcome is the share of pairs of samples in which a's is better; equal ones count half.
    """
    texts = rated.table["text"].to_pylist()
    pairs = list(combinations(rated.llms, 2))
    outcomes = []
    for a, b in pairs:
        first, second = rated.samples[a][:, :, None], rated.samples[b][:, None, :]
        outcomes.append(((first > second) + 0.5 * (first == second)).mean(axis=(1, 2)))
    count = len(texts)
    data = Comparisons(
        prompts=tuple(texts * len(pairs)),
        llm_a=tuple(a for a, _ in pairs for _ in range(count)),
        llm_b=tuple(b for _, b in pairs for _ in range(count)),
        a_wins=np.concatenate(outcomes),
        weak=weak,
        strong=strong,
    )
    return data, np.tile(np.arange(count), len(pairs))


def pool_lessons(rated: PoolQueries, experiment: Experiment) -> list[Fold]:
    """Return what is learnt from, watched and predicted in turn; the last makes the final router.

    Out of fold that is everything, which predicts nothing.
    """
    folds = evaluation_folds(rated.table, experiment.evaluation)
    return folds if len(folds) == 1 else [*folds, everything(rated.table)]


def trained_pool(settings: Any, rated: PoolQueries, experiment: Experiment) -> Learnt:
    """Train a router for each lesson; the expectations are of routers that have not seen the query.

    Its prompts are those it was trained on and those that decided when training ends.
    """
    pair = experiment.pairs[0]
    data, query = pool_battles(rated, weak=pair.weak, strong=pair.strong)
    texts = rated.table["text"].to_pylist()
    lessons = pool_lessons(rated, experiment)
    expected = np.full((len(texts), len(rated.llms)), np.nan)
    with progress(f"Training pool {settings.name}", len(lessons)) as advance:
        for fold in lessons:
            router = build_router(settings).fit(
                data.take(np.flatnonzero(np.isin(query, fold.train))),
                data.take(np.flatnonzero(np.isin(query, fold.validation))),
                seed=experiment.seed,
            )
            prompts = [texts[row] for row in fold.predicted]
            expected[fold.predicted] = expected_quality(router, prompts, llms=rated.llms)
            advance(1)
    judged = np.sort(np.concatenate([fold.predicted for fold in lessons]))
    known = np.concatenate([lessons[-1].train, lessons[-1].validation])
    hashes = prompt_hashes(texts[row] for row in known)
    return Learnt(expected[judged], router, frozenset(hashes))


def _routed(
    experiment: Experiment,
    settings: Any,
    learn: Callable[[], Learnt],
    rated: PoolQueries,
    judged: np.ndarray,
    singles: Sequence[SingleLLM],
    parent_id: str,
    *,
    tried: int,
) -> Candidate:
    """Let one router learn in its own run, evaluate it as one of ``tried``, and register it."""
    assert experiment.pool is not None
    store, evaluation, margin = experiment.store, experiment.evaluation, experiment.pool.margin
    quality, cost_usd = rated.quality()[judged], rated.cost_usd[judged]
    name = f"pool-{settings.name}"
    tags = {"turnout.kind": settings.router, POOL_TAG: "all"}
    with tracking.child_run(store, parent_id, name, tags=tags) as run_id:
        tracking.log_params(
            store, run_id, settings.model_dump(mode="json") | {"pool.margin": margin}
        )
        learnt = learn()
        tracking.set_tags(store, run_id, learnt.tags)
        expected = learnt.expected
        table = rated.table.take(judged).select(["query_key", "query_id", "text", "domain"])
        # For people at the level they asked for; for the gate as the best of several.
        outcome, strict = (
            pool_outcomes(
                expected,
                quality,
                cost_usd,
                margins=[margin],
                replicates=evaluation.replicates,
                seed=experiment.seed,
                level=level,
                groups=groups_of(table),
            )[0]
            for level in (evaluation.confidence, gate.two_sided_level(experiment.gate, tried))
        )
        tracking.log_metrics(store, run_id, _metrics(outcome, rated.llms))
        for column, llm in enumerate(rated.llms):
            for what, values in {
                "expected": expected,
                "quality": quality,
                "cost_usd": cost_usd,
            }.items():
                table = table.append_column(f"{what}/{llm}", pa.array(values[:, column]))
        costs = dict(zip(rated.llms, rated.cost_usd.mean(axis=0).tolist(), strict=True))
        served = PoolPolicy(costs, margin=margin).choose(learnt.router, table["text"].to_pylist())
        table = table.append_column("served", pa.array(served))
        snapshot = Warehouse(store.directory).write_snapshot("pool", table)
        client = tracking.client(store)
        client.log_artifact(run_id, str(snapshot.path), "pool")
        curve = pool_curve(expected, quality, cost_usd)
        figure = cost_quality(curve, outcome, singles, router=settings.name, experiment=experiment)
        client.log_figure(run_id, figure, "pool/cost_quality.png")
        version = _register(experiment, settings, learnt, costs, snapshot, run_id)
    return Candidate(
        routed=RoutedPool(settings.name, run_id, version.uri(), outcome),
        version=version,
        over_mix=strict.over_mix,
        queries=table.select(["query_key", "text", "served"]),
        digest=snapshot.digest,
        notes=learnt.notes,
    )


def _metrics(outcome: PoolOutcome, llms: Sequence[str]) -> dict[str, float]:
    estimates = {
        "pool_quality": outcome.quality,
        "pool_cost_usd_per_1000": per_1000(outcome.cost_usd),
        "pool_over_single": outcome.over_single,
        "pool_over_mix": outcome.over_mix,
    }
    shares = {f"pool_share/{llm}": share for llm, share in zip(llms, outcome.shares, strict=True)}
    return flat(estimates) | shares


def per_1000(usd: Estimate) -> Estimate:
    """Return the cost of 1,000 queries from that of one."""
    ends = usd.interval
    return Estimate(1e3 * usd.value, Interval(1e3 * ends.low, 1e3 * ends.high, ends.level))


def _register(
    experiment: Experiment,
    settings: Any,
    learnt: Learnt,
    costs: Mapping[str, float],
    judged: Snapshot,
    run_id: str,
) -> Version:
    """Register the final router with what its LLMs cost; by default it chooses as it was judged.

    What expects and chooses the same is the version that is there already.
    """
    import mlflow

    assert experiment.pool is not None
    client, name = tracking.client(experiment.store), pool_model(experiment)
    if (known := registered(experiment.store, name, judged.digest)) is not None:
        return known
    params = {"policy": "pool", "margin": experiment.pool.margin}
    with tempfile.TemporaryDirectory() as scratch, mlflow.start_run(run_id=run_id):
        learnt.router.save(Path(scratch, "router"))
        logged = mlflow.pyfunc.log_model(
            name="router",
            python_model=ROOT / "serving" / "router_model.py",
            artifacts={"router": str(Path(scratch, "router"))},
            code_paths=[str(ROOT / "conf"), str(ROOT / "router_models")],
            input_example=(judged.read()["text"].to_pylist()[:2], params),
            model_config={"cost_usd": dict(costs)},
            pip_requirements=requirements(settings),
        )
        log_learnt_prompts(client, run_id, learnt.prompts)
        tags = {
            "router": settings.name,
            "metric": experiment.quality.label_metric,
            "training_digest": judged.digest,
            **learnt.tags,
        }
        version = mlflow.register_model(logged.model_uri, name, tags=tags)
    client.set_registered_model_tag(name, POOL_TAG, "all")
    return Version(name, str(version.version), run_id)


def cost_quality(
    curve: PoolCurve,
    outcome: PoolOutcome,
    singles: Sequence[SingleLLM],
    *,
    router: str,
    experiment: Experiment,
) -> "Figure":
    """Return cost in USD against quality: the policy at all margins, and all single LLMs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot(1e3 * curve.cost_usd, curve.quality, color=COLOURS[0], label=f"pool of {router}")
    chosen = per_1000(outcome.cost_usd)
    axes.errorbar(
        [chosen.value],
        [outcome.quality.value],
        # A percentile interval need not hold the estimate itself.
        yerr=[
            [max(0.0, outcome.quality.value - outcome.quality.interval.low)],
            [max(0.0, outcome.quality.interval.high - outcome.quality.value)],
        ],
        fmt="o",
        color=COLOURS[1],
        capsize=3,
        label=f"margin {outcome.margin:g}, with its interval",
    )
    best_first = sorted(singles, key=lambda llm: (llm.cost_usd_per_1000, -llm.quality.value))
    costs = np.array([single.cost_usd_per_1000 for single in best_first])
    qualities = np.array([single.quality.value for single in best_first])
    hull_cost, hull_quality = upper_hull(costs, qualities)
    axes.plot(
        hull_cost,
        np.maximum.accumulate(hull_quality),
        color=GREY,
        linestyle="--",
        label="best coin toss between two LLMs",
    )
    axes.plot(costs, qualities, "s", color="black", label="one LLM for all queries")
    for single in singles:
        at = (single.cost_usd_per_1000, single.quality.value)
        axes.annotate(single.llm, at, (6, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("US dollars for 1,000 queries")
    axes.set_ylabel(f"mean quality ({experiment.quality.label_metric})")
    axes.set_title("Choosing among all LLMs, on queries the router has not seen")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    return figure
