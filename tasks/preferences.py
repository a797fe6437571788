"""Preference data: who answered better, said by people, by known answers or by a judge.

Three layouts come in, one table comes out (columns as in SCHEMA): Chatbot Arena's battles, and
RouteLLM's judge battles of the same schema; RouteLLM's response CSVs, whose correct and wrong
answers make verdicts (D_gold); alpaca_eval's judgements against one reference LLM. From the table
follow `Comparisons`, of all LLMs or, grouped into tiers, of the routed pair (arXiv 2406.18665,
section 4.1). The adapters leave out what cannot be used, and count it.

A long file: the adapters, the table and its checks are read, and changed, together.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from prefect import task

from conf.errors import DataError, unknown_name
from router_models.tiers import llm_tiers
from router_models.training_data import Comparisons
from tasks.warehouse import Snapshot, Warehouse

Layout = Literal["arena", "gold", "alpaca"]
Source = Literal["arena", "gold", "judge"]

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
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
FLAGS = ("winner_model_a", "winner_tie", "winner_model_b")
VERDICTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
WINNERS = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie"}
CONTAMINATED = "contaminated_prompts.jsonl"
ALPACA_REFERENCE = "gpt4_1106_preview"
# Nearer to 0 or 1 a judge's probability says nothing but that it is certain.
CERTAIN = 0.01


@dataclass(frozen=True, eq=False)
class Preferences:
    """Battles, one row each as in SCHEMA, and how many rows were left out, by reason."""

    rows: pa.Table
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class IngestedPreferences:
    """Where the battles lie, and how many rows were left out, by reason."""

    snapshot: Snapshot
    left_out: Mapping[str, int]


@task(task_run_name="ingest {layout} preferences")
def ingest_preferences(
    warehouse: Warehouse, layout: Layout, path: str, *, source: Source | None = None
) -> IngestedPreferences:
    """Store the battles found at ``path`` and return them as a snapshot.

    source: who gave an arena layout's verdicts, people (arena, the default) or a judge.
    """
    found = preferences(layout, path, source=source)
    warehouse.ingest("preferences", found.rows)
    return IngestedPreferences(warehouse.write_snapshot("preferences", found.rows), found.left_out)


def preferences(layout: Layout, path: str, *, source: Source | None = None) -> Preferences:
    """Return the battles found at ``path``, read as ``layout``."""
    if layout == "arena":
        return arena_preferences(path, source=source or "arena")
    return gold_preferences(Path(path)) if layout == "gold" else alpaca_preferences(Path(path))


def arena_preferences(path: str, *, source: Source = "arena") -> Preferences:
    """Return the battles of a hub dataset, a folder or a file in Chatbot Arena's schema.

    Columns: model_a, model_b, prompt (JSON-encoded turns, of which the first is routed; plain text
    is taken as it is), and winner_model_a, winner_model_b, winner_tie, or one column `winner`. id
    is optional. Raises DataError for missing columns and for rows without exactly one verdict.
    """
    columns = _arena_columns(path)
    names = sorted(columns)
    judged = [name for name in FLAGS if name in columns] if "winner" not in columns else ["winner"]
    needed = ["model_a", "model_b", "prompt", *(judged if judged == ["winner"] else FLAGS)]
    if missing := [name for name in needed if name not in columns]:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; {', '.join(missing)} is missing. Expected "
            f"model_a, model_b, prompt and {', '.join(FLAGS)} (or winner). Rename the columns."
        )
    records, left_out = [], Counter[str]()
    for row, (a, b, prompt) in enumerate(
        zip(columns["model_a"], columns["model_b"], columns["prompt"], strict=True)
    ):
        text = _first_turn(prompt)
        verdict = _verdict({name: columns[name][row] for name in judged}, row)
        if not text.strip():
            left_out["no text in the first turn"] += 1
        elif a == b:
            left_out["an LLM against itself"] += 1
        else:
            battle_id = columns["id"][row] if "id" in columns else row
            records.append(_record(str(battle_id), text, str(a), str(b), VERDICTS[verdict]))
    return Preferences(_table(records, source=source, dataset=path), left_out)


def gold_preferences(path: Path, *, contaminated: Path | None = None) -> Preferences:
    """Return the battles in a response CSV, or in all CSVs of a folder, between all its LLMs.

    A CSV has the columns `prompt` and, for each LLM, whether it answered correctly: True or False,
    or a score in [0, 1]. Text columns, such as the responses, are not read.
    contaminated: a JSONL file of prompts (eval_prompt) that are left out; by default the folder's
    own `contaminated_prompts.jsonl`, where there is one.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{path} holds no CSV. Expected RouteLLM's response files: prompt, then a column for "
            "each LLM. Correct the path."
        )
    listed = contaminated or folder / CONTAMINATED
    refused = set(contaminated_prompts(listed)) if contaminated or listed.exists() else set()
    records, left_out = [], Counter[str]()
    for file in files:
        frame, llms = _correctness(file)
        for row, (prompt, *correct) in enumerate(
            frame[["prompt", *llms]].itertuples(index=False, name=None)
        ):
            if prompt in refused:
                left_out["contaminated"] += 1
                continue
            for (a, right_a), (b, right_b) in combinations(zip(llms, correct, strict=True), 2):
                a_wins = 0.5 * (1 + np.sign(float(right_a) - float(right_b)))
                record = _record(f"{file.stem}:{row}", _readable(prompt), a, b, float(a_wins))
                quality = {"a_quality": float(right_a), "b_quality": float(right_b)}
                records.append(record | quality | {"domain": file.stem})
    if left_out and not records:
        raise DataError(
            f"All {left_out['contaminated']} rows of {path} are contaminated: {listed} lists them. "
            "Expected rows that are not. Correct the list."
        )
    return Preferences(_table(records, source="gold", dataset=str(path)), left_out)


