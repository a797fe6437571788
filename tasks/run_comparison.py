"""Routers of one run or of several, compared on the queries that all of them were judged on.

Every router is taken at the win rates its own run logged for queries it had not seen. The same
draws of queries serve all of them, so a difference has an interval of its own, paired. Longer than
most files here: what is found, how, and what must be said about it belong together.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from conf.errors import ArtifactError, ConfigError, DataError
from conf.llms import Pair
from conf.load import config_digest
from conf.schema import Evaluation, Store
from router_models.statistics import Estimate, bootstrap_metrics
from tasks.evaluation import CONTROLS, COST_COLUMNS, ORACLE, groups_of, saved_usd_per_1000
from tasks.judged_runs import JudgedRun, champion_run, judged_run, parent_of, receipts
from tasks.progress import stage
from tasks.receipt import Receipt

# Random's expectation over all draws: the straight line from all-weak to all-strong.
CHANCE = "a coin"
CHAMPION, RANDOM, KNN = "champion", "random", "kNN"


@dataclass(frozen=True, eq=False)
class Contender:
    """One router; once only, where several runs took up the same training."""

    name: str
    """Unique in the comparison: the router's name, with its runs' letters where it needs them."""
    router: str
    kind: str
    runs: str
    """Letters of the runs that have it."""
    run_ids: tuple[str, ...]
    """Its own MLflow runs, in the same order."""
    win_rate: np.ndarray
    """(N,)"""
    observed: np.ndarray | None
    """(N,) 1 − label, by the kind of labels it was trained on; None where that is not known."""
    champion: bool

    def is_reference(self) -> bool:
        """Tell whether it only stands for comparison: random, length or oracle."""
        return self.kind in CONTROLS


@dataclass(frozen=True, eq=False)
class RunComparison:
    """How routers of some runs did on the same N queries."""

    pair: Pair
    metric: str
    runs: Mapping[str, JudgedRun]
    """Letter → run, the one that was asked for first is A."""
    contenders: tuple[Contender, ...]
    """Best APGR first, references last."""
    test_digest: str
    domain: tuple[str, ...]
    weak: np.ndarray
    strong: np.ndarray
    """(N,) mean quality of a query's responses."""
    groups: np.ndarray
    """(N,) numbers that queries of the same prompt share."""
    bills: tuple[np.ndarray, np.ndarray] | None
    """(N,) US dollars of one response of the weak and of the strong LLM, where they are known."""
    estimates: Mapping[str, Mapping[str, Estimate]]
    """Contender → metric → value with interval."""
    against: Mapping[str, Mapping[str, Estimate]]
    """Baseline (champion, random, kNN) → contender → APGR difference, paired."""
    baselines: Mapping[str, str]
    """Baseline → the contender it is; random is the expectation over all draws."""
    saved: Mapping[str, Mapping[str, Estimate]]
    """Contender → saved_usd_per_1000_at_… → value with interval; empty without bills."""
    receipts: tuple[Receipt, ...]
    notes: tuple[str, ...]
    """What a reader must know: which queries, whose qualities."""
    level: float
    replicates: int
    seed: int

    def champion(self) -> Contender | None:
        """Return the champion, where it is among the contenders."""
        return next((one for one in self.contenders if one.champion), None)

    def best(self) -> Contender:
        """Return the router with the highest APGR; a reference only where there is nothing else."""
        return self.contenders[0]

    def main_baseline(self) -> str:
        """Return what differences are shown against where there is room for one only."""
        return CHAMPION if CHAMPION in self.against else RANDOM

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; null for what is undefined."""
        return {
            "pair": {"weak": self.pair.weak, "strong": self.pair.strong},
            "metric": self.metric,
            "queries": len(self.weak),
            "test_digest": self.test_digest,
            "confidence": self.level,
            "runs": {
                letter: {
                    "run_id": run.run_id,
                    "name": run.name,
                    "started": run.started,
                    "evaluated": run.evaluated,
                }
                for letter, run in self.runs.items()
            },
            "champion": next((one.name for one in self.contenders if one.champion), None),
            "routers": {one.name: self._plain(one) for one in self.contenders},
            "notes": list(self.notes),
        }

    def _plain(self, one: Contender) -> dict[str, Any]:
        return {
            "router": one.router,
            "runs": list(one.runs),
            "run_ids": list(one.run_ids),
            "champion": one.champion,
            "metrics": {
                metric: _plain(value) for metric, value in self.estimates[one.name].items()
            },
            "apgr_against": {
                baseline: _plain(differences[one.name])
                for baseline, differences in self.against.items()
                if one.name in differences
            },
            **{name: _plain(value) for name, value in self.saved.get(one.name, {}).items()},
        }


def _plain(estimate: Estimate) -> dict[str, float | None]:
    ends = {
        "value": estimate.value,
        "low": estimate.interval.low,
        "high": estimate.interval.high,
    }
    return {name: None if math.isnan(end) else float(end) for name, end in ends.items()}


def compare_runs(
    store: Store,
    run_ids: Sequence[str],
    *,
    pair: str | None,
    evaluation: Evaluation,
    seed: int,
) -> RunComparison:
    """Compare all routers of these runs on the queries that all of the runs judged.

    Raises DataError for runs that were judged by different metrics or share no query.
    """
    first = judged_run(store, run_ids[0], pair)
    rest = [judged_run(store, run_id, first.pair.name()) for run_id in run_ids[1:]]
    return compared(store, [first, *rest], evaluation=evaluation, seed=seed)


def compare_run_with_champion(
    store: Store, run_id: str, pair: str, *, evaluation: Evaluation, seed: int
) -> RunComparison:
    """Compare a run's routers on all its queries, with the champion where it was judged on them."""
    own, note = judged_run(store, run_id, pair), ""
    runs = [own]
    router_run = champion_run(store, pair)
    parent = parent_of(store, router_run)
    if parent is not None and parent != run_id:
        name, judged = None, set[str]()
        with suppress(ArtifactError):  # of a run that was killed before it was judged
            other = judged_run(store, parent, pair)
            name = next(
                (name for name, child in other.routers.items() if child == router_run), None
            )
            judged = set(other.table["query_key"].to_pylist())
        if name is not None and judged >= set(own.table["query_key"].to_pylist()):
            runs.append(replace(other, routers={name: other.routers[name]}))
        else:
            note = (
                "The champion's own run did not judge it on all these queries, so it is not in "
                "these tables; the gate's receipt holds it against the candidate on queries new to "
                "both."
            )
    found = compared(store, runs, evaluation=evaluation, seed=seed)
    return replace(found, notes=(*found.notes, note)) if note else found


