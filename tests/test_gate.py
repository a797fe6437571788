"""The gate's checks and the receipt that a person reads."""

import json
from pathlib import Path

import pytest

from conf.schema import Gate, Pair
from router_models.statistics import Estimate, Interval
from tasks.evaluation import Comparison
from tasks.gate import Check, Receipt, above_chance, reproduces
from tasks.warehouse import Snapshot


def comparison(apgr: Estimate) -> Comparison:
    return Comparison(
        pair=Pair(weak="small", strong="large"),
        metric="bartscore",
        queries=300,
        out_of_fold=True,
        test_digest="abc",
        estimates={"knn": {"apgr": apgr}},
        runs={"knn": "run"},
        label_kinds={"knn": "probabilistic"},
        table=Snapshot("evaluation", "abc", 300, Path("none")),
        best="knn",
    )


@pytest.mark.parametrize(
    ("low", "passed"), [(0.51, True), (0.5, False), (0.49, False), (float("nan"), False)]
)
def test_only_an_interval_above_chance_passes(low: float, passed: bool) -> None:
    check = above_chance(comparison(Estimate(0.6, Interval(low, 0.7))), Gate())
    assert check.passed is passed


def test_an_undefined_apgr_is_rejected_with_its_reason() -> None:
    nothing = Interval(float("nan"), float("nan"), reason="gap interval includes 0")
    check = above_chance(
        comparison(Estimate(float("nan"), nothing, "gap interval includes 0")), Gate()
    )
    assert not check.passed
    assert check.value == "undefined: gap interval includes 0"


def test_reproduction_is_to_1e5() -> None:
    assert reproduces([0.1, 0.2], [0.1, 0.200009], Gate()).passed
    assert not reproduces([0.1, 0.2], [0.1, 0.20002], Gate()).passed
    assert not reproduces([0.1, 0.2], [0.1, float("nan")], Gate()).passed


def test_receipt_names_every_check_and_the_reason() -> None:
    checks = (
        Check("APGR above chance", "0.6 [0.55, 0.65]", "interval above 0.5", passed=True),
        Check("reproduces its win rates", "0.1 at most", "at most 1e-05", passed=False),
    )
    receipt = Receipt("small--large", "3", "knn", "bartscore", "abc", 300, checks)
    assert receipt.verdict() == "rejected"
    assert json.loads(receipt.to_json())["verdict"] == "rejected"
    page = receipt.to_markdown()
    assert page.startswith("# small--large version 3: rejected, for: reproduces its win rates\n")
    for check in checks:
        assert f"| {check.name} | {check.value} | {check.bound} |" in page
