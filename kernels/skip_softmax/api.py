"""The public operations: validate, choose a backend, run.

An explicit backend never falls back: it runs what was asked or says why it cannot.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, overload

import torch

from skip_softmax.choose import (
    Backend,
    choose_backend,
    choose_prefill,
    decode_kernel,
    run_prefill,
    statistics_kernel,
)
from skip_softmax.meaning import reference
from skip_softmax.meaning.call import (
    Lengths,
    as_kernels_read,
    check_block_table,
    check_geometry,
    check_packed,
    check_pages,
    check_qkv,
    gather_pages,
    kernel_factors,
    kernel_lengths,
    lengths_of,
    scale_factors,
    scale_of,
    warn_if_known_meaningless,
    warn_if_meaningless,
)
from skip_softmax.meaning.counts import TileCounts
from skip_softmax.meaning.histogram import BINS, TileHistogram
from skip_softmax.meaning.reference import Request, RunningMax


class _ForwardOnly(torch.autograd.Function):
    """Passes an output on; who asks for its gradient is told that there is none."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "skip-softmax attention has no backward, but a gradient through it was asked for; run it under "
            "torch.no_grad(), or train with the model's own attention"
        )


def _forward_only(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out = _ForwardOnly.apply(out, *inputs)  # type: ignore[no-untyped-call]
    return out


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: float | torch.Tensor = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: float | torch.Tensor = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


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
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Prefill attention that skips KV tiles whose softmax weight cannot matter (arXiv 2512.12087).

    Args:
        q: queries [B, Hq, Sq, D], fp16, bf16, fp32 or fp64. The last query stands at position
            kv_len - 1.
        k: keys [B, Hkv, Skv, D]; Hq is a multiple of Hkv.
        v: values [B, Hkv, Skv, Dv].
        scale_factor: threshold times KV length [tokens], a number or a tensor [Hq]; 0 is dense.
        causal: whether a query sees no key after its own position.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: a query sees its own position and the `window - 1` before it; None: no window.
        tile_q: query rows that vote together [tokens], a power of two.
        tile_kv: keys per tile [tokens], a power of two.
        backend: one by name, which runs or says why it cannot; or `auto`: hopper on sm_90 where it can, else
            triton, and the reference on a CPU.
        q_lens: valid queries per request [B], right-padded; None: Sq. Rows of padding come out as
            zero.
        kv_lens: KV length per request, counted from position 0 [B]; None: kv_start + Skv.
        kv_start: absolute position of the first key held (sliding caches drop old keys).
        return_stats: also return tile counts.

    Returns:
        Output [B, Hq, Sq, Dv] in q's dtype, and with `return_stats` the tile counts [B, Hq].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors break a law.
        NotImplementedError: the named backend cannot run this call.
    """
    check_qkv(q, k, v)
    check_geometry(tile_kv, window, tile_q)
    scale = scale_of(scale, q)
    chosen = choose_prefill(backend, q, k, v, window, tile_q, tile_kv, scale, kv_start)
    if chosen != "reference":
        factor, factors = kernel_factors(scale_factor, q.shape[1], q.device, "query")
        warn_if_known_meaningless(factor, kv_lens, k.shape[2])
        out, counts = run_prefill(
            chosen, q, k, v, factor, factors, causal, scale, window, tile_q, tile_kv,
            kernel_lengths("q_lens", q_lens, q.shape[0], q.shape[2], q.device),
            kernel_lengths("kv_lens", kv_lens, q.shape[0], k.shape[2], q.device),
            None, None, q.shape[2], return_stats,
        )  # fmt: skip
        out = _forward_only(out, q, k, v)
        return (out, TileCounts(counts[..., 0], counts[..., 1])) if return_stats else out
    factors = scale_factors(scale_factor, q.shape[1], q.device, "query")
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    stats = TileCounts(
        *(torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) for _ in range(2))
    )
    lengths = lengths_of(q_lens, kv_lens, q, k, kv_start)
    warn_if_meaningless(factors.max().item(), [kv_len for _, kv_len in lengths])
    for b, (q_len, kv_len) in enumerate(lengths):
        request = Request(q_len, kv_len, kv_start, causal, window, tile_q, tile_kv)
        out[b, :, :q_len], stats.visited[b], stats.skipped[b] = reference.attend(
            q[b], k[b], v[b], request, scale, factors
        )
    out = _forward_only(out, q, k, v)
    return (out, stats) if return_stats else out


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    scale_factor: float | torch.Tensor = ..., causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., tile_q: int = ..., tile_kv: int = ..., backend: Backend = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    scale_factor: float | torch.Tensor = ..., causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., tile_q: int = ..., tile_kv: int = ..., backend: Backend = ...,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale_factor: float | torch.Tensor = 0.0,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    backend: Backend = "auto",
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Prefill attention of packed requests, each as `attention` would run it alone.

    Args:
        q: queries of all requests, one after another [total_q, Hq, D].
        k: keys [total_k, Hkv, D].
        v: values [total_k, Hkv, Dv].
        cu_seqlens_q: where each request's queries start, and the end, int32 [requests + 1].
        cu_seqlens_k: the same for keys.
        max_seqlen_q: queries of the longest request.
        max_seqlen_k: keys of the longest request.
        scale_factor: as in `attention`, like the rest; each request has its own threshold.
        causal: whether a query sees no key after its own position.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        backend: `auto`, or one by name.
        return_stats: also return tile counts.

    Returns:
        Output [total_q, Hq, Dv], and with `return_stats` the tile counts [requests, Hq]. A kernel leaves
        rows of no request as they were in memory.

    Raises:
        ValueError: shapes, lengths (where `cu_seqlens` are on the CPU), geometry or scale factors break a
            law.
        NotImplementedError: the named backend cannot run this call.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            "packed q, k and v must be [tokens, heads, head_dim], but got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (
        cu_seqlens_q.dim() != 1
        or cu_seqlens_q.shape != cu_seqlens_k.shape
        or not cu_seqlens_q.shape[0]
    ):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be [requests + 1] alike, but got "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    check_packed(cu_seqlens_q, q.shape[0], max_seqlen_q, "q")
    check_packed(cu_seqlens_k, k.shape[0], max_seqlen_k, "k")
    heads_first = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    check_qkv(*heads_first)
    check_geometry(tile_kv, window, tile_q)
    scale = scale_of(scale, q)
    chosen = choose_prefill(backend, *heads_first, window, tile_q, tile_kv, scale, 0)
    if chosen != "reference":
        factor, factors = kernel_factors(scale_factor, q.shape[1], q.device, "query")
        out, counts = run_prefill(
            chosen, *heads_first, factor, factors, causal, scale, window, tile_q, tile_kv, None, None,
            as_kernels_read(cu_seqlens_q, q.device), as_kernels_read(cu_seqlens_k, q.device), max_seqlen_q,
            return_stats,
        )  # fmt: skip
        out = _forward_only(out[0].transpose(0, 1), q, k, v)
        return (out, TileCounts(counts[..., 0], counts[..., 1])) if return_stats else out
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    starts = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    stats = []
    for (q0, k0), (q1, k1) in pairwise(starts):
        part, counted = attention(
            *(x[:, :, i:j] for x, i, j in zip(heads_first, (q0, k0, k0), (q1, k1, k1), strict=True)),
            scale_factor=scale_factor, causal=causal, scale=scale, window=window, tile_q=tile_q,
            tile_kv=tile_kv, backend="reference", return_stats=True,
        )  # fmt: skip
        out[q0:q1] = part[0].transpose(0, 1)
        stats.append(counted)
    if not return_stats:
        return out
    empty = torch.zeros(0, q.shape[1], dtype=torch.int64, device=q.device)
    return out, TileCounts(
        torch.cat([empty, *(counted.visited for counted in stats)]),
        torch.cat([empty, *(counted.skipped for counted in stats)]),
    )


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: float | torch.Tensor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., backend: Backend = ..., kv_start: int = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: float | torch.Tensor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., backend: Backend = ..., kv_start: int = ...,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


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
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Decode attention: one or a few new tokens per request against its cache, skipping KV tiles.

    The query heads of one KV head vote together, for each query token alone. Token t of T sees
    kv_len - T + t + 1 keys, and that is the length behind its threshold: sending tokens one by one
    or in
    a short run gives the same result.

    Args:
        q: queries [B, Hq, D], or [B, Hq, T, D] for runs of T tokens.
        k_cache: contiguous [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with
            `block_table`.
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
        check_block_table(block_table, kv_lens, q.shape[0], kv_start)
    check_geometry(tile_kv, window, None)
    scale = scale_of(scale, q)
    page = 0 if block_table is None else k_cache.shape[2]
    check_qkv(run, k_cache, v_cache, paged=block_table is not None)

    def why_not() -> str | None:
        reason: str | None = decode_kernel().why_not(run, v_cache, tile_kv, scale, kv_start, page)
        return reason

    if choose_backend(backend, q, {"triton": why_not}) == "triton":
        factor, factors = kernel_factors(scale_factor, k_cache.shape[1], q.device, "KV")
        capacity = page * block_table.shape[1] if block_table is not None else k_cache.shape[2]
        warn_if_known_meaningless(factor, kv_lens, capacity, tokens=run.shape[2])
        out, counts = decode_kernel().decode(
            run, k_cache, v_cache, kernel_lengths("kv_lens", kv_lens, q.shape[0], capacity, q.device),
            None if block_table is None else as_kernels_read(block_table, q.device),
            factor, factors, scale, window, tile_kv, running_max == "seeded", 0, return_stats,
        )  # fmt: skip
        out = _forward_only(out if q.dim() == 4 else out[:, :, 0], q, k_cache, v_cache)
        return (out, TileCounts(counts[..., 0], counts[..., 1])) if return_stats else out
    keys, values = k_cache, v_cache
    if block_table is not None:
        keys, values = (gather_pages(cache, block_table) for cache in (k_cache, v_cache))
    kv_heads, tokens = keys.shape[1], run.shape[2]
    factors = scale_factors(scale_factor, kv_heads, q.device, "KV")
    out = q.new_zeros(*run.shape[:3], values.shape[-1])
    shape = (q.shape[0], kv_heads)
    stats = TileCounts(*(torch.zeros(shape, dtype=torch.int64, device=q.device) for _ in range(2)))
    lengths = lengths_of(None, kv_lens, run, keys, kv_start)
    if block_table is not None:
        check_pages(block_table, lengths, window, k_cache)
    warn_if_meaningless(factors.max().item(), [kv_len - tokens + 1 for _, kv_len in lengths])
    for b, (_, kv_len) in enumerate(lengths):
        request = Request(tokens, kv_len, kv_start, True, window, None, tile_kv, running_max)
        out[b], stats.visited[b], stats.skipped[b] = reference.attend(
            run[b], keys[b], values[b], request, scale, factors
        )
    out = _forward_only(out if q.dim() == 4 else out[:, :, 0], q, k_cache, v_cache)
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
    check_qkv(q, k, k)
    check_geometry(tile_kv, window, tile_q)
    choose_backend(backend, q, {"triton": lambda: "tile_gaps has no kernel; `tile_statistics` has"})
    tiles = (-(-q.shape[2] // tile_q), -(-k.shape[2] // tile_kv))
    result = torch.full((*q.shape[:2], *tiles), -torch.inf, device=q.device, dtype=torch.float32)
    result = result.double() if q.dtype == torch.float64 else result
    for b, (q_len, kv_len) in enumerate(lengths_of(q_lens, kv_lens, q, k, 0)):
        request = Request(q_len, kv_len, 0, causal, window, tile_q, tile_kv)
        gaps = reference.gaps(q[b], k[b], request, scale_of(scale, q))
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
    check_qkv(q, k, v)
    check_geometry(tile_kv, window, None if decode else tile_q)
    scale = scale_of(scale, q)

    def why_not() -> str | None:
        rows = None if decode else tile_q
        reason: str | None = statistics_kernel().why_not(q, v, rows, tile_kv, scale, kv_start)
        return reason

    if choose_backend(backend, q, {"triton": why_not}) == "triton":
        out, histogram = statistics_kernel().statistics(
            q, k, v, decode=decode, causal=causal, scale=scale, window=window, tile_q=tile_q,
            tile_kv=tile_kv,
            seeded=running_max == "seeded",
        )  # fmt: skip
        return _forward_only(out, q, k, v), histogram
    kv_len = kv_start + k.shape[2]
    request = Request(
        q.shape[2],
        kv_len,
        kv_start,
        causal,
        window,
        None if decode else tile_q,
        tile_kv,
        running_max,
    )
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    heads = k.shape[1] if decode else q.shape[1]
    counts = torch.zeros(heads, BINS, dtype=torch.int64, device=q.device)
    mass, rows = counts.double(), 0
    for b, qkv in enumerate(zip(q, k, v, strict=True)):
        out[b], one = reference.statistics(*qkv, request, scale)
        counts, mass, rows = counts + one.counts, mass + one.mass, rows + one.rows
    return _forward_only(out, q, k, v), TileHistogram(counts, mass, rows)
