"""What a report says for people: who was left out, at which confidence, against which gold."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conf.llms import Pair
from conf.load import load_experiment
from conf.schema import Experiment
from router_models.statistics import bootstrap_metrics, mean_interval
from tasks.evaluation import Comparison
from tasks.figures import cost_quality
from tasks.receipt import Receipt
from tasks.reporting import (
    Leaderboard,
    PairReport,
    Standing,
    comparison_page,
    gold_agreement,
    leaderboard_page,
)
from tasks.warehouse import Snapshot, Warehouse

PAIR = Pair(weak="small", strong="large")
NAMES = ("knn", "random", "oracle")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Sixty queries at a confidence of 90 %."""
    random = np.random.default_rng(0)
    weak, strong = random.random(60), random.random(60) + 0.4
    columns: dict[str, Any] = {"weak_quality": weak, "strong_quality": strong}
    columns["text"] = [f"question {row}" for row in range(60)]
    columns |= {name: random.random(60) for name in NAMES}
    rates = {name: columns[name] for name in NAMES}
    bootstrap = bootstrap_metrics(rates, weak, strong, replicates=50, seed=0)
    warehouse = Warehouse(tmp_path_factory.mktemp("warehouse"))
    return Comparison(
        pair=PAIR,
        metric="bartscore",
        queries=60,
        out_of_fold=True,
        test_digest="abc",
        estimates={name: bootstrap.estimates(name, level=0.9) for name in NAMES},
        runs=dict.fromkeys(NAMES, "run"),
        label_kinds={"knn": "probabilistic", "random": "probabilistic"},
        table=warehouse.write_snapshot("evaluation", pa.table(columns)),
        best="knn",
    )


def pair_report(comparison: Comparison, *, unlabelled: int) -> PairReport:
    return PairReport(
        pair=PAIR,
        t=0.1,
        degenerate=False,
        queries=60,
        unlabelled=unlabelled,
        out_of_fold=True,
        metric="bartscore",
        best="knn",
        estimates=comparison.estimates,
        gap={"bartscore": comparison.estimates["knn"]["quality_gap"]},
        receipt=Receipt("small--large", "1", "knn", "bartscore", "abc", 60, ()),
    )


def test_queries_that_were_left_out_are_told(comparison: Comparison) -> None:
    some = comparison_page(pair_report(comparison, unlabelled=7))
    assert "7 queries are left out: a response or its score is missing." in some
    none = comparison_page(pair_report(comparison, unlabelled=0))
    assert "left out" not in none


def test_the_figure_states_the_confidence_that_was_asked_for(comparison: Comparison) -> None:
    legend = cost_quality(comparison).axes[0].get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "APGR with 90 % interval"


def test_the_leaderboard_states_the_confidence_that_was_asked_for() -> None:
    quality = {"gold": mean_interval(np.arange(10) / 10, replicates=50, level=0.975)}
    standing = Standing("small", 10, 0, quality, 0.1, 5.0, 20.0, 8.0)
    page = leaderboard_page(Leaderboard("gold", (standing,), agreement={}))
    assert "Means over queries with 97.5 % intervals" in page


def scores(warehouse: Warehouse) -> Snapshot:
    rows = [
        {
            "query_key": f"key {row}",
            "llm": "small",
            "sample_index": 0,
            "metric": metric,
            "value": float(row % 2) if metric == "exact" else float(row),
        }
        for row in range(20)
        for metric in ("exact", "likelihood")
    ]
    return warehouse.write_snapshot("scores", pa.Table.from_pylist(rows))


def experiment(metrics: str) -> Experiment:
    label = "likelihood" if "bartscore" in metrics else "exact"
    return load_experiment(
        overrides=(
            f"quality={{label_metric: {label}, metrics: {metrics}}}",
            "evaluation.confidence=0.8",
        )
    )


def test_the_gold_metric_may_have_any_name(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    both = "[{metric: bartscore, name: likelihood}, {metric: gold_match, name: exact}]"
    found = gold_agreement(warehouse, scores(warehouse), experiment(both))
    assert list(found) == ["likelihood"]
    assert 0.4 < found["likelihood"].value < 0.7
    assert found["likelihood"].interval.level == 0.8
    named_gold = "[{metric: bartscore, name: likelihood}, {metric: bartscore, name: gold}]"
    assert gold_agreement(warehouse, scores(warehouse), experiment(named_gold)) == {}
