"""Responses per second through generation, against a bare loop of HTTP requests.

    python -m benchmarks.generation [--queries 24] [--rounds 2] [llm.key=value ...]

Both ask the same embedded llama.cpp server, freshly started, the same prompts with the same seeds
at the same concurrency, so both wait for the same tokens. The bare loop does nothing else; what
generation takes longer is the price of journal, token counts, retries and accounts. The best of a
few rounds counts: other work on the machine can only slow a round down.
"""

import argparse
import http.client
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conf.llms import LLM, Generation
from conf.load import load_experiment
from conf.schema import Experiment
from tasks.endpoints import serving_endpoint
from tasks.generation import generate_responses, rendered_prompts
from tasks.queries import ingest_queries
from tasks.warehouse import Snapshot, Warehouse


def body(llm: LLM, prompt: str, samples: int) -> dict[str, Any]:
    """Return the request that generation sends for one query."""
    decoding = llm.decoding
    asked: dict[str, Any] = {
        "model": llm.model,
        "n": samples,
        "seed": decoding.seed,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "max_tokens": decoding.max_tokens,
    }
    if decoding.stop:
        asked["stop"] = list(decoding.stop)
    if llm.endpoint.api == "completions":
        return asked | {"prompt": prompt}
    system = [{"role": "system", "content": llm.system}] if llm.system is not None else []
    return asked | {"messages": [*system, {"role": "user", "content": prompt}]}


def bare_loop(llm: LLM, prompts: list[str], samples: int) -> float:
    """Return the responses per second of plain requests at the LLM's concurrency."""
    path = "/v1/completions" if llm.endpoint.api == "completions" else "/v1/chat/completions"

    def ask(prompt: str) -> None:
        connection = http.client.HTTPConnection(host, timeout=300)
        content = json.dumps(body(llm, prompt, samples))
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        answer = json.load(connection.getresponse())
        assert len(answer["choices"]) == samples
        connection.close()

    with serving_endpoint(llm) as endpoint:
        host = urlsplit(endpoint.url).netloc
        started = time.perf_counter()
        with ThreadPoolExecutor(llm.limits.concurrency) as workers:
            list(workers.map(ask, prompts))
        return samples * len(prompts) / (time.perf_counter() - started)


def generation(warehouse: Warehouse, queries: Snapshot, llm: LLM, samples: int) -> dict[str, float]:
    """Return generation's responses per second: while it asks, and in all."""
    report = generate_responses.fn(warehouse, queries, llm, Generation(samples=samples))
    assert report.failed == 0
    times = warehouse.query("SELECT created_at, latency_ms FROM responses").to_pylist()
    first = min(row["created_at"] - timedelta(milliseconds=row["latency_ms"]) for row in times)
    asking_s = (max(row["created_at"] for row in times) - first).total_seconds()
    return {"asking": report.new / asking_s, "whole": report.new / report.seconds}


def measured(config: str, overrides: tuple[str, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Return responses per second for each embedded LLM of an experiment."""
    experiment = load_experiment(config, overrides)
    assert isinstance(experiment, Experiment), "a preference experiment asks no LLM"
    samples = experiment.generation.samples
    result: dict[str, dict[str, float]] = {}
    for llm in experiment.llms:
        found: list[dict[str, float]] = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as directory:
                warehouse = Warehouse(Path(directory))
                queries = ingest_queries.fn(warehouse, experiment.queries)
                prompts = list(dict.fromkeys(rendered_prompts(queries, llm).values()))
                bare = bare_loop(llm, prompts, samples)
                found.append({"bare": bare, **generation(warehouse, queries, llm, samples)})
        best = {name: max(one[name] for one in found) for name in found[0]}
        result[llm.name] = best | {"asking_share_of_bare": best["asking"] / best["bare"]}
    return result


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    overrides = (f"queries.limit={arguments.queries}", *arguments.overrides)
    found = measured(arguments.config, overrides, arguments.rounds)
    rounded = {name: {k: round(v, 3) for k, v in one.items()} for name, one in found.items()}
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
