"""What a call may hold: shapes, lengths, scale factors. Errors state the law, the value and the cure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

Lengths = torch.Tensor | Sequence[int] | None


class DenseCallWarning(UserWarning):
    """A call ran dense because its threshold would be 1 or more, which has no meaning."""


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: bool = False) -> None:
    """Shapes, heads and dtypes agree; `paged`: keys and values are pages."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            "q, k and v must be [batch, heads, tokens, head_dim], but got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch_agrees = paged or q.shape[0] == k.shape[0]
    if k.shape[:3] != v.shape[:3] or not batch_agrees or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k and v must agree in batch and head_dim, k and v also in heads and tokens, but got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not k.shape[1] or not q.shape[1] or not q.shape[3]:
        raise ValueError(
            f"heads and head_dim must be above 0, but got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, but got {q.shape[1]} and {k.shape[1]}"
        )
    if not q.is_floating_point() or len({q.dtype, k.dtype, v.dtype}) != 1:
        raise ValueError(
            f"q, k and v must share one floating dtype, but got {q.dtype}, {k.dtype}, {v.dtype}"
        )


def check_geometry(tile_kv: int, window: int | None, tile_q: int | None) -> None:
    """Tiles are powers of two, and a window holds a key."""
    for name, tile in (("tile_q", tile_q), ("tile_kv", tile_kv)):
        if tile is not None and (tile < 1 or tile & (tile - 1)):
            raise ValueError(f"`{name}` must be a power of two, but got {tile}")
    if window is not None and window < 1:
        raise ValueError(f"`window >= 1` must hold, but got {window}; pass None for no window")


def scale_factors(
    value: float | torch.Tensor, heads: int, device: torch.device, kind: str
) -> torch.Tensor:
    """One number per head, float64 [heads], each finite and not below 0."""
    factors = torch.as_tensor(value, dtype=torch.float64, device=device)
    _check_one_per_head(factors, heads, kind)
    if not bool(torch.isfinite(factors).all()) or bool((factors < 0).any()):
        raise _no_scale_factor(value)
    return factors.expand(heads)


def _no_scale_factor(value: object) -> ValueError:
    return ValueError(f"`scale_factor >= 0` and finite must hold, but got {value}; 0 means dense")


def kernel_factors(
    value: float | torch.Tensor, heads: int, device: torch.device, kind: str
) -> tuple[float, torch.Tensor | None]:
    """One number for all heads, or fp32 [heads]; a tensor on the device is taken as it is, without a wait."""
    # Without tensors: every layer passes here in every step.
    if isinstance(value, int | float):
        if not (math.isfinite(value) and value >= 0):
            raise _no_scale_factor(value)
        return float(value), None
    if not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        value = scale_factors(value, heads, device, kind)
    else:
        _check_one_per_head(value, heads, kind)
    return 0.0, value.to(device, torch.float32).expand(heads).contiguous()


def _check_one_per_head(factors: torch.Tensor, heads: int, kind: str) -> None:
    if factors.shape not in ((), (heads,)):
        raise ValueError(
            f"scale_factor must be a number or a tensor [{heads}] (one per {kind} head), "
            f"but got shape {tuple(factors.shape)}"
        )


