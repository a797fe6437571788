"""What should a router look at? Views of a prompt under kernel ridge, chosen without the test rows.

    python -m benchmarks.prompt_views MMLU_DIR [--alpaca DIR] [--cache DIR] [--draws 7,8,9,10,11]
        [--fold-seeds 7] [--json]

The packaged settings of `kernel_ridge` (which encoder, which layer, γ) were found on these very
rows, so a figure on them might flatter. Three answers are printed beside each other:

- every candidate, with its paired difference to the packaged settings, by interval;
- `chosen inside`: for each division, the candidate with the least leave-one-out error on the
  training part alone (split into blocks, so that the choice costs seconds), trained on all of that
  part and judged on the rest. The choice has not seen its test rows; the list of candidates comes
  of work on other divisions of these rows;
- AlpacaEval (--alpaca), on which nothing was chosen: five-fold, two pairs of LLMs, judged quality
  in [0, 1], beside the other routers.

Embedding 8,900 prompts takes half an hour for each view the first time; --cache keeps it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pandas as pd

from conf.routers import KernelRidge, Knn, MatrixFactorization, Router, SimilarityWeighted
from router_models.catalog import build_router
from router_models.kernel_ridge import KernelRidgeRouter
from router_models.statistics import Bootstrap, Estimate, bootstrap_metrics
from router_models.training_data import Comparisons, same_prompt

PACKAGED = "packaged"
STATES = "smollm2-135m@18"
CANDIDATES: Mapping[str, dict[str, object]] = {
    PACKAGED: {},
    "states alone": {"encoders": (STATES,)},
    "last token alone": {"encoders": ("smollm2-135m@30:last",)},
    "sentences": {"encoders": ("minilm",)},
    "states and sentences": {"encoders": (STATES, "minilm"), "weights": (0.8, 0.2)},
    "packaged and sentences": {
        "encoders": (STATES, "smollm2-135m@30:last", "minilm"),
        "weights": (0.7, 0.2, 0.1),
    },
    "γ = 1": {"gamma": 1.0},
    "γ = 4": {"gamma": 4.0},
}
CHOSEN = "chosen inside"
# The choice compares leave-one-out errors on blocks of so many training rows.
BLOCK = 1600
ALPACA_PAIRS = (
    ("FuseChat-Llama-3.2-3B-Instruct", "FuseChat-Gemma-2-9B-Instruct"),
    ("gemma-2b-it", "gpt-3.5-turbo-1106"),
)


@dataclass(frozen=True, eq=False)
class Rows:
    """(n,) prompts and both LLMs' qualities."""

    prompts: list[str]
    weak: np.ndarray
    strong: np.ndarray

    def comparisons(self, rows: np.ndarray) -> Comparisons:
        """Return these rows as what routers learn from; half the gap around 1/2."""
        return Comparisons.from_win_rates(
            [self.prompts[row] for row in rows],
            0.5 + (self.strong[rows] - self.weak[rows]) / 2,
            weak="weak",
            strong="strong",
        )


@dataclass(frozen=True)
class Line:
    """APGR of one candidate, and its paired difference to the packaged settings."""

    data: str
    router: str
    apgr: Estimate
    difference: Estimate
    chosen: list[str]

    def __str__(self) -> str:
        figures = "   ".join(
            f"{each.value:+.3f} [{each.interval.low:+.3f}, {each.interval.high:+.3f}]"
            for each in (self.apgr, self.difference)
        )
        return f"{self.data:34s}{self.router:24s}{figures}   {', '.join(self.chosen)}".rstrip()


@dataclass(frozen=True, eq=False)
class Division:
    """One way to divide rows: parts are predicted by what was trained on `train` of each."""

    name: str
    parts: list[tuple[np.ndarray, np.ndarray]]


def mmlu(folder: Path) -> Rows:
    """Return RouteLLM's MMLU rows but for those of its contamination list."""
    frame = pd.concat([pd.read_csv(file) for file in sorted(folder.glob("mmlu_*.csv"))])
    with (folder / "contaminated_prompts.jsonl").open(encoding="utf-8-sig") as lines:
        listed = {json.loads(line)["eval_prompt"] for line in lines if line.strip()}
    frame = frame[~frame["prompt"].isin(listed)]
    first, second = (frame[column].to_numpy(np.float64) for column in frame.columns[1:3])
    weak, strong = (first, second) if first.mean() < second.mean() else (second, first)
    return Rows(frame["prompt"].tolist(), weak, strong)


def alpaca(folder: Path, weak: str, strong: str) -> Rows:
    """Return AlpacaEval's queries; quality is the probability to beat the reference answer."""
    queries = pd.read_parquet(folder / "queries.parquet").set_index("query_id")
    judged = pd.read_parquet(folder / "preferences.parquet")
    wins = judged.pivot(index="query_id", columns="model", values="win_prob")[[weak, strong]]
    wins = wins.dropna()
    qualities = (wins[llm].to_numpy(np.float64) for llm in (weak, strong))
    return Rows(queries.loc[wins.index, "prompt"].tolist(), *qualities)


