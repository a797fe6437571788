"""The warehouse at scale: seconds and peak memory from responses to labels and t*.

    python -m benchmarks.warehouse [--queries 10000] [--growth 1 3 5 10] [--rounds 2]

Synthetic answers of the real schema, 10,000 queries × 11 LLMs × 10 samples, go the way that real
ones go: into the journal, from there into DuckDB, out as a snapshot, through scoring (by a scorer
that costs nothing: each answer begins with its own quality), and for the strongest LLM against each
of the others into labels with their exact t*. Every stage is a process of its own, so that its peak
is its own; seconds are without imports. The best of a few rounds counts for what can be repeated:
other work on the machine can only slow a round down.

--growth repeats all with so many times the queries. The journal is left out past the first: it
reads one line after the other, so answers are ingested from Arrow tables instead.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from conf.llms import LLM, Endpoint, Generation, Pair
from conf.schema import GoldMatch, Labels, Queries
from tasks import scoring
from tasks.generation import collect_responses, missing_requests, prompt_table
from tasks.journal import SCHEMA, open_journal, recover_journals
from tasks.labelling import label_queries
from tasks.queries import ingest_queries
from tasks.warehouse import Snapshot, Warehouse

LLMS, SAMPLES = 11, 10
GENERATION = Generation(samples=SAMPLES)
METRIC = GoldMatch(name="quality")
# About 60 tokens, which is what a short answer has.
ANSWER = "the answer to this question is one of many that could be given by an LLM of its size " * 3
BATCH = 100_000
# What the design bounds: from stored scores to labels and t*.
BOUNDED = ("scores", "labels")


@dataclass(frozen=True)
class Site:
    """A store under measurement, and what earlier stages have left in it."""

    directory: Path
    queries: int

    def warehouse(self) -> Warehouse:
        """Return the store's warehouse."""
        return Warehouse(self.directory)

    def keep(self, snapshot: Snapshot) -> None:
        """Write down where a snapshot lies, for the stages to come."""
        (self.directory / f"{snapshot.table}.json").write_text(
            json.dumps([snapshot.table, snapshot.digest, snapshot.rows, str(snapshot.path)])
        )

    def kept(self, table: str) -> Snapshot:
        """Return a snapshot of an earlier stage."""
        name, digest, rows, path = json.loads((self.directory / f"{table}.json").read_text())
        return Snapshot(name, digest, rows, Path(path))


def llms() -> list[LLM]:
    """Return the LLMs, the weakest first."""
    endpoint = Endpoint(url="http://localhost:1/v1")
    names = [f"llm-{k:02d}" for k in range(LLMS)]
    return [LLM(name=name, model=name, endpoint=endpoint) for name in names]


def ask(site: Site) -> float:
    """Ingest the queries and register every prompt."""
    file = site.directory / "queries.jsonl"
    with file.open("w") as lines:
        for k in range(site.queries):
            row = {"id": f"q{k:07d}", "text": f"question {k}: {ANSWER[:150]}", "gold": [str(k)]}
            lines.write(json.dumps({**row, "domain": f"domain {k % 7}"}) + "\n")
    start = time.perf_counter()
    queries = ingest_queries.fn(site.warehouse(), Queries(source="file", path=str(file)))
    for llm in llms():
        prompts = prompt_table(queries, llm)
        site.warehouse().ingest("prompts", prompts.drop_columns(["prompt"]))
        missing_requests(site.warehouse(), prompts, SAMPLES)
    seconds = time.perf_counter() - start
    site.keep(queries)
    return seconds


