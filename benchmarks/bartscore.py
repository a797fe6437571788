"""Time BARTScore against the plain way on the same model, texts and machine.

The plain way is the published code's: every pair is encoded by itself, in the order given, in
padded batches of 4 with a log-softmax over the whole vocabulary at every position; for a causal
model likewise, prompt and target in one row. Both give the same scores, which is checked.

Run it with ``python -m benchmarks.bartscore [--sources N] [--responses N] [--threads N]
[--full]``; ``--full`` instead times the pipeline's job alone: 250 sources with 12 responses each
under SmolLM2. On a busy machine one thread gives steadier ratios than two that wait for each other.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

from metrics.bartscore.likelihood import Likelihood, ScorerSpec, load_likelihood
from router_models.packaged import minilm_directory, smollm2_gguf

QUESTIONS = Path(__file__).resolve().parents[1] / "data" / "geography.jsonl"
PHRASINGS = [
    "{answer}",
    "{answer}.",
    "It is {answer}.",
    "The answer is {answer}.",
    "The correct answer is {answer}, as far as I know.",
    "{answer} is the answer to the question, and it is well known in the region.",
]
PLAIN_BATCH = 4


def pairs(sources: int, responses: int) -> tuple[list[str], list[str]]:
    """Return (source, target) lists: bundled questions with right and wrong short answers.

    Like samples of an LLM, some of a source's responses are equal and many begin alike.
    """
    rng = random.Random(0)
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    questions = rng.sample([json.loads(line) for line in lines], sources)
    answers = [question["gold"][0] for question in questions]
    givens, targets = [], []
    for question in questions:
        near = [question["gold"][0], *rng.sample(answers, 3)]
        for _ in range(responses):
            givens.append(f"{question['context']}\nQ: {question['text']}\n{question['reference']}")
            targets.append(rng.choice(PHRASINGS).format(answer=rng.choice(near)))
    return givens, targets


def random_bart() -> Likelihood:
    """Return a scorer of BART-base's size with random weights and MiniLM's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
    )
    tokenizer.eos_token = tokenizer.sep_token
    model = BartForConditionalGeneration(config).eval()
    return Likelihood(ScorerSpec("random", max_length=256), model, tokenizer)


def smollm2() -> Likelihood:
    """Return the packaged causal scorer."""
    spec = ScorerSpec(str(smollm2_gguf()), "causal", max_length=256, device="cpu")
    return load_likelihood(spec)


@torch.inference_mode()
def plain_seq2seq(scorer: Likelihood, sources: list[str], targets: list[str]) -> np.ndarray:
    """Score pairs as the published ``BARTScorer.score`` does."""
    scores: list[float] = []
    for start in range(0, len(sources), PLAIN_BATCH):
        given, wanted = (
            scorer.tokenizer(
                texts[start : start + PLAIN_BATCH],
                truncation=True,
                max_length=scorer.spec.max_length,
                padding=True,
                return_tensors="pt",
            )
            for texts in (sources, targets)
        )
        labels = wanted.input_ids
        logits = scorer.model(
            input_ids=given.input_ids, attention_mask=given.attention_mask, labels=labels
        ).logits
        table = torch.log_softmax(logits, dim=-1)
        found = table.gather(2, labels[:, :, None])[:, :, 0] * wanted.attention_mask
        scores += (found.sum(1) / wanted.attention_mask.sum(1)).tolist()
    return np.array(scores)


@torch.inference_mode()
def plain_causal(scorer: Likelihood, sources: list[str], targets: list[str]) -> np.ndarray:
    """Score pairs one row each, prompt and target together."""
    scores: list[float] = []
    tokenizer, pad = scorer.tokenizer, scorer.tokenizer.pad_token_id
    prompts = tokenizer([scorer.spec.template.replace("{source}", text) for text in sources])
    answers = tokenizer(targets)
    rows = list(zip(prompts.input_ids, answers.input_ids, strict=True))
    for start in range(0, len(rows), PLAIN_BATCH):
        batch = rows[start : start + PLAIN_BATCH]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        padded = [p + a + [pad] * (width - len(p) - len(a)) for p, a in batch]
        tokens = torch.tensor(padded)
        mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p) - len(a)) for p, a in batch])
        logits = scorer.model(input_ids=tokens, attention_mask=mask).logits
        table = torch.log_softmax(logits[:, :-1], dim=-1)
        found = table.gather(2, tokens[:, 1:, None])[:, :, 0]
        for row, (prompt, answer) in zip(found, batch, strict=True):
            first = len(prompt) - 1
            scores.append(float(row[first : first + len(answer)].mean()))
    return np.array(scores)


def main() -> None:
    """Print one line for each scorer: seconds of both ways, the ratio, the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=16)
    parser.add_argument("--responses", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        sources, targets = pairs(250, 12)
        scorer = smollm2()
        started = time.perf_counter(), time.process_time()
        scorer.score(sources, targets)
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        print(f"SmolLM2, {len(sources)} responses to 250 sources: {wall:.1f} s ({cpu:.1f} s CPU)")
        return
    sources, targets = pairs(options.sources, options.responses)
    print(
        f"{len(sources)} pairs, {len(set(zip(sources, targets, strict=True)))} distinct, "
        f"{options.sources} sources, {torch.get_num_threads()} threads"
    )
    for name, load, plain in (
        ("random BART-base", random_bart, plain_seq2seq),
        ("SmolLM2", smollm2, plain_causal),
    ):
        scorer = load()
        plain(scorer, sources[:4], targets[:4])  # the first pass of a process allocates
        started_s = time.perf_counter()
        expected = plain(scorer, sources, targets)
        plain_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        scores = scorer.score(sources, targets)
        ours_s = time.perf_counter() - started_s
        difference = np.abs(scores - expected).max()
        print(
            f"{name}: plain {plain_s:.1f} s, here {ours_s:.1f} s, {plain_s / ours_s:.1f} times "
            f"as fast, scores within {difference:.1e}"
        )


if __name__ == "__main__":
    main()
