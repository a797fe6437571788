"""`turnout doctor` as a function: all kinds of findings, and none crashes for a missing package."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.load import load_experiment
from flows import doctor
from flows.doctor import Finding, findings


def found(store: Path, *overrides: str) -> dict[str, Finding]:
    experiment = load_experiment(overrides=(f"store.directory={store}", *overrides))
    return {finding.what: finding for finding in findings(experiment)}


def test_nothing_of_the_stack_is_imported_before_it_was_looked_for() -> None:
    code = (
        "import sys\nimport flows.doctor\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'evaluate', 'duckdb', 'pyarrow', 'openai'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_missing_package_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, store_directory: Path
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("duckdb", "no-such-package"))
    by_name = found(store_directory)
    assert list(by_name) == ["duckdb", "no-such-package"]
    assert by_name["no-such-package"] == Finding(
        "no-such-package", False, "not installed", "make install"
    )


def test_scorers_encoders_and_queries_are_looked_at(store_directory: Path) -> None:
    well = found(store_directory)
    names = {"queries", "smollm2", "metric bartscore", "metric gold", "model minilm"}
    assert names <= well.keys()
    assert all(finding.ok for finding in well.values())


@pytest.mark.parametrize(
    ("override", "what", "problem", "remedy"),
    [
        (
            "llms.smollm2.template={question}",
            "smollm2",
            "asks for ['question']",
            "Correct llms.smollm2.template.",
        ),
        (
            "quality.metrics.bartscore.checkpoint=/no/such/folder",
            "metric bartscore",
            "There is no checkpoint at /no/such/folder.",
            "Check the path",
        ),
        ("routers.knn.encoder=/no/such", "model /no/such", "is no folder", "Correct the path."),
        ("queries={source: file, path: no.jsonl}", "queries", "There is no file", "Correct quer"),
    ],
)
def test_what_is_wrong_comes_with_what_to_do(
    store_directory: Path, override: str, what: str, problem: str, remedy: str
) -> None:
    key, _, value = override.partition("=")
    quoted: Any = f"{key}='{value}'" if value.startswith("{question") else override
    finding = found(store_directory, quoted)[what]
    assert not finding.ok
    assert problem in finding.found
    assert remedy in finding.remedy


def test_nothing_is_downloaded_for_the_doctor(store_directory: Path) -> None:
    by_name = found(
        store_directory,
        "queries={source: mixinstruct, path: llm-blender/mix-instruct}",
        "quality.metrics.bartscore.checkpoint=facebook/bart-large-cnn",
        "quality.metrics.bartscore.architecture=seq2seq",
        "routers.knn.encoder=microsoft/deberta-v3-large",
    )
    for what in ("queries", "metric bartscore", "model microsoft/deberta-v3-large"):
        assert by_name[what].ok, by_name[what]
        assert "from the hub when a run needs it" in by_name[what].found
