"""Prefill attention that skips KV tiles, for Hopper (sm_90), in Triton's Gluon (BLASST, arXiv 2512.12087).

A program has GROUPS consumer warpgroups of 64 query rows each, and one producer warp. The rows of a warpgroup
vote together, so each warpgroup decides by one barrier of its own and branches independently of the others. A
call is armed when it may skip: some scale factor is above 0.

    producer   item -> K ring (2 tiles) --------------------> consumers   s = q k^T
                       V ring (3 tiles) <- "keeps" or "skips" --------    top = max s; any row keeps?
                       V is fetched ahead while tiles are kept,           kept: p = exp2(s - m); acc += p v
                       and on demand after a skipped one                  skipped: nothing

While a warpgroup computes the softmax of one tile, the tensor cores run its own product p v of the tile
before and the other warpgroups' products. A skipped tile costs its q k^T, 64 maxima per thread and one
barrier, so skipped tiles run back to back.

Barriers. A program numbers its tiles n = 0, 1, ... across all its items. Tile n uses slot n % 2 of the K ring
and n % 3 of the V ring; n // 2 and n // 3, odd or even, are the parities of these slots' barriers.

    k_full, v_full, q_full   TMA -> consumers: the slot is filled. The producer itself completes v_full where
                             every warpgroup skips and nothing was fetched.
    K_FREE, V_FREE, Q_FREE   consumers -> producer: the slot may be overwritten
    DECIDED                  consumers -> producer: every warpgroup has written whether it keeps the tile
    ITEM_THERE, ITEM_FREE    the number of the next item: written, read (a ring of 2)

In an armed call the producer settles tile n - 2 once it has fetched the keys of tile n: it waits for DECIDED,
and fetches the values if some warpgroup keeps the tile and they are not there yet. An item's last two tiles
are thus settled by tiles of later items, or at the end. An item without tiles settles none: after two of them
the producer would wait for ITEM_FREE while the consumers wait for v_full. Where such items can occur (EMPTY),
the producer settles both tiles at each of them.

Columns. Keys whose D is no power of two come as two pieces, D - TAIL and TAIL columns, each with a ring of
its own; both report to the same k_full. A tile of 192 columns leaves room for two tiles of values (V_SLOTS),
while barriers stay a ring of three: tile n's values then wait for V_FREE of tile n - 2, not of n - 3.

Pages. With a block table, keys and values are pages of PAGE rows, and a tile comes in TILE / BOX boxes of
rows, each inside one page: loads of their own into their part of the slot. A part is whole swizzle atoms of 8
rows, so the tile lies as one load would leave it. One arrival announces the bytes of all boxes before the
first is requested: for the barriers, a tile of pages is one load like any other. A box without keys is page
-1, which TMA fills with zeros, so a barrier always waits for the bytes of a whole tile. Page numbers are
read a tile ahead, box i's by lane i, and kept until the tile is settled: its values may be fetched as late.
Several producer warps (WARPS) do the same and share the loads; both arrive at ITEM_THERE. None gets a phase
ahead of another: no phase of k_full or v_full completes before the loads of all warps are there.
Rows of the last page behind the request's end may hold anything; `_clean` zeroes them.

Leading rows. Votes begin at multiples of ROWS of the request's positions. Where the request's first row may
lie between two of them (LEADS), its first vote begins before it: queries are fetched from there (TMA takes
coordinates below 0, too), and rows that are not the request's neither vote nor are stored.

What was tried, and what came of it, is in kernels/bench/hopper.md.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from skip_softmax.hopper.primitives import (
    DECIDED,
    ITEM_AT,
    ITEM_FREE,
    ITEM_THERE,
    K_FREE,
    KEEP_AT,
    Q_FREE,
    V_FREE,
    any_wants,
    arrive,
    declare,
    init,
    log2_threshold,
    meet,
    moved,
    read,
    uniform,
    wait_for,
    write,
)

# These names changed between Triton 3.6 and 3.9. No `from __future__ import annotations` in this file: an
# aggregate needs the types of its fields, not their names.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_aggregate = getattr(gluon, "aggregate", None) or triton.language.core._aggregate

K_STAGES = gl.constexpr(2)
V_STAGES = gl.constexpr(3)  # of barriers; of values there are V_SLOTS
ROWS = gl.constexpr(64)  # query rows of a warpgroup, which vote together


# --- Shared by producer and consumers ---------------------------------------------------------------------


@_aggregate
class _Call:
    """Lengths and constants of a call."""

    q_len: gl.tensor
    kv_len: gl.tensor
    dense_last: object  # a tensor or None
    items: gl.tensor
    group: gl.tensor
    kv_heads: gl.tensor
    blocks: gl.tensor
    near: gl.tensor
    q_lens: object  # tensors or None
    kv_lens: object
    q_starts: object
    kv_starts: object
    factors: object
    stats: object
    table: object  # page numbers, `pages` for each request; None: keys and values are contiguous
    pages: object
    min_kv_len: object  # requests with fewer keys skip nothing; None: no such rule
    GROUPS: gl.constexpr
    D: gl.constexpr  # columns of queries and keys
    TAIL: gl.constexpr  # of them in the second piece, or 0
    DV: gl.constexpr  # columns of values
    V_SLOTS: gl.constexpr
    TILE: gl.constexpr
    CAUSAL: gl.constexpr
    ARMED: gl.constexpr
    EMPTY: gl.constexpr  # some item may have no tiles
    LEADS: gl.constexpr  # the first vote of a request may begin before its first row (`_item`)
    PAGE: gl.constexpr  # rows of a page of the cache; 0 without a table
    BOX: gl.constexpr  # rows that one load takes from a page
    SUMMED: gl.constexpr  # `stats` are summed over requests
    WARPS: gl.constexpr  # of the producer

    @gluon.constexpr_function
    def __init__(
        self, q_len, kv_len, dense_last, items, group, kv_heads, blocks, near, q_lens, kv_lens, q_starts,
        kv_starts, factors, stats, table, pages, min_kv_len, GROUPS, D, TAIL, DV, V_SLOTS, TILE, CAUSAL,
        ARMED, EMPTY, LEADS, PAGE, BOX, SUMMED, WARPS,
    ):  # fmt: skip
        self.q_len = q_len
        self.kv_len = kv_len
        self.dense_last = gl.constexpr(None) if dense_last is None else dense_last
        self.items = items
        self.group = group
        self.kv_heads = kv_heads
        self.blocks = blocks
        self.near = near
        self.q_lens = gl.constexpr(None) if q_lens is None else q_lens
        self.kv_lens = gl.constexpr(None) if kv_lens is None else kv_lens
        self.q_starts = gl.constexpr(None) if q_starts is None else q_starts
        self.kv_starts = gl.constexpr(None) if kv_starts is None else kv_starts
        self.factors = gl.constexpr(None) if factors is None else factors
        self.stats = gl.constexpr(None) if stats is None else stats
        self.table = gl.constexpr(None) if table is None else table
        self.pages = gl.constexpr(None) if pages is None else pages
        self.min_kv_len = gl.constexpr(None) if min_kv_len is None else min_kv_len
        self.GROUPS = gl.constexpr(GROUPS)
        self.D = gl.constexpr(D)
        self.TAIL = gl.constexpr(TAIL)
        self.DV = gl.constexpr(DV)
        self.V_SLOTS = gl.constexpr(V_SLOTS)
        self.TILE = gl.constexpr(TILE)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.ARMED = gl.constexpr(ARMED)
        self.EMPTY = gl.constexpr(EMPTY)
        self.LEADS = gl.constexpr(LEADS)
        self.PAGE = gl.constexpr(PAGE)
        self.BOX = gl.constexpr(BOX)
        self.SUMMED = gl.constexpr(SUMMED)
        self.WARPS = gl.constexpr(WARPS)


@_aggregate
class _Shared:
    """Tiles in shared memory, and the barriers on which TMA reports that they are full."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    q_tail: object  # the second piece of queries and keys, or None
    k_tail: object
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, q_tail, k_tail, v, q_full, k_full, v_full):
        self.q = q
        self.k = k
        self.q_tail = gl.constexpr(None) if q_tail is None else q_tail
        self.k_tail = gl.constexpr(None) if k_tail is None else k_tail
        self.v = v
        self.q_full = q_full
        self.k_full = k_full
        self.v_full = v_full


