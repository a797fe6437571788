"""Promotion: aliases move together, whatever dies when; and the story of a router's life.

Real stores throughout. The kills are real ones: a forked process is killed before each call by
which it changes the registry, and what it leaves is looked at and settled by another.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import demonstration
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.settings import PREFECT_API_URL

import flows.pipeline
from conf.errors import ArtifactError, ConfigError, StoreError
from conf.llms import Pair
from conf.load import load_experiment
from conf.routers import Random
from conf.schema import Experiment, Store
from flows.promote import promote as promote_flow
from flows.promote import registered_model
from flows.promote import rollback as rollback_flow
from flows.retrain import outcome, retrain
from router_models.controls import RandomRouter
from router_models.training_data import Comparisons
from tasks import gate, promotion, tracking
from tasks.judged_runs import receipts
from tasks.processes import this_process
from tasks.promotion import (
    NOTE,
    Aliases,
    OvertakenError,
    aliases,
    carry_out,
    promote,
    rollback,
    settle,
)
from tasks.receipt import Check, Receipt
from tasks.registry import CHALLENGER, ROLLED_BACK, ROOT, Version, challenge, rolled_back
from tasks.reporting import Leaderboard, PairReport, RunReport

MODEL = "small--large"


@pytest.fixture(scope="session")
def three_versions(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Path:
    """A store with three versions of a router, none of them champion; to be copied."""
    directory = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_mlflow_database, directory / "mlflow.db")
    battles = Comparisons.from_win_rates(["a"], np.array([0.5]), weak="small", strong="large")
    RandomRouter(Random()).fit(battles, seed=1).save(directory / "router")
    mlflow.pyfunc.save_model(
        directory / "model",
        python_model=ROOT / "serving" / "router_model.py",
        artifacts={"router": str(directory / "router")},
        code_paths=[str(ROOT / "conf"), str(ROOT / "router_models")],
        pip_requirements=["mlflow"],
    )
    client = tracking.client(Store(directory=directory))
    client.create_registered_model(MODEL)
    for verdict in ("passed", "passed", "rejected"):
        tags = {"gate": verdict, "gate.failed": "APGR above chance"}
        client.create_model_version(MODEL, str(directory / "model"), tags=tags)
    return directory


@pytest.fixture
def store(three_versions: Path, tmp_path: Path) -> Store:
    """A store of its own with three versions; the model's files are shared."""
    (tmp_path / "own").mkdir()
    shutil.copy(three_versions / "mlflow.db", tmp_path / "own" / "mlflow.db")
    return Store(directory=tmp_path / "own")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take every version for one that answers; a clean process for each would take minutes."""
    asked: list[str] = []
    monkeypatch.setattr(promotion, "smoke_test", lambda store, uri: asked.append(uri))
    return asked


def experiment(store: Store) -> Experiment:
    loaded = load_experiment(overrides=(f"store.directory={store.directory}",))
    pair = Pair(weak="small", strong="large")
    llms = [
        loaded.llms[0].model_copy(update={"name": "small"}),
        loaded.llms[1].model_copy(update={"name": "large"}),
    ]
    return loaded.model_copy(update={"pairs": (pair,), "llms": tuple(llms)})


def pending(store: Store) -> bool:
    return NOTE in MlflowClient(store.mlflow_uri()).get_registered_model(MODEL).tags


def test_a_promotion_moves_all_aliases_and_says_why(store: Store, answering: list[str]) -> None:
    assert promote(store, MODEL, "1", why="first") == Aliases(MODEL, champion="1")
    tracking.client(store).set_registered_model_alias(MODEL, CHALLENGER, "2")
    assert promote(store, MODEL, "2", why="better") == Aliases(MODEL, "2", "1", None)
    assert aliases(store, MODEL) == Aliases(MODEL, "2", "1", None)
    assert answering[-2:] == [f"models:/{MODEL}/2", f"models:/{MODEL}@champion"]
    tags = tracking.client(store).get_model_version(MODEL, "2").tags
    assert (tags["promotion.why"], tags["promotion.instead_of"]) == ("better", "1")
    assert not pending(store)


def test_promoting_the_champion_changes_nothing(store: Store, answering: list[str]) -> None:
    promote(store, MODEL, "1", why="first")
    promote(store, MODEL, "2", why="better")
    assert promote(store, MODEL, "2", why="again") == Aliases(MODEL, "2", "1")


def test_rollback_swaps_and_swaps_back(store: Store, answering: list[str]) -> None:
    promote(store, MODEL, "1", why="first")
    with pytest.raises(StoreError, match="champion 1 and previous None"):
        rollback(store, MODEL)
    promote(store, MODEL, "2", why="better")
    assert rollback(store, MODEL) == aliases(store, MODEL) == Aliases(MODEL, "1", "2")
    assert rollback(store, MODEL) == Aliases(MODEL, "2", "1")


def test_a_version_that_was_rolled_back_comes_back_by_force_only(
    store: Store, answering: list[str], prefect_server: None
) -> None:
    mine, client = experiment(store), tracking.client(store)
    promote(store, MODEL, "1", why="first")
    promote(store, MODEL, "2", why="better")
    rollback(store, MODEL, why="wrong answers")
    tag = client.get_model_version(MODEL, "2").tags[ROLLED_BACK]
    assert tag.endswith(": wrong answers")
    assert rolled_back(store, Version(MODEL, "2", "")) == tag
    assert rolled_back(store, Version(MODEL, "1", "")) is None
    # Nor does a version of the very same training come instead.
    for version in ("2", "3"):
        client.set_model_version_tag(MODEL, version, "training_digest", "abc")
    assert rolled_back(store, Version(MODEL, "3", "")) == tag
    assert not gate.not_rolled_back(tag).passed
    assert gate.not_rolled_back(None).passed
    with pytest.raises(ConfigError, match=r"Version 2 of small--large was rolled back .*wrong"):
        promote_flow(mine, "2")
    assert promote_flow(mine, "2", force="it was the network") == Aliases(MODEL, "2", "1")
    assert rolled_back(store, Version(MODEL, "2", "")) is None


def judged(store: Store, version: str, *, champion: str | None) -> tuple[Receipt, str]:
    """Return a receipt that passed, as the gate leaves it, and the run that it is about."""
    checks = (Check("latency within budget", "1 ms", "9 ms", passed=True),)
    receipt = Receipt(
        *(MODEL, version, "knn", "gold", "abc", 300), checks, champion=champion, pending=True
    )
    client = tracking.client(store)
    return receipt, client.create_run(tracking.experiment_id(store)).info.run_id


def carried_out(store: Store, version: str, *, champion: str | None) -> tuple[Receipt, Receipt]:
    """Carry a passed verdict out; return the receipt, and the one that MLflow shows."""
    receipt, run_id = judged(store, version, champion=champion)
    assert receipt.verdict() == "passed"
    receipt = carry_out.fn(store, Version(MODEL, version, run_id), receipt, run_id=run_id)
    (kept,) = receipts(store, [run_id])
    found = tracking.client(store).get_model_version(MODEL, version)
    assert found.tags["gate"] == ("passed" if receipt.passed() else "rejected")
    assert str(found.description).startswith(f"**{receipt.summary()}**")
    return receipt, kept


def test_a_verdict_is_carried_out_against_the_champion_it_is_about(
    store: Store, answering: list[str]
) -> None:
    told, shown = carried_out(store, "1", champion=None)
    assert told.verdict() == shown.verdict() == "promoted"
    promote(store, MODEL, "2", why="by hand, meanwhile")
    told, shown = carried_out(store, "3", champion="1")
    assert told.summary() == shown.summary() == "rejected: the champion changed meanwhile"
    assert told.next_steps()[0].startswith("Run again")
    assert aliases(store, MODEL) == Aliases(MODEL, "2", "1")
    assert not pending(store)


def test_what_does_not_answer_is_not_shown_as_promoted(
    store: Store, answering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, MODEL, "1", why="first")

    def fails(store: Store, uri: str) -> None:
        raise ArtifactError(f"{uri} is broken")

    monkeypatch.setattr(promotion, "smoke_test", fails)
    told, shown = carried_out(store, "2", champion="1")
    assert told.summary() == shown.summary() == "rejected: fails its smoke test"
    assert aliases(store, MODEL) == Aliases(MODEL, "1")


def test_a_champion_that_came_during_the_smoke_test_is_not_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = False

    def meanwhile(store: Store, uri: str) -> None:
        if uri.endswith("/2"):
            promote(store, MODEL, "3", why="another process")
        if fails and uri.endswith("@champion") and aliases(store, MODEL).champion == "2":
            raise ArtifactError("it is broken")

    monkeypatch.setattr(promotion, "smoke_test", meanwhile)
    promote(store, MODEL, "1", why="first")
    assert promote(store, MODEL, "2", why="better") == Aliases(MODEL, "2", "3")
    promote(store, MODEL, "1", why="again")
    fails = True
    with pytest.raises(ArtifactError, match="it is broken"):
        promote(store, MODEL, "2", why="better")
    assert aliases(store, MODEL).champion == "3"


def test_in_a_local_store_promotions_wait_for_each_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[bool] = []

    def smoke_test(store: Store, uri: str) -> None:
        with open(store.directory / "promotion.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)

    monkeypatch.setattr(promotion, "smoke_test", smoke_test)
    promote(store, MODEL, "1", why="first")
    assert free == [True, False]  # before anything is written, and while aliases move


def test_another_process_note_is_left_alone(
    store: Store, answering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server there is no lock: another one's note may come right after this one's."""
    promote(store, MODEL, "1", why="first")
    before = aliases(store, MODEL)
    other = promotion.Note(before, before.promoted("3"), "other", process="elsewhere").to_json()
    write = MlflowClient.set_registered_model_tag

    def overwritten(self: MlflowClient, name: str, key: str, value: str) -> None:
        write(self, name, key, value)
        write(self, name, key, other)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_tag", overwritten)
        with pytest.raises(OvertakenError, match="Somebody else is moving"):
            promote(store, MODEL, "2", why="better")
    assert aliases(store, MODEL) == before
    assert tracking.client(store).get_registered_model(MODEL).tags[NOTE] == other


