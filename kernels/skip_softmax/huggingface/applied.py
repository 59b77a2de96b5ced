"""Skip-softmax inside a Hugging Face model, for the duration of a `with` block.

Attention is replaced where the model's code looks it up, so that code is not touched (`route.py`). Masks are
not built: each call learns from the mask's recipe which keys a row may see (`masks.py`). Layers are those
that a pass of four tokens found (`layers.py`). Anything but plain causal, windowed or full attention is left
to the model (`calls.py`). In continuous batching, the scheduler tells which rows belong to which request
(`continuous.py`, `packed.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from skip_softmax.api import attention, decode_attention
from skip_softmax.choose import Backend
from skip_softmax.huggingface.calls import DecodeCall, LayerCall, joined
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.huggingface.layers import inspected
from skip_softmax.meaning.counts import TileCounts
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase

_RUN = 16  # decode tokens per call, the most that the Triton kernel takes


class PhaseCounts(Mapping[Phase, TileCounts]):
    """Tiles that a model visited and skipped inside `applied`: `TileCounts` [layers, heads] per phase.

    They are counted on the device of each layer's tensors, and brought together when they are read.
    """

    def __init__(self, layers: int, heads: dict[Phase, int]) -> None:
        self._layers, self._heads = layers, heads
        self._counted: dict[tuple[Phase, int, torch.device], torch.Tensor] = {}

    def add(self, phase: Phase, layer: int, stats: TileCounts) -> None:
        """Adds the counts of one call [batch, heads]."""
        key = (phase, layer, stats.visited.device)
        if key not in self._counted:
            with torch.inference_mode(False):  # the next call may be made outside of it
                self._counted[key] = torch.zeros(
                    2, self._heads[phase], dtype=torch.int64, device=key[2]
                )
        visited, skipped = self._counted[key]
        visited += stats.visited.sum(0)
        skipped += stats.skipped.sum(0)

    def __getitem__(self, phase: Phase) -> TileCounts:
        """Counts up to now, on the CPU. Waits for the GPU."""
        total = torch.zeros(2, self._layers, self._heads[phase], dtype=torch.int64)
        counted = list(self._counted.items())  # another thread may be adding
        for device in {key[2] for key, _ in counted}:
            there = {key[1]: x for key, x in counted if key[::2] == (phase, device)}
            if there:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # continuous batching counts on its own stream
                total[:, list(there)] += torch.stack(list(there.values()), 1).cpu()
        return TileCounts(*total)

    def __iter__(self) -> Iterator[Phase]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

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

    Continuous batching (`model.generate_batch` and managers that are made inside the block, as transformers
    5.21 to 5.23 have them) gives each request the numbers and the counts that `generate` gives it alone.
    Where a prompt is read in chunks (longer than what is left of `max_batch_tokens`, or behind a prefix that
    is in the cache), a chunk's threshold is that of its end, as in any call with a cache. CUDA graphs and
    `torch.compile` are refused there. Managers end with the block, and finish their requests first.

    Args:
        model: a decoder-only transformers model; `architectures.md` lists those that were tried.
        thresholds: what to apply per layer and phase, or the path of its file. With
            `geometry.prefill.chunk` each layer attends to a prompt in chunks of that size, also where the
            whole prompt arrives in one call. With `model.kv_cache_dtype` each layer attends to keys and
            values as such a cache would keep them, in layers and phases that are dense too; continuous
            batching is refused then.
        decode_from: absolute position from which tokens count as decode steps, however many arrive in
            one call (teacher forcing, a verification loop of your own). None: in `model.generate`, which
            knows where the prompt ends, every token behind the prompt is a decode step: drafts that are
            verified several in one call are, while all chunks of the prompt are prefill, however short
            the last one is; continuous batching knows it for each of its requests. In any other call one
            query token behind a non-empty cache is a decode step, and everything else is prefill, because
            nothing tells a draft from a chunk there.
        backend: attention backend, see `attention`.
        count: whether to count tiles, which costs a little time in every call.

    Yields:
        Tile counts per phase, growing as the model runs.

    Raises:
        FileError: the path does not lead to a valid thresholds file.
        ValueError: the thresholds are for a model of another shape, `inspect_layers` refuses the model, or
            it (or one that shares its config) already runs inside such a block. Inside the block: continuous
            batching with settings that are refused, or with a manager that was made outside.
    """
    if not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.load(thresholds)
    _check_same_shape(model, thresholds)
    shape = thresholds.model
    tiles = {phase: thresholds.geometry.keywords(phase) for phase in PHASES}
    counts = PhaseCounts(shape.layers, {phase: thresholds.vote_heads(phase) for phase in PHASES})
    factors: dict[tuple[int, Phase, torch.device], float | torch.Tensor] = {}

    def factor_of(call: LayerCall | DecodeCall) -> float | torch.Tensor:
        key = (call.layer, call.phase, call.q.device)
        if key not in factors:
            factors[key] = _on_device(thresholds.per_head(call.layer, call.phase), key[2])
        return factors[key]

    def attend(call: LayerCall) -> torch.Tensor:
        operation: Any = decode_attention if call.phase == "decode" else attention
        outputs = []
        for part, dense in _parts(
            call, getattr(thresholds.min_kv_len, call.phase), thresholds.geometry.chunk
        ):
            factor = 0.0 if dense else factor_of(call)
            out = operation(
                part.q, part.k, part.v, scale_factor=factor, backend=backend, return_stats=count,
                **part.keywords, **tiles[call.phase],
            )  # fmt: skip
            if count:
                out, stats = out
                counts.add(call.phase, call.layer, stats)
            outputs.append(out)
        return joined(outputs)

    def attend_steps(call: DecodeCall) -> torch.Tensor:
        operation: Any = decode_attention
        out: Any = operation(
            call.q, call.k, call.v, call.kv_lens, block_table=call.table, scale=call.scale,
            scale_factor=factor_of(call), min_kv_len=thresholds.min_kv_len.decode or 0, backend=backend,
            return_stats=count, **tiles["decode"],
        )  # fmt: skip
        if count:
            out, stats = out
            counts.add("decode", call.layer, stats)
        written: torch.Tensor = out
        return written

    left_alone = {entry.layer: entry.reason for entry in thresholds.uncalibrated}
    with intercepted(
        model,
        attend,
        decode_from=decode_from,
        left_alone=left_alone,
        decode=attend_steps,
        kv_cache_dtype=shape.kv_cache_dtype,
    ):
        yield counts


