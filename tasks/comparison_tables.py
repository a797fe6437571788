"""The tables of a comparison, for page and terminal: metrics with differences, money, domains.

Rows are text with intervals, in the order of the contenders.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router_models.statistics import Estimate, bootstrap_metrics
from tasks.evaluation import WEAK_SHARES_PERCENT
from tasks.run_comparison import CHAMPION, Contender, RunComparison

# A domain of fewer queries is marked; of fewer still, taken together with others like it.
FEW_QUERIES = 30
FEWEST_QUERIES = 10


@dataclass(frozen=True)
class Cell:
    """A number in a table, with the ends of its interval and whether it is surely good or bad."""

    value: str
    ends: str = ""
    verdict: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    cells: tuple[Cell, ...]
    mark: str = ""
    """champion, reference or nothing."""


@dataclass(frozen=True)
class DomainSlice:
    """What the LLMs and some routers do on the queries of one domain."""

    domain: str
    queries: int
    gap: Estimate
    apgr: Mapping[str, Estimate]


def metric_rows(found: RunComparison) -> list[Row]:
    """Return each router's metrics and what they are more than the baselines'."""
    rows = []
    for one in found.contenders:
        own = found.estimates[one.name]
        differences = [
            cell(differences[one.name], sign="+", judged=True)
            if one.name in differences
            else Cell("–")
            for differences in found.against.values()
        ]
        cells = [
            cell(own["apgr"]),
            *differences,
            cell(own["cpt_50"]),
            cell(own["cpt_80"]),
            cell(own["quality_drop_pct_at_20"], digits=1, unit=" %"),
        ]
        rows.append(Row(one.name, tuple(cells), _mark(one)))
    return rows


def money_rows(found: RunComparison) -> list[Row]:
    """Return what each router saves and loses at each share; none where nothing has a price."""
    if found.bills is None or not any(bill.any() for bill in found.bills):
        return []
    largest = max(abs(value.value) for saved in found.saved.values() for value in saved.values())
    digits = 4 if largest == 0 else min(max(2 - math.floor(math.log10(largest)), 2), 8)
    rows = []
    for one in found.contenders:
        cells = []
        for share in WEAK_SHARES_PERCENT:
            saved = found.saved[one.name][f"saved_usd_per_1000_at_{share}"]
            lost = found.estimates[one.name][f"quality_drop_pct_at_{share}"]
            cells += [cell(saved, digits=digits, unit="$"), cell(lost, digits=1, unit=" %")]
        rows.append(Row(one.name, tuple(cells), _mark(one)))
    return rows


def console_rows(found: RunComparison) -> list[dict[str, str]]:
    """Return one row of text for each router, to fit a terminal of 80 columns."""
    baseline = found.main_baseline()
    rows = []
    for one in found.contenders:
        own, difference = found.estimates[one.name], found.against[baseline].get(one.name)
        apgr = cell(own["apgr"])
        gain = Cell("–") if difference is None else cell(difference, sign="+")
        row = {
            "router": one.router + (" ★" if one.champion else ""),
            "run": one.runs,
            "APGR": f"{apgr.value} {apgr.ends}".strip(),
            f"− {baseline}": f"{gain.value} {gain.ends}".strip(),
            "CPT50": cell(own["cpt_50"], digits=2).value,
        }
        # With several runs their letters take the room of the last column.
        left_out = "CPT50" if len(found.runs) > 1 else "run"
        rows.append({key: text for key, text in row.items() if key != left_out})
    return rows


def shown_slices(found: RunComparison) -> list[Contender]:
    """Return the routers that are shown by domain: the best, and the champion if it is another."""
    shown = [found.best(), found.champion()]
    return [one for place, one in enumerate(shown) if one is not None and one not in shown[:place]]


def domain_slices(found: RunComparison, shown: Sequence[Contender]) -> list[DomainSlice]:
    """Return the domains, largest first; those of under ten queries together, last."""
    domain = np.array(found.domain)
    names, sizes = np.unique(domain, return_counts=True)
    own = [str(name) for name in names[np.argsort(-sizes, kind="stable")]]
    own = [name for name in own if _prompts(found, domain == name) >= FEWEST_QUERIES]
    slices = [_slice(found, shown, name, domain == name) for name in own]
    rest = np.setdiff1d(names, own)
    if len(rest):
        title = f"{len(rest)} small domains" if len(rest) > 1 else str(rest[0])
        slices.append(_slice(found, shown, title, np.isin(domain, rest)))
    return slices


def _prompts(found: RunComparison, rows: np.ndarray) -> int:
    return len(np.unique(found.groups[rows]))


def _slice(
    found: RunComparison, shown: Sequence[Contender], title: str, rows: np.ndarray
) -> DomainSlice:
    bootstrap = bootstrap_metrics(
        {one.name: one.win_rate[rows] for one in shown},
        found.weak[rows],
        found.strong[rows],
        replicates=found.replicates,
        seed=found.seed,
        groups=found.groups[rows],
    )
    return DomainSlice(
        domain=title,
        queries=_prompts(found, rows),
        gap=bootstrap.estimate(shown[0].name, "quality_gap", level=found.level),
        apgr={one.name: bootstrap.estimate(one.name, "apgr", level=found.level) for one in shown},
    )


def domain_row(one: DomainSlice) -> Row:
    few = one.queries < FEW_QUERIES
    cells = (Cell(str(one.queries)), cell(one.gap, sign="+"), *map(cell, one.apgr.values()))
    return Row(one.domain + (" (few)" if few else ""), cells, "reference" if few else "")


def domain_note(found: RunComparison) -> str:
    names, sizes = np.unique(np.array(found.domain), return_counts=True)
    if len(names) == 1:
        return "These queries name no domains, or one only."
    notes = []
    if (sizes < FEW_QUERIES).any():
        notes.append(f"Grey: under {FEW_QUERIES} queries, too few to go by.")
    if (sizes < FEWEST_QUERIES).sum() > 1:
        notes.append(f"Domains of under {FEWEST_QUERIES} are taken together.")
    return " ".join(notes)


def cell(
    estimate: Estimate, *, digits: int = 3, sign: str = "", unit: str = "", judged: bool = False
) -> Cell:
    """Return an estimate as a table's cell; ``judged`` colours what surely differs from 0.

    unit: "$" goes before the number, anything else after it.
    """
    if math.isnan(estimate.value):
        return Cell("undefined", reason=estimate.reason or "no value")
    ends = estimate.interval
    number = f"{sign}z.{digits}f"  # z: no minus before a zero
    value = f"{estimate.value:{number}}"
    verdict = ""
    if judged and ends.excludes(0.0):
        verdict = "good" if ends.low > 0 else "bad"
    return Cell(
        unit + value if unit == "$" else value + unit,
        f"[{ends.low:{number}}, {ends.high:{number}}]",
        verdict,
    )


def _mark(one: Contender) -> str:
    if one.champion:
        return CHAMPION
    return "reference" if one.is_reference() else ""
