"""What an engine can express: search spaces, and projections that are measured, not assumed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import calibrate
from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export
from calibrate.engines.types import Server, Votes
from calibrate.proof import project
from calibrate.proof.project import describe
from calibrate.record.folder import open_run
from calibrate.schema import load_config
from calibrate.search.study import open_study, points
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, LayerOverride


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines whose kernels vote on the smoke run's tiles."""
    votes = Votes(((1 << 20, (16,)),), tile_q=16)
    for name in ("trtllm", "sglang"):
        server = Server(ENGINES[name].title, "sm90", votes, replace(votes, tile_q=None))
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], servers=(server,)))


def per_layer(folder: Path) -> Thresholds:
    """Makes the run's result differ by layer; layer 0 is dense in both phases."""
    file = Thresholds.load(folder / "thresholds.yaml")
    layers = tuple(
        LayerOverride(
            layer=i, prefill=0.0 if i == 0 else 40.0 * i, decode=0.0 if i == 0 else 30.0 * i
        )
        for i in range(file.model.layers)
    )
    evidence = {key: value for key, value in file.evidence.items() if key != "uniform_baseline"}
    changed = file.model_copy(
        update={
            "layers": layers,
            "evidence": evidence,
            "scale_factor": file.scale_factor.model_copy(update={"prefill": 0.0, "decode": 0.0}),
        }
    )
    changed.save(folder / "thresholds.yaml")
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_the_search_stays_in_what_the_engine_can_express(
    engine: str, smoke_model: Path, tmp_path: Path
) -> None:
    overrides = (f"model.path={smoke_model}", f"target.engine={engine}", "search.trials=8")
    config = load_config(ROOT / "configs" / "smoke.yaml", overrides)
    run = calibrate.run(config, tmp_path / "run")
    found = points(open_study(config.search, tmp_path / "run"))
    assert len(found) >= 5
    dense = set()
    for point in found:
        skipping = [factors for factors in point.setting.values() if any(factors)]
        assert all(len(set(factors) - {0.0}) == 1 for factors in skipping)
        zeros = {tuple(f == 0 for f in factors) for factors in skipping}
        assert len(zeros) <= 1  # an ignored layer is dense in both phases
        dense |= {sum(pattern) for pattern in zeros}
    assert dense == {0} if engine == "sglang" else len(dense) > 1
    # Nothing has to be projected: the winner is the export.
    spaces = {key.split(".")[-1] for trial in run.study.trials for key in trial.params}
    assert spaces == {"log2_scale"} | ({"dense_layers"} if engine == "trtllm" else set())
    # The curve that is exported goes through the number, at the sparsity that was counted there.
    factors = {
        phase: [max(run.thresholds.per_head(layer, phase)) for layer in range(4)]
        for phase in PHASES
    }
    assert any(map(any, factors.values()))
    for phase in (phase for phase in PHASES if any(factors[phase])):
        curve = run.thresholds.fit[phase]
        assert curve["target"] == pytest.approx(run.stats.sparsity(phase, factors[phase]), rel=1e-4)
        number = curve["a"] * math.exp(curve["b"] * curve["target"])
        assert number == pytest.approx(max(factors[phase]), rel=1e-2)
        low, high = curve["good"]
        assert low <= curve["target"] <= high


@pytest.mark.slow
def test_a_reduced_search_goes_on_as_if_it_had_not_been_stopped(
    smoke_model: Path, tmp_path: Path
) -> None:
    def config(trials: int) -> Any:
        overrides = (
            f"model.path={smoke_model}",
            "target.engine=scalar+ignore",
            f"search.trials={trials}",
        )
        return load_config(ROOT / "configs" / "smoke.yaml", overrides)

    calibrate.run(config(7), tmp_path / "part")
    shutil.copytree(tmp_path / "part", tmp_path / "other")
    for folder in ("part", "other"):
        calibrate.open_run(tmp_path / folder).search(trials=9)
    params = [
        [
            trial.params
            for trial in open_study(open_run(tmp_path / folder)[1].search, tmp_path / folder).trials
        ]
        for folder in ("part", "other")
    ]
    assert len(params[0]) == 9 and params[0] == params[1]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("engine", ["trtllm", "sglang"])
