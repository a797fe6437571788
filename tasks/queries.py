"""Queries: bundled, from a file, or from MixInstruct, brought to one schema with fixed splits.

A split comes from the source where it has one, else from a hash of the query's id, so that a row
never changes split when others are added.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task

from conf.errors import DataError
from conf.schema import Queries
from tasks.warehouse import Snapshot, Warehouse, table_digest

BUNDLED = Path(__file__).parent.parent / "data" / "geography.jsonl"
SPLITS = ("train", "validation", "test")
CONTENT = ("query_id", "text", "reference", "gold", "context", "domain")
SCHEMA = pa.schema(
    [
        ("query_key", pa.string()),
        ("query_id", pa.string()),
        ("text", pa.string()),
        ("reference", pa.string()),
        ("gold", pa.list_(pa.string())),
        ("context", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("position", pa.int32()),
    ]
)
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@task(task_run_name="ingest {settings.source} queries")
def ingest_queries(warehouse: Warehouse, settings: Queries) -> Snapshot:
    """Store the configured queries and return them, one row each, as a snapshot."""
    rows = query_table(settings)
    query_set = table_digest(rows)
    members = rows.select(["query_key", "position", "split"]).append_column(
        "query_set", pa.array([query_set] * rows.num_rows)
    )
    warehouse.ingest("queries", rows.drop_columns(["split", "position"]))
    warehouse.ingest("query_sets", members)
    return warehouse.write_snapshot("queries", rows)


def query_table(settings: Queries) -> pa.Table:
    """Return the configured queries, ordered by id, limited and split; columns as in SCHEMA.

    Raises DataError for rows without text or id, duplicate ids, and a split left empty.
    """
    if settings.source == "mixinstruct":
        records = list(_mixinstruct(settings.path))
    else:
        path = str(BUNDLED) if settings.source == "bundled" else settings.path
        records = list(_file_records(path, settings.columns))
    queries = [_checked(record, row) for row, record in enumerate(records)]
    _refuse_duplicates(queries)
    for query in queries:
        query["split"] = query["split"] or _hashed_split(query["query_id"], settings)
        content = json.dumps([query[column] for column in CONTENT], ensure_ascii=False)
        query["query_key"] = hashlib.sha256(content.encode()).hexdigest()[:24]
    chosen = sorted(_limited(queries, settings.limit), key=lambda query: str(query["query_id"]))
    _refuse_empty_splits(chosen, settings)
    for position, query in enumerate(chosen):
        query["position"] = position
    return pa.Table.from_pylist(chosen, schema=SCHEMA)


def _file_records(path: str, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield rows of a JSONL, CSV or Parquet file (or glob) under our own column names."""
    import datasets

    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise DataError(
            f"{path} ends in {suffix!r}. Expected one of {', '.join(FORMATS)}. Convert the file."
        )
    if not any(char in path for char in "*?[") and not Path(path).exists():
        raise DataError(
            f"There is no file {path}. Expected queries as JSONL, CSV or Parquet. Correct "
            "queries.path."
        )
    try:
        rows = datasets.load_dataset(
            FORMATS[suffix], data_files=path, split="train", keep_in_memory=True
        )
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{path} cannot be read: {cause}. Expected UTF-8 {FORMATS[suffix].upper()} with the "
            "same columns in every row. Correct the file."
        ) from error
    text = columns.get("text", "text")
    if text not in rows.column_names:
        raise DataError(
            f"{path} has the columns {', '.join(rows.column_names)}. Expected the query text in "
            f"{text!r}. Set queries.columns, such as queries.columns.text=question."
        )
    ours = {"id": "query_id"}
    fields = ("id", "text", "reference", "gold", "context", "domain", "split")
    for row in rows:
        yield {ours.get(field, field): row.get(columns.get(field, field)) for field in fields}


