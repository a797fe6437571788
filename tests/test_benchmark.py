"""`turnout benchmark`: what is trained on is never judged, and what is printed is true."""

import csv
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from rich.console import Console
from test_causal_llm import save_tiny_llm

from conf.errors import ConfigError, DataError
from conf.load import load_benchmark
from conf.routers import (
    Bert,
    CausalLLM,
    Hybrid,
    KernelRidge,
    Knn,
    MatrixFactorization,
    Router,
    SimilarityWeighted,
    Trainer,
)
from conf.schema import Benchmark
from flows import cli
from flows.benchmark import benchmark
from flows.terminal import print_table
from router_models.catalog import build_router
from router_models.frontier import METRICS, apgr
from router_models.statistics import bootstrap_metrics
from router_models.training_data import Comparisons, same_prompt
from tasks.benchmark import BenchmarkReport, benchmark_data
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
            for row in range(1000 * len(topic), 1000 * len(topic) + rows // 2):
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
    run = client.get_run(report.comparison.runs["knn"])
    assert run.data.params["labels"] == "battles"
    kept = {file.path for file in client.list_artifacts(report.run_id)}
    assert kept >= {"cost_quality.png", "benchmark.md", "benchmark.json", "win_rates"}
    for name, router in found["routers"].items():
        for metric in METRICS:
            low, high = router[f"{metric}_ci"]
            assert low <= high
        low, high = router["apgr_less_best_ci"]
        assert low <= router["apgr_less_best"] <= high
        assert router["apgr_less_best"] == pytest.approx(router["apgr"] - knn["apgr"]), name
    assert found["best"] == "knn"
    assert found["routers"]["random"]["apgr_less_best_ci"][1] < 0
    shown = {row["router"]: row["less best"] for row in report.rows()}
    assert shown["knn"] == "0.00 [0.00, 0.00]"
    assert "…" not in printed(report)
    widest = {"router": "kernel_ridge", "less best": "-0.12 [-0.15, -0.10]", "ms": "123.4"}
    assert "…" not in printed_rows([{**report.rows()[0], **widest}])
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
        csv.writer(file).writerow([repeated[0].lower(), *repeated[1:]])
    report = benchmark(settings(trained, store_directory, evaluation_directory=judged))
    assert report.comparison.queries == 62
    assert not report.comparison.out_of_fold
    assert report.left_out == {"training prompts that are evaluated too, or nearly": 1}
    assert report.to_json()["routers"]["knn"]["apgr_ci"][0] > 0.5


def test_near_copies_of_judged_prompts_are_not_learnt_from(
    tmp_path: Path, store_directory: Path
) -> None:
    folders = answers(tmp_path / "a", 80), answers(tmp_path / "b", 60, topic="the ")
    for file in folders[1].glob("*.csv"):
        copies = list(csv.reader(file.read_text().splitlines()))[1:]
        with (folders[0] / file.name).open("a", newline="") as trained:
            csv.writer(trained).writerows([f"{text}?", *correct] for text, *correct in copies)
    apart = settings(folders[0], store_directory, evaluation_directory=folders[1])
    data = benchmark_data.fn(Warehouse(store_directory), apart)
    assert data.left_out == {"training prompts that are evaluated too, or nearly": 60}
    assert data.battles.rows == 80
    # In one folder, they share a fold with what they copy.
    (folders[1] / "more.csv").write_bytes((folders[0] / "capitals.csv").read_bytes())
    data = benchmark_data.fn(Warehouse(store_directory), settings(folders[1], store_directory))
    assert data.left_out == {"near copies of other prompts, kept on one side": 30}
    labels = data.queries.labels.read()
    bare = [same_prompt(text).rstrip("?") for text in labels["text"].to_pylist()]
    for fold in evaluation_folds(labels, data.evaluation):
        seen = {bare[row] for row in [*fold.train, *fold.validation]}
        assert not seen & {bare[row] for row in fold.predicted}


def test_battles_of_other_llms_on_near_copies_of_queries_are_left_out(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "a", 40)
    rows = list(csv.reader((folder / "capitals.csv").read_text().splitlines()))[1:]
    with (folder / "others.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", WEAK, "third"])
        writer.writerows([f"{text}?", True, False] for text, *_ in rows)
        writer.writerows([f"Who painted picture {row}?", True, False] for row in range(5))
    pair = {"weak": WEAK, "strong": STRONG}
    data = benchmark_data.fn(Warehouse(store_directory), settings(folder, store_directory, **pair))
    assert data.left_out["battles on near copies of queries"] == 20
    assert data.battles.rows == 40 + 5


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


THREE = "prompt,small,large,other\n"


