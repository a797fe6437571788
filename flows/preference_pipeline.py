"""RouteLLM's experiment (arXiv 2406.18665, sections 4 and 5): learn from battles, ask no LLM.

Battles of people, known answers or a judge make routers, which are judged on questions to which
both LLMs' answers are known to be right or wrong. From there on it is the pipeline: gate,
registry, promotion, report.
"""

from prefect import flow

from conf.schema import PreferenceExperiment
from flows.promote import settle_promotions
from tasks.benchmark import (
    PreferenceReport,
    compare_on_benchmarks,
    judged_queries,
    publish_preference_report,
)
from tasks.controls import Training
from tasks.preference_collection import collect_preferences
from tasks.preflight import preference_preflight
from tasks.promotion import carry_out
from tasks.registry import judge, register_router
from tasks.reporting import publish_battles
from tasks.tracking import parent_run
from tasks.training import train_router
from tasks.warehouse import Warehouse


@flow(name="preferences", flow_run_name="{experiment.name}", validate_parameters=True)
def preference_pipeline(experiment: PreferenceExperiment) -> PreferenceReport:
    """Collect battles, train, compare on each benchmark, and promote the best if it earns it."""
    store, pair, seed = experiment.store, experiment.pair, experiment.seed
    warehouse = Warehouse(store.directory)
    with parent_run(experiment) as run_id:
        preference_preflight(experiment)  # what would stop the run later stops it here
        settle_promotions(experiment)  # a killed one's rest too

        # The benchmarks come first: no battle on one of their prompts is learnt from.
        judged = judged_queries(warehouse, experiment)

        # Battles of all LLMs, and those of the pair's own tiers as battles of the pair.
        battles = collect_preferences(
            warehouse, experiment.preferences, pair, held_out=judged.together.labels
        )
        publish_battles(store, battles, pair, run_id)

        # Each router learns, once, from the battles that its kind can use.
        trained = [
            train_router(
                store,
                judged.together,
                settings,
                evaluation=judged.evaluation,
                seed=seed,
                parent_id=run_id,
                battles=battles.learnt_by(settings),
            )
            for settings in experiment.routers
        ]

        # Exact cost-quality curves on every benchmark; the first one chooses the best router.
        comparisons = compare_on_benchmarks(store, judged, trained, seed=seed, parent_id=run_id)
        decisive = comparisons[experiment.benchmarks[0].name]

        # It is registered, loaded anew in a clean process and judged as in the pipeline.
        best = next(router for router in trained if router.name == decisive.best)
        training = Training(
            store,
            judged.decisive(),
            judged.evaluation,
            seed,
            run_id,
            battles.learnt_by(best.settings),
        )
        version = register_router(store, decisive, best, training)
        receipt = judge(experiment, decisive, trained, version, training)
        receipt = carry_out(store, version, receipt, run_id=best.run_id)
        return publish_preference_report(
            store, judged, battles, comparisons, trained, receipt, run_id
        )