def alpaca_preferences(path: Path, *, llms: Sequence[str] = ()) -> Preferences:
    """Return alpaca_eval's judgements, each LLM against the reference LLM.

    path: a folder with queries.parquet (query_id, prompt) and preferences.parquet (query_id,
    model, win_prob). llms: also the battles between each two of these, which follow from both
    judgements on one query: the odds of a against b are those of a against the reference, divided
    by those of b (Bradley-Terry).
    """
    queries = _parquet(path / "queries.parquet", ("query_id", "prompt"))
    judged = _parquet(path / "preferences.parquet", ("query_id", "model", "win_prob"))
    prompts = dict(zip(queries["query_id"], queries["prompt"], strict=True))
    if unknown := set(judged["query_id"]) - set(prompts):
        raise DataError(
            f"{len(unknown)} queries of {path / 'preferences.parquet'}, such as {min(unknown)!r}, "
            "are not in queries.parquet. Expected a prompt for each. Complete the file."
        )
    bad = judged[~judged["win_prob"].between(0, 1)]
    if len(bad):
        raise DataError(
            f"{len(bad)} judgements, the first of {bad['model'].iloc[0]!r}, have a win_prob of "
            f"{bad['win_prob'].iloc[0]}. Expected a probability in [0, 1]. Correct or drop them."
        )
    known = {*judged["model"], ALPACA_REFERENCE}
    for llm in llms:
        if llm not in known:
            raise DataError(unknown_name("LLM", llm, known) + " Choose LLMs that were judged.")
    left_out = Counter({"an LLM against itself": int((judged["model"] == ALPACA_REFERENCE).sum())})
    judged = judged[judged["model"] != ALPACA_REFERENCE]
    triples = zip(judged["query_id"], judged["model"], judged["win_prob"], strict=True)
    records = [
        _record(str(query), _readable(prompts[query]), model, ALPACA_REFERENCE, win_prob)
        for query, model, win_prob in triples
    ]
    by_llm = {llm: rows.set_index("query_id")["win_prob"] for llm, rows in judged.groupby("model")}
    for a, b in combinations([llm for llm in llms if llm != ALPACA_REFERENCE], 2):
        first, second = by_llm[a].align(by_llm[b], join="inner")
        odds_a, odds_b = (_odds(side.to_numpy()) for side in (first, second))
        records += [
            _record(str(query), _readable(prompts[query]), a, b, float(share))
            for query, share in zip(first.index, odds_a / (odds_a + odds_b), strict=True)
        ]
    return Preferences(_table(records, source="judge", dataset=str(path)), +left_out)


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


