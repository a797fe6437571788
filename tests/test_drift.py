"""Drift: the mathematics against brute force and simulation, `turnout drift` on a real store."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_calibrate import PAIR, register

from conf.errors import ConfigError, DataError
from conf.load import load_experiment
from conf.routers import Length
from conf.schema import Experiment
from flows import cli
from flows.drift import drift, drift_request
from router_models.catalog import build_router
from router_models.drift import (
    TwoSample,
    energy_test,
    holm,
    ks_test,
    permutations_for,
    queries_needed,
)
from router_models.training_data import Comparisons
from tasks import tracking
from tasks.drift import EMBEDDING, WIN_RATE, judged, recent_queries, verdict
from tasks.warehouse import Warehouse

TRAINED, EVALUATED = 60, 240


def energy_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a[:, None] - b[None], axis=2).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


samples = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@hypothesis_settings(max_examples=40, deadline=None)
@given(known=samples, recent=samples)
def test_statistics_are_those_of_the_definitions(known: list[int], recent: list[int]) -> None:
    x, y = (np.array(sample, dtype=float) for sample in (known, recent))
    energy = energy_test(x, y, permutations=1, seed=0).statistic
    assert energy == pytest.approx(energy_by_definition(x[:, None], y[:, None]), abs=1e-9)
    difference = ks_test(x, y, permutations=1, seed=0).statistic
    below = [[float((sample <= value).mean()) for value in range(4)] for sample in (x, y)]
    assert difference == pytest.approx(max(abs(a - b) for a, b in zip(*below, strict=True)))


@hypothesis_settings(max_examples=15, deadline=None)
@given(pooled=st.lists(st.integers(0, 4), min_size=7, max_size=7), known=st.integers(2, 5))
def test_permutation_p_values_are_exact(pooled: list[int], known: int) -> None:
    # Under the hypothesis every choice of the known ones is equally likely. The share of choices
    # whose p-value is at most a must then be at most a: for the p-values by all choices exactly,
    # ties included; and those of drawn relabellings are these, up to the drawing.
    values = np.array(pooled, dtype=float)
    choices = [np.isin(np.arange(7), chosen) for chosen in combinations(range(7), known)]
    for test in (energy_test, ks_test):
        found = [
            test(values[is_known], values[~is_known], permutations=199, seed=1)
            for is_known in choices
        ]
        statistics = np.array([each.statistic for each in found])
        exact = (statistics[None, :] >= statistics[:, None] - 1e-9).mean(axis=1)
        assert all((exact <= level).mean() <= level + 1e-12 for level in (0.05, 0.1, 0.25, 0.5))
        error = 4 * np.sqrt(exact * (1 - exact) / 199) + 1 / 200
        assert (np.abs([each.p_value for each in found] - exact) <= error).all()


def simulated(shift: float, runs: int) -> float:
    """Return how often drift is reported at a rate of 0.1, both tests, 80 against 60 queries."""
    rng = np.random.default_rng(int(1000 * shift))
    direction = np.eye(8)[0]
    reported = 0
    for run in range(runs):
        known, recent = rng.normal(size=(80, 8)), rng.normal(size=(60, 8)) + shift * direction
        found = {
            EMBEDDING: energy_test(known, recent, permutations=199, seed=run),
            # Rounded, so that there are ties.
            WIN_RATE: ks_test(
                known[:, 0].round(1), recent[:, 0].round(1), permutations=199, seed=run
            ),
        }
        reported += any(test.drifted for test in judged(found, 0.1))
    return reported / runs


def test_false_alarms_are_as_rare_as_stated_and_a_shift_is_seen() -> None:
    runs = 300
    assert simulated(0.0, runs) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / runs)
    assert simulated(0.8, 60) >= 0.9


@pytest.mark.slow
def test_the_number_of_queries_needed_gives_the_stated_power() -> None:
    known, rate, shift = 200, 0.02, 0.3
    needed = queries_needed(known, shift=shift, rate=rate)
    assert needed is not None
    rng = np.random.default_rng(5)
    seen = 0
    for run in range(150):
        recent = np.where(rng.random(needed) < shift, 1 + rng.random(needed), rng.random(needed))
        found = ks_test(rng.random(known), recent, permutations=499, seed=run)
        seen += found.p_value <= rate
    assert seen / 150 >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / 150)


def test_more_known_queries_need_fewer_recent_ones() -> None:
    needed = [queries_needed(known, shift=0.25, rate=0.005) for known in (100, 200, 1000, 10**6)]
    assert needed == sorted(needed, reverse=True)  # type: ignore[type-var]
    assert queries_needed(70, shift=0.25, rate=0.005) is None
    assert permutations_for(0.005) == 1999


def test_holm_ends_at_the_first_that_is_not_below_its_bound() -> None:
    found = holm({"a": 0.02, "b": 0.001, "c": 0.04}, 0.05)
    assert found == {"a": (0.025, True), "b": (pytest.approx(0.05 / 3), True), "c": (0.05, True)}
    assert [rejected for _, rejected in holm({"a": 0.03, "b": 0.03}, 0.05).values()] == [False] * 2


def test_samples_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match=r"recent sample has the shape \(0, 1\)"):
        ks_test([0.1], [], permutations=9, seed=0)
    with pytest.raises(DataError, match=r"1 of its values are not finite"):
        ks_test([0.1, np.nan], [0.2], permutations=9, seed=0)
    with pytest.raises(DataError, match="have 2 dimensions, recent ones 3"):
        energy_test(np.zeros((4, 2)), np.zeros((4, 3)), permutations=9, seed=0)


def test_absence_is_only_claimed_with_enough_queries() -> None:
    calm = judged({EMBEDDING: TwoSample(0.1, 0.4, 9, 9), WIN_RATE: TwoSample(0.1, 0.3, 9, 9)}, 0.01)
    assert verdict(calm, recent=50, needed=50) == "no drift"
    assert verdict(calm, recent=49, needed=50) == "too few queries"
    assert verdict(calm, recent=10**6, needed=None) == "too few queries"
    moved = judged(
        {EMBEDDING: TwoSample(0.1, 0.4, 9, 9), WIN_RATE: TwoSample(0.9, 0.001, 9, 9)}, 0.01
    )
    assert verdict(moved, recent=9, needed=50) == "drift"


def drawn_queries(count: int, seed: int) -> dict[str, list[Any]]:
    """Draw queries: the longer, the more often the weak LLM fails where the strong one does not."""
    rng = np.random.default_rng(seed)
    topics = np.array(["river", "capital", "currency", "climate", "border", "language"])
    words = rng.integers(3, 30, count)
    weak = rng.random(count) > (words / 30) ** 3
    return {
        "text": ["Tell me about the " + " ".join(rng.choice(topics, size)) for size in words],
        "weak_quality": weak.astype(float).tolist(),
        "strong_quality": [1.0] * count,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Experiment:
    """A store with one finished run whose router `length`, held out, is the champion."""
    directory = tmp_path_factory.mktemp("drift") / "store"
    directory.mkdir()
    shutil.copy(empty_mlflow_database, directory / "mlflow.db")
    experiment = load_experiment(
        overrides=(f"store.directory={directory}", "quality.label_metric=gold")
    )
    assert isinstance(experiment, Experiment)
    count = TRAINED + EVALUATED
    rows = drawn_queries(count, seed=0)
    split = ["train"] * TRAINED + ["test"] * EVALUATED
    queries = pa.table({"query_key": [f"q{row}" for row in range(count)], **rows, "split": split})
    needed = (queries["strong_quality"].to_numpy() > queries["weak_quality"].to_numpy()) * 1.0
    data = Comparisons.from_win_rates(rows["text"], needed, weak=PAIR.weak, strong=PAIR.strong)
    store, client = experiment.store, tracking.client(experiment.store)
    router = build_router(Length()).fit(data.take(np.arange(TRAINED)), seed=0)
    rate = router.win_rate(rows["text"][TRAINED:])
    folder = directory / "training" / "length"
    router.save(folder / "router")
    keys = queries["query_key"].slice(TRAINED)
    predicted = pa.table({"query_key": keys, "win_rate": rate, "served_win_rate": rate})
    pq.write_table(predicted, folder / "predictions.parquet")
    with tracking.parent_run(experiment) as parent:
        tags = {tracking.PAIR_TAG: PAIR.name()}
        with tracking.child_run(store, parent, "length", tags=tags) as run:
            client.log_artifact(run, str(folder / "predictions.parquet"), "win_rates")
        evaluated = queries.slice(TRAINED).append_column("length", pa.array(rate))
        for name, kept in {"win_rates": evaluated, "labels": queries}.items():
            snapshot = Warehouse(directory).write_snapshot(name, kept)
            client.log_artifact(parent, str(snapshot.path), f"{PAIR.name()}/{name}")
    register(store, run, folder, rows["text"][:TRAINED])
    return experiment


def jsonl(path: Path, texts: list[Any], column: str = "prompt") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "ms": 3}) + "\n" for text in texts))
    return path


def test_like_queries_are_no_drift_and_others_are(
    trained: Experiment,
    tmp_path: Path,
    prefect_server: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = drawn_queries(200, seed=1)["text"]
    like = jsonl(tmp_path / "log" / "monday.jsonl", texts[:100])
    pq.write_table(pa.table({"text": texts[100:]}), tmp_path / "log" / "tuesday.parquet")
    (tmp_path / "log" / "wednesday.csv").touch()
    report = drift(trained, drift_request(like.parent, router="champion"))
    assert (report.verdict, report.model_version, report.router) == ("no drift", "1", "length")
    assert {test.recent for test in report.tests} == {200 - report.repeated}
    assert all(test.known > 0.9 * EVALUATED for test in report.tests)
    assert "out of fold" not in report.condition

    few = drift(trained, drift_request(jsonl(tmp_path / "few.jsonl", texts[:9]), router="length"))
    assert few.verdict == "too few queries"
    assert f"{few.queries_needed} are needed" in few.summary()

    # Short questions about something else: another embedding, and the weak LLM suffices.
    other = jsonl(tmp_path / "other.jsonl", [f"Who wrote book number {n}?" for n in range(90)])
    command = [
        "drift",
        "--queries",
        str(other),
        "--json",
        f"store.directory={trained.store.directory}",
    ]
    arguments = cli.parser().parse_args(command)
    capsys.readouterr()
    assert arguments.command(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "drift"
    assert all(test["drifted"] for test in found["tests"])
    assert found["recent_mean_win_rate"] < found["known_mean_win_rate"]
    assert found["retrain"] is None


def test_recent_queries_are_the_distinct_ones_with_text(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "log.jsonl", ["one", "two", "one", None, "  "])
    assert recent_queries(file) == (["one", "two"], 1, 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no file with content that ends in .parquet"):
        recent_queries(empty)
    with pytest.raises(DataError, match=r"columns question, ms\. Expected the query text"):
        recent_queries(jsonl(tmp_path / "other.jsonl", ["one"], column="question"))
    with pytest.raises(DataError, match=r"prompt of .*holds int64. Expected text"):
        recent_queries(jsonl(tmp_path / "numbers.jsonl", [1, 2]))
    with pytest.raises(DataError, match=r"no query with text, in 1 rows"):
        recent_queries(jsonl(tmp_path / "blank.jsonl", [" "]))


def test_rates_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--false-alarm-rate is '0'. Expected a share above 0"):
        drift_request(Path("log"), router="champion", false_alarm_rate="0")
    with pytest.raises(ConfigError, match=r"--smallest-shift is 'much'"):
        drift_request(Path("log"), router="champion", smallest_shift="much")
