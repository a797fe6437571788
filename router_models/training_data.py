"""What every router is trained from: queries on which two LLMs were compared.

One shape serves both papers. Hybrid LLM's labels are comparisons between the strong and the weak
LLM with a soft outcome; RouteLLM's preference data are comparisons between any two of many LLMs
with outcome 1, 0.5 or 0. A router that needs labels reads `labels()`, one that needs battles
reads the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from conf.errors import DataError


def same_prompt(prompt: str) -> str:
    """Return what prompts that differ in case and white space only have in common.

    >>> same_prompt("Who  is he? ") == same_prompt("who is he?")
    True
    """
    return " ".join(prompt.split()).casefold()


def prompt_groups(prompts: Sequence[str]) -> np.ndarray:
    """Return (n,) group numbers of the same prompts, from 0 in the order of their first ones.

    >>> prompt_groups(["Who?", "where", " who?"]).tolist()
    [0, 1, 0]
    """
    number: dict[str, int] = {}
    return np.array([number.setdefault(same_prompt(one), len(number)) for one in prompts])


@dataclass(frozen=True)
class Comparisons:
    """Rows of (query, LLM a, LLM b, probability that a wins), and the pair to be routed between.

    prompts, llm_a, llm_b: n strings each; a_wins: (n,) floats in [0, 1], 0.5 for a tie.
    weak_quality, strong_quality: (n,) mean qualities of the routed pair's own LLMs where they are
    known (responses were generated or answers are known), else None.
    """

    prompts: tuple[str, ...]
    llm_a: tuple[str, ...]
    llm_b: tuple[str, ...]
    a_wins: np.ndarray
    weak: str
    strong: str
    weak_quality: np.ndarray | None = None
    strong_quality: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.prompts)
        columns = [self.llm_a, self.llm_b, self.a_wins]
        columns += [q for q in (self.weak_quality, self.strong_quality) if q is not None]
        if n == 0 or any(len(column) != n for column in columns):
            raise DataError(
                f"Comparisons of {n} prompts have columns of lengths "
                f"{[len(column) for column in columns]}. Expected at least one row and equal "
                "lengths. Check the query set and its splits."
            )
        outcome = self.a_wins
        if not np.all((outcome >= 0) & (outcome <= 1)):  # NaN fails too
            bad = int(np.flatnonzero(~((outcome >= 0) & (outcome <= 1)))[0])
            raise DataError(
                f"Comparison {bad} has outcome {outcome[bad]}. Expected a probability in [0, 1]. "
                "Check the labels or verdicts it comes from."
            )

    @classmethod
    def from_win_rates(
        cls,
        prompts: Sequence[str],
        win_rate: np.ndarray,
        *,
        weak: str,
        strong: str,
        weak_quality: np.ndarray | None = None,
        strong_quality: np.ndarray | None = None,
    ) -> "Comparisons":
        """Return one comparison of ``strong`` with ``weak`` per prompt; win_rate: (n,)."""
        n = len(prompts)
        return cls(
            prompts=tuple(prompts),
            llm_a=(strong,) * n,
            llm_b=(weak,) * n,
            a_wins=np.asarray(win_rate, dtype=np.float64),
            weak=weak,
            strong=strong,
            weak_quality=weak_quality,
            strong_quality=strong_quality,
        )

    def labels(self) -> tuple[list[str], np.ndarray]:
        """Return the prompts on which the routed pair met, and how often the strong LLM won, (m,).

        Raises DataError when the pair never met.
        """
        pairs = list(zip(self.llm_a, self.llm_b, strict=True))
        forward = np.array([pair == (self.strong, self.weak) for pair in pairs])
        backward = np.array([pair == (self.weak, self.strong) for pair in pairs])
        met = forward | backward
        if not met.any():
            raise DataError(
                f"{self.strong!r} and {self.weak!r} are never compared in {len(self.prompts)} "
                "rows. Expected comparisons between the routed pair. Group LLMs into tiers, or "
                "choose a pair that was compared."
            )
        win_rate = np.where(forward, self.a_wins, 1 - self.a_wins)[met]
        return [prompt for prompt, keep in zip(self.prompts, met, strict=True) if keep], win_rate

    def joined(self, other: "Comparisons | None") -> "Comparisons":
        """Return these rows and the ``other`` ones; qualities only where both have them."""
        if other is None:
            return self

        def both(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
            return None if first is None or second is None else np.concatenate([first, second])

        return replace(
            self,
            prompts=self.prompts + other.prompts,
            llm_a=self.llm_a + other.llm_a,
            llm_b=self.llm_b + other.llm_b,
            a_wins=np.concatenate([self.a_wins, other.a_wins]),
            weak_quality=both(self.weak_quality, other.weak_quality),
            strong_quality=both(self.strong_quality, other.strong_quality),
        )

    def take(self, rows: np.ndarray) -> "Comparisons":
        """Return the rows at ``rows`` (integer positions)."""

        def part(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[int(row)] for row in rows)

        def values(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[rows]

        return replace(
            self,
            prompts=part(self.prompts),
            llm_a=part(self.llm_a),
            llm_b=part(self.llm_b),
            a_wins=self.a_wins[rows],
            weak_quality=values(self.weak_quality),
            strong_quality=values(self.strong_quality),
        )
