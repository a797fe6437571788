"""Where battles come from: files and hub datasets of people and judges, and our own scores.

Each adapter brings one layout to the one table of `tasks/preferences.py`: Chatbot Arena's battles,
and RouteLLM's judge battles of the same schema; RouteLLM's response CSVs, whose correct and wrong
answers make verdicts (D_gold); alpaca_eval's judgements against one reference LLM; and the scored
responses of a run. The adapters leave out what cannot be used, and count it. Source: arXiv
2406.18665, section 4.1.

A long file: one adapter after the other, each with its checks.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from conf.errors import DataError, unknown_name
from router_models.training_data import same_prompt
from tasks.preferences import (
    AGAINST_ITSELF,
    CONTAMINATED,
    VERDICTS,
    WITHOUT_NAME,
    Preferences,
    Source,
    battle,
    contaminated_prompts,
    counted_battles,
    readable,
)
from tasks.warehouse import Snapshot

Layout = Literal["arena", "gold", "alpaca"]

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
FLAGS = ("winner_model_a", "winner_tie", "winner_model_b")
WINNERS = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie"}
SAID = {"true": "1", "yes": "1", "false": "0", "no": "0"}
ALPACA_REFERENCE = "gpt4_1106_preview"
# Nearer to 0 or 1 a judge's probability says nothing but that it is certain.
CERTAIN = 0.01


def preferences(
    layout: Layout, path: str, *, source: Source | None = None, llms: Sequence[str] = ()
) -> Preferences:
    """Return the battles found at ``path``, read as ``layout``; llms: of alpaca's, as there."""
    if layout == "arena":
        return arena_preferences(path, source=source or "arena")
    if layout == "gold":
        return gold_preferences(Path(path))
    return alpaca_preferences(Path(path), llms=llms)


def arena_preferences(path: str, *, source: Source = "arena") -> Preferences:
    """Return the battles of a hub dataset, a folder or a file in Chatbot Arena's schema.

    Columns: model_a, model_b, prompt (JSON-encoded turns, of which the first is routed; plain text
    is taken as it is), and winner_model_a, winner_model_b, winner_tie, or one column `winner`. id
    is optional. A winner between equal responses (response_a, response_b, where they are there)
    says nothing, and is left out. Raises DataError for missing columns and for rows without exactly
    one verdict.
    """
    table = _arena_table(path)
    judged = ["winner"] if "winner" in table.column_names else list(FLAGS)
    needed = ["model_a", "model_b", "prompt", *judged]
    if missing := [name for name in needed if name not in table.column_names]:
        raise DataError(
            f"{path} has the columns {', '.join(sorted(table.column_names))}; "
            f"{', '.join(missing)} is missing. Expected model_a, model_b, prompt and "
            f"{', '.join(FLAGS)} (or winner). Rename the columns."
        )
    ids = table["id"].to_pylist() if "id" in table.column_names else range(table.num_rows)
    columns = [table[name].to_pylist() for name in needed]
    records, left_out = [], Counter[str]()
    for row, (battle_id, equal, a, b, prompt, *said) in enumerate(
        zip(ids, _equal_responses(table), *columns, strict=True)
    ):
        text = _first_turn(prompt)
        verdict = _verdict(dict(zip(judged, said, strict=True)), row)
        if not text.strip():
            left_out["no text in the first turn"] += 1
        elif not (_name(a) and _name(b)):
            left_out[WITHOUT_NAME] += 1
        elif a == b:
            left_out[AGAINST_ITSELF] += 1
        elif equal and verdict != "tie":
            left_out["a winner between equal responses"] += 1
        else:
            records.append(battle(str(battle_id), text, str(a), str(b), VERDICTS[verdict]))
    return counted_battles(records, left_out, source=source, dataset=path)


