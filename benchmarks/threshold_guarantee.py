"""Whether the promise of a threshold is kept: over many draws, against the uncorrected choice.

    python -m benchmarks.threshold_guarantee [--figure docs/threshold_guarantee.png]

The idea. A router (k-NN, out-of-fold, so each query is rated by one that has not seen it) fixes a
win rate for every query of a data set. That finite set *is* the population here: its quality drop
at any threshold is known exactly. Calibration sets are drawn from it with replacement, which makes
them independent queries of just this population, so a broken promise is one without any doubt or
noise in the truth. Splitting in halves instead would compare two noisy numbers; how the promise
looks to somebody who checks it so, on as many new queries as were calibrated on, stands in the
column "on a test set".

Two data sets: MMLU with right-or-wrong answers (RouteLLM's rows) and AlpacaEval, where quality is a
judge's probability in [0, 1]. Three choices of the threshold: `betting` and `t-test`, the two
guarantees of `router_models.calibration`, and `naive`, Hybrid LLM's (arXiv 2404.14618, section 4),
which takes the cheapest threshold that was good enough on the calibration queries.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from router_models.calibration import (
    FloatArray,
    PValue,
    threshold_naive,
    threshold_with_guarantee,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
CONFIDENCE = 0.9
SIZES = (200, 500, 1000)
MAX_DROPS = {"MMLU": (0.02, 0.04), "AlpacaEval": (0.03, 0.06)}
METHODS: dict[str, PValue | None] = {"betting": "betting", "t-test": "clt", "naive": None}
FOLDS = 3
ALPACA_PAIR = ("FuseChat-Llama-3.2-3B-Instruct", "FuseChat-Gemma-2-9B-Instruct")
CHARACTERS = 300  # of a prompt: encoding whole ones takes longer than everything else together


@dataclass(frozen=True, eq=False)
class Population:
    """All queries there are: (N,) win rates and both qualities."""

    name: str
    win_rate: FloatArray
    weak: FloatArray
    strong: FloatArray

    def drawn(
        self, size: int, rng: np.random.Generator
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return ``size`` independent queries."""
        rows = rng.integers(0, len(self.win_rate), size)
        return self.win_rate[rows], self.weak[rows], self.strong[rows]


@dataclass(frozen=True)
class Outcome:
    """How one choice of the threshold did in one setting, over all draws."""

    population: str
    queries: int
    max_drop: float
    method: str
    draws: int
    broken: float
    """Share of draws whose threshold drops more than max_drop on the population, exactly."""
    broken_on_test: float
    """The same on a fresh test set as large as the calibration set."""
    strong_share: float
    """Mean over draws, on the population."""
    best_strong_share: float
    """Of the cheapest threshold that keeps the promise, by perfect knowledge."""
    allowed: float
    """δ."""

    def error(self) -> float:
        """Return the standard error of `broken`."""
        return float(np.sqrt(self.broken * (1 - self.broken) / self.draws))

    def kept(self) -> bool:
        """Tell whether the promise is broken no more often than δ, but for two standard errors."""
        noise = np.sqrt(self.allowed * (1 - self.allowed) / self.draws)
        return bool(self.broken <= self.allowed + 2 * noise)


def outcomes(
    population: Population, *, size: int, max_drop: float, draws: int, seed: int = 0
) -> list[Outcome]:
    """Calibrate on ``draws`` sets of ``size`` queries by each method, and count broken promises."""
    rng = np.random.default_rng([seed, size, round(1e6 * max_drop)])
    rate, loss = population.win_rate, population.strong - population.weak
    order = np.argsort(rate)
    ascending = rate[order]
    lost = np.concatenate(([0.0], np.cumsum(loss[order]))) / len(rate)
    thresholds: dict[str, list[float]] = {method: [] for method in METHODS}
    on_test: dict[str, list[bool]] = {method: [] for method in METHODS}
    for draw in range(draws):
        calibration = population.drawn(size, rng)
        test_rate, test_weak, test_strong = population.drawn(size, rng)
        for method, p_value in METHODS.items():
            if p_value is None:
                found = threshold_naive(*calibration, max_drop=max_drop)
            else:
                found = threshold_with_guarantee(
                    *calibration,
                    max_drop=max_drop,
                    confidence=CONFIDENCE,
                    p_value=p_value,
                    quality_range=(0.0, 1.0),
                    seed=draw,
                )
            thresholds[method].append(found.threshold)
            drop = ((test_strong - test_weak) * (test_rate < found.threshold)).mean()
            on_test[method].append(bool(drop > max_drop))
    best = threshold_naive(rate, population.weak, population.strong, max_drop=max_drop)
    result = []
    for method in METHODS:
        to_weak = np.searchsorted(ascending, thresholds[method], side="left")
        result.append(
            Outcome(
                population=population.name,
                queries=size,
                max_drop=max_drop,
                method=method,
                draws=draws,
                # The sums are of numbers that are not exact in binary.
                broken=float((lost[to_weak] > max_drop + 1e-12).mean()),
                broken_on_test=float(np.mean(on_test[method])),
                strong_share=float(1 - to_weak.mean() / len(rate)),
                best_strong_share=best.strong_share,
                allowed=1 - CONFIDENCE,
            )
        )
    return result


