"""One LLM being asked: a few workers, what they spend, and what stops them.

Money is set aside for a request before it is sent, at the most it can cost, so that no budget is
passed however the requests in flight turn out. Once something stops the run, nothing more is asked
and what is in flight is still received.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from conf.errors import BudgetError, EndpointError, TurnoutError
from conf.llms import LLM, Generation
from tasks.client import Client, PermanentFailure, Reply, TransientFailure
from tasks.endpoints import ServedEndpoint
from tasks.journal import Row

PROMPT_OVERHEAD_TOKENS = 50  # what chat templates add
EXAMPLES = 3  # reasons that an error message quotes


@dataclass(frozen=True)
class Request:
    """What one prompt still lacks."""

    prompt_id: str
    prompt: str
    missing: tuple[int, ...]
    """Sample indices without a response."""


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Return the seed of one sample of one prompt; consecutive samples have consecutive seeds.

    A server counts on from a request's seed by itself, so a sample has the same seed however many
    share its request. Two prompts share none: their answers' noise would be alike. Fits 32 bits.
    """
    drawn = hashlib.sha256(f"{seed} {prompt_id}".encode()).digest()
    return (int.from_bytes(drawn[:4]) >> 2) + sample_index


@dataclass
class Asking:
    """One LLM being asked: a few workers, what they have spent, and what stops them."""

    llm: LLM
    settings: Generation
    total: int
    spent_usd: float
    requests: int = 0
    received: int = 0
    failed: int = 0
    billed_usd: float = 0.0
    reserved_usd: float = 0.0
    """The most that the requests in flight can cost."""
    lost_usd: float = 0.0
    """The most that requests can have cost whose answers never arrived."""
    examples: list[str] = field(default_factory=list)
    stopped_by: TurnoutError | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask_all(
        self,
        endpoint: ServedEndpoint,
        requests: Sequence[Request],
        write: Callable[[Sequence[Row]], None],
        advance: Callable[[int], None],
    ) -> None:
        """Work through ``requests``; once something stops it, finish what is in flight."""
        waiting = iter(requests)

        async def work(client: Client) -> None:
            for request in waiting:
                for asked in self._parts(request, endpoint.most_samples):
                    if self.stopped_by is None:
                        await self._ask(client, asked, write, advance)

        async with Client(self.llm, endpoint) as client:
            await asyncio.gather(*(work(client) for _ in range(self.llm.limits.concurrency)))

    def _parts(self, request: Request, most_samples: int) -> list[Request]:
        """Return the request in parts of as many samples as may share one."""
        size = most_samples if self.llm.endpoint.supports_n else 1
        parts = [request.missing[k : k + size] for k in range(0, len(request.missing), size)]
        return [Request(request.prompt_id, request.prompt, part) for part in parts]

    async def _ask(
        self,
        client: Client,
        request: Request,
        write: Callable[[Sequence[Row]], None],
        advance: Callable[[int], None],
    ) -> None:
        """Ask until every sample has arrived, failed, or the run is stopped."""
        missing = list(request.missing)
        while missing and self.stopped_by is None:
            seed = request_seed(self.llm.decoding.seed, request.prompt_id, missing[0])
            worst_usd = self.worst_case_usd(request.prompt, len(missing))
            if not self._reserve(worst_usd):
                return
            self.requests += 1
            try:
                reply = await client.ask_patiently(
                    request.prompt,
                    n=len(missing),
                    seed=seed,
                    stop=self.stop,
                    on_failure=partial(self._lose, worst_usd),
                )
            except PermanentFailure as failure:
                write([self._row(request, k, error=str(failure)) for k in missing])
                self.fail(len(missing), str(failure))
                advance(len(missing))
                return
            except TransientFailure as failure:
                self.fail(len(missing), str(failure))
                advance(len(missing))
                return
            except EndpointError as error:
                self.stop_for(error)
                return
            finally:
                self.reserved_usd -= worst_usd
            rows = self._rows(request, missing, reply)
            write(rows)
            self.received += len(rows)
            self.billed_usd += sum(row["billed_usd"] for row in rows)
            advance(len(rows))
            missing = missing[len(rows) :]  # some servers give fewer answers than asked for

    def _rows(self, request: Request, missing: Sequence[int], reply: Reply) -> list[Row]:
        prices, answers = self.llm.prices, len(reply.texts)
        return [
            self._row(
                request,
                k,
                text=text,
                finish_reason=reason,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=tokens,
                billed_usd=prices.cost_usd(reply.prompt_tokens / answers, tokens),
                latency_ms=reply.latency_ms,
            )
            for k, text, reason, tokens in zip(
                missing, reply.texts, reply.finish_reasons, reply.completion_tokens, strict=False
            )
        ]

    def _row(self, request: Request, sample_index: int, **columns: object) -> Row:
        return {
            "prompt_id": request.prompt_id,
            "sample_index": sample_index,
            "llm": self.llm.name,
            "seed": request_seed(self.llm.decoding.seed, request.prompt_id, sample_index),
            "created_at": datetime.now(UTC).isoformat(),
            **columns,
        }

    def worst_case_usd(self, prompt: str, samples: int) -> float:
        """Return the most that so many samples of a prompt can cost, in one request."""
        # Every token covers at least one byte, whatever the tokenizer.
        prompt_tokens = len((prompt + (self.llm.system or "")).encode()) + PROMPT_OVERHEAD_TOKENS
        return self.llm.prices.cost_usd(prompt_tokens, samples * self.llm.decoding.max_tokens)

    def _reserve(self, worst_usd: float) -> bool:
        """Set money aside for a request, or stop the run if the budget may not hold it."""
        self.reserved_usd += worst_usd
        if self._within_budget(worst_usd):
            return True
        self.reserved_usd -= worst_usd
        return False

    def _lose(self, worst_usd: float, failure: TransientFailure) -> None:
        """Count a request as paid whose answers may have been generated, but never arrived."""
        if failure.maybe_billed:
            self.lost_usd += worst_usd
            self._within_budget(worst_usd)

    def _within_budget(self, worst_usd: float) -> bool:
        """Tell whether the budget holds all that is spent or in flight, and stop if it does not."""
        budget_usd = self.settings.budget_usd
        spent_usd = self.spent_usd + self.billed_usd + self.lost_usd
        if budget_usd is None or spent_usd + self.reserved_usd <= budget_usd:
            return True
        self.stop_for(
            BudgetError(
                f"Asking {self.llm.name!r} stopped at {spent_usd:.6f} USD: the next request could "
                f"cost {worst_usd:.6f} USD. Expected the run to stay within budget_usd = "
                f"{budget_usd:g}. Raise generation.budget_usd, or ask less; what was received is "
                "kept."
            )
        )
        return False

    def stop_for(self, error: TurnoutError) -> None:
        """Let the requests in flight end, and ask nothing more; the first reason counts."""
        self.stopped_by = self.stopped_by or error
        self.stop.set()

    def fail(self, responses: int, *reasons: str) -> None:
        """Count failed responses, and stop once they are too many for the rest to make up for."""
        self.failed += responses
        self.examples = list(dict.fromkeys([*self.examples, *reasons]))[:EXAMPLES]
        if self.failed > self.settings.max_failure_share * self.total:
            self.stop_for(
                EndpointError(
                    f"{self.failed} of {self.total} responses of {self.llm.name!r} failed, such "
                    f"as: {'; '.join(self.examples)}. Expected at most "
                    f"{self.settings.max_failure_share:.0%}. See to the endpoint and run again: "
                    "what was received is kept. Or raise generation.max_failure_share."
                )
            )
