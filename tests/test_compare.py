"""`turnout compare`: routers of several runs on their shared queries, from what MLflow keeps."""

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pytest
from logged_runs import PAIR, LoggedRun, experiment, log_run, make_champion, queries, rates
from mlflow import MlflowClient

from conf.errors import ArtifactError, ConfigError, DataError, StoreError
from conf.schema import Experiment, Store
from flows import cli
from flows.compare import compare, compare_url
from router_models.statistics import bootstrap_metrics
from tasks import tracking
from tasks.judged_runs import judged_run, named_run
from tasks.run_comparison import compare_run_with_champion, compared

TABLE = queries(120)
HALF = np.full(120, 0.5)


@pytest.fixture
def settings(store_directory: Path) -> Experiment:
    return experiment(store_directory)


@pytest.fixture
def older(settings: Experiment, tmp_path: Path) -> LoggedRun:
    """A run whose mf is the champion."""
    named = settings.model_copy(update={"name": "older"})
    routers = {
        "mf": rates(TABLE, 0.3, seed=1),
        "knn": rates(TABLE, 0.6, seed=2),
        "random": rates(TABLE, 1.0, seed=3),
        "oracle": rates(TABLE, 0.0, seed=0),
    }
    run = log_run(named, TABLE, routers)
    make_champion(settings, run.routers["mf"], tmp_path)
    return run


@pytest.fixture
def newer(settings: Experiment, older: LoggedRun) -> LoggedRun:
    """A run whose mf is new and whose other routers are as they were."""
    routers = {
        "mf": rates(TABLE, 0.8, seed=4),
        "knn": rates(TABLE, 0.6, seed=2),
        "random": rates(TABLE, 1.0, seed=3),
        "oracle": rates(TABLE, 0.0, seed=0),
    }
    return log_run(settings, TABLE, routers)


def test_by_default_the_last_run_and_the_champions_are_compared(
    settings: Experiment, older: LoggedRun, newer: LoggedRun
) -> None:
    found = compare(settings)
    assert [run.run_id for run in found.runs.values()] == [newer.run_id, older.run_id]
    # What both runs have alike stands there once; references come last.
    assert [one.name for one in found.contenders] == ["mf B", "knn", "mf A", "oracle", "random"]
    knn = found.contenders[1]
    assert (knn.runs, knn.run_ids) == ("AB", (newer.routers["knn"], older.routers["knn"]))
    champion = found.champion()
    assert champion is not None
    assert champion.name == "mf B"
    assert found.notes == ()
    assert found.test_digest == compare(settings, ["older"]).test_digest


def test_differences_are_the_paired_ones(
    settings: Experiment, older: LoggedRun, newer: LoggedRun
) -> None:
    found = compare(settings)
    win_rates = {one.name: one.win_rate for one in found.contenders} | {"coin": HALF}
    weak, strong = TABLE["weak_quality"].to_numpy(), TABLE["strong_quality"].to_numpy()
    bootstrap = bootstrap_metrics(win_rates, weak, strong, replicates=200, seed=settings.seed)
    level = settings.evaluation.confidence
    for baseline, name in {"champion": "mf B", "random": "coin", "kNN": "knn"}.items():
        assert found.against[baseline] == {
            one.name: bootstrap.difference(one.name, name, "apgr", level=level)
            for one in found.contenders
            if one.name != name
        }
    assert found.estimates["knn"] == bootstrap.estimates("knn", level=level)


def test_different_queries_are_compared_on_the_shared_ones(
    settings: Experiment, older: LoggedRun
) -> None:
    other = queries(120, first=70, seed=5)
    run = log_run(settings, other, {"mf": rates(other, 0.5, seed=1)})
    found = compare(settings, [run.run_id[:12], "older"])
    assert len(found.weak) == 50
    assert "Compared are the 50 that all of them share" in found.notes[0]
    # The same queries were answered anew: run A's qualities judge all.
    assert "50 queries were answered or scored differently in run B" in found.notes[1]
    np.testing.assert_array_equal(found.weak, other["weak_quality"].to_numpy()[:50])


