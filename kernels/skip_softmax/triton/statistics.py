"""The host side of the Triton kernel of tile statistics: which calls it can run, and the launch.

The kernel itself is in `statistics_kernel.py`; only a launch imports it, and Triton with it.
"""

from __future__ import annotations

import torch

from skip_softmax.launch import (
    LOG2E,
    Device,
    cdiv,
    descriptor,
    descriptor_fits,
    device_of,
    empty_output,
    launching_on,
    next_power_of_2,
    pieces,
    precision,
    why_not_blackwell,
    why_not_here,
    width,
)
from skip_softmax.meaning import histogram
from skip_softmax.meaning.call import Call, Scales
from skip_softmax.meaning.histogram import TileHistogram

MASS_UNIT = 2.0**-40


def why_not(call: Call, device: Device) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    if not 16 <= call.tile_kv <= 512:
        return f"tile_kv {call.tile_kv} is not between 16 and 512"
    if call.tile_q is not None and call.tile_q > 512:
        return f"tile_q {call.tile_q} is above 512"
    if call.heads_per_vote > 64:
        return f"{call.heads_per_vote} query heads per vote are more than 64"
    if call.decode and call.heads_per_vote > call.group:
        return f"votes of {call.heads_per_vote} query heads span KV heads, of {call.group} each"
    return why_not_here(call, device) or why_not_blackwell(device)


def run(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense attention of a batch, and its tiles by critical scale factor.

    Args:
        call: one that `why_not` accepts.
        q: queries [B, Hq, Sq, D].
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        scales: of an FP8 cache.

    Returns:
        Output [B, Hq, Sq, Dv] and the histogram, summed over the batch.
    """
    from skip_softmax.triton.statistics_kernel import _statistics

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, q_len, kv_len, tile_kv = q.shape[0], call.q_len, call.kv_len, call.tile_kv
    heads, group = call.vote_heads, call.heads_per_vote
    pack = next_power_of_2(group)
    single, wide = q.dtype == torch.float32, max(q.shape[-1], v.shape[-1]) > 128
    small = single or wide
    block_m = 64 if small else 128
    # As many keys as fit in shared memory beside the queries.
    block_n = min(tile_kv, 32 if single and wide else 64 if small else 128)
    vote_rows = call.tile_q or pack
    subs = max(1, vote_rows // block_m)
    blocks = cdiv(q_len + call.lead, block_m // pack * subs)
    items = batch * heads * blocks
    on = device_of(q.device)
    programs = max(1, min(items, 2 if on.on_cpu else on.processors))

    out = empty_output(q, v.shape[-1]).zero_()
    counts = torch.zeros(heads, histogram.BINS, dtype=torch.int64, device=q.device)
    mass = torch.zeros_like(counts)
    note_blocks = cdiv(kv_len, tile_kv) * (tile_kv // block_n)
    notes = torch.empty(
        2, programs, note_blocks, block_m * subs, dtype=torch.float32, device=q.device
    )
    row_lse = torch.empty(programs, block_m * subs, dtype=torch.float32, device=q.device)
    if items and kv_len:
        first, rest = pieces(k.shape[-1], q.dtype)
        columns = width(v.shape[-1])
        tma = on.major >= 9 and descriptor_fits(k, first + rest)
        tma_v = on.major >= 9 and descriptor_fits(v, columns)
        with launching_on(q):
            _statistics[(programs,)](
                q,
                descriptor(k, [block_n, first]) if tma else k,
                None if not rest else descriptor(k, [block_n, rest]) if tma else k,
                descriptor(v, [block_n, columns]) if tma_v else v,
                out, counts, mass, notes[0], notes[1], row_lse,
                scales.k_each, scales.v_each, call.scale * (scales.k or 1.0) * LOG2E, scales.v, q_len, kv_len,
                call.window or 0,
                # None compiles the kernel without the rule.
                min(call.dense_last, q_len) or None, call.lead or None,
                items, blocks, note_blocks,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                HEADS=heads, Q_GROUP=group, KV_GROUP=heads // call.kv_heads,
                PACK=pack,
                HEAD_DIM=k.shape[-1], HEAD_DIM_V=v.shape[-1], WIDTH=first, TAIL=rest,
                WIDTH_V=columns,
                BLOCK_M=block_m, SUBS=subs, VOTE_ROWS=vote_rows, BLOCK_N=block_n, PARTS=tile_kv // block_n,
                CHUNK=max(1, 16 * block_n // tile_kv), CAUSAL=call.causal, WINDOWED=call.window is not None,
                SEEDED=call.seeded, DECODE=call.decode, LOW=histogram.LOW, PER_OCTAVE=histogram.PER_OCTAVE,
                BINS=histogram.BINS, TMA=tma, TMA_V=tma_v,
                K_EACH=scales.k_per_head, V_EACH=scales.v_per_head, PRECISION=precision(q.dtype, block_n),
                STAGES=1 if single and wide else 2 if small else 3, num_warps=8,
            )  # fmt: skip
    rows = batch * q_len * group
    return out, TileHistogram(counts, mass.double() * MASS_UNIT, rows)
