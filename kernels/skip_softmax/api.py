"""The public operations: check, choose, run.

A backend asked for by name never falls back: it runs the call or raises an error that says why it cannot.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from skip_softmax.choose import Backend, Operation, choose
from skip_softmax.meaning import reference
from skip_softmax.meaning.call import (
    Call,
    Lengths,
    Requests,
    RunningMax,
    ScaleFactor,
    call_of,
    check_counts,
    check_out,
    check_packed,
    check_pages,
    check_table,
    gathered,
    kernel_factors,
    scale_factors,
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
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., dense_last: int = ..., backend: Backend = ..., q_lens: Lengths = ...,
    kv_lens: Lengths = ..., kv_start: int = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: ScaleFactor = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., dense_last: int = ..., backend: Backend = ..., q_lens: Lengths = ...,
    kv_lens: Lengths = ..., kv_start: int = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, TileCounts]: ...  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale_factor: ScaleFactor = 0.0,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    dense_last: int = 0,
    backend: Backend = "auto",
    q_lens: Lengths = None,
    kv_lens: Lengths = None,
    kv_start: int = 0,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Prefill attention that skips KV tiles whose softmax weight cannot matter (arXiv 2512.12087).

    Args:
        q: queries [B, Hq, Sq, D], fp16, bf16, fp32 or fp64. The last query is at position
            kv_len - 1.
        k: keys [B, Hkv, Skv, D]; Hq is a multiple of Hkv.
        v: values [B, Hkv, Skv, Dv].
        scale_factor: threshold times KV length [tokens], a number or a tensor [Hq]; 0 is dense.
        causal: whether a query sees no key after its own position.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: a query sees its own position and the `window - 1` before it; None: no window.
        tile_q: query rows that vote together [tokens], a power of two.
        tile_kv: keys per tile [tokens], a power of two.
        dense_last: a vote that holds one of the last `dense_last` valid query rows of its request skips
            nothing [tokens]; its tiles count as visited and kept. 0: every vote may skip.
        backend: `auto` takes hopper on sm_90 if it can run the call, else triton, and the reference on a CPU;
            a backend by name runs the call or raises.
        q_lens: valid queries per request [B], right-padded; None: Sq. Padding rows of the
            output are zero.
        kv_lens: KV length per request, counted from position 0 [B]; None: kv_start + Skv.
        kv_start: absolute position of the first key in `k` (sliding caches drop old keys).
        return_stats: also return tile counts.

    Returns:
        Output [B, Hq, Sq, Dv] in q's dtype, and with `return_stats` the tile counts [B, Hq].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors are invalid.
        NotImplementedError: the named backend cannot run this call.
    """
    call = call_of(
        q, k, v, tile_q=tile_q, tile_kv=tile_kv, scale=scale, window=window, causal=causal, kv_start=kv_start,
        dense_last=dense_last,
    )  # fmt: skip
    requests = Requests(q_lens, kv_lens)
    out, stats = _attend("prefill", backend, call, q, k, v, scale_factor, requests, return_stats)
    out = _forward_only(out, q, k, v)
    return (out, stats) if return_stats else out


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    scale_factor: ScaleFactor = ..., causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., tile_q: int = ..., tile_kv: int = ..., dense_last: int = ...,
    backend: Backend = ..., return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    scale_factor: ScaleFactor = ..., causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., tile_q: int = ..., tile_kv: int = ..., dense_last: int = ...,
    backend: Backend = ..., return_stats: Literal[True],
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
    scale_factor: ScaleFactor = 0.0,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    tile_q: int = 64,
    tile_kv: int = 128,
    dense_last: int = 0,
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
        dense_last: last rows of each request whose votes skip nothing [tokens].
        backend: `auto`, or one by name.
        return_stats: also return tile counts.

    Returns:
        Output [total_q, Hq, Dv], and with `return_stats` the tile counts [requests, Hq]. A kernel leaves
        rows that belong to no request uninitialised.

    Raises:
        ValueError: shapes, lengths (of `cu_seqlens` on the CPU), geometry or scale factors are invalid.
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
    call = call_of(
        *heads_first, tile_q=tile_q, tile_kv=tile_kv, scale=scale, window=window, causal=causal,
        dense_last=dense_last, q_len=max_seqlen_q, kv_len=max_seqlen_k,
    )  # fmt: skip
    requests = Requests(q_starts=cu_seqlens_q, kv_starts=cu_seqlens_k)
    out, stats = _attend(
        "prefill", backend, call, *heads_first, scale_factor, requests, return_stats
    )
    out = _forward_only(out[0].transpose(0, 1), q, k, v)
    return (out, stats) if return_stats else out


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: ScaleFactor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., min_kv_len: int = ..., backend: Backend = ..., kv_start: int = ...,
    out: torch.Tensor | None = ..., counts: torch.Tensor | None = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_lens: Lengths = ..., *,
    scale_factor: ScaleFactor = ..., block_table: torch.Tensor | None = ...,
    scale: float | None = ..., window: int | None = ..., tile_kv: int = ...,
    running_max: RunningMax = ..., min_kv_len: int = ..., backend: Backend = ..., kv_start: int = ...,
    out: torch.Tensor | None = ..., counts: torch.Tensor | None = ...,
    return_stats: Literal[True],
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
    min_kv_len: int = 0,
    backend: Backend = "auto",
    kv_start: int = 0,
    out: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TileCounts]:
    """Decode attention: one or a few new tokens per request against its cache, skipping KV tiles.

    The query heads of one KV head vote together, separately for each query token. Token t of T sees
    kv_len - T + t + 1 keys, and that is the length in its threshold, so sending tokens one by one or in a
    short run gives the same result.

    A request of length 0 gives zeros, counts no tile, and its row of the block table is not read.

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
        min_kv_len: a token that sees fewer keys skips nothing [tokens].
        backend: `auto`, or one by name.
        kv_start: absolute position of the first key in `k_cache` (contiguous caches only).
        out: takes the output, in q's shape (the last dimension Dv) and dtype, and is returned; without
            gradients.
        counts: visited and skipped tiles are added to it, summed over requests, int64 [Hkv, 2] on q's device.
        return_stats: also return tile counts.

    Returns:
        Output in q's shape and dtype, and with `return_stats` the tile counts [B, Hkv].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors are invalid.
        NotImplementedError: the named backend cannot run this call.
        RuntimeError: `out` is given where a gradient is wanted.
    """
    run = q if q.dim() == 4 else q[:, :, None]
    if block_table is not None:
        check_table(block_table, kv_lens, q.shape[0], kv_start)
    call = call_of(
        run, k_cache, v_cache, tile_q=None, tile_kv=tile_kv, scale=scale, window=window, kv_start=kv_start,
        running_max=running_max, min_kv_len=min_kv_len, table=block_table,
    )  # fmt: skip
    if out is not None:
        check_out(out, q, call.value_dim)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
            raise RuntimeError(
                "`out` takes no gradients, but an input requires one; run under torch.no_grad()"
            )
    if counts is not None:
        check_counts(counts, call, q.device)
    requests = Requests(kv_lens=kv_lens, table=block_table)
    result, per_request = _decode(
        backend, call, run, k_cache, v_cache, scale_factor, requests,
        out if out is None or q.dim() == 4 else out[:, :, None], counts, return_stats,
    )  # fmt: skip
    if out is None:
        out = _forward_only(result if q.dim() == 4 else result[:, :, 0], q, k_cache, v_cache)
    if per_request is None:
        return out
    return out, TileCounts(per_request[..., 0], per_request[..., 1])