def test_a_champion_that_is_gone_is_not_no_champion_yet(store: Store, answering: list[str]) -> None:
    def against_nothing() -> Check:
        nothing: Any = None  # neither queries nor settings are looked at
        version = Version(MODEL, "3", "")
        found = challenge(store, version, None, nothing, nothing, 1, training=nothing)
        return found.check

    assert against_nothing().passed
    promote(store, MODEL, "1", why="first")
    promote(store, MODEL, "2", why="better")
    tracking.client(store).delete_model_version(MODEL, "2")
    assert aliases(store, MODEL) == Aliases(MODEL, None, "1")
    assert not against_nothing().passed
    assert against_nothing().complaint == "the champion is gone"
    assert aliases(store, MODEL).promoted("1") == Aliases(MODEL, "1")
    assert rollback(store, MODEL) == Aliases(MODEL, "1")
    tracking.client(store).delete_registered_model_alias(MODEL, "champion")
    assert not against_nothing().passed  # by the tag of version 1
    assert promote(store, MODEL, "1", why="by hand") == Aliases(MODEL, "1")


def left_note(store: Store, version: str, *, process: str, minutes_ago: int = 0) -> None:
    """Leave the note of a promotion that is under way, or was."""
    before = aliases(store, MODEL)
    at = (datetime.now(UTC) - timedelta(minutes=minutes_ago)).isoformat(timespec="seconds")
    note = promotion.Note(before, before.promoted(version), "better", process=process, at=at)
    tracking.client(store).set_registered_model_tag(MODEL, NOTE, note.to_json())


