"""Reports: the leaderboard of LLMs, the comparison of routers, and what to do next.

The same numbers go to the terminal, to Prefect as artifacts and to the MLflow parent run.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.context import FlowRunContext

from conf.llms import LLM, Pair
from conf.schema import Experiment, GoldMatch, Store
from router_models.statistics import Estimate, auc_interval, mean_interval
from tasks import tracking
from tasks.comparison_report import log_report
from tasks.evaluation import Comparison, flat, groups_of, reported_metric
from tasks.figures import pair_figures
from tasks.labelling import LabelSet
from tasks.pool import PoolReport, per_1000
from tasks.preference_collection import CollectedPreferences
from tasks.progress import stage
from tasks.receipt import Receipt
from tasks.warehouse import Snapshot, Warehouse

# Metric → heading, in the tables for people.
SHOWN = {
    "apgr": "APGR",
    "cpt_50": "CPT50",
    "cpt_80": "CPT80",
    "quality_drop_pct_at_20": "drop@20%",
    "quality_drop_pct_at_40": "drop@40%",
}


@dataclass(frozen=True)
class Standing:
    """One LLM's line of the leaderboard."""

    llm: str
    responses: int
    missing: int
    quality: Mapping[str, Estimate]
    """Metric name → mean over queries with its interval."""
    cost_usd_per_1000: float
    """For 1,000 queries with one response each."""
    latency_ms: float
    """Median time of a request."""
    prompt_tokens: float
    completion_tokens: float


@dataclass(frozen=True)
class Leaderboard:
    """All configured LLMs side by side, best label metric first."""

    label_metric: str
    standings: tuple[Standing, ...]
    agreement: Mapping[str, Estimate]
    """Metric name → AUC against gold correctness, where gold exists."""

    def rows(self, *, digits: int = 3) -> list[dict[str, str]]:
        """Return one row of text for each LLM, its qualities with ``digits`` decimals."""
        return [
            {
                "LLM": standing.llm,
                **{name: shown(found, digits=digits) for name, found in standing.quality.items()},
                "USD/1k": f"{standing.cost_usd_per_1000:.4f}",
                "ms": f"{standing.latency_ms:.0f}",
                "tokens": f"{standing.prompt_tokens:.0f}+{standing.completion_tokens:.0f}",
                "missing": f"{standing.missing}",
            }
            for standing in self.standings
        ]


@dataclass(frozen=True)
class PairReport:
    """The outcome of one pair."""

    pair: Pair
    t: float
    degenerate: bool
    queries: int
    unlabelled: int
    """Queries left out because a response or its score is missing."""
    out_of_fold: bool
    metric: str
    best: str
    estimates: Mapping[str, Mapping[str, Estimate]]
    gap: Mapping[str, Estimate]
    """Metric name → strong − weak, with its interval."""
    receipt: Receipt

    def rows(self, intervals: Collection[str] = tuple(SHOWN)) -> list[dict[str, str]]:
        """Return one row of text for each router, best first, some metrics with ``intervals``."""
        names = sorted(
            self.estimates, key=lambda name: -np.nan_to_num(self.estimates[name]["apgr"].value)
        )
        return [
            {
                "router": name,
                **{
                    heading: shown(self.estimates[name][metric], interval=metric in intervals)
                    for metric, heading in SHOWN.items()
                },
            }
            for name in names
        ]


