"""When a tile may be skipped: the definition in plain PyTorch, which the kernels implement in their terms.

A row's gap is its maximum in the tile minus its running maximum before the tile; a tile's gap is the largest
of its valid rows' (`reference.py`). The tile is skipped exactly when its critical scale factor,
kv_len * exp(gap), is below the call's scale factor. The kernels decide row by row (`keeps` in
`triton/primitives.py`, `_vote` in `hopper/prefill_kernel.py`) and skip a tile if no row of a vote keeps it.

A call is *armed* when it may skip: one of its scale factors is above 0. If the host knows that none is, the
kernels run without the branch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

# What a tile is judged by. `max`: by its row maxima alone.
Criterion = Literal["max"]


def has_threshold(scale_factor: Any, kv_len: Any, min_kv_len: int = 0) -> Any:
    """Whether anything may be skipped; for numbers or tensors.

    0 is dense; a threshold of 1 or more has no meaning, and is dense too; so is NaN, which fails both
    comparisons; so is a KV length below `min_kv_len`.
    """
    return (scale_factor > 0) & (scale_factor < kv_len) & (kv_len >= min_kv_len)


def critical_log2(gap: torch.Tensor, kv_len: torch.Tensor | int) -> torch.Tensor:
    """log2 of the critical scale factor, in float64 so that a bin edge means the same everywhere.

    Args:
        gap: tile gaps [nats].
        kv_len: KV length of the call [tokens], broadcast against `gap`.

    Returns:
        log2(kv_len * exp(gap)), +inf for tiles that no threshold below 1 can skip.
    """
    length = torch.as_tensor(kv_len, dtype=torch.float64, device=gap.device)
    critical = torch.log2(length) + gap.double() * math.log2(math.e)
    return torch.where(gap >= 0, torch.inf, critical)


def skips(
    gap: torch.Tensor, scale_factor: torch.Tensor, kv_len: torch.Tensor, min_kv_len: int = 0
) -> torch.Tensor:
    """Which tiles are skipped.

    Args:
        gap: tile gaps [nats]; +inf at tiles that no threshold may skip.
        scale_factor: float64 [tokens], broadcast against `gap`.
        kv_len: KV length of the call [tokens], broadcast likewise.
        min_kv_len: what is shorter skips nothing [tokens].

    Returns:
        bool, in the shape of `gap`; a tile that is not visited (-inf) counts as skipped.
    """
    below: torch.Tensor = critical_log2(gap, kv_len) < torch.log2(scale_factor)
    return below.logical_and(has_threshold(scale_factor, kv_len, min_kv_len))
