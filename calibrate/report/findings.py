"""Every number that the report and the notebooks show, taken from a run folder without loading the model.

Numbers keep six significant digits. A part that the run has not reached yet is None, so a stopped or failed
run can be looked at too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import TrialState

from calibrate.proof.validate import upper_bound
from calibrate.record.files import read_json
from calibrate.record.provenance import digest
from calibrate.schema import RunConfig
from calibrate.search.cost import load_curves
from calibrate.search.points import front, points
from calibrate.search.study import read_study
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import NEVER, edges
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
        `name`, `folder`, `verdict`, `budget`, `trials`, `pruned`, `front`, `heldout` (searched and uniform
        setting), `tasks`, `phases` (per phase: `scale_factor`, `sparsity` and so on) and `provenance`.

    Raises:
        UserError: the folder has no statistics, or a file in it is damaged.
    """
    statistics = Statistics.load(folder / "stats.safetensors")
    notes = _read(folder / "run.json") or {}
    # After more trials the old proof is still on disk, but it is not of this search.
    proven = "validation" in notes.get("seconds", {})
    validation = _read(folder / "validation.json") if proven else None
    thresholds = None
    if validation is not None and (folder / "thresholds.yaml").exists():
        thresholds = Thresholds.load(folder / "thresholds.yaml")
    attempt = validation["attempts"][-1] if validation and validation["attempts"] else None
    baseline = validation["baseline"] if validation else None
    fits = _read(folder / "fit.json") or {}
    rows = _read(folder / "sensitivity.json") or []
    outcomes = _outcomes(folder, attempt)
    phases = {
        phase: _phase(phase, statistics, config, attempt, outcomes)
        | {
            "fit": _rounded(fits[phase]["model"]) if phase in fits else None,
            "sensitivity": [_rounded(row) for row in rows if row["phase"] == phase],
            "by_length": {
                "searched": _rounded(attempt["by_length"][phase]) if attempt else None,
                "uniform": _rounded(baseline["by_length"][phase]) if baseline else None,
            },
            "speed": _speed(phase, statistics, config, attempt, thresholds),
        }
        for phase in config.target.phases
    }
    return {
        "name": notes.get("model", {}).get("name", config.model.path),
        "folder": folder.resolve().name,
        "verdict": _verdict(validation, thresholds),
        "budget": _rounded(config.budget.model_dump(mode="json")),
        "min_kv_len": {phase: config.target.min_kv_len[phase] for phase in config.target.phases},
        "geometry": config.geometry.model_dump(mode="json"),
        **_search(folder, config, attempt),
        "heldout": {"searched": _attempt(attempt), "uniform": _attempt(baseline)},
        "short_prompt": _rounded(validation["short_prompt"]) if validation else None,
        "tasks": _tasks(outcomes, config, attempt),
        "phases": phases,
        "provenance": {**notes, "config": config.model_dump(mode="json")},
    }


def _verdict(validation: Any, thresholds: Thresholds | None) -> dict[str, Any]:
    if validation is None or thresholds is None:
        return {"passed": None, "reason": "no setting has been proven on held-out prompts yet"}
    passed = thresholds.evidence.get("verdict") == "passed"
    reason = thresholds.evidence.get("reason")
    if not passed and reason is None:
        reason = "a short prompt did not come out dense"
    return {"passed": passed, "reason": reason}


def _attempt(attempt: Any) -> dict[str, Any] | None:
    """A candidate on the held-out prompts, as `validation.json` has it, without its setting."""
    if attempt is None:
        return None
    kept = ("name", "kl", "score_drop", "passed", "reason", "relative_time", "sparsity", "prompts")
    return {
        **{key: _rounded(attempt[key]) for key in kept},
        "speedup": _round(1 / attempt["relative_time"]),
    }


def _search(folder: Path, config: RunConfig, attempt: Any) -> dict[str, Any]:
    """Trials of the study, in the order they were made."""
    if config.search.storage is None and not (folder / "study.db").exists():
        return {"trials": [], "pruned": 0, "front": []}
    study = read_study(config, folder)
    trials: list[dict[str, Any]] = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        loss, time = trial.values
        trials.append(
            {
                "number": trial.number,
                "name": trial.user_attrs.get("name", "search"),
                "kl": _round(loss),
                "relative_time": _round(time),
                "speedup": _round(1 / time),
                "sparsity": _rounded(trial.user_attrs["sparsity"]),
                "chosen": attempt is not None
                and trial.user_attrs["setting"] == attempt["setting"]
                and not any(earlier["chosen"] for earlier in trials),
            }
        )
    best = [
        {"kl": _round(p.kl), "speedup": _round(1 / p.relative_time)} for p in front(points(study))
    ]
    pruned = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    return {"trials": trials, "pruned": pruned, "front": best}


