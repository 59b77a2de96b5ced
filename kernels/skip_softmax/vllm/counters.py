"""Tiles that a server visited and skipped, counted on the device by the kernels themselves.

Both functions run inside a worker: `llm.collective_rpc(counters.read)`, which between processes needs
VLLM_ALLOW_INSECURE_SERIALIZATION=1. Reading waits for the device; counting does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from skip_softmax.thresholds.types import PHASES, Phase


def read(worker: Any) -> dict[Phase, dict[str, list[list[int]]]]:
    """Counts since the start or since `clear`, warm-up runs included.

    Args:
        worker: one of vLLM's.

    Returns:
        Per phase and layer name, one [visited, skipped] per head that votes and that this worker has: query
        heads in prefill, KV heads in decode.
    """
    counted: dict[Phase, dict[str, list[list[int]]]] = {phase: {} for phase in PHASES}
    for name, phase, counts in _tensors(worker):
        counted[phase][name] = counts.tolist()
    return counted


def clear(worker: Any) -> None:
    """Sets all counts to 0."""
    for _, _, counts in _tensors(worker):
        counts.zero_()


def _tensors(worker: Any) -> Iterator[tuple[str, Phase, torch.Tensor]]:
    layers = worker.vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        for phase, counts in getattr(getattr(layer, "impl", None), "counts", {}).items():
            yield name, phase, counts
