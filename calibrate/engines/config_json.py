"""A model's `config.json`: its shape, its hash, and the one key of it that we may write."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.engines.artefacts import FORMULA, producer
from calibrate.errors import UserError
from calibrate.model.config_json import KEY, ModelConfigFile


@dataclass(frozen=True)
class ConfigPatch:
    """A change of a `config.json`, before and after."""

    path: Path
    before: str
    after: str

    def diff(self) -> str:
        """Unified diff; empty when nothing changes."""
        return "".join(
            difflib.unified_diff(
                self.before.splitlines(keepends=True),
                self.after.splitlines(keepends=True),
                str(self.path),
                f"{self.path} (patched)",
            )
        )


def patch_config(config: ModelConfigFile, group: dict[str, Any]) -> ConfigPatch:
    """Puts a `skip_softmax` group into a config and leaves everything else as it is.

    Args:
        config: the model's config.
        group: from `artefacts.config_group`.

    Returns:
        The patch; nothing is written.

    Raises:
        UserError: the config holds a schema or a formula that is not ours to replace.
    """
    section = config.data.get(KEY)
    ours = {"config_groups": {"group_0": group}, "producer": producer()}
    if section is not None:
        ours = _merged(config, section, group)
    if section == ours:
        return ConfigPatch(config.path, config.text, config.text)
    after = (
        _spliced(config, ours)
        if section is None
        else _dumped({**config.data, KEY: ours}, config.text)
    )
    changed = json.loads(after)
    assert {**changed, KEY: None} == {**config.data, KEY: None} and changed[KEY] == ours
    return ConfigPatch(config.path, config.text, after)


def _merged(config: ModelConfigFile, section: Any, group: dict[str, Any]) -> dict[str, Any]:
    where = f"{config.path}: {KEY}"
    if not isinstance(section, dict) or not isinstance(section.get("config_groups"), dict):
        raise UserError(
            f"{where} must hold config_groups, but it has an older or foreign schema; move it away yourself"
        )
    groups = config.skip_groups()
    if len(groups) > 1:
        raise UserError(
            f"{where} may hold one skip_softmax group, but it holds {len(groups)} "
            f"({', '.join(groups)}); remove all "
            "but one"
        )
    for name, old in groups.items():
        factors = old.get("threshold_scale_factor")
        formula = factors.get("formula") if isinstance(factors, dict) else factors
        if formula != FORMULA:
            raise UserError(
                f"{where}.{name}: the formula must be `{FORMULA}`, but it is `{formula}`; the same letters "
                "mean "
                "something else there: move this group away yourself"
            )
    free = next(f"group_{i}" for i in range(10_000) if f"group_{i}" not in section["config_groups"])
    name = next(iter(groups), free)
    return {
        **section,
        "config_groups": {**section["config_groups"], name: group},
        "producer": section.get("producer", producer()),
    }


def _spliced(config: ModelConfigFile, section: dict[str, Any]) -> str:
    """Adds the key at the end of the text: not one byte before it changes."""
    head = config.text.rstrip()
    tail = config.text[len(head) :]
    body, indent = head[:-1].rstrip(), _indent(config.text)
    dumped = json.dumps(section, indent=indent, allow_nan=False).replace("\n", "\n" + " " * indent)
    comma = "" if body.endswith("{") else ","
    added = f'{comma}\n{" " * indent}"{KEY}": {dumped}\n}}'
    return body + added.replace("\n", _newline(config.text)) + tail


def _dumped(data: dict[str, Any], like: str) -> str:
    text = json.dumps(data, indent=_indent(like), ensure_ascii=like.isascii())
    return text.replace("\n", _newline(like)) + like[len(like.rstrip()) :]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _indent(text: str) -> int:
    lines = text.splitlines()
    return len(lines[1]) - len(lines[1].lstrip()) if len(lines) > 1 else 2
