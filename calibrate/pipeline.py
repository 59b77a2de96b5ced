"""A whole run: the stages in order, each from what the run folder already holds.

Everything finished is on disk the moment it is finished, so a run can be stopped at any point and
the same command goes on: no prompt is captured twice, no layer measured twice, no trial repeated.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from calibrate.errors import UserError, WorkFailed
from calibrate.loss import losses
from calibrate.loss.losses import FINEST
from calibrate.loss.measure import Outcome, compare
from calibrate.loss.sensitivity import Row, loss_model, measure_layers, plan
from calibrate.model.config_json import identity_of
from calibrate.model.forward import dense_logits
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import Setting, thresholds_for
from calibrate.prompts.build import Prompt, Split, build
from calibrate.proof.emit import emit
from calibrate.proof.validate import Validation, validate
from calibrate.proof.verdict import Law
from calibrate.record import provenance
from calibrate.record.files import as_written, read_json
from calibrate.schema import RunConfig
from calibrate.search.cost import Cost, load_curves
from calibrate.search.points import Point, candidates, uniform_candidates
from calibrate.search.space import Space, build_space
from calibrate.search.study import open_study, points, search
from calibrate.statistics.capture import capture, empty_statistics, without_unseen
from calibrate.statistics.counts import Statistics
from calibrate.statistics.fit import fit_phase
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import Phase
from skip_softmax.thresholds.yaml_file import write_text_atomically

if TYPE_CHECKING:
    import optuna

    from calibrate.report.figures import Figures
    from calibrate.report.findings import Findings

from calibrate.record.folder import _write_config, claimed, locked, open_run


class Progress(Protocol):
    """Who watches a run; the library itself prints nothing."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage starts, with `done` of `total` steps already on disk."""

    def step(self, note: str) -> None:
        """One step of the current stage is finished."""


class Silent:
    """Watches and says nothing."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Says nothing."""

    def step(self, note: str) -> None:
        """Says nothing."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run folder.
        config: the run config.
        thresholds: what was emitted.
        stats: tile statistics of the calibration prompts.
        study: the Optuna study.
        validation: content of `validation.json`.
    """

    folder: Path
    config: RunConfig
    thresholds: Thresholds
    stats: Statistics
    study: optuna.Study
    validation: dict[str, Any]

    @cached_property
    def findings(self) -> Findings:
        """Every number of the report, as plain data."""
        from calibrate.report.findings import findings

        return findings(self.folder, self.config)

    @cached_property
    def figures(self) -> Figures:
        """The figures of the report, one method each."""
        from calibrate.report.figures import Figures

        return Figures(self.findings, self.study)


def run(config: RunConfig, folder: str | os.PathLike[str], progress: Progress | None = None) -> Run:
    """Runs all stages that are not on disk yet.

    Args:
        config: the run config.
        folder: the run folder; made if missing.
        progress: who watches.

    Returns:
        The finished run, whatever its verdict.

    Raises:
        UserError: config, model, prompts or folder are wrong.
        WorkFailed: nothing can be skipped within the budget.
    """
    with locked(Path(folder)) as path:
        config = claimed(path, config)
        work = _Work(config, path, progress or Silent())
        work.capture()
        work.fit()
        work.sensitivity()
        work.search()
        return work.finish()


def search_again(
    folder: str | os.PathLike[str], trials: int | None = None, progress: Progress | None = None
) -> Path:
    """Continues the search of a run, to a larger number of trials if given.

    Args:
        folder: a run folder that has its statistics and sensitivities.
        trials: new number of trials; stored in the run's config.
        progress: who watches.

    Returns:
        The folder. The validation is out of date then; `validate_again` makes it anew.
    """
    path, config = open_run(folder)
    if trials is not None:
        if trials < config.search.trials:
            raise UserError(
                f"--trials must be at least the {config.search.trials} of the run, but got {trials}; trials "
                "are never taken back"
            )
        config = config.model_copy(
            update={"search": config.search.model_copy(update={"trials": trials})}
        )
    with locked(path):
        work = _Work(config, path, progress or Silent())
        work.require("sensitivity")
        _write_config(path, config)
        work.forget("search", "validation")
        work.search()
    return path


