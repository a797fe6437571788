"""D_judge: an LLM says which of two answers is better, and its verdicts become battles.

Judges favour a place: many take the first answer, whichever it is. So every two answers are shown
in both orders, and a verdict counts only where both name the same LLM, or both a tie. Judge prompts
are queries to the judge: `tasks/generation.py` asks them, with its journal, retries and budget, and
what was once answered is never paid for again. Source: RouteLLM (arXiv 2406.18665), section 4.1.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from conf.errors import DataError
from conf.llms import Generation, Pair
from conf.load import config_digest
from conf.preferences import Judge
from tasks.generation import collect_responses, generate_responses
from tasks.preferences import battle, battle_table
from tasks.queries import SCHEMA as QUERY_SCHEMA
from tasks.warehouse import Snapshot, Warehouse

MISSING = "an answer to compare is missing"
FAILED = "the judge gave no answer"
NO_VERDICT = "no verdict in the judge's answer"
SEVERAL_VERDICTS = "several verdicts in the judge's answer"
DISAGREED = "the two orders disagree"
EXAMPLES = 3  # answers without a verdict that are shown
EXAMPLE_CHARS = 160
# How much of a win the first answer is given by each label.
FIRST_WINS = (1.0, 0.0, 0.5)


@dataclass(frozen=True)
class Contest:
    """Two answers to one query, and the judge prompts that show them in either order."""

    battle_id: str
    query: Mapping[str, Any]
    prompts: tuple[str, str] | None
    """The strong LLM's answer first, and second; None where both answers are the same text."""


@dataclass(frozen=True)
class JudgedPreferences:
    """Where a judge's battles lie, and what became of all comparisons."""

    snapshot: Snapshot
    agreed: int
    """Comparisons on which both orders agree; with `identical` they are the battles."""
    identical: int
    """Pairs of equal answers: ties, for which no judge is asked."""
    left_out: Mapping[str, int]
    """Comparisons without a verdict, by reason."""
    examples: tuple[str, ...]
    """How some answers end in which no verdict was found."""
    requests: int
    billed_usd: float
    """Spent this time."""
    lost_usd: float
    """At most so much for answers that may have been billed and never arrived."""
    cost_usd: float
    """What all the answers that were used cost, whenever they were paid for."""


def judge_answers(
    warehouse: Warehouse,
    queries: Snapshot,
    responses: Snapshot,
    pair: Pair,
    judge: Judge,
    generation: Generation,
    *,
    spent_usd: float = 0.0,
) -> JudgedPreferences:
    """Let ``judge`` compare the pair's answers, and store its verdicts as battles.

    generation: the budget and the share of failures that are allowed; as `generate_responses`,
    raises EndpointError and BudgetError and keeps what was received. Raises DataError when no
    comparison ends in a verdict.
    """
    contests, missing = _contests(queries, responses, pair, judge)
    prompts = _prompt_snapshot(warehouse, contests)
    settings = generation.model_copy(update={"samples": 1})
    asked = generate_responses.fn(warehouse, prompts, judge.llm, settings, spent_usd=spent_usd)
    answered = collect_responses.fn(warehouse, prompts, [judge.llm], settings).read()
    answers = dict(
        zip(answered["query_key"].to_pylist(), answered["text"].to_pylist(), strict=True)
    )
    outcomes = [_outcome(contest, answers, judge.labels) for contest in contests]
    left_out = Counter(found for found in outcomes if isinstance(found, str))
    if missing:
        left_out[MISSING] = missing
    unread = [text for text in answers.values() if isinstance(verdict(text, judge.labels), str)]
    examples = tuple(dict.fromkeys(text[-EXAMPLE_CHARS:] for text in unread))[:EXAMPLES]
    records = [
        battle(contest.battle_id, contest.query["text"], pair.strong, pair.weak, found)
        | {"domain": contest.query["domain"]}
        for contest, found in zip(contests, outcomes, strict=True)
        if isinstance(found, float)
    ]
    if not records:
        raise _no_verdicts(judge, left_out, examples)
    rows = battle_table(records, source="judge", dataset=judge_name(judge))
    warehouse.ingest("preferences", rows)
    identical = sum(contest.prompts is None for contest in contests)
    return JudgedPreferences(
        snapshot=warehouse.write_snapshot("preferences", rows),
        agreed=len(records) - identical,
        identical=identical,
        left_out=left_out,
        examples=examples,
        requests=asked.requests,
        billed_usd=asked.billed_usd,
        lost_usd=asked.lost_usd,
        cost_usd=float(sum(answered["cost_usd"].to_pylist())),
    )


