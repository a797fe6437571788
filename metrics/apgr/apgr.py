"""APGR as a Hugging Face `evaluate` metric: how much of the quality gap a router recovers.

The columns are `predictions` (win rates), `weak_quality` and `strong_quality`. `evaluate` copies
this file to its cache before importing it, hence the absolute imports, one module a line. The
mathematics is `router_models.frontier`.
"""

import datasets
import evaluate

from router_models.frontier import METRICS, cost_quality_curve

_NAMES = ("apgr", "apgr_10", "apgr_routellm")

_DESCRIPTION = "\n".join(f"{name}: {METRICS[name].description}." for name in _NAMES)

_KWARGS_DESCRIPTION = """
Args:
    predictions: win rates, one a query: the router's estimate in [0, 1] of the probability that the
        strong LLM is needed.
    weak_quality: quality of the weak LLM, one a query; higher is better.
    strong_quality: quality of the strong LLM, one a query.
Returns:
    apgr, apgr_10, apgr_routellm: higher is better; 0.5, 0.55 and 0.5 for a random router; NaN where
    the strong LLM is not better than the weak one.
Example:
    >>> apgr = evaluate.load("metrics/apgr")
    >>> apgr.compute(predictions=[0.9, 0.1], weak_quality=[0, 0], strong_quality=[1, 0])["apgr"]
    0.75
"""

_CITATION = """
@article{ong2024routellm,
  title={RouteLLM: Learning to Route LLMs with Preference Data},
  author={Ong, Isaac and others},
  journal={arXiv:2406.18665},
  year={2024}
}
"""

_NUMBER = datasets.Value("float64")


class Apgr(evaluate.Metric):
    """Average performance gap recovered. RouteLLM, arXiv 2406.18665, section 3."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": _NUMBER, "weak_quality": _NUMBER, "strong_quality": _NUMBER}
            ),
        )

    def _compute(
        self, predictions: list[float], weak_quality: list[float], strong_quality: list[float]
    ) -> dict[str, float]:
        found = cost_quality_curve(predictions, weak_quality, strong_quality).metrics()
        return {name: found[name] for name in _NAMES}