def unseen_win_rates(prompts: Sequence[str], needed: FloatArray, *, seed: int = 0) -> FloatArray:
    """Return each prompt's win rate by a k-NN router that was fitted on the other folds, (N,).

    needed: (N,) 1 where the strong LLM was better.
    """
    from conf.routers import Knn
    from router_models.knn import KnnRouter
    from router_models.training_data import Comparisons

    data = Comparisons.from_win_rates(prompts, needed, weak="weak", strong="strong")
    fold = np.random.default_rng(seed).permutation(len(prompts)) % FOLDS
    rate = np.empty(len(prompts))
    with tempfile.TemporaryDirectory() as cache:
        settings = Knn(
            encoder_cache=Path(cache),
            neighbours=(40, 160),
            temperatures=(0.05, 0.1),
            prior_counts=(4.0,),
        )
        for number in range(FOLDS):
            router = KnnRouter(settings).fit(data.take(np.flatnonzero(fold != number)), seed=seed)
            held_out = np.flatnonzero(fold == number)
            rate[held_out] = router.win_rate([prompts[int(row)] for row in held_out])
    return rate


def population(
    name: str, prompts: Sequence[str], weak: FloatArray, strong: FloatArray
) -> Population:
    """Return the queries with win rates of routers that have not seen them."""
    needed = (strong > weak).astype(np.float64)
    rate = unseen_win_rates([prompt[:CHARACTERS] for prompt in prompts], needed)
    return Population(name, rate, weak, strong)


def mmlu(folder: Path, rows: int) -> Population:
    """Return RouteLLM's MMLU rows, ``rows`` of them: quality is 0 or 1."""
    import pandas as pd

    frame = pd.concat([pd.read_csv(file) for file in sorted(folder.glob("mmlu_*.csv"))])
    frame = frame.sample(min(rows, len(frame)), random_state=0)
    weak, strong = frame.columns[1:3]
    return population(
        "MMLU",
        frame["prompt"].tolist(),
        frame[weak].to_numpy(np.float64),
        frame[strong].to_numpy(np.float64),
    )


def alpaca_eval(folder: Path) -> Population:
    """Return AlpacaEval's queries: quality is the probability to beat the reference answer."""
    import pandas as pd

    queries = pd.read_parquet(folder / "queries.parquet").set_index("query_id")
    judged = pd.read_parquet(folder / "preferences.parquet")
    wins = judged.pivot(index="query_id", columns="model", values="win_prob")[[*ALPACA_PAIR]]
    wins = wins.dropna()
    weak, strong = (wins[llm].to_numpy(np.float64) for llm in ALPACA_PAIR)
    return population("AlpacaEval", queries.loc[wins.index, "prompt"].tolist(), weak, strong)


def table(found: Sequence[Outcome]) -> str:
    """Return the outcomes as lines of text."""
    lines = [
        f"{'data':11s}{'n':>5s}{'ε':>6s}  {'method':8s}{'broken, %':>14s}{'on a test set':>15s}"
        f"{'strong share, %':>17s}{'best':>7s}  verdict (δ = {100 * (1 - CONFIDENCE):.0f} %)"
    ]
    for each in found:
        verdict = "kept" if each.kept() else "BROKEN"
        lines.append(
            f"{each.population:11s}{each.queries:5d}{each.max_drop:6.2f}  {each.method:8s}"
            f"{100 * each.broken:8.1f} ± {100 * each.error():3.1f}{100 * each.broken_on_test:15.1f}"
            f"{100 * each.strong_share:17.1f}{100 * each.best_strong_share:7.1f}  {verdict}"
        )
    return "\n".join(lines)


def drawing(found: Sequence[Outcome]) -> "Figure":
    """Return the share of broken promises and the price of the guarantee, by calibration size."""
    from matplotlib.figure import Figure

    from tasks.figures import COLOURS

    settings = sorted({(each.population, each.max_drop) for each in found}, reverse=True)
    figure = Figure(figsize=(3.2 * len(settings), 6), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(settings), sharex=True, sharey="row", squeeze=False)
    for column, setting in enumerate(settings):
        top, bottom = axes[:, column]
        here = [each for each in found if (each.population, each.max_drop) == setting]
        for method, colour in zip(METHODS, COLOURS, strict=False):
            line = [each for each in here if each.method == method]
            sizes = [each.queries for each in line]
            broken, noise = ([100 * value for value in values] for values in _broken(line))
            top.errorbar(sizes, broken, yerr=noise, color=colour, marker="o", markersize=4)
            shares = [100 * each.strong_share for each in line]
            bottom.plot(sizes, shares, color=colour, marker="o", markersize=4, label=method)
        top.axhline(100 * (1 - CONFIDENCE), color="black", linestyle="--", linewidth=0.8)
        bottom.axhline(
            100 * here[0].best_strong_share, color="black", linestyle=":", label="perfect knowledge"
        )
        top.set_title(f"{setting[0]}, drop ≤ {setting[1]:g}", fontsize=10)
        bottom.set_xlabel("calibration queries")
    axes[0, 0].set_ylabel("promises broken, % (dashed: allowed)")
    axes[1, 0].set_ylabel("queries sent to the strong LLM, %")
    axes[1, 0].legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylim(bottom=0)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure


def _broken(line: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    return [each.broken for each in line], [2 * each.error() for each in line]


def main() -> None:
    parser = argparse.ArgumentParser(description="Count how often a threshold breaks its promise.")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the two data sets")
    parser.add_argument("--resplits", type=int, default=1000, help="draws of each setting")
    parser.add_argument("--rows", type=int, default=3000, help="MMLU rows to rate")
    parser.add_argument("--figure", type=Path, help="write a figure there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = [
        outcome
        for people in (
            mmlu(options.data / "routellm_mmlu", options.rows),
            alpaca_eval(options.data / "alpaca_eval"),
        )
        for max_drop in MAX_DROPS[people.name]
        for size in SIZES
        for outcome in outcomes(people, size=size, max_drop=max_drop, draws=options.resplits)
    ]
    if options.figure is not None:
        drawing(found).savefig(options.figure)
    if options.json:
        rows = [{**asdict(each), "error": each.error(), "kept": each.kept()} for each in found]
        print(json.dumps({"outcomes": rows}))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
