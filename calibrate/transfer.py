"""Numbers between a run and an engine: a result projected onto an engine, foreign numbers measured in a run.

Both use the run's model, prompts and dense outputs; what was measured once is on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibrate.engines.catalogue import as_run, find_engine, find_kv_dtype
from calibrate.errors import UserError, WorkFailed
from calibrate.loss.measure import Outcome
from calibrate.model.section import Setting, thresholds_for
from calibrate.pipeline import Stages
from calibrate.prompts.build import Prompt
from calibrate.proof.assess import Assessment, Evaluate, assess
from calibrate.proof.dense import reach
from calibrate.proof.emit import emit, with_slopes
from calibrate.proof.project import Projection, describe, project, tiles_for
from calibrate.proof.validate import Attempt
from calibrate.proof.verdict import Law
from calibrate.record import provenance
from calibrate.record.files import read_json
from calibrate.schema import GeometryConfig, RunConfig
from calibrate.search.study import points
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Geometry, MinKvLen, Phase


def project_run(
    run: Stages,
    engine_name: str,
    gpu: str | None = None,
    phases: tuple[Phase, ...] | None = None,
    kv_dtype: str | None = None,
) -> Path:
    """Measures the nearest setting that an engine can express, at the engine's tiles.

    Args:
        run: a finished run whose validation passed.
        engine_name: one of `ENGINES`.
        gpu: GPU family; None: one on which the run's tiles are right, else the engine's first.
        phases: phases to project; None: those of the run in which the engine can skip.
        kv_dtype: type of the engine's KV cache; None: a 16-bit one.

    Returns:
        The thresholds file `projected-<engine>.yaml`; its evidence has what the straight projection gave.

    Raises:
        UserError: the engine cannot run what was asked for, or the run has no result.
        WorkFailed: nothing that the engine can express stays within the budget.
    """
    engine = as_run(find_engine(engine_name), find_kv_dtype(kv_dtype), None)
    if engine.form == "native":
        raise UserError(
            "--engine must be an engine other than native, which needs no projection; use `calibrate export`"
        )
    run.notes.require("validation")
    source = Thresholds.load(run.folder / "thresholds.yaml")
    if source.evidence.get("verdict") != "passed":
        raise WorkFailed(
            f"`{run.folder}`: its validation did not pass, so there is nothing to project; raise the budget"
        )
    ran = run.config.target.phases
    chosen = tuple(phase for phase in ran if phase in (phases or engine.numbers))
    if not chosen:
        raise UserError(
            f"--phase must be one of the run's: {', '.join(ran)}"
            if phases
            else f"{engine.title} skips in {' and '.join(engine.numbers)} only, but the run's phases are "
            f"{', '.join(ran)}; use another engine"
        )
    shape = source.model
    winner: Setting = {
        phase: tuple(max(source.per_head(i, phase)) for i in range(shape.layers))
        for phase in chosen
    }
    skipping = tuple(phase for phase in chosen if any(winner[phase]))
    if not skipping:
        raise UserError(
            f"--phase must name a phase that skips, but the run leaves {' and '.join(chosen)} dense; choose "
            "another one, or leave --phase out"
        )
    tiles = tiles_for(
        engine, gpu, source.geometry, skipping, shape.head_dim, shape.q_heads // shape.kv_heads,
        shape.latent,
    )  # fmt: skip
    ours = _at(run.config, tiles, engine_name, chosen)
    refused = ours.target.first_chunks(ours.geometry.prefill.chunk, ours.target.engine)
    if refused is not None:
        raise UserError(refused)
    found = _projected(run, ours, winner, engine_name)
    return _emitted(run, ours, found, source, engine_name)


def assess_thresholds(run: Stages, thresholds: Thresholds) -> tuple[Thresholds, Assessment]:
    """Measures thresholds on a run's model and held-out prompts.

    Args:
        run: a run; need not be finished.
        thresholds: the numbers in question.

    Returns:
        The thresholds with their new evidence, and what was measured.

    Raises:
        UserError: the thresholds are for another model.
    """
    _require_same_model(thresholds, run)
    calibrated = _calibrated(run.folder)
    heldout = run.prompts["heldout"]
    run.progress.stage("assess", len(heldout) * (1 if calibrated is None else 2), 0)
    result = assess(thresholds, calibrated, heldout, _evaluator(run), Law.of(run.config))
    floors = {phase: getattr(thresholds.min_kv_len, phase) for phase in PHASES}
    if result.evidence["verdict"] == "passed" and "imported" in thresholds.evidence:
        shortest = min(run.config.prompts.lengths)
        floors = {phase: floor and max(floor, shortest) for phase, floor in floors.items()}
    limits = MinKvLen(**floors)
    return thresholds.model_copy(update={"evidence": result.evidence, "min_kv_len": limits}), result


def statistics_for(run: Stages, thresholds: Thresholds) -> Statistics:
    """A run's tile statistics, if they are of these thresholds' model and tiles.

    Raises:
        UserError: they are not.
    """
    statistics = Statistics.load(run.folder / "stats.safetensors")
    tiles = thresholds.geometry.model_dump(mode="json", exclude={"order"})
    if (
        statistics.identity.get("model") != thresholds.model.sha256
        or statistics.identity.get("geometry") != tiles
        or statistics.identity.get("kv_cache_dtype") != thresholds.model.kv_cache_dtype
    ):
        raise UserError(
            f"`{run.folder}` must be a run of the file's model at the file's tiles and KV cache; leave --run "
            "out"
        )
    return statistics


def _at(config: RunConfig, tiles: Geometry, engine: str, phases: tuple[Phase, ...]) -> RunConfig:
    assert tiles.prefill is not None and tiles.decode is not None
    geometry = GeometryConfig(prefill=tiles.prefill, decode=tiles.decode)
    target = config.target.model_copy(update={"engine": engine, "phases": phases})
    return config.model_copy(update={"geometry": geometry, "target": target})


def _projected(run: Stages, ours: RunConfig, winner: Setting, engine: str) -> Projection:
    tiles = ours.geometry.model_dump(mode="json")

    def evaluate(setting: Setting, prompt: Prompt) -> Outcome:
        def measure() -> Outcome:
            return run.measure(thresholds_for(run.loaded, ours, setting), prompt)

        return run.once("served.jsonl", [setting, tiles], prompt, measure)

    search, heldout = run.prompts["search"], run.prompts["heldout"]
    run.progress.stage(f"project on {engine}", 2 * len(search) + len(heldout), 0)
    return project(
        winner,
        points(run.study),
        run.space,
        find_engine(engine),
        Law.of(ours),
        ours.validation.attempts,
        (search, heldout),
        evaluate,
    )


def _emitted(
    run: Stages, ours: RunConfig, found: Projection, source: Thresholds, engine: str
) -> Path:
    attempt = found.validation.chosen
    assert attempt is not None  # `project` tries at least one
    if not found.validation.passed:
        raise WorkFailed(
            f"nothing that {find_engine(engine).title} can express stays within the budget on the held-out "
            f"prompts; the nearest ({describe(attempt.setting)}) fails: {attempt.reason}; raise the budget, "
            f"or calibrate with `--set target.engine={engine}`"
        )
    same_tiles = ours.geometry == run.config.geometry
    fits = (
        read_json(run.folder / "fit.json")
        if same_tiles
        else {
            phase: {"model": {"refused": "fitted at other tiles than the engine's", "points": 0}}
            for phase in ours.target.phases
        }
    )
    thresholds = emit(
        thresholds_for(run.loaded, ours, attempt.served),
        found.validation,
        {phase: fits[phase] for phase in ours.target.phases},
        run.space.phase_times(attempt.served),
        run.cost,
        ours.budget,
        run.provenance(ours),
        _left_dense(run, ours, attempt, source),
    )
    if same_tiles:
        thresholds = with_slopes(thresholds, found.validation, run.statistics)
    direct = {**describe(found.direct.setting), "holds": found.refused is None}
    if found.refused is not None:
        direct["refused"] = found.refused
    report = {
        "engine": engine,
        "direct": direct,
        "used": describe(attempt.served),
        "of": provenance.digest(source.model_dump(mode="json")),
        "predicted_speedup_before": source.evidence.get("predicted_speedup", {}).get("weighted"),
        "predicted_speedup": thresholds.evidence["predicted_speedup"]["weighted"],
    }
    thresholds = thresholds.model_copy(
        update={"evidence": {**thresholds.evidence, "projection": report}}
    )
    target = run.folder / f"projected-{engine}.yaml"
    thresholds.save(target)
    return target


def _left_dense(
    run: Stages, ours: RunConfig, attempt: Attempt, source: Thresholds
) -> dict[str, Any]:
    """As the run's own file says; a phase that only the projection leaves dense has its own reason."""
    known = source.evidence.get("dense", {})
    idle = [phase for phase, factors in attempt.served.items() if not any(factors)]
    dense = {
        phase: known.get(phase)
        or {
            "reason": "the projected number skips no tile there",
            **reach(run.statistics, phase, ours.target),
        }
        for phase in idle
    }
    return {"dense": dense} if dense else {}