def test_a_projection_is_measured_and_can_be_exported(
    engine: str, call: Callable[..., Any], copied: Path
) -> None:
    source = per_layer(copied)
    code, out, err = call("export", copied / "thresholds.yaml", "--engine", engine)
    assert code == 2 and f"calibrate project RUN_DIR --engine {engine}" in err
    code, out, err = call("project", copied, "--engine", engine, "--json")
    assert code == 0, err
    report = json.loads(out)["projection"]
    file = Thresholds.load(copied / f"projected-{engine}.yaml")
    assert file.evidence["verdict"] == "passed"
    assert file.evidence["projection"] == report
    assert file.evidence["loss"]["kl"]["upper"] <= file.evidence["budget"]["kl"]
    expected_dense = [0] if engine == "trtllm" else []
    assert report["direct"]["dense_layers"] == expected_dense
    assert report["of"] and source.evidence["verdict"] == "passed"
    model = copied.parent / "served"
    model.mkdir()
    shutil.copy(Path(open_run(copied)[1].model.path) / "config.json", model)
    made = export(file, engine, model=model, pin=True)
    assert made.sidecar is not None
    assert made.sidecar["evidence"]["loss"] == file.evidence["loss"]
    assert made.sidecar["dense_layers"] == report["used"]["dense_layers"]
    assert made.sidecar["scale_factor"] == report["used"]["scale_factor"]
    # A second time nothing is measured again.
    before = (copied / "served.jsonl").read_text()
    assert call("project", copied, "--engine", engine)[0] == 0
    assert (copied / "served.jsonl").read_text() == before


