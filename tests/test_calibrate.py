"""`turnout calibrate`: on a small real store, with logged queries and with files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from test_benchmark import answers
from test_benchmark import settings as benchmark_settings

from conf.errors import ArtifactError, ConfigError, DataError, StoreError, TurnoutError
from conf.llms import Pair
from conf.load import load_experiment
from conf.routers import Length, Random
from conf.schema import Experiment, Store, ThresholdRequest
from flows import cli
from flows.benchmark import benchmark
from flows.calibrate import calibrate, threshold_request
from router_models.calibration import threshold_naive, threshold_with_guarantee
from router_models.catalog import build_router
from router_models.training_data import Comparisons
from tasks import tracking
from tasks.calibration_data import (
    CalibrationRows,
    LoggedRouter,
    file_rows,
    logged_router,
    logged_rows,
)
from tasks.controls import prompt_hashes
from tasks.registry import CHAMPION, ROOT
from tasks.thresholds import choose_threshold, chosen, readable_threshold
from tasks.warehouse import Warehouse

PAIR = Pair(weak="smollm2", strong="gemma3-facts")
TRAINED, EVALUATED = 200, 600
ROUTERS: dict[str, Length | Random] = {"length": Length(), "random": Random()}


@dataclass(frozen=True)
class Filled:
    """A store with one finished run of two routers; `length` is registered and the champion."""

    experiment: Experiment
    queries: pa.Table
    runs: dict[str, str]

    @property
    def store(self) -> Store:
        return self.experiment.store


def drawn_queries(count: int, seed: int) -> dict[str, list[Any]]:
    """Draw queries: the longer, the more often the weak LLM fails where the strong one does not."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 60, count)
    strong = rng.random(count) < 0.9
    weak = strong & (rng.random(count) > (words / 60) ** 3)
    return {
        "text": [f"query {seed} {row} " + "why " * size for row, size in enumerate(words)],
        "weak_quality": weak.astype(float).tolist(),
        "strong_quality": strong.astype(float).tolist(),
    }


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Filled:
    directory = tmp_path_factory.mktemp("calibrate") / "store"
    directory.mkdir()
    shutil.copy(empty_mlflow_database, directory / "mlflow.db")
    experiment = load_experiment(
        overrides=(f"store.directory={directory}", "quality.label_metric=gold")
    )
    count = TRAINED + EVALUATED
    rows = drawn_queries(count, seed=0)
    split = ["train"] * TRAINED + ["test"] * EVALUATED
    queries = pa.table({"query_key": [f"q{row}" for row in range(count)], **rows, "split": split})
    store, warehouse = experiment.store, Warehouse(directory)
    needed = (queries["strong_quality"].to_numpy() > queries["weak_quality"].to_numpy()) * 1.0
    data = Comparisons.from_win_rates(rows["text"], needed, weak=PAIR.weak, strong=PAIR.strong)
    table, client = queries.slice(TRAINED), tracking.client(store)
    runs = {}
    with tracking.parent_run(experiment) as parent:
        for name, config in ROUTERS.items():
            router = build_router(config).fit(data.take(np.arange(TRAINED)), seed=0)
            rate = router.win_rate(rows["text"][TRAINED:])
            table = table.append_column(name, pa.array(rate))
            folder = directory / "training" / name
            router.save(folder / "router")
            keys = queries["query_key"].slice(TRAINED)
            predicted = pa.table({"query_key": keys, "win_rate": rate, "served_win_rate": rate})
            pq.write_table(predicted, folder / "predictions.parquet")
            with tracking.child_run(
                store, parent, name, tags={tracking.PAIR_TAG: PAIR.name()}
            ) as run:
                client.log_artifact(run, str(folder / "predictions.parquet"), "win_rates")
            runs[name] = run
        logged = {"win_rates": table, "labels": queries}
        for folder_name, kept in logged.items():
            snapshot = warehouse.write_snapshot(folder_name, kept)
            client.log_artifact(parent, str(snapshot.path), f"{PAIR.name()}/{folder_name}")
    register(store, runs["length"], directory / "training" / "length", rows["text"][:TRAINED])
    return Filled(experiment, table, runs)


