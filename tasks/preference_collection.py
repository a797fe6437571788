"""Collecting preference data: every configured source, united into the battles routers learn from.

Two tables come out. Battles of all LLMs, for the routers that rate every LLM; and the routed
pair's, with those of other LLMs of their tiers under the pair's names, for the routers that know
two LLMs only. A router's settings say which it is (`battles_of`). Source: RouteLLM (arXiv
2406.18665), sections 4.1 and 4.2.

A long file: the sources, what each gives and what is left out of it are read together.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task

from conf.errors import ConfigError, DataError
from conf.llms import Generation, Pair
from conf.preferences import Preferences as PreferenceSettings
from conf.preferences import PreferenceSource
from conf.routers import Router as RouterSettings
from conf.schema import Experiment
from tasks.judging import judge_answers
from tasks.preference_sources import preferences, response_preferences
from tasks.preferences import AGAINST_ITSELF, other_prompts, pair_battles
from tasks.training import SPLITS, evaluation_folds
from tasks.warehouse import Snapshot, Warehouse

HELD_OUT = "on a query that is held out"
EQUAL_ANSWERS = "equal answers, ties for which no judge is asked"


@dataclass(frozen=True)
class RunData:
    """What a run has so far: its queries, the LLMs' responses and their scores."""

    queries: Snapshot
    responses: Snapshot
    scores: Snapshot
    metric: str
    """Name of the quality metric that makes battles of responses."""
    splits: tuple[str, ...] = ("train", "validation")
    """Queries that may be learnt from; battles on any other query are left out."""


@dataclass(frozen=True)
class SourceCount:
    """What one source gave."""

    source: str
    battles: int
    left_out: Mapping[str, int]
    remarks: Mapping[str, int] = field(default_factory=dict)
    """What else was not used, such as columns that are not read."""
    billed_usd: float = 0.0
    """Spent on a judge this time."""
    lost_usd: float = 0.0
    cost_usd: float = 0.0
    """What the judge's answers cost, whenever they were paid for."""
    examples: tuple[str, ...] = ()
    """How some answers of the judge end in which no verdict was found."""
    own: int = 0
    """Battles that the pair fought itself."""
    strong_wins: float = float("nan")
    """Share of them that the strong LLM won, a tie being half: a look at the labels."""


@dataclass(frozen=True)
class CollectedPreferences:
    """The battles of all sources, and how many each gave."""

    all_llms: Snapshot
    """Every battle, of whichever LLMs."""
    pair: Snapshot
    """The pair's own battles and, if they are augmented, those that stand in for them."""
    own: int
    """Battles of ``pair`` that the pair fought itself."""
    counts: tuple[SourceCount, ...]

    def learnt_by(self, router: RouterSettings) -> Snapshot:
        """Return the battles that a router of this kind learns from."""
        return self.all_llms if router.battles_of == "all" else self.pair

    def joined_by(self, router: RouterSettings) -> Snapshot | None:
        """Return the same for a router whose labels they join; None where it keeps to those."""
        return self.learnt_by(router) if router.joins_battles else None

    def spent_usd(self) -> float:
        """Return what the judge took of the budget this time, at the most."""
        return sum(count.billed_usd + count.lost_usd for count in self.counts)

    def metrics(self) -> dict[str, float]:
        """Return all counts under names for MLflow."""
        found: dict[str, float] = {
            "battles": self.all_llms.rows,
            "battles_pair": self.pair.rows,
            "battles_pair_own": self.own,
        }
        for count in self.counts:
            found[f"battles_{count.source}"] = count.battles
            found[f"battles_{count.source}_left_out"] = sum(count.left_out.values())
            if count.source == "judge":
                found["judge_billed_usd"] = count.billed_usd + count.lost_usd
                found["judge_cost_usd"] = count.cost_usd
        return found

    def rows(self) -> list[dict[str, str]]:
        """Return one row of text for each source."""
        return [
            {
                "source": count.source,
                "battles": f"{count.battles:,}",
                "of the pair": f"{count.own:,}",
                "strong wins": f"{count.strong_wins:.0%}" if count.own else "",
                "left out": "; ".join(f"{n:,} {why}" for why, n in count.left_out.items()),
                "remarks": "; ".join(f"{what}: {n:,}" for what, n in count.remarks.items()),
                "USD": f"{count.cost_usd:.4f}",
                "answers without a verdict": " / ".join(count.examples),
            }
            for count in self.counts
        ]


