"""A model's `config.json`: its shape, and its hash without the key that an export writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from calibrate.model.locate import locate
from calibrate.schema import ModelConfig
from skip_softmax.thresholds.identity import (
    EXPORT_KEY,
    hash_of_config,
    hash_of_files,
    hash_of_hub_id,
)
from skip_softmax.thresholds.yaml_file import user_path


@dataclass(frozen=True)
class ModelConfigFile:
    """A `config.json` as it was read."""

    path: Path
    text: str
    data: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the config without our key."""
        return hash_of_config(self.data)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, query heads, KV heads, head size.

        Raises:
            UserError: the config does not say.
        """
        text = self.data.get("text_config", self.data)
        try:
            layers, heads, kv_heads, head_dim = _shape(
                self._of_diffusers if "_class_name" in self.data else text.get
            )
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
    def head_dim_v(self) -> int | None:
        """Columns of values where they are not as many as those of keys; else None."""
        size = self.data.get("text_config", self.data).get("v_head_dim")
        return size if isinstance(size, int) and size != self.shape[3] else None

    def _of_diffusers(self, key: str) -> Any:
        """A key of a text model's config, in a component of a diffusers pipeline."""
        if key == "num_hidden_layers":
            blocks = [self.data.get(name) for name in ("num_layers", "num_single_layers")]
            return sum(filter(None, blocks)) or None
        return self.data.get("attention_head_dim" if key == "head_dim" else key)

    @property
    def attention_class(self) -> str | None:
        """The attention class, as transformers names it: `Qwen3ForCausalLM` has `Qwen3Attention`."""
        names = self.data.get("architectures")
        family = str(names[0]).split("For")[0] if isinstance(names, list) and names else ""
        return f"{family}Attention" if family else None

    def skip_groups(self) -> dict[str, Any]:
        """The `skip_softmax` groups of the config, by name.

        Raises:
            UserError: `config_groups` is not a mapping.
        """
        section = self.data.get(EXPORT_KEY, {})
        groups = section.get("config_groups", {}) if isinstance(section, dict) else {}
        if not isinstance(groups, dict):
            raise UserError(
                f"{self.path}: {EXPORT_KEY}.config_groups must be a mapping, but it is {groups!r}"
            )
        return {
            name: group
            for name, group in groups.items()
            if isinstance(group, dict) and group.get("algorithm") == "skip_softmax"
        }


def read_model_config(path: Path, option: str = "--model") -> ModelConfigFile:
    """Reads a model folder's `config.json`, or the file itself.

    Args:
        path: the folder or the file.
        option: where the user gave it, for messages.

    Raises:
        UserError: it is missing, not JSON, not a mapping, or has a key twice.
    """
    path = user_path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        # Bytes, not text: a backup must be the old file with its line ends.
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        pipeline = (path / "model_index.json").is_file()
        inside = ", for example its folder `transformer`" if pipeline else ""
        raise UserError(
            f"{option}: `{path}` is missing or has no config.json; give a config.json or its folder{inside}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{option}: `{file}` cannot be read as UTF-8 text ({error}); give a JSON file"
        ) from None
    return ModelConfigFile(file, text, json_mapping(text, f"{option}: `{file}`"))


def json_mapping(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON mapping.

    Raises:
        UserError: it is not JSON, not a mapping, or has a key twice.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} must be JSON, but it is not ({error}); correct it") from None
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a mapping, but it is a {type(data).__name__}; correct it")
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


def model_hash(location: str | Path, model: Any) -> str:
    """SHA-256 of what decides a model's numbers: its files, or the commit that a hub id resolved to."""
    if isinstance(location, Path):
        return hash_of_files(location)
    return hash_of_hub_id(location, getattr(model.config, "_commit_hash", None) or "")


def _shape(value: Callable[[str], Any]) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads and head size of a transformers config.

    Args:
        value: returns a key's value, or None where the config has none.

    Raises:
        KeyError: a key is missing.
        TypeError: a value is not a number.
        ValueError: a value is a text that is not a number.
    """

    def needed(key: str) -> int:
        if (number := value(key)) is None:
            raise KeyError(key)
        return int(number)

    heads = needed("num_attention_heads")
    kv_heads = int(value("num_key_value_heads") or heads)
    if value("qk_nope_head_dim"):  # latent attention: a part with rotary positions, and one without
        head_dim = needed("qk_nope_head_dim") + needed("qk_rope_head_dim")
    else:
        head_dim = int(value("head_dim") or needed("hidden_size") // heads)
    return needed("num_hidden_layers"), heads, kv_heads, head_dim


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return data
