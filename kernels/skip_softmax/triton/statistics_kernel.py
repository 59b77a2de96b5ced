"""Dense attention that also counts its tiles by critical scale factor, in Triton and in one pass.

A program walks the tiles of some rows as dense attention does, and notes two numbers per row and tile:
the gap, and log2 of the tile's softmax weight. A tile's share of the row is known only with the row's sum,
at the end of the walk; then the program reads its notes back, joins the rows of each vote, and adds the
votes to the histogram. One program's notes are tiles x rows numbers, and there are only as many programs as
run at once, each taking one item after another: memory grows with kv_len, never with its square.

Weights are added as integers (units of 2^-40), so that a histogram does not depend on the order of its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skip_softmax.triton.primitives import (
    load_queries,
    load_tile,
    online_softmax,
    place_of,
    scale_of,
    scores_of,
    visible,
    visited_tiles,
    whole_tiles,
)


@triton.jit
def _observe(
    first, last, acc, l, m, before, q, q_tail, k, k_tail, v, k_offset, v_offset, k_place, v_place, k_stride,
    v_stride, position, row_first, row_last, kv_len, window, scale, seed, gaps, weights_log2, note,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, NOTE_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, SEEDED: tl.constexpr,
    TMA: tl.constexpr, TMA_V: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dense attention over key blocks `first` to `last`, noting each row's gap and weight in each."""
    for block in tl.range(first, last, num_stages=STAGES):
        start = block * BLOCK_N
        scores = scores_of(
            q, q_tail, k, k_tail, k_offset, k_place, k_stride, start, kv_len, BLOCK_N, HEAD_DIM, WIDTH,
            TAIL, TMA, MASKED, PRECISION,
        )  # fmt: skip
        values = load_tile(
            v, v_offset, v_place, v_stride, start, kv_len, BLOCK_N, HEAD_DIM_V, WIDTH_V, TMA_V, MASKED,
            True,
        )  # fmt: skip
        if MASKED:
            seen = visible(
                position, start + tl.arange(0, BLOCK_N), kv_len, window, CAUSAL, WINDOWED
            )
            scores = tl.where(seen, scores, float("-inf"))
        top = tl.max(scores, 1) * scale
        tile = block // PARTS
        if SEEDED:
            gap = tl.where((tile == row_first) | (tile == row_last), float("inf"), top - seed)
        else:
            # All parts of a tile are compared with the running maximum before its first part.
            before = tl.where(block % PARTS == 0, m, before)
            gap = top - before
        if MASKED:
            gap = tl.where(top == float("-inf"), float("-inf"), gap)
        m_new = tl.maximum(m, top)
        weights, l, acc = online_softmax(scores, scale, m, m_new, m, l, acc, MASKED, False)
        inside = tl.sum(weights, 1)
        tl.store(gaps + note + block * NOTE_ROWS, gap)
        tl.store(weights_log2 + note + block * NOTE_ROWS, m_new + tl.log2(inside))
        acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc, input_precision=PRECISION)
        m = m_new
    return acc, l, m, before


