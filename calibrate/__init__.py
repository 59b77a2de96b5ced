"""Calibration of skip-softmax attention: which scale factor a model can take, at what cost.

Importing this package loads neither torch nor optuna nor transformers; `run` does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibrate.pipeline import Progress, Run
    from calibrate.schema import RunConfig

__all__ = ["open_run", "run"]


def run(
    config: str | os.PathLike[str] | RunConfig,
    output: str | os.PathLike[str] | None = None,
    *,
    overrides: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Run:
    """Calibrates a model: captures, fits, searches, validates and emits; resumes what is in the run folder.

    Args:
        config: path of a run config, or a config.
        output: run folder; None: the config's `output`, else `runs/` and the config file's name.
        overrides: `section.key=value` strings, applied to a config given as a path.
        progress: who watches; None: nobody.

    Returns:
        The finished run: `run.thresholds`, `run.stats`, `run.study`, `run.validation`.

    Raises:
        UserError: config, model, prompts or folder are wrong.
        FileError: the config file breaks its schema.
        WorkFailed: no setting skips anything within the budget.
    """
    from calibrate.schema import RunConfig, load_config

    if isinstance(config, RunConfig):
        chosen, name = config, "run"
    else:
        chosen, name = load_config(config, overrides), Path(config).stem
    folder = output or chosen.output or Path("runs") / name
    # Only now: a mistake in the config is told before torch is loaded.
    from calibrate import pipeline

    return pipeline.run(chosen, folder, progress)


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Opens a finished run to look at it or to decide again; the model is not loaded, no GPU is needed.

    Args:
        folder: the folder of a `calibrate run`.

    Returns:
        The run: `run.thresholds`, `run.stats`, `run.study`, `run.validation`.

    Raises:
        UserError: it is no run folder, or the run is not finished.
    """
    from calibrate import pipeline

    return pipeline.load_run(folder)
