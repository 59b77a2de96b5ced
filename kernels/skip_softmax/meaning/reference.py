"""What skip-softmax attention means, in plain PyTorch (BLASST, arXiv 2512.12087, Algorithm 1).

For one query head, a tile of query rows, and KV tiles in ascending absolute position:

    M[r] = -inf
    for each visited tile j:                         # a tile that at least one row may see
        s[r, c] = scale * q[r] . k[c]                # masked scores are -inf
        m[r]    = max over c in tile j of s[r, c]
        skip    = j is not the first visited tile
                  and every valid row r has exp(m[r] - M[r]) < scale_factor / kv_len
        if not skip:
            keep tile j; M[r] = max(M[r], m[r])
    out[r] = softmax over the kept scores of row r, times v

Prefill: the rows of `tile_q` consecutive queries of one head vote. Decode: the heads of one GQA
    group vote
for each query token alone, and kv_len is what that token sees. Below a threshold of 1 a skipped
tile cannot raise M, so M is the plain running max and a dense pass knows every decision. A
threshold of 1 or more is dense.

Scores, softmax and both products are computed in float32 for lower precisions, in float64 for
float64; only the output is rounded to the input's dtype. Memory grows with kv_len, never with its
square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch

from skip_softmax.meaning import histogram
from skip_softmax.meaning.histogram import TileHistogram

# Scores held at once [elements]; bounds memory, large enough to keep the matrix products busy.
_BLOCK_ELEMENTS = 1 << 21

RunningMax = Literal["ascending", "seeded"]


@dataclass(frozen=True)
class Request:
    """Where one request's rows and keys stand, and who votes.

    Attributes:
        q_len: valid query rows.
        kv_len: KV length of the call [tokens]; the last query row is position kv_len - 1.
        kv_start: absolute position of the first key that the key tensor holds (a sliding cache
            drops keys).
        causal: a row sees no key after its own position.
        window: a row sees only its own position and the `window - 1` before it; None: no window.
        tile_q: query rows per vote; None: decode, where the heads of a KV head vote for each row
            alone.
        tile_kv: keys per tile.
        running_max: decode only, what a tile is compared with (`DecodeGeometry`).
    """

    q_len: int
    kv_len: int
    kv_start: int
    causal: bool
    window: int | None
    tile_q: int | None
    tile_kv: int
    running_max: RunningMax = "ascending"

    @property
    def decode(self) -> bool:
        """Whether this is a decode call."""
        return self.tile_q is None


@dataclass(frozen=True)
class Block:
    """Some query rows of one request against every KV tile they visit.

    Attributes:
        rows: which query rows.
        first_tile: index of the first KV tile of this block.
        scores: masked scores [q_heads, rows, tiles * tile_kv].
        visited: bool [votes, tiles]; a vote is a query tile (prefill) or a query token (decode).
        gaps: [vote_heads, votes, tiles] nats; +inf first visited tile, -inf not visited.
        blind: some row sees no key at all.
    """

    rows: slice
    first_tile: int
    scores: torch.Tensor
    visited: torch.Tensor
    gaps: torch.Tensor
    blind: bool


F = TypeVar("F", bound=Callable[..., Any])


def _as_documented(function: F) -> F:
    """Without gradients, and in the precision that is promised also where autocast would lower it."""

    @wraps(function)
    def run(q: torch.Tensor, *others: Any) -> Any:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return function(q, *others)

    return cast(F, run)


@_as_documented
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    request: Request,
    scale: float,
    scale_factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Skip-softmax attention of one request.

    Args:
        q: [q_heads, q_len, head_dim].
        k: [kv_heads, keys, head_dim], the keys from `request.kv_start` on.
        v: [kv_heads, keys, head_dim_v].
        request: geometry and lengths.
        scale: factor of the scores.
        scale_factor: float64 [vote_heads], query heads in prefill, KV heads in decode [tokens].

    Returns:
        Output [q_heads, q_len, head_dim_v], visited tiles and skipped tiles, int64 [vote_heads].
    """
    votes = q.shape[0] if not request.decode else k.shape[0]
    visited = torch.zeros(votes, dtype=torch.int64, device=q.device)
    skipped = torch.zeros_like(visited)
    out = q.new_zeros(q.shape[0], request.q_len, v.shape[-1])
    for block in blocks(q, k, request, scale):
        skip = _skips(block, request, scale_factor)
        visited += block.visited.sum()
        if skip is not None:
            skipped += skip.sum(dim=(1, 2))
            _tiles(block.scores, request).masked_fill_(_per_row(skip, block, request), -torch.inf)
        out[:, block.rows] = _softmax_times_v(block, v, request)[0].to(out.dtype)
    return out, visited, skipped


