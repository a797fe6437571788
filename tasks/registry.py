"""The registry: a router becomes a version of its pair's registered model, and is promoted or not.

The champion is whatever the alias `champion` points to; `previous` is what it pointed to before.
"""

from dataclasses import dataclass
from pathlib import Path

from prefect import task

from conf.errors import ArtifactError
from conf.schema import Gate, Store
from serving.score import win_rates_in_clean_process
from tasks import tracking
from tasks.evaluation import Comparison
from tasks.gate import Check, Receipt, above_chance, reproduces
from tasks.progress import stage
from tasks.training import TrainedRouter

ROOT = Path(__file__).parent.parent
CHAMPION = "champion"
PREVIOUS = "previous"
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "numpy", "scipy", "pydantic")


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    model: str
    version: str
    run_id: str

    def uri(self) -> str:
        """Return the URI that MLflow loads it by."""
        return f"models:/{self.model}/{self.version}"


@task(task_run_name="register {router.name}")
def register_router(store: Store, comparison: Comparison, router: TrainedRouter) -> Version:
    """Log the router's model to its run and register it under its pair's name."""
    from importlib.metadata import version

    import mlflow

    tracking.client(store)
    example = comparison.table.read()["text"].to_pylist()[:2]
    with stage(f"Registering {router.name}"), mlflow.start_run(run_id=router.run_id):
        logged = mlflow.pyfunc.log_model(
            name="router",
            python_model=ROOT / "serving" / "router_model.py",
            artifacts={"router": str(router.directory)},
            code_paths=[str(ROOT / "conf"), str(ROOT / "router_models")],
            input_example=example,
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            registered_model_name=comparison.pair.name(),
        )
    tags = {
        "router": router.name,
        "metric": comparison.metric,
        "test_digest": comparison.test_digest,
        "training_digest": router.digest,
    }
    registered = Version(
        comparison.pair.name(), str(logged.registered_model_version), router.run_id
    )
    for key, value in tags.items():
        tracking.client(store).set_model_version_tag(
            registered.model, registered.version, key, value
        )
    return registered


@task(task_run_name="judge {version.model} version {version.version}")
def judge(
    store: Store,
    comparison: Comparison,
    router: TrainedRouter,
    version: Version,
    settings: Gate,
) -> Receipt:
    """Hold the registered version against the gate and log its receipt."""
    receipt = Receipt(
        model=version.model,
        version=version.version,
        router=router.name,
        metric=comparison.metric,
        test_digest=comparison.test_digest,
        queries=comparison.queries,
        checks=(
            above_chance(comparison, settings),
            reproduction(store, comparison, router, version, settings),
        ),
    )
    client = tracking.client(store)
    client.log_text(version.run_id, receipt.to_json(), "gate/receipt.json")
    client.log_text(version.run_id, receipt.to_markdown(), "gate/receipt.md")
    client.set_model_version_tag(version.model, version.version, "gate", receipt.verdict())
    client.update_model_version(version.model, version.version, receipt.to_markdown())
    return receipt


def reproduction(
    store: Store,
    comparison: Comparison,
    router: TrainedRouter,
    version: Version,
    settings: Gate,
) -> Check:
    """Score the evaluated queries with the registered version in a clean process."""
    served = router.predictions.read()
    rate = dict(
        zip(served["query_key"].to_pylist(), served["served_win_rate"].to_pylist(), strict=True)
    )
    table = comparison.table.read()
    try:
        with stage("Scoring in a clean process"):
            loaded = win_rates_in_clean_process(
                version.uri(), table["text"].to_pylist(), tracking_uri=store.mlflow_uri()
            )
    except ArtifactError as error:
        bound = f"at most {settings.reproduce_tolerance:g}"
        return Check("reproduces its win rates", str(error), bound, passed=False)
    return reproduces([rate[key] for key in table["query_key"].to_pylist()], loaded, settings)


@task(task_run_name="promote {version.model} version {version.version}")
def promote(store: Store, version: Version) -> None:
    """Make ``version`` the champion; the champion so far becomes the previous one."""
    client = tracking.client(store)
    current = champion(store, version.model)
    if current is not None and current != version.version:
        client.set_registered_model_alias(version.model, PREVIOUS, current)
    client.set_registered_model_alias(version.model, CHAMPION, version.version)


def champion(store: Store, model: str) -> str | None:
    """Return the version that the champion alias of ``model`` points to, if any."""
    from mlflow.exceptions import MlflowException

    try:
        return str(tracking.client(store).get_model_version_by_alias(model, CHAMPION).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
