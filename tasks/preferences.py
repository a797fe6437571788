"""Preference data: who answered better, said by people, by known answers or by a judge.

One table of battles (columns as in SCHEMA), wherever they come from (`tasks/preference_sources.py`,
`tasks/judging.py`). From it follow `Comparisons`, of all LLMs or, grouped into tiers, of the routed
pair (arXiv 2406.18665, section 4.1), without prompts that a test will ask.

A long file: the table, what follows from it and its checks are read, and changed, together.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conf.errors import DataError, unknown_name
from router_models.tiers import llm_tiers
from router_models.training_data import Comparisons, same_prompt

Source = Literal["arena", "gold", "judge", "responses"]

SCHEMA = pa.schema(
    [
        ("preference_key", pa.string()),
        ("source", pa.string()),
        ("dataset", pa.string()),
        ("battle_id", pa.string()),
        ("prompt", pa.string()),
        ("llm_a", pa.string()),
        ("llm_b", pa.string()),
        ("verdict", pa.string()),
        ("a_wins", pa.float64()),
        ("a_quality", pa.float64()),
        ("b_quality", pa.float64()),
        ("domain", pa.string()),
    ]
)
VERDICTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
CONTAMINATED = "contaminated_prompts.jsonl"
# Reasons for leaving rows out, which more than one source has.
AGAINST_ITSELF = "an LLM against itself"
WITHOUT_NAME = "an LLM without a name"
REPEATED = "merged with an identical battle"


@dataclass(frozen=True, eq=False)
class Preferences:
    """Battles, one row each as in SCHEMA, and how many rows were left out, by reason."""

    rows: pa.Table
    left_out: Mapping[str, int]
    remarks: Mapping[str, int] = field(default_factory=dict)
    """What else was not used, and how many of them: columns that are not read, for instance."""


def battle(battle_id: str, prompt: str, a: str, b: str, a_wins: float) -> dict[str, Any]:
    """Return one row for `battle_table`; ``a_wins`` is a verdict or the probability of one."""
    verdict = "tie" if a_wins == 0.5 else "a" if a_wins > 0.5 else "b"
    return {
        "battle_id": battle_id,
        "prompt": prompt,
        "llm_a": a,
        "llm_b": b,
        "verdict": verdict,
        "a_wins": float(a_wins),
    }


def battle_table(records: list[dict[str, Any]], *, source: Source, dataset: str) -> pa.Table:
    """Return the battles as a table, each once; raises DataError when there are none."""
    if not records:
        raise DataError(
            f"{dataset} holds no battle that can be used. Expected rows with a prompt and two "
            "different LLMs. Check the file."
        )
    for record in records:
        record |= {"source": source, "dataset": dataset}
        content = json.dumps([record.get(name) for name in SCHEMA.names[1:]], ensure_ascii=False)
        record["preference_key"] = hashlib.sha256(content.encode()).hexdigest()[:24]
    return distinct_battles(pa.Table.from_pylist(records, schema=SCHEMA))


def counted_battles(
    records: list[dict[str, Any]],
    left_out: Mapping[str, int],
    *,
    source: Source,
    dataset: str,
    remarks: Mapping[str, int] | None = None,
) -> Preferences:
    """Return `battle_table` with what was left out, of which identical battles are a part."""
    rows = battle_table(records, source=source, dataset=dataset)
    repeated = Counter({REPEATED: len(records) - rows.num_rows})
    return Preferences(rows, Counter(left_out) + repeated, remarks or {})


def distinct_battles(rows: pa.Table) -> pa.Table:
    """Return the rows in their order, without those that agree in everything with an earlier."""
    first = np.unique(rows["preference_key"].to_numpy(zero_copy_only=False), return_index=True)[1]
    return rows.take(np.sort(first))


def readable(text: str) -> str:
    """Return the text without halves of surrogate pairs: JSON carries them, no table takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def comparisons(rows: pa.Table, *, weak: str, strong: str) -> Comparisons:
    """Return the battles of all LLMs as training data for a router between two of them.

    The qualities come along where all battles are the pair's own and say them.
    Raises DataError for an LLM without battles and for verdicts that are all the same.
    """
    a, b = rows["llm_a"].to_pylist(), rows["llm_b"].to_pylist()
    known = {*a, *b}
    for llm in (weak, strong):
        if llm not in known:
            raise DataError(
                unknown_name("LLM", llm, known)
                + f" It has no battle in {rows.num_rows} rows. Choose one that has."
            )
    a_wins = rows["a_wins"].to_numpy()
    # The pair's own battles are all seen from the strong LLM's side.
    reverse = np.array([pair == (weak, strong) for pair in zip(a, b, strict=True)])
    verdicts = np.sign(np.where(reverse, 1 - a_wins, a_wins) - 0.5)
    if len(np.unique(verdicts)) == 1:
        said = {1.0: "a win for the same side", 0.0: "a tie", -1.0: "a loss for the same side"}
        raise DataError(
            f"All {rows.num_rows} verdicts are {said[float(verdicts[0])]}: one class only. "
            "Expected battles with different outcomes. Check the verdict columns, or add battles."
        )
    own = reverse | np.array([pair == (strong, weak) for pair in zip(a, b, strict=True)])
    quality_a, quality_b = rows["a_quality"].to_numpy(), rows["b_quality"].to_numpy()
    rated = own.all() and not (np.isnan(quality_a) | np.isnan(quality_b)).any()
    return Comparisons(
        prompts=tuple(rows["prompt"].to_pylist()),
        llm_a=tuple(a),
        llm_b=tuple(b),
        a_wins=a_wins,
        weak=weak,
        strong=strong,
        weak_quality=np.where(reverse, quality_a, quality_b) if rated else None,
        strong_quality=np.where(reverse, quality_b, quality_a) if rated else None,
    )


