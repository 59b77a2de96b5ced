"""Algorithm 1 of arXiv 2512.12087 to the letter, also for thresholds of 1 or more, where kernels run dense.

Engines without that guard still compare a tile with the rows' maxima over the tiles kept so far, so they skip
even dominant tiles: they keep the first tile, and tiles that exceed all those kept before by ln(threshold).
For measurement only; below a threshold of 1 it equals `reference.attend`. Such engines have no rows that must
stay dense, so a call with `dense_last` is refused.
"""

from __future__ import annotations

import torch

from skip_softmax.meaning import reference
from skip_softmax.meaning.call import Call


@reference.as_documented
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale_factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.attend`, but the running maximum ignores skipped tiles, and any threshold applies.

    Raises:
        ValueError: the call has `dense_last`.
    """
    if call.dense_last:
        raise ValueError(
            "`dense_last` must be 0 in the published algorithm, which knows no dense rows, but got "
            f"{call.dense_last}; pass 0"
        )
    visited = torch.zeros(call.vote_heads, dtype=torch.int64, device=q.device)
    skipped = torch.zeros_like(visited)
    out = q.new_zeros(q.shape[0], call.q_len, v.shape[-1])
    for block in reference.blocks(q, k, call):
        # [vote_heads, votes, 1]; -inf is dense.
        lengths = reference.vote_kv_lens(block, call)
        log_threshold = (scale_factor[:, None] / lengths).log()
        log_threshold = log_threshold.masked_fill(lengths < call.min_kv_len, -torch.inf)[..., None]
        tiles = reference.by_tile(block.scores, call)
        running = tiles.new_full((*tiles.shape[:2], 1), -torch.inf)
        started = torch.zeros_like(block.visited[:, :1])
        for j in range(tiles.shape[2]):
            top = tiles[:, :, j].amax(-1, keepdim=True)  # [q_heads, rows, 1]
            seen = block.visited[:, j : j + 1]
            skip = (
                (reference.largest_gap(top, running, block.rows, call) < log_threshold)
                & seen
                & started
            )
            started = started | seen
            skipped += skip.sum(dim=(1, 2))
            hidden = reference.per_row(skip, block, call)[..., 0]
            tiles[:, :, j].masked_fill_(hidden, -torch.inf)
            running = torch.where(hidden, running, torch.maximum(running, top))
        visited += block.visited.sum()
        out[:, block.rows] = reference.softmax_times_v(block, v, call)[0].to(out.dtype)
    return out, visited, skipped
