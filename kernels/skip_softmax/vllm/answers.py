"""A worker answers for its tile counters on a Unix socket, where the API server asks (`metrics.py`).

A step does nothing for it: no copy, no event, no clock. The copy that answers goes through a stream of its
own, which waits for no other. A graph that is being captured would break if another thread used the device;
vLLM captures before it serves, and nobody reads the page of a server that does not serve yet.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from functools import lru_cache
from typing import Any

import torch
from vllm.logger import init_logger

from skip_softmax.thresholds.evidence import EvidenceSection
from skip_softmax.thresholds.types import PHASES
from skip_softmax.vllm import counters, metrics, startup

GROUP = 8
"""Neighbouring layers that share a counter: a series per layer and phase would be hundreds."""

_log = init_logger("vllm.skip_softmax")
_answering: dict[int, Any] = {}  # by process: a forked one has no thread yet


def answer(config: Any) -> None:
    """Lets this worker answer for its counters; of several engines in a process the last one answers.

    Args:
        config: vLLM's whole configuration.
    """
    folder = os.environ.get(metrics.FOLDER)
    if folder is None:
        return
    first = os.getpid() not in _answering
    _answering[os.getpid()] = config
    if first:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.path.join(folder, str(os.getpid())))
        except OSError as error:
            # Serving does not depend on it.
            _log.warning(
                "skip-softmax: no tile counters on the page of metrics: %s cannot hold a socket (%s); set "
                "TMPDIR to a short path on a local disk",
                folder,
                error,
            )
            return
        listener.listen()
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.settimeout(metrics.PATIENCE)
                connection.sendall(json.dumps(_told(_answering[os.getpid()])).encode())
            except OSError:
                pass  # whoever asked has gone
            except Exception:
                # The worker must go on serving; without an answer it is counted as silent.
                _log.exception("skip-softmax: the tile counters could not be read")


def _told(config: Any) -> dict[str, Any]:
    """What a worker answers: the file, its layers that may skip, and tiles per phase and group of layers."""
    plan = startup.plan_of(config)
    thresholds = plan.thresholds
    ours = counters.by_layer(config)
    counted = [(name, phase, ours[name][phase]) for name in ours for phase in ours[name]]
    tiles: dict[str, dict[str, list[int]]] = {phase: {} for phase in PHASES}
    for (name, phase, _), found in zip(
        counted, _sums([counts for _, _, counts in counted]), strict=True
    ):
        row = tiles[phase].setdefault(_group(startup.index_of(name)), [0, 0])
        row[:] = [total + new for total, new in zip(row, found, strict=True)]
    known = [] if thresholds is None else [startup.index_of(name) for name in ours]
    armed = {
        index
        for index in known
        if thresholds is not None
        and index is not None
        and index < thresholds.model.layers
        and any(any(thresholds.per_head(index, phase)) for phase in PHASES)
    }
    verdict = "none"
    if thresholds is not None:
        verdict = str(EvidenceSection.model_validate(thresholds.evidence).verdict)
    info = {
        "thresholds_sha256": plan.sha256,
        "verdict": verdict,
        "allowed": ",".join(plan.allow),
        **{f"min_kv_len_{phase}": str(plan.min_kv_len[phase]) for phase in PHASES},
    }
    return {"info": info, "armed": sorted(armed), "tiles": tiles}


def _group(index: int | None) -> str:
    if index is None:
        return "other"
    first = index // GROUP * GROUP
    return f"{first}-{first + GROUP - 1}"


def _sums(counts: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Visited and skipped tiles of each tensor [heads, 2], over its heads; waits for no kernel."""
    if counts and counts[0].is_cuda:
        device = counts[0].device
        with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
            # Copies alone: a kernel would queue behind those of a long prefill.
            pinned = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in counts]
            for there, here in zip(pinned, counts, strict=True):
                there.copy_(here, non_blocking=True)
            _stream(device).synchronize()
        counts = pinned
    return [(int(visited), int(skipped)) for visited, skipped in (c.sum(0) for c in counts)]


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
