"""The public operations: validate, choose a backend, run.

An explicit backend never falls back: it runs what was asked or says why it cannot.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Literal, overload

import torch

from skip_softmax import reference
from skip_softmax.histogram import TileHistogram
from skip_softmax.reference import Request, RunningMax

Backend = Literal["auto", "reference", "triton", "hopper"]
Lengths = torch.Tensor | Sequence[int] | None


class DenseCallWarning(UserWarning):
    """A call ran dense because its threshold would be 1 or more, which has no meaning."""


class FallbackWarning(UserWarning):
    """The reference runs a call on a GPU because the kernels cannot; said once per reason."""


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


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
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale_factor: float | torch.Tensor = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ..., tile_q: int = ...,
    tile_kv: int = ..., backend: Backend = ..., q_lens: Lengths = ..., kv_lens: Lengths = ...,
    kv_start: int = ..., return_stats: Literal[True],
) -> tuple[torch.Tensor, Stats]: ...  # fmt: skip


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
    _check_qkv(q, k, v)
    _check_geometry(tile_kv, window, tile_q)
    scale = _scale(scale, q)
    chosen = _choose_prefill(backend, q, k, v, window, tile_q, tile_kv, scale, kv_start)
    if chosen != "reference":
        factor, factors = _kernel_factors(scale_factor, q.shape[1], q.device, "query")
        _warn_if_known_meaningless(factor, kv_lens, k.shape[2])
        out, counts = _run_prefill(
            chosen, q, k, v, factor, factors, causal, scale, window, tile_q, tile_kv,
            _kernel_lengths("q_lens", q_lens, q.shape[0], q.shape[2], q.device),
            _kernel_lengths("kv_lens", kv_lens, q.shape[0], k.shape[2], q.device),
            None, None, q.shape[2], return_stats,
        )  # fmt: skip
        return (out, Stats(counts[..., 0], counts[..., 1])) if return_stats else out
    factors = _scale_factors(scale_factor, q.shape[1], q.device, "query")
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    stats = Stats(*(torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) for _ in range(2)))
    lengths = _lengths(q_lens, kv_lens, q, k, kv_start)
    _warn_if_meaningless(factors, [kv_len for _, kv_len in lengths])
    for b, (q_len, kv_len) in enumerate(lengths):
        request = Request(q_len, kv_len, kv_start, causal, window, tile_q, tile_kv)
        out[b, :, :q_len], stats.visited[b], stats.skipped[b] = reference.attend(
            q[b], k[b], v[b], request, scale, factors
        )
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
) -> tuple[torch.Tensor, Stats]: ...  # fmt: skip


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
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
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
        Output [total_q, Hq, Dv], and with `return_stats` the tile counts [requests, Hq].

    Raises:
        ValueError: shapes, lengths, geometry or scale factors break a law.
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
    heads_first = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    _check_qkv(*heads_first)
    _check_geometry(tile_kv, window, tile_q)
    scale = _scale(scale, q)
    chosen = _choose_prefill(backend, *heads_first, window, tile_q, tile_kv, scale, 0)
    if chosen != "reference":
        factor, factors = _kernel_factors(scale_factor, q.shape[1], q.device, "query")
        out, counts = _run_prefill(
            chosen, *heads_first, factor, factors, causal, scale, window, tile_q, tile_kv, None, None,
            cu_seqlens_q.to(q.device, torch.int32), cu_seqlens_k.to(q.device, torch.int32),
            max_seqlen_q,
            return_stats,
        )  # fmt: skip
        out = out[0].transpose(0, 1)
        return (out, Stats(counts[..., 0], counts[..., 1])) if return_stats else out
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
    return out, Stats(
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
) -> tuple[torch.Tensor, Stats]: ...  # fmt: skip


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
        _check_block_table(block_table, kv_lens, k_cache, kv_start)
    _check_geometry(tile_kv, window, None)
    scale = _scale(scale, q)
    page = 0 if block_table is None else k_cache.shape[2]
    _check_qkv(run, k_cache, v_cache, paged=block_table is not None)

    def why_not() -> str | None:
        reason: str | None = _decode().why_not(run, v_cache, tile_kv, scale, kv_start, page)
        return reason

    if _choose_backend(backend, q, {"triton": why_not}) == "triton":
        factor, factors = _kernel_factors(scale_factor, k_cache.shape[1], q.device, "KV")
        capacity = page * block_table.shape[1] if block_table is not None else k_cache.shape[2]
        _warn_if_known_meaningless(factor, kv_lens, capacity, tokens=run.shape[2])
        out, counts = _decode().decode(
            run, k_cache, v_cache, _kernel_lengths("kv_lens", kv_lens, q.shape[0], capacity, q.device),
            None if block_table is None else block_table.to(q.device, torch.int32),
            factor, factors, scale, window, tile_kv, running_max == "seeded", 0, return_stats,
        )  # fmt: skip
        out = out if q.dim() == 4 else out[:, :, 0]
        return (out, Stats(counts[..., 0], counts[..., 1])) if return_stats else out
    if block_table is not None:
        if bool((block_table >= k_cache.shape[0]).any()):
            raise ValueError(f"block_table names a page that is not below {k_cache.shape[0]}")
        k_cache, v_cache = (_gather_pages(cache, block_table) for cache in (k_cache, v_cache))
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
            run[b], k_cache[b], v_cache[b], request, scale, factors
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
    _choose_backend(
        backend, q, {"triton": lambda: "tile_gaps has no kernel; `tile_statistics` has"}
    )
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
    scale = _scale(scale, q)

    def why_not() -> str | None:
        rows = None if decode else tile_q
        reason: str | None = _gaps().why_not(q, v, rows, tile_kv, scale, kv_start)
        return reason

    if _choose_backend(backend, q, {"triton": why_not}) == "triton":
        out, histogram = _gaps().statistics(
            q, k, v, decode=decode, causal=causal, scale=scale, window=window, tile_q=tile_q,
            tile_kv=tile_kv,
            seeded=running_max == "seeded",
        )  # fmt: skip
        return out, histogram
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
    pairs = [reference.statistics(*qkv, request, scale) for qkv in zip(q, k, v, strict=True)]
    histograms = [histogram for _, histogram in pairs]
    total = TileHistogram(
        counts=torch.stack([h.counts for h in histograms]).sum(0),
        mass=torch.stack([h.mass for h in histograms]).sum(0),
        rows=sum(h.rows for h in histograms),
    )
    return torch.stack([out for out, _ in pairs]), total


def _prefill() -> ModuleType:
    from skip_softmax import prefill

    return prefill


def _decode() -> ModuleType:
    from skip_softmax import decode

    return decode


def _hopper() -> ModuleType:
    from skip_softmax import hopper

    return hopper


def _gaps() -> ModuleType:
    from skip_softmax import gaps

    return gaps


def _choose_backend(
    backend: Backend, q: torch.Tensor, kernels: dict[str, Callable[[], str | None]]
) -> str:
    """The backend that runs a call.

    Args:
        backend: as asked.
        q: queries; only their device matters.
        kernels: the kernels of this operation, best first: each says why it cannot run the call, or None.
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
            f"the reference runs this call, slowly: {reason}", FallbackWarning, stacklevel=3
        )
    return "reference"


