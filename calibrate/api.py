"""What a program calls: a run, and the verbs on it. The command line calls the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.errors import UserError
from calibrate.schema import ModelConfig, RunConfig, load_config, require_in_memory
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.yaml_file import user_path

if TYPE_CHECKING:
    import optuna

    from calibrate.model.load import LoadedModel
    from calibrate.pipeline import Progress, Stages
    from calibrate.proof.assess import Assessment
    from calibrate.report.figures import Figures
    from calibrate.report.findings import Findings
    from calibrate.statistics.counts import Statistics

Place = str | os.PathLike[str]


class Run:
    """A run folder, and what can be done with it. `run` and `open_run` give one.

    An attribute whose stage is not finished raises `UserError`, which names the stage and the command that
    finishes it.

    Attributes:
        folder: the run folder.
        config: the run config.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._stages.folder

    @property
    def config(self) -> RunConfig:
        """The run config."""
        return self._stages.config

    @property
    def thresholds(self) -> Thresholds:
        """What was emitted: `thresholds.yaml`."""
        self._stages.notes.require("validation")
        return Thresholds.load(self.folder / "thresholds.yaml")

    @property
    def validation(self) -> dict[str, Any]:
        """Content of `validation.json`."""
        from calibrate.record.files import read_json

        self._stages.notes.require("validation")
        content: dict[str, Any] = read_json(self.folder / "validation.json")
        return content

    @property
    def stats(self) -> Statistics:
        """Tile statistics of the calibration prompts."""
        self._stages.notes.require("capture")
        return self._stages.statistics

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        self._require_search()
        self._stages.notes.require("sensitivity")
        return self._stages.study

    @cached_property
    def findings(self) -> Findings:
        """Every number that the report shows, as plain data; a part that was not reached is None."""
        from calibrate.report.findings import findings

        return findings(self.folder, self.config)

    @property
    def figures(self) -> Figures:
        """The report's figures, one method each: `run.figures.curves("prefill")`."""
        from calibrate.report.figures import Figures

        return Figures(self.findings, self.study if self.findings["trials"] else None)

    def search(self, trials: int | None = None) -> Run:
        """Continues the search. The validation is out of date then; `validate` makes it anew.

        Args:
            trials: new total number of trials, kept in the run's config; None: the config's.

        Returns:
            This run.

        Raises:
            UserError: there are more trials already, or the search cannot start yet.
        """
        from calibrate.record.folder import write_config

        self._require_search()
        with self._locked() as stages:
            search = stages.config.search
            if trials is not None and trials < search.trials:
                raise UserError(
                    f"trials must be at least the {search.trials} of the run, but got {trials}; trials "
                    "are never removed"
                )
            stages.notes.require("sensitivity")
            if trials is not None:
                changed = search.model_copy(update={"trials": trials})
                stages.config = stages.config.model_copy(update={"search": changed})
            write_config(stages.folder, stages.config)
            stages.notes.reopen("search", "validation")
            stages.search()
        return self

    def validate(self) -> Run:
        """Chooses again from the trials, or at the target, and proves the choice on the held-out prompts.

        Returns:
            This run, with its new verdict and report.

        Raises:
            UserError: the search is not finished.
            WorkFailed: no setting skips anything within the budget.
        """
        with self._locked() as stages:
            stages.notes.require("capture" if self.config.target.targets else "search")
            stages.notes.reopen("validation")
            stages.prove()
        return self

    def report(self, other: Run | Place | None = None, output: Place | None = None) -> Path:
        """Writes the report of the run from what is on disk, or of two runs side by side.

        Args:
            other: a second run, to compare with; None: no comparison.
            output: the HTML file; None: `report.html` or `comparison.html` in this run's folder.

        Returns:
            The file's path.

        Raises:
            UserError: a run has no statistics yet, or the file cannot be written.
        """
        from calibrate.report.comparison import write_comparison
        from calibrate.report.page import write_report

        target = None if output is None else _path(output, "output")
        if other is None:
            return write_report(self.folder, self.config, target)
        if not isinstance(other, Run):
            other = open_run(other)
        runs = (self.folder, self.config), (other.folder, other.config)
        return write_comparison(*runs, target)

    def project(
        self,
        engine: str,
        *,
        gpu: str | None = None,
        phases: Sequence[str] | None = None,
        kv_dtype: str | None = None,
    ) -> Path:
        """Finds and measures the best setting near the run's result that an engine can express.

        Args:
            engine: who will serve, for example `trtllm`.
            gpu: GPU family that will serve, for example `sm90`; None: one on which the run's tiles are
                right, else the engine's first.
            phases: `prefill`, `decode` or both; None: those of the run in which the engine can skip.
            kv_dtype: type of the engine's KV cache, for example `fp8`; None: a 16-bit one.

        Returns:
            The thresholds file, ready for `calibrate.export`; its `evidence["projection"]` says what the
            straight projection would have done.

        Raises:
            UserError: the engine cannot run what was asked for, or the run is not validated.
            WorkFailed: nothing that the engine can express stays within the budget.
        """
        from calibrate.engines.catalogue import find_phases
        from calibrate.transfer import project_run

        self._require_search()
        chosen = find_phases(phases)
        with self._locked() as stages:
            return project_run(stages, engine, gpu, chosen, kv_dtype)

    def assess(self, thresholds: Thresholds | Place) -> tuple[Thresholds, Assessment]:
        """Measures any thresholds on the run's model and held-out prompts; the run need not be finished.

        Args:
            thresholds: the numbers in question, or the path of their file.

        Returns:
            The thresholds with their new evidence, and what was measured, per length.

        Raises:
            UserError: the thresholds are for another model.
        """
        from calibrate.transfer import assess_thresholds

        with self._locked() as stages:
            return assess_thresholds(stages, _thresholds(thresholds))

    def stats_for(self, thresholds: Thresholds | Place) -> Statistics:
        """The run's tile statistics, if they tell what these thresholds skip.

        Raises:
            UserError: the thresholds are of another model or other tiles.
        """
        from calibrate.transfer import statistics_for

        return statistics_for(self._stages, _thresholds(thresholds))

    def _require_search(self) -> None:
        """Refuses a run that searches for nothing."""
        if self.config.target.targets:
            raise UserError(
                f"`{self.folder}`: `target.target_sparsity` must be null for this, but the run has one, in "
                "place of a search; an engine with the run's tiles takes its number per phase as it is "
                "(`calibrate export`), and a run in another folder, without the key, searches"
            )

    @contextmanager
    def _locked(self) -> Iterator[Stages]:
        from calibrate.record.folder import locked, open_run

        with locked(self.folder):
            # Another process may have asked for more trials since.
            self._stages.config = open_run(self.folder)[1]
            yield self._stages
            self.__dict__.pop("findings", None)  # they are of the folder as it was


