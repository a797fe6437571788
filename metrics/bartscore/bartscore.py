"""BARTScore as a Hugging Face ``evaluate`` metric: ``evaluate.load("metrics/bartscore")``.

evaluate copies this file to a cache and runs it there, so it imports the project absolutely, one
module a line; the work is in likelihood.py.
"""

from typing import Any

import datasets
import evaluate

from metrics.bartscore.likelihood import CAUSAL_TEMPLATE, Likelihood, ScorerSpec, load_likelihood

_DESCRIPTION = """
The mean log-likelihood per token that a language model gives to one text after another (BARTScore).
Higher is better; 0 is the highest. Scores of different fingerprints cannot be compared.
"""

_CITATION = """
@inproceedings{yuan2021bartscore,
  title = {BARTScore: Evaluating Generated Text as Text Generation},
  author = {Yuan, Weizhe and Neubig, Graham and Liu, Pengfei},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021},
  url = {https://arxiv.org/abs/2106.11520}
}
"""

_INPUTS = """
Args:
    predictions: responses, one text each.
    references: one reference text for each response.
    checkpoint: a hub name, a folder or a GGUF file. There is no fallback to another one.
    architecture: "seq2seq" or "causal".
    direction: "reference_to_response", "response_to_reference" or "f" (their mean).
    max_length: most tokens kept of a source, and of a target.
    template: the prompt of a causal model, with {source} in it once.
    overlay: a .pth state dict laid over the checkpoint (BARTScore's ParaBank weights).
    dtype, device, tokens_per_batch: how to compute; see ScorerSpec.
Returns:
    scores: one float for each prediction, in order.
    mean: their mean.
    fingerprint: what the scores depend on.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class BartScore(evaluate.Metric):
    """Keep the last scorer loaded, so that a second ``compute`` of the same kind starts at once."""

    _scorer: Likelihood | None = None

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            codebase_urls=["https://github.com/neulab/BARTScore"],
            reference_urls=["https://arxiv.org/abs/2106.11520"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        *,
        checkpoint: str = "facebook/bart-large-cnn",
        architecture: str = "seq2seq",
        direction: str = "reference_to_response",
        max_length: int = 1024,
        template: str = CAUSAL_TEMPLATE,
        overlay: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        tokens_per_batch: int | None = None,
    ) -> dict[str, Any]:
        spec = ScorerSpec(
            checkpoint=checkpoint,
            architecture=architecture,  # type: ignore[arg-type]  # ScorerSpec checks the names
            direction=direction,  # type: ignore[arg-type]
            max_length=max_length,
            template=template,
            overlay=overlay,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,
            tokens_per_batch=tokens_per_batch,
        )
        if self._scorer is None or self._scorer.spec != spec:
            self._scorer = load_likelihood(spec)
        scores = self._scorer.quality(predictions, references)
        return {
            "scores": scores.tolist(),
            "mean": float(scores.mean()),
            "fingerprint": spec.fingerprint(),
        }
