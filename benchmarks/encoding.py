"""Speed of our encoder next to sentence-transformers with its defaults, on the same weights.

    python benchmarks/encoding.py [--texts 2000] [--threads N] [--rounds 3]

Both encode the same texts of mixed length in alternating rounds, so that a busy machine slows both
alike; the median ratio counts. Wall seconds are what a user waits; CPU seconds are steadier when
other work shares the cores. sentence-transformers runs as `SentenceTransformer(...).encode(texts)`.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from router_models.encoders import load_encoder
from router_models.packaged import minilm_directory

ROOT = Path(__file__).resolve().parent.parent
MMLU = Path(os.environ.get("TURNOUT_SHARED", "/work/shared")) / "data" / "routellm_mmlu"


def texts_of_mixed_length(count: int) -> tuple[str, list[str]]:
    """Return a description and ``count`` distinct texts: MMLU prompts, or else bundled texts."""
    files = sorted(MMLU.glob("*.csv"))
    if files:
        texts = []
        for file in files:
            with file.open(encoding="utf-8", newline="") as stream:
                texts += [row["prompt"] for row in csv.DictReader(stream)]
        source = "MMLU prompts"
    else:
        lines = (ROOT / "data" / "geography.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        texts = [record[field] for record in records for field in ("text", "context")]
        source = "bundled questions and contexts"
    distinct = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(distinct))[:count]
    return source, [distinct[row] for row in order]


def seconds(encode: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    """Return wall seconds, CPU seconds and the vectors."""
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = encode()
    return time.perf_counter() - wall, time.process_time() - cpu, vectors


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import torch
    from sentence_transformers import SentenceTransformer

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    source, texts = texts_of_mixed_length(options.texts)
    theirs = SentenceTransformer(str(minilm_directory()), device="cpu")
    ours = {
        "default": load_encoder("minilm"),
        "float32": load_encoder("minilm", precision="float32"),
    }
    theirs.encode(texts[:64])
    for encoder in ours.values():
        encoder.encode(texts[:64])

    print(f"{len(texts)} {source}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    for _ in range(options.rounds):
        their_wall, their_cpu, reference = seconds(
            lambda: theirs.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        )
        print(f"  sentence-transformers  {their_wall:6.2f} s wall  {their_cpu:6.2f} s CPU")
        for name, encoder in ours.items():
            wall, cpu, vectors = seconds(partial(encoder.encode, texts))
            ratios[name].append((their_wall / wall, their_cpu / cpu))
            cosine = float((vectors * reference).sum(axis=1).min())
            print(
                f"  ours, {name:8s} {encoder.description()['precision']:>8s} {wall:6.2f} s wall  "
                f"{cpu:6.2f} s CPU  min cosine {cosine:.6f}"
            )
    for name, pairs in ratios.items():
        wall_ratio, cpu_ratio = (median(pair[at] for pair in pairs) for at in (0, 1))
        print(f"{name}: {wall_ratio:.2f} times as fast (wall), {cpu_ratio:.2f} (CPU)")


if __name__ == "__main__":
    main()
