"""A real HTTP server that speaks OpenAI's protocol and misbehaves on request.

In a test:

    with ScriptedLLM(steps=[Step(status=429, headers={"Retry-After": "1"})]) as llm:
        ...                     # llm.url; what was asked and answered stands in llm.log

As a process: `python tests/scripted_llm.py --port-file F --log F`; the port is written to one file
when the server listens, and one JSON line for each request to the other when it was answered.

Each request takes the next of ``steps``; when none are left it is answered well. A prompt may also
script its own request, which works from other processes: `[[status=400]]`, `[[delay_s=0.5]]`,
`[[choices=1]]` (fewer answers than asked for), `[[disconnect=1]]`, `[[body=text]]`.
"""

import argparse
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """How one request is treated."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    """Sent as it is in place of what the protocol asks for."""
    delay_s: float = 0.0
    choices: int | None = None
    """Answers given, where fewer than asked for."""
    disconnect: bool = False
    """Announce a longer body than is sent, and hang up."""
    usage: bool = True
    code: str | None = None
    """The error's code, such as insufficient_quota."""


@dataclass(frozen=True)
class Entry:
    """One request that was answered: to the end, unless its step hung up."""

    path: str
    prompt: str
    system: str | None
    n: int
    seed: int | None
    status: int
    body: Json
    authorization: str | None


def default_answer(prompt: str, sample: int) -> str:
    """Return an answer that tells prompt and sample; sample is the seed plus its position."""
    return f"answer {sample} to {prompt}"


