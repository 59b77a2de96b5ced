"""A target sparsity in place of a search: numbers from Model-Optimizer's curve, and what comes of them.

Model-Optimizer's users ask for a share of the tiles, not for a loss. The number that its curve gives is one
candidate like any other: it must meet the budget on the held-out prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from calibrate.loss.losses import LOSSES
from calibrate.model.section import Setting
from calibrate.proof.dense import reach, reach_text
from calibrate.proof.emit import rounded
from calibrate.proof.validate import Attempt
from calibrate.schema import TargetConfig
from calibrate.statistics.counts import Statistics
from calibrate.statistics.fit import Curve
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase, ScaleFactors

# Of the whole model's loss over the dropped mass: less than a layer's own. On SmolLM2-135M, between targets
# of 0.2 and 0.3 at 1024 tokens, the mean followed a power of 1.4 and its upper bound one of 1.55.
_POWER = 1.5
_PER_OCTAVE = 8
_OCTAVES = 30  # below this no tile is left to skip


@dataclass(frozen=True)
class Aim:
    """What a target asks of a phase.

    Attributes:
        target: share of the tiles to skip, in (0, 1).
        asked: the number that Model-Optimizer's curve gives for it [tokens]; None: it gives none.
        scale_factor: what is used: `asked`, or the largest that `min_kv_len` allows [tokens]; 0: dense.
        refused: why the phase is left dense; None: it is not.
    """

    target: float
    asked: float | None
    scale_factor: float
    refused: str | None


def aim(
    statistics: Statistics, phase: Phase, curve: Mapping[str, Any], config: TargetConfig
) -> Aim:
    """The number of a phase.

    A curve knows no ceiling: it also gives a number for a sparsity that no threshold reaches. The histograms
    do know it.

    Args:
        statistics: of the calibration prompts.
        phase: `prefill` or `decode`; it must have a target.
        curve: from `nvidia.fit`.
        config: targets, and the largest scale factors.
    """
    target, ceiling = config.targets[phase], config.largest_scale_factor(phase)
    asked = None if curve["refused"] else curve["a"] * math.exp(curve["b"] * target)
    if statistics.sparsity(phase, ceiling) < target:
        return Aim(target, asked, 0.0, f"its target of {100 * target:g} % is out of reach")
    if asked is None:
        reason = f"Model-Optimizer's fit gives no curve for it: {curve['refused']}"
        return Aim(target, None, 0.0, reason)
    return Aim(target, asked, min(asked, ceiling), None)


def candidate(aims: Mapping[Phase, Aim], layers: int, usable: Sequence[int]) -> Setting:
    """Each phase's number in every layer that can be calibrated."""
    return {
        phase: tuple(one.scale_factor if layer in usable else 0.0 for layer in range(layers))
        for phase, one in aims.items()
    }


def nothing_aimed(aims: Mapping[Phase, Aim], statistics: Statistics, config: TargetConfig) -> str:
    """Why no phase of a run can be brought to its target, how far each was, and the cure."""
    texts = "; ".join(
        f"{phase}: {one.refused} ({reach_text(reach(statistics, phase, config))})"
        for phase, one in aims.items()
    )
    return (
        f"no phase can be brought to its target sparsity ({texts}); lower `target.target_sparsity`, or raise "
        "`target.min_kv_len`, which limits scale factors, and calibrate on prompts as long"
    )


def aims_of(fits: Mapping[Phase, Mapping[str, Any]]) -> dict[Phase, Aim]:
    """The aims that `fit.json` holds under `target`."""
    return {phase: Aim(**fits[phase]["target"]) for phase in PHASES if phase in fits}


def left_dense(
    attempt: Attempt,
    fits: Mapping[Phase, Mapping[str, Any]],
    statistics: Statistics,
    config: TargetConfig,
) -> dict[str, Any]:
    """What the candidate leaves dense, for the evidence, as `dense.left_dense`."""
    aims = aims_of(fits)
    unused = f"no tile was skipped there on the {attempt.prompts} held-out prompts"
    phases = {
        phase: {"reason": aims[phase].refused or unused, **reach(statistics, phase, config)}
        for phase, factors in attempt.served.items()
        if not any(factors)
    }
    return {"dense": phases} if phases else {}


