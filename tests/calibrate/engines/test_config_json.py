"""The one key of a `config.json`: merged, left alone, and its curve read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    CURVE,
    FORMULA,
    config_json,
    thresholds,
    write_model,
)

from calibrate.engines import read as importing
from calibrate.engines.config_json import read_curve
from calibrate.engines.export import export
from calibrate.errors import UserError


@pytest.mark.parametrize("section", [None, {"config_groups": {}, "kept": "\\n"}])
def test_apply_keeps_bytes_and_line_ends(
    section: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {} if section is None else {"sparse_attention_config": section}
    config = write_model(tmp_path / "model", **changes) / "config.json"
    before = config.read_bytes().replace(b"\n", b"\r\n")
    config.write_bytes(before)
    thresholds().save(tmp_path / "t.yaml")
    flags = ("--engine", "modelopt", "--model", config.parent, "--apply")
    code, _, err = call("export", tmp_path / "t.yaml", *flags)
    assert code == 0 and "merged into" in err
    assert (config.parent / "config.json.bak").read_bytes() == before
    after = config.read_bytes()
    assert after.count(b"\r\n") == after.count(b"\n") > before.count(b"\n")
    assert section is not None or after.startswith(before.rstrip().rstrip(b"}").rstrip())
    # Again: nothing is merged, and that is what is said.
    code, _, err = call("export", tmp_path / "t.yaml", *flags)
    assert code == 0 and "nothing was merged" in err and "merged into" not in err
    assert config.read_bytes() == after


def group(formula: Any) -> dict[str, Any]:
    return {
        "algorithm": "skip_softmax",
        "threshold_scale_factor": {"formula": formula, "prefill": {"a": 1, "b": 1}},
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"config_groups": {"g": group("1 - exp(-a)")}}, "formula must be .* but it is `1 - exp"),
        ({"config_groups": {"g": group(None)}}, "formula must be"),
        (
            {"config_groups": {"g": group(FORMULA), "h": group(FORMULA)}},
            "one skip_softmax group, but it has 2",
        ),
        ({"sparse_algo": "softmax_skip"}, "older or foreign schema"),
    ],
)
def test_a_config_that_is_not_ours_to_replace_is_refused(
    tmp_path: Path, section: Any, message: str
) -> None:
    model = write_model(tmp_path / "model", sparse_attention_config=section)
    with pytest.raises(UserError, match=message):
        export(thresholds(), "modelopt", model=model)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"threshold_scale_factor": 1000.0}, "fixed threshold of 0.1"),
        ({"threshold_scale_factor": {"formula": "x", "prefill": {"a": 1, "b": 1}}}, "formula must be"),
        ({"threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)"}}, "there are none"),
        (
            {"threshold_scale_factor":
                 {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1, "b": 1}},
             "target_sparsity": 1.5},
            r"\[0, 1\], but got 1.5",
        ),
    ],
)  # fmt: skip
def test_coefficients_that_engines_misread_are_refused(
    group: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config_json(**group))
    with pytest.raises(UserError, match=message):
        read_curve(tmp_path)


def test_shared_coefficients_and_ignore_are_read(tmp_path: Path) -> None:
    factors = {"formula": "a * exp(b * target_sparsity)", "coefficients": {"a": 2.0, "b": 0.0}}
    text = config_json(
        threshold_scale_factor=factors, ignore=["model.layers.1.self_attn", "*layers.3.*"]
    )
    (tmp_path / "x.json").write_text(text)
    found = read_curve(tmp_path / "x.json")
    assert found.scale_factor == {"prefill": 2.0, "decode": 2.0}
    file = importing.to_thresholds(found, thresholds().model, "trtllm", None, "sm90", "x.json")
    assert [max(file.per_head(layer, "prefill")) for layer in range(4)] == [2.0, 0.0, 2.0, 0.0]
    assert file.geometry.prefill is not None and file.geometry.prefill.tile_q == 64


def test_a_null_ignore_list_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(config_json(threshold_scale_factor=CURVE, ignore=None))
    assert read_curve(tmp_path / "x.json").ignore == ()
