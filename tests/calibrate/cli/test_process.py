"""The installed command in a process of its own: exit code, streams, no traceback; its help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    SMOKE,
    Result,
    in_subprocess,
)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("show", "missing.yaml"), "no such file"),
        (("run", "config.yaml"), "did you mean `model`?"),
        (("validate", "."), "not a run folder"),
    ],
)
def test_the_installed_command_refuses_with_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    (tmp_path / "config.yaml").write_text("modle: {path: x}\n")
    if arguments[0] == "validate":
        (tmp_path / "config.yaml").unlink()
    result = in_subprocess(*arguments, cwd=tmp_path)
    assert (result.code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert part in result.stderr and result.stderr.startswith("error: ")


def test_version_is_the_packages(call: Callable[..., Result]) -> None:
    from importlib import metadata

    result = call("--version")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == f"{metadata.version('skip-softmax-calibrate')}\n"


@pytest.mark.parametrize("verb", ["export", "import"])
def test_help_keeps_the_units_in_brackets(call: Callable[..., Result], verb: str) -> None:
    assert "[tokens]" in call(verb, "--help").stdout


def test_help_names_every_verb(call: Callable[..., Result]) -> None:
    result = call("--help")
    assert (result.code, result.stderr) == (0, "")
    for verb in ("run", "search", "validate", "show", "export"):
        assert verb in result.stdout


def test_every_default_config_names_known_keys_only() -> None:
    """Guards the fixture above: the smoke config is what the tests change."""
    data: dict[str, Any] = yaml.safe_load(SMOKE.read_text())
    assert data["search"]["trials"] == 8 and data["prompts"]["lengths"] == [256, 384]
