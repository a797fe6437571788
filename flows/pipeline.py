"""The whole chain, top to bottom: queries, responses, scores, labels, routers, curves, gate.

Read this file and you know the project. Every step is a task in `tasks/`; tasks hand each other
references (an immutable Parquet snapshot and its digest, an MLflow run id), never the data.
"""

from prefect import flow

from conf.llms import Pair
from conf.schema import Experiment
from flows.promote import settle_promotions
from tasks.controls import Training
from tasks.evaluation import compare_routers
from tasks.generation import collect_responses, generate_responses
from tasks.labelling import label_queries
from tasks.pool import route_pool
from tasks.preference_collection import CollectedPreferences, pair_preferences
from tasks.preflight import preflight
from tasks.promotion import carry_out
from tasks.queries import ingest_queries
from tasks.registry import judge, register_router
from tasks.reporting import (
    PairReport,
    RunReport,
    publish_battles,
    publish_leaderboard,
    publish_pool,
    publish_report,
)
from tasks.scoring import score_responses
from tasks.tracking import parent_run
from tasks.training import train_router
from tasks.warehouse import Snapshot, Warehouse


@flow(name="turnout", flow_run_name="{experiment.name}", validate_parameters=True)
def pipeline(experiment: Experiment) -> RunReport:
    """Ask, score, label, train, compare, and promote the best router if it earns it."""
    warehouse = Warehouse(experiment.store.directory)
    compute = experiment.compute  # this process, or shards on a Ray cluster
    with parent_run(experiment) as run_id:
        # Queries come from the configured source, split once and for all by a hash of their ids.
        queries = ingest_queries(warehouse, experiment.queries)
        preflight(experiment, queries)  # what would stop the run later stops it here
        settle_promotions(experiment)  # a killed one's rest too

        # Every LLM answers every query several times. What is in the warehouse is not asked again.
        spent_usd = 0.0
        for llm in experiment.llms:
            asked = generate_responses(
                warehouse, queries, llm, experiment.generation, compute, spent_usd=spent_usd
            )
            spent_usd += asked.billed_usd + asked.lost_usd
        responses = collect_responses(warehouse, queries, experiment.llms, experiment.generation)

        # Each response is scored under each quality metric.
        scores = score_responses(warehouse, queries, responses, experiment.quality.metrics, compute)
        leaderboard = publish_leaderboard(experiment, queries, responses, scores, run_id)

        # For each pair of a weak and a strong LLM, routers are trained and the best one is judged.
        # Where the experiment has preferences, battles of other origin join what the scores say.
        pairs = []
        for pair in experiment.pairs:
            battles = pair_preferences(
                experiment, pair, queries, responses, scores, spent_usd=spent_usd
            )
            if battles is not None:
                spent_usd += battles.spent_usd()
                publish_battles(experiment.store, battles, pair, run_id)
            found = route_pair(experiment, pair, queries, responses, scores, run_id, battles)
            pairs.append(found)

        # With more than two LLMs, routers also learn to choose among all of them.
        pool = None
        if experiment.pool is not None:
            pool = route_pool(experiment, queries, responses, scores, run_id)
            publish_pool(experiment, pool, run_id)
        return RunReport(run_id=run_id, leaderboard=leaderboard, pairs=tuple(pairs), pool=pool)


def route_pair(
    experiment: Experiment,
    pair: Pair,
    queries: Snapshot,
    responses: Snapshot,
    scores: Snapshot,
    run_id: str,
    battles: CollectedPreferences | None = None,
) -> PairReport:
    """Label one pair's queries, train and compare its routers, and judge the best."""
    store, seed = experiment.store, experiment.seed

    # Scores become labels: how often the weak LLM is as good, exactly and within the relaxation t*.
    label_set = label_queries(
        Warehouse(store.directory),
        queries,
        scores,
        pair=pair,
        metric=experiment.quality.label_metric,
        settings=experiment.labels,
    )

    # Every router learns from the same labels, RouteLLM's from battles where there are some, and
    # predicts queries it has not seen.
    trained = [
        train_router(
            store,
            label_set,
            settings,
            evaluation=experiment.evaluation,
            seed=seed,
            parent_id=run_id,
            battles=None if battles is None else battles.joined_by(settings),
        )
        for settings in experiment.routers
    ]

    # Exact cost-quality curves on the same queries, with paired intervals.
    comparison = compare_routers(
        store,
        label_set,
        trained,
        responses,
        metric=experiment.quality.label_metric,
        settings=experiment.evaluation,
        seed=seed,
        parent_id=run_id,
    )

    # The best one is registered, loaded anew in a clean process, and held against chance, kNN, its
    # own twin on shuffled outcomes and the champion. It is promoted if it passes every check.
    best = next(router for router in trained if router.name == comparison.best)
    learnt = None if battles is None else battles.joined_by(best.settings)
    training = Training(store, label_set, experiment.evaluation, seed, run_id, learnt)
    version = register_router(store, comparison, best, training)
    receipt = judge(experiment, comparison, trained, version, training)
    receipt = carry_out(store, version, receipt, run_id=best.run_id)
    return publish_report(experiment, label_set, comparison, queries, scores, receipt, run_id)
