"""Prefill attention that skips KV tiles, in Triton (BLASST, arXiv 2512.12087, Algorithm 1).

A program owns BLOCK_M query rows of one head and walks the KV tiles in ascending order:

    for each visited tile j:
        s        = q k_j^T                                    # always
        top[r]   = max over c of s[r, c]
        bits     = the votes with a row r where top[r] >= m[r] + log2(scale_factor / kv_len)
        if bits:                                              # a real branch on one scalar
            p    = exp2(s - max(m, top)), 0 on rows whose vote is not in bits
            acc, l, m  take p, and v_j                        # v_j is loaded here, not before

A call is armed when it may skip: some scale factor is above 0. The kernel of a call known to be dense (ARMED
false) has no branch.

A block may contain several votes of `tile_q` rows. The branch skips a tile that all of them skip; if only
some do, their rows get zero weights. So decisions are those of `tile_q` x `tile_kv` for every BLOCK_M.
A vote with one of the last `dense_last` rows has a threshold of 0, and so keeps every tile that it sees.

An FP8 cache is converted to the queries' dtype, which is exact, where a tile is used; its scales are left to
the scores' scale and to the output.

Keys and values may be in pages of PAGE rows: a page is a whole number of tiles, or a tile of pages.

Votes begin at multiples of `tile_q` of the request's positions. LEADS: the first row may lie inside one, and
then the first block begins before it, with rows that are not there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skip_softmax.triton.primitives import (
    keeps,
    kept_votes,
    load_queries,
    load_tile,
    log2_threshold,
    online_softmax,
    pages_of,
    place_of,
    private_votes,
    scale_of,
    scores_of,
    visible,
    visited_tiles,
    whole_tiles,
)


@triton.jit
def _walk(
    first, last, acc, l, m, kept, busy, q, q_tail, k, k_tail, v, k_offset, v_offset, k_place, v_place,
    k_stride, v_stride, paging, position, ballot, kv_len, window, scale, threshold,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    WIDTH_V: tl.constexpr, TILE_KV: tl.constexpr, PAGE: tl.constexpr, VOTES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, ARMED: tl.constexpr,
    AHEAD: tl.constexpr, PRIVATE: tl.constexpr, TMA: tl.constexpr, STATS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walks tiles `first` to `last`; MASKED where some row of the block does not see all of their keys.

    An armed walk without AHEAD jumps over a tile that every vote skips, and loads values after the decision.
    AHEAD loads them in the pipeline, and gives the rows of a skipping vote zero weights: the same result.
    """
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * TILE_KV
        table, k_page, v_page, begin = paging
        pages = 0
        if PAGE > 0:
            pages = pages_of(table, start, begin, kv_len, TILE_KV, PAGE, MASKED)
        scores = scores_of(
            q, q_tail, k, k_tail, k_offset, k_place, k_stride, start, kv_len, TILE_KV, HEAD_DIM, WIDTH,
            TAIL, TMA, MASKED, PRECISION, pages, k_page, begin, PAGE,
        )  # fmt: skip
        if AHEAD:
            values = load_tile(
                v, v_offset, v_place, v_stride, start, kv_len, TILE_KV, HEAD_DIM_V, WIDTH_V, TMA,
                MASKED, True, pages, v_page, begin, PAGE,
            )  # fmt: skip
        if MASKED:
            seen = visible(
                position, start + tl.arange(0, TILE_KV), kv_len, window, CAUSAL, WINDOWED
            )
            scores = tl.where(seen, scores, float("-inf"))
        # Here m is each row's maximum over all earlier tiles, the same whether they were skipped or not. A
        # vote keeps the tile if any of its rows wants it.
        tile_max = tl.max(scores, 1) * scale
        m_new = tl.maximum(m, tile_max)  # a skipped tile cannot raise it
        if ARMED:
            wanted = keeps(tile_max, m, threshold)
            if PRIVATE:
                absent = private_votes(wanted & (ballot != 0)) == 0
            else:
                bits = kept_votes(wanted, ballot)
                absent = (bits & ballot) == 0
                busy += (bits != 0).to(tl.int32)
            if STATS or PRIVATE:
                kept += tl.where(absent, 0, 1)
        else:
            absent = ballot == 0
        if ARMED and not AHEAD:
            # `bits` is one scalar for the program: all its warps branch together.
            if bits != 0:
                values = load_tile(
                    v, v_offset, v_place, v_stride, start, kv_len, TILE_KV, HEAD_DIM_V, WIDTH_V, TMA,
                    MASKED, True, pages, v_page, begin, PAGE,
                )  # fmt: skip
                weights, l, acc = online_softmax(
                    scores, scale, m, m_new, absent, l, acc, MASKED, VOTES > 1
                )
                acc = tl.dot(
                    weights.to(q.dtype), values.to(q.dtype), acc, input_precision=PRECISION
                )
        else:
            weights, l, acc = online_softmax(scores, scale, m, m_new, absent, l, acc, MASKED, ARMED)
            acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc, input_precision=PRECISION)
        m = m_new
    return acc, l, m, kept, busy


