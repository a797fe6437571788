"""`turnout add-llm`: three scripted LLMs behind real HTTP are a pool, and a fourth one joins it."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demonstration import answers
from mlflow import MlflowClient
from scripted_llm import ScriptedLLM

from conf.errors import ConfigError, StoreError, TurnoutError
from conf.routers import Knn
from conf.schema import Experiment
from flows.add_llm import KIND, add_llm
from flows.cli import parsed
from flows.terminal import show_run
from router_models import mf
from router_models.catalog import build_router, load_router
from router_models.mf import MatrixFactorizationRouter
from router_models.pool import expected_quality
from tasks import pool, pool_extension, promotion, tracking
from tasks.calibration_data import logged_router
from tasks.controls import prompt_hashes
from tasks.generation import collect_responses, generate_responses
from tasks.judged_runs import last_run
from tasks.pool import PoolReport, rated_pool, route_pool
from tasks.pool_extension import Extendable, extendable, extended_pool, with_pool
from tasks.queries import BUNDLED, ingest_queries
from tasks.receipt import Check
from tasks.registry import Version
from tasks.reporting import RunReport
from tasks.scoring import score_responses
from tasks.warehouse import Snapshot, Warehouse

QUESTIONS = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
RIVERS = [question["text"] for question in QUESTIONS if question["domain"] == "river"]
MODEL = "pool-geo"
KNOWN = ("large", "medium", "small")
# How often each LLM is right on the kinds of questions; the newcomer knows rivers alone.
RIGHT: dict[str, Callable[[str], float]] = {
    "small": lambda kind: 0.8 if kind in ("capital", "continent") else 0.1,
    "medium": lambda kind: 0.1 if kind == "river" else 0.6,
    "large": lambda kind: 0.2 if kind == "river" else 0.9,
    "newcomer": lambda kind: 0.95 if kind == "river" else 0.05,
}
USD = {"small": 0.1, "medium": 0.5, "large": 2.0, "newcomer": 0.2}


def settings(store: Path, urls: dict[str, str], **changes: Any) -> dict[str, Any]:
    def llm(name: str) -> dict[str, Any]:
        prices = {"input_usd_per_million": USD[name], "output_usd_per_million": USD[name]}
        return {"name": name, "model": name, "endpoint": {"url": urls[name]}, "prices": prices}

    return {
        "name": "geo",
        "store": {"directory": str(store)},
        "queries": {"source": "bundled", "limit": 150},
        "llms": [llm(name) for name in urls],
        "pairs": [{"weak": "small", "strong": "large"}],
        "generation": {"samples": 2},
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [
            {"router": "mf", "trainer": {"max_epochs": 6}},
            {"router": "knn"},
        ],
        "evaluation": {"replicates": 200, "folds": 2, "min_test_queries": 30},
        "pool": {"margin": 0.02, "routers": ["mf"]},
        **changes,
    }


def answered(experiment: Experiment) -> tuple[Snapshot, Snapshot, Snapshot]:
    """Return queries, responses and scores, asking for what is missing, as the pipeline does."""
    warehouse = Warehouse(experiment.store.directory)
    queries = ingest_queries.fn(warehouse, experiment.queries)
    for llm in experiment.llms:
        generate_responses.fn(warehouse, queries, llm, experiment.generation)
    responses = collect_responses.fn(warehouse, queries, experiment.llms, experiment.generation)
    metrics = experiment.quality.metrics
    return queries, responses, score_responses.fn(warehouse, queries, responses, metrics)


def trained(experiment: Experiment) -> PoolReport:
    """Train the pool as the pipeline does, without its pairs."""
    with tracking.parent_run(experiment) as run_id:
        return route_pool.fn(experiment, *answered(experiment), run_id)


@dataclass(frozen=True)
class Story:
    """A pool of three, and what came of adding the fourth."""

    three: Experiment
    four: Experiment
    before: PoolReport
    added: RunReport
    asked: dict[str, int]
    """LLM → requests that it got for the addition."""

    def version(self, number: str) -> MatrixFactorizationRouter:
        """Return a registered version's router."""
        import mlflow

        tracking.client(self.four.store)
        where = mlflow.artifacts.download_artifacts(f"models:/{MODEL}/{number}/artifacts/router")
        router = load_router(Path(where))
        assert isinstance(router, MatrixFactorizationRouter)
        return router


