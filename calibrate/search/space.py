"""The search space: few numbers that stand for one scale factor per layer and phase.

Per phase: a global scale, how far layers follow the analytic allocation (0: one number for all, 1:
the allocation), one offset per sensitivity group, and the sparsity under which a layer is left
dense. Uniform scale factors and the analytic optimum are both points of this space, so the search
starts from them.

A scale at the lower end of its range leaves the whole phase dense.

An engine that takes one number per phase has only the global scale; one with an ignore list also
the number of layers left dense in both phases, first those that cost most loss for the time they
save.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from calibrate.engines.catalogue import form_of
from calibrate.loss.sensitivity import LossModel
from calibrate.model.section import Setting
from calibrate.schema import TargetConfig
from calibrate.search.cost import Cost
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.types import Phase

Params = dict[str, float]

_FLOOR_LOG2 = -2.0  # scale factors below 1/4 skip nothing in any model seen
_OPTIONS_PER_OCTAVE = 4
_PRICES = (-30.0, 60.0)  # log2 of relative time per nat; wide enough for any loss
_SCALE_RANGE = 2.0  # octaves
_DENSE_RANGE = 0.5  # octaves below that: the phase is dense
_GROUP_RANGE = 1.0  # octaves
_OFFSET_RANGE = (-6.0, 4.0)  # octaves a layer may lie from the phase's scale
_DENSE_BELOW = 0.3
_DENSE_LAYERS = "dense_layers"
_TILTS = {"analytic": 1.0, "uniform": 0.0}
ALONE = " alone"  # name of a warm start in which only one phase skips: `prefill alone`
_LEAST_LOSS = 1e-9  # of a setting that skips next to nothing [nats/token]
# Shares of the budget that a predicted loss may spend: of the allocation between layers, and of each
# warm start.
_ALLOCATED = 0.5
_SEEDED = (0.5, 0.25, 1.0)


@dataclass(frozen=True)
class Space:
    """Maps a point of the search space to a setting.

    Attributes:
        statistics: of the calibration prompts.
        cost: measured kernel curves.
        losses: predicted KL per layer.
        target: engine, phases and their weights, shortest KV lengths.
        budget: of the predicted KL [nats/token].
        layers: indices of the layers that can be calibrated.
        offsets: per phase and layer, log2 distance from the phase's scale in the analytic
            allocation.
        group_count: how many sensitivity groups the layers of a phase are split into.
        groups: per phase and layer, its sensitivity group.
        dense_order: layers, the one to leave dense first at the front.
    """

    statistics: Statistics
    cost: Cost
    losses: LossModel
    target: TargetConfig
    budget: float
    layers: tuple[int, ...]
    offsets: dict[Phase, tuple[float, ...]]
    group_count: int
    groups: dict[Phase, tuple[int, ...]]
    dense_order: tuple[int, ...] = ()

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Range of every parameter; a scale lies within two octaves of the warm starts, or says dense."""
        bounds: dict[str, tuple[float, float]] = {}
        seeds = [params for _, params in self.seeds()]
        if self._form == "scalar+ignore":
            bounds[_DENSE_LAYERS] = (0.0, max(len(self.layers) - 1.0, 0.0))
        for phase in self.target.phases:
            highest = max(params[f"{phase}.log2_scale"] for params in seeds)
            bounds[f"{phase}.log2_scale"] = (
                self._lowest[phase] - _DENSE_RANGE,
                min(highest + _SCALE_RANGE, self._top(phase)),
            )
            if self._form != "native":
                continue
            bounds[f"{phase}.tilt"] = (0.0, 1.5)
            for group in range(self.group_count):
                bounds[f"{phase}.group{group}"] = (-_GROUP_RANGE, _GROUP_RANGE)
            bounds[f"{phase}.dense_below"] = (0.0, _DENSE_BELOW)
        return bounds

    def setting(self, params: Params) -> Setting:
        """One scale factor per phase and layer; layers that cannot be calibrated are 0."""
        size = len(self.statistics.counts["prefill"])
        return {
            phase: self._phase_setting(phase, params)
            if params[f"{phase}.log2_scale"] >= self._lowest[phase]
            else (0.0,) * size
            for phase in self.target.phases
        }

    def one_number(self, scale_factor: dict[Phase, float], dense: Collection[int]) -> Setting:
        """The same number per phase in every layer that can be calibrated and is not to stay dense."""
        size = len(self.statistics.counts["prefill"])
        return {
            phase: tuple(
                factor if layer in self.layers and layer not in dense else 0.0
                for layer in range(size)
            )
            for phase, factor in scale_factor.items()
        }

    def relative_time(self, setting: Setting) -> float:
        """Predicted attention time relative to dense, weighted over phases."""
        return self.cost.weighted_time(self.statistics, setting, self.target.phase_weight)

    def phase_times(self, setting: Setting) -> dict[Phase, float]:
        """Predicted attention time of each phase relative to dense."""
        return self.cost.phase_times(self.statistics, setting)

    def predicted_loss(self, setting: Setting) -> dict[Phase, float]:
        """Sum of the layers' predicted losses per phase [nats/token]; `loss.joint` corrects it."""
        losses: dict[Phase, float] = {}
        for phase, factors in setting.items():
            mass = self.statistics.dropped_mass(phase, factors).tolist()
            losses[phase] = sum(
                self.losses.loss(phase, layer, mass[layer]) for layer in self.layers
            )
        return losses

    def seeds(self) -> list[tuple[str, Params]]:
        """Warm starts: the analytic allocation and one number per phase, at several shares of the budget."""
        return list(self._seeds)

    @cached_property
    def _seeds(self) -> list[tuple[str, Params]]:
        points: list[tuple[str, Params]] = []
        for share in _SEEDED:
            for name, tilt in _TILTS.items():
                if self._form == "scalar" and tilt:
                    continue  # one number per phase is uniform
                points.append((name, self._seed(tilt, share * self.budget)))
        return points

    @cached_property
    def lines(self) -> dict[str, str]:
        """Names of warm starts that can be aimed at a loss; for each, those whose losses tell where it is."""
        both = [name for name in _TILTS if name != "analytic" or self._form != "scalar"]
        alone = self.target.phases if len(self.target.phases) > 1 else ()
        return {name: name for name in both} | {f"{phase}{ALONE}": both[0] for phase in alone}

    def aimed(
        self, name: str, loss: float, measured: Sequence[tuple[Setting, float]]
    ) -> Params | None:
        """A warm start whose measured loss should come to `loss` [nats/token].

        Layers interact, so a predicted loss is off by a factor, which differs between models. Losses
        measured on the same line of settings say which prediction to ask for: between them by their
        logarithms, beyond them in proportion.

        Args:
            name: one of `lines`.
            loss: what to aim at.
            measured: settings of the name in `lines` that were tried, with their loss [nats/token].

        Returns:
            The point; None if nothing was measured.
        """
        if not measured:
            return None
        pairs = sorted(
            (math.log(max(sum(self.predicted_loss(setting).values()), _LEAST_LOSS)), spent)
            for setting, spent in measured
        )
        predicted = [log_predicted for log_predicted, _ in pairs]
        # A larger allowance costs no less; what noise puts out of order counts as equal.
        risen = itertools.accumulate((math.log(max(spent, _LEAST_LOSS)) for _, spent in pairs), max)
        found, target = list(risen), math.log(loss)
        if target < found[0]:
            allowed = predicted[0] + target - found[0]
        elif target > found[-1]:
            allowed = predicted[-1] + target - found[-1]
        else:
            allowed = float(np.interp(target, found, predicted))
        if name in _TILTS:
            return self._seed(_TILTS[name], math.exp(allowed))
        only = [phase for phase in self.target.phases if name == f"{phase}{ALONE}"]
        return self._seed(_TILTS[self.lines[name]], math.exp(allowed), only)

    def _seed(self, tilt: float, allowed: float, only: Sequence[Phase] = ()) -> Params:
        """The scale of each phase that gains most time for a total predicted loss of `allowed`.

        Args:
            tilt: how far layers follow the allocation.
            allowed: the loss [nats/token].
            only: the other phases stay dense; none: all phases skip.
        """
        phases = only or self.target.phases
        scales = {phase: grid(self._top(phase), _OPTIONS_PER_OCTAVE) for phase in phases}
        options = {
            phase: [self._option(phase, tilt, log2_scale) for log2_scale in scales[phase]]
            for phase in phases
        }

        def cheapest(log2_price: float, phase: Phase) -> int:
            return _cheapest(options[phase], log2_price, self.target.phase_weight[phase])

        def loss(log2_price: float) -> float:
            return sum(options[phase][cheapest(log2_price, phase)][2] for phase in phases)

        price = _price(loss, allowed)
        params: Params = {}
        for phase in phases:
            params |= self._point(phase, tilt, scales[phase][cheapest(price, phase)])
        for phase in self.target.phases:
            if phase not in phases:
                params |= self._point(phase, tilt, self._lowest[phase] - _DENSE_RANGE)
        return params

    def _option(self, phase: Phase, tilt: float, log2_scale: float) -> _Option:
        setting: Setting = {phase: self._phase_setting(phase, self._point(phase, tilt, log2_scale))}
        return log2_scale, self.phase_times(setting)[phase], self.predicted_loss(setting)[phase]

    def _point(self, phase: Phase, tilt: float, log2_scale: float) -> Params:
        if self._form != "native":
            params = {f"{phase}.log2_scale": log2_scale}
            quarter = len(self.layers) // 4 if tilt else 0
            return params | (
                {_DENSE_LAYERS: float(quarter)} if self._form == "scalar+ignore" else {}
            )
        groups = {f"{phase}.group{group}": 0.0 for group in range(self.group_count)}
        # A layer below break-even would only pay for the skipping kernel; one number for all layers
        # cannot leave it out.
        dense_below = min(self.cost.curves[phase].break_even, _DENSE_BELOW) if tilt else 0.0
        return {
            f"{phase}.log2_scale": log2_scale,
            f"{phase}.tilt": tilt,
            **groups,
            f"{phase}.dense_below": dense_below,
        }

    def _phase_setting(self, phase: Phase, params: Params) -> tuple[float, ...]:
        if self._form != "native":
            factor = float(f"{2.0 ** params[f'{phase}.log2_scale']:.5g}")
            dense = self.dense_order[: round(params.get(_DENSE_LAYERS, 0.0))]
            return self.one_number({phase: factor}, dense)[phase]
        scale, tilt = params[f"{phase}.log2_scale"], params[f"{phase}.tilt"]
        top = self._top(phase)
        factors = [0.0] * self.statistics.counts[phase].shape[0]
        for layer in self.layers:
            exponent = scale + tilt * self.offsets[phase][layer]
            exponent += params[f"{phase}.group{self.groups[phase][layer]}"]
            factors[layer] = 2.0 ** min(max(exponent, _FLOOR_LOG2), top)
        share = self.statistics.layer_sparsity(phase, factors).tolist()
        floor = params[f"{phase}.dense_below"]
        return tuple(
            float(f"{factor:.5g}") if share[layer] > floor else 0.0
            for layer, factor in enumerate(factors)
        )

    @cached_property
    def _lowest(self) -> dict[Phase, float]:
        """log2 of the scale below which a phase is dense."""
        seeds = [params for _, params in self.seeds()]
        return {
            phase: max(min(p[f"{phase}.log2_scale"] for p in seeds) - _SCALE_RANGE, _FLOOR_LOG2)
            for phase in self.target.phases
        }

    @property
    def _form(self) -> str:
        return form_of(self.target.engine)

    def _top(self, phase: Phase) -> float:
        return math.log2(self.target.largest_scale_factor(phase))