@_as_documented
def gaps(q: torch.Tensor, k: torch.Tensor, request: Request, scale: float) -> torch.Tensor:
    """Tile gaps of one request, [vote_heads, votes, KV tiles] nats (see `Block.gaps`)."""
    tile_q = request.tile_q or 1
    shape = (
        k.shape[0] if request.decode else q.shape[0],
        -(-request.q_len // tile_q),
        -(-request.kv_len // request.tile_kv),
    )
    result = torch.full(shape, -torch.inf, dtype=_compute_dtype(q), device=q.device)
    for block in blocks(q, k, request, scale):
        first = block.rows.start // tile_q
        votes, tiles = block.visited.shape
        result[:, first : first + votes, block.first_tile : block.first_tile + tiles] = block.gaps
    return result


@_as_documented
def statistics(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: Request, scale: float
) -> tuple[torch.Tensor, TileHistogram]:
    """Dense attention of one request, and its tiles by critical scale factor.

    Returns:
        Dense output [q_heads, q_len, head_dim_v] and the histogram over [vote_heads, BINS].
    """
    heads = k.shape[0] if request.decode else q.shape[0]
    rows = request.q_len * (q.shape[0] // k.shape[0] if request.decode else 1)
    counts = torch.zeros(heads * histogram.BINS, dtype=torch.int64, device=q.device)
    mass = torch.zeros(heads * histogram.BINS, dtype=torch.float64, device=q.device)
    out = q.new_zeros(q.shape[0], request.q_len, v.shape[-1])
    for block in blocks(q, k, request, scale):
        output, tile_mass = _softmax_times_v(block, v, request)
        out[:, block.rows] = output.to(out.dtype)
        critical = histogram.critical_log2(block.gaps, _kv_lens(block, request)[None, :, None])
        bins = histogram.bin_index(critical)
        bins += histogram.BINS * torch.arange(heads, device=q.device)[:, None, None]
        visited = block.visited.expand_as(bins)
        counts += torch.bincount(bins[visited], minlength=counts.numel())
        votes = _vote_sum(tile_mass, block, request)[visited].double()
        mass += torch.bincount(bins[visited], weights=votes, minlength=mass.numel())
    return out, TileHistogram(counts.view(heads, -1), mass.view(heads, -1), rows)


def blocks(q: torch.Tensor, k: torch.Tensor, request: Request, scale: float) -> Iterator[Block]:
    """Walks the query rows of one request in blocks of bounded memory."""
    q = q[:, : request.q_len].to(_compute_dtype(q)) * scale
    k = k.to(q.dtype)
    for rows in _row_slices(q.shape[0], request):
        tiles = _tile_range(rows, request)
        keys = _padded_keys(k, tiles, request)
        scores = _grouped_product(q[:, rows], keys.transpose(1, 2))
        visible = _visible(rows, tiles, request, q.device)
        scores.masked_fill_(~visible, -torch.inf)
        visited = _row_to_vote(
            visible.view(len(visible), -1, request.tile_kv).any(-1), request
        ).any(1)
        votes = _vote_gaps(scores, visited, k.shape[0], request)
        yield Block(rows, tiles.start, scores, visited, votes, not bool(visible.any(1).all()))


def _vote_gaps(
    scores: torch.Tensor, visited: torch.Tensor, kv_heads: int, request: Request
) -> torch.Tensor:
    """The gap of each tile: its largest valid row's."""
    tile_max = _tiles(scores, request).amax(-1)  # [q_heads, rows, tiles]
    first = visited & (visited.cumsum(1) == 1)
    if request.decode and request.running_max == "seeded":
        last = visited & (visited.flip(1).cumsum(1).flip(1) == 1)
        first = first | last
        before = tile_max.masked_fill(~first, -torch.inf).amax(-1, keepdim=True)
    else:
        running = tile_max.cummax(-1).values
        before = torch.cat(
            [torch.full_like(running[..., :1], -torch.inf), running[..., :-1]], dim=-1
        )
    # A row that sees no key of the tile votes skip, also where it has seen none before (-inf minus
    # -inf).
    gap = torch.where(torch.isneginf(tile_max), -torch.inf, tile_max - before)
    if request.decode:
        votes = gap.view(kv_heads, -1, *gap.shape[1:]).amax(1)
    else:
        votes = _row_to_vote(gap.transpose(0, 1), request, fill=-torch.inf).amax(1).transpose(0, 1)
    votes = votes.masked_fill(first, torch.inf)
    return votes.masked_fill(~visited, -torch.inf)


def _skips(block: Block, request: Request, scale_factor: torch.Tensor) -> torch.Tensor | None:
    """Which tiles are skipped, bool [vote_heads, votes, tiles]; None when the whole call is dense."""
    lengths = _kv_lens(block, request)
    # A threshold of 1 or more has no meaning: such a vote runs dense.
    active = (scale_factor[:, None] > 0) & (scale_factor[:, None] < lengths)
    if not bool(active.any()):
        return None
    critical = histogram.critical_log2(block.gaps, lengths[None, :, None])
    below = critical < torch.log2(scale_factor)[:, None, None]
    return below & active[..., None] & block.visited


def _softmax_times_v(
    block: Block, v: torch.Tensor, request: Request
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output rows, and the probabilities as [q_heads, rows, tiles, tile_kv]; overwrites the scores."""
    weights = torch.softmax(block.scores, dim=-1, out=block.scores)
    if block.blind:
        weights.nan_to_num_(nan=0.0)  # a row that sees no key at all gives zeros
    tiles = range(block.first_tile, block.first_tile + block.visited.shape[1])
    values = _padded_keys(v.to(weights.dtype), tiles, request)
    return _grouped_product(weights, values), _tiles(weights, request)


def _per_row(skip: torch.Tensor, block: Block, request: Request) -> torch.Tensor:
    """Spreads votes over the rows that cast them, bool [q_heads, rows, tiles, 1]."""
    rows = block.scores.shape[1]
    if request.decode:
        group = block.scores.shape[0] // skip.shape[0]
        return skip.repeat_interleave(group, dim=0)[..., None]
    return skip.repeat_interleave(request.tile_q or 1, dim=1)[:, :rows, :, None]


def _vote_sum(weights: torch.Tensor, block: Block, request: Request) -> torch.Tensor:
    """Probability inside each tile summed over the rows that vote, [vote_heads, votes, tiles]."""
    mass = weights.sum(-1)
    if request.decode:
        return mass.view(block.gaps.shape[0], -1, *mass.shape[1:]).sum(1)
    return _row_to_vote(mass.transpose(0, 1), request, fill=0.0).sum(1).transpose(0, 1)


def _row_to_vote(rows: torch.Tensor, request: Request, fill: float = 0.0) -> torch.Tensor:
    """[rows, ...] -> [votes, rows per vote, ...]; padding rows hold `fill` and so never vote."""
    tile_q = request.tile_q or 1
    padding = -rows.shape[0] % tile_q
    if padding:
        rows = torch.cat([rows, rows.new_full((padding, *rows.shape[1:]), fill)])
    return rows.view(-1, tile_q, *rows.shape[1:])


def _tiles(scores: torch.Tensor, request: Request) -> torch.Tensor:
    return scores.view(*scores.shape[:2], -1, request.tile_kv)


def _kv_lens(block: Block, request: Request) -> torch.Tensor:
    """KV length behind each vote's threshold [tokens], float64 [votes]."""
    votes = block.visited.shape[0]
    if not request.decode:
        return torch.full((votes,), request.kv_len, dtype=torch.float64, device=block.gaps.device)
    first = request.kv_len - request.q_len + block.rows.start + 1
    return torch.arange(first, first + votes, dtype=torch.float64, device=block.gaps.device)


def _row_slices(q_heads: int, request: Request) -> Iterator[slice]:
    tile_q = request.tile_q or 1
    tiles_at_once = max(1, _BLOCK_ELEMENTS // (q_heads * tile_q * max(request.kv_len, 1)))
    step = tiles_at_once * tile_q
    for start in range(0, request.q_len, step):
        yield slice(start, min(start + step, request.q_len))


def _tile_range(rows: slice, request: Request) -> range:
    """KV tiles that some row of `rows` may see."""
    offset = request.kv_len - request.q_len
    last = offset + rows.stop if request.causal else request.kv_len
    first = request.kv_start
    if request.window is not None:
        first = max(first, offset + rows.start - request.window + 1)
    first = min(max(first, 0), max(last - 1, 0))
    return range(
        first // request.tile_kv, max(-(-last // request.tile_kv), first // request.tile_kv + 1)
    )


def _visible(rows: slice, tiles: range, request: Request, device: torch.device) -> torch.Tensor:
    """Which keys each row sees, bool [rows, tiles * tile_kv]."""
    offset = request.kv_len - request.q_len
    row = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
    key = torch.arange(tiles.start * request.tile_kv, tiles.stop * request.tile_kv, device=device)
    visible = ((key >= request.kv_start) & (key < request.kv_len)).expand(len(row), -1)
    if request.causal:
        visible = visible & (key <= row)
    if request.window is not None:
        visible = visible & (key > row - request.window)
    return visible


def _padded_keys(k: torch.Tensor, tiles: range, request: Request) -> torch.Tensor:
    """Keys (or values) of whole tiles; positions that are not held are zero, and masked by `_visible`."""
    start, stop = tiles.start * request.tile_kv, tiles.stop * request.tile_kv
    held = k[
        :, max(start - request.kv_start, 0) : max(min(stop, request.kv_len) - request.kv_start, 0)
    ]
    front = max(request.kv_start - start, 0)
    back = stop - start - front - held.shape[1]
    return torch.nn.functional.pad(held, (0, 0, front, back))


def _grouped_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[q_heads, rows, x] times [kv_heads, x, y], each KV head serving its group of query heads."""
    heads, rows, inner = a.shape
    return (a.reshape(b.shape[0], -1, inner) @ b).view(heads, rows, -1)


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
