"""Battles from every source on the real schemas, and what bad input is told."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from tasks.preference_sources import (
    ALPACA_REFERENCE,
    alpaca_preferences,
    arena_preferences,
    gold_preferences,
    preferences,
    response_preferences,
    win_probability,
)
from tasks.preferences import SCHEMA, comparisons, contaminated_prompts, pair_battles
from tasks.warehouse import Snapshot, Warehouse

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("TURNOUT_SHARED", ROOT.parent / "shared"))
WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"

needs_mmlu = pytest.mark.skipif(
    not (SHARED / "data" / "routellm_mmlu").is_dir(),
    reason=f"needs RouteLLM's MMLU rows in {SHARED / 'data'}; set TURNOUT_SHARED",
)
needs_alpaca = pytest.mark.skipif(
    not (SHARED / "data" / "alpaca_eval").is_dir(),
    reason=f"needs alpaca_eval's judgements in {SHARED / 'data'}; set TURNOUT_SHARED",
)


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep what `datasets` writes out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def arena_row(prompt: Any, winner: str = "model_a", **changes: Any) -> dict[str, Any]:
    flags = {f"winner_{name}": int(name == winner) for name in ("model_a", "model_b", "tie")}
    row = {"id": 1, "model_a": "gpt-4", "model_b": "llama", "prompt": prompt}
    row |= {"response_a": '["yes"]', "response_b": '["no", null]'}
    return row | flags | changes


def arena_file(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gold_folder(folder: Path, text: str, *, name: str = "mmlu_law.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


ARENA = [
    arena_row('["Why is the sky blue?", "And at dusk?"]', "model_a", id=11),
    arena_row('["Line one\\nline two \\ud83e\\udd9c"]', "model_b", id=12),
    arena_row('["1 + 1?"]', "tie", id=13, model_a="claude"),
]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_arena_battles_are_read_from_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    found = arena_preferences(arena_file(tmp_path / f"train{suffix}", ARENA))
    assert found.rows.schema == SCHEMA
    assert found.rows["prompt"].to_pylist() == [
        "Why is the sky blue?", "Line one\nline two 🦜", "1 + 1?",
    ]  # fmt: skip
    assert found.rows["verdict"].to_pylist() == ["a", "b", "tie"]
    assert found.rows["a_wins"].to_pylist() == [1.0, 0.0, 0.5]
    assert found.rows["llm_a"].to_pylist() == ["gpt-4", "gpt-4", "claude"]
    assert found.rows["battle_id"].to_pylist() == ["11", "12", "13"]
    assert set(found.rows["source"].to_pylist()) == {"arena"}
    assert found.left_out == {}


def test_judge_battles_have_the_same_schema_in_a_local_copy_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [arena_row("Plain prompt", "model_a", id="x"), arena_row("[1, 2] is a list", "tie")]
    arena_file(tmp_path / "data" / "train-00000-of-00001.parquet", [{**r, "id": "7"} for r in rows])
    found = arena_preferences(str(tmp_path), source="judge")
    assert found.rows["prompt"].to_pylist() == ["Plain prompt", "[1, 2] is a list"]
    assert set(found.rows["source"].to_pylist()) == {"judge"}


def test_newer_arena_data_name_the_winner(tmp_path: Path) -> None:
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    rows = [
        {"model_a": "x", "model_b": "y", "prompt": [f"q{at}"], "winner": winner}
        for at, winner in enumerate(winners)
    ]
    found = arena_preferences(arena_file(tmp_path / "train.parquet", rows))
    assert found.rows["verdict"].to_pylist() == ["a", "b", "tie", "tie"]
    assert found.rows["prompt"].to_pylist() == ["q0", "q1", "q2", "q3"]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows = [
        arena_row('["fine"]'),
        arena_row("[null]"),
        arena_row('["  "]'),
        arena_row("[]"),
        arena_row('["x"]', model_b="gpt-4"),
        arena_row('["half \\ud83e"]', id=2),
        arena_row('["of whom?"]', model_a=None),
        arena_row('["by whom?"]', model_b=" "),
    ]
    for suffix in ("csv", "jsonl"):
        found = arena_preferences(arena_file(tmp_path / f"train.{suffix}", rows))
        assert found.rows["prompt"].to_pylist() == ["fine", "half ?"]
        assert found.left_out == {
            "no text in the first turn": 3,
            "an LLM against itself": 1,
            "an LLM without a name": 2,
        }


def test_the_same_battle_counts_once_and_another_of_the_same_prompt_counts(tmp_path: Path) -> None:
    rows = [arena_row('["q"]', id=1), arena_row('["q"]', id=1), arena_row('["q"]', id=2)]
    found = arena_preferences(arena_file(tmp_path / "train.jsonl", rows))
    assert found.rows.num_rows == 2
    assert found.left_out == {"merged with an identical battle": 1}


def test_bad_arena_data_are_explained(tmp_path: Path) -> None:
    missing = [{name: value for name, value in ARENA[0].items() if name != "winner_tie"}]
    with pytest.raises(DataError, match=r"winner_tie is missing\. Expected .*Rename the columns"):
        arena_preferences(arena_file(tmp_path / "a.csv", missing))
    with pytest.raises(DataError, match=r"Row 0 has the verdict .*Expected exactly one of"):
        arena_preferences(arena_file(tmp_path / "b.csv", [arena_row('["q"]', "nobody")]))
    both = [arena_row('["q"]', "model_a", winner_tie=1)]
    with pytest.raises(DataError, match="Expected exactly one of"):
        arena_preferences(arena_file(tmp_path / "c.csv", both))
    with pytest.raises(DataError, match="no battle that can be used"):
        arena_preferences(arena_file(tmp_path / "d.csv", [arena_row("[null]")]))
    with pytest.raises(DataError, match=r"'.*nothing\.csv' cannot be loaded.*Correct the path"):
        arena_preferences(str(tmp_path / "nothing.csv"))


GOLD = (
    "prompt,small,large\n"
    '"Two\nlines?",True,False\n'
    "Second?,False,True\n"
    "Third?,True,True\n"
    "None,False,False\n"
)


def test_known_answers_make_verdicts(tmp_path: Path) -> None:
    found = gold_preferences(gold_folder(tmp_path, GOLD))
    assert found.rows["verdict"].to_pylist() == ["a", "b", "tie", "tie"]
    assert found.rows["prompt"].to_pylist()[0] == "Two\nlines?"
    assert set(found.rows["source"].to_pylist()) == {"gold"}
    assert set(found.rows["domain"].to_pylist()) == {"mmlu_law"}
    data = comparisons(found.rows, weak="small", strong="large")
    assert data.weak_quality is not None
    assert data.strong_quality is not None
    assert data.weak_quality.tolist() == [1, 0, 1, 0]
    assert data.strong_quality.tolist() == [0, 1, 1, 0]
    assert data.labels()[1].tolist() == [0, 1, 0.5, 0.5]
    swapped = comparisons(found.rows, weak="large", strong="small")
    assert swapped.weak_quality is not None
    assert swapped.weak_quality.tolist() == [0, 1, 1, 0]


def test_all_llms_of_a_csv_meet_and_responses_are_not_read(tmp_path: Path) -> None:
    text = "prompt,a,b,c,a_response\nq1,1,0,0.5,because\nq2,0,0,1,42 is it\n"
    found = gold_preferences(gold_folder(tmp_path, text, name="any name.csv")).rows
    assert list(zip(found["llm_a"].to_pylist(), found["llm_b"].to_pylist(), strict=True)) == [
        ("a", "b"), ("a", "c"), ("b", "c"),
    ] * 2  # fmt: skip
    assert found["verdict"].to_pylist() == ["a", "a", "b", "tie", "b", "b"]
    data = comparisons(found, weak="a", strong="c")
    assert data.weak_quality is None  # other LLMs' battles have other qualities


def test_contaminated_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    gold_folder(tmp_path, GOLD)
    listed = tmp_path / "contaminated_prompts.jsonl"
    listed.write_text('{"train_prompt": "x", "eval_prompt": "Second?"}\n\n')
    found = gold_preferences(tmp_path)
    assert "Second?" not in found.rows["prompt"].to_pylist()
    assert found.left_out == {"contaminated": 1}
    elsewhere = tmp_path / "other.jsonl"
    prompts = ("Two\nlines?", "Second?", "Third?", "None")
    elsewhere.write_text("".join(json.dumps({"eval_prompt": prompt}) + "\n" for prompt in prompts))
    with pytest.raises(DataError, match=r"All 4 rows of .* are contaminated.*Correct the list"):
        gold_preferences(tmp_path, contaminated=elsewhere)
    elsewhere.write_text('{"prompt": "Second?"}')
    with pytest.raises(DataError, match=r"Expected one JSON object with eval_prompt"):
        gold_preferences(tmp_path, contaminated=elsewhere)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,a,b\nq,True,False\n", r"columns question, a, b\. Expected prompt"),
        ("prompt,a\nq,True\n", r"at least two LLMs"),
        ("prompt,a,b\nq,True,False\nr,,True\n", r"Line 3 of .* has nan for 'a'"),
        ("prompt,a,b\nq,1,7\n", r"Line 2 of .* has 7 for 'b'.*score in \[0, 1\]"),
        ("prompt,a,b\nq,1,inf\n", r"Line 2 of .* has inf for 'b'"),
        ("prompt,a,b\n,True,False\n", r"Line 2 of .* has no prompt"),
        ('prompt,a,b\n"q\nr",1,0\n\n"  ",1,0\n', r"Line 5 of .* has no prompt"),
        ("prompt,a,b,c\nq,1,0,1\nr,True,0,N/A\ns,1,1,no\n", r"Line 3 of .*\.csv has 'N/A' for 'c'"),
        ("prompt,a,b\nq,1,0\nr,1,maybe\ns,1,nan\nt,1,1\nu,0,0", r"Line 3 of .* has 'maybe'"),
        ("prompt,w,w\nq,True,False\n", r"column 'w' twice.*Rename or drop"),
        ("prompt,a,b\n", r"has no rows, only a header"),
        ("", r"cannot be read"),
    ],
)
def test_bad_response_files_are_explained(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        gold_preferences(gold_folder(tmp_path, text))


def test_answers_may_be_spelled_in_words_and_other_columns_are_named(tmp_path: Path) -> None:
    text = "prompt,a,b,note,more\nq,TRUE,yes,sure,\nr, false ,No,1,\ns,1,0.5,fine,\n"
    found = gold_preferences(gold_folder(tmp_path, text))
    assert found.rows["a_quality"].to_pylist() == [1, 0, 1]
    assert found.rows["b_quality"].to_pylist() == [1, 0, 0.5]
    assert found.left_out == {}
    assert found.remarks == {"ignored columns (note, more)": 2}


def test_listed_prompts_are_met_however_they_are_spelled(tmp_path: Path) -> None:
    folder = gold_folder(tmp_path, GOLD)
    prompts = ("two  LINES?", "never\u2028asked", "second?")
    lines = [json.dumps({"eval_prompt": text}, ensure_ascii=False) for text in prompts]
    listed = folder / "contaminated_prompts.jsonl"
    listed.write_text("\n".join(lines), encoding="utf-8-sig")
    found = gold_preferences(folder)
    assert found.rows["prompt"].to_pylist() == ["Third?", "None"]
    assert found.left_out == {"contaminated": 2}
    assert found.remarks == {"prompts of contaminated_prompts.jsonl that no row has": 1}
    assert gold_preferences(folder / "mmlu_law.csv").remarks == {}
    listed.write_text('{"eval_prompt": 3}')
    with pytest.raises(DataError, match="eval_prompt is 3"):
        gold_preferences(folder)


def test_other_bad_gold_input_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        gold_preferences(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no CSV"):
        gold_preferences(tmp_path)
    (tmp_path / "latin.csv").write_bytes("prompt,a,b\ncafé,True,False\n".encode("latin-1"))
    with pytest.raises(DataError, match="Expected a UTF-8 CSV"):
        gold_preferences(tmp_path)


def alpaca_folder(folder: Path, judged: dict[str, list[Any]], **changes: list[Any]) -> Path:
    queries = {"query_id": [1, 2], "prompt": ["one", "two"]}
    pd.DataFrame(queries | changes).to_parquet(folder / "queries.parquet")
    pd.DataFrame(judged).to_parquet(folder / "preferences.parquet")
    return folder


def test_judgements_against_a_reference_and_between_others(tmp_path: Path) -> None:
    judged: dict[str, list[Any]] = {
        "query_id": [1, 2, 1, 1],
        "model": ["x", "x", "y", ALPACA_REFERENCE],
        "win_prob": [0.6, 0.5, 0.2, 0.5],
    }
    folder = alpaca_folder(tmp_path, judged)
    found = alpaca_preferences(folder)
    assert found.rows["a_wins"].to_pylist() == [0.6, 0.5, 0.2]
    assert found.rows["verdict"].to_pylist() == ["a", "tie", "b"]
    assert found.rows["prompt"].to_pylist() == ["one", "two", "one"]
    assert found.left_out == {"an LLM against itself": 1}
    derived = alpaca_preferences(folder, llms=["x", "y"]).rows.to_pylist()[3:]
    assert [(row["llm_a"], row["llm_b"], row["prompt"]) for row in derived] == [("x", "y", "one")]
    assert derived[0]["a_wins"] == pytest.approx(1.5 / (1.5 + 0.25))


def test_judgements_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    judged: dict[str, list[Any]] = {
        "query_id": [1, 2, 3, 1, 1],
        "model": ["x", "x", "x", None, " "],
        "win_prob": [0.6, 0.5, 0.2, 0.5, None],
    }
    folder = alpaca_folder(
        tmp_path, judged, query_id=[1, 2, 3, 1], prompt=["one", None, " ", "one"]
    )
    found = alpaca_preferences(folder)
    assert found.rows["prompt"].to_pylist() == ["one"]
    assert found.left_out == {"a query without a prompt": 2, "an LLM without a name": 2}


def test_what_is_judged_twice_counts_by_its_mean_between_two_others(tmp_path: Path) -> None:
    judged: dict[str, list[Any]] = {
        "query_id": [1, 1, 1, 1, 1],
        "model": ["x", "x", "x", "y", "y"],
        "win_prob": [0.6, 0.4, 0.4, 0.5, 0.5],
    }
    found = alpaca_preferences(alpaca_folder(tmp_path, judged | {"query_id": [2] * 5}))
    assert found.rows["a_wins"].to_pylist() == [0.6, 0.4, 0.5]
    assert found.left_out == {"merged with an identical battle": 2}
    judged["win_prob"] = [0.6, 0.4, 0.5, 0.2, 0.2]
    derived = alpaca_preferences(alpaca_folder(tmp_path, judged), llms=["x", "y"]).rows
    assert derived["a_wins"].to_pylist()[-1] == pytest.approx(1 / (1 + 0.25))


def test_bad_judgements_are_explained(tmp_path: Path) -> None:
    good: dict[str, list[Any]] = {"query_id": [1], "model": ["x"], "win_prob": [0.5]}
    with pytest.raises(DataError, match=r"'x', have a win_prob of 1\.5"):
        alpaca_preferences(alpaca_folder(tmp_path, good | {"win_prob": [1.5]}))
    with pytest.raises(DataError, match="have a win_prob of nan"):
        alpaca_preferences(alpaca_folder(tmp_path, good | {"win_prob": [float("nan")]}))
    with pytest.raises(DataError, match=r"'x', have a win_prob of 'high'\. Expected a number in"):
        alpaca_preferences(alpaca_folder(tmp_path, good | {"win_prob": ["high"]}))
    with pytest.raises(DataError, match=r"different prompts for the query_id 2\. Expected one for"):
        alpaca_preferences(
            alpaca_folder(tmp_path, good, query_id=[1, 2, 2], prompt=["one", "two", "three"])
        )
    with pytest.raises(DataError, match=r"such as 9, are not in queries\.parquet"):
        alpaca_preferences(alpaca_folder(tmp_path, good | {"query_id": [9]}))
    with pytest.raises(DataError, match="win_prob is missing"):
        alpaca_preferences(alpaca_folder(tmp_path, {"query_id": [1], "model": ["x"]}))
    with pytest.raises(DataError, match="Unknown LLM 'xx'"):
        alpaca_preferences(alpaca_folder(tmp_path, good), llms=["xx"])
    (tmp_path / "queries.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        alpaca_preferences(tmp_path)


def test_preferences_are_stored_once(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "store")
    path = arena_file(tmp_path / "train.csv", [*ARENA, arena_row("[null]")])
    first = preferences("arena", path)
    gold = preferences("gold", str(gold_folder(tmp_path / "gold", GOLD)))
    for found in (first, first, gold):
        warehouse.ingest("preferences", found.rows)
    assert dict(first.left_out) == {"no text in the first turn": 1}
    counted = warehouse.query("SELECT source, count(*) n FROM preferences GROUP BY 1 ORDER BY 1")
    assert counted.to_pylist() == [{"source": "arena", "n": 3}, {"source": "gold", "n": 4}]
    data = comparisons(first.rows, weak="llama", strong="gpt-4")
    assert data.a_wins.tolist() == [1.0, 0.0, 0.5]


@needs_mmlu
def test_mmlu_rows_become_comparisons() -> None:
    folder = SHARED / "data" / "routellm_mmlu"
    found = gold_preferences(folder)
    listed = contaminated_prompts(folder / "contaminated_prompts.jsonl")
    assert found.left_out["contaminated"] + found.rows.num_rows == 8944
    assert not set(listed) & set(found.rows["prompt"].to_pylist())
    data = comparisons(found.rows, weak=WEAK, strong=STRONG)
    assert data.weak_quality is not None
    assert data.strong_quality is not None
    assert 0.6 < data.weak_quality.mean() < data.strong_quality.mean() < 0.9
    assert np.allclose(data.labels()[1], (1 + data.strong_quality - data.weak_quality) / 2)


@needs_alpaca
def test_alpaca_judgements_become_comparisons() -> None:
    rows = alpaca_preferences(SHARED / "data" / "alpaca_eval").rows
    assert len(set(rows["llm_a"].to_pylist())) >= 54
    weak, strong = "claude-instant-1.2", ALPACA_REFERENCE
    data = comparisons(rows, weak=weak, strong=strong)
    battles = pair_battles(rows, weak=weak, strong=strong)
    grouped = comparisons(battles, weak=weak, strong=strong)
    assert len(grouped.prompts) > len(data.labels()[0])
    assert grouped.labels()[1].mean() > 0.5


def test_a_winner_between_equal_responses_is_left_out(tmp_path: Path) -> None:
    same = {"response_a": '["yes"]', "response_b": '["yes"]'}
    rows = [
        arena_row('["one"]', "model_b", id=1, **same),
        arena_row('["two"]', "tie", id=2, **same),
        arena_row('["three"]', "model_b", id=3),
        arena_row('["four"]', "model_a", id=4, response_a=None, response_b=None),
    ]
    found = arena_preferences(arena_file(tmp_path / "train.jsonl", rows))
    assert found.rows["prompt"].to_pylist() == ["two", "three", "four"]
    assert found.left_out == {"a winner between equal responses": 1}


@pytest.mark.parametrize(
    ("file", "source", "prompts"),
    [
        # As lmsys/lmsys-arena-human-preference-55k lies on the hub: one CSV in the root.
        ("train.csv", "arena", ['["Is it so?"]', '["Why?", "And now?"]']),
        # As routellm/gpt4_judge_battles does: Parquet shards under data/.
        ("data/train-00000-of-00001.parquet", "judge", ['["Is it so?"]', '["Why?", null]']),
    ],
)
def test_a_hub_datasets_layout_is_found_by_its_name_alone(
    file: str, source: Any, prompts: list[str], tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    pair = {"model_a": "gpt-4-1106-preview", "model_b": "mixtral-8x7b-instruct-v0.1"}
    winners = ("model_b", "tie")
    rows = [
        arena_row(prompt, winner, id=at, **pair)
        for at, (prompt, winner) in enumerate(zip(prompts, winners, strict=True))
    ]
    arena_file(tmp_path / file, rows)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = arena_preferences(str(tmp_path), source=source).rows
    assert found["prompt"].to_pylist() == ["Is it so?", "Why?"]
    assert found["a_wins"].to_pylist() == [0.0, 0.5]
    assert set(found["source"].to_pylist()) == {source}


def snapshots(
    warehouse: Warehouse, qualities: dict[str, dict[str, list[float]]], metric: str = "gold"
) -> tuple[Snapshot, Snapshot]:
    """Write queries q0, q1 … and the scores of each LLM's samples by query."""
    names = sorted({query for scored in qualities.values() for query in scored})
    queries = pa.table(
        {
            "query_key": [f"key {name}" for name in names],
            "query_id": names,
            "text": [f"text of {name}" for name in names],
            "domain": ["maps"] * len(names),
        }
    )
    scores = [
        {
            "query_key": f"key {query}",
            "llm": llm,
            "sample_index": sample,
            "metric": metric,
            "value": value,
        }
        for llm, scored in qualities.items()
        for query, values in scored.items()
        for sample, value in enumerate(values)
        if not np.isnan(value)
    ]
    return (
        warehouse.write_snapshot("queries", queries),
        warehouse.write_snapshot("scores", pa.Table.from_pylist(scores)),
    )