def build_space(
    statistics: Statistics,
    cost: Cost,
    losses: LossModel,
    layers: tuple[int, ...],
    target: TargetConfig,
    *,
    budget: float,
    groups: int,
) -> Space:
    """Computes the analytic allocation and the sensitivity groups.

    The allocation minimises predicted time plus a price times predicted loss, layer by layer: for
    every price that is the exact optimum of the knapsack. The price is the one that spends half the
    budget.

    Args:
        statistics: of the calibration prompts.
        cost: measured kernel curves.
        losses: predicted KL per layer.
        layers: indices of the layers that can be calibrated.
        target: engine, phases and their weights, shortest KV lengths.
        budget: of the predicted KL [nats/token].
        groups: how many sensitivity groups.
    """
    tables = {
        phase: _options(statistics, cost, losses, target, phase, layers) for phase in target.phases
    }

    def chosen(log2_price: float, phase: Phase, layer: int) -> _Option:
        options = tables[phase][layer]
        return options[_cheapest(options, log2_price, target.phase_weight[phase])]

    def loss(log2_price: float) -> float:
        return sum(
            chosen(log2_price, phase, layer)[2] for phase in target.phases for layer in layers
        )

    price = _price(loss, _ALLOCATED * budget)
    offsets: dict[Phase, tuple[float, ...]] = {}
    group_of: dict[Phase, tuple[int, ...]] = {}
    for phase in target.phases:
        size = statistics.counts[phase].shape[0]
        log2_factors = {layer: chosen(price, phase, layer)[0] for layer in layers}
        skipping = [factor for factor in log2_factors.values() if factor is not None]
        centre = sum(skipping) / len(skipping) if skipping else 0.0
        low, high = _OFFSET_RANGE
        offsets[phase] = tuple(
            low if factor is None else min(max(factor - centre, low), high)
            for factor in (log2_factors.get(layer) for layer in range(size))
        )
        order = sorted(layers, key=lambda layer: losses.weights[phase][layer])
        rank = {layer: position for position, layer in enumerate(order)}
        group_of[phase] = tuple(
            rank.get(layer, 0) * groups // max(len(order), 1) for layer in range(size)
        )
    dense_order = _dense_order(tables, layers, target, budget)
    return Space(
        statistics, cost, losses, target, budget, layers, offsets, groups, group_of, dense_order
    )


