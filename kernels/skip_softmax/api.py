"""The public operations: validate, choose a backend, run.

An explicit backend never falls back: it runs what was asked or says why it cannot.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch

from skip_softmax import reference
from skip_softmax.histogram import TileHistogram
from skip_softmax.reference import Request, RunningMax

Backend = Literal["auto", "reference", "triton", "hopper"]
Lengths = torch.Tensor | Sequence[int] | None


class DenseCallWarning(UserWarning):
    """A call ran dense because its threshold would be 1 or more, which has no meaning."""


@dataclass(frozen=True)
class Stats:
    """Tiles of one call, int64 [batch, heads]: query heads in prefill, KV heads in decode."""

    visited: torch.Tensor
    skipped: torch.Tensor


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: float | torch.Tensor = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: float | torch.Tensor = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, Stats]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale_factor: float | torch.Tensor = 0.0,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    backend: Backend = "auto",
    q_lens: Lengths = None,
    kv_lens: Lengths = None,
    kv_start: int = 0,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """Prefill attention that skips KV tiles whose softmax weight cannot matter (arXiv 2512.12087).

    Args:
        q: queries [B, Hq, Sq, D], fp16, bf16, fp32 or fp64. The last query stands at position kv_len - 1.
        k: keys [B, Hkv, Skv, D]; Hq is a multiple of Hkv.
        v: values [B, Hkv, Skv, Dv].
        scale_factor: threshold times KV length [tokens], a number or a tensor [Hq]; 0 is dense.
        causal: whether a query sees no key after its own position.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: a query sees its own position and the `window - 1` before it; None: no window.
        tile_q: query rows that vote together [tokens], a power of two.
        tile_kv: keys per tile [tokens], a power of two.
        backend: `auto`, or one by name.
        q_lens: valid queries per request [B], right-padded; None: Sq. Rows of padding come out as zero.
        kv_lens: KV length per request, counted from position 0 [B]; None: kv_start + Skv.
        kv_start: absolute position of the first key held (sliding caches drop old keys).
        return_stats: also return tile counts.

    Returns:
        Output [B, Hq, Sq, Dv] in q's dtype, and with `return_stats` the tile counts [B, Hq].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors break a law.
        NotImplementedError: the named backend cannot run this call.
    """
    _check_qkv(q, k, v)
    _check_geometry(tile_kv, window, tile_q)
    _resolve_backend(backend, q)
    factors = _scale_factors(scale_factor, q.shape[1], q.device, "query")
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    stats = Stats(*(torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) for _ in range(2)))
    lengths = _lengths(q_lens, kv_lens, q, k, kv_start)
    _warn_if_meaningless(factors, [kv_len for _, kv_len in lengths])
    for b, (q_len, kv_len) in enumerate(lengths):
        request = Request(q_len, kv_len, kv_start, causal, window, tile_q, tile_kv)
        out[b, :, :q_len], stats.visited[b], stats.skipped[b] = reference.attend(
            q[b], k[b], v[b], request, _scale(scale, q), factors
        )
    return (out, stats) if return_stats else out


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: float | torch.Tensor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., backend: Backend = ..., kv_start: int = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: float | torch.Tensor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., backend: Backend = ..., kv_start: int = ...,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, Stats]: ...


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: Lengths = None,
    *,
    scale_factor: float | torch.Tensor = 0.0,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    tile_kv: int = 64,
    running_max: RunningMax = "ascending",
    backend: Backend = "auto",
    kv_start: int = 0,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """Decode attention: one or a few new tokens per request against its cache, skipping KV tiles.

    The query heads of one KV head vote together, for each query token alone. Token t of T sees
    kv_len - T + t + 1 keys, and that is the length behind its threshold: sending tokens one by one or in
    a short run gives the same result.

    Args:
        q: queries [B, Hq, D], or [B, Hq, T, D] for runs of T tokens.
        k_cache: contiguous [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with `block_table`.
        v_cache: as `k_cache`.
        kv_lens: KV length per request, the new tokens included [B]; None: kv_start + Skv.
        scale_factor: threshold times KV length [tokens], a number or a tensor [Hkv]; 0 is dense.
        block_table: page numbers [B, pages per request], integer; None: the cache is contiguous.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: a token sees its own position and the `window - 1` before it; None: no window.
        tile_kv: keys per tile [tokens], a power of two.
        running_max: what a tile is compared with, see `DecodeGeometry`.
        backend: `auto`, or one by name.
        kv_start: absolute position of the first key held (contiguous caches only).
        return_stats: also return tile counts.

    Returns:
        Output in q's shape and dtype, and with `return_stats` the tile counts [B, Hkv].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors break a law.
        NotImplementedError: the named backend cannot run this call.
    """
    run = q if q.dim() == 4 else q[:, :, None]
    if block_table is not None:
        _check_block_table(block_table, kv_lens, k_cache, kv_start)
        k_cache, v_cache = (_gather_pages(cache, block_table) for cache in (k_cache, v_cache))
    _check_qkv(run, k_cache, v_cache)
    _check_geometry(tile_kv, window, None)
    _resolve_backend(backend, q)
    kv_heads, tokens = k_cache.shape[1], run.shape[2]
    factors = _scale_factors(scale_factor, kv_heads, q.device, "KV")
    out = q.new_zeros(*run.shape[:3], v_cache.shape[-1])
    shape = (q.shape[0], kv_heads)
    stats = Stats(*(torch.zeros(shape, dtype=torch.int64, device=q.device) for _ in range(2)))
    lengths = _lengths(None, kv_lens, run, k_cache, kv_start)
    _warn_if_meaningless(factors, [kv_len - tokens + 1 for _, kv_len in lengths])
    for b, (_, kv_len) in enumerate(lengths):
        request = Request(tokens, kv_len, kv_start, True, window, None, tile_kv, running_max)
        out[b], stats.visited[b], stats.skipped[b] = reference.attend(
            run[b], k_cache[b], v_cache[b], request, _scale(scale, q), factors
        )
    out = out if q.dim() == 4 else out[:, :, 0]
    return (out, stats) if return_stats else out


def tile_gaps(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    backend: Backend = "auto",
    q_lens: Lengths = None,
    kv_lens: Lengths = None,
) -> torch.Tensor:
    """The gap of every tile: how far its largest row maximum stays below that row's running maximum.

    A tile is skipped exactly when scale_factor > kv_len * exp(gap).

    Args:
        q: queries [B, Hq, Sq, D].
        k: keys [B, Hkv, Skv, D].
        causal: as in `attention`, like the rest.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        backend: `auto`, or one by name.
        q_lens: valid queries per request [B].
        kv_lens: KV length per request [B].

    Returns:
        [B, Hq, Tq, Tkv] nats; -inf where the tile is not visited, +inf at the first visited tile.

    Raises:
        ValueError: shapes, lengths or geometry break a law.
    """
    _check_qkv(q, k, k)
    _check_geometry(tile_kv, window, tile_q)
    _resolve_backend(backend, q)
    tiles = (-(-q.shape[2] // tile_q), -(-k.shape[2] // tile_kv))
    result = torch.full((*q.shape[:2], *tiles), -torch.inf, device=q.device, dtype=torch.float32)
    result = result.double() if q.dtype == torch.float64 else result
    for b, (q_len, kv_len) in enumerate(_lengths(q_lens, kv_lens, q, k, 0)):
        request = Request(q_len, kv_len, 0, causal, window, tile_q, tile_kv)
        gaps = reference.gaps(q[b], k[b], request, _scale(scale, q))
        result[b, :, : gaps.shape[1], : gaps.shape[2]] = gaps
    return result


def tile_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    decode: bool = False,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    running_max: RunningMax = "ascending",
    kv_start: int = 0,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense attention that also counts its tiles by critical scale factor, in one pass.

    Args:
        q: queries [B, Hq, Sq, D]; every request of the batch has this length.
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        decode: each query token votes alone, with the heads of its KV head (`tile_q` is not used).
        causal: as in `attention`, like the rest.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        running_max: decode only, see `DecodeGeometry`.
        kv_start: absolute position of the first key held.
        backend: `auto`, or one by name.

    Returns:
        Dense output [B, Hq, Sq, Dv] and the histogram, summed over the batch.

    Raises:
        ValueError: shapes or geometry break a law.
    """
    _check_qkv(q, k, v)
    _check_geometry(tile_kv, window, None if decode else tile_q)
    _resolve_backend(backend, q)
    kv_len = kv_start + k.shape[2]
    request = Request(
        q.shape[2], kv_len, kv_start, causal, window, None if decode else tile_q, tile_kv, running_max
    )
    pairs = [reference.statistics(*qkv, request, _scale(scale, q)) for qkv in zip(q, k, v, strict=True)]
    histograms = [histogram for _, histogram in pairs]
    total = TileHistogram(
        counts=torch.stack([h.counts for h in histograms]).sum(0),
        mass=torch.stack([h.mass for h in histograms]).sum(0),
        rows=sum(h.rows for h in histograms),
    )
    return torch.stack([out for out, _ in pairs]), total


def _resolve_backend(backend: Backend, q: torch.Tensor) -> None:
    if backend not in ("auto", "reference", "triton", "hopper"):
        raise ValueError(f"backend must be auto, reference, triton or hopper, but got {backend!r}")
    if backend in ("triton", "hopper"):
        raise NotImplementedError(
            f"backend={backend!r} is not part of this version; use backend='reference' or 'auto'"
        )


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            "q, k and v must be [batch, heads, tokens, head_dim], but got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k and v must agree in batch and head_dim, k and v also in heads and tokens, but got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, but got {q.shape[1]} and {k.shape[1]}"
        )
    if not q.is_floating_point() or len({q.dtype, k.dtype, v.dtype}) != 1:
        raise ValueError(
            f"q, k and v must share one floating dtype, but got {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _check_geometry(tile_kv: int, window: int | None, tile_q: int | None) -> None:
    for name, tile in (("tile_q", tile_q), ("tile_kv", tile_kv)):
        if tile is not None and (tile < 1 or tile & (tile - 1)):
            raise ValueError(f"`{name}` must be a power of two, but got {tile}")
    if window is not None and window < 1:
        raise ValueError(f"`window >= 1` must hold, but got {window}; pass None for no window")


def _scale_factors(
    value: float | torch.Tensor, heads: int, device: torch.device, kind: str
) -> torch.Tensor:
    factors = torch.as_tensor(value, dtype=torch.float64, device=device)
    if factors.dim() > 1 or (factors.dim() == 1 and factors.shape[0] != heads):
        raise ValueError(
            f"scale_factor must be a number or a tensor [{heads}] (one per {kind} head), "
            f"but got shape {tuple(factors.shape)}"
        )
    if not bool(torch.isfinite(factors).all()) or bool((factors < 0).any()):
        raise ValueError(
            f"`scale_factor >= 0` and finite must hold, but got {value}; 0 means dense"
        )
    return factors.expand(heads)


def _lengths(
    q_lens: Lengths, kv_lens: Lengths, q: torch.Tensor, k: torch.Tensor, kv_start: int
) -> list[tuple[int, int]]:
    batch, most_q, most_kv = q.shape[0], q.shape[2], kv_start + k.shape[2]
    queries = [most_q] * batch if q_lens is None else [int(n) for n in q_lens]
    keys = [most_kv] * batch if kv_lens is None else [int(n) for n in kv_lens]
    for name, values, most in (("q_lens", queries, most_q), ("kv_lens", keys, most_kv)):
        if len(values) != batch or any(not 0 <= n <= most for n in values):
            raise ValueError(f"`{name}` must hold {batch} numbers from 0 to {most}, but got {values}")
    return list(zip(queries, keys, strict=True))


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _warn_if_meaningless(factors: torch.Tensor, kv_lens: list[int]) -> None:
    shortest, largest = min(kv_lens, default=0), float(factors.max()) if factors.numel() else 0.0
    if largest > 0 and largest >= shortest:
        warnings.warn(
            f"`scale_factor < kv_len` must hold, but got scale_factor={largest:g} with kv_len={shortest}; "
            "such votes run dense. Lower the scale factor, or send short requests to dense attention",
            DenseCallWarning,
            stacklevel=3,
        )


def _check_block_table(
    block_table: torch.Tensor, kv_lens: Lengths, k_cache: torch.Tensor, kv_start: int
) -> None:
    if block_table.dim() != 2 or block_table.is_floating_point():
        raise ValueError(f"block_table must be integers [batch, pages], but got {tuple(block_table.shape)}")
    if kv_lens is None or kv_start:
        raise ValueError("a paged cache needs `kv_lens`, and `kv_start=0`")
    if bool((block_table >= k_cache.shape[0]).any()):
        raise ValueError(f"block_table names a page that is not below {k_cache.shape[0]}")


def _gather_pages(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """[pages, Hkv, page_size, D] -> [B, Hkv, tokens, D]; table entries below 0 are unused."""
    pages = cache[block_table.clamp_min(0).long()]
    return pages.permute(0, 2, 1, 3, 4).flatten(2, 3)
