"""Does a pool policy beat its best single LLM? Six LLMs of alpaca_eval, judged by GPT-4.

    python -m benchmarks.pool_policy DATA_DIR [--routers mf,knn,sw_ranking] [--llms a,b,c]
        [--prices FILE] [--margins 0,0.02,0.05] [--folds K] [--seed S] [--json]

DATA_DIR holds alpaca_eval's queries.parquet and preferences.parquet. Quality is win_prob, the
judge's probability that the response beats GPT-4's own. Routers are trained on the battles between
the pool's LLMs that follow from two win_probs on one query, and choose for queries of the fold
that they have not seen. The baselines are every single LLM, and the best coin toss between two of
them that costs the same ("over mix"), which no query has to be looked at for.

Prices are notional, US dollars per million output tokens of four characters: what hosted LLMs of
that size cost, and gpt-3.5-turbo-1106's list price. A query's cost is that of its own response;
choices are made by the LLMs' mean costs, for nobody knows a response's length before it is there.
Another list is a JSON object, LLM to USD per million output tokens.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conf.errors import ConfigError, DataError, TurnoutError, unknown_name
from conf.routers import Knn, MatrixFactorization, SimilarityWeighted
from router_models.catalog import build_router
from router_models.pool import PoolOutcome, expected_quality, pool_outcomes
from router_models.statistics import Estimate, mean_interval
from router_models.training_data import Comparisons
from tasks.preference_sources import alpaca_preferences
from tasks.preferences import comparisons

NOTIONAL_PRICES = {
    "gemma-2b-it": 0.06,
    "FuseChat-Llama-3.2-1B-Instruct": 0.04,
    "FuseChat-Llama-3.2-3B-Instruct": 0.10,
    "FuseChat-Llama-3.1-8B-Instruct": 0.20,
    "FuseChat-Gemma-2-9B-Instruct": 0.35,
    "gpt-3.5-turbo-1106": 2.00,
}
CHARACTERS_PER_TOKEN = 4
ROUTERS: dict[str, Any] = {"mf": MatrixFactorization, "knn": Knn, "sw_ranking": SimilarityWeighted}
MARGINS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)
VALIDATION = 7  # every seventh training query is watched for early stopping


def judged(folder: Path, prices: dict[str, float]) -> pd.DataFrame:
    """Return win_prob and cost_usd for each query_id (rows) and LLM, complete queries only."""
    rows = pd.read_parquet(folder / "preferences.parquet")
    known = set(rows["model"])
    for llm in prices:
        if llm not in known:
            raise DataError(unknown_name("LLM", llm, known) + " Choose LLMs that were judged.")
    rows = rows[rows["model"].isin(list(prices))]
    usd_per_character = rows["model"].map(prices) / CHARACTERS_PER_TOKEN / 1e6
    rows = rows.assign(cost_usd=rows["response_chars"] * usd_per_character)
    wide = rows.pivot(index="query_id", columns="model", values=["win_prob", "cost_usd"]).dropna()
    if wide.empty:
        raise DataError(
            f"No query of {folder} was judged for all of {', '.join(prices)}. Expected some. "
            "Choose other LLMs."
        )
    return wide


def battles(folder: Path, llms: Sequence[str]) -> tuple[Comparisons, np.ndarray]:
    """Return the battles between the pool's LLMs, and the query_id of each."""
    rows = alpaca_preferences(folder, llms=llms).rows
    frame = rows.select(["llm_a", "llm_b"]).to_pandas()
    within = frame.isin(list(llms)).all(axis=1).to_numpy()
    rows = rows.filter(within)
    ids = np.array([int(battle) for battle in rows["battle_id"].to_pylist()])
    return comparisons(rows, weak=llms[0], strong=llms[-1]), ids


def unseen_expected_quality(
    settings: Any,
    data: Comparisons,
    ids: np.ndarray,
    queries: np.ndarray,
    *,
    llms: Sequence[str],
    folds: int,
    seed: int,
) -> np.ndarray:
    """Return expected qualities, (queries, LLMs), each by a router that has not seen the query."""
    prompt = dict(zip(ids.tolist(), data.prompts, strict=True))
    part = np.array([_hashed(query, seed) % folds for query in queries])
    battle_part = np.array([_hashed(query, seed) % folds for query in ids])
    watched = np.array([_hashed(query, seed + 1) % VALIDATION == 0 for query in ids])
    expected = np.empty((len(queries), len(llms)))
    for fold in range(folds):
        train, validation = (
            data.take(np.flatnonzero((battle_part != fold) & chosen))
            for chosen in (~watched, watched)
        )
        router = build_router(settings).fit(train, validation, seed=seed)
        rows = np.flatnonzero(part == fold)
        prompts = [prompt[int(query)] for query in queries[rows]]
        expected[rows] = expected_quality(router, prompts, llms=llms)
    return expected