def validate_again(folder: str | os.PathLike[str], progress: Progress | None = None) -> Run:
    """Chooses and proves again, from the trials of a run.

    Args:
        folder: a run folder with a finished search.
        progress: who watches.

    Returns:
        The run with its new verdict.
    """
    path, config = open_run(folder)
    with locked(path):
        work = _Work(config, path, progress or Silent())
        work.require("search")
        work.forget("validation")
        return work.finish()


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Opens a finished run without loading its model.

    Raises:
        UserError: it is no run folder, or the run is not finished.
    """
    path, config = open_run(folder)
    work = _Work(config, path, Silent())
    work.require("validation")
    return work.emitted()


def write_report(
    folder: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the report of a run, from what is on disk, or of two runs side by side.

    Args:
        folder: a run folder that has at least its statistics.
        other: a second one, to compare with; None: no comparison.
        output: the HTML file; None: `report.html` or `comparison.html` in the first folder.

    Returns:
        The file's path.

    Raises:
        UserError: a folder is no run folder, or the file cannot be written.
    """
    from calibrate.report import comparison
    from calibrate.report import page as report

    target = None if output is None else Path(output)
    if other is None:
        return report.write_report(*open_run(folder), target)
    return comparison.write_comparison(open_run(folder), open_run(other), target)


_SPLITS: tuple[Split, ...] = ("calibration", "search", "heldout")
# What a finished stage has left in the folder; what somebody deleted is made again.
_RESULTS = {
    "sensitivity": ("sensitivity.json",),
    "search": ("study.db",),
    "validation": ("validation.json", "thresholds.yaml"),
}


