"""A run and an engine: projecting a run's result onto an engine, and measuring somebody's numbers in a run.

Both work in a run folder, with its model, prompts and dense outputs; what was measured once is on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrate.engines.catalogue import find_engine
from calibrate.errors import UserError, WorkFailed
from calibrate.loss import losses
from calibrate.loss.measure import Outcome, compare, compare_unguarded
from calibrate.model.config_json import identity_of
from calibrate.model.section import Setting, thresholds_for
from calibrate.pipeline import Progress, Silent, _Work
from calibrate.prompts.build import Prompt
from calibrate.proof.assess import Assessment, Evaluate, assess
from calibrate.proof.emit import emit
from calibrate.proof.project import Projection, describe, project, tiles_for
from calibrate.proof.verdict import Law
from calibrate.record import provenance
from calibrate.record.files import read_json
from calibrate.record.folder import claimed, locked, open_run
from calibrate.schema import GeometryConfig, RunConfig
from calibrate.search.study import points
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Geometry, MinKvLen, Phase
from skip_softmax.thresholds.yaml_file import write_text_atomically


def project_run(
    folder: str | os.PathLike[str],
    engine_name: str,
    *,
    gpu: str | None = None,
    phases: tuple[Phase, ...] | None = None,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Measures the nearest setting that an engine can express, at the engine's tiles.

    Args:
        folder: a finished run whose validation passed.
        engine_name: one of `ENGINES`.
        gpu: GPU family; None: one on which the run's tiles hold, else the engine's first.
        phases: phases to project; None: the run's.
        progress: who watches.

    Returns:
        The thresholds file `projected-<engine>.yaml`, and what the straight projection gave.

    Raises:
        UserError: the engine cannot run what was asked for, or the run has no result.
        WorkFailed: nothing that the engine can express holds.
    """
    engine = find_engine(engine_name)
    if engine.form == "native":
        raise UserError(
            "--engine must be an engine other than native, which needs no projection; use `calibrate export`"
        )
    path, config = open_run(folder)
    with locked(path):
        work = _Work(config, path, progress or Silent())
        work.require("validation")
        source = Thresholds.load(path / "thresholds.yaml")
        if source.evidence.get("verdict") != "passed":
            raise WorkFailed(
                f"`{path}`: its validation did not pass, so there is nothing to project; raise the budget"
            )
        chosen = tuple(phase for phase in config.target.phases if phases is None or phase in phases)
        if not chosen:
            raise UserError(f"--phase must be one of the run's: {', '.join(config.target.phases)}")
        if engine.joint and len(chosen) < len(PHASES):
            raise UserError(
                f"{engine.title} applies one number to both phases, but only {chosen[0]} is projected; leave "
                "--phase out, or calibrate both phases"
            )
        shape = source.model
        tiles = tiles_for(
            engine, gpu, source.geometry, chosen, shape.head_dim, shape.q_heads // shape.kv_heads
        )
        ours = _at(config, tiles, engine_name, chosen)
        winner: Setting = {
            phase: tuple(max(source.per_head(i, phase)) for i in range(shape.layers))
            for phase in chosen
        }
        found = _projected(work, ours, winner, engine_name)
        return _emitted(work, ours, found, source, engine_name)


def assess_file(
    thresholds: Thresholds,
    folder: str | os.PathLike[str],
    config: RunConfig | None = None,
    progress: Progress | None = None,
) -> tuple[Thresholds, Assessment]:
    """Measures a thresholds file on a run's model and held-out prompts.

    Args:
        thresholds: the numbers in question.
        folder: a run folder; need not be finished.
        config: for a folder that does not exist yet.
        progress: who watches.

    Returns:
        The thresholds with their new evidence, and what was measured.

    Raises:
        UserError: the file is for another model.
    """
    if config is None:
        config = open_run(folder)[1]
    with locked(Path(folder)) as path:
        config = claimed(path, config)
        work = _Work(config, path, progress or Silent())
        _require_same_model(thresholds, work)
        calibrated = _calibrated(path)
        heldout = work.prompts["heldout"]
        work.progress.stage("assess", len(heldout) * (1 if calibrated is None else 2), 0)
        result = assess(
            thresholds, calibrated, heldout, _evaluator(work), Law.of(config), config.budget
        )
    floors = {phase: getattr(thresholds.min_kv_len, phase) for phase in PHASES}
    if result.evidence["verdict"] == "passed" and "imported" in thresholds.evidence:
        shortest = min(config.prompts.lengths)
        floors = {phase: floor and max(floor, shortest) for phase, floor in floors.items()}
    limits = MinKvLen(**floors)
    return thresholds.model_copy(update={"evidence": result.evidence, "min_kv_len": limits}), result


def statistics_for(thresholds: Thresholds, folder: str | os.PathLike[str]) -> Statistics:
    """A run's tile statistics, if they are of this file's model and tiles.

    Raises:
        UserError: they are not.
    """
    path, _ = open_run(folder)
    statistics = Statistics.load(path / "stats.safetensors")
    tiles = thresholds.geometry.model_dump(mode="json", exclude={"order"})
    if (
        statistics.identity.get("model") != thresholds.model.sha256
        or statistics.identity.get("geometry") != tiles
    ):
        raise UserError(
            f"`{folder}` must be a run of the file's model at the file's tiles; leave --run out"
        )
    return statistics


