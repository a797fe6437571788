"""`turnout deploy` and the deployed flow, on a real Prefect server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.deployments.steps.core import run_steps
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled
from prefect.utilities.asyncutils import run_coro_as_sync
from scripted_llm import ScriptedLLM, Step

from conf import load
from conf.errors import ConfigError, EndpointError
from conf.load import load_experiment
from conf.schema import Experiment, Gate, PreferenceExperiment, Queries, Store
from flows import cli, pipeline
from flows.deploy import (
    FULL_NAME,
    PREFECT_YAML,
    ROOT,
    _pool,
    api_url,
    checked_schedule,
    deploy,
    deployed,
    planned,
    server,
    start_retrain,
)
from flows.drift import retrained
from flows.retrain import retrain, with_gate
from tasks import tracking
from tasks.queries import query_table
from tasks.registry import judge
from tasks.warehouse import Warehouse

QUERIES, SAMPLES = 60, 2


@pytest.fixture
def clean_server(prefect_server: None) -> Iterator[None]:
    """The session's server, without a deployment before and after."""
    yield
    with server() as client:
        found = deployed(client)
        if found is not None:
            client.delete_deployment(found.id)


def experiment(**changes: Any) -> Experiment:
    loaded = load_experiment("embedded")
    assert isinstance(loaded, Experiment)
    return loaded.model_copy(update=changes)