def judge_name(judge: Judge) -> str:
    """Return the judge's name with a digest of all that determines its verdicts."""
    without: dict[str, Any] = {"endpoint": {"url", "api_key_env"}}
    without |= dict.fromkeys(("name", "prices", "limits"), True)
    determines = judge.model_dump(mode="json", exclude={"samples": True, "llm": without})
    return f"{judge.llm.name}@{config_digest(determines)[:8]}"


def verdict(answer: str, labels: Sequence[str]) -> float | str:
    """Return how much of a win the first answer is given, or why that cannot be told.

    >>> verdict("Both are right, the first says why. [[A]]", ("[[A]]", "[[B]]", "[[C]]"))
    1.0
    >>> verdict("The first one.", ("[[A]]", "[[B]]", "[[C]]"))
    "no verdict in the judge's answer"
    """
    found = [wins for label, wins in zip(labels, FIRST_WINS, strict=True) if label in answer]
    if len(found) == 1:
        return found[0]
    return SEVERAL_VERDICTS if found else NO_VERDICT


def _contests(
    queries: Snapshot, responses: Snapshot, pair: Pair, judge: Judge
) -> tuple[list[Contest], int]:
    """Return what is to be compared, in the order of the queries, and how many lack an answer."""
    columns = ["query_key", "llm", "sample_index", "text"]
    answers = {
        (row["query_key"], row["llm"], row["sample_index"]): row["text"]
        for row in responses.read().select(columns).to_pylist()
    }
    contests, missing = [], 0
    for query in queries.read().to_pylist():
        for sample in range(judge.samples):
            strong = answers.get((query["query_key"], pair.strong, sample))
            weak = answers.get((query["query_key"], pair.weak, sample))
            if strong is None or weak is None:
                missing += 1
                continue
            prompts = (
                _prompt(judge, query["text"], strong, weak),
                _prompt(judge, query["text"], weak, strong),
            )
            battle_id = f"{query['query_id']}:{sample}"
            contests.append(Contest(battle_id, query, None if strong == weak else prompts))
    return contests, missing


def _prompt(judge: Judge, question: str, first: str, second: str) -> str:
    return judge.template.format(question=question, answer_a=first, answer_b=second)


def _prompt_snapshot(warehouse: Warehouse, contests: Sequence[Contest]) -> Snapshot:
    """Return the distinct judge prompts as queries."""
    prompts = {
        _key(prompt): {"query_key": _key(prompt), "query_id": contest.battle_id, "text": prompt}
        for contest in contests
        for prompt in contest.prompts or ()
    }
    rows = pa.Table.from_pylist(list(prompts.values()), schema=QUERY_SCHEMA)
    return warehouse.write_snapshot("judge_prompts", rows)


def _key(prompt: str) -> str:
    return hashlib.sha256(f"judge {prompt}".encode()).hexdigest()[:24]


def _outcome(contest: Contest, answers: Mapping[str, str], labels: Sequence[str]) -> float | str:
    """Return how much of a win the strong LLM has, or why there is no verdict."""
    if contest.prompts is None:
        return 0.5
    found = [answers.get(_key(prompt)) for prompt in contest.prompts]
    if None in found:
        return FAILED
    forward, backward = (verdict(str(answer), labels) for answer in found)
    for read in (forward, backward):
        if isinstance(read, str):
            return read
    return forward if forward == 1.0 - float(backward) else DISAGREED


def _no_verdicts(judge: Judge, left_out: Mapping[str, int], examples: Sequence[str]) -> DataError:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
    shown = f", such as {examples[0]!r}" if examples else ""
    return DataError(
        f"No comparison by {judge.llm.name!r} ended in a verdict: {reasons or 'no query'}{shown}. "
        f"Expected answers of both LLMs, and one of {', '.join(judge.labels)} in each of the "
        "judge's. Take one that follows its template, raise its decoding.max_tokens, or correct "
        "judge.labels; what was received is kept."
    )
