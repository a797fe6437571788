"""Near copies: what is one prompt, what stays apart, and the control that they cannot slip past."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.llms import Pair
from conf.schema import Evaluation, Gate, Store
from router_models.frontier import METRICS
from router_models.near_copies import near_copy_groups
from router_models.statistics import Bootstrap, bootstrap_metrics
from router_models.training_data import same_prompt
from tasks.controls import Control, Training, duplicated_prompts, shuffled_outcomes
from tasks.gate import Copies, ShuffledApgr, chance_on_shuffled, no_duplicates
from tasks.labelling import RatedQueries
from tasks.warehouse import Warehouse

BUNDLED = Path(__file__).parents[1] / "data/geography.jsonl"
PASSAGE = (
    "This question refers to the following passage. The envoys came to the court in the spring of "
    "1648 and asked for grain, for the harvest in the northern valleys had failed a second time. "
)


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return [json.loads(line)["text"] for line in BUNDLED.read_text().splitlines()]


def test_no_two_bundled_questions_are_near_copies(questions: list[str]) -> None:
    assert len(np.unique(near_copy_groups(questions))) == len(questions)


@pytest.mark.parametrize(
    "copy",
    ["{}?", "{} please", " {}!", "“{}”", "Hi! {} Thanks!"],
)
def test_copies_in_other_wording_are_found(questions: list[str], copy: str) -> None:
    copied = [copy.format(text.rstrip("?.")) for text in questions[:200]]
    group = near_copy_groups([*questions, *copied])
    found = group[len(questions) :] == group[:200]
    assert found.mean() > 0.9, [copied[row] for row in np.flatnonzero(~found)]
    assert np.bincount(group).max() == 2  # no chains


def test_a_slip_of_the_pen_in_a_long_prompt_is_a_near_copy() -> None:
    both = [
        PASSAGE + "Why did they come?",
        PASSAGE.replace("envoys", "envosy") + "Why did they come?",
    ]
    assert len(set(near_copy_groups(both).tolist())) == 1


@pytest.mark.parametrize(
    "prompts",
    [
        ["What is the capital of France?", "What is the capital of Spain?"],
        ["2+3", "2-3", "3+2", "2+4"],
        ["5!", "5"],
        [PASSAGE + "Why did they come?", PASSAGE + "Who was the ruler of the empire?"],
        [f"{PASSAGE} Classify the ticket: {what}" for what in ("printer", "invoice", "delivery")],
        [f"{PASSAGE} How much is {a} - {b}?" for a, b in ((17, 12), (12, 17), (17, 13))],
        ["", "?", "a", "b", "\ud800", "法国的首都是什么", "德国的首都是什么"],
    ],
)
def test_questions_that_differ_in_what_matters_stay_apart(prompts: list[str]) -> None:
    assert near_copy_groups(prompts).tolist() == list(range(len(prompts)))


def test_thousands_of_prompts_of_one_template_stay_apart() -> None:
    prompts = [f"{PASSAGE} Translate order {number} into French." for number in range(3_000)]
    assert len(np.unique(near_copy_groups(prompts))) == len(prompts)


WORDS = st.lists(st.sampled_from(["who", "Who", "wrote", "emma", "please", "2", "?"]), max_size=5)
PROMPTS = st.lists(WORDS.map(" ".join) | st.text(max_size=6), max_size=12)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.randoms(use_true_random=False))
def test_groups_follow_the_prompts_and_not_their_order(prompts: list[str], random) -> None:  # type: ignore[no-untyped-def]
    group = near_copy_groups(prompts)
    assert list(dict.fromkeys(group.tolist())) == list(range(len(set(group.tolist()))))
    for normal in set(map(same_prompt, prompts)):
        rows = [row for row, prompt in enumerate(prompts) if same_prompt(prompt) == normal]
        assert len(set(group[rows].tolist())) == 1
    order = list(range(len(prompts)))
    random.shuffle(order)
    moved = near_copy_groups([prompts[row] for row in order])
    together = group[order][:, None] == group[order][None, :]
    np.testing.assert_array_equal(moved[:, None] == moved[None, :], together)


def table(questions: list[str], ending: str | None, seed: int) -> pa.Table:
    """Return 200 queries, the last 80 of them tested and, with an ending, also learned from."""
    rng = np.random.default_rng(seed)
    texts, weak = questions[:200], rng.integers(0, 2, 200).astype(float)
    if ending is not None:
        texts = [text + ending for text in texts[120:]] + texts
        weak = np.concatenate([weak[120:], weak])
    learned = len(texts) - 80
    return pa.table(
        {
            "query_key": [str(row) for row in range(len(texts))],
            "query_id": [str(row) for row in range(len(texts))],
            "text": texts,
            "domain": ["any"] * len(texts),
            "split": ["train"] * (learned - 8) + ["validation"] * 8 + ["test"] * 80,
            "weak_quality": weak,
            "strong_quality": np.ones(len(texts)),
        }
    )


def remembered(labels: pa.Table) -> Bootstrap:
    """Return the metrics of a router that gives each query the outcome of the likest text."""
    texts = [set(pairwise(text)) for text in labels["text"].to_pylist()]
    weak, strong = labels["weak_quality"].to_numpy(), labels["strong_quality"].to_numpy()
    learned = len(texts) - 80
    likest = [
        int(np.argmax([len(one & other) / len(one | other) for other in texts[:learned]]))
        for one in texts[learned:]
    ]
    rate = (strong - weak)[likest]
    return bootstrap_metrics({"shuffled": rate}, weak[learned:], strong[learned:], replicates=300)


def control(labels: pa.Table, *, seed: int) -> Control:
    shuffles = [remembered(shuffled_outcomes(labels, seed=seed + number)) for number in range(3)]
    first = Control(tuple(shuffles[:1]))
    return (
        first
        if first.estimate("shuffled", "apgr").interval.low <= 0.5
        else Control(tuple(shuffles))
    )


@pytest.mark.parametrize("ending", ["", "?", " please"])
def test_the_control_rejects_copies_of_the_test_in_other_wording(
    questions: list[str], ending: str
) -> None:
    for seed in range(3):
        check = chance_on_shuffled(
            control(table(questions, ending, seed), seed=seed).estimate("shuffled", "apgr")
        )
        assert not check.passed, check.value
        assert "the middle one of 3 shuffles (0." in check.value


def test_the_control_passes_clean_data(questions: list[str]) -> None:
    for seed in range(8):
        found = control(table(questions, None, seed), seed=seed).estimate("shuffled", "apgr")
        assert chance_on_shuffled(found).passed, found


def draw(low: float) -> Bootstrap:
    values = {metric: np.linspace(low, low + 0.1, 200) for metric in METRICS}
    return Bootstrap({"shuffled": {"apgr": low + 0.05}}, {"shuffled": values})


@pytest.mark.parametrize(
    ("lows", "passed"),
    [
        ([0.45], True),
        ([0.55, 0.45, 0.45], True),
        ([0.55, 0.56, 0.45], False),
        ([0.55, 0.45, float("nan")], False),
    ],
)
def test_two_shuffles_of_three_decide(lows: list[float], passed: bool) -> None:
    found = Control(tuple(map(draw, lows))).estimate("shuffled", "apgr")
    assert isinstance(found, ShuffledApgr)
    check = chance_on_shuffled(found)
    assert check.passed is passed
    assert ("of 3 shuffles" in check.value) is (len(lows) > 1)


def test_near_copies_are_counted_and_not_bounded(tmp_path: Path, questions: list[str]) -> None:
    labels = table(questions, " please", 0)
    queries = RatedQueries(
        Pair(weak="small", strong="large"),
        Warehouse(tmp_path).write_snapshot("labels", labels),
    )
    training = Training(Store(directory=tmp_path), queries, Evaluation(min_test_queries=80), 0, "")
    copies, evaluated = duplicated_prompts(training)
    assert (copies.exact, evaluated) == ((), 80)
    assert len(copies.near) > 72
    check = no_duplicates(copies, evaluated, Gate())
    assert check.passed
    assert f"none of 80 prompts (0.0%); {len(copies.near)} more nearly, such as" in check.value
    assert no_duplicates(Copies(near=("a | b",)), 80, Gate()).value.count("|") == 0


def test_battles_on_near_copies_of_evaluated_prompts_are_counted(
    tmp_path: Path, questions: list[str]
) -> None:
    warehouse = Warehouse(tmp_path)
    labels = table(questions, None, 0)
    pair, snapshot = Pair(weak="small", strong="large"), warehouse.write_snapshot("l", labels)
    queries = RatedQueries(pair, snapshot)
    tested = [row["text"] for row in labels.to_pylist() if row["split"] == "test"]
    prompts = [*tested[:3], *(f"{text}??" for text in tested[3:8]), *questions[-20:]]
    battles = warehouse.write_snapshot("battles", pa.table({"prompt": prompts}))
    evaluation = Evaluation(min_test_queries=len(tested))
    training = Training(Store(directory=tmp_path), queries, evaluation, 0, "", battles)
    copies, evaluated = duplicated_prompts(training)
    # Those on the very prompts are never learnt from.
    assert (copies.exact, evaluated) == ((), len(tested))
    assert {*copies.near} >= {*tested[3:8]}
    assert not {*tested[:3]} & {*copies.near}