def test_what_was_repaired_by_hand_stays(
    store: Store, answering: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    promote(store, MODEL, "1", why="first")
    left_note(store, "2", process=this_process())
    tracking.client(store).set_registered_model_alias(MODEL, "champion", "3")
    assert settle(store, MODEL) == "dropped"
    assert "somebody has set it to 3" in caplog.text
    assert aliases(store, MODEL) == Aliases(MODEL, "3")
    assert not pending(store)


def test_a_note_from_elsewhere_is_abandoned_after_an_hour(
    store: Store, answering: list[str]
) -> None:
    promote(store, MODEL, "1", why="first")
    left_note(store, "2", process="container 7 boot pid 123", minutes_ago=50)
    with pytest.raises(OvertakenError, match="Version 2 of small--large is being made"):
        settle(store, MODEL)
    left_note(store, "2", process="container 7 boot pid 123", minutes_ago=70)
    assert settle(store, MODEL) == "undone"
    assert not pending(store)


def test_a_promotion_under_way_stops_a_run_before_it_asks(
    tmp_path: Path, store: Store, prefect_server: None
) -> None:
    left_note(store, "2", process="container 7 boot pid 123")
    nowhere = "http://127.0.0.1:9/v1"  # whoever asked there would fail in another way
    demonstration.prepare(tmp_path, (nowhere, nowhere))
    with pytest.raises(OvertakenError, match="Version 2 of small--large is being made"):
        demonstration.taken(
            demonstration.STEPS[0], tmp_path, (f"store.directory={store.directory}",)
        )


def test_a_version_that_fails_before_moves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: Store, uri: str) -> None:
        raise ArtifactError(f"{uri} is broken")

    monkeypatch.setattr(promotion, "smoke_test", fails)
    with pytest.raises(ArtifactError, match="/1 is broken"):
        promote(store, MODEL, "1", why="first")
    assert aliases(store, MODEL) == Aliases(MODEL)


