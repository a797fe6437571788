"""The policy and its exact curve against loops; three LLMs from scores to a registered model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from pydantic import ValidationError

from conf.errors import ArtifactError, ConfigError, DataError, StoreError
from conf.routers import Knn, Length, MatrixFactorization, SimilarityWeighted, Trainer
from conf.schema import Evaluation, Experiment, Pool, Store
from flows.promote import registered_model
from router_models.catalog import build_router
from router_models.pool import (
    PoolOutcome,
    PoolPolicy,
    best_mix,
    best_single,
    choices,
    expected_quality,
    pool_curve,
    pool_outcomes,
)
from router_models.statistics import Estimate, Interval
from router_models.training_data import Comparisons
from tasks import pool, promotion, tracking
from tasks.calibration_data import logged_router
from tasks.judged_runs import receipts
from tasks.pool import (
    Candidate,
    RoutedPool,
    no_worse_than_a_coin,
    pool_battles,
    pool_queries,
    route_pool,
)
from tasks.promotion import Aliases
from tasks.registry import Version
from tasks.reporting import Leaderboard, RunReport, pool_page, publish_pool
from tasks.warehouse import Snapshot, Warehouse

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
PROMPTS = [json.loads(line)["text"] for line in LINES[::4]][:90]
RIVERS = np.array(["river" in prompt or "capital" in prompt for prompt in PROMPTS])
LLMS = ("large", "medium", "small")
COSTS = {"small": 1e-5, "medium": 1e-4, "large": 1e-3}
FAST: dict[str, Any] = {
    "knn": Knn(neighbours=(5, 15)),
    "mf": MatrixFactorization(dimension=16, trainer=Trainer(max_epochs=3)),
    "sw_ranking": SimilarityWeighted(),
}


def battles() -> Comparisons:
    """Return battles of three LLMs: the large one is best, on rivers the small one is as good."""
    outcomes = {
        ("large", "medium"): np.where(RIVERS, 0.6, 0.8),
        ("large", "small"): np.where(RIVERS, 0.5, 0.95),
        ("medium", "small"): np.where(RIVERS, 0.4, 0.8),
    }
    return Comparisons(
        prompts=tuple(PROMPTS * 3),
        llm_a=tuple(a for a, _ in outcomes for _ in PROMPTS),
        llm_b=tuple(b for _, b in outcomes for _ in PROMPTS),
        a_wins=np.concatenate(list(outcomes.values())),
        weak="small",
        strong="large",
    )


class OnlyPairs:
    """A router of the kind that compares two LLMs at a time and has no scores."""

    def win_rate_between(self, prompts: Any, *, strong: str, weak: str) -> np.ndarray:
        """Return rates that no rating explains: rock, paper, scissors."""
        beats = {("rock", "scissors"), ("paper", "rock"), ("scissors", "paper")}
        return np.full(len(prompts), 0.9 if (strong, weak) in beats else 0.1)


@pytest.mark.parametrize("kind", sorted(FAST))
def test_expected_quality_is_the_mean_win_rate_against_the_others(kind: str) -> None:
    router = build_router(FAST[kind]).fit(battles(), seed=0)
    found = expected_quality(router, PROMPTS[:20], llms=LLMS)
    for column, llm in enumerate(LLMS):
        others = [
            router.win_rate_between(PROMPTS[:20], strong=llm, weak=other)  # type: ignore[attr-defined]
            for other in LLMS
            if other != llm
        ]
        assert np.allclose(found[:, column], np.mean(others, axis=0), rtol=0, atol=1e-12)
    assert np.allclose(found.mean(axis=1), 0.5)
    assert expected_quality(router, [], llms=LLMS).shape == (0, 3)
    two = expected_quality(router, PROMPTS, llms=["large", "small"])
    assert np.allclose(two[:, 0], router.win_rate(PROMPTS), rtol=0, atol=1e-12)


def test_a_router_without_scores_is_asked_for_every_pair() -> None:
    found = expected_quality(OnlyPairs(), ["a", "b"], llms=["paper", "rock", "scissors"])
    assert np.allclose(found, 0.5)


def test_a_router_of_one_pair_cannot_choose_in_a_pool() -> None:
    router = build_router(Length()).fit(battles(), seed=0)
    with pytest.raises(ConfigError, match=r"LengthRouter decides between the two.*knn, mf or sw_r"):
        PoolPolicy(COSTS, margin=0.1).choose(router, PROMPTS)


def test_an_unknown_llm_is_named() -> None:
    router = build_router(FAST["sw_ranking"]).fit(battles(), seed=0)
    with pytest.raises(ConfigError, match=r"Unknown LLM 'smal'. Did you mean 'small'"):
        PoolPolicy({"smal": 1.0, "large": 2.0}, margin=0.1).choose(router, PROMPTS)


def test_the_margin_goes_from_the_best_to_the_cheapest() -> None:
    router = build_router(FAST["knn"]).fit(battles(), seed=0)
    expected = expected_quality(router, PROMPTS, llms=LLMS)
    best = [LLMS[column] for column in expected.argmax(axis=1)]
    assert PoolPolicy(COSTS, margin=0.0).choose(router, PROMPTS) == best
    assert set(PoolPolicy(COSTS, margin=1.0).choose(router, PROMPTS)) == {"small"}
    some = np.array(PoolPolicy(COSTS, margin=0.15).choose(router, PROMPTS))
    assert np.mean(some[RIVERS] == "small") > np.mean(some[~RIVERS] == "small")
    shuffled = PoolPolicy({llm: COSTS[llm] for llm in sorted(COSTS)}, margin=0.15)
    assert shuffled.choose(router, PROMPTS) == some.tolist()


@pytest.mark.parametrize("margin", [-0.1, 1.5, float("nan")])
def test_an_impossible_margin_is_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match=r"The margin is .*from 0 .* to 1"):
        PoolPolicy(COSTS, margin=margin)


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least two LLMs"):
        PoolPolicy({"one": 1.0}, margin=0.1)
    with pytest.raises(ConfigError, match=r"'b' costs -1.0 USD.*Correct its price"):
        PoolPolicy({"a": 1.0, "b": -1.0}, margin=0.1)
    with pytest.raises(ConfigError, match="two different LLMs"):
        expected_quality(OnlyPairs(), ["x"], llms=["a", "a"])
    with pytest.raises(DataError, match="NaN or infinite"):
        pool_curve([[0.5, 0.5]], [[np.nan, 1.0]], [1.0, 2.0])
    with pytest.raises(DataError, match="same queries and LLMs"):
        pool_curve([[0.5, 0.5]], [[1.0, 1.0], [0.0, 1.0]], [1.0, 2.0])


def test_equal_llms_are_decided_by_cost_then_quality_then_order() -> None:
    assert choices([[0.5, 0.5, 0.5]], [2.0, 1.0, 1.0], margin=0.0).tolist() == [1]
    assert choices([[0.5, 0.5, 0.6]], [2.0, 1.0, 1.0], margin=0.2).tolist() == [2]
    assert choices(np.full((1, 3), 0.5), [1.0, 1.0, 1.0], margin=0.0).tolist() == [0]


def choice_by_hand(expected: np.ndarray, cost: np.ndarray, margin: float) -> int:
    allowed = [column for column, value in enumerate(expected) if expected.max() - value <= margin]
    return min(allowed, key=lambda column: (cost[column], -expected[column], column))


@st.composite
def pools(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    # Few levels, so that expected qualities and costs are often equal.
    expected = rng.integers(0, 5, (n, m)) / 4
    return expected, rng.normal(size=(n, m)), rng.integers(0, 3, m).astype(float)


@given(pool=pools(), margin=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]))
@settings(max_examples=100, deadline=None)
def test_choices_and_the_curve_agree_with_a_loop(
    pool: tuple[np.ndarray, np.ndarray, np.ndarray], margin: float
) -> None:
    expected, quality, cost = pool
    by_hand = [choice_by_hand(row, cost, margin) for row in expected]
    assert choices(expected, cost, margin=margin).tolist() == by_hand
    rows = np.arange(len(expected))
    curve = pool_curve(expected, quality, cost)
    found = curve.at(margin)
    assert found == pytest.approx((quality[rows, by_hand].mean(), cost[by_hand].mean()), abs=1e-12)
    assert curve.margin[0] == 0
    assert np.all(np.diff(curve.margin) > 0)
    assert np.all(np.diff(curve.cost_usd) <= 1e-12)


@given(pool=pools())
@settings(max_examples=40, deadline=None)
def test_costs_of_single_responses_are_counted_but_not_chosen_by(
    pool: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    expected, quality, cost = pool
    paid = np.random.default_rng(0).random(quality.shape)
    curve = pool_curve(expected, quality, paid, expected_cost_usd=cost)
    chosen = choices(expected, cost, margin=0.25)
    assert curve.at(0.25)[1] == pytest.approx(paid[np.arange(len(paid)), chosen].mean())


@given(seed=st.integers(0, 1000), llms=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_best_mix_is_found_among_all_coin_tosses(seed: int, llms: int) -> None:
    rng = np.random.default_rng(seed)
    quality, cost = rng.random((1, llms)), rng.random((1, llms))
    at = rng.uniform(cost.min(), cost.max(), 1)
    single = max(q for q, c in zip(quality[0], cost[0], strict=True) if c <= at[0] + 1e-12)
    assert best_single(quality, cost, at)[0] == single
    tosses = [
        share * quality[0, i] + (1 - share) * quality[0, j]
        for i in range(llms)
        for j in range(llms)
        for share in np.linspace(0, 1, 201)
        if share * cost[0, i] + (1 - share) * cost[0, j] <= at[0]
    ]
    best = best_mix(quality, cost, at)[0]
    assert best >= max([*tosses, single]) - 1e-12
    assert best <= max([*tosses, single]) + 0.02


def test_a_perfect_policy_beats_every_mixture_and_a_constant_one_none() -> None:
    rng = np.random.default_rng(0)
    quality = (rng.random((300, 3)) < [0.8, 0.6, 0.4]).astype(float)
    cost = np.array([3.0, 2.0, 1.0])
    (perfect,) = pool_outcomes(quality, quality, cost, margins=[0.0], replicates=300)
    assert perfect.quality.value == quality.max(axis=1).mean()
    assert perfect.over_mix.interval.low > 0.1
    assert perfect.over_single.value >= perfect.over_mix.value
    constant = np.tile([0.7, 0.5, 0.3], (300, 1))
    for outcome in pool_outcomes(constant, quality, cost, margins=[0.0, 0.3, 1.0], replicates=300):
        assert outcome.over_single.value <= 0
        assert outcome.over_mix.interval.low <= 0 <= outcome.over_single.interval.high
        assert sorted(outcome.shares) == [0.0, 0.0, 1.0]


# Three LLMs, at the level of tasks: from scores to a registered model.


def stored(warehouse: Warehouse) -> tuple[Snapshot, Snapshot, Snapshot]:
    """Store queries, and three samples of each LLM's responses with scores."""
    rng = np.random.default_rng(0)
    right = {
        "small": np.where(RIVERS, 0.9, 0.1),
        "medium": np.where(RIVERS, 0.5, 0.7),
        "large": np.full(len(PROMPTS), 0.95),
    }
    keys = [f"key {row:03d}" for row in range(len(PROMPTS))]
    queries = pa.table(
        {
            "query_key": keys,
            "query_id": [key.replace("key", "q") for key in keys],
            "text": PROMPTS,
            "domain": ["any"] * len(keys),
            "split": ["train"] * len(keys),
        }
    )
    scores = [
        {
            "query_key": key,
            "llm": llm,
            "sample_index": sample,
            "metric": "gold",
            "value": float(rng.random() < right[llm][row]),
        }
        for llm in right
        for row, key in enumerate(keys)
        for sample in range(3)
        if (llm, row, sample) != ("medium", 7, 1)  # one response was never scored
    ]
    responses = [
        {**row, "cost_usd": COSTS[str(row["llm"])] * rng.uniform(0.5, 1.5)} for row in scores
    ]
    return (
        warehouse.write_snapshot("queries", queries),
        warehouse.write_snapshot("responses", pa.Table.from_pylist(responses)),
        warehouse.write_snapshot("scores", pa.Table.from_pylist(scores)),
    )