def compared(
    store: Store, runs: Sequence[JudgedRun], *, evaluation: Evaluation, seed: int
) -> RunComparison:
    """Compare the routers of some runs of one pair."""
    lettered = {chr(ord("A") + number): run for number, run in enumerate(_checked(runs))}
    first = runs[0]
    shared = _shared_keys(runs)
    tables = {letter: _rows_of(run.table, shared) for letter, run in lettered.items()}
    table = tables["A"]
    weak, strong = table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy()
    champion = champion_run(store, first.pair.name())
    contenders = _contenders(lettered, tables, shared, champion)
    rates = {one.name: one.win_rate for one in contenders} | {CHANCE: np.full(len(weak), 0.5)}
    replicates, level, groups = evaluation.replicates, evaluation.confidence, groups_of(table)
    with stage("Comparing routers"):
        bootstrap = bootstrap_metrics(
            rates, weak, strong, replicates=replicates, seed=seed, groups=groups
        )
    estimates = {one.name: bootstrap.estimates(one.name, level=level) for one in contenders}
    ranked = sorted(contenders, key=lambda one: (one.is_reference(), -_apgr(estimates, one)))
    baselines = _baselines(ranked)
    bills, saved = None, {}
    if set(COST_COLUMNS) <= set(table.column_names):
        bills = (table[COST_COLUMNS[0]].to_numpy(), table[COST_COLUMNS[1]].to_numpy())
        own = {one.name: one.win_rate for one in contenders}
        saved = saved_usd_per_1000(
            own, *bills, replicates=replicates, seed=seed, level=level, groups=groups
        )
    return RunComparison(
        pair=first.pair,
        metric=first.metric,
        runs=lettered,
        contenders=tuple(ranked),
        test_digest=config_digest([shared, weak.tolist(), strong.tolist()]),
        domain=tuple(name or "(none)" for name in table["domain"].to_pylist()),
        weak=weak,
        strong=strong,
        groups=groups,
        bills=bills,
        estimates=estimates,
        against={
            baseline: {
                one.name: bootstrap.difference(one.name, name, "apgr", level=level)
                for one in ranked
                if one.name != name
            }
            for baseline, name in baselines.items()
        },
        baselines=baselines,
        saved=saved,
        receipts=tuple(receipts(store, [run_id for one in ranked for run_id in one.run_ids])),
        notes=tuple(_notes(lettered, tables, champion, ranked)),
        level=level,
        replicates=replicates,
        seed=seed,
    )


