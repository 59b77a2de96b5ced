"""Curves: planted parameters come back, and poor fits are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calibrate.schema import FitConfig
from calibrate.statistics.counts import Statistics
from calibrate.statistics.fit import fit_phase, fit_points, local_curve, trusted
from skip_softmax.meaning.histogram import LOW, NEVER, PER_OCTAVE


def points(
    exponent: float = 1.0, noise: float = 0.0
) -> tuple[list[float], list[float], list[float]]:
    """Points of scale_factor = 0.5 exp(8 s), where threshold ~ kv_len^-exponent around 4096 tokens."""
    random = np.random.default_rng(0)
    s, x, length = [], [], []
    for kv_len in (1024.0, 4096.0, 16384.0):
        for share in np.linspace(0.1, 0.8, 20):
            s.append(float(share))
            length.append(kv_len)
            x.append(
                0.5
                * math.exp(8 * share + noise * random.normal())
                * (kv_len / 4096) ** (1 - exponent)
            )
    return s, x, length


def test_planted_parameters_come_back() -> None:
    curve = fit_points(*points(), min_r2=0.9)
    assert curve.refused is None
    assert (curve.a, curve.b) == (pytest.approx(0.5, rel=1e-9), pytest.approx(8.0, rel=1e-9))
    assert curve.r2 == pytest.approx(1.0)
    assert curve.length_exponent == pytest.approx(1.0)


def test_the_length_exponent_is_found() -> None:
    assert fit_points(*points(exponent=1.3), min_r2=0.0).length_exponent == pytest.approx(1.3)


def test_one_length_says_nothing_about_the_exponent() -> None:
    s, x, _ = points()
    assert fit_points(s[:20], x[:20], [4096.0] * 20, min_r2=0.9).length_exponent is None


def test_a_poor_fit_is_refused() -> None:
    curve = fit_points(*points(noise=6.0), min_r2=0.9)
    assert curve.refused is not None
    assert "`R² >= 0.9` must hold" in curve.refused


def test_a_falling_curve_and_too_few_points_are_refused() -> None:
    falling = fit_points([0.1, 0.2, 0.3], [3.0, 2.0, 1.0], [9.0] * 3, min_r2=0.0)
    assert falling.refused is not None
    assert "does not grow" in falling.refused
    assert (
        fit_points([0.1, 0.1], [1.0, 2.0], [9.0] * 2, min_r2=0.0).refused == "only 2 usable points"
    )


def test_saturated_points_are_dropped() -> None:
    """Half of the tiles can never be skipped: sparsity stops at 0.5 however large the scale factor."""
    statistics = Statistics.empty({}, 1, 1, 1, [8192])
    statistics.kv_tokens["prefill"][0], statistics.calls["prefill"][0] = 8192, 1
    octaves = torch.arange(1, 9) * PER_OCTAVE - LOW * PER_OCTAVE
    statistics.counts["prefill"][0, 0, 0, octaves] = 10
    statistics.counts["prefill"][0, 0, 0, NEVER] = 80
    fit = fit_phase(statistics, "prefill", FitConfig(sparsity_range=(0.1, 0.9)))
    low, high = fit["model"]["sparsity_range"]
    assert 0.05 <= low < high <= 0.45
    assert fit["model"] == fit["layers"][0]
    assert fit["model"]["refused"] is None
    # One octave per 1/16 of all tiles.
    assert fit["model"]["b"] == pytest.approx(math.log(2) * 16, rel=0.1)


def planted(skipped_at: list[int], tiles: int, layers: int = 1) -> Statistics:
    """Tiles that single octaves of the scale factor, from 2 on, begin to skip, of so many in each layer."""
    statistics = Statistics.empty({}, layers, 1, 1, [8192])
    statistics.kv_tokens["prefill"][0], statistics.calls["prefill"][0] = 8192, 1
    for octave, count in enumerate(skipped_at, 1):
        # Spread over the octave's bins, so that sparsity is linear in the logarithm within it.
        first = (octave - LOW) * PER_OCTAVE + 1  # the bin above that edge
        statistics.counts["prefill"][:, 0, 0, first : first + PER_OCTAVE] = count // PER_OCTAVE
    rest = tiles - statistics.counts["prefill"].sum(-1)
    statistics.counts["prefill"][..., NEVER] = rest
    return statistics


def test_the_exported_curve_has_the_slope_at_the_number_and_says_how_far_it_is_right() -> None:
    # Sparsity grows by 0.16 in an octave up to 2^4, then by 0.016: no one curve fits both.
    statistics = planted([160, 160, 160, 16, 16, 16, 16], tiles=1000)
    curve = local_curve(statistics, "prefill", (2.0**2.5,), 4096.0)
    assert curve is not None
    assert curve["b"] == pytest.approx(math.log(2) / 0.16, rel=0.02)
    assert curve["target"] == pytest.approx(statistics.sparsity("prefill", 2.0**2.5))
    assert curve["a"] * math.exp(curve["b"] * curve["target"]) == pytest.approx(2.0**2.5)

    low, high = curve["good"]
    assert low == pytest.approx(curve["target"] - 0.24, abs=0.025)  # nothing is skipped below 2^1
    # Above 2^4 one octave of the curve asks for 0.16 more, and 0.016 more is skipped.
    bend = curve["target"] + 0.24
    assert high == pytest.approx(bend + 0.02 / 0.9, abs=0.01)
    for asked, right in ((high - 0.001, True), (high + 0.011, False)):
        there = statistics.sparsity("prefill", curve["a"] * math.exp(curve["b"] * asked))
        assert (abs(there - asked) <= 0.02) == right
    assert [abs(float(asked) - share) < 0.01 for asked, share in curve["near"].items()] == [
        True,
        True,
    ]

    flat = local_curve(statistics, "prefill", (2.0**6,), 4096.0)
    assert flat is not None and flat["b"] == pytest.approx(math.log(2) / 0.016, rel=0.05)
    fitted = fit_phase(statistics, "prefill", FitConfig(min_r2=0.0))["model"]
    assert curve["b"] < fitted["b"] < flat["b"]


def test_layers_left_dense_count_and_a_number_must_stay_below_the_floor() -> None:
    statistics = planted([160] * 6, tiles=1000, layers=2)
    both = local_curve(statistics, "prefill", (8.0, 8.0), 4096.0)
    one = local_curve(statistics, "prefill", (8.0, 0.0), 4096.0)
    assert both is not None and one is not None
    assert one["target"] == pytest.approx(both["target"] / 2)
    assert one["b"] == pytest.approx(both["b"] * 2)
    floored = local_curve(statistics, "prefill", (8.0, 8.0), 10.0)
    assert floored is not None
    assert floored["a"] * math.exp(floored["b"] * floored["good"][1]) < 10.0
    assert len(floored["near"]) == 1


@pytest.mark.parametrize("factors", [(0.0,), (1e-3,), (2.0**20,)])
def test_where_nothing_changes_there_is_no_slope(factors: tuple[float, ...]) -> None:
    assert local_curve(planted([160] * 6, tiles=1000), "prefill", factors, math.inf) is None


def test_a_foreign_curve_is_trusted_as_far_as_it_tells_what_is_counted() -> None:
    statistics = planted([160] * 6, tiles=1000)
    own = local_curve(statistics, "prefill", (8.0,), 4096.0)
    assert own is not None
    a, b = own["a"], own["b"]
    assert trusted(statistics, "prefill", (8.0,), 4096.0, a, b)["good"] == own["good"]
    off = a * math.exp(0.03 * b)  # 3 points beside it everywhere
    assert set(trusted(statistics, "prefill", (8.0,), 4096.0, off, b)) == {"target", "near"}
    assert trusted(statistics, "prefill", (8.0,), 4096.0, 9.0, b) == {}


def test_a_layer_without_tiles_has_no_curve() -> None:
    fit = fit_phase(Statistics.empty({}, 2, 1, 1, [64]), "decode", FitConfig())
    assert fit["model"]["refused"] == "no threshold below 1 skips a tile"
    assert len(fit["layers"]) == 2


def test_a_curve_too_steep_for_numbers_is_refused() -> None:
    s = [0.50, 0.505, 0.51]
    curve = fit_points(s, [math.exp(2600 * (x - 0.5)) for x in s], [4096.0] * 3, min_r2=0.9)
    assert curve.a == 0.0
    assert curve.refused is not None and "grows too fast" in curve.refused
