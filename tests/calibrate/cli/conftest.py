"""What tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Finished, smoke_config


@pytest.fixture
def smoke(tmp_path: Path, smoke_model: Path) -> Callable[..., Path]:
    """Writes the smoke config with the tiny model, and with `old` replaced by `new` in its text."""
    return partial(smoke_config, tmp_path, smoke_model)


@pytest.fixture
def finished(smoke_command: Finished) -> Finished:
    """The smoke run, end to end in a process of its own. Tests that change the folder copy it."""
    return smoke_command
