"""The whole chain, top to bottom: queries, responses, scores, labels, routers, curves, gate.

Read this file and you know the project. Every step is a task in `tasks/`; tasks hand each other
references (an immutable Parquet snapshot and its digest, an MLflow run id), never the data.
"""

from prefect import flow

from conf.schema import Experiment, Pair
from tasks.evaluation import compare_routers
from tasks.generation import collect_responses, generate_responses
from tasks.labelling import label_queries
from tasks.queries import ingest_queries
from tasks.registry import judge, promote, register_router
from tasks.reporting import PairReport, RunReport, publish_leaderboard, publish_report
from tasks.scoring import score_responses
from tasks.tracking import parent_run
from tasks.training import train_router
from tasks.warehouse import Snapshot, Warehouse


@flow(name="turnout", flow_run_name="{experiment.name}", validate_parameters=True)
def pipeline(experiment: Experiment) -> RunReport:
    """Ask, score, label, train, compare, and promote the best router if it earns it."""
    warehouse = Warehouse(experiment.store.directory)
    with parent_run(experiment) as run_id:
        # Queries come from the configured source, split once and for all by a hash of their ids.
        queries = ingest_queries(warehouse, experiment.queries)

        # Every LLM answers every query several times. What is in the warehouse is not asked again.
        spent_usd = 0.0
        for llm in experiment.llms:
            asked = generate_responses(
                warehouse, queries, llm, experiment.generation, spent_usd=spent_usd
            )
            spent_usd += asked.billed_usd + asked.lost_usd
        responses = collect_responses(warehouse, queries, experiment.llms, experiment.generation)

        # Each response is scored under each quality metric.
        scores = score_responses(warehouse, queries, responses, experiment.quality.metrics)
        leaderboard = publish_leaderboard(experiment, queries, responses, scores, run_id)

        # For each pair of a weak and a strong LLM, routers are trained and the best one is judged.
        pairs = tuple(
            route_pair(experiment, pair, queries, responses, scores, run_id)
            for pair in experiment.pairs
        )
        return RunReport(run_id=run_id, leaderboard=leaderboard, pairs=pairs)


def route_pair(
    experiment: Experiment,
    pair: Pair,
    queries: Snapshot,
    responses: Snapshot,
    scores: Snapshot,
    run_id: str,
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

    # Every router learns from the same labels and predicts queries it has not seen.
    trained = [
        train_router(
            store,
            label_set,
            settings,
            evaluation=experiment.evaluation,
            seed=seed,
            parent_id=run_id,
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

    # The best one is registered, loaded anew in a clean process, and promoted if the gate is met.
    best = next(router for router in trained if router.name == comparison.best)
    version = register_router(store, comparison, best)
    receipt = judge(store, comparison, best, version, experiment.gate)
    if receipt.passed():
        promote(store, version)
    return publish_report(experiment, label_set, comparison, queries, scores, receipt, run_id)
