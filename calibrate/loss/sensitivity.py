"""Loss as a function of each layer's scale factor, one layer at a time.

Only one layer skips in each measurement, so everything before it is the dense run: those layers are
not computed again. For decode the prompt itself is dense, so its keys and values are computed once.
A late layer therefore costs a fraction of a pass, and only late layers are measured at every level: they
tell how loss grows with the dropped mass, and one level tells how much each layer weighs. A serving engine
computes all of it each time.
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

_LATE = 3  # the last of so many parts of the layers is measured at every level
# What is expected before anything is measured: a perturbation of the output moves the logits in proportion,
# and KL is quadratic in small changes of the logits. `notebooks/studies/loss_model.json` has the spread of
# the power between sets of prompts, and of the KLs around the line of one power.
POWER = 2.0
_POWER_SPREAD = 0.3
_KL_SPREAD = 0.35  # of log KL
_LEAST = 1e-9  # of a layer [nats/token]
_ABOVE_ROUNDING = 5.0  # times what rounding alone costs: from here on a loss says how it grows

_MUCH_ROUNDING = 0.1  # of the budget: worth saying


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
        rounding: KL between two dense runs of the same prompts, one with the model's own kernels: what a
            change of rounding alone costs [nats/token]. 4e-4 was seen in bfloat16 and 6e-6 in float16. Not
            measured by earlier versions.
    """

    phase: Phase
    layer: int
    scale_factor: float
    sparsity: float
    dropped_mass: float
    kl: float
    rounding: float = 0.0


@dataclass(frozen=True)
class LossModel:
    """Predicted loss of a layer: `weight * dropped_mass ** power` [nats/token].

    Attributes:
        weights: per phase one per layer.
        powers: one per phase.
    """

    weights: dict[Phase, tuple[float, ...]]
    powers: dict[Phase, float]

    def loss(self, phase: Phase, layer: int, dropped_mass: float) -> float:
        """Predicted KL when only this layer skips [nats/token]."""
        return float(self.weights[phase][layer] * dropped_mass ** self.powers[phase])


Step = tuple[Phase, int, float]
"""One measurement: phase, layer, scale factor [tokens]."""


