"""Decode attention that skips KV tiles, in Triton: a few query tokens per request, split over the keys.

A program owns the query heads that vote together, those of one KV head of a request or a part of them, and a
range of its KV tiles. They vote separately for each query token. K is always read; V is read only after the
decision, which is what saves memory traffic:

    for each tile j of the range:
        s, top   = q k_j^T, its row maxima
        bits     = the tokens that keep the tile
        if bits: p, l, acc, with v_j loaded here

With the load there, every kept tile waits for the full latency of v_j. With `ahead` the load is outside the
`if`, masked by `bits` (a skipped tile causes no traffic): Triton's pipeliner then decides `stages - 1` tiles
before it computes p and acc, while v_j is in flight. The seed tiles (below) are then the first steps of the
same loop. Decisions and the order of sums are the same either way.

A call is armed when it may skip: some scale factor is above 0.

ALIASED: values are the first columns of their keys (the latent cache of MLA), so the tile is there already,
and skipping saves products, not traffic. Keys that are no power of two wide come in two pieces, WIDTH and
TAIL.

What a tile is compared with (`running_max` of the thresholds file) must not depend on the number of splits.
`seeded`: the row maximum over the first and the last visited tile, which are never skipped; every program
computes it for itself. `ascending`: the running maximum over all earlier tiles, which only a program that
walks them all knows, so an armed call has a single split.

An FP8 cache is converted where a tile is used: memory holds, and shared memory takes, half the bytes of bf16.
Its scales belong to a head, so that they are left to the scores' scale and to the output. Queries in bf16
become fp16 for it (HALVES), because e4m3 turns into fp16 in one instruction, and into bf16 only by way of it.

Who owns what is found on the device (`_share`), from the lengths that requests have when the kernel runs: a
captured graph stays right, and balanced, whatever lengths its replays find. A KV head has about `programs`
programs for the whole batch, and a request of `tiles` KV tiles out of `total` gets

    max(1, min(programs * tiles // total, tiles // LEAST))

of them, consecutive in batch order, each an equal range of its tiles. The others of the grid, which is sized
for any lengths, end at once. A request with one program has nothing to join, and writes the output itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skip_softmax.triton.primitives import (
    count_bits,
    keeps,
    kept_votes,
    load_queries,
    log2_threshold,
    online_softmax,
    scale_of,
    visible,
)

# Lengths that `_share` looks at together.
_LIFT_BACK: tl.constexpr = tl.constexpr(1 / 32768)
_TOGETHER: tl.constexpr = tl.constexpr(128)


@triton.jit
def _lifted(weights, HALVES: tl.constexpr):
    """Weights for fp16, which would lose those below 2^-25: with HALVES the output is divided again."""
    if HALVES:
        weights *= 32768.0
    return weights


@triton.jit
def _tiles(kv_len, window, TOKENS: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr):
    """Tiles [low, high) that a request's tokens visit."""
    low = 0
    if WINDOWED:
        low = tl.maximum(kv_len - (TOKENS - 1) - window, 0) // TILE_KV
    return low, tl.cdiv(tl.maximum(kv_len, 0), TILE_KV)


