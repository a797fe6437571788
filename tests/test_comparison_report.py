"""The comparison report: what it must show, its numbers equal to the estimates; the band."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logged_runs import (
    PAIR,
    LoggedRun,
    experiment,
    log_receipt,
    log_run,
    make_champion,
    queries,
    rates,
)

from conf.errors import StoreError
from conf.schema import Experiment
from router_models.frontier import cost_quality_curve
from router_models.statistics import Estimate, Interval, bootstrap_metrics
from tasks import tracking
from tasks.comparison_report import comparison_html, log_report, write_report
from tasks.comparison_tables import cell, domain_slices, shown_slices
from tasks.evaluation import Comparison
from tasks.figures import BAND_COSTS, quality_band
from tasks.labelling import KINDS, LabelSet
from tasks.reporting import publish_report
from tasks.run_comparison import RunComparison, compare_runs
from tasks.warehouse import Warehouse


class Page(HTMLParser):
    """Collects a page's text by section, its tags and everything it refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.section, self.text = "", dict[str, str]()
        self.links, self.tags = list[str](), set[str]()
        self.feed(html)
        self.text = {name: " ".join(text.split()) for name, text in self.text.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self.section = str(known["id"])
        self.links += [str(known[name]) for name in ("src", "href", "xlink:href") if name in known]

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + " " + data


@pytest.fixture
def tiny(store_directory: Path) -> Experiment:
    return experiment(store_directory)


@pytest.fixture
def logged(tiny: Experiment, tmp_path: Path) -> LoggedRun:
    table = queries(120)
    routers = {
        "mf": rates(table, 0.3, seed=1),
        "knn": rates(table, 0.5, seed=2),
        "oracle": rates(table, 0.0, seed=0),
    }
    run = log_run(tiny, table, routers)
    make_champion(tiny, run.routers["knn"], tmp_path)
    log_receipt(tiny, run.routers["mf"])
    return run


@pytest.fixture
def found(tiny: Experiment, logged: LoggedRun) -> RunComparison:
    return compare_runs(
        tiny.store, [logged.run_id], pair=None, evaluation=tiny.evaluation, seed=tiny.seed
    )


def test_it_shows_what_was_found(found: RunComparison) -> None:
    page = Page(comparison_html(found))
    assert page.text.keys() >= {"curves", "metrics", "money", "domains", "calibration", "gate"}
    for one in found.contenders:
        shown = [
            cell(found.estimates[one.name]["apgr"]),
            cell(found.estimates[one.name]["cpt_50"]),
            *(
                cell(difference[one.name], sign="+")
                for difference in found.against.values()
                if one.name in difference
            ),
        ]
        for number in shown:
            assert f"{number.value} {number.ends}" in page.text["metrics"]
        lost = cell(found.estimates[one.name]["quality_drop_pct_at_40"], digits=1, unit=" %")
        assert f"{lost.value} {lost.ends}" in page.text["money"]
    assert "knn ★" in page.text["metrics"]
    assert "$" in page.text["money"]
    assert "rejected: not better than champion" in page.text["gate"]
    assert "no query that the champion was not trained on" in page.text["gate"]


def test_it_needs_nothing_else(found: RunComparison) -> None:
    html = comparison_html(found)
    page = Page(html)
    assert all(link.startswith("#") for link in page.links), page.links
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert not re.search(r"url\((?!#)|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    assert "#000000" not in html
    assert "a &amp; b" in html
    assert "a & b" not in html


def test_domains_have_their_own_numbers(found: RunComparison) -> None:
    shown = shown_slices(found)
    assert [one.name for one in shown] == ["mf", "knn"]
    slices = domain_slices(found, shown)
    assert [(one.domain, one.queries) for one in slices] == [
        ("law", 48),
        ("maths", 48),
        ("a & b", 24),
    ]
    law = np.array(found.domain) == "law"
    curve = cost_quality_curve(shown[0].win_rate[law], found.weak[law], found.strong[law])
    assert slices[0].apgr["mf"].value == pytest.approx(curve.apgr())
    assert slices[0].gap.value == pytest.approx((found.strong - found.weak)[law].mean())
    assert "a & b (few)" in Page(comparison_html(found)).text["domains"]


def test_what_is_not_known_is_said(tiny: Experiment) -> None:
    table = queries(40).drop_columns(["weak_cost_usd", "strong_cost_usd"])
    swapped = table.rename_columns(
        [
            {"weak_quality": "strong_quality", "strong_quality": "weak_quality"}.get(name, name)
            for name in table.column_names
        ]
    )
    run = log_run(tiny, swapped, {"mf": rates(table, 0.5, seed=1)}, labels=False)
    bare = compare_runs(
        tiny.store, [run.run_id], pair=None, evaluation=tiny.evaluation, seed=tiny.seed
    )
    page = Page(comparison_html(bare))
    assert "Undefined: strong is not better than weak" in page.text["metrics"]
    assert "was not logged with these runs" in page.text["money"]
    assert "keep no labels" in page.text["calibration"]
    assert "None of these routers has been before the gate" in page.text["gate"]


def test_it_is_logged_to_the_pipelines_run(tiny: Experiment, logged: LoggedRun) -> None:
    log_report(tiny.store, logged.run_id, PAIR, evaluation=tiny.evaluation, seed=tiny.seed)
    client = tracking.client(tiny.store)
    path = client.download_artifacts(logged.run_id, f"{PAIR.name()}/comparison.html")
    assert "Routing between small and large" in Path(path).read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_is_an_error(found: RunComparison, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be written to .*No such file"):
        write_report(found, tmp_path / "absent" / "report.html")


def test_only_sure_differences_are_judged() -> None:
    assert cell(Estimate(0.02, Interval(0.01, 0.03)), sign="+", judged=True).verdict == "good"
    assert cell(Estimate(-0.02, Interval(-0.03, -0.01)), judged=True).verdict == "bad"
    assert cell(Estimate(0.02, Interval(-0.01, 0.03)), judged=True).verdict == ""


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(10, 60), st.integers(2, 20))
def test_the_band_contains_the_curve(seed: int, count: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    weak, strong = rng.normal(size=count), rng.normal(0.5, 1, count)
    rate = rng.integers(0, distinct, count) / distinct
    low, high = quality_band(rate, weak, strong, level=0.95, replicates=200, seed=1)
    curve = cost_quality_curve(rate, weak, strong).quality_at(BAND_COSTS)
    assert (low <= curve + 1e-9).all()
    assert (curve <= high + 1e-9).all()


def test_the_pipeline_logs_it_and_describes_the_pages(tiny: Experiment, tmp_path: Path) -> None:
    """`publish_report`, on invented outcomes: the page, the model's and the run's descriptions."""
    store, table = tiny.store, queries(60)
    quality = tiny.quality.model_copy(update={"metrics": tiny.quality.metrics[:1]})
    table = table.append_column("mf", pa.array(rates(table, 0.3, seed=1)))
    table = table.append_column("oracle", pa.array(rates(table, 0.0, seed=0)))
    labels = table.select(["query_key"])
    for kind in KINDS:
        labels = labels.append_column(kind, table["weak_quality"])
    warehouse = Warehouse(store.directory)
    curve = pa.table({"t": [0.0, 0.1], "objective": [0.1, 0.2]})
    bootstrap = bootstrap_metrics(
        {name: table[name].to_numpy() for name in ("mf", "oracle")},
        *(table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy()),
        replicates=50,
    )
    snapshots = {
        name: warehouse.write_snapshot(name, rows)
        for name, rows in {"evaluation": table, "labels": labels, "curve": curve}.items()
    }
    with tracking.parent_run(tiny) as parent:
        runs = {}
        for name in ("mf", "oracle"):
            tags = {tracking.PAIR_TAG: PAIR.name(), "turnout.kind": name}
            with tracking.child_run(store, parent, name, tags=tags) as runs[name]:
                pass
        make_champion(tiny, runs["mf"], tmp_path)
        publish_report.fn(
            tiny.model_copy(update={"quality": quality}),
            LabelSet(PAIR, snapshots["labels"], snapshots["curve"], 0.1, 0.2, False, 0),
            Comparison(
                *(PAIR, quality.label_metric, 60, True, "digest"),
                {name: bootstrap.estimates(name) for name in runs},
                *(runs, {"mf": "probabilistic"}, snapshots["evaluation"], "mf"),
            ),
            *(snapshots["labels"], snapshots["labels"]),  # read for further metrics only
            log_receipt(tiny, runs["mf"]),
            parent,
        )
    client = tracking.client(store)
    path = client.download_artifacts(parent, f"{PAIR.name()}/comparison.html")
    page = Page(Path(path).read_text(encoding="utf-8"))
    assert "mf ★" in page.text["metrics"]
    assert "$" in page.text["money"]
    assert "champion" in client.get_registered_model(PAIR.name()).description
    note = client.get_run(parent).data.tags[tracking.NOTE_TAG]
    assert f"`{PAIR.name()}/comparison.html`" in note