class ScriptedLLM:
    """The server; starts on entering, stops on leaving."""

    def __init__(
        self,
        *,
        steps: Sequence[Step] = (),
        answer: Callable[[str, int], str] = default_answer,
        key: str | None = None,
        delay_s: float = 0.0,
        log_file: Path | None = None,
        port: int = 0,
    ) -> None:
        self.steps = deque(steps)
        self.answer = answer
        self.key = key
        self.delay_s = delay_s
        self.log: list[Entry] = []
        self.log_file = log_file
        self.in_flight = 0
        self.most_in_flight = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.llm = self
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ScriptedLLM":
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve_forever(self) -> None:
        """Serve in this thread until the process ends."""
        self._server.serve_forever()

    def answers(self) -> int:
        """Return how many answers were given in all."""
        return sum(len(entry.body.get("choices", ())) for entry in self.log)

    def next_step(self, prompt: str) -> Step:
        with self._lock:
            step = self.steps.popleft() if self.steps else Step(delay_s=self.delay_s)
        for name, value in re.findall(r"\[\[(\w+)=([^\]]*)\]\]", prompt):
            parsed: Any = value if name in ("body", "code") else float(value)
            if name in ("status", "choices", "disconnect"):
                parsed = int(value)
            step = replace(step, **{name: parsed})
        return step

    def count_in(self) -> None:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def count_out(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def record(self, entry: Entry) -> None:
        with self._lock:
            self.log.append(entry)
            if self.log_file is not None:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(vars(entry), ensure_ascii=False) + "\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    llm: ScriptedLLM


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one piece
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Keep standard error clean."""

    def do_GET(self) -> None:
        if self.path.endswith("/models"):
            models = [{"id": "scripted", "object": "model", "created": 0, "owned_by": "tests"}]
            self._send(200, {"object": "list", "data": models})
        else:
            self._send(200, {"status": "ok"})

    def do_POST(self) -> None:
        llm = self.server.llm
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, system = _prompt(asked)
        llm.count_in()
        try:
            step = llm.next_step(prompt)
            time.sleep(step.delay_s)
            status, body = self._respond(step, asked, prompt)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up; nothing was received
            return
        finally:
            llm.count_out()
        llm.record(
            Entry(
                path=self.path,
                prompt=prompt,
                system=system,
                n=asked.get("n") or 1,
                seed=asked.get("seed"),
                status=status,
                body=body,
                authorization=self.headers.get("Authorization"),
            )
        )

    def _respond(self, step: Step, asked: Json, prompt: str) -> tuple[int, Json]:
        llm = self.server.llm
        authorization = self.headers.get("Authorization")
        if llm.key is not None and authorization != f"Bearer {llm.key}":
            return self._send(401, _error(401, f"Incorrect API key provided: {authorization}"))
        if step.status != 200:
            message = step.body or f"scripted failure (your key was {authorization})"
            return self._send(step.status, _error(step.status, message, step.code), step.headers)
        body = self._completion(step, asked, prompt)
        if step.body is not None:
            self._send_bytes(200, step.body.encode(), step.headers)
            return 200, {}
        if step.disconnect:
            self._send_bytes(200, json.dumps(body).encode(), step.headers, missing=100)
            self.close_connection = True
            return 200, {}
        if asked.get("stream"):
            return self._stream(body)
        return self._send(200, body, step.headers)

    def _completion(self, step: Step, asked: Json, prompt: str) -> Json:
        n, seed = asked.get("n") or 1, asked.get("seed") or 0
        texts = [self.server.llm.answer(prompt, seed + k) for k in range(n)]
        texts = texts if step.choices is None else texts[: step.choices]
        chat = self.path.endswith("/chat/completions")
        body: Json = {
            "id": "scripted",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": asked.get("model"),
            "choices": [_choice(text, k, chat=chat) for k, text in enumerate(texts)],
        }
        if step.usage:
            tokens = sum(len(text.split()) for text in texts)
            asked_tokens = len(json.dumps(asked.get("messages") or prompt).split())
            body["usage"] = {
                "prompt_tokens": asked_tokens,
                "completion_tokens": tokens,
                "total_tokens": asked_tokens + tokens,
            }
        return body

    def _stream(self, body: Json) -> tuple[int, Json]:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for chunk in _chunks(body):
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.wfile.flush()
        self.close_connection = True
        return 200, body

    def _send(
        self, status: int, body: Json, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Json]:
        self._send_bytes(status, json.dumps(body).encode(), headers or {})
        return status, body

    def _send_bytes(
        self, status: int, content: bytes, headers: Mapping[str, str], *, missing: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) + missing))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def _prompt(asked: Json) -> tuple[str, str | None]:
    if "messages" not in asked:
        return str(asked.get("prompt", "")), None
    system = [message["content"] for message in asked["messages"] if message["role"] == "system"]
    return asked["messages"][-1]["content"], system[0] if system else None


def _choice(text: str, index: int, *, chat: bool) -> Json:
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": index, "finish_reason": "stop", "logprobs": None, **content}


def _chunks(body: Json) -> list[Json]:
    """Return a body as stream events: each answer word by word, then its finish reason."""
    common = {**body, "object": "chat.completion.chunk"}
    common.pop("usage", None)
    chunks = []
    for choice in body["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        for part in re.findall(r"\s*\S+", text):
            piece: Json = {"delta": {"content": part}} if "message" in choice else {"text": part}
            event = {"index": choice["index"], "finish_reason": None, **piece}
            chunks.append({**common, "choices": [event]})
        end: Json = {"delta": {}} if "message" in choice else {"text": ""}
        event = {"index": choice["index"], "finish_reason": "stop", **end}
        chunks.append({**common, "choices": [event]})
    return chunks


def _error(status: int, message: str, code: str | None = None) -> Json:
    return {"error": {"message": message, "type": "scripted", "code": code or status}}


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-s", type=float, default=0.0, help="pause before every answer")
    parser.add_argument("--key", default=None, help="the only API key that is accepted")
    arguments = parser.parse_args()
    llm = ScriptedLLM(
        key=arguments.key,
        delay_s=arguments.delay_s,
        log_file=arguments.log,
        port=arguments.port,
    )
    unfinished = arguments.port_file.with_suffix(".tmp")
    unfinished.write_text(str(llm.port))
    unfinished.rename(arguments.port_file)
    llm.serve_forever()


if __name__ == "__main__":
    main()
