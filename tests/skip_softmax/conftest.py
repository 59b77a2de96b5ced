"""What every test of the attention code gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from skip_softmax import api
from skip_softmax.hopper import prefill as hopper
from skip_softmax.triton import decode, prefill


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an unwritten output or an unread note fails a test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    """Which kernel runs a call, and how, is asked again, because a test may change the answer."""
    api._asked.clear()
    for room in (hopper, prefill, decode):
        room._plans.clear()
