"""What would stop a run later is found before anything is asked."""

import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from scripted_llm import ScriptedLLM

from conf.errors import ArtifactError, ConfigError, DataError, EndpointError, TurnoutError
from conf.load import load_experiment, validated
from conf.schema import BartScore, Experiment
from router_models.packaged import smollm2_gguf
from tasks.generation import generate_responses
from tasks.preflight import check_scorer, preflight
from tasks.queries import ingest_queries
from tasks.warehouse import Snapshot, Warehouse


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "store")


def experiment(warehouse: Warehouse, **changes: Any) -> Experiment:
    here = "http://127.0.0.1:9/v1"
    settings: dict[str, Any] = {
        "store": {"directory": str(warehouse.directory)},
        "llms": [
            {"name": "small", "model": "m", "endpoint": {"url": here}, **changes.pop("small", {})},
            {"name": "large", "model": "m", "endpoint": {"url": here}},
        ],
        "pairs": [{"weak": "small", "strong": "large"}],
        "generation": {"samples": 1},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [{"router": "length"}],
        "queries": {"limit": 30},
        **changes,
    }
    return validated(settings, where="test")


def queries(warehouse: Warehouse, **columns: object) -> Snapshot:
    """Thirty bundled queries, with every value of some columns replaced."""
    table = ingest_queries.fn(warehouse, experiment(warehouse).queries).read()
    for name, value in columns.items():
        field = table.schema.field(name)
        replaced = pa.array([value] * table.num_rows, field.type)
        table = table.set_column(table.column_names.index(name), field, replaced)
    return warehouse.write_snapshot("queries", table)


def refused(warehouse: Warehouse, asked: Snapshot | None = None, **changes: Any) -> TurnoutError:
    with pytest.raises(TurnoutError) as caught:
        preflight(experiment(warehouse, **changes), asked or queries(warehouse))
    return caught.value


def test_a_run_that_can_start_passes_and_asks_nothing(warehouse: Warehouse) -> None:
    with ScriptedLLM() as server:
        preflight(
            experiment(warehouse, small={"endpoint": {"url": server.url}}), queries(warehouse)
        )
    assert server.log == []


def test_the_embedded_default_passes(warehouse: Warehouse) -> None:
    preflight(
        load_experiment(overrides=(f"store.directory={warehouse.directory}",)), queries(warehouse)
    )


@pytest.mark.parametrize(
    ("small", "kind", "message"),
    [
        ({"template": "{question}"}, DataError, r"asks for \['question'\].*Expected only"),
        ({"template": "{text"}, DataError, "not readable"),
        (
            {"endpoint": {"url": "http://127.0.0.1:9", "api_key_env": "NO_SUCH_KEY"}},
            ConfigError,
            "NO_SUCH_KEY is not set",
        ),
        (
            {"endpoint": {"kind": "embedded", "weights": "none.gguf"}},
            ArtifactError,
            r"none.gguf, the weights of 'small', does not exist",
        ),
    ],
)
def test_what_is_wrong_with_an_llm_is_told(
    warehouse: Warehouse, small: dict[str, Any], kind: type[TurnoutError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        preflight(experiment(warehouse, small=small), queries(warehouse))


def test_a_host_that_does_not_resolve_is_told(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # a resolver may take long to say no
    small = {"endpoint": {"url": "http://no-such-host.invalid/v1"}}
    error = refused(warehouse, small=small)
    assert isinstance(error, EndpointError)
    assert "The host 'no-such-host.invalid' of 'small' is not known here" in str(error)
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    error = refused(warehouse, small=small)
    assert "127.0.0.1" in str(error)
    assert "no-such-host" not in str(error)  # the proxy looks it up


def test_all_problems_are_told_at_once(warehouse: Warehouse) -> None:
    small = {"template": "{nothing}"}
    error = refused(warehouse, queries(warehouse, gold=None), small=small)
    assert "2 things stand in the way of this run, and nothing was asked yet" in str(error)
    assert "asks for ['nothing']" in str(error)
    assert "30 of 30 queries have no gold" in str(error)


def test_queries_without_what_a_metric_compares_with_are_counted(warehouse: Warehouse) -> None:
    scorer = {"metric": "bartscore", "checkpoint": "smollm2-135m", "architecture": "causal"}
    quality = {"label_metric": "bartscore", "metrics": [scorer]}
    error = refused(warehouse, queries(warehouse, reference=None), quality=quality)
    assert "30 of 30 queries have no reference, such as '" in str(error)
    assert "take 'bartscore' out of quality.metrics" in str(error)


def test_an_llm_whose_responses_are_stored_needs_no_key(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = queries(warehouse)
    with ScriptedLLM() as server:
        both = experiment(warehouse, small={"endpoint": {"url": server.url}})
        generate_responses.fn(warehouse, asked, both.llm("small"), both.generation)
    locked = {"endpoint": {"url": server.url, "api_key_env": "NO_SUCH_KEY"}}
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    preflight(experiment(warehouse, small=locked), asked)
    more = {"samples": 2}
    assert "NO_SUCH_KEY is not set" in str(refused(warehouse, asked, small=locked, generation=more))


def test_prompts_that_no_embedded_server_has_room_for_are_refused(warehouse: Warehouse) -> None:
    small: dict[str, Any] = {
        "endpoint": {"kind": "embedded", "weights": "smollm2-135m", "context_tokens": 400},
        "decoding": {"max_tokens": 150},
    }
    asked = queries(warehouse, text="word " * 500)
    error = refused(warehouse, asked, small=small)
    assert "30 of 30 prompts for 'small' are too long" in str(error)
    assert "at least 312 tokens. Expected at most 400 with the answer, for which 150" in str(error)
    assert "Raise llms.small.endpoint.context_tokens" in str(error)
    small["endpoint"]["context_tokens"] = 800
    preflight(experiment(warehouse, small=small), asked)


def test_scorers_that_cannot_score_are_refused(tmp_path: Path) -> None:
    packaged = {"checkpoint": str(smollm2_gguf()), "architecture": "causal"}
    cases: list[tuple[dict[str, Any], type[TurnoutError], str]] = [
        ({"checkpoint": str(tmp_path / "none")}, ArtifactError, "There is no checkpoint"),
        (packaged | {"source_form": "{quesion} {text}"}, ConfigError, "source_form of 'bartscore'"),
        (packaged | {"source_form": "{query}"}, ConfigError, r"without {text}"),
        (packaged | {"architecture": "seq2seq"}, ConfigError, "which is causal"),
        (packaged | {"max_length": 10**6}, ConfigError, "max_length is 1000000"),
        (packaged | {"template": "no source"}, ConfigError, r"does not hold {source}"),
        (packaged | {"overlay": str(tmp_path / "none.pth")}, ArtifactError, "none.pth"),
    ]
    for settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            check_scorer(BartScore(**settings))


def test_base_models_that_cannot_be_loaded_are_refused(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in {
        str(tmp_path / "none"): "is no folder",
        str(tmp_path / "empty"): "cannot be loaded",
        "openai:nowhere": "names no endpoint",
    }.items():
        assert message in str(refused(warehouse, routers=[{"router": "knn", "encoder": name}]))
    causal = [{"router": "causal_llm", "model": str(tmp_path / "empty")}]
    assert "cannot be loaded" in str(refused(warehouse, routers=causal))
    preflight(experiment(warehouse, routers=[{"router": "causal_llm"}]), queries(warehouse))
