"""How often the gate's rule against the champion errs: simulated retrains, for several rules.

`python -m benchmarks.gate_error_rates` prints, for each rule and number of test queries, the share
of 200 retrains that are promoted where candidate and champion are equally good (false promotions),
and where the candidate is better by twice `min_gain` (power); and then how many months have a false
promotion if every night's version is judged on the same queries. Three minutes on one core.

A retrain: queries have a difficulty, both LLMs are right more or less often by it, 10 samples of
each make a quality. A router reads the difficulty with an error; what candidate and champion
misread is mostly the same, since they share encoder and data (correlation SHARED). Equally good
means an equal precision of reading, hence an equal APGR on all queries there are. "Best of 4": four
candidates are trained, and the one with the highest APGR on the test queries is judged on them.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from conf.schema import Gate
from router_models.statistics import Estimate, interval
from tasks.gate import promotes, promotion_level

SAMPLES = 10
SHARED = 0.8  # of the variance of the routers' errors
PRECISION = 0.6  # correlation of the champion's reading with the difficulty
RETRAINS = 200
REPLICATES = 1_000
NIGHTS = 30


@dataclass(frozen=True)
class Rule:
    """What of the gain on the champion is asked: see `tasks.gate.promotes`."""

    name: str
    settings: Gate
    corrected: bool
    """Whether the level allows for the choice among several candidates."""

    def promotes(self, gain: float, replicates: np.ndarray, tried: int, *, nth: int = 1) -> bool:
        """Judge a gain in APGR by its paired replicates."""
        level = promotion_level(self.settings, tried if self.corrected else 1, nth)
        return promotes(Estimate(gain, interval(replicates, level=level)), self.settings)


RULES = (
    Rule("gain >= min_gain, nothing else", Gate(margin=1.0), corrected=False),
    Rule("lower bound above -0.02", Gate(margin=0.02), corrected=False),
    Rule("lower bound above 0", Gate(margin=0.0), corrected=False),
    Rule("lower bound above 0, for the best of several", Gate(margin=0.0), corrected=True),
)


@dataclass(frozen=True)
class Retrain:
    """One test set: gap (N,), win rates of the champion (N,) and of the candidates (K, N)."""

    gap: np.ndarray
    champion: np.ndarray
    candidates: np.ndarray


def retrain(queries: int, *, gain: float, candidates: int, rng: np.random.Generator) -> Retrain:
    """Return a simulated test set and what the routers say on it."""
    difficulty = rng.normal(size=queries)
    weak, strong = (
        rng.binomial(SAMPLES, 1 / (1 + np.exp(steep * difficulty - easy))) / SAMPLES
        for steep, easy in ((2.0, 0.0), (1.0, 1.5))
    )
    common = rng.normal(size=queries)

    def reads(precision: float) -> np.ndarray:
        error = np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * rng.normal(size=queries)
        return precision * difficulty + np.sqrt(1 - precision**2) * error

    return Retrain(
        gap=strong - weak,
        champion=reads(PRECISION),
        candidates=np.stack([reads(precision_for(gain)) for _ in range(candidates)]),
    )


@cache
def precision_for(gain: float) -> float:
    """Return the precision at which a router's APGR is higher than the champion's by ``gain``."""
    if gain == 0:
        return PRECISION

    def apgr_at(precision: float) -> float:
        rng = np.random.default_rng(0)
        difficulty, error = rng.normal(size=(2, 400_000))
        gap = 1 / (1 + np.exp(difficulty - 1.5)) - 1 / (1 + np.exp(2 * difficulty))
        rate = precision * difficulty + np.sqrt(1 - precision**2) * error
        return float(apgr(rate, gap, np.ones((1, len(gap))))[0])

    low, high, wanted = PRECISION, 0.999, apgr_at(PRECISION) + gain
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if apgr_at(middle) < wanted else (low, middle)
    return low


def apgr(rate: np.ndarray, gap: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return APGR under each of R vectors of query counts, (R, N) → (R,); no two rates are equal.

    The same as `router_models.frontier.apgr`, for many replicates at once.
    """
    order = np.argsort(-rate)
    drawn = counts[:, order]
    gained = drawn * gap[order]
    gain = np.cumsum(gained, axis=1)
    area = (drawn * (gain - gained / 2)).sum(axis=1) / drawn.sum(axis=1)
    return np.asarray(area / gain[:, -1])


