"""Every number that the report and the notebooks show, read from a run folder without loading the model.

Numbers keep six significant digits. A part that the run has not reached yet is None, so that a stopped or
failed run can be looked at too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState
from pydantic import TypeAdapter, ValidationError

from calibrate.errors import UserError
from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome, by_loss
from calibrate.proof.bounds import FREEDOM
from calibrate.proof.validate import Attempt, Validation
from calibrate.proof.verdict import Bound, Law, upper_bound
from calibrate.record.files import as_written, read_json
from calibrate.record.measured import Measured
from calibrate.schema import RunConfig
from calibrate.search.cost import load_curves
from calibrate.search.owner import owner_of
from calibrate.search.points import dense_where_idle, front
from calibrate.search.study import points, read_study, stopped
from calibrate.statistics.counts import Statistics
from calibrate.terminal import argument
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import Phase

Findings = dict[str, Any]
"""Plain data, the shape of the report's JSON block; `findings` says what is in it."""


def findings(folder: Path, config: RunConfig) -> Findings:
    """Reads a run folder.

    Args:
        folder: the run folder; it needs at least its statistics.
        config: the run's config.

    Returns:
        `name`, `folder`, `verdict`, `budget`, `dense`, `layers_dense` (what is left dense, as in the evidence
        of the thresholds file), `target_sparsity` (from there too; empty without a target), `trials`,
        `pruned`, `stopped` (why the search ended before its last trial, or None), `front`, `heldout` (all
        candidates, the chosen one, and one number per phase), `loss_model` (its errors on trials), `tasks`,
        `phases` (per phase: `scale_factor`, `sparsity` and so on) and `provenance`. `losses` has every loss
        that was measured, by its name in `LOSSES`; the `loss` of a layer that skips alone is `FINEST`.

    Raises:
        UserError: the folder has no statistics, or a file in it is damaged.
    """
    statistics = Statistics.load(folder / "stats.safetensors")
    notes = _read(folder / "run.json") or {}
    with as_written(folder / "run.json"):
        name = notes.get("model", {}).get("name", config.model.path)
        # After more trials the old proof is still on disk, but it is not of this search.
        proven = "validation" in notes.get("seconds", {})
    validation = _validation(folder / "validation.json", statistics, config) if proven else None
    thresholds = None
    if validation is not None and (folder / "thresholds.yaml").exists():
        thresholds = Thresholds.load(folder / "thresholds.yaml")
    attempt = validation.chosen if validation else None
    baseline = validation.baseline if validation else None
    with as_written(folder / "heldout.jsonl"):
        outcomes = _outcomes(folder, attempt)
        tasks = _tasks(outcomes, config, attempt)
        layers = {phase: _heldout_layers(phase, outcomes) for phase in config.target.phases}
    with as_written(folder / "fit.json"):
        fits = {phase: fit["model"] for phase, fit in (_read(folder / "fit.json") or {}).items()}
    rows = _sensitivity(folder / "sensitivity.json")
    phases = {
        phase: _phase(phase, statistics, config, attempt)
        | {
            "layer_heldout": layers[phase],
            "fit": _rounded(fits.get(phase)),
            "sensitivity": [row for row in rows if row["phase"] == phase],
            "by_length": {
                "searched": _rounded(attempt.by_length[phase]) if attempt else None,
                "uniform": _rounded(baseline.by_length[phase]) if baseline else None,
            },
            "speed": _speed(phase, statistics, config, attempt, thresholds),
        }
        for phase in config.target.phases
    }
    return {
        "name": name,
        "folder": folder.resolve().name,
        "verdict": _verdict(validation, thresholds),
        "budget": _budget(config),
        **_stated(thresholds),
        "min_kv_len": {phase: config.target.min_kv_len[phase] for phase in config.target.phases},
        "geometry": config.geometry.model_dump(mode="json"),
        **_search(folder, config, attempt),
        "heldout": {
            "attempts": [_attempt(candidate) for candidate in validation.attempts]
            if validation
            else [],
            "searched": _attempt(attempt),
            "uniform": _attempt(baseline),
        },
        "short_prompt": _rounded(validation.short_prompt) if validation else None,
        "loss_model": _loss_model(folder / "loss_model.json"),
        "tasks": tasks,
        "phases": phases,
        "provenance": {**notes, "config": config.model_dump(mode="json")},
    }