def run(
    config: Place | Mapping[str, Any] | RunConfig,
    output: Place | None = None,
    *,
    overrides: Sequence[str] = (),
    model: Any = None,
    tokenizer: Any = None,
    prompts: Any = None,
    progress: Progress | None = None,
) -> Run:
    """Calibrates a model: captures, fits, searches, validates and emits; resumes what is in the run folder.

    Args:
        config: path of a run config, the same as a dict, or a `RunConfig`.
        output: run folder; None: the config's `output`, else `runs/` and the config file's name.
        overrides: `section.key=value` strings, applied to a config given as a path or a dict.
        model: a transformers model in memory, in place of the config's `model` section; it is put in eval
            mode. It is known again by its config and weights, so a run resumes only with the same model.
        tokenizer: the tokenizer of `model`.
        prompts: prompts in memory, in place of `prompts.sources`: a list of texts, or of dicts with `prompt`
            and, if there are reference answers, `answer` (or `continuation`); or a `datasets.Dataset` with
            these columns. Lengths and numbers of prompts are the config's.
        progress: who watches; None: nobody.

    Returns:
        The finished run: `run.thresholds`, `run.stats`, `run.study`, `run.validation`.

    Raises:
        UserError: config, model, prompts or folder are wrong.
        FileError: the config breaks its schema.
        WorkFailed: no setting skips anything within the budget.
    """
    if (model is None) != (tokenizer is None):
        given, missing = ("tokenizer", "model") if model is None else ("model", "tokenizer")
        raise UserError(
            f"`model` and `tokenizer` must be given together, but got a {given} alone; pass {missing}="
        )
    if isinstance(overrides, str):
        raise UserError(
            f"`overrides` must be a list of `section.key=value`, but got a str; pass [{overrides!r}]"
        )
    chosen, name = _config(config, overrides, in_memory=model is not None)
    rows = None
    if prompts is not None:
        from calibrate.prompts.rows import from_memory as rows_from_memory

        source, rows = rows_from_memory(prompts)
        sources = chosen.prompts.model_copy(update={"sources": (source,)})
        chosen = chosen.model_copy(update={"prompts": sources})
    loaded: LoadedModel | None = None
    if model is not None:
        from calibrate.model.load import from_memory

        loaded, section = from_memory(model, tokenizer)
        chosen = chosen.model_copy(update={"model": section})
    folder = _folder(output, chosen, name)
    # Only now: a mistake in the config is reported before torch is loaded.
    from calibrate.pipeline import Stages
    from calibrate.record.folder import claimed, locked

    with locked(folder):
        stages = Stages(folder, claimed(folder, chosen), progress, loaded, rows)
        if loaded is not None:
            _ = (
                stages.loaded
            )  # refuses a model that is not the run's, also if there is nothing to do
        stages.run()
    return Run(stages)


