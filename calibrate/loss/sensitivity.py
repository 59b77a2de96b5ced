"""Loss as a function of each layer's scale factor, one layer at a time.

Only one layer skips in each measurement, so everything before it is the dense run: those layers are
not computed again. For decode the prompt itself is dense, so its keys and values are computed once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibrate.loss.losses import kl_divergence
from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.schema import TargetConfig
from calibrate.statistics.counts import Statistics, scale_factor_at
from skip_softmax.huggingface.applied import applied
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import Phase

# Outputs of all layers of one prompt are kept up to this size [bytes]; above it every layer is
# computed again.
_REPLAY_LIMIT = 2 << 30

# Loss grows faster than the dropped mass: a perturbation of the output moves the logits in
# proportion, and KL is quadratic in small changes of the logits. Rows that lose much dominate,
# which lowers the power from 2.
LOSS_POWER = 1.5


@dataclass(frozen=True)
class Row:
    """One layer at one scale factor.

    Attributes:
        phase: `prefill` or `decode`.
        layer: layer index.
        scale_factor: what was applied [tokens].
        sparsity: of this layer, from the statistics.
        dropped_mass: of this layer, from the statistics.
        kl: mean over prompts [nats/token].
    """

    phase: Phase
    layer: int
    scale_factor: float
    sparsity: float
    dropped_mass: float
    kl: float


@dataclass(frozen=True)
class LossModel:
    """Predicted loss of a layer: `weight * dropped_mass ** LOSS_POWER` [nats/token]."""

    weights: dict[Phase, tuple[float, ...]]

    def loss(self, phase: Phase, layer: int, dropped_mass: float) -> float:
        """Predicted KL when only this layer skips [nats/token]."""
        return float(self.weights[phase][layer] * dropped_mass**LOSS_POWER)


Step = tuple[Phase, int, float]
"""One measurement: phase, layer, scale factor [tokens]."""


def plan(
    loaded: LoadedModel, statistics: Statistics, target: TargetConfig, levels: Sequence[float]
) -> list[Step]:
    """What to measure: each layer at the scale factors that reach the given sparsities in it.

    Layers that cannot skip a percent of their tiles are left out.
    """
    todo: list[Step] = []
    for phase in target.phases:
        ceiling = target.largest_scale_factor(phase)
        for layer in loaded.calibratable:
            factors = {
                min(scale_factor_at(statistics, phase, level, layer.index), ceiling)
                for level in levels
            }
            for factor in sorted(factors):
                if statistics.layer_sparsity(phase, factor)[layer.index] >= 0.01:
                    todo.append((phase, layer.index, factor))
    return todo


def measure_layers(
    loaded: LoadedModel,
    statistics: Statistics,
    todo: Sequence[Step],
    thresholds: Callable[[Setting], Thresholds],
    prompts: Sequence[Prompt],
    dense: Callable[[Prompt], torch.Tensor],
) -> Iterator[Row]:
    """Measures layers, one at a time.

    Args:
        loaded: the model.
        statistics: of the calibration prompts.
        todo: what `plan` lists and no earlier, interrupted measurement has done.
        thresholds: a setting as what the model runs.
        prompts: a few short search prompts.
        dense: gives a prompt's dense logits.

    Yields:
        One row per item of `todo`.
    """
    probes: dict[Phase, list[Callable[[int, Thresholds], torch.Tensor]]] = {}
    for phase, layer, factor in todo:
        if phase not in probes:
            probes = {phase: [_PROBES[phase](loaded, prompt) for prompt in prompts]}
        setting: Setting = {
            phase: tuple(factor if i == layer else 0.0 for i in range(len(loaded.layers)))
        }
        alone = thresholds(setting)
        losses = [
            kl_divergence(dense(prompt), probe(layer, alone))
            for prompt, probe in zip(prompts, probes[phase], strict=True)
        ]
        yield Row(
            phase,
            layer,
            factor,
            float(statistics.layer_sparsity(phase, factor)[layer]),
            float(statistics.dropped_mass(phase, factor)[layer]),
            sum(losses) / len(losses),
        )


def loss_model(rows: Sequence[Row], layers: int, phases: Sequence[Phase]) -> LossModel:
    """Weights from the measured rows; a layer without a row takes the phase's largest weight.

    Args:
        rows: from `measure_layers`.
        layers: number of layers.
        phases: phases to model.
    """
    weights: dict[Phase, tuple[float, ...]] = {}
    for phase in phases:
        found: dict[int, list[float]] = {}
        for row in rows:
            if row.phase == phase and row.dropped_mass > 0:
                # The floor keeps a layer whose loss drowns in rounding from counting as free.
                found.setdefault(row.layer, []).append(
                    max(row.kl, 1e-9) / row.dropped_mass**LOSS_POWER
                )
        means = {layer: math.exp(sum(map(math.log, ws)) / len(ws)) for layer, ws in found.items()}
        worst = max(means.values(), default=1.0)
        weights[phase] = tuple(means.get(layer, worst) for layer in range(layers))
    return LossModel(weights)


def _prefill_probe(
    loaded: LoadedModel, prompt: Prompt
) -> Callable[[int, Thresholds], torch.Tensor]:
    blocks = _blocks(loaded)
    recorded = _record(loaded, prompt, blocks)

    def run(layer: int, thresholds: Thresholds) -> torch.Tensor:
        with (
            _replayed(blocks, recorded, layer),
            applied(loaded.model, thresholds, decode_from=len(prompt.ids)),
        ):
            return forward(loaded, prompt).float().cpu()

    return run


def _decode_probe(loaded: LoadedModel, prompt: Prompt) -> Callable[[int, Thresholds], torch.Tensor]:
    device = loaded.model.device
    with torch.no_grad():
        start = loaded.model(
            input_ids=torch.tensor([prompt.ids], device=device), use_cache=True, logits_to_keep=1
        )
    steps = torch.tensor([prompt.continuation], device=device)

    def run(layer: int, thresholds: Thresholds) -> torch.Tensor:
        del layer  # the cache holds everything that cannot change
        with torch.no_grad(), applied(loaded.model, thresholds, decode_from=len(prompt.ids)):
            out = loaded.model(
                input_ids=steps,
                past_key_values=copy.deepcopy(start.past_key_values),
                use_cache=True,
            )
        return torch.cat([start.logits[0, -1:], out.logits[0]]).float().cpu()

    return run


_PROBES: dict[Phase, Callable[[LoadedModel, Prompt], Callable[[int, Thresholds], torch.Tensor]]] = {
    "prefill": _prefill_probe,
    "decode": _decode_probe,
}


def _blocks(loaded: LoadedModel) -> dict[int, torch.nn.Module]:
    """The module around each attention layer: `model.layers.3` for `model.layers.3.self_attn`."""
    return {
        layer.index: loaded.model.get_submodule(layer.name.rpartition(".")[0])
        for layer in loaded.layers
        if "." in layer.name
    }


def _record(
    loaded: LoadedModel, prompt: Prompt, blocks: dict[int, torch.nn.Module]
) -> dict[int, Any]:
    """Outputs of all blocks in the dense run; empty when they would take too much memory."""
    tokens = len(prompt.ids) + len(prompt.continuation)
    hidden = loaded.model.config.get_text_config().hidden_size
    if len(blocks) * tokens * hidden * loaded.model.dtype.itemsize > _REPLAY_LIMIT:
        return {}
    recorded: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, output, index=index: recorded.update({index: output})
        )
        for index, block in blocks.items()
    ]
    try:
        forward(loaded, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


@contextmanager
def _replayed(
    blocks: dict[int, torch.nn.Module], recorded: dict[int, Any], layer: int
) -> Iterator[None]:
    """Blocks before `layer` return what they returned in the dense run."""
    patched = [index for index in recorded if index < layer]
    try:
        for index in patched:
            output = recorded[index]
            blocks[index].forward = lambda *_args, _output=output, **_kwargs: _output
        yield
    finally:
        for index in patched:
            del blocks[index].forward
