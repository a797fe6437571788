"""Evaluation: every router, random and the oracle on the same queries, with paired intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task

from conf.errors import DataError
from conf.llms import Pair
from conf.load import config_digest
from conf.schema import Evaluation, Store
from router_models.frontier import Frontier, RankedQueries, oracle_win_rate
from router_models.statistics import (
    Bootstrap,
    Estimate,
    bootstrap_metrics,
    interval,
    resamples,
)
from router_models.training_data import prompt_groups
from tasks import tracking
from tasks.labelling import RatedQueries, paired_qualities
from tasks.progress import stage
from tasks.training import TrainedRouter
from tasks.warehouse import Snapshot, Warehouse

ORACLE = "oracle"
CONTROLS = ("random", "length", ORACLE)
WEAK_SHARES_PERCENT = (10, 20, 40)
COST_COLUMNS = ("weak_cost_usd", "strong_cost_usd")


@dataclass(frozen=True)
class Comparison:
    """How the routers of one pair did on the same queries under one quality metric."""

    pair: Pair
    metric: str
    queries: int
    out_of_fold: bool
    """Whether predictions are out-of-fold over all queries instead of on a held-out test split."""
    test_digest: str
    """Hash of the evaluated queries and their qualities: equal digests may be compared."""
    estimates: Mapping[str, Mapping[str, Estimate]]
    """Router → metric → value with interval."""
    runs: Mapping[str, str]
    """Router → MLflow run id."""
    label_kinds: Mapping[str, str]
    """Trained router → the kind of labels it was trained on."""
    table: Snapshot
    """query_key, query_id, text, domain, both LLMs' qualities, their cost_usd of one response where
    it is known, and each router's win rate."""
    best: str
    """The router with the highest APGR; a control only where there is nothing else."""
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    """Router → its APGR less the best router's, with the paired interval."""


@task(task_run_name="compare routers of {label_set.pair.weak}")
def compare_routers(
    store: Store,
    label_set: RatedQueries,
    trained: Sequence[TrainedRouter],
    responses: Snapshot | None,
    *,
    metric: str,
    settings: Evaluation,
    seed: int,
    parent_id: str,
) -> Comparison:
    """Evaluate all routers of a pair against each other and log the numbers to their runs.

    responses: what the LLMs answered and what it cost, where it is known: money saved is logged.
    """
    table = evaluated_queries(label_set, trained)
    names = [*(router.name for router in trained), ORACLE]
    with stage("Comparing routers"):
        bootstrap = _bootstrap(table, names, settings=settings, seed=seed)
    best = _best(bootstrap, trained)
    tags = {"turnout.pair": label_set.pair.name(), "turnout.kind": ORACLE}
    with tracking.child_run(store, parent_id, ORACLE, tags=tags) as oracle_run:
        runs = {**{router.name: router.run_id for router in trained}, ORACLE: oracle_run}
    warehouse = Warehouse(store.directory)
    judged = _judged(store, bootstrap, table, runs, best=best, level=settings.confidence)
    if responses is not None:
        table = with_costs(warehouse, table, responses, pair=label_set.pair)
        savings = saved_usd_per_1000(
            {name: table[name].to_numpy() for name in names},
            *(table[column].to_numpy() for column in COST_COLUMNS),
            replicates=settings.replicates,
            seed=seed,
            level=settings.confidence,
            groups=groups_of(table),
        )
        for name in names:
            tracking.log_metrics(store, runs[name], flat(savings[name]))
    comparison = Comparison(
        pair=label_set.pair,
        metric=metric,
        out_of_fold=not _is_held_out(label_set, table),
        runs=runs,
        label_kinds={router.name: router.labels for router in trained},
        table=warehouse.write_snapshot("evaluation", table),
        best=best,
        **judged,
    )
    _describe(store, comparison)
    return comparison


def compared_too(
    store: Store,
    queries: RatedQueries,
    trained: Sequence[TrainedRouter],
    first: Comparison,
    *,
    name: str,
    settings: Evaluation,
    seed: int,
) -> Comparison:
    """Compare the routers of the ``first`` comparison on other queries, in the same runs.

    Metrics are logged as `name/apgr` and so on. The router that the first one chose is the best
    here too: it is what gets served.
    """
    table = evaluated_queries(queries, trained)
    bootstrap = _bootstrap(table, list(first.runs), settings=settings, seed=seed)
    judged = _judged(
        store, bootstrap, table, first.runs,
        best=first.best, level=settings.confidence, prefix=f"{name}/",
    )  # fmt: skip
    kept = Warehouse(store.directory).write_snapshot("evaluation", table)
    return replace(first, table=kept, **judged)


