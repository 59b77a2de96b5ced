"""Calibration of skip-softmax attention: which scale factor a model can take, at what cost.

Importing this package loads neither torch nor optuna nor transformers; `run` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibrate.api import Run, open_run, run
    from calibrate.engines.export import export
    from calibrate.engines.read import import_numbers
    from calibrate.errors import FileError, UserError, WorkFailed
    from calibrate.pipeline import Progress
    from calibrate.schema import RunConfig

    __version__: str

_HOME = {
    "FileError": "calibrate.errors",
    "Progress": "calibrate.pipeline",
    "Run": "calibrate.api",
    "RunConfig": "calibrate.schema",
    "UserError": "calibrate.errors",
    "WorkFailed": "calibrate.errors",
    "__version__": "skip_softmax",
    "export": "calibrate.engines.export",
    "import_numbers": "calibrate.engines.read",
    "open_run": "calibrate.api",
    "run": "calibrate.api",
}

__all__ = [
    "FileError",
    "Progress",
    "Run",
    "RunConfig",
    "UserError",
    "WorkFailed",
    "export",
    "import_numbers",
    "open_run",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'calibrate' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
