"""Whose a study is: what decides the values of its trials. The trials of one study must compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from calibrate.prompts.build import Prompt
from calibrate.record.files import as_written, read_json
from calibrate.record.folder import Notes
from calibrate.record.provenance import digest
from calibrate.schema import CostConfig, RunConfig


def owner_of(folder: Path, config: RunConfig) -> dict[str, Any]:
    """What decides a run's trials, from what the run has on disk.

    Args:
        folder: the run folder.
        config: its config.

    Returns:
        Plain data, the same for every worker of one search; what is not known yet is None.

    Raises:
        UserError: a file of the folder is damaged.
    """
    model = Notes(folder, config).model
    about: dict[str, str] = {"dtype": config.model.dtype, "engine": config.model.engine}
    if config.model.kv_cache_dtype != "auto":
        about["kv_cache_dtype"] = config.model.kv_cache_dtype
    return {
        "model": None if model is None else {**model, **about},
        "geometry": _plain(config.geometry),
        "prompts": _prompts(folder / "prompts.json"),
        "budget": _plain(config.budget),
        "target": _plain(config.target),
        "search": {"groups": config.search.groups},
        "sensitivity": _plain(config.sensitivity),
        "cost": _times(config.cost),
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In words, where two owners differ; what one of them does not know is no difference."""
    found = []
    for part in (part for part in ours if ours[part] and theirs.get(part)):
        for key, there, here in _leaves(part, theirs[part], ours[part]):
            if there == here or key == "model.name":
                continue
            if key == "model.sha256":
                key, there, here = "model", *_told_apart(theirs[part], ours[part])
            # A digest tells a reader nothing.
            found.append(key if key == "prompts" else f"{key} ({there} there, {here} here)")
    return found


def _told_apart(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str]:
    there, here = theirs["name"], ours["name"]
    return (there, here) if there != here else (theirs["sha256"][:12], ours["sha256"][:12])


def _leaves(name: str, theirs: Any, ours: Any) -> Iterator[tuple[str, Any, Any]]:
    """Both sides' values of every key that both have, with its dotted name."""
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        yield name, theirs, ours
        return
    for key in (key for key in ours if key in theirs):
        yield from _leaves(f"{name}.{key}", theirs[key], ours[key])


def _plain(value: Any) -> Any:
    """A section with all its keys: what is written leaves out some at their default."""
    if isinstance(value, BaseModel):
        return {key: _plain(inner) for key, inner in value}
    return list(value) if isinstance(value, tuple) else value


def _prompts(path: Path) -> str | None:
    """Digest of the prompts that decide trials: what is counted, and what is scored."""
    if not path.exists():
        return None
    rows = read_json(path)
    with as_written(path):
        return digest(
            [
                [Prompt.from_json(row).key for row in rows[split]]
                for split in ("calibration", "search")
            ]
        )


def _times(config: CostConfig) -> dict[str, str]:
    """Where predicted times come from; a file by its content, since workers may keep it elsewhere."""
    curves = "bundled"
    if config.curves is not None:
        try:
            curves = hashlib.sha256(Path(config.curves).read_bytes()).hexdigest()[:12]
        except OSError:
            return {"device": config.device}  # a finished run may outlive the file
    return {"device": config.device, "curves": curves}
