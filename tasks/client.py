"""One request to an OpenAI-compatible endpoint, and what to do when it fails.

The openai package speaks the protocol; its own retries are off, so that there is one policy, here:
rate limits, server errors, timeouts and broken bodies are tried again with growing pauses, or the
one that a Retry-After header asks for. What every other request would meet too (a refused key, an
unknown model, nobody at that address) ends the run; anything else is the request's own fault and is
final.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx  # what openai is built on
import openai

from conf.errors import EndpointError
from conf.llms import LLM
from tasks.endpoints import ServedEndpoint

RETRIED = {408, 409, 425, 429}
# A refused key or payment, a wrong path, a model that is not there: not one prompt's fault.
FATAL = {401, 402, 403, 404, 405}
CONNECT_S = 10.0
FIRST_PAUSE_S = 0.5
BYTES_PER_TOKEN = 4  # for servers that report no usage


class PermanentFailure(Exception):
    """The endpoint will never answer this request."""


class TransientFailure(Exception):
    """The endpoint may answer this request later."""

    def __init__(
        self, reason: str, *, retry_after_s: float | None = None, maybe_billed: bool = False
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.maybe_billed = maybe_billed
        """Whether the endpoint may have generated answers that never arrived."""


@dataclass(frozen=True)
class Reply:
    """What one request brought: for each answer its text, finish reason and token count."""

    texts: Sequence[str]
    finish_reasons: Sequence[str]
    prompt_tokens: int
    completion_tokens: Sequence[int]
    latency_ms: float


class Client:
    """An LLM behind its endpoint; use as an async context manager."""

    def __init__(self, llm: LLM, endpoint: ServedEndpoint) -> None:
        self.llm = llm
        self.endpoint = endpoint
        self.reached = False
        timeout_s = llm.limits.timeout_s
        self._openai = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=endpoint.api_key,
            max_retries=0,
            timeout=openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            # A proxy for the internet must not come between us and our own server.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=llm.endpoint.kind == "openai"),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._openai.close()

    async def ask_patiently(
        self,
        prompt: str,
        *,
        n: int,
        seed: int,
        stop: asyncio.Event,
        on_failure: Callable[[TransientFailure], None],
    ) -> Reply:
        """Ask, and ask again after passing troubles, as often as the limits allow until ``stop``.

        Raises PermanentFailure, TransientFailure once the tries are used up, or EndpointError when
        no other request would fare better. Each passing trouble is told to ``on_failure``.
        """
        limits = self.llm.limits
        for attempt in range(limits.retries + 1):
            try:
                return await self.ask(prompt, n=n, seed=seed)
            except TransientFailure as failure:
                on_failure(failure)
                pause_s = FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5)
                pause_s = min(max(pause_s, failure.retry_after_s or 0.0), limits.max_backoff_s)
                if attempt == limits.retries or await _is_set_within(stop, pause_s):
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    async def ask(self, prompt: str, *, n: int, seed: int) -> Reply:
        """Ask once for ``n`` answers; fewer may come. Raises as `ask_patiently`."""
        started = time.perf_counter()
        content = await self._content(prompt, n=n, seed=seed)
        latency_ms = (time.perf_counter() - started) * 1e3
        try:
            texts, finish_reasons, usage = _answers(content, n)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            said = self._clean(content[:200].decode(errors="replace"))
            raise TransientFailure(
                f"broken body ({type(error).__name__}): {said!r}", maybe_billed=True
            ) from None
        prompt_tokens = usage.get("prompt_tokens") or len(prompt.encode()) // BYTES_PER_TOKEN
        return Reply(
            texts=texts,
            finish_reasons=finish_reasons,
            prompt_tokens=prompt_tokens,
            completion_tokens=await self._token_counts(texts, finish_reasons, usage),
            latency_ms=latency_ms,
        )

    async def _content(self, prompt: str, *, n: int, seed: int) -> bytes:
        """Return the body of a successful answer as it came. Raises as `ask_patiently`."""
        try:
            response = await self._create(prompt, n=n, seed=seed)
            self.reached = True
            return response.content
        except openai.APIStatusError as error:
            self.reached = True
            raise self._failure(error) from None  # the chained request would hold the key
        except openai.APIConnectionError as error:
            raise self._lost(error) from None
        except openai.APIError as error:
            reason = self._clean(f"unreadable answer: {error}")
            raise TransientFailure(reason, maybe_billed=True) from None

    async def _create(self, prompt: str, *, n: int, seed: int) -> httpx.Response:
        decoding = self.llm.decoding
        options: dict[str, Any] = {
            "model": self.llm.model,
            "n": n,
            "seed": seed,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_tokens,
            "stop": list(decoding.stop) or openai.omit,
        }
        if not self.llm.endpoint.supports_n:
            del options["n"]  # some servers refuse the very word
        if self.llm.endpoint.api == "completions":
            completions = self._openai.completions.with_raw_response
            return (await completions.create(prompt=prompt, **options)).http_response
        messages: list[Any] = [{"role": "user", "content": prompt}]
        if self.llm.system is not None:
            messages.insert(0, {"role": "system", "content": self.llm.system})
        chat = self._openai.chat.completions.with_raw_response
        return (await chat.create(messages=messages, **options)).http_response

    def _failure(self, error: openai.APIStatusError) -> Exception:
        status = error.status_code
        said = error.message.removeprefix(f"Error code: {status} - ")
        reason = self._clean(f"HTTP {status}: {said}")[:500]
        if status in (401, 403):
            variable = self.llm.endpoint.api_key_env
            expected = (
                f"a valid key in ${variable}" if variable else "endpoint.api_key_env to be set"
            )
            return EndpointError(
                f"{self.llm.name!r} refuses the key at {self.endpoint.url} ({reason}). Expected "
                f"{expected}. Correct it and run again: what was received is kept."
            )
        if status in FATAL or error.code == "insufficient_quota":
            return EndpointError(
                f"{self.llm.name!r} at {self.endpoint.url} answers no request ({reason}). Expected "
                f"an account in credit, the model {self.llm.model!r} and the "
                f"{self.llm.endpoint.api} API there. Correct llms.{self.llm.name} and run again: "
                "what was received is kept."
            )
        if status in RETRIED or status >= 500:
            return TransientFailure(reason, retry_after_s=_retry_after_s(error.response.headers))
        return PermanentFailure(reason)

    def _lost(self, error: openai.APIConnectionError) -> Exception:
        cause = error.__cause__
        reason = self._clean(f"{type(cause).__name__} {cause}".strip())
        unconnected = isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout)
        if unconnected and not self.reached:
            return EndpointError(
                f"{self.llm.name!r} cannot be reached at {self.endpoint.url}: {reason}. Expected "
                "an OpenAI-compatible server. Start it, or correct endpoint.url; `turnout doctor` "
                "checks it."
            )
        if isinstance(error, openai.APITimeoutError) and not unconnected:
            reason = f"no answer in {self.llm.limits.timeout_s} s"
        return TransientFailure(f"connection lost: {reason}", maybe_billed=not unconnected)

    def _clean(self, text: str) -> str:
        """Remove the key, which some servers quote back."""
        key = self.endpoint.api_key
        return text.replace(key, "***") if self.llm.endpoint.api_key_env else text

    async def _token_counts(
        self, texts: Sequence[str], finish_reasons: Sequence[str], usage: Mapping[str, Any]
    ) -> list[int]:
        """Return each answer's tokens.

        llama.cpp reports the tokens of one answer when it gave several, so its tokenizer is asked,
        and the token that ends an answer added. Elsewhere the reported total is split in
        proportion to length.
        """
        if self.endpoint.counts_tokens and len(texts) > 1:
            counts = await self._tokenized(texts)
            ends = [reason == "stop" for reason in finish_reasons]
            return [tokens + end for tokens, end in zip(counts, ends, strict=True)]
        lengths = [len(text.encode()) + 1 for text in texts]
        total = usage.get("completion_tokens")
        if not isinstance(total, int):
            total = sum(lengths) // BYTES_PER_TOKEN
        sums = [0, *itertools.accumulate(lengths)]
        marks = [round(total * part / sums[-1]) for part in sums]
        return [after - before for before, after in itertools.pairwise(marks)]

    async def _tokenized(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens llama.cpp makes of each text, from one request for all of them."""
        separator = -1  # no token has it; a list of strings and tokens is answered as one list
        body = {"content": list(itertools.chain.from_iterable((t, separator) for t in texts))}
        root = self.endpoint.url.removesuffix("/v1")
        try:
            found = await self._openai.post(f"{root}/tokenize", body=body, cast_to=dict[str, Any])
        except openai.OpenAIError:  # better roughly right than to lose the answers
            return [len(text.encode()) // BYTES_PER_TOKEN + 1 for text in texts]
        counts = [0]
        for token in found["tokens"]:
            if token == separator:
                counts.append(0)
            else:
                counts[-1] += 1
        return counts[:-1]


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return event.is_set()


def _answers(content: bytes, n: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return texts, finish reasons and the usage of a body; stumbles over a broken one."""
    body = json.loads(content)
    choices = sorted(body["choices"][:n], key=lambda choice: int(choice["index"]))
    if not choices:
        raise ValueError("no choices")
    texts = [_text(choice) for choice in choices]
    return texts, [str(choice.get("finish_reason")) for choice in choices], body.get("usage") or {}


def _text(choice: Mapping[str, Any]) -> str:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError("an answer that is no text")
    # No text is an answer too: a model that thought until its tokens were spent, or a filter.
    return text or ""


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the pause that a Retry-After header asks for, as seconds or as a date."""
    header = headers.get("retry-after")
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
