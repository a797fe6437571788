"""One more LLM for the pool, top to bottom: ask it, score it, learn it, judge, promote.

The short way beside `turnout run`: no router is trained again, no pair is judged again, and what
the champion knows of the other LLMs stays as it is. A nightly `turnout retrain` learns all LLMs
together anyway.
"""

from prefect import flow

from conf.schema import AnyExperiment
from flows.promote import settle_promotions
from tasks.generation import collect_responses, generate_responses
from tasks.pool_extension import extend_pool, extendable, with_pool
from tasks.preflight import preflight
from tasks.queries import ingest_queries
from tasks.reporting import RunReport, publish_leaderboard, publish_pool
from tasks.scoring import score_responses
from tasks.tracking import parent_run
from tasks.warehouse import Warehouse

KIND = "add-llm"  # of its runs: `compare`, `calibrate` and `drift` look for runs of a pipeline


@flow(name="add-llm", flow_run_name="add {llm} to {experiment.name}", validate_parameters=True)
def add_llm(experiment: AnyExperiment, llm: str) -> RunReport:
    """Teach the pool's champion one more LLM, and promote what comes of it if it earns it."""
    # What cannot be extended is refused at once, before an answer is paid for.
    pooled = with_pool(experiment, llm)
    settle_promotions(pooled)  # a killed one's rest: it may move the champion
    extendable(pooled, llm)

    warehouse, compute = Warehouse(pooled.store.directory), pooled.compute
    with parent_run(pooled, kind=KIND, name=f"{pooled.name}: add {llm}") as run_id:
        queries = ingest_queries(warehouse, pooled.queries)
        preflight(pooled, queries)

        # The known LLMs' responses are in the warehouse, so that only the new one is asked. After
        # it they are, too, for what is missing, such as answers to queries added since.
        spent_usd = 0.0
        for one in sorted(pooled.llms, key=lambda one: one.name != llm):
            asked = generate_responses(
                warehouse, queries, one, pooled.generation, compute, spent_usd=spent_usd
            )
            spent_usd += asked.billed_usd + asked.lost_usd
        responses = collect_responses(warehouse, queries, pooled.llms, pooled.generation)

        # Its responses are scored as the others' were; then all LLMs stand side by side.
        scores = score_responses(warehouse, queries, responses, pooled.quality.metrics, compute)
        leaderboard = publish_leaderboard(pooled, queries, responses, scores, run_id)

        # Its vector is learnt from its battles with the others. The version that it makes of the
        # champion is judged on queries it has not seen, by the pool's gate.
        pool = extend_pool(pooled, queries, responses, scores, run_id, llm=llm)
        publish_pool(pooled, pool, run_id)
        return RunReport(run_id=run_id, leaderboard=leaderboard, pairs=(), pool=pool)
