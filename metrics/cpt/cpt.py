"""CPT as a Hugging Face `evaluate` metric: the smallest cost at which a router reaches a PGR mark.

The columns are `predictions` (win rates), `weak_quality` and `strong_quality`. `evaluate` copies
this file to its cache before importing it, hence the absolute imports, one module a line. The
mathematics is `router_models.frontier`.
"""

import evaluate

from conf.errors import ConfigError
from metrics.curve import COLUMNS, metric_info
from router_models.frontier import cost_quality_curve

_DESCRIPTION = (
    "Call-performance threshold: the smallest share of queries sent to the strong LLM at which the "
    "performance gap recovered reaches a mark. Read off the exact curve; lower is better."
)

_INPUTS = f"""
Args:{COLUMNS}    pgr: the marks, shares of the quality gap above 0 and up to 1. Default (0.5, 0.8).
Returns:
    cpt_50, cpt_80 … by mark: a share in [0, 1], about equal to the mark for a random router; NaN
    where the strong LLM is not better than the weak one.
Example:
    >>> cpt = evaluate.load("metrics/cpt")
    >>> columns = {{"weak_quality": [0, 0], "strong_quality": [1, 0]}}
    >>> cpt.compute(predictions=[0.9, 0.1], **columns)
    {{'cpt_50': 0.25, 'cpt_80': 0.4}}
"""


class Cpt(evaluate.Metric):
    """Call-performance threshold. RouteLLM, arXiv 2406.18665, section 3."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(_DESCRIPTION, _INPUTS)

    def _compute(
        self,
        predictions: list[float],
        weak_quality: list[float],
        strong_quality: list[float],
        pgr: tuple[float, ...] = (0.5, 0.8),
    ) -> dict[str, float]:
        for mark in pgr:
            if not 0.0 < mark <= 1.0:
                raise ConfigError(
                    f"The PGR mark is {mark}; expected a share above 0 and up to 1. Give 0.8 for "
                    "CPT(80 %)."
                )
        curve = cost_quality_curve(predictions, weak_quality, strong_quality)
        return {f"cpt_{100 * mark:g}": curve.cpt(mark) for mark in pgr}
