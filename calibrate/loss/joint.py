"""Loss of a setting from the losses of its layers, corrected by settings that were measured.

The layers' losses, each measured alone, are summed within a phase. How far the sum is off differs between
phases, models and prompts, so each phase has a factor and a power, and phases add: measured together they
lose what they lose apart. `notebooks/studies/loss_model.py` compares this with other forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from calibrate.loss.sensitivity import LossModel
from skip_softmax.thresholds.types import Phase

PhaseLosses = dict[Phase, float]
"""Sum of the layers' predicted losses of each phase [nats/token]."""

# Below this, a loss is rounding of the model's arithmetic [nats/token].
_LEAST = 1e-6
# What is expected of log factor and power before a setting is measured: 0 and 1, within these; and of log KL
# around the prediction.
_FACTOR_SPREAD = 1.0
_POWER_SPREAD = 0.25
_KL_SPREAD = 0.3
_FEWEST = 4  # settings from which an error is told


@dataclass(frozen=True)
class Correction:
    """Predicted loss of a setting: sum over phases of `factor * pivot * (sum / pivot) ** power`.

    Attributes:
        pivot: a typical loss of the settings it was fitted to [nats/token].
        factor: one per phase; 1 before anything was measured.
        power: one per phase; 1 before anything was measured.
    """

    pivot: float
    factor: dict[Phase, float]
    power: dict[Phase, float]

    def loss(self, predicted: PhaseLosses) -> float:
        """Predicted loss of a setting [nats/token]."""
        return float(
            sum(
                self.factor[phase] * self.pivot * (loss / self.pivot) ** self.power[phase]
                for phase, loss in predicted.items()
            )
        )


@dataclass(frozen=True)
class Errors:
    """How well losses of settings were predicted that had no part in the prediction.

    Attributes:
        rank_correlation: Spearman's; None if all predictions or all losses are equal.
        log2_error: root mean square of log2(predicted / measured) [octaves].
    """

    rank_correlation: float | None
    log2_error: float


def correct(predicted: Sequence[PhaseLosses], measured: Sequence[float]) -> Correction:
    """Fits the correction to settings; the fewer there are, the nearer it stays to the plain sum.

    Args:
        predicted: of each setting.
        measured: loss of each setting [nats/token].
    """
    phases = list(dict.fromkeys(phase for losses in predicted for phase in losses))
    logs = np.log(np.maximum(measured, _LEAST))
    pivot = float(np.exp(logs.mean())) if len(logs) else 1.0
    sums = np.array([[losses.get(phase, 0.0) for phase in phases] for losses in predicted])
    sums = sums.reshape(len(predicted), len(phases)) / pivot

    def residuals(parameters: np.ndarray) -> np.ndarray:
        factors, powers = np.exp(parameters[: len(phases)]), parameters[len(phases) :]
        losses = pivot * (factors * sums**powers).sum(1)
        return np.concatenate(
            [
                (np.log(np.maximum(losses, _LEAST)) - logs) / _KL_SPREAD,
                parameters[: len(phases)] / _FACTOR_SPREAD,
                (powers - 1) / _POWER_SPREAD,
            ]
        )

    start = np.repeat([0.0, 1.0], len(phases))
    # A sum of 0 needs a power above 0 to stay 0.
    low = np.repeat([-np.inf, 0.1], len(phases))
    fitted = least_squares(residuals, start, bounds=(low, np.inf)).x
    return Correction(
        pivot,
        {phase: math.exp(fitted[i]) for i, phase in enumerate(phases)},
        {phase: float(fitted[len(phases) + i]) for i, phase in enumerate(phases)},
    )


def described(
    model: LossModel, predicted: Sequence[PhaseLosses], measured: Sequence[float]
) -> dict[str, Any]:
    """The model as plain data: of the layers, its correction by settings, and its errors on unseen ones.

    Args:
        model: of the layers.
        predicted: of each setting, from the model.
        measured: loss of each setting [nats/token].

    Returns:
        `phases` (per phase `power`, `weights`, and the correction's `factor` and `correction_power`), `pivot`
        [nats/token], `settings`, and `errors`: `layers` without the correction, which has seen no setting,
        and `corrected`, each setting by a correction fitted to all others; None of fewer than four settings.
    """
    correction = correct(predicted, measured)
    without = [sum(losses.values()) for losses in predicted]
    errors = {
        "layers": errors_of(without, measured),
        "corrected": errors_of(left_out(predicted, measured), measured),
    }
    return {
        "phases": {
            phase: {
                "power": model.powers[phase],
                "weights": list(model.weights[phase]),
                "factor": correction.factor.get(phase, 1.0),
                "correction_power": correction.power.get(phase, 1.0),
            }
            for phase in model.weights
        },
        "pivot": correction.pivot,
        "settings": len(measured),
        "errors": {name: error and asdict(error) for name, error in errors.items()},
    }


def left_out(predicted: Sequence[PhaseLosses], measured: Sequence[float]) -> list[float]:
    """Loss of each setting [nats/token], predicted with a correction that was fitted to all others."""
    found = []
    for index, losses in enumerate(predicted):
        others = [i for i in range(len(predicted)) if i != index]
        correction = correct([predicted[i] for i in others], [measured[i] for i in others])
        known = {phase: loss for phase, loss in losses.items() if phase in correction.factor}
        found.append(correction.loss(known))
    return found


def errors_of(predicted: Sequence[float], measured: Sequence[float]) -> Errors | None:
    """Errors of predictions of unseen settings; None if there are fewer than four.

    Args:
        predicted: loss of each setting [nats/token].
        measured: the same.
    """
    if len(measured) < _FEWEST:
        return None
    ours, theirs = (np.maximum(values, _LEAST) for values in (predicted, measured))
    rank = None
    if min(len(set(ours.tolist())), len(set(theirs.tolist()))) > 1:
        rank = float(spearmanr(ours, theirs).statistic)
    return Errors(rank, float(np.sqrt(np.mean(np.log2(ours / theirs) ** 2))))
