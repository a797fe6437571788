"""Which way of scoring tells right from wrong answers best: AUC against gold correctness.

`python -m benchmarks.scorer_choice` reads the responses of the default run (.turnout) and scores a
sample of them (100 queries, 2 samples of each LLM) with the packaged SmolLM2 in every direction
and prompt below. The embedded experiment uses the best; docs/results.md has the table.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from metrics.bartscore.likelihood import ScorerSpec, load_likelihood
from router_models.packaged import smollm2_gguf
from router_models.statistics import auc_interval
from tasks.warehouse import Warehouse

QUERIES, SAMPLES = 100, 2
PLAIN, ASKED = "{text}", "Question: {query}\nAnswer: {text}"
WORDS, AGAIN, NEXT = "{source}\nIn other words:\n", "{source}\nAnswer:", "{source}\n"
WAYS = [
    ("reference_to_response", PLAIN, WORDS),
    ("reference_to_response", ASKED, WORDS),
    ("reference_to_response", ASKED, AGAIN),
    ("response_to_reference", PLAIN, WORDS),
    ("response_to_reference", ASKED, WORDS),
    ("response_to_reference", ASKED, AGAIN),
    ("response_to_reference", ASKED, NEXT),
    ("response_to_reference", ASKED, "{source}\nThe correct answer:\n"),
]


def main() -> None:
    """Score the sample in every way and print one line for each."""
    store = Path(sys.argv[1] if len(sys.argv) > 1 else ".turnout")
    rows = (
        Warehouse(store)
        .query(
            """
        SELECT q.text AS query, q.reference, r.text AS response, s.value AS correct
        FROM scores s JOIN responses r USING (prompt_id, sample_index)
        JOIN queries q USING (query_key)
        WHERE s.metric = 'gold' AND sample_index < $samples AND query_key IN (
            SELECT DISTINCT query_key FROM scores ORDER BY query_key LIMIT $queries)
        ORDER BY query_key, prompt_id, sample_index
        """,
            {"samples": SAMPLES, "queries": QUERIES},
        )
        .to_pydict()
    )
    print(f"{len(rows['query'])} responses, {sum(rows['correct']):.0f} of them right")
    likelihood = load_likelihood(ScorerSpec(str(smollm2_gguf()), "causal", max_length=256))
    for direction, form, template in WAYS:
        sides = {"reference": rows["reference"], "response": rows["response"]}
        source, _, target = direction.partition("_to_")
        texts = [
            form.format(query=query, text=text)
            for query, text in zip(rows["query"], sides[source], strict=True)
        ]
        likelihood.spec = replace(likelihood.spec, template=template)
        started = time.monotonic()
        scores = likelihood.score(texts, sides[target])
        seconds = time.monotonic() - started
        found = auc_interval(scores, rows["correct"])
        print(
            f"{direction:22} {form!r:36} {template!r:36} AUC {found.value:.3f} "
            f"[{found.interval.low:.3f}, {found.interval.high:.3f}] {seconds:4.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
