"""Is a running server skipping, with which file, and how much of a prompt?

Our plug-in says it: its counters before and after a request are what that request visited and skipped.
Another engine says nothing, and the answers of one server alone cannot show whether it skips: the same prompt
must also go to a dense server.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibrate.errors import UserError, WorkFailed
from calibrate.serving.against import Comparison, compare
from calibrate.serving.client import Sample, Server
from calibrate.terminal import Table

VISITED = "skip_softmax_visited_tiles_total"
SKIPPED = "skip_softmax_skipped_tiles_total"
INFO = "skip_softmax_info"
WORKERS = "skip_softmax_workers"
# How long a server may take to count a request that it has answered [s].
SETTLE = 5.0


@dataclass(frozen=True)
class Serving:
    """What our plug-in says of itself.

    Attributes:
        sha256: hash of the thresholds file that is served.
        verdict: the file's verdict.
        armed_layers: layers that may skip.
        min_kv_len: per phase, the shortest request that may skip [tokens].
    """

    sha256: str
    verdict: str
    armed_layers: int
    min_kv_len: dict[str, int]


@dataclass(frozen=True)
class Tiles:
    """Tiles of one phase in one group of layers, over all heads."""

    phase: str
    layers: str
    visited: int
    skipped: int

    @property
    def sparsity(self) -> float:
        """Skipped / visited tiles; 0 where none was visited."""
        return self.skipped / self.visited if self.visited else 0.0


@dataclass
class Found:
    """What a probe found.

    Attributes:
        url: the server.
        model: what it serves.
        skipping: `on`, `off`, or `unknown`, because only our plug-in says it.
        serving: what our plug-in says of itself; None without it.
        prompt_tokens: length of the prompt that was sent; None: none was.
        generated: length of its answer.
        tiles: what that request visited and skipped; without a prompt, all requests since the server started.
        exact: whether `tiles` are those of the request alone; None: no request was sent, or nobody counts.
        against: the comparison with a dense server.
        notes: what a reader should know.
    """

    url: str
    model: str
    skipping: str
    serving: Serving | None = None
    prompt_tokens: int | None = None
    generated: int | None = None
    tiles: list[Tiles] = field(default_factory=list)
    exact: bool | None = None
    against: Comparison | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        document = asdict(self)
        document["tiles"] = [{**asdict(row), "sparsity": row.sparsity} for row in self.tiles]
        if self.against is not None:
            document["against"]["reading"] = self.against.reading
        return document

    def to_terminal(self) -> list[Table | str]:
        """As tables and lines."""
        lines: list[Table | str] = [
            f"server    {self.url}",
            f"model     {self.model}",
            f"skipping  {self.skipping}",
        ]
        if self.serving is not None:
            floors = ", ".join(f"{name} {n}" for name, n in self.serving.min_kv_len.items())
            lines += [
                f"file      sha256 {self.serving.sha256}, verdict {self.serving.verdict}",
                f"armed     {self.serving.armed_layers} layers; requests from {floors} tokens on",
            ]
        if self.tiles:
            title = (
                "Tiles of all requests since the server started"
                if self.prompt_tokens is None
                else f"Tiles of this request: {self.prompt_tokens} prompt tokens, {self.generated} generated"
            )
            rows = [
                [row.phase, row.layers, str(row.visited), str(row.skipped), percent(row.sparsity)]
                for row in (*self.tiles, *totals(self.tiles))
            ]
            lines.append(Table(title, ("phase", "layers", "visited", "skipped", "sparsity"), rows))
        if self.against is not None:
            lines.append(self.against.to_terminal(self.url))
        return lines


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.1f} %"


def totals(tiles: list[Tiles]) -> list[Tiles]:
    """Tiles of each phase, over all layers."""
    return [
        Tiles(
            phase,
            "all",
            sum(row.visited for row in tiles if row.phase == phase),
            sum(row.skipped for row in tiles if row.phase == phase),
        )
        for phase in dict.fromkeys(row.phase for row in tiles)
    ]


def between(after: list[Tiles], before: list[Tiles]) -> list[Tiles]:
    """Tiles between two readings of the same counters; what the first lacks was 0."""
    old = {(row.phase, row.layers): (row.visited, row.skipped) for row in before}
    found = []
    for row in after:
        visited, skipped = old.get((row.phase, row.layers), (0, 0))
        found.append(Tiles(row.phase, row.layers, row.visited - visited, row.skipped - skipped))
    return found


def probe(
    server: Server,
    prompt: str | None = None,
    *,
    tokens: int = 32,
    against: Server | None = None,
    repeats: int = 5,
) -> Found:
    """Asks a running server whether it skips.

    Args:
        server: whom to ask.
        prompt: a prompt to send; None: nothing is sent.
        tokens: longest answer [tokens].
        against: a dense server of the same model, to compare with; it needs a prompt.
        repeats: how many times both answer.

    Raises:
        UserError: an address, key or prompt is wrong, or a server refuses the request.
        WorkFailed: a server fails.
    """
    model = server.model()
    page = server.metrics()
    serving = _serving(page or [])
    skipping = "unknown" if serving is None else "on" if serving.armed_layers else "off"
    found = Found(server.url, model, skipping, serving)
    if serving is not None and page is not None:
        if prompt is None:
            found.tiles = _tiles(page)
        else:
            _count(found, server, page, prompt, tokens)
    if against is not None:
        if prompt is None:
            raise UserError("a comparison needs a prompt; give one with --prompt FILE")
        found.against = compare(server, against, prompt, tokens, repeats)
    elif serving is None:
        found.notes.append(
            "this server does not say whether it skips, and its answers alone cannot show it; give a dense "
            "server of the same model with --against URL"
        )
    return found


def read_prompt(path: Path) -> str:
    """The prompt in a text file.

    Raises:
        UserError: it cannot be read as text, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` must be a text file in UTF-8: {error}") from None
    if not text.strip():
        raise UserError(f"`{path}` must hold a prompt, but it is empty")
    return text


def check_file(found: Found, path: Path) -> None:
    """Compares the file that is served with the one that should be.

    Raises:
        UserError: the file cannot be read.
        WorkFailed: another is served, or the server does not say which.
    """
    try:
        wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}") from None
    if found.serving is None:
        raise WorkFailed(f"{found.url} does not say which thresholds file it serves")
    if found.serving.sha256 != wanted:
        raise WorkFailed(
            f"{found.url} serves another file than `{path}`: sha256 {found.serving.sha256}, not {wanted}"
        )


def _serving(page: list[Sample]) -> Serving | None:
    told = [sample.labels for sample in page if sample.name == INFO]
    if not told and _total(page, WORKERS):
        raise WorkFailed(
            "the server has the plug-in, but none of its workers answers; its log says why"
        )
    if not told:
        return None
    if len(told) > 1:
        raise WorkFailed(
            f"one server must serve one thresholds file, but its workers name {len(told)}; restart it"
        )
    labels = told[0]
    try:
        floors = {
            phase: int(labels[f"min_kv_len_{phase}"])
            for phase in ("prefill", "decode")
            if labels.get(f"min_kv_len_{phase}")
        }
        return Serving(
            labels["thresholds_sha256"], labels["verdict"], int(labels["armed_layers"]), floors
        )
    except (KeyError, ValueError) as error:
        raise WorkFailed(
            f"the server's `{INFO}` is not of this version ({error}); probe with the version it runs"
        ) from None


def _tiles(page: list[Sample]) -> list[Tiles]:
    """Tiles on a page."""

    def counts(name: str) -> dict[tuple[str, str], int]:
        rows = [sample for sample in page if sample.name == name]
        return {(row.labels["phase"], row.labels["layers"]): round(row.value) for row in rows}

    visited, skipped = counts(VISITED), counts(SKIPPED)
    return [Tiles(*key, visited[key], skipped[key]) for key in visited]


def _total(page: list[Sample], name: str, **labels: str) -> float:
    return sum(
        sample.value
        for sample in page
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _count(found: Found, server: Server, before: list[Sample], prompt: str, tokens: int) -> None:
    """Sends one prompt, and reads the counters around it."""
    answer = server.complete(found.model, prompt, tokens, cache_salt=secrets.token_hex(8))
    found.prompt_tokens, found.generated = answer.prompt_tokens, answer.generated
    wanted = {
        "vllm:prompt_tokens_total": answer.prompt_tokens,
        "vllm:generation_tokens_total": answer.generated,
    }
    deadline = time.monotonic() + SETTLE
    while True:
        after = server.metrics() or []
        grown = {name: _total(after, name) - _total(before, name) for name in wanted}
        if all(grown[name] >= wanted[name] for name in wanted) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    found.tiles = between(_tiles(after), _tiles(before))
    busy = [_total(page, "vllm:num_requests_running") for page in (before, after)]
    silent = [_total(page, WORKERS, state="silent") for page in (before, after)]
    found.exact = grown == wanted and not any(busy) and not any(silent)
    if any(silent):
        found.notes.append(
            f"{max(silent):.0f} workers did not answer: their tiles are missing from the counts"
        )
    elif not found.exact:
        found.notes.append(
            "the counts are not of this request alone: the server computed {:.0f} prompt and {:.0f} "
            "generated tokens, this request had {} and {}; probe it while it is idle".format(
                *grown.values(), *wanted.values()
            )
        )
    assert found.serving is not None
    floors = found.serving.min_kv_len
    lengths = {"prefill": answer.prompt_tokens, "decode": answer.prompt_tokens + answer.generated}
    for phase, floor in floors.items():
        if lengths[phase] < floor:
            found.notes.append(
                f"{phase} is dense here: the file lets requests skip from {floor} tokens on, and this one "
                f"has {lengths[phase]}"
            )