def groups(rows: Rows, seed: int) -> np.ndarray:
    """Return a random number for each row, the same for equal prompts."""
    _, group = np.unique([same_prompt(prompt) for prompt in rows.prompts], return_inverse=True)
    return np.random.default_rng(seed).permutation(group.max() + 1)[group]


def drawn(rows: Rows, *, train_rows: int, seed: int) -> Division:
    """Train on about ``train_rows`` rows, predict the rest."""
    group = groups(rows, seed)
    limit = np.sort(group)[train_rows]
    parts = [(np.flatnonzero(group < limit), np.flatnonzero(group >= limit))]
    return Division(f"{train_rows} rows, draw {seed}", parts)


def folds(rows: Rows, *, count: int, seed: int) -> Division:
    """Predict each row by what was trained on the other folds."""
    part = groups(rows, seed) % count
    parts = [(np.flatnonzero(part != k), np.flatnonzero(part == k)) for k in range(count)]
    return Division(f"{count}-fold, division {seed}", parts)


def candidates(cache: Path) -> dict[str, KernelRidge]:
    """Return the settings to compare."""
    return {
        name: KernelRidge.model_validate({**changes, "name": name, "encoder_cache": cache})
        for name, changes in CANDIDATES.items()
    }


def chosen(rows: Rows, train: np.ndarray, settings: Mapping[str, KernelRidge]) -> str:
    """Return the candidate with the least leave-one-out error on the training rows."""
    order = np.random.default_rng(0).permutation(train)
    blocks = [rows.comparisons(block) for block in np.array_split(order, -(-len(order) // BLOCK))]
    errors = {
        name: np.mean([KernelRidgeRouter(each).fit(block, seed=0).error_ for block in blocks])
        for name, each in settings.items()
    }
    return min(errors, key=lambda name: errors[name])


def compared(
    rows: Rows, division: Division, settings: Mapping[str, Router], *, choose: bool
) -> tuple[Bootstrap, list[str]]:
    """Return all metrics of each candidate, and what was chosen for each part."""
    judged = np.concatenate([test for _, test in division.parts])
    rates: dict[str, list[np.ndarray]] = {name: [] for name in settings}
    picks = []
    for train, test in division.parts:
        prompts = [rows.prompts[row] for row in test]
        for name, each in settings.items():
            router = build_router(each).fit(rows.comparisons(train), seed=0)
            rates[name].append(router.win_rate(prompts))
        if choose:
            kernels = {n: each for n, each in settings.items() if isinstance(each, KernelRidge)}
            picks.append(chosen(rows, train, kernels))
            rates.setdefault(CHOSEN, []).append(rates[picks[-1]][-1])
    found = {name: np.concatenate(parts) for name, parts in rates.items()}
    return bootstrap_metrics(found, rows.weak[judged], rows.strong[judged]), picks


def lines(data: str, found: Bootstrap, picks: list[str]) -> Iterator[Line]:
    """Yield one line for each candidate."""
    for router in found.point:
        yield Line(
            data,
            router,
            found.estimate(router, "apgr"),
            found.difference(router, PACKAGED, "apgr"),
            picks if router == CHOSEN else [],
        )


def results(arguments: argparse.Namespace) -> Iterator[Line]:
    """Yield every line, those of the quick divisions first."""
    cache = arguments.cache
    settings = candidates(cache)
    rows = mmlu(arguments.mmlu)
    for seed in arguments.draws:
        division = drawn(rows, train_rows=1531, seed=seed)
        yield from lines(f"MMLU {division.name}", *compared(rows, division, settings, choose=True))
    if arguments.alpaca is not None:
        others: dict[str, Router] = {
            PACKAGED: settings[PACKAGED],
            "states alone": settings["states alone"],
            "knn": Knn(encoder_cache=cache),
            "sw_ranking": SimilarityWeighted(encoder_cache=cache),
            "mf": MatrixFactorization(encoder_cache=cache),
        }
        for weak, strong in ALPACA_PAIRS:
            judged = alpaca(arguments.alpaca, weak, strong)
            division = folds(judged, count=5, seed=0)
            found = compared(judged, division, others, choose=False)
            yield from lines(f"AlpacaEval {weak[:22]}", *found)
    for seed in arguments.fold_seeds:
        division = folds(rows, count=5, seed=seed)
        few = {name: settings[name] for name in (PACKAGED, "states alone")}
        yield from lines(f"MMLU {division.name}", *compared(rows, division, few, choose=True))


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, or JSON lines."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("mmlu", type=Path, help="folder of RouteLLM's MMLU CSVs")
    parser.add_argument("--alpaca", type=Path, help="folder of AlpacaEval's queries and verdicts")
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "turnout-views")
    parser.add_argument("--draws", type=numbers, default=[7, 8, 9, 10, 11], help="of 1,531 rows")
    parser.add_argument("--fold-seeds", type=numbers, default=[7], help="divisions into 5 folds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    for line in results(arguments):
        print(json.dumps(asdict(line)) if arguments.json else line, flush=True)


def numbers(text: str) -> list[int]:
    """Return the numbers in "7,8,9"; none of "none"."""
    return [] if text == "none" else [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
