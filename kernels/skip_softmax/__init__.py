"""Skip-softmax attention: attention that skips KV tiles whose softmax weight cannot matter.

Importing this package loads neither torch nor triton; the first use of a name loads what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skip_softmax.api import attention as attention
    from skip_softmax.api import attention_varlen as attention_varlen
    from skip_softmax.api import decode_attention as decode_attention
    from skip_softmax.api import tile_gaps as tile_gaps
    from skip_softmax.api import tile_statistics as tile_statistics
    from skip_softmax.choose import FallbackWarning as FallbackWarning
    from skip_softmax.huggingface.applied import applied as applied
    from skip_softmax.meaning.call import DenseCallWarning as DenseCallWarning
    from skip_softmax.meaning.counts import TileCounts as TileCounts
    from skip_softmax.meaning.histogram import TileHistogram as TileHistogram
    from skip_softmax.thresholds.file import Thresholds as Thresholds
    from skip_softmax.thresholds.types import DecodeGeometry as DecodeGeometry
    from skip_softmax.thresholds.types import Geometry as Geometry
    from skip_softmax.thresholds.types import PrefillGeometry as PrefillGeometry
    from skip_softmax.thresholds.yaml_file import FileError as FileError

    __version__: str

_HOME = {
    "attention": "skip_softmax.api",
    "attention_varlen": "skip_softmax.api",
    "decode_attention": "skip_softmax.api",
    "tile_gaps": "skip_softmax.api",
    "tile_statistics": "skip_softmax.api",
    "FallbackWarning": "skip_softmax.choose",
    "applied": "skip_softmax.huggingface.applied",
    "DenseCallWarning": "skip_softmax.meaning.call",
    "TileCounts": "skip_softmax.meaning.counts",
    "TileHistogram": "skip_softmax.meaning.histogram",
    "Thresholds": "skip_softmax.thresholds.file",
    "DecodeGeometry": "skip_softmax.thresholds.types",
    "Geometry": "skip_softmax.thresholds.types",
    "PrefillGeometry": "skip_softmax.thresholds.types",
    "FileError": "skip_softmax.thresholds.yaml_file",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'skip_softmax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _version() -> str:
    from importlib import metadata  # here: it takes longer to import than all else above

    try:
        return metadata.version("skip-softmax-calibrate")
    except metadata.PackageNotFoundError:
        return "unknown"
