"""tokenspeed's option, read back by a parser."""

from __future__ import annotations

import argparse
import shlex

import pytest
from engine_files import (
    thresholds,
)

from calibrate.engines.export import export
from calibrate.errors import UserError


def test_golden_tokenspeed() -> None:
    made = export(thresholds(), "tokenspeed", at_length=32_768, trust_geometry=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-softmax-threshold", type=float)
    line = made.text.splitlines()[-1]
    assert parser.parse_args(shlex.split(line)).skip_softmax_threshold == 16.52 / 32_768
    assert any("the smaller number is written" in loss for loss in made.sidecar["lost"])


def test_a_projection_is_no_cure_for_tiles_that_are_not_published() -> None:
    with pytest.raises(UserError, match="cure: `--trust-geometry`") as refused:
        export(thresholds(), "tokenspeed", at_length=9000)
    assert "calibrate project" not in str(refused.value)