def test_runs_that_cannot_be_compared_are_refused(settings: Experiment, older: LoggedRun) -> None:
    far = queries(20, first=500)
    run = log_run(settings, far, {"mf": rates(far, 0.5, seed=1)})
    with pytest.raises(DataError, match=r"shares no query with run .* Expected some"):
        compare(settings, [run.run_id, "older"])
    judged = judged_run(settings.store, older.run_id)
    with pytest.raises(DataError, match=r"different quality metrics: .* by gold"):
        compared(
            settings.store,
            [judged, replace(judged, metric="gold")],
            evaluation=settings.evaluation,
            seed=0,
        )


def test_a_run_is_found_by_name_id_or_router(settings: Experiment, older: LoggedRun) -> None:
    store = settings.store
    assert named_run(store, "older") == older.run_id
    assert named_run(store, older.run_id[:10].upper()) == older.run_id
    assert named_run(store, older.routers["knn"]) == older.run_id
    with pytest.raises(ConfigError, match=r"run.*'nobody'.* beginning of its id"):
        named_run(store, "nobody")
    log_run(settings, TABLE, {"mf": HALF})
    with pytest.raises(ConfigError, match="ids that begin with ''"):
        named_run(store, "")


def test_of_several_pairs_one_is_named(settings: Experiment) -> None:
    run = log_run(settings, TABLE, {"mf": HALF}, pairs=(PAIR.name(), "small--huge"))
    with pytest.raises(ConfigError, match="Choose it with --pair"):
        compare(settings, [run.run_id])
    assert compare(settings, [run.run_id], pair="small--huge").pair.strong == "huge"
    with pytest.raises(ConfigError, match="small--hugh"):
        compare(settings, [run.run_id], pair="small--hugh")


def test_a_run_without_win_rates_says_so(settings: Experiment, tmp_path: Path) -> None:
    with tracking.parent_run(settings) as parent:
        pass
    with pytest.raises(ArtifactError, match="No router was trained"):
        compare(settings, [parent])
    with pytest.raises(StoreError, match="no finished run"):
        compare(experiment(tmp_path / "empty"))


def test_without_a_champion_chance_is_the_baseline(settings: Experiment) -> None:
    log_run(settings, TABLE, {"mf": rates(TABLE, 0.2, seed=1)}, labels=False)
    found = compare(settings)
    assert (found.champion(), found.main_baseline()) == (None, "random")
    assert found.against["random"]["mf"].value == pytest.approx(
        found.estimates["mf"]["apgr"].value - 0.5
    )
    assert "no champion yet" in found.notes[0]
    assert found.contenders[0].observed is None


def test_a_pipelines_report_takes_the_champion_along_where_it_is_fair(
    settings: Experiment, older: LoggedRun, newer: LoggedRun, tmp_path: Path
) -> None:
    options = {"evaluation": settings.evaluation, "seed": 0}
    found = compare_run_with_champion(settings.store, newer.run_id, PAIR.name(), **options)  # type: ignore[arg-type]
    assert [one.name for one in found.contenders] == ["mf B", "knn", "mf A", "oracle", "random"]
    assert set(found.runs["B"].routers) == {"mf"}
    wider = queries(130)
    run = log_run(settings, wider, {"mf": rates(wider, 0.5, seed=1)})
    alone = compare_run_with_champion(settings.store, run.run_id, PAIR.name(), **options)  # type: ignore[arg-type]
    assert (len(alone.weak), [one.name for one in alone.contenders]) == (130, ["mf"])
    assert "did not judge it on all these queries" in alone.notes[-1]


def test_money_saved_has_its_interval(settings: Experiment, older: LoggedRun) -> None:
    found = compare(settings, ["older"])
    weak, strong = TABLE["weak_cost_usd"].to_numpy(), TABLE["strong_cost_usd"].to_numpy()
    rate = rates(TABLE, 0.3, seed=1)
    cheapest = np.argsort(rate)[:24]  # 20 % of 120 queries
    saved = found.saved["mf"]["saved_usd_per_1000_at_20"]
    assert saved.value == pytest.approx(1000 * (strong - weak)[cheapest].sum() / 120)
    assert saved.interval.low < saved.value < saved.interval.high


def test_the_address_of_mlflows_comparison(settings: Experiment, older: LoggedRun) -> None:
    found = compare(settings)
    address = urlsplit(compare_url(settings, found)).fragment
    assert address.startswith("/compare-runs?")
    query = parse_qs(urlsplit(address).query)
    assert set(json.loads(query["runs"][0])) == set(older.routers.values())
    assert json.loads(query["experiments"][0]) == [tracking.experiment_id(settings.store)]
    served = Store(directory=settings.store.directory, tracking_uri=settings.store.mlflow_uri())
    assert '?runs=["a"]&experiments=["1"]&' in unquote(tracking.compare_url(served, ["a"]))


