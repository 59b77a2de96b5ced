"""The host side of the Triton prefill kernel: which calls it can run, how a shape is computed, the launch.

The kernel itself is in `prefill_kernel.py`; only a launch imports it, and Triton with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from skip_softmax.launch import (
    INTERPRETED,
    LOG2E,
    Device,
    cdiv,
    descriptor,
    descriptor_fits,
    device_of,
    launching_on,
    pieces,
    precision,
    why_not_blackwell,
    why_not_here,
    why_too_large,
    width,
)
from skip_softmax.meaning.call import Call, Requests, Scales


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
    """Runs a call that `why_not` accepts; see `prefill`."""
    prefill(
        q, k, v, out, counts, factor, factors, call.causal, call.scale, call.window, call.tile_q,
        call.tile_kv, call.dense_last, call.min_kv_len, requests.q_lens, requests.kv_lens,
        requests.q_starts, requests.kv_starts, requests.table, call.q_len, call.kv_len, call.most_lead,
        *scales,
    )  # fmt: skip


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
    most_lead: int,
    k_scale: float | None,
    k_scales: torch.Tensor | None,
    v_scale: float | None,
    v_scales: torch.Tensor | None,
) -> None:
    """Skip-softmax prefill attention; never synchronises with the device.

    Args:
        q: queries [B, Hq, Sq, D]; packed requests are one batch entry [1, Hq, total, D].
        k: keys [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with `table`.
        v: values [B, Hkv, Skv, Dv], or pages as `k`.
        out: takes the output [B, Hq, Sq, Dv], padding rows as zeros; rows of no packed request stay as they
            are.
        counts: visited and skipped tiles are added to it, int64 [requests, Hq, 2], or [Hq, 2] for their sum
            over requests; None counts nothing.
        factor: scale factor of all heads [tokens]; 0 runs the kernel without skipping.
        factors: scale factor per query head, fp32 [Hq]; overrides `factor`.
        causal: a row sees no key after its own position.
        scale: factor of the scores.
        window: sliding window [tokens], or None.
        tile_q: query rows per vote.
        tile_kv: keys per tile.
        dense_last: last rows of each request whose votes skip nothing.
        min_kv_len: a request with a shorter KV length skips nothing.
        q_lens: valid rows per request, int32 [B], or None.
        kv_lens: KV length per request, int32 [B], or None.
        q_starts: where each packed request starts, and the end, int32 [requests + 1]; None: not packed.
        kv_starts: the same for keys, or None.
        table: page numbers, int32 [requests, pages per request], or None.
        most_q: rows of the longest request.
        most_kv: keys of the longest request.
        most_lead: most rows of a request's first query tile that lie before its first row (`Call.lead`).
        k_scale: of an FP8 cache, as the next three (`Scales`).
        k_scales: the same on the device, fp32.
        v_scale: of values.
        v_scales: of values.
    """
    from skip_softmax.triton.prefill_kernel import _prefill

    on, (first, rest), columns = device_of(q.device), pieces(q.shape[-1]), width(v.shape[-1])
    page = 0 if table is None else k.shape[2]
    config = choose(
        on.major, on.shared, q.element_size(), first + rest, columns, tile_q, tile_kv, page
    )
    # False where the host knows that the call is dense: the kernel without a branch.
    armed = factors is not None or factor > 0
    scales = Scales(k_scale, k_scales, v_scale, v_scales)
    if not out.numel():
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    tma = config.tma and descriptor_fits(k, first + rest) and descriptor_fits(v, columns)
    requests = q.shape[0] if q_starts is None else q_starts.shape[0] - 1
    grid = (q.shape[1], cdiv(most_q + most_lead, config.block_m), requests)
    with launching_on(q):
        _prefill[grid](
            q,
            descriptor(k, [tile_kv, first]) if tma else k,
            None if not rest else descriptor(k, [tile_kv, rest]) if tma else k,
            descriptor(v, [tile_kv, columns]) if tma else v,
            out, counts, factors, q_lens, kv_lens, q_starts, kv_starts,
            table, k_scales, v_scales, factor, scale * (k_scale or 1.0) * LOG2E, v_scale, most_q, most_kv,
            window or 0,
            # None compiles the kernel without the rule.
            min(dense_last, most_q) or None if armed else None,
            min_kv_len or None if armed else None,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            None if table is None else table.stride(0),
            GROUP=q.shape[1] // k.shape[1], HEAD_DIM=k.shape[-1], HEAD_DIM_V=v.shape[-1],
            WIDTH=first, TAIL=rest, WIDTH_V=columns, BLOCK_M=config.block_m, TILE_Q=tile_q,
            TILE_KV=tile_kv, PAGE=page, CAUSAL=causal, WINDOWED=window is not None, ARMED=armed,
            TWO_WAYS=config.two_ways, PRIVATE=config.private, PROBE=config.probe, SPAN=config.span,
            TMA=tma, LEADS=most_lead > 0, STATS=counts is not None,
            SUMMED=counts is not None and counts.dim() == 2, K_EACH=scales.k_per_head,
            V_EACH=scales.v_per_head, PRECISION=precision(q.dtype, tile_kv),
            STAGES=config.stages, SPARSE_STAGES=config.sparse_stages, num_warps=config.warps,
            maxnreg=config.registers,
        )  # fmt: skip