def judged(found: Retrain, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Return the best candidate's gain on the champion, and its paired bootstrap replicates."""
    queries = len(found.gap)
    once = np.ones((1, queries))
    scores = [float(apgr(rate, found.gap, once)[0]) for rate in found.candidates]
    best = found.candidates[int(np.argmax(scores))]
    drawn = rng.integers(0, queries, (REPLICATES, queries))
    drawn += queries * np.arange(REPLICATES)[:, np.newaxis]
    counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    replicates = apgr(best, found.gap, counts) - apgr(found.champion, found.gap, counts)
    return max(scores) - float(apgr(found.champion, found.gap, once)[0]), replicates


def promoted_shares(
    queries: int,
    *,
    gain: float,
    candidates: int,
    retrains: int = RETRAINS,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of retrains that each rule promotes, by its name."""
    rng = np.random.default_rng([seed, queries, candidates])
    promoted = dict.fromkeys((rule.name for rule in RULES), 0)
    for _ in range(retrains):
        found = retrain(queries, gain=gain, candidates=candidates, rng=rng)
        measured, replicates = judged(found, rng)
        for rule in RULES:
            promoted[rule.name] += rule.promotes(measured, replicates, candidates)
    return {name: count / retrains for name, count in promoted.items()}


def promoted_months(
    queries: int, *, candidates: int, nights: int = NIGHTS, months: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Return the share of months with a false promotion: at one level, and at the gate's levels.

    A month: a new version every night, as good as the champion, all judged on the same queries.
    """
    rng = np.random.default_rng([seed, queries, candidates, nights])
    rule, wrong = RULES[-1], np.zeros(2)
    for _ in range(months):
        found = retrain(queries, gain=0.0, candidates=nights * candidates, rng=rng)
        promoted = np.zeros((nights, 2), dtype=bool)
        for night, tonights in enumerate(np.split(found.candidates, nights)):
            measured, replicates = judged(replace(found, candidates=tonights), rng)
            promoted[night] = [
                rule.promotes(measured, replicates, candidates, nth=nth) for nth in (1, night + 1)
            ]
        wrong += promoted.any(axis=0)
    one_level, spent = wrong / months
    return float(one_level), float(spent)


def main() -> None:
    """Print both error rates of every rule, and what the nights of a month add up to."""
    better = 2 * Gate().min_gain
    print(f"{RETRAINS} retrains each; better means by {better:g} APGR")
    print(f"{'rule':46} {'queries':>7} {'best of':>7} {'false promotions':>17} {'power':>7}")
    for queries in (150, 500, 1500):
        for candidates in (1, 4):
            false, power = (
                promoted_shares(queries, gain=gain, candidates=candidates) for gain in (0.0, better)
            )
            for rule in false:
                rates = f"{false[rule]:17.1%} {power[rule]:7.1%}"
                print(f"{rule:46} {queries:7} {candidates:7} {rates}")
            sys.stdout.flush()
    print(f"\nMonths of {NIGHTS} versions on the same queries with a false promotion, of 100")
    print(f"{'queries':>7} {'best of':>7} {'one level':>10} {'level of the nth by 1/n²':>25}")
    for candidates in (1, 4):
        one_level, spent = promoted_months(150, candidates=candidates)
        print(f"{150:7} {candidates:7} {one_level:10.0%} {spent:25.0%}")


if __name__ == "__main__":
    main()
