"""One dense pass per prompt: the tiles of every layer, by critical scale factor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch

from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt, nearest_bin
from calibrate.schema import GeometryConfig
from calibrate.statistics import nvidia
from calibrate.statistics.counts import Statistics
from skip_softmax.api import tile_statistics
from skip_softmax.huggingface.calls import LayerCall, joined
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.meaning.histogram import TileHistogram
from skip_softmax.thresholds.types import PHASES, Phase

_Tiles = tuple[int, Phase, int, TileHistogram]  # layer, phase, KV length, and what was counted


def empty_statistics(
    loaded: LoadedModel, geometry: GeometryConfig, lengths: Sequence[int], min_kv_len: int = 0
) -> Statistics:
    """Statistics for this model and geometry, with nothing counted yet.

    Args:
        loaded: the model.
        geometry: tiles of both phases.
        lengths: prompt lengths [tokens].
        min_kv_len: of prefill [tokens]: with `geometry.prefill.chunk`, chunks that end before it run dense,
            whatever the number.
    """
    layer = loaded.calibratable[0]
    identity = {
        "model": loaded.sha256,
        "geometry": geometry.model_dump(mode="json"),
        "q_heads": layer.q_heads,
        "kv_heads": layer.kv_heads,
        "layers": len(loaded.layers),
    }
    if geometry.prefill.chunk is not None:
        identity["min_kv_len"] = min_kv_len
    if loaded.kv_cache_dtype is not None:
        identity["kv_cache_dtype"] = loaded.kv_cache_dtype
    votes = geometry.decode.vote_heads(layer.q_heads, layer.kv_heads)
    return Statistics.empty(identity, len(loaded.layers), layer.q_heads, votes, lengths)


def capture(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    statistics: Statistics,
    geometry: GeometryConfig,
    samples: bool = False,
) -> Iterator[tuple[Prompt, Statistics]]:
    """Counts the tiles of the prompts that are not in the statistics yet.

    The prompt's rows are prefill tiles. The continuation is teacher-forced in the same pass, and
    each of its tokens is one decode step. An interruption leaves a prompt out as a whole.

    Args:
        loaded: the model.
        prompts: prompts to count.
        statistics: what was counted before; left as it is.
        geometry: tiles of both phases.
        samples: whether to keep what Model-Optimizer's fit needs, see `observe`.

    Yields:
        Each prompt once it is counted, with the statistics up to it.
    """
    counted = set(statistics.prompts)
    for prompt in prompts:
        if prompt.key in counted:
            continue
        one = statistics.like()
        observe(loaded, prompt, one, geometry, samples)
        statistics = statistics.merge(one)
        yield prompt, statistics


def without_unseen(loaded: LoadedModel, statistics: Statistics) -> LoadedModel:
    """The model, in which layers that counted no tile are marked as not calibratable, with the reason.

    When probed they looked calibratable: a layer that attends in chunks shows it only on prompts
    longer than a chunk.
    """
    if not statistics.prompts:
        return loaded
    tiles = statistics.visited("prefill").sum((1, 2)).tolist()
    reason = "attention other than full, causal or sliding window at these lengths"
    layers = [
        replace(layer, reason=reason) if layer.reason is None and not tiles[layer.index] else layer
        for layer in loaded.layers
    ]
    return replace(loaded, layers=layers)


def observe(
    loaded: LoadedModel,
    prompt: Prompt,
    statistics: Statistics,
    geometry: GeometryConfig,
    samples: bool = False,
) -> torch.Tensor:
    """Runs one prompt densely and adds its tiles, and its key, to the statistics.

    With `geometry.prefill.chunk`, a tile's critical scale factor is that of its chunk's KV length, and tiles
    of chunks below the `min_kv_len` that `empty_statistics` was told count as never skipped.

    Args:
        loaded: the model.
        prompt: the prompt.
        statistics: what to add to.
        geometry: tiles of both phases.
        samples: whether to add the rows of `nvidia.sample` too, for which each decode step is counted in
            a call of its own.

    Returns:
        The logits [continuation + 1, vocabulary], which are the dense model's.
    """
    length_bin = nearest_bin(prompt.length, statistics.lengths)
    prompt_len, steps = len(prompt.ids), len(prompt.continuation)
    floor = statistics.identity.get("min_kv_len", 0)
    count = _counted if loaded.engine is None else _counted_by_engine
    logits, seen = count(loaded, prompt, geometry, floor, samples)
    for layer, phase, _, histogram in seen:
        statistics.add(layer, phase, length_bin, histogram)
    if samples:
        by_call: dict[tuple[Phase, int], list[torch.Tensor]] = {}
        for _, phase, kv_len, histogram in seen:
            by_call.setdefault((phase, kv_len), []).append(histogram.counts.cpu())
        for phase in PHASES:
            rows = [nvidia.sample(c, kv_len) for (p, kv_len), c in by_call.items() if p == phase]
            if rows:
                statistics.samples[phase] = torch.stack(rows)
    lengths: dict[Phase, tuple[int, int]] = {
        "prefill": (prompt_len, 1),
        "decode": (sum(range(prompt_len + 1, prompt_len + steps + 1)), steps),
    }
    for phase, (tokens, calls) in lengths.items():
        statistics.kv_tokens[phase][length_bin] += tokens
        statistics.calls[phase][length_bin] += calls
    statistics.prompts.append(prompt.key)
    return logits


def _counted_by_engine(
    loaded: LoadedModel, prompt: Prompt, geometry: GeometryConfig, floor: int, samples: bool
) -> tuple[torch.Tensor, list[_Tiles]]:
    found: tuple[torch.Tensor, list[_Tiles]] = loaded.engine.tiles(
        prompt.ids,
        prompt.continuation,
        geometry.prefill,
        geometry.decode,
        floor=floor,
        each_step=samples,
    )
    return found


def _counted(
    loaded: LoadedModel, prompt: Prompt, geometry: GeometryConfig, floor: int, samples: bool
) -> tuple[torch.Tensor, list[_Tiles]]:
    """Logits of a dense pass and the tiles of every layer; the decode steps apart, if for samples."""
    chunk = geometry.prefill.chunk
    # Read back after the pass: in every call it would make the GPU wait.
    seen: list[_Tiles] = []

    def counted(part: LayerCall) -> tuple[torch.Tensor, TileHistogram]:
        tiles = getattr(geometry, part.phase).keywords
        decode = part.phase == "decode"
        if not decode and part.kv_len < floor:
            tiles["dense_last"] = part.q.shape[2]  # all of its rows are dense
        return tile_statistics(part.q, part.k, part.v, decode=decode, **part.keywords, **tiles)

    def handler(call: LayerCall) -> torch.Tensor:
        if call.phase == "prefill":
            parts = list(call.chunks(chunk))
        else:
            parts = [call.rows(i, i + 1) for i in range(call.q.shape[2])] if samples else [call]
        outputs, histograms = zip(*map(counted, parts), strict=True)
        if call.phase == "prefill":  # a prompt is one sample, in how many chunks it may be computed
            parts, histograms = [call], (reduce(add, histograms),)
        for part, histogram in zip(parts, histograms, strict=True):
            seen.append((part.layer, part.phase, part.kv_len, histogram))
        return joined(list(outputs))

    left_alone = {layer.index: layer.reason for layer in loaded.layers if layer.reason is not None}
    with intercepted(
        loaded.model, handler, decode_from=len(prompt.ids), left_alone=left_alone,
        kv_cache_dtype=loaded.kv_cache_dtype,
    ):  # fmt: skip
        return forward(loaded, prompt), seen