def test_the_command_prints_one_table_or_one_object(
    settings: Experiment,
    older: LoggedRun,
    newer: LoggedRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = [f"store.directory={settings.store.directory}", "evaluation.replicates=100"]
    report = tmp_path / "report.html"
    arguments = cli.parser().parse_args(
        ["compare", "--open", "--report", str(report), "older", "tiny", *words]
    )
    assert arguments.command(arguments) == 0
    page = capsys.readouterr().out
    assert "mf ★" in page
    assert "…" not in page
    assert "/#/compare-runs?runs=" in page
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")
    arguments = cli.parser().parse_args(["compare", "--json", *words])
    assert arguments.command(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["champion"] == "mf B"
    assert found["routers"]["knn"]["runs"] == ["A", "B"]
    assert set(found["routers"]["knn"]["apgr_against"]) == {"champion", "random"}
    assert found["routers"]["knn"]["saved_usd_per_1000_at_20"]["value"] > 0


def test_the_champions_mark_moves(settings: Experiment, older: LoggedRun) -> None:
    store, client = settings.store, MlflowClient(settings.store.mlflow_uri())

    def marked() -> dict[str, str]:
        runs = client.search_runs([tracking.experiment_id(store)])
        return {
            run.info.run_id: run.data.tags[tracking.CHAMPION_TAG]
            for run in runs
            if tracking.CHAMPION_TAG in run.data.tags
        }

    mf, knn = older.routers["mf"], older.routers["knn"]
    tracking.mark_champion(store, PAIR.name(), mf)
    tracking.mark_champion(store, "other--pair", knn)
    tracking.mark_champion(store, PAIR.name(), older.routers["random"])
    assert marked() == {older.routers["random"]: "★ small--large", knn: "★ other--pair"}
    client.delete_run(mf)
    tracking.mark_champion(store, PAIR.name(), mf)  # its run is gone: nothing to mark, no error
    tracking.mark_champion(store, "other--pair", None)
    assert marked() == {}


def test_the_experiment_and_the_model_describe_themselves(
    settings: Experiment, older: LoggedRun
) -> None:
    client = MlflowClient(settings.store.mlflow_uri())
    experiment_id = tracking.experiment_id(settings.store)
    tags = client.get_experiment(experiment_id).tags
    assert "turnout.champion" in tags["mlflow.note.content"]
    client.set_experiment_tag(experiment_id, "mlflow.note.content", "my own words")
    tracking.describe_experiment(settings.store)
    assert client.get_experiment(experiment_id).tags["mlflow.note.content"] == "my own words"
    # The view is in MLflow's own form: a name, times in milliseconds, its state as JSON text.
    view = json.loads(tags[f"mlflow.sharedViewState.{tracking.VIEW}"])
    assert (view["name"], type(view["createdAt"])) == ("Routers, best first", int)
    state = json.loads(view["state"])
    filtered = client.search_runs(
        [experiment_id], state["searchFilter"], order_by=[state["orderByKey"] + " DESC"]
    )
    assert {run.info.run_id for run in filtered} == set(older.routers.values()) - {
        older.routers["oracle"]
    }
    assert tracking.VIEW in tracking.routers_url(settings.store)
    tracking.describe_model(settings.store, PAIR)
    assert f"models:/{PAIR.name()}@champion" in client.get_registered_model(PAIR.name()).description
    client.update_registered_model(PAIR.name(), "my own words")
    tracking.describe_model(settings.store, PAIR)
    assert client.get_registered_model(PAIR.name()).description == "my own words"


def test_equal_names_in_one_run_stay_apart_only_where_they_differ(settings: Experiment) -> None:
    first = log_run(settings, TABLE, {"mf": rates(TABLE, 0.2, seed=1)})
    second = log_run(settings, TABLE, {"mf": rates(TABLE, 0.2, seed=1)})
    found = compare(settings, [first.run_id, second.run_id])
    assert [(one.name, one.runs) for one in found.contenders] == [("mf", "AB")]
    assert isinstance(found.runs["A"].table, pa.Table)
