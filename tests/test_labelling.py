"""From scores to labels, through real DuckDB tables."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conf.errors import DataError
from conf.llms import Pair
from conf.schema import Labels
from router_models.relaxation import optimal_relaxation, transformed_labels
from tasks.labelling import label_queries
from tasks.warehouse import Snapshot, Warehouse

PAIR = Pair(weak="small", strong="large")


def stored(
    warehouse: Warehouse, qualities: dict[str, np.ndarray]
) -> tuple[Snapshot, Snapshot, list[str]]:
    n = len(next(iter(qualities.values())))
    ids = [f"q{row:03d}" for row in range(n)]
    queries = warehouse.write_snapshot(
        "queries",
        pa.table(
            {
                "query_key": [f"key {name}" for name in ids],
                "query_id": ids,
                "text": [f"text of {name}" for name in ids],
                "domain": ["any"] * n,
                "split": ["test" if row % 5 == 0 else "train" for row in range(n)],
            }
        ),
    )
    scores = [
        {
            "query_key": f"key {ids[row]}",
            "llm": llm,
            "sample_index": sample,
            "metric": "bartscore",
            "value": value,
        }
        for llm, matrix in qualities.items()
        for row, values in enumerate(matrix)
        for sample, value in enumerate(values)
        if not np.isnan(value)
    ]
    shuffled = np.random.default_rng(0).permutation(len(scores))
    table = pa.Table.from_pylist([scores[position] for position in shuffled])
    return queries, warehouse.write_snapshot("scores", table), ids


def test_labels_are_those_of_the_relaxation_of_the_training_queries(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    weak, strong = generator.normal(size=(30, 4)), generator.normal(0.5, size=(30, 6))
    warehouse = Warehouse(tmp_path)
    queries, scores, ids = stored(warehouse, {"small": weak, "large": strong})
    found = label_queries.fn(
        warehouse, queries, scores, pair=PAIR, metric="bartscore", settings=Labels()
    )
    train = np.arange(30) % 5 != 0
    expected = optimal_relaxation(weak[train], strong[train])
    table = found.labels.read()
    assert table["query_id"].to_pylist() == ids
    np.testing.assert_array_equal(table["transformed"].to_numpy()[train], expected.labels)
    np.testing.assert_array_equal(
        table["transformed"].to_numpy(), transformed_labels(weak, strong, expected.t)
    )
    np.testing.assert_allclose(table["strong_quality"].to_numpy(), strong.mean(axis=1))
    assert found.t == expected.t
    assert found.unlabelled == 0
    kept = warehouse.query("SELECT weak, strong, t FROM relaxations").to_pylist()
    assert kept == [{"weak": "small", "strong": "large", "t": expected.t}]


def test_queries_with_missing_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    weak, strong = np.zeros((5, 2)), np.ones((5, 2))
    weak[3, 1] = np.nan
    warehouse = Warehouse(tmp_path)
    queries, scores, ids = stored(warehouse, {"small": weak, "large": strong})
    found = label_queries.fn(
        warehouse, queries, scores, pair=PAIR, metric="bartscore", settings=Labels()
    )
    assert found.labels.read()["query_id"].to_pylist() == ids[:3] + ids[4:]
    assert found.unlabelled == 1
    assert found.degenerate


def test_no_scored_query_is_an_error(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    queries, scores, _ = stored(warehouse, {"small": np.zeros((2, 2))})
    with pytest.raises(DataError, match="No query has all its 'bartscore' scores for both"):
        label_queries.fn(
            warehouse, queries, scores, pair=PAIR, metric="bartscore", settings=Labels()
        )