def _bootstrap(
    table: pa.Table, names: Sequence[str], *, settings: Evaluation, seed: int
) -> Bootstrap:
    return bootstrap_metrics(
        {name: table[name].to_numpy() for name in names},
        table["weak_quality"].to_numpy(),
        table["strong_quality"].to_numpy(),
        replicates=settings.replicates,
        seed=seed,
        groups=groups_of(table),
    )


def groups_of(table: pa.Table) -> np.ndarray:
    """Return the `prompt_groups` of a table of queries, (N,)."""
    return prompt_groups(table["text"].to_pylist())


def _judged(
    store: Store,
    bootstrap: Bootstrap,
    table: pa.Table,
    runs: Mapping[str, str],
    *,
    best: str,
    level: float,
    prefix: str = "",
) -> dict[str, Any]:
    """Log the metrics to the routers' runs; return what a comparison says about these queries."""
    estimates = {name: bootstrap.estimates(name, level=level) for name in runs}
    for name, run_id in runs.items():
        tracking.log_metrics(store, run_id, flat(estimates[name], prefix=prefix))
    judged = ("query_key", "weak_quality", "strong_quality")
    return {
        "queries": table.num_rows,
        "test_digest": config_digest([table[column].to_pylist() for column in judged]),
        "estimates": estimates,
        "differences": {
            name: bootstrap.difference(name, best, "apgr", level=level) for name in runs
        },
    }


def _describe(store: Store, comparison: Comparison) -> None:
    """Say on each router's run what it was judged on; the tags are columns in MLflow's list."""
    how = "out of fold" if comparison.out_of_fold else "held out"
    evaluated = f"{comparison.queries} queries {how}"
    for name, run_id in comparison.runs.items():
        apgr = comparison.estimates[name]["apgr"]
        found = f"APGR {apgr.value:.3f} [{apgr.interval.low:.3f}, {apgr.interval.high:.3f}]"
        if np.isnan(apgr.value):
            found = f"APGR is undefined: {apgr.reason}"
        tags = {
            "turnout.metric": comparison.metric,
            "turnout.test_digest": comparison.test_digest,
            "turnout.evaluated": evaluated,
            tracking.NOTE_TAG: f"`{name}` between {comparison.pair.weak} (weak) and "
            f"{comparison.pair.strong} (strong), on {evaluated} by {comparison.metric}.\n\n"
            f"{found}; 0.5 is chance.",
        }
        tracking.set_tags(store, run_id, tags)


def _is_held_out(queries: RatedQueries, table: pa.Table) -> bool:
    """Tell whether exactly the test split is evaluated."""
    return queries.labels.read()["split"].to_pylist().count("test") == table.num_rows


def evaluated_queries(label_set: RatedQueries, trained: Sequence[TrainedRouter]) -> pa.Table:
    """Return the predicted queries, ordered by id, with qualities and each router's win rate."""
    labels = label_set.labels.read()
    columns = ["query_key", "query_id", "text", "domain", "weak_quality", "strong_quality"]
    predictions = [router.predictions.read() for router in trained]
    row_of = {key: row for row, key in enumerate(labels["query_key"].to_pylist())}
    rows = np.sort([row_of[key] for key in predictions[0]["query_key"].to_pylist()])
    table = labels.select(columns).take(rows)
    keys = table["query_key"].to_pylist()
    for router, predicted in zip(trained, predictions, strict=True):
        rate = dict(
            zip(predicted["query_key"].to_pylist(), predicted["win_rate"].to_pylist(), strict=True)
        )
        if rate.keys() != set(keys):
            raise DataError(
                f"{router.name} predicted {len(rate)} queries, {trained[0].name} {len(keys)}. "
                "Expected the same queries for every router. Train them in one run."
            )
        table = table.append_column(router.name, pa.array([rate[key] for key in keys]))
    oracle = oracle_win_rate(table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy())
    return table.append_column(ORACLE, pa.array(oracle))


