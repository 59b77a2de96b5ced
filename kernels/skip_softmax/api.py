"""The public operations: check, choose, run.

A backend asked for by name never falls back: it runs the call or raises an error that says why it cannot.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, overload

import torch

from skip_softmax.choose import Backend, Operation, choose
from skip_softmax.launch import empty_output
from skip_softmax.meaning import reference
from skip_softmax.meaning.call import (
    Call,
    Lengths,
    Requests,
    RunningMax,
    Scale,
    ScaleFactor,
    Scales,
    call_of,
    check_counts,
    check_out,
    check_packed,
    check_pages,
    check_table,
    dequantised,
    kernel_factors,
    same_memory,
    scale_factors,
    scales_of,
    warn_if_dense,
)
from skip_softmax.meaning.counts import TileCounts
from skip_softmax.meaning.histogram import TileHistogram


class _ForwardOnly(torch.autograd.Function):
    """Passes an output through; a backward pass through it raises an error that says why."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "skip-softmax attention has no backward pass, but a gradient was requested; run it under "
            "torch.no_grad(), or train with the model's own attention"
        )


def _forward_only(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out = _ForwardOnly.apply(out, *inputs)  # type: ignore[no-untyped-call]
    return out


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: ScaleFactor = ...,
    block_table: torch.Tensor | None = ..., causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., tile_q: int = ..., tile_kv: int = ..., dense_last: int = ...,
    min_kv_len: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., k_scale: Scale = ..., v_scale: Scale = ..., out: torch.Tensor | None = ...,
    counts: torch.Tensor | None = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: ScaleFactor = ...,
    block_table: torch.Tensor | None = ..., causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., tile_q: int = ..., tile_kv: int = ..., dense_last: int = ...,
    min_kv_len: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., k_scale: Scale = ..., v_scale: Scale = ..., out: torch.Tensor | None = ...,
    counts: torch.Tensor | None = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale_factor: ScaleFactor = 0.0,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    dense_last: int = 0,
    min_kv_len: int = 0,
    backend: Backend = "auto",
    q_lens: Lengths = None,
    kv_lens: Lengths = None,
    kv_start: int = 0,
    k_scale: Scale = None,
    v_scale: Scale = None,
    out: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Prefill attention that skips KV tiles whose softmax weight cannot matter (arXiv 2512.12087).

    Query tiles begin at multiples of `tile_q` of the request's positions, as KV tiles do: the first tile of a
    chunk that begins inside one holds only the rows from there on.

    Args:
        q: queries [B, Hq, Sq, D], fp16, bf16, fp32 or fp64. The last query is at position
            kv_len - 1. Keys and values have its dtype or are float8_e4m3fn.
        k: keys [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with `block_table`; Hq is a
            multiple of Hkv.
        v: values [B, Hkv, Skv, Dv], or pages as `k`.
        scale_factor: threshold times KV length [tokens], a number or a tensor [Hq]; 0 is dense.
        block_table: page numbers [B, pages per request], integer; None: keys and values are contiguous.
            Entries that no key of the request needs may be anything.
        causal: whether a query sees no key after its own position.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: a query sees its own position and the `window - 1` before it; None: no window.
        tile_q: query rows that vote together [tokens], a power of two.
        tile_kv: keys per tile [tokens], a power of two.
        dense_last: a vote that holds one of the last `dense_last` valid query rows of its request skips
            nothing [tokens]; its tiles count as visited and kept. 0: every vote may skip.
        min_kv_len: a request with a shorter KV length skips nothing [tokens]; 0: every request may skip.
        backend: `auto` takes hopper on sm_90 if it can run the call, else triton, and the reference on a CPU;
            a backend by name runs the call or raises.
        q_lens: valid queries per request [B], right-padded; None: Sq. Padding rows of the
            output are zero.
        kv_lens: KV length per request, counted from position 0 [B]; None: kv_start + Skv. Needed with
            `block_table`.
        kv_start: absolute position of the first key in `k` (sliding caches drop old keys).
        k_scale: what keys in FP8 are multiplied by, a number, or a tensor with one number or one per KV head;
            needed exactly where k and v are float8_e4m3fn (sm_89 and later, and the reference).
        v_scale: the same for values.
        out: takes the output, in its shape and q's dtype with a last stride of 1, and is returned; without
            gradients. None: a new tensor.
        counts: visited and skipped tiles are added to it, summed over requests, int64 [Hq, 2] on q's device.
        return_stats: also return tile counts.

    Returns:
        Output [B, Hq, Sq, Dv] in q's dtype (`out`, if given), and with `return_stats` the tile counts
        [B, Hq].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors are invalid.
        NotImplementedError: the named backend cannot run this call.
        RuntimeError: `out` is given where a gradient is wanted.
    """
    if block_table is not None:
        check_table(block_table, kv_lens, q.shape[0], kv_start)
    call, room = _settled(
        "prefill", backend, q, k, v, block_table, tile_q=tile_q, tile_kv=tile_kv, scale=scale, window=window,
        causal=causal, kv_start=kv_start, dense_last=dense_last, min_kv_len=min_kv_len,
        ragged=q_lens is not None or kv_lens is not None,
    )  # fmt: skip
    requests = Requests(q_lens, kv_lens, table=block_table)
    if out is not None:
        check_out(out, q, call.value_dim)
    scales = scales_of(k_scale, v_scale, call, q.device)
    written, stats = _attend(
        room, call, q, k, v, scale_factor, scales, requests, out, counts, return_stats
    )
    if out is None:
        out = _forward_only(written, q, k, v)
    return out if stats is None else (out, stats)


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int, *,
    scale_factor: ScaleFactor = ..., block_table: torch.Tensor | None = ..., kv_lens: Lengths = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., dense_last: int = ..., min_kv_len: int = ..., backend: Backend = ...,
    k_scale: Scale = ..., v_scale: Scale = ..., out: torch.Tensor | None = ...,
    counts: torch.Tensor | None = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int, *,
    scale_factor: ScaleFactor = ..., block_table: torch.Tensor | None = ..., kv_lens: Lengths = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., dense_last: int = ..., min_kv_len: int = ..., backend: Backend = ...,
    k_scale: Scale = ..., v_scale: Scale = ..., out: torch.Tensor | None = ...,
    counts: torch.Tensor | None = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale_factor: ScaleFactor = 0.0,
    block_table: torch.Tensor | None = None,
    kv_lens: Lengths = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    dense_last: int = 0,
    min_kv_len: int = 0,
    backend: Backend = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    out: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Prefill attention of packed requests, each as `attention` would run it alone.

    Args:
        q: queries of all requests, one after another [total_q, Hq, D].
        k: keys [total_k, Hkv, D], or pages [pages, Hkv, page_size, D] with `block_table`.
        v: values [total_k, Hkv, Dv], or pages as `k`.
        cu_seqlens_q: where each request's queries start, and the end, int32 [requests + 1].
        cu_seqlens_k: the same for keys; None with `block_table`.
        max_seqlen_q: queries of the longest request, or more.
        max_seqlen_k: keys of the longest request, or more.
        scale_factor: as in `attention`, like the rest; each request has its own threshold.
        block_table: page numbers [requests, pages per request], integer, or None.
        kv_lens: KV length of each request, its cached prefix and its new tokens [requests]; with
            `block_table` only.
        causal: whether a query sees no key after its own position.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        dense_last: last rows of each request whose votes skip nothing [tokens].
        min_kv_len: KV length below which a request skips nothing [tokens].
        backend: `auto`, or one by name.
        k_scale: of keys in FP8.
        v_scale: of values in FP8.
        out: takes the output [total_q, Hq, Dv], or None.
        counts: tiles are added to it, int64 [Hq, 2], or None.
        return_stats: also return tile counts.

    Returns:
        Output [total_q, Hq, Dv] (`out`, if given), and with `return_stats` the tile counts [requests, Hq].
        Rows that belong to no request are left as they are in `out`, and uninitialised without it.

    Raises:
        ValueError: shapes, lengths (of `cu_seqlens` on the CPU), geometry or scale factors are invalid.
        NotImplementedError: the named backend cannot run this call.
        RuntimeError: `out` is given where a gradient is wanted.
    """
    paged, kv_dims = block_table is not None, 3 if block_table is None else 4
    if q.dim() != 3 or k.dim() != kv_dims or v.dim() != kv_dims:
        law = "q [tokens, heads, head_dim], k and v pages [pages, heads, page_size, head_dim]"
        raise ValueError(
            f"{law if paged else 'packed q, k and v'} must be "
            f"{'so with `block_table`' if paged else '[tokens, heads, head_dim]'}, but got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if cu_seqlens_q.dim() != 1 or not cu_seqlens_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_q must be [requests + 1], but got {tuple(cu_seqlens_q.shape)}"
        )
    check_packed(cu_seqlens_q, q.shape[0], max_seqlen_q, "q")
    if block_table is not None:
        if cu_seqlens_k is not None:
            raise ValueError(
                "with `block_table`, `kv_lens` gives the KV lengths; pass cu_seqlens_k=None"
            )
        check_table(block_table, kv_lens, cu_seqlens_q.shape[0] - 1)
    elif cu_seqlens_k is None or kv_lens is not None or cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            "without `block_table`, cu_seqlens_q and cu_seqlens_k must be [requests + 1] alike and `kv_lens` "
            f"None, but got {tuple(cu_seqlens_q.shape)}, "
            f"{None if cu_seqlens_k is None else tuple(cu_seqlens_k.shape)} and kv_lens={kv_lens}"
        )
    else:
        check_packed(cu_seqlens_k, k.shape[0], max_seqlen_k, "k")
        k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    queries = q.transpose(0, 1).unsqueeze(0)
    call, room = _settled(
        "prefill", backend, queries, k, v, block_table, tile_q=tile_q, tile_kv=tile_kv, scale=scale,
        window=window, causal=causal, dense_last=dense_last, min_kv_len=min_kv_len, q_len=max_seqlen_q,
        kv_len=max_seqlen_k,
        # The same tensor twice: no request has a prefix.
        ragged=cu_seqlens_k is not cu_seqlens_q,
    )  # fmt: skip
    requests = Requests(
        kv_lens=kv_lens, q_starts=cu_seqlens_q, kv_starts=cu_seqlens_k, table=block_table
    )
    if out is not None:
        check_out(out, q, call.value_dim)
    heads_first = None if out is None else out.transpose(0, 1).unsqueeze(0)
    scales = scales_of(k_scale, v_scale, call, q.device)
    written, stats = _attend(
        room, call, queries, k, v, scale_factor, scales, requests, heads_first, counts, return_stats
    )
    if out is None:
        out = _forward_only(written[0].transpose(0, 1), q, k, v)
    return out if stats is None else (out, stats)


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: ScaleFactor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., tile_heads: int | None = ..., min_kv_len: int = ...,
    backend: Backend = ..., kv_start: int = ..., k_scale: Scale = ..., v_scale: Scale = ...,
    out: torch.Tensor | None = ...,
    counts: torch.Tensor | None = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: ScaleFactor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., tile_heads: int | None = ..., min_kv_len: int = ...,
    backend: Backend = ..., kv_start: int = ..., k_scale: Scale = ..., v_scale: Scale = ...,
    out: torch.Tensor | None = ...,
    counts: torch.Tensor | None = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: Lengths = None,
    *,
    scale_factor: ScaleFactor = 0.0,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    tile_kv: int = 64,
    running_max: RunningMax = "ascending",
    tile_heads: int | None = None,
    min_kv_len: int = 0,
    backend: Backend = "auto",
    kv_start: int = 0,
    k_scale: Scale = None,
    v_scale: Scale = None,
    out: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Decode attention: one or a few new tokens per request against its cache, skipping KV tiles.

    The query heads of one KV head vote together, or every `tile_heads` of them, separately for each query
    token. Token t of T sees
    kv_len - T + t + 1 keys, and that is the length in its threshold, so sending tokens one by one or in a
    short run gives the same result.

    Latent attention (MLA) decodes on its cache: one KV head, q [B, Hq, 576], `k_cache` of 576 columns, and
    `v_cache = k_cache[..., :512]`. A kernel that sees the same memory reads each tile once. Scores are those
    of expanded keys up to rounding, so numbers that were calibrated there hold, with the same `tile_heads`.

    A request of length 0 gives zeros, counts no tile, and its row of the block table is not read.

    With lengths, block table and scale factors in tensors on the GPU, the call never waits for it and may be
    captured in a CUDA graph, whose replays follow whatever the tensors then hold. Only the table's width, the
    longest that a request may be, is captured. Programs are shared out on the device: a request gets them in
    proportion to the KV tiles that it has at that moment, at least one and at most one for every four tiles.

    Args:
        q: queries [B, Hq, D], or [B, Hq, T, D] for runs of T tokens.
        k_cache: contiguous [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with
            `block_table`.
        v_cache: as `k_cache`, with Dv columns.
        kv_lens: KV length per request, the new tokens included [B]; None: kv_start + Skv.
        scale_factor: threshold times KV length [tokens], a number or a tensor with one per vote of heads
            [Hkv], or [Hq / tile_heads]; 0 is dense.
        block_table: page numbers [B, pages per request], integer; None: the cache is contiguous.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: a token sees its own position and the `window - 1` before it; None: no window.
        tile_kv: keys per tile [tokens], a power of two.
        running_max: what a tile is compared with, see `DecodeGeometry`.
        tile_heads: consecutive query heads that vote together: a part of a KV head's, or those of several;
            None: those of a KV head.
        min_kv_len: a token that sees fewer keys skips nothing [tokens].
        backend: `auto`, or one by name.
        kv_start: absolute position of the first key in `k_cache` (contiguous caches only).
        k_scale: what keys in FP8 are multiplied by, a number, or a tensor with one number or one per KV head;
            needed exactly where the caches are float8_e4m3fn. Scores and decisions include it.
        v_scale: the same for values.
        out: takes the output, in q's shape (the last dimension Dv) and dtype, and is returned; without
            gradients.
        counts: visited and skipped tiles are added to it, summed over requests, int64 [Hkv, 2] on q's device,
            or [Hq / tile_heads, 2].
        return_stats: also return tile counts.

    Returns:
        Output in q's shape (the last dimension Dv) and dtype, and with `return_stats` the tile counts
        [B, Hkv], or [B, Hq / tile_heads].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors are invalid.
        NotImplementedError: the named backend cannot run this call.
        RuntimeError: `out` is given where a gradient is wanted.
    """
    run = q if q.dim() == 4 else q.unsqueeze(2)
    if block_table is not None:
        check_table(block_table, kv_lens, q.shape[0], kv_start)
    call, room = _settled(
        "decode", backend, run, k_cache, v_cache, block_table, tile_q=None, tile_kv=tile_kv, scale=scale,
        window=window, kv_start=kv_start, running_max=running_max, tile_heads=tile_heads,
        min_kv_len=min_kv_len,
    )  # fmt: skip
    if out is not None:
        check_out(out, q, call.value_dim)
    requests = Requests(kv_lens=kv_lens, table=block_table)
    written, stats = _attend(
        room, call, run, k_cache, v_cache, scale_factor, scales_of(k_scale, v_scale, call, q.device),
        requests, out if out is None or q.dim() == 4 else out.unsqueeze(2), counts, return_stats,
    )  # fmt: skip
    if out is None:
        out = _forward_only(written if q.dim() == 4 else written.squeeze(2), q, k_cache, v_cache)
    return out if stats is None else (out, stats)


# Calls that a kernel runs, by all that decides about them. Every layer of every step asks, and the answer
# costs more of the host's time than a launch.
_asked: dict[object, tuple[Call, ModuleType]] = {}
MOST_ASKED = 1024


def _settled(
    operation: Operation,
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor | None,
    **about: Any,
) -> tuple[Call, ModuleType | None]:
    """The checked call (`call_of`, with `about`) and the room of the kernel that runs it (`choose`)."""
    if torch.compiler.is_compiling():
        call = call_of(q, k, v, table=table, **about)
        return call, choose(operation, backend, call, q.device)
    key = (
        operation, backend, q.device, None if table is None else table.shape, *about.values(),
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
        same_memory(k, v),
    )  # fmt: skip
    found = _asked.get(key)
    if found is not None:
        return found
    call = call_of(q, k, v, table=table, **about)
    room = choose(operation, backend, call, q.device)
    if room is None:
        return call, None
    if len(_asked) >= MOST_ASKED:
        _asked.clear()
    _asked[key] = call, room
    return call, room


def _attend(
    room: ModuleType | None,
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_factor: ScaleFactor,
    scales: Scales,
    requests: Requests,
    out: torch.Tensor | None,
    counts: torch.Tensor | None,
    return_stats: bool,
) -> tuple[torch.Tensor, TileCounts | None]:
    """Runs a call, by the reference if `room` is None.

    Tiles are counted per request if `return_stats` is set, and added to `counts` if it is given; without
    either, a kernel counts none.
    """
    if counts is not None:
        check_counts(counts, call, q.device)
    if out is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(
            "`out` takes no gradients, but an input requires one; run under torch.no_grad()"
        )
    stats = None
    if return_stats:
        shape = (requests.count(q), call.vote_heads, 2)
        stats = torch.zeros(shape, dtype=torch.int64, device=q.device)
    if room is not None:
        factor, factors = kernel_factors(scale_factor, call, q.device)
        if call.kv_len < call.min_kv_len:
            factor, factors = 0.0, None  # known here: the kernel without skipping
        if factor and requests.q_starts is None and not torch.compiler.is_compiling():
            # Lengths on the device are not read: that would synchronise with it.
            if requests.kv_lens is None:
                warn_if_dense(factor, call, [call.kv_len])
            elif not isinstance(requests.kv_lens, torch.Tensor):
                warn_if_dense(factor, call, requests.kv_lens)
        if out is None:
            out = empty_output(q, v.shape[-1])
        there = requests.as_kernels_read(call, q)
        # Only the sum of the requests is wanted: the kernel adds to it itself.
        tally = counts if stats is None else stats
        room.run(call, q, k, v, factor, factors, there, out, tally, scales)
    else:
        per_head = scale_factors(scale_factor, call, q.device)
        each = list(requests.each(call, q))
        if requests.table is not None:
            check_pages(each, k.shape[0])
        warn_if_dense(per_head.max().item(), call, [alone.call.kv_len for alone in each])
        if out is None:
            out = q.new_zeros(*q.shape[:3], v.shape[-1])
        elif requests.q_starts is None:
            out.zero_()  # padding rows
        stats = reference.run(q, k, v, each, per_head, out, scales)
    if counts is not None and stats is not None:
        counts += stats.sum(0)
    return out, TileCounts(*stats.unbind(-1)) if return_stats and stats is not None else None


def tile_gaps(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    dense_last: int = 0,
    backend: Backend = "auto",
    q_lens: Lengths = None,
    kv_lens: Lengths = None,
    k_scale: Scale = None,
) -> torch.Tensor:
    """The gap of every tile: row maximum minus running maximum before it, of the row where this is largest.

    A tile is skipped exactly when scale_factor > kv_len * exp(gap).

    Args:
        q: queries [B, Hq, Sq, D].
        k: keys [B, Hkv, Skv, D].
        causal: as in `attention`, like the rest.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        dense_last: last rows of each request whose votes skip nothing [tokens].
        backend: `auto`, or one by name.
        q_lens: valid queries per request [B].
        kv_lens: KV length per request [B].
        k_scale: of keys in FP8.

    Returns:
        [B, Hq, Tq, Tkv] nats; -inf where the tile is not visited, +inf at the first visited tile and
        wherever `dense_last` keeps every tile. Query tiles are cut as in `attention`, so that the first may
        hold fewer rows than `tile_q`.

    Raises:
        ValueError: shapes, lengths or geometry are invalid.
    """
    call = call_of(
        q, k, k, tile_q=tile_q, tile_kv=tile_kv, scale=scale, window=window, causal=causal,
        dense_last=dense_last,
    )  # fmt: skip
    choose("gaps", backend, call, q.device, stacklevel=3)
    each = list(Requests(q_lens, kv_lens).each(call, q))
    scales = scales_of(k_scale, k_scale, call, q.device)
    found = []
    for alone in each:
        keys = dequantised(alone.held(k), scales.k, scales.k_each, q)
        found.append(reference.gaps(q[alone.entry], keys, alone.call))
    # Of the request with most query tiles: those of two can differ by where their first rows lie.
    most = max([call.q_len // tile_q, *(alone.call.query_tiles for alone in each)])
    tiles = (most, -(-call.kv_len // tile_kv))
    result = torch.full((*q.shape[:2], *tiles), -torch.inf, device=q.device, dtype=torch.float32)
    result = result.double() if q.dtype == torch.float64 else result
    for alone, gaps in zip(each, found, strict=True):
        result[alone.entry, :, : gaps.shape[1], : gaps.shape[2]] = gaps
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
    dense_last: int = 0,
    running_max: RunningMax = "ascending",
    tile_heads: int | None = None,
    kv_start: int = 0,
    backend: Backend = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense attention that also counts its tiles by critical scale factor, in one pass.

    Args:
        q: queries [B, Hq, Sq, D]; every request of the batch has this length.
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        decode: query heads vote together, separately for each token, as in `decode_attention`; `tile_q` is
            not used.
        causal: as in `attention`, like the rest.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        dense_last: last rows of each request whose votes skip nothing [tokens].
        running_max: decode only, see `DecodeGeometry`.
        tile_heads: decode only, query heads that vote together, see `decode_attention`.
        kv_start: absolute position of the first key in `k`.
        backend: `auto`, or one by name.
        k_scale: of keys in FP8.
        v_scale: of values in FP8.

    Returns:
        Dense output [B, Hq, Sq, Dv] and the histogram, summed over the batch.

    Raises:
        ValueError: shapes or geometry are invalid.
    """
    call = call_of(
        q, k, v, tile_q=None if decode else tile_q, tile_kv=tile_kv, scale=scale, window=window,
        causal=causal, kv_start=kv_start, running_max=running_max, tile_heads=tile_heads,
        dense_last=dense_last,
    )  # fmt: skip
    room = choose("statistics", backend, call, q.device, stacklevel=3)
    scales = scales_of(k_scale, v_scale, call, q.device)
    run = reference.batch_statistics if room is None else room.run
    out, histogram = run(call, q, k, v, scales)
    return _forward_only(out, q, k, v), histogram