# A batch's lengths and tables may begin anywhere: a kernel for each would make the first such batch wait.
@triton.jit(
    do_not_specialize=["q_len", "kv_len", "window", "dense_last", "min_kv_len", "stride_table"],
    do_not_specialize_on_alignment=["q_lens", "kv_lens", "q_starts", "kv_starts", "table"],
)
def _prefill(
    q, k, k_tail, v, out, stats, factors, q_lens, kv_lens, q_starts, kv_starts, table, k_scales, v_scales,
    factor, scale, v_scale, q_len, kv_len, window, dense_last, min_kv_len, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_table, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, ARMED: tl.constexpr, TWO_WAYS: tl.constexpr, PRIVATE: tl.constexpr,
    PROBE: tl.constexpr, SPAN: tl.constexpr, TMA: tl.constexpr, LEADS: tl.constexpr, STATS: tl.constexpr,
    SUMMED: tl.constexpr, K_EACH: tl.constexpr, V_EACH: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, SPARSE_STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # The last rows of a causal call see most keys: they start first, so that no long program starts last.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2)
    VOTES: tl.constexpr = BLOCK_M // TILE_Q

    # Where the request's rows and keys start, and how many there are.
    q_offset = head.to(tl.int64) * stride_qh
    o_offset = head.to(tl.int64) * stride_oh
    k_offset = (head // GROUP).to(tl.int64) * stride_kh
    v_offset = (head // GROUP).to(tl.int64) * stride_vh
    most_rows = q_len  # rows of the output, padding included
    if q_starts is None:
        q_offset += batch.to(tl.int64) * stride_qb
        o_offset += batch.to(tl.int64) * stride_ob
        if PAGE == 0:
            k_offset += batch.to(tl.int64) * stride_kb
            v_offset += batch.to(tl.int64) * stride_vb
    else:  # packed requests, one after another
        q_start = tl.load(q_starts + batch)
        q_len = tl.load(q_starts + batch + 1) - q_start
        most_rows = q_len
        q_offset += q_start.to(tl.int64) * stride_qs
        o_offset += q_start.to(tl.int64) * stride_os
        if PAGE == 0:
            kv_start = tl.load(kv_starts + batch)
            kv_len = tl.load(kv_starts + batch + 1) - kv_start
            k_offset += kv_start.to(tl.int64) * stride_ks
            v_offset += kv_start.to(tl.int64) * stride_vs
    if q_lens is not None:
        q_len = tl.minimum(tl.load(q_lens + batch), q_len)
    if kv_lens is not None:
        kv_len = tl.minimum(tl.load(kv_lens + batch), kv_len)
    k_place = place_of(k_offset, stride_ks)
    v_place = place_of(v_offset, stride_vs)
    row0 = block * BLOCK_M
    if LEADS:
        row0 -= tl.maximum(kv_len - q_len, 0) % TILE_Q
    if row0 >= most_rows:
        return

    # The block's rows: their positions, their votes, and one bit per vote (none for padding).
    rows = row0 + tl.arange(0, BLOCK_M)
    position = rows + (kv_len - q_len)
    valid = rows < q_len
    first_row = row0  # that is there
    count = BLOCK_M
    if LEADS:
        valid = valid & (rows >= 0)
        first_row = tl.maximum(row0, 0)
        count = row0 + BLOCK_M - first_row
    vote = tl.arange(0, BLOCK_M) // TILE_Q
    ballot = tl.where(valid, 1 << vote, 0)
    q_rows = q + q_offset + rows.to(tl.int64) * stride_qs
    q_tile = load_queries(q_rows, valid, 0, HEAD_DIM, WIDTH)
    q_tail = load_queries(q_rows, valid, WIDTH, HEAD_DIM, TAIL) if TAIL > 0 else None

    if k_scales is not None:
        scale *= scale_of(k_scales, head // GROUP, K_EACH)
    if factors is not None:
        factor = tl.load(factors + head)
    threshold = log2_threshold(factor, kv_len, min_kv_len)
    if dense_last is not None:
        # One number where the block is one vote, else one per row.
        end = row0 + TILE_Q if VOTES == 1 else row0 + (vote + 1) * TILE_Q
        threshold = tl.where(end > q_len - dense_last, float("-inf"), threshold)

    low, high = visited_tiles(first_row, count, q_len, kv_len, window, TILE_KV, CAUSAL, WINDOWED)
    low_full, high_full = whole_tiles(
        first_row, count, low, high, q_len, kv_len, window, TILE_KV, CAUSAL, WINDOWED
    )

    # The request's table, the way from one page to the next (for a descriptor in rows), and the first key
    # that the block needs: the pages of earlier ones may be gone.
    paging = (0, 0, 0, 0)
    if PAGE > 0:
        begin = kv_len - q_len + first_row - window + 1 if WINDOWED else 0
        table += batch.to(tl.int64) * stride_table
        if TMA:
            k_page = (stride_kb // stride_ks).to(tl.int32)
            v_page = (stride_vb // stride_vs).to(tl.int32)
            paging = (table, k_page, v_page, begin)
        else:
            paging = (table, stride_kb, stride_vb, begin)

    # Three walks, one state: masked tiles at the window's edge, whole tiles, masked tiles at the diagonal.
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    kept = tl.zeros([BLOCK_M], tl.int32)  # tiles that each row's vote kept
    busy = 0  # tiles that some vote kept
    # An armed call branches, but with two paths (below) its masked tiles take the one that does not.
    EDGE_AHEAD: tl.constexpr = TWO_WAYS or not ARMED
    EDGE_STAGES: tl.constexpr = STAGES if EDGE_AHEAD else SPARSE_STAGES
    if WINDOWED:
        acc, l, m, kept, busy = _walk(
            low, low_full, acc, l, m, kept, busy, q_tile, q_tail, k, k_tail, v, k_offset, v_offset, k_place,
            v_place, stride_ks, stride_vs, paging, position, ballot, kv_len, window, scale, threshold,
            HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, TILE_KV, PAGE, VOTES, CAUSAL, WINDOWED, True, ARMED,
            EDGE_AHEAD, PRIVATE, TMA, STATS, PRECISION, EDGE_STAGES,
        )  # fmt: skip
    if ARMED and TWO_WAYS:
        # Two paths through the same tiles. Where nearly all are kept, values are loaded ahead in the
        # pipeline and the product overlaps the next tile; elsewhere they are loaded after the decision, if
        # at all. The share of tiles kept in one span chooses the path of the next, in each program.
        stop = tl.minimum(low_full + PROBE, high_full)
        sparse = True
        tile = low_full
        for _ in tl.range(0, tl.cdiv(tl.maximum(high_full - low_full - PROBE, 0), SPAN) + 1):
            before = kept
            busy = 0
            if sparse:
                acc, l, m, kept, busy = _walk(
                    tile, stop, acc, l, m, kept, busy, q_tile, q_tail, k, k_tail, v, k_offset, v_offset,
                    k_place, v_place, stride_ks, stride_vs, paging, position, ballot, kv_len, window, scale,
                    threshold, HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, TILE_KV, PAGE, VOTES, CAUSAL,
                    WINDOWED, False, ARMED, False, False, TMA, STATS, PRECISION, SPARSE_STAGES,
                )  # fmt: skip
            else:
                acc, l, m, kept, busy = _walk(
                    tile, stop, acc, l, m, kept, busy, q_tile, q_tail, k, k_tail, v, k_offset, v_offset,
                    k_place, v_place, stride_ks, stride_vs, paging, position, ballot, kv_len, window, scale,
                    threshold, HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, TILE_KV, PAGE, VOTES, CAUSAL,
                    WINDOWED, False, ARMED, True, PRIVATE, TMA, STATS, PRECISION, STAGES,
                )  # fmt: skip
                if PRIVATE:
                    busy = tl.max(kept - before, 0)
            sparse = busy * 5 <= (stop - tile) * 4
            tile = stop
            stop = tl.minimum(stop + SPAN, high_full)
    else:
        acc, l, m, kept, busy = _walk(
            low_full, high_full, acc, l, m, kept, busy, q_tile, q_tail, k, k_tail, v, k_offset, v_offset,
            k_place, v_place, stride_ks, stride_vs, paging, position, ballot, kv_len, window, scale,
            threshold, HEAD_DIM, HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, TILE_KV, PAGE, VOTES, CAUSAL, WINDOWED,
            False, ARMED, EDGE_AHEAD, PRIVATE, TMA, STATS, PRECISION, EDGE_STAGES,
        )  # fmt: skip
    acc, l, m, kept, busy = _walk(
        high_full, high, acc, l, m, kept, busy, q_tile, q_tail, k, k_tail, v, k_offset, v_offset, k_place,
        v_place, stride_ks, stride_vs, paging, position, ballot, kv_len, window, scale, threshold, HEAD_DIM,
        HEAD_DIM_V, WIDTH, TAIL, WIDTH_V, TILE_KV, PAGE, VOTES, CAUSAL, WINDOWED, True, ARMED, EDGE_AHEAD,
        PRIVATE, TMA, STATS, PRECISION, EDGE_STAGES,
    )  # fmt: skip

    # A row that saw no key has l = 0 and acc = 0, and comes out as zero, like padding.
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    if v_scales is not None:
        v_scale = scale_of(v_scales, head // GROUP, V_EACH)
    if v_scale is not None:
        acc *= v_scale
    acc = tl.where(valid[:, None], acc, 0.0)
    columns = tl.arange(0, WIDTH_V)
    inside = (rows < most_rows)[:, None] & (columns < HEAD_DIM_V)[None, :]
    if LEADS:
        inside = inside & (rows >= 0)[:, None]
    tl.store(
        out + o_offset + rows.to(tl.int64)[:, None] * stride_os + columns[None, :],
        acc.to(out.dtype.element_ty),
        mask=inside,
    )
    if STATS:
        # Visited tiles follow from the lengths; kept ones were counted per row: one row of each vote is read.
        begin = row0 + tl.arange(0, VOTES) * TILE_Q
        first_row = begin
        count = TILE_Q
        reads = tl.arange(0, BLOCK_M) % TILE_Q == 0
        if LEADS:
            first_row = tl.maximum(begin, 0)
            count = begin + TILE_Q - first_row
            reads = reads | (rows == 0)
        first, last = visited_tiles(
            first_row, count, q_len, kv_len, window, TILE_KV, CAUSAL, WINDOWED
        )
        visited = tl.sum(tl.maximum(last - first, 0), 0)
        kept = tl.sum(tl.where(valid & reads, kept, 0), 0)
        slot = stats + (head if SUMMED else batch * tl.num_programs(0) + head) * 2
        tl.atomic_add(slot, visited.to(tl.int64), sem="relaxed")
        if ARMED:
            tl.atomic_add(slot + 1, (visited - kept).to(tl.int64), sem="relaxed")