def gold_preferences(path: Path, *, contaminated: Path | None = None) -> Preferences:
    """Return the battles in a response CSV, or in all CSVs of a folder, between all its LLMs.

    A CSV has the columns `prompt` and, for each LLM, whether it answered correctly: true or false,
    yes or no, in any case, or a score in [0, 1]. Columns that mostly hold something else, such as
    the responses, are not read; the remarks name them.
    contaminated: a JSONL file of prompts (eval_prompt) that are left out, however they are spelled
    (`same_prompt`); by default the folder's own `contaminated_prompts.jsonl`, where there is one.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Expected a folder of response CSVs, or one of them. Correct "
            "the path."
        )
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{path} holds no CSV. Expected RouteLLM's response files: prompt, then a column for "
            "each LLM. Correct the path."
        )
    listed = contaminated or folder / CONTAMINATED
    refused = contaminated_prompts(listed) if contaminated or listed.exists() else ()
    unmet = {same_prompt(prompt): False for prompt in refused}
    records, left_out = [], Counter[str]()
    ignored: dict[str, None] = {}
    for file in files:
        frame, llms, others = _correctness(file)
        ignored |= dict.fromkeys(others)
        for row, (prompt, *correct) in enumerate(
            frame[["prompt", *llms]].itertuples(index=False, name=None)
        ):
            if (normal := same_prompt(prompt)) in unmet:
                unmet[normal] = True
                left_out["contaminated"] += 1
                continue
            for (a, right_a), (b, right_b) in combinations(zip(llms, correct, strict=True), 2):
                a_wins = 0.5 * (1 + np.sign(float(right_a) - float(right_b)))
                record = battle(f"{file.stem}:{row}", readable(prompt), a, b, float(a_wins))
                quality = {"a_quality": float(right_a), "b_quality": float(right_b)}
                records.append(record | quality | {"domain": file.stem})
    if left_out and not records:
        raise DataError(
            f"All {left_out['contaminated']} rows of {path} are contaminated: {listed} lists them. "
            "Expected rows that are not. Correct the list."
        )
    remarks = {f"ignored columns ({named_first(list(ignored))})": len(ignored)} if ignored else {}
    # Of one file alone, the folder's list is about the others too.
    if (absent := list(unmet.values()).count(False)) and (contaminated or path.is_dir()):
        remarks[f"prompts of {listed.name} that no row has"] = absent
    dataset = str(path)
    return counted_battles(records, left_out, source="gold", dataset=dataset, remarks=remarks)


def named_first(names: Sequence[str], *, most: int = 3) -> str:
    """Return the first few names for a message.

    >>> named_first(["a", "b", "c", "d"])
    'a, b, c …'
    """
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def alpaca_preferences(path: Path, *, llms: Sequence[str] = ()) -> Preferences:
    """Return alpaca_eval's judgements, each LLM against the reference LLM.

    path: a folder with queries.parquet (query_id, prompt) and preferences.parquet (query_id,
    model, win_prob). llms: also the battles between each two of these, which follow from both
    judgements on one query: the odds of a against b are those of a against the reference, divided
    by those of b (Bradley-Terry). Judgements without a prompt or an LLM's name are left out.
    """
    prompts = _alpaca_prompts(path / "queries.parquet")
    judged = _parquet(path / "preferences.parquet", ("query_id", "model", "win_prob"))
    if unknown := judged["query_id"][~judged["query_id"].isin(list(prompts))].tolist():
        raise DataError(
            f"{len(set(unknown))} queries of {path / 'preferences.parquet'}, such as "
            f"{unknown[0]!r}, are not in queries.parquet. Expected a prompt for each. Complete the "
            "file."
        )
    judged["model"] = [_name(llm) for llm in judged["model"]]
    judged["prompt"] = judged["query_id"].map(prompts)
    left_out = Counter[str]()
    for reason, column, value in (
        ("a query without a prompt", "prompt", ""),
        (WITHOUT_NAME, "model", ""),
        (AGAINST_ITSELF, "model", ALPACA_REFERENCE),
    ):
        left_out[reason] = int((judged[column] == value).sum())
        judged = judged[judged[column] != value]
    _check_shares(judged, path / "preferences.parquet")
    known = {*judged["model"], ALPACA_REFERENCE}
    for llm in llms:
        if llm not in known:
            raise DataError(unknown_name("LLM", llm, known) + " Choose LLMs that were judged.")
    triples = zip(judged["query_id"], judged["model"], judged["win_prob"], strict=True)
    records = [
        battle(str(query), prompts[query], model, ALPACA_REFERENCE, win_prob)
        for query, model, win_prob in triples
    ]
    by_llm = {  # one share for each query, however often it was judged
        llm: rows.groupby("query_id", sort=False)["win_prob"].mean()
        for llm, rows in judged.groupby("model")
    }
    for a, b in combinations([llm for llm in llms if llm != ALPACA_REFERENCE], 2):
        first, second = by_llm[a].align(by_llm[b], join="inner")
        odds_a, odds_b = (_odds(side.to_numpy()) for side in (first, second))
        records += [
            battle(str(query), prompts[query], a, b, float(share))
            for query, share in zip(first.index, odds_a / (odds_a + odds_b), strict=True)
        ]
    return counted_battles(records, left_out, source="judge", dataset=str(path))


def _alpaca_prompts(file: Path) -> dict[Any, str]:
    """Return each query's prompt, empty where there is no text; raises DataError for two."""
    queries = _parquet(file, ("query_id", "prompt")).dropna(subset="query_id")
    texts = [readable(text) if isinstance(text, str) else "" for text in queries["prompt"]]
    texts = [text if text.strip() else "" for text in texts]
    queries = queries[["query_id"]].assign(prompt=texts).drop_duplicates()
    if twice := queries["query_id"][queries["query_id"].duplicated()].tolist():
        raise DataError(
            f"{file} has different prompts for the query_id {twice[0]!r}. Expected one for each. "
            "Correct or drop the others."
        )
    return dict(zip(queries["query_id"], queries["prompt"], strict=True))


