"""The host side of the Triton prefill kernel: which calls it can run, how a shape is computed, the launch.

The kernel itself is in `prefill_kernel.py`; only a launch imports it, and Triton with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from skip_softmax.launch import (
    INTERPRETED,
    LOG2E,
    Device,
    Prepared,
    addresses_of,
    aligned,
    cdiv,
    descriptor,
    descriptor_fits,
    device_of,
    launching_on,
    on_device,
    pieces,
    precision,
    remember,
    stream_of,
    traced,
    why_not_blackwell,
    why_not_here,
    why_too_large,
    width,
)
from skip_softmax.meaning.call import Call, Requests, Scales, call_of, with_columns_together


@dataclass(frozen=True)
class Config:
    """How one shape is computed; never changes which tiles are skipped."""

    block_m: int
    warps: int
    stages: int  # of the path that loads values ahead
    sparse_stages: int = 2  # of the path that loads them after the decision
    tma: bool = True
    two_ways: bool = False  # whether an armed call also has the path that loads values ahead
    private: bool = False  # whether each warpgroup votes alone on that path (`private_votes`)
    registers: int | None = None
    probe: int = 8  # tiles before the path is first chosen
    span: int = 64  # tiles between later choices


def why_not(call: Call, device: Device) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    if not 16 <= call.tile_kv <= 256:
        return f"tile_kv {call.tile_kv} is not between 16 and 256"
    if call.tile_q is None or not 4 <= call.tile_q <= 128:
        return f"tile_q {call.tile_q} is not between 4 and 128 (a block has 128 rows and at most 32 votes)"
    if call.page % 16 or (call.page % call.tile_kv and call.tile_kv % call.page):
        return f"page size {call.page} is no multiple of 16 that divides tile_kv {call.tile_kv} or is divided"
    rows = max(call.tile_q, 64) if call.dtype == torch.float32 else 0
    return (
        why_not_here(call, device)
        or why_too_large(call, max(rows, call.tile_kv))
        or why_not_blackwell(device)
    )


def run(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    factors: torch.Tensor | None,
    requests: Requests,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    scales: Scales,
) -> None:
    """Runs a call that `why_not` accepts; never synchronises with the device.

    Args:
        call: what is computed.
        q: queries [B, Hq, Sq, D]; packed requests are one batch entry [1, Hq, total, D].
        k: keys [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with `requests.table`.
        v: values [B, Hkv, Skv, Dv], or pages as `k`.
        factor: scale factor of all heads [tokens]; 0 runs the kernel without skipping.
        factors: scale factor per query head, fp32 [Hq]; overrides `factor`.
        requests: where they are, as kernels read it.
        out: takes the output [B, Hq, Sq, Dv], padding rows as zeros; rows of no packed request stay as they
            are.
        counts: visited and skipped tiles are added to it, int64 [requests, Hq, 2], or [Hq, 2] for their sum
            over requests; None counts nothing.
        scales: of an FP8 cache.
    """
    if traced(q):
        prefill(
            q, k, v, out, counts, factor, factors, call.causal, call.scale, call.window, call.tile_q,
            call.tile_kv, call.dense_last, call.min_kv_len, requests.q_lens, requests.kv_lens,
            requests.q_starts, requests.kv_starts, requests.table, call.q_len, call.kv_len, call.ragged,
            *scales,
        )  # fmt: skip
    else:
        _launch(call, q, k, v, factor, factors, requests, out, counts, scales)


def choose(
    major: int, shared: int, size: int, columns: int, columns_v: int, tile_q: int, tile_kv: int,
    page: int = 0,
) -> Config:  # fmt: skip
    """The fastest known configuration of a shape; measured on an H100, see kernels/bench/results.

    Args:
        major: major compute capability of the device.
        shared: shared memory that a program may use [bytes].
        size: of an element [bytes].
        columns: of a tile of k.
        columns_v: of a tile of v.
        tile_q: query rows per vote.
        tile_kv: keys per tile.
        page: rows of a page, 0 without.
    """
    widest = max(columns, columns_v)
    if size == 4:
        config = Config(64, warps=8, stages=1, tma=False)
    elif widest <= 64 and tile_kv <= 128 and tile_q <= 64:
        # Three small programs per multiprocessor hide each other's waits.
        config = Config(64, warps=4, stages=2, sparse_stages=3, registers=168)
    elif widest <= 64:
        config = Config(128, warps=8, stages=3, sparse_stages=3)
    elif widest <= 128 and tile_kv <= 64:
        config = Config(128, warps=4, stages=2, sparse_stages=3)
    elif columns <= 192 and columns_v <= 128 and tile_kv <= 128 and major == 9:
        # One large program per multiprocessor: its two paths differ by more than switching costs.
        config = Config(128, warps=8, stages=3, sparse_stages=3, two_ways=True)
    else:
        config = Config(128 if major > 9 and widest <= 128 else 64, warps=8, stages=2)
    if major < 9 and size == 2 and widest > 64:
        # Without wgmma the scores of 128 rows do not fit in registers.
        config = Config(64, warps=8, stages=2)
    block_m = max(config.block_m, tile_q)
    room = shared - size * block_m * columns - 2048
    keys, values = size * tile_kv * columns, size * tile_kv * columns_v

    def steps(wanted: int, fitting: int) -> int:
        stages = max(1, min(wanted, fitting))
        # Page numbers are loaded as far ahead of what is on the page as that is of its use.
        return 2 * stages - 1 if page else stages

    return replace(
        config,
        private=config.two_ways
        and major == 9
        and block_m == 128
        and tile_q == 64
        and not INTERPRETED,
        block_m=block_m,
        warps=8 if block_m > config.block_m else config.warps,
        registers=config.registers if block_m == config.block_m and major == 9 else None,
        stages=steps(config.stages, room // (keys + values)),
        sparse_stages=steps(
            config.sparse_stages, (room - (1 if major >= 9 else 2) * values) // keys
        ),
        # One box is one tile, so it must lie in one page.
        tma=config.tma and major >= 9 and (not page or page >= tile_kv),
    )


class _Plan(NamedTuple):
    """How calls of one shape are launched.

    Attributes:
        kernel: the kernel.
        tma: whether it reads keys and values by TMA.
        tail: whether keys come in two pieces.
    """

    kernel: Prepared
    tma: bool
    tail: bool


# By all that a launch depends on but addresses and scale factors.
_plans: dict[object, _Plan] = {}


def _launch(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    factors: torch.Tensor | None,
    requests: Requests,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    scales: Scales,
) -> None:
    if not out.numel():
        return
    call, (q, k, v) = with_columns_together(call, q, k, v)
    armed = factors is not None or factor > 0
    table = requests.table
    lengths = requests.q_lens, requests.kv_lens, requests.q_starts, requests.kv_starts, table
    addresses = addresses_of(q, k, v, out, counts, factors, scales.k_each, scales.v_each, *lengths)
    key = (
        call, q.device, out.stride(), armed, None if counts is None else counts.dim(), requests.count(q),
        None if table is None else table.stride(0), scales.v is None, scales.k_per_head, scales.v_per_head,
        *aligned(addresses[:8]), *[x is None for x in lengths],
    )  # fmt: skip
    numbers = factor, call.scale * (scales.k or 1.0) * LOG2E, scales.v
    plan = _plans.get(key)
    if plan is None:
        plan = _planned(call, q, k, v, out, armed, requests, counts, scales)
        keys: Any = k
        tail: Any = k if plan.tail else None
        values: Any = v
        if plan.tma:
            first, rest = pieces(call.head_dim, call.dtype)
            keys = descriptor(k, [call.tile_kv, first])
            tail = descriptor(k, [call.tile_kv, rest]) if rest else None
            values = descriptor(v, [call.tile_kv, width(call.value_dim)])
        with launching_on(q):
            plan.kernel.first(
                q, keys, tail, values, out, counts, factors, *lengths, scales.k_each, scales.v_each, *numbers
            )  # fmt: skip
        if plan.kernel.compiled:
            remember(_plans, key, plan)
        return
    q_at, k_at, v_at, out_at, counts_at, factors_at, *rest_at = addresses
    scales_at, lengths_at = rest_at[:2], rest_at[2:]
    keys, values = (k, v) if plan.tma else (k_at, v_at)
    with on_device(q.device):
        plan.kernel.again(
            stream_of(q.device), q_at, keys, keys if plan.tail else None, values, out_at, counts_at,
            factors_at, *lengths_at, *scales_at, *numbers,
        )  # fmt: skip


def _planned(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    armed: bool,
    requests: Requests,
    counts: torch.Tensor | None,
    scales: Scales,
) -> _Plan:
    from skip_softmax.triton.prefill_kernel import _prefill

    on, (first, rest), columns = (
        device_of(q.device),
        pieces(call.head_dim, call.dtype),
        width(call.value_dim),
    )
    table = requests.table
    config = choose(
        on.major, on.shared, call.dtype.itemsize, first + rest, columns, call.tile_q, call.tile_kv, call.page
    )  # fmt: skip
    tma = config.tma and descriptor_fits(k, first + rest) and descriptor_fits(v, columns)
    kernel = Prepared(
        _prefill,
        (call.q_heads, cdiv(call.q_len + call.most_lead, config.block_m), requests.count(q)),
        (
            call.q_len, call.kv_len, call.window or 0,
            # None compiles the kernel without the rule.
            min(call.dense_last, call.q_len) or None if armed else None,
            call.min_kv_len or None if armed else None,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            None if table is None else table.stride(0),
        ),
        {
            "GROUP": call.group, "HEAD_DIM": call.head_dim, "HEAD_DIM_V": call.value_dim, "WIDTH": first,
            "TAIL": rest, "WIDTH_V": columns, "BLOCK_M": config.block_m, "TILE_Q": call.tile_q,
            "TILE_KV": call.tile_kv, "PAGE": call.page, "CAUSAL": call.causal,
            "WINDOWED": call.window is not None, "ARMED": armed, "TWO_WAYS": config.two_ways,
            "PRIVATE": config.private, "PROBE": config.probe, "SPAN": config.span, "TMA": tma,
            "LEADS": call.most_lead > 0, "STATS": counts is not None,
            "SUMMED": counts is not None and counts.dim() == 2, "K_EACH": scales.k_per_head,
            "V_EACH": scales.v_per_head,
            "PRECISION": precision(call.dtype, call.tile_kv), "STAGES": config.stages,
            "SPARSE_STAGES": config.sparse_stages,
        },
        num_warps=config.warps,
        maxnreg=config.registers,
    )  # fmt: skip
    return _Plan(kernel, tma, rest > 0)


@torch.library.custom_op("skip_softmax::prefill", mutates_args=("out", "counts"))
def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    factor: float,
    factors: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    tile_q: int,
    tile_kv: int,
    dense_last: int,
    min_kv_len: int,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    q_starts: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    table: torch.Tensor | None,
    most_q: int,
    most_kv: int,
    ragged: bool,
    k_scale: float | None,
    k_scales: torch.Tensor | None,
    v_scale: float | None,
    v_scales: torch.Tensor | None,
) -> None:
    """`run` for torch.compile and other tracers; what they see must not allocate the caller's output."""
    call = call_of(
        q, k, v, tile_q=tile_q, tile_kv=tile_kv, scale=scale, window=window, causal=causal,
        dense_last=dense_last, min_kv_len=min_kv_len, ragged=ragged, table=table, q_len=most_q,
        kv_len=most_kv,
    )  # fmt: skip
    requests = Requests(q_lens, kv_lens, q_starts, kv_starts, table)
    scales = Scales(k_scale, k_scales, v_scale, v_scales)
    _launch(call, q, k, v, factor, factors, requests, out, counts, scales)
