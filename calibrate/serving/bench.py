"""A dense and a calibrated server of one model, in turn, under the same load of `vllm bench serve`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import UserError, WorkFailed
from calibrate.record.files import write_output
from calibrate.serving.client import Server
from calibrate.serving.probe import Tiles, between, percent, probe, totals
from calibrate.terminal import Table
from skip_softmax.thresholds.file import Thresholds

RESULT = "serving.json"
# What a user does not say otherwise. Random prompts skip what random prompts skip: measure with your own.
LOAD = (
    "--dataset-name random --random-input-len 8192 --random-output-len 128 --num-prompts 32 --num-warmups 2 "
    "--ignore-eos --temperature 0 --seed 0 --percentile-metrics ttft,tpot,itl,e2el"
)
# The numbers of vLLM's result that are shown: name, heading, unit, whether more is better.
SHOWN = (
    ("median_ttft_ms", "TTFT, median", "ms", False),
    ("p99_ttft_ms", "TTFT, 99 %", "ms", False),
    ("median_tpot_ms", "TPOT, median", "ms", False),
    ("p99_tpot_ms", "TPOT, 99 %", "ms", False),
    ("request_throughput", "requests", "1/s", True),
    ("output_throughput", "output", "tokens/s", True),
    ("total_token_throughput", "input and output", "tokens/s", True),
    ("request_goodput", "goodput", "1/s", True),
)
HOST = "127.0.0.1"
DENSE, CALIBRATED = "dense", "calibrated"


@dataclass(frozen=True)
class Measured:
    """Both servers under the same load.

    Attributes:
        model: what they served.
        thresholds: the calibrated server's file.
        sha256: hash of that file, as the server says it.
        serve: options of both servers.
        load: options of `vllm bench serve`, for both.
        tiles: what the calibrated server visited and skipped under the load.
        results: by server, vLLM's own result.
    """

    model: str
    thresholds: str
    sha256: str
    serve: list[str]
    load: list[str]
    tiles: list[Tiles]
    results: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return {
            "model": self.model,
            "thresholds": self.thresholds,
            "sha256": self.sha256,
            "serve": self.serve,
            "load": self.load,
            "tiles": [
                {"phase": row.phase, "visited": row.visited, "skipped": row.skipped}
                for row in self.tiles
            ],
            "results": self.results,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """Reads what `to_json` wrote."""
        tiles = [
            Tiles(row["phase"], "all", row["visited"], row["skipped"]) for row in data["tiles"]
        ]
        return cls(
            data["model"], data["thresholds"], data["sha256"], list(data["serve"]),
            list(data["load"]), tiles, dict(data["results"]),
        )  # fmt: skip

    def to_table(self) -> Table:
        """Both servers side by side; a ratio above 1 is in favour of the calibrated one."""
        dense, calibrated = self.results[DENSE], self.results[CALIBRATED]
        rows = []
        for name, heading, unit, more_is_better in SHOWN:
            one, other = dense.get(name), calibrated.get(name)
            if one is None or other is None:
                continue
            better, worse = (other, one) if more_is_better else (one, other)
            ratio = f"{better / worse:.2f}×" if worse else "–"
            rows.append([f"{heading} [{unit}]", f"{one:.4g}", f"{other:.4g}", ratio])
        skipped = ", ".join(
            f"{percent(row.sparsity)} of {row.phase} tiles" for row in self.tiles if row.visited
        )
        return Table(
            f"A dense and a calibrated server of {self.model} under the same load",
            ("", DENSE, CALIBRATED, "ratio"),
            rows,
            notes=(
                f"skipped under this load: {skipped or 'nothing was visited'}; thresholds file "
                f"{self.sha256[:12]}",
                f"{dense['completed']} requests with {dense['total_input_tokens']} input and "
                f"{dense['total_output_tokens']} output tokens; a ratio above 1 is in favour of the "
                "calibrated server",
            ),
        )


def read_measured(folder: Path) -> Measured | None:
    """What a folder holds of an earlier measurement; None: nothing.

    Raises:
        UserError: the file there is none of ours.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return Measured.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"`{path}` must be what `calibrate serve-bench` wrote: {error}") from None