def _at(config: RunConfig, tiles: Geometry, engine: str, phases: tuple[Phase, ...]) -> RunConfig:
    assert tiles.prefill is not None and tiles.decode is not None
    geometry = GeometryConfig(prefill=tiles.prefill, decode=tiles.decode)
    target = config.target.model_copy(update={"engine": engine, "phases": phases})
    return config.model_copy(update={"geometry": geometry, "target": target})


def _projected(work: _Work, ours: RunConfig, winner: Setting, engine: str) -> Projection:
    dense = work._dense
    once = _cached(work)

    def evaluate(setting: Setting, prompt: Prompt) -> Outcome:
        def measure() -> Outcome:
            return compare(
                work.loaded, thresholds_for(work.loaded, ours, setting), prompt, dense(prompt)
            )

        outcome = once([setting, ours.geometry.model_dump(mode="json")], prompt, measure)
        work.progress.step(f"{prompt.task}, {prompt.length} tokens: {losses.text(outcome.losses)}")
        return outcome

    search, heldout = work.prompts["search"], work.prompts["heldout"]
    work.progress.stage(f"project on {engine}", 2 * len(search) + len(heldout), 0)
    return project(
        winner,
        points(work.study),
        work.space,
        find_engine(engine),
        Law.of(ours),
        ours.validation.attempts,
        (search, heldout),
        evaluate,
    )


def _emitted(
    work: _Work, ours: RunConfig, found: Projection, source: Thresholds, engine: str
) -> tuple[Path, dict[str, Any]]:
    attempt = found.validation.attempts[-1]
    if not found.validation.passed:
        raise WorkFailed(
            f"nothing that {find_engine(engine).title} can express holds on the held-out prompts; the "
            "nearest "
            f"({describe(attempt.setting)}) fails: {attempt.reason}; raise the budget, or calibrate with "
            f"`--set target.engine={engine}`"
        )
    same_tiles = ours.geometry == work.config.geometry
    fits = (
        read_json(work.folder / "fit.json")
        if same_tiles
        else {
            phase: {"model": {"refused": "fitted at other tiles than the engine's", "points": 0}}
            for phase in ours.target.phases
        }
    )
    thresholds = emit(
        thresholds_for(work.loaded, ours, attempt.setting),
        found.validation,
        {phase: fits[phase] for phase in ours.target.phases},
        work.space.phase_times(attempt.setting),
        work.cost,
        ours.budget,
        provenance.of_results(ours, work.prompts) | identity_of(ours.model),
    )
    direct = {**describe(found.direct.setting), "holds": found.refused is None}
    if found.refused is not None:
        direct["refused"] = found.refused
    report = {
        "engine": engine,
        "direct": direct,
        "used": describe(attempt.setting),
        "of": provenance.digest(source.model_dump(mode="json")),
        "predicted_speedup_before": source.evidence.get("predicted_speedup", {}).get("weighted"),
        "predicted_speedup": thresholds.evidence["predicted_speedup"]["weighted"],
    }
    thresholds = thresholds.model_copy(
        update={"evidence": {**thresholds.evidence, "projection": report}}
    )
    target = work.folder / f"projected-{engine}.yaml"
    thresholds.save(target)
    return target, report


def _require_same_model(thresholds: Thresholds, work: _Work) -> None:
    loaded = work.loaded
    if thresholds.model.sha256 != loaded.sha256:
        raise UserError(
            f"the file must be for the run's model, but it is for {thresholds.model.name} "
            f"({thresholds.model.sha256[:12]}) and the run has {loaded.name} ({loaded.sha256[:12]}); "
            "`calibrate import` puts somebody's numbers into a file for your model"
        )


def _calibrated(folder: Path) -> Thresholds | None:
    """The run's own result, if it has one that passed."""
    file = folder / "thresholds.yaml"
    if not file.exists():
        return None
    thresholds = Thresholds.load(file)
    return thresholds if thresholds.evidence.get("verdict") == "passed" else None


def _evaluator(work: _Work) -> Evaluate:
    once = _cached(work)

    def evaluate(thresholds: Thresholds, prompt: Prompt, above_one: bool) -> Outcome:
        parts = {"scale_factor", "layers", "geometry", "min_kv_len"}
        key = [thresholds.model_dump(mode="json", include=parts), above_one]
        measure = compare_unguarded if above_one else compare
        outcome = once(
            key, prompt, lambda: measure(work.loaded, thresholds, prompt, work._dense(prompt))
        )
        work.progress.step(f"{prompt.task}, {prompt.length} tokens: {losses.text(outcome.losses)}")
        return outcome

    return evaluate


def _cached(work: _Work) -> Callable[[Any, Prompt, Callable[[], Outcome]], Outcome]:
    """Measures once per setting and prompt, across processes."""
    path = work.folder / "served.json"

    def once(setting: Any, prompt: Prompt, measure: Callable[[], Outcome]) -> Outcome:
        known: dict[str, Any] = read_json(path) if path.exists() else {}
        key = f"{provenance.digest(setting)}:{prompt.key}"
        if key not in known:
            known[key] = asdict(measure())
            write_text_atomically(path, json.dumps(known))
        return Outcome.from_row(known[key])

    return once
