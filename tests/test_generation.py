"""Generation against a real HTTP server that misbehaves by script."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from scripted_llm import ScriptedLLM, Step

from conf.errors import BudgetError, ConfigError, DataError, EndpointError, TurnoutError
from conf.llms import LLM, Decoding, Endpoint, Generation, Limits, Prices
from tasks import journal
from tasks.asking import request_seed
from tasks.generation import (
    GenerationReport,
    collect_responses,
    generate_responses,
    prompt_table,
)
from tasks.journal import open_journal, recover_journals
from tasks.warehouse import Snapshot, Warehouse

KEY = "sk-very-secret-0123456789"
ROOT = Path(__file__).parent.parent


def queries(warehouse: Warehouse, *texts: str, context: str | None = None) -> Snapshot:
    rows = [
        {
            "query_key": f"key-{k}",
            "query_id": f"id-{k}",
            "text": text,
            "reference": None,
            "gold": None,
            "context": context,
            "domain": None,
            "split": "train",
            "position": k,
        }
        for k, text in enumerate(texts)
    ]
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("query_key", "query_id", "text", "reference")),
            ("gold", pa.list_(pa.string())),
            *((name, pa.string()) for name in ("context", "domain", "split")),
            ("position", pa.int32()),
        ]
    )
    return warehouse.write_snapshot("queries", pa.Table.from_pylist(rows, schema=schema))


def llm(url: str, **changes: Any) -> LLM:
    endpoint = Endpoint(url=url, **changes.pop("endpoint", {}))
    limits: dict[str, Any] = {"concurrency": 2, "timeout_s": 5, "retries": 2, "max_backoff_s": 0.05}
    limits |= changes.pop("limits", {})
    settings = {"name": "small", "model": "scripted", "endpoint": endpoint, **changes}
    return LLM(limits=Limits(**limits), **settings)


def generate(
    warehouse: Warehouse, asked: Snapshot, model: LLM, *, samples: int = 3, **settings: Any
) -> GenerationReport:
    return generate_responses.fn(warehouse, asked, model, Generation(samples=samples, **settings))


def rows(warehouse: Warehouse) -> list[dict[str, object]]:
    sql = "SELECT * FROM responses ORDER BY prompt_id, sample_index"
    return warehouse.query(sql).to_pylist()


def texts(warehouse: Warehouse) -> set[object]:
    return {row["text"] for row in rows(warehouse)}


def seeds(asked: Snapshot, model: LLM, samples: int, *, seed: int = 0) -> dict[str, list[int]]:
    """The seeds of each prompt's samples."""
    table = prompt_table(asked, model)
    return {
        prompt: [request_seed(seed, prompt_id, k) for k in range(samples)]
        for prompt, prompt_id in zip(
            table["prompt"].to_pylist(), table["prompt_id"].to_pylist(), strict=True
        )
    }


def answers(asked: Snapshot, model: LLM, samples: int = 3) -> set[object]:
    """What the scripted LLM answers to these prompts, from its seeds."""
    found = seeds(asked, model, samples)
    return {f"answer {seed} to {prompt}" for prompt in found for seed in found[prompt]}


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "store")