def test_scores_make_battles_between_all_llms(tmp_path: Path) -> None:
    qualities = {
        "a": {"q0": [1.0, 0.0], "q1": [0.3, 0.1]},
        "b": {"q0": [0.0, 0.0], "q1": [0.1, 0.3]},
        "c": {"q0": [1.0], "q1": [0.2]},
    }
    queries, scores = snapshots(Warehouse(tmp_path), qualities)
    found = response_preferences(queries, scores, ("a", "b", "c"), "gold").rows
    rows = {(row["llm_a"], row["llm_b"], row["battle_id"]): row for row in found.to_pylist()}
    assert {key: row["a_wins"] for key, row in rows.items()} == {
        ("a", "b", "q0"): 0.75,
        ("a", "b", "q1"): 0.5,
        ("a", "c", "q0"): 0.25,
        ("a", "c", "q1"): 0.5,
        ("b", "c", "q0"): 0.0,
        ("b", "c", "q1"): 0.5,
    }
    first = rows["a", "b", "q0"]
    assert (first["a_quality"], first["b_quality"]) == (0.5, 0.0)
    assert (first["source"], first["prompt"], first["domain"]) == (
        "responses", "text of q0", "maps",
    )  # fmt: skip
    assert [rows["a", "b", query]["verdict"] for query in ("q0", "q1")] == ["a", "tie"]


