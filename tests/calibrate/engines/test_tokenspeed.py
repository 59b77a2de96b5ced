"""tokenspeed's option, read back by a parser."""

from __future__ import annotations

import argparse
import shlex

import pytest
from engine_files import TOKENSPEED, thresholds

from calibrate.engines.export import export
from calibrate.errors import UserError


def read_tokenspeed(text: str) -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-softmax-threshold", type=float)
    return parser.parse_args(shlex.split(text.splitlines()[-1])).skip_softmax_threshold


@pytest.mark.parametrize("decode", [0.0, 16.52])
@pytest.mark.parametrize("phases", [None, ("prefill",)])
def test_golden_tokenspeed(decode: float, phases: tuple[str, ...] | None) -> None:
    """0.1.1 hands its option to `mha_prefill` alone: the prefill number, whatever decode has."""
    file = thresholds(decode=decode, geometry=TOKENSPEED)
    made = export(file, "tokenspeed", at_length=32_768, phases=phases)
    assert read_tokenspeed(made.text) == 587.18 / 32_768 == pytest.approx(0.0179, abs=1e-4)
    assert made.sidecar["scale_factor"] == {"prefill": 587.18}
    lost = "\n".join(made.sidecar["lost"])
    assert ("decode: tokenspeed has no kernel that skips there" in lost) == (decode > 0)
    for trap in (
        "a cached prefix",
        "prefix-cache hit",
        "triton backend",
        "FP8",
        "whole batch dense",
    ):
        assert trap in lost


@pytest.mark.parametrize(
    ("changes", "phase", "message"),
    [
        ({}, "decode", "silently ignores the decode number: only its prefill kernel"),
        (
            {"geometry": None},
            "prefill",
            "geometry.prefill must be 128x64 .* the numbers are for 64x128",
        ),
        ({"prefill": 0.0}, None, "above 0 in prefill, but the file leaves it dense"),
    ],
)
def test_what_tokenspeed_would_not_run_as_measured_is_refused(
    changes: dict[str, object], phase: str | None, message: str
) -> None:
    fields = {"geometry": TOKENSPEED, **changes}
    file = thresholds(**{key: value for key, value in fields.items() if value is not None})
    with pytest.raises(UserError, match=message):
        export(file, "tokenspeed", at_length=9000, phases=phase and [phase])


@pytest.mark.parametrize(
    ("head_dim", "holds"), [(64, True), (128, True), (256, False), (96, False)]
)
def test_tokenspeed_s_kernel_has_two_head_sizes(head_dim: int, holds: bool) -> None:
    file = thresholds(geometry=TOKENSPEED)
    model = file.model.model_copy(update={"head_dim": head_dim})
    file = file.model_copy(update={"model": model})
    if holds:
        assert export(file, "tokenspeed", at_length=9000).sidecar["holds_for"]
        return
    with pytest.raises(UserError, match=f"head_dim must be 64 or 128 .* the model has {head_dim}"):
        export(file, "tokenspeed", at_length=9000)