def kernel_lengths(
    name: str, lengths: Lengths, batch: int, most: int, device: torch.device
) -> torch.Tensor | None:
    """int32 [batch] on the device; the host's numbers are checked, the kernel clamps the device's."""
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor) or (
        lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        values = _on_the_host(name, lengths, batch, most)
        return torch.tensor(values, dtype=torch.int32, device=device)
    if lengths.shape != (batch,):
        raise ValueError(
            f"`{name}` must hold {batch} numbers, but got shape {tuple(lengths.shape)}"
        )
    return as_kernels_read(lengths, device)


def as_kernels_read(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Lengths, starts and page numbers as kernels read them: int32, one behind the other."""
    return x.to(device, torch.int32).contiguous()


def lengths_of(
    q_lens: Lengths, kv_lens: Lengths, q: torch.Tensor, k: torch.Tensor, kv_start: int
) -> list[tuple[int, int]]:
    """Query and KV length of each request, from what the caller gave or the shapes say."""
    batch, most_q, most_kv = q.shape[0], q.shape[2], kv_start + k.shape[2]
    queries = [most_q] * batch if q_lens is None else _on_the_host("q_lens", q_lens, batch, most_q)
    keys = (
        [most_kv] * batch if kv_lens is None else _on_the_host("kv_lens", kv_lens, batch, most_kv)
    )
    return list(zip(queries, keys, strict=True))


def _on_the_host(
    name: str, lengths: torch.Tensor | Sequence[int], batch: int, most: int
) -> list[int]:
    values = [int(n) for n in lengths]
    if len(values) != batch or any(not 0 <= n <= most for n in values):
        raise ValueError(f"`{name}` must hold {batch} numbers from 0 to {most}, but got {values}")
    return values


def scale_of(scale: float | None, q: torch.Tensor) -> float:
    """Factor of the scores: 1 / sqrt(head_dim) unless given."""
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def warn_if_meaningless(largest: float, kv_lens: list[int], stacklevel: int = 3) -> None:
    """Says that a call runs dense because its threshold would be 1 or more; without keys it just is empty."""
    shortest = min((n for n in kv_lens if n > 0), default=math.inf)
    if largest > 0 and largest >= shortest:
        warnings.warn(
            f"`scale_factor < kv_len` must hold, but got scale_factor={largest:g} with kv_len={shortest}; "
            "such votes run dense. Lower the scale factor, or send short requests to dense attention",
            DenseCallWarning,
            stacklevel=stacklevel,
        )


def warn_if_known_meaningless(
    factor: float, kv_lens: Lengths, capacity: int, tokens: int = 1
) -> None:
    """As `warn_if_meaningless`, from what the host knows."""
    if factor == 0 or isinstance(kv_lens, torch.Tensor) or torch.compiler.is_compiling():
        return
    lengths = [capacity] if kv_lens is None else [int(n) for n in kv_lens]
    warn_if_meaningless(factor, [n - tokens + 1 for n in lengths], stacklevel=4)


def check_packed(starts: torch.Tensor, total: int, longest: int, name: str) -> None:
    """`cu_seqlens` rise from 0 or more to the tokens at most; looked at on the host only: no wait."""
    if starts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = starts.diff()
    if starts[0] < 0 or starts[-1] > total or (lengths < 0).any() or (lengths > longest).any():
        raise ValueError(
            f"cu_seqlens_{name} must rise within 0 to {total} by at most max_seqlen_{name} {longest}, but "
            f"got {starts.tolist()}"
        )


def check_block_table(
    block_table: torch.Tensor, kv_lens: Lengths, batch: int, kv_start: int
) -> None:
    """A block table is [batch, pages]; a paged cache comes with its lengths and its first keys."""
    if (
        block_table.dim() != 2
        or block_table.shape[0] != batch
        or block_table.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"block_table must be int32 or int64 [{batch}, pages], but got {block_table.dtype} "
            f"{tuple(block_table.shape)}"
        )
    if kv_lens is None or kv_start:
        raise ValueError("a paged cache needs `kv_lens`, and `kv_start=0`")


def check_pages(
    block_table: torch.Tensor,
    lengths: list[tuple[int, int]],
    window: int | None,
    k_cache: torch.Tensor,
) -> None:
    """Entries that a request's keys need name pages of the cache; the others may hold anything."""
    pages, page = k_cache.shape[0], k_cache.shape[2]
    for row, (tokens, kv_len) in zip(block_table.tolist(), lengths, strict=True):
        first = 0 if window is None else max(kv_len - tokens + 1 - window, 0) // page
        needed = row[first : -(-kv_len // page)]
        if any(not 0 <= number < pages for number in needed):
            raise ValueError(
                f"block_table must name pages from 0 to {pages - 1} for a request's {kv_len} keys, but "
                f"got {needed}"
            )


def gather_pages(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """[pages, Hkv, page_size, D] -> [B, Hkv, tokens, D]; an entry that names no page gives zeros."""
    named = (block_table >= 0) & (block_table < cache.shape[0])
    pages = cache[torch.where(named, block_table, 0).long()]
    pages = pages.masked_fill(~named[:, :, None, None, None], 0.0)
    return pages.permute(0, 2, 1, 3, 4).flatten(2, 3)
