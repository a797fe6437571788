"""APGR as a Hugging Face `evaluate` metric: how much of the quality gap a router recovers.

The columns are `predictions` (win rates), `weak_quality` and `strong_quality`. `evaluate` copies
this file to its cache before importing it, hence the absolute imports, one module a line. The
mathematics is `router_models.frontier`.
"""

import evaluate

from metrics.curve import COLUMNS, metric_info
from router_models.frontier import METRICS, cost_quality_curve

_NAMES = ("apgr", "apgr_10", "apgr_routellm")

_INPUTS = f"""
Args:{COLUMNS}Returns:
    apgr, apgr_10, apgr_routellm: higher is better; 0.5, 0.55 and 0.5 for a random router; NaN where
    the strong LLM is not better than the weak one.
Example:
    >>> apgr = evaluate.load("metrics/apgr")
    >>> apgr.compute(predictions=[0.9, 0.1], weak_quality=[0, 0], strong_quality=[1, 0])["apgr"]
    0.75
"""


class Apgr(evaluate.Metric):
    """Average performance gap recovered. RouteLLM, arXiv 2406.18665, section 3."""

    def _info(self) -> evaluate.MetricInfo:
        described = "\n".join(f"{name}: {METRICS[name].description}." for name in _NAMES)
        return metric_info(described, _INPUTS)

    def _compute(
        self, predictions: list[float], weak_quality: list[float], strong_quality: list[float]
    ) -> dict[str, float]:
        found = cost_quality_curve(predictions, weak_quality, strong_quality).metrics()
        return {name: found[name] for name in _NAMES}
