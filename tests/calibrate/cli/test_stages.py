"""`calibrate search` and `validate`: one stage again, from what the run saved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    Finished,
    Result,
    refused,
)

from skip_softmax.thresholds.file import Thresholds


def without_commit(content: bytes) -> bytes:
    """Somebody may commit while the tests run; that alone changes a file's provenance."""
    return re.sub(rb"commit: \w+", b"", content)


def finished_trials(folder: Path) -> int:
    import optuna

    study = optuna.load_study(study_name="calibrate", storage=f"sqlite:///{folder / 'study.db'}")
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=done))


def test_search_adds_trials_and_validate_proves_their_winner(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    assert finished_trials(folder) == 8
    searched = call("search", folder, "--trials", "10")
    assert searched.code == 0, searched.stderr
    assert searched.stdout == ""
    assert f"calibrate validate {folder}" in searched.stderr
    assert finished_trials(folder) == 10
    (folder / "thresholds.yaml").unlink()
    validated = call("validate", folder, "--json")
    assert validated.code == 0, validated.stderr
    assert json.loads(validated.stdout)["evidence"]["verdict"] == "passed"
    assert Thresholds.load(folder / "thresholds.yaml").evidence["verdict"] == "passed"
    assert finished_trials(folder) == 10


def test_validate_of_an_unchanged_run_writes_the_same_file(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = (folder / "thresholds.yaml").read_bytes()
    (folder / "thresholds.yaml").unlink()
    assert call("validate", folder).code == 0
    assert without_commit((folder / "thresholds.yaml").read_bytes()) == without_commit(before)


@pytest.mark.parametrize("verb", ["search", "validate"])
def test_a_stage_whose_earlier_stages_are_missing_is_refused(
    finished: Finished, call: Callable[..., Result], tmp_path: Path, verb: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "config.yaml", folder)
    refused(call(verb, folder), str(folder), "calibrate run")


@pytest.mark.parametrize("verb", ["search", "validate"])
def test_a_folder_that_is_no_run_is_refused(
    call: Callable[..., Result], tmp_path: Path, verb: str
) -> None:
    refused(call(verb, tmp_path), str(tmp_path), "not a run folder", "config.yaml")
    refused(call(verb, tmp_path / "missing"), "missing", "not a run folder")


def test_a_damaged_config_in_a_run_folder_is_named(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("trials: 8", "trials: eight"))
    line = text.splitlines().index("  trials: 8") + 1
    refused(call("validate", folder), f"config.yaml:{line}: search.trials", "'eight'")
