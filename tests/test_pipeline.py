"""The whole chain: with two scripted LLMs behind real HTTP, killed and resumed, and with real ones.

The scripted weak LLM knows capitals and little else, the strong one knows almost everything, so a
router has something to learn.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow import MlflowClient
from scripted_llm import ScriptedLLM

from conf.errors import TurnoutError
from conf.load import load_experiment
from conf.schema import Experiment
from flows.pipeline import pipeline
from tasks import tracking
from tasks.queries import BUNDLED
from tasks.registry import champion
from tasks.warehouse import Warehouse

QUESTIONS = {
    question["text"]: question for question in map(json.loads, BUNDLED.read_text().splitlines())
}
MODEL = "weak--strong"
# Everything that must not depend on whether a run was interrupted.
TABLES = {
    "responses": "SELECT prompt_id, sample_index, llm, text, billed_usd, error FROM responses",
    "scores": "SELECT * FROM scores",
    "labels": "SELECT * FROM labels",
    "relaxations": "SELECT * FROM relaxations",
}


def answering(knows: Callable[[str], float]) -> Callable[[str, int], str]:
    """Answer rightly as often as ``knows`` says for the question's domain, by a hash."""

    def answer(prompt: str, sample: int) -> str:
        question = QUESTIONS[prompt]
        drawn = int(hashlib.sha256(f"{prompt} {sample}".encode()).hexdigest()[:8], 16) / 16**8
        return question["gold"][0] if drawn < knows(question["domain"]) else "I do not know."

    return answer


@pytest.fixture
def llms() -> Iterator[tuple[ScriptedLLM, ScriptedLLM]]:
    weak = answering(lambda domain: 0.85 if domain in ("capital", "currency") else 0.05)
    strong = answering(lambda domain: 0.9)
    with ScriptedLLM(answer=weak) as small, ScriptedLLM(answer=strong) as large:
        yield small, large


def experiment_file(path: Path, store: Path, urls: tuple[str, str], **changes: Any) -> Path:
    def llm(name: str, url: str, price: float) -> dict[str, Any]:
        prices = {"input_usd_per_million": price, "output_usd_per_million": price}
        return {"name": name, "model": name, "endpoint": {"url": url}, "prices": prices}

    trainer = {"max_epochs": 1}
    settings = {
        "name": "scripted",
        "store": {"directory": str(store)},
        "queries": {"source": "bundled", "limit": 120},
        "llms": [llm("weak", urls[0], 0.1), llm("strong", urls[1], 1.0)],
        "pairs": [{"weak": "weak", "strong": "strong"}],
        "generation": {"samples": 4},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [
            {"router": "hybrid", "name": "hybrid", "labels": "probabilistic", "trainer": trainer},
            {"router": "knn"},
            {"router": "random"},
        ],
        "evaluation": {"replicates": 500, "folds": 3},
        **changes,
    }
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def loaded(path: Path) -> Experiment:
    experiment = load_experiment(path)
    assert isinstance(experiment, Experiment)
    return experiment


