"""SGLang's diffusion requests, read back by their published rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from engine_files import BLACKWELL, HOPPER, thresholds

from calibrate.engines.export import export
from calibrate.engines.read import read_artefact
from calibrate.engines.types import Source
from calibrate.errors import UserError
from skip_softmax.thresholds.types import Geometry


def resolve(params: dict[str, Any]) -> float:
    """0.5.23, multimodal_gen/configs/sample/sampling_params.py, `resolve_skip_softmax_params`."""
    assert set(params) <= {"threshold_scale_factor", "start_step"}
    factor, start = params["threshold_scale_factor"], params.get("start_step", 0)
    assert type(factor) in (int, float) and math.isfinite(factor) and factor > 0
    assert type(start) is int and start >= 0
    return float(factor)


@pytest.mark.parametrize(("gpu", "geometry"), [("sm90", HOPPER), ("sm100", BLACKWELL)])
def test_golden_request(gpu: str, geometry: Geometry, tmp_path: Path) -> None:
    made = export(thresholds(geometry=geometry), "sglang-diffusion", gpu=gpu, served_min_len=8192)
    body = json.loads(made.text)
    assert list(body) == ["skip_softmax_params"]
    assert resolve(body["skip_softmax_params"]) == 587.18
    assert body["skip_softmax_params"]["start_step"] == 0
    made.write(tmp_path / "request.json")
    found = read_artefact("sglang-diffusion", Source(tmp_path / "request.json"))
    assert found.scale_factor == {"prefill": 587.18}


def test_a_request_fails_elsewhere_so_the_export_does() -> None:
    with pytest.raises(UserError, match="--gpu must be one of: sm100, sm90 for SGLang diffusion"):
        export(thresholds(), "sglang-diffusion", gpu="sm120")
    file = thresholds()
    small = file.model_copy(update={"model": file.model.model_copy(update={"head_dim": 64})})
    with pytest.raises(
        UserError, match="head_dim must be 128 or 256 for prefill of SGLang diffusion"
    ):
        export(small, "sglang-diffusion", gpu="sm90")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "skip_softmax_params must be a mapping, but it is None"),
        ({"skip_softmax_params": {"threshold": 1}}, r"may contain .* but got \['threshold'\]"),
        ({"skip_softmax_params": {"start_step": 3}}, "must give a number for prefill"),
    ],
)
def test_a_body_without_a_number_is_refused(body: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=message):
        read_artefact("sglang-diffusion", Source(tmp_path / "request.json"))


def test_dense_steps_are_named(tmp_path: Path) -> None:
    params = {"threshold_scale_factor": 5, "start_step": 3}
    (tmp_path / "request.json").write_text(json.dumps({"skip_softmax_params": params}))
    found = read_artefact("sglang-diffusion", Source(tmp_path / "request.json"))
    assert found.scale_factor == {"prefill": 5}
    assert found.notes == ("start_step 3: earlier steps are dense there",)
