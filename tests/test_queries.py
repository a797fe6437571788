"""Queries from every source, their splits, and what bad input is told."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv

from conf.errors import DataError
from conf.schema import Queries
from tasks.queries import ingest_queries, query_table
from tasks.warehouse import Warehouse


def jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int) -> list[dict[str, object]]:
    return [
        {"id": f"q{row}", "text": f"Question {row}?", "gold": [str(row)]} for row in range(count)
    ]


def test_bundled_queries_are_complete_and_split() -> None:
    table = query_table(Queries())
    splits = Counter(table["split"].to_pylist())
    assert table.num_rows >= 300
    assert min(splits.values()) > 40
    for column in ("reference", "gold", "context", "domain"):
        assert table[column].null_count == 0


def test_a_query_keeps_its_split_when_others_come(tmp_path: Path) -> None:
    few = query_table(Queries(source="file", path=str(jsonl(tmp_path / "few.jsonl", numbered(60)))))
    many = query_table(
        Queries(source="file", path=str(jsonl(tmp_path / "all.jsonl", numbered(90))))
    )
    split = dict(zip(many["query_id"].to_pylist(), many["split"].to_pylist(), strict=True))
    for query_id, before in zip(few["query_id"].to_pylist(), few["split"].to_pylist(), strict=True):
        assert split[query_id] == before


def test_limit_draws_the_same_queries_again_and_a_larger_one_adds() -> None:
    some, more = query_table(Queries(limit=80)), query_table(Queries(limit=120))
    assert (some.num_rows, more.num_rows) == (80, 120)
    assert set(some["query_id"].to_pylist()) < set(more["query_id"].to_pylist())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_file_format_gives_the_same_queries(tmp_path: Path, suffix: str) -> None:
    rows = pa.table(
        {"question": [f"What is {n}?" for n in range(50)], "number": [f"n{n}" for n in range(50)]}
    )
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        jsonl(path, rows.to_pylist())
    elif suffix == "csv":
        write_csv(rows, path)
    else:
        pq.write_table(rows, path)
    settings = Queries(source="file", path=str(path), columns={"text": "question", "id": "number"})
    table = query_table(settings)
    assert sorted(table["query_id"].to_pylist()) == sorted(rows["number"].to_pylist())
    assert set(table["text"].to_pylist()) == set(rows["question"].to_pylist())


def test_mixinstruct_rows_of_the_real_schema(tmp_path: Path) -> None:
    for split, count in {"train": 3, "validation": 2, "test": 2}.items():
        rows = [
            {
                "id": f"unified_chip2/{split}{row}",
                "instruction": "Name a river.",
                "input": "In Europe." if row else "",
                "output": "The Danube.",
                "candidates": [
                    {
                        "decoding_method": "top_p_sampling",
                        "model": "alpaca-native",
                        "text": "The Rhine.",
                        "scores": {"logprobs": -0.5, "bertscore": 0.8, "bartscore": -2.1},
                    }
                ],
            }
            for row in range(count)
        ]
        jsonl(tmp_path / f"{split}.jsonl", rows)
    settings = Queries(
        source="mixinstruct", path=str(tmp_path), limit={"train": 2, "test": 2, "validation": 2}
    )
    table = query_table(settings)
    assert Counter(table["split"].to_pylist()) == {"train": 2, "validation": 2, "test": 2}
    assert set(table["domain"].to_pylist()) == {"unified_chip2"}
    assert set(table["text"].to_pylist()) <= {"Name a river.", "Name a river.\nIn Europe."}
    assert set(table["reference"].to_pylist()) == {"The Danube."}


def test_ingesting_twice_stores_once(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    first = ingest_queries.fn(warehouse, Queries(limit=50))
    again = ingest_queries.fn(warehouse, Queries(limit=50))
    assert first == again
    counts = warehouse.query(
        "SELECT (SELECT count(*) FROM queries) AS q, (SELECT count(*) FROM query_sets) AS m"
    )
    assert counts.to_pylist() == [{"q": 50, "m": 50}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": ""}], "Query 0 has the text ''"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "Queries 0 and 1 share the id 'a'"),
        ([{"id": "a", "text": "x", "split": "dev"}], "in split 'dev'"),
        ([{"id": "a", "question": "x"}], "Expected the query text in 'text'"),
        ([{"id": "a", "text": "x"}], "No query is in split"),
        ([{"id": "a", "text": "x", "gold": 42}], "Query 0 has the gold 42.*Expected a string, a l"),
        ([{"id": "a", "text": "x", "gold": [1, 2]}], r"the gold \[1, 2\].*Write it as text"),
        ([{"id": "a", "text": "x", "reference": 3.5}], "the reference 3.5.*Expected a string"),
        ([{"id": "a", "text": "x", "context": ["y"]}], "Query 0 has the context"),
        ([{"id": "a", "text": "x", "domain": True}], "Query 0 has the domain True"),
    ],
)
def test_bad_rows_are_explained(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        query_table(Queries(source="file", path=str(jsonl(tmp_path / "bad.jsonl", rows))))


def test_bad_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        query_table(Queries(source="file", path=str(tmp_path / "absent.csv")))
    with pytest.raises(DataError, match=r"Expected one of \.jsonl"):
        query_table(Queries(source="file", path="rows.xlsx"))
    latin = tmp_path / "latin.csv"
    latin.write_bytes("id,text\n1,Goiás\n".encode("latin-1"))
    with pytest.raises(DataError, match="Expected UTF-8 CSV"):
        query_table(Queries(source="file", path=str(latin)))


def test_mixinstruct_that_is_not_there_or_something_else_is_explained(tmp_path: Path) -> None:
    absent = Queries(source="mixinstruct", path=str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"cannot be loaded from .*absent.*Expected.*Download it"):
        query_table(absent)
    jsonl(tmp_path / "train.jsonl", [{"id": "a", "prompt": "x"}])
    with pytest.raises(DataError, match=r"has no input, instruction, output in its train split"):
        query_table(Queries(source="mixinstruct", path=str(tmp_path)))
    (tmp_path / "train.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="cannot be loaded from"):
        query_table(Queries(source="mixinstruct", path=str(tmp_path)))
