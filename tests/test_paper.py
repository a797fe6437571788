"""The paper's experiment whole, on MixInstruct's schema, with tiny random BART and DeBERTa.

Nothing but sizes and places is changed: three pairs, four LLMs, a held-out test split.
"""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from scripted_llm import ScriptedLLM
from test_bartscore import _bart, _saved
from test_hybrid import save_tiny_encoder

from conf.load import load_experiment
from flows.pipeline import pipeline
from tasks import tracking

SIZES = {"train": 30, "validation": 12, "test": 24}


def mixinstruct(folder: Path) -> Path:
    """Write rows of llm-blender/mix-instruct's schema, one file for each split."""
    folder.mkdir()
    for split, count in SIZES.items():
        rows: list[dict[str, object]] = [
            {
                "id": f"unified_chip2/{split}{row}",
                "instruction": f"Name {row} things that are found in {split}.",
                "input": "" if row % 2 else "Be brief.",
                "output": "Paris is a city in France",
                "candidates": [],
            }
            for row in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.mark.slow
def test_the_papers_experiment_runs_whole(
    tmp_path: Path, store_directory: Path, prefect_server: None
) -> None:
    bart = _saved(_bart(1), tmp_path / "bart", adds_special=True)
    deberta = save_tiny_encoder(tmp_path / "deberta", kind="deberta")
    queries = mixinstruct(tmp_path / "mixinstruct")
    with ScriptedLLM() as server:
        paper = load_experiment("hybrid_llm_paper")
        urls = [
            f"llms.{llm.name}.endpoint={{url: '{server.url}', api: {llm.endpoint.api}}}"
            for llm in paper.llms
        ]
        kinds = ("hybrid-deterministic", "hybrid-probabilistic", "hybrid-transformed")
        models = [
            change
            for kind in kinds
            for change in (
                f"routers.{kind}.encoder={deberta}",
                f"routers.{kind}.max_length=32",
                f"routers.{kind}.trainer.precision=32-true",
                f"routers.{kind}.trainer.max_epochs=1",
            )
        ]
        experiment = load_experiment(
            "hybrid_llm_paper",
            (
                f"store.directory={store_directory}",
                f"queries.path={queries}",
                "generation.samples=2",
                f"quality.metrics.bartscore.checkpoint={bart}",
                "quality.metrics.bartscore.max_length=32",
                "evaluation={replicates: 100, min_test_queries: 20}",
                *urls,
                *models,
            ),
        )
        report = pipeline(experiment)
    assert [pair.pair for pair in report.pairs] == list(paper.pairs)
    for pair in report.pairs:
        assert (pair.queries, pair.out_of_fold) == (SIZES["test"], False)
        assert pair.estimates.keys() == {*kinds, "knn", "length", "random", "oracle"}
        assert pair.receipt.checks[1].passed, pair.receipt.to_markdown()
    client = MlflowClient(experiment.store.mlflow_uri())
    children = client.search_runs(
        [tracking.experiment_id(experiment.store)],
        f"tags.`mlflow.parentRunId` = '{report.run_id}'",
    )
    repeated = ("-shuffled-2", "-shuffled-3")  # where the first shuffle was above chance
    once = [child for child in children if not child.info.run_name.endswith(repeated)]
    assert len(once) == 3 * 8  # the shuffled control too
    assert {model.name for model in client.search_registered_models()} == {
        pair.name() for pair in paper.pairs
    }
