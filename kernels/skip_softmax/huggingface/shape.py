"""A model's shape, as its Hugging Face config states it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def shape_of_config(value: Callable[[str], Any]) -> tuple[int, int, int, int]:
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