def test_scores_of_other_queries_and_metrics_do_not_count(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    queries, _ = snapshots(warehouse, {"a": {"q0": [1.0]}})
    _, scores = snapshots(warehouse, {"a": {"q0": [1.0], "q1": [1.0]}, "b": {"q0": [0.0]}})
    other = scores.read().set_column(3, "metric", pa.array(["other"] * scores.rows))
    both = warehouse.write_snapshot("scores", pa.concat_tables([scores.read(), other]))
    found = response_preferences(queries, both, ("a", "b"), "gold")
    assert found.rows["a_wins"].to_pylist() == [1.0]


def test_incompletely_scored_queries_are_left_out_for_the_pair_they_concern(tmp_path: Path) -> None:
    nan = float("nan")
    qualities = {
        "a": {"q0": [1.0, nan], "q1": [1.0, 1.0]},
        "b": {"q0": [0.0, 0.0], "q1": [0.0, 0.0]},
        "c": {"q0": [0.0], "q1": [0.0]},
    }
    queries, scores = snapshots(Warehouse(tmp_path), qualities)
    found = response_preferences(queries, scores, ("a", "b", "c"), "gold")
    assert found.left_out == {"a sample without a score": 2}
    assert found.rows["battle_id"].to_pylist() == ["q1", "q1", "q0", "q1"]


def test_unknown_llms_and_metrics_are_named(tmp_path: Path) -> None:
    queries, scores = snapshots(Warehouse(tmp_path), {"small": {"q": [1.0]}, "big": {"q": [0.0]}})
    with pytest.raises(DataError, match=r"'smal'\. Did you mean 'small'.*scored with 'gold'"):
        response_preferences(queries, scores, ("smal", "big"), "gold")
    with pytest.raises(DataError, match=r"Unknown quality metric 'gol'\. Did you mean 'gold'"):
        response_preferences(queries, scores, ("small", "big"), "gol")


few = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(few, few)
def test_win_probabilities_are_those_of_all_pairs(first: list[int], second: list[int]) -> None:
    outcomes = [1.0 if a > b else 0.5 if a == b else 0.0 for a in first for b in second]
    one, two = np.array([first], dtype=float), np.array([second], dtype=float)
    assert win_probability(one, two)[0] == pytest.approx(np.mean(outcomes))
    assert win_probability(one, two) == pytest.approx(1 - win_probability(two, one))