def _decode(
    backend: Backend,
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_factor: ScaleFactor,
    requests: Requests,
    out: torch.Tensor | None,
    counts: torch.Tensor | None,
    return_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs a decode call; the output, and with `return_stats` the tiles of each request [B, Hkv, 2]."""
    room = choose("decode", backend, call, q.device)
    per_request = None
    if room is None:
        result, per_request = _by_reference(call, q, k, v, scale_factor, requests)
        out = result if out is None else out.copy_(result)
    else:
        factor, factors = _checked_factors(scale_factor, call, requests, q)
        if out is None:
            out = q.new_empty((*q.shape[:3], v.shape[3]))
        if return_stats:
            shape = q.shape[0], call.kv_heads, 2
            per_request = torch.zeros(shape, dtype=torch.int64, device=q.device)
        there = requests.as_kernels_read(call, q)
        room.run(
            call,
            q,
            k,
            v,
            factor,
            factors,
            there,
            out,
            counts if per_request is None else per_request,
        )
    if counts is not None and per_request is not None:
        counts += per_request.sum(0)
    return out, per_request if return_stats else None


def _attend(
    operation: Operation,
    backend: Backend,
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_factor: ScaleFactor,
    requests: Requests,
    return_stats: bool,
) -> tuple[torch.Tensor, TileCounts]:
    """Chooses who runs the call, and runs it; a kernel counts tiles only if `return_stats` is set."""
    room = choose(operation, backend, call, q.device)
    if room is None:
        out, counts = _by_reference(call, q, k, v, scale_factor, requests)
    else:
        factor, factors = _checked_factors(scale_factor, call, requests, q)
        there = requests.as_kernels_read(call, q)
        out, counts = room.run(call, q, k, v, factor, factors, there, return_stats)
    return out, TileCounts(counts[..., 0], counts[..., 1])


def _checked_factors(
    scale_factor: ScaleFactor, call: Call, requests: Requests, q: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """The scale factors as kernels read them; warns of requests that they make dense."""
    factor, factors = kernel_factors(scale_factor, call, q.device)
    if factor and requests.q_starts is None and not torch.compiler.is_compiling():
        # Lengths on the device are not read: that would synchronise with it.
        if requests.kv_lens is None:
            warn_if_dense(factor, call, [call.kv_len])
        elif not isinstance(requests.kv_lens, torch.Tensor):
            warn_if_dense(factor, call, requests.kv_lens)
    return factor, factors


def _by_reference(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_factor: ScaleFactor,
    requests: Requests,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and tile counts [requests, heads that vote, 2] of the reference."""
    per_head = scale_factors(scale_factor, call, q.device)
    if requests.table is not None:
        pages = k.shape[0]
        k, v = gathered(k, requests.table), gathered(v, requests.table)
    each = list(requests.each(call, q.shape[0]))
    calls = [alone for *_, alone in each]
    if requests.table is not None:
        check_pages(requests.table, calls, pages)
    warn_if_dense(per_head.max().item(), call, [alone.kv_len for alone in calls])
    return reference.run(q, k, v, each, per_head)


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

    Returns:
        [B, Hq, Tq, Tkv] nats; -inf where the tile is not visited, +inf at the first visited tile and
        wherever `dense_last` keeps every tile.

    Raises:
        ValueError: shapes, lengths or geometry are invalid.
    """
    call = call_of(
        q, k, k, tile_q=tile_q, tile_kv=tile_kv, scale=scale, window=window, causal=causal,
        dense_last=dense_last,
    )  # fmt: skip
    choose("gaps", backend, call, q.device, stacklevel=3)
    tiles = (-(-call.q_len // tile_q), -(-call.kv_len // tile_kv))
    result = torch.full((*q.shape[:2], *tiles), -torch.inf, device=q.device, dtype=torch.float32)
    result = result.double() if q.dtype == torch.float64 else result
    for b, _, _, alone in Requests(q_lens, kv_lens).each(call, q.shape[0]):
        gaps = reference.gaps(q[b], k[b], alone)
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
    dense_last: int = 0,
    running_max: RunningMax = "ascending",
    kv_start: int = 0,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense attention that also counts its tiles by critical scale factor, in one pass.

    Args:
        q: queries [B, Hq, Sq, D]; every request of the batch has this length.
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        decode: the heads of a KV head vote separately for each query token (`tile_q` is not used).
        causal: as in `attention`, like the rest.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: sliding window [tokens], or None.
        tile_q: query rows that vote together [tokens].
        tile_kv: keys per tile [tokens].
        dense_last: last rows of each request whose votes skip nothing [tokens].
        running_max: decode only, see `DecodeGeometry`.
        kv_start: absolute position of the first key in `k`.
        backend: `auto`, or one by name.

    Returns:
        Dense output [B, Hq, Sq, Dv] and the histogram, summed over the batch.

    Raises:
        ValueError: shapes or geometry are invalid.
    """
    call = call_of(
        q, k, v, tile_q=None if decode else tile_q, tile_kv=tile_kv, scale=scale, window=window,
        causal=causal, kv_start=kv_start, running_max=running_max, dense_last=dense_last,
    )  # fmt: skip
    room = choose("statistics", backend, call, q.device, stacklevel=3)
    out, histogram = (reference.batch_statistics if room is None else room.run)(call, q, k, v)
    return _forward_only(out, q, k, v), histogram
