"""Skip-softmax inside a Hugging Face model, for the duration of a `with` block.

Attention is replaced through transformers' own attention interface, so the model's code is not
touched (`intercept.py`). Masks are not built: each call learns from the mask's recipe which keys a
row may see (`masks.py`). Anything but plain causal, windowed or full attention is left to the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from skip_softmax.api import attention, decode_attention
from skip_softmax.choose import Backend
from skip_softmax.huggingface.intercept import LayerCall, intercepted, joined
from skip_softmax.huggingface.shape import shape_of_config
from skip_softmax.meaning.counts import TileCounts
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

_RUN = 16  # decode tokens per call, the most that the Triton kernel takes


class PhaseCounts(dict[Phase, TileCounts]):
    """Tiles that a model visited and skipped inside `applied`: `TileCounts` [layers, heads] per phase."""

    def sparsity(self, phase: Phase) -> float:
        """Skipped / visited tiles of a phase over all layers, in [0, 1]; 0 when none was visited."""
        return self[phase].sparsity


@contextmanager
def applied(
    model: PreTrainedModel,
    thresholds: Thresholds | str | os.PathLike[str],
    *,
    decode_from: int | None = None,
    backend: Backend = "auto",
    count: bool = True,
) -> Iterator[PhaseCounts]:
    """Runs a model with a thresholds file; undone on exit, also after an exception.

    Args:
        model: a decoder-only transformers model.
        thresholds: what to apply per layer and phase, or the path of its file.
        decode_from: absolute position from which tokens count as decode steps, however many arrive in
            one call (teacher forcing). None: a call with one query token and a non-empty cache is
            decode, every other call is prefill; a last prefill chunk of one token then counts as
            decode.
        backend: attention backend, see `attention`.
        count: whether to count tiles, which costs a little time in every call.

    Yields:
        Tile counts per phase, growing as the model runs.

    Raises:
        FileError: the path does not lead to a valid thresholds file.
        ValueError: the thresholds are for a model of another shape, the model has an encoder, or it (or
            one that shares its config) already runs inside such a block.
    """
    if not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.load(thresholds)
    _check_same_shape(model, thresholds)
    shape, device = thresholds.model, model.device
    # A phase without tiles is dense, and dense attention is the same for any tiles.
    geometry = {phase: getattr(thresholds.geometry, phase) for phase in PHASES}
    tiles = {phase: given.model_dump() if given else {} for phase, given in geometry.items()}
    tiles["decode"]["criterion"] = thresholds.criterion.decode
    # The block may be entered in inference mode and the model run outside of it.
    with torch.inference_mode(False):
        # Counts stay on the model's device: reading them back after every call would make the GPU wait.
        counts = PhaseCounts(
            {
                phase: TileCounts(
                    *torch.zeros(2, shape.layers, heads, dtype=torch.int64, device=device)
                )
                for phase, heads in (("prefill", shape.q_heads), ("decode", shape.kv_heads))
            }
        )
        factors = {
            (layer, phase): _on_device(thresholds.per_head(layer, phase), device)
            for layer in range(shape.layers)
            for phase in PHASES
        }

    def attend(call: LayerCall) -> torch.Tensor:
        operation: Any = decode_attention if call.phase == "decode" else attention
        outputs = []
        for part, dense in _split_at_floor(call, getattr(thresholds.min_kv_len, call.phase)):
            factor = 0.0 if dense else factors[call.layer, call.phase]
            out = operation(
                part.q, part.k, part.v, scale_factor=factor, backend=backend, return_stats=count,
                **part.keywords, **tiles[call.phase],
            )  # fmt: skip
            if count:
                out, stats = out
                total = counts[call.phase]
                total.visited[call.layer] += stats.visited.sum(0).to(device)
                total.skipped[call.layer] += stats.skipped.sum(0).to(device)
            outputs.append(out)
        return joined(outputs)

    left_alone = {entry.layer: entry.reason for entry in thresholds.uncalibrated}
    with intercepted(model, attend, decode_from=decode_from, left_alone=left_alone):
        yield counts


def _on_device(factors: tuple[float, ...], device: torch.device) -> float | torch.Tensor:
    """One number where all heads share it, so that the host knows a dense layer to be dense."""
    if len(set(factors)) == 1:
        return factors[0]
    return torch.tensor(factors, dtype=torch.float64, device=device)


def _split_at_floor(call: LayerCall, floor: int | None) -> Iterator[tuple[LayerCall, bool]]:
    """Parts of a call, and whether each runs dense because its KV length is below `min_kv_len`."""
    if call.phase == "prefill":
        yield call, floor is not None and call.kv_len < floor
        return
    floor = floor or 0
    tokens = call.q.shape[2]
    first = call.position + 1  # KV length of the first token
    short = min(max(floor - first, 0), tokens)
    for start, stop, dense in ((0, short, True), (short, tokens, False)):
        # Each token votes alone, so the kernel may take a long teacher-forced run in short pieces.
        for begin in range(start, stop, _RUN):
            yield call.rows(begin, min(begin + _RUN, stop)), dense


def _check_same_shape(model: PreTrainedModel, thresholds: Thresholds) -> None:
    config = model.config.get_text_config()
    found = shape_of_config(lambda key: getattr(config, key, None))
    wanted = thresholds.model
    made_for = (wanted.layers, wanted.q_heads, wanted.kv_heads, wanted.head_dim)
    if found != made_for:
        raise ValueError(
            "(layers, q_heads, kv_heads, head_dim) of the file and of the model must agree, but the file "
            f"is for {wanted.name} with {made_for} and the model has {found}; calibrate this model"
        )
