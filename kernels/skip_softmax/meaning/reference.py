"""What skip-softmax attention means, in plain PyTorch (BLASST, arXiv 2512.12087, Algorithm 1).

For one query head, a tile of query rows, and KV tiles in ascending absolute position:

    M[r] = -inf
    for each visited tile j:                         # a tile that at least one row may see
        s[r, c] = scale * q[r] . k[c]                # masked scores are -inf
        m[r]    = max over c in tile j of s[r, c]
        skip    = j is not the first visited tile
                  and no valid row r is one of the request's last `dense_last` rows
                  and every valid row r has exp(m[r] - M[r]) < scale_factor / kv_len
        if not skip:
            keep tile j; M[r] = max(M[r], m[r])
    out[r] = softmax over the kept scores of row r, times v

Prefill: the rows of `tile_q` consecutive queries of one head vote together; tiles begin at multiples of
tile_q of the request's positions, so that the first tile of a chunk may hold fewer rows. kv_len is the
request's length at the call's end. Decode: the heads of one GQA group vote, separately for each query token,
and kv_len is the number of keys that the token sees. Below a threshold of 1 a skipped tile cannot raise M, so
M is the plain running max, and one dense pass gives every decision. A call whose threshold is 1 or more, or
whose kv_len is below `min_kv_len`, runs dense (`criterion.py`).

Decode with `running_max: seeded` never skips the first and the last visited tile, and M[r] is the maximum
over these two, whatever else is kept.

Scores, softmax and both products are computed in float32 for lower precisions, in float64 for float64; only
the output is rounded to the queries' dtype. Keys and values in FP8 (e4m3) stand for themselves times their
scale, so that scores are scale * k_scale * q . k, and decisions follow from these. Memory grows with kv_len,
never with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from skip_softmax.meaning import histogram
from skip_softmax.meaning.call import Alone, Call, Scales, dequantised
from skip_softmax.meaning.criterion import critical_log2, has_threshold, skips
from skip_softmax.meaning.histogram import TileHistogram

# Scores in memory at once [elements]: a bound on memory, large enough for efficient matrix products.
_BLOCK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Block:
    """Some query rows of one request against every KV tile they visit.

    Attributes:
        rows: which query rows.
        first_tile: index of the first KV tile of this block.
        scores: masked scores [q_heads, rows, tiles * tile_kv].
        visited: bool [votes, tiles]; a vote is a query tile (prefill) or a query token (decode).
        gaps: [vote_heads, votes, tiles] nats; +inf at tiles that are never skipped (the first visited, the
            last too if `Call.seeded`, all of a vote that `Call.dense_last` keeps), -inf where not visited.
        blind: whether some row sees no key at all.
    """

    rows: slice
    first_tile: int
    scores: torch.Tensor
    visited: torch.Tensor
    gaps: torch.Tensor
    blind: bool


F = TypeVar("F", bound=Callable[..., Any])


def as_documented(function: F) -> F:
    """Runs without gradients, and in the precision promised above even where autocast would lower it."""

    @wraps(function)
    def run(q: torch.Tensor, *others: Any) -> Any:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return function(q, *others)

    return cast(F, run)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    each: list[Alone],
    scale_factor: torch.Tensor,
    out: torch.Tensor,
    scales: Scales,
) -> torch.Tensor:
    """Skip-softmax attention of a batch, one request (`Requests.each`) after another.

    Args:
        q: queries [B, Hq, Sq, D].
        k: keys [B, Hkv, Skv, D], or pages.
        v: as `k`.
        each: the requests.
        scale_factor: float64 [vote_heads] [tokens].
        out: the rows of the requests are written into it [B, Hq, Sq, Dv].
        scales: of an FP8 cache.

    Returns:
        Visited and skipped tiles, int64 [requests, vote_heads, 2].
    """
    counts = torch.zeros(len(each), len(scale_factor), 2, dtype=torch.int64, device=q.device)
    for count, alone in zip(counts, each, strict=True):
        here = (alone.entry, slice(None), alone.rows)
        keys = dequantised(alone.held(k), scales.k, scales.k_each, q)
        values = dequantised(alone.held(v), scales.v, scales.v_each, q)
        result, count[:, 0], count[:, 1] = attend(q[here], keys, values, alone.call, scale_factor)
        out[here] = result
    return counts


@as_documented
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    scale_factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Skip-softmax attention of one call.

    Args:
        q: [q_heads, q_len, head_dim].
        k: [kv_heads, keys, head_dim], the keys from `call.kv_start` on.
        v: [kv_heads, keys, head_dim_v].
        call: the request's own.
        scale_factor: float64 [vote_heads] [tokens].

    Returns:
        Output [q_heads, q_len, head_dim_v], visited tiles and skipped tiles, int64 [vote_heads].
    """
    visited = torch.zeros(call.vote_heads, dtype=torch.int64, device=q.device)
    skipped = torch.zeros_like(visited)
    out = q.new_zeros(q.shape[0], call.q_len, v.shape[-1])
    for block in blocks(q, k, call):
        skip = _skips(block, call, scale_factor)
        visited += block.visited.sum()
        if skip is not None:
            skipped += skip.sum(dim=(1, 2))
            by_tile(block.scores, call).masked_fill_(per_row(skip, block, call), -torch.inf)
        out[:, block.rows] = softmax_times_v(block, v, call)[0].to(out.dtype)
    return out, visited, skipped