@task(task_run_name="collect preferences of {pair.weak} and {pair.strong}")
def collect_preferences(
    warehouse: Warehouse,
    settings: PreferenceSettings,
    pair: Pair,
    *,
    run: RunData | None = None,
    generation: Generation | None = None,
    spent_usd: float = 0.0,
    held_out: Snapshot | None = None,
) -> CollectedPreferences:
    """Store the battles of every source, unite them, and let tiers stand in for the pair.

    run: what the sources `judge` and `responses` are made from, and which queries are held out.
    held_out: queries, by `text`, that are held out too.
    generation: the judge's budget, of which ``spent_usd`` is gone, and its share of failures.
    Raises DataError where a source has no battle to give or nothing compares the pair, and as
    `judge_answers`; what was judged is kept.
    """
    tables, counts = [], []
    refused = _held_out(run, held_out)
    for name, source in _named(settings.sources):
        if source.kind == "judge":
            rows, count = _judged(
                warehouse, settings, pair, _run_data(run, source), generation, spent_usd
            )
        else:
            rows, count = _ingested(warehouse, source, run)
        usable, unusable = _usable(under_our_names(rows, settings.names), refused)
        tables.append(usable)
        own, strong_wins = _own_battles(usable, pair)
        counts.append(
            replace(
                count,
                source=name,
                battles=usable.num_rows,
                left_out=Counter(count.left_out) + Counter(unusable),
                own=own,
                strong_wins=strong_wins,
            )
        )
    united = pa.concat_tables(tables)
    if united.num_rows == 0:
        reasons = "; ".join(f"{count.source}: {dict(count.left_out)}" for count in counts)
        raise DataError(
            f"No battle can be learnt from ({reasons}). Expected some on prompts that are not held "
            "out, between different LLMs. Add sources, or correct preferences.names."
        )
    tiers = settings.tiers if settings.augment else None
    of_pair = pair_battles(united, weak=pair.weak, strong=pair.strong, tiers=tiers)
    return CollectedPreferences(
        all_llms=warehouse.write_snapshot("battles", united),
        pair=warehouse.write_snapshot("battles", of_pair),
        own=sum(count.own for count in counts),
        counts=tuple(counts),
    )


def pair_preferences(
    experiment: Experiment,
    pair: Pair,
    queries: Snapshot,
    responses: Snapshot,
    scores: Snapshot,
    *,
    spent_usd: float,
) -> CollectedPreferences | None:
    """Collect what joins the labels of one pair in a run that asked LLMs; None for nothing.

    What the responses' own scores say is always among it: battles take the place of labels in
    training. Queries of a held-out test give no battles; out of fold each training hides its own.
    """
    settings = experiment.preferences
    if settings is None:
        return None
    if all(source.kind != "responses" for source in settings.sources):
        own = PreferenceSource(kind="responses", llms=(pair.weak, pair.strong))
        settings = settings.model_copy(update={"sources": (*settings.sources, own)})
    held_out = len(evaluation_folds(queries.read(), experiment.evaluation)) == 1
    return collect_preferences(
        Warehouse(experiment.store.directory),
        settings,
        pair,
        run=RunData(
            queries,
            responses,
            scores,
            metric=experiment.quality.label_metric,
            splits=SPLITS[:2] if held_out else SPLITS,
        ),
        generation=experiment.generation,
        spent_usd=spent_usd,
    )


def _named(sources: Sequence[PreferenceSource]) -> list[tuple[str, PreferenceSource]]:
    """Return the sources under their kinds, numbered where a kind comes again."""
    seen = Counter[str]()
    named = []
    for source in sources:
        seen[source.kind] += 1
        number = f"_{seen[source.kind]}" if seen[source.kind] > 1 else ""
        named.append((f"{source.kind}{number}", source))
    return named


def _run_data(run: RunData | None, source: PreferenceSource) -> RunData:
    if run is None:
        raise ConfigError(
            f"The preferences of kind {source.kind!r} are made from a run's responses, and there "
            "are none here. Expected queries, responses and scores. Run the pipeline with llms, or "
            "take other preferences.sources."
        )
    return run


