"""Whole runs in which a phase, or both, cannot skip: what is left dense is named, and the rest is proven."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import SMOKE, Result

import calibrate
from calibrate.errors import WorkFailed
from skip_softmax import Thresholds

pytestmark = pytest.mark.slow


def config(folder: Path, sharpness: float, prefill: int, decode: int) -> Path:
    """The smoke config with a model of milder attention, in which no gap is larger than a few nats."""
    model = folder / "model"
    tiny.model("llama", sharpness, num_hidden_layers=4).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    text = SMOKE.read_text(encoding="utf-8")
    for old, new in (
        ("../runs/smoke-model", str(model)),
        ("[256, 384]", "[384]"),
        ("{prefill: 200, decode: 200}", f"{{prefill: {prefill}, decode: {decode}}}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    """Decode's scale factors are capped at 3.92 tokens, far below what any of its tiles needs."""
    folder = tmp_path_factory.mktemp("half")
    return calibrate.run(config(folder, 30.0, 380, 4), folder / "run")


def test_the_phase_that_cannot_skip_is_dense_and_the_other_is_proven(half: calibrate.Run) -> None:
    file, evidence = half.thresholds, half.thresholds.evidence
    assert evidence["verdict"] == "passed"
    for layer in range(4):
        assert set(file.per_head(layer, "decode")) == {0.0}
    assert any(max(file.per_head(layer, "prefill")) > 0 for layer in range(4))
    assert evidence["sparsity"]["prefill"]["achieved"] > 0.05
    assert evidence["sparsity"]["decode"]["achieved"] == 0.0
    assert evidence["predicted_speedup"]["decode"] == 1.0
    assert set(evidence["dense"]) == {"decode"}
    named = evidence["dense"]["decode"]
    assert named["reason"] == "no tile can be skipped below the largest scale factor"
    assert (named["most"], named["at"]) == (0.0, 3.92)
    # The first tile is skipped from this scale factor on, and at the bin edge before it none is.
    assert half.stats.sparsity("decode", named["first"] * 1.001) > 0
    assert half.stats.sparsity("decode", named["first"] * 2 ** (-1 / 8)) == 0
    assert named["first"] > named["at"]
    assert "left dense" in file.fit["decode"]["refused"], "an engine must not read that curve"


def test_what_is_dense_is_shown(half: calibrate.Run, call: Callable[..., Result]) -> None:
    file = half.folder / "thresholds.yaml"
    line = (
        "decode is left dense: no tile can be skipped below the largest scale factor (at most 0 %"
    )
    shown = call("show", file)
    assert shown.code == 0 and line in shown.stdout
    page = half.report().read_text(encoding="utf-8")
    assert line[1:] in page
    assert half.findings["dense"] == half.thresholds.evidence["dense"]
    again = call("validate", half.folder)
    assert again.code == 0 and line in again.stdout


def test_a_half_dense_result_is_exported(
    half: calibrate.Run, call: Callable[..., Result], tmp_path: Path
) -> None:
    file = half.folder / "thresholds.yaml"
    native = call("export", file, "--engine", "native", "-o", tmp_path / "t.yaml")
    assert native.code == 0, native.stderr
    assert Thresholds.load(tmp_path / "t.yaml") == half.thresholds
    projected = call("project", half.folder, "--engine", "trtllm", "--gpu", "sm100", "--json")
    assert projected.code == 0, projected.stderr
    report = json.loads(projected.stdout)
    assert report["projection"]["used"]["scale_factor"]["decode"] == 0.0
    evidence = Thresholds.load(report["thresholds"]).evidence
    assert evidence["dense"] == half.thresholds.evidence["dense"]
    made = call("export", report["thresholds"], "--engine", "trtllm", "--gpu", "sm100")
    assert made.code == 0, made.stderr
    assert "prefill" in made.stdout and "decode" not in made.stdout
    refused = call("project", half.folder, "--engine", "trtllm", "--phase", "decode")
    assert refused.code == 2 and "the run leaves decode dense" in refused.stderr


def test_the_file_of_a_half_dense_run_holds_on_its_own_prompts(
    half: calibrate.Run, call: Callable[..., Result]
) -> None:
    found = call("validate", half.folder, "--thresholds", half.folder / "thresholds.yaml")
    assert found.code == 0, found.stderr


def test_a_run_in_which_no_phase_can_skip_fails_and_says_how_far_away_it_was(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    ran = call("run", config(tmp_path, 10.0, 20, 4), "-o", tmp_path / "run")
    assert ran.code == 1
    assert (
        "no tile can be skipped below the largest scale factor in prefill or decode" in ran.stderr
    )
    assert "prefill: at most 0 % of the tiles at 19.6 tokens, the first at" in ran.stderr
    assert "decode: at most 0 % of the tiles at 3.92 tokens, the first at" in ran.stderr
    assert "raise `target.min_kv_len`" in ran.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "thresholds.yaml").exists()


def test_a_budget_that_stops_every_trial_says_how_far_away_it_was(tmp_path: Path) -> None:
    file = config(tmp_path, 400.0, 380, 380)
    few = ("budget.kl=1e-9", "search.trials=2", "search.prune_factor=1.01")
    with pytest.raises(
        WorkFailed, match=r"stopped early spends at least [\d.e+]+ times the budget"
    ):
        calibrate.run(file, tmp_path / "run", overrides=few)
