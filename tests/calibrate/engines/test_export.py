"""What every export has in common: numbers come back, or their loss is listed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    BLACKWELL,
    HOPPER,
    LAYERS,
    TOKENSPEED,
    per_layer,
    thresholds,
    write_model,
)

from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export
from calibrate.engines.read import read_artefact
from calibrate.engines.types import Source
from calibrate.errors import UserError

ABSOLUTE = {"vllm-omni", "tokenspeed"}
PREFILL_ONLY = {*ABSOLUTE, "sglang-diffusion"}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "native"])
def test_numbers_come_back_or_their_loss_is_listed(engine: str, tmp_path: Path) -> None:
    draw = random.Random(engine)
    model = write_model(tmp_path / "model")
    for _ in range(40):
        blackwell = engine in ("vllm", "vllm-omni") or draw.random() < 0.5
        numbers = {p: 10 ** draw.uniform(-2, 3.5) for p in ("prefill", "decode")}
        phases = draw.choice([("prefill",), ("decode",), ("prefill", "decode")])
        if engine in PREFILL_ONLY or (engine in ("sglang", "flashinfer") and not blackwell):
            phases = ("prefill",)
        dense = (
            tuple(sorted(draw.sample(range(LAYERS), draw.randint(0, 3))))
            if engine in ("trtllm", "modelopt")
            else ()
        )
        geometry = BLACKWELL if blackwell else HOPPER
        if engine == "tokenspeed":
            geometry = TOKENSPEED
        file = thresholds(**numbers, geometry=geometry, dense=dense)
        made = export(
            file,
            engine,
            phases=phases,
            pin=True,
            model=model,
            trust_geometry=True,
            at_length=50_000 if engine in ABSOLUTE else None,
            experimental=True,
        )
        lost = " ".join(made.sidecar["lost"])
        path = tmp_path / "artefact"
        made.write(path)
        text = made.patch.after if engine == "modelopt" else made.text
        (tmp_path / "config.json").write_text(made.patch.after if made.patch else "{}")
        found = read_artefact(
            engine, Source(tmp_path / "config.json" if engine == "modelopt" else path)
        )
        for phase in phases:
            assert found.scale_factor[phase] == pytest.approx(numbers[phase], rel=1e-12), text
        assert set(found.scale_factor) == set(phases)
        ignored = (
            read_artefact("modelopt", Source(tmp_path / "config.json")).ignore if made.patch else ()
        )
        assert ignored == tuple(f"model.layers.{i}.self_attn" for i in dense)
        # What no artefact can hold is always listed.
        assert "min_kv_len" in lost and "geometry" in lost
        if len(phases) == 1:
            assert "skips in one only" in lost
        if engine in ABSOLUTE:
            assert "1/length law" in lost
        assert json.loads((tmp_path / "artefact.evidence.json").read_text()) == made.sidecar


def test_the_sidecar_holds_the_evidence_of_exactly_these_numbers() -> None:
    own = export(thresholds(), "trtllm", gpu="sm90", served_min_len=8192).sidecar
    assert own["evidence"]["loss"]["kl"]["mean"] == 0.003
    assert own["holds_for"] == [{"server": "TensorRT-LLM", "gpu": "sm90"}]
    assert own["does_not_hold_for"] == []
    best = export(per_layer(), "trtllm", served_min_len=8192).sidecar
    assert best["evidence"]["loss"]["kl"]["mean"] == 0.004
    assert any("numbers per layer" in loss for loss in best["lost"])
    assert best["scale_factor"] == {"prefill": 587.18, "decode": 16.52}


@pytest.mark.parametrize("engine", ["trtllm", "modelopt"])
def test_apply_without_a_model_writes_nothing(
    engine: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    flags = ("--engine", engine, "--apply", "-o", tmp_path / "applied.yaml")
    code, out, err = call("export", tmp_path / "t.yaml", *flags)
    assert (code, out) == (2, "") and f"but got {engine} without --model" in err
    assert [path.name for path in tmp_path.iterdir()] == ["t.yaml"]


def test_an_export_needs_no_torch(tmp_path: Path) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code = (
        "import sys; sys.argv = ['calibrate', 'export', sys.argv[1], '--engine', 'trtllm']\n"
        "from calibrate.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code, error\n"
        "assert not {'torch', 'transformers', 'optuna'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.yaml")], check=True, capture_output=True
    )


def test_a_program_exports_a_file_by_its_path(tmp_path: Path) -> None:
    thresholds().save(tmp_path / "t.yaml")
    made = export(str(tmp_path / "t.yaml"), "trtllm", gpu="sm90", phases=["prefill"])
    assert made == export(thresholds(), "trtllm", gpu="sm90", phases=("prefill",))
    with pytest.raises(UserError, match="--phase must be prefill or decode, but got `both`"):
        export(thresholds(), "trtllm", phases=("both",))