def _judged(
    warehouse: Warehouse,
    settings: PreferenceSettings,
    pair: Pair,
    run: RunData,
    generation: Generation | None,
    spent_usd: float,
) -> tuple[pa.Table, SourceCount]:
    assert settings.judge is not None  # as its settings are validated
    found = judge_answers(
        warehouse,
        _learnt_queries(warehouse, run),
        run.responses,
        pair,
        settings.judge,
        generation or Generation(),
        spent_usd=spent_usd,
    )
    count = SourceCount(
        source="judge",
        battles=found.snapshot.rows,
        left_out=found.left_out,
        remarks={EQUAL_ANSWERS: found.identical} if found.identical else {},
        billed_usd=found.billed_usd,
        lost_usd=found.lost_usd,
        cost_usd=found.cost_usd,
        examples=found.examples,
    )
    return found.snapshot.read(), count


def _ingested(
    warehouse: Warehouse, source: PreferenceSource, run: RunData | None
) -> tuple[pa.Table, SourceCount]:
    if source.kind in ("arena", "gold", "alpaca"):
        found = preferences(source.kind, str(source.path), source=source.verdicts, llms=source.llms)
    else:
        own = _run_data(run, source)
        llms = source.llms or _answering(own.scores)
        queries = _learnt_queries(warehouse, own)
        found = response_preferences(queries, own.scores, llms, own.metric)
    warehouse.ingest("preferences", found.rows)
    return found.rows, SourceCount(
        source.kind, found.rows.num_rows, found.left_out, remarks=found.remarks
    )


def _answering(scores: Snapshot) -> tuple[str, ...]:
    return tuple(sorted(set(scores.read()["llm"].unique().to_pylist())))


def _learnt_queries(warehouse: Warehouse, run: RunData) -> Snapshot:
    rows = run.queries.read()
    kept = rows.filter(pc.is_in(rows["split"], pa.array(run.splits)))
    return warehouse.write_snapshot("queries", kept)


def under_our_names(rows: pa.Table, names: Mapping[str, str]) -> pa.Table:
    """Return the battles with both LLMs called as the experiment calls them."""
    for side in ("llm_a", "llm_b"):
        renamed = [names.get(llm, llm) for llm in rows[side].to_pylist()]
        column = rows.schema.get_field_index(side)
        rows = rows.set_column(column, rows.schema.field(side), pa.array(renamed, pa.string()))
    return rows


def _held_out(run: RunData | None, others: Snapshot | None) -> list[str]:
    """Return the prompts on which no battle may be learnt from."""
    prompts: list[str] = []
    if run is not None:
        queries = run.queries.read()
        learnt = pc.is_in(queries["split"], pa.array(run.splits))
        prompts += queries.filter(pc.invert(learnt))["text"].to_pylist()
    if others is not None:
        prompts += others.read()["text"].to_pylist()
    return prompts


def _usable(rows: pa.Table, refused: Sequence[str]) -> tuple[pa.Table, Mapping[str, int]]:
    """Return the battles that may be learnt from, and the others' count."""
    apart = rows.filter(pc.not_equal(rows["llm_a"], rows["llm_b"]))
    kept = other_prompts(apart["prompt"].to_pylist(), refused)
    left_out = {
        AGAINST_ITSELF: rows.num_rows - apart.num_rows,
        HELD_OUT: apart.num_rows - len(kept),
    }
    return apart.take(kept), left_out


def _own_battles(rows: pa.Table, pair: Pair) -> tuple[int, float]:
    """Return how many battles the pair fought itself, and the share that the strong LLM won."""
    sides = pa.array([pair.weak, pair.strong])
    own = rows.filter(pc.and_(pc.is_in(rows["llm_a"], sides), pc.is_in(rows["llm_b"], sides)))
    if own.num_rows == 0:
        return 0, float("nan")
    wins, forward = own["a_wins"].to_numpy(), pc.equal(own["llm_a"], pair.strong).to_numpy()
    return own.num_rows, float(np.mean(np.where(forward, wins, 1 - wins)))
