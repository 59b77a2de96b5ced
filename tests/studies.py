"""The studies of `notebooks/studies`, which are scripts, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from conftest import ROOT

STUDIES = ROOT / "notebooks" / "studies"


def opened(name: str) -> ModuleType:
    """A study under its own name: what stands beside it can import it, as when it is run."""
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
