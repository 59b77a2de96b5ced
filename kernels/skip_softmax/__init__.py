"""Skip-softmax attention: attention that skips KV tiles whose softmax weight cannot matter.

Importing this package loads neither torch nor triton; the first use of an operation does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skip_softmax.api import (
        Stats,
        attention,
        attention_varlen,
        decode_attention,
        tile_gaps,
        tile_statistics,
    )
    from skip_softmax.choose import FallbackWarning
    from skip_softmax.huggingface.applied import applied
    from skip_softmax.meaning.call import DenseCallWarning
    from skip_softmax.thresholds.file import Thresholds

_HOME = {
    "attention": "skip_softmax.api",
    "attention_varlen": "skip_softmax.api",
    "decode_attention": "skip_softmax.api",
    "tile_gaps": "skip_softmax.api",
    "tile_statistics": "skip_softmax.api",
    "Stats": "skip_softmax.api",
    "DenseCallWarning": "skip_softmax.meaning.call",
    "FallbackWarning": "skip_softmax.choose",
    "Thresholds": "skip_softmax.thresholds.file",
    "applied": "skip_softmax.huggingface.applied",
}

__all__ = [
    "DenseCallWarning",
    "FallbackWarning",
    "Stats",
    "Thresholds",
    "applied",
    "attention",
    "attention_varlen",
    "decode_attention",
    "tile_gaps",
    "tile_statistics",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'skip_softmax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