class _Work:
    """The stages of one run over its folder. Each stage reads what earlier ones left on disk."""

    def __init__(self, config: RunConfig, folder: Path, progress: Progress) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self._started = time.monotonic()

    # What the stages share; loaded when first needed, so that a finished run never loads the model.

    @cached_property
    def loaded(self) -> LoadedModel:
        self.progress.stage("load model", 1, 0)
        loaded = load(self.config.model)
        self.progress.step(loaded.name)
        self._note_once("model", {"name": loaded.name, "sha256": loaded.sha256})
        counted = self.folder / "stats.safetensors"
        return without_unseen(loaded, Statistics.load(counted)) if counted.exists() else loaded

    @cached_property
    def prompts(self) -> dict[Split, list[Prompt]]:
        path = self.folder / "prompts.json"
        if not path.exists():
            sets = build(
                self.config.prompts,
                self.loaded.tokenizer,
                seed=self.config.seed,
                max_context=self.loaded.max_context,
            )
            rows = {
                split: [asdict(prompt) for prompt in prompts] for split, prompts in sets.items()
            }
            write_text_atomically(path, json.dumps(rows))
        rows = read_json(path)
        with as_written(path):
            return {split: [_prompt(row) for row in rows[split]] for split in _SPLITS}

    @cached_property
    def statistics(self) -> Statistics:
        path = self.folder / "stats.safetensors"
        if path.exists():
            return self._ours(Statistics.load(path), path)
        return empty_statistics(self.loaded, self.config.geometry, self.config.prompts.lengths)

    @cached_property
    def cost(self) -> Cost:
        return load_curves(
            self.config.cost,
            max(self.config.prompts.lengths),
            self.loaded.calibratable[0].head_dim,
            self.config.geometry,
        )

    @cached_property
    def space(self) -> Space:
        with as_written(self.folder / "sensitivity.json"):
            rows = [Row(**row) for row in self._sensitivity_rows()]
        layers = self.statistics.counts["prefill"].shape[0]
        predicted = loss_model(rows, layers, self.config.target.phases)
        usable = tuple(layer.index for layer in self.loaded.calibratable)
        return build_space(
            self.statistics,
            self.cost,
            predicted,
            usable,
            self.config.target,
            budget=self.config.budget.limits[FINEST],
            groups=self.config.search.groups,
        )

    @cached_property
    def study(self) -> optuna.Study:
        return open_study(self.config.search, self.folder)

    # The stages.

    def capture(self) -> None:
        total = self.prompts["calibration"]
        missing = [prompt for prompt in total if prompt.key not in set(self.statistics.prompts)]
        if not missing:
            return
        # What else the config can get wrong is said before the long work, not after it.
        _ = self.study, self.cost
        self.progress.stage("capture", len(total), len(total) - len(missing))
        counted = capture(self.loaded, total, self.statistics, self.config.geometry)
        for prompt, self.statistics in counted:
            self.statistics.save(self.folder / "stats.safetensors")
            self.progress.step(f"{prompt.task}, {prompt.length} tokens")
        self.loaded = without_unseen(self.loaded, self.statistics)
        self._note_time("capture")

    def fit(self) -> None:
        fits = {
            phase: fit_phase(self.statistics, phase, self.config.fit)
            for phase in self.config.target.phases
        }
        write_text_atomically(self.folder / "fit.json", json.dumps(fits, indent=1))

    def sensitivity(self) -> None:
        rows = self._sensitivity_rows()
        if self._noted("sensitivity"):
            return
        levels = self.config.sensitivity.target_sparsity
        todo = plan(self.loaded, self.statistics, self.config.target, levels)
        self.progress.stage("sensitivity", len(todo), len(rows))
        done = {(row["phase"], row["layer"], row["scale_factor"]) for row in rows}
        shortest = sorted(self.prompts["search"], key=lambda prompt: len(prompt.ids))
        measured = measure_layers(
            self.loaded,
            self.statistics,
            [step for step in todo if step not in done],
            lambda setting: thresholds_for(self.loaded, self.config, setting),
            shortest[: self.config.sensitivity.prompts],
            self._dense,
        )
        for row in measured:
            rows.append(asdict(row))
            write_text_atomically(self.folder / "sensitivity.json", json.dumps(rows, indent=1))
            self.progress.step(f"{row.phase} layer {row.layer}: KL {row.kl:.2g}")
        self._note_time("sensitivity")

    def search(self) -> None:
        if self._noted("search"):
            return
        finished = len(points(self.study))
        self.progress.stage("search", self.config.search.trials, finished)
        limits = self.config.budget.limits
        trials = search(
            self.study,
            self.space,
            self.prompts["search"],
            self._evaluate,
            self.config.search,
            limits=limits,
            seed=self.config.seed,
        )
        best: Point | None = None
        for point in trials:
            if (
                point is not None
                and point.share(limits) <= 1.0
                and (best is None or point.relative_time < best.relative_time)
            ):
                best = point
            self.progress.step(
                "no trial within the budget yet" if best is None else _describe(best)
            )
        self._note_time("search")

    def validate(self) -> None:
        if self._noted("validation"):
            return
        heldout = self.prompts["heldout"]
        found = points(self.study)
        within = self.config.budget.limits, self.config.validation.attempts
        chosen = candidates(found, *within)
        # The best single number is picked as the winner is: within the same shares of the budget.
        baselines = uniform_candidates(found, *within)
        short = self._short_prompt()
        steps = len(heldout) * (2 if baselines else 1) + (short is not None)
        self.progress.stage("validation", steps, 0)

        def evaluate(setting: Setting, prompt: Prompt) -> Outcome:
            outcome = self._evaluate_once(setting, prompt)
            self.progress.step(
                f"{prompt.task}, {prompt.length} tokens: {losses.text(outcome.losses)}"
            )
            return outcome

        result = validate(
            chosen, baselines, heldout, evaluate, self.statistics, Law.of(self.config), short
        )
        write_text_atomically(
            self.folder / "validation.json", json.dumps(result.to_json(), indent=1)
        )
        self._write_thresholds(result)
        self._note_time("validation")

    def finish(self) -> Run:
        """Proves the winner and writes the report, also of a run that found nothing within the budget."""
        try:
            self.validate()
        except WorkFailed:
            write_report(self.folder)
            raise
        self.progress.stage("report", 1, 0)
        self.progress.step(write_report(self.folder).name)
        return self.emitted()

    def emitted(self) -> Run:
        return Run(
            folder=self.folder,
            config=self.config,
            thresholds=Thresholds.load(self.folder / "thresholds.yaml"),
            stats=self.statistics,
            study=self.study,
            validation=read_json(self.folder / "validation.json"),
        )

    def forget(self, *stages: str) -> None:
        """Marks stages as open again; what they measured stays."""
        notes = self._notes()
        for stage in stages:
            notes.get("seconds", {}).pop(stage, None)
        self._write_notes(notes)

    def require(self, stage: str) -> None:
        """Refuses a run whose earlier stage is not finished."""
        if not self._noted(stage):
            cure = "validate" if stage == "validation" and self._noted("search") else "run"
            raise UserError(
                f"`{self.folder}`: its {stage} is not finished; finish it with `calibrate {cure}`"
            )

    def _ours(self, statistics: Statistics, path: Path) -> Statistics:
        """Tiles that were counted at another geometry, or in another model, say nothing about this run."""
        ours: dict[str, Any] = {
            "geometry": self.config.geometry.model_dump(mode="json"),
            "lengths": list(self.config.prompts.lengths),
            "model": self._notes().get("model", {}).get("sha256"),
        }
        different = [
            k for k, v in ours.items() if v is not None and statistics.identity.get(k) != v
        ]
        if different:
            raise UserError(
                f"`{path}` was counted with another {' and '.join(different)} than this run's; "
                "use another output folder, or delete the file to capture again"
            )
        return statistics

    # How prompts are run.

    def _dense(self, prompt: Prompt) -> Any:
        return dense_logits(self.loaded, prompt, self.folder / "dense")

    def _evaluate(self, setting: Setting, prompt: Prompt) -> Outcome:
        thresholds = thresholds_for(self.loaded, self.config, setting)
        return compare(self.loaded, thresholds, prompt, self._dense(prompt))

    def _evaluate_once(self, setting: Setting, prompt: Prompt) -> Outcome:
        """Like `_evaluate`, but what an interrupted validation measured is taken from disk."""
        path = self.folder / "heldout.json"
        known: dict[str, Any] = read_json(path) if path.exists() else {}
        key = f"{provenance.digest(setting)}:{prompt.key}"
        if key not in known:
            known[key] = asdict(self._evaluate(setting, prompt))
            write_text_atomically(path, json.dumps(known))
        return Outcome.from_row(known[key])

    def _short_prompt(self) -> Prompt | None:
        tokens = self.config.validation.short_prompt
        floors = [self.config.target.min_kv_len[phase] for phase in self.config.target.phases]
        if tokens is None or tokens + self.config.prompts.decode_tokens >= min(floors):
            return None
        longest = max(self.prompts["heldout"], key=lambda prompt: len(prompt.ids))
        return Prompt(
            "short",
            "heldout",
            min(self.config.prompts.lengths),
            longest.ids[:tokens],
            longest.continuation,
            has_answer=False,
        )

    def _write_thresholds(self, result: Validation) -> None:
        winner: Setting = result.attempts[-1].setting
        template = thresholds_for(self.loaded, self.config, winner)
        times: dict[Phase, float] = self.space.phase_times(winner)
        sources = provenance.of_results(self.config, self.prompts) | identity_of(self.config.model)
        thresholds = emit(
            template,
            result,
            read_json(self.folder / "fit.json"),
            times,
            self.cost,
            self.config.budget,
            sources,
        )
        thresholds.save(self.folder / "thresholds.yaml")

    def _sensitivity_rows(self) -> list[dict[str, Any]]:
        path = self.folder / "sensitivity.json"
        return list(read_json(path, list)) if path.exists() else []

    # run.json: versions, device, and how long each stage took.

    def _notes(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return dict(read_json(path)) if path.exists() else dict(provenance.of_run(self.config))

    def _write_notes(self, notes: dict[str, Any]) -> None:
        write_text_atomically(self.folder / "run.json", json.dumps(notes, indent=1))

    def _note_once(self, key: str, value: Any) -> None:
        notes = self._notes()
        if key in notes and notes[key] != value:
            raise UserError(
                f"`{self.folder}` was made with another model file ({notes[key]} before, {value} now); "
                "use another output folder"
            )
        self._write_notes({**notes, key: value})

    def _note_time(self, stage: str) -> None:
        """Marks a stage as finished, with the seconds this process spent since the last mark."""
        notes = self._notes()
        now = time.monotonic()
        notes.setdefault("seconds", {})[stage] = round(now - self._started, 1)
        self._started = now
        self._write_notes(notes)

    def _noted(self, stage: str) -> bool:
        files = _RESULTS.get(stage, ())
        if stage == "search" and self.config.search.storage is not None:
            files = ()
        return stage in self._notes().get("seconds", {}) and all(
            (self.folder / name).exists() for name in files
        )


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(**{**row, "ids": tuple(row["ids"]), "continuation": tuple(row["continuation"])})


def _describe(point: Point) -> str:
    shares = ", ".join(f"{phase} {100 * share:.0f}%" for phase, share in point.sparsity.items())
    return f"best: {1 / point.relative_time:.2f}x, {losses.text(point.losses)}, skips {shares}"
