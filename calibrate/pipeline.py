"""The stages of a run in order, each made from what earlier ones left in the run folder.

Whatever is finished is on disk the moment it is finished, so a run can be stopped at any point and resumed:
no prompt is captured twice, no layer measured twice, no trial repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from calibrate.errors import UserError, WorkFailed
from calibrate.loss import losses
from calibrate.loss.joint import described
from calibrate.loss.losses import FINEST
from calibrate.loss.measure import (
    Outcome,
    compare,
    compare_unguarded,
    require_measurable,
    with_generated,
)
from calibrate.loss.sensitivity import Row, loss_model, measure_layers, plan, rounding_told
from calibrate.model.config_json import identity_of
from calibrate.model.forward import dense_logits, served_densely
from calibrate.model.generate import greedy_text
from calibrate.model.load import LoadedModel, in_memory, load
from calibrate.model.section import Setting, attention_modules, thresholds_for
from calibrate.model.served import serve
from calibrate.prompts.build import SPLITS, Prompt, Split, build
from calibrate.proof import target as targeted
from calibrate.proof.dense import left_dense, nothing_skipped
from calibrate.proof.emit import emit, with_slopes, with_trust
from calibrate.proof.plan import ASSUMED_SPREAD, foresight, provable, shares, spread_seen
from calibrate.proof.validate import Attempt, Validation, validate
from calibrate.proof.verdict import Law, require_provable
from calibrate.record import provenance
from calibrate.record.files import as_written, read_json, write_json
from calibrate.record.folder import Notes
from calibrate.record.measured import Measured
from calibrate.schema import RunConfig
from calibrate.search.cost import Cost, load_curves
from calibrate.search.owner import owner_of
from calibrate.search.path import Candidate, candidates, walked
from calibrate.search.points import Point
from calibrate.search.space import Space, build_space
from calibrate.search.study import (
    least_pruned,
    open_study,
    points,
    prompt_losses,
    search,
    stopped,
)
from calibrate.statistics import nvidia
from calibrate.statistics.capture import capture, empty_statistics, without_unseen
from calibrate.statistics.counts import Statistics
from calibrate.statistics.fit import fit_phase
from skip_softmax.thresholds.types import Phase

if TYPE_CHECKING:
    import optuna

    from skip_softmax.thresholds.file import Thresholds


class Progress(Protocol):
    """Who watches a run; the library itself prints nothing."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage starts, with `done` of `total` steps already on disk."""

    def step(self, note: str) -> None:
        """One step of the current stage is finished."""

    def note(self, text: str) -> None:
        """Something worth knowing, in a sentence."""


class Silent:
    """Watches and prints nothing."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Prints nothing."""

    def step(self, note: str) -> None:
        """Prints nothing."""

    def note(self, text: str) -> None:
        """Prints nothing."""


