"""A small HTTP server that answers as an inference server does, with planted counts and times."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["to", "be", "or", "not"]
INFO = {
    "thresholds_sha256": "ab" * 32,
    "verdict": "passed",
    "armed_layers": "3",
    "min_kv_len_prefill": "4",
    "min_kv_len_decode": "6",
}


@dataclass
class Planted:
    """What the server does.

    Attributes:
        info: labels of the plug-in's info; empty: no worker answers; None: a server without it.
        per_request: visited and skipped tiles that a request adds, by phase and layers.
        prompt_tokens: what it says a prompt has.
        others: tokens that other requests compute meanwhile.
        running: requests that are running.
        silent: workers that do not answer.
        late: pages of metrics that do not know the last request yet.
        delay: before the first token [s].
        logprobs: of the answer's tokens [nats]; a function of the number of requests so far.
        words: the answer.
        counts: whether there is a page of metrics.
        status: of the answer to a completion.
        breaks: the stream ends before its last event.
        key: the key that it wants.
    """

    info: dict[str, str] | None = None
    per_request: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    prompt_tokens: int = 10
    others: int = 0
    running: int = 0
    silent: int = 0
    late: int = 0
    delay: float = 0.0
    logprobs: Callable[[int], list[float]] = lambda _: [-0.5, -0.25, -0.125, -1.0]
    words: list[str] = field(default_factory=lambda: list(WORDS))
    counts: bool = True
    status: int = 200
    breaks: bool = False
    key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    _behind: int = 0

    def page(self) -> str:
        """The page of metrics."""
        known = len(self.requests)
        if known and self._behind:
            self._behind -= 1
            known -= 1
        lines = [
            "# HELP vllm:prompt_tokens_total Number of prefill tokens processed.",
            f'vllm:prompt_tokens_total{{engine="0",model_name="m"}} {known * self.prompt_tokens:.1f}',
            f'vllm:generation_tokens_total{{engine="0"}} {known * (len(self.words) + self.others):.1f}',
            f'vllm:num_requests_running{{engine="0"}} {self.running:.1f}',
        ]
        if self.info is not None:
            labels = ",".join(f'{name}="{value}"' for name, value in self.info.items())
            lines += [f"skip_softmax_info{{{labels}}} 1.0"] if labels else []
            lines += [f'skip_softmax_workers{{state="silent"}} {self.silent:.1f}']
            for (phase, layers), (visited, skipped) in self.per_request.items():
                where = f'{{layers="{layers}",phase="{phase}"}}'
                # 1e6 tiles were there before.
                lines += [f"skip_softmax_visited_tiles_total{where} {1e6 + known * visited!r}"]
                lines += [f"skip_softmax_skipped_tiles_total{where} {known * skipped:.1f}"]
        return "\n".join(lines) + "\n"


@contextmanager
def serving(planted: Planted, port: int = 0) -> Iterator[Planted]:
    """Runs it on a port, or on a free one; its address is in `url`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def allowed(self) -> bool:
            return planted.key in (None, self.headers.get("Authorization", "").split(" ")[-1])

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.reply(*((200, planted.page().encode()) if planted.counts else (404, b"")))
            elif not self.allowed():
                self.reply(401, b"unauthorized")
            elif self.path == "/v1/models":
                self.reply(200, json.dumps({"data": [{"id": "m"}]}).encode())
            else:
                self.reply(404, b"not here")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions" or planted.status != 200:
                self.reply(planted.status, b'{"message": "the prompt is too long"}')
                return
            time.sleep(planted.delay)
            values = planted.logprobs(len(planted.requests))
            self.send_response(200)
            self.end_headers()
            for word, value in zip(planted.words, values, strict=True):
                choice: dict[str, Any] = {"text": word}
                if asked.get("logprobs"):
                    choice["logprobs"] = {"tokens": [word], "token_logprobs": [value]}
                self.event({"choices": [choice]})
            if planted.breaks:
                return
            generated = len(planted.words)
            planted.requests.append(asked)
            planted._behind = planted.late
            usage = {"prompt_tokens": planted.prompt_tokens, "completion_tokens": generated}
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def event(self, data: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that gave up

    server = Quiet(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    planted.url = f"http://{server.server_address[0]}:{server.server_port}"
    try:
        yield planted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