@triton.jit
def _tiles_together(
    kv_lens, first, kv_len, window, requests, TOKENS: tl.constexpr, TILE_KV: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """How many tiles some requests visit, from the `first` on."""
    request = first + tl.arange(0, _TOGETHER)
    lengths = tl.load(kv_lens + request, mask=request < requests, other=0)
    low, high = _tiles(tl.minimum(lengths, kv_len), window, TOKENS, TILE_KV, WINDOWED)
    return request, high - low


@triton.jit
def _share_alike(
    item, kv_len, window, requests, programs, TOKENS: tl.constexpr, TILE_KV: tl.constexpr,
    WINDOWED: tl.constexpr, LEAST: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """`_share` where all requests have the same length."""
    low, high = _tiles(kv_len, window, TOKENS, TILE_KV, WINDOWED)
    count = tl.maximum(tl.minimum(programs // requests, (high - low) // LEAST), 1)
    owner = item if JOINED else item // count
    begin = owner * count
    return owner, begin, tl.where(owner < requests, count, 0)


@triton.jit
def _share(
    item, kv_lens, kv_len, window, requests, programs, TOKENS: tl.constexpr, TILE_KV: tl.constexpr,
    WINDOWED: tl.constexpr, LEAST: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Request, first program and number of programs of the request that owns program `item`.

    JOINED: of the `item`-th request that has more than one program. The number is 0 if there is none.
    """
    if kv_lens is None:
        owner, begin, count = _share_alike(
            item, kv_len, window, requests, programs, TOKENS, TILE_KV, WINDOWED, LEAST, JOINED
        )
    else:
        if requests == 1:  # needs no sums
            owner, begin, count = _share_alike(
                item, tl.minimum(tl.load(kv_lens), kv_len), window, requests, programs, TOKENS, TILE_KV,
                WINDOWED, LEAST, JOINED,
            )  # fmt: skip
        else:
            total = 0
            for first in tl.range(0, requests, _TOGETHER, num_stages=1):
                _, tiles = _tiles_together(
                    kv_lens, first, kv_len, window, requests, TOKENS, TILE_KV, WINDOWED
                )
                total += tl.sum(tiles, 0)
            total = tl.maximum(total, 1)
            before = 0  # programs of the requests before
            joined = 0  # those of these requests that have more than one
            owner = 0
            begin = 0
            count = 0
            for first in tl.range(0, requests, _TOGETHER, num_stages=1):
                request, tiles = _tiles_together(
                    kv_lens, first, kv_len, window, requests, TOKENS, TILE_KV, WINDOWED
                )
                counts = tl.maximum(tl.minimum(programs * tiles // total, tiles // LEAST), 1)
                counts = tl.where(request < requests, counts, 0)
                ends = before + tl.cumsum(counts, 0)
                if JOINED:
                    several = (counts > 1).to(tl.int32)
                    mine = (counts > 1) & (joined + tl.cumsum(several, 0) == item + 1)
                    joined += tl.sum(several, 0)
                else:
                    mine = (item < ends) & (item >= ends - counts)
                owner += tl.sum(tl.where(mine, request, 0), 0)
                begin += tl.sum(tl.where(mine, ends - counts, 0), 0)
                count += tl.sum(tl.where(mine, counts, 0), 0)
                before += tl.sum(counts, 0)
    return owner, begin, count


@triton.jit
def _in_use(keys, begin, limit, WINDOWED: tl.constexpr):
    in_use = keys < limit
    if WINDOWED:
        in_use = in_use & (keys >= begin)
    return in_use


@triton.jit
def _page_of(
    table, start, begin, limit, TILE_KV: tl.constexpr, PAGE: tl.constexpr, WINDOWED: tl.constexpr
):
    """Page number of each key of a tile, or one for all where a page contains the tile; 0 without pages.

    k and v share it: a second load under the mask of v would wait for the decision.
    """
    if PAGE == 0:
        return 0
    elif PAGE >= TILE_KV:
        return tl.load(table + start // PAGE).to(tl.int64)
    else:
        keys = start + tl.arange(0, TILE_KV)
        in_use = _in_use(keys, begin, limit, WINDOWED)
        return tl.load(table + keys // PAGE, mask=in_use, other=0).to(tl.int64)


@triton.jit
def _load_keys(
    x, offset, stride_page, stride, page, start, begin, limit, TILE_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Keys (or values) `start` to `start + TILE_KV` of one request and head; zero from `limit` on.

    Those below `begin` are in no token's window: their pages may be gone.
    """
    keys = start + tl.arange(0, TILE_KV)
    columns = tl.arange(0, WIDTH)
    held = _in_use(keys, begin, limit, WINDOWED)[:, None]
    if WIDTH != HEAD_DIM:
        held = held & (columns < HEAD_DIM)[None, :]
    if PAGE == 0:
        rows = offset + start.to(tl.int64) * stride + tl.arange(0, TILE_KV) * stride
    else:
        rows = offset + page * stride_page + (keys % PAGE) * stride
    return tl.load(x + rows[:, None] + columns[None, :], mask=held, other=0.0)


@triton.jit
def _scored(
    q, q_tail, k, offset, stride_page, stride, page, start, begin, limit, TILE_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw scores of a tile, and its keys, of which a second piece (TAIL columns) is left out."""
    COLUMNS: tl.constexpr = HEAD_DIM if TAIL == 0 else WIDTH
    keys = _load_keys(
        k,
        offset,
        stride_page,
        stride,
        page,
        start,
        begin,
        limit,
        TILE_KV,
        COLUMNS,
        WIDTH,
        PAGE,
        WINDOWED,
    )
    scores = tl.dot(q, keys.to(q.dtype).T, input_precision=PRECISION)
    if TAIL > 0:
        rest = _load_keys(
            k, offset + WIDTH, stride_page, stride, page, start, begin, limit, TILE_KV, HEAD_DIM - WIDTH,
            TAIL, PAGE, WINDOWED,
        )  # fmt: skip
        scores = tl.dot(q_tail, rest.to(q.dtype).T, scores, input_precision=PRECISION)
    return scores, keys


# A batch's lengths and tables may begin anywhere: a kernel for each would make the first such batch wait.
@triton.jit(
    do_not_specialize=["kv_len", "window", "min_kv_len", "requests", "programs", "stride_table"],
    do_not_specialize_on_alignment=["kv_lens", "table"],
)
def _decode(
    q, k, v, out, parts, lse, stats, factors, kv_lens, table, k_scales, v_scales, factor, scale, v_scale,
    kv_len, window, min_kv_len,
    requests, programs, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb,
    stride_vh, stride_vs, stride_ob, stride_oh, stride_ot, stride_table,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    WIDTH_V: tl.constexpr, ALIASED: tl.constexpr, TILE_KV: tl.constexpr, PAGE: tl.constexpr,
    WINDOWED: tl.constexpr, ARMED: tl.constexpr, SEEDED: tl.constexpr, SPLIT: tl.constexpr,
    LEAST: tl.constexpr, EARLY: tl.constexpr, STATS: tl.constexpr, SUMMED: tl.constexpr, K_EACH: tl.constexpr,
    V_EACH: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # `_combine` may start before these programs end; it waits for them in `gdc_wait`.
        tl.extra.cuda.gdc_launch_dependents()
    # Heads first: in a cache whose heads lie side by side they read neighbouring memory. `head` counts votes
    # of GROUP query heads, of which SHARE share a KV head.
    head = tl.program_id(0)
    program = tl.program_id(1)
    heads = tl.num_programs(0)
    batch = program
    split = 0
    splits = 1
    if SPLIT:
        batch, begin, splits = _share(
            program,
            kv_lens,
            kv_len,
            window,
            requests,
            programs,
            TOKENS,
            TILE_KV,
            WINDOWED,
            LEAST,
            False,
        )
        if splits == 0:
            return
        split = program - begin
    if kv_lens is not None:
        kv_len = tl.minimum(tl.load(kv_lens + batch), kv_len)

    # Row r is head r % GROUP of token r // GROUP; each token sees its own number of keys.
    row = tl.arange(0, ROWS)
    token = row // GROUP
    length = kv_len - (TOKENS - 1) + token
    valid = (row < TOKENS * GROUP) & (length > 0)
    ballot = tl.where(valid, 1 << tl.minimum(token, TOKENS), 0)
    position = length - 1
    if WINDOWED:
        first_tile = tl.maximum(length - window, 0) // TILE_KV
        begin = tl.maximum(kv_len - (TOKENS - 1) - window, 0)
        low = begin // TILE_KV
        low_last = tl.maximum(kv_len - window, 0) // TILE_KV
    else:
        first_tile = tl.zeros([ROWS], tl.int32)
        begin = 0
        low = 0
        low_last = 0
    last_tile = position // TILE_KV
    high = tl.cdiv(kv_len, TILE_KV)

    # Queries, and where the request's keys and values (or its pages) start.
    q_rows = (
        batch.to(tl.int64) * stride_qb
        + (head * GROUP + row % GROUP).to(tl.int64) * stride_qh
        + token.to(tl.int64) * stride_qt
    )
    if k_scales is not None:
        scale *= scale_of(k_scales, head // SHARE, K_EACH)
    q_tile = load_queries(q + q_rows, valid, 0, HEAD_DIM, WIDTH)
    q_tail = load_queries(q + q_rows, valid, WIDTH, HEAD_DIM, TAIL) if TAIL > 0 else None
    if HALVES:
        # In fp16, with the largest number between 1 and 2: what bf16 holds of more than 2^-17 of it is exact.
        largest = tl.max(tl.max(tl.abs(q_tile.to(tl.float32)), 1), 0)
        usual = (largest > 0.0) & (largest < float("inf"))
        power = tl.exp2(tl.floor(tl.log2(tl.where(usual, largest, 1.0))))
        q_tile = (q_tile.to(tl.float32) / power).to(tl.float16)
        scale *= power
    k_offset = (head // SHARE).to(tl.int64) * stride_kh
    v_offset = (head // SHARE).to(tl.int64) * stride_vh
    if PAGE == 0:
        k_offset += batch.to(tl.int64) * stride_kb
        v_offset += batch.to(tl.int64) * stride_vb
    else:
        table += batch.to(tl.int64) * stride_table

    # Armed and seeded: `seed`, with which every tile is compared, needs the first and the last tiles. With
    # AHEAD they are the first `count` steps of the loop below.
    firsts = 0
    high_first = 0
    count = 0
    seed = tl.full([ROWS], float("-inf"), tl.float32)
    if ARMED:
        if factors is not None:
            factor = tl.load(factors + head)
        threshold = log2_threshold(factor, length, min_kv_len)
        if SEEDED:
            # The tiles that are some token's first, then those that are some token's last.
            high_first = tl.maximum(kv_len - TOKENS, 0) // TILE_KV
            firsts = low_last + 1 - low
            count = tl.where(
                tl.max(tl.where(valid, threshold, float("-inf")), 0) > float("-inf"),
                firsts + high - high_first,
                0,
            )
            if not AHEAD:
                for i in tl.range(0, count, num_stages=2):
                    tile = tl.where(i < firsts, low + i, high_first + i - firsts)
                    start = tile * TILE_KV
                    page = _page_of(table, start, begin, kv_len, TILE_KV, PAGE, WINDOWED)
                    scores, _ = _scored(
                        q_tile, q_tail, k, k_offset, stride_kb, stride_ks, page, start, begin, kv_len,
                        TILE_KV, HEAD_DIM, WIDTH, TAIL, PAGE, WINDOWED, PRECISION,
                    )  # fmt: skip
                    seen = visible(
                        position, start + tl.arange(0, TILE_KV), kv_len, window, True, WINDOWED
                    )
                    seen = seen & ((tile == first_tile) | (tile == last_tile))[:, None]
                    seed = tl.maximum(
                        seed, tl.max(tl.where(seen, scores, float("-inf")), 1) * scale
                    )

    # This split's range of tiles. Splits share nothing before `_combine`: each has its own acc, l and m, and
    # the same `seed`, so decisions do not depend on their number.
    tiles = tl.maximum(high - low, 0)
    first = low + tiles * split // splits
    last = low + tiles * (split + 1) // splits
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    kept = 0
    if AHEAD:
        # v is loaded outside the branch, masked by the decision, so that the pipeliner can load it ahead. The
        # first `count` steps keep nothing (bits = 0): after them `seed` is complete.
        for i in tl.range(0, count + last - first, num_stages=STAGES):
            tile = first + i - count
            if ARMED and SEEDED:
                end = tl.where(i < firsts, low + i, high_first + i - firsts)
                tile = tl.where(i < count, end, tile)
            start = tile * TILE_KV
            page = _page_of(table, start, begin, kv_len, TILE_KV, PAGE, WINDOWED)
            scores, _ = _scored(
                q_tile, q_tail, k, k_offset, stride_kb, stride_ks, page, start, begin, kv_len, TILE_KV,
                HEAD_DIM, WIDTH, TAIL, PAGE, WINDOWED, PRECISION,
            )  # fmt: skip
            seen = visible(position, start + tl.arange(0, TILE_KV), kv_len, window, True, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
            tile_max = tl.max(scores, 1) * scale
            if ARMED:
                if SEEDED:
                    ends = ((tile == first_tile) | (tile == last_tile)) & (tile_max > float("-inf"))
                    seed = tl.maximum(seed, tl.where(ends, tile_max, float("-inf")))
                    bits = kept_votes(keeps(tile_max, seed, threshold) | ends, ballot)
                    bits = tl.where(i < count, 0, bits)
                else:
                    bits = kept_votes(keeps(tile_max, m, threshold), ballot)
                if STATS:
                    kept += count_bits(bits, TOKENS)
                absent = (bits & ballot) == 0
                m_new = tl.where(absent, m, tl.maximum(m, tile_max))
                limit = tl.where(bits != 0, kv_len, 0)
            else:
                bits = 1
                absent = ballot == 0
                m_new = tl.maximum(m, tile_max)
                limit = kv_len
            values = _load_keys(
                v, v_offset, stride_vb, stride_vs, page, start, begin, limit, TILE_KV, HEAD_DIM_V,
                WIDTH_V, PAGE, WINDOWED,
            )  # fmt: skip
            if bits != 0:
                weights, l, acc = online_softmax(
                    scores, scale, m, m_new, absent, l, acc, True, True
                )
                acc = tl.dot(
                    _lifted(weights, HALVES).to(q_tile.dtype),
                    values.to(q_tile.dtype),
                    acc,
                    input_precision=PRECISION,
                )
            m = m_new
    else:
        # v is loaded where it is used: inside the branch if armed, else ahead like k.
        for tile in tl.range(first, last, num_stages=STAGES):
            start = tile * TILE_KV
            page = _page_of(table, start, begin, kv_len, TILE_KV, PAGE, WINDOWED)
            scores, keys = _scored(
                q_tile, q_tail, k, k_offset, stride_kb, stride_ks, page, start, begin, kv_len, TILE_KV,
                HEAD_DIM, WIDTH, TAIL, PAGE, WINDOWED, PRECISION,
            )  # fmt: skip
            if ALIASED:
                values = keys
            if not ARMED and not ALIASED:
                values = _load_keys(
                    v, v_offset, stride_vb, stride_vs, page, start, begin, kv_len, TILE_KV, HEAD_DIM_V,
                    WIDTH_V, PAGE, WINDOWED,
                )  # fmt: skip
            seen = visible(position, start + tl.arange(0, TILE_KV), kv_len, window, True, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
            tile_max = tl.max(scores, 1) * scale
            if ARMED:
                if SEEDED:
                    wanted = keeps(tile_max, seed, threshold)
                    wanted = wanted | ((tile == first_tile) | (tile == last_tile)) & (
                        tile_max > float("-inf")
                    )
                else:
                    wanted = keeps(tile_max, m, threshold)
                bits = kept_votes(wanted, ballot)
                if STATS:
                    kept += count_bits(bits, TOKENS)
                if bits != 0:
                    absent = (bits & ballot) == 0
                    # A tile that a token skips may still exceed the running maximum of this split.
                    m_new = tl.where(absent, m, tl.maximum(m, tile_max))
                    weights, l, acc = online_softmax(
                        scores, scale, m, m_new, absent, l, acc, True, True
                    )
                    if not ALIASED:
                        values = _load_keys(
                            v, v_offset, stride_vb, stride_vs, page, start, begin, kv_len, TILE_KV,
                            HEAD_DIM_V, WIDTH_V, PAGE, WINDOWED,
                        )  # fmt: skip
                    acc = tl.dot(
                        _lifted(weights, HALVES).to(q_tile.dtype),
                        values.to(q_tile.dtype),
                        acc,
                        input_precision=PRECISION,
                    )
                    m = m_new
            else:
                m_new = tl.maximum(m, tile_max)
                weights, l, acc = online_softmax(
                    scores, scale, m, m_new, ballot == 0, l, acc, True, True
                )
                acc = tl.dot(
                    _lifted(weights, HALVES).to(q_tile.dtype),
                    values.to(q_tile.dtype),
                    acc,
                    input_precision=PRECISION,
                )
                m = m_new

    if v_scales is not None:
        v_scale = scale_of(v_scales, head // SHARE, V_EACH)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    if HALVES:
        acc *= _LIFT_BACK
    if v_scale is not None:
        acc *= v_scale
    columns = tl.arange(0, WIDTH_V)
    written = (row < TOKENS * GROUP)[:, None] & (columns < HEAD_DIM_V)[None, :]
    rows = TOKENS * GROUP  # of the output
    if SPLIT:
        if splits > 1:  # parts and their log-sum-exp, for `_combine`
            part = (program * heads + head).to(tl.int64) * (TOKENS * GROUP) + row
            tl.store(lse + part, m + tl.log2(tl.where(l == 0.0, 1.0, l)), mask=row < TOKENS * GROUP)
            tl.store(parts + part[:, None] * HEAD_DIM_V + columns[None, :], acc, mask=written)
        rows = tl.where(splits > 1, 0, rows)
    place = batch.to(tl.int64) * stride_ob + token * stride_ot
    place += (head * GROUP + row % GROUP) * stride_oh
    whole = (row < rows)[:, None] & (columns < HEAD_DIM_V)[None, :]
    tl.store(out + place[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=whole)
    if STATS:
        seen_tiles = tl.where(valid & (row % GROUP == 0), last_tile - first_tile + 1, 0)
        visited = tl.where(split == 0, tl.sum(seen_tiles, 0), 0)
        slot = stats + (head if SUMMED else batch * heads + head) * 2
        tl.atomic_add(slot, visited.to(tl.int64), sem="relaxed")
        if ARMED:
            tl.atomic_add(slot + 1, (visited - kept).to(tl.int64), sem="relaxed")


@triton.jit(
    do_not_specialize=["kv_len", "window", "requests", "programs"],
    do_not_specialize_on_alignment=["kv_lens"],
)
def _combine(
    parts, lse, out, kv_lens, kv_len, window, requests, programs, stride_ob, stride_oh, stride_ot,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr, WIDTH_V: tl.constexpr,
    TILE_KV: tl.constexpr, WINDOWED: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one row by their log-sum-exp."""
    blocks: tl.constexpr = (HEAD_DIM_V + WIDTH_V - 1) // WIDTH_V
    row = tl.program_id(0) // blocks
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, begin, splits = _share(
        tl.program_id(2),
        kv_lens,
        kv_len,
        window,
        requests,
        programs,
        TOKENS,
        TILE_KV,
        WINDOWED,
        LEAST,
        True,
    )
    if EARLY:
        # Waits until all programs of `_decode` have written; those with nothing to join too, or what comes
        # after this kernel could start too early.
        tl.extra.cuda.gdc_wait()
    if splits < 2:
        return
    columns = tl.program_id(0) % blocks * WIDTH_V + tl.arange(0, WIDTH_V)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([WIDTH_V], tl.float32)
    for first in tl.range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        rows = ((begin + split) * heads + head).to(tl.int64) * (TOKENS * GROUP) + row
        part_lse = tl.load(lse + rows, mask=split < splits, other=float("-inf"))
        part = tl.load(
            parts + rows[:, None] * HEAD_DIM_V + columns[None, :],
            mask=(split < splits)[:, None] & (columns < HEAD_DIM_V)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(part_lse - safe)
        alpha = tl.exp2(top - safe)
        total = total * alpha + tl.sum(weights, 0)
        acc = acc * alpha + tl.sum(weights[:, None] * part, 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
    where = batch.to(tl.int64) * stride_ob + row // GROUP * stride_ot
    where += (head * GROUP + row % GROUP) * stride_oh
    tl.store(out + where + columns, acc.to(out.dtype.element_ty), mask=columns < HEAD_DIM_V)