def _check_shares(judged: pd.DataFrame, file: Path) -> None:
    shares = judged["win_prob"]
    numbers = shares if pd.api.types.is_numeric_dtype(shares) else pd.Series(np.nan, shares.index)
    if len(bad := judged[~numbers.astype(float).between(0, 1)]):
        raise DataError(
            f"{len(bad)} judgements of {file}, the first of {bad['model'].tolist()[0]!r}, have a "
            f"win_prob of {bad['win_prob'].tolist()[0]!r}. Expected a number in [0, 1], the "
            "probability of a win. Correct or drop them."
        )


def response_preferences(
    queries: Snapshot, scores: Snapshot, llms: Sequence[str], metric: str
) -> Preferences:
    """Return battles between each two of ``llms`` from the scores of their responses.

    a_wins is the probability that a response of a scores higher than one of b, over all pairs of
    samples, a tie counting half; the qualities are the means over samples. A query is left out for
    two LLMs when one of them lacks samples there that it has elsewhere, as it is for labels.
    Raises DataError for an LLM that has no score under the metric.
    """
    asked = {row["query_key"]: row for row in queries.read().to_pylist()}
    qualities = _qualities(scores, list(asked), llms, metric)
    records: list[dict[str, Any]] = []
    left_out = 0
    for a, b in combinations(llms, 2):
        complete = ~(np.isnan(qualities[a]).any(axis=1) | np.isnan(qualities[b]).any(axis=1))
        left_out += int((~complete).sum())
        first, second = qualities[a][complete], qualities[b][complete]
        keys = [key for key, whole in zip(asked, complete, strict=True) if whole]
        figures = (win_probability(first, second), first.mean(axis=1), second.mean(axis=1))
        for key, a_wins, a_quality, b_quality in zip(
            keys, *(column.tolist() for column in figures), strict=True
        ):
            query = asked[key]
            record = battle(query["query_id"], query["text"], a, b, a_wins)
            record |= {"a_quality": a_quality, "b_quality": b_quality, "domain": query["domain"]}
            records.append(record)
    reasons = {"a sample without a score": left_out} if left_out else {}
    return counted_battles(records, reasons, source="responses", dataset=f"scores {metric}")