def tiered(data: Comparisons, *, weak: str, strong: str, tiers: int = 10) -> Comparisons:
    """Return the battles between the two LLMs' tiers as battles of the two themselves.

    Two given LLMs rarely meet in arena data; LLMs about as strong as either stand in for them.
    Raises DataError when the tiers never met.
    """
    tier = llm_tiers(replace(data, weak=weak, strong=strong), tiers)
    # LLMs that no battle links to the pair have no tier.
    a, b = ([tier.get(llm, -1) for llm in side] for side in (data.llm_a, data.llm_b))
    stands_for = {tier[strong]: strong, tier[weak]: weak}
    rows = [row for row, pair in enumerate(zip(a, b, strict=True)) if set(pair) == set(stands_for)]
    if not rows:
        raise DataError(
            f"No battle among {len(data.prompts)} is between the tiers of {strong!r} and {weak!r}. "
            f"Expected some. Group the LLMs into fewer than {tiers} tiers, or add battles."
        )
    taken = replace(data, weak_quality=None, strong_quality=None).take(np.array(rows))
    return replace(
        taken,
        llm_a=tuple(stands_for[a[row]] for row in rows),
        llm_b=tuple(stands_for[b[row]] for row in rows),
        weak=weak,
        strong=strong,
    )


@dataclass(frozen=True)
class Leaks:
    """Training prompts that must not be trained on, each once, as they stand in the test data."""

    duplicates: tuple[str, ...]
    contaminated: tuple[str, ...]


def leaks(train: Iterable[str], test: Iterable[str], *, contaminated: Iterable[str] = ()) -> Leaks:
    """Return the prompts of ``train`` that are in ``test`` or listed as contaminated.

    Case and white space make no difference.
    """
    seen = {_normal(prompt) for prompt in train}

    def found(prompts: Iterable[str]) -> tuple[str, ...]:
        distinct = {_normal(prompt): prompt for prompt in prompts}
        return tuple(prompt for normal, prompt in distinct.items() if normal in seen)

    return Leaks(found(test), found(contaminated))


def refuse_leaks(
    train: Iterable[str], test: Iterable[str], *, contaminated: Iterable[str] = ()
) -> None:
    """Raise DataError when a training prompt is in the test data or listed as contaminated."""
    found = leaks(train, test, contaminated=contaminated)
    for prompts, what in (
        (found.duplicates, "also in the test data"),
        (found.contaminated, f"listed in {CONTAMINATED}"),
    ):
        if prompts:
            raise DataError(
                f"{len(prompts)} training prompts are {what}, such as {prompts[0][:80]!r}. "
                "Expected prompts that no test has seen. Drop them with without_prompts."
            )


def without_prompts(data: Comparisons, prompts: Iterable[str]) -> Comparisons:
    """Return the battles on other prompts; raises DataError when none is left."""
    refused = {_normal(prompt) for prompt in prompts}
    rows = [row for row, prompt in enumerate(data.prompts) if _normal(prompt) not in refused]
    if not rows:
        raise DataError(
            f"All {len(data.prompts)} training prompts are in the test data. Expected some of its "
            "own. Add training data, or split the queries."
        )
    return data.take(np.array(rows))


def contaminated_prompts(path: Path) -> tuple[str, ...]:
    """Return the `eval_prompt` of every line of a JSONL file; raises DataError for another file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return tuple(json.loads(line)["eval_prompt"] for line in lines if line.strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error!r}. Expected one JSON object with eval_prompt on each "
            "line. Correct the file."
        ) from error


def _arena_columns(path: str) -> dict[str, list[Any]]:
    """Return the columns but for the responses, which are most of the bytes."""
    import datasets

    suffix = Path(path).suffix.lower()
    try:
        if suffix in FORMATS:
            loaded = datasets.load_dataset(FORMATS[suffix], data_files=path)
        else:
            loaded = datasets.load_dataset(path)
        rows = datasets.concatenate_datasets(list(loaded.values()))
    except Exception as error:  # datasets lets through whatever hub, files and network raise
        raise DataError(
            f"The battles {path!r} cannot be loaded: {error.__cause__ or error}. Expected a hub "
            "dataset, or a JSONL, CSV or Parquet file. Correct the path, or check the network."
        ) from error
    if rows.num_rows == 0:
        raise DataError(f"{path} has no rows. Expected battles. Correct the path or the file.")
    wanted = ("id", "question_id", "model_a", "model_b", "prompt", "winner", *FLAGS)
    kept = {name: list(rows[name]) for name in wanted if name in rows.column_names}
    others: dict[str, list[Any]] = {name: [] for name in rows.column_names if name not in kept}
    return others | kept


def _first_turn(prompt: object) -> str:
    """Return a conversation's first turn; an empty text where it has none."""
    turns = prompt
    if isinstance(prompt, str) and prompt.lstrip().startswith("["):
        try:
            turns = json.loads(prompt)
        except ValueError:
            turns = prompt  # a plain prompt that happens to begin with a bracket
    if isinstance(turns, list):
        turns = turns[0] if turns else ""
    return _readable(turns) if isinstance(turns, str) else ""


