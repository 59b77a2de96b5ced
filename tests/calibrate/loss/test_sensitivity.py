"""What is measured of each layer, and the model of its loss: planted powers come back."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibrate.loss.sensitivity import (
    POWER,
    LossModel,
    Row,
    Step,
    loss_model,
    plan,
    rounding_told,
)
from calibrate.schema import TargetConfig
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import LOW, NEVER, PER_OCTAVE

LAYERS = 9


def statistics() -> Statistics:
    """Every layer: 100 tiles, ten of which each octave from 1 to 512 skips, and ten that none does."""
    result = Statistics.empty({}, LAYERS, 1, 1, [4096])
    for phase in ("prefill", "decode"):
        bins = torch.arange(9) * PER_OCTAVE - LOW * PER_OCTAVE + 1
        result.counts[phase][:, :, 0, bins] = 10
        result.counts[phase][:, :, 0, NEVER] = 10
        result.rows[phase][:] = 1
    return result


def planned(levels: tuple[float, ...], shortest: int = 4000) -> list[Step]:
    layers = [SimpleNamespace(index=i, reason=None) for i in range(LAYERS)]
    loaded: Any = SimpleNamespace(layers=layers, calibratable=layers[1:])
    target = TargetConfig(phases=("decode",), min_kv_len={"prefill": 4000, "decode": shortest})
    return plan(loaded, statistics(), target, levels)


def sparsities(steps: list[Step]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for phase, layer, factor in steps:
        found.setdefault(layer, []).append(statistics().sparsity(phase, factor))
    return found


def test_late_layers_are_measured_at_every_level_and_the_others_at_the_middle_one() -> None:
    found = sparsities(planned((0.7, 0.3, 0.5)))
    assert list(found) == list(range(1, LAYERS)), "a layer that cannot be calibrated has no row"
    for layer, shares in found.items():
        expected = [0.3, 0.5, 0.7] if layer >= 6 else [0.5]
        assert shares == pytest.approx(expected, abs=0.01)
    assert sparsities(planned((0.5, 0.8)))[1] == pytest.approx([0.5], abs=0.01)


def test_levels_beyond_the_largest_scale_factor_are_one_measurement() -> None:
    steps = planned((0.3, 0.5, 0.7), shortest=12)
    ceiling = TargetConfig(phases=("decode",), min_kv_len={"decode": 12}).largest_scale_factor(
        "decode"
    )
    assert {factor for _, _, factor in steps} == {planned((0.3,))[0][2], ceiling}
    assert [len(shares) for shares in sparsities(steps).values()] == [1] * 5 + [2] * 3


def rows(power: float, masses: list[list[float]], noise: float = 0.0) -> list[Row]:
    """Layers whose loss is `(layer + 1) * mass ** power`, each measured at some masses."""
    drawn = random.Random(0)
    return [
        Row("prefill", layer, 1.0, 0.5, mass, (layer + 1) * mass**power * math.exp(drawn.gauss(0, noise)))
        for layer, of_layer in enumerate(masses)
        for mass in of_layer
    ]  # fmt: skip


@pytest.mark.parametrize("power", [1.2, 1.6, 2.5])
def test_the_power_and_the_weights_are_those_of_the_layers(power: float) -> None:
    masses = [[10.0 ** (-1 - layer % 3 / 2), 10.0 ** (-2 - layer % 3 / 2)] for layer in range(20)]
    model = loss_model(rows(power, masses), 21, ["prefill"])
    assert model.powers["prefill"] == pytest.approx(power, abs=0.03)
    assert model.loss("prefill", 4, 0.01) == pytest.approx(5 * 0.01**power, rel=0.05)
    assert model.weights["prefill"][20] == max(model.weights["prefill"])
    noisy = loss_model(rows(power, masses, noise=0.35), 20, ["prefill"])
    assert noisy.powers["prefill"] == pytest.approx(power, abs=0.1)


def test_one_level_has_the_power_of_small_changes_and_few_stay_near_it() -> None:
    assert loss_model(rows(1.2, [[0.1], [0.01]]), 2, ["prefill"]).powers["prefill"] == POWER
    assert loss_model([], 2, ["decode"]) == LossModel({"decode": (1.0, 1.0)}, {"decode": POWER})
    few = loss_model(rows(1.0, [[0.1, 0.05], [0.01]]), 2, ["prefill"]).powers["prefill"]
    more = loss_model(rows(1.0, [[0.1, 0.05]] * 9), 9, ["prefill"]).powers["prefill"]
    assert 1.0 < more < few < POWER


def test_a_layer_is_weighed_at_its_own_mass() -> None:
    model = loss_model(rows(1.4, [[0.2], [0.001]]), 2, ["prefill"])
    for row in rows(1.4, [[0.2], [0.001]]):
        assert model.loss("prefill", row.layer, row.dropped_mass) == pytest.approx(row.kl)
    assert model.loss("prefill", 0, 0.0) == 0.0
    assert model.loss("prefill", 0, 0.1) == pytest.approx(0.2**1.4 / 2**POWER)


@pytest.mark.parametrize(
    ("rounding", "dtype", "said"),
    [
        (4.9e-4, "bfloat16", None),
        (
            5.1e-4,
            "bfloat16",
            r"0\.00051 nats/token in bfloat16, 0\.1 of the budget; use `model\.dtype: f",
        ),
        (0.01, "float32", r"2 of the budget; raise `budget\.kl`$"),
    ],
)
def test_much_rounding_is_told_with_its_cure(rounding: float, dtype: str, said: str | None) -> None:
    rows = [Row("prefill", 0, 1.0, 0.5, 0.1, 0.1, each) for each in (0.0, rounding)]
    told = rounding_told(rows, 0.005, dtype)
    assert told is None if said is None else re.search(said, str(told))
    assert rounding_told([], 0.005, dtype) is None


def test_rounding_decides_neither_the_power_nor_the_weight() -> None:
    """In 16 bits many a layer alone loses less than two dense kernels differ by."""
    rounding = 1e-5
    masses = [[3e-2, 1e-1], [1e-4, 1e-3], [2e-4, 5e-4]] * 7
    measured = [
        dataclasses.replace(row, kl=row.kl + rounding, rounding=rounding)
        for row in rows(2.0, masses)
    ]
    measured.append(Row("prefill", 21, 1.0, 0.5, 0.3, 0.0, rounding))  # the last layer: dense rows
    model = loss_model(measured, 22, ["prefill"])
    assert model.powers["prefill"] == pytest.approx(2.0, abs=0.1)
    assert model.loss("prefill", 0, 0.05) == pytest.approx(0.05**2, rel=0.3)
    assert model.loss("prefill", 21, 0.3) < 1e-8
    deaf = [dataclasses.replace(row, rounding=0.0) for row in measured]
    assert loss_model(deaf, 22, ["prefill"]).powers["prefill"] < 1.5, "this test shows nothing"