def win_probability(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return, for each row, how often a value of ``first`` is larger than one of ``second``, (n,).

    first: (n, S); second: (n, L). All S · L pairs count, equal values half.

    >>> win_probability(np.array([[1.0, 2.0]]), np.array([[1.0]]))
    array([0.75])
    """
    wins = np.zeros(len(first))
    for column in range(first.shape[1]):  # (n, S, L) at once would be large
        wins += np.sign(first[:, column : column + 1] - second).sum(axis=1)
    return 0.5 + 0.5 * wins / (first.shape[1] * second.shape[1])


def _qualities(
    scores: Snapshot, keys: Sequence[str], llms: Sequence[str], metric: str
) -> dict[str, np.ndarray]:
    """Return each LLM's scores, (queries, its samples), NaN where there is none."""
    table = scores.read()
    if metric not in (known := set(table["metric"].unique().to_pylist())):
        raise DataError(unknown_name("quality metric", metric, known) + " Choose a scored one.")
    table = table.filter(pc.equal(table["metric"], metric))
    known = set(table["llm"].unique().to_pylist())
    found = {}
    for llm in llms:
        if llm not in known:
            raise DataError(
                unknown_name("LLM", llm, known)
                + f" It has no response scored with {metric!r}. Choose LLMs that have."
            )
        own = table.filter(pc.equal(table["llm"], llm))
        row = pc.index_in(own["query_key"], pa.array(keys, own["query_key"].type))
        asked = pc.is_valid(row).to_numpy()
        sample = own["sample_index"].to_numpy()
        found[llm] = np.full((len(keys), int(sample.max()) + 1), np.nan)
        at = row.filter(pc.is_valid(row)).to_numpy().astype(np.int64)
        found[llm][at, sample[asked]] = own["value"].to_numpy()[asked]
    return found


def _arena_table(path: str) -> pa.Table:
    """Return all rows and columns; they stay on disk, where `datasets` maps them from."""
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
    # As a whole: row by row, or a column as a list, takes seconds at Arena's size.
    table: pa.Table = rows.with_format("arrow")[:]
    return table


def _equal_responses(table: pa.Table) -> list[bool]:
    """Return for each battle whether both LLMs answered the same, as far as the table says it."""
    sides = [table[name] for name in ("response_a", "response_b") if name in table.column_names]
    if len(sides) < 2 or sides[0].type != sides[1].type or pa.types.is_nested(sides[0].type):
        return [False] * table.num_rows
    equal: list[bool] = pc.fill_null(pc.equal(*sides), False).to_pylist()
    return equal


def _name(llm: Any) -> str:
    """Return an LLM's name, empty where there is none; numbers are names too."""
    return "" if pd.isna(llm) is True or not str(llm).strip() else str(llm)


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
    return readable(turns) if isinstance(turns, str) else ""


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


def _correctness(file: Path) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Return a response CSV, the names of its LLMs, and of the columns that are ignored."""
    try:
        # A prompt may well be "None" or "NA"; only an empty cell is missing.
        frame = pd.read_csv(file, keep_default_na=False, na_values=[""])
        # Read once more: pandas gives the second of two equal names another one.
        header = pd.read_csv(file, header=None, nrows=1, dtype=str).iloc[0].dropna().tolist()
    except (OSError, ValueError) as error:  # parser and decoding errors are ValueErrors
        raise DataError(
            f"{file} cannot be read: {error}. Expected a UTF-8 CSV: prompt, then a column for each "
            "LLM. Correct the file."
        ) from error
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(
            f"{file} has the column {twice[0]!r} twice. Expected a different name for each column. "
            "Rename or drop one of them."
        )
    if len(frame) == 0:
        raise DataError(
            f"{file} has no rows, only a header. Expected rows with a prompt. Complete the "
            "file, or take it out of the folder."
        )
    columns = [str(name) for name in frame.columns if not str(name).startswith("Unnamed:")]
    right = {name: _right(frame[name]) for name in columns if name != "prompt"}
    llms = [name for name, values in right.items() if _is_an_llms(frame[name], values)]
    texts = {f"{llm}_response" for llm in llms}  # RouteLLM's GSM8K file has them
    others = [name for name in right if name not in llms and name not in texts]
    if "prompt" not in columns or len(llms) < 2:
        named = others and "prompt" in columns
        ignored = f" Mostly no True and False: {named_first(others)}." if named else ""
        raise DataError(
            f"{file} has the columns {', '.join(map(str, frame.columns))}.{ignored} Expected "
            "prompt and, for at least two LLMs, a column of True and False. Rename or add columns."
        )
    for llm in llms:
        bad = np.flatnonzero(~right[llm].between(0, 1))
        if len(bad):
            raise DataError(
                f"Line {_line(file, bad[0])} of {file} has {frame[llm].tolist()[bad[0]]!r} for "
                f"{llm!r}. Expected True, False or a score in [0, 1]. Correct the row, or drop the "
                "column if it is no LLM's."
            )
        frame[llm] = right[llm]
    frame["prompt"] = frame["prompt"].astype("string").fillna("").astype(object)
    if len(missing := np.flatnonzero(frame["prompt"].str.strip() == "")):
        raise DataError(
            f"Line {_line(file, missing[0])} of {file} has no prompt. Expected a text. Correct or "
            "drop the row."
        )
    return frame, llms, others


def _right(column: pd.Series) -> pd.Series:
    """Return how right each answer is; NaN where the cell is no such thing."""
    if column.dtype.kind in "biuf":
        return column.astype(float)
    said = column.astype("string").str.strip().str.casefold().replace(SAID)
    return pd.to_numeric(said, errors="coerce").astype("float64")


def _is_an_llms(column: pd.Series, right: pd.Series) -> bool:
    """Tell whether most of the cells that are not empty say how right an answer is."""
    filled = column.notna() & (column.astype("string").str.strip() != "").fillna(False)
    return bool(right[filled].notna().sum() * 2 > filled.sum())


def _line(file: Path, row: int) -> int:
    """Return the line on which a row begins, as an editor counts: cells may hold line breaks."""
    record, quoted = -1, False  # the header is record 0
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if not quoted and line.strip():  # pandas skips blank lines
            record += 1
            if record == row + 1:
                return number
        quoted ^= line.count('"') % 2 == 1
    return len(lines)


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
