"""Drift: recent queries held against those that a router was trained and judged on.

The known queries are those of the router's own run, so neither the warehouse nor the champion's
training folder is needed. Their embeddings are compared with those of the recent queries, and the
win rates that the router gave to queries it had not seen with those that it gives to the recent
ones. The mathematics is `router_models.drift`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from prefect import task

from conf.errors import ArtifactError, DataError
from conf.schema import DriftRequest, Store
from router_models.drift import (
    TwoSample,
    energy_test,
    holm,
    ks_test,
    permutations_for,
    queries_needed,
)
from router_models.encoders import load_encoder
from router_models.training_data import same_prompt
from tasks.calibration_data import (
    TEXT_COLUMNS,
    LoggedRouter,
    file_table,
    needed_table,
    win_rates,
)
from tasks.progress import stage

SUFFIXES = (".parquet", ".csv", ".jsonl")
EMBEDDING, WIN_RATE = "embedding", "win rate"
ASSUMPTION = "distinct queries, each drawn independently of the others"
# Out of fold, the router in service was trained on a fold more than those that rated the known
# queries, and rates new ones a little more boldly. Measured with kNN on 150 known and 150 recent
# queries that had not drifted: p ≤ 0.05 in 6.9 %, p ≤ 0.01 in 1.8 % of 811 draws. So p counts
# twice.
FOLD_FACTOR = 2.0
OUT_OF_FOLD = "the served form rates new queries much as its folds did (its p-value is doubled)"

Verdict = Literal["drift", "no drift", "too few queries"]


@dataclass(frozen=True)
class DriftTest:
    """One of the two tests."""

    what: str
    statistic: float
    p_value: float
    bound: float
    """Holm's: p-values up to it are drift."""
    drifted: bool
    known: int
    recent: int


@dataclass(frozen=True)
class DriftReport:
    """Whether the queries have changed, and what that rests on."""

    verdict: Verdict
    router: str
    pair: str
    model_version: str | None
    source: str
    tests: tuple[DriftTest, ...]
    false_alarm_rate: float
    smallest_shift: float
    queries_needed: int | None
    """Distinct recent queries for `no drift` to be said; None where the known ones are too few."""
    repeated: int
    """Recent rows left out, for their query is there already."""
    without_text: int
    """Recent rows left out, for they hold none."""
    known_mean_win_rate: float
    recent_mean_win_rate: float
    condition: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def rows(self) -> list[dict[str, str]]:
        """Return one row for each test, for people."""
        return [
            {
                "test": test.what,
                "known": str(test.known),
                "recent": str(test.recent),
                "statistic": f"{test.statistic:.3g}",
                "p": f"{test.p_value:.3g}",
                "bound": f"{test.bound:.3g}",
                "": "drift" if test.drifted else "",
            }
            for test in self.tests
        ]

    def summary(self) -> str:
        """Return the verdict in a sentence or two."""
        means = f"{self.known_mean_win_rate:.3f} → {self.recent_mean_win_rate:.3f}"
        recent = self.tests[0].recent
        if self.verdict == "drift":
            moved = " and ".join(test.what for test in self.tests if test.drifted)
            return (
                f"Drift in {moved}, at a false-alarm rate of {self.false_alarm_rate:g}. "
                f"Mean win rate {means}."
            )
        if self.verdict == "no drift":
            return (
                f"No drift: a shift of {self.smallest_shift:.0%} of the traffic across a threshold "
                f"would have been seen with 80 % chance. Mean win rate {means}."
            )
        need = (
            f"{self.queries_needed} are needed"
            if self.queries_needed is not None
            else "and so are the known ones, whatever the number of recent ones"
        )
        return (
            f"{recent} distinct recent queries are too few to see a shift of "
            f"{self.smallest_shift:.0%} of the traffic with 80 % chance: {need}. Nothing is said."
        )

    def to_markdown(self) -> str:
        """Return the report as a page."""
        rows = self.rows()
        lines = [
            f"# {self.router}: {self.verdict}",
            "",
            self.summary(),
            "",
            "| " + " | ".join(rows[0]) + " |",
            "|" + "---|" * len(rows[0]),
            *("| " + " | ".join(row.values()) + " |" for row in rows),
            "",
            f"Recent queries: {self.source} ({self.repeated} repeated and {self.without_text} "
            f"without text left out). Holds if: {self.condition}.",
        ]
        return "\n".join(lines)


