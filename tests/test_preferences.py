"""Preference data as a table: what follows from it, tiers, leaks, and what bad input is told."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conf.errors import DataError
from router_models.training_data import Comparisons
from tasks.preferences import (
    SCHEMA,
    comparisons,
    contaminated_prompts,
    other_prompts,
    pair_battles,
)


def preference_rows(*rows: tuple[str, str, float]) -> pa.Table:
    records = [
        {"prompt": f"q{at}", "llm_a": a, "llm_b": b, "a_wins": wins}
        for at, (a, b, wins) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=SCHEMA)


def test_an_llm_without_battles_is_named() -> None:
    rows = preference_rows(("gpt-4", "llama", 1), ("gpt-4", "llama", 0))
    with pytest.raises(DataError, match=r"'gpt4'\. Did you mean 'gpt-4'.*has no battle in 2 rows"):
        comparisons(rows, weak="llama", strong="gpt4")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("s", "w", 0.5), ("x", "w", 0.5)], "All 2 verdicts are a tie: one class only"),
        ([("s", "w", 1.0), ("w", "s", 0.0)], "a win for the same side: one class only"),
        ([("w", "s", 1.0), ("s", "w", 0.2)], "a loss for the same side: one class only"),
    ],
)
def test_one_class_only_is_refused(rows: list[tuple[str, str, float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        comparisons(preference_rows(*rows), weak="w", strong="s")


def test_lines_of_a_list_end_with_a_line_feed_only(tmp_path: Path) -> None:
    listed = tmp_path / "listed.jsonl"
    text = '{"eval_prompt": "a\u2028b"}\r\n\n{"eval_prompt": "c\x85"}\n'
    listed.write_text(text, encoding="utf-8-sig", newline="")
    assert contaminated_prompts(listed) == ("a\u2028b", "c\x85")


def arena_like(count: int = 900) -> Comparisons:
    """Draw battles among two strong, two middling and two weak LLMs."""
    rng = np.random.default_rng(0)
    strength = np.array([2.0, 1.9, 0.1, 0.0, -1.9, -2.0])
    names = ["s", "s2", "m", "m2", "w2", "w"]
    a = rng.integers(0, 6, count)
    b = (a + rng.integers(1, 6, count)) % 6
    wins = (rng.random(count) < 1 / (1 + np.exp(strength[b] - strength[a]))).astype(float)
    prompts = tuple(f"q{row}" for row in range(count))
    return Comparisons(
        prompts, tuple(names[n] for n in a), tuple(names[n] for n in b), wins, "w", "s"
    )


def as_rows(data: Comparisons, **qualities: list[float | None]) -> pa.Table:
    columns = {"prompt": data.prompts, "llm_a": data.llm_a, "llm_b": data.llm_b}
    lists = {**columns, "a_wins": data.a_wins.tolist(), **qualities}
    empty = [None] * len(data.prompts)
    return pa.table({name: lists.get(name, empty) for name in SCHEMA.names}, schema=SCHEMA)


def test_tiers_stand_in_for_the_routed_pair() -> None:
    data = arena_like()
    rows = pair_battles(as_rows(data), weak="w", strong="s", tiers=3)
    assert rows.schema == SCHEMA
    found = comparisons(rows, weak="w", strong="s")
    sides = {"s": {"s", "s2"}, "w": {"w", "w2"}}
    expected = [
        row
        for row, (a, b) in enumerate(zip(data.llm_a, data.llm_b, strict=True))
        if (a in sides["s"] and b in sides["w"]) or (a in sides["w"] and b in sides["s"])
    ]
    assert found.prompts == tuple(data.prompts[row] for row in expected)
    assert np.array_equal(found.a_wins, data.a_wins[expected])
    assert set(found.llm_a) == set(found.llm_b) == {"s", "w"}
    for row, a in zip(expected, found.llm_a, strict=True):
        assert data.llm_a[row] in sides[a]
    prompts, win_rate = found.labels()
    assert len(prompts) == len(expected) > len(data.labels()[0]) * 3
    assert win_rate.mean() > 0.9


def test_with_a_tier_each_only_the_pairs_own_battles_remain() -> None:
    data = arena_like()
    found = pair_battles(as_rows(data), weak="w", strong="s")
    assert found["prompt"].to_pylist() == list(data.labels()[0])


def test_tiers_that_never_met_are_refused() -> None:
    rows = (("s", "m", 1.0), ("m", "w", 1.0), ("m", "s", 1.0), ("w", "m", 1.0))
    with pytest.raises(DataError, match=r"No battle among 5 is between the tiers of 's' and 'w'"):
        pair_battles(preference_rows(*rows, ("s", "m", 0.0)), weak="w", strong="s")


def test_leaking_prompts_can_be_dropped() -> None:
    prompts = arena_like(6).prompts
    assert other_prompts(prompts, ["Q3", " q4 "]).tolist() == [0, 1, 2, 5]
    assert other_prompts(prompts, prompts).tolist() == []


def test_qualities_stay_with_the_pairs_own_battles() -> None:
    data = arena_like()
    quality: list[float | None] = [0.25] * len(data.prompts)
    rows = as_rows(data, a_quality=quality, b_quality=quality)
    found = pair_battles(rows, weak="w", strong="s", tiers=3)
    own = set(data.labels()[0])
    assert len(own) < found.num_rows
    for row in found.to_pylist():
        assert row["a_quality"] == row["b_quality"] == (0.25 if row["prompt"] in own else None)
    assert comparisons(found, weak="w", strong="s").weak_quality is None
    alone = pair_battles(rows, weak="w", strong="s", tiers=None)
    assert set(alone["prompt"].to_pylist()) == own
    assert comparisons(alone, weak="w", strong="s").weak_quality is not None


def test_a_pair_that_never_met_is_refused_without_tiers() -> None:
    rows = preference_rows(("s", "m", 1.0), ("m", "w", 1.0), ("s", "m", 0.0))
    message = r"No battle among 3 is between 's' and 'w'.*Group them into tiers, or add battles"
    with pytest.raises(DataError, match=message):
        pair_battles(rows, weak="w", strong="s", tiers=None)
