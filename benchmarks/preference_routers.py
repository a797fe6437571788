"""Speed of the routers that learn from battles, at the size of Chatbot Arena's published data.

    python -m benchmarks.preference_routers

- `sw_ranking`: weighted tier-by-tier wins and Newton's method for a batch of 64 queries, against
  what RouteLLM's router does for each of them: a dense logistic regression on all weighted battles
  (scikit-learn, its default tolerance), ties entered twice. With a small tolerance both give the
  same win rates, which is shown too;
- `mf`: training on 55,000 battles whose embeddings are cached.

The battles are drawn: LLMs of known strength, queries around a few topics, of which some are hard
for weak LLMs. The best of a few rounds counts: other work on the machine can only slow one down.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from conf.routers import MatrixFactorization, SimilarityWeighted
from router_models.encoders import load_encoder
from router_models.mf import MatrixFactorizationRouter
from router_models.persistence import VectorCache
from router_models.sw_ranking import SimilarityWeightedRouter
from router_models.tiers import llm_numbers
from router_models.training_data import Comparisons

BATTLES, LLMS, WIDTH, BATCH, TOPICS = 55_000, 64, 384, 64, 40
DENSE = 3  # queries that scikit-learn is asked


def seconds(work: Callable[[], object], *, rounds: int = 3) -> float:
    """Return the shortest wall time of ``work``."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def embeddings(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw unit vectors around topics, (n, d), and each query's topic, (n,)."""
    centres = rng.normal(size=(TOPICS, WIDTH))
    topic = rng.integers(0, TOPICS, count)
    vectors = centres[topic] + 1.2 * rng.normal(size=(count, WIDTH)) + 0.8 * centres.mean(axis=0)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), topic


def battles(topic: np.ndarray, rng: np.random.Generator) -> Comparisons:
    """Draw one battle per query; how much strength matters depends on the topic."""
    strength = np.sort(rng.normal(size=LLMS))
    a = rng.integers(0, LLMS, len(topic))
    b = (a + rng.integers(1, LLMS, len(topic))) % LLMS
    matters = rng.uniform(0.2, 1.8, TOPICS)[topic]
    gap = matters * (strength[a] - strength[b])
    first, second, tie = np.exp(gap / 2), np.exp(-gap / 2), 0.6
    drawn = rng.random(len(topic)) * (first + second + tie)
    return Comparisons(
        prompts=tuple(f"query {row}" for row in range(len(topic))),
        llm_a=tuple(f"llm-{number:02d}" for number in a),
        llm_b=tuple(f"llm-{number:02d}" for number in b),
        a_wins=np.where(drawn < first, 1.0, np.where(drawn < first + second, 0.0, 0.5)),
        weak="llm-20",
        strong="llm-60",
    )


def keep(vectors: np.ndarray, folder: Path) -> None:
    """Put the vector of "query 7" and so on into the cache of the packaged encoder."""
    texts = [f"query {row}" for row in range(len(vectors))]
    VectorCache(folder, load_encoder("minilm").digest).write(texts, vectors)


def dense_win_rate(
    data: Comparisons,
    tiers: dict[str, int],
    vectors: np.ndarray,
    query: np.ndarray,
    *,
    tolerance: float = 1e-4,
) -> float:
    """Return one query's win rate from a logistic regression on all battles, ties twice.

    tolerance: scikit-learn's own default, which RouteLLM leaves as it is, stops early.
    """
    count = len(set(tiers.values()))
    number = np.array(list(tiers.values()))
    a, b = (number[side] for side in llm_numbers(data, list(tiers)))
    rows = np.flatnonzero(a != b)
    design = np.zeros((2 * len(rows), count))
    for sign, side in ((1.0, a), (-1.0, b)):
        design[np.arange(2 * len(rows)), np.tile(side[rows], 2)] += sign
    outcome = data.a_wins[rows]
    won = np.concatenate([outcome > 0, outcome == 1]).astype(float)
    cosines = vectors[rows] @ query
    weights = 10.0 ** (1 + cosines / cosines.max())
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=tolerance, max_iter=1000)
    rating = model.fit(design, won, sample_weight=np.tile(weights, 2)).coef_[0]
    gap = rating[tiers[data.strong]] - rating[tiers[data.weak]]
    return float(1 / (1 + np.exp(-gap)))


def figures(cache: Path) -> dict[str, float]:
    """Time both routers, and scikit-learn on the first queries of the batch."""
    rng = np.random.default_rng(0)
    vectors, topic = embeddings(BATTLES + BATCH, rng)
    keep(vectors, cache)
    data = battles(topic[:BATTLES], rng)
    asked = [f"query {BATTLES + row}" for row in range(BATCH)]

    ranking = SimilarityWeightedRouter(SimilarityWeighted(encoder_cache=cache))
    fit_s = seconds(lambda: ranking.fit(data, seed=0), rounds=2)
    batch_s = seconds(lambda: ranking.win_rate(asked), rounds=10)
    single_s = seconds(lambda: ranking.win_rate(asked[:1]), rounds=10)
    plain = partial(dense_win_rate, data, ranking.tiers_, vectors[:BATTLES])
    dense_s = min(seconds(partial(plain, vectors[BATTLES + row]), rounds=1) for row in range(DENSE))
    exact = [plain(vectors[BATTLES + row], tolerance=1e-8) for row in range(DENSE)]
    difference = np.abs(ranking.win_rate(asked[:DENSE]) - exact).max()

    factors = MatrixFactorizationRouter(MatrixFactorization(encoder_cache=cache))
    train_s = seconds(lambda: factors.fit(data, seed=0), rounds=2)
    return {
        "sw_ranking_fit_s": fit_s,
        "sw_ranking_ms_per_query_in_batch": 1e3 * batch_s / BATCH,
        "sw_ranking_ms_single_query": 1e3 * single_s,
        "dense_regression_ms_per_query": 1e3 * dense_s,
        "sw_ranking_speedup": dense_s * BATCH / batch_s,
        "largest_win_rate_difference": float(difference),
        "mf_training_s": train_s,
        "mf_ms_per_query_in_batch": 1e3 * seconds(lambda: factors.win_rate(asked)) / BATCH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the routers that learn from battles.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as cache:
        found = figures(Path(cache))
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:34s} {value:12.6g}")


if __name__ == "__main__":
    main()