def attained(
    attempt: Attempt,
    fits: Mapping[Phase, Mapping[str, Any]],
    statistics: Statistics,
    limits: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """What each phase was to skip, what was predicted of its number, and what it skipped on held-out prompts.

    Args:
        attempt: the candidate on the held-out prompts.
        fits: `model` (our curve), `nvidia` and `target` of each phase.
        statistics: of the calibration prompts.
        limits: the budgets.

    Returns:
        Per phase that has a number: `target`, `asked`, `scale_factor`, `achieved`; `fit` (`a`, `b`, `r2`,
        `r2_raw`, `points`, `sparsity_range` of Model-Optimizer's curve); `by_length` (per length the sparsity
        that `nvidia`, `ours` and the `histogram` predict of the number, without ours if it was refused,
        and `achieved`); and, if the candidate broke the budget, `affordable`: a sparsity that should keep it.
    """
    allowed = affordable(attempt, statistics, limits)
    found: dict[str, dict[str, Any]] = {}
    for phase, one in aims_of(fits).items():
        if one.refused is not None:
            continue
        curves = {"nvidia": fits[phase]["nvidia"], "ours": fits[phase]["model"]}
        by_curve = {
            name: _predicted(curve, one.scale_factor)
            for name, curve in curves.items()
            if not curve["refused"]
        }
        stated = ("a", "b", "r2", "r2_raw", "points", "sparsity_range")
        found[phase] = {
            "target": one.target,
            "asked": one.asked,
            "scale_factor": one.scale_factor,
            "achieved": attempt.sparsity[phase],
            "fit": {key: curves["nvidia"][key] for key in stated},
            "by_length": {
                str(length): {**by_curve, "histogram": row["target"], "achieved": row["achieved"]}
                for length, row in attempt.by_length[phase].items()
            },
        }
        if phase in allowed:
            found[phase]["affordable"] = allowed[phase]
    return found


def curves_of(fits: Mapping[Phase, Mapping[str, Any]]) -> dict[Phase, dict[str, Any]]:
    """Fits of which Model-Optimizer's curve is the one that a thresholds file states."""
    known = {part.name for part in fields(Curve)}
    return {
        phase: {"model": {key: value for key, value in fit["nvidia"].items() if key in known}}
        for phase, fit in fits.items()
    }


def with_target(
    thresholds: Thresholds,
    attempt: Attempt,
    found: Mapping[str, Mapping[str, Any]],
    dense: Mapping[str, Any],
) -> Thresholds:
    """The file that `emit` made of the candidate, with one number per phase in place of a list of layers.

    Args:
        thresholds: from `emit`.
        attempt: the candidate.
        found: from `attained`.
        dense: from `left_dense`; stated also if the candidate failed.
    """
    passed = thresholds.evidence["verdict"] == "passed"
    numbers = {phase: max(factors) * passed for phase, factors in attempt.served.items()}
    return thresholds.model_copy(
        update={
            "scale_factor": ScaleFactors(**numbers),
            "layers": (),
            "evidence": {**thresholds.evidence, **dense, "target_sparsity": rounded(found)},
        }
    )


def affordable(
    attempt: Attempt, statistics: Statistics, limits: Mapping[str, float]
) -> dict[Phase, float]:
    """Sparsity of each phase at which a candidate that broke its budget should meet it, by estimate.

    All its numbers are lowered by one factor until the dropped mass to the power of 1.5, summed over layers,
    has fallen as far as the upper bound must.

    Returns:
        Sparsity of the calibration prompts per phase; empty if the candidate met its budget, or broke one
        whose bound does not follow the loss alone.
    """
    over = {
        name: attempt.losses[name].upper / limit
        for name, limit in limits.items()
        if name in attempt.losses and attempt.losses[name].upper > limit
    }
    follows = all(math.isinf(LOSSES[name].most) for name in over)
    if not over or not follows or math.isinf(max(over.values())):
        return {}

    def lowered(octaves: float) -> Setting:
        return {
            phase: tuple(factor * 2.0**-octaves for factor in factors)
            for phase, factors in attempt.setting.items()
        }

    def cost(setting: Setting) -> float:
        return sum(
            float((statistics.dropped_mass(phase, factors) ** _POWER).sum())
            for phase, factors in setting.items()
        )

    allowed = cost(attempt.setting) / max(over.values())
    steps = (lowered(step / _PER_OCTAVE) for step in range(1, _OCTAVES * _PER_OCTAVE + 1))
    setting = next((one for one in steps if cost(one) <= allowed), None)
    if setting is None:
        return {}
    return {
        phase: statistics.sparsity(phase, factors)
        for phase, factors in setting.items()
        if any(factors)
    }


def _predicted(curve: Mapping[str, Any], scale_factor: float) -> float:
    """The sparsity at which a curve gives a scale factor, in [0, 1]."""
    share = (math.log(scale_factor) - math.log(curve["a"])) / curve["b"]
    return float(min(max(share, 0.0), 1.0))
