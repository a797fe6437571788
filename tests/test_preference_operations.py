"""Every operating command after runs of a preference experiment, through the command line's own
functions, on a real store: promote, retrain, rollback, calibrate, compare, drift, tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_hybrid import save_tiny_encoder
from test_routellm_paper import (
    EXPERIMENTS,
    answers,
    arena_file,
    drawn,
    own_datasets_cache,
)

from conf.errors import ConfigError, StoreError
from conf.load import load_experiment
from conf.schema import PreferenceExperiment
from flows import cli
from flows.retrain import receipts_of, retrain
from tasks import promotion, tracking

__all__ = ["own_datasets_cache"]  # a fixture, used by its name


def written(folder: Path, store: Path) -> Path:
    """Write an experiment on tiny files of the real schemas, with quick routers."""
    mmlu = answers(folder / "mmlu", "mmlu")
    answers(folder / "validation", "gold")
    arena = arena_file(folder / "arena.jsonl", also=mmlu[0])
    encoder = str(save_tiny_encoder(folder / "encoder"))
    settings = yaml.safe_load((EXPERIMENTS / "routellm_paper.yaml").read_text())
    settings |= {
        "name": "tiny",
        "store": {"directory": str(store)},
        "benchmarks": [{"name": "mmlu", "directory": str(folder / "mmlu")}],
        "routers": [
            {"router": "mf", "name": "mf", "encoder": encoder, "trainer": {"max_epochs": 2}},
            {"router": "sw_ranking", "name": "sw-ranking", "encoder": encoder},
            {"router": "knn", "name": "knn", "encoder": encoder},
        ],
        "evaluation": {"replicates": 100},
        "gate": {"min_apgr": 1},  # nothing passes: what is promoted is promoted by hand
    }
    settings["preferences"]["sources"] = [
        {"kind": "arena", "path": str(arena)},
        {"kind": "gold", "path": str(folder / "validation")},
    ]
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


class Turnout:
    """The command line on one experiment's file."""

    def __init__(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config, self.capsys = config, capsys

    def __call__(self, *words: str) -> Any:
        """Return the JSON that a command prints."""
        self.capsys.readouterr()
        arguments = cli.parsed([*words, "--config", str(self.config), "--json"])
        assert arguments.command(arguments) == 0
        return json.loads(self.capsys.readouterr().out)

    def said(self, *words: str) -> str:
        """Return what a command prints for people."""
        self.capsys.readouterr()
        arguments = cli.parsed([*words, "--config", str(self.config)])
        assert arguments.command(arguments) == 0
        return self.capsys.readouterr().out


@pytest.fixture
def turnout(tmp_path: Path, store_directory: Path, capsys: pytest.CaptureFixture[str]) -> Turnout:
    return Turnout(written(tmp_path, store_directory), capsys)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_a_router_that_learnt_from_battles_is_operated_like_any_other(
    turnout: Turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: None
) -> None:
    # The gate and the drift test ask versions in clean processes; six more would take a minute.
    monkeypatch.setattr(promotion, "smoke_test", lambda store, uri: None)
    experiment = load_experiment(turnout.config)
    assert isinstance(experiment, PreferenceExperiment)
    store, model = experiment.store, experiment.pair.name()
    with pytest.raises(StoreError, match=r"has no version|no finished run"):
        turnout("calibrate", "--router", "knn", "--strong-share", "30%")

    # A run whose best router the gate rejects: only a reason makes it the champion.
    first = turnout("run")
    assert first["receipt"]["verdict"] == "rejected"
    version = first["receipt"]["version"]
    with pytest.raises(ConfigError, match=r"is rejected for: .*--force REASON"):
        turnout("promote", version)
    assert turnout("promote", version, "--force", "a trial")["champion"] == version
    with pytest.raises(StoreError, match="Expected two different versions to swap"):
        turnout("rollback")

    # Another seed, as a worker runs it: from the parameters that a deployment keeps.
    parameters = experiment.model_copy(update={"seed": 8}).model_dump(mode="json", round_trip=True)
    state = retrain(parameters, return_state=True)
    assert state.name == "Rejected"
    report = state.result()
    (receipt,) = receipts_of(report)
    newer = receipt.version
    assert (newer, receipt.champion) == ("2", version)
    assert turnout("promote", newer, "--force", "newer")["previous"] == version
    assert turnout("rollback") == {
        "model": model, "champion": version, "previous": newer, "challenger": None,
    }  # fmt: skip

    # Calibration: a router of the last run, and the champion, whose run is an earlier one.
    found = turnout("calibrate", "--router", "knn", "--strong-share", "30%")
    assert (found["metric"], found["queries"]) == ("correct", 70)
    assert found["strong_share"] <= 0.3
    found = turnout("calibrate", "--router", "champion", "--max-drop", "0.4", "--confidence", "0.8")
    assert (found["model_version"], found["max_drop"]) == (version, 0.4)
    assert 0 < found["strong_share"] < 1
    tags = tracking.client(store).get_model_version(model, version).tags
    assert tags["threshold"] == str(found["threshold"])

    # Comparison of the last run with the champion's.
    compared = turnout("compare")
    assert len(compared["runs"]) == 2
    assert "★" in turnout.said("compare", "--report", str(tmp_path / "report.html"))

    # A router that was never registered is found by its training's digest, and a file's queries
    # that it has learnt from are left out.
    judged = {first["receipt"]["router"], receipt.router}
    other = next(router.name for router in experiment.routers if router.name not in judged)
    asked = [
        {"prompt": record["text"], "weak_quality": row % 3 > 0, "strong_quality": True}
        for row, record in enumerate([*drawn("gold")[:5], *drawn("gsm8k")])
    ]
    words = ("--max-drop", "0.5", "--confidence", "0.8")
    data = jsonl(tmp_path / "asked.jsonl", asked)
    found = turnout("calibrate", "--router", other, *words, "--data", data)
    assert (found["model_version"], found["queries"], found["left_out"]) == (None, 40, 5)

    # Drift: the queries themselves are none, others are and retrain.
    like = jsonl(tmp_path / "like.jsonl", [{"prompt": one["text"]} for one in drawn("mmlu")])
    drift = turnout("drift", "--queries", like)
    assert (drift["model_version"], drift["verdict"]) == (version, "too few queries")
    monkeypatch.setattr("flows.preference_pipeline.preference_pipeline", lambda given: report)
    monkeypatch.setattr("flows.retrain._report", lambda given, max_hours: report)
    others = [{"prompt": f"Sing me verse {number} of the song!"} for number in range(60)]
    words = ("--queries", jsonl(tmp_path / "others.jsonl", others), "--router", other)
    drift = turnout("drift", *words, "--retrain")
    assert drift["verdict"] == "drift"
    assert drift["retrain"] == f"Retrained here. {receipt.summary()}"

    # The warehouse: what runs and versions refer to stays, which includes all trainings.
    assert "preferences" in json.dumps(turnout("tables"))
    pruned = turnout("tables", "--prune", "--dry-run", "--keep-days", "0")
    assert {one["what"]: one["count"] for one in pruned["freed"]}["orphaned trainings"] == 0
