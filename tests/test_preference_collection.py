"""Collected preferences: every source united under our names, tiers, held-out queries, counts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scripted_llm import ScriptedLLM

from conf.errors import BudgetError, ConfigError, DataError
from conf.llms import Generation, Pair
from conf.load import load_experiment
from conf.preferences import Preferences
from flows.terminal import show_preferences
from tasks.benchmark import PreferenceReport
from tasks.preference_collection import (
    HELD_OUT,
    CollectedPreferences,
    RunData,
    collect_preferences,
)
from tasks.preferences import AGAINST_ITSELF, SCHEMA, comparisons
from tasks.queries import SCHEMA as QUERY_SCHEMA
from tasks.receipt import Receipt
from tasks.reporting import battles_page
from tasks.warehouse import Warehouse

PAIR = Pair(weak="small", strong="large")
SPLITS = ("train", "train", "validation", "test")
# Quality of every sample on queries 0 to 3.
QUALITIES = {"small": (0.0, 1.0, 0.0, 0.0), "large": (1.0, 0.0, 1.0, 1.0), "mid": (0.5,) * 4}


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` writes out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "store")


def run_data(warehouse: Warehouse, **changes: Any) -> RunData:
    """Write four queries, two samples of three LLMs each, and their scores."""
    queries = [
        {"query_key": f"key {at}", "query_id": f"id {at}", "text": f"Query {at}?", "split": split}
        for at, split in enumerate(SPLITS)
    ]
    samples = [
        {"query_key": f"key {at}", "llm": llm, "sample_index": sample, "value": value}
        for llm, values in QUALITIES.items()
        for at, value in enumerate(values)
        for sample in range(2)
    ]
    texts = [{**row, "text": f"{row['llm']} says {row['value']}"} for row in samples]
    scores = [{**row, "metric": "gold"} for row in samples]
    asked = pa.Table.from_pylist(queries, schema=QUERY_SCHEMA)
    tables = {
        "queries": warehouse.write_snapshot("queries", asked),
        "responses": warehouse.write_snapshot("responses", pa.Table.from_pylist(texts)),
        "scores": warehouse.write_snapshot("scores", pa.Table.from_pylist(scores)),
    }
    return RunData(**{**tables, "metric": "gold", **changes})


def arena_file(path: Path, battles: list[tuple[str, str, str, str]]) -> str:
    """Write battles (prompt, LLM a, LLM b, winner)."""
    rows = [
        {"id": at, "model_a": a, "model_b": b, "prompt": json.dumps([prompt]), "winner": winner}
        for at, (prompt, a, b, winner) in enumerate(battles)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ARENA = [
    ("One?", "gpt", "llama", "model_a"),
    ("Two?", "gpt-0314", "tiny", "model_b"),
    ("Three?", "llama", "gpt", "tie"),
    ("Four?", "gpt", "gpt-0314", "model_a"),
    ("query  3?", "gpt", "llama", "model_a"),
]
NAMES = {"gpt": "large", "gpt-0314": "large", "llama": "small"}


def collect(
    warehouse: Warehouse, settings: dict[str, Any], **arguments: Any
) -> CollectedPreferences:
    checked = Preferences.model_validate(settings)
    return collect_preferences.fn(warehouse, checked, PAIR, **arguments)


def test_battles_of_files_come_under_our_names(warehouse: Warehouse, tmp_path: Path) -> None:
    path = arena_file(tmp_path / "arena.jsonl", ARENA)
    settings = {"sources": [{"kind": "arena", "path": path}], "names": NAMES, "augment": False}
    found = collect(warehouse, settings, run=run_data(warehouse))
    every, own = found.all_llms.read(), found.pair.read()
    assert every.schema == own.schema == SCHEMA
    assert every["prompt"].to_pylist() == ["One?", "Two?", "Three?"]
    assert list(zip(every["llm_a"].to_pylist(), every["llm_b"].to_pylist(), strict=True)) == [
        ("large", "small"), ("large", "tiny"), ("small", "large"),
    ]  # fmt: skip
    assert own["prompt"].to_pylist() == ["One?", "Three?"]
    [count] = found.counts
    assert count.left_out == {AGAINST_ITSELF: 1, HELD_OUT: 1}
    assert found.metrics() == {
        "battles": 3,
        "battles_pair": 2,
        "battles_pair_own": 2,
        "battles_arena": 3,
        "battles_arena_left_out": 2,
    }
    # What was said of whom stays in the warehouse as it was said.
    stored = warehouse.query("SELECT DISTINCT llm_a FROM preferences ORDER BY 1")
    assert stored["llm_a"].to_pylist() == ["gpt", "gpt-0314", "llama"]


def test_tiers_stand_in_where_the_pair_rarely_met(warehouse: Warehouse, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    strength = {"large": 2.0, "big": 1.9, "mid": 0.0, "tiny": -1.9, "small": -2.0}
    battles = []
    for at in range(400):
        a, b = rng.choice(list(strength), 2, replace=False)
        won = rng.random() < 1 / (1 + np.exp(strength[b] - strength[a]))
        battles.append((f"Prompt {at}", a, b, "model_a" if won else "model_b"))
    source = {"kind": "arena", "path": arena_file(tmp_path / "arena.jsonl", battles)}
    wide = collect(warehouse, {"sources": [source], "tiers": 3})
    narrow = collect(warehouse, {"sources": [source], "augment": False})
    assert wide.all_llms == narrow.all_llms
    assert wide.all_llms.rows == 400
    assert wide.own == narrow.own == narrow.pair.rows
    assert wide.pair.rows > 3 * wide.own
    prompts, win_rate = comparisons(wide.pair.read(), weak="small", strong="large").labels()
    assert len(prompts) == wide.pair.rows
    assert win_rate.mean() > 0.9


def test_scores_make_battles_of_all_llms_on_queries_to_learn_from(warehouse: Warehouse) -> None:
    settings = {"sources": [{"kind": "responses"}], "augment": False}
    found = collect(warehouse, settings, run=run_data(warehouse))
    assert found.all_llms.rows == 3 * 3  # three pairs of LLMs on three queries
    assert "Query 3?" not in found.all_llms.read()["prompt"].to_pylist()
    data = comparisons(found.pair.read(), weak="small", strong="large")
    assert data.labels()[1].tolist() == [1.0, 0.0, 1.0]
    assert data.strong_quality is not None
    assert data.strong_quality.tolist() == [1.0, 0.0, 1.0]
    two = {"sources": [{"kind": "responses", "llms": ["small", "large"]}]}
    assert collect(warehouse, two, run=run_data(warehouse)).all_llms.rows == 3
    everywhere = run_data(warehouse, splits=("train", "validation", "test"))
    assert collect(warehouse, settings, run=everywhere).all_llms.rows == 12


def judging(url: str) -> dict[str, Any]:
    return {
        "llm": {
            "name": "judy",
            "model": "scripted",
            "endpoint": {"url": url},
            "prices": {"output_usd_per_million": 1000.0},
            "decoding": {"max_tokens": 20},
            "limits": {"max_backoff_s": 0.05},
        },
        "template": "{question}\n1. {answer_a}\n2. {answer_b}\n[[A]] [[B]] [[C]]",
    }


def first_right(prompt: str, sample: int) -> str:
    """Take the answer that holds 1.0."""
    return "Well, [[A]]" if "1.0" in prompt.splitlines()[1] else "Well, [[B]]"


def test_all_sources_are_united_and_counted(warehouse: Warehouse, tmp_path: Path) -> None:
    arena = {"kind": "arena", "path": arena_file(tmp_path / "arena.jsonl", ARENA)}
    judged = {"kind": "arena", "path": arena_file(tmp_path / "judged.jsonl", ARENA[:2])}
    sources = [arena, {**judged, "verdicts": "judge"}, {"kind": "judge"}, {"kind": "responses"}]
    with ScriptedLLM(answer=first_right) as server:
        settings = {"sources": sources, "names": NAMES, "judge": judging(server.url)}
        run = run_data(warehouse)
        found = collect(warehouse, settings, run=run, spent_usd=0.5)
        assert len(server.log) == 6  # both orders of three queries: no test query is paid for
        again = collect(warehouse, settings, run=run)
        assert len(server.log) == 6
        with pytest.raises(BudgetError, match="'judy' stopped at"):
            collect(
                Warehouse(tmp_path / "other"),
                settings,
                run=run_data(Warehouse(tmp_path / "other")),
                generation=Generation(budget_usd=0.5),
                spent_usd=0.5,
            )
    assert [count.source for count in found.counts] == ["arena", "arena_2", "judge", "responses"]
    assert [count.battles for count in found.counts] == [3, 2, 3, 9]
    assert found.all_llms.rows == 17
    sources_of = found.all_llms.read()["source"].to_pylist()
    assert {name: sources_of.count(name) for name in set(sources_of)} == {
        "arena": 3, "judge": 5, "responses": 9,
    }  # fmt: skip
    assert found.spent_usd() == pytest.approx(6 * 2e-3)
    metrics = found.metrics()
    assert metrics["judge_billed_usd"] == metrics["judge_cost_usd"] == pytest.approx(6 * 2e-3)
    assert (again.all_llms, again.pair) == (found.all_llms, found.pair)
    assert again.spent_usd() == 0
    assert again.metrics()["judge_cost_usd"] == pytest.approx(6 * 2e-3)
    row = found.rows()[0]
    assert (row["source"], row["battles"]) == ("arena", "3")
    assert row["left out"] == f"1 {AGAINST_ITSELF}; 1 {HELD_OUT}"


def test_what_a_source_ignored_is_said(
    warehouse: Warehouse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gold.csv").write_text("prompt,small,large,[note]\nq,1,0,why\nr,0,1,so\n")
    listed = {"eval_prompt": "never asked"}
    (tmp_path / "contaminated_prompts.jsonl").write_text(json.dumps(listed))
    path = arena_file(tmp_path / "arena.jsonl", [ARENA[0]])
    (tmp_path / "arena.jsonl").write_text(Path(path).read_text() * 3)
    sources = [{"kind": "gold", "path": str(tmp_path)}, {"kind": "arena", "path": path}]
    found = collect(warehouse, {"sources": sources, "names": NAMES})
    remarks = (
        "ignored columns ([note]): 1; prompts of contaminated_prompts.jsonl that no row has: 1"
    )
    merged = "2 merged with an identical battle"
    assert [row["remarks"] for row in found.rows()] == [remarks, ""]
    assert [row["left out"] for row in found.rows()] == ["", merged]
    assert found.metrics()["battles_arena_left_out"] == 2
    page = battles_page(found, PAIR)
    assert remarks in page
    assert merged in page
    receipt = Receipt("small--large", "1", "knn", "correct", "abc", 2, checks=())
    report = PreferenceReport("run", found, {}, receipt)
    show_preferences(load_experiment("routellm_paper"), report)
    said = " ".join(capsys.readouterr().out.split())
    assert f"gold, remarks: {remarks}" in said
    assert f"arena, left out: {merged}" in said


def test_equal_answers_are_counted_with_the_judges_battles(warehouse: Warehouse) -> None:
    run = run_data(warehouse)
    texts = run.responses.read()
    same = texts.set_column(
        texts.schema.get_field_index("text"), "text", pa.array(["same"] * texts.num_rows)
    )
    run = replace(run, responses=warehouse.write_snapshot("responses", same))
    judge = judging("http://127.0.0.1:9/v1")  # nobody is asked
    settings = {"sources": [{"kind": "judge"}, {"kind": "responses"}], "judge": judge}
    row = collect(warehouse, settings, run=run).rows()[0]
    assert row["remarks"] == "equal answers, ties for which no judge is asked: 3"


def test_sources_that_need_a_run_say_so(warehouse: Warehouse) -> None:
    with pytest.raises(ConfigError, match=r"'responses' are made from a run's responses.*Expected"):
        collect(warehouse, {"sources": [{"kind": "responses"}]})


def test_nothing_left_to_learn_from_is_explained(warehouse: Warehouse, tmp_path: Path) -> None:
    path = arena_file(tmp_path / "arena.jsonl", [("query 3?", "large", "small", "model_a")])
    with pytest.raises(DataError, match=r"No battle can be learnt from \(arena: .*held out': 1"):
        collect(warehouse, {"sources": [{"kind": "arena", "path": path}]}, run=run_data(warehouse))


@pytest.mark.usefixtures("prefect_server")
def test_it_runs_as_a_task_of_a_flow(warehouse: Warehouse) -> None:
    from prefect import flow

    @flow
    def collecting() -> CollectedPreferences:
        settings = Preferences.model_validate({"sources": [{"kind": "responses"}]})
        return collect_preferences(warehouse, settings, PAIR, run=run_data(warehouse))

    assert collecting().all_llms.rows == 9
