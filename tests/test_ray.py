"""Asking and scoring on a real Ray cluster: two node processes, killed nodes, dying scorers."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from prefect import flow
from prefect.runtime import flow_run
from ray.cluster_utils import Cluster
from recorded_tasks import recorded_tasks
from scripted_llm import ScriptedLLM

import tasks.scoring
from conf.errors import BudgetError, ConfigError, EndpointError, TurnoutError
from conf.llms import LLM, Decoding, Endpoint, Generation, Limits, Prices
from conf.load import load_experiment
from conf.schema import LOCAL, Compute, GoldMatch
from flows import doctor
from tasks.asking_shards import REQUESTS, Part, ask_shard
from tasks.cluster import check_cluster
from tasks.endpoints import model_identity
from tasks.generation import (
    GenerationReport,
    collect_responses,
    generate_responses,
    missing_requests,
    prompt_table,
)
from tasks.scoring import score_responses
from tasks.warehouse import Snapshot, Warehouse, table_digest

HERE = Path(__file__).parent
SAMPLES = 5
GOLD = (GoldMatch(),)


@pytest.fixture(scope="module")
def cluster(prefect_server: None) -> Iterator[Cluster]:
    """A head and one more node, a CPU each; workers find this file, whose flow they are told of."""
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        environment.setenv("RAY_AUTH_MODE", "disabled")  # whatever token a developer has
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args=node)
        nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="module")
def connection(cluster: Cluster) -> Iterator[Cluster]:
    """The same, connected to once: a connection starts new worker processes, which takes time."""
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


@flow
def stages(
    store: Path, llm: LLM, compute: Compute, count: int
) -> tuple[GenerationReport, Snapshot, Snapshot, str]:
    """Ask and score, as the pipeline does."""
    warehouse = Warehouse(store)
    asked = queries(warehouse, *(f"query {k}" for k in range(count)))
    settings = Generation(samples=SAMPLES)
    report = generate_responses(warehouse, asked, llm, settings, compute)
    responses = collect_responses(warehouse, asked, [llm], settings)
    scores = score_responses(warehouse, asked, responses, GOLD, compute)
    return report, responses, scores, flow_run.id


def queries(warehouse: Warehouse, *texts: str) -> Snapshot:
    count = len(texts)
    nothing = pa.nulls(count, pa.string())
    rows = {
        "query_key": [f"key-{k}" for k in range(count)],
        "query_id": [f"id-{k}" for k in range(count)],
        "text": list(texts),
        "reference": nothing,
        "gold": [[str(k), "answer 1"] for k in range(count)],
        "context": nothing,
        "position": list(range(count)),
    }
    return warehouse.write_snapshot("queries", pa.table(rows))


def scripted(url: str, **changes: Any) -> LLM:
    limits = Limits(concurrency=4, timeout_s=5, retries=1, max_backoff_s=0.05)
    prices = Prices(input_usd_per_million=1.0, output_usd_per_million=10.0)
    settings: dict[str, Any] = {"limits": limits, "prices": prices, **changes}
    return LLM(name="small", model="scripted", endpoint=Endpoint(url=url), **settings)


def on_ray(cluster: Cluster, **changes: Any) -> Compute:
    settings = {"shard_queries": 20, "shard_responses": 1000, **changes}
    return Compute(kind="ray", address=cluster.address, **settings)


def digest(snapshot: Snapshot) -> str:
    """The digest of what does not depend on when it was made."""
    rows = snapshot.read()
    return table_digest(rows.drop_columns({"latency_ms"} & {*rows.column_names}))


@pytest.mark.slow
def test_the_tables_are_those_of_one_process_and_are_not_asked_for_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    with ScriptedLLM() as server:
        llm = scripted(server.url)
        here, *tables, _ = stages(tmp_path / "local", llm, LOCAL, 210)
        asked = Counter((entry.prompt, entry.seed) for entry in server.log)
        server.log.clear()
        there, *others, run = stages(tmp_path / "ray", llm, on_ray(cluster, shard_queries=70), 210)
        assert Counter((entry.prompt, entry.seed) for entry in server.log) == asked
        server.log.clear()
        again, *same, _ = stages(tmp_path / "ray", llm, on_ray(cluster, shard_queries=70), 210)
        assert server.log == []
    assert [digest(table) for table in others] == [digest(table) for table in tables]
    assert same == others
    assert (there.new, there.failed, there.requests) == (here.new, 0, here.requests)
    assert there.billed_usd == pytest.approx(here.billed_usd)
    assert (again.new, again.reused) == (0, 1050)
    left = [path.name for path in (tmp_path / "ray" / "shards").rglob("*") if path.is_file()]
    assert left == [".lock"]
    shards = {("ask small, shard", "Completed"): 3, ("score with gold, shard", "Completed"): 2}
    shown = recorded_tasks(run, shards)
    assert {kind: shown[kind] for kind in shards} == shards


def dying() -> None:
    """Make the scorer of a worker process end that process."""
    tasks.scoring.gold_match = lambda *texts: os._exit(1)


def test_a_scorer_that_dies_fails_the_task(cluster: Cluster, tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    asked = queries(warehouse, "one", "two")
    with ScriptedLLM() as server:
        llm, settings = scripted(server.url), Generation(samples=SAMPLES)
        generate_responses.fn(warehouse, asked, llm, settings)
    responses = collect_responses.fn(warehouse, asked, [llm], settings)
    hook = {"worker_process_setup_hook": "test_ray.dying"}
    ray.init(address=cluster.address, runtime_env=hook, log_to_driver=False)
    try:
        compute = on_ray(cluster, retries=1)
        message = r"(?s)ended under it 2 times.*WorkerCrashedError.*Expected.*compute.retries"
        with pytest.raises(TurnoutError, match=message):
            score_responses.fn(warehouse, asked, responses, GOLD, compute)
    finally:
        ray.shutdown()
    assert warehouse.query("SELECT count(*) AS n FROM scores")["n"].to_pylist() == [0]
    scores = score_responses.fn(warehouse, asked, responses, GOLD)
    assert scores.rows == 2 * SAMPLES


def test_what_a_killed_run_left_is_ingested_by_the_next(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    folder = tmp_path / "shards" / "responses"
    asked = queries(warehouse, "one", "two")
    with ScriptedLLM() as server:
        llm, settings = scripted(server.url), Generation(samples=SAMPLES)
        missing = missing_requests(warehouse, prompt_table(asked, llm), SAMPLES)
        rows = pa.Table.from_pylist([vars(request) for request in missing], schema=REQUESTS)
        part = Part(llm, settings, model_identity(llm), 10, 0, 0.0, folder / "s.stop")
        folder.mkdir(parents=True)
        first = ask_shard.fn("a", rows, part, folder)
        assert first is not None
        assert first.received == 10
        assert ask_shard.fn("a", rows, part, folder) is None
        assert [path.name for path in folder.iterdir()] == ["a.parquet"]
        report = generate_responses.fn(warehouse, asked, llm, settings)
        assert len(server.log) == 2
    assert (report.new, report.reused) == (0, 10)
    assert list(folder.iterdir()) == []


def test_settings_by_a_word_or_one_by_one() -> None:
    assert load_experiment(overrides=("compute=ray",)).compute == Compute(kind="ray")
    overrides = ("compute.kind=ray", "compute.address=auto", "compute.shard_queries=3")
    expected = Compute(kind="ray", address="auto", shard_queries=3)
    assert load_experiment(overrides=overrides).compute == expected
    assert load_experiment().compute == LOCAL
    with pytest.raises(ConfigError, match=r"compute.kind: .*'local' or 'ray' \(got 'slurm'\)"):
        load_experiment(overrides=("compute=slurm",))


def test_the_doctor_looks_at_the_cluster() -> None:
    assert list(doctor._cluster(LOCAL)) == []
    (found,) = doctor._cluster(Compute(kind="ray", address="127.0.0.1:9"))
    assert (found.what, found.ok) == ("ray", False)
    assert "No Ray cluster answers" in found.found
    assert "ray start --head" in found.remedy


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cluster.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ray is not installed.*Expected.*pip install"):
        check_cluster(Compute(kind="ray"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:9",
            "No Ray cluster answers at '127.0.0.1:9': .*Expected the head.*ray start",
        ),
        ("ray://127.0.0.1:9", "No Ray cluster answers at 'ray://127.0.0.1:9'.*correct"),
        ("somewhere", "No Ray cluster answers at 'somewhere': it names no host and port"),
    ],
)
def test_an_address_without_a_cluster(tmp_path: Path, address: str, message: str) -> None:
    compute = Compute(kind="ray", address=address)
    with pytest.raises(ConfigError, match=message):
        check_cluster(compute)
    warehouse = Warehouse(tmp_path)
    asked = queries(warehouse, "one")
    llm = scripted("http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=message):
        generate_responses.fn(warehouse, asked, llm, Generation(), compute)


def test_all_shards_have_one_budget(connection: Cluster, tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    asked = queries(warehouse, *(f"query {k}" for k in range(40)))
    compute = on_ray(connection, shard_queries=10)
    with ScriptedLLM() as server:
        prices = Prices(output_usd_per_million=1000.0)
        llm = scripted(server.url, prices=prices, decoding=Decoding(max_tokens=8))
        tight = Generation(samples=SAMPLES, budget_usd=0.4)
        with pytest.raises(BudgetError, match=r"budget_usd = 0.4.*Raise generation.budget_usd"):
            generate_responses.fn(warehouse, asked, llm, tight, compute)
        rows = warehouse.query("SELECT billed_usd FROM responses")
        assert rows.num_rows == server.answers()
        # What one request could cost was left at most: the shards' parts did not lie idle.
        assert 0.4 - 2 * 0.04 < pa.compute.sum(rows["billed_usd"]).as_py() <= 0.4
        enough = Generation(samples=SAMPLES, budget_usd=2.0)
        report = generate_responses.fn(warehouse, asked, llm, enough, compute)
    assert (report.new, report.reused) == (200 - rows.num_rows, rows.num_rows)


def test_failures_are_judged_over_all_shards(connection: Cluster, tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    bad = [f"[[status=400]] {k}" for k in range(4)]
    asked = queries(warehouse, *bad, *(f"query {k}" for k in range(36)))
    compute = on_ray(connection, shard_queries=10)
    with ScriptedLLM() as server:
        llm = scripted(server.url)
        within = Generation(samples=SAMPLES, max_failure_share=0.1)  # of the first shard: 0.4
        report = generate_responses.fn(warehouse, asked, llm, within, compute)
        assert (report.new, report.failed, report.requests) == (180, 20, 40)
        strict = Generation(samples=SAMPLES, max_failure_share=0.05)
        with pytest.raises(EndpointError, match=r"of 200 responses.*HTTP 400.*at most 5%"):
            generate_responses.fn(warehouse, asked, llm, strict, compute)
    assert server.most_in_flight <= 4


def test_keys_come_from_the_environment_of_the_nodes(
    connection: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_KEY", "sk-very-secret")  # here, not there
    warehouse = Warehouse(tmp_path)
    asked = queries(warehouse, "one")
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", api_key_env="SCRIPTED_KEY")
    llm = scripted("http://127.0.0.1:9/v1").model_copy(update={"endpoint": endpoint})
    with pytest.raises(ConfigError, match="SCRIPTED_KEY is not set"):
        generate_responses.fn(warehouse, asked, llm, Generation(), on_ray(connection))


def test_a_node_that_is_killed_costs_what_it_had_in_flight(
    connection: Cluster, tmp_path: Path
) -> None:
    with ScriptedLLM() as server:
        llm = scripted(server.url)
        _, *tables, _ = stages(tmp_path / "local", llm, LOCAL, 80)
        server.log.clear()
        server.delay_s = 0.08

        def kill() -> None:
            while len(server.log) < 12:
                time.sleep(0.01)
            connection.remove_node(connection.list_all_nodes()[-1], allow_graceful=False)

        killing = threading.Thread(target=kill)
        killing.start()
        report, *others, run = stages(tmp_path / "ray", llm, on_ray(connection), 80)
        killing.join()
        asked = Counter(entry.prompt for entry in server.log)
    assert [digest(table) for table in others] == [digest(table) for table in tables]
    assert len(asked) == 80
    assert sum(asked.values()) - 80 <= 2  # in flight on that node: half of a concurrency of four
    assert (report.new, report.failed) == (400, 0)
    assert report.lost_usd > 0
    shards = {("ask small, shard", "Crashed"): 1, ("ask small, shard", "Completed"): 4}
    shown = recorded_tasks(run, shards)
    assert shown["ask small, shard", "Crashed"] == 1
    assert shown["ask small, shard", "Completed"] >= 4