@triton.jit
def _tally(
    counts, mass, gaps, weights_log2, row_lse, low, high, token0, q_len, kv_len, window, dense_last, lead,
    Q_GROUP: tl.constexpr, PACK: tl.constexpr, NOTE_ROWS: tl.constexpr, VOTE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, DECODE: tl.constexpr, LOW: tl.constexpr, PER_OCTAVE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Adds the tiles `low` to `high` of one item's rows to the histogram."""
    VOTES: tl.constexpr = NOTE_ROWS // VOTE_ROWS
    rows = tl.arange(0, NOTE_ROWS)
    token = token0 + rows // PACK
    position = token + (kv_len - q_len)
    valid = (token < q_len) & (rows % PACK < Q_GROUP)
    if lead is not None:
        valid = valid & (token >= lead)
    first_key = tl.zeros([NOTE_ROWS], tl.int32)
    last_key = first_key + kv_len - 1
    if WINDOWED:
        first_key = tl.maximum(position - window + 1, 0)
    if CAUSAL:
        last_key = tl.minimum(last_key, position)
    lse = tl.load(row_lse + rows)

    # The KV length in each vote's threshold.
    length = tl.zeros([VOTES], tl.float32) + kv_len
    if DECODE:  # a token's own length
        length = (token0 + tl.arange(0, VOTES) * VOTE_ROWS // PACK + (kv_len - q_len) + 1).to(
            tl.float32
        )
    length_log2 = tl.log2(tl.maximum(length, 1.0))

    for tile0 in tl.range(low, high, CHUNK):
        block = tile0 * PARTS + tl.arange(0, CHUNK * PARTS)
        seen = (block < high * PARTS)[:, None] & valid[None, :]
        seen = seen & ((block * BLOCK_N)[:, None] <= last_key[None, :])
        seen = seen & ((block * BLOCK_N + BLOCK_N)[:, None] > first_key[None, :])
        note = block[:, None] * NOTE_ROWS + rows[None, :]
        # Notes of CHUNK tiles: the largest gap and the summed weight of each vote's rows.
        gap = tl.load(gaps + note, mask=seen, other=float("-inf"))
        weight_log2 = tl.load(weights_log2 + note, mask=seen, other=float("-inf"))
        weight = tl.exp2(weight_log2 - lse[None, :])
        gap = tl.max(tl.max(tl.reshape(gap, [CHUNK, PARTS, VOTES, VOTE_ROWS]), 3), 1)
        weight = tl.sum(tl.sum(tl.reshape(weight, [CHUNK, PARTS, VOTES, VOTE_ROWS]), 3), 1)
        if dense_last is not None:  # such a vote's tiles can never be skipped
            end = token0 + (tl.arange(0, VOTES) + 1) * VOTE_ROWS
            whole = (end > q_len - dense_last)[None, :] & (gap > float("-inf"))
            gap = tl.where(whole, float("inf"), gap)

        # The bin of the critical scale factor, as `histogram.bin_index` computes it.
        critical = length_log2[None, :] + tl.minimum(gap, 0.0)
        edge = tl.floor((tl.maximum(critical, LOW - 1.0) - LOW) * PER_OCTAVE) + 1.0
        index = tl.minimum(tl.maximum(edge, 0.0), BINS - 2.0).to(tl.int32)
        index = tl.where(gap >= 0.0, BINS - 1, index)
        visited = gap > float("-inf")
        # Units of 2^-40.
        units = (weight.to(tl.float64) * 1099511627776.0).to(tl.int64)
        tl.atomic_add(
            counts + index, tl.full([CHUNK, VOTES], 1, tl.int64), mask=visited, sem="relaxed"
        )
        tl.atomic_add(mass + index, units, mask=visited, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "window",
        "dense_last",
        "lead",
        "items",
        "blocks",
        "note_blocks",
    ]
)
def _statistics(
    q, k, k_tail, v, out, counts, mass, gaps, weights_log2, row_lse, k_scales, v_scales, cache_scale,
    v_scale, q_len, kv_len, window, dense_last, lead, items, blocks, note_blocks, stride_qb, stride_qh,
    stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh,
    stride_os, HEADS: tl.constexpr, Q_GROUP: tl.constexpr, KV_GROUP: tl.constexpr, PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, SUBS: tl.constexpr, VOTE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SEEDED: tl.constexpr, DECODE: tl.constexpr, LOW: tl.constexpr,
    PER_OCTAVE: tl.constexpr, BINS: tl.constexpr, TMA: tl.constexpr, TMA_V: tl.constexpr,
    K_EACH: tl.constexpr, V_EACH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NOTE_ROWS: tl.constexpr = BLOCK_M * SUBS  # rows of one item
    TOKENS: tl.constexpr = BLOCK_M // PACK  # query tokens of one block
    TILE_KV: tl.constexpr = BLOCK_N * PARTS
    note_base = tl.program_id(0).to(tl.int64) * note_blocks * NOTE_ROWS
    lse_base = tl.program_id(0) * NOTE_ROWS
    if lead is not None:  # rows of the first vote that come before the call's, and are not there
        q_len += lead
        q -= lead.to(tl.int64) * stride_qs
        out -= lead.to(tl.int64) * stride_os
    offset = kv_len - q_len
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        # The rows of a causal call that see most keys come first, so that no program ends late.
        head = item % HEADS
        batch = (item // HEADS) // blocks
        item_block = blocks - 1 - (item // HEADS) % blocks
        item_low = 0
        item_high = 0
        scale = cache_scale
        if k_scales is not None:
            scale *= scale_of(k_scales, head // KV_GROUP, K_EACH)
        # A vote of more rows than a block is walked in SUBS blocks; their notes are joined below.
        for sub in range(SUBS):
            local = tl.arange(0, BLOCK_M)
            token0 = (item_block * SUBS + sub) * TOKENS
            token = token0 + local // PACK
            valid = (token < q_len) & (local % PACK < Q_GROUP)
            if lead is not None:
                valid = valid & (token >= lead)
            position = token + offset
            q_head = head * Q_GROUP + local % PACK
            q_row = batch.to(tl.int64) * stride_qb + q_head.to(tl.int64) * stride_qh
            q_row += token.to(tl.int64) * stride_qs
            q_tile = load_queries(q + q_row, valid, 0, HEAD_DIM, WIDTH)
            q_tail = load_queries(q + q_row, valid, WIDTH, HEAD_DIM, TAIL) if TAIL > 0 else None
            k_offset = batch.to(tl.int64) * stride_kb + (head // KV_GROUP).to(tl.int64) * stride_kh
            v_offset = batch.to(tl.int64) * stride_vb + (head // KV_GROUP).to(tl.int64) * stride_vh

            k_place = place_of(k_offset, stride_ks)
            v_place = place_of(v_offset, stride_vs)

            # Tiles are visited as in prefill; they are walked in key blocks, PARTS of them per tile.
            low, high = visited_tiles(
                token0, TOKENS, q_len, kv_len, window, TILE_KV, CAUSAL, WINDOWED
            )
            low *= PARTS
            high *= PARTS
            low_full, high_full = whole_tiles(
                token0, TOKENS, low, high, q_len, kv_len, window, BLOCK_N, CAUSAL, WINDOWED
            )
            row_first = tl.zeros([BLOCK_M], tl.int32)
            if WINDOWED:
                row_first = tl.maximum(position - window + 1, 0) // TILE_KV
            if sub == 0:
                item_low = low
            item_high = tl.maximum(item_high, high)

            row_last = position // TILE_KV
            seed = tl.full([BLOCK_M], float("-inf"), tl.float32)
            if SEEDED:
                # The tiles that are some token's first, then those that are some token's last.
                firsts = (
                    tl.minimum(tl.max(tl.where(valid, row_first, 0), 0) * PARTS + PARTS, high) - low
                )
                high_first = tl.maximum(offset + token0, 0) // TILE_KV * PARTS
                for i in tl.range(
                    0,
                    tl.where(
                        tl.minimum(token0 + TOKENS, q_len) > token0, firsts + high - high_first, 0
                    ),
                ):
                    block = tl.where(i < firsts, low + i, high_first + i - firsts)
                    start = block * BLOCK_N
                    scores = scores_of(
                        q_tile, q_tail, k, k_tail, k_offset, k_place, stride_ks, start, kv_len, BLOCK_N,
                        HEAD_DIM, WIDTH, TAIL, TMA, True, PRECISION,
                    )  # fmt: skip
                    seen = visible(
                        position, start + tl.arange(0, BLOCK_N), kv_len, window, CAUSAL, WINDOWED
                    )
                    edge = (block // PARTS == row_first) | (block // PARTS == row_last)
                    scores = tl.where(seen & edge[:, None], scores, float("-inf"))
                    seed = tl.maximum(seed, tl.max(scores, 1) * scale)
                # For a row without keys, -inf - -inf would be NaN.
                seed = tl.where(seed == float("-inf"), 0.0, seed)

            # Dense attention over the masked and the whole blocks, noting gaps and weights on the way.
            acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            before = m
            note = note_base + sub * BLOCK_M + local
            if WINDOWED:
                acc, l, m, before = _observe(
                    low, low_full, acc, l, m, before, q_tile, q_tail, k, k_tail, v, k_offset, v_offset,
                    k_place, v_place, stride_ks, stride_vs, position, row_first, row_last, kv_len, window,
                    scale, seed, gaps, weights_log2, note, HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V,
                    BLOCK_N, PARTS, NOTE_ROWS, CAUSAL, WINDOWED, True, SEEDED, TMA, TMA_V, PRECISION, STAGES,
                )  # fmt: skip
            acc, l, m, before = _observe(
                low_full, high_full, acc, l, m, before, q_tile, q_tail, k, k_tail, v, k_offset, v_offset,
                k_place, v_place, stride_ks, stride_vs, position, row_first, row_last, kv_len, window, scale,
                seed, gaps, weights_log2, note, HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, BLOCK_N, PARTS,
                NOTE_ROWS, CAUSAL, WINDOWED, False, SEEDED, TMA, TMA_V, PRECISION, STAGES,
            )  # fmt: skip
            acc, l, m, before = _observe(
                high_full, high, acc, l, m, before, q_tile, q_tail, k, k_tail, v, k_offset, v_offset, k_place,
                v_place, stride_ks, stride_vs, position, row_first, row_last, kv_len, window, scale, seed,
                gaps, weights_log2, note, HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, BLOCK_N, PARTS,
                NOTE_ROWS, CAUSAL, WINDOWED, True, SEEDED, TMA, TMA_V, PRECISION, STAGES,
            )  # fmt: skip
            total = tl.where(l == 0.0, 1.0, l)
            acc = acc / total[:, None]
            if v_scales is not None:
                acc *= scale_of(v_scales, head // KV_GROUP, V_EACH)
            elif v_scale is not None:
                acc *= v_scale
            columns = tl.arange(0, WIDTH_V)
            o_row = batch.to(tl.int64) * stride_ob + q_head.to(tl.int64) * stride_oh
            o_row += token.to(tl.int64) * stride_os
            tl.store(
                out + o_row[:, None] + columns[None, :],
                acc.to(out.dtype.element_ty),
                mask=valid[:, None] & (columns < HEAD_DIM_V)[None, :],
            )
            tl.store(
                row_lse + lse_base + sub * BLOCK_M + local,
                # A row that saw no key weighs nothing, like padding.
                tl.where(valid & (l > 0.0), m + tl.log2(total), float("inf")),
            )
        # `_tally` reads notes that other threads of this program wrote.
        tl.debug_barrier()
        _tally(
            counts + head * BINS, mass + head * BINS, gaps + note_base, weights_log2 + note_base,
            row_lse + lse_base, item_low // PARTS, item_high // PARTS, item_block * SUBS * TOKENS,
            q_len, kv_len, window, dense_last, lead, Q_GROUP, PACK, NOTE_ROWS, VOTE_ROWS, BLOCK_N, PARTS,
            CHUNK, CAUSAL, WINDOWED, DECODE, LOW, PER_OCTAVE, BINS,
        )  # fmt: skip
        tl.debug_barrier()