def folder_of(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "answers"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def rows_of(answers: str, *, topic: str = "q", count: int = 4) -> str:
    return "".join(f"{topic}{row},{answers}\n" for row in range(count))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"one": "question,small,large\nq,True,False\n"},
            r"columns question, .*Expected prompt and",
        ),
        (
            {"one": "prompt,small,note\nq,True,a text\n"},
            r"no True and False: note\..*at least two",
        ),
        (
            {"one": THREE + rows_of("1,0,1")},
            "LLMs large, other, small. Expected two, or to be told",
        ),
        (
            {"one": THREE + rows_of("True,False,True") + "r,True,N/A,True\n"},
            r"Line 6 of .*one\.csv has 'N/A' for 'large'",
        ),
        ({"one": THREE + rows_of("1,0,1"), "two": THREE}, r"two\.csv has no rows"),
    ],
)
def test_unusable_folders_are_explained(
    tmp_path: Path, store_directory: Path, files: dict[str, str], message: str
) -> None:
    folder = folder_of(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        benchmark_data.fn(Warehouse(store_directory), settings(folder, store_directory))


def test_rows_of_files_without_one_of_the_llms_are_counted(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = folder_of(
        tmp_path,
        both=THREE + rows_of("False,True,True") + rows_of("True,False,True", topic="r"),
        maths="prompt,small,other,note\n" + rows_of("False,True,why", topic="s", count=3),
        law="prompt,large,other\n" + rows_of("False,True", topic="t", count=2),
    )
    chosen = settings(folder, store_directory, weak="small", strong="large")
    data = benchmark_data.fn(Warehouse(store_directory), chosen)
    assert data.queries.labels.rows == 8
    assert data.left_out == {
        "ignored columns (note)": 1,
        "rows of files without a column for each of the two LLMs (law.csv, maths.csv)": 5,
    }


def test_without_a_sure_gap_the_table_says_why_once(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    folder = answers(tmp_path / "answers", 60)
    options = {"directory": folder, "weak": STRONG, "strong": WEAK}
    report = benchmark(load_benchmark(["length"], options, (f"store.directory={store_directory}",)))
    assert {row["APGR"] for row in report.rows()} == {"–"}
    assert {row["less best"] for row in report.rows()} == {"–"}
    undefined, exchange = report.notes()
    assert undefined == "APGR and CPT are undefined: strong is not better than weak"
    assert f"{WEAK} is worse than {STRONG} on these rows: --weak and --strong" in exchange
    found = report.to_json()["routers"]["length"]
    assert (found["cpt_50"], found["cpt_50_ci"]) == (None, [None, None])
    assert found["cpt_50_reason"] == "strong is not better than weak"
    assert {"length", "random", "oracle"} <= set(printed(report).split())


def printed(report: BenchmarkReport) -> str:
    return printed_rows(report.rows())


def printed_rows(rows: list[dict[str, str]]) -> str:
    """Return the table as a terminal of 80 characters shows it."""
    text = StringIO()
    print_table(Console(width=80, file=text), "", rows)
    return text.getvalue()


def test_a_benchmark_has_no_kinds_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"routers\.knn\.labels is set.*a tie counting half"):
        settings(tmp_path, tmp_path, "routers.knn.labels=deterministic")
    for nothing in ("routers=3", "routers.knn=null"):
        with pytest.raises(ConfigError, match="cannot be used"):
            settings(tmp_path, tmp_path, nothing)


def test_routers_are_named(tmp_path: Path) -> None:
    for named in ([""], ["knn", " "], []):
        with pytest.raises(ConfigError, match=r"a name is empty.*Give --routers"):
            load_benchmark(named, {"directory": tmp_path})


KINDS = [
    Knn(),
    MatrixFactorization(dimension=16, trainer=Trainer(max_epochs=3, learning_rate=3e-3)),
    SimilarityWeighted(),
    KernelRidge(encoders=("minilm",), weights=(1,)),
    Hybrid(max_length=32, trainer=Trainer(max_epochs=2)),
    Bert(max_length=32, trainer=Trainer(max_epochs=2)),
    CausalLLM(
        template="Q:{query}\nA:",
        max_length=96,
        rank=4,
        trainer=Trainer(max_epochs=3, learning_rate=1e-2),
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.router)
@pytest.mark.parametrize("shuffled", [False, True], ids=["true", "shuffled"])
def test_a_router_trained_on_shuffled_labels_is_at_chance(
    kind: Router, shuffled: bool, tmp_path: Path
) -> None:
    if isinstance(kind, CausalLLM):
        kind = kind.model_copy(update={"model": str(save_tiny_llm(tmp_path))})
    rng = np.random.default_rng(11)
    hard = rng.random(400) < 0.5
    asked = ("What is {} plus {}?", "Which city is the capital of country {} of {}?")
    prompts = [asked[int(easy)].format(row, rng.integers(1000)) for row, easy in enumerate(~hard)]
    weak = np.where(rng.random(400) < np.where(hard, 0.1, 0.9), 1.0, 0.0)
    strong = np.where(rng.random(400) < 0.9, 1.0, 0.0)
    if shuffled:  # in training as in the test: there is nothing to be known
        moved = rng.permutation(400)
        weak, strong = weak[moved], strong[moved]
    train, test = np.arange(200), np.arange(200, 400)
    win_rate = (1 + np.sign(strong - weak)) / 2
    data = Comparisons.from_win_rates(
        [prompts[row] for row in train], win_rate[train], weak="small", strong="large"
    )
    router = build_router(kind).fit(data, seed=0)
    found = router.win_rate([prompts[row] for row in test])
    drawn = bootstrap_metrics({"it": found}, weak[test], strong[test], replicates=400, seed=0)
    interval = drawn.estimate("it", "apgr").interval
    assert interval.low > 0.55 if not shuffled else interval.low <= 0.5 <= interval.high


def test_an_unknown_llm_and_too_many_rows_are_refused(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "answers", 20)
    warehouse = Warehouse(store_directory)
    with pytest.raises(DataError, match="Did you mean 'gpt-4-1106-preview'"):
        benchmark_data.fn(warehouse, settings(folder, store_directory, strong="gpt-4-1106"))
    with pytest.raises(DataError, match="20 training rows are asked for, of 20"):
        benchmark_data.fn(warehouse, settings(folder, store_directory, train_rows=20))
    with pytest.raises(ConfigError, match=r"Unknown router 'knm'\. Did you mean 'knn'\?"):
        load_benchmark(["knm"], {"directory": folder})


@pytest.mark.parametrize(
    ("asked", "pair"),
    [
        ({}, (WEAK, STRONG)),
        ({"weak": WEAK}, (WEAK, STRONG)),
        ({"weak": STRONG}, (STRONG, WEAK)),
        ({"strong": WEAK}, (STRONG, WEAK)),
        ({"strong": STRONG}, (WEAK, STRONG)),
    ],
)
def test_of_two_llms_the_one_that_is_not_named_is_the_other_side(
    asked: dict[str, str], pair: tuple[str, str], tmp_path: Path, store_directory: Path
) -> None:
    chosen = settings(answers(tmp_path / "answers", 40), store_directory, **asked)
    found = benchmark_data.fn(Warehouse(store_directory), chosen).queries.pair
    assert (found.weak, found.strong) == pair


def test_one_llm_cannot_be_both_sides(tmp_path: Path, store_directory: Path) -> None:
    folder = answers(tmp_path / "answers", 20)
    chosen = settings(folder, store_directory, weak=WEAK, strong=WEAK)
    with pytest.raises(DataError, match=rf"--weak and --strong are both '{WEAK}'\. Expected two"):
        benchmark_data.fn(Warehouse(store_directory), chosen)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("absent/x.png", r"--figure .*x\.png cannot be written: .*absent is no folder\. Expected"),
        (".", "cannot be written: it is a folder"),
        ("x.bmpp", r"x\.bmpp ends in '\.bmpp'\. Expected one of .*\.png, .*Rename it"),
        ("x", r"x ends in ''"),
    ],
)
def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_trained(
    file: str, message: str, tmp_path: Path
) -> None:
    figure = tmp_path / file
    store = f"store.directory={tmp_path / 'store'}"
    words = ["routellm", str(tmp_path), "--routers", "knn", "--figure", str(figure), store]
    arguments = cli.parsed(["benchmark", *words])
    with pytest.raises(ConfigError, match=message):
        arguments.command(arguments)
    assert not (tmp_path / "store").exists()


def test_a_report_that_cannot_be_written_is_refused_before_runs_are_compared(
    tmp_path: Path,
) -> None:
    report = tmp_path / "absent" / "x.html"
    arguments = cli.parsed(["compare", "--report", str(report)])
    with pytest.raises(ConfigError, match=r"--report .* cannot be written: .* is no folder"):
        arguments.command(arguments)


def test_a_folder_that_is_all_trained_on_cannot_be_judged(
    tmp_path: Path, store_directory: Path
) -> None:
    folder = answers(tmp_path / "answers", 20)
    chosen = settings(folder, store_directory, evaluation_directory=folder)
    with pytest.raises(DataError, match="Give another folder"):
        benchmark_data.fn(Warehouse(store_directory), chosen)
