"""The thresholds file of a run, with its evidence; dense unless the validation passed."""

from __future__ import annotations

from typing import Any

from calibrate.proof.validate import Attempt, Bound, Validation
from calibrate.schema import RunConfig
from calibrate.search.cost import Cost
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import LayerOverride, Phase, ScaleFactors


def emit(
    template: Thresholds,
    validation: Validation,
    fits: dict[Phase, dict[str, Any]],
    times: dict[Phase, float],
    cost: Cost,
    config: RunConfig,
    provenance: dict[str, Any],
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
        config: the run config.
        provenance: versions, seeds and hashes; nothing that differs between two equal runs.

    Returns:
        Thresholds that hold the validated setting, or 0 everywhere.
    """
    winner = validation.attempts[-1] if validation.passed else None
    baseline = (
        validation.baseline
        if validation.baseline is not None and validation.baseline.passed
        else None
    )
    uniform = {
        phase: max(baseline.setting[phase]) if baseline and winner else 0.0
        for phase in config.target.phases
    }
    layers = (
        tuple(
            LayerOverride(
                layer=index, **{phase: factors[index] for phase, factors in winner.setting.items()}
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
            "fit": {phase: _curve(fit["model"]) for phase, fit in fits.items()},
            "evidence": _evidence(validation, times, cost, config),
            "provenance": provenance,
        }
    )


def _evidence(
    validation: Validation, times: dict[Phase, float], cost: Cost, config: RunConfig
) -> dict[str, Any]:
    evidence: dict[str, Any] = {
        "verdict": "passed" if validation.passed else "failed",
        "budget": config.budget.model_dump(mode="json", exclude_none=True),
    }
    if validation.attempts:
        last = validation.attempts[-1]
        if last.reason is not None:
            evidence["reason"] = last.reason
        evidence |= {
            "loss": _loss(last),
            "sparsity": _sparsity(last),
            "attempts": len(validation.attempts),
        }
    if validation.passed:
        weighted = validation.attempts[-1].relative_time
        evidence["predicted_speedup"] = {
            **{phase: round(1 / time, 3) for phase, time in times.items()},
            "weighted": round(1 / weighted, 3),
            "source": cost.source,
        }
    if validation.baseline is not None:
        evidence["uniform_baseline"] = {
            "loss": _loss(validation.baseline),
            "sparsity": _sparsity(validation.baseline),
            "scale_factor": {p: max(f) for p, f in validation.baseline.setting.items()},
            "predicted_speedup": round(1 / validation.baseline.relative_time, 3),
        }
    if validation.short_prompt is not None:
        evidence["short_prompt"] = validation.short_prompt
    return evidence


def _loss(attempt: Attempt) -> dict[str, Any]:
    return {
        "kl": _bound(attempt.kl),
        "score_drop": _bound(attempt.score_drop),
        "heldout_prompts": attempt.prompts,
        "by_task": {
            task: {k: _round(v) for k, v in row.items()} for task, row in attempt.by_task.items()
        },
    }


def _sparsity(attempt: Attempt) -> dict[str, Any]:
    return {
        phase: {
            "achieved": _round(share),
            "by_length": {
                str(length): {k: _round(v) for k, v in row.items()}
                for length, row in attempt.by_length[phase].items()
            },
        }
        for phase, share in attempt.sparsity.items()
    }


def _curve(curve: dict[str, Any]) -> dict[str, Any]:
    """A refused curve keeps its reason but not its numbers: nobody can use them by mistake."""
    if curve["refused"] is not None:
        return {"refused": curve["refused"], "points": curve["points"]}
    kept = {key: value for key, value in curve.items() if value is not None}
    return {
        key: [_round(v) for v in value] if isinstance(value, (list, tuple)) else _round(value)
        for key, value in kept.items()
    }


def _bound(bound: Bound) -> dict[str, float]:
    return {
        "mean": _round(bound.mean),
        "upper": _round(bound.upper),
        "confidence": _round(bound.confidence),
    }


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
