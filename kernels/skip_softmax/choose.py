"""Which backend runs a call."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import torch

Backend = Literal["auto", "reference", "triton", "hopper"]


class FallbackWarning(UserWarning):
    """The reference runs a call on a GPU because the kernels cannot; said once per reason."""


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


def prefill_kernel() -> ModuleType:
    """Imported when a call needs it: triton loads slowly, and a CPU may have none."""
    from skip_softmax.triton import prefill

    return prefill


def decode_kernel() -> ModuleType:
    """See `prefill_kernel`."""
    from skip_softmax.triton import decode

    return decode


def hopper_kernel() -> ModuleType:
    """See `prefill_kernel`."""
    from skip_softmax.hopper import launch as hopper

    return hopper


def statistics_kernel() -> ModuleType:
    """See `prefill_kernel`."""
    from skip_softmax.triton import statistics as gaps

    return gaps


def choose_backend(
    backend: Backend,
    q: torch.Tensor,
    kernels: dict[str, Callable[[], str | None]],
    stacklevel: int = 3,
) -> str:
    """The backend that runs a call.

    Args:
        backend: as asked.
        q: queries; only their device matters.
        kernels: the kernels of this operation, best first: each says why it cannot run the call, or None.
        stacklevel: frames between the warning and who called the operation.
    """
    if backend not in ("auto", "reference", "triton", "hopper"):
        raise ValueError(f"backend must be auto, reference, triton or hopper, but got {backend!r}")
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        return "reference"
    if backend != "auto" and backend not in kernels:
        raise NotImplementedError(
            f"backend={backend!r} has no such operation; use {' or '.join(kernels)}"
        )
    reason: str | None = None
    for name, why_not in kernels.items():
        if backend not in ("auto", name):
            continue
        if not _HAS_TRITON:
            reason = "triton is not installed; `pip install skip-softmax-calibrate[gpu]` brings it"
        else:
            reason = why_not()
        if reason is None:
            return name
    if backend != "auto":
        raise NotImplementedError(f"backend={backend!r} cannot run this call: {reason}")
    if reason not in _warned:
        _warned.add(str(reason))
        warnings.warn(
            f"the reference runs this call, slowly: {reason}",
            FallbackWarning,
            stacklevel=stacklevel,
        )
    return "reference"


def choose_prefill(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    tile_q: int,
    tile_kv: int,
    scale: float,
    kv_start: int,
) -> str:
    """The backend that runs a prefill call; the Hopper kernel comes first."""
    return choose_backend(
        backend,
        q,
        {
            "hopper": lambda: hopper_kernel().why_not(
                q, k, v, tile_q, tile_kv, window, scale, kv_start
            ),
            "triton": lambda: prefill_kernel().why_not(q, v, tile_q, tile_kv, scale, kv_start),
        },
        stacklevel=4,
    )


def run_prefill(
    chosen: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    factors: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    tile_q: int,
    tile_kv: int,
    *lengths_and_stats: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a kernel that `choose_prefill` chose; arguments and results are those of `prefill.prefill`."""
    if chosen == "hopper":
        # Window and geometry are those it accepted.
        out, counts = hopper_kernel().hopper(
            q, k, v, factor, factors, causal, scale, *lengths_and_stats
        )
    else:
        out, counts = prefill_kernel().prefill(
            q, k, v, factor, factors, causal, scale, window, tile_q, tile_kv, *lengths_and_stats
        )
    return out, counts