def experiment(store: Store, **changes: Any) -> Experiment:
    values = {
        "name": "three",
        "store": store,
        "llms": [
            {"name": llm, "model": llm, "endpoint": {"url": "http://localhost:1/v1"}}
            for llm in LLMS
        ],
        "pairs": [{"weak": "small", "strong": "large"}],
        "quality": {"label_metric": "gold", "metrics": [{"metric": "gold_match"}]},
        "routers": [FAST["knn"], FAST["mf"], Length()],
        "evaluation": Evaluation(replicates=200, folds=3),
        "pool": Pool(margin=0.1, routers=("knn",)),
    }
    return Experiment.model_validate(values | changes)


def test_battles_are_the_shares_of_pairs_of_samples(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path)
    rated = pool_queries(warehouse, *stored(warehouse), llms=LLMS, metric="gold")
    assert rated.llms == LLMS
    assert rated.table.num_rows == len(PROMPTS) - 1
    assert "q 007" not in rated.table["query_id"].to_pylist()
    assert rated.cost_usd.mean(axis=0) == pytest.approx([1e-3, 1e-4, 1e-5], rel=0.2)
    data, query = pool_battles(rated, weak="small", strong="large")
    for row in (0, 40, 150, 266):
        a, b = (rated.samples[side[row]][query[row]] for side in (data.llm_a, data.llm_b))
        share = np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b])
        assert data.a_wins[row] == pytest.approx(share)
        assert data.prompts[row] == rated.table["text"].to_pylist()[query[row]]
    with pytest.raises(DataError, match=r"No query has all its 'bart' scores for all of large"):
        pool_queries(warehouse, *stored(warehouse), llms=LLMS, metric="bart")


