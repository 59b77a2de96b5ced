"""A run folder: its lock, whose it is, and its config."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from calibrate.errors import UserError
from calibrate.schema import RunConfig
from skip_softmax.thresholds.yaml_file import parse, read_mapping, write_text_atomically

if TYPE_CHECKING:
    pass


def open_run(folder: str | os.PathLike[str]) -> tuple[Path, RunConfig]:
    """Path and config of an existing run folder.

    Raises:
        UserError: it is no run folder.
    """
    path = Path(folder)
    if not (path / "config.yaml").exists():
        raise UserError(
            f"`{folder}` is no run folder: it has no config.yaml; give the folder of a `calibrate run`"
        )
    data, text = read_mapping(path / "config.yaml")
    return path, parse(RunConfig, data, source=str(path / "config.yaml"), text=text)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Two processes in one run folder would mix their results. Makes the folder if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"output: `{folder}` cannot be written ({error}); choose a writable folder"
        ) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"`{folder}` is in use by another `calibrate` process; wait for it or use another folder"
            ) from None
        yield folder


def claimed(folder: Path, config: RunConfig) -> RunConfig:
    """Makes a locked folder this config's, or checks that it is.

    Returns:
        The config, with as many trials as `calibrate search` has asked for since.
    """
    begun = any((folder / name).exists() for name in ("prompts.json", "stats.safetensors"))
    if not begun or not (folder / "config.yaml").exists():
        # A config that led nowhere may be corrected.
        (folder / "run.json").unlink(missing_ok=True)
        _write_config(folder, config)
    _, before = open_run(folder)
    if config.search.trials < before.search.trials:
        search = config.search.model_copy(update={"trials": before.search.trials})
        config = config.model_copy(update={"search": search})
    ours, theirs = _comparable(config), _comparable(before)
    if ours != theirs:
        keys = [key for key in ours if ours[key] != theirs[key]]
        raise UserError(
            f"output: `{folder}` belongs to another config (different: {', '.join(keys)}); use another "
            "output folder, delete it if it holds nothing you need, or `calibrate search` for more trials "
            "of the same run"
        )
    return config


def _comparable(config: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in config.model_dump(mode="json").items() if k != "output"}


def _write_config(folder: Path, config: RunConfig) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_text_atomically(folder / "config.yaml", text)
