"""A judge on a real HTTP server: both orders, strict verdicts, money, and what a rerun pays."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scripted_llm import ScriptedLLM, Step

from conf.errors import BudgetError, ConfigError, DataError, EndpointError
from conf.llms import LLM, Decoding, Endpoint, Generation, Limits, Pair, Prices
from conf.preferences import Judge, Preferences, PreferenceSource
from tasks.judging import (
    DISAGREED,
    FAILED,
    MISSING,
    NO_VERDICT,
    SEVERAL_VERDICTS,
    JudgedPreferences,
    judge_answers,
    judge_name,
    verdict,
)
from tasks.queries import SCHEMA as QUERY_SCHEMA
from tasks.warehouse import Snapshot, Warehouse

ROOT = Path(__file__).parent.parent
PAIR = Pair(weak="small", strong="large")
PRICES = Prices(input_usd_per_million=10.0, output_usd_per_million=1000.0)
TEMPLATE = "Q: {question}\nA: {answer_a}\nB: {answer_b}\nSay [[A]], [[B]] or [[C]]."
# What the judge says of a question, as an LLM that knows the better answer or a place.
SAID = {"first": ("[[A]]", "[[A]]"), "tie": ("[[C]]", "[[C]]"), "garbage": ("Hm.", "[[A]]")}


def fair(prompt: str, sample: int) -> str:
    """Judge by what stands in the question: `large`, `small`, `tie`, `first`, `garbage`."""
    found = re.fullmatch(r"Q: (\w+).*\nA: (\w+).*\nB: .*\n.*", prompt)
    assert found is not None
    question, first = found.groups()
    if question in ("large", "small"):
        return f"The better one is clear. {'[[A]]' if first == question else '[[B]]'}"
    return SAID[question][first == "small"]


def judge(url: str, **changes: Any) -> Judge:
    limits = Limits(concurrency=2, timeout_s=5, retries=2, max_backoff_s=0.05)
    given = {"prices": PRICES, "limits": limits, "decoding": Decoding(max_tokens=20)}
    llm = LLM(
        name="judy",
        model="scripted",
        endpoint=Endpoint(url=url),
        **{**given, **changes.pop("llm", {})},
    )
    return Judge(llm=llm, **{"template": TEMPLATE, **changes})


def queries(warehouse: Warehouse, texts: Sequence[str]) -> Snapshot:
    rows = [
        {"query_key": f"key {at}", "query_id": f"id {at}", "text": text, "domain": "maps"}
        for at, text in enumerate(texts)
    ]
    return warehouse.write_snapshot("queries", pa.Table.from_pylist(rows, schema=QUERY_SCHEMA))


def responses(
    warehouse: Warehouse,
    count: int,
    *,
    samples: int = 1,
    answer: Callable[[str, int, int], str | None] = lambda llm, query, sample: llm,
) -> Snapshot:
    rows = [
        {"query_key": f"key {at}", "llm": llm, "sample_index": sample, "text": text}
        for at in range(count)
        for llm in ("small", "large")
        for sample in range(samples)
        if (text := answer(llm, at, sample)) is not None
    ]
    return warehouse.write_snapshot("responses", pa.Table.from_pylist(rows))


def judged(
    warehouse: Warehouse, texts: Sequence[str], by: Judge, **settings: Any
) -> JudgedPreferences:
    spent_usd = settings.pop("spent_usd", 0.0)
    answered = settings.pop("answered", None) or responses(warehouse, len(texts))
    return judge_answers(
        warehouse,
        queries(warehouse, texts),
        answered,
        PAIR,
        by,
        Generation(**settings),
        spent_usd=spent_usd,
    )


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "store")


def test_only_verdicts_on_which_both_orders_agree_count(warehouse: Warehouse) -> None:
    texts = ["large", "small", "tie", "first", "garbage"]
    with ScriptedLLM(answer=fair) as server:
        by = judge(server.url)
        found = judged(warehouse, texts, by)
    assert len(server.log) == 10
    rows = found.snapshot.read()
    assert rows["prompt"].to_pylist() == ["large", "small", "tie"]
    assert rows["a_wins"].to_pylist() == [1.0, 0.0, 0.5]
    assert rows["verdict"].to_pylist() == ["a", "b", "tie"]
    assert set(rows["llm_a"].to_pylist()) == {"large"}
    assert set(rows["llm_b"].to_pylist()) == {"small"}
    assert set(rows["source"].to_pylist()) == {"judge"}
    assert set(rows["domain"].to_pylist()) == {"maps"}
    assert set(rows["dataset"].to_pylist()) == {judge_name(by)}
    assert judge_name(by).startswith("judy@")
    assert rows["battle_id"].to_pylist() == ["id 0:0", "id 1:0", "id 2:0"]
    assert (found.agreed, found.identical) == (3, 0)
    assert found.left_out == {DISAGREED: 1, NO_VERDICT: 1}
    assert found.examples == ("Hm.",)
    assert warehouse.query("SELECT count(*) n FROM preferences")["n"].to_pylist() == [3]


def test_a_second_run_asks_nothing_and_finds_the_same(warehouse: Warehouse) -> None:
    texts = ["large", "small", "first", "garbage"]
    with ScriptedLLM(answer=fair) as server:
        first = judged(warehouse, texts, judge(server.url))
        asked = len(server.log)
        again = judged(warehouse, texts, judge(server.url))
        assert len(server.log) == asked == first.requests
        other = judged(warehouse, texts, judge(server.url, template=f"{TEMPLATE}!"))
        assert len(server.log) == 2 * asked
    assert again.snapshot == first.snapshot
    assert other.snapshot != first.snapshot
    assert (again.requests, again.billed_usd, again.lost_usd) == (0, 0.0, 0.0)
    assert again.cost_usd == pytest.approx(first.cost_usd)
    assert (again.left_out, again.examples) == (first.left_out, first.examples)


def test_the_cost_is_that_of_all_tokens(warehouse: Warehouse) -> None:
    with ScriptedLLM(answer=fair) as server:
        found = judged(warehouse, ["large", "tie"], judge(server.url))
    usage = [entry.body["usage"] for entry in server.log]
    cost_usd = sum(
        PRICES.cost_usd(used["prompt_tokens"], used["completion_tokens"]) for used in usage
    )
    assert found.billed_usd == pytest.approx(cost_usd)
    assert found.cost_usd == pytest.approx(cost_usd)


def test_passing_troubles_are_tried_again(warehouse: Warehouse) -> None:
    troubles = [Step(status=429, headers={"Retry-After": "0"}), Step(status=503), Step(body="{")]
    by = {"limits": Limits(concurrency=1, retries=5, max_backoff_s=0.02)}
    with ScriptedLLM(answer=fair, steps=troubles) as server:
        found = judged(warehouse, ["large"], judge(server.url, llm=by))
    assert found.agreed == 1
    assert len(server.log) == 5
    assert found.lost_usd > 0  # the broken body may have been billed


def test_a_judge_that_fails_leaves_no_verdict(warehouse: Warehouse) -> None:
    with ScriptedLLM(answer=fair) as server:
        by = judge(server.url)
        texts = ["large", "large [[status=400]]"]
        found = judged(warehouse, texts, by, max_failure_share=0.5)
        with pytest.raises(EndpointError, match=r"of 4 responses of 'judy' failed.*HTTP 400"):
            judged(warehouse, texts, by)
    assert (found.agreed, found.left_out) == (1, {FAILED: 1})


def test_the_budget_stops_the_judge_and_a_rerun_pays_only_for_the_rest(
    warehouse: Warehouse,
) -> None:
    texts = [f"large {at}" for at in range(20)]
    one_by_one = {"limits": Limits(concurrency=1)}
    with ScriptedLLM(answer=fair) as server:
        by = judge(server.url, llm=one_by_one)
        with pytest.raises(BudgetError, match=r"'judy' stopped at .*budget_usd = 0\.1"):
            judged(warehouse, texts, by, budget_usd=0.1)
        before = len(server.log)
        assert 0 < before < 40
        with pytest.raises(BudgetError):
            judged(warehouse, texts, by, budget_usd=1.0, spent_usd=0.999)
        assert len(server.log) == before  # what others spent of the budget counts
        found = judged(warehouse, texts, by)
        assert len({entry.prompt for entry in server.log}) == len(server.log) == 40
    assert found.agreed == 20
    assert found.requests == 40 - before
    assert found.billed_usd < found.cost_usd


RUN = """
import sys
from pathlib import Path
from test_judging import TEXTS, judge, judged
from tasks.warehouse import Warehouse
judged(Warehouse(Path(sys.argv[1])), TEXTS, judge(sys.argv[2]))
"""
TEXTS = [f"large {at}" for at in range(30)]


def test_a_killed_judging_resumes(warehouse: Warehouse, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with ScriptedLLM(answer=fair, delay_s=0.03) as server:
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, str(warehouse.directory), server.url],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.DEVNULL,
        )
        while len(server.log) < 10 and run.poll() is None:
            time.sleep(0.005)
        run.kill()
        run.wait(timeout=30)
        before = len(server.log)
        found = judged(warehouse, TEXTS, judge(server.url))
    assert 10 <= before < 60
    assert found.agreed == 30
    assert found.requests <= 60 - (before - 2)  # but for what was in flight


def test_equal_answers_are_ties_that_nobody_is_asked_about(warehouse: Warehouse) -> None:
    answered = responses(warehouse, 2, answer=lambda llm, at, _: llm if at else "same")
    with ScriptedLLM(answer=fair) as server:
        by = judge(server.url)
        found = judged(warehouse, ["large", "large"], by, answered=answered)
        assert len(server.log) == 2
        same = responses(warehouse, 2, answer=lambda *_: "same")
        ties = judged(warehouse, ["large", "large"], by, answered=same)
        assert len(server.log) == 2
    assert (found.agreed, found.identical) == (1, 1)
    assert found.snapshot.read()["a_wins"].to_pylist() == [0.5, 1.0]
    assert (ties.agreed, ties.identical, ties.cost_usd) == (0, 2, 0.0)


def test_several_samples_are_compared_index_by_index(warehouse: Warehouse) -> None:
    def answer(llm: str, query: int, sample: int) -> str | None:
        return None if (llm, query, sample) == ("small", 1, 2) else f"{llm} {sample}"

    answered = responses(warehouse, 2, samples=3, answer=answer)
    with ScriptedLLM(answer=fair) as server:
        by = judge(server.url, samples=3)
        found = judged(warehouse, ["large", "small"], by, answered=answered)
    assert found.snapshot.read()["battle_id"].to_pylist() == [
        "id 0:0", "id 0:1", "id 0:2", "id 1:0", "id 1:1",
    ]  # fmt: skip
    assert found.left_out == {MISSING: 1}
    assert {re.findall(r"(?:A|B): \w+ (\d)", entry.prompt)[0] for entry in server.log} == {
        "0", "1", "2",
    }  # fmt: skip
    for entry in server.log:
        first, second = re.findall(r"(?:A|B): \w+ (\d)", entry.prompt)
        assert first == second


def test_answers_and_questions_are_put_in_as_they_are(warehouse: Warehouse) -> None:
    answered = responses(warehouse, 1, answer=lambda llm, *_: f"{llm} {{question}} {{0}} [[A]]")
    with ScriptedLLM(answer=fair) as server:
        found = judged(warehouse, ["large {answer_b}"], judge(server.url), answered=answered)
    assert found.agreed == 1  # labels in an answer are no verdict
    assert all("large {question} {0} [[A]]" in entry.prompt for entry in server.log)
    assert all("Q: large {answer_b}\n" in entry.prompt for entry in server.log)


def test_a_judge_without_any_verdict_is_an_error_that_shows_why(warehouse: Warehouse) -> None:
    message = (
        r"No comparison by 'judy' ended in a verdict: no verdict in the judge's answer \(2\), such "
        r"as 'I cannot say\.'.*Expected answers of both LLMs.*raise its decoding\.max_tokens"
    )
    with ScriptedLLM(answer=lambda *_: "I cannot say.") as server:
        with pytest.raises(DataError, match=message):
            judged(warehouse, ["one", "two"], judge(server.url))
        other = responses(warehouse, 1, answer=lambda llm, *_: llm if llm == "small" else None)
        with pytest.raises(DataError, match=rf"in a verdict: {MISSING} \(1\)\. Expected"):
            judged(warehouse, ["one"], judge(server.url), answered=other)


def test_own_labels_and_the_judges_own_prompt(warehouse: Warehouse) -> None:
    def answer(prompt: str, sample: int) -> str:
        assert prompt.startswith("<s>Which?")
        return "first" if re.search(r"large \| small", prompt) else "second"

    template = "Which? {question}: {answer_a} | {answer_b}"
    told = {"system": "Say first, second or neither.", "template": "<s>{text}</s>"}
    with ScriptedLLM(answer=answer) as server:
        by = judge(server.url, template=template, labels=("first", "second", "neither"), llm=told)
        found = judged(warehouse, ["one"], by)
        assert [entry.system for entry in server.log] == [told["system"]] * 2
    assert found.snapshot.read()["a_wins"].to_pylist() == [1.0]


LABELS = ("[[A]]", "[[B]]", "[[C]]")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[[A]]", 1.0),
        ("Because.\n\n[[B]]\n", 0.0),
        ("[[C]] as I said: [[C]]", 0.5),
        ("", NO_VERDICT),
        ("A", NO_VERDICT),
        ("[A]", NO_VERDICT),
        ("[[a]]", NO_VERDICT),
        ("[[A]] or rather [[B]]", SEVERAL_VERDICTS),
    ],
)
def test_verdicts_are_read_strictly(answer: str, expected: float | str) -> None:
    assert verdict(answer, LABELS) == expected


@given(st.text(), st.text(), st.sampled_from(LABELS))
def test_a_verdict_is_found_wherever_it_stands(before: str, after: str, label: str) -> None:
    others = {other for other in LABELS if other in f"{before}{label}{after}"} - {label}
    expected = SEVERAL_VERDICTS if others else (1.0, 0.0, 0.5)[LABELS.index(label)]
    assert verdict(f"{before}{label}{after}", LABELS) == expected


def test_the_name_tells_judges_apart_that_may_decide_differently() -> None:
    plain = judge("http://a/v1")
    same = [
        judge("http://b/v1"),
        judge("http://a/v1", samples=3),
        judge("http://a/v1", llm={"prices": Prices()}),
    ]
    other = [
        judge("http://a/v1", template=f"{TEMPLATE}."),
        judge("http://a/v1", llm={"decoding": Decoding(temperature=0.5)}),
    ]
    assert {judge_name(by) for by in same} == {judge_name(plain)}
    assert len({judge_name(by) for by in [plain, *other]}) == 3


def test_a_judge_decodes_greedily_unless_told() -> None:
    plain = {"name": "judy", "model": "m", "endpoint": {"url": "http://a/v1"}}
    by = Judge.model_validate({"llm": plain})
    assert (by.llm.decoding.temperature, by.llm.decoding.max_tokens) == (0.0, 1024)
    told = Judge.model_validate({"llm": {**plain, "decoding": {"temperature": 0.7}}})
    assert (told.llm.decoding.temperature, told.llm.decoding.max_tokens) == (0.7, 1024)
    assert Judge.model_validate(told.model_dump()) == told
    assert Judge.model_validate_json(told.model_dump_json()) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{question} [[A]] [[B]] [[C]]"}, r"has the fields question\. Expected ques"),
        ({"template": f"{TEMPLATE} {{x}}"}, r"answer_b, question, x\. .*Correct judge.template"),
        ({"template": f"{TEMPLATE} {{"}, r"has a flaw, .*other braces doubled"),
        ({"labels": ("A", "AB", "C")}, r"none within another\. Correct judge.labels"),
        ({"labels": ("[[A]]", "[[A]]", "[[C]]")}, "none within another"),
        ({"labels": ("[[A]]", " ", "[[C]]")}, "not empty"),
        ({"labels": ("[[A]]", "[[B]]", "[[T]]")}, r"never told of the verdict '\[\[T\]\]'"),
    ],
)
def test_unusable_judges_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge("http://a/v1", **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": [{"kind": "judge"}]}, r"a judge is not set\. Expected a judge if and only if"),
        ({"sources": [{"kind": "arena"}]}, r"arena source .* path None\. Expected a path or a hub"),
        ({"sources": [{"kind": "responses", "path": "x"}]}, r"path 'x'\. Expected no path"),
        ({"sources": [{"kind": "responses"}] * 2}, r"has responses 2 times\. Expected it once"),
        ({"sources": [{"kind": "gold", "path": "x"}] * 2}, r"lists x more than once"),
    ],
)
def test_contradicting_preferences_are_explained(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preferences.model_validate(settings)


def test_preferences_need_a_source() -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        Preferences(sources=())
    assert Preferences(sources=(PreferenceSource(kind="gold", path="x"),)).tiers == 10