_Option = tuple[float | None, float, float]
"""log2 of a scale factor (None: dense), predicted relative time, predicted loss [nats/token]."""


def _dense_order(
    tables: dict[Phase, dict[int, list[_Option]]],
    layers: tuple[int, ...],
    target: TargetConfig,
    budget: float,
) -> tuple[int, ...]:
    """Layers by predicted loss per saved time, at the number per phase that spends the budget."""
    price: dict[int, float] = dict.fromkeys(layers, 0.0)
    gain: dict[int, float] = dict.fromkeys(layers, 0.0)
    for phase, table in tables.items():
        levels = range(1, len(next(iter(table.values()), [])))
        allowed = budget / len(tables)
        spends = [
            level for level in levels if sum(table[layer][level][2] for layer in layers) <= allowed
        ]
        level = max(spends, default=1)
        for layer in layers:
            _, time, loss = table[layer][level]
            price[layer] += loss
            gain[layer] += target.phase_weight[phase] * (1.0 - time)
    # A layer that saves no time goes first, whatever it costs.
    return tuple(
        sorted(layers, key=lambda i: (-price[i] / gain[i] if gain[i] > 0 else -math.inf, i))
    )


def _options(
    statistics: Statistics,
    cost: Cost,
    losses: LossModel,
    target: TargetConfig,
    phase: Phase,
    layers: tuple[int, ...],
) -> dict[int, list[_Option]]:
    """What each layer may do: stay dense, or take one of the scale factors of the grid."""
    table: dict[int, list[_Option]] = {layer: [(None, 1.0, 0.0)] for layer in layers}
    for log2_factor in grid(math.log2(target.largest_scale_factor(phase)), _OPTIONS_PER_OCTAVE):
        share = statistics.layer_sparsity(phase, 2.0**log2_factor)
        mass = statistics.dropped_mass(phase, 2.0**log2_factor)
        for layer in layers:
            time = cost.curves[phase].at(float(share[layer]))
            table[layer].append((log2_factor, time, losses.loss(phase, layer, float(mass[layer]))))
    return table


def grid(top: float, per_octave: int) -> list[float]:
    """log2 scale factors from the smallest that is of use to `top`, rising."""
    steps = int((top - _FLOOR_LOG2) * per_octave)
    return [top - step / per_octave for step in range(steps + 1)][::-1]


def _cheapest(options: list[_Option], log2_price: float, weight: float) -> int:
    """Index of the option with the least weighted time plus price times loss."""
    totals = torch.tensor([weight * time + 2.0**log2_price * loss for _, time, loss in options])
    return int(totals.argmin())


def _price(loss: Callable[[float], float], allowed: float) -> float:
    """log2 of the smallest price at which `loss` (falling in the price) is at most `allowed`."""
    low, high = _PRICES
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(middle) <= allowed else (middle, high)
    return high