def _verdict(said: Mapping[str, Any], row: int) -> str:
    if "winner" in said:
        if said["winner"] in WINNERS:
            return WINNERS[said["winner"]]
    else:
        set_flags = [name for name, value in said.items() if value == 1]
        others = [value for value in said.values() if value not in (0, 1)]
        if len(set_flags) == 1 and not others:
            return dict(zip(FLAGS, VERDICTS, strict=True))[set_flags[0]]
    raise DataError(
        f"Row {row} has the verdict {dict(said)}. Expected exactly one of {', '.join(FLAGS)} to be "
        f"1, or winner to be one of {', '.join(WINNERS)}. Correct or drop the row."
    )


def _correctness(file: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a response CSV, and the names of its LLMs."""
    try:
        # A prompt may well be "None" or "NA"; only an empty cell is missing.
        frame = pd.read_csv(file, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:  # parser and decoding errors are ValueErrors
        raise DataError(
            f"{file} cannot be read: {error}. Expected a UTF-8 CSV: prompt, then a column for each "
            "LLM. Correct the file."
        ) from error
    llms = [
        str(name)
        for name in frame.columns
        if name != "prompt"
        and not str(name).startswith("Unnamed:")
        and any(isinstance(value, bool | int | float | np.number) for value in frame[name].dropna())
    ]
    if "prompt" not in frame.columns or len(llms) < 2:
        raise DataError(
            f"{file} has the columns {', '.join(map(str, frame.columns))}. Expected prompt and, "
            "for at least two LLMs, a column of True and False. Rename or add columns."
        )
    for llm in llms:
        values = pd.to_numeric(frame[llm], errors="coerce").astype(float)
        bad = np.flatnonzero(~values.between(0, 1))
        if len(bad):
            raise DataError(
                f"Row {bad[0]} of {file} has {frame[llm].iloc[bad[0]]!r} for {llm!r}. Expected "
                "True, False or a score in [0, 1]. Correct the row, or drop the column if it is no "
                "LLM's."
            )
        frame[llm] = values
    if len(missing := np.flatnonzero(frame["prompt"].isna())):
        raise DataError(
            f"Row {missing[0]} of {file} has no prompt. Expected a text. Correct or drop the row."
        )
    frame["prompt"] = frame["prompt"].astype(str)
    return frame, llms


def _parquet(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read: {error}. Expected a Parquet file with {', '.join(columns)}. "
            "Correct the path or the file."
        ) from error
    if missing := [name for name in columns if name not in frame.columns]:
        raise DataError(
            f"{file} has the columns {', '.join(map(str, frame.columns))}; {', '.join(missing)} is "
            f"missing. Expected {', '.join(columns)}. Rename the columns."
        )
    return frame


def _odds(probability: np.ndarray) -> np.ndarray:
    certain = np.clip(probability, CERTAIN, 1 - CERTAIN)
    return certain / (1 - certain)


def _record(battle_id: str, prompt: str, a: str, b: str, a_wins: float) -> dict[str, Any]:
    verdict = "tie" if a_wins == 0.5 else "a" if a_wins > 0.5 else "b"
    return {
        "battle_id": battle_id,
        "prompt": prompt,
        "llm_a": a,
        "llm_b": b,
        "verdict": verdict,
        "a_wins": float(a_wins),
    }


def _table(records: list[dict[str, Any]], *, source: Source, dataset: str) -> pa.Table:
    if not records:
        raise DataError(
            f"{dataset} holds no battle that can be used. Expected rows with a prompt and two "
            "different LLMs. Check the file."
        )
    for record in records:
        record |= {"source": source, "dataset": dataset}
        content = json.dumps([record.get(name) for name in SCHEMA.names[1:]], ensure_ascii=False)
        record["preference_key"] = hashlib.sha256(content.encode()).hexdigest()[:24]
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    first = np.unique(table["preference_key"].to_numpy(zero_copy_only=False), return_index=True)[1]
    return table.take(np.sort(first))  # rows that agree in everything are one battle


def _readable(text: str) -> str:
    # JSON can carry half of a surrogate pair, which no table takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _normal(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()
