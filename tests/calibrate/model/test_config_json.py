"""A model's `config.json`: its shape, and what cannot be one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    write_model,
)

from calibrate.model.config_json import read_model_config


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["Qwen3ForCausalLM"], "Qwen3Attention"),
        ({"a": 1}, None),
        ("LlamaForCausalLM", None),
        ([], None),
        (5, None),
    ],
)
def test_the_attention_class_comes_from_a_list_of_architectures(
    architectures: Any, expected: str | None, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", architectures=architectures)
    assert read_model_config(model).attention_class == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('"num_hidden_layers": 0', r"must be 1 or more, .* \(0, 8, 2, 128\)"),
        ('"num_key_value_heads": 3', r"multiple of the KV heads, but got .* \(4, 8, 3, 128\)"),
        ('"num_hidden_layers": 1e400', "must name layers, heads and head size"),
        ('"head_dim": -1', "must be 1 or more"),
    ],
)
def test_a_model_without_a_usable_shape_is_refused(
    changes: str, message: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    config = write_model(tmp_path / "model") / "config.json"
    key = changes.split(":")[0]
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if key not in line]
    config.write_text("\n".join([lines[0], f"{changes},", *lines[1:]]), encoding="utf-8")
    code, _, err = call(
        "import", "--prefill", 5, "--model", config.parent, "-o", tmp_path / "t.yaml"
    )
    assert code == 2 and re.search(message, err), err


def test_the_model_is_a_folder(call: Callable[..., Any], tmp_path: Path) -> None:
    # The hash of a lone config.json is no model's: `validate` would refuse the file.
    file = write_model(tmp_path / "model") / "config.json"
    code, _, err = call("import", "--prefill", 5, "--model", file, "-o", tmp_path / "t.yaml")
    assert code == 2 and "is a file; give its folder" in err
