"""Stands in for the command `vllm`: `serve` is the planted server, `bench serve` sends it two requests."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from planted_server import INFO, Planted, serving

from calibrate.serving.client import Server

DENSE_MS, CALIBRATED_MS = 200.0, 100.0


def option(name: str) -> str | None:
    """The last value of an option."""
    places = [index for index, word in enumerate(sys.argv) if word == name]
    return sys.argv[places[-1] + 1] if places else None


def serve() -> None:
    if "--fail" in sys.argv:
        print("INFO fine\nValueError: no room for the cache\nINFO exit", flush=True)
        raise SystemExit(3)
    given = option("--additional-config")
    planted = Planted()
    if given is not None:
        assert option("--attention-backend") == "CUSTOM"
        file = Path(json.loads(given)["skip_softmax"]["thresholds"])
        planted.info = {
            **INFO,
            "thresholds_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "allowed": ",".join(json.loads(given)["skip_softmax"]["allow"]),
        }
        planted.per_request = {("prefill", "0-7"): (40, 10), ("decode", "0-7"): (4, 3)}
    with serving(planted, int(option("--port") or 0)):
        signal.sigwait({signal.SIGTERM})


def load() -> None:
    if "--crash" in sys.argv:
        raise ValueError("the load makes no sense")
    server = Server(str(option("--base-url")))
    for _ in range(2):
        server.complete(server.model(), "To be", 4)
    calibrated = any(one.name == "skip_softmax_info" for one in server.metrics() or ())
    time_ms = CALIBRATED_MS if calibrated else DENSE_MS
    result = {
        "completed": 2,
        "failed": int("--lose" in sys.argv),
        "total_input_tokens": 20,
        "total_output_tokens": 8 - int("--other-work" in sys.argv and calibrated),
        "median_ttft_ms": time_ms,
        "p99_ttft_ms": 3 * time_ms,
        "median_tpot_ms": time_ms / 10,
        "request_throughput": 100 / time_ms,
        "request_goodput": None,
    }
    folder = Path(str(option("--result-dir")))
    (folder / str(option("--result-filename"))).write_text(json.dumps(result))


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if sys.argv[1] == "serve":
        serve()
    else:
        assert sys.argv[1:3] == ["bench", "serve"]
        load()