def passed(*_: object) -> Check:
    return Check("reproduces its choices", "not asked in this test", "all", True, "", "", "")


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path, prefect_server: None
) -> Iterator[Story]:
    store = tmp_path_factory.mktemp("add") / "store"
    store.mkdir()
    shutil.copy(empty_mlflow_database, store / "mlflow.db")
    llms = {name: ScriptedLLM(answer=answers(right)).__enter__() for name, right in RIGHT.items()}
    urls = {name: llm.url for name, llm in llms.items()}
    three = Experiment.model_validate(settings(store, {name: urls[name] for name in KNOWN}))
    four = Experiment.model_validate(settings(store, urls))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        # A clean process takes seconds. The gate starts one for the version that is looked at here.
        patch.setattr(promotion, "smoke_test", lambda store, uri: None)
        with pytest.MonkeyPatch.context() as first:
            # How the champion came to be one is not looked at: 150 queries would show too little.
            for check in ("reproduces_choices", "no_worse_than_a_coin"):
                first.setattr(pool, check, passed)
            before = trained(three)
        already = {name: len(llm.log) for name, llm in llms.items()}
        added = add_llm(four, "newcomer")
        asked = {name: len(llm.log) - already[name] for name, llm in llms.items()}
        yield Story(three, four, before, added, asked)
    for llm in llms.values():
        llm.__exit__()


def test_its_run_says_what_it_did(story: Story) -> None:
    run = tracking.client(story.four.store).get_run(story.added.run_id)
    assert run.info.run_name == "geo: add newcomer"
    assert run.data.tags["turnout.kind"] == "add-llm"


def test_only_the_new_llm_is_asked(story: Story) -> None:
    assert story.before.receipt.verdict() == "promoted", story.before.receipt.to_markdown()
    assert story.asked == {"small": 0, "medium": 0, "large": 0, "newcomer": 150}


def test_nothing_changes_for_the_llms_that_were_known(story: Story) -> None:
    before, after = story.version("1"), story.version("2")
    assert (before.llms_, after.llms_) == ([*KNOWN], [*KNOWN, "newcomer"])
    for name, weights in before.weights_.items():
        same = after.weights_[name][: len(KNOWN)] if name == "vectors" else after.weights_[name]
        assert np.array_equal(weights, same)
    prompts = [question["text"] for question in QUESTIONS[:40]]
    for pair in (("large", "small"), ("medium", "small"), ("large", "medium")):
        sides = {"strong": pair[0], "weak": pair[1]}
        known = before.win_rate_between(prompts, **sides)
        assert np.array_equal(after.win_rate_between(prompts, **sides), known)


def test_the_new_version_is_judged_promoted_and_says_where_it_comes_from(story: Story) -> None:
    assert story.added.pool is not None
    receipt = story.added.pool.receipt
    assert receipt.verdict() == "promoted", receipt.to_markdown()
    tested = story.added.pool.queries
    assert receipt.checks[0].value == f"{tested} of {tested} queries go to the logged LLM"
    assert receipt.notes[0].startswith(
        f"It is version 1 with one more LLM: 'newcomer', learnt from {3 * (150 - tested)} battles "
    )
    assert (
        receipt.notes[1] == "Neither version 1 nor what it was taught has seen the queries judged."
    )
    aliases = promotion.aliases(story.four.store, MODEL)
    assert (aliases.champion, aliases.previous) == ("2", "1")
    client = MlflowClient(story.four.store.mlflow_uri())
    version = client.get_model_version(MODEL, "2")
    tags = {"extends": "1", "extends.llm": "newcomer", "gate": "passed", "router": "mf"}
    assert tags.items() <= version.tags.items()
    (routed,) = story.added.pool.routers
    run = client.get_run(routed.run_id)
    assert {
        "extends": "1",
        "mlflow.parentRunId": story.added.run_id,
    }.items() <= run.data.tags.items()
    assert json.loads(json.dumps(story.added.to_json()))["pool"]["receipt"]["verdict"] == "promoted"


def test_the_served_model_sends_the_newcomer_what_it_knows(story: Story) -> None:
    import mlflow

    tracking.client(story.four.store)
    model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
    chosen = model.predict(RIVERS)
    assert np.mean([llm == "newcomer" for llm in chosen]) > 0.7
    others = [question["text"] for question in QUESTIONS if question["domain"] != "river"][::6]
    assert np.mean([llm == "newcomer" for llm in model.predict(others)]) < 0.1
    assert story.added.pool is not None
    (after,), (before,) = story.added.pool.routers, story.before.routers
    assert after.outcome.quality.value > before.outcome.quality.value + 0.04


def test_its_run_is_not_taken_for_that_of_a_pipeline(story: Story) -> None:
    store = story.four.store
    run = MlflowClient(store.mlflow_uri()).get_run(story.added.run_id)
    assert (run.data.tags["turnout.kind"], run.info.status) == (KIND, "FINISHED")
    assert last_run(store) != story.added.run_id
    with pytest.raises(TurnoutError, match=r"mf"):
        logged_router(store, "mf")