def with_costs(
    warehouse: Warehouse, table: pa.Table, responses: Snapshot, *, pair: Pair
) -> pa.Table:
    """Return the queries with what one response of each LLM costs, in US dollars as configured."""
    rows = warehouse.query(
        "SELECT llm, query_key, avg(cost_usd) AS usd FROM read_parquet($responses) "
        "WHERE llm IN ($weak, $strong) GROUP BY llm, query_key",
        {"responses": str(responses.path), "weak": pair.weak, "strong": pair.strong},
    ).to_pylist()
    usd = {(row["llm"], row["query_key"]): row["usd"] for row in rows}
    keys = table["query_key"].to_pylist()
    for column, llm in zip(COST_COLUMNS, (pair.weak, pair.strong), strict=True):
        table = table.append_column(column, pa.array([usd[llm, key] for key in keys]))
    return table


def saved_usd_per_1000(
    win_rates: Mapping[str, np.ndarray],
    weak_usd: np.ndarray,
    strong_usd: np.ndarray,
    *,
    replicates: int,
    seed: int,
    level: float,
    groups: np.ndarray | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Return, for each router, US dollars saved per 1,000 queries against all-strong.

    At 10, 20 and 40 % of the queries on the weak LLM. The bills are (N,), of one response; what is
    saved is the "quality drop" of the curve whose quality is the bill, and its interval comes of
    the same draws of queries as the metrics'.
    """
    saved: dict[str, dict[str, Estimate]] = {}
    for name, rate in win_rates.items():
        ranked = RankedQueries(rate, weak_usd, strong_usd)
        draws = resamples(len(weak_usd), replicates=replicates, seed=seed, groups=groups)
        drawn = np.array([_saved_usd(ranked.curve(counts)) for counts in draws])
        point = _saved_usd(ranked.curve())
        saved[name] = {
            f"saved_usd_per_1000_at_{share}": Estimate(
                point[at], interval(drawn[:, at], level=level)
            )
            for at, share in enumerate(WEAK_SHARES_PERCENT)
        }
    return saved


def _saved_usd(bill: Frontier) -> list[float]:
    return [1000 * bill.quality_drop_at(share / 100).absolute for share in WEAK_SHARES_PERCENT]


def flat(estimates: Mapping[str, Estimate], prefix: str = "") -> dict[str, float]:
    """Return metrics under their names, with _low and _high for the ends of the interval."""
    metrics: dict[str, float] = {}
    for name, estimate in estimates.items():
        metrics[f"{prefix}{name}"] = estimate.value
        metrics[f"{prefix}{name}_low"] = estimate.interval.low
        metrics[f"{prefix}{name}_high"] = estimate.interval.high
    return metrics


def reported_metric(
    store: Store,
    comparison: Comparison,
    queries: Snapshot,
    scores: Snapshot,
    *,
    metric: str,
    settings: Evaluation,
    seed: int,
) -> Mapping[str, Mapping[str, Estimate]]:
    """Evaluate the same routers under another quality metric, logged as `metric/apgr` and so on."""
    rows, weak, strong = paired_qualities(
        Warehouse(store.directory), queries, scores, pair=comparison.pair, metric=metric
    )
    row_of = {key: row for row, key in enumerate(rows["query_key"].to_pylist())}
    table = comparison.table.read()
    scored = [key in row_of for key in table["query_key"].to_pylist()]
    table = table.filter(pa.array(scored))
    if table.num_rows == 0:
        return {}
    at = [row_of[key] for key in table["query_key"].to_pylist()]
    bootstrap = bootstrap_metrics(
        {name: table[name].to_numpy() for name in comparison.runs},
        weak.mean(axis=1)[at],
        strong.mean(axis=1)[at],
        replicates=settings.replicates,
        seed=seed,
        groups=groups_of(table),
    )
    estimates = {
        name: bootstrap.estimates(name, level=settings.confidence) for name in comparison.runs
    }
    for name, run_id in comparison.runs.items():
        tracking.log_metrics(store, run_id, flat(estimates[name], prefix=f"{metric}/"))
    return estimates


def _best(bootstrap: Bootstrap, trained: Sequence[TrainedRouter]) -> str:
    names = [router.name for router in trained]
    learned = [router.name for router in trained if router.settings.router not in CONTROLS]
    candidates = learned or names
    apgr = {name: bootstrap.point[name]["apgr"] for name in candidates}
    # With no gap to recover every APGR is NaN; the first router stands in and the gate rejects it.
    return max(candidates, key=lambda name: -np.inf if np.isnan(apgr[name]) else apgr[name])
