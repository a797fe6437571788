"""RouteLLM's experiment whole, on tiny files of the real schemas, with tiny random base models.

Nothing but sizes and places is changed: the bundled file's sources, benchmarks and routers.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from scripted_llm import ScriptedLLM
from test_causal_llm import CHAT, save_tiny_llm
from test_hybrid import RECORDS, save_tiny_encoder

from conf.errors import ConfigError, DataError
from conf.llms import Pair
from conf.load import EXPERIMENTS, load_experiment
from conf.routers import Router
from conf.schema import Experiment, PreferenceExperiment
from flows import cli, commands
from flows.doctor import findings
from flows.pipeline import pipeline
from flows.preference_pipeline import preference_pipeline
from router_models.frontier import apgr
from router_models.training_data import same_prompt
from tasks import tracking
from tasks.benchmark import judged_queries
from tasks.calibration_data import logged_router, logged_rows
from tasks.preference_collection import HELD_OUT, collect_preferences
from tasks.registry import champion
from tasks.warehouse import Warehouse

WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
ARENA_WEAK = "mixtral-8x7b-instruct-v0.1"
STRENGTH = {STRONG: 2.0, "gpt-4-0613": 1.7, ARENA_WEAK: 0.0, "llama-2-7b-chat": -0.5}
HARD = {"capital", "region", "river"}
ROWS = {"arena": 220, "gold": 50, "mmlu": 70, "gsm8k": 40}


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` writes out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def drawn(part: str) -> list[dict[str, Any]]:
    """Return questions of the bundled set, other ones for each part."""
    order = np.random.default_rng(1).permutation(len(RECORDS))
    start = sum(ROWS[name] for name in list(ROWS)[: list(ROWS).index(part)])
    return [RECORDS[row] for row in order[start : start + ROWS[part]]]


def gap(record: dict[str, Any]) -> float:
    """Return by how much a hard question widens the gap between strong and weak LLMs."""
    return 2.0 if record["domain"] in HARD else 0.3


def arena_file(path: Path, *, also: str) -> Path:
    """Write battles in Chatbot Arena's schema, one of them on the prompt ``also``."""
    rng, llms = np.random.default_rng(2), list(STRENGTH)
    rows = []
    for at, record in enumerate(drawn("arena")):
        a, b = rng.choice(llms, 2, replace=False)
        lead = gap(record) * (STRENGTH[a] - STRENGTH[b])
        won = rng.choice(3, p=np.array([np.exp(lead), np.exp(-lead), 0.4]) / (
            np.exp(lead) + np.exp(-lead) + 0.4
        ))  # fmt: skip
        text = also if at == 0 else record["text"]
        rows.append(
            {
                "id": at,
                "model_a": str(a),
                "model_b": str(b),
                "prompt": json.dumps([text, "And why?"]),
                "response_a": json.dumps([f"a {at}", "So."]),
                "response_b": json.dumps([f"b {at}", "So."]),
                "winner_model_a": int(won == 0),
                "winner_model_b": int(won == 1),
                "winner_tie": int(won == 2),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(folder: Path, part: str, *, responses: bool = False) -> list[str]:
    """Write a folder in RouteLLM's layout, and return its prompts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(part))
    header = ["prompt", WEAK, STRONG]
    header += [f"{WEAK}_response", f"{STRONG}_response"] if responses else []
    with (folder / f"{part}_responses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for record in drawn(part):
            right = [rng.random() < (0.15 if gap(record) > 1 else 0.85), rng.random() < 0.9]
            texts = ["It is 4.", "It is 5."] if responses else []
            writer.writerow([record["text"], *map(bool, right), *texts])
    return [record["text"] for record in drawn(part)]


def contaminated(path: Path, prompt: str) -> Path:
    path.write_text(json.dumps({"eval_prompt": prompt, "train_prompt": "", "eval_idx": 0}) + "\n")
    return path


def paper(tmp_path: Path, store: Path) -> PreferenceExperiment:
    """Return the bundled experiment on tiny data and models."""
    mmlu = answers(tmp_path / "mmlu" / "responses", "mmlu")
    gsm8k = answers(tmp_path / "gsm8k", "gsm8k", responses=True)
    answers(tmp_path / "validation", "gold")
    contaminated(tmp_path / "gsm8k" / "contaminated_prompts.jsonl", gsm8k[3])
    arena = arena_file(tmp_path / "arena.jsonl", also=f"  {mmlu[5].upper()}")
    encoder = save_tiny_encoder(tmp_path / "encoder")
    llm = save_tiny_llm(tmp_path / "llm", chat=CHAT)
    return load_experiment(
        "routellm_paper",
        (
            f"store.directory={store}",
            f"preferences.sources.0.path={arena}",
            f"preferences.sources.1.path={tmp_path / 'validation'}",
            f"benchmarks.mmlu.directory={tmp_path / 'mmlu' / 'responses'}",
            "benchmarks.mmlu.contaminated="
            + str(contaminated(tmp_path / "mmlu" / "contaminated_prompts.jsonl", mmlu[7])),
            f"benchmarks.gsm8k.directory={tmp_path / 'gsm8k'}",
            *(f"routers.{name}.encoder={encoder}" for name in ("mf", "sw-ranking", "knn", "bert")),
            "routers.bert.max_length=32",
            f"routers.causal-llm.model={llm}",
            "routers.causal-llm.max_length=48",
            "routers.causal-llm.template='Q:{query}'",
            "routers.causal-llm.trainer.precision=32-true",
            "routers.bert.trainer.max_epochs=1",
            "evaluation.replicates=100",
            "gate.min_apgr=1",  # a promotion would start two more processes; others test it
        ),
    )


def datasets_of(run: Run) -> dict[str, int]:
    """Return the rows of each dataset that is attached to an MLflow run."""
    entries = run.inputs.dataset_inputs if run.inputs else []
    return {
        entry.dataset.name: json.loads(str(entry.dataset.profile))["num_rows"] for entry in entries
    }


@pytest.fixture
def experiment(tmp_path: Path, store_directory: Path) -> PreferenceExperiment:
    return paper(tmp_path, store_directory)


@pytest.mark.slow
def test_the_papers_experiment_runs_whole(
    experiment: PreferenceExperiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prefect_server: None,
) -> None:
    report = preference_pipeline(experiment)
    # What the command line prints of it, and that it takes this flow.
    monkeypatch.setattr(commands, "_experiment", lambda arguments: experiment)
    monkeypatch.setattr("flows.preference_pipeline.preference_pipeline", lambda given: report)
    monkeypatch.setattr("flows.retrain._report", lambda given, max_hours: report)
    capsys.readouterr()
    for command in ("run", "retrain"):
        arguments = cli.parser().parse_args([command, "--config", "routellm_paper"])
        assert arguments.command(arguments) == 0
        table = capsys.readouterr().out
        for said in ("Battles for", "Routers on mmlu: 69", "Routers on gsm8k: 39", "causal-llm"):
            assert said in table
    arguments = cli.parser().parse_args(["run", "--config", "routellm_paper", "--json"])
    assert arguments.command(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"mf", "sw-ranking", "bert", "causal-llm", "knn", "length", "random", "oracle"}
    assert list(found["benchmarks"]) == ["mmlu", "gsm8k"]
    for name, page in found["benchmarks"].items():
        assert page["routers"].keys() == names
        assert (page["n"], page["out_of_fold"]) == (ROWS[name] - 1, False)
        assert page["left_out"] == {"contaminated": 1}
        assert (page["weak"], page["strong"]) == (WEAK, STRONG)
    # The battle on a prompt of a benchmark is left out, however it is spelled.
    arena, gold = found["battles"]["sources"]
    assert arena["left out"] == f"1 {HELD_OUT}"
    assert gold["of the pair"] == gold["battles"] == str(ROWS["gold"])
    assert found["battles"]["counts"]["battles"] == ROWS["arena"] - 1 + ROWS["gold"]

    receipt, store = found["receipt"], experiment.store
    assert receipt["checks"][1]["passed"], receipt["checks"]  # it reproduces its win rates
    assert receipt["model"] == experiment.pair.name()
    assert (receipt["verdict"], champion(store, receipt["model"])) == ("rejected", None)

    client, folder = MlflowClient(store.mlflow_uri()), experiment.pair.name()
    run = client.get_run(found["run_id"])
    assert run.data.tags[f"turnout.best.{folder}"] == found["best"] == receipt["router"]
    metrics = {f"{folder}/battles_pair", f"{folder}/best_apgr", f"{folder}/gsm8k/best_apgr"}
    assert metrics <= run.data.metrics.keys()
    logged = {item.path for item in client.list_artifacts(found["run_id"], folder)}
    files = {"cost_quality.png", "comparison.md", "battles.md", "win_rates", "gsm8k"}
    assert {f"{folder}/{name}" for name in files} <= logged
    own = client.search_runs(
        [tracking.experiment_id(store)], f"tags.`mlflow.parentRunId` = '{found['run_id']}'"
    )
    children = {child.info.run_name: child for child in own}
    assert names <= children.keys()
    for name in names:
        values = children[name].data.metrics
        for benchmark, prefix in (("mmlu", ""), ("gsm8k", "gsm8k/")):
            reported = found["benchmarks"][benchmark]["routers"][name]["apgr"]
            assert values[f"{prefix}apgr"] == pytest.approx(reported)
    # What each router learned from has its kind's battles.
    counts, battles = found["battles"]["counts"], f"battles {folder}"
    for name in ("mf", "sw-ranking", "knn"):
        assert datasets_of(children[name])[battles] == counts["battles"]
    for name in ("bert", "causal-llm"):
        assert datasets_of(children[name])[battles] == counts["battles_pair"]

    # The other commands find what they look for.
    router = logged_router(store, "mf")
    kept = logged_rows(store, router)
    assert (router.pair, router.metric, len(kept.win_rate)) == (experiment.pair, "correct", 69)
    assert kept.weak_quality is not None
    assert kept.strong_quality is not None
    assert apgr(kept.win_rate, kept.weak_quality, kept.strong_quality) == pytest.approx(
        found["benchmarks"]["mmlu"]["routers"]["mf"]["apgr"]
    )

    assert all(finding.ok for finding in findings(experiment) if "Prefect" not in finding.what)


def test_no_judged_prompt_is_trained_on(experiment: PreferenceExperiment) -> None:
    warehouse = Warehouse(experiment.store.directory)
    judged = judged_queries.fn(warehouse, experiment)
    assert judged.left_out == {"mmlu": {"contaminated": 1}, "gsm8k": {"contaminated": 1}}
    assert judged.decisive() is judged.benchmarks["mmlu"]
    prompts = {same_prompt(text) for text in judged.together.labels.read()["text"].to_pylist()}
    assert len(prompts) == ROWS["mmlu"] + ROWS["gsm8k"] - 2
    found = collect_preferences.fn(
        warehouse, experiment.preferences, experiment.pair, held_out=judged.together.labels
    )
    for battles in (found.all_llms, found.pair):
        assert not prompts & {same_prompt(text) for text in battles.read()["prompt"].to_pylist()}
    assert {*found.pair.read()["llm_a"].to_pylist()} <= {WEAK, STRONG}
    # A folder that was moved holds the same queries.
    places = [folder.directory for folder in experiment.benchmarks]
    moved = [place.rename(place.with_name(f"{place.name}-moved")) for place in places]
    folders = tuple(
        folder.model_copy(update={"directory": place})
        for folder, place in zip(experiment.benchmarks, moved, strict=True)
    )
    again = judged_queries.fn(warehouse, experiment.model_copy(update={"benchmarks": folders}))
    assert again.together == judged.together


def changed(path: Path, **changes: Any) -> Path:
    """Write the bundled file with some top-level settings changed."""
    settings = yaml.safe_load((EXPERIMENTS / "routellm_paper.yaml").read_text()) | changes
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_bundled_file_is_the_papers() -> None:
    paper = load_experiment("routellm_paper")
    assert paper.pair == Pair(weak=WEAK, strong=STRONG)
    assert paper.preferences.tiers == 10
    assert [source.kind for source in paper.preferences.sources] == ["arena", "gold"]
    assert [folder.name for folder in paper.benchmarks] == ["mmlu", "gsm8k"]
    assert [router.router for router in paper.routers][:4] == [
        "mf", "sw_ranking", "bert", "causal_llm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routers": []}, "Expected at least one, with different names"),
        ({"benchmarks": []}, "benchmarks: .*at least 1 item"),
        ({"benchmarks": [{"name": "a/b", "directory": "x"}]}, "benchmark name 'a/b' cannot be"),
        (
            {"benchmarks": [{"name": "a", "directory": "x"}, {"name": "a", "directory": "y"}]},
            "share the name 'a'.*Correct benchmarks.name",
        ),
        (
            {"benchmarks": [{"name": "a", "directory": "x"}, {"name": "b", "directory": "x"}]},
            "share the directory 'x'",
        ),
        ({"preferences": {"sources": [{"kind": "responses"}]}}, "no LLM is asked here.*Take it"),
        ({"quality": {}}, "quality: no such setting"),
    ],
)
def test_bad_settings_are_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(changed(tmp_path / "e.yaml", **changes))


def test_what_is_missing_is_said_before_anything_is_trained(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    places = {"store": {"directory": str(store_directory)}, "routers": [{"router": "length"}]}
    loaded = load_experiment(changed(tmp_path / "e.yaml", **places))
    assert isinstance(loaded, PreferenceExperiment)
    with pytest.raises(DataError, match=r"3 things stand in the way(?s:.*)'mmlu' has no CSV in"):
        preference_pipeline(loaded)
    missing = {finding.what for finding in findings(loaded) if not finding.ok}
    assert missing == {"benchmark mmlu", "benchmark gsm8k", "battles routellm_mmlu_validation"}


def test_every_router_says_which_battles_it_learns_from() -> None:
    kinds = {each.model_fields["router"].default: each for each in get_args(get_args(Router)[0])}
    every = {kind for kind, settings in kinds.items() if settings.battles_of == "all"}
    joining = {kind for kind, settings in kinds.items() if settings.joins_battles}
    assert every == {"mf", "sw_ranking", "knn"}
    assert joining == {"mf", "sw_ranking", "bert", "causal_llm"}


def generating(
    store: Path, url: str, arena: Path, encoder: str = "minilm", **preferences: Any
) -> dict[str, Any]:
    """Return an experiment that asks a scripted server, and learns from others' battles too."""

    def llm(name: str) -> dict[str, Any]:
        return {"name": name, "model": name, "endpoint": {"url": url}}

    judging = {
        "llm": llm("judy") | {"prices": {"output_usd_per_million": 1000.0}},
        "template": "{question}\n1. {answer_a}\n2. {answer_b}\n[[A]] [[B]] [[C]]",
    }
    return {
        "name": "joined",
        "store": {"directory": str(store)},
        "queries": {"limit": 40},
        "llms": [llm("weak"), llm("strong")],
        "pairs": [{"weak": "weak", "strong": "strong"}],
        "generation": {"samples": 1},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [{"router": kind, "encoder": encoder} for kind in ("sw_ranking", "knn")],
        "evaluation": {"replicates": 100, "folds": 2},
        "gate": {"min_apgr": 1},
        "preferences": {
            "sources": [{"kind": "arena", "path": str(arena)}, {"kind": "judge"}],
            "names": {STRONG: "strong", ARENA_WEAK: "weak"},
            "judge": judging,
            **preferences,
        },
    }


def answer(prompt: str, sample: int) -> str:
    """Answer half of the questions rightly; as a judge, take the longer answer."""
    if "[[A]]" in prompt:
        first, second = prompt.splitlines()[1:3]
        return "So [[A]]" if len(first) > len(second) else "So [[B]]"
    record = next((record for record in RECORDS if record["text"] in prompt), RECORDS[0])
    return str(record["gold"][0]) if (len(prompt) + sample) % 2 else "I do not know."


@pytest.mark.slow
def test_battles_join_labels_where_llms_are_asked(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    arena = arena_file(tmp_path / "arena.jsonl", also="One more?")
    file, encoder = tmp_path / "joined.yaml", str(save_tiny_encoder(tmp_path / "encoder"))
    with ScriptedLLM(answer=answer) as server:
        file.write_text(json.dumps(generating(store_directory, server.url, arena, encoder)))
        loaded = load_experiment(file)
        assert isinstance(loaded, Experiment)
        report = pipeline(loaded)
    (pair,) = report.pairs
    assert pair.out_of_fold
    client = MlflowClient(loaded.store.mlflow_uri())
    counts = client.get_run(report.run_id).data.metrics
    # Every query is in the battles, of whichever split: each fold's training hides its own.
    assert counts["weak--strong/battles_responses"] == 40
    assert counts["weak--strong/battles_arena"] == ROWS["arena"]
    assert counts["weak--strong/judge_billed_usd"] > 0
    children = client.search_runs(
        [tracking.experiment_id(loaded.store)], f"tags.`mlflow.parentRunId` = '{report.run_id}'"
    )
    learnt = {child.info.run_name: datasets_of(child) for child in children}
    assert "battles weak--strong" in learnt["sw-ranking"]
    assert "battles weak--strong" not in learnt["knn"]


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ({"names": {"gpt-4": "stronk"}}, "Did you mean 'strong'.*Correct preferences.names"),
        (
            {"sources": [{"kind": "responses", "llms": ["weak", "week"]}], "judge": None},
            "Unknown LLM 'week'.*Correct preferences.sources.llms",
        ),
        (
            {"sources": [{"kind": "responses", "llms": ["weak"]}], "judge": None},
            "not of every pair",
        ),
    ],
)
def test_joined_preferences_are_checked(
    tmp_path: Path, preferences: dict[str, Any], message: str
) -> None:
    file = tmp_path / "joined.yaml"
    settings = generating(tmp_path, "http://localhost:1/v1", tmp_path / "a.jsonl", **preferences)
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        load_experiment(file)