def _require_same_model(thresholds: Thresholds, run: Stages) -> None:
    loaded = run.loaded
    if thresholds.model.sha256 != loaded.sha256:
        raise UserError(
            f"the file must be for the run's model, but it is for {thresholds.model.name} "
            f"({thresholds.model.sha256[:12]}) and the run has {loaded.name} ({loaded.sha256[:12]}); "
            "`calibrate import` puts numbers from elsewhere into a file for your model"
        )
    wanted, ours = (
        kind or "auto" for kind in (thresholds.model.kv_cache_dtype, loaded.kv_cache_dtype)
    )
    if wanted != ours:
        raise UserError(
            f"the file must be for the run's KV cache, but it is for {wanted} and the run's is "
            f"{ours}; set `model.kv_cache_dtype: {wanted}` in the run's config, in a new folder"
        )


def _calibrated(folder: Path) -> Thresholds | None:
    """The run's own result, if it has one that passed."""
    file = folder / "thresholds.yaml"
    if not file.exists():
        return None
    thresholds = Thresholds.load(file)
    return thresholds if thresholds.evidence.get("verdict") == "passed" else None


def _evaluator(run: Stages) -> Evaluate:
    def evaluate(thresholds: Thresholds, prompt: Prompt, above_one: bool) -> Outcome:
        parts = {"scale_factor", "layers", "geometry", "min_kv_len"}
        key = [thresholds.model_dump(mode="json", include=parts), above_one]
        return run.once(
            "served.jsonl",
            key,
            prompt,
            lambda: run.measure(thresholds, prompt, unguarded=above_one),
        )

    return evaluate
