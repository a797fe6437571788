"""Endpoints: keys, and the embedded llama.cpp server with real weights."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_generation import generate, queries, rows

from conf.errors import ArtifactError, ConfigError, EndpointError
from conf.llms import LLM, Endpoint, Limits
from conf.load import load_experiment
from tasks.endpoints import NO_KEY, ServedEndpoint, model_identity, serving_endpoint
from tasks.warehouse import Warehouse

SMOLLM2 = load_experiment("embedded").llm("smollm2")


def remote(variable: str | None) -> LLM:
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", api_key_env=variable)
    return LLM(name="far", model="m", endpoint=endpoint)


def embedded(weights: Path) -> LLM:
    return LLM(name="near", model="m", endpoint=Endpoint(kind="embedded", weights=weights))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


def test_a_remote_endpoint_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", " sk-far\n")
    with serving_endpoint(remote("FAR_KEY")) as endpoint:
        assert (endpoint.url, endpoint.api_key) == ("http://127.0.0.1:9/v1", "sk-far")
        assert "sk-far" not in repr(endpoint)
    with serving_endpoint(remote(None)) as endpoint:
        assert endpoint.api_key == NO_KEY


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "FAR_KEY is not set.*Expected an API key.*export FAR_KEY"),
        ("  ", "FAR_KEY is not set"),
        ("sk-gehe\u00efm", "FAR_KEY.*no HTTP header can carry.*Expected printable ASCII"),
        ("sk-a\nb", "no HTTP header"),
    ],
)
def test_keys_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, key: str | None, message: str
) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("FAR_KEY", key)
    with (
        pytest.raises(ConfigError, match=message) as caught,
        serving_endpoint(remote("FAR_KEY")),
    ):
        pass
    assert "sk-" not in str(caught.value)


def test_weights_that_are_not_there_or_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none.gguf.*does not exist.*Expected a GGUF"):
        model_identity(embedded(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("no weights at all")
    with (
        pytest.raises(EndpointError, match=r"'near' did not start: .*GGUF.*Expected.*turnout doct"),
        serving_endpoint(embedded(tmp_path / "text.gguf")),
    ):
        pass


def test_the_identity_of_embedded_weights_is_their_content(tmp_path: Path) -> None:
    for name, content in {"a": "one", "b": "one", "c": "two"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (model_identity(embedded(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert model_identity(remote(None)) == "m"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedEndpoint]:
    with serving_endpoint(SMOLLM2) as endpoint:
        yield endpoint


def test_two_servers_one_after_the_other(served: ServedEndpoint) -> None:
    assert answers(served.url)
    with serving_endpoint(SMOLLM2) as other:
        assert other.url != served.url
        assert answers(other.url)
    assert not answers(other.url)
    assert answers(served.url)


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom test_endpoints import SMOLLM2\n"
        "from tasks.endpoints import serving_endpoint\n"
        "with serving_endpoint(SMOLLM2) as endpoint:\n"
        "    print(endpoint.url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert answers(url)
        process.kill()
    deadline = time.monotonic() + 20
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(url)


def test_real_answers_with_their_tokens(served: ServedEndpoint, tmp_path: Path) -> None:
    """SmolLM2 answers, its samples differ, and tokens are counted as llama.cpp counts them."""
    warehouse = Warehouse(tmp_path)
    asked = queries(warehouse, "What is the capital of France?", "What is the capital of Spain?")
    near = Endpoint(kind="openai", url=served.url)
    model = SMOLLM2.model_copy(update={"endpoint": near, "limits": Limits(concurrency=2)})
    report = generate(warehouse, asked, SMOLLM2, samples=4)
    assert (report.new, report.failed) == (8, 0)
    stored = rows(warehouse)
    assert any("Paris" in str(row["text"]) for row in stored)
    assert len({row["text"] for row in stored}) > 4
    for row in stored:
        # Asked for alone, a sample's usage is llama.cpp's own count.
        alone = _alone(served.url, model, str(row["text"]), int(str(row["seed"])))
        if alone["text"] == row["text"]:
            assert row["completion_tokens"] == pytest.approx(alone["tokens"], abs=1)
            assert row["prompt_tokens"] == alone["prompt_tokens"]
    assert max(int(str(row["completion_tokens"])) for row in stored) <= 20


def _alone(url: str, model: LLM, text: str, seed: int) -> dict[str, object]:
    country = "France" if "France" in text or "Paris" in text else "Spain"
    body = {
        "messages": [
            {"role": "system", "content": model.system},
            {"role": "user", "content": f"What is the capital of {country}?"},
        ],
        "seed": seed,
        **model.decoding.model_dump(include={"temperature", "top_p", "max_tokens"}),
    }
    request = urllib.request.Request(
        f"{url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found = json.load(response)
    return {
        "text": found["choices"][0]["message"]["content"],
        "tokens": found["usage"]["completion_tokens"],
        "prompt_tokens": found["usage"]["prompt_tokens"],
    }


def test_the_room_for_a_prompt_is_a_setting(tmp_path: Path) -> None:
    """A prompt beyond it fails for good, and is asked again once there is room."""
    warehouse = Warehouse(tmp_path)
    asked = queries(warehouse, "word " * 300)
    with pytest.raises(EndpointError, match=r"2 of 2 responses.*HTTP 400.*exceeds"):
        generate(warehouse, asked, roomy(128), samples=2)
    report = generate(warehouse, asked, roomy(512), samples=2)
    assert (report.new, report.failed) == (2, 0)
    assert {row["error"] for row in rows(warehouse)} == {None}


def roomy(context_tokens: int) -> LLM:
    # Gemma's slots have separate buffers, so that each holds no more than its own part.
    gemma = load_experiment("embedded").llm("gemma3-facts")
    endpoint = gemma.endpoint.model_copy(update={"context_tokens": context_tokens})
    return gemma.model_copy(update={"endpoint": endpoint, "template": "{text}"})