def test_a_champion_that_fails_after_is_undone(
    store: Store, answering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, MODEL, "1", why="first")
    promote(store, MODEL, "2", why="better")
    tracking.client(store).set_registered_model_alias(MODEL, CHALLENGER, "3")
    before = aliases(store, MODEL)

    def fails(store: Store, uri: str) -> None:
        if uri.endswith("@champion"):
            raise ArtifactError(f"{uri} is broken")

    monkeypatch.setattr(promotion, "smoke_test", fails)
    with pytest.raises(ArtifactError, match="@champion is broken"):
        promote(store, MODEL, "3", why="better")
    assert aliases(store, MODEL) == before == Aliases(MODEL, "2", "1", "3")
    assert not pending(store)


def test_one_promotion_at_a_time(store: Store, answering: list[str]) -> None:
    promote(store, MODEL, "1", why="first")
    says = "from tasks.processes import this_process as p; print(p(), flush=True); input()"
    command = [sys.executable, "-c", says]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        process = other.stdout.readline().strip()
        before = aliases(store, MODEL)
        note = promotion.Note(before, before.promoted("2"), "better", process=process)
        tracking.client(store).set_registered_model_tag(MODEL, NOTE, note.to_json())
        with pytest.raises(StoreError, match="Version 2 of small--large is being made"):
            promote(store, MODEL, "3", why="better")
        other.kill()
    assert promote(store, MODEL, "3", why="better") == Aliases(MODEL, "3", "1")


def test_the_smoke_test_loads_and_asks_in_a_clean_process(store: Store) -> None:
    assert promote(store, MODEL, "1", why="first").champion == "1"
    tracking.client(store).create_model_version(MODEL, str(store.directory / "nothing"))
    with pytest.raises(ArtifactError, match=f"models:/{MODEL}/4 does not load"):
        promote(store, MODEL, "4", why="better")
    assert aliases(store, MODEL) == Aliases(MODEL, champion="1")


