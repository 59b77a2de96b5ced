"""What numbers from elsewhere do to a run's model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    thresholds,
)

from calibrate.engines import read as importing
from calibrate.proof.assess import as_served
from skip_softmax.thresholds.file import Thresholds


def import_for(
    smoke_run: Path, target: Path, prefill: float, decode: float, engine: str = "native"
) -> Thresholds:
    run = Thresholds.load(smoke_run / "thresholds.yaml")
    foreign = importing.plain({"prefill": prefill, "decode": decode})
    file = importing.to_thresholds(foreign, run.model, engine, None, None, "a blog")
    # The tiny model's tiles, so that something can be skipped.
    file = file.model_copy(update={"geometry": run.geometry})
    file.save(target)
    return file


def test_numbers_that_hold_pass_and_can_be_written_with_their_evidence(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 100.0, 100.0)
    code, out, err = call(
        "validate", smoke_run, "--thresholds", tmp_path / "t.yaml", "-o", tmp_path / "v.yaml"
    )
    assert code == 0, err
    assert all(word in out for word in ("dense", "given", "calibrated", "256", "384"))
    new = Thresholds.load(tmp_path / "v.yaml")
    assert new.evidence["verdict"] == "passed"
    assert new.evidence["sparsity"]["decode"]["achieved"] > 0
    assert new.min_kv_len.prefill == 256  # nothing shorter was measured


def test_a_threshold_of_1_or_more_fails_and_says_where(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 300.0, 0.0, engine="trtllm")
    code, out, err = call("validate", smoke_run, "--thresholds", tmp_path / "t.yaml", "--json")
    assert code == 1 and "the threshold is 1 or more at 256 tokens" in err
    rows = {(row["length"], row["setting"]): row for row in json.loads(out)["rows"]}
    assert rows[256, "given"]["above_one"] and not rows[384, "given"]["above_one"]
    assert rows[256, "given"]["threshold"]["prefill"] == pytest.approx(300 / 256)
    assert rows[256, "dense"]["kl"] == 0


def test_engines_know_no_shortest_length_but_our_kernel_does(
    smoke_run: Path, tmp_path: Path
) -> None:
    foreign = import_for(smoke_run, tmp_path / "t.yaml", 300.0, 10.0, engine="sglang")
    assert as_served(foreign, 256) == (foreign, True)
    served, above_one = as_served(foreign, 512)
    assert not above_one and served.min_kv_len.prefill == served.min_kv_len.decode == 512
    own = import_for(smoke_run, tmp_path / "t.yaml", 300.0, 10.0)
    assert as_served(own, 256) == (own, False)


def test_numbers_for_another_model_are_refused(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code, out, err = call("validate", smoke_run, "--thresholds", tmp_path / "t.yaml")
    assert (code, out) == (2, "") and "must be for the run's model" in err


def test_a_run_is_not_needed_beforehand(
    call: Callable[..., Any], smoke_run: Path, smoke_model: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 0.0, 50.0)
    config = tmp_path / "c.yaml"
    config.write_text((smoke_run / "config.yaml").read_text())
    arguments = ("--thresholds", tmp_path / "t.yaml", "--config", config)
    code, out, err = call("validate", tmp_path / "new", *arguments)
    assert code == 0, err
    assert "calibrated" not in out and (tmp_path / "new" / "prompts.json").exists()
    code, _, err = call("validate", "--thresholds", tmp_path / "t.yaml")
    assert code == 2 and "needs a run folder, or --config" in err


def test_below_1_the_engines_rule_is_ours_and_above_it_skips_what_dominates(
    smoke_run: Path, smoke_model: Path, tmp_path: Path
) -> None:
    from calibrate.loss.measure import compare, compare_unguarded
    from calibrate.model.load import load
    from calibrate.pipeline import Stages
    from calibrate.record.folder import open_run
    from calibrate.schema import ModelConfig

    loaded = load(ModelConfig(path=str(smoke_model)))
    shutil.copytree(smoke_run, tmp_path / "run")
    run = Stages(*open_run(tmp_path / "run"))
    prompt = run.prompts["heldout"][0]
    dense = run.dense(prompt)
    for prefill, decode in ((150.0, 0.0), (0.0, 120.0), (199.0, 199.0)):
        file = import_for(smoke_run, tmp_path / "t.yaml", prefill, decode)
        ours = compare(loaded, file, prompt, dense)
        theirs = compare_unguarded(loaded, file, prompt, dense)
        assert (theirs.visited, theirs.skipped) == (ours.visited, ours.skipped)
        assert sum(ours.skipped["prefill"]) + sum(ours.skipped["decode"]) > 0
        assert theirs.losses["kl"] == pytest.approx(ours.losses["kl"], rel=1e-3, abs=1e-6)
    huge = import_for(smoke_run, tmp_path / "t.yaml", 1e300, 1e300, engine="trtllm")
    found = compare_unguarded(loaded, huge, prompt, dense)
    # What is left is one tile per vote: the first.
    kept = [v - s for v, s in zip(found.visited["prefill"], found.skipped["prefill"], strict=True)]
    assert kept == [4 * -(-len(prompt.ids) // 16)] * 4
    assert compare(loaded, huge, prompt, dense).losses["kl"] < 1e-6  # our kernel runs dense
