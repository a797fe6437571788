"""Generation: every LLM answers every query several times; what was ever received is kept.

A response has an address: a hash of what determines it (model, template, decoding, rendered
prompt) and its sample index. Only what has not been received is asked for. A response that failed
for good is a row with its reason; each run asks for it once more, for a key, a limit or a filter
may have been mended since, and an answer takes the row's place. A response that arrives is appended
to a journal at once, and the journal is ingested at the end or by the next run, so a killed run
loses nothing but the requests in flight.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter

import pyarrow as pa
from prefect import task

from conf.errors import DataError
from conf.llms import LLM, Generation
from conf.load import config_digest
from conf.schema import LOCAL, Compute
from tasks.asking import Asking, Request
from tasks.asking_shards import ask_in_shards
from tasks.endpoints import model_identity, serving_endpoint
from tasks.journal import open_journal, recover_journals
from tasks.progress import progress
from tasks.shards import recover_shards
from tasks.warehouse import Snapshot, Warehouse

FIELDS = ("text", "context")


@dataclass(frozen=True)
class GenerationReport:
    """What asking one LLM took."""

    llm: str
    requests: int
    new: int
    reused: int
    failed: int
    """Responses that are not to be had: for good, or this time. The three sum to those wanted."""
    billed_usd: float
    lost_usd: float
    """At most so much for answers that may have been billed and never arrived."""
    seconds: float


@task(task_run_name="ask {llm.name}")
def generate_responses(
    warehouse: Warehouse,
    queries: Snapshot,
    llm: LLM,
    settings: Generation,
    compute: Compute = LOCAL,
    *,
    spent_usd: float = 0.0,
) -> GenerationReport:
    """Ask ``llm`` for every response that the warehouse lacks.

    Raises EndpointError when the endpoint refuses the key, cannot be reached, or fails for more
    than the configured share; BudgetError before more than the budget is spent. Whatever was
    received by then is kept.
    """
    started = time.monotonic()
    recover_journals(warehouse)
    recover_shards(warehouse, compute)
    prompts = prompt_table(queries, llm)
    warehouse.ingest("prompts", prompts.drop_columns(["prompt"]))
    requests = missing_requests(warehouse, prompts, settings.samples)
    total = len(set(prompts["prompt_id"].to_pylist())) * settings.samples
    wanted = sum(len(request.missing) for request in requests)
    asking = Asking(llm, settings, total=total, spent_usd=spent_usd)
    if requests:
        with progress(f"Asking {llm.name}", wanted) as advance:
            if compute.kind == "ray":
                ask_in_shards(warehouse, compute, asking, requests, advance)
            else:
                _ask_here(warehouse, asking, requests, advance)
    if asking.stopped_by is not None:
        raise asking.stopped_by
    return GenerationReport(
        llm=llm.name,
        requests=asking.requests,
        new=asking.received,
        reused=total - wanted,
        failed=asking.failed,
        billed_usd=asking.billed_usd,
        lost_usd=asking.lost_usd,
        seconds=time.monotonic() - started,
    )


def _ask_here(
    warehouse: Warehouse,
    asking: Asking,
    requests: Sequence[Request],
    advance: Callable[[int], None],
) -> None:
    with serving_endpoint(asking.llm) as endpoint, open_journal(warehouse) as write:
        asyncio.run(asking.ask_all(endpoint, requests, write, advance))
    recover_journals(warehouse)


@task(task_run_name="collect responses")
def collect_responses(
    warehouse: Warehouse, queries: Snapshot, llms: Sequence[LLM], settings: Generation
) -> Snapshot:
    """Return all responses to these queries: one row for each query, LLM and sample.

    Their cost_usd is that of one response asked for alone at the configured prices, which is what
    serving costs; what was billed for generating them is less where samples shared a prompt.
    """
    answers = (
        part for llm in llms for part in _responses(warehouse, queries, llm, settings.samples)
    )
    return warehouse.write_snapshot("responses", answers)


def _responses(
    warehouse: Warehouse, queries: Snapshot, llm: LLM, samples: int
) -> Iterator[pa.Table]:
    prompts = prompt_table(queries, llm).drop_columns(["prompt"])
    return warehouse.parts(
        """
        SELECT query_key, asked.llm, prompt_id, sample_index, r.text, prompt_tokens,
               completion_tokens, latency_ms,
               (prompt_tokens * $input + completion_tokens * $output) / 1e6 AS cost_usd
        FROM asked JOIN responses r USING (prompt_id)
        WHERE r.error IS NULL AND sample_index < $samples
        ORDER BY query_key, sample_index
        """,
        {
            "samples": samples,
            "input": llm.prices.input_usd_per_million,
            "output": llm.prices.output_usd_per_million,
        },
        tables={"asked": prompts},
    )


def prompt_table(queries: Snapshot, llm: LLM) -> pa.Table:
    """Return each query's rendered prompt and its address: query_key, llm, prompt_id, prompt."""
    rendered = rendered_prompts(queries, llm)
    digest = _llm_digest(llm)
    ids = [
        hashlib.sha256(f"{digest} {prompt}".encode()).hexdigest()[:32]
        for prompt in rendered.values()
    ]
    return pa.table(
        {
            "query_key": list(rendered),
            "llm": [llm.name] * len(ids),
            "prompt_id": ids,
            "prompt": list(rendered.values()),
        }
    )


