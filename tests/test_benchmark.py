"""`turnout benchmark`: what is trained on is never judged, and what is printed is true."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from conf.errors import ConfigError, DataError
from conf.load import load_benchmark
from conf.schema import Benchmark
from flows.benchmark import benchmark
from router_models.frontier import apgr
from router_models.training_data import same_prompt
from tasks.benchmark import benchmark_data
from tasks.training import evaluation_folds
from tasks.warehouse import Warehouse

WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"


def answers(folder: Path, rows: int, *, topic: str = "", header: tuple[str, ...] = ()) -> Path:
    """Write a folder of two CSVs; the weak LLM fails at sums, both know the rest."""
    folder.mkdir()
    rng = np.random.default_rng(len(topic))
    for name in ("arithmetic", "capitals"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header or ("prompt", WEAK, STRONG))
            for row in range(rows // 2):
                if name == "arithmetic":
                    text = f"What is {topic}{row} plus {rng.integers(1000)} minus seven?"
                    correct = [bool(rng.random() < 0.1), bool(rng.random() < 0.9)]
                else:
                    text = f"Which city is the capital of {topic}country number {row}?"
                    correct = [bool(rng.random() < 0.9), bool(rng.random() < 0.9)]
                writer.writerow([text, *correct])
    return folder


def settings(directory: Path, store: Path, *overrides: str, **options: object) -> Benchmark:
    return load_benchmark(
        ["knn", "length"],
        {"directory": directory, **options},
        (f"store.directory={store}", "evaluation.replicates=200", *overrides),
    )


def test_routers_are_compared_out_of_fold(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    folder = answers(tmp_path / "answers", 120)
    report = benchmark(settings(folder, store_directory))
    found = report.to_json()
    assert (found["n"], found["out_of_fold"]) == (120, True)
    assert (found["weak"], found["strong"]) == (WEAK, STRONG)
    assert found["routers"].keys() == {"knn", "length", "random", "oracle"}
    knn = found["routers"]["knn"]
    assert knn["apgr_ci"][0] > 0.5
    assert knn["apgr"] < found["routers"]["oracle"]["apgr"]
    # The table that MLflow keeps says the same.
    table = report.comparison.table.read()
    qualities = table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy()
    assert knn["apgr"] == pytest.approx(apgr(table["knn"].to_numpy(), *qualities))
    client = MlflowClient(f"sqlite:///{store_directory / 'mlflow.db'}")
    kept = {file.path for file in client.list_artifacts(report.run_id)}
    assert kept >= {"cost_quality.png", "benchmark.md", "benchmark.json", "win_rates"}
    kept_json = client.download_artifacts(report.run_id, "benchmark.json", str(tmp_path))
    assert json.loads(Path(kept_json).read_text()) == found


def test_another_folder_is_judged_without_what_was_trained_on(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    trained, judged = answers(tmp_path / "a", 80), answers(tmp_path / "b", 60, topic="the ")
    with (trained / "capitals.csv").open() as file:
        repeated = list(csv.reader(file))[1]
    with (judged / "capitals.csv").open("a", newline="") as file:
        csv.writer(file).writerow([repeated[0].upper(), *repeated[1:]])
    report = benchmark(settings(trained, store_directory, evaluation_directory=judged))
    assert report.comparison.queries == 61
    assert not report.comparison.out_of_fold
    assert report.left_out == {"training prompts that are evaluated too": 1}
    assert report.to_json()["routers"]["knn"]["apgr_ci"][0] > 0.5


def test_a_number_of_rows_is_trained_on_and_the_rest_is_judged(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "answers", 100)
    with (folder / "capitals.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["WHICH city is the capital of country number 3?", True, False])
    chosen = settings(folder, store_directory, train_rows=30)
    data = benchmark_data.fn(Warehouse(store_directory), chosen)
    labels = data.queries.labels.read().to_pandas()
    train = {same_prompt(text) for text in labels[labels["split"] == "train"]["text"]}
    test = {same_prompt(text) for text in labels[labels["split"] == "test"]["text"]}
    assert (labels["split"] == "train").sum() == 30
    assert not train & test
    assert data.left_out == {"repeated prompts, kept on one side": 1}
    other = settings(folder, store_directory, train_rows=30, seed=8)
    again = benchmark_data.fn(Warehouse(store_directory), other).queries.labels.read().to_pandas()
    assert set(again[again["split"] == "train"]["text"]) != set(
        labels[labels["split"] == "train"]["text"]
    )


def test_equal_prompts_share_a_fold(tmp_path: Path, store_directory: Path) -> None:
    folder = answers(tmp_path / "answers", 60)
    rows = (folder / "capitals.csv").read_text().splitlines()
    (folder / "repeated.csv").write_text("\n".join([rows[0], *(row.upper() for row in rows[1:9])]))
    text = (folder / "repeated.csv").read_text()
    (folder / "repeated.csv").write_text(text.replace("TRUE", "True").replace("FALSE", "False"))
    data = benchmark_data.fn(Warehouse(store_directory), settings(folder, store_directory))
    labels = data.queries.labels.read()
    fold_of: dict[str, int] = {}
    for number, fold in enumerate(evaluation_folds(labels, data.evaluation)):
        for row in fold.predicted:
            key = same_prompt(labels["text"][int(row)].as_py())
            assert fold_of.setdefault(key, number) == number
    assert len(fold_of) == 60


def test_contaminated_prompts_are_left_out_and_counted(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "answers", 40)
    with (folder / "capitals.csv").open() as file:
        listed = list(csv.reader(file))[2][0]
    line = json.dumps({"eval_prompt": listed, "train_prompt": "", "eval_idx": 0})
    (folder / "contaminated_prompts.jsonl").write_text(line + "\n")
    data = benchmark_data.fn(Warehouse(store_directory), settings(folder, store_directory))
    assert data.left_out == {"contaminated": 1}
    assert listed not in data.queries.labels.read()["text"].to_pylist()
    assert listed not in data.battles.read()["prompt"].to_pylist()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("prompt", WEAK, "note"), "Expected two, or to be told|at least two LLMs"),
        (("question", WEAK, STRONG), "Expected prompt and"),
    ],
)
def test_missing_columns_are_named(
    tmp_path: Path, store_directory: Path, header: tuple[str, ...], message: str
) -> None:
    folder = answers(tmp_path / "answers", 20, header=header)
    text = (folder / "capitals.csv").read_text()
    if "note" in header:
        for file in folder.glob("*.csv"):
            lines = file.read_text().splitlines()
            body = [line.rpartition(",")[0] + ",a text" for line in lines[1:]]
            file.write_text("\n".join([lines[0], *body]))
    assert text
    with pytest.raises(DataError, match=message):
        benchmark_data.fn(Warehouse(store_directory), settings(folder, store_directory))


def test_an_unknown_llm_and_too_many_rows_are_refused(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "answers", 20)
    warehouse = Warehouse(store_directory)
    with pytest.raises(DataError, match="Did you mean 'gpt-4-1106-preview'"):
        benchmark_data.fn(warehouse, settings(folder, store_directory, strong="gpt-4-1106"))
    with pytest.raises(DataError, match="20 training rows are asked for, of 20"):
        benchmark_data.fn(warehouse, settings(folder, store_directory, train_rows=20))
    with pytest.raises(ConfigError, match="router"):
        load_benchmark(["knm"], {"directory": folder})


def test_a_folder_that_is_all_trained_on_cannot_be_judged(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "answers", 20)
    chosen = settings(folder, store_directory, evaluation_directory=folder)
    with pytest.raises(DataError, match="Give another folder"):
        benchmark_data.fn(Warehouse(store_directory), chosen)