def test_every_query_gets_its_samples(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one", "two")
    with ScriptedLLM() as server:
        report = generate(warehouse, asked, llm(server.url, system="Be brief."))
    assert (report.new, report.reused, report.failed, report.requests) == (6, 0, 0, 2)
    assert texts(warehouse) == answers(asked, llm(server.url, system="Be brief."))
    assert {(row["finish_reason"], row["error"]) for row in rows(warehouse)} == {("stop", None)}
    expected = seeds(asked, llm(server.url, system="Be brief."), 3)
    assert {row["seed"] for row in rows(warehouse)} == {*expected["one"], *expected["two"]}
    assert all(float(str(row["latency_ms"])) > 0 for row in rows(warehouse))
    assert all(isinstance(row["created_at"], datetime) for row in rows(warehouse))
    assert [entry.system for entry in server.log] == ["Be brief."] * 2
    assert list(warehouse.directory.glob("journal/*")) == []


def test_what_is_there_is_not_asked_again(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one", "two")
    with ScriptedLLM() as server:
        generate(warehouse, asked, llm(server.url), samples=2)
        more = generate(warehouse, asked, llm(server.url), samples=5)
        again = generate(warehouse, asked, llm(server.url), samples=5)
        fewer = generate(warehouse, asked, llm(server.url), samples=1)
    assert (more.new, more.reused) == (6, 4)
    assert (again.new, again.reused, again.requests) == (0, 10, 0)
    assert (fewer.new, fewer.reused) == (0, 2)
    expected = seeds(asked, llm(server.url), 5)
    assert [entry.n for entry in server.log] == [2, 2, 3, 3]
    for entry, first in zip(server.log, (0, 0, 2, 2), strict=True):
        assert entry.seed == expected[entry.prompt][first]


def test_equal_prompts_share_their_responses(warehouse: Warehouse) -> None:
    with ScriptedLLM() as server:
        report = generate(warehouse, queries(warehouse, "same", "same", "other"), llm(server.url))
        responses = collect_responses.fn(
            warehouse,
            queries(warehouse, "same", "same", "other"),
            [llm(server.url)],
            Generation(samples=3),
        )
    assert (report.new, report.requests) == (6, 2)
    assert warehouse.query("SELECT count(*) AS n FROM prompts")["n"].to_pylist() == [3]
    assert Counter(responses.read()["query_key"].to_pylist()) == dict.fromkeys(
        ["key-0", "key-1", "key-2"], 3
    )


def test_one_request_per_sample_where_n_is_not_supported(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one")
    model_settings = {"endpoint": {"supports_n": False}, "decoding": Decoding(seed=40)}
    with ScriptedLLM() as server:
        report = generate(warehouse, asked, llm(server.url, **model_settings))
    assert report.requests == 3
    expected = seeds(asked, llm(server.url, **model_settings), 3, seed=40)
    assert sorted(entry.seed or 0 for entry in server.log) == expected["one"]
    assert all("n" not in entry.body for entry in server.log)
    assert len(texts(warehouse)) == 3


def test_completions_send_the_prompt_as_it_is(warehouse: Warehouse) -> None:
    asked = queries(warehouse, 'braces {text} {context} {0} "quoted"', context="{text}")
    model = {"endpoint": {"api": "completions"}, "template": "C: {context}\nQ: {text}\nA:"}
    with ScriptedLLM() as server:
        generate(warehouse, asked, llm(server.url, **model), samples=1)
    assert [entry.path for entry in server.log] == ["/v1/completions"]
    assert server.log[0].prompt == ('C: {text}\nQ: braces {text} {context} {0} "quoted"\nA:')


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{context} {text}", "'id-0' has no context, which the template of 'small'.*Expected.*Add"),
        ("{question}", r"asks for \['question'\].*Expected only the fields.*Correct llms.small"),
        ("{text", "template of 'small' is not readable.*Expected.*doubled.*Correct"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(
    warehouse: Warehouse, template: str, message: str
) -> None:
    with ScriptedLLM() as server:
        model = llm(server.url, template=template)
        with pytest.raises(DataError, match=message):
            generate(warehouse, queries(warehouse, "one"), model)
    assert server.log == []


def test_the_address_is_what_determines_the_response(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one")

    def address(model: LLM) -> str:
        return str(prompt_table(asked, model)["prompt_id"].to_pylist()[0])

    plain = llm("http://a/v1")
    same = [
        llm("http://b/v1"),
        llm("http://a/v1", name="renamed"),
        llm("http://a/v1", endpoint={"api_key_env": "SOME_KEY"}),
        llm("http://a/v1", endpoint={"supports_n": False}),
        llm("http://a/v1", prices=Prices(input_usd_per_million=3)),
        llm("http://a/v1", limits={"concurrency": 9}),
    ]
    other = [
        llm("http://a/v1", model="another"),
        llm("http://a/v1", endpoint={"api": "completions"}),
        llm("http://a/v1", system="Be brief."),
        llm("http://a/v1", template="Q: {text}"),
        llm("http://a/v1", decoding=Decoding(temperature=0.1)),
        llm("http://a/v1", decoding=Decoding(seed=1)),
    ]
    assert {address(model) for model in same} == {address(plain)}
    assert len({address(model) for model in [plain, *other]}) == len(other) + 1


@pytest.mark.parametrize(
    "step",
    [
        Step(status=429),
        Step(status=503),
        Step(status=408),
        Step(delay_s=1.5),
        Step(disconnect=True),
        Step(body="{not json"),
        Step(body="[]"),
        Step(body="<html>busy</html>", headers={"Content-Type": "text/html"}),
        Step(body=json.dumps({"choices": []})),
        Step(body=json.dumps({"choices": None})),
        Step(body=json.dumps({"error": {"message": "overloaded"}})),
        Step(body=json.dumps({"choices": [{"index": 0, "message": None}]})),
        Step(body=json.dumps({"choices": [{"index": 0, "message": {"content": 7}}]})),
    ],
    ids=lambda step: f"{step.status} {step.body or ''}"[:24],
)
def test_passing_troubles_are_tried_again(warehouse: Warehouse, step: Step) -> None:
    model = {"limits": {"timeout_s": 1, "concurrency": 1}}
    asked = queries(warehouse, "one")
    with ScriptedLLM(steps=[step, step]) as server:
        report = generate(warehouse, asked, llm(server.url, **model))
    assert (report.new, report.failed) == (3, 0)
    assert texts(warehouse) == answers(asked, llm(server.url))


def test_fewer_answers_than_asked_for_are_kept_and_the_rest_asked(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one")
    with ScriptedLLM(steps=[Step(choices=2), Step(choices=1)]) as server:
        report = generate(warehouse, asked, llm(server.url), samples=4)
    first, _, third, fourth = seeds(asked, llm(server.url), 4)["one"]
    assert [(entry.n, entry.seed) for entry in server.log] == [(4, first), (2, third), (1, fourth)]
    assert report.new == 4
    assert texts(warehouse) == answers(asked, llm(server.url), 4)


def test_retry_after_is_honoured_up_to_the_longest_pause(warehouse: Warehouse) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    steps = [Step(status=429, headers={"Retry-After": "0.4"})]
    steps += [Step(status=503, headers={"Retry-After": later})]
    model = {"limits": {"max_backoff_s": 0.6}}
    with ScriptedLLM(steps=steps) as server:
        started = time.monotonic()
        generate(warehouse, queries(warehouse, "one"), llm(server.url, **model))
        waited = time.monotonic() - started
    assert len(server.log) == 3
    assert waited >= 0.4 + 0.6  # the date is an hour away, the longest pause is not


def test_two_prompts_share_no_seed_and_samples_count_on() -> None:
    drawn = [[request_seed(0, f"prompt {p}", k) for k in range(10)] for p in range(1000)]
    assert all(row == list(range(row[0], row[0] + 10)) for row in drawn)
    assert len({seed for row in drawn for seed in row}) == 10_000
    assert all(0 <= seed < 2**31 for row in drawn for seed in row)
    assert request_seed(1, "prompt 0", 0) != drawn[0][0]


def test_a_failure_for_good_is_a_row_and_is_asked_once_more_in_each_run(
    warehouse: Warehouse,
) -> None:
    asked = queries(warehouse, "one", "[[status=400]] two")
    with ScriptedLLM() as server:
        reports = [
            generate(warehouse, asked, llm(server.url), max_failure_share=0.5) for _ in range(2)
        ]
    assert sorted(entry.prompt for entry in server.log) == ["[[status=400]] two"] * 2 + ["one"]
    assert [(r.new, r.reused, r.failed) for r in reports] == [(3, 0, 3), (0, 3, 3)]
    failed = [row for row in rows(warehouse) if row["text"] is None]
    assert len(failed) == 3
    assert all("HTTP 400" in str(row["error"]) for row in failed)


def test_once_the_cause_is_mended_answers_take_the_place_of_failures(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one", "two", "three")
    model = {"limits": {"concurrency": 1}}
    with ScriptedLLM(steps=[Step(), Step(status=400), Step(status=400)]) as server:
        with pytest.raises(EndpointError, match=r"3 of 9 responses.*HTTP 400.*at most 2%"):
            generate(warehouse, asked, llm(server.url, **model))
        assert [row["error"] is None for row in rows(warehouse)].count(False) == 3
        server.steps.clear()
        report = generate(warehouse, asked, llm(server.url, **model))
        again = generate(warehouse, asked, llm(server.url, **model))
    assert (report.new, report.reused, report.failed) == (6, 3, 0)
    assert (again.new, again.reused, again.requests) == (0, 9, 0)
    assert {row["error"] for row in rows(warehouse)} == {None}
    assert texts(warehouse) == answers(asked, llm(server.url))
    assert [entry.prompt for entry in server.log if entry.status == 200].count("one") == 1


def test_an_uncured_cause_fails_the_next_run_after_a_few_requests(warehouse: Warehouse) -> None:
    asked = queries(warehouse, *(f"[[status=400]] {k}" for k in range(50)))
    with ScriptedLLM() as server:
        for _ in range(2):
            with pytest.raises(EndpointError, match=r"6 of 150 responses.*HTTP 400.*at most 2%"):
                generate(warehouse, asked, llm(server.url, limits={"concurrency": 1}))
    assert len(server.log) == 4


def test_no_failure_takes_the_place_of_an_answer(warehouse: Warehouse) -> None:
    common = {"prompt_id": "p", "llm": "small", "created_at": datetime.now(UTC).isoformat()}

    def journal_of(*outcomes: dict[str, str]) -> int:
        with open_journal(warehouse) as write:
            for outcome in outcomes:
                write([{**common, "sample_index": 0, **outcome}])
        return recover_journals(warehouse)

    assert journal_of({"error": "HTTP 400: a"}, {"error": "HTTP 400: b"}) == 1
    assert [row["error"] for row in rows(warehouse)] == ["HTTP 400: b"]
    journal_of({"text": "first"}, {"error": "HTTP 400: c"}, {"text": "second"})
    assert [(row["text"], row["error"]) for row in rows(warehouse)] == [("first", None)]
    assert journal_of({"error": "HTTP 400: d"}, {"text": "third"}) == 0
    assert [(row["text"], row["error"]) for row in rows(warehouse)] == [("first", None)]


def test_too_many_failures_stop_the_run_early_and_keep_the_rest(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "good", *(f"[[status=500]] {k}" for k in range(50)))
    model = {"limits": {"retries": 0, "concurrency": 1}}
    with ScriptedLLM() as server:
        with pytest.raises(EndpointError, match=r"6 of 153 .*HTTP 500.*at most 2%.*run again"):
            generate(warehouse, asked, llm(server.url, **model))
        assert len(server.log) == 3
    assert len(rows(warehouse)) == 3  # passing troubles leave no rows


def test_failures_within_the_share_are_asked_again_by_the_next_run(warehouse: Warehouse) -> None:
    asked = queries(warehouse, "one", "two")
    model = {"limits": {"retries": 0, "concurrency": 1}}
    with ScriptedLLM(steps=[Step(status=500)]) as server:
        first = generate(warehouse, asked, llm(server.url, **model), max_failure_share=0.5)
        second = generate(warehouse, asked, llm(server.url, **model))
    assert (first.new, first.failed) == (3, 3)
    assert (second.new, second.reused, second.failed) == (3, 3, 0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            Step(status=401),
            "'small' refuses the key.*Expected a valid key in .SCRIPTED_KEY",
        ),
        (Step(status=403), "refuses the key"),
        (Step(status=404), "answers no request.*HTTP 404.*the model 'scripted'.*Correct"),
        (Step(status=429, code="insufficient_quota"), "answers no request.*account in credit"),
    ],
)
def test_what_every_request_would_meet_ends_the_run_at_once(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, step: Step, message: str
) -> None:
    monkeypatch.setenv("SCRIPTED_KEY", KEY)
    asked = queries(warehouse, *(f"query {k}" for k in range(30)))
    with ScriptedLLM(steps=[step] * 30) as server:
        with pytest.raises(EndpointError, match=message) as caught:
            generate(warehouse, asked, llm(server.url, endpoint={"api_key_env": "SCRIPTED_KEY"}))
        assert len(server.log) <= 2
    assert rows(warehouse) == []
    assert KEY not in str(caught.value)


def test_an_endpoint_that_cannot_be_reached_ends_the_run_at_once(warehouse: Warehouse) -> None:
    with ScriptedLLM() as server:
        url = server.url
    with pytest.raises(EndpointError, match=rf"'small' cannot be reached at {url}.*Expected.*Star"):
        generate(warehouse, queries(warehouse, *"abcdef"), llm(url, limits={"retries": 50}))


def test_an_endpoint_that_dies_midway_keeps_what_it_gave(warehouse: Warehouse) -> None:
    asked = queries(warehouse, *(f"query {k}" for k in range(40)))
    server = ScriptedLLM(delay_s=0.01)

    def answer(prompt: str, sample: int) -> str:
        if prompt == "query 9":
            server._server.socket.close()  # no new connections
            server.steps.extend([Step(disconnect=True)] * 100)
        return f"{prompt} {sample}"

    server.answer = answer
    with server, pytest.raises(EndpointError, match=r"of 120 responses.*connection lost"):
        generate(warehouse, asked, llm(server.url, limits={"concurrency": 1}))
    assert len(rows(warehouse)) >= 27


def test_a_missing_key_is_found_before_any_request(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCRIPTED_KEY", raising=False)
    asked = queries(warehouse, "one")
    message = r"SCRIPTED_KEY is not set.*Expected.*export"
    with ScriptedLLM() as server, pytest.raises(ConfigError, match=message):
        generate(warehouse, asked, llm(server.url, endpoint={"api_key_env": "SCRIPTED_KEY"}))
    assert server.log == []


def test_the_key_is_sent_and_written_nowhere(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCRIPTED_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    asked = queries(warehouse, "one", "[[status=400]] two", "[[status=500]] three")
    model = {"endpoint": {"api_key_env": "SCRIPTED_KEY"}}
    with ScriptedLLM(key=KEY) as server:
        report = generate(warehouse, asked, llm(server.url, **model), max_failure_share=1)
        assert {entry.authorization for entry in server.log} == {f"Bearer {KEY}"}
        with pytest.raises(EndpointError) as caught:
            generate(warehouse, asked, llm(server.url, **model))
    assert (report.new, report.failed) == (3, 6)
    assert "your key was Bearer ***" in str(caught.value)
    stored = b"".join(path.read_bytes() for path in warehouse.directory.rglob("*.*"))
    for text in (str(rows(warehouse)), str(caught.value), caplog.text, stored.decode("latin1")):
        assert KEY not in text


def test_tokens_and_money(warehouse: Warehouse) -> None:
    prices = Prices(input_usd_per_million=1.0, output_usd_per_million=10.0)
    seeds: list[int] = []

    def longer_each_time(_: str, seed: int) -> str:
        seeds.append(seed)
        return "word " * len(seeds)

    with ScriptedLLM(answer=longer_each_time) as server:
        report = generate(warehouse, queries(warehouse, "one two"), llm(server.url, prices=prices))
    usage = server.log[0].body["usage"]
    stored = rows(warehouse)
    assert [row["completion_tokens"] for row in stored] == [1, 2, 3]
    assert {row["prompt_tokens"] for row in stored} == {usage["prompt_tokens"]}
    billed_usd = prices.cost_usd(usage["prompt_tokens"], usage["completion_tokens"])
    assert report.billed_usd == pytest.approx(billed_usd)
    assert sum(float(str(row["billed_usd"])) for row in stored) == pytest.approx(billed_usd)


def test_a_server_without_usage_is_estimated_not_free(warehouse: Warehouse) -> None:
    prices = Prices(input_usd_per_million=1.0, output_usd_per_million=1.0)
    with ScriptedLLM(steps=[Step(usage=False)], answer=lambda *_: "x" * 40) as server:
        report = generate(
            warehouse, queries(warehouse, "q" * 400), llm(server.url, prices=prices), samples=1
        )
    assert report.billed_usd == pytest.approx(110e-6, rel=0.05)


def test_a_budget_is_never_passed_and_what_came_is_kept(warehouse: Warehouse) -> None:
    asked = queries(warehouse, *(f"query {k}" for k in range(40)))
    prices = Prices(output_usd_per_million=1000.0)
    model = {"prices": prices, "decoding": Decoding(max_tokens=8)}
    budget_usd = 0.2
    with ScriptedLLM(delay_s=0.01) as server:
        with pytest.raises(BudgetError, match=r"budget_usd = 0.2.*Raise generation.budget_usd"):
            generate(warehouse, asked, llm(server.url, **model), budget_usd=budget_usd)
        stored = rows(warehouse)
        billed_usd = sum(float(str(row["billed_usd"])) for row in stored)
        assert len(stored) == server.answers()
        assert budget_usd - 2 * 0.024 < billed_usd <= budget_usd
        rest = generate(warehouse, asked, llm(server.url, **model), budget_usd=1)
    assert (rest.new, rest.reused) == (120 - len(stored), len(stored))


def test_answers_that_never_arrived_may_have_been_paid(warehouse: Warehouse) -> None:
    model = {
        "prices": Prices(output_usd_per_million=1000.0),
        "decoding": Decoding(max_tokens=10),
        "limits": {"concurrency": 1},
    }
    with ScriptedLLM(steps=[Step(body="{")] * 9) as server:
        with pytest.raises(BudgetError):
            generate(
                warehouse, queries(warehouse, "one"), llm(server.url, **model), budget_usd=0.05
            )
        assert len(server.log) == 1  # 3 samples of 10 tokens may have cost 0.03


def test_concurrency_is_what_the_limits_say(warehouse: Warehouse) -> None:
    asked = queries(warehouse, *(f"query {k}" for k in range(20)))
    with ScriptedLLM(delay_s=0.03) as server:
        generate(warehouse, asked, llm(server.url, limits={"concurrency": 5}))
    assert server.most_in_flight == 5


def test_a_torn_last_line_is_forgotten_and_a_damaged_one_set_aside(
    warehouse: Warehouse, caplog: pytest.LogCaptureFixture
) -> None:
    good = {
        "prompt_id": "p",
        "llm": "small",
        "text": "whole ☃",
        "created_at": datetime.now(UTC).isoformat(),
    }
    with open_journal(warehouse) as write:
        write([{**good, "sample_index": 0}])
        write([{**good, "sample_index": 1}])
        assert recover_journals(warehouse) == 0  # it is still being written
    [written] = warehouse.directory.glob("journal/*")
    whole = written.read_bytes().splitlines(keepends=True)
    bad = [b"\xff\xfe\n", b'[{"prompt_id": "p"}]\n', b'[{"sample_index": "x"}]\n', b"7\n", b"[]\n"]
    written.write_bytes(whole[0] + b"".join(bad) + whole[1] + whole[0][:20])
    assert recover_journals(warehouse) == 2
    [aside] = warehouse.directory.glob("journal/*")
    assert (aside.suffix, aside.read_bytes()) == (".damaged", b"".join(bad))
    assert "5 lines of" in caplog.text
    assert recover_journals(warehouse) == 0


def test_a_journal_stays_until_its_rows_are_committed(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = queries(warehouse, "one", "two")

    def locked(*_: object) -> int:
        raise duckdb.IOException("locked")

    with ScriptedLLM() as server:
        monkeypatch.setattr(journal, "_ingest", locked)
        with pytest.raises(duckdb.IOException, match="locked"):
            generate(warehouse, asked, llm(server.url))
        monkeypatch.undo()
        report = generate(warehouse, asked, llm(server.url))
        assert len(server.log) == 2
    assert (report.new, report.reused) == (0, 6)


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from test_generation import generate, llm, queries
from tasks.warehouse import Warehouse
warehouse = Warehouse(__import__("pathlib").Path(sys.argv[1]))
asked = queries(warehouse, *(f"query {k}" for k in range(60)))
generate(warehouse, asked, llm(sys.argv[2]))
"""


def started(*arguments: object, directory: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_without_asking_again(
    warehouse: Warehouse, tmp_path: Path, end: signal.Signals
) -> None:
    with ScriptedLLM(delay_s=0.1) as server:
        run = started("-c", RUN, warehouse.directory, server.url, directory=tmp_path)
        while len(server.log) < 15 and run.poll() is None:
            time.sleep(0.005)
        run.send_signal(end)
        _, complaints = run.communicate(timeout=30)
        assert run.returncode != 0
        assert end == signal.SIGKILL or b"KeyboardInterrupt" in complaints
        asked_before = len(server.log)
        asked = queries(warehouse, *(f"query {k}" for k in range(60)))
        report = generate(warehouse, asked, llm(server.url))
    times = Counter(entry.prompt for entry in server.log)
    assert len(times) == 60
    assert sum(times.values()) - 60 <= 2  # what was in flight, at a concurrency of two
    assert 15 <= asked_before < 60
    assert report.new + report.reused == 180
    assert report.reused >= 3 * (asked_before - 2)
    assert len(rows(warehouse)) == 180


def test_the_scripted_server_runs_as_a_process(warehouse: Warehouse, tmp_path: Path) -> None:
    port_file, log = tmp_path / "port", tmp_path / "log.jsonl"
    script = ROOT / "tests" / "scripted_llm.py"
    server = started(script, "--port-file", port_file, "--log", log, directory=tmp_path)
    try:
        while not port_file.exists():
            assert server.poll() is None
            time.sleep(0.02)
        url = f"http://127.0.0.1:{port_file.read_text()}/v1"
        assert generate(warehouse, queries(warehouse, "one"), llm(url)).new == 3
        [line] = log.read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["prompt"] == "one"
    finally:
        server.kill()
        server.communicate()


def test_a_full_disk_says_so(warehouse: Warehouse) -> None:
    with open_journal(warehouse) as write:
        [written] = warehouse.directory.glob("journal/*")
        with pytest.raises(TurnoutError, match=r"Writing .*jsonl failed.*Expected room.*Free some"):
            _write_past_limit(write)
    assert written.read_bytes() == b""


def _write_past_limit(write: object) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        write([{"text": "x" * 1000}])  # type: ignore[operator]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