def rendered_prompts(queries: Snapshot, llm: LLM) -> dict[str, str]:
    """Return each query's rendered prompt by query key.

    Raises DataError for a template field that is unknown, or that a query does not have.
    """
    try:
        wanted = {name for _, name, _, _ in Formatter().parse(llm.template) if name is not None}
    except ValueError as error:
        raise DataError(
            f"The template of {llm.name!r} is not readable: {error}. Expected the fields "
            f"{', '.join(FIELDS)} in braces, and other braces doubled. Correct "
            f"llms.{llm.name}.template."
        ) from error
    if unknown := wanted - set(FIELDS):
        raise DataError(
            f"The template of {llm.name!r} asks for {sorted(unknown)}. Expected only the fields "
            f"{', '.join(FIELDS)} in braces, and other braces doubled. Correct "
            f"llms.{llm.name}.template."
        )
    prompts = {}
    for row in queries.read().select(["query_key", "query_id", *FIELDS]).to_pylist():
        for name in wanted:
            if not row[name]:
                raise DataError(
                    f"Query {row['query_id']!r} has no {name}, which the template of {llm.name!r} "
                    f"asks for. Expected one for every query. Add it, or change the template."
                )
        prompts[row["query_key"]] = llm.template.format(**{name: row[name] for name in wanted})
    return prompts


def _llm_digest(llm: LLM) -> str:
    """Return a hash of all that determines a response but its prompt and sample index.

    Where the LLM answers, its key, prices and limits are left out: they change no response.
    """
    decoding = llm.decoding.model_dump(mode="json")
    return config_digest(
        [model_identity(llm), llm.endpoint.api, llm.system, llm.template, decoding]
    )


def missing_requests(warehouse: Warehouse, prompts: pa.Table, samples: int) -> list[Request]:
    """Return what has to be asked, in the order of the queries; nothing that was received."""
    with warehouse.connection() as con:
        con.register("asked", prompts.select(["prompt_id"]))
        rows = con.execute(
            "SELECT prompt_id, list(sample_index) FROM responses "
            "WHERE error IS NULL AND prompt_id IN (SELECT prompt_id FROM asked) GROUP BY prompt_id"
        ).fetchall()
    there = {prompt_id: set(indices) for prompt_id, indices in rows}
    unique = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    requests = [
        Request(
            prompt_id,
            prompt,
            tuple(k for k in range(samples) if k not in there.get(prompt_id, ())),
        )
        for prompt_id, prompt in unique.items()
    ]
    return [request for request in requests if request.missing]