def six(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def percent(share: float) -> float:
    """Percent of a share, to six significant digits."""
    return six(100 * share)


def _validation(path: Path, statistics: Statistics, config: RunConfig) -> Validation | None:
    """What the validation measured; None if it is missing.

    Raises:
        UserError: the file does not hold what a validation writes, for example after an edit by hand.
    """
    if not path.exists():
        return None
    cure = f"write it again with `calibrate validate {argument(path.parent)}`"
    try:
        validation = TypeAdapter(Validation).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        # In the file each loss stands under its own name.
        key = ".".join(str(part) for part in first["loc"] if part != "losses") or "the file"
        raise UserError(
            f"`{path}`: {key}: {first['msg']}, but got {first['input']!r}; {cure}"
        ) from None
    for attempt in (*validation.attempts, *([validation.baseline] if validation.baseline else [])):
        for phase in config.target.phases:
            layers = statistics.counts[phase].shape[0]
            for key, lacking in (
                ("setting", len(attempt.setting.get(phase, ())) != layers),
                ("sparsity", phase not in attempt.sparsity),
                ("by_length", phase not in attempt.by_length),
            ):
                if lacking:
                    raise UserError(
                        f"`{path}`: {key} must have {phase}, of {layers} layers, but got "
                        f"{getattr(attempt, key).get(phase)!r}; {cure}"
                    )
    return validation


def _verdict(validation: Validation | None, thresholds: Thresholds | None) -> dict[str, Any]:
    if validation is None or thresholds is None:
        return {"passed": None, "reason": "no setting has been proven on held-out prompts yet"}
    passed = thresholds.evidence.get("verdict") == "passed"
    reason = thresholds.evidence.get("reason")
    if not passed and reason is None:
        reason = "a short prompt did not come out dense"
    return {"passed": passed, "reason": reason}


def _stated(thresholds: Thresholds | None) -> dict[str, Any]:
    """What is left dense, with the reasons, and what came of a target; earlier versions state none."""
    evidence = {} if thresholds is None else thresholds.evidence
    keys = ("dense", "layers_dense", "target_sparsity")
    return {key: _rounded(evidence.get(key, {})) for key in keys}


def _budget(config: RunConfig) -> dict[str, Any]:
    """The limit of each loss that has one, and the confidence at which it must be met."""
    return {
        "losses": _rounded(config.budget.limits),
        "confidence": six(config.budget.confidence),
    }


def _attempt(attempt: Attempt | None) -> dict[str, Any] | None:
    """A candidate on the held-out prompts, without its setting."""
    if attempt is None:
        return None
    return {
        "name": attempt.name,
        "losses": {name: _bound(bound) for name, bound in attempt.losses.items()},
        "confidence": six(attempt.losses[FINEST].confidence),
        "passed": attempt.passed,
        "reason": attempt.reason,
        "relative_time": six(attempt.relative_time),
        "speedup": six(1 / attempt.relative_time),
        "sparsity": _rounded(attempt.sparsity),
        "prompts": attempt.prompts,
        "failing": _rounded(asdict(attempt.failing)) if attempt.failing else None,
    }


def _bound(bound: Bound) -> dict[str, Any]:
    # Too few prompts have no bound.
    upper = six(bound.upper) if math.isfinite(bound.upper) else None
    confidence = six(bound.confidence)
    return {
        "mean": six(bound.mean),
        "upper": upper,
        "confidence": confidence,
        "prompts": bound.prompts,
    }


def _search(folder: Path, config: RunConfig, attempt: Attempt | None) -> dict[str, Any]:
    """Trials of the study, in the order they were made."""
    own = config.search.storage is None
    if config.target.targets or (own and not (folder / "study.db").exists()):
        return {"trials": [], "pruned": 0, "front": [], "stopped": None}
    study = read_study(config.search, folder, owner_of(folder, config))
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finished = points(study)
    # What was proven is dense where the trial skipped nothing.
    chosen = [
        attempt is not None
        and attempt.setting in (point.setting, dense_where_idle(point.setting, point.sparsity))
        for point in finished
    ]
    trials = [
        {
            "number": trial.number,
            "name": point.name,
            "losses": _rounded(point.losses),
            "relative_time": six(point.relative_time),
            "speedup": six(1 / point.relative_time),
            "sparsity": _rounded(point.sparsity),
            "chosen": True in chosen and index == chosen.index(True),
        }
        for index, (trial, point) in enumerate(zip(complete, finished, strict=True))
    ]
    best = [
        {"losses": _rounded(point.losses), "speedup": six(1 / point.relative_time)}
        for point in front(finished, config.budget.limits)
    ]
    pruned = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    ended = stopped(study, config.search.trials)
    return {
        "trials": trials,
        "pruned": pruned,
        "front": best,
        "stopped": None if ended is None else ended.text,
    }


def _phase(
    phase: Phase, statistics: Statistics, config: RunConfig, attempt: Attempt | None
) -> dict[str, Any]:
    """Where tiles are skipped: at the chosen setting, and as a function of one scale factor."""
    found: dict[str, Any] = {"curve": _curve(phase, statistics, config), "scale_factor": None}
    if attempt is None:
        return found
    layers = attempt.served[phase]
    heads = statistics.counts[phase].shape[1]
    skipped, visited = statistics.skipped(phase, layers), statistics.visited(phase)
    return found | {
        "scale_factor": _rounded([[factor] * heads for factor in layers]),
        "sparsity": _rounded((skipped.sum(2) / visited.sum(2).clamp_min(1)).tolist()),
        "layer_sparsity": _rounded(statistics.layer_sparsity(phase, layers).tolist()),
        "layer_dropped_mass": _rounded(statistics.dropped_mass(phase, layers).tolist()),
    }


def _curve(phase: Phase, statistics: Statistics, config: RunConfig) -> dict[str, Any]:
    """Sparsity and dropped mass at every bin edge that this phase may use, where the statistics are exact."""
    at = statistics.at_edges(phase)
    below = at.skipped.sum(1).double()  # [layers, lengths, EDGES]
    visited = statistics.visited(phase).sum(1)  # [layers, lengths]
    total = below.sum((0, 1)) / visited.sum().clamp_min(1)
    allowed = (at.scale_factor < config.target.min_kv_len[phase]) & (total >= 1e-4)
    length = below.sum(0) / visited.sum(0).clamp_min(1)[:, None]
    layer = below.sum(1) / visited.sum(1).clamp_min(1)[:, None]
    return {
        "scale_factor": _rounded(at.scale_factor[allowed].tolist()),
        "sparsity": _rounded(total[allowed].tolist()),
        "dropped_mass": _rounded(at.dropped_mass.mean(0)[allowed].tolist()),
        "lengths": statistics.lengths,
        "length_sparsity": _rounded(length[:, allowed].tolist()),
        "layer_sparsity": _rounded(layer[:, allowed].tolist()),
    }


def _sensitivity(path: Path) -> list[dict[str, Any]]:
    """Layers that were measured alone."""
    with as_written(path):
        return [
            {"loss" if key == FINEST else key: _rounded(value) for key, value in row.items()}
            for row in _read(path) or []
        ]


def _loss_model(path: Path) -> dict[str, Any] | None:
    """How well the loss model predicts trials; None if the run has none, or fewer than four."""
    with as_written(path):
        model = _read(path)
        if model is None or model["errors"]["layers"] is None:
            return None
        errors = {name: dict(model["errors"][name]) for name in ("layers", "corrected")}
        return dict(_rounded({"settings": model["settings"], "errors": errors}))


def _heldout_layers(phase: Phase, outcomes: Sequence[Outcome]) -> list[float] | None:
    """Sparsity of each layer on the held-out prompts."""
    if not outcomes:
        return None
    visited = np.sum([outcome.visited[phase] for outcome in outcomes], axis=0)
    skipped = np.sum([outcome.skipped[phase] for outcome in outcomes], axis=0)
    return [six(share) for share in (skipped / np.maximum(visited, 1)).tolist()]


def _outcomes(folder: Path, attempt: Attempt | None) -> list[Outcome]:
    """What every held-out prompt gave with the last candidate; the short prompt is not one of them."""
    if attempt is None:
        return []
    rows = Measured(folder / "heldout.jsonl").of(attempt.setting)
    outcomes = map(Outcome.from_row, rows)
    return [outcome for outcome in outcomes if outcome.task != "short"]


def _tasks(
    outcomes: Sequence[Outcome], config: RunConfig, attempt: Attempt | None
) -> dict[str, Any]:
    """Losses of each task: mean, upper bound (as the validation computes it), and every prompt."""
    tasks: dict[str, Any] = {}
    if attempt is None:
        return tasks
    law = replace(Law.of(config), confidence=attempt.losses[FINEST].confidence)
    for task in sorted({outcome.task for outcome in outcomes}):
        mine = [outcome for outcome in outcomes if outcome.task == task]
        tasks[task] = {
            "prompts": len(mine),
            "lengths": [outcome.length for outcome in mine],
            "losses": {name: _task_bound(name, mine, law) for name in by_loss(mine)},
            "dense_score": six(float(np.mean([outcome.dense_score for outcome in mine]))),
            "dense_generated": _mean_of([outcome.dense_generated for outcome in mine]),
        }
    return tasks


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return six(float(np.mean(known))) if known else None


def _task_bound(name: str, outcomes: Sequence[Outcome], law: Law) -> dict[str, Any]:
    values = by_loss(outcomes)[name]
    bound = _bound(upper_bound(name, outcomes, law))
    if len(values) < FREEDOM:  # too few to know the task's spread from
        bound["upper"] = None
    return {"values": [*map(six, values)], **bound}


def _speed(
    phase: Phase,
    statistics: Statistics,
    config: RunConfig,
    attempt: Attempt | None,
    thresholds: Thresholds | None,
) -> dict[str, Any] | None:
    """The measured kernel curve of the run's cost model, and the speed-up it predicts for the setting."""
    if thresholds is None:
        return None
    cost = load_curves(
        config.cost, max(config.prompts.lengths), thresholds.model.head_dim, config.geometry
    )
    curve = cost.curves[phase]
    share, time = np.asarray(curve.sparsity), np.asarray(curve.relative_time)
    found: dict[str, Any] = {
        "device": config.cost.device,
        "kv_len": curve.kv_len,
        "measured": {
            "sparsity": _rounded(share.tolist()),
            "speedup": _rounded((1 / time).tolist()),
        },
        "law": None,
        "predicted": None,
    }
    if len(share) > 2:
        # time = 1 + overhead - sparsity * (1 - K/D): K and D are the times of a skipped and a kept tile.
        slope, start = np.polyfit(share, time, 1)
        found["law"] = {"skipped_tile_cost": six(1 + slope), "overhead": six(start - 1)}
    if attempt is not None:
        factors = attempt.served[phase]
        layers = statistics.layer_sparsity(phase, factors).tolist()
        relative = cost.relative_time(phase, layers, [factor > 0 for factor in factors])
        found["predicted"] = {
            "sparsity": six(statistics.sparsity(phase, factors)),
            "speedup": six(1 / relative),
        }
    return found


def _rounded(value: Any) -> Any:
    """`six` through dictionaries and lists; keys become text, as in JSON."""
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return six(value) if isinstance(value, float) else value


def _read(path: Path) -> Any:
    """A JSON file of the folder; None if the run has not written it."""
    return read_json(path, object) if path.exists() else None