KILLED = '''
import json, os, signal, sys
from pathlib import Path
import mlflow
from conf.schema import Store
from tasks import promotion
from tasks.registry import champion

promotion.smoke_test = lambda store, uri: None
CALLS = [
    "set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias",
    "set_model_version_tag", "delete_model_version_tag", "delete_registered_model_tag",
]
template, work, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def act(store):
    if action == "promote":
        promotion.promote(store, "small--large", "3", why="better")
    else:
        promotion.rollback(store, "small--large")

def dies_at(call):
    """Kill this process before the given change of the registry, counted over all of them.

    Reads change nothing, so that is as good as after the change before it.
    """
    done = iter(range(10**6))
    def dying(method):
        def wrapped(*args, **kwargs):
            if next(done) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)
        return wrapped
    for name in CALLS:
        setattr(mlflow.MlflowClient, name, dying(getattr(mlflow.MlflowClient, name)))

def in_a_process(run):
    """Return how a process of its own that does ``run`` ended, and what that returned."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writes, json.dumps(run()).encode())
        os._exit(0)
    os.close(writes)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reads) as answer:
        text = answer.read()
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None

def look(store):
    found = promotion.aliases(store, "small--large")
    return [found.champion, found.previous, found.challenger]

# The first use of MLflow is slow. Its connection is to a file that nobody else uses.
(work / "warm").mkdir()
(work / "warm" / "mlflow.db").write_bytes((template / "mlflow.db").read_bytes())
look(Store(directory=work / "warm"))

def copied(template, directory):
    directory.mkdir()
    (directory / "mlflow.db").write_bytes((template / "mlflow.db").read_bytes())
    return Store(directory=directory)

def continued(store):
    """Return what the next process finds, and what it and the one after it do."""
    def goes_on():
        left = look(store)
        settled = promotion.settle(store, "small--large")
        between = look(store)
        if between[0] != ("3" if action == "promote" else "1"):
            act(store)
        return [left, settled, between, look(store), promotion.settle(store, "small--large")]

    code, result = in_a_process(goes_on)
    assert code == 0, code
    return result

def killed_at_each(run, template, work):
    """Yield a copy of the store for each change at which ``run`` was killed, until it is not."""
    call, ended = 0, -9
    while True:
        store = copied(template, work / str(call))

        def killed():
            dies_at(call)
            run(store)

        ended, _ = in_a_process(killed)
        if ended != -9:
            assert ended == 0, ended
            return
        yield call, store
        call += 1

seen, settling = [], []
for call, store in killed_at_each(act, template, work):
    if call in (2, 3):  # just before the champion moves, and just after
        folder = work / f"settling-{call}"
        folder.mkdir()
        settle = lambda store: promotion.settle(store, "small--large")
        found = killed_at_each(settle, store.directory, folder)
        settling += [continued(again) for _, again in found]
    seen.append(continued(store))
print(json.dumps({"seen": seen, "settling": settling}))
'''


@pytest.mark.parametrize(
    ("action", "before", "after", "calls"),
    [
        ("promote", ["2", "1", "3"], ["3", "2", None], 8),
        ("rollback", ["2", "1", "3"], ["1", "2", "3"], 8),
    ],
)
def test_killed_at_every_step_one_champion_remains_and_the_next_run_goes_on(
    store: Store,
    answering: list[str],
    tmp_path: Path,
    action: str,
    before: list[str],
    after: list[str | None],
    calls: int,
) -> None:
    promote(store, MODEL, "1", why="first")
    promote(store, MODEL, "2", why="better")
    tracking.client(store).set_registered_model_alias(MODEL, CHALLENGER, "3")
    (tmp_path / "work").mkdir()
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(store.directory), str(tmp_path / "work"), action],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found["seen"]) == calls
    assert {settled for _, settled, *_ in found["seen"]} == {"nothing", "undone", "finished"}
    # Killed once more, while it was being settled.
    assert {settled for _, settled, *_ in found["settling"]} == {"undone", "finished"}
    for left, settled, between, in_the_end, again in [*found["seen"], *found["settling"]]:
        assert left[0] in (before[0], after[0])
        assert between == (after if left[0] == after[0] else before), settled
        assert in_the_end == after
        assert again == "nothing"


