"""A model's `config.json`: its shape, its hash, and the one key of it that we may write."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.artefacts import FORMULA, producer
from calibrate.errors import UserError
from calibrate.models import locate
from calibrate.schema import ModelConfig
from skip_softmax.thresholds import shape_of_config

KEY = "sparse_attention_config"


@dataclass(frozen=True)
class ModelConfigFile:
    """A `config.json` as read."""

    path: Path
    text: str
    data: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the config without our key, so that an export does not change the model's identity."""
        kept = {key: value for key, value in self.data.items() if key != KEY}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, query heads, KV heads, head size.

        Raises:
            UserError: the config does not say.
        """
        text = self.data.get("text_config", self.data)
        try:
            layers, heads, kv_heads, head_dim = shape_of_config(text.get)
        except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"`{self.path}` must name layers, heads and head size, but reading {error} failed; "
                "give the folder of a transformers model"
            ) from None
        if min(layers, heads, kv_heads, head_dim) < 1 or heads % kv_heads:
            raise UserError(
                f"`{self.path}`: layers, heads and head size must be 1 or more, and the query heads a "
                f"multiple of the KV heads, but got (layers, q_heads, kv_heads, head_dim) = "
                f"{(layers, heads, kv_heads, head_dim)}; give the folder of a transformers model"
            )
        return layers, heads, kv_heads, head_dim

    @property
    def attention_class(self) -> str | None:
        """Name of the attention class by transformers' custom: `Qwen3ForCausalLM` has `Qwen3Attention`."""
        names = self.data.get("architectures")
        family = str(names[0]).split("For")[0] if isinstance(names, list) and names else ""
        return f"{family}Attention" if family else None

    def skip_groups(self) -> dict[str, Any]:
        """The `skip_softmax` groups that are there already, by name."""
        section = self.data.get(KEY, {})
        groups = section.get("config_groups", {}) if isinstance(section, dict) else {}
        if not isinstance(groups, dict):
            raise UserError(
                f"{self.path}: {KEY}.config_groups must be a mapping, but it is {groups!r}"
            )
        return {
            name: group
            for name, group in groups.items()
            if isinstance(group, dict) and group.get("algorithm") == "skip_softmax"
        }


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


def read_model_config(path: Path, option: str = "--model") -> ModelConfigFile:
    """Reads a model folder's `config.json`, or the file itself.

    Args:
        path: the folder or the file.
        option: where the user gave it, for messages.

    Raises:
        UserError: it is missing, not JSON, not a mapping, or names a key twice.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        # Bytes, not text: a backup must be the old file with its line ends.
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{option}: `{path}` is missing or has no config.json; give a config.json or its folder"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{option}: `{file}` cannot be read as UTF-8 text ({error}); give a JSON file"
        ) from None
    return ModelConfigFile(file, text, json_mapping(text, f"{option}: `{file}`"))


def json_mapping(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON mapping.

    Raises:
        UserError: it is no JSON, no mapping, or names a key twice.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be JSON, but it is not ({error}); correct it") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{where} must hold a mapping, but it holds a {type(data).__name__}; correct it"
        )
    return data


def identity_of(model: ModelConfig) -> dict[str, str]:
    """`model_config_sha256` of a run's model; empty for GGUF, and hub models not in the cache."""
    location = locate(model.path)
    if isinstance(location, Path):
        file = location / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(location, "config.json", revision=model.revision)
        file = Path(found) if isinstance(found, str) else Path("")
    return {"model_config_sha256": read_model_config(file).sha256} if file.is_file() else {}


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return data