def register(store: Store, run_id: str, training: Path, prompts: list[str]) -> None:
    """Make the router the champion, as the pipeline would."""
    import mlflow

    client = tracking.client(store)
    pq.write_table(pa.table({"prompt": prompt_hashes(prompts)}), training / "prompts.parquet")
    client.log_artifact(run_id, str(training / "prompts.parquet"), "training")
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="router",
            python_model=ROOT / "serving" / "router_model.py",
            artifacts={"router": str(training / "router")},
            code_paths=[str(ROOT / "conf"), str(ROOT / "router_models")],
            pip_requirements=[],
        )
    tags = {"training_digest": training.name}
    version = mlflow.register_model(logged.model_uri, PAIR.name(), tags=tags)
    client.set_registered_model_alias(PAIR.name(), CHAMPION, version.version)


def chosen_by(filled: Filled, name: str = "length", **request: Any) -> Any:
    router = logged_router(filled.store, name)
    return choose_threshold.fn(
        filled.store, router, ThresholdRequest(router=name, **request), seed=7
    )


def tags_of(filled: Filled, name: str) -> dict[str, str]:
    client = MlflowClient(filled.store.mlflow_uri())
    return {
        key: value
        for key, value in client.get_run(filled.runs[name]).data.tags.items()
        if key.startswith("threshold")
    }


def test_a_promised_threshold_is_chosen_explained_and_stored(
    filled: Filled, prefect_server: None
) -> None:
    request = ThresholdRequest(router="length", max_drop=0.06, confidence=0.9)
    found = calibrate(filled.experiment, request)
    columns = [filled.queries[name] for name in ("length", "weak_quality", "strong_quality")]
    rate, weak, strong = (column.to_numpy() for column in columns)
    expected = threshold_with_guarantee(
        rate, weak, strong, max_drop=0.06, confidence=0.9, quality_range=(0, 1), seed=7
    )
    assert ((rate >= found.threshold) == (rate >= expected.threshold)).all()
    assert found.model == f"router-length-{found.threshold:g}"
    assert found.strong_share == pytest.approx(expected.strong_share)
    assert 0 < found.strong_share_low < found.strong_share < found.strong_share_high < 1
    assert found.drop == pytest.approx(expected.drop)
    assert expected.drop < 0.06
    assert found.drop_upper == 0.06
    assert "exact" in found.assumption
    assert "cannot leave" not in found.assumption  # gold is 0 or 1 by definition
    naive = threshold_naive(rate, weak, strong, max_drop=0.06)
    assert found.naive == {
        "threshold": naive.threshold,
        "strong_share": naive.strong_share,
        "drop": naive.drop,
    }
    client = MlflowClient(filled.store.mlflow_uri())
    version = client.get_model_version_by_alias(PAIR.name(), "champion")
    for tags in (tags_of(filled, "length"), version.tags):
        assert float(tags["threshold"]) == found.threshold
        assert (tags["threshold_max_drop"], tags["threshold_confidence"]) == ("0.06", "0.9")
    path = client.download_artifacts(filled.runs["length"], "threshold.json")
    assert json.loads(Path(path).read_text()) == json.loads(json.dumps(found.to_json()))

    # The champion is the same version; another goal leaves nothing of the former behind.
    found = calibrate(filled.experiment, ThresholdRequest(router="champion", strong_share=0.25))
    assert found.router == "length"
    assert found.strong_share <= 0.25
    assert found.drop is not None
    assert found.drop_upper is not None
    assert found.drop < found.drop_upper < 1
    assert "(exact for any number)" in found.assumption
    version = client.get_model_version_by_alias(PAIR.name(), "champion")
    for tags in (tags_of(filled, "length"), version.tags):
        assert float(tags["threshold"]) == found.threshold
        assert tags["threshold_strong_share"] == "0.25"
        assert not {"threshold_max_drop", "threshold_confidence"} & tags.keys()


def test_a_relative_drop_is_a_share_of_the_strong_quality(filled: Filled) -> None:
    found = chosen_by(filled, max_drop_percent=7.0)
    mean = filled.queries["strong_quality"].to_numpy().mean()
    assert found.max_drop == pytest.approx(0.07 * mean)
    assert "7 % of the mean strong quality" in found.assumption
    assert found.threshold == chosen_by(filled, max_drop=found.max_drop).threshold