class Stages:
    """The stages of one run, and what they share.

    What they share is loaded when it is first needed, so that a finished run never loads the model.

    Attributes:
        folder: the run folder; whoever changes it must hold its lock.
        config: the run config.
        progress: who watches.
        notes: `run.json`.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        progress: Progress | None = None,
        model: LoadedModel | None = None,
        rows: list[dict[str, Any]] | None = None,
    ) -> None:
        """Opens a folder.

        Args:
            folder: the run folder.
            config: the run config.
            progress: who watches; None: nobody.
            model: a model in memory; None: the config's.
            rows: prompts in memory, for the source `task: memory`.
        """
        self.folder = folder
        self.config = config
        self.progress = progress or Silent()
        self.notes = Notes(folder, config)
        self._model = model
        self._rows = rows
        self._files: dict[str, Measured] = {}

    def run(self) -> None:
        """Runs all stages that are not on disk yet.

        Raises:
            UserError: the budget cannot be proven with as many held-out prompts.
        """
        if not self.notes.finished("validation"):
            require_provable(self.config)
        self.capture()
        self.fit()
        if not self.config.target.targets:
            self.sensitivity()
            self.search()
        self.prove()

    # What the stages share.

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, without the layers in which no tile was seen."""
        self.progress.stage("load model", 1, 0)
        loaded = self._model or (
            serve(self.config) if self.config.model.served else load(self.config.model)
        )
        self.progress.step(loaded.name)
        self.notes.note_model(loaded.name, loaded.sha256)
        counted = self.folder / "stats.safetensors"
        return without_unseen(loaded, Statistics.load(counted)) if counted.exists() else loaded

    @cached_property
    def prompts(self) -> dict[Split, list[Prompt]]:
        """The three sets of prompts."""
        path = self.folder / "prompts.json"
        if not path.exists():
            sets = build(
                self.config.prompts,
                self.loaded.tokenizer,
                seed=self.config.seed,
                max_context=self.loaded.max_context,
                vocabulary=self.loaded.vocabulary,
                memory=self._rows,
                generate=self.config.generated_tokens,
            )
            write_json(path, {s: [prompt.to_json() for prompt in sets[s]] for s in SPLITS})
        rows = read_json(path)
        with as_written(path):
            return {split: [Prompt.from_json(row) for row in rows[split]] for split in SPLITS}

    @cached_property
    def statistics(self) -> Statistics:
        """Tile statistics of the calibration prompts so far."""
        path = self.folder / "stats.safetensors"
        floor = self.config.target.min_kv_len.get("prefill", 0)
        if not path.exists():
            return empty_statistics(
                self.loaded, self.config.geometry, self.config.prompts.lengths, floor
            )
        statistics = Statistics.load(path)
        # Tiles that were counted at another geometry, or in another model, tell nothing about this run.
        ours: dict[str, Any] = {
            "geometry": self.config.geometry.model_dump(mode="json"),
            "lengths": list(self.config.prompts.lengths),
            "model": (self.notes.model or {}).get("sha256"),
            "min_kv_len": None if self.config.geometry.prefill.chunk is None else floor,
        }
        different = [
            k for k, v in ours.items() if v is not None and statistics.identity.get(k) != v
        ]
        if statistics.identity.get("kv_cache_dtype", "auto") != self.config.model.kv_cache_dtype:
            different.append("kv_cache_dtype")
        if different:
            raise UserError(
                f"`{path}` was counted with another {' and '.join(different)} than this run's; "
                "use another output folder, or delete the file to capture again"
            )
        return statistics

    @cached_property
    def cost(self) -> Cost:
        """Measured times of the kernels at the run's longest prompt."""
        return load_curves(
            self.config.cost,
            max(self.config.prompts.lengths),
            self.loaded.calibratable[0].head_dim,
            self.config.geometry,
        )

    @cached_property
    def space(self) -> Space:
        """What the search may vary."""
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
        """The Optuna study."""
        return open_study(self.config.search, self.folder, owner_of(self.folder, self.config))

    # The stages.

    def capture(self) -> None:
        """Counts the tiles of the calibration prompts in one dense pass each."""
        total = self.prompts["calibration"]
        missing = [prompt for prompt in total if prompt.key not in set(self.statistics.prompts)]
        if not missing:
            return
        # What else the config can get wrong is said before the long work, not after it.
        _ = self.cost
        targets = self.config.target.targets
        if not targets:
            _ = self.study
        tasks = [prompt.task for prompt in self.prompts["heldout"]]
        self.progress.note(foresight(tasks, Law.of(self.config), ASSUMED_SPREAD, seen=False))
        self.progress.stage("capture", len(total), len(total) - len(missing))
        counted = capture(
            self.loaded, total, self.statistics, self.config.geometry, samples=bool(targets)
        )
        for prompt, self.statistics in counted:
            self.statistics.save(self.folder / "stats.safetensors")
            self.progress.step(f"{prompt.task}, {prompt.length} tokens")
        self.loaded = without_unseen(self.loaded, self.statistics)
        self.notes.finish("capture")

    def fit(self) -> None:
        """Fits the curves that engines read."""
        fits = {
            phase: fit_phase(self.statistics, phase, self.config.fit)
            for phase in self.config.target.phases
        }
        for phase in self.config.target.targets:
            curve = nvidia.fit(self.statistics.samples[phase])
            aim = targeted.aim(self.statistics, phase, curve, self.config.target)
            fits[phase] |= {"nvidia": curve, "target": asdict(aim)}
        write_json(self.folder / "fit.json", fits, indent=1)

    def sensitivity(self) -> None:
        """Measures the loss of each layer when it skips alone."""
        rows = self._sensitivity_rows()
        if self.notes.finished("sensitivity"):
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
            self.dense,
        )
        for row in measured:
            rows.append(asdict(row))
            write_json(self.folder / "sensitivity.json", rows, indent=1)
            self.progress.step(f"{row.phase} layer {row.layer}: KL {row.kl:.2g}")
        budget = self.config.budget.limits[FINEST]
        told = rounding_told([Row(**row) for row in rows], budget, self.loaded.dtype)
        if told is not None:
            self.progress.note(told)
        self.notes.finish("sensitivity")

    def search(self) -> None:
        """Runs trials until there are as many as the config asks for, or the search stops by itself."""
        if self.notes.finished("search"):
            return
        finished = len(points(self.study))
        self.progress.stage("search", self.config.search.trials, finished)
        limits = self.config.budget.limits
        trials = search(
            self.study,
            self.space,
            self.prompts["search"],
            self.evaluate,
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
            note = "no trial within the budget yet" if best is None else _describe(best, limits)
            ended = stopped(self.study, self.config.search.trials)
            self.progress.step(note if ended is None else f"{ended.text}; {note}")
        ended = stopped(self.study, self.config.search.trials)
        self.notes.note_stop(None if ended is None else asdict(ended))
        self._write_loss_model()
        self.notes.finish("search")

    def validate(self) -> None:
        """Proves the best trial, or the target's number, on held-out prompts; writes the thresholds file."""
        if self.notes.finished("validation"):
            return
        heldout, target = self.prompts["heldout"], self.config.target
        law = Law.of(self.config)
        chosen, baselines = self._aimed() if target.targets else self._searched()
        # A target was not tried on the search prompts, so counting them would tell nothing about it.
        searched = None if target.targets else self._count_search_prompts()
        short = self._short_prompt()
        # At most: a sequence of candidates ends at its first failure, and a candidate where a look decides.
        steps = len(heldout) * (len(chosen) + len(baselines)) + (short is not None)
        self.progress.stage("validation", steps, 0)

        def evaluate(setting: Setting, prompt: Prompt) -> Outcome:
            return self.once(
                "heldout.jsonl", setting, prompt, lambda: self.evaluate(setting, prompt)
            )

        result = validate(
            chosen,
            baselines,
            heldout,
            evaluate,
            self.statistics,
            law,
            short,
            lambda setting: self.cost.weighted_time(self.statistics, setting, target.phase_weight),
            searched,
        )
        attempt = result.chosen
        assert attempt is not None  # there is at least one candidate
        found = result.to_json()
        if target.targets:
            found["target_sparsity"] = targeted.attained(
                attempt, self._fits(), self.statistics, self.config.budget.limits
            )
        write_json(self.folder / "validation.json", found, indent=1)
        self._write_thresholds(result, attempt, found.get("target_sparsity"))
        self.notes.finish("validation")

    def prove(self) -> None:
        """Validates and writes the report, also of a run that found nothing within the budget."""
        from calibrate.report.page import write_report

        try:
            self.validate()
        except WorkFailed:
            write_report(self.folder, self.config)
            raise
        self.progress.stage("report", 1, 0)
        self.progress.step(write_report(self.folder, self.config).name)

    # How prompts are run.

    def dense(self, prompt: Prompt) -> Any:
        """The model's own logits [continuation + 1, vocabulary]."""
        return dense_logits(self.loaded, prompt, self.folder / "dense")

    def evaluate(self, setting: Setting, prompt: Prompt) -> Outcome:
        """Runs a setting on a prompt, against the dense run."""
        return self.measure(thresholds_for(self.loaded, self.config, setting), prompt)

    def measure(
        self, thresholds: Thresholds, prompt: Prompt, *, unguarded: bool = False
    ) -> Outcome:
        """Runs thresholds on a prompt, against the dense run.

        A held-out prompt with an answer is generated from too, if the config asks for it.

        Args:
            thresholds: what to apply.
            prompt: what to run.
            unguarded: as engines run thresholds of 1 or more.
        """
        require_measurable(self.loaded, thresholds, unguarded=unguarded)
        run = compare_unguarded if unguarded else compare
        outcome = run(self.loaded, thresholds, prompt, self.dense(prompt))
        tokens = self.config.generated_tokens
        if tokens is None or prompt.split != "heldout" or not prompt.answers:
            return outcome
        dense = self.dense_text(prompt, tokens)
        return with_generated(
            outcome, self.loaded, thresholds, prompt, dense, tokens, unguarded=unguarded
        )

    def dense_text(self, prompt: Prompt, tokens: int) -> str:
        """What the model itself writes after a prompt; generated once, and kept in the run folder."""
        kept, setting = self._measured("generated.jsonl"), {"dense": tokens}

        def generated() -> dict[str, str]:
            with served_densely(self.loaded):
                return {"text": greedy_text(self.loaded, prompt, tokens)}

        with as_written(kept.path):
            return str(kept.once(setting, prompt, generated)["text"])

    def once(
        self, file: str, setting: Any, prompt: Prompt, measure: Callable[[], Outcome]
    ) -> Outcome:
        """Measures a setting on a prompt, or takes from the run folder's `file` what was measured before."""
        row = self._measured(file).once(setting, prompt, lambda: asdict(measure()))
        outcome = Outcome.from_row(row)
        shown = losses.text(outcome.losses, self.config.budget.limits)
        self.progress.step(f"{prompt.task}, {prompt.length} tokens: {shown}")
        return outcome

    def _measured(self, file: str) -> Measured:
        # Kept open: a proof asks thousands of times.
        return self._files.setdefault(file, Measured(self.folder / file))

    def provenance(self, config: RunConfig) -> dict[str, Any]:
        """What decides the numbers of a thresholds file that is made at `config`."""
        identity = {} if in_memory(config.model) else identity_of(config.model)
        # Engines leave layers dense by the names of their modules.
        modules = {"attention_modules": attention_modules(self.loaded)}
        return provenance.of_results(config, self.prompts) | identity | modules

    def _count_search_prompts(self) -> Statistics:
        """Tile statistics of the search prompts: what was found on them has then been counted and run."""
        path, prompts = self.folder / "stats-search.safetensors", self.prompts["search"]
        searched = Statistics.load(path) if path.exists() else self.statistics.like()
        self.progress.stage("count search prompts", len(prompts), len(searched.prompts))
        counted = capture(self.loaded, prompts, searched, self.config.geometry)
        for prompt, searched in counted:
            searched.save(path)
            self.progress.step(f"{prompt.task}, {prompt.length} tokens")
        return searched

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

    def _write_loss_model(self) -> None:
        """Writes what the layers' losses predict, and how far that is off on the trials."""
        found = points(self.study)
        predicted = [self.space.predicted_loss(point.setting) for point in found]
        measured = [point.losses[FINEST] for point in found]
        write_json(
            self.folder / "loss_model.json",
            described(self.space.losses, predicted, measured),
            indent=1,
        )

    def _searched(self) -> tuple[list[Candidate], list[Candidate]]:
        """The settings to prove, and those with one number per phase."""
        # A phase that skips nothing is left dense, which costs less than the kernel that could skip.
        found = [point.without_idle(self.space.relative_time) for point in points(self.study)]
        limits = self.config.budget.limits
        if not any(point.skips for point in found):
            pruned = least_pruned(self.study, limits)
            raise WorkFailed(nothing_skipped(self.statistics, self.config.target, limits, pruned))
        law, tasks = Law.of(self.config), [prompt.task for prompt in self.prompts["heldout"]]
        spread = spread_seen(
            prompt_losses(self.study), [p.task for p in self.prompts["search"]], limits[FINEST]
        )
        share = provable(tasks, law, spread)
        aims = shares(share, self.config.validation.attempts)
        chosen = candidates(found, self.space, limits, aims, share)
        # The best single number is proven as the winner is: on its own path, at the same shares.
        uniform = [point for point in found if point.name == "uniform"]
        self.progress.note(foresight(tasks, law, spread, seen=True))
        return chosen, walked(uniform, self.space, limits, aims, share)

    def _aimed(self) -> tuple[list[Candidate], list[Candidate]]:
        """The one setting that the target sparsity asks for; no search prompt has seen it."""
        aims, config = targeted.aims_of(self._fits()), self.config.target
        if all(aim.refused for aim in aims.values()):
            raise WorkFailed(targeted.nothing_aimed(aims, self.statistics, config))
        usable = tuple(layer.index for layer in self.loaded.calibratable)
        setting = targeted.candidate(aims, len(self.loaded.layers), usable)
        time = self.cost.weighted_time(self.statistics, setting, config.phase_weight)
        expected = {
            phase: self.statistics.sparsity(phase, factors) for phase, factors in setting.items()
        }
        point = Point("target", setting, {}, time, expected)
        return [Candidate(point, setting, None, time)], []

    def _fits(self) -> dict[Phase, dict[str, Any]]:
        path = self.folder / "fit.json"
        fits: dict[Phase, dict[str, Any]] = read_json(path)
        with as_written(path):
            for phase in self.config.target.targets:
                _ = fits[phase]["nvidia"], fits[phase]["target"]
        return fits

    def _write_thresholds(
        self, result: Validation, attempt: Attempt, found: dict[str, Any] | None
    ) -> None:
        winner, target, fits = attempt.served, self.config.target, self._fits()
        if found is None:
            dense = left_dense(
                attempt,
                points(self.study),
                self.statistics,
                target,
                self.config.budget.limits,
                self.space.layers,
            )
        else:
            dense = targeted.left_dense(attempt, fits, self.statistics, target)
            fits = targeted.curves_of(fits)
        thresholds = emit(
            thresholds_for(self.loaded, self.config, winner),
            result,
            fits,
            self.cost.phase_times(self.statistics, winner),
            self.cost,
            self.config.budget,
            self.provenance(self.config),
            dense,
        )
        if found is None:
            thresholds = with_slopes(thresholds, result, self.statistics)
        else:
            thresholds = targeted.with_target(thresholds, attempt, found, dense)
            thresholds = with_trust(thresholds, result, self.statistics)
        thresholds.save(self.folder / "thresholds.yaml")

    def _sensitivity_rows(self) -> list[dict[str, Any]]:
        path = self.folder / "sensitivity.json"
        return list(read_json(path, list)) if path.exists() else []


def _describe(point: Point, limits: Mapping[str, float]) -> str:
    shares = ", ".join(f"{phase} {100 * share:.0f}%" for phase, share in point.sparsity.items())
    return (
        f"best: {1 / point.relative_time:.2f}x, {losses.text(point.losses, limits)}, skips {shares}"
    )
