"""Tiles that a server visited and skipped, counted on the device by the kernels themselves.

Both functions run inside a worker: `llm.collective_rpc(counters.read)`, which between processes needs
VLLM_ALLOW_INSECURE_SERIALIZATION=1. Reading waits for the device; counting does not.
"""

from __future__ import annotations

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
    for name, phases in by_layer(worker.vllm_config).items():
        for phase, counts in phases.items():
            counted[phase][name] = counts.tolist()
    return counted


def clear(worker: Any) -> None:
    """Sets all counts to 0."""
    for phases in by_layer(worker.vllm_config).values():
        for counts in phases.values():
            counts.zero_()


def by_layer(config: Any) -> dict[str, dict[Phase, torch.Tensor]]:
    """The tensors of our layers by their names, int64 [heads, 2] per phase; none of a layer before it runs.

    Args:
        config: vLLM's whole configuration.
    """
    return {name: impl.counts for name, impl in impls(config).items()}


def impls(config: Any) -> dict[str, Any]:
    """Our layers (`SkipSoftmaxImpl`) by their names.

    Args:
        config: vLLM's whole configuration.
    """
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    found: dict[str, Any] = {name: getattr(layer, "impl", None) for name, layer in layers.items()}
    return {name: impl for name, impl in found.items() if hasattr(impl, "counts")}