def measure(
    model: str,
    thresholds: Path,
    folder: Path,
    *,
    serve: str = "",
    load: str = "",
    allow: Sequence[str] = (),
    say: Callable[[str], None],
) -> Measured:
    """Serves a model dense and calibrated, and measures both under the same load.

    Args:
        model: folder or hub id.
        thresholds: the calibrated server's file.
        folder: where the result, the servers' logs and vLLM's own results go.
        serve: more options of `vllm serve`, for both.
        load: more options of `vllm bench serve`, for both; they replace those of `LOAD`.
        allow: what the plug-in should accept all the same.
        say: where it says what it does.

    Returns:
        The result, which is also in `folder`.

    Raises:
        UserError: vLLM is not installed, or the file is none.
        WorkFailed: a server or the load fails, or the two did not do the same work.
    """
    Thresholds.load(thresholds)
    command = _command()
    folder.mkdir(parents=True, exist_ok=True)
    options = shlex.split(serve)
    asked = [*shlex.split(LOAD), *shlex.split(load)]
    section: dict[str, Any] = {"thresholds": str(thresholds.resolve()), "allow": list(allow)}
    ours = [
        "--attention-backend", "CUSTOM", "--additional-config", json.dumps({"skip_softmax": section})
    ]  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    tiles: list[Tiles] = []
    sha256 = ""
    for name, more in ((DENSE, []), (CALIBRATED, ours)):
        say(f"{name}: starting the server")
        log = folder / f"serving-{name}.log"
        with serving([*command, "serve", model, *options, *more], log) as server:
            before = probe(server)
            say(f"{name}: measuring")
            results[name] = _loaded(command, model, server, asked, folder / f"serving-{name}.json")
            after = probe(server)
        if name == CALIBRATED:
            if after.serving is None:
                raise WorkFailed(
                    f"the calibrated server does not say that it serves `{thresholds}`; its log is {log}"
                )
            sha256 = after.serving.sha256
            tiles = totals(between(after.tiles, before.tiles))
    work = {
        name: [row["completed"], row["total_input_tokens"], row["total_output_tokens"]]
        for name, row in results.items()
    }
    if work[DENSE] != work[CALIBRATED]:
        raise WorkFailed(
            "both servers must do the same work, but requests, input and output tokens were "
            f"{work[DENSE]} and {work[CALIBRATED]}; use --ignore-eos, and a load that both can take"
        )
    found = Measured(model, str(thresholds), sha256, options, asked, tiles, results)
    write_output(folder / RESULT, json.dumps(found.to_json(), indent=2) + "\n")
    return found


def _command() -> list[str]:
    """VLLM's command: of this Python's environment, or else the first on the path."""
    here = Path(sys.executable).with_name("vllm")
    found = str(here) if here.exists() else shutil.which("vllm")
    if found is None:
        raise UserError(
            "vLLM must be installed to serve; install it with the extra [vllm]: "
            "pip install 'skip-softmax-calibrate[vllm]'"
        )
    return [found]


def _loaded(
    command: Sequence[str], model: str, server: Server, asked: Sequence[str], result: Path
) -> dict[str, Any]:
    """Runs the load on a server; what vLLM measured."""
    result.unlink(missing_ok=True)
    ran = subprocess.run(
        [
            *command, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", model,
            "--disable-tqdm", *asked, "--save-result", "--result-dir", str(result.parent),
            "--result-filename", result.name,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )  # fmt: skip
    if ran.returncode or not result.exists():
        raise WorkFailed(f"`vllm bench serve` failed: {_end(ran.stdout)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if found.get("failed") or not found["completed"]:
        raise WorkFailed(
            f"every request must be answered, but {found.get('failed', 'all')} failed; {_end(ran.stdout)}"
        )
    return found


@contextmanager
def serving(command: Sequence[str], log: Path, patience: float = 1800.0) -> Iterator[Server]:
    """A server that runs until the end of the block.

    Args:
        command: starts it; host and port are added.
        log: where its output goes.
        patience: how long it may take to start [s].

    Yields:
        The server, once it answers.

    Raises:
        WorkFailed: it ends, or does not answer in time.
    """
    with socket.socket() as probe_socket:
        probe_socket.bind((HOST, 0))
        port = probe_socket.getsockname()[1]
    # Nobody else reaches this address; a key that is set for other servers would lock us out.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # its workers end with it, and Ctrl-C reaches us first
        )
    server = Server(f"http://{HOST}:{port}")
    try:
        deadline = time.monotonic() + patience
        while not _answers(server):
            if process.poll() is not None:
                text = log.read_text(encoding="utf-8", errors="replace")
                raise WorkFailed(
                    f"the server ended with {process.returncode}: {_end(text)}; see {log}"
                )
            if time.monotonic() > deadline:
                raise WorkFailed(f"the server did not answer within {patience:.0f} s; see {log}")
            time.sleep(0.1)
        yield server
    finally:
        _end_group(process)


def _answers(server: Server) -> bool:
    try:
        server.model()
    except (UserError, WorkFailed):
        return False
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number, wait in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def _end(text: str) -> str:
    """The line that says why, of a long log: the last that names an error, or the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or ["it said nothing"])[-1][-400:]
