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
    Prepared,
    addresses_of,
    aligned,
    cdiv,
    device_of,
    launching_on,
    next_power_of_2,
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
from skip_softmax.meaning.call import (
    FP8,
    Call,
    Requests,
    Scales,
    call_of,
    with_columns_together,
)

MOST_TOKENS = 16  # query tokens per request
MOST_COLUMNS = 576  # of the latent cache of MLA
# Rows whose output of 512 columns takes half of the registers; without wgmma, which reads queries from shared
# memory, half as many.
LATENT_ROWS, LATENT_ROWS_WITHOUT = 64, 32


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
        registers: most per thread of `_decode`; None: as many as the compiler takes.
    """

    per_processor: int
    warps: int
    stages: int
    ahead: bool = False
    join: int = 64
    join_warps: int = 4
    join_columns: int = 0
    registers: int | None = None


# Measured on an H100, see kernels/bench/results.
AHEAD = Config(2, warps=4, stages=3, ahead=True, join=256, join_columns=32)
# For many small tiles: two programs per processor do not have enough bytes in flight.
AHEAD_SMALL = Config(4, warps=2, stages=3, ahead=True, join=256, join_columns=32)
# For calls that cannot load v ahead: few programs are split further, many are not.
LATE = Config(2, warps=4, stages=3, join=256, join_columns=32)
LATE_MANY = Config(4, warps=2, stages=2)
# For small tiles of FP8, whose conversion takes registers: four programs per processor hide each other's
# waits; with v ahead of its use there is room for two. Measured on an H200, see kernels/bench/triton.md.
FP8_DENSE = Config(4, warps=2, stages=3, join=256, join_columns=32)
FP8_ARMED = Config(4, warps=4, stages=3, join=256, join_columns=32, registers=128)
# For heads above 256 columns: shared memory holds one program.
LATENT = Config(1, warps=8, stages=2, join=256, join_columns=32)
# Largest tile of k and v together that is loaded ahead [bytes]; its buffers take twice as much.
AHEAD_BYTES = 2**15
SMALL_BYTES = 2**14  # up to this, a tile of k and v is small
MANY_TILES = 64  # tiles per processor
LEAST_TILES = 4  # per program, where a request has several


def why_not(call: Call, device: Device) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    if call.q_len > MOST_TOKENS:
        return f"{call.q_len} query tokens are more than {MOST_TOKENS}"
    if call.heads_per_vote > call.group:
        return f"votes of {call.heads_per_vote} query heads span KV heads, of {call.group} each"
    rows = call.q_len * call.heads_per_vote
    if rows > 128:
        return f"{rows} rows per vote of heads (tokens x query heads) are more than 128"
    if not 16 <= call.tile_kv <= 256:
        return f"tile_kv {call.tile_kv} is not between 16 and 256"
    if call.page and (call.page < 16 or call.page & (call.page - 1)):
        return f"page size {call.page} is not a power of two from 16"
    if max(call.head_dim, call.value_dim) > 256:
        return why_not_here(call, device, MOST_COLUMNS) or _why_not_latent(call, rows, device)
    reason = why_not_here(call, device) or why_too_large(call, call.tile_kv)
    if reason is None and call.dtype == torch.float32 and rows > 32:
        # For wgmma, shared memory must then hold the parts of the queries too.
        reason = why_too_large(
            call, next_power_of_2(rows) + call.tile_kv, most=MOST_TILE_BYTES * 3 // 2
        )
    return reason


def _why_not_latent(call: Call, rows: int, device: Device) -> str | None:
    """Why heads as wide as those of a latent cache do not fit, or None."""
    for dtype in (torch.float32, FP8):
        if dtype in (call.dtype, call.kv_dtype):
            return f"head_dim {call.head_dim} in {dtype} is above 256"
    most = LATENT_ROWS if device.major >= 9 else LATENT_ROWS_WITHOUT
    if rows > most:
        return (
            f"{rows} rows per vote of heads (tokens x query heads) at head_dim {call.head_dim} are more than "
            f"{most}; let fewer heads vote together (`tile_heads`)"
        )
    needed = _latent_bytes(call, rows)
    if needed > device.shared:
        return (
            f"a tile of {call.tile_kv} keys of {call.head_dim} columns and {rows} queries take "
            f"{needed // 1024} KiB of shared memory, which is more than {device.shared // 1024}"
        )
    return why_not_blackwell(device)


def _latent_bytes(call: Call, rows: int) -> int:
    """Shared memory that one stage of a call takes: queries, a tile, weights."""
    rows = max(16, next_power_of_2(rows))
    columns = sum(pieces(call.head_dim, call.dtype))
    values = 0 if _aliased(call) else width(call.value_dim)
    return call.dtype.itemsize * (
        rows * (columns + call.tile_kv) + call.tile_kv * (columns + values)
    )


def _aliased(call: Call) -> bool:
    """Whether the first piece of a tile of keys is its tile of values."""
    return call.aliased and pieces(call.head_dim, call.dtype)[0] == call.value_dim


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
    """Runs a call that `why_not` accepts.

    Never synchronises with the device, and chooses by shapes alone: a captured graph stays right for other
    lengths, scale factors, tables and counts in the same tensors.

    Args:
        call: what is computed.
        q: queries [B, Hq, T, D].
        k: contiguous [B, Hkv, Skv, D], or pages [pages, Hkv, page_size, D] with `requests.table`.
        v: as `k`.
        factor: scale factor of all heads [tokens]; 0 runs the kernel without skipping.
        factors: scale factor per vote of heads, fp32 [vote_heads]; overrides `factor`.
        requests: KV lengths and the block table, as kernels read them.
        out: takes the output [B, Hq, T, Dv].
        counts: visited and skipped tiles are added to it, int64 [B, vote_heads, 2], or [vote_heads, 2] for
            their sum over requests; None counts nothing.
        scales: of an FP8 cache.
    """
    if traced(q):
        decode(
            q, k, v, out, counts, requests.kv_lens, requests.table, factor, factors, call.scale, call.window,
            call.tile_kv, call.seeded, call.min_kv_len, call.tile_heads, *scales,
        )  # fmt: skip
    else:
        _launch(
            call, q, k, v, factor, factors, requests.kv_lens, requests.table, out, counts, scales
        )


def choose(
    batch_heads: int,
    tiles: int,
    processors: int,
    rows: int,
    tile_bytes: int,
    *,
    ahead: bool,
    paged: bool,
    fp8: bool = False,
    armed: bool = True,
) -> tuple[Config, int]:
    """The configuration of a call, and the stages of its pipeline.

    Args:
        batch_heads: requests times votes of heads.
        tiles: KV tiles of the longest request.
        processors: multiprocessors of the device.
        rows: of the score tile.
        tile_bytes: of one tile of k and v.
        ahead: whether the call may load v ahead of its use.
        paged: whether page numbers are loaded first.
        fp8: whether k and v are converted where they are used.
        armed: whether tiles may be skipped.
    """
    small = rows == 16 and tile_bytes <= SMALL_BYTES
    if fp8 and small:
        config = FP8_ARMED if armed else FP8_DENSE
    elif not ahead:
        config = LATE_MANY if batch_heads >= processors else LATE
    else:
        many = batch_heads * tiles >= MANY_TILES * processors
        config = AHEAD_SMALL if small and many else AHEAD
    # Loads of page numbers take stages of the pipeline too; with 32 rows, more stages would spill.
    return config, 2 * config.stages - 1 if config.ahead and paged and rows == 16 else config.stages


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


def latent_config(call: Call, rows: int, on: Device) -> tuple[Config, int]:
    """The configuration of a call with heads above 256 columns, and the stages that fit in shared memory."""
    values = 0 if _aliased(call) else width(call.value_dim)
    tile = call.dtype.itemsize * call.tile_kv * (sum(pieces(call.head_dim, call.dtype)) + values)
    more = (on.shared - _latent_bytes(call, rows) - 1024) // tile
    buffers = 1 + max(0, min(LATENT.stages - 1, more))
    # Products of wgmma still read a tile while the next one arrives; others have it in registers by then.
    return LATENT, buffers if rows > 32 and on.major >= 9 else buffers + 1


class _Plan(NamedTuple):
    """How calls of one shape are launched.

    Attributes:
        decode: the kernel.
        combine: the one that joins splits; None where there are none.
        parts: size of the splits' outputs [numbers].
        lse: size of their log-sum-exps [numbers].
    """

    decode: Prepared
    combine: Prepared | None
    parts: int
    lse: int


# By all that a launch depends on but addresses and scale factors.
_plans: dict[object, _Plan] = {}


def _launch(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    factors: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    table: torch.Tensor | None,
    out: torch.Tensor,
    counts: torch.Tensor | None,
    scales: Scales,
) -> None:
    if not out.numel():
        return
    call, (q, k, v) = with_columns_together(call, q, k, v)
    armed = factors is not None or factor > 0
    addresses = addresses_of(
        q, k, v, out, counts, factors, kv_lens, table, scales.k_each, scales.v_each
    )
    scale = call.scale * (scales.k or 1.0) * LOG2E
    key = (
        call, q.device, out.stride(), armed, None if counts is None else counts.dim(), kv_lens is None,
        None if table is None else table.stride(0), scales.v is None, scales.k_per_head, scales.v_per_head,
        *aligned(addresses[:6]), *aligned(addresses[8:]),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _planned(call, out, q.device, armed, kv_lens, table, counts, scales)
        parts = lse = None
        if plan.combine is not None:
            scratch = torch.empty(plan.parts + plan.lse, dtype=torch.float32, device=q.device)
            parts, lse = scratch[: plan.parts], scratch[plan.parts :]
        with launching_on(q):
            plan.decode.first(
                q, k, v, out, parts, lse, counts, factors, kv_lens, table, scales.k_each, scales.v_each,
                factor, scale, scales.v,
            )  # fmt: skip
            if plan.combine is not None:
                plan.combine.first(parts, lse, out, kv_lens)
        if plan.decode.compiled:
            remember(_plans, key, plan)
        return
    q_at, k_at, v_at, out_at, counts_at, factors_at, lens_at, table_at, *scales_at = addresses
    parts_at = lse_at = None
    if plan.combine is not None:
        scratch = torch.empty(plan.parts + plan.lse, dtype=torch.float32, device=q.device)
        parts_at = scratch.data_ptr()
        lse_at = parts_at + 4 * plan.parts
    with on_device(q.device):
        stream = stream_of(q.device)
        plan.decode.again(
            stream, q_at, k_at, v_at, out_at, parts_at, lse_at, counts_at, factors_at, lens_at, table_at,
            *scales_at, factor, scale, scales.v,
        )  # fmt: skip
        if plan.combine is not None:
            plan.combine.again(stream, parts_at, lse_at, out_at, lens_at)


def _planned(
    call: Call,
    out: torch.Tensor,
    device: torch.device,
    armed: bool,
    kv_lens: torch.Tensor | None,
    table: torch.Tensor | None,
    counts: torch.Tensor | None,
    scales: Scales,
) -> _Plan:
    """How a call is launched: from host numbers alone, which hold for any lengths in `kv_lens`."""
    from skip_softmax.triton.decode_kernel import _combine, _decode

    on = device_of(device)
    batch, rows = out.shape[0], call.q_len * call.heads_per_vote
    padded_rows = max(16, next_power_of_2(rows))
    (first, rest), columns_v = pieces(call.head_dim, call.dtype), width(call.value_dim)
    aliased, tiles = _aliased(call), most_tiles(call)
    row = call.tile_kv * (call.kv_dtype or call.dtype).itemsize
    k_bytes, v_bytes = row * (first + rest), row * columns_v
    if max(call.head_dim, call.value_dim) > 256:
        config, stages = latent_config(call, rows, on)
    else:
        # The pipeliner cannot run a product of 64 rows ahead (it aborts on wgmma), nor a decision that needs
        # the running maximum of the tile before. Of aliased values there is nothing to load ahead.
        fp8 = call.kv_dtype is not None
        can = (
            not fp8
            and padded_rows < 64
            and k_bytes + v_bytes <= AHEAD_BYTES
            and (call.seeded or not armed)
        )
        config, stages = choose(
            batch * call.vote_heads, tiles, on.processors, padded_rows, k_bytes + v_bytes,
            ahead=can and not aliased, paged=table is not None, fp8=fp8, armed=armed,
        )  # fmt: skip
        if not config.ahead:
            single = call.dtype == torch.float32
            stages = stages_that_fit(
                stages, k_bytes, v_bytes, padded_rows, single, armed, on.shared
            )
    # Programs of a vote of heads for the whole batch, and the most that one request can have of them.
    programs = max(1, config.per_processor * on.processors // call.vote_heads)
    if armed and not call.seeded:
        programs = 1
    most = max(1, min(programs // (batch if kv_lens is None else 1), tiles // LEAST_TILES))
    split = most > 1
    # Every request has a program; rounding down leaves no more than `programs` beside.
    grid = batch * most if kv_lens is None else min(programs + batch - 1, batch * most)
    early = split and not on.on_cpu and on.major >= 9
    about = {
        "TILE_KV": call.tile_kv, "WINDOWED": call.window is not None, "LEAST": LEAST_TILES, "EARLY": early,
    }  # fmt: skip
    shape = {"TOKENS": call.q_len, "GROUP": call.heads_per_vote, "HEAD_DIM_V": call.value_dim}
    strides = [x for _, place in call.places for x in place[:3]]
    lengths = call.kv_len, call.window or 0
    decode = Prepared(
        _decode,
        (call.vote_heads, grid),
        (
            *lengths, (call.min_kv_len or None) if armed else None, batch, programs, *strides,
            *out.stride()[:3], 0 if table is None else table.stride(0),
        ),
        {
            **shape, **about, "SHARE": call.group // call.heads_per_vote, "ROWS": padded_rows,
            "HEAD_DIM": call.head_dim, "WIDTH": first, "TAIL": rest, "WIDTH_V": columns_v,
            "ALIASED": aliased, "PAGE": call.page, "ARMED": armed, "SEEDED": call.seeded, "SPLIT": split,
            "STATS": counts is not None, "SUMMED": counts is not None and counts.dim() == 2,
            "K_EACH": scales.k_per_head, "V_EACH": scales.v_per_head,
            "HALVES": call.kv_dtype is not None and call.dtype == torch.bfloat16 and not rest,
            "PRECISION": precision(call.dtype, call.tile_kv), "AHEAD": config.ahead, "STAGES": stages,
        },
        num_warps=config.warps, **({"maxnreg": config.registers} if config.registers else {}),
    )  # fmt: skip
    if not split:
        return _Plan(decode, None, 0, 0)
    joined = min(config.join_columns or columns_v, columns_v)
    combine = Prepared(
        _combine,
        # Of the requests that share `programs`, no more than half have two.
        (rows * cdiv(call.value_dim, joined), call.vote_heads, min(batch, max(1, programs // 2))),
        (*lengths, batch, programs, *out.stride()[:3]),
        {**shape, **about, "WIDTH_V": joined, "BLOCK": min(config.join, next_power_of_2(most))},
        num_warps=config.join_warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    numbers = grid * call.vote_heads * rows
    return _Plan(decode, combine, numbers * call.value_dim, numbers)


def most_tiles(call: Call) -> int:
    """The most KV tiles that a request of a call can visit."""
    tiles = cdiv(call.kv_len, call.tile_kv)
    if call.window is None:
        return tiles
    return min(tiles, cdiv(call.window + call.q_len - 2, call.tile_kv) + 1)


@torch.library.custom_op("skip_softmax::decode", mutates_args=("out", "counts"))
def decode(
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
    tile_heads: int | None,
    k_scale: float | None,
    k_scales: torch.Tensor | None,
    v_scale: float | None,
    v_scales: torch.Tensor | None,
) -> None:
    """`run` for torch.compile and other tracers; what they see must not allocate the caller's output."""
    call = call_of(
        q, k, v, tile_q=None, tile_kv=tile_kv, scale=scale, window=window,
        running_max="seeded" if seeded else "ascending", min_kv_len=min_kv_len, tile_heads=tile_heads,
        table=table,
    )  # fmt: skip
    scales = Scales(k_scale, k_scales, v_scale, v_scales)
    _launch(call, q, k, v, factor, factors, kv_lens, table, out, counts, scales)


@decode.register_fake
def _(*arguments: object) -> None:
    pass