def _mixinstruct(path: str) -> Iterator[dict[str, Any]]:
    """Yield MixInstruct's rows (instruction, input, output) from the hub or a local copy."""
    import datasets

    try:
        found = datasets.load_dataset(path)
    except Exception as error:  # hub, network, cache and file formats all fail in their own ways
        raise DataError(
            f"MixInstruct cannot be loaded from {path!r}: {error.__cause__ or error}. Expected a "
            "dataset on a hub within reach, or a folder with its JSONL files. Download it where "
            "there is a network and set queries.path to its folder."
        ) from error
    for split, rows in found.items():
        if absent := {"id", "instruction", "input", "output"} - set(rows.column_names):
            raise DataError(
                f"{path!r} has no {', '.join(sorted(absent))} in its {split} split, only "
                f"{', '.join(rows.column_names)}. Expected MixInstruct's columns. Correct "
                "queries.path, or read another file with queries.source=file."
            )
        for row in rows:
            text = "\n".join(part for part in (row["instruction"], row["input"]) if part)
            yield {
                "query_id": str(row["id"]),
                "text": text,
                "reference": row["output"],
                "domain": str(row["id"]).split("/")[0],
                "split": {"val": "validation"}.get(split, split),
            }


def _checked(record: Mapping[str, Any], row: int) -> dict[str, Any]:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"Query {row} has the text {text!r}. Expected a non-empty string. Correct or drop it."
        )
    split = record.get("split") or None
    if split is not None and split not in SPLITS:
        raise DataError(
            f"Query {row} is in split {split!r}. Expected one of {', '.join(SPLITS)}, or none. "
            "Rename it."
        )
    for column in ("reference", "context", "domain"):
        if not isinstance(record.get(column), str | None):
            raise _no_text(row, column, record[column], "a string, or nothing")
    gold = record.get("gold")
    answers = [gold] if isinstance(gold, str) else gold
    if answers is not None and not (
        isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    ):
        raise _no_text(row, "gold", gold, "a string, a list of strings, or nothing")
    query_id = record.get("query_id")
    return {
        "query_id": str(query_id) if query_id is not None else _digest(text),
        "text": text,
        "reference": record.get("reference"),
        "gold": answers,
        "context": record.get("context"),
        "domain": record.get("domain"),
        "split": split,
    }


def _no_text(row: int, column: str, found: object, expected: str) -> DataError:
    return DataError(
        f"Query {row} has the {column} {found!r}. Expected {expected}. Write it as text: in JSONL "
        "and Parquet numbers too can be strings, in CSV they cannot."
    )


def _refuse_duplicates(queries: Iterable[Mapping[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for row, query in enumerate(queries):
        first = seen.setdefault(query["query_id"], row)
        if first != row:
            raise DataError(
                f"Queries {first} and {row} share the id {query['query_id']!r}. Expected one row "
                "for each id. Rename or drop one of them."
            )


def _limited(
    queries: list[dict[str, Any]], limit: Mapping[Any, int] | int | None
) -> list[dict[str, Any]]:
    """Return at most ``limit`` queries, in all or per split, lowest hash of the id first."""
    if limit is None:
        return queries
    drawn = sorted(queries, key=lambda query: _digest(f"limit {query['query_id']}"))
    if isinstance(limit, int):
        return drawn[:limit]
    return [
        query
        for split, most in limit.items()
        for query in [query for query in drawn if query["split"] == split][:most]
    ]


def _refuse_empty_splits(queries: list[dict[str, Any]], settings: Queries) -> None:
    counts = {split: sum(query["split"] == split for query in queries) for split in SPLITS}
    if empty := [split for split, count in counts.items() if count == 0]:
        raise DataError(
            f"No query is in split {', '.join(empty)} (rows per split: {counts}). Expected "
            f"queries in each of {', '.join(SPLITS)}. Add queries, or change queries.limit, "
            "queries.validation_share or queries.test_share."
        )


def _hashed_split(query_id: str, settings: Queries) -> str:
    position = int(_digest(f"split {query_id}"), 16) / 16**24
    if position < settings.test_share:
        return "test"
    if position < settings.test_share + settings.validation_share:
        return "validation"
    return "train"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
