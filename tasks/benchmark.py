"""Benchmark data: routers judged on known answers, in the layout that RouteLLM publishes.

A folder of response CSVs gives battles to learn from and queries to be judged on. Training prompts
are never judged: equal prompts and near copies (`near_copy_groups`) stay on one side, and what the
folder lists as contaminated is left out of both. A preference experiment learns elsewhere and is
judged on several such folders.

A long file: what `turnout benchmark` and such an experiment have in common are its functions.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from conf.errors import DataError, unknown_name
from conf.llms import Pair
from conf.schema import Benchmark, Evaluation, PreferenceExperiment, Store
from router_models.near_copies import near_copy_groups
from router_models.statistics import Estimate
from router_models.training_data import same_prompt
from tasks import tracking
from tasks.evaluation import Comparison, compare_routers, compared_too, flat
from tasks.figures import cost_quality, win_rate_by_domain
from tasks.labelling import RatedQueries
from tasks.preference_collection import CollectedPreferences, under_our_names
from tasks.preference_sources import gold_preferences, named_first
from tasks.receipt import Receipt
from tasks.reporting import markdown_table, shown
from tasks.training import COPY, TrainedRouter, timings
from tasks.warehouse import Snapshot, Warehouse

METRIC = "correct"
# Metric → heading, after APGR with its interval: what fits into 80 characters.
SHOWN = {"cpt_50": "CPT50", "cpt_80": "CPT80"}
NOTHING = "–"


@dataclass(frozen=True)
class BenchmarkData:
    """What routers learn from, what they are judged on, and what was left out."""

    queries: RatedQueries
    battles: Snapshot
    evaluation: Evaluation
    """How the queries are divided: a held-out part, or out-of-fold predictions of all."""
    left_out: Mapping[str, int]
    """Reason → rows (or, of a folder's columns and list, how many of them)."""


@task(task_run_name="read {settings.directory}")
def benchmark_data(warehouse: Warehouse, settings: Benchmark) -> BenchmarkData:
    """Read the folder, or both folders, into the warehouse and divide the queries."""
    known = gold_preferences(settings.directory)
    left_out = Counter(known.left_out) + Counter(known.remarks)
    pair = _pair(known.rows, settings)
    trained_on = judged = known.rows
    if settings.evaluation_directory is not None:
        other = gold_preferences(settings.evaluation_directory)
        left_out += Counter(other.left_out) + Counter(other.remarks)
        judged = other.rows
    queries, incomplete = _queries(judged, pair)
    left_out += incomplete
    texts = queries["text"].to_pylist()
    prompts = trained_on["prompt"].to_pylist()
    copies = _copies([*texts, *prompts])
    keys, own_keys = copies[: len(texts)], copies[len(texts) :]
    if settings.evaluation_directory is not None:
        split = ["test"] * len(keys)
        own = ~np.isin(own_keys, keys)
        left_out["training prompts that are evaluated too, or nearly"] = int((~own).sum())
        if settings.train_rows is not None:
            own[own] = _drawn(own_keys[own].tolist(), settings.train_rows, seed=settings.seed)
        trained_on = trained_on.filter(pa.array(own))
    else:
        # Rows of files without a column for each LLM are no queries; such battles stay if they copy
        # none.
        queried = {same_prompt(text) for text in texts}
        is_query = np.array([same_prompt(prompt) in queried for prompt in prompts])
        kept = is_query | ~np.isin(own_keys, keys)
        left_out["battles on near copies of queries"] = int((~kept).sum())
        trained_on = trained_on.filter(pa.array(kept))
        repeated = len(texts) - len(queried)
        nearly = len(keys) - len(set(keys)) - repeated
        left_out["repeated prompts, kept on one side"] = repeated
        left_out["near copies of other prompts, kept on one side"] = nearly
        split = ["train"] * len(keys)
        if settings.train_rows is not None:
            drawn = _drawn(keys.tolist(), settings.train_rows, seed=settings.seed)
            split = ["train" if row else "test" for row in drawn]
    if trained_on.num_rows == 0:
        raise DataError(
            f"All prompts of {settings.directory} are in {settings.evaluation_directory}. Expected "
            "training prompts that are not evaluated. Give another folder."
        )
    queries = queries.append_column("split", pa.array(split)).append_column(COPY, pa.array(keys))
    warehouse.ingest("preferences", trained_on)
    held_out = "test" in split
    return BenchmarkData(
        queries=RatedQueries(pair, warehouse.write_snapshot("benchmark", queries)),
        battles=warehouse.write_snapshot("preferences", trained_on),
        evaluation=settings.evaluation.model_copy(
            update={
                "min_test_queries": 1 if held_out else len(keys) + 1,
                "fold_seed": settings.seed,
            }
        ),
        left_out={reason: rows for reason, rows in left_out.items() if rows},
    )


def _pair(battles: pa.Table, settings: Benchmark) -> Pair:
    """Return the pair that is asked for; of two LLMs, the less often right one is the weak one."""
    llms = sorted({*battles["llm_a"].to_pylist(), *battles["llm_b"].to_pylist()})
    for asked in (settings.weak, settings.strong):
        if asked is not None and asked not in llms:
            raise DataError(
                unknown_name("LLM", asked, llms) + f" {settings.directory} has columns for these."
            )
    if settings.weak and settings.weak == settings.strong:
        raise DataError(
            f"--weak and --strong are both {settings.weak!r}. Expected two of {', '.join(llms)}. "
            "Correct one of them."
        )
    if settings.weak and settings.strong:
        return Pair(weak=settings.weak, strong=settings.strong)
    if len(llms) != 2:
        raise DataError(
            f"{settings.directory} holds the LLMs {', '.join(llms)}. Expected two, or to be told "
            "which to route between. Give --weak and --strong."
        )
    means = {
        llm: np.mean(
            [
                *battles.filter(pc.field("llm_a") == llm)["a_quality"].to_pylist(),
                *battles.filter(pc.field("llm_b") == llm)["b_quality"].to_pylist(),
            ]
        )
        for llm in llms
    }
    weak, strong = sorted(llms, key=lambda llm: means[llm])
    if settings.weak == strong or settings.strong == weak:  # as asked, though it is the better one
        weak, strong = strong, weak
    return Pair(weak=weak, strong=strong)


def _queries(battles: pa.Table, pair: Pair) -> tuple[pa.Table, Counter[str]]:
    """Return the pair's rows as queries with both LLMs' qualities, ordered by id.

    Also how many rows are of files in which one of the two LLMs has no column.
    """
    forward = (pc.field("llm_a") == pair.weak) & (pc.field("llm_b") == pair.strong)
    backward = (pc.field("llm_a") == pair.strong) & (pc.field("llm_b") == pair.weak)
    own = battles.filter(forward | backward).sort_by("battle_id")
    if own.num_rows == 0:
        raise DataError(
            f"No row has answers of both {pair.weak!r} and {pair.strong!r}. Expected a column of "
            "True and False for each, in the folder that is evaluated too. Rename the columns."
        )
    others = battles.filter(~pc.field("domain").isin(own["domain"].unique()))
    incomplete = Counter[str]()
    if others.num_rows:
        names = named_first([f"{name}.csv" for name in sorted(set(others["domain"].to_pylist()))])
        rows = len(set(others["battle_id"].to_pylist()))
        incomplete[f"rows of files without a column for each of the two LLMs ({names})"] = rows
    weak_is_a = pc.equal(own["llm_a"], pair.weak)
    queries = pa.table(
        {
            "query_key": own["preference_key"],
            "query_id": own["battle_id"],
            "text": own["prompt"],
            "domain": own["domain"],
            "weak_quality": pc.if_else(weak_is_a, own["a_quality"], own["b_quality"]),
            "strong_quality": pc.if_else(weak_is_a, own["b_quality"], own["a_quality"]),
        }
    )
    return queries, incomplete


def _copies(texts: Sequence[str]) -> np.ndarray:
    """Return, for each text, the first one that it is a near copy of, (n,) strings."""
    group = near_copy_groups(texts)
    first = np.unique(group, return_index=True)[1]
    return np.array([same_prompt(texts[row]) for row in first], dtype=object)[group]


def _drawn(keys: list[str], rows: int, *, seed: int) -> np.ndarray:
    """Draw ``rows`` of them, equal keys together, by a hash: (n,) booleans."""
    if rows >= len(keys):
        raise DataError(
            f"{rows} training rows are asked for, of {len(keys)}. Expected fewer, so that some are "
            "left to be judged on. Lower --train-rows, or use --folds."
        )
    chosen, left = set(), rows
    for key, count in sorted(Counter(keys).items(), key=lambda item: _hashed(seed, item[0])):
        if count <= left:
            chosen.add(key)
            left -= count
    return np.array([key in chosen for key in keys])


def _hashed(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


@dataclass(frozen=True)
class BenchmarkReport:
    """The outcome of a benchmark."""

    run_id: str
    comparison: Comparison
    left_out: Mapping[str, int]
    seconds: Mapping[str, Mapping[str, float]]
    """Router → fit_seconds (of the last fit) and latency_ms (of one query)."""

    def rows(self) -> list[dict[str, str]]:
        """Return one row of text for each router, best first: 80 characters wide at most.

        How long a fit took, and all other metrics, are in `to_json`.
        """
        estimates = self.comparison.estimates

        def apgr(name: str) -> float:
            return float(np.nan_to_num(estimates[name]["apgr"].value))

        return [
            {
                "router": name,
                "APGR": _cell(estimates[name]["apgr"]),
                "less best": _cell(self.comparison.differences[name], digits=2),
                **{
                    heading: _cell(estimates[name][metric], interval=False)
                    for metric, heading in SHOWN.items()
                },
                "ms": f"{self.seconds[name]['latency_ms']:.1f}" if name in self.seconds else "",
            }
            for name in sorted(estimates, key=apgr, reverse=True)
        ]

    def notes(self) -> list[str]:
        """Return what is to be said beneath the table: why cells are empty, what was left out."""
        found = self.comparison.estimates[self.comparison.best]
        notes = []
        if np.isnan(found["apgr"].value):
            notes.append(f"APGR and CPT are undefined: {found['apgr'].reason}")
        if found["quality_gap"].value < 0:
            pair = self.comparison.pair
            notes.append(
                f"{pair.strong} is worse than {pair.weak} on these rows: --weak and --strong may "
                "have to be exchanged"
            )
        return notes + [f"{reason}: {rows}" for reason, rows in self.left_out.items()]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values; null where a metric is undefined.

        Each router has every metric, `<metric>_ci`, and where a metric is undefined
        `<metric>_reason`; `apgr_less_best` is the paired difference to the best router.
        """
        comparison = self.comparison

        def router(name: str) -> dict[str, Any]:
            figures = dict(comparison.estimates[name])
            figures["apgr_less_best"] = comparison.differences[name]
            found: dict[str, Any] = {"n": comparison.queries}
            for metric, estimate in figures.items():
                found |= _plain(metric, estimate)
            return {**found, **self.seconds.get(name, {})}

        return {
            "weak": comparison.pair.weak,
            "strong": comparison.pair.strong,
            "n": comparison.queries,
            "best": comparison.best,
            "out_of_fold": comparison.out_of_fold,
            "test_digest": comparison.test_digest,
            "left_out": dict(self.left_out),
            "run_id": self.run_id,
            "routers": {name: router(name) for name in comparison.estimates},
        }

    def page(self) -> str:
        """Return the report as Markdown."""
        comparison = self.comparison
        how = "out of fold" if comparison.out_of_fold else "held out"
        notes = "".join(f"- {note}\n" for note in self.notes())
        return (
            f"## {comparison.pair.weak} or {comparison.pair.strong}\n\n{comparison.queries} queries"
            f", {how}.\n\n{markdown_table(self.rows())}\nless best: APGR less that of "
            f"{comparison.best}, with the paired interval. CPT50, CPT80: share of strong calls at "
            f"which that much of the gap is recovered.\n\n{notes}"
        )


def _cell(estimate: Estimate, *, interval: bool = True, digits: int = 3) -> str:
    """Return a value for the table; a dash where there is none: the notes say why."""
    if np.isnan(estimate.value):
        return NOTHING
    return shown(estimate, interval=interval, digits=digits)


def _plain(metric: str, estimate: Estimate) -> dict[str, Any]:
    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    ends = [plain(estimate.interval.low), plain(estimate.interval.high)]
    reason = estimate.reason or estimate.interval.reason
    return {
        metric: plain(estimate.value),
        f"{metric}_ci": ends,
        **({f"{metric}_reason": reason} if reason else {}),
    }


@task(task_run_name="report {comparison.pair.weak}")
def publish_benchmark(
    settings: Benchmark,
    data: BenchmarkData,
    comparison: Comparison,
    trained: Sequence[TrainedRouter],
    run_id: str,
) -> BenchmarkReport:
    """Log tables and figures of a benchmark to its MLflow run and, in a flow, to Prefect."""
    report = _benchmark_report(comparison, data.left_out, trained, run_id)
    _log_report(settings.store, report)
    client = tracking.client(settings.store)
    client.log_text(run_id, report.page(), "benchmark.md")
    client.log_dict(run_id, report.to_json(), "benchmark.json")
    client.set_tag(run_id, "mlflow.note.content", report.page())
    tracking.log_dataset(settings.store, run_id, data.battles, name=str(settings.directory))
    if FlowRunContext.get():
        create_markdown_artifact(key="benchmark", markdown=report.page())
    return report


def _benchmark_report(
    comparison: Comparison,
    left_out: Mapping[str, int],
    trained: Sequence[TrainedRouter],
    run_id: str,
) -> BenchmarkReport:
    seconds = {router.name: timings(router) for router in trained}
    return BenchmarkReport(run_id, comparison, left_out, seconds)


def _log_report(store: Store, report: BenchmarkReport, prefix: str = "") -> None:
    """Log figures, win rates and the best APGR under names that begin with ``prefix``."""
    client, comparison, run_id = tracking.client(store), report.comparison, report.run_id
    for name, figure in {
        "cost_quality.png": cost_quality(comparison),
        "win_rate_by_domain.png": win_rate_by_domain(comparison),
    }.items():
        client.log_figure(run_id, figure, f"{prefix}{name}")
    client.log_artifact(run_id, str(comparison.table.path), f"{prefix}win_rates")
    best = {"best_apgr": comparison.estimates[comparison.best]["apgr"]}
    tracking.log_metrics(store, run_id, flat(best, prefix=prefix))


@dataclass(frozen=True)
class JudgedQueries:
    """What the routers of a preference experiment are judged on, and never trained."""

    together: RatedQueries
    """The queries of all benchmarks: routers are trained once, without any of them."""
    benchmarks: Mapping[str, RatedQueries]
    """Each benchmark's own, the one that decides the gate first."""
    left_out: Mapping[str, Mapping[str, int]]
    """Benchmark → reason → rows."""
    evaluation: Evaluation
    """As configured, but that all queries are a held-out test."""

    def decisive(self) -> RatedQueries:
        """Return the queries that decide the gate."""
        return next(iter(self.benchmarks.values()))


@task(task_run_name="read the benchmarks of {settings.name}")
def judged_queries(warehouse: Warehouse, settings: PreferenceExperiment) -> JudgedQueries:
    """Read the folders on which routers are judged into the warehouse."""
    tables, left_out = {}, {}
    for folder in settings.benchmarks:
        found = gold_preferences(folder.directory, contaminated=folder.contaminated)
        warehouse.ingest("preferences", found.rows)
        renamed = under_our_names(found.rows, settings.preferences.names)
        rows, incomplete = _queries(renamed, settings.pair)
        ids = [f"{folder.name}:{query_id}" for query_id in rows["query_id"].to_pylist()]
        keys = [
            hashlib.sha256(f"{query_id} {text}".encode()).hexdigest()[:24]
            for query_id, text in zip(ids, rows["text"].to_pylist(), strict=True)
        ]  # a folder that is moved holds the same queries
        rows = rows.set_column(0, "query_key", pa.array(keys, pa.string()))
        rows = rows.set_column(1, "query_id", pa.array(ids, pa.string()))
        tables[folder.name] = rows.append_column("split", pa.array(["test"] * rows.num_rows))
        left_out[folder.name] = dict(Counter(found.left_out) + Counter(found.remarks) + incomplete)

    def rated(rows: pa.Table) -> RatedQueries:
        return RatedQueries(settings.pair, warehouse.write_snapshot("benchmark", rows))

    return JudgedQueries(
        together=rated(pa.concat_tables(tables.values())),
        benchmarks={name: rated(rows) for name, rows in tables.items()},
        left_out=left_out,
        evaluation=settings.evaluation.model_copy(update={"min_test_queries": 1}),
    )


@task(task_run_name="compare routers on each benchmark")
def compare_on_benchmarks(
    store: Store,
    judged: JudgedQueries,
    trained: Sequence[TrainedRouter],
    *,
    seed: int,
    parent_id: str,
) -> dict[str, Comparison]:
    """Evaluate the routers on each benchmark: name → comparison, the decisive one first.

    On the decisive one metrics have their plain names in the routers' runs; on the others they are
    logged as `gsm8k/apgr` and so on.
    """
    found: dict[str, Comparison] = {}
    for name, queries in judged.benchmarks.items():
        own = _predictions_on(store, trained, queries)
        if not found:
            found[name] = compare_routers.fn(
                store,
                queries,
                own,
                None,
                metric=METRIC,
                settings=judged.evaluation,
                seed=seed,
                parent_id=parent_id,
            )
        else:
            first = next(iter(found.values()))
            found[name] = compared_too(
                store, queries, own, first, name=name, settings=judged.evaluation, seed=seed
            )
    return found


def _predictions_on(
    store: Store, trained: Sequence[TrainedRouter], queries: RatedQueries
) -> list[TrainedRouter]:
    """Return the routers with their predictions on these queries only."""
    keys = queries.labels.read()["query_key"]
    found = []
    for router in trained:
        rows = router.predictions.read()
        own = rows.filter(pc.is_in(rows["query_key"], keys.combine_chunks()))
        kept = Warehouse(store.directory).write_snapshot("predictions", own)
        found.append(replace(router, predictions=kept))
    return found


@dataclass(frozen=True)
class PreferenceReport:
    """The outcome of a preference experiment."""

    run_id: str
    battles: CollectedPreferences
    benchmarks: Mapping[str, BenchmarkReport]
    """Each benchmark's comparison; the first one chose the best router and judged it."""
    receipt: Receipt

    def best(self) -> str:
        """Return the router that was judged."""
        return self.receipt.router

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        verdict = {"verdict": self.receipt.verdict(), "summary": self.receipt.summary()}
        return {
            "run_id": self.run_id,
            "best": self.best(),
            "battles": {"counts": self.battles.metrics(), "sources": self.battles.rows()},
            "benchmarks": {name: found.to_json() for name, found in self.benchmarks.items()},
            "receipt": {**asdict(self.receipt), **verdict},
        }

    def page(self) -> str:
        """Return the report as Markdown."""
        tables = "".join(f"# {name}\n\n{found.page()}\n" for name, found in self.benchmarks.items())
        return f"{tables}Best: **{self.best()}**, {self.receipt.summary()}.\n"


@task(task_run_name="report {judged.together.pair.weak}")
def publish_preference_report(
    store: Store,
    judged: JudgedQueries,
    battles: CollectedPreferences,
    comparisons: Mapping[str, Comparison],
    trained: Sequence[TrainedRouter],
    receipt: Receipt,
    run_id: str,
) -> PreferenceReport:
    """Log tables and figures of all benchmarks, and the verdict; to Prefect and MLflow.

    What belongs to the decisive benchmark lies where a pipeline run has it, under the pair's name.
    """
    folder = judged.together.pair.name()
    reports = {
        name: _benchmark_report(comparison, judged.left_out[name], trained, run_id)
        for name, comparison in comparisons.items()
    }
    report = PreferenceReport(run_id, battles, reports, receipt)
    for number, (name, found) in enumerate(reports.items()):
        _log_report(store, found, prefix=f"{folder}/{name}/" if number else f"{folder}/")
        queries = judged.benchmarks[name].labels
        tracking.log_dataset(store, run_id, queries, name=f"benchmark {name}")
    client, page = tracking.client(store), report.page()
    client.log_text(run_id, page, f"{folder}/comparison.md")
    client.log_dict(run_id, report.to_json(), f"{folder}/report.json")
    client.set_tag(run_id, "mlflow.note.content", page)
    client.set_tag(run_id, f"turnout.best.{folder}", report.best())
    client.set_tag(run_id, f"turnout.verdict.{folder}", receipt.verdict())
    if FlowRunContext.get():
        create_markdown_artifact(key="comparison", markdown=page, description=folder)
        create_markdown_artifact(key="gate", markdown=receipt.to_markdown(), description=folder)
    return report