@_aggregate
class _Item:
    """One block of rows of one query head."""

    request: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    row: gl.tensor  # first row of the block; below 0 if its vote begins before the request's
    q_start: gl.tensor  # where the request's rows start in the tensors
    kv_start: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    held: gl.tensor  # rows of the output, padding included

    @gluon.constexpr_function
    def __init__(self, request, head, kv_head, row, q_start, kv_start, q_len, kv_len, held):
        self.request = request
        self.head = head
        self.kv_head = kv_head
        self.row = row
        self.q_start = q_start
        self.kv_start = kv_start
        self.q_len = q_len
        self.kv_len = kv_len
        self.held = held


@gluon.jit
def _item(number, c):
    """The item of a number: heads that share keys are adjacent; in `near` KV heads, long blocks are first."""
    member = number % c.group
    rest = number // c.group
    pack = rest // (c.near * c.blocks)
    rest = rest % (c.near * c.blocks)
    block = c.blocks - 1 - rest // c.near
    overall = pack * c.near + rest % c.near  # KV head, counted over all requests
    kv_head = overall % c.kv_heads
    request = overall // c.kv_heads
    q_start = gl.to_tensor(0)
    kv_start = gl.to_tensor(0)
    q_len = c.q_len
    kv_len = c.kv_len
    held = c.q_len
    if c.q_starts is not None:
        q_start = uniform(gl.load(c.q_starts + request))
        q_len = uniform(gl.load(c.q_starts + request + 1)) - q_start
        held = q_len
    if c.kv_starts is not None:
        kv_start = uniform(gl.load(c.kv_starts + request))
        kv_len = uniform(gl.load(c.kv_starts + request + 1)) - kv_start
    if c.q_lens is not None:
        q_len = gl.minimum(uniform(gl.load(c.q_lens + request)), q_len)
    if c.kv_lens is not None:
        kv_len = gl.minimum(uniform(gl.load(c.kv_lens + request)), kv_len)
    row = block * (ROWS * c.GROUPS)
    if c.LEADS:
        # Votes begin at multiples of ROWS of the request's positions, so that they do not depend on how a
        # prompt was cut. The rows before the request's first one are another's or nobody's.
        row -= gl.maximum(kv_len - q_len, 0) % ROWS
    return _Item(
        request, kv_head * c.group + member, kv_head, row, q_start, kv_start, q_len, kv_len, held
    )


