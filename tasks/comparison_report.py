"""The comparison report: one HTML file that needs nothing else, for people who were not there.

Curves with bands, metrics with paired differences, money, domains, calibration and the gate's
receipts, each with a line on what it means. Figures are inline SVG in the reader's own ink, so the
page reads in light and dark and on paper.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import StoreError
from conf.schema import Evaluation, Pair, Store
from router_models.statistics import Estimate, bootstrap_metrics
from tasks import tracking
from tasks.evaluation import WEAK_SHARES_PERCENT
from tasks.figures import domain_boxes, quality_curves, reliability_curves
from tasks.run_comparison import CHAMPION, Contender, RunComparison, compare_run_with_champion

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

REPORT = "comparison.html"
# A domain of fewer queries is marked; of fewer still, taken together with others like it.
FEW_QUERIES = 30
FEWEST_QUERIES = 10
TEMPLATES = Path(__file__).parent / "templates"
NO_BILLS = "What the responses cost was not logged with these runs."
NO_PRICES = "No LLM has a price, so nothing is saved in money: set llms.prices."


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
class Fact:
    """One of the numbers at the head of the page."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class DomainSlice:
    """What the LLMs and some routers do on the queries of one domain."""

    domain: str
    queries: int
    gap: Estimate
    apgr: Mapping[str, Estimate]


def write_report(found: RunComparison, path: Path) -> None:
    """Write the report to a file; raises StoreError where that cannot be."""
    try:
        path.write_text(comparison_html(found), encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"The report cannot be written to {path}: {error.strerror}. Expected a file in a "
            "folder that exists. Give another --report."
        ) from error


def log_report(store: Store, run_id: str, pair: Pair, *, evaluation: Evaluation, seed: int) -> None:
    """Log the report of one pair to its pipeline run, whose win rates have been logged."""
    found = compare_run_with_champion(store, run_id, pair.name(), evaluation=evaluation, seed=seed)
    file = f"{pair.name()}/{REPORT}"
    tracking.client(store).log_text(run_id, comparison_html(found), file)


def comparison_html(found: RunComparison) -> str:
    """Return the whole report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = shown_slices(found)
    slices = domain_slices(found, shown)
    apgr = [found.estimates[one.name]["apgr"] for one in found.contenders]
    return environment.get_template("comparison.html.j2").render(
        title=f"Routing between {found.pair.weak} and {found.pair.strong}",
        weak=found.pair.weak,
        strong=found.pair.strong,
        metric=found.metric,
        queries=len(found.weak),
        level=f"{100 * found.level:g} %",
        replicates=f"{found.replicates:,}",
        notes=found.notes,
        facts=_facts(found),
        figures=_figures(found, slices),
        metric_headings=[
            *("router", "APGR"),
            *(f"− {name}" for name in found.against),
            *("CPT50", "CPT80", "drop at 20 %"),
        ],
        metric_rows=metric_rows(found),
        undefined=next((one.reason for one in apgr if math.isnan(one.value)), None),
        money_headings=[
            "router",
            *(
                f"{what} {share} %"
                for share in WEAK_SHARES_PERCENT
                for what in ("saved at", "lost at")
            ),
        ],
        money_rows=money_rows(found),
        no_money=NO_BILLS if found.bills is None else NO_PRICES,
        domain_headings=["domain", "queries", "gap", *(f"APGR {one.name}" for one in shown)],
        domain_rows=[_domain_row(one) for one in slices],
        domain_note=_domain_note(found),
        receipts=found.receipts,
        runs=found.runs,
        test_digest=found.test_digest,
    )


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
            cells += [cell(saved, digits=digits, unit=" $"), cell(lost, digits=1, unit=" %")]
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
    own = [name for name in own if (domain == name).sum() >= FEWEST_QUERIES]
    slices = [_slice(found, shown, name, domain == name) for name in own]
    rest = np.setdiff1d(names, own)
    if len(rest):
        title = f"{len(rest)} small domains" if len(rest) > 1 else str(rest[0])
        slices.append(_slice(found, shown, title, np.isin(domain, rest)))
    return slices


def _slice(
    found: RunComparison, shown: Sequence[Contender], title: str, rows: np.ndarray
) -> DomainSlice:
    bootstrap = bootstrap_metrics(
        {one.name: one.win_rate[rows] for one in shown},
        found.weak[rows],
        found.strong[rows],
        replicates=found.replicates,
        seed=found.seed,
    )
    return DomainSlice(
        domain=title,
        queries=int(rows.sum()),
        gap=bootstrap.estimate(shown[0].name, "quality_gap", level=found.level),
        apgr={one.name: bootstrap.estimate(one.name, "apgr", level=found.level) for one in shown},
    )


def _domain_row(one: DomainSlice) -> Row:
    few = one.queries < FEW_QUERIES
    cells = (Cell(str(one.queries)), cell(one.gap, sign="+"), *map(cell, one.apgr.values()))
    return Row(one.domain + (" (few)" if few else ""), cells, "reference" if few else "")


def _domain_note(found: RunComparison) -> str:
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
    """Return an estimate as a table's cell; ``judged`` colours what surely differs from 0."""
    if math.isnan(estimate.value):
        return Cell("undefined", reason=estimate.reason or "no value")
    number = f"{sign}.{digits}f"
    ends = estimate.interval
    verdict = ""
    if judged and ends.excludes(0.0):
        verdict = "good" if ends.low > 0 else "bad"
    return Cell(
        f"{estimate.value:{number}}{unit}", f"[{ends.low:{number}}, {ends.high:{number}}]", verdict
    )