def _hashed(query: int, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {query}".encode()).digest()[:4], "big")


def figures(
    folder: Path,
    *,
    routers: Sequence[str],
    prices: dict[str, float],
    margins: Sequence[float],
    folds: int,
    seed: int,
) -> dict[str, Any]:
    """Return every single LLM's quality and cost, and each router's outcome at each margin."""
    table = judged(folder, prices)
    llms = sorted(prices, key=lambda llm: float(table["win_prob"][llm].mean()))
    quality, cost = table["win_prob"][llms].to_numpy(), table["cost_usd"][llms].to_numpy()
    data, ids = battles(folder, llms)
    singles = {
        llm: {"quality": mean_interval(quality[:, at]), "usd_per_1000": 1e3 * cost[:, at].mean()}
        for at, llm in enumerate(llms)
    }
    found: dict[str, list[PoolOutcome]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in routers:
            expected = unseen_expected_quality(
                ROUTERS[name](encoder_cache=Path(cache)),
                data,
                ids,
                table.index.to_numpy(),
                llms=llms,
                folds=folds,
                seed=seed,
            )
            found[name] = pool_outcomes(expected, quality, cost, margins=margins, seed=seed)
    return {"queries": len(table), "llms": llms, "single": singles, "pool": found}


def _ends(estimate: Estimate, *, scale: float = 1.0) -> dict[str, float]:
    ends = estimate.interval
    return {
        "value": scale * estimate.value,
        "low": scale * ends.low,
        "high": scale * ends.high,
    }


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """Return `figures` as plain JSON values."""
    return {
        "queries": found["queries"],
        "llms": found["llms"],
        "single": {
            llm: {"quality": _ends(row["quality"]), "usd_per_1000": row["usd_per_1000"]}
            for llm, row in found["single"].items()
        },
        "pool": {
            name: [
                {
                    "margin": outcome.margin,
                    "quality": _ends(outcome.quality),
                    "usd_per_1000": _ends(outcome.cost_usd, scale=1e3),
                    "over_single": _ends(outcome.over_single),
                    "over_mix": _ends(outcome.over_mix),
                    "shares": dict(zip(found["llms"], outcome.shares, strict=True)),
                }
                for outcome in outcomes
            ]
            for name, outcomes in found["pool"].items()
        },
    }


def _shown(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    ends = estimate.interval
    return f"{estimate.value:{sign}.3f} [{ends.low:{sign}.3f}, {ends.high:{sign}.3f}]"


def lines(found: dict[str, Any]) -> list[str]:
    """Return `figures` as a table for people."""
    shown = [f"{found['queries']} queries", f"{'LLM':34s}{'quality':>22s}{'USD/1k':>10s}"]
    for llm, row in found["single"].items():
        shown.append(f"{llm:34s}{_shown(row['quality']):>22s}{row['usd_per_1000']:10.4f}")
    header = f"{'router':12s}{'margin':>7s}{'quality':>22s}{'USD/1k':>10s}"
    shown.append(f"\n{header}{'over single':>26s}{'over mix':>26s}")
    for name, outcomes in found["pool"].items():
        for row in outcomes:
            over = "".join(
                f"{_shown(gain, signed=True):>26s}" for gain in (row.over_single, row.over_mix)
            )
            costs = f"{_shown(row.quality):>22s}{1e3 * row.cost_usd.value:10.4f}"
            shown.append(f"{name:12s}{row.margin:7.2f}{costs}{over}")
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pool policies against single LLMs.")
    parser.add_argument("data", type=Path, help="folder with alpaca_eval's Parquet files")
    parser.add_argument("--routers", default=",".join(ROUTERS), help="of mf, knn, sw_ranking")
    parser.add_argument("--llms", help="the pool, of those that have a price (default: all)")
    parser.add_argument("--prices", type=Path, help="JSON: LLM → USD per million output tokens")
    parser.add_argument("--margins", default=",".join(map(str, MARGINS)))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _priced(arguments: argparse.Namespace) -> dict[str, float]:
    prices = dict(NOTIONAL_PRICES)
    if arguments.prices is not None:
        prices = {llm: float(usd) for llm, usd in json.loads(arguments.prices.read_text()).items()}
    chosen = arguments.llms.split(",") if arguments.llms else list(prices)
    for llm in chosen:
        if llm not in prices:
            raise ConfigError(unknown_name("priced LLM", llm, prices) + " Add it to --prices.")
    return {llm: prices[llm] for llm in chosen}


def main() -> None:
    """Print what each router's pool policy gives; exit code 1 for an error with a message."""
    arguments = _parser().parse_args()
    try:
        routers = arguments.routers.split(",")
        for name in routers:
            if name not in ROUTERS:
                raise ConfigError(unknown_name("router", name, ROUTERS) + " Set --routers.")
        found = figures(
            arguments.data,
            routers=routers,
            prices=_priced(arguments),
            margins=[float(margin) for margin in arguments.margins.split(",")],
            folds=arguments.folds,
            seed=arguments.seed,
        )
    except TurnoutError as error:
        raise SystemExit(f"pool_policy: {error}") from error
    print(json.dumps(as_json(found)) if arguments.json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
