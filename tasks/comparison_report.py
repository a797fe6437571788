"""The comparison report: one HTML file that needs nothing else, for people who were not there.

Curves with bands, metrics with paired differences, money, domains, calibration and the gate's
receipts, each with a line on what it means. Figures are inline SVG in the reader's own ink, so the
page reads in light and dark and on paper.
"""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import StoreError
from conf.llms import Pair
from conf.schema import Evaluation, Store
from tasks import tracking
from tasks.comparison_tables import (
    cell,
    domain_note,
    domain_row,
    domain_slices,
    metric_rows,
    money_rows,
    shown_slices,
)
from tasks.evaluation import WEAK_SHARES_PERCENT
from tasks.figures import domain_boxes, quality_curves, reliability_curves
from tasks.run_comparison import CHAMPION, RunComparison, compare_run_with_champion

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

REPORT = "comparison.html"
TEMPLATES = Path(__file__).parent / "templates"
NO_BILLS = "What the responses cost was not logged with these runs."
NO_PRICES = "No LLM has a price, so nothing is saved in money: set llms.prices."


@dataclass(frozen=True)
class Fact:
    """One of the numbers at the head of the page."""

    name: str
    value: str
    more: str = ""


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
        figures=_figures(found),
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
        domain_rows=[domain_row(one) for one in slices],
        domain_note=domain_note(found),
        receipts=found.receipts,
        runs=found.runs,
        test_digest=found.test_digest,
    )


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
        more = f"per 1,000 queries, losing {lost.value} {lost.ends} of the quality"
        facts.append(Fact("Saved with 20 % on the weak LLM", saved.value, more))
    for receipt in found.receipts[:1]:
        facts.append(Fact(f"Gate, version {receipt.version}", receipt.summary()))
    return facts


def _figures(found: RunComparison) -> dict[str, "Markup | None"]:
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
        groups=found.groups,
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