def _mark(one: Contender) -> str:
    if one.champion:
        return CHAMPION
    return "reference" if one.is_reference() else ""


def _facts(found: RunComparison) -> list[Fact]:
    best, champion = found.best(), found.champion()
    apgr = cell(found.estimates[best.name]["apgr"])
    facts = [Fact("Best router", best.name, f"APGR {apgr.value} {apgr.ends}")]
    if champion is not None and champion != best:
        gain = cell(found.against[CHAMPION][best.name], sign="+")
        facts.append(Fact("Champion", champion.name, f"the best is {gain.value} {gain.ends}"))
    elif champion is not None:
        facts.append(Fact("Champion", champion.name, "the best router is the champion"))
    rows = {row.name: row for row in money_rows(found)}
    if rows:
        place = 2 * WEAK_SHARES_PERCENT.index(20)
        saved, lost = rows[best.name].cells[place : place + 2]
        more = f"a 1,000 queries, losing {lost.value} {lost.ends}"
        facts.append(Fact("Saved with 20 % on the weak LLM", saved.value, more))
    for receipt in found.receipts[:1]:
        facts.append(Fact(f"Gate, version {receipt.version}", receipt.summary()))
    return facts


def _figures(found: RunComparison, slices: Sequence[DomainSlice]) -> dict[str, "Markup | None"]:
    best = found.best()
    curves = quality_curves(
        {one.name: one.win_rate for one in found.contenders},
        found.weak,
        found.strong,
        apgr={one.name: found.estimates[one.name]["apgr"] for one in found.contenders},
        kinds={one.name: one.kind for one in found.contenders},
        banded=[one.name for one in shown_slices(found)],
        pair=found.pair,
        metric=found.metric,
        title=f"{len(found.weak)} queries",
        seed=found.seed,
    )
    observed = {
        one.name: (one.win_rate, one.observed)
        for one in found.contenders
        if one.observed is not None and not one.is_reference()
    }
    boxes = None
    if len(set(found.domain)) > 1:
        boxes = domain_boxes(
            best.win_rate, found.domain, router=best.name, strong=found.pair.strong
        )
    reliability = reliability_curves(observed) if observed else None
    return {
        "curves": inline_svg(curves, "Cost-quality curves of all routers"),
        "reliability": _svg(reliability, "Predicted against observed win rates"),
        "domains": _svg(boxes, f"Win rates by {best.name} in each domain"),
    }


def _svg(figure: "Figure | None", title: str) -> "Markup | None":
    return None if figure is None else inline_svg(figure, title)


def inline_svg(figure: "Figure", title: str) -> "Markup":
    """Return a figure as SVG to stand in a page, black turned into the page's own ink."""
    import matplotlib
    from markupsafe import Markup, escape

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace("#000000", "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return Markup(drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
