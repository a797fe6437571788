"""Asking as shards on a Ray cluster, from one purse.

No money is spent twice: a shard appends each answer to a journal in the shared folder at once. If
its node dies, the journal is ingested, and the shard runs again elsewhere for the rest. Each shard
may spend its part of the budget, and has its part of the endpoint's concurrency; what it did not
spend goes back. A shard that could need more waits until all others have ended, and then has all
that is left.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.cache_policies import NO_CACHE

from conf.errors import BudgetError, TurnoutError
from conf.llms import LLM, Generation
from conf.schema import Compute
from tasks.asking import Asking, Request
from tasks.cluster import Cluster, Lost, Resources, Shard, connected
from tasks.endpoints import ServedEndpoint, model_identity, serving_endpoint
from tasks.journal import (
    Row,
    append,
    ingest_responses,
    new_journal,
    recover_journals,
    response_table,
    written_table,
)
from tasks.shards import leave, left, locked, other_weights, shard_folder
from tasks.warehouse import Warehouse, table_digest

if TYPE_CHECKING:
    from prefect_ray.task_runners import PrefectRayFuture

POLL_S = 1.0  # how often a shard looks whether it has been told to stop
REQUESTS = pa.schema(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("missing", pa.list_(pa.int32()))]
)


@dataclass(frozen=True)
class Part:
    """What one shard has of the whole: its part of the limits, and what is already spent."""

    llm: LLM
    settings: Generation
    identity: str
    """Of the model, by which a node with other weights is refused."""
    total: int
    failed: int
    spent_usd: float
    """All of the budget that the shard may not spend."""
    stop_file: Path


@dataclass(frozen=True)
class Asked:
    """What one shard took, and what stopped it."""

    requests: int
    received: int
    failed: int
    billed_usd: float
    lost_usd: float
    examples: tuple[str, ...]
    stopped_by: TurnoutError | None


@task(
    task_run_name="ask {part.llm.name}, shard {address}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def ask_shard(address: str, rows: pa.Table, part: Part, folder: Path) -> Asked | None:
    """Ask for what ``rows`` lack, on this node; None where the shard's file is there already."""
    path = folder / f"{address}.parquet"
    if path.exists():
        return None
    llm = part.llm
    asking = Asking(llm, part.settings, part.total, part.spent_usd, failed=part.failed)
    received: list[Row] = []
    with new_journal(folder, f"{address}-") as journal:

        def keep(answers: Sequence[Row]) -> None:
            append(journal, answers)
            received.extend(answers)

        try:
            if model_identity(llm) != part.identity:
                raise other_weights(llm.name)
            with serving_endpoint(llm) as endpoint:
                asyncio.run(_ask_until(part.stop_file, asking, endpoint, _requests(rows), keep))
        except TurnoutError as error:
            asking.stop_for(error)
        leave(path, response_table(received))
        Path(journal.name).unlink()
    return Asked(
        requests=asking.requests,
        received=asking.received,
        failed=asking.failed - part.failed,
        billed_usd=asking.billed_usd,
        lost_usd=asking.lost_usd,
        examples=tuple(asking.examples),
        stopped_by=asking.stopped_by,
    )


async def _ask_until(
    stop_file: Path,
    asking: Asking,
    endpoint: ServedEndpoint,
    requests: Sequence[Request],
    keep: Callable[[Sequence[Row]], None],
) -> None:
    """Ask to the end, or until the file is there: another shard has met what stops the run."""

    async def watch() -> None:
        while not stop_file.exists():
            await asyncio.sleep(POLL_S)
        asking.stop_for(
            TurnoutError(
                f"{asking.llm.name!r} is no longer asked: another shard was stopped. Expected all "
                "to go on. See to what stopped that one, and run again."
            )
        )

    watching = asyncio.create_task(watch())
    try:
        await asking.ask_all(endpoint, requests, keep, lambda responses: None)
    finally:
        watching.cancel()