@gluon.jit
def _tiles(item, row, rows, c):
    """How many tiles the `rows` rows from `row` on visit, and how many of these every row sees in full."""
    end = gl.minimum(row + rows, item.q_len)
    seen = item.kv_len
    whole = item.kv_len
    if c.CAUSAL:
        offset = item.kv_len - item.q_len
        seen = gl.minimum(seen, gl.maximum(offset + end, 0))
        whole = gl.minimum(whole, gl.maximum(offset + row + 1, 0))
    first = row
    if c.LEADS:
        first = gl.maximum(row, 0)
    visited = gl.where(end > first, (seen + c.TILE - 1) // c.TILE, 0)
    return visited, gl.minimum(whole // c.TILE, visited)


@gluon.jit
def _tensor_batch(item, c):
    """The item's batch entry in the tensors; packed requests share entry 0."""
    batch = item.request
    if c.q_starts is not None:
        batch = 0
    return batch


# --- Producer ---------------------------------------------------------------------------------------------


@gluon.jit
def _pages(item, tile, visited, c):
    """The numbers of the pages that hold a tile's boxes of rows: box i's in lane i, -1 where no key is.

    Only entries of the table are read whose keys are visited: the others may be anything.
    """
    box = gl.arange(0, 32, gl.BlockedLayout([1], [32], [c.WARPS], [0]))
    key = tile * c.TILE + box * c.BOX
    wanted = (box < c.TILE // c.BOX) & (key < item.kv_len) & (tile < visited)
    return gl.load(c.table + item.request * c.pages + key // c.PAGE, mask=wanted, other=-1)


@gluon.jit
def _fetch_tile(
    source, tail, batch, head, row, pages, tiles, tails, slot, full, D: gl.constexpr, c
):  # fmt: skip
    """Fetches D columns of keys or values into a slot, from row `row` of `batch` on, or out of `pages`.

    `tail` describes a second piece to TMA, whose slots are `tails`; None: there is one piece. `full` is told.
    """
    mbarrier.expect(full, c.TILE * D * 2)
    if c.PAGE == 0:
        _tma_load(source, [batch, head, row, 0], full, tiles.index(slot))
        if tail is not None:
            _tma_load(tail, [batch, head, row, D - c.TAIL], full, tails.index(slot))
    else:
        box = gl.arange(0, 32, gl.BlockedLayout([1], [32], [c.WARPS], [0]))
        for i in gl.static_range(c.TILE // c.BOX):
            # Without a key in it, the number is -1, and what TMA finds there is zeros.
            page = gl.max(gl.where(box == i, pages, -1), 0)
            inside = i * c.BOX % c.PAGE
            if c.TILE % c.PAGE != 0:
                inside = (row + i * c.BOX) % c.PAGE
            part = tiles.index(slot).slice(i * c.BOX, c.BOX, dim=2)
            _tma_load(source, [page, head, inside, 0], full, part)
            if tail is not None:
                part_tail = tails.index(slot).slice(i * c.BOX, c.BOX, dim=2)
                _tma_load(tail, [page, head, inside, D - c.TAIL], full, part_tail)


@gluon.jit
def _fetch_values(n, v, batch, head, row, pages, s, c):
    """Fetches the values of tile `n`."""
    if c.V_SLOTS < V_STAGES:  # fewer than barriers: those of the tile that had the slot last
        old = n - c.V_SLOTS
        if old >= 0:
            wait_for(V_FREE + old % V_STAGES, (old // V_STAGES) & 1)
            if c.ARMED:
                mbarrier.wait(s.v_full.index(old % V_STAGES), (old // V_STAGES) & 1)
    full = s.v_full.index(n % V_STAGES)
    _fetch_tile(v, None, batch, head, row, pages, s.v, None, n % c.V_SLOTS, full, c.DV, c)


@gluon.jit
def _settle(n, v, batch, head, row, pages, fetched, s, c):
    """Waits for all decisions on tile `n`, and fetches its values if they are wanted and not there yet.

    Returns whether any warpgroup keeps the tile.
    """
    slot = n % V_STAGES
    wait_for(DECIDED + slot, (n // V_STAGES) & 1)
    keep = 0
    for w in gl.static_range(c.GROUPS):
        keep |= read(KEEP_AT + 4 * (slot * c.GROUPS + w))
    if fetched == 0:
        if keep != 0:
            _fetch_values(n, v, batch, head, row, pages, s, c)
        else:  # nobody reads the slot: its phase completes without a load
            mbarrier.arrive(s.v_full.index(slot), count=1)
    return keep


@gluon.jit
def _give(number, turn):
    """Hands the consumers the number of the next item; `c.items` or more ends their loop (`_take`)."""
    wait_for(ITEM_FREE + turn % 2, (turn // 2) & 1 ^ 1)
    write(ITEM_AT + 4 * (turn % 2), number)
    arrive(ITEM_THERE + turn % 2)


@gluon.jit
def _produce(q, k, q_tail, k_tail, v, s, c, counter):
    number = gl.program_id(0)
    turn = 0
    q_phase = 1
    n = 0  # tiles so far, over all items
    # State of tiles n - 1 and n - 2, which are not settled yet and may belong to earlier items.
    keep = 1
    fetched1 = 0
    fetched2 = 0
    batch1 = 0
    batch2 = 0
    head1 = 0
    head2 = 0
    row1 = 0
    row2 = 0
    ahead = 0  # page numbers of the next tile
    pages1 = 0
    pages2 = 0
    if c.PAGE:
        # Each a value of its own: of names that begin as one, Triton carries only some around the loop.
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [c.WARPS], [0])
        ahead = gl.full([32], -1, gl.int32, LANES)
        pages1 = gl.full([32], -1, gl.int32, LANES)
        pages2 = gl.full([32], -1, gl.int32, LANES)
    while number < c.items:
        _give(number, turn)
        turn += 1
        item = _item(number, c)
        # Sparsity varies between heads, so a program that is free takes the next item; requested early.
        following = c.items
        if counter is not None:
            following = gl.num_programs(0) + uniform(gl.atomic_add(counter, 1, sem="relaxed"))
        batch = _tensor_batch(item, c)
        visited, shared = _tiles(item, item.row, ROWS * c.GROUPS, c)
        if c.PAGE:
            ahead = _pages(item, 0, visited, c)
        for tile in range(visited):
            key = item.kv_start + tile * c.TILE
            pages = ahead
            if c.PAGE:
                ahead = _pages(item, tile + 1, visited, c)
            k_slot = n % K_STAGES
            v_slot = n % V_STAGES
            v_phase = (n // V_STAGES) & 1 ^ 1
            # A slot is free once every consumer warp has arrived for the tile that used it before. The
            # parity is that tile's, so the first round of a ring passes at once.
            wait_for(K_FREE + k_slot, (n // K_STAGES) & 1 ^ 1)
            if c.ARMED:
                # A warpgroup that skips frees the slot without waiting for its values: they may be in flight.
                wait_for(V_FREE + v_slot, v_phase)
                mbarrier.wait(s.v_full.index(v_slot), v_phase)
            full = s.k_full.index(k_slot)
            _fetch_tile(
                k, k_tail, batch, item.kv_head, key, pages, s.k, s.k_tail, k_slot, full, c.D, c
            )
            if c.ARMED:
                if n >= 2:
                    keep = _settle(n - 2, v, batch2, head2, row2, pages2, fetched2, s, c)
                # After a kept tile the next ones will probably be kept: their values are fetched ahead.
                if (keep != 0) & (fetched1 == 0) & (n >= 1):
                    _fetch_values(n - 1, v, batch1, head1, row1, pages1, s, c)
                    fetched1 = 1
                if keep != 0:
                    _fetch_values(n, v, batch, item.kv_head, key, pages, s, c)
                fetched2 = fetched1
                batch2 = batch1
                head2 = head1
                row2 = row1
                pages2 = pages1
                fetched1 = keep
                batch1 = batch
                head1 = item.kv_head
                row1 = key
                pages1 = pages
            if tile == 0:
                # Only now: consumers may need values of tile n - 2 before they free the old queries.
                for w in gl.static_range(c.GROUPS):
                    wait_for(Q_FREE + w, q_phase)
                    place = [batch, item.head, item.q_start + item.row + ROWS * w, 0]
                    mbarrier.expect(s.q_full.index(w), ROWS * c.D * 2)
                    _tma_load(q, place, s.q_full.index(w), s.q.index(w))
                    if q_tail is not None:
                        place_tail = [place[0], place[1], place[2], c.D - c.TAIL]
                        _tma_load(q_tail, place_tail, s.q_full.index(w), s.q_tail.index(w))
                q_phase ^= 1
            if not c.ARMED:
                wait_for(V_FREE + v_slot, v_phase)
                _fetch_values(n, v, batch, item.kv_head, key, pages, s, c)
            n += 1
        if c.ARMED & c.EMPTY:
            if visited == 0:
                # Why: top of the file. Compiled into calls without such items, this costs up to 5 %.
                if n >= 2:
                    _settle(n - 2, v, batch2, head2, row2, pages2, fetched2, s, c)
                if n >= 1:
                    _settle(n - 1, v, batch1, head1, row1, pages1, fetched1, s, c)
                # The tiles to come settle both again, which then fetches nothing.
                fetched1 = 1
                fetched2 = 1
        number = following
    _give(number, turn)
    if c.ARMED:
        if n >= 2:
            _settle(n - 2, v, batch2, head2, row2, pages2, fetched2, s, c)
        if n >= 1:
            _settle(n - 1, v, batch1, head1, row1, pages1, fetched1, s, c)


# --- Consumers --------------------------------------------------------------------------------------------


@gluon.jit
def _take(turn):
    """The number of the next item; `c.items` or more ends the loop."""
    wait_for(ITEM_THERE + turn % 2, (turn // 2) & 1)
    number = read(ITEM_AT + 4 * (turn % 2))
    arrive(ITEM_FREE + turn % 2)
    return number


@gluon.jit
def _announce(keep, slot, W: gl.constexpr, c):
    """Tells the producer what warpgroup W decided; a skipped tile's slot for values is freed at once."""
    write(KEEP_AT + 4 * (slot * c.GROUPS + W), keep)
    arrive(DECIDED + slot)
    if keep == 0:
        arrive(V_FREE + slot)


@gluon.jit
def _scores(queries, s, slot, W: gl.constexpr, c, S: gl.constexpr):
    """Starts q k^T of the tile in a slot."""
    keys = s.k.index(slot).reshape([c.TILE, c.D - c.TAIL]).permute((1, 0))
    zero = gl.zeros([ROWS, c.TILE], gl.float32, S)
    scores = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
    if c.TAIL > 0:
        rest = s.k_tail.index(slot).reshape([c.TILE, c.TAIL]).permute((1, 0))
        queries_tail = s.q_tail.index(W).reshape([ROWS, c.TAIL])
        scores = warpgroup_mma(queries_tail, rest, scores, is_async=True)
    return scores


@gluon.jit
def _product(weights, s, n, acc, c):
    """Starts acc + p v of tile `n`."""
    values = s.v.index(n % c.V_SLOTS).reshape([c.TILE, c.DV])
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def _both(queries, weights, acc, s, n, W: gl.constexpr, c, S: gl.constexpr):
    """Starts q k^T of tile `n` and p v of the tile before; returns finished scores and p v in flight."""
    scores = _scores(queries, s, n % K_STAGES, W, c, S)
    mbarrier.wait(s.v_full.index((n - 1) % V_STAGES), ((n - 1) // V_STAGES) & 1)
    flying = _product(weights, s, n - 1, acc, c)
    return warpgroup_mma_wait(1, deps=[scores]), flying


@gluon.jit
def _taken(scores, slot, tile, item, row, MASKED: gl.constexpr, c, S: gl.constexpr):
    """Frees the keys' slot, and returns the scores with -inf where a row does not see the key."""
    arrive(K_FREE + slot)
    if MASKED:
        key = tile * c.TILE + gl.arange(0, c.TILE, gl.SliceLayout(0, S))
        last = item.kv_len - 1
        if c.CAUSAL:
            position = row + gl.arange(0, ROWS, gl.SliceLayout(1, S)) + (item.kv_len - item.q_len)
            scores = gl.where(
                key[None, :] <= gl.minimum(position, last)[:, None], scores, float("-inf")
            )
        else:
            scores = gl.where((key <= last)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _tops(scores, scale, c):
    """Row maxima over each thread's own scores, [ROWS, 4]: enough to vote, without exchange among threads."""
    return gl.max(gl.max(gl.reshape(scores, [ROWS, c.TILE // 8, 4, 2]), 3), 1) * scale


@gluon.jit
def _vote(tops, m, needed, slot, MASKED: gl.constexpr, W: gl.constexpr, c):
    """Announces whether the warpgroup keeps the tile: some valid row has exp(top - m) >= threshold."""
    least = gl.convert_layout(m + needed, gl.SliceLayout(1, tops.type.layout))
    wanted = tops >= least[:, None]
    if MASKED:
        wanted = wanted & (tops > float("-inf"))
    keep = any_wants(wanted, W)
    _announce(keep, slot, W, c)
    return keep


@gluon.jit
def _soften(scores, tops, scale, m, l, MASKED: gl.constexpr, S: gl.constexpr):
    """Unnormalised weights, the factor that rescales earlier sums, and the new l and m."""
    m_new = gl.maximum(m, gl.convert_layout(gl.max(tops, 1), gl.SliceLayout(1, S)))
    top = m_new
    if MASKED:
        # A row without any key so far has top = -inf, and -inf minus -inf is NaN.
        top = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m - top)
    p = gl.exp2(scores * scale - top[:, None])
    return p, alpha, l * alpha + gl.sum(p, 1), m_new


@gluon.jit
def _rescaled(acc, alpha, O: gl.constexpr):
    # A factor of 1 changes no bit, and maxima seldom move.
    if moved(alpha) != 0:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
    return acc


@gluon.jit
def _finished(flying, slot, phase):
    """Waits for p v.

    The phase of V_FREE is long complete: it only keeps ptxas from moving the wait above the softmax.
    """
    wait_for(V_FREE + slot, phase ^ 1)
    return warpgroup_mma_wait(0, deps=[flying])


@gluon.jit
def _walk(
    first, last, queries, item, row, scale, needed, acc, l, m, weights, keep, kept, n, s, c,
    W: gl.constexpr, MASKED: gl.constexpr, S: gl.constexpr, O: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """Walks tiles `first` to `last`; MASKED where some row does not see all of their keys.

    `weights` are those of the tile before, if it was kept: their product with its values is still to do.
    """
    for tile in range(first, last):
        k_slot = n % K_STAGES
        slot = n % V_STAGES
        old = (n - 1) % V_STAGES
        old_phase = ((n - 1) // V_STAGES) & 1
        # `_taken` frees the keys of tile n. If tile n - 1 was kept, its values are still needed: `_both`
        # waits for v_full, and V_FREE follows once p v is done. If it was skipped, `_announce` freed them.
        mbarrier.wait(s.k_full.index(k_slot), (n // K_STAGES) & 1)
        if not c.ARMED:
            scores, flying = _both(queries, weights, acc, s, n, W, c, S)
            scores = _taken(scores, k_slot, tile, item, row, MASKED, c, S)
            p, alpha, l, m = _soften(scores, _tops(scores, scale, c), scale, m, l, MASKED, S)
            acc = _finished(flying, old, old_phase)
            arrive(V_FREE + old)
            acc = _rescaled(acc, alpha, O)
            weights = gl.convert_layout(p.to(s.v.dtype), A)
        elif keep != 0:
            scores, flying = _both(queries, weights, acc, s, n, W, c, S)
            scores = _taken(scores, k_slot, tile, item, row, MASKED, c, S)
            tops = _tops(scores, scale, c)
            keep = _vote(tops, m, needed, slot, MASKED, W, c)
            if keep != 0:
                p, alpha, l, m = _soften(scores, tops, scale, m, l, MASKED, S)
                acc = _finished(flying, old, old_phase)
                acc = _rescaled(acc, alpha, O)
                weights = gl.convert_layout(p.to(s.v.dtype), A)
            else:
                acc = warpgroup_mma_wait(0, deps=[flying])
            arrive(V_FREE + old)
            kept += keep
        else:
            scores = _scores(queries, s, k_slot, W, c, S)
            scores = warpgroup_mma_wait(0, deps=[scores])
            scores = _taken(scores, k_slot, tile, item, row, MASKED, c, S)
            tops = _tops(scores, scale, c)
            keep = _vote(tops, m, needed, slot, MASKED, W, c)
            if keep != 0:
                p, alpha, l, m = _soften(scores, tops, scale, m, l, MASKED, S)
                acc = _rescaled(acc, alpha, O)
                weights = gl.convert_layout(p.to(s.v.dtype), A)
            kept += keep
        n += 1
    return acc, l, m, weights, keep, kept, n


@gluon.jit
def _clean(values, held, W: gl.constexpr, c):
    """Zeroes the rows of a tile from `held` on: a cache may contain anything there, even NaN.

    Every warpgroup writes the whole tile, all with the same bytes.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // c.DV, c.DV // 8], [4, 1], [1, 0])
    tile = values.load(L)
    inside = gl.arange(0, c.TILE, gl.SliceLayout(1, L)) < held
    values.store(gl.where(inside[:, None], tile, 0.0))
    fence_async_shared()
    meet(W)


@gluon.jit
def _consume(
    W: gl.constexpr, out, factor, scale, stride_ob, stride_oh, stride_os, s, c
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.TILE, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, c.DV, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    n = 0
    q_phase = 0
    turn = 0
    number = _take(turn)
    while number < c.items:
        item = _item(number, c)
        row = item.row + ROWS * W
        visited, shared = _tiles(item, item.row, ROWS * c.GROUPS, c)
        mine, whole = _tiles(item, row, ROWS, c)
        # In a dense call every warpgroup walks all tiles of the block; those beyond its own are all masked.
        last = mine if c.ARMED else visited
        acc = gl.zeros([ROWS, c.DV], gl.float32, O)
        l = gl.full([ROWS], 0.0, gl.float32, ROW)
        needed = gl.full([ROWS], 0.0, gl.float32, ROW)
        kept = 0
        if c.ARMED:
            if c.factors is not None:
                factor = gl.load(c.factors + item.head)
            threshold = log2_threshold(factor, item.kv_len)
            if c.min_kv_len is not None:
                threshold = gl.where(item.kv_len < c.min_kv_len, float("-inf"), threshold)
            if c.dense_last is not None:
                # With one of the last rows among them, every row keeps all that it sees.
                dense = row + ROWS > item.q_len - c.dense_last
                threshold = gl.where(dense, float("-inf"), threshold)
            # Padding rows, and rows of others, never vote: nothing is above NaN.
            voter = row + gl.arange(0, ROWS, ROW)
            valid = voter < item.q_len
            if c.LEADS:
                valid = valid & (voter >= 0)
            needed = gl.where(valid, threshold, float("nan"))
        # q_full and Q_FREE change phase once per item with tiles, here as in the producer.
        if visited > 0:
            mbarrier.wait(s.q_full.index(W), q_phase)
            q_phase ^= 1
        if last > 0:
            queries = s.q.index(W).reshape([ROWS, c.D - c.TAIL])
            # The first tile is always kept.
            k_slot = n % K_STAGES
            mbarrier.wait(s.k_full.index(k_slot), (n // K_STAGES) & 1)
            scores = warpgroup_mma_wait(0, deps=[_scores(queries, s, k_slot, W, c, S)])
            scores = _taken(scores, k_slot, 0, item, row, True, c, S)
            m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
            p, unused, l, m = _soften(scores, _tops(scores, scale, c), scale, m, l, True, S)
            weights = gl.convert_layout(p.to(s.v.dtype), A)
            keep = 1
            kept = 1
            if c.ARMED:
                _announce(keep, n % V_STAGES, W, c)
            n += 1
            acc, l, m, weights, keep, kept, n = _walk(
                1, whole, queries, item, row, scale, needed, acc, l, m, weights, keep, kept, n, s, c,
                W, False, S, O, A,
            )  # fmt: skip
            acc, l, m, weights, keep, kept, n = _walk(
                gl.maximum(whole, 1), last, queries, item, row, scale, needed, acc, l, m, weights, keep, kept,
                n, s, c, W, True, S, O, A,
            )  # fmt: skip
            arrive(Q_FREE + W)
            if keep != 0:  # the last tile's p v; its values are there once it is settled
                slot = (n - 1) % V_STAGES
                mbarrier.wait(s.v_full.index(slot), ((n - 1) // V_STAGES) & 1)
                if (c.kv_lens is not None) | (c.kv_starts is not None) | (c.PAGE > 0):
                    held = item.kv_len - (last - 1) * c.TILE
                    if held < c.TILE:
                        _clean(s.v.index((n - 1) % c.V_SLOTS).reshape([c.TILE, c.DV]), held, W, c)
                acc = warpgroup_mma_wait(0, deps=[_product(weights, s, n - 1, acc, c)])
                arrive(V_FREE + slot)
        elif visited > 0:
            arrive(Q_FREE + W)
        if c.ARMED:
            # Tiles of other warpgroups only: the barriers count every warpgroup, so this one arrives too.
            for tile in range(last, visited):
                mbarrier.wait(s.k_full.index(n % K_STAGES), (n // K_STAGES) & 1)
                arrive(K_FREE + n % K_STAGES)
                _announce(0, n % V_STAGES, W, c)
                n += 1
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, O))
        columns = gl.arange(0, c.DV, gl.SliceLayout(0, O))
        # A row that saw no key has l = 0 and acc = 0, and comes out as zero, like padding.
        inverse = gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), gl.SliceLayout(1, O))
        acc = gl.where((rows < item.q_len)[:, None], acc * inverse[:, None], 0.0)
        place = (
            out
            + _tensor_batch(item, c).to(gl.int64) * stride_ob
            + item.head.to(gl.int64) * stride_oh
            + (item.q_start + rows).to(gl.int64)[:, None] * stride_os
            + columns[None, :]
        )
        stored = rows < item.held
        if c.LEADS:
            stored = stored & (rows >= 0)
        gl.store(place, acc.to(s.v.dtype), mask=stored[:, None])
        if c.stats is not None:
            at = c.stats + item.head * 2
            if not c.SUMMED:
                at += item.request * (c.group * c.kv_heads) * 2
            gl.atomic_add(at, mine.to(gl.int64), sem="relaxed")
            if c.ARMED:
                gl.atomic_add(at + 1, (mine - kept).to(gl.int64), sem="relaxed")
        turn += 1
        number = _take(turn)


# A batch's lengths and tables may begin anywhere: a kernel for each would make the first such batch wait.
@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "dense_last", "items", "group", "kv_heads", "blocks", "near", "pages", "min_kv_len"
    ],
    do_not_specialize_on_alignment=["q_lens", "kv_lens", "q_starts", "kv_starts", "table"],
)  # fmt: skip
def _hopper(
    q, k, q_tail, k_tail, v, out, stats, counter, factors, q_lens, kv_lens, q_starts, kv_starts, table,
    factor, scale, q_len, kv_len, dense_last, min_kv_len, items, group, kv_heads, blocks, near, pages,
    stride_ob, stride_oh, stride_os,
    GROUPS: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, DV: gl.constexpr, V_SLOTS: gl.constexpr,
    TILE: gl.constexpr, CAUSAL: gl.constexpr, ARMED: gl.constexpr,
    EMPTY: gl.constexpr, LEADS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr, SUMMED: gl.constexpr,
    WARPS: gl.constexpr, HEAVY: gl.constexpr, LIGHT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries_tail = None
    keys_tail = None
    if TAIL > 0:
        queries_tail = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, TAIL], q.layout)
        keys_tail = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, TILE, TAIL], k.layout)
    s = _Shared(
        gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D - TAIL], q.layout),
        gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, TILE, D - TAIL], k.layout),
        queries_tail,
        keys_tail,
        gl.allocate_shared_memory(dtype, [V_SLOTS, 1, 1, TILE, DV], v.layout),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER),
    )
    declare()
    for i in gl.static_range(GROUPS):
        mbarrier.init(s.q_full.index(i), count=1)
        init(Q_FREE + i, 4)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(s.k_full.index(i), count=1)
        init(K_FREE + i, 4 * GROUPS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(s.v_full.index(i), count=1)
        init(V_FREE + i, 4 * GROUPS)
        init(DECIDED + i, 4 * GROUPS)
    for i in gl.static_range(2):
        init(ITEM_THERE + i, WARPS)
        init(ITEM_FREE + i, 4 * GROUPS)
    fence_async_shared()
    c = _Call(
        q_len, kv_len, dense_last, items, group, kv_heads, blocks, near, q_lens, kv_lens, q_starts,
        kv_starts, factors, stats, table, pages, min_kv_len, GROUPS, D, TAIL, DV, V_SLOTS, TILE, CAUSAL,
        ARMED, EMPTY, LEADS, PAGE, BOX, SUMMED, WARPS,
    )  # fmt: skip
    place = (out, factor, scale, stride_ob, stride_oh, stride_os, s, c)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0,) + place),
                (_consume, (1,) + place),
                (_produce, (q, k, q_tail, k_tail, v, s, c, counter)),
            ],
            [4, WARPS],
            [HEAVY, LIGHT],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0,) + place),
                (_consume, (1,) + place),
                (_consume, (2,) + place),
                (_produce, (q, k, q_tail, k_tail, v, s, c, counter)),
            ],
            [4, 4, WARPS],
            [HEAVY, HEAVY, LIGHT],
        )