def _phase(
    phase: Phase,
    statistics: Statistics,
    config: RunConfig,
    attempt: Any,
    outcomes: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Where tiles are skipped: at the chosen setting, and as a function of one scale factor."""
    heads = statistics.counts[phase].shape[1]
    found: dict[str, Any] = {"curve": _curve(phase, statistics, config), "scale_factor": None}
    if attempt is None:
        return found
    grid = torch.tensor(
        [_per_head(value, heads) for value in attempt["setting"][phase]], dtype=torch.float64
    )
    skipped = statistics.skipped(phase, grid)
    visited = statistics.visited(phase)
    return found | {
        "scale_factor": _rounded(grid.tolist()),
        "sparsity": _rounded((skipped.sum(2) / visited.sum(2).clamp_min(1)).tolist()),
        "layer_sparsity": _rounded(statistics.layer_sparsity(phase, grid).tolist()),
        "layer_dropped_mass": _rounded(statistics.dropped_mass(phase, grid).tolist()),
        "layer_heldout": _heldout_layers(phase, outcomes),
    }


def _curve(phase: Phase, statistics: Statistics, config: RunConfig) -> dict[str, Any]:
    """Sparsity and dropped mass at every bin edge that this phase may use, where the statistics are exact."""
    counts = statistics.counts[phase].sum(1).double()  # [layers, lengths, BINS]
    mass = statistics.mass[phase].sum((1, 2))  # [layers, BINS]
    below = counts[..., :NEVER].cumsum(-1)  # [layers, lengths, EDGES]
    visited = counts.sum(-1)
    rows = statistics.rows[phase].sum(1) * statistics.mass[phase].shape[1]
    dropped = mass[:, :NEVER].cumsum(-1) / rows.clamp_min(1)[:, None]
    total = below.sum((0, 1)) / visited.sum().clamp_min(1)
    grid = edges()
    allowed = (grid < config.target.min_kv_len[phase]) & (total >= 1e-4)
    length = below.sum(0) / visited.sum(0).clamp_min(1)[:, None]
    layer = below.sum(1) / visited.sum(1).clamp_min(1)[:, None]
    return {
        "scale_factor": _rounded(grid[allowed].tolist()),
        "sparsity": _rounded(total[allowed].tolist()),
        "dropped_mass": _rounded(dropped.mean(0)[allowed].tolist()),
        "lengths": statistics.lengths,
        "length_sparsity": _rounded(length[:, allowed].tolist()),
        "layer_sparsity": _rounded(layer[:, allowed].tolist()),
    }


def _heldout_layers(phase: Phase, outcomes: Sequence[dict[str, Any]]) -> list[float] | None:
    """Sparsity of each layer on the held-out prompts."""
    if not outcomes:
        return None
    visited = np.sum([row["visited"][phase] for row in outcomes], axis=0)
    skipped = np.sum([row["skipped"][phase] for row in outcomes], axis=0)
    return [_round(share) for share in (skipped / np.maximum(visited, 1)).tolist()]


def _outcomes(folder: Path, attempt: Any) -> list[dict[str, Any]]:
    """What every held-out prompt gave with the last candidate; the short prompt is no held-out prompt."""
    known = _read(folder / "heldout.json")
    if known is None or attempt is None:
        return []
    prefix = f"{digest(attempt['setting'])}:"
    return [row for key, row in known.items() if key.startswith(prefix) and row["task"] != "short"]


def _tasks(outcomes: Sequence[dict[str, Any]], config: RunConfig, attempt: Any) -> dict[str, Any]:
    """Loss of each task: mean, upper bound (as the validation computes it), and every prompt."""
    tasks: dict[str, Any] = {}
    for task in sorted({row["task"] for row in outcomes}):
        mine = [row for row in outcomes if row["task"] == task]
        tasks[task] = {
            "prompts": len(mine),
            "lengths": [row["length"] for row in mine],
            "kl": _task_bound([row["kl"] for row in mine], config, attempt),
            "score_drop": _task_bound(
                [row["dense_score"] - row["score"] for row in mine], config, attempt
            ),
            "dense_score": _round(float(np.mean([row["dense_score"] for row in mine]))),
        }
    return tasks


def _task_bound(values: Sequence[float], config: RunConfig, attempt: Any) -> dict[str, Any]:
    bound = upper_bound(values, attempt["kl"]["confidence"], config)
    # One prompt has no spread, and BCa has no answer for some tiny samples.
    known = len(values) > 1 and math.isfinite(bound.upper)
    return {
        "values": [_round(value) for value in values],
        "mean": _round(bound.mean),
        "upper": _round(bound.upper) if known else None,
        "confidence": _round(bound.confidence),
    }


def _speed(
    phase: Phase,
    statistics: Statistics,
    config: RunConfig,
    attempt: Any,
    thresholds: Thresholds | None,
) -> dict[str, Any] | None:
    """The measured kernel curve of the run's cost model, and the speed-up it predicts for the setting."""
    if thresholds is None:
        return None
    cost = load_curves(
        config.cost,
        max(config.prompts.lengths),
        thresholds.model.head_dim,
        config.geometry.prefill,
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
        found["law"] = {
            "skipped_tile_cost": _round(1 + float(slope)),
            "overhead": _round(float(start) - 1),
        }
    if attempt is not None:
        factors = attempt["setting"][phase]
        heads = statistics.counts[phase].shape[1]
        grid = torch.tensor([_per_head(value, heads) for value in factors], dtype=torch.float64)
        layers = statistics.layer_sparsity(phase, grid).tolist()
        relative = cost.relative_time(phase, layers, [bool(row.max() > 0) for row in grid])
        found["predicted"] = {
            "sparsity": _round(statistics.sparsity(phase, grid)),
            "speedup": _round(1 / relative),
        }
    return found


def _per_head(value: float | Sequence[float], heads: int) -> list[float]:
    return [value] * heads if isinstance(value, (int, float)) else list(value)


def _rounded(value: Any) -> Any:
    """`_round` through dictionaries and lists; keys become text, as in JSON."""
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return _round(value) if isinstance(value, float) else value


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _read(path: Path) -> Any:
    """A JSON file of the folder; None if the run has not written it."""
    return read_json(path, object) if path.exists() else None
