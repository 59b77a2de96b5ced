"""A run folder: its lock, whose it is, its config, and which stages are finished."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from calibrate.errors import UserError
from calibrate.record.files import read_json, write_json
from calibrate.record.provenance import of_run
from calibrate.schema import RunConfig
from skip_softmax.thresholds.yaml_file import parse, read_mapping, write_text_atomically

# What a finished stage has left in the folder; a deleted result is recomputed.
_RESULTS = {
    "sensitivity": ("sensitivity.json",),
    "search": ("study.db",),
    "validation": ("validation.json", "thresholds.yaml"),
}
# What the model has done, which belongs to one config; everything else is soon made again.
_WORK = ("stats.safetensors", "dense", "served.jsonl", "served.json")


def open_run(folder: str | os.PathLike[str]) -> tuple[Path, RunConfig]:
    """Path and config of an existing run folder.

    Raises:
        UserError: it is not a run folder.
    """
    path = Path(folder)
    _require_utf8(path)
    if not (path / "config.yaml").exists():
        raise UserError(
            f"`{folder}` is not a run folder (no config.yaml); pass a folder written by `calibrate run`"
        )
    data, text = read_mapping(path / "config.yaml")
    return path, parse(RunConfig, data, source=str(path / "config.yaml"), text=text)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Two processes in one run folder would mix their results. Makes the folder if it is missing."""
    _require_utf8(folder)
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
        except BlockingIOError:
            raise UserError(
                f"`{folder}` is in use by another `calibrate` process; wait for it or use another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"output: `{folder}` must be on a filesystem that can lock files, but it cannot ({error}); "
                "use a folder on a local disk"
            ) from None
        yield folder


def _require_utf8(folder: Path) -> None:
    """The library that reads tensors opens no other names."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"output: the name of a run folder must be UTF-8, but got {str(folder)!a}; rename it, or use "
            "another folder"
        ) from None


def claimed(folder: Path, config: RunConfig) -> RunConfig:
    """Makes a locked folder this config's, or checks that it is.

    Returns:
        The config, with as many trials as `calibrate search` has asked for since.
    """
    written = folder / "config.yaml"
    begun = any((folder / name).exists() for name in _WORK)
    if not written.exists() or (not begun and written.read_bytes() != _text(config).encode()):
        # A config that led nowhere may be corrected.
        for name in ("run.json", "prompts.json"):
            (folder / name).unlink(missing_ok=True)
        write_config(folder, config)
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


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes `config.yaml`."""
    write_text_atomically(folder / "config.yaml", _text(config))


def _text(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class Notes:
    """`run.json`: what the run was made with, and which stages are finished, with their seconds."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._folder = folder
        self._config = config
        self._started = time.monotonic()

    @property
    def model(self) -> dict[str, str] | None:
        """`name` and `sha256` of the run's model; None: no model was loaded yet."""
        model: dict[str, str] | None = self._read().get("model")
        return model

    def note_model(self, name: str, sha256: str) -> None:
        """Notes the run's model.

        Raises:
            UserError: the run was made with another one.
        """
        notes, model = self._read(), {"name": name, "sha256": sha256}
        if notes.get("model", model) != model:
            raise UserError(
                f"`{self._folder}` was made with another model ({notes['model']} before, {model} now); "
                "use another output folder"
            )
        self._write({**notes, "model": model})

    def note_stop(self, stopped: dict[str, Any] | None) -> None:
        """Notes why the search ended before its last trial, as `search.study.Stopped`; None: it did not."""
        notes = {key: value for key, value in self._read().items() if key != "search_stopped"}
        self._write(notes if stopped is None else {**notes, "search_stopped": stopped})

    def finish(self, stage: str) -> None:
        """Marks a stage as finished, with the seconds this process spent since the last mark."""
        notes, now = self._read(), time.monotonic()
        notes.setdefault("seconds", {})[stage] = round(now - self._started, 1)
        self._started = now
        self._write(notes)

    def reopen(self, *stages: str) -> None:
        """Marks stages as unfinished; what they measured stays."""
        notes = self._read()
        for stage in stages:
            notes.get("seconds", {}).pop(stage, None)
        self._write(notes)

    def finished(self, stage: str) -> bool:
        """Whether a stage is marked as finished and its results are still there."""
        files = _RESULTS.get(stage, ())
        if stage == "search" and self._config.search.storage is not None:
            files = ()
        return stage in self._read().get("seconds", {}) and all(
            (self._folder / name).exists() for name in files
        )

    def require(self, stage: str) -> None:
        """Refuses a run whose stage is not finished.

        Raises:
            UserError: it is not; the message names the command that finishes it.
        """
        if not self.finished(stage):
            cure = "validate" if stage == "validation" and self.finished("search") else "run"
            raise UserError(
                f"`{self._folder}`: its {stage} is not finished; finish it with `calibrate {cure}`"
            )

    def _read(self) -> dict[str, Any]:
        path = self._folder / "run.json"
        return dict(read_json(path)) if path.exists() else of_run(self._config)

    def _write(self, notes: dict[str, Any]) -> None:
        write_json(self._folder / "run.json", notes, indent=1)