def ask_in_shards(
    warehouse: Warehouse,
    compute: Compute,
    whole: Asking,
    requests: Sequence[Request],
    advance: Callable[[int], None],
) -> None:
    """Ask for ``requests`` on the cluster, adding up in ``whole``; what arrives is ingested."""
    size = compute.shard_queries
    shards = deque(_shard(requests[k : k + size]) for k in range(0, len(requests), size))
    root = shard_folder(warehouse, compute)
    folder = root / "responses"
    with locked(root), connected(compute) as cluster:
        stop_file = folder / f"{time.time_ns()}-{os.getpid()}.stop"
        try:
            _Asking(warehouse, cluster, whole, folder, stop_file, advance, shards).run()
        finally:
            stop_file.unlink(missing_ok=True)
        recover_journals(warehouse, folder)  # of lost nodes


@dataclass
class _Asking:
    """The shards of one LLM: which wait, what each may spend, and what they took together."""

    warehouse: Warehouse
    cluster: Cluster
    whole: Asking
    folder: Path
    stop_file: Path
    advance: Callable[[int], None]
    waiting: deque[Shard]
    starved: deque[Shard] = field(default_factory=deque)
    """Shards that came to the end of their part of the budget."""
    worst_usd: dict[str, float] = field(default_factory=dict)
    """The most that each shard's responses can cost."""
    allotted_usd: dict[str, float] = field(default_factory=dict)
    """What each running shard may spend."""
    alone: bool = False
    """Whether one shard runs at a time, and has all that is left."""

    def run(self) -> None:
        """Run all shards, until none waits or something stops them."""
        llm = self.whole.llm
        needed, slots = Resources(), llm.limits.concurrency
        if llm.endpoint.kind == "embedded":  # each shard starts a server, which takes all CPUs
            needed, slots = self.cluster.whole_node(), len(self.waiting)
        slots = min(slots, self.cluster.slots(needed), len(self.waiting))
        submit = partial(self._submit, needed=needed, slots=slots)
        while self.waiting:
            for shard, outcome in self.cluster.work_through(
                submit, needed, slots=slots, again=self.waiting
            ):
                self._settle(shard, outcome)
                if self.whole.stopped_by is not None:
                    self._stop()
            if self.starved:
                self.alone = True
                self.waiting.append(self.starved.popleft())

    def _submit(
        self, shard: Shard, slot: int, *, needed: Resources, slots: int
    ) -> "PrefectRayFuture[Asked | None]":
        whole, llm = self.whole, self.whole.llm
        budget_usd = whole.settings.budget_usd
        self.allotted_usd[shard.address] = part_usd = self._part_usd(shard)
        part = Part(
            llm=_limited(llm, slot, slots),
            settings=whole.settings,
            identity=model_identity(llm),
            total=whole.total,
            failed=whole.failed,
            spent_usd=0.0 if budget_usd is None else budget_usd - part_usd,
            stop_file=self.stop_file,
        )
        parameters = {"address": shard.address, "rows": shard.rows, "part": part}
        return self.cluster.submit(ask_shard, {**parameters, "folder": self.folder}, needed)

    def _part_usd(self, shard: Shard) -> float:
        """Return what the shard may spend: in proportion to the most that it can cost.

        The parts of the shards that run, and what is spent, never sum to more than the budget.
        """
        worst_usd = self._worst_usd(shard)
        if self.whole.settings.budget_usd is None:
            return worst_usd
        spent_usd = self.whole.spent_usd + self.whole.billed_usd + self.whole.lost_usd
        left_usd = self.whole.settings.budget_usd - spent_usd - sum(self.allotted_usd.values())
        left_usd = max(0.0, left_usd)
        if self.alone:
            return left_usd
        to_come_usd = worst_usd + sum(self._worst_usd(other) for other in self.waiting)
        return min(worst_usd, left_usd * worst_usd / to_come_usd) if to_come_usd else 0.0

    def _worst_usd(self, shard: Shard) -> float:
        """Return the most that a shard's responses can cost, each asked for alone."""
        if shard.address not in self.worst_usd:
            self.worst_usd[shard.address] = sum(
                len(request.missing) * self.whole.worst_case_usd(request.prompt, 1)
                for request in _requests(shard.rows)
            )
        return self.worst_usd[shard.address]

    def _settle(self, shard: Shard, outcome: Asked | Lost | None) -> None:
        """Take in what a shard left, count it, and let the rest of a lost one wait again."""
        allotted_usd = self.allotted_usd.pop(shard.address)
        if not isinstance(outcome, Asked):
            self._settle_lost(shard, outcome, allotted_usd)
            return
        rows = self._take_in(shard)
        whole = self.whole
        whole.requests += outcome.requests
        whole.received += outcome.received
        whole.billed_usd += outcome.billed_usd
        whole.lost_usd += outcome.lost_usd
        if isinstance(outcome.stopped_by, BudgetError) and not self.alone:
            # What failed in passing is asked for with the rest, and counted then.
            self.advance(outcome.received)
            self._count_failed(rows)
            if (rest := _rest(shard, rows)) is not None:
                self.starved.append(rest)
            return
        whole.fail(outcome.failed, *outcome.examples)
        self.advance(outcome.received + outcome.failed)
        if outcome.stopped_by is not None:
            whole.stop_for(outcome.stopped_by)

    def _settle_lost(self, shard: Shard, lost: Lost | None, allotted_usd: float) -> None:
        """Count what a shard left whose end was not told, and what it may have spent besides."""
        finished = (self.folder / f"{shard.address}.parquet").exists()
        rows = self._take_in(shard) if finished else self._take_in_journals(shard)
        answers = rows.filter(pc.is_null(rows["error"]))
        billed_usd = pc.sum(answers["billed_usd"]).as_py() or 0.0
        self.whole.received += answers.num_rows
        self.whole.billed_usd += billed_usd
        self.advance(answers.num_rows)
        self._count_failed(rows)
        if not finished:
            self.whole.lost_usd += min(
                max(0.0, allotted_usd - billed_usd), self._in_flight_usd(shard)
            )
        rest = _rest(shard, rows)
        if rest is None:
            return
        try:
            again = rest if lost is None else self.cluster.another_try(rest, lost)
        except TurnoutError as error:
            self.whole.stop_for(error)
        else:
            self.waiting.appendleft(again)

    def _take_in(self, shard: Shard) -> pa.Table:
        path = self.folder / f"{shard.address}.parquet"
        rows = left(path)
        ingest_responses(self.warehouse, rows)
        path.unlink()
        return rows

    def _take_in_journals(self, shard: Shard) -> pa.Table:
        """Ingest what a lost attempt wrote, and leave it: if it lives on, it may write more."""
        paths = sorted(self.folder.glob(f"{shard.address}-*.jsonl"))
        rows = written_table(paths)
        ingest_responses(self.warehouse, rows)
        return rows

    def _count_failed(self, rows: pa.Table) -> None:
        reasons = rows["error"].drop_null().to_pylist()
        self.whole.fail(len(reasons), *reasons)
        self.advance(len(reasons))

    def _in_flight_usd(self, shard: Shard) -> float:
        requests = _requests(shard.rows)
        worst_usd = max(self.whole.worst_case_usd(one.prompt, len(one.missing)) for one in requests)
        return worst_usd * self.whole.llm.limits.concurrency

    def _stop(self) -> None:
        self.waiting.clear()
        self.starved.clear()
        self.stop_file.touch()


