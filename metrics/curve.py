"""What the metrics over a cost-quality curve (apgr, cpt) share: their columns and their source.

`evaluate` copies a metric's own file to its cache before importing it; this one is imported from
here, by its absolute name.
"""

import datasets
import evaluate

COLUMNS = """
    predictions: win rates, one a query: the router's estimate in [0, 1] of the probability that the
        strong LLM is needed.
    weak_quality: quality of the weak LLM, one a query; higher is better.
    strong_quality: quality of the strong LLM, one a query.
"""

_CITATION = """
@article{ong2024routellm,
  title={RouteLLM: Learning to Route LLMs with Preference Data},
  author={Ong, Isaac and others},
  journal={arXiv:2406.18665},
  year={2024}
}
"""


def metric_info(description: str, inputs: str) -> evaluate.MetricInfo:
    """Return the card of a metric over the three COLUMNS. RouteLLM, arXiv 2406.18665, section 3."""
    number = datasets.Value("float64")
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=inputs,
        features=datasets.Features(
            {"predictions": number, "weak_quality": number, "strong_quality": number}
        ),
    )