@dataclass(frozen=True)
class RunReport:
    """The outcome of a pipeline run."""

    run_id: str
    leaderboard: Leaderboard
    pairs: tuple[PairReport, ...]
    pool: PoolReport | None = None
    """Choosing among all LLMs, where the experiment asks for it."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        report = asdict(self)
        for pair, found in zip(report["pairs"], self.pairs, strict=True):
            pair["pair"] = found.pair.model_dump()
            pair["receipt"] |= _verdict(found.receipt)
        if self.pool is not None:
            report["pool"]["receipt"] |= _verdict(self.pool.receipt)
        return _without_nan(report)


def _verdict(receipt: Receipt) -> dict[str, str]:
    return {"verdict": receipt.verdict(), "summary": receipt.summary()}


def _without_nan(value: Any) -> Any:
    """Return plain values with null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def shown(estimate: Estimate, *, interval: bool = True, digits: int = 3) -> str:
    """Return a value for people, with its interval unless told otherwise.

    >>> from router_models.statistics import Interval
    >>> shown(Estimate(0.6123, Interval(0.55, 0.67)))
    '0.612 [0.550, 0.670]'
    """
    if np.isnan(estimate.value):
        return f"undefined ({estimate.reason or 'no value'})"
    ends = f" [{estimate.interval.low:.{digits}f}, {estimate.interval.high:.{digits}f}]"
    return f"{estimate.value:.{digits}f}{ends if interval else ''}"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([row[key] for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@task(task_run_name="leaderboard")
def publish_leaderboard(
    experiment: Experiment, queries: Snapshot, responses: Snapshot, scores: Snapshot, run_id: str
) -> Leaderboard:
    """Compare the LLMs themselves: quality, cost, latency; to Prefect and MLflow."""
    warehouse = Warehouse(experiment.store.directory)
    metrics = [metric.name for metric in experiment.quality.metrics]
    standings = [
        _standing(warehouse, llm, queries, responses, scores, metrics, experiment)
        for llm in experiment.llms
    ]
    label_metric = experiment.quality.label_metric
    board = Leaderboard(
        label_metric=label_metric,
        standings=tuple(
            sorted(standings, key=lambda standing: -standing.quality[label_metric].value)
        ),
        agreement=gold_agreement(warehouse, scores, experiment),
    )
    client = tracking.client(experiment.store)
    client.log_text(run_id, leaderboard_page(board), "leaderboard.md")
    client.log_table(run_id, _columns(board.rows()), "leaderboard.json")
    tracking.log_dataset(experiment.store, run_id, queries, name="queries")
    tracking.log_dataset(experiment.store, run_id, responses, name="responses")
    for standing in board.standings:
        tracking.log_metrics(
            experiment.store, run_id, flat(standing.quality, prefix=f"{standing.llm}/")
        )
    tracking.log_metrics(
        experiment.store, run_id, flat(board.agreement, prefix="auc_against_gold/")
    )
    if FlowRunContext.get():
        create_table_artifact(
            key="leaderboard", table=board.rows(), description="The configured LLMs, best first"
        )
    return board


def leaderboard_page(board: Leaderboard) -> str:
    """Return the leaderboard as Markdown, with what its columns mean."""
    agreement = "".join(
        f"\n{metric} tells right from wrong answers with AUC {shown(found)}.\n"
        for metric, found in board.agreement.items()
    )
    level = 100 * board.standings[0].quality[board.label_metric].interval.level
    return (
        f"{markdown_table(board.rows())}\nMeans over queries with {level:g} % intervals; USD for "
        "1,000 queries with one answer each; median milliseconds of a request; mean tokens in a "
        f"prompt and in an answer.\n{agreement}"
    )


def _standing(
    warehouse: Warehouse,
    llm: LLM,
    queries: Snapshot,
    responses: Snapshot,
    scores: Snapshot,
    metrics: Sequence[str],
    experiment: Experiment,
) -> Standing:
    totals = warehouse.query(
        "SELECT count(*) AS responses, 1000 * avg(cost_usd) AS usd, "
        "median(latency_ms) AS latency_ms, avg(prompt_tokens) AS prompt_tokens, "
        "avg(completion_tokens) AS completion_tokens "
        "FROM read_parquet($responses) WHERE llm = $llm",
        {"responses": str(responses.path), "llm": llm.name},
    ).to_pylist()[0]
    quality = {}
    for metric in metrics:
        rows = warehouse.query(
            "SELECT q.text, s.mean FROM read_parquet($queries) q JOIN "
            "(SELECT query_key, avg(value) AS mean FROM read_parquet($scores) "
            "WHERE llm = $llm AND metric = $metric GROUP BY query_key) s USING (query_key) "
            "ORDER BY query_key",
            {
                "queries": str(queries.path),
                "scores": str(scores.path),
                "llm": llm.name,
                "metric": metric,
            },
        )
        quality[metric] = mean_interval(
            rows["mean"].to_numpy(),
            groups=groups_of(rows),
            replicates=experiment.evaluation.replicates,
            seed=experiment.seed,
            level=experiment.evaluation.confidence,
        )
    return Standing(
        llm=llm.name,
        responses=totals["responses"],
        missing=queries.rows * experiment.generation.samples - totals["responses"],
        quality=quality,
        cost_usd_per_1000=totals["usd"],
        latency_ms=totals["latency_ms"],
        prompt_tokens=totals["prompt_tokens"],
        completion_tokens=totals["completion_tokens"],
    )


def gold_agreement(
    warehouse: Warehouse, scores: Snapshot, experiment: Experiment
) -> dict[str, Estimate]:
    """Return how well each metric tells right from wrong responses (AUC), where gold exists."""
    metrics = experiment.quality.metrics
    golden = [metric.name for metric in metrics if isinstance(metric, GoldMatch)]
    if not golden:
        return {}
    found = {}
    for metric in (metric.name for metric in metrics if metric.name not in golden):
        rows = warehouse.query(
            "SELECT m.value, g.value AS correct FROM read_parquet($scores) m "
            "JOIN read_parquet($scores) g USING (query_key, llm, sample_index) "
            "WHERE m.metric = $metric AND g.metric = $gold "
            "ORDER BY query_key, llm, sample_index",
            {"scores": str(scores.path), "metric": metric, "gold": golden[0]},
        )
        found[metric] = auc_interval(
            rows["value"].to_numpy(),
            rows["correct"].to_numpy(),
            replicates=500,
            seed=experiment.seed,
            level=experiment.evaluation.confidence,
        )
    return found


@task(task_run_name="report battles of {pair.weak}")
def publish_battles(store: Store, battles: CollectedPreferences, pair: Pair, run_id: str) -> None:
    """Log where the battles that routers learn from came from; to Prefect and MLflow."""
    client, folder, page = tracking.client(store), pair.name(), battles_page(battles, pair)
    client.log_text(run_id, page, f"{folder}/battles.md")
    tracking.log_metrics(
        store, run_id, {f"{folder}/{name}": value for name, value in battles.metrics().items()}
    )
    tracking.log_dataset(store, run_id, battles.all_llms, name=f"battles {folder}")
    if FlowRunContext.get():
        create_markdown_artifact(key="battles", markdown=page, description=folder)


def battles_page(battles: CollectedPreferences, pair: Pair) -> str:
    """Return the sources of battles as Markdown."""
    # A judge's answer may hold anything, and a table's cell no line break or bar.
    rows = [
        {name: " ".join(text.split()).replace("|", "/") for name, text in row.items()}
        for row in battles.rows()
    ]
    return (
        f"## Battles for {pair.weak} or {pair.strong}\n\n{battles.all_llms.rows} of all LLMs; "
        f"{battles.pair.rows} of the pair and of LLMs about as strong, {battles.own} of these its "
        f"own.\n\n{markdown_table(rows)}\nstrong wins: share of the pair's own battles "
        f"that {pair.strong} won, a tie being half. Where it looks wrong, so are the labels.\n"
    )


@task(task_run_name="report {comparison.pair.weak}")
def publish_report(
    experiment: Experiment,
    label_set: LabelSet,
    comparison: Comparison,
    queries: Snapshot,
    scores: Snapshot,
    receipt: Receipt,
    run_id: str,
) -> PairReport:
    """Log figures, tables and the receipt of one pair; to Prefect and MLflow."""
    store, pair = experiment.store, comparison.pair
    gap = {comparison.metric: comparison.estimates[comparison.best]["quality_gap"]}
    for metric in experiment.quality.metrics:
        if metric.name != comparison.metric:
            found = reported_metric(
                store,
                comparison,
                queries,
                scores,
                metric=metric.name,
                settings=experiment.evaluation,
                seed=experiment.seed,
            )
            gap[metric.name] = found[comparison.best]["quality_gap"]
    report = PairReport(
        pair=pair,
        t=label_set.t,
        degenerate=label_set.degenerate,
        queries=comparison.queries,
        unlabelled=label_set.unlabelled,
        out_of_fold=comparison.out_of_fold,
        metric=comparison.metric,
        best=comparison.best,
        estimates=comparison.estimates,
        gap=gap,
        receipt=receipt,
    )
    client = tracking.client(store)
    folder = pair.name()
    with stage("Drawing figures"):
        for name, figure in pair_figures(label_set, comparison).items():
            client.log_figure(run_id, figure, f"{folder}/{name}")
    for name, snapshot in {"win_rates": comparison.table, "labels": label_set.labels}.items():
        client.log_artifact(run_id, str(snapshot.path), f"{folder}/{name}")
    page = comparison_page(report)
    client.log_text(run_id, page, f"{folder}/comparison.md")
    # A run may compare several pairs: each has its own names, and its part of the description.
    described = client.get_run(run_id).data.tags.get("mlflow.note.content", "")
    client.set_tag(run_id, "mlflow.note.content", described + page)
    headline = {
        "t_star": label_set.t,
        "t_star_objective": label_set.objective,
        **flat({"best_apgr": comparison.estimates[comparison.best]["apgr"]}),
    }
    tracking.log_metrics(
        store, run_id, {f"{folder}/{name}": value for name, value in headline.items()}
    )
    client.set_tag(run_id, f"turnout.best.{folder}", comparison.best)
    client.set_tag(run_id, f"turnout.verdict.{folder}", receipt.verdict())
    tracking.describe_model(store, pair)
    log_report(store, run_id, pair, evaluation=experiment.evaluation, seed=experiment.seed)
    if FlowRunContext.get():
        create_markdown_artifact(key="comparison", markdown=page, description=folder)
        create_markdown_artifact(key="gate", markdown=receipt.to_markdown(), description=folder)
        create_link_artifact(
            key="mlflow-run",
            link=tracking.run_url(store, run_id),
            link_text="The run in MLflow",
            description="Served by `turnout ui` where MLflow has no server of its own",
        )
    return report


def comparison_page(report: PairReport) -> str:
    """Return the comparison of one pair's routers as Markdown."""
    how = "out-of-fold over all queries" if report.out_of_fold else "on the held-out test split"
    gaps = "; ".join(f"{name} {shown(found)}" for name, found in report.gap.items())
    relaxation = f"t* = {report.t:.4g}" + (
        " (degenerate: the transformed labels equal the probabilistic ones)"
        if report.degenerate
        else ""
    )
    left_out = (
        f"{report.unlabelled} queries are left out: a response or its score is missing.\n\n"
        if report.unlabelled
        else ""
    )
    return (
        f"## {report.pair.weak} or {report.pair.strong}\n\n"
        f"{report.queries} queries, {how}; quality is {report.metric}; {relaxation}.\n\n{left_out}"
        f"Strong minus weak: {gaps}.\n\n{markdown_table(report.rows())}\n"
        "CPT50 and CPT80: share of strong calls at which that much of the gap is recovered. "
        "drop@20%: quality lost, in % of all-strong, with 20 % of the queries on the weak LLM.\n\n"
        f"Best: **{report.best}**, {report.receipt.summary()}.\n\n"
        f"Artifacts, `{report.pair.name()}/comparison.html`: the whole comparison on one page.\n"
    )


@task(task_run_name="report pool")
def publish_pool(experiment: Experiment, report: PoolReport, run_id: str) -> None:
    """Log the pool's table; to Prefect and MLflow."""
    client, page = tracking.client(experiment.store), pool_page(report)
    client.log_text(run_id, page, "pool/pool.md")
    described = client.get_run(run_id).data.tags.get("mlflow.note.content", "")
    client.set_tag(run_id, "mlflow.note.content", described + page)
    if FlowRunContext.get():
        create_markdown_artifact(key="pool", markdown=page, description="All LLMs")


def pool_rows(report: PoolReport) -> list[dict[str, str]]:
    """Return one row of text for each single LLM and each pool policy."""
    return [
        {
            "choice": f"all {single.llm}",
            report.metric: shown(single.quality),
            "USD/1k": f"{single.cost_usd_per_1000:.4f}",
            "over single": "",
            "over mix": "",
        }
        for single in report.singles
    ] + [
        {
            "choice": f"pool of {routed.router}",
            report.metric: shown(routed.outcome.quality),
            "USD/1k": shown(per_1000(routed.outcome.cost_usd), interval=False, digits=4),
            "over single": shown(routed.outcome.over_single),
            "over mix": shown(routed.outcome.over_mix),
        }
        for routed in report.routers
    ]


def pool_page(report: PoolReport) -> str:
    """Return single LLMs and pool policies side by side as Markdown."""
    how = "out-of-fold over all queries" if report.out_of_fold else "on the held-out test split"
    free = not any(single.cost_usd_per_1000 for single in report.singles)
    return (
        f"## All LLMs\n\n{report.queries} queries, {how}; for each the cheapest LLM whose expected "
        f"quality is within {report.margin:g} of the best one's.\n\n"
        f"{markdown_table(pool_rows(report))}\n"
        "over single: quality above the best single LLM that is not dearer. over mix: above the "
        "best coin toss between two LLMs at the same mean cost, which needs no router.\n"
        + ("\nNo LLM has a price, so cost decides nothing: set llms.prices.\n" if free else "")
    )


def _columns(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    return {key: [row[key] for row in rows] for key in rows[0]}
