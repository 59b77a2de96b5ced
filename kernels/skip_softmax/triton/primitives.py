"""What the Triton kernels share: visited tiles, masks, the skip decision, the online softmax.

Inside the kernels scores are in the log2 domain (natural logits times log2 e), so that every exponential
is one `exp2`. A row's running maximum `m` starts at -inf; `l` is the row sum, `acc` the unnormalised output.
"""

import triton
import triton.language as tl


@triton.jit
def log2_threshold(scale_factor, kv_len, min_kv_len=None):
    """log2 of the threshold scale_factor / kv_len; -inf (nothing is below it) where the call is dense."""
    length = kv_len.to(tl.float32)
    scale_factor += length * 0.0  # broadcast to one number per length
    # 0 and a threshold of 1 or more are dense; so is NaN, which fails both comparisons.
    active = (scale_factor > 0.0) & (scale_factor < length)
    if min_kv_len is not None:
        active = active & (kv_len >= min_kv_len)
    return tl.where(active, tl.log2(tl.where(active, scale_factor, 1.0) / length), float("-inf"))


@triton.jit
def visited_tiles(
    first, rows, q_len, kv_len, window, TILE_KV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Tiles [low, high) in which one of the `rows` query rows from `first` on sees a key.

    `first` is one number or several. The walks, their counts and the statistics use it; no rows: `high` is 0.
    """
    offset = kv_len - q_len
    end = tl.minimum(first + rows, q_len)
    low = 0
    keys = kv_len
    if WINDOWED:
        low = tl.maximum(offset + first - window + 1, 0) // TILE_KV
    if CAUSAL:
        keys = tl.minimum(keys, tl.maximum(offset + end, 0))
    return low, tl.cdiv(tl.where(end > first, keys, 0), TILE_KV)


@triton.jit
def whole_tiles(
    first, rows, low, high, q_len, kv_len, window, TILE_KV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Those of the tiles [low, high) in which every row sees all keys, so that nothing is masked."""
    offset = kv_len - q_len
    low_whole = 0
    keys = kv_len
    if WINDOWED:
        low_whole = tl.cdiv(tl.maximum(offset + first + rows - window, 0), TILE_KV)
    if CAUSAL:
        keys = tl.minimum(keys, tl.maximum(offset + first + 1, 0))
    low_whole = tl.minimum(tl.maximum(low_whole, low), tl.maximum(high, low))
    return low_whole, tl.maximum(tl.minimum(keys // TILE_KV, high), low_whole)


@triton.jit
def visible(position, key, kv_len, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys each row sees, bool [rows, keys]."""
    last = position[:, None]
    if CAUSAL:
        seen = (key[None, :] <= last) & (key < kv_len)[None, :]
    else:
        seen = (key[None, :] < kv_len) & (last == last)
    if WINDOWED:
        seen = seen & (key[None, :] > last - window)
    return seen


@triton.jit
def keeps(tile_max, before, threshold):
    """Whether a row wants the tile kept: exp(tile_max - before) >= threshold.

    A row that sees no key of the tile (-inf) never does; one whose scores are NaN always does.
    """
    below = tile_max < before + threshold
    return (below == 0) & (tile_max != float("-inf"))


@triton.jit
def kept_votes(wanted, ballot):
    """The votes that keep the tile, as bits of one scalar; if it is zero, the whole block skips the tile.

    `ballot` has each row's vote as one bit, and 0 for padding rows, which never vote.
    """
    return tl.reduce_or(tl.where(wanted, ballot, 0), 0)


@triton.jit
def private_votes(wanted):
    """Lets the 64 rows of each warpgroup vote alone (sm_90, 8 warps, 128 rows).

    A reduction over all rows makes the two warpgroups wait for each other in every tile; voting apart, one
    computes its softmax while the other uses the tensor cores. Each thread has two rows of the score tile,
    and the barrier of its warpgroup returns the OR over the 128 threads.

    Returns:
        Each row's vote, int32 [rows]: nonzero keeps the tile.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred mine, any;
        .reg .b32 both, group;
        or.b32 both, $2, $3;
        setp.ne.b32 mine, both, 0;
        mov.u32 group, %tid.x;
        shr.u32 group, group, 7;
        add.u32 group, group, 1;
        barrier.cta.red.or.pred any, group, 128, mine;
        selp.b32 $0, 1, 0, any;
        selp.b32 $1, 1, 0, any;
        }
        """,
        "=r,=r,r,r",
        [wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=2,
    )


@triton.jit
def count_bits(bits, VOTES: tl.constexpr):
    """How many of the votes are set in `bits`."""
    total = bits & 1
    for vote in tl.static_range(1, VOTES):
        total += (bits >> vote) & 1
    return total


@triton.jit
def online_softmax(
    scores, scale, m, m_new, absent, l, acc, MASKED: tl.constexpr, PARTIAL: tl.constexpr
):
    """Weights of one tile, and the state rescaled to the new running maximum.

    Args:
        scores: raw scores [rows, keys], -inf where masked.
        scale: turns raw scores into the log2 domain.
        m: running maximum before the tile.
        m_new: running maximum with the tile.
        absent: rows that this tile leaves as they are (their vote skipped it); used when PARTIAL.
        l: row sums.
        acc: unnormalised output.
        MASKED: whether a row may have seen no key yet.
        PARTIAL: whether a row may be absent.

    Returns:
        Weights [rows, keys], l, acc.
    """
    top = m_new
    if MASKED:
        # A row without any key so far has top = -inf, and -inf minus -inf is NaN.
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - top)
    if PARTIAL:
        top = tl.where(absent, float("inf"), top)
    weights = tl.exp2(scores * scale - top[:, None])
    return weights, l * alpha + tl.sum(weights, 1), acc * alpha[:, None]


@triton.jit
def scale_of(each, head, PER_HEAD: tl.constexpr):
    """The scale of an FP8 cache for one KV head, from one number or one per KV head."""
    return tl.load(each + (head if PER_HEAD else 0))


@triton.jit
def place_of(offset, stride):
    """Row and column of an offset in the matrix of a descriptor; used once per head, because it divides."""
    row = offset // stride
    return row.to(tl.int32), (offset - row * stride).to(tl.int32)


@triton.jit
def pages_of(
    table, first, begin, limit, ROWS: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Page number of each of the keys `first` to `first + ROWS`, or one for all where a page contains them.

    Keys and values share it. MASKED: only keys from `begin` up to `limit` are in use; what the table says of
    others is not read.
    """
    if PAGE >= ROWS:
        return tl.load(table + first // PAGE)
    else:
        keys = first + tl.arange(0, ROWS)
        if MASKED:
            return tl.load(table + keys // PAGE, mask=(keys >= begin) & (keys < limit), other=0)
        else:
            return tl.load(table + keys // PAGE)


@triton.jit
def load_tile(
    x, offset, place, stride, first, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, CLEAN: tl.constexpr, pages=0,
    page_stride=0, begin=0, PAGE: tl.constexpr = 0,
):  # fmt: skip
    """Rows `first` to `first + ROWS` of one head, [ROWS, WIDTH]; columns beyond COLUMNS are zero.

    The head starts at `offset` for pointers, at row and column `place` for a descriptor.
    MASKED: rows from `limit` on may be outside the tensor. CLEAN: they must read as zero, because a cache may
    contain anything there, even NaN (scores are masked anyway, values are not).
    PAGE: rows of a page, 0 without. With pages the head starts there in each; `pages` are those of the rows
    (`pages_of`), `page_stride` apart (for a descriptor in rows), and rows before `begin` are not there.
    """
    if TMA:
        if PAGE == 0:
            tile = x.load([place[0] + first, place[1]])
        else:
            tile = x.load([place[0] + pages * page_stride + first % PAGE, place[1]])
        if MASKED and CLEAN:
            there = first + tl.arange(0, ROWS) < limit
            if PAGE > 0:
                there = there & (first + tl.arange(0, ROWS) >= begin)
            tile = tl.where(there[:, None], tile, 0.0)
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, WIDTH)
        if PAGE == 0:
            pointers = (
                x + offset + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
            )
        else:
            # A tile begins where a page does, or lies inside one.
            inside = first % PAGE + rows if PAGE >= ROWS else rows % PAGE
            starts = pages.to(tl.int64) * page_stride + inside * stride
            pointers = x + offset + starts[:, None] + columns[None, :]
        if MASKED:
            there = first + rows < limit
            if PAGE > 0:
                there = there & (first + rows >= begin)
            held = there[:, None] & (columns < COLUMNS)[None, :]
            tile = tl.load(pointers, mask=held, other=0.0)
        elif WIDTH != COLUMNS:
            tile = tl.load(pointers, mask=(columns < COLUMNS)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_queries(
    rows, valid, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of query rows, [rows, WIDTH]; zero beyond HEAD_DIM and where not valid.

    Args:
        rows: where each row starts.
        valid: which rows are there.
        FIRST: the first column.
        HEAD_DIM: columns of the tensor.
        WIDTH: columns to load.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(
        rows[:, None] + columns[None, :],
        mask=valid[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def scores_of(
    q, q_tail, k, k_tail, offset, place, stride, first, limit, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, pages=0, page_stride=0, begin=0, PAGE: tl.constexpr = 0,
):  # fmt: skip
    """Raw scores of queries and the keys from `first` on, [rows, KEYS].

    A HEAD_DIM that is no power of two comes in two pieces: WIDTH columns, and TAIL more (0: none), for which
    there are `q_tail` and, with TMA, a descriptor `k_tail` of its own. The rest is as in `load_tile`.
    """
    COLUMNS: tl.constexpr = HEAD_DIM if TAIL == 0 else WIDTH
    keys = load_tile(
        k, offset, place, stride, first, limit, KEYS, COLUMNS, WIDTH, TMA, MASKED, False, pages,
        page_stride, begin, PAGE,
    )  # fmt: skip
    scores = tl.dot(q, keys.to(q.dtype).T, input_precision=PRECISION)
    if TAIL > 0:
        place_tail = (place[0], place[1] + WIDTH)
        rest = load_tile(
            k_tail, offset + WIDTH, place_tail, stride, first, limit, KEYS, HEAD_DIM - WIDTH, TAIL, TMA,
            MASKED, False, pages, page_stride, begin, PAGE,
        )  # fmt: skip
        scores = tl.dot(q_tail, rest.to(q.dtype).T, scores, input_precision=PRECISION)
    return scores