@pytest.mark.slow
def test_queries_become_a_champion(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    store_directory: Path,
    llms: tuple[ScriptedLLM, ScriptedLLM],
    prefect_server: None,
) -> None:
    urls = (llms[0].url, llms[1].url)
    experiment = loaded(experiment_file(tmp_path / "e.yaml", store_directory, urls))
    report = pipeline(experiment)
    (pair,) = report.pairs
    assert pair.receipt.verdict() == "promoted", pair.receipt.to_markdown()
    assert pair.out_of_fold
    assert pair.estimates["oracle"]["apgr"].value > pair.estimates[pair.best]["apgr"].value > 0.55
    assert pair.estimates["random"]["apgr"].interval.low < 0.5
    assert [standing.llm for standing in report.leaderboard.standings] == ["strong", "weak"]
    assert champion(experiment.store, MODEL) == pair.receipt.version == "1"
    client = MlflowClient(experiment.store.mlflow_uri())
    children = client.search_runs(
        [tracking.experiment_id(experiment.store)],
        f"tags.`mlflow.parentRunId` = '{report.run_id}'",
    )
    controls = {run.info.run_name for run in children if "turnout.control" in run.data.tags}
    assert controls == {f"{pair.best}-shuffled"}
    assert {run.info.run_name for run in children} == {
        "hybrid",
        "knn",
        "random",
        "oracle",
    } | controls
    assert {run.info.status for run in children} == {"FINISHED"}
    shown = {"apgr", "apgr_low", "apgr_high", "cpt_50", "cpt_80", "saved_usd_per_1000_at_40"}
    for run in children:
        assert shown <= run.data.metrics.keys() or run.info.run_name in controls
    logged = {item.path for item in client.list_artifacts(report.run_id, MODEL)}
    assert {f"{MODEL}/cost_quality.png", f"{MODEL}/comparison.md"} <= logged

    # What the README shows works on this champion.
    readme = (BUNDLED.parent.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    code = code.replace("sqlite:///.turnout/mlflow.db", experiment.store.mlflow_uri())
    exec(code.replace("smollm2--gemma3-facts", MODEL))
    (win_rate,) = json.loads(capsys.readouterr().out)
    assert 0 <= win_rate <= 1

    # A second run asks nothing, trains nothing, and gives the same numbers.
    asked = [len(llm.log) for llm in llms]
    again = pipeline(experiment)
    assert [len(llm.log) for llm in llms] == asked
    assert again.pairs[0].estimates == pair.estimates
    assert again.pairs[0].receipt.failures() == ["better than the champion"]
    assert champion(experiment.store, MODEL) == "1"


@pytest.mark.slow
def test_no_gap_is_rejected_with_a_receipt(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    same = answering(lambda domain: 0.5)
    with ScriptedLLM(answer=same) as small, ScriptedLLM(answer=same) as large:
        path = experiment_file(
            tmp_path / "e.yaml",
            store_directory,
            (small.url, large.url),
            routers=[{"router": "knn"}, {"router": "random"}],
        )
        report = pipeline(loaded(path))
    receipt = report.pairs[0].receipt
    assert receipt.verdict() == "rejected"
    assert "APGR above chance" in receipt.failures()
    assert "undefined" in receipt.checks[0].value
    assert champion(loaded(path).store, MODEL) is None


def test_a_failing_stage_fails_the_run_and_keeps_what_was_received(
    tmp_path: Path,
    store_directory: Path,
    llms: tuple[ScriptedLLM, ScriptedLLM],
    prefect_server: None,
) -> None:
    dead = "http://127.0.0.1:9/v1"
    path = experiment_file(tmp_path / "e.yaml", store_directory, (llms[0].url, dead))
    experiment = loaded(path)
    with pytest.raises(TurnoutError, match="cannot be reached"):
        pipeline(experiment)
    counted = Warehouse(store_directory).query(
        "SELECT llm, count(*) AS n FROM responses GROUP BY 1"
    )
    assert counted.to_pylist() == [{"llm": "weak", "n": 480}]
    (run,) = MlflowClient(experiment.store.mlflow_uri()).search_runs(
        [tracking.experiment_id(experiment.store)]
    )
    assert run.info.status == "FAILED"


def tables(store: Path) -> dict[str, list[Any]]:
    warehouse = Warehouse(store)
    return {
        name: sorted(map(repr, warehouse.query(sql).to_pylist())) for name, sql in TABLES.items()
    }


def started(config: Path) -> subprocess.Popen[bytes]:
    from prefect.settings import PREFECT_API_URL

    environment = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    command = [sys.executable, "-m", "flows.cli", "run", "--config", str(config), "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never came to where it was to be killed"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_any_stage_goes_on(
    tmp_path: Path,
    store_directory: Path,
    llms: tuple[ScriptedLLM, ScriptedLLM],
    prefect_server: None,
) -> None:
    small, large = llms
    small.delay_s = large.delay_s = 0.02
    urls = (small.url, large.url)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "mlflow.db").write_bytes((store_directory / "mlflow.db").read_bytes())
    pipeline(loaded(experiment_file(tmp_path / "whole.yaml", undisturbed, urls)))
    small.log.clear()
    large.log.clear()

    config = experiment_file(tmp_path / "killed.yaml", store_directory, urls)
    stages: list[Callable[[], bool]] = [
        lambda: len(small.log) >= 20,
        lambda: len(large.log) >= 40,
        lambda: any((store_directory / "training").glob("*.unfinished/*")),
    ]
    for happened in stages:
        process = started(config)
        wait_for(happened, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = started(config)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert json.loads(output)["pairs"][0]["receipt"]["verdict"] == "promoted"

    assert tables(store_directory) == tables(undisturbed)
    for llm in llms:
        asked = Counter(entry.prompt for entry in llm.log)
        assert len(asked) == 120
        # Only a request in flight at a kill is sent again: at most as many as are sent at once.
        assert sum(asked.values()) - 120 <= 4
    statuses = Counter(
        run.info.status
        for run in MlflowClient(loaded(config).store.mlflow_uri()).search_runs(
            [tracking.experiment_id(loaded(config).store)], "tags.`turnout.kind` = 'pipeline'"
        )
    )
    assert statuses == {"KILLED": 3, "FINISHED": 1}


@pytest.mark.slow
def test_the_real_llms_answer_and_are_judged(store_directory: Path, prefect_server: None) -> None:
    experiment = load_experiment(
        overrides=(
            f"store.directory={store_directory}",
            "queries.limit=24",
            "generation.samples=2",
            "evaluation={folds: 2, replicates: 200}",
            "routers=[{router: hybrid, trainer: {max_epochs: 1}}, {router: knn}, {router: random}]",
        )
    )
    report = pipeline(experiment)
    responses = Warehouse(store_directory).query(
        "SELECT llm, text, completion_tokens FROM responses"
    )
    assert Counter(responses["llm"].to_pylist()) == {"smollm2": 48, "gemma3-facts": 48}
    assert len(set(responses["text"].to_pylist())) > 40
    assert pa.compute.min(responses["completion_tokens"]).as_py() >= 0
    strong, weak = (
        next(s for s in report.leaderboard.standings if s.llm == name)
        for name in ("gemma3-facts", "smollm2")
    )
    assert strong.quality["gold"].value > weak.quality["gold"].value
    assert strong.cost_usd_per_1000 > 3 * weak.cost_usd_per_1000
    assert 0.5 < report.leaderboard.agreement["bartscore"].value <= 1
    receipt = report.pairs[0].receipt
    assert receipt.checks[1].passed, receipt.to_markdown()