def test_three_llms_become_a_registered_pool(
    store_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    # The gate asks the version in a clean process; the promotion would start two more.
    monkeypatch.setattr(promotion, "smoke_test", lambda store, uri: None)
    store = Store(directory=store_directory)
    asked, warehouse = experiment(store), Warehouse(store_directory)
    with tracking.parent_run(asked) as run_id:
        report = route_pool.fn(asked, *stored(warehouse), run_id)
        publish_pool.fn(asked, report, run_id)
    assert (report.queries, report.unscored, report.out_of_fold) == (len(PROMPTS) - 1, 1, True)
    assert [single.llm for single in report.singles] == ["small", "medium", "large"]
    (routed,) = report.routers
    assert routed.outcome.over_mix.value > 0
    assert "| pool of knn |" in pool_page(report)
    board = Leaderboard(label_metric="gold", standings=(), agreement={})
    whole = RunReport(run_id=run_id, leaderboard=board, pairs=(), pool=report).to_json()
    assert json.loads(json.dumps(whole))["pool"]["routers"][0]["router"] == "knn"

    client = MlflowClient(store.mlflow_uri())
    run = client.get_run(routed.run_id)
    assert run.data.tags["mlflow.parentRunId"] == run_id
    assert run.data.metrics["pool_quality"] == pytest.approx(routed.outcome.quality.value)
    assert {"pool_over_mix_low", "pool_share/small"} <= run.data.metrics.keys()
    logged = {item.path for item in client.list_artifacts(routed.run_id, "pool")}
    assert "pool/cost_quality.png" in logged

    # It was judged by its own rule, and is the champion of a model that is no pair's.
    receipt = report.receipt
    assert receipt.passed(), receipt.to_markdown()
    assert receipt.checks[0].value.startswith(f"{report.queries} of {report.queries} queries go")
    assert promotion.aliases(store, "pool-three") == Aliases("pool-three", champion="1")
    assert [kept.verdict() for kept in receipts(store, [routed.run_id])] == ["promoted"]
    assert registered_model(asked, "pool-three") == "pool-three"
    assert registered_model(asked, None) == "small--large"
    with pytest.raises(StoreError, match=r"No registered model .* has the alias 'champion'"):
        logged_router(store, "champion")

    # The registered version chooses as it was judged, and with a parameter gives win rates.
    model = mlflow.pyfunc.load_model(routed.model)
    rates = model.predict(PROMPTS[:30], params={"policy": "win_rate"})
    assert all(0 < rate < 1 for rate in rates)
    named = model.predict(PROMPTS[:30])
    assert len(named) == 30
    assert set(named) <= set(LLMS)
    assert named == model.predict(PROMPTS[:30], params={"policy": "pool", "margin": 0.1})
    cheapest = model.predict(PROMPTS[:30], params={"policy": "pool", "margin": 1.0})
    assert set(cheapest) == {"small"}
    free = mlflow.pyfunc.load_model(
        routed.model, model_config={"cost_usd": {"large": 0.0, "small": 1.0}}
    )
    everything = {"policy": "pool", "margin": 1.0}
    assert set(free.predict(PROMPTS[:30], params=everything)) == {"large"}
    with pytest.raises(Exception, match=r"Unknown policy 'pol'. Did you mean 'pool'"):
        model.predict(PROMPTS[:2], params={"policy": "pol"})
    costless = mlflow.pyfunc.load_model(routed.model, model_config={"cost_usd": {}})
    with pytest.raises(Exception, match="without the cost of its LLMs"):
        costless.predict(PROMPTS[:2], params={"policy": "pool"})


def test_a_pool_that_is_not_shown_to_be_as_good_is_not_promoted() -> None:
    def over_mix(low: float) -> Estimate:
        return Estimate(0.02, Interval(low, 0.1))

    assert no_worse_than_a_coin(over_mix(0.0)).passed
    worse = no_worse_than_a_coin(over_mix(-0.001))
    assert not worse.passed
    assert worse.complaint == "not shown to be as good as a coin toss between two LLMs"


@pytest.mark.parametrize("seed", range(10))
def test_always_the_best_llm_is_as_good_as_a_coin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quality, cost = rng.random((200, 4)) + np.array([0.0, 0.1, 0.2, 1.0]), rng.random((200, 4))
    expected = np.tile([0.0, 0.0, 0.0, 1.0], (200, 1))
    (outcome,) = pool_outcomes(expected, quality, cost, margins=[0.0], replicates=200)
    assert no_worse_than_a_coin(outcome.over_mix).passed


def test_a_coin_that_saves_a_cent_does_not_pass() -> None:
    rng = np.random.default_rng(2)
    quality = (rng.random((3000, 3)) < [0.5, 0.7, 0.8]).astype(float)
    cost = np.tile([1.0, 2.0, 3.0], (3000, 1))
    expected = np.tile([0.0, 0.0, 1.0], (3000, 1))
    expected[rng.random(3000) < 0.2] = [0.0, 1.0, 0.0]  # a fifth to the second best, blindly
    (outcome,) = pool_outcomes(expected, quality, cost, margins=[0.0], replicates=400)
    assert outcome.over_single.interval.low > 0  # compared with the second best
    assert not no_worse_than_a_coin(outcome.over_mix).passed


def test_a_pool_that_chooses_otherwise_or_not_at_all_is_not_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = Estimate(0.0, Interval(0.0, 0.0))
    best = Candidate(
        routed=RoutedPool(
            "knn", "run", "models:/pool-three/1", PoolOutcome(0.1, none, none, none, none, (1.0,))
        ),
        version=Version("pool-three", "1", "run"),
        over_mix=none,
        queries=pa.table({"text": PROMPTS[:3], "served": ["small", "large", "large"]}),
        digest="abc",
    )

    def answer(uri: str, queries: Any, *, tracking_uri: str) -> list[str]:
        return ["small", "large", "small"]

    def fail(uri: str, queries: Any, *, tracking_uri: str) -> list[str]:
        raise ArtifactError(f"{uri} does not load. Expected a router. Register it anew.")

    monkeypatch.setattr(pool, "win_rates_in_clean_process", answer)
    check = pool.reproduces_choices(Store(directory=tmp_path), best)
    assert (check.value, check.passed) == ("2 of 3 queries go to the logged LLM", False)
    monkeypatch.setattr(pool, "win_rates_in_clean_process", fail)
    check = pool.reproduces_choices(Store(directory=tmp_path), best)
    assert not check.passed
    assert "models:/pool-three/1 does not load" in check.value


def test_a_pool_that_nobody_can_choose_from_is_refused(tmp_path: Path) -> None:
    store = Store(directory=tmp_path)
    with pytest.raises((ConfigError, ValidationError), match="no router can choose among its LLMs"):
        experiment(store, routers=[Length()], pool=Pool())
    with pytest.raises((ConfigError, ValidationError), match="Unknown pool router 'length'"):
        experiment(store, pool=Pool(routers=("length",)))
    llms = [
        {"name": llm, "model": llm, "endpoint": {"url": "http://localhost:1/v1"}}
        for llm in ("small", "large")
    ]
    with pytest.raises((ConfigError, ValidationError), match="pool is set, with 2 LLMs"):
        experiment(store, llms=llms)
    assert [router.name for router in experiment(store, pool=Pool()).pool_routers()] == [
        "knn",
        "mf",
    ]