def test_prefect_yaml_is_whole_and_holds_the_embedded_experiment() -> None:
    plan = planned()
    assert plan["entrypoint"] == "flows/retrain.py:retrain"
    assert plan["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    (schedule,) = plan["schedules"]
    assert checked_schedule(schedule["cron"], schedule["timezone"]).timezone == "Europe/Berlin"
    assert Experiment.model_validate(plan["parameters"]["experiment"]) == experiment()
    whole = yaml.safe_load(PREFECT_YAML.read_text())
    assert "gate" not in plan["parameters"]["experiment"]  # conf/gate.yaml has it
    assert plan["parameters"]["max_hours"] > 0
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert f"prefect=={whole['prefect-version']}" in lock
    # Prefect 3.8 cannot insert scheduled runs on SQLAlchemy 2.1: no schedule would ever fire.
    assert any(line.lower().startswith("sqlalchemy==2.0.") for line in lock)


def test_prefect_deploy_makes_a_deployment_that_runs_where_the_worker_is(
    clean_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a laptop: the server is elsewhere, and so is the worker, in a folder of its own."""
    with server() as client:
        _pool(client, planned()["work_pool"]["name"])
    laptop = tmp_path / "laptop"
    for name in ("prefect.yaml", "flows"):
        (laptop / name).parent.mkdir(exist_ok=True)
        (laptop / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "PREFECT_API_URL": str(api_url()), "PWD": str(laptop)}
    done = subprocess.run(command, cwd=laptop, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    with server() as client:
        found = deployed(client)
        assert found is not None
        assert found.entrypoint == "flows/retrain.py:retrain"
        assert str(laptop) not in json.dumps(found.pull_steps)
        assert found.parameters["max_hours"] == planned()["parameters"]["max_hours"]
        assert "gate" not in found.parameters["experiment"]
        # What the worker's process does with it, started anywhere.
        monkeypatch.chdir(tmp_path)
        steps = [step for step in found.pull_steps or [] if step]
        there = run_coro_as_sync(run_steps(steps))
        assert there is not None
        assert there["directory"] == str(Path.cwd()) == str(ROOT)
        assert Path("flows/retrain.py").exists()


def test_a_change_of_the_gates_file_reaches_what_is_deployed(
    clean_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deploy(experiment(), pool="gate-test").gate.startswith("as conf/gate.yaml has it")
    own = deploy(experiment(gate=Gate(min_gain=0.5)), pool="gate-test")
    assert any("deployed with the experiment" in line and "0.5" in line for line in own.lines())
    file = tmp_path / "gate.yaml"
    file.write_text(load.GATE.read_text().replace("min_gain: 0.01", "min_gain: 0.03"))
    monkeypatch.setattr(load, "GATE", file)
    late = Experiment.model_validate(planned()["parameters"]["experiment"])
    assert with_gate(late).gate.min_gain == 0.03
    assert with_gate(experiment(gate=Gate(min_gain=0.5))).gate.min_gain == 0.5


def test_a_run_that_hangs_is_ended(
    store_directory: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(*_: object) -> None:
        # In short steps: pytest's own timeout holds the alarm that would interrupt a long one.
        for _step in range(600):
            time.sleep(0.1)

    monkeypatch.setattr(pipeline, "ingest_queries", hangs)
    settings = experiment(store=Store(directory=store_directory))
    state = retrain(settings, max_hours=1 / 3600, return_state=True)
    assert state.is_failed()
    (run,) = tracking.client(settings.store).search_runs([tracking.experiment_id(settings.store)])
    assert run.info.status == "FAILED"  # and not left open
    with pytest.raises(ConfigError, match=r"may take 0 hours. Expected more than 0.*--max-hours"):
        deploy(settings, max_hours=0)


def test_deploying_twice_leaves_one_deployment_as_asked_for_last(
    clean_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = deploy(experiment(), pool="deploy-test")
    assert (first.replaced, first.pool_created, first.pool_type) == (None, True, "process")
    assert "prefect worker start --pool deploy-test --type process --limit 1" in (
        first.worker_command()
    )
    wanted = experiment(name="other", seed=8)
    again = deploy(wanted, cron="30 2 * * 1", timezone="UTC", pool="deploy-test")
    assert (again.replaced, again.pool_created) == ("embedded", False)
    assert (
        "replaced deployment retrain/retrain of experiment other (before: embedded)"
        in (again.lines()[0])
    )
    with server() as client:
        found = deployed(client)
        assert found is not None
        (schedule,) = found.schedules
        assert (schedule.schedule.cron, schedule.schedule.timezone) == ("30 2 * * 1", "UTC")  # type: ignore[union-attr]
        assert schedule.active
        assert found.work_pool_name == "deploy-test"
        assert Experiment.model_validate(found.parameters["experiment"]) == wanted
        assert found.global_concurrency_limit is not None
        assert found.global_concurrency_limit.limit == 1
        assert found.concurrency_options is not None
        assert found.concurrency_options.collision_strategy == "ENQUEUE"
        (step,) = found.pull_steps or []
        assert step["prefect.deployments.steps.set_working_directory"] == {
            "directory": str(tmp_path)
        }
        # The form refuses what the settings models refuse, before anything runs.
        bad = {"experiment": {**found.parameters["experiment"], "generation": {"samples": 0}}}
        with pytest.raises(PrefectHTTPStatusError, match="samples"):
            client.create_flow_run_from_deployment(found.id, parameters=bad)


def test_the_command_says_what_it_did_and_what_comes_next(
    clean_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["deploy", "--cron", "0 4 * * *", "--pool", "deploy-test", "generation.samples=3"]
    arguments = cli.parser().parse_args(command)
    assert arguments.command(arguments) == 0
    said = capsys.readouterr().out
    assert "schedule: 0 4 * * * (Europe/Berlin); one at a time: enqueue" in said
    assert "prefect worker start --pool deploy-test" in said
    arguments = cli.parser().parse_args([*command, "--json"])
    assert arguments.command(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["replaced"] == "embedded"
    assert done["next"].startswith("PREFECT_API_URL=http://")


def test_mistakes_are_told_before_anything_is_deployed(prefect_server: None) -> None:
    with pytest.raises(ConfigError, match=r"'0 25 \* \* \*' is no cron.*Expected minute, hour"):
        deploy(experiment(), cron="0 25 * * *")
    with pytest.raises(ConfigError, match=r"'Europe/Berln'. Did you mean 'Europe/Berlin'"):
        deploy(experiment(), timezone="Europe/Berln")
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(EndpointError, match=r"127.0.0.1:9/api does not answer.*prefect server"),
    ):
        deploy(experiment())
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with pytest.raises(ConfigError, match=r"No Prefect server.*\$PREFECT_API_URL"):
            deploy(experiment())
        assert start_retrain(experiment()) is None


def test_an_experiment_on_battles_is_deployed_with_a_form_of_its_own(
    clean_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["deploy", "--config", "routellm_paper", "--pool", "deploy-test", "seed=9"]
    arguments = cli.parser().parse_args(command)
    assert arguments.command(arguments) == 0
    assert "deployment retrain/retrain of experiment routellm_paper" in capsys.readouterr().out
    wanted = load_experiment("routellm_paper", ("seed=9",))
    with server() as client:
        found = deployed(client)
        assert found is not None
        assert PreferenceExperiment.model_validate(found.parameters["experiment"]) == wanted
        bad = {"experiment": {**found.parameters["experiment"], "evaluation": {"replicates": 0}}}
        with pytest.raises(PrefectHTTPStatusError, match="replicates"):
            client.create_flow_run_from_deployment(found.id, parameters=bad)
    assert start_retrain(wanted) is not None
    # Deploying the other kind changes the form with it.
    assert deploy(experiment(), pool="deploy-test").replaced == "routellm_paper"
    assert start_retrain(experiment()) is not None


def test_drift_starts_the_deployment_of_the_same_experiment(
    clean_server: None, store_directory: Path
) -> None:
    settings = experiment(store=Store(directory=store_directory))
    assert start_retrain(settings) is None
    deploy(settings, pool="deploy-test")
    said = retrained(settings)
    assert said.startswith(f"Started {FULL_NAME} as flow run ")
    with get_client(sync_client=True) as client:
        (run,) = [run for run in client.read_flow_runs() if run.name in said]
        assert run.work_pool_name == "deploy-test"
        assert "drift" in run.tags
        # The next look at the log finds the same drift while the run still waits.
        again = retrained(settings)
        assert again.startswith(f"Flow run {run.name}, which drift has started before")
        assert len([run for run in client.read_flow_runs() if "drift" in run.tags]) == 1
        client.set_flow_run_state(run.id, Cancelled(), force=True)
    # When these queries have been learnt from, another run would find nothing new.
    queries = query_table(settings.queries)
    with tracking.parent_run(settings) as finished:
        snapshot = Warehouse(store_directory).write_snapshot("queries", queries)
        tracking.log_dataset(settings.store, finished, snapshot, name="queries")
    said = retrained(settings)
    assert said.startswith(f"Nothing new to learn from: run {finished[:8]} had exactly these")
    assert "queries.path" in said
    more = settings.model_copy(update={"queries": Queries(limit=151)})
    assert retrained(more).startswith(f"Started {FULL_NAME}")
    with pytest.raises(ConfigError, match=r"deployed for the experiment 'embedded'.*'other'"):
        retrained(more.model_copy(update={"name": "other"}))


def scripted(store: Path, urls: tuple[str, str]) -> Experiment:
    """Return an experiment whose strong LLM reads the answer in its prompt and repeats it."""
    templates = ("{text}", "{text} {context}")
    llms = [
        {"name": name, "model": name, "endpoint": {"url": url}, "template": template}
        for name, url, template in zip(("weak", "strong"), urls, templates, strict=True)
    ]
    settings = {
        "name": "scripted",
        "store": {"directory": store},
        "queries": {"source": "bundled", "limit": QUERIES},
        "llms": llms,
        "pairs": [{"weak": "weak", "strong": "strong"}],
        "generation": {"samples": SAMPLES},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [{"router": "knn"}],
        "evaluation": {"replicates": 200, "folds": 2},
    }
    return Experiment.model_validate(settings)


@pytest.mark.slow
def test_a_retried_run_asks_and_trains_nothing_again(
    store_directory: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The strong LLM refuses the key once: the run fails when the weak one has answered everything.
    # Then it fails when everything is trained and compared.
    broken = [OSError("the disk is full")]

    def judged(*arguments: Any) -> Any:
        if broken:
            raise broken.pop()
        return judge(*arguments)

    monkeypatch.setattr(pipeline, "judge", judged)
    with ScriptedLLM() as weak, ScriptedLLM(steps=[Step(status=401)]) as strong:
        settings = scripted(store_directory, (weak.url, strong.url))
        again = retrain.with_options(retries=2, retry_delay_seconds=0)
        state = again(settings, return_state=True)
        assert state.name == "Rejected"
        assert weak.answers() == strong.answers() == QUERIES * SAMPLES
        assert not broken
        # All three attempts are one run in MLflow, with one child for each router.
        runs = tracking.client(settings.store).search_runs([tracking.experiment_id(settings.store)])
        tags = [run.data.tags for run in runs]
        parents = [run for run in runs if tracking.PARENT_TAG not in run.data.tags]
        children = [own[tracking.ROUTER_TAG] for own in tags if tracking.PARENT_TAG in own]
        assert [run.info.status for run in parents] == ["FINISHED"]
        assert len(set(children)) == len(children) > 0
        trained = {
            path: path.stat().st_mtime_ns for path in (store_directory / "training").rglob("*.json")
        }
        assert trained
        # The next night, with nothing new: nothing is asked, nothing is trained.
        assert retrain(settings, return_state=True).name == "Rejected"
        assert weak.answers() == strong.answers() == QUERIES * SAMPLES
        assert trained == {path: path.stat().st_mtime_ns for path in trained}
        assert set(trained) == set((store_directory / "training").rglob("*.json"))