def test_the_champion_is_calibrated_on_a_file_in_a_clean_process(
    filled: Filled, tmp_path: Path
) -> None:
    rows = drawn_queries(500, seed=1)
    seen = filled_training_texts(filled)[:20]
    table = pa.table(
        {
            "prompt": [f'{text}\n"Well?"' for text in rows["text"]] + seen,
            PAIR.weak: [value > 0 for value in rows["weak_quality"]] + [True] * 20,
            PAIR.strong: [value > 0 for value in rows["strong_quality"]] + [True] * 20,
        }
    )
    path = tmp_path / "routellm.csv"
    table.to_pandas().to_csv(path, index=False)
    found = chosen_by(filled, "champion", max_drop=0.06, data=path)
    assert (found.queries, found.left_out) == (500, 20)
    assert found.model_version == "1"
    router = logged_router(filled.store, "length")
    unregistered = LoggedRouter(**{**router.__dict__, "version": None})
    # What the registered version answers is what the router on disk does.
    known = file_rows(filled.store, unregistered, path, labelled=True)
    assert known.left_out == 20
    assert found.strong_share == pytest.approx((known.win_rate >= found.threshold).mean())


def test_repeated_prompts_promise_no_more_than_one(filled: Filled, tmp_path: Path) -> None:
    table = pa.table(drawn_queries(200, seed=2)).rename_columns(["prompt", PAIR.weak, PAIR.strong])
    found = []
    for times in (1, 10):
        path = tmp_path / f"{times}.parquet"
        pq.write_table(pa.concat_tables([table] * times), path)
        found.append(chosen_by(filled, max_drop=0.2, data=path))
    # A share is of the traffic, in which repeats count.
    share = chosen_by(filled, strong_share=0.4, data=path)
    assert share.queries == 2000
    once, repeated = found
    assert repeated.queries == once.queries == 200
    assert repeated.threshold == once.threshold
    assert "every prompt counts once (1800 rows repeat another)" in repeated.assumption
    assert "repeat" not in once.assumption


def filled_training_texts(filled: Filled) -> list[str]:
    return drawn_queries(TRAINED + EVALUATED, seed=0)["text"][:TRAINED]


def test_a_share_needs_prompts_only_and_no_registered_version(
    filled: Filled, tmp_path: Path
) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"question {n}\nor two"}) for n in range(200)))
    found = chosen_by(filled, "random", strong_share=0.3, data=path)
    assert found.strong_share == pytest.approx(0.3)
    assert (found.drop, found.drop_upper, found.naive) == (None, None, None)
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)
    elsewhere = filled.store.model_copy(
        update={"directory": tmp_path / "nothing", "tracking_uri": filled.store.mlflow_uri()}
    )
    with pytest.raises(ArtifactError, match=r"no registered version.*Calibrate the champion"):
        file_rows(elsewhere, logged_router(elsewhere, "random"), path, labelled=False)