def pair_battles(rows: pa.Table, *, weak: str, strong: str, tiers: int | None = 10) -> pa.Table:
    """Return the battles of the pair as rows like SCHEMA, those of their tiers under their names.

    Two given LLMs rarely meet in arena data; LLMs about as strong as either stand in for them.
    tiers: how many; None for no stand-ins. The qualities stay with the pair's own battles.
    Raises DataError when the pair, or its tiers, never met.
    """
    kept, a, b = _stand_ins(comparisons(rows, weak=weak, strong=strong), tiers)
    found = rows.take(kept)
    own = pc.and_(pc.equal(found["llm_a"], pa.array(a)), pc.equal(found["llm_b"], pa.array(b)))
    columns: dict[str, Any] = {"llm_a": pa.array(a), "llm_b": pa.array(b)}
    for name in ("a_quality", "b_quality"):
        columns[name] = pc.if_else(own, found[name], pa.scalar(None, pa.float64()))
    for name, column in columns.items():
        found = found.set_column(found.schema.get_field_index(name), name, column)
    return found


def _stand_ins(
    data: Comparisons, tiers: int | None
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Return the rows of battles between the pair's tiers, and whom their sides stand for."""
    weak, strong = data.weak, data.strong
    tier = {strong: 0, weak: 1} if tiers is None else llm_tiers(data, tiers)
    # LLMs that no battle links to the pair have no tier.
    a, b = ([tier.get(llm, -1) for llm in side] for side in (data.llm_a, data.llm_b))
    stands_for = {tier[strong]: strong, tier[weak]: weak}
    rows = [row for row, pair in enumerate(zip(a, b, strict=True)) if set(pair) == set(stands_for)]
    if not rows:
        who = "the tiers of " if tiers else ""
        todo = f"Group the LLMs into fewer than {tiers} tiers" if tiers else "Group them into tiers"
        raise DataError(
            f"No battle among {len(data.prompts)} is between {who}{strong!r} and {weak!r}. "
            f"Expected some. {todo}, or add battles."
        )
    return (
        np.array(rows),
        tuple(stands_for[a[row]] for row in rows),
        tuple(stands_for[b[row]] for row in rows),
    )


def other_prompts(prompts: Sequence[str], refused: Iterable[str]) -> np.ndarray:
    """Return the positions of the prompts that are none of ``refused``, however spelled."""
    normal = {same_prompt(prompt) for prompt in refused}
    kept = [row for row, prompt in enumerate(prompts) if same_prompt(prompt) not in normal]
    return np.array(kept, dtype=np.int64)


def contaminated_prompts(path: Path) -> tuple[str, ...]:
    """Return the `eval_prompt` of every line of a JSONL file; raises DataError for another file."""
    try:
        # Not splitlines: JSON may hold U+2028 and other separators as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        prompts = tuple(json.loads(line)["eval_prompt"] for line in lines if line.strip())
        if bad := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise TypeError(f"eval_prompt is {bad[0]!r}")
        return prompts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error!r}. Expected one JSON object with eval_prompt on each "
            "line. Correct the file."
        ) from error
