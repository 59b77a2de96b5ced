"""Run folders that belong to another run, are in use or cannot be written."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    Finished,
    Result,
    refused,
)


def test_a_folder_of_another_config_is_refused(
    finished: Finished, call: Callable[..., Result]
) -> None:
    before = (finished.folder / "config.yaml").read_bytes()
    result = call("run", finished.config, "-o", finished.folder, "--set", "budget.kl=0.3")
    refused(result, str(finished.folder), "belongs to another config", "budget", "another output")
    assert (finished.folder / "config.yaml").read_bytes() == before


def test_a_run_of_one_geometry_is_not_continued_at_another(
    finished: Finished, call: Callable[..., Result]
) -> None:
    changed = ("--set", "geometry.prefill.tile_q=32")
    result = call("run", finished.config, "-o", finished.folder, *changed)
    refused(result, "belongs to another config", "geometry")


def test_statistics_of_another_geometry_are_refused(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "stats.safetensors", folder)
    changed = ("--set", "geometry.prefill.tile_q=32")
    result = call("run", finished.config, "-o", folder, *changed)
    refused(result, str(folder / "stats.safetensors"), "geometry", "another output folder")


def test_statistics_of_another_model_are_refused(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    import tiny

    tiny.model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "stats.safetensors", folder)
    changed = ("--set", f"model.path={tmp_path / 'other'}")
    result = call("run", finished.config, "-o", folder, *changed)
    refused(result, str(folder / "stats.safetensors"), "model", "another output folder")


def test_damaged_statistics_are_named(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "stats.safetensors").write_bytes(b"x" * 100)
    result = call("run", finished.config, "-o", folder)
    refused(result, str(folder / "stats.safetensors"), "cannot be read as tile statistics")


def unwritable_folders(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "file"
    file.touch()
    yield file
    yield file / "below"
    yield Path("/proc/calibrate-run")
    if os.geteuid() != 0:  # root may write everywhere
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
        yield folder
        yield folder / "below"


def test_an_output_that_cannot_be_written_is_refused(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in unwritable_folders(tmp_path):
        result = call("run", smoke(), "-o", folder)
        refused(result, "output", str(folder), "cannot be written", "choose a writable folder")


def test_a_lock_that_cannot_be_written_is_refused(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # stands for a file of another user; root may open those
    refused(call("validate", folder), str(folder), "cannot be written")


@pytest.mark.parametrize("verb", ["run", "search", "validate"])
def test_a_folder_in_use_is_refused_and_left_as_it_is(
    finished: Finished, call: Callable[..., Result], tmp_path: Path, verb: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    arguments = {
        "run": ("run", finished.config, "-o", folder),
        "search": ("search", folder, "--trials", "12"),
        "validate": ("validate", folder),
    }[verb]
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(call(*arguments), str(folder), "in use by another", "wait for it")
    after = {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"}
    assert after == {path: at for path, at in before.items() if path.name != ".lock"}


@pytest.mark.parametrize(
    "url", ["nonsense", "nonsense://host/db", "sqlite:////nowhere/at/all/study.db"]
)
def test_a_storage_that_cannot_be_used_is_refused_before_any_work(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path, url: str
) -> None:
    result = call("run", smoke(), "-o", tmp_path / "run", "--set", f"search.storage={url}")
    refused(result, "search.storage", f"`{url}`", "cannot be used")
    assert not (tmp_path / "run" / "stats.safetensors").exists()


def test_a_device_without_measured_times_is_refused_before_any_work(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    result = call("run", smoke(), "-o", tmp_path / "run", "--set", "cost.device=Abacus")
    refused(result, "cost.device", "`Abacus`", "devices there")
    assert not (tmp_path / "run" / "stats.safetensors").exists()
