"""Scoring: every response once per fingerprint, in durable pieces, with clear refusals."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from prefect import flow
from recorded_tasks import recorded_tasks

import tasks.scoring
from conf.errors import DataError, TurnoutError
from conf.load import load_experiment
from conf.schema import BartScore, GoldMatch
from tasks import tracking
from tasks.scoring import gold_match, metric_fingerprint, score_responses
from tasks.warehouse import Snapshot, Warehouse

GOLD = (GoldMatch(name="gold"),)


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("The capital is Goiânia.", ["Goiania"], True),
        ("goiânia", ["Goiânia"], True),
        ("**São-Paulo**!", ["Sao Paulo"], True),
        ("_Lima_", ["Lima"], True),
        ("Limassol", ["Lima"], False),
        ("It is the Nile or the Amazon", ["Amazon", "Amazonas"], True),
        ("", ["Lima"], False),
    ],
)
def test_gold_match_looks_for_whole_words(response: str, gold: list[str], right: bool) -> None:
    assert gold_match([response], [gold]) == [float(right)]


def stored(
    warehouse: Warehouse, *, gold: list[str] | None, count: int = 5
) -> tuple[Snapshot, Snapshot]:
    keys = [f"key-{k}" for k in range(count)]
    queries = pa.table(
        {
            "query_key": keys,
            "query_id": [f"id-{k}" for k in range(count)],
            "text": ["Capital of Peru?"] * count,
            "reference": ["The capital of Peru is Lima."] * count,
            "gold": pa.array([gold] * count, pa.list_(pa.string())),
            "position": list(range(count)),
        }
    )
    responses = pa.table(
        {
            "query_key": keys * 2,
            "llm": ["small"] * count * 2,
            "prompt_id": [f"prompt-{k}" for k in range(count)] * 2,
            "sample_index": [0] * count + [1] * count,
            "text": ["It is Lima."] * count + ["It is Quito."] * count,
        }
    )
    return (
        warehouse.write_snapshot("queries", queries),
        warehouse.write_snapshot("responses", responses),
    )


def test_each_response_is_scored_once(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    queries, responses = stored(warehouse, gold=["Lima"])
    scores = score_responses.fn(warehouse, queries, responses, GOLD)
    table = scores.read()
    assert table.num_rows == 10
    right = dict(zip(table["sample_index"].to_pylist(), table["value"].to_pylist(), strict=True))
    assert right == {0: 1.0, 1: 0.0}
    assert score_responses.fn(warehouse, queries, responses, GOLD) == scores
    assert warehouse.query("SELECT count(*) AS n FROM scores")["n"].to_pylist() == [10]


def test_a_crashing_scorer_fails_and_keeps_what_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse = Warehouse(tmp_path)
    queries, responses = stored(warehouse, gold=["Lima"])
    monkeypatch.setattr(tasks.scoring, "CHUNK", 4)
    chunks = []

    def failing(rows: pa.Table) -> list[float]:
        chunks.append(rows.num_rows)
        if len(chunks) == 2:
            raise MemoryError("out of memory")
        return [0.0] * rows.num_rows

    monkeypatch.setattr(tasks.scoring, "gold_scorer", failing)
    with pytest.raises(MemoryError):
        score_responses.fn(warehouse, queries, responses, GOLD)
    assert warehouse.query("SELECT count(*) AS n FROM scores")["n"].to_pylist() == [4]
    monkeypatch.undo()
    assert score_responses.fn(warehouse, queries, responses, GOLD).rows == 10


def test_a_scorer_out_of_memory_fails_its_task_its_flow_and_its_run(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: None
) -> None:
    """Never a silent success: Prefect and MLflow both say that it failed."""
    warehouse = Warehouse(store_directory)
    queries, responses = stored(warehouse, gold=["Lima"])
    experiment = load_experiment(overrides=(f"store.directory={store_directory}",))

    def failing(rows: pa.Table) -> list[float]:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(tasks.scoring, "gold_scorer", failing)

    @flow
    def night() -> str:
        with tracking.parent_run(experiment):
            score_responses(warehouse, queries, responses, GOLD)
        return "scored"

    state = night(return_state=True)
    assert state.is_failed()
    with pytest.raises(torch.OutOfMemoryError):
        state.result()
    only = {("score", "Failed"): 1}
    assert recorded_tasks(str(state.state_details.flow_run_id), only) == only
    (run,) = tracking.client(experiment.store).search_runs(
        [tracking.experiment_id(experiment.store)]
    )
    assert run.info.status == "FAILED"
    assert "tried to allocate" in run.data.tags[tracking.ERROR_TAG]


@pytest.mark.parametrize("gold", [None, []])
def test_a_query_without_gold_is_refused(tmp_path: Path, gold: list[str] | None) -> None:
    warehouse = Warehouse(tmp_path)
    queries, responses = stored(warehouse, gold=gold)
    with pytest.raises(DataError, match="Query 'id-0' has no gold, which 'gold' compares"):
        score_responses.fn(warehouse, queries, responses, GOLD)


def test_scorers_that_differ_never_share_scores() -> None:
    bart = BartScore(checkpoint="smollm2-135m", architecture="causal", max_length=64)
    changes: list[dict[str, Any]] = [
        {"direction": "response_to_reference"},
        {"max_length": 32},
        {"template": "{source}\n"},
        {"source_form": "Question: {query}\nAnswer: {text}"},
    ]
    prints = {metric_fingerprint(bart.model_copy(update=change)) for change in changes}
    assert len(prints | {metric_fingerprint(bart), metric_fingerprint(GOLD[0])}) == 6


def test_a_missing_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    queries, responses = stored(warehouse, gold=["Lima"])
    with pytest.raises(TurnoutError, match="There is no checkpoint"):
        score_responses.fn(
            warehouse, queries, responses, [BartScore(checkpoint=str(tmp_path / "absent"))]
        )
