"""What engines do at a threshold of 1 or more, where our own kernel runs dense.

They go on comparing a tile with the rows' maxima before it, so they skip tiles that dominate: what is
left is the first tile, and tiles that exceed all before them by ln(threshold). For measuring only.
"""

from __future__ import annotations

import torch

from calibrate.loss.measure import Outcome, outcome
from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from skip_softmax.huggingface.intercept import LayerCall, intercepted
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

_ROWS = 512  # query rows computed at a time; a multiple of every tile_q


def compare_unguarded(
    loaded: LoadedModel, thresholds: Thresholds, prompt: Prompt, dense: torch.Tensor
) -> Outcome:
    """Like `measure.compare`, as an engine that knows neither `min_kv_len` nor a largest threshold.

    Args:
        loaded: the model.
        thresholds: what to apply.
        prompt: the prompt with its continuation.
        dense: logits of the dense model.

    Returns:
        Loss and tile counts.
    """
    layers = len(loaded.layers)
    visited: dict[Phase, list[int]] = {phase: [0] * layers for phase in PHASES}
    skipped: dict[Phase, list[int]] = {phase: [0] * layers for phase in PHASES}

    def handler(call: LayerCall) -> torch.Tensor:
        outputs = []
        for start in range(0, call.q.shape[2], _ROWS):
            out, seen, left_out = _attend(call, slice(start, start + _ROWS), thresholds)
            visited[call.phase][call.layer] += seen
            skipped[call.phase][call.layer] += left_out
            outputs.append(out)
        return torch.cat(outputs, dim=2)

    left_alone = {entry.layer: entry.reason for entry in thresholds.uncalibrated}
    with intercepted(loaded.model, handler, decode_from=len(prompt.ids), left_alone=left_alone):
        sparse = forward(loaded, prompt).float().cpu()
    return outcome(prompt, dense, sparse, visited, skipped)


def _attend(call: LayerCall, rows: slice, thresholds: Thresholds) -> tuple[torch.Tensor, int, int]:
    """Output of some query rows, visited tiles, skipped tiles."""
    q = call.q[:, :, rows].float()
    group = q.shape[1] // call.k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (call.k, call.v))
    device = q.device
    row = torch.arange(call.q.shape[2], device=device)[rows] + call.kv_len - call.q.shape[2]
    key = torch.arange(call.kv_start, call.kv_len, device=device)
    seen = key <= row[:, None] if call.causal else torch.ones(len(row), len(key), dtype=torch.bool)
    if call.window is not None:
        seen = seen & (key > row[:, None] - call.window)
    scores = (q @ k.transpose(-1, -2) * call.scale).masked_fill(~seen, -torch.inf)

    tiles = getattr(thresholds.geometry, call.phase)
    factors = torch.tensor(
        thresholds.per_head(call.layer, call.phase), device=device, dtype=torch.float64
    )
    factors = factors.repeat_interleave(q.shape[1] // len(factors))[:, None]
    kv_len = row + 1 if call.phase == "decode" else torch.full_like(row, call.kv_len)
    log_threshold = (factors / kv_len).log()  # [Hq, rows]; -inf is dense

    running = torch.full(scores.shape[:3], -torch.inf, device=device)
    visited = skipped = 0
    started = None
    for first in range(call.kv_start // tiles.tile_kv * tiles.tile_kv, call.kv_len, tiles.tile_kv):
        keys = slice(max(first - call.kv_start, 0), first + tiles.tile_kv - call.kv_start)
        top = scores[..., keys].amax(-1)
        in_sight = _votes(top > -torch.inf, call.phase, tiles, group).any(-1)
        low = (top - running < log_threshold) | (top == -torch.inf)
        skip = _votes(low, call.phase, tiles, group).all(-1) & in_sight
        skip = skip & started if started is not None else torch.zeros_like(skip)
        started = in_sight if started is None else started | in_sight
        visited, skipped = visited + int(in_sight.sum()), skipped + int(skip.sum())
        hidden = _spread(skip, call.phase, tiles, group)[:, :, : len(row)]
        scores[..., keys] = scores[..., keys].masked_fill(hidden[..., None], -torch.inf)
        running = torch.where(hidden, running, torch.maximum(running, top))
    return (scores.softmax(-1) @ v).to(call.q.dtype), visited, skipped


def _votes(rows: torch.Tensor, phase: Phase, tiles: object, group: int) -> torch.Tensor:
    """[B, Hq, rows] -> [B, votes, blocks, voters]: who decides together, in the last dimension."""
    batch, heads, count = rows.shape
    if phase == "decode":
        return rows.view(batch, heads // group, group, count).transpose(2, 3)
    size = int(getattr(tiles, "tile_q"))  # noqa: B009  (prefill tiles only)
    blocks = -(-count // size)
    # Rows past the end repeat the last one, so they change neither `any` nor `all`.
    index = torch.arange(blocks * size, device=rows.device).clamp_max(count - 1)
    return rows[:, :, index].view(batch, heads, blocks, size)


def _spread(votes: torch.Tensor, phase: Phase, tiles: object, group: int) -> torch.Tensor:
    """The inverse of `_votes` for a verdict per vote: [B, Hq, rows or more]."""
    if phase == "decode":
        return votes.repeat_interleave(group, dim=1)
    return votes.repeat_interleave(int(getattr(tiles, "tile_q")), dim=2)  # noqa: B009