def _apgr(estimates: Mapping[str, Mapping[str, Estimate]], one: Contender) -> float:
    apgr = estimates[one.name]["apgr"].value
    return -math.inf if math.isnan(apgr) else apgr


def _checked(runs: Sequence[JudgedRun]) -> Sequence[JudgedRun]:
    if len(runs) > 26:
        raise ConfigError(
            f"{len(runs)} runs are to be compared. Expected 26 at most, a letter for each. Name "
            "fewer."
        )
    metrics = {run.metric: run for run in runs}
    if len(metrics) > 1:
        listed = ", ".join(f"{run.run_id[:8]} by {metric}" for metric, run in metrics.items())
        raise DataError(
            f"The runs were judged by different quality metrics: {listed}. Expected one. Compare "
            "runs with the same quality.label_metric."
        )
    return runs


def _shared_keys(runs: Sequence[JudgedRun]) -> list[str]:
    """Return the queries that every run judged, in the first run's order."""
    keys = runs[0].table["query_key"].to_pylist()
    for run in runs[1:]:
        other = set(run.table["query_key"].to_pylist())
        keys = [key for key in keys if key in other]
        if not keys:
            raise DataError(
                f"Run {run.run_id[:8]} ({run.name}) shares no query with run "
                f"{runs[0].run_id[:8]} ({runs[0].name}). Expected some that all of them were "
                "judged on. Compare runs on the same queries, or run one of them on the other's."
            )
    return keys


def _rows_of(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    row_of = {key: row for row, key in enumerate(table["query_key"].to_pylist())}
    return table.take(pa.array([row_of[key] for key in keys]))


def _contenders(
    runs: Mapping[str, JudgedRun],
    tables: Mapping[str, pa.Table],
    shared: Sequence[str],
    champion: str | None,
) -> list[Contender]:
    """Return the routers; equal win rates under one name are one training, taken up again."""
    found: dict[tuple[str, bytes], Contender] = {}
    for letter, run in runs.items():
        for router, run_id in run.routers.items():
            if router == ORACLE and letter != "A":
                continue  # it knows the outcomes, and those are run A's
            win_rate = tables[letter][router].to_numpy()
            key = (router, win_rate.tobytes())
            known = found.get(key)
            found[key] = Contender(
                name=router,
                router=router,
                kind=run.kinds[router],
                runs=letter if known is None else known.runs + letter,
                run_ids=(run_id,) if known is None else (*known.run_ids, run_id),
                win_rate=win_rate,
                observed=_observed(run, router, shared) if known is None else known.observed,
                champion=run_id == champion or (known is not None and known.champion),
            )
    names = [one.router for one in found.values()]
    return [
        replace(one, name=f"{one.router} {one.runs}") if names.count(one.router) > 1 else one
        for one in found.values()
    ]


def _observed(run: JudgedRun, router: str, shared: Sequence[str]) -> np.ndarray | None:
    kind = run.label_kinds.get(router)
    if run.labels is None or kind is None or kind not in run.labels.column_names:
        return None
    return 1.0 - _rows_of(run.labels, shared)[kind].to_numpy()


def _baselines(ranked: Sequence[Contender]) -> dict[str, str]:
    """Return what the routers are held against; of several kNN, the best."""
    champion = next((one.name for one in ranked if one.champion), None)
    knn = next((one.name for one in ranked if one.kind == "knn"), None)
    found = {} if champion is None else {CHAMPION: champion}
    return found | {RANDOM: CHANCE} | ({} if knn is None else {KNN: knn})


def _notes(
    runs: Mapping[str, JudgedRun],
    tables: Mapping[str, pa.Table],
    champion: str | None,
    ranked: Sequence[Contender],
) -> list[str]:
    notes, table = [], tables["A"]
    sizes = {letter: run.table.num_rows for letter, run in runs.items()}
    if any(size != table.num_rows for size in sizes.values()):
        listed = ", ".join(f"{letter} {size}" for letter, size in sizes.items())
        notes.append(
            f"The runs were judged on different queries ({listed}). Compared are the "
            f"{table.num_rows} that all of them share."
        )
    for letter, other in tables.items():
        differ = int(
            np.any(
                [
                    table[column].to_numpy() != other[column].to_numpy()
                    for column in ("weak_quality", "strong_quality")
                ],
                axis=0,
            ).sum()
        )
        if differ:
            notes.append(
                f"{differ} queries were answered or scored differently in run {letter}. All "
                "routers are judged by run A's qualities."
            )
    if champion is None:
        notes.append("There is no champion yet.")
    elif not any(one.champion for one in ranked):
        notes.append(f"The champion (run {champion[:8]}) is not among these routers.")
    return notes
