"""The gate: each check alone (met, not met, undefined), its arms, and the receipt."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect import flow

from conf.errors import ConfigError
from conf.llms import Pair
from conf.load import GATE, load_experiment
from conf.routers import Knn, Length
from conf.schema import Evaluation, Gate, Store
from router_models.catalog import build_router
from router_models.frontier import apgr as exact_apgr
from router_models.statistics import Estimate, Interval
from router_models.training_data import Comparisons
from tasks import controls, gate, registry, tracking
from tasks.controls import (
    ChampionArm,
    Training,
    champion_arm,
    duplicated_prompts,
    shuffled_outcomes,
)
from tasks.evaluation import Comparison
from tasks.figures import arms_figure
from tasks.gate import Copies
from tasks.labelling import RatedQueries
from tasks.preferences import battle, battle_table
from tasks.receipt import FIND_THE_LEAK, KEEP_THE_CHAMPION, Check, Receipt
from tasks.training import TrainedRouter
from tasks.warehouse import Snapshot, Warehouse

NAN = float("nan")
PAIR = Pair(weak="small", strong="large")
UNDEFINED = Estimate(NAN, Interval(NAN, NAN, reason="no gap"), "no gap")


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, Interval(low, high))


def test_the_file_says_what_the_model_says() -> None:
    assert Gate.model_validate(yaml.safe_load(GATE.read_text())) == Gate()
    assert yaml.safe_load(GATE.read_text()).keys() == Gate.model_fields.keys()


def test_the_file_is_every_experiments_default() -> None:
    assert load_experiment().gate == load_experiment("hybrid_llm_paper").gate == Gate()
    assert load_experiment(overrides=("gate.min_gain=0.02",)).gate == Gate(min_gain=0.02)
    with pytest.raises(ConfigError, match=r"gate\.min_gian: no such setting"):
        load_experiment(overrides=("gate.min_gian=0.02",))


@pytest.mark.parametrize(("low", "passed"), [(0.51, True), (0.5, False), (0.49, False)])
def test_only_an_interval_above_chance_passes(low: float, passed: bool) -> None:
    assert gate.above_chance(estimate(0.6, low, 0.7), Gate()).passed is passed


@pytest.mark.parametrize(("low", "passed"), [(0.001, True), (0.0, False), (-0.01, False)])
def test_random_is_beaten_only_surely(low: float, passed: bool) -> None:
    assert gate.beats_random(estimate(0.02, low, 0.05)).passed is passed


@pytest.mark.parametrize(
    ("advantage", "passed"),
    [
        (estimate(-0.02, -0.04, 0.0), True),
        (estimate(0.03, -0.01, 0.07), True),  # better, but not surely
        (estimate(0.03, 0.01, 0.05), False),
        (None, True),  # it is kNN itself
        (UNDEFINED, False),
    ],
)
def test_only_a_surely_better_knn_rejects(advantage: Estimate | None, passed: bool) -> None:
    assert gate.not_beaten_by_knn(advantage, Gate()).passed is passed


def test_the_tolerance_for_knn_counts() -> None:
    assert gate.not_beaten_by_knn(estimate(0.03, 0.01, 0.05), Gate(knn_tolerance=0.02)).passed


@pytest.mark.parametrize(("low", "passed"), [(0.46, True), (0.5, True), (0.51, False)])
def test_the_twin_on_shuffled_outcomes_must_be_at_chance(low: float, passed: bool) -> None:
    check = gate.chance_on_shuffled(estimate(0.52, low, 0.6))
    assert check.passed is passed
    assert "leak" in check.complaint


@pytest.mark.parametrize(("found", "passed"), [(0, True), (1, True), (2, False)])
def test_few_test_prompts_may_be_in_training(found: int, passed: bool) -> None:
    check = gate.no_duplicates(Copies(("What | is it?",) * found), 100, Gate())
    assert check.passed is passed
    assert check.value.count("|") == 0
    assert not gate.no_duplicates(Copies(), 0, Gate()).passed


@pytest.mark.parametrize(
    ("gain", "queries", "passed"),
    [
        (estimate(0.02, 0.001, 0.04), 100, True),
        (estimate(0.02, -0.001, 0.04), 100, False),  # not surely better
        (estimate(0.009, 0.004, 0.01), 100, False),  # surely better, but not worth it
        (estimate(0.02, 0.001, 0.04), 29, False),  # on too few queries
        (UNDEFINED, 100, False),
    ],
)
def test_a_champion_falls_only_to_a_sure_gain(gain: Estimate, queries: int, passed: bool) -> None:
    check = gate.better_than_champion(gain, Gate(), queries=queries)
    assert check.passed is passed
    assert check.complaint == "not better than champion"


def test_a_margin_lets_more_through() -> None:
    gain = estimate(0.02, -0.01, 0.05)
    assert not gate.promotes(gain, Gate())
    assert gate.promotes(gain, Gate(margin=0.02))


@pytest.mark.parametrize(("latency_ms", "passed"), [(250.0, True), (250.1, False), (NAN, False)])
def test_latency_is_held_to_its_budget(latency_ms: float, passed: bool) -> None:
    assert gate.fast_enough(latency_ms, Gate()).passed is passed


def test_reproduction_is_to_1e5() -> None:
    assert gate.reproduces([0.1, 0.2], [0.1, 0.200009], Gate()).passed
    assert not gate.reproduces([0.1, 0.2], [0.1, 0.20002], Gate()).passed
    assert not gate.reproduces([0.1, 0.2], [0.1, NAN], Gate()).passed
    assert not gate.reproduces([0.1, 0.2], [0.1], Gate()).passed
    assert not gate.does_not_load(OSError("no\nsuch | file"), Gate()).passed


@pytest.mark.parametrize("check", [gate.beats_random, gate.chance_on_shuffled])
def test_what_is_undefined_never_passes(check: object) -> None:
    for found in (check(UNDEFINED), gate.above_chance(UNDEFINED, Gate())):  # type: ignore[operator]
        assert not found.passed
        assert found.value == "undefined: no gap"


def test_all_versions_on_one_test_err_no_more_than_stated() -> None:
    # Only the lower end promotes: half of what is outside the interval.
    spent = [(1 - gate.promotion_level(Gate(), 1, nth=nth)) / 2 for nth in range(1, 1000)]
    assert sum(spent) < Gate().max_false_promotions
    assert spent[0] == pytest.approx(Gate().max_false_promotions / 2)


def test_the_level_allows_for_the_choice_of_the_best() -> None:
    assert gate.two_sided_level(Gate(), 5) == pytest.approx(0.99)
    assert gate.promotion_level(Gate(), 5) == pytest.approx(0.99)


def rated(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weak, strong = rng.uniform(0, 0.5, n), rng.uniform(0.3, 1, n)
    return strong - weak + rng.normal(0, 0.1, n), weak, strong


def test_matched_cost_gain_is_against_the_expectation_of_random() -> None:
    rate, weak, strong = rated(200, np.random.default_rng(0))
    options = {"replicates": 200, "seed": 0, "level": 0.95}
    good = gate.matched_cost_gain(rate, weak, strong, **options)  # type: ignore[arg-type]
    assert good.interval.low > 0
    constant = gate.matched_cost_gain(np.full(200, 0.3), weak, strong, **options)  # type: ignore[arg-type]
    assert constant.value == pytest.approx(0)
    assert constant.interval.high == pytest.approx(0)
    # Defined though there is no gap to recover.
    assert gate.matched_cost_gain(rate, strong, weak, **options).value < 0  # type: ignore[arg-type]


def receipt(*, champion: bool = True, challenger: bool = False) -> Receipt:
    checks = (
        Check("APGR above chance", "0.6 [0.55, 0.65]", "interval above 0.5", passed=True),
        gate.better_than_champion(estimate(0.0, -0.01, 0.01), Gate(), queries=300)
        if champion
        else gate.champion_check("no champion yet", passed=True),
    )
    return Receipt(
        *("small--large", "3", "mf", "bartscore", "abc", 300),
        checks,
        champion="2" if champion else None,
        arms={"candidate": "0.600 [0.550, 0.650]"},
        notes=("One note.",),
        challenger=challenger,
    )


def test_a_receipt_names_every_check_and_the_reason() -> None:
    rejected = receipt(challenger=True)
    assert rejected.verdict() == "rejected"
    assert rejected.failures() == ["better than the champion"]
    assert rejected.summary() == "rejected: not better than champion"
    kept = json.loads(rejected.to_json())
    assert (kept["verdict"], kept["summary"]) == ("rejected", rejected.summary())
    page = rejected.to_markdown()
    assert page.startswith("# Rejected: small--large version 3\n")
    assert "1 of 2 checks is not met. Version 2 stays the champion." in page
    assert "- **Not better than champion.** What it gains on the champion is too little" in page
    for check in rejected.checks:
        assert f"| {check.name} | {check.value} | {check.bound} |" in page
    for text in ("against version 2", "| candidate |", "- One note.", "becomes the challenger"):
        assert text in page
    assert "](http" not in page
    drawn = replace(rejected, figure="http://127.0.0.1:5000/#/experiments/1/runs/2")
    assert "curves of all of them](http://127.0.0.1:5000/#/experiments/1" in drawn.to_markdown()


def test_the_first_version_needs_no_champion() -> None:
    first = receipt(champion=False)
    assert first.summary() == first.verdict() == "promoted"
    page = first.to_markdown()
    assert page.startswith("# Promoted: small--large version 3\n")
    assert "against no champion yet" in page
    assert "Load it as `models:/small--large@champion`." in page


def test_a_receipt_says_what_to_do_first() -> None:
    slow = gate.fast_enough(300, Gate())
    unsure = gate.above_chance(estimate(0.5, 0.4, 0.6), Gate())
    too_little = gate.better_than_champion(estimate(0.0, -0.01, 0.01), Gate(), queries=300)
    leak = gate.no_duplicates(Copies(("What is it?",) * 9), 100, Gate())

    def steps(*checks: Check, version: str = "3") -> list[str]:
        return replace(receipt(), checks=checks, version=version).next_steps()

    assert steps(too_little) == [KEEP_THE_CHAMPION]
    assert steps(slow, unsure, too_little) == [slow.advice, gate.LEARN_MORE]
    # With a leak nothing else that was measured means anything.
    assert steps(slow, leak, too_little) == [FIND_THE_LEAK]
    assert steps(too_little, version="2")[0].startswith("Nothing has to be done.")


def test_a_receipt_with_all_that_can_go_wrong_fits_mlflows_description() -> None:
    """MLflow's database holds 5,000 characters of a version's description."""
    long = "x " * 1000
    checks = (
        gate.above_chance(UNDEFINED, Gate()),
        gate.does_not_load(OSError(long), Gate()),
        gate.beats_random(UNDEFINED),
        gate.not_beaten_by_knn(UNDEFINED, Gate()),
        gate.chance_on_shuffled(UNDEFINED),
        gate.no_duplicates(Copies((long,) * 50, (long,)), 100, Gate()),
        gate.judged_alike("bartscore", "gold"),
        gate.champion_check(f"cannot be scored: {long}", passed=False),
        gate.not_rolled_back(long),
        gate.fast_enough(300, Gate()),
    )
    arms = {f"arm {number}": gate.shown(estimate(0.6, 0.5, 0.7)) for number in range(5)}
    worst = replace(receipt(), checks=checks, arms=arms, notes=("n" * 230,) * 3, figure="u" * 150)
    assert len(worst.failures()) == 10
    assert all(check.because and check.advice for check in checks)
    assert len(registry.description(worst)) <= 5_000
    # What is cut off, if anything, is the evidence: why and what to do come first.
    assert "| check | measured |" in registry.description(worst)


def test_a_challenger_is_sound_and_may_yet_be_better() -> None:
    met = Check("APGR above chance", "", "", passed=True)
    lost = Check("better than the champion", "", "", passed=False)
    unsure, hopeless = estimate(0.005, -0.01, 0.02), estimate(-0.02, -0.03, 0.005)
    assert gate.may_challenge(unsure, [met, lost], Gate())
    assert not gate.may_challenge(hopeless, [met, lost], Gate())
    assert not gate.may_challenge(unsure, [Check("latency", "", "", passed=False), lost], Gate())
    assert not gate.may_challenge(unsure, [met], Gate())


def labels(texts: list[str], rng: np.random.Generator, *, test: int = 0) -> pa.Table:
    """Return a labels table; the last ``test`` rows are the test split, a few before validation."""
    _, weak, strong = rated(len(texts), rng)
    split = ["train"] * (len(texts) - test - 8) + ["validation"] * 8 + ["test"] * test
    return pa.table(
        {
            "query_key": [f"key-{row}" for row in range(len(texts))],
            "query_id": [f"{row:04}" for row in range(len(texts))],
            "text": texts,
            "domain": ["any"] * len(texts),
            "split": split,
            "weak_quality": weak,
            "strong_quality": strong,
            "probabilistic": (weak > strong).astype(float),
            "transformed": (weak > strong - 0.1).astype(float),
        }
    )


OUTCOMES = ["weak_quality", "strong_quality", "probabilistic", "transformed"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["a", "A ", "b", "c", "d  d", "d D"]), min_size=9, max_size=30))
def test_shuffling_moves_whole_outcomes_and_keeps_one_for_each_prompt(texts: list[str]) -> None:
    table = labels(texts, np.random.default_rng(0))
    moved = shuffled_outcomes(table, seed=3)
    assert moved.schema == table.schema
    assert moved.select(controls.IDENTITY) == table.select(controls.IDENTITY)
    outcomes = [tuple(row.values()) for row in moved.select(OUTCOMES).to_pylist()]
    assert set(outcomes) <= {tuple(row.values()) for row in table.select(OUTCOMES).to_pylist()}
    of_prompt: dict[str, set[tuple[float, ...]]] = {}
    for text, outcome in zip(texts, outcomes, strict=True):
        of_prompt.setdefault(" ".join(text.lower().split()), set()).add(outcome)
    assert all(len(found) == 1 for found in of_prompt.values())
    assert len(set(outcomes)) == len(of_prompt)  # a permutation: none is used twice
    assert moved == shuffled_outcomes(table, seed=3)


def test_shuffled_battles_agree_with_the_shuffled_labels() -> None:
    table = shuffled_outcomes(
        labels([f"p{n}" for n in range(12)], np.random.default_rng(1)), seed=1
    )
    sides = [("large", "small"), ("small", "large")]
    battles = battle_table(
        [battle(str(n), f"P{n}", *sides[n % 2], float(n % 3 == 0)) for n in range(16)],
        source="arena",
        dataset="here",
    )
    moved = controls.shuffled_battles(battles, table, strong="large", seed=1)
    gap = table["strong_quality"].to_numpy() - table["weak_quality"].to_numpy()
    for n, row in enumerate(moved.to_pylist()):
        assert row["prompt"] == f"P{n}"
        if n < 12:
            strong_wins = row["a_wins"] if row["llm_a"] == "large" else 1 - row["a_wins"]
            assert strong_wins == (gap[n] > 0)
    assert {row["a_wins"] for row in moved.to_pylist()[12:]} <= {0.0, 1.0}


def training(store: Store, table: pa.Table, **evaluation: int) -> Training:
    queries = RatedQueries(PAIR, Warehouse(store.directory).write_snapshot("labels", table))
    return Training(store, queries, Evaluation(replicates=300, **evaluation), 0, "")


def test_duplicates_are_counted_between_a_test_and_its_own_training(tmp_path: Path) -> None:
    texts = [f"question {row}" for row in range(40)]
    texts[35] = " QUESTION  3 "
    table = labels(texts, np.random.default_rng(0), test=10)
    held_out = training(Store(directory=tmp_path), table, min_test_queries=10)
    assert duplicated_prompts(held_out) == (Copies((" QUESTION  3 ",)), 10)
    assert len(held_out.prompts()) == 30
    # Out of fold, equal prompts are in one fold.
    folds = training(Store(directory=tmp_path), table, min_test_queries=11, folds=2)
    assert duplicated_prompts(folds) == (Copies(), 39)
    assert len(folds.prompts()) == 40


def test_the_control_finds_a_leak_and_nothing_where_there_is_none(
    store_directory: Path, prefect_server: None
) -> None:
    words = np.random.default_rng(5).permutation([f"w{n}" for n in range(600)]).reshape(-1, 3)
    texts = [" ".join(row) for row in words]  # 200 prompts that have little in common
    rng = np.random.default_rng(6)
    experiment = load_experiment(overrides=(f"store.directory={store_directory}",))
    store = experiment.store
    knn = Knn(neighbours=(1, 5), temperatures=(0.02,), prior_counts=(1.0,))

    def right_or_wrong(texts: list[str]) -> pa.Table:
        table = labels(texts, rng, test=80)
        right = rng.integers(0, 2, len(texts)).astype(float)  # half of them need the strong LLM
        for name, column in {
            "weak_quality": right,
            "strong_quality": np.ones(len(texts)),
            "probabilistic": right,
            "transformed": right,
        }.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(column))
        return table

    clean = right_or_wrong(texts)
    leaked = right_or_wrong([*texts[120:], *texts[80:]])  # the test, once more in training
    nearly = right_or_wrong([*(f"{text} please" for text in texts[120:]), *texts[80:]])
    found: dict[str, Check] = {}
    arms: list[tuple[str, np.ndarray] | None] = []

    @flow
    def judged() -> None:
        with tracking.parent_run(experiment) as run:
            for name, table in {"clean": clean, "leaked": leaked, "nearly": nearly}.items():
                arm = replace(training(store, table, min_test_queries=80), parent_id=run)
                apgr = controls.shuffled_control(arm, knn).estimate("shuffled", "apgr")
                found[name] = gate.chance_on_shuffled(apgr)

            # kNN is trained for the purpose where the run has none.
            tested = clean.slice(len(clean) - 80)
            evaluated = Warehouse(store_directory).write_snapshot("evaluation", tested)
            arms.append(controls.knn_arm(arm, compared(evaluated), []))

    judged()
    ((name, rate),) = filter(None, arms)
    assert name == "gate-knn"
    assert rate.shape == (80,)
    assert found["clean"].passed, found["clean"].value
    for name in ("leaked", "nearly"):
        assert not found[name].passed, found[name].value
        assert "the middle one of 3 shuffles" in found[name].value


def test_the_champion_is_compared_only_on_what_it_has_not_seen(
    store_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(directory=store_directory)
    client = tracking.client(store)
    run_id = client.create_run(tracking.experiment_id(store)).info.run_id
    pq.write_table(
        pa.table({"query_key": ["key-0", "key-1"], "win_rate": [0.25, 0.5]}),
        tmp_path / "predictions.parquet",
    )
    client.log_artifact(run_id, str(tmp_path / "predictions.parquet"), "win_rates")
    client.create_registered_model(PAIR.name())
    client.create_model_version(PAIR.name(), str(tmp_path), run_id=run_id)
    asked: list[str] = []

    def score(uri: str, queries: list[str], *, tracking_uri: str) -> list[float]:
        asked.extend(queries)
        return [0.75] * len(queries)

    monkeypatch.setattr(controls, "win_rates_in_clean_process", score)
    table = labels([f"q{n}" for n in range(12)], np.random.default_rng(0))
    comparison = compared(
        Warehouse(store_directory).write_snapshot("evaluation", table.slice(0, 4))
    )
    # What it was trained on is not recorded: only what its own run logged is fair.
    unrecorded = champion_arm(store, PAIR.name(), "1", comparison)
    assert unrecorded.fair().tolist() == [0, 1]
    assert "2 left out of the comparison, since its training is not recorded" in unrecorded.note
    seen = pa.table({"prompt": controls.prompt_hashes(["q0", "Q2 "])})
    pq.write_table(seen, tmp_path / "prompts.parquet")
    client.log_artifact(run_id, str(tmp_path / "prompts.parquet"), "training")
    arm = champion_arm(store, PAIR.name(), "1", comparison)
    np.testing.assert_array_equal(arm.win_rate, [0.25, 0.5, NAN, 0.75])
    assert asked == ["q3"]
    logged = "logged by its own run for 2 of the 2 queries that it was judged on"
    assert f"{logged}, scored in a clean process for 1 others" in arm.note
    assert "1 left out of the comparison, since it was trained on them" in arm.note


def test_the_champions_metric_and_the_versions_before_count(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(directory=store_directory)
    client, model = tracking.client(store), PAIR.name()
    client.create_registered_model(model)
    for against in ("none", "1", "1"):
        version = client.create_model_version(model, str(store_directory))
        tags = {"metric": "gold", "test_digest": "abc", registry.AGAINST_TAG: against}
        for key, value in tags.items():
            client.set_model_version_tag(model, version.version, key, value)
    rows = labels([f"q{n}" for n in range(60)], np.random.default_rng(0))
    rate = rows["strong_quality"].to_numpy() - rows["weak_quality"].to_numpy()
    table = rows.append_column("knn", pa.array((rate + 1) / 2))
    comparison = compared(Warehouse(store_directory).write_snapshot("evaluation", table))
    arm = ChampionArm("1", np.random.default_rng(1).random(60), "Champion.")
    monkeypatch.setattr(controls, "champion_arm", lambda *_: arm)

    def held(number: str) -> registry.Challenge:
        candidate = registry.Version(model, number, "run")
        return registry.challenge(
            store, candidate, "1", comparison, Gate(), 2, training=training(store, rows)
        )

    found = held("4")
    (alike,) = found.also
    assert not alike.passed
    assert alike.value == "by bartscore, the champion by gold"
    assert alike.advice
    assert gate.judged_alike("gold", "gold").passed
    assert not gate.judged_alike("gold", None).passed
    # The first had nothing to be held against, and a version judged again is not counted twice.
    assert "2 other versions were held against a champion on these" in found.notes[1]
    assert found.gain is not None
    assert found.gain.interval.level == pytest.approx(gate.promotion_level(Gate(), 2, nth=3))
    assert "1 other versions" in held("3").notes[1]
    client.set_model_version_tag(model, "2", "test_digest", "another")
    client.set_model_version_tag(model, "3", "test_digest", "another")
    assert "No other versions" in held("4").notes[1]


def test_a_slow_hour_is_measured_again(tmp_path: Path) -> None:
    data = Comparisons.from_win_rates(
        ["a", "b c"], np.array([0.0, 1.0]), weak="small", strong="large"
    )
    build_router(Length()).fit(data, seed=0).save(tmp_path / "router")
    (tmp_path / "training.json").write_text('{"fit_seconds": 1.0, "latency_ms": 900.0}')
    rows = Warehouse(tmp_path).write_snapshot("evaluation", pa.table({"text": ["a", "b"]}))
    trained = TrainedRouter(
        name="length", settings=Length(), digest="d", run_id="r",
        directory=tmp_path / "router", predictions=rows, reused=True, labels="probabilistic",
    )  # fmt: skip
    assert registry.latency(trained, compared(rows), Gate()) < 250
    assert registry.latency(trained, compared(rows), Gate(max_latency_ms=1000)) == 900


def compared(table: Snapshot) -> Comparison:
    return Comparison(
        pair=PAIR,
        metric="bartscore",
        queries=table.rows,
        out_of_fold=True,
        test_digest="abc",
        estimates={},
        runs={},
        label_kinds={},
        table=table,
        best="knn",
    )


def test_the_figure_shows_all_arms_on_the_queries_they_share() -> None:
    rate, weak, strong = rated(50, np.random.default_rng(2))
    champion = np.where(np.arange(50) < 10, NAN, rate)
    arms = {"candidate": rate, "random": np.full(50, 0.5), "champion": champion}
    (axes,) = arms_figure(arms, weak, strong, metric="gold", title="a--b version 2").axes
    assert len(axes.lines) == 3
    assert axes.get_title().endswith("40 queries")
    unfair = arms | {"champion": np.full(50, NAN)}
    (axes,) = arms_figure(unfair, weak, strong, metric="gold", title="a--b version 2").axes
    assert len(axes.lines) == 2


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "gate_error_rates.py"
    spec = importlib.util.spec_from_file_location("gate_error_rates", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_the_simulations_apgr_is_the_exact_one(simulation: ModuleType) -> None:
    rng = np.random.default_rng(4)
    rate, gap = rng.normal(size=30), rng.uniform(-0.5, 1, 30)
    found = simulation.apgr(rate, gap, np.ones((1, 30)))
    assert found[0] == pytest.approx(exact_apgr(rate, np.zeros(30), gap))


@pytest.mark.parametrize("candidates", [1, 4])
def test_false_promotions_stay_within_what_is_stated(
    simulation: ModuleType, candidates: int
) -> None:
    """200 retrains as good as the champion: the rule of the gate, and what it does better than."""
    shares = simulation.promoted_shares(200, gain=0.0, candidates=candidates)
    naive, *_, chosen = shares.values()
    assert chosen <= Gate().max_false_promotions
    assert naive > 2 * Gate().max_false_promotions
