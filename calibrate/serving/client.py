"""One server with the OpenAI interface: its model, its metrics, one completion at a time."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from calibrate.errors import UserError, WorkFailed

_LINE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True)
class Sample:
    """One line of a Prometheus page."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass
class Completion:
    """What a server answered to one prompt.

    Attributes:
        first_token_s: from the request to the first token [s].
        total_s: from the request to the end [s].
        prompt_tokens: length of the prompt, as the server counts it; 0: it does not say.
        generated: length of the answer, likewise.
        tokens: the answer's tokens; empty unless log-probabilities were asked for.
        logprobs: their log-probabilities [nats].
    """

    first_token_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens: int = 0
    generated: int = 0
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Server:
    """A server behind an address.

    Args:
        url: its address, with or without /v1.
        key: its API key, if it wants one.
        timeout: how long it may keep silent [s].

    Raises:
        UserError: the address is none.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"a server's address is http:// or https:// with a host and a port, not {url!r}"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._timeout = timeout

    def model(self) -> str:
        """Name of the model that it serves.

        Raises:
            UserError: nobody answers there, or not in the OpenAI interface.
        """
        with self._open("/v1/models") as answer:
            text = answer.read()
        try:
            return str(json.loads(text)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{self.url}/v1/models must list the models that it serves, as the OpenAI interface has it; "
                f"it answered {text[:80]!r}"
            ) from None

    def metrics(self) -> list[Sample] | None:
        """Its Prometheus page; None: it has none."""
        try:
            with self._open("/metrics", missing_is_fine=True) as answer:
                return parse_metrics(answer.read().decode("utf-8", "replace"))
        except _Missing:
            return None

    def complete(
        self, model: str, prompt: str, tokens: int, *, logprobs: bool = False, **more: Any
    ) -> Completion:
        """Asks for the greedy continuation of a prompt.

        Args:
            model: the model's name.
            prompt: its text.
            tokens: longest answer [tokens].
            logprobs: whether to ask for log-probabilities.
            **more: what this server understands beyond the OpenAI interface.

        Raises:
            UserError: the server refuses the request.
            WorkFailed: it fails.
        """
        asked: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        if logprobs:
            asked["logprobs"] = 1
        found = Completion()
        start = time.perf_counter()
        with self._open("/v1/completions", asked) as answer:
            for event in _events(answer, self.url):
                if "error" in event:
                    raise WorkFailed(f"{self.url} failed: {event['error']}")
                if event.get("choices") and not found.first_token_s:
                    found.first_token_s = time.perf_counter() - start
                for choice in event.get("choices") or ():
                    told = choice.get("logprobs") or {}
                    found.tokens += told.get("tokens") or ()
                    found.logprobs += told.get("token_logprobs") or ()
                usage = event.get("usage") or {}
                found.prompt_tokens = usage.get("prompt_tokens") or found.prompt_tokens
                found.generated = usage.get("completion_tokens") or found.generated
        found.total_s = time.perf_counter() - start
        if not found.first_token_s:
            raise WorkFailed(f"{self.url} answered without a single token")
        return found

    def _open(
        self, path: str, data: dict[str, Any] | None = None, missing_is_fine: bool = False
    ) -> Any:
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read().decode("utf-8", "replace").split())[:400]
            if error.code == 404 and missing_is_fine:
                raise _Missing from None
            what = f"{self.url}{path} answered {error.code}"
            if error.code in (401, 403):
                raise UserError(f"{what}: it wants its API key; give it with --api-key") from None
            if error.code == 404:
                raise UserError(
                    f"{what}: it must speak the OpenAI interface with completions; {said}"
                ) from None
            if error.code < 500:
                raise UserError(f"{what}, it refuses the request: {said}") from None
            raise WorkFailed(f"{what}: {said}") from None
        except TimeoutError:
            raise WorkFailed(f"{self.url} kept silent for {self._timeout:.0f} s") from None
        except urllib.error.URLError as error:
            raise UserError(
                f"nobody answers at {self.url} ({error.reason}); is the server up, and is this its port?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise WorkFailed(f"{self.url} broke off: {error}") from None


class _Missing(Exception):
    """The server has no such page."""


def _events(answer: Any, url: str) -> Iterator[dict[str, Any]]:
    """The JSON documents of a stream of server-sent events."""
    try:
        for line in answer:
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                return
            yield json.loads(text)
    except TimeoutError:
        raise WorkFailed(f"{url} kept silent in the middle of an answer") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WorkFailed(f"{url} broke off in the middle of an answer: {error}") from None
    raise WorkFailed(f"{url} broke off in the middle of an answer: its last event did not come")


def parse_metrics(text: str) -> list[Sample]:
    """Samples of a page in Prometheus's text format; lines of other forms are passed over."""
    found = []
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.fullmatch(line.strip())
        if match is None:
            continue
        labels = {
            name: re.sub(r"\\[\\\"n]", lambda escaped: _ESCAPED[escaped[0]], value)
            for name, value in _LABEL.findall(match[2] or "")
        }
        try:
            found.append(Sample(match[1], labels, float(match[3])))
        except ValueError:
            continue
    return found
