"""Skip-softmax inside a Hugging Face model, for the length of a `with` block.

Attention is replaced through transformers' own attention interface, so the model's code is not
touched. Masks are not built: each call learns from the mask's recipe which keys a row may see,
checks that this is plain causal (or windowed, or full) attention, and otherwise leaves the layer to
the model's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from skip_softmax.api import attention, decode_attention
from skip_softmax.choose import Backend
from skip_softmax.huggingface.intercept import Call, intercepted
from skip_softmax.huggingface.shape import shape_of_config
from skip_softmax.meaning.counts import TileCounts
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, DecodeGeometry, Phase, PrefillGeometry

_RUN = 16  # decode tokens per call; what the Triton kernel takes


class PhaseCounts(dict[Phase, TileCounts]):
    """Tiles of each phase that `applied` saw, [layers, heads]."""

    def sparsity(self, phase: Phase) -> float:
        """Skipped / visited tiles over all layers, in [0, 1]; 0 when nothing was visited."""
        return self[phase].sparsity


@contextmanager
def applied(
    model: PreTrainedModel,
    thresholds: Thresholds,
    *,
    decode_from: int | None = None,
    backend: Backend = "auto",
    count: bool = True,
) -> Iterator[PhaseCounts]:
    """Runs a model with the thresholds of a file; undone on exit, also after an exception.

    Args:
        model: a decoder-only model of transformers.
        thresholds: what to apply, per layer and phase.
        decode_from: absolute position from which tokens count as decode steps, however many come in
            one call (teacher forcing). None: a call with one query token and a non-empty cache is
            decode, every other call is prefill; a last prefill chunk of one token is then taken for
            decode.
        backend: attention backend, see `attention`.
        count: whether tiles are counted; counting costs a little time in every call.

    Yields:
        Tile counts, growing as the model runs.

    Raises:
        ValueError: the thresholds are for a model of another shape, the model has an encoder, or it (or
            one that shares its config) already runs in such a block.
    """
    _check_same_shape(model, thresholds)
    shape, device = thresholds.model, model.device
    # The block may be entered in inference mode, and the model run outside of it.
    with torch.inference_mode(False):
        # Counts stay on the model's device: reading them back in every call would make the GPU wait.
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

    def attend(call: Call) -> torch.Tensor:
        outputs = []
        for part, dense in _split_at_floor(call, getattr(thresholds.min_kv_len, call.phase)):
            factor = 0.0 if dense else factors[call.layer, call.phase]
            if not count:
                outputs.append(_attend(part, factor, thresholds, backend, count=False))
                continue
            out, stats = _attend(part, factor, thresholds, backend, count=True)
            total = counts[call.phase]
            total.visited[call.layer] += stats.visited.sum(0).to(device)
            total.skipped[call.layer] += stats.skipped.sum(0).to(device)
            outputs.append(out)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    left_alone = {entry.layer: entry.reason for entry in thresholds.uncalibrated}
    with intercepted(model, attend, decode_from=decode_from, left_alone=left_alone):
        yield counts


def _attend(
    call: Call,
    factor: float | torch.Tensor,
    thresholds: Thresholds,
    backend: Backend,
    *,
    count: bool,
) -> Any:
    # A phase without tiles is dense, and dense attention is the same for any tiles.
    if call.phase == "decode":
        tokens = thresholds.geometry.decode or DecodeGeometry(tile_kv=64)
        return decode_attention(
            call.q,
            call.k,
            call.v,
            scale_factor=factor,
            scale=call.scale,
            window=call.window,
            tile_kv=tokens.tile_kv,
            running_max=tokens.running_max,
            kv_start=call.kv_start,
            backend=backend,
            return_stats=count,  # type: ignore[call-overload]
        )
    tiles = thresholds.geometry.prefill or PrefillGeometry(tile_q=64, tile_kv=128)
    return attention(
        call.q,
        call.k,
        call.v,
        scale_factor=factor,
        causal=call.causal,
        scale=call.scale,
        window=call.window,
        tile_q=tiles.tile_q,
        tile_kv=tiles.tile_kv,
        kv_start=call.kv_start,
        backend=backend,
        return_stats=count,  # type: ignore[call-overload]
    )


def _on_device(factors: tuple[float, ...], device: torch.device) -> float | torch.Tensor:
    """One number where all heads share it, so that a dense layer is known to be dense on the host."""
    if len(set(factors)) == 1:
        return factors[0]
    return torch.tensor(factors, dtype=torch.float64, device=device)


def _split_at_floor(call: Call, floor: int | None) -> Iterator[tuple[Call, bool]]:
    """Parts of a call with whether they run dense because their KV length is below `min_kv_len`."""
    if call.phase == "prefill":
        yield call, floor is not None and call.kv_len < floor
        return
    floor = floor or 0
    tokens = call.q.shape[2]
    first = call.kv_len - tokens + 1  # KV length of the first token
    short = min(max(floor - first, 0), tokens)
    for start, stop, dense in ((0, short, True), (short, tokens, False)):
        # Tokens vote alone, so a long teacher-forced run may go through the kernel in short ones.
        for begin in range(start, stop, _RUN):
            end = min(begin + _RUN, stop)
            seen = first + end - 1 - call.kv_start
            q, k, v = call.q[:, :, begin:end], call.k[:, :, :seen], call.v[:, :, :seen]
            yield (
                Call(call.layer, call.phase, q, k, v, call.scale, True, call.window, call.kv_start),
                dense,
            )


def _check_same_shape(model: PreTrainedModel, thresholds: Thresholds) -> None:
    config = model.config.get_text_config()
    found = shape_of_config(lambda key: getattr(config, key, None))
    wanted = thresholds.model
    made_for = (wanted.layers, wanted.q_heads, wanted.kv_heads, wanted.head_dim)
    if found != made_for:
        raise ValueError(
            "(layers, q_heads, kv_heads, head_dim) of file and model must agree, but the file is for "
            f"{wanted.name} with {made_for} and the model has {found}; calibrate this model"
        )