@pytest.mark.usefixtures("tiny_tiles")
def test_a_projection_that_breaks_the_budget_is_refused_with_the_nearest_that_holds(
    call: Callable[..., Any], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_layer(copied)
    # Far over the budget above a scale factor of 60: the straight projection must not pass.

    def far(outcome: Any) -> Any:
        return replace(outcome, losses={**outcome.losses, "kl": 10.0})

    def compare(loaded: Any, thresholds: Thresholds, prompt: Any, dense: Any) -> Any:
        outcome = original(loaded, thresholds, prompt, dense)
        largest = max(thresholds.per_head(1, "prefill"))
        return far(outcome) if largest > 60 else outcome

    from calibrate import pipeline, transfer

    original = pipeline.compare
    monkeypatch.setattr(pipeline, "compare", compare)
    monkeypatch.setattr(transfer, "points", lambda _study: [])
    monkeypatch.setattr(project, "_nearest", lambda *_: 120.0)
    code, out, err = call("project", copied, "--engine", "sglang", "--json")
    assert code == 0, err
    report = json.loads(out)["projection"]
    assert (
        not report["direct"]["holds"] and "above the budget of 0.2" in report["direct"]["refused"]
    )
    assert "refused: the straight projection" in err and "the nearest within it" in err
    assert report["direct"]["scale_factor"]["prefill"] == 120.0
    assert 40 < report["used"]["scale_factor"]["prefill"] <= 60
    # Nothing holds: exit 1 and no file.
    monkeypatch.setattr(pipeline, "compare", lambda *a: far(original(*a)))
    (copied / "served.jsonl").unlink()
    (copied / "projected-sglang.yaml").unlink()
    code, out, err = call("project", copied, "--engine", "sglang")
    assert code == 1 and "budget" in err and not (copied / "projected-sglang.yaml").exists()


def test_a_projection_uses_the_engine_s_tiles_or_is_refused(
    call: Callable[..., Any], copied: Path
) -> None:
    # The smoke model's KV heads serve two query heads: Model-Optimizer's decode votes head by head.
    code, _, err = call(
        "project", copied, "--engine", "modelopt", "--gpu", "any", "--phase", "decode"
    )
    assert code == 2 and "votes alone" in err
    code, _, err = call("project", copied, "--engine", "sglang", "--gpu", "sm90")
    assert code == 2 and "ignores the decode number" in err and "--phase prefill" in err
    code, _, err = call("project", copied, "--engine", "tokenspeed", "--phase", "decode")
    assert code == 2 and "silently ignores the decode number" in err
    code, _, err = call("project", copied, "--engine", "trtllm", "--kv-dtype", "int4")
    assert code == 2 and "--kv-dtype must be one of" in err
    code, _, err = call("project", copied, "--engine", "native")
    assert code == 2 and "needs no projection" in err
    # At 64x256 tiles prefill of 384 tokens has nothing to skip: said, not exported; decode still has.
    sm90 = ("project", copied, "--engine", "trtllm", "--gpu", "sm90")
    code, _, err = call(*sm90, "--phase", "prefill")
    assert code == 1 and "none that ran to its end skips" in err
    code, _, err = call(*sm90)
    assert code == 0, err
    made = Thresholds.load(copied / "projected-trtllm.yaml")
    assert made.evidence["dense"]["prefill"]["reason"] == "the projected number skips no tile there"
    assert made.evidence["sparsity"]["decode"]["achieved"] > 0
    assert {made.per_head(layer, "prefill") for layer in range(4)} == {(0.0,) * 4}


def test_no_engine_that_skips_in_every_chunk_gets_a_projection_of_dense_ones(
    call: Callable[..., Any], copied: Path
) -> None:
    for name in ("config.yaml", "thresholds.yaml"):
        text = (copied / name).read_text(encoding="utf-8")
        assert re.search(r"tile_q: 16,?\s+tile_kv: 16", text)
        changed = re.sub(r"(tile_q: 16)(,?\s+)(tile_kv: 16)", r"\1\2\3\2chunk: 64", text, count=1)
        (copied / name).write_text(changed, encoding="utf-8")
    code, _, err = call("project", copied, "--engine", "sglang", "--phase", "prefill")
    law = "`geometry.prefill.chunk >= target.min_kv_len.prefill` must hold for sglang"
    assert code == 2 and law in err and "but got 64 and 200" in err, err


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("engine", ["modelopt", "trtllm", "sglang"])
def test_the_next_command_that_is_printed_runs(
    engine: str, call: Callable[..., Any], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_layer(copied)
    # Only what is near the planted result, with its dense layer; a trial with one number may be faster.
    monkeypatch.setattr("calibrate.proof.project._expressible", lambda *_: [])
    if engine == "modelopt":  # its tiles are too large for the smoke run
        votes = Votes(((1 << 20, (16,)),), tile_q=16)
        server = Server("a server", "any", votes, replace(votes, tile_q=None))
        monkeypatch.setitem(ENGINES, engine, replace(ENGINES[engine], servers=(server,)))
        fits = json.loads((copied / "fit.json").read_text())
        for fit in fits.values():
            fit["model"] = {"refused": "planted", "points": 0}
        (copied / "fit.json").write_text(json.dumps(fits))
        monkeypatch.setattr("calibrate.proof.emit.local_curve", lambda *_: None)
    gpu = ("--gpu", "sm90") if engine == "sglang" else ()
    code, _, err = call("project", copied, "--engine", engine, *gpu)
    assert code == 0, err
    command = err.rpartition("now: calibrate ")[2].split()
    needed = {
        "modelopt": ["--pin"],
        "trtllm": ["--model", "DIR", "--apply"],
        "sglang": ["--gpu", "sm90"],
    }[engine]
    assert command[2:] == ["--engine", engine, *needed]
    served = copied.parent / "served"
    served.mkdir()
    shutil.copy(Path(open_run(copied)[1].model.path) / "config.json", served)
    known = {"TOKENS": "100000", "DIR": str(served)}
    code, _, err = call(*(known.get(word, word) for word in command))
    assert code == 0, err


def test_a_run_without_a_result_is_refused(call: Callable[..., Any], copied: Path) -> None:
    file = Thresholds.load(copied / "thresholds.yaml")
    failed = file.model_copy(update={"evidence": {**file.evidence, "verdict": "failed"}})
    failed.save(copied / "thresholds.yaml")
    code, _, err = call("project", copied, "--engine", "sglang", "--phase", "prefill")
    assert code == 1 and "its validation did not pass" in err


def test_describe_names_layers_that_are_dense_in_every_phase() -> None:
    setting: Any = {"prefill": (0.0, 2.0, 2.0), "decode": (0.0, 0.0, 1.0)}
    assert describe(setting) == {
        "scale_factor": {"prefill": 2.0, "decode": 1.0},
        "dense_layers": [0],
    }