def test_out_of_fold_win_rates_are_told_apart(filled: Filled, tmp_path: Path) -> None:
    router = logged_router(filled.store, "length")
    assert "not picked for these very queries" in logged_rows(filled.store, router).condition
    assert "folds" not in logged_rows(filled.store, router).condition
    predicted = pa.table({"query_key": ["q"], "win_rate": [0.2], "served_win_rate": [0.3]})
    path = tmp_path / "predictions.parquet"
    pq.write_table(predicted, path)
    client = tracking.client(filled.store)
    run = client.create_run(tracking.experiment_id(filled.store))
    client.log_artifact(run.info.run_id, str(path), "win_rates")
    client.set_terminated(run.info.run_id)
    folded = LoggedRouter(**{**router.__dict__, "run_id": run.info.run_id})
    assert "as its folds did" in logged_rows(filled.store, folded).condition


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("lenght", None, "Did you mean 'length'.*Known: champion, length, random.*last run"),
        ("oracle", None, "Unknown router 'oracle'"),
        ("length", "smollm--gemma3-facts", "Did you mean 'smollm2--gemma3-facts'"),
        ("champion", "other", "Unknown pair 'other'"),
    ],
)
def test_unknown_names_get_the_nearest(
    filled: Filled, name: str, pair: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        logged_router(filled.store, name, pair=pair)


def test_a_store_without_runs_says_so(tmp_path: Path, store_directory: Path) -> None:
    for directory in (tmp_path / "nowhere", store_directory):
        with pytest.raises(StoreError, match=r"no finished run.*Run `turnout run` first"):
            logged_router(Store(directory=directory), "knn")
    with pytest.raises(StoreError, match=r"alias 'champion'.*Name a router"):
        logged_router(Store(directory=store_directory), "champion")
    assert not (tmp_path / "nowhere").exists()


GOOD = {"prompt": ["a", "b"], "weak_quality": [0.0, 1.0], "strong_quality": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["a"]}, "columns question. Expected the query text in 'prompt' or 'text'"),
        ({"prompt": ["a"], "cost": [1]}, "or smollm2 and gemma3-facts. .*use --strong-share"),
        ({**GOOD, "weak_quality": [0.0, None]}, "1 of 2 rows .* no finite weak_quality.*row 1"),
        ({**GOOD, "strong_quality": [np.nan, np.inf]}, "2 of 2 rows .* strong_quality.*row 0"),
        ({**GOOD, "weak_quality": ["bad", "good"]}, "holds string: .*Expected numbers"),
        ({**GOOD, "prompt": ["a", " "]}, "Row 1 .* prompt ' '. Expected a non-empty string"),
        ({"prompt": pa.array([], pa.string())}, "holds no rows"),
        ({**GOOD, "weak_quality": [1.0, 1.0]}, "In all 2 rows .* strong − weak quality is 0"),
        ({**GOOD, "weak_quality": [0.0, 0.0]}, "strong − weak quality is 1. .*--strong-share"),
    ],
)
def test_files_that_cannot_be_used(
    filled: Filled, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=message):
        chosen_by(filled, "random", max_drop=0.05, data=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"prompt", "ends in '.txt'. Expected one of .parquet, .csv, .jsonl"),
        ("rows.parquet", b"not parquet", "rows.parquet cannot be read.*Correct the file"),
        ("rows.csv", b"prompt\n\xff\xfe\n", "not UTF-8 in column prompt. Expected UTF-8 text"),
        ("rows.jsonl", b"{", "cannot be read.*Expected UTF-8 JSONL"),
        ("gone.csv", None, "There is no file .*gone.csv.*Correct --data"),
    ],
)
def test_files_that_cannot_be_read(
    filled: Filled, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        chosen_by(filled, "random", strong_share=0.5, data=path)


def test_training_queries_alone_are_refused(filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "seen.parquet"
    # Case and white space do not make a query new.
    texts = [text.upper() for text in filled_training_texts(filled)]
    pq.write_table(
        pa.table({"text": texts, "weak_quality": [0.0] * 200, "strong_quality": [1.0] * 200}), path
    )
    with pytest.raises(DataError, match=r"was trained on all 200 queries.*leave --data out"):
        chosen_by(filled, "length", max_drop=0.05, data=path)


def file_of(
    tmp_path: Path, count: int, *, change: Callable[[float], float] = lambda value: value
) -> Path:
    rows = drawn_queries(count, seed=2)
    for column in ("weak_quality", "strong_quality"):
        rows[column] = [change(value) for value in rows[column]]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(rows), path)
    return path


def test_too_few_rows_say_how_many_are_needed(filled: Filled, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="100 queries are too few") as caught:
        chosen_by(filled, "random", max_drop=0.01, data=file_of(tmp_path, 100))
    message = str(caught.value)
    fewest = int(message.split("at least ")[1].split(",")[0])
    least = float(message.split("a drop of ")[2].split(",")[0])

    def certified(queries: int, max_drop: float) -> bool:
        same = np.ones(queries)
        found = threshold_with_guarantee(np.zeros(queries), same, same, max_drop=max_drop)
        return found.p_value is not None

    assert certified(fewest, 0.01)
    assert not certified(fewest - 1, 0.01)
    assert certified(100, 1.05 * least)
    assert not certified(100, 0.9 * least)
    path = file_of(tmp_path, 20, change=lambda value: value - 3)
    with pytest.raises(DataError, match=r"20 queries are too few for a t-test.*at least 30"):
        chosen_by(filled, "random", max_drop=0.5, data=path)


def test_a_drop_that_cannot_be_had_names_one_that_can(filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = drawn_queries(600, seed=3)
    # The weak LLM fails always, the strong one hardly ever, whatever the win rate.
    rows |= {"weak_quality": [0.0] * 600, "strong_quality": [0.0] + [1.0] * 599}
    pq.write_table(pa.table(rows), path)
    with pytest.raises(DataError, match=r"or allow 0\.\d+, which would need .* %") as caught:
        chosen_by(filled, "random", max_drop=0.0068, data=path)
    allowed = float(str(caught.value).split("or allow ")[1].split(",")[0])
    assert chosen_by(filled, "random", max_drop=allowed, data=path).strong_share < 1


def test_unbounded_quality_is_calibrated_with_its_caveat(filled: Filled, tmp_path: Path) -> None:
    path = file_of(tmp_path, 400, change=lambda value: value - 3)
    found = chosen_by(filled, "random", max_drop=0.1, data=path)
    assert found.method == "Learn then Test, t-test"
    assert "approximate" in found.assumption


def test_a_files_range_is_assumed_or_given(filled: Filled, tmp_path: Path) -> None:
    path = file_of(tmp_path, 600)
    assumed = chosen_by(filled, "random", max_drop=0.2, data=path)
    assert "quality cannot leave [0, 1]" in assumed.assumption
    given_range = threshold_request(
        "random", max_drop="2", data=str(path), quality_range=["0", "10"]
    )
    assert given_range.quality_range == (0.0, 10.0)
    router = logged_router(filled.store, "random")
    found = choose_threshold.fn(filled.store, router, given_range, seed=7)
    assert "cannot leave" not in found.assumption
    assert "strong − weak ≤ 10 (exact" in found.assumption
    with pytest.raises(ConfigError, match=r"The quality range is \(0.0, 0.5\).*go from 0 to 1"):
        chosen_by(filled, "random", max_drop=0.2, data=path, quality_range=(0.0, 0.5))
    words = ["calibrate", "--router", "knn", "--max-drop", "1", "--quality-range", "-5", "0"]
    assert cli.parser().parse_args(words).quality_range == ["-5", "0"]


def test_a_share_on_few_unbounded_rows_gets_no_bound(filled: Filled) -> None:
    router, rng = logged_router(filled.store, "random"), np.random.default_rng(1)
    rows = CalibrationRows("few", *(rng.random((3, 20)) - [[0], [3], [3]]))
    found = chosen(router, rows, ThresholdRequest(router="random", strong_share=0.5), seed=7)
    assert found.drop_upper is None
    assert "too few queries" in dict(found.rows())["drop of gold"]


def test_a_benchmarks_routers_are_calibrated_where_nothing_else_was_run(
    store_directory: Path, tmp_path: Path, prefect_server: None
) -> None:
    settings = benchmark_settings(
        answers(tmp_path / "folder", 60), store_directory, **{"routers": ["length"]}
    )
    report = benchmark(settings)
    experiment = load_experiment(overrides=(f"store.directory={store_directory}",))
    found = calibrate(experiment, ThresholdRequest(router="length", strong_share=0.5))
    assert (found.queries, found.metric, found.model_version) == (60, "correct", None)
    assert (
        "a benchmark registers no router"
        in logged_rows(
            settings.store, logged_router(settings.store, "length", kinds=("benchmark",))
        ).condition
    )
    client = MlflowClient(settings.store.mlflow_uri())
    tags = client.get_run(report.comparison.runs["length"]).data.tags
    assert float(tags["threshold"]) == found.threshold
    # What may be served comes first, and only calibration asks for a benchmark's.
    with pytest.raises(StoreError, match="no finished run"):
        logged_router(settings.store, "length")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"max_drop": "0"}, "drop is 0. Expected a finite number above 0"),
        ({"max_drop": "some"}, "--max-drop is 'some'. Expected a number such as 0.01"),
        ({"max_drop": "1%", "confidence": "95"}, "confidence is 95. .*such as 0.95 or 95%"),
        ({"strong_share": "30"}, "strong share is 30. .* such as 0.3 or 30%"),
        ({}, "names no goal. Expected one of max_drop"),
    ],
)
def test_impossible_requests_are_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        threshold_request("knn", **words)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 19))
def test_a_readable_threshold_decides_alike_and_is_no_higher(rates: list[float], at: int) -> None:
    rate = np.array(rates)
    alpha = rates[at % len(rates)]
    found = readable_threshold(alpha, rate)
    assert found <= alpha
    assert ((rate >= found) == (rate >= alpha)).all()


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_a_table_or_one_object(
    filled: Filled, prefect_server: None, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    settings = [f"store.directory={filled.store.directory}"]
    words = ["calibrate", "--router", "length", "--max-drop", "7%", "--confidence", "90%"]
    arguments = cli.parser().parse_args([*words, *(["--json"] if as_json else []), *settings])
    assert arguments.command(arguments) == 0
    printed = capsys.readouterr().out
    if as_json:
        found = json.loads(printed)
        assert found["model"] == f"router-length-{found['threshold']}"
        assert found["confidence"] == 0.9
    else:
        assert "router-length-0." in printed
        assert "without any guarantee" in " ".join(printed.split())


@pytest.mark.parametrize("goal", [[], ["--max-drop", "1%", "--strong-share", "0.5"]])
def test_one_goal_is_required(goal: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args(["calibrate", "--router", "knn", *goal])
    assert ended.value.code == 2
    assert "--max-drop" in capsys.readouterr().err
    assert issubclass(ConfigError, TurnoutError)
