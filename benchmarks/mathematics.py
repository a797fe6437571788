"""Speed of the mathematics, side by side with what a user would otherwise run.

    python -m benchmarks.mathematics

- t*: the exact sweep, against a search of a 50-point grid over an N × N matrix of label
  differences (LLMRouter searches such a grid);
- the bootstrap of every metric, against sorting each resample again;
- AIQ's hull, against trying every chord at every cost (RouterBench's is about O(n³)).

The best of a few rounds counts: other work on the machine can only slow a round down.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from router_models.frontier import FloatArray, cost_quality_curve, summary, upper_hull
from router_models.relaxation import label_spread, optimal_relaxation, transformed_labels
from router_models.statistics import bootstrap_metrics, resamples

GRID_POINTS = 50


def seconds(work: Callable[[], object], *, rounds: int = 3) -> float:
    """Return the shortest wall time of ``work``."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def responses(queries: int, samples: int = 10) -> tuple[FloatArray, FloatArray]:
    """Draw log-likelihood-like qualities, (N, samples) each, of a weak and a strong LLM."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=(queries, 1))
    weak = -3.0 - difficulty + rng.normal(size=(queries, samples))
    strong = -2.0 - 0.5 * difficulty + rng.normal(size=(queries, samples))
    return weak, strong


def routed(queries: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Draw (win rate, weak, strong) with right-or-wrong answers."""
    rng = np.random.default_rng(1)
    difficulty = rng.normal(size=queries)
    weak = (rng.normal(size=queries) + 0.5 > difficulty).astype(float)
    strong = (rng.random(queries) < 0.85).astype(float)
    return 1.0 / (1.0 + np.exp(-difficulty - rng.normal(size=queries))), weak, strong


def grid_search(weak: FloatArray, strong: FloatArray) -> float:
    """Find a t by the plain method: a grid, and all pairs of queries at each of its points."""
    gaps = (strong[:, np.newaxis, :] - weak[:, :, np.newaxis]).reshape(len(weak), -1)
    best_t, best = 0.0, -1.0
    for t in np.linspace(0.0, gaps.max(), GRID_POINTS):
        labels = (gaps <= t).mean(axis=1)
        spread = float(np.abs(labels[:, np.newaxis] - labels[np.newaxis, :]).mean())
        if spread > best:
            best_t, best = float(t), spread
    return best_t


def relaxation_figures() -> dict[str, float]:
    """Time t* at the paper's size, and against the grid where N × N still fits."""
    small, full = responses(2_000), responses(10_000)
    exact = optimal_relaxation(*small)
    grid_t = grid_search(*small)
    grid_s = seconds(lambda: grid_search(*small), rounds=1)
    sweep_s = seconds(lambda: optimal_relaxation(*small))
    return {
        "t_star_s_at_10000x100": seconds(lambda: optimal_relaxation(*full), rounds=5),
        "t_star_s_at_2000x100": sweep_s,
        "grid_s_at_2000x100": grid_s,
        "t_star_speedup": grid_s / sweep_s,
        "objective_exact": exact.objective,
        "objective_grid": label_spread(transformed_labels(*small, grid_t)),
    }


def bootstrap_figures() -> dict[str, float]:
    """Time 2,000 replicates of every metric at n = 14,000, and sorting each resample instead."""
    data = routed(14_000)
    draws = list(resamples(14_000, replicates=20, seed=0))

    def sorted_again() -> None:
        for counts in draws:
            drawn = np.repeat(np.arange(14_000), counts)
            summary(*(column[drawn] for column in data))

    naive_s = seconds(sorted_again) * 2_000 / len(draws)
    ours_s = seconds(lambda: bootstrap_metrics({"router": data[0]}, data[1], data[2]))
    return {
        "bootstrap_s_at_14000x2000": ours_s,
        "bootstrap_sorting_again_s": naive_s,
        "bootstrap_speedup": naive_s / ours_s,
    }


def chord_hull_area(cost: FloatArray, quality: FloatArray) -> float:
    """Integrate the hull as the best chord at every cost: O(n³)."""
    height = np.full(len(cost), -np.inf)
    for at in range(len(cost)):
        for left in range(at + 1):
            for right in range(at, len(cost)):
                width = cost[right] - cost[left]
                share = (cost[at] - cost[left]) / width if width else 0.0
                chord = quality[left] + share * (quality[right] - quality[left])
                height[at] = max(height[at], chord)
    return float(np.trapezoid(height, cost))


def hull_figures() -> dict[str, float]:
    """Time the hull of a 120-point curve both ways, and of a 14,000-point one."""
    small, full = cost_quality_curve(*routed(120)), cost_quality_curve(*routed(14_000))
    upper_hull(small.cost, small.quality)  # imports scipy
    ours_s = seconds(lambda: upper_hull(small.cost, small.quality), rounds=20)
    cubic_s = seconds(lambda: chord_hull_area(small.cost, small.quality), rounds=1)
    return {
        "hull_s_at_120": ours_s,
        "hull_cubic_s_at_120": cubic_s,
        "hull_speedup": cubic_s / ours_s,
        "hull_s_at_14000": seconds(lambda: upper_hull(full.cost, full.quality), rounds=20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the mathematics of Turnout.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    figures = relaxation_figures() | bootstrap_figures() | hull_figures()
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28s} {value:12.6g}")


if __name__ == "__main__":
    main()