def _limited(llm: LLM, slot: int, slots: int) -> LLM:
    """Return the LLM with one slot's part of its endpoint's concurrency; its own is its own."""
    if llm.endpoint.kind == "embedded":
        return llm
    each, more = divmod(llm.limits.concurrency, slots)
    limits = llm.limits.model_copy(update={"concurrency": each + (slot < more)})
    return llm.model_copy(update={"limits": limits})


def _shard(requests: Sequence[Request], *, losses: int = 0) -> Shard:
    rows = pa.Table.from_pylist([vars(request) for request in requests], schema=REQUESTS)
    return Shard(table_digest(rows), rows, losses)


def _requests(rows: pa.Table) -> list[Request]:
    return [
        Request(row["prompt_id"], row["prompt"], tuple(row["missing"])) for row in rows.to_pylist()
    ]


def _rest(shard: Shard, rows: pa.Table) -> Shard | None:
    """Return what a shard was to ask for and ``rows`` do not hold, or None for nothing."""
    there = set(zip(rows["prompt_id"].to_pylist(), rows["sample_index"].to_pylist(), strict=True))
    requests = [
        replace(one, missing=tuple(k for k in one.missing if (one.prompt_id, k) not in there))
        for one in _requests(shard.rows)
    ]
    requests = [request for request in requests if request.missing]
    return _shard(requests, losses=shard.losses) if requests else None
