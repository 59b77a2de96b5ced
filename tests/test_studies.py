"""The studies behind a design decision: what they compute, with planted answers."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT

from calibrate.search.cost import Curve


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "per_head_study", ROOT / "notebooks" / "studies" / "per_head.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["per_head_study"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CURVE = Curve((0.0, 1.0), (1.0, 0.5), 1024)


def planted(study: ModuleType, mass: list[list[float]]) -> Any:
    """Two layers of two heads, in which every head skips the same tiles and drops `mass`."""
    tiles = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)[:, None, None].expand(3, 2, 2)
    steps = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None]
    return study.PerHead([0.0, 1.0, 2.0], tiles, steps * torch.tensor(mass, dtype=torch.float64))


def best(study: ModuleType, table: Any, power: float | None, allowed: float) -> list[Any]:
    choices = {"prefill": study.options(table, CURVE, [1.0, 1.0], power)}
    return list(study.optimum(choices, allowed)["prefill"])


def test_the_head_that_loses_nothing_skips_more(study: ModuleType) -> None:
    table = planted(study, [[1e-6, 0.9], [1e-6, 0.9]])
    for option in best(study, table, 1.0, 0.001):
        assert option.factors == (2.0, 0.0)
    for option in best(study, table, None, 0.001):
        assert option.factors == (0.0, 0.0)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_never_predicted_slower_than_per_layer_and_falls_with_the_loss(
    study: ModuleType, power: float
) -> None:
    table = planted(study, [[0.01, 0.2], [0.05, 0.4]])
    both = {"prefill": study.options(table, CURVE, [1.0, 1.0], power)}
    # Of the same loss: how heads are averaged is not what is compared.
    one = {"prefill": [[o for o in layer if len(set(o.factors)) == 1] for layer in both["prefill"]]}
    for price in torch.arange(-6.0, 12.0, 0.5).tolist():
        layer, head = (
            sum(
                min(o.time + 2.0**price * o.loss for o in options) for options in choices["prefill"]
            )
            for choices in (one, both)
        )
        assert head <= layer + 1e-12
    times = [
        sum(option.time for option in best(study, table, power, allowed))
        for allowed in (0.0, 0.005, 0.02, 0.1, 1.0)
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] == 2.0 and times[-1] == pytest.approx(2 * CURVE.at(0.8))