def test_twins_stand_in_for_a_champion_that_has_seen_the_queries(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(story.four.store.mlflow_uri())
    run_id = str(client.get_model_version(MODEL, "1").run_id)
    base = Extendable("newcomer", Version(MODEL, "1", run_id), story.version("1"))
    rated = rated_pool(story.four, *answered(story.four))
    table = rated.table.to_pylist()
    tested = [row["text"] for row in table if row["split"] == "test"]
    taught = [row["text"] for row in table if row["split"] != "test"]
    assert extended_pool(base, rated, story.four).prompts == {*prompt_hashes(taught)}

    # As after an evaluation out of fold: what is tested is among what it was trained on.
    everything = frozenset(prompt_hashes(tested + taught))
    monkeypatch.setattr(pool_extension, "learnt_prompts", lambda client, run_id: everything)
    seen = extended_pool(base, rated, story.four)
    assert seen.notes[1].startswith("The choices judged are those of twins of version 1, 1 in all")
    assert seen.prompts == everything
    # Here the champion did not see them in truth, and a twin trained without them is the champion.
    assert np.array_equal(seen.expected, expected_quality(seen.router, tested, llms=rated.llms))
    assert base.router.llms_ == [*KNOWN]


def test_a_second_time_is_refused_before_anything_is_asked(story: Story) -> None:
    client = MlflowClient(story.four.store.mlflow_uri())
    runs = len(client.search_runs([tracking.experiment_id(story.four.store)]))
    with pytest.raises(ConfigError, match=r"Version 2 of pool-geo, the champion, knows 'newcomer'"):
        add_llm(story.four, "newcomer")
    assert len(client.search_runs([tracking.experiment_id(story.four.store)])) == runs


def changed(story: Story, **changes: Any) -> Experiment:
    given = story.four.model_dump(mode="json", exclude={"pool"}, exclude_unset=True)
    return Experiment.model_validate(given | {"pool": {"margin": 0.02}} | changes)


def test_experiments_that_cannot_be_extended_are_told_why(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"'geo' has no pool.*Set pool.*`turnout run`"):
        with_pool(changed(story, pool=None), "newcomer")
    with pytest.raises(ConfigError, match=r"Unknown LLM 'newcomr'. Did you mean 'newcomer'.*under"):
        with_pool(story.four, "newcomr")
    with pytest.raises(StoreError, match=r"pool-empty has no champion.*`turnout run`.*pool-empty`"):
        extendable(changed(story, name="empty"), "newcomer")
    llms = [llm.model_dump(mode="json", exclude_unset=True) for llm in story.four.llms]
    more = [{**llms[0], "name": name} for name in ("fourth", "fifth")]
    with pytest.raises(ConfigError, match=r"does not know fifth either.*'fourth'.*one after the"):
        extendable(changed(story, llms=[*llms, *more]), "fourth")
    other = {"label_metric": "exact", "metrics": [{"metric": "gold_match", "name": "exact"}]}
    with pytest.raises(ConfigError, match=r"by gold, and the experiment's are by exact.*Set qual"):
        extendable(changed(story, quality=other), "newcomer")
    monkeypatch.setattr(pool_extension, "_loaded", lambda store, version: build_router(Knn()))
    with pytest.raises(ConfigError, match=r"Version 2 .* of kind knn.*Expected mf.*pool.routers="):
        extendable(story.four, "newcomer")


def test_the_terminal_shows_how_it_came_about(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    show_run(story.four, story.added)
    shown = " ".join(capsys.readouterr().out.split())
    assert "mf is version 2 of pool-geo" in shown
    assert "It is version 1 with one more LLM: 'newcomer', learnt from" in shown
    assert 'Load the champion with "models:/pool-geo@champion".' in shown
    assert "…" not in shown


def test_the_command_takes_a_name_and_settings() -> None:
    arguments = parsed(["add-llm", "newcomer", "--config", "mine.yaml", "generation.budget_usd=1"])
    assert (arguments.llm, arguments.config) == ("newcomer", "mine.yaml")
    assert arguments.overrides == ["generation.budget_usd=1"]


def test_the_prior_is_as_wide_as_the_battles_say() -> None:
    rng = np.random.default_rng(0)
    features, prompts = rng.normal(size=(300, 8)), [f"prompt {row // 3}" for row in range(300)]

    def width(scale: float, count: int = 300) -> float:
        logits = scale * features[:count, 0]
        return mf._prior_variance(
            features[:count],
            (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(float),
            offset=np.zeros(count),
            prompts=prompts[:count],
            least=0.01,
        )

    assert width(0.0) <= 0.04
    assert width(4.0) >= 0.64
    assert width(4.0, count=3) == 0.01  # battles on one prompt: nothing to hold them against