def plan(
    loaded: LoadedModel, statistics: Statistics, target: TargetConfig, levels: Sequence[float]
) -> list[Step]:
    """What to measure: each layer at the scale factor that reaches the middle sparsity of `levels` in it.

    The last third of the layers is measured at all of them. Layers that cannot skip a percent of their
    tiles are left out.
    """
    middle = sorted(levels)[(len(levels) - 1) // 2]
    late = len(loaded.layers) - len(loaded.layers) // _LATE
    todo: list[Step] = []
    for phase in target.phases:
        ceiling = target.largest_scale_factor(phase)
        for layer in loaded.calibratable:
            factors = {
                min(scale_factor_at(statistics, phase, level, layer.index), ceiling)
                for level in (levels if layer.index >= late else (middle,))
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
    own: Callable[[Prompt], torch.Tensor],
) -> Iterator[Row]:
    """Measures layers, one at a time.

    The dense run that they are compared with uses the same kernels, so that what differs is what the layer
    lost and not also how two kernels round, which in 16 bits is as much as a layer may lose.

    Args:
        loaded: the model.
        statistics: of the calibration prompts.
        todo: what `plan` lists and no earlier, interrupted measurement has done.
        thresholds: a setting as what the model runs.
        prompts: a few short search prompts.
        own: gives the logits of a prompt's dense run with the model's own attention.

    Yields:
        One row per item of `todo`.
    """
    probes: dict[Phase, list[_Probe]] = {}

    def only(phase: Phase, layer: int, factor: float) -> Thresholds:
        factors = tuple(factor if i == layer else 0.0 for i in range(len(loaded.layers)))
        setting: Setting = {phase: factors}
        return thresholds(setting)

    for phase, layer, factor in todo:
        if phase not in probes:
            dense = only(phase, layer, 0.0)
            probe = _PROBES[phase] if loaded.engine is None else _served_probe
            probes = {phase: [probe(loaded, prompt, dense) for prompt in prompts]}
            pairs = zip(prompts, probes[phase], strict=True)
            rounding = [kl_divergence(own(prompt), ready.dense) for prompt, ready in pairs]
        alone = only(phase, layer, factor)
        losses = [kl_divergence(probe.dense, probe.run(layer, alone)) for probe in probes[phase]]
        yield Row(
            phase,
            layer,
            factor,
            float(statistics.layer_sparsity(phase, factor)[layer]),
            float(statistics.dropped_mass(phase, factor)[layer]),
            sum(losses) / len(losses),
            sum(rounding) / len(rounding),
        )


def rounding_told(rows: Sequence[Row], budget: float, dtype: str) -> str | None:
    """That rounding alone spends much of a budget, in a sentence; None: it does not.

    Skipping exchanges the attention of a layer, and the model then rounds otherwise: where that costs a tenth
    of the budget, the proof has that much less to spend, and single layers drown in it.

    Args:
        rows: from `measure_layers`.
        budget: of the KL [nats/token].
        dtype: of the model, by its name in torch.
    """
    most = max((row.rounding for row in rows), default=0.0)
    if most < _MUCH_ROUNDING * budget:
        return None
    return (
        f"rounding alone costs a KL of {most:.2g} nats/token in {dtype}, {most / budget:.2g} of the budget; "
        + (
            "raise `budget.kl`"
            if dtype == "float32"
            else "use `model.dtype: float32` or raise `budget.kl`"
        )
    )


def loss_model(rows: Sequence[Row], layers: int, phases: Sequence[Phase]) -> LossModel:
    """Weights and powers from the measured rows; a layer without a row takes the phase's largest weight.

    Args:
        rows: from `measure_layers`.
        layers: number of layers.
        phases: phases to model.
    """
    weights: dict[Phase, tuple[float, ...]] = {}
    powers: dict[Phase, float] = {}
    for phase in phases:
        found: dict[int, list[tuple[float, float]]] = {}
        telling: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row.phase == phase and row.dropped_mass > 0:
                # Losses add, so rounding's comes off; what is left of a layer that drowns in it is a
                # guess. The floor keeps such a layer from counting as free.
                lost = max(row.kl - row.rounding, row.kl / 4, _LEAST)
                logs = math.log(row.dropped_mass), math.log(lost)
                found.setdefault(row.layer, []).append(logs)
                if row.kl > max(_ABOVE_ROUNDING * row.rounding, _LEAST):
                    telling.setdefault(row.layer, []).append(logs)
        power = powers[phase] = _power(list(telling.values()))
        means = {
            layer: math.exp(sum(kl - power * mass for mass, kl in logs) / len(logs))
            for layer, logs in found.items()
        }
        worst = max(means.values(), default=1.0)
        weights[phase] = tuple(means.get(layer, worst) for layer in range(layers))
    return LossModel(weights, powers)


def _power(layers: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Slope of log KL over log dropped mass, common to all layers; near `POWER` if few were measured twice.

    Args:
        layers: log dropped mass and log KL of each measurement of a layer.
    """
    # The prior as one more observation.
    weight = (_KL_SPREAD / _POWER_SPREAD) ** 2
    products, squares = POWER * weight, weight
    for logs in layers:
        mass, kl = (sum(column) / len(logs) for column in zip(*logs, strict=True))
        products += sum((m - mass) * (k - kl) for m, k in logs)
        squares += sum((m - mass) ** 2 for m, _ in logs)
    return products / squares


@dataclass(frozen=True)
class _Probe:
    """A prompt, ready to be run with one layer skipping.

    Attributes:
        dense: logits of its dense run [continuation + 1, vocabulary].
        run: the same logits, with thresholds in which no layer before the given one skips.
    """

    dense: torch.Tensor
    run: Callable[[int, Thresholds], torch.Tensor]


def _prefill_probe(loaded: LoadedModel, prompt: Prompt, dense: Thresholds) -> _Probe:
    tokens = len(prompt.ids) + len(prompt.continuation)
    return _probe(loaded, prompt, dense, tokens, lambda: forward(loaded, prompt).float().cpu())


def _decode_probe(loaded: LoadedModel, prompt: Prompt, dense: Thresholds) -> _Probe:
    device = loaded.model.device
    with torch.no_grad():
        start = loaded.model(
            input_ids=torch.tensor([prompt.ids], device=device), use_cache=True, logits_to_keep=1
        )
    steps = torch.tensor([prompt.continuation], device=device)

    def decode() -> torch.Tensor:
        cache = copy.deepcopy(start.past_key_values)
        with torch.no_grad():
            out = loaded.model(input_ids=steps, past_key_values=cache, use_cache=True)
        return torch.cat([start.logits[0, -1:], out.logits[0]]).float().cpu()

    return _probe(loaded, prompt, dense, len(prompt.continuation), decode)


def _probe(
    loaded: LoadedModel,
    prompt: Prompt,
    dense: Thresholds,
    tokens: int,
    logits: Callable[[], torch.Tensor],
) -> _Probe:
    """A probe of `logits`, one pass over `tokens` tokens with whatever attention the model has then."""
    blocks = _blocks(loaded)
    with applied(loaded.model, dense, decode_from=len(prompt.ids)):
        expected, recorded = _record(loaded, blocks, tokens, logits)

    def run(layer: int, thresholds: Thresholds) -> torch.Tensor:
        with (
            _replayed(blocks, recorded, layer),
            applied(loaded.model, thresholds, decode_from=len(prompt.ids)),
        ):
            return logits()

    return _Probe(expected, run)


def _served_probe(loaded: LoadedModel, prompt: Prompt, dense: Thresholds) -> _Probe:
    """In a serving engine each run is a whole pass: nobody else may give its layers what they return."""

    def run(_layer: int, thresholds: Thresholds) -> torch.Tensor:
        found: torch.Tensor = loaded.engine.logits(prompt.ids, prompt.continuation, thresholds)[0]
        return found

    return _Probe(run(0, dense), run)


_PROBES: dict[Phase, Callable[[LoadedModel, Prompt, Thresholds], _Probe]] = {
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
    loaded: LoadedModel,
    blocks: dict[int, torch.nn.Module],
    tokens: int,
    logits: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor, dict[int, Any]]:
    """Logits of one pass, and the outputs of all blocks; none when they would take too much memory."""
    hidden = loaded.model.config.get_text_config().hidden_size
    if len(blocks) * tokens * hidden * loaded.model.dtype.itemsize > _REPLAY_LIMIT:
        return logits(), {}
    recorded: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, output, index=index: recorded.update({index: output})
        )
        for index, block in blocks.items()
    ]
    try:
        return logits(), recorded
    finally:
        for hook in hooks:
            hook.remove()


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
