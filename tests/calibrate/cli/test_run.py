"""`calibrate run`: what it prints and where, what it leaves, its exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Finished,
    Result,
)
from report_files import chosen_of

from calibrate import pipeline
from skip_softmax.thresholds.file import Thresholds


def test_smoke_run_ends_well_within_a_minute(finished: Finished) -> None:
    assert finished.result.code == 0, finished.result.stderr
    assert finished.seconds < 60
    assert "Traceback" not in finished.result.stderr
    assert finished.result.message == "passed: run/thresholds.yaml\n"


def test_a_run_says_what_it_can_prove_before_the_work_and_before_the_proof(
    finished: Finished,
) -> None:
    said = finished.result.stderr.splitlines()
    notes = [line for line in said if line.startswith("note: with 8 held-out prompts and ")]
    assert "losses that differ by a factor of 2 within a task" in notes[0]
    assert "the spread seen on the search prompts" in notes[1]
    assert all(" of the KL budget can be proven; 0.85 would take about " in note for note in notes)
    stages = {line.partition(":")[0]: number for number, line in enumerate(said)}
    assert said.index(notes[0]) < stages["capture"] < stages["search"]
    assert stages["search"] < said.index(notes[1]) < stages["validation"]


def test_json_of_a_run_is_exactly_one_document_on_stdout(finished: Finished) -> None:
    document = json.loads(finished.result.stdout)
    assert document["thresholds"] == "run/thresholds.yaml"
    assert document["evidence"] == Thresholds.load(finished.folder / "thresholds.yaml").evidence
    assert document["evidence"]["verdict"] == "passed"


def test_a_run_skips_tiles_in_both_phases_and_holds_every_result(finished: Finished) -> None:
    evidence = Thresholds.load(finished.folder / "thresholds.yaml").evidence
    assert all(evidence["sparsity"][phase]["achieved"] > 0 for phase in ("prefill", "decode"))
    names = {path.name for path in finished.folder.iterdir()}
    assert {
        "config.yaml",
        "stats.safetensors",
        "fit.json",
        "sensitivity.json",
        "study.db",
        "loss_model.json",
        "validation.json",
        "thresholds.yaml",
        "run.json",
    } <= names


def test_results_are_as_readable_as_any_file_the_user_makes(finished: Finished) -> None:
    mine = finished.folder.parent / "any-file"
    mine.touch()
    modes = {path.name: oct(path.stat().st_mode) for path in finished.folder.glob("[!.]*.*")}
    assert set(modes.values()) == {oct(mine.stat().st_mode)}, modes


def test_run_prints_the_table_on_stdout_uncut(
    finished: Finished, call: Callable[..., Result]
) -> None:
    result = call("run", finished.config, "-o", finished.folder)
    assert result.code == 0, result.stderr
    assert "best single number" in result.stdout
    assert "…" not in result.stdout
    kl = chosen_of(json.loads((finished.folder / "validation.json").read_text()))["kl"]["mean"]
    assert f"{kl:#.3g}" in result.stdout


def test_messages_do_not_take_paths_for_markup_or_wrap_them(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "[bold]" / ("long-" * 20)
    shutil.copytree(finished.folder, folder)
    result = call("run", finished.config, "-o", folder)
    assert result.message == f"passed: {folder / 'thresholds.yaml'}\n"


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["budget.kl=1e-13", "budget.kl=0.1"])
def test_a_budget_that_cannot_be_met_exits_1_and_leaves_nothing_that_skips(
    call: Callable[..., Result],
    smoke: Callable[..., Path],
    tmp_path: Path,
    budget: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is within the budget on the search prompts, or held-out prompts lose far more than those."""
    if budget == "budget.kl=0.1":

        def compare(loaded: Any, thresholds: Thresholds, prompt: Any, dense: Any) -> Any:
            outcome = original(loaded, thresholds, prompt, dense)
            lost = {**outcome.losses, "kl": 10.0} if prompt.split == "heldout" else outcome.losses
            return replace(outcome, losses=lost)

        original = pipeline.compare
        monkeypatch.setattr(pipeline, "compare", compare)
    few = ("--set", "search.trials=3")
    command = ("run", smoke(), "-o", tmp_path / "run", "--set", budget, *few)
    result, again = call(*command), call(*command)
    assert (again.code, again.stdout, again.message) == (1, result.stdout, result.message)
    assert result.code == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.message.startswith("error: ") and len(result.message.splitlines()) == 1
    assert "udget" in result.message  # the law
    assert "aise" in result.message  # the cure
    written = tmp_path / "run" / "thresholds.yaml"
    if budget == "budget.kl=1e-13":
        assert "no trial skips" in result.message
        assert result.stdout == ""
        assert not written.exists()
        return
    assert str(written) in result.message
    thresholds = Thresholds.load(written)
    assert thresholds.evidence["verdict"] == "failed"
    assert "upper bound" in thresholds.evidence["reason"]
    for layer in range(thresholds.model.layers):
        for phase in ("prefill", "decode"):
            assert set(thresholds.per_head(layer, phase)) == {0.0}


def test_a_budget_that_nothing_could_prove_is_refused_before_any_work(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = call("run", smoke(), "-o", folder, "--set", "budget.confidence=0.999999")
    assert result.code == 2 and len(result.message.splitlines()) == 1
    assert "`prompts.heldout: 8` have no upper bound of the KL at a confidence of 0.999999" in (
        result.message
    )
    result = call("run", smoke(), "-o", folder, "--set", "budget.score_drop=3")
    assert result.code == 2 and len(result.message.splitlines()) == 1
    for part in (
        "budget.score_drop: an upper bound of at most 3 points must be possible",
        "with `prompts.heldout: 8` it is 33.05 even if no prompt loses anything",
        "at least 106 held-out prompts",
        "`budget.score_drop: null`",
    ):
        assert part in result.message
    assert not (folder / "prompts.json").exists()
