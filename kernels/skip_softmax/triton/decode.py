"""The host side of the Triton decode kernel: which calls it can run, how a shape is computed, the launch.

The kernel itself is in `decode_kernel.py`; only a launch imports it, and Triton with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from skip_softmax.launch import (
    LOG2E,
    MOST_TILE_BYTES,
    Device,
    cdiv,
    device_of,
    launching_on,
    next_power_of_2,
    precision,
    why_not_here,
    why_too_large,
    width,
)
from skip_softmax.meaning.call import Call, Requests

MOST_TOKENS = 16  # query tokens per request


class Config(NamedTuple):
    """A launch configuration.

    Attributes:
        per_processor: programs per multiprocessor, which sets the number of splits.
        warps: of `_decode`.
        stages: of its pipeline.
        ahead: whether v, too, is loaded ahead of its use (see `decode_kernel.py`).
        join: most splits that `_combine` reads at once.
        join_warps: of `_combine`.
        join_columns: columns of the output per program of `_combine`, a power of two; 0: all.
    """

    per_processor: int
    warps: int
    stages: int
    ahead: bool = False
    join: int = 64
    join_warps: int = 4
    join_columns: int = 0


# Measured on an H100, see kernels/bench/results.
AHEAD = Config(2, warps=4, stages=3, ahead=True, join=256, join_columns=32)
# For many small tiles: two programs per processor do not have enough bytes in flight.
AHEAD_SMALL = Config(4, warps=2, stages=3, ahead=True, join=256, join_columns=32)
# For calls that cannot load v ahead: few programs are split further, many are not.
LATE = Config(2, warps=4, stages=3, join=256, join_columns=32)
LATE_MANY = Config(4, warps=2, stages=2)
# Largest tile of k and v together that is loaded ahead [bytes]; its buffers take twice as much.
AHEAD_BYTES = 2**15
SMALL_BYTES = 2**14  # up to this, a tile of k and v is small
MANY_TILES = 64  # tiles per processor


def why_not(call: Call, device: Device) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    if call.q_len > MOST_TOKENS:
        return f"{call.q_len} query tokens are more than {MOST_TOKENS}"
    rows = call.q_len * call.group
    if rows > 128:
        return f"{rows} rows per KV head (tokens x query heads) are more than 128"
    if not 16 <= call.tile_kv <= 256:
        return f"tile_kv {call.tile_kv} is not between 16 and 256"
    if call.page and (call.page < 16 or call.page & (call.page - 1)):
        return f"page size {call.page} is not a power of two from 16"
    reason = why_not_here(call, device) or why_too_large(call, call.tile_kv)
    if reason is None and call.dtype == torch.float32 and rows > 32:
        # For wgmma, shared memory must then hold the parts of the queries too.
        reason = why_too_large(
            call, next_power_of_2(rows) + call.tile_kv, most=MOST_TILE_BYTES * 3 // 2
        )
    return reason


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
) -> None:
    """Runs a call that `why_not` accepts; see `launch`."""
    # An operator costs more of the host's time than both launches; only what traces the call needs one.
    traced = torch.compiler.is_compiling() or type(q) is not torch.Tensor
    (decode if traced else launch)(
        q, k, v, out, counts, requests.kv_lens, requests.table, factor, factors, call.scale, call.window,
        call.tile_kv, call.seeded, call.min_kv_len,
    )  # fmt: skip


def choose(
    batch_heads: int,
    tiles: int,
    processors: int,
    rows: int,
    tile_bytes: int,
    *,
    ahead: bool,
    paged: bool,
) -> tuple[Config, int, int]:
    """The configuration of a call, its splits and the stages of its pipeline.

    Args:
        batch_heads: requests times KV heads.
        tiles: KV tiles of the longest request.
        processors: multiprocessors of the device.
        rows: of the score tile.
        tile_bytes: of one tile of k and v.
        ahead: whether the call may load v ahead of its use.
        paged: whether page numbers are loaded first.
    """
    if not ahead:
        config = LATE_MANY if batch_heads >= processors else LATE
    else:
        many = batch_heads * tiles >= MANY_TILES * processors
        small = rows == 16 and tile_bytes <= SMALL_BYTES
        config = AHEAD_SMALL if small and many else AHEAD
    splits = max(1, min(config.per_processor * processors // batch_heads, tiles // 4))
    # Loads of page numbers take stages of the pipeline too; with 32 rows, more stages would spill.
    stages = 2 * config.stages - 1 if config.ahead and paged and rows == 16 else config.stages
    return config, splits, stages


def stages_that_fit(
    stages: int, k_bytes: int, v_bytes: int, rows: int, single: bool, armed: bool, shared: int
) -> int:
    """Stages of the pipeline that fit in shared memory, for a call that does not load v ahead.

    Args:
        stages: how many are wanted.
        k_bytes: of a tile of keys.
        v_bytes: of a tile of values; an armed call needs room for only one.
        rows: of the score tile; from 64 on its products are wgmma, which read shared memory later.
        single: whether tensors are fp32, whose parts need room too.
        armed: whether tiles may be skipped.
        shared: shared memory that a program may use [bytes].
    """
    many = rows >= 64
    # What else the compiled kernel has there: queries, weights before the product, parts of fp32.
    room = shared - 1024 * (40 if many else 16 + rows if single else 16)
    tiles = (room - v_bytes) // k_bytes if armed else room // (k_bytes + v_bytes)
    return max(1, min(stages, tiles + (not many)))


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    table: torch.Tensor | None,
    factor: float,
    factors: torch.Tensor | None,
    scale: float,
    window: int | None,
    tile_kv: int,
    seeded: bool,
    min_kv_len: int,
    splits: int = 0,
) -> None:
    """Skip-softmax decode attention; never synchronises with the device.

    Args:
        q: queries [B, Hq, T, D].
        k: contiguous [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with `table`.
        v: as `k`.
        out: takes the output [B, Hq, T, Dv].
        counts: visited and skipped tiles are added to it, int64 [B, Hkv, 2], or [Hkv, 2] for their sum over
            requests; None counts nothing.
        kv_lens: KV length per request, int32 [B]; None: Skv.
        table: page numbers, int32 [B, pages per request], or None.
        factor: scale factor of all heads [tokens]; 0 runs the kernel without skipping.
        factors: scale factor per KV head, fp32 [Hkv]; overrides `factor`.
        scale: factor of the scores.
        window: sliding window [tokens], or None.
        tile_kv: keys per tile.
        seeded: what a tile is compared with (see `decode_kernel.py`).
        min_kv_len: a token that sees fewer keys skips nothing.
        splits: programs per KV head and request; 0 chooses.
    """
    from skip_softmax.triton.decode_kernel import _combine, _decode

    if not out.numel():
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, _ = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    armed = factors is not None or factor > 0
    capacity = k.shape[2] if table is None else table.shape[1] * k.shape[2]
    on = device_of(q.device)
    rows = max(16, next_power_of_2(tokens * group))
    # The pipeliner cannot run a product of 64 rows ahead (it aborts on wgmma), nor a decision that needs
    # the running maximum of the tile before.
    k_bytes, v_bytes = (tile_kv * width(x.shape[-1]) * x.element_size() for x in (k, v))
    tile_bytes = k_bytes + v_bytes
    can = rows < 64 and tile_bytes <= AHEAD_BYTES and (seeded or not armed)
    tiles = cdiv(capacity, tile_kv)
    config, chosen, stages = choose(
        batch * kv_heads, tiles, on.processors, rows, tile_bytes, ahead=can, paged=table is not None
    )
    if not config.ahead:
        single = q.dtype == torch.float32
        stages = stages_that_fit(stages, k_bytes, v_bytes, rows, single, armed, on.shared)
    splits = 1 if armed and not seeded else splits or chosen
    shape = (batch, kv_heads, splits, tokens * group)
    parts = torch.empty(
        (*shape, v.shape[-1]) if splits > 1 else (0,), dtype=torch.float32, device=q.device
    )
    lse = torch.empty(shape if splits > 1 else (0,), dtype=torch.float32, device=q.device)
    early = splits > 1 and not on.on_cpu and on.major >= 9
    with launching_on(q):
        _decode[(splits, kv_heads, batch)](
            q, k, v, parts if splits > 1 else out, lse, counts, factors, kv_lens, table,
            factor, scale * LOG2E, capacity, window or 0, (min_kv_len or None) if armed else None,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            0 if table is None else table.stride(0),
            TOKENS=tokens, GROUP=group, ROWS=rows,
            HEAD_DIM=k.shape[-1], HEAD_DIM_V=v.shape[-1], WIDTH=width(k.shape[-1]),
            WIDTH_V=width(v.shape[-1]), TILE_KV=tile_kv, PAGE=0 if table is None else k.shape[2],
            WINDOWED=window is not None, ARMED=armed, SEEDED=seeded, SPLIT=splits > 1,
            EARLY=early, STATS=counts is not None, SUMMED=counts is not None and counts.dim() == 2,
            PRECISION=precision(q.dtype, tile_kv), AHEAD=config.ahead, STAGES=stages,
            num_warps=config.warps,
        )  # fmt: skip
        if splits > 1:
            columns = min(config.join_columns or width(v.shape[-1]), width(v.shape[-1]))
            _combine[(tokens * group * cdiv(v.shape[-1], columns), kv_heads, batch)](
                parts, lse, out, splits, *out.stride()[:3], TOKENS=tokens, GROUP=group,
                HEAD_DIM_V=v.shape[-1], WIDTH_V=columns, EARLY=early,
                BLOCK=min(config.join, next_power_of_2(splits)), num_warps=config.join_warps,
                **({"launch_pdl": True} if early else {}),
            )  # fmt: skip


# For torch.compile and other tracers; what they see must not allocate the output, which may be the caller's.
decode = torch.library.custom_op("skip_softmax::decode", launch, mutates_args=("out", "counts"))


@decode.register_fake
def _(*arguments: object) -> None:
    pass