def answers(site: Site) -> Iterator[pa.Table]:
    """Yield each LLM's answers: a batch of rows of the responses table at a time."""
    difficulty = np.random.default_rng(0).normal(size=(site.queries, 1))
    for strength, llm in enumerate(llms()):
        draw = np.random.default_rng([1, strength])
        quality = strength / 10 - difficulty + draw.normal(size=(site.queries, SAMPLES))
        ids = prompt_table(site.kept("queries"), llm)["prompt_id"].to_pylist()
        for start in range(0, site.queries, BATCH // SAMPLES):
            part = slice(start, start + BATCH // SAMPLES)
            yield _rows(llm.name, ids[part], quality[part])


def _rows(llm: str, prompt_ids: list[str], quality: np.ndarray) -> pa.Table:
    count = quality.size
    columns = {
        "prompt_id": np.repeat(prompt_ids, SAMPLES),
        "sample_index": np.tile(np.arange(SAMPLES), len(prompt_ids)),
        "llm": [llm] * count,
        "text": [f"{value:.6f} {ANSWER}" for value in quality.ravel().tolist()],
        "finish_reason": ["stop"] * count,
        "prompt_tokens": [40] * count,
        "completion_tokens": [60] * count,
        "billed_usd": [1e-5] * count,
        "latency_ms": [500.0] * count,
        "seed": np.arange(count),
        "error": [None] * count,
        "created_at": [datetime.now(UTC)] * count,
    }
    return pa.table(columns).select(SCHEMA.names).cast(SCHEMA)


def journal(site: Site) -> float:
    """Take in the answers through the journal; what is timed is its recovery."""
    with open_journal(site.warehouse()) as write:
        for table in answers(site):
            rows = table.to_pylist()
            for row in rows:
                row["created_at"] = row["created_at"].isoformat()
            for start in range(0, len(rows), SAMPLES):
                write(rows[start : start + SAMPLES])
    start_s = time.perf_counter()
    recover_journals(site.warehouse())
    return time.perf_counter() - start_s


def ingest(site: Site) -> float:
    """Take in the answers from Arrow tables."""
    seconds = 0.0
    for table in answers(site):
        start = time.perf_counter()
        site.warehouse().ingest("responses", table)
        seconds += time.perf_counter() - start
    return seconds


def collect(site: Site) -> float:
    """Collect all responses into a snapshot."""
    start = time.perf_counter()
    responses = collect_responses.fn(site.warehouse(), site.kept("queries"), llms(), GENERATION)
    seconds = time.perf_counter() - start
    site.keep(responses)
    return seconds


def score(site: Site) -> float:
    """Score what has no score yet, all there is the first time, and collect the scores."""

    def quality(rows: pa.Table) -> list[float]:
        return [float(text.partition(" ")[0]) for text in rows["text"].to_pylist()]

    start = time.perf_counter()
    with patch.object(scoring, "gold_scorer", quality):
        scores = scoring.score_responses.fn(
            site.warehouse(), site.kept("queries"), site.kept("responses"), [METRIC]
        )
    seconds = time.perf_counter() - start
    site.keep(scores)
    return seconds


def labels(site: Site) -> float:
    """Label every LLM against the strongest, each with its exact t*."""
    *weak, strong = [llm.name for llm in llms()]
    start = time.perf_counter()
    for name in weak:
        found = label_queries.fn(
            site.warehouse(),
            site.kept("queries"),
            site.kept("scores"),
            pair=Pair(weak=name, strong=strong),
            metric=METRIC.name,
            settings=Labels(),
        )
        assert found.unlabelled == 0
        assert found.t > 0
    return time.perf_counter() - start


STAGES: dict[str, Callable[[Site], float]] = {
    "ask": ask,
    "journal": journal,
    "ingest": ingest,
    "collect": collect,
    "score": score,
    "scores": score,  # again: with every score stored
    "labels": labels,
}
REPEATABLE = ("collect", "scores", "labels")


def measured(stage: str, site: Site, rounds: int) -> dict[str, float]:
    """Run a stage in processes of its own: the shortest seconds, and the least peak in MiB."""
    found = []
    for _ in range(rounds if stage in REPEATABLE else 1):
        command = [sys.executable, "-m", "benchmarks.warehouse", "--stage", stage]
        command += ["--queries", str(site.queries), "--directory", str(site.directory)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(ended.stdout))
    return {key: min(one[key] for one in found) for key in found[0]}


def peak_mib() -> float:
    """Return the most memory that this process has held, itself alone."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(kib) / 1024, 1)


def at_size(queries: int, rounds: int, *, by_journal: bool) -> dict[str, object]:
    """Measure every stage with so many queries in a store of its own."""
    stages = [stage for stage in STAGES if stage != ("ingest" if by_journal else "journal")]
    with tempfile.TemporaryDirectory() as directory:
        site = Site(Path(directory), queries)
        found = {}
        for stage in stages:
            found[stage] = measured(stage, site, rounds)
            print(f"{queries} queries, {stage}: {found[stage]}", file=sys.stderr, flush=True)
        size = site.warehouse().file().stat().st_size
    bounded = {
        "seconds": sum(found[stage]["seconds"] for stage in BOUNDED),
        "peak_mib": max(found[stage]["peak_mib"] for stage in BOUNDED),
    }
    return {
        "responses": queries * LLMS * SAMPLES,
        "file_mib": round(size / 2**20, 1),
        "stages": found,
        "labels and t*": {key: round(value, 2) for key, value in bounded.items()},
    }


def main() -> None:
    """Measure, and print one JSON object for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--growth", type=int, nargs="+", default=[1], metavar="TIMES")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        seconds = STAGES[arguments.stage](Site(arguments.directory, arguments.queries))
        print(json.dumps({"seconds": round(seconds, 2), "peak_mib": peak_mib()}))
        return
    for times in arguments.growth:
        found = at_size(arguments.queries * times, arguments.rounds, by_journal=times == 1)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