KILLED_WITH_THE_CHAMPION_MOVED = """
import os, signal, sys
import mlflow
from conf.schema import Store
from tasks import promotion

move = mlflow.MlflowClient.set_registered_model_alias

def killed(self, name, alias, version):
    move(self, name, alias, version)
    if alias == "champion":
        os.kill(os.getpid(), signal.SIGKILL)

mlflow.MlflowClient.set_registered_model_alias = killed
promotion.promote(Store(directory=sys.argv[1]), "small--large", "4", why="better")
"""


@pytest.mark.slow
def test_after_a_kill_the_champion_is_one_that_loads(
    store: Store, three_versions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smoke test is the real one, in clean processes."""
    with monkeypatch.context() as quick:
        quick.setattr(promotion, "smoke_test", lambda store, uri: None)
        promote(store, MODEL, "1", why="first")
    own = store.directory / "version-4"
    shutil.copytree(three_versions / "model", own)
    tracking.client(store).create_model_version(MODEL, str(own))
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WITH_THE_CHAMPION_MOVED, str(store.directory)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert aliases(store, MODEL) == Aliases(MODEL, "4", "1")
    promotion.smoke_test(store, f"models:/{MODEL}@champion")
    # By the next run its files have gone: what loads is the champion again.
    shutil.rmtree(own)
    assert settle(store, MODEL) == "undone"
    assert aliases(store, MODEL) == Aliases(MODEL, "1")
    promotion.smoke_test(store, f"models:/{MODEL}@champion")


KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
import demonstration
import flows.pipeline
from tasks import promotion

def dies(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(flows.pipeline, sys.argv[1], dies)
demonstration.taken(demonstration.STEPS[0], Path(sys.argv[2]), sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_it_is_judged_or_promoted_the_next_run_goes_on(
    tmp_path: Path, store_directory: Path, answering: list[str], prefect_server: None
) -> None:
    quicker = (
        f"store.directory={store_directory}",
        "routers=[{router: knn}]",
        "evaluation.replicates=200",
        "gate.max_latency_ms=5000",
    )
    store = Store(directory=store_directory)
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    own = {"PYTHONPATH": path, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    verdicts = []
    with demonstration.scripted_pair() as urls:
        demonstration.prepare(tmp_path, urls)
        for step in ("judge", "carry_out"):
            done = subprocess.run(
                [sys.executable, "-c", KILLED_BETWEEN, step, str(tmp_path), *quicker],
                env=os.environ | own,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
            assert aliases(store, MODEL) == Aliases(MODEL)
            found = tracking.client(store).get_model_version(MODEL, "1")
            verdicts.append((found.tags.get("gate"), (found.description or "")[:10]))
        receipt, now = demonstration.taken(demonstration.STEPS[0], tmp_path, quicker)
    assert verdicts == [(None, ""), ("passed", "**passed**")]
    assert receipt is not None
    assert (receipt.version, receipt.verdict()) == ("1", "promoted")
    assert now == Aliases(MODEL, "1")


def test_by_hand_needs_a_passed_gate_or_a_reason(
    store: Store, answering: list[str], prefect_server: None
) -> None:
    mine = experiment(store)
    assert promote_flow(mine, "1").champion == "1"
    with pytest.raises(ConfigError, match="rejected for: APGR above chance"):
        promote_flow(mine, "3")
    with pytest.raises(ConfigError, match="reason for --force is empty"):
        promote_flow(mine, "3", force=" ")
    with pytest.raises(ConfigError, match=r"Unknown version '30'\. Did you mean '3'"):
        promote_flow(mine, "30")
    assert promote_flow(mine, "3", force="the test set is old") == Aliases(MODEL, "3", "1")
    tags = tracking.client(store).get_model_version(MODEL, "3").tags
    assert tags["promotion.why"] == "forced (rejected by the gate): the test set is old"
    assert rollback_flow(mine) == Aliases(MODEL, "1", "3")


def test_the_pair_is_named_where_there_are_several(store: Store) -> None:
    mine = experiment(store)
    two = mine.model_copy(update={"pairs": (*mine.pairs, Pair(weak="large", strong="small"))})
    assert registered_model(mine, None) == registered_model(two, MODEL) == MODEL
    with pytest.raises(ConfigError, match="has 2 registered models: small--large, large--small"):
        registered_model(two, None)
    with pytest.raises(ConfigError, match="Did you mean 'small--large'"):
        registered_model(two, "small-large")


def test_a_retrained_state_says_what_came_of_it(
    store: Store, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = RunReport("run", Leaderboard("gold", (), {}), (paired("1", passed=True),))
    state = outcome(report)
    assert (state.name, state.is_completed()) == ("Promoted", True)
    assert state.message == "small--large version 1: promoted"
    report = RunReport("run", Leaderboard("gold", (), {}), (paired("2", passed=False),))
    state = outcome(report)
    assert (state.name, state.is_completed()) == ("Rejected", True)
    assert state.message == "small--large version 2: rejected: too slow"
    monkeypatch.setattr(flows.pipeline, "pipeline", flow(name="done")(lambda experiment: report))
    assert retrain(experiment(store)) == report


def paired(version: str, *, passed: bool) -> PairReport:
    checks = (Check("latency within budget", "1 ms", "9 ms", passed, complaint="too slow"),)
    receipt = Receipt(MODEL, version, "knn", "gold", "abc", 300, checks)
    return PairReport(
        pair=Pair(weak="small", strong="large"),
        t=0.0,
        degenerate=False,
        queries=300,
        unlabelled=0,
        out_of_fold=False,
        metric="gold",
        best="knn",
        estimates={},
        gap={},
        receipt=receipt,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_life_of_a_router(
    tmp_path: Path, store_directory: Path, answering: list[str], prefect_server: None
) -> None:
    """Promoted; the same again, rejected; with a leak, rejected; better, promoted; rolled back."""
    quicker = (
        f"store.directory={store_directory}",  # MLflow's database is there already
        "routers=[{router: knn}]",
        "evaluation.replicates=200",
        "gate.max_latency_ms=5000",  # other tests may keep the machine busy
    )
    with demonstration.scripted_pair() as urls:
        demonstration.prepare(tmp_path, urls)
        chapters = [*demonstration.story(tmp_path, *quicker)]
    for number, chapter in enumerate(chapters, start=1):
        assert not chapter.departures(), demonstration.chapter_page(chapter, number)
    first, again, leaked, better, night = (one.receipt for one in chapters if one.receipt)
    # What looks like the best version of all is the one with the leak.
    assert again.version == first.version == "1"
    assert leaked.arms["candidate"] > better.arms["candidate"] > first.arms["candidate"]

    client = tracking.client(Store(directory=store_directory))
    assert client.get_model_version(MODEL, "1").tags["gate"] == "passed"
    # What was promoted once keeps its evidence, whatever a later night says of it.
    assert night.version == better.version
    kept = client.get_model_version(MODEL, better.version)
    assert (kept.tags["gate"], str(kept.description)[:12]) == ("passed", "**promoted**")
    tags = client.get_model_version(MODEL, better.version).tags
    assert {
        "config_digest",
        "data_digest",
        "git_revision",
        "test_digest",
        "promotion.at",
    } <= tags.keys()
    run_id = str(client.get_model_version(MODEL, better.version).run_id)
    logged = {item.path for item in client.list_artifacts(run_id, "gate")}
    assert logged == {"gate/receipt.json", "gate/receipt.md", "gate/comparison.png"}