def _on_device(factors: tuple[float, ...], device: torch.device) -> float | torch.Tensor:
    """One number where all heads share it, so that the host knows a dense layer to be dense."""
    if len(set(factors)) == 1:
        return factors[0]
    with torch.inference_mode(False):  # the next call may be made outside of it
        return torch.tensor(factors, dtype=torch.float64, device=device)


def _parts(
    call: LayerCall, floor: int | None, chunk: int | None
) -> Iterator[tuple[LayerCall, bool]]:
    """Parts of a call, and whether each runs dense because its KV length is below `min_kv_len`."""
    floor = floor or 0
    if call.phase == "prefill":
        yield from ((part, part.kv_len < floor) for part in call.chunks(chunk))
        return
    tokens = call.q.shape[2]
    first = call.position + 1  # KV length of the first token
    short = min(max(floor - first, 0), tokens)
    for start, stop, dense in ((0, short, True), (short, tokens, False)):
        # Each token votes alone, so the kernel may take a long teacher-forced run in short pieces.
        for begin in range(start, stop, _RUN):
            yield call.rows(begin, min(begin + _RUN, stop)), dense


def _check_same_shape(model: PreTrainedModel, thresholds: Thresholds) -> None:
    seen = inspected(model)
    found = (len(seen.layers), *seen.shape)
    wanted = thresholds.model
    made_for = (wanted.layers, wanted.q_heads, wanted.kv_heads, wanted.head_dim)
    if found != made_for:
        raise ValueError(
            "(layers, q_heads, kv_heads, head_dim) of the file and of the model must agree, but the file "
            f"is for {wanted.name} with {made_for} and the model has {found}; calibrate this model"
        )