@task(task_run_name="drift of {router.name}")
def measure_drift(
    store: Store, router: LoggedRouter, request: DriftRequest, *, seed: int
) -> DriftReport:
    """Compare recent queries with the router's known ones.

    Raises DataError for queries that cannot be read, ArtifactError for a router that cannot be
    asked or whose run has lost its tables.
    """
    recent, repeated, without_text = recent_queries(request.queries)
    known, known_rate, out_of_fold = known_queries(store, router)
    generator = np.random.default_rng(seed)
    recent, known = (_drawn(texts, request.at_most, generator) for texts in (recent, known))
    known_rate = _drawn(known_rate, request.at_most, generator)
    recent_rate = win_rates(store, router, recent)
    with stage("Embedding queries"):
        encoder = load_encoder(request.encoder, cache=store.directory / "embeddings")
        embedded = encoder.encode([*known, *recent]).astype(np.float64)
    permutations = permutations_for(request.false_alarm_rate / 2)
    with stage("Comparing queries"):
        found = {
            EMBEDDING: energy_test(
                embedded[: len(known)],
                embedded[len(known) :],
                permutations=permutations,
                seed=seed,
            ),
            WIN_RATE: ks_test(known_rate, recent_rate, permutations=permutations, seed=seed),
        }
    factor = FOLD_FACTOR if out_of_fold else 1.0
    found[WIN_RATE] = replace(found[WIN_RATE], p_value=min(1.0, factor * found[WIN_RATE].p_value))
    tests = judged(found, request.false_alarm_rate)
    needed = queries_needed(
        len(known_rate), shift=request.smallest_shift, rate=request.false_alarm_rate / 2 / factor
    )
    return DriftReport(
        verdict=verdict(tests, recent=len(recent), needed=needed),
        router=router.name,
        pair=router.pair.name(),
        model_version=None if router.version is None else router.version.version,
        source=str(request.queries),
        tests=tests,
        false_alarm_rate=request.false_alarm_rate,
        smallest_shift=request.smallest_shift,
        queries_needed=needed,
        repeated=repeated,
        without_text=without_text,
        known_mean_win_rate=float(np.mean(known_rate)),
        recent_mean_win_rate=float(np.mean(recent_rate)),
        condition=f"{ASSUMPTION}; {OUT_OF_FOLD}" if out_of_fold else ASSUMPTION,
    )


def judged(found: Mapping[str, TwoSample], rate: float) -> tuple[DriftTest, ...]:
    """Return the tests with their bounds: together they raise a false alarm at most at ``rate``."""
    bounds = holm({what: test.p_value for what, test in found.items()}, rate)
    return tuple(
        DriftTest(what, test.statistic, test.p_value, *bounds[what], test.known, test.recent)
        for what, test in found.items()
    )


def verdict(tests: Sequence[DriftTest], *, recent: int, needed: int | None) -> Verdict:
    """Return what may be said: drift is drift at any size, but its absence needs enough queries."""
    if any(test.drifted for test in tests):
        return "drift"
    return "no drift" if needed is not None and recent >= needed else "too few queries"


def known_queries(store: Store, router: LoggedRouter) -> tuple[list[str], np.ndarray, bool]:
    """Return what the router's run knew, and how the router rated what it had not seen.

    The distinct queries of all splits, (N,) win rates of those that were evaluated, and whether
    these are out of fold.
    """
    folder = router.pair.name()
    evaluated = needed_table(store, router.parent_id, f"{folder}/win_rates")
    try:
        everything = needed_table(store, router.parent_id, f"{folder}/labels")
    except ArtifactError:  # a run on battles logs what it was judged on
        everything = evaluated
    predicted = needed_table(store, router.run_id, "win_rates")
    served = "served_win_rate" in predicted.column_names
    held_out = served and predicted["win_rate"].equals(predicted["served_win_rate"])
    distinct, _ = _distinct(everything["text"].to_pylist())
    first = _first_of_each(evaluated["text"].to_pylist())
    rate = evaluated[router.name].to_numpy()[first]
    return distinct, rate, not held_out


def recent_queries(path: Path) -> tuple[list[str], int, int]:
    """Return a file's or a folder's distinct queries, and how many rows were repeats or empty.

    The query stands in a column `prompt` or `text`. Raises DataError where there is none.
    """
    texts: list[object] = []
    for file in _files(path):
        table = file_table(file)
        name = next((name for name in TEXT_COLUMNS if name in table.column_names), None)
        if name is None:
            raise DataError(
                f"{file} has the columns {', '.join(table.column_names)}. Expected the query text "
                "in 'prompt' or 'text'. Rename its column."
            )
        column = table[name]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise DataError(
                f"Column {name} of {file} holds {column.type}. Expected text. Correct it."
            )
        texts += column.to_pylist()
    written = [text for text in texts if isinstance(text, str) and text.strip()]
    if not written:
        raise DataError(
            f"{path} holds no query with text, in {len(texts)} rows. Expected recent queries. Name "
            "another file or folder."
        )
    distinct, repeated = _distinct(written)
    return distinct, repeated, len(texts) - len(written)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # A gateway's log has a file that nothing was written to yet.
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file() and file.stat().st_size > 0
    ]
    if not found:
        raise DataError(
            f"{path} holds no file with content that ends in {', '.join(SUFFIXES)}. Expected "
            "recent queries. Name another folder."
        )
    return found


def _distinct(texts: Sequence[str]) -> tuple[list[str], int]:
    first = _first_of_each(texts)
    return [texts[row] for row in first], len(texts) - len(first)


def _first_of_each(texts: Sequence[str]) -> list[int]:
    """Return the row in which each distinct prompt stands first."""
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        rows.setdefault(same_prompt(text), row)
    return list(rows.values())


def _drawn(rows: Any, at_most: int, generator: np.random.Generator) -> Any:
    """Draw ``at_most`` of a list's or an array's entries, in their order."""
    if len(rows) <= at_most:
        return rows
    chosen = np.sort(generator.permutation(len(rows))[:at_most])
    return rows[chosen] if isinstance(rows, np.ndarray) else [rows[row] for row in chosen]
