"""Where an LLM answers: a remote OpenAI-compatible server, or a llama.cpp server started here."""

import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from conf.errors import ArtifactError, ConfigError, EndpointError
from conf.llms import LLM
from router_models.packaged import file_digest, gemma_gguf, smollm2_gguf
from tasks import llama_server

WEIGHTS: dict[str, Callable[[], Path]] = {
    "smollm2-135m": smollm2_gguf,
    "gemma3-270m": gemma_gguf,
}
NO_KEY = "none"  # the openai client insists on one
SLOTS = 20  # sequences that the embedded server decodes together
START_S = 120.0  # longest wait for the weights to load
STOP_S = 20.0
# One key-value buffer for all slots is faster for SmolLM2 (15 against 9 responses a second), and
# slower for Gemma (4.5 against 7.8).
SEPARATE_BUFFERS = {"gemma3-270m"}


@dataclass(frozen=True)
class ServedEndpoint:
    """An endpoint that answers now."""

    url: str
    api_key: str = field(repr=False)
    counts_tokens: bool
    """Whether the server has llama.cpp's /tokenize."""
    most_samples: int
    """Samples that one request may ask for."""


@contextmanager
def serving_endpoint(llm: LLM) -> Iterator[ServedEndpoint]:
    """Yield where ``llm`` answers, starting and stopping a server for embedded weights.

    Raises ConfigError when the key's environment variable is not set, ArtifactError when weights
    are missing, EndpointError when the server does not start.
    """
    if llm.endpoint.kind == "openai":
        yield ServedEndpoint(
            str(llm.endpoint.url), api_key(llm), counts_tokens=False, most_samples=128
        )
        return
    options = {
        "weights": str(weights_file(llm)),
        "slots": SLOTS,
        "slot_tokens": llm.endpoint.context_tokens,
        "threads": len(os.sched_getaffinity(0)),
        "kv_unified": str(llm.endpoint.weights) not in SEPARATE_BUFFERS,
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        process = _start(options, complaints)
        try:
            url = _address(process)
            if url is None:
                process.kill()
                process.wait()
                reason = _complaint(complaints)
                raise EndpointError(
                    f"The embedded server for {llm.name!r} did not start: {reason}. Expected GGUF "
                    f"weights that llama.cpp reads in {options['weights']}, and memory for them. "
                    "Run `turnout doctor`."
                )
            yield ServedEndpoint(f"{url}/v1", NO_KEY, counts_tokens=True, most_samples=SLOTS)
        finally:
            _stop(process)


def _start(options: dict[str, object], complaints: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", llama_server.__file__, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        start_new_session=True,  # Ctrl-C is the caller's to handle: answers still arrive
    )


def _address(process: subprocess.Popen[str]) -> str | None:
    """Return the server's URL, or None when it ends, or takes too long, before it answers."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        if not ready.select(START_S):
            return None
    line = process.stdout.readline()
    return str(json.loads(line)["url"]) if line else None


def _stop(process: subprocess.Popen[str]) -> None:
    """Let the server end by itself, or make it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _complaint(complaints: IO[str]) -> str:
    """Return what llama.cpp complained of first, or else the last thing that was said."""
    complaints.seek(0)
    lines = [line.strip() for line in complaints if line.strip()]
    # Its log is written by a thread of its own and may follow Python's traceback.
    errors = [line.partition(" E ")[2] for line in lines if re.match(r"[\d.]+ E ", line)]
    return " / ".join(errors[:2] or lines[-1:]) or "it gave no reason"


def api_key(llm: LLM) -> str:
    """Return the key from the environment; it goes into no table, log or artifact."""
    name = llm.endpoint.api_key_env
    if name is None:
        return NO_KEY
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"The environment variable {name} is not set, from which {llm.name!r} takes its key. "
            f"Expected an API key in it. Run `export {name}=…` first."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"The environment variable {name}, from which {llm.name!r} takes its key, holds "
            "characters that no HTTP header can carry. Expected printable ASCII. Copy the key anew."
        )
    return key


def weights_file(llm: LLM) -> Path:
    """Return the GGUF file of an embedded LLM; raises ArtifactError if it is not there."""
    weights = str(llm.endpoint.weights)
    path = WEIGHTS[weights]() if weights in WEIGHTS else Path(weights)
    if not path.is_file():
        raise ArtifactError(
            f"{path}, the weights of {llm.name!r}, does not exist. Expected a GGUF file, or one "
            f"of {', '.join(WEIGHTS)}. Correct endpoint.weights."
        )
    return path


def model_identity(llm: LLM) -> str:
    """Return what stands for the model in a response's address.

    That is its name, or for an embedded one the digest of its weights and llama.cpp's sampling.
    """
    if llm.endpoint.kind == "openai":
        return llm.model
    sampling = ",".join(f"{name}={value}" for name, value in llama_server.SAMPLING.items())
    return f"{file_digest(weights_file(llm))} {sampling}"