def _choose_prefill(
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
    return _choose_backend(
        backend,
        q,
        {
            "hopper": lambda: _hopper().why_not(q, k, v, tile_q, tile_kv, window, scale, kv_start),
            "triton": lambda: _prefill().why_not(q, v, tile_q, tile_kv, scale, kv_start),
        },
    )


def _run_prefill(
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
    if chosen == "hopper":
        # Window and geometry are those it accepted.
        run = partial(_hopper().hopper, q, k, v, factor, factors, causal, scale)
    else:
        run = partial(
            _prefill().prefill, q, k, v, factor, factors, causal, scale, window, tile_q, tile_kv
        )
    out, counts = run(*lengths_and_stats)
    return out, counts


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: bool = False) -> None:
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


def _kernel_factors(
    value: float | torch.Tensor, heads: int, device: torch.device, kind: str
) -> tuple[float, torch.Tensor | None]:
    """One number for all heads, or fp32 [heads]; a tensor on the device is taken as it is, without a wait."""
    if not isinstance(value, torch.Tensor):
        _scale_factors(value, heads, torch.device("cpu"), kind)
        return float(value), None
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        value = _scale_factors(value, heads, device, kind)
    elif value.shape not in ((), (heads,)):
        raise ValueError(
            f"scale_factor must be a number or a tensor [{heads}] (one per {kind} head), "
            f"but got shape {tuple(value.shape)}"
        )
    return 0.0, value.to(device, torch.float32).expand(heads).contiguous()


def _kernel_lengths(
    name: str, lengths: Lengths, batch: int, most: int, device: torch.device
) -> torch.Tensor | None:
    """int32 [batch] on the device; the host's numbers are checked, the kernel clamps the device's."""
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor) or (
        lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        values = [int(n) for n in lengths]
        if len(values) != batch or any(not 0 <= n <= most for n in values):
            raise ValueError(
                f"`{name}` must hold {batch} numbers from 0 to {most}, but got {values}"
            )
        return torch.tensor(values, dtype=torch.int32, device=device)
    if lengths.shape != (batch,):
        raise ValueError(
            f"`{name}` must hold {batch} numbers, but got shape {tuple(lengths.shape)}"
        )
    return lengths.to(device, torch.int32)


def _lengths(
    q_lens: Lengths, kv_lens: Lengths, q: torch.Tensor, k: torch.Tensor, kv_start: int
) -> list[tuple[int, int]]:
    batch, most_q, most_kv = q.shape[0], q.shape[2], kv_start + k.shape[2]
    queries = [most_q] * batch if q_lens is None else [int(n) for n in q_lens]
    keys = [most_kv] * batch if kv_lens is None else [int(n) for n in kv_lens]
    for name, values, most in (("q_lens", queries, most_q), ("kv_lens", keys, most_kv)):
        if len(values) != batch or any(not 0 <= n <= most for n in values):
            raise ValueError(
                f"`{name}` must hold {batch} numbers from 0 to {most}, but got {values}"
            )
    return list(zip(queries, keys, strict=True))


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _warn_if_meaningless(factors: torch.Tensor, kv_lens: list[int], stacklevel: int = 3) -> None:
    shortest, largest = min(kv_lens, default=0), float(factors.max()) if factors.numel() else 0.0
    if largest > 0 and largest >= shortest:
        warnings.warn(
            f"`scale_factor < kv_len` must hold, but got scale_factor={largest:g} with kv_len={shortest}; "
            "such votes run dense. Lower the scale factor, or send short requests to dense attention",
            DenseCallWarning,
            stacklevel=stacklevel,
        )


def _warn_if_known_meaningless(
    factor: float, kv_lens: Lengths, capacity: int, tokens: int = 1
) -> None:
    """As `_warn_if_meaningless`, from what the host knows."""
    if factor == 0 or isinstance(kv_lens, torch.Tensor) or torch.compiler.is_compiling():
        return
    lengths = [capacity] if kv_lens is None else [int(n) for n in kv_lens]
    _warn_if_meaningless(torch.tensor([factor]), [n - tokens + 1 for n in lengths], stacklevel=4)


def _check_block_table(
    block_table: torch.Tensor, kv_lens: Lengths, k_cache: torch.Tensor, kv_start: int
) -> None:
    if block_table.dim() != 2 or block_table.is_floating_point():
        raise ValueError(
            f"block_table must be integers [batch, pages], but got {tuple(block_table.shape)}"
        )
    if kv_lens is None or kv_start:
        raise ValueError("a paged cache needs `kv_lens`, and `kv_start=0`")


def _gather_pages(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """[pages, Hkv, page_size, D] -> [B, Hkv, tokens, D]; table entries below 0 are unused."""
    pages = cache[block_table.clamp_min(0).long()]
    return pages.permute(0, 2, 1, 3, 4).flatten(2, 3)