@as_documented
def gaps(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """Tile gaps of one call, [vote_heads, votes, KV tiles] nats (see `Block.gaps`)."""
    tile_q = call.tile_q or 1
    shape = (call.vote_heads, call.query_tiles, -(-call.kv_len // call.tile_kv))
    result = torch.full(shape, -torch.inf, dtype=_compute_dtype(q), device=q.device)
    for block in blocks(q, k, call):
        first = (block.rows.start + call.lead) // tile_q
        votes, tiles = block.visited.shape
        result[:, first : first + votes, block.first_tile : block.first_tile + tiles] = block.gaps
    return result


@as_documented
def statistics(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense attention of one call, and its tiles by critical scale factor.

    Returns:
        Dense output [q_heads, q_len, head_dim_v] and the histogram over [vote_heads, BINS].
    """
    heads = call.vote_heads
    rows = call.q_len * call.heads_per_vote
    counts = torch.zeros(heads * histogram.BINS, dtype=torch.int64, device=q.device)
    mass = torch.zeros(heads * histogram.BINS, dtype=torch.float64, device=q.device)
    out = q.new_zeros(q.shape[0], call.q_len, v.shape[-1])
    for block in blocks(q, k, call):
        output, tile_mass = softmax_times_v(block, v, call)
        out[:, block.rows] = output.to(out.dtype)
        critical = critical_log2(block.gaps, vote_kv_lens(block, call)[None, :, None])
        bins = histogram.bin_index(critical)
        bins += histogram.BINS * torch.arange(heads, device=q.device)[:, None, None]
        visited = block.visited.expand_as(bins)
        counts += torch.bincount(bins[visited], minlength=counts.numel())
        votes = _vote_sum(tile_mass, block, call)[visited].double()
        mass += torch.bincount(bins[visited], weights=votes, minlength=mass.numel())
    return out, TileHistogram(counts.view(heads, -1), mass.view(heads, -1), rows)


def batch_statistics(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense output [B, Hq, Sq, Dv] of a batch and the histogram, summed over it."""
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    counts = torch.zeros(call.vote_heads, histogram.BINS, dtype=torch.int64, device=q.device)
    mass, rows = counts.double(), 0
    for b, (queries, keys, values) in enumerate(zip(q, k, v, strict=True)):
        keys = dequantised(keys, scales.k, scales.k_each, q)
        values = dequantised(values, scales.v, scales.v_each, q)
        out[b], one = statistics(queries, keys, values, call)
        counts, mass, rows = counts + one.counts, mass + one.mass, rows + one.rows
    return out, TileHistogram(counts, mass, rows)


def blocks(q: torch.Tensor, k: torch.Tensor, call: Call) -> Iterator[Block]:
    """Walks the query rows of one request in blocks of bounded memory."""
    q = q[:, : call.q_len].to(_compute_dtype(q)) * call.scale
    k = k.to(q.dtype)
    for rows in _row_slices(q.shape[0], call):
        tiles = _tile_range(rows, call)
        keys = _padded_keys(k, tiles, call)
        scores = _grouped_product(q[:, rows], keys.transpose(1, 2))
        visible = _visible(rows, tiles, call, q.device)
        scores.masked_fill_(~visible, -torch.inf)
        seen = visible.view(len(visible), -1, call.tile_kv).any(-1)
        visited = _row_to_vote(seen, rows, call).any(1)
        votes = _vote_gaps(scores, visited, rows, call)
        yield Block(rows, tiles.start, scores, visited, votes, not bool(visible.any(1).all()))


def _vote_gaps(
    scores: torch.Tensor, visited: torch.Tensor, rows: slice, call: Call
) -> torch.Tensor:
    """The gap of each tile: its largest valid row's."""
    tile_max = by_tile(scores, call).amax(-1)  # [q_heads, rows, tiles]
    first = visited & (visited.cumsum(1) == 1)
    if call.seeded:
        last = visited & (visited.flip(1).cumsum(1).flip(1) == 1)
        first = first | last
        before = tile_max.masked_fill(~first, -torch.inf).amax(-1, keepdim=True)
    else:
        running = tile_max.cummax(-1).values
        before = torch.cat(
            [torch.full_like(running[..., :1], -torch.inf), running[..., :-1]], dim=-1
        )
    never = first | _kept_whole(rows, call, scores.device)
    votes = largest_gap(tile_max, before, rows, call).masked_fill(never, torch.inf)
    return votes.masked_fill(~visited, -torch.inf)


def _kept_whole(rows: slice, call: Call, device: torch.device) -> torch.Tensor:
    """Which votes of `rows` hold one of the call's last `dense_last` rows, bool [votes, 1]."""
    row = torch.arange(rows.start, rows.stop, device=device)
    last = (row >= call.q_len - call.dense_last)[:, None]
    return last if call.decode else _row_to_vote(last, rows, call).any(1)


def largest_gap(
    tile_max: torch.Tensor, before: torch.Tensor, rows: slice, call: Call
) -> torch.Tensor:
    """The gap of each vote, from tiles' row maxima and what they are compared with [q_heads, rows, tiles]."""
    # A row that sees no key of the tile votes skip, even if it has seen none before (-inf minus -inf).
    gap = torch.where(torch.isneginf(tile_max), -torch.inf, tile_max - before)
    if call.decode:
        return gap.view(call.vote_heads, -1, *gap.shape[1:]).amax(1)
    return _row_to_vote(gap.transpose(0, 1), rows, call, fill=-torch.inf).amax(1).transpose(0, 1)


def _skips(block: Block, call: Call, scale_factor: torch.Tensor) -> torch.Tensor | None:
    """Which tiles are skipped, bool [vote_heads, votes, tiles]; None when the whole call is dense."""
    lengths = vote_kv_lens(block, call)
    if not bool(has_threshold(scale_factor[:, None], lengths, call.min_kv_len).any()):
        return None
    skip = skips(block.gaps, scale_factor[:, None, None], lengths[None, :, None], call.min_kv_len)
    return skip & block.visited


def softmax_times_v(block: Block, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Output rows, and the probabilities as [q_heads, rows, tiles, tile_kv]; overwrites the scores."""
    weights = torch.softmax(block.scores, dim=-1, out=block.scores)
    if block.blind:
        weights.nan_to_num_(nan=0.0)  # a row that sees no key at all gives zeros
    tiles = range(block.first_tile, block.first_tile + block.visited.shape[1])
    values = _padded_keys(v.to(weights.dtype), tiles, call)
    return _grouped_product(weights, values), by_tile(weights, call)


def per_row(skip: torch.Tensor, block: Block, call: Call) -> torch.Tensor:
    """Spreads votes over the rows that cast them, bool [q_heads, rows, tiles, 1]."""
    rows = block.scores.shape[1]
    if call.decode:
        group = block.scores.shape[0] // skip.shape[0]
        return skip.repeat_interleave(group, dim=0)[..., None]
    front = _front(block.rows, call)
    return skip.repeat_interleave(call.tile_q or 1, dim=1)[:, front : front + rows, :, None]


def _vote_sum(weights: torch.Tensor, block: Block, call: Call) -> torch.Tensor:
    """Probability inside each tile summed over the rows that vote, [vote_heads, votes, tiles]."""
    mass = weights.sum(-1)
    if call.decode:
        return mass.view(block.gaps.shape[0], -1, *mass.shape[1:]).sum(1)
    return _row_to_vote(mass.transpose(0, 1), block.rows, call, fill=0.0).sum(1).transpose(0, 1)


def _front(rows: slice, call: Call) -> int:
    """Rows of the first of these query tiles that are not there."""
    return 0 if rows.start else call.lead


def _row_to_vote(x: torch.Tensor, rows: slice, call: Call, fill: float = 0.0) -> torch.Tensor:
    """[rows, ...] -> [votes, rows per vote, ...]; rows that are not there are `fill`, so they never vote."""
    tile_q, front = call.tile_q or 1, _front(rows, call)
    back = -(front + x.shape[0]) % tile_q
    if front or back:
        before, after = (x.new_full((n, *x.shape[1:]), fill) for n in (front, back))
        x = torch.cat([before, x, after])
    return x.view(-1, tile_q, *x.shape[1:])


def by_tile(scores: torch.Tensor, call: Call) -> torch.Tensor:
    """[q_heads, rows, tiles * tile_kv] -> [q_heads, rows, tiles, tile_kv]."""
    return scores.view(*scores.shape[:2], -1, call.tile_kv)


def vote_kv_lens(block: Block, call: Call) -> torch.Tensor:
    """KV length in each vote's threshold [tokens], float64 [votes]."""
    votes = block.visited.shape[0]
    if not call.decode:
        return torch.full((votes,), call.kv_len, dtype=torch.float64, device=block.gaps.device)
    first = call.kv_len - call.q_len + block.rows.start + 1
    return torch.arange(first, first + votes, dtype=torch.float64, device=block.gaps.device)


def _row_slices(q_heads: int, call: Call) -> Iterator[slice]:
    tile_q = call.tile_q or 1
    tiles_at_once = max(1, _BLOCK_ELEMENTS // (q_heads * tile_q * max(call.kv_len, 1)))
    step = tiles_at_once * tile_q
    for start in range(-call.lead, call.q_len, step):
        yield slice(max(start, 0), min(start + step, call.q_len))


def _tile_range(rows: slice, call: Call) -> range:
    """KV tiles that some row of `rows` may see."""
    offset = call.kv_len - call.q_len
    last = offset + rows.stop if call.causal else call.kv_len
    first = call.kv_start
    if call.window is not None:
        first = max(first, offset + rows.start - call.window + 1)
    first = min(max(first, 0), max(last - 1, 0))
    return range(first // call.tile_kv, max(-(-last // call.tile_kv), first // call.tile_kv + 1))


def _visible(rows: slice, tiles: range, call: Call, device: torch.device) -> torch.Tensor:
    """Which keys each row sees, bool [rows, tiles * tile_kv]."""
    offset = call.kv_len - call.q_len
    row = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
    key = torch.arange(tiles.start * call.tile_kv, tiles.stop * call.tile_kv, device=device)
    visible = ((key >= call.kv_start) & (key < call.kv_len)).expand(len(row), -1)
    if call.causal:
        visible = visible & (key <= row)
    if call.window is not None:
        visible = visible & (key > row - call.window)
    return visible


def _padded_keys(k: torch.Tensor, tiles: range, call: Call) -> torch.Tensor:
    """Keys (or values) of whole tiles; positions outside the tensor are zero, and `_visible` masks them."""
    start, stop = tiles.start * call.tile_kv, tiles.stop * call.tile_kv
    held = k[:, max(start - call.kv_start, 0) : max(min(stop, call.kv_len) - call.kv_start, 0)]
    front = max(call.kv_start - start, 0)
    back = stop - start - front - held.shape[1]
    return torch.nn.functional.pad(held, (0, 0, front, back))


def _grouped_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[q_heads, rows, x] times [kv_heads, x, y], each KV head serving its group of query heads."""
    heads, rows, inner = a.shape
    return (a.reshape(b.shape[0], -1, inner) @ b).view(heads, rows, -1)


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
