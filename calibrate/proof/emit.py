"""The thresholds file of a run, with its evidence; every layer is dense unless the validation passed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from calibrate.loss.losses import LOSSES
from calibrate.proof.validate import Attempt, Validation
from calibrate.schema import BudgetConfig
from calibrate.search.cost import Cost
from calibrate.statistics.counts import Statistics
from calibrate.statistics.fit import local_curve, trusted
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import LayerOverride, Phase, ScaleFactors

_OF_LENGTHS = ("kv_len_range", "length_exponent")  # what a fit says beyond its curve


def emit(
    template: Thresholds,
    validation: Validation,
    fits: dict[Phase, dict[str, Any]],
    times: dict[Phase, float],
    cost: Cost,
    budget: BudgetConfig,
    provenance: dict[str, Any],
    dense: Mapping[str, Any],
) -> Thresholds:
    """Builds the file.

    Every layer is listed with its own number. The model-wide numbers are the best single scale
    factors that met the budget on the held-out prompts too; they are 0 when none did.

    Args:
        template: the model, geometry and limits, as they were measured.
        validation: the proof.
        fits: `fit.fit_phase` of each phase.
        times: predicted attention time per phase relative to dense, of the winner.
        cost: where predicted times come from.
        budget: what the winner had to meet.
        provenance: versions, seeds and hashes; nothing that differs between two equal runs.
        dense: what the winner leaves dense, of `left_dense`.

    Returns:
        Thresholds with the validated setting, or with 0 everywhere.
    """
    winner = validation.chosen if validation.passed else None
    baseline = (
        validation.baseline
        if validation.baseline is not None and validation.baseline.passed
        else None
    )
    uniform = {phase: max(baseline.served[phase]) if baseline and winner else 0.0 for phase in fits}
    layers = (
        tuple(
            LayerOverride(
                layer=index, **{phase: factors[index] for phase, factors in winner.served.items()}
            )
            for index in range(template.model.layers)
        )
        if winner
        else ()
    )
    return template.model_copy(
        update={
            "scale_factor": ScaleFactors(**uniform),
            "layers": layers,
            "fit": {
                phase: _curve(fit["model"], dense.get("dense", {}).get(phase))
                for phase, fit in fits.items()
            },
            "evidence": _evidence(validation, times, cost, budget, dense),
            "provenance": provenance,
        }
    )


def with_slopes(
    thresholds: Thresholds, validation: Validation, statistics: Statistics
) -> Thresholds:
    """The file, with each phase's curve as it is at the number that an engine would be given.

    Args:
        thresholds: from `emit`.
        validation: the proof.
        statistics: histograms at the file's tiles.

    Returns:
        The file; a phase without such a number keeps its curve.
    """
    fit = dict(thresholds.fit)
    for phase, factors in _one_number(validation).items():
        local = local_curve(statistics, phase, factors, _largest(thresholds, phase))
        if local is not None:
            spans = {key: fit[phase][key] for key in _OF_LENGTHS if key in fit.get(phase, {})}
            fit[phase] = {key: rounded(value) for key, value in (local | spans).items()}
    return thresholds.model_copy(update={"fit": fit})


def with_trust(
    thresholds: Thresholds, validation: Validation, statistics: Statistics
) -> Thresholds:
    """The file, with how far each phase's own curve can be trusted; arguments as of `with_slopes`."""
    fit = dict(thresholds.fit)
    for phase, factors in _one_number(validation).items():
        if "a" in fit.get(phase, {}):
            curve = fit[phase]
            largest = _largest(thresholds, phase)
            found = trusted(statistics, phase, factors, largest, curve["a"], curve["b"])
            fit[phase] = curve | {key: rounded(value) for key, value in found.items()}
    return thresholds.model_copy(update={"fit": fit})


def _one_number(validation: Validation) -> dict[Phase, tuple[float, ...]]:
    """What engines with one number per phase would get: the winner's setting, else the best of that kind."""
    for attempt in (validation.chosen, validation.baseline):
        if not validation.passed or attempt is None or not attempt.passed:
            continue
        if all(len(set(factors) - {0.0}) <= 1 for factors in attempt.served.values()):
            return {phase: factors for phase, factors in attempt.served.items() if any(factors)}
    return {}


def _largest(thresholds: Thresholds, phase: Phase) -> float:
    floor: int | None = getattr(thresholds.min_kv_len, phase)
    return math.inf if floor is None else float(floor)


def _evidence(
    validation: Validation,
    times: dict[Phase, float],
    cost: Cost,
    budget: BudgetConfig,
    dense: Mapping[str, Any],
) -> dict[str, Any]:
    evidence: dict[str, Any] = {
        "verdict": "passed" if validation.passed else "failed",
        "budget": budget.model_dump(mode="json", exclude_none=True),
    }
    chosen = validation.chosen
    if chosen is not None:
        if chosen.reason is not None:
            evidence["reason"] = chosen.reason
        evidence |= {
            "loss": _loss(chosen),
            "sparsity": _sparsity(chosen),
            "attempts": len(validation.attempts),
        }
        if validation.passed:
            evidence["claim"] = _claim(chosen, budget)
        if chosen.failing is not None:
            evidence["failing_prompts"] = rounded(asdict(chosen.failing))
    if chosen is not None and validation.passed:
        evidence["predicted_speedup"] = {
            **{phase: round(1 / time, 3) for phase, time in times.items()},
            "weighted": round(1 / chosen.relative_time, 3),
            "source": cost.source,
        }
        evidence |= dense
    if validation.baseline is not None:
        evidence["uniform_baseline"] = {
            "loss": _loss(validation.baseline),
            "sparsity": _sparsity(validation.baseline),
            "scale_factor": {p: max(f) for p, f in validation.baseline.served.items()},
            "predicted_speedup": round(1 / validation.baseline.relative_time, 3),
        }
    if validation.short_prompt is not None:
        evidence["short_prompt"] = validation.short_prompt
    return evidence


def _claim(attempt: Attempt, budget: BudgetConfig) -> str:
    """What was proven, in a sentence."""
    bounds = (
        f"a mean {LOSSES[name].title} of at most {LOSSES[name].text(attempt.losses[name].upper)} "
        f"{LOSSES[name].unit}"
        for name in budget.limits
    )
    return (
        f"with {100 * budget.confidence:g} % confidence, over prompts like the {attempt.prompts} held-out "
        f"ones on which it was run: {' and '.join(bounds)}"
    )


def _loss(attempt: Attempt) -> dict[str, Any]:
    return {
        **{name: rounded(asdict(bound)) for name, bound in attempt.losses.items()},
        "heldout_prompts": attempt.prompts,
        "by_task": rounded(attempt.by_task),
    }


def _sparsity(attempt: Attempt) -> dict[str, Any]:
    return {
        phase: {
            "achieved": rounded(share),
            "by_length": {
                str(length): rounded(row) for length, row in attempt.by_length[phase].items()
            },
        }
        for phase, share in attempt.sparsity.items()
    }


def _curve(curve: dict[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Any]:
    """A refused curve keeps its reason but not its numbers, so that nobody uses them by mistake."""
    refused = curve["refused"]
    if refused is None and dense is not None:
        refused = f"the phase is left dense: {dense['reason']}"
    if refused is not None:
        return {"refused": refused, "points": curve["points"]}
    return {key: rounded(value) for key, value in curve.items() if value is not None}


def rounded(value: Any) -> Any:
    """Five significant digits, through mappings and lists; what is None in a mapping is left out."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