def open_run(
    folder: Place | None = None,
    *,
    config: Place | Mapping[str, Any] | RunConfig | None = None,
    progress: Progress | None = None,
) -> Run:
    """Opens a run, finished or not. No model is loaded and no GPU is needed until a method runs the model.

    Args:
        folder: the folder of a `calibrate run`; None: where `run` puts this config's run.
        config: for a folder in which there is no run yet: the config of the run that begins there.
        progress: who watches; None: nobody.

    Returns:
        The run.

    Raises:
        UserError: it is not a run folder, or it belongs to another config.
    """
    from calibrate.pipeline import Stages
    from calibrate.record import folder as record

    if config is not None:
        chosen, name = _config(config, (), in_memory=False)
        path = _folder(folder, chosen, name)
        with record.locked(path):
            record.claimed(path, chosen)
    else:
        path = _path(folder, "folder")
    return Run(Stages(*record.open_run(path), progress))


def _config(
    config: Place | Mapping[str, Any] | RunConfig, overrides: Sequence[str], *, in_memory: bool
) -> tuple[RunConfig, str]:
    """The config, and how its run folder is called by default."""
    if isinstance(config, RunConfig):
        if overrides:
            raise UserError(
                "`overrides` must be applied to a path or a dict, but got a RunConfig; change the config "
                "itself: config.model_copy(update=...)"
            )
        if in_memory:
            require_in_memory(config.model.engine)
        return config, "run"
    if not isinstance(config, (str, os.PathLike, Mapping)):
        raise UserError(
            "`config` must be the path of a run config, a dict or a RunConfig, but got "
            f"{type(config).__name__}: {str(config)[:60]}"
        )
    # The section is required, but a model in memory says everything that would be in it.
    stand_in = ModelConfig(path="memory://") if in_memory else None
    name = "run" if isinstance(config, Mapping) else Path(config).stem
    return load_config(config, tuple(overrides), model=stand_in), name


def _thresholds(thresholds: Thresholds | Place) -> Thresholds:
    if isinstance(thresholds, Thresholds):
        return thresholds
    return Thresholds.load(_path(thresholds, "thresholds"))


def _folder(output: Place | None, config: RunConfig, name: str) -> Path:
    return _path(output or config.output or Path("runs") / name, "output")


def _path(place: Any, name: str) -> Path:
    if not isinstance(place, (str, os.PathLike)):
        raise UserError(
            f"`{name}` must be a path, but got {type(place).__name__}: {str(place)[:60]}"
        )
    return user_path(place)
