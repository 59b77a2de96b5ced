"""Curves `scale_factor = a * exp(b * sparsity)` per layer and phase, with their error.

This is the form that TensorRT-LLM and Model-Optimizer read. It is fitted in log space: a fit of the
raw values would follow the largest scale factors only. The 1/length law behind a scale factor is
tested, not assumed: a second fit frees the length exponent.

An engine's user moves the target sparsity along the one curve that the engine reads. So what is exported
is not the fit over all sparsities but the curve with the slope at the number that was proven
(`local_curve`), and the range in which it tells what the histograms count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from calibrate.schema import FitConfig
from calibrate.statistics.counts import Statistics
from skip_softmax.thresholds.types import Phase

_OCTAVES = 1.0  # over so much of the scale factor the slope is taken
_POINTS = 0.02  # of sparsity, between what a curve says and what is counted
_STEP = 0.005  # of the target, in search of where that ends


@dataclass(frozen=True)
class Curve:
    """One fitted curve, or why there is none.

    Attributes:
        a: scale factor at sparsity 0 [tokens].
        b: growth of its logarithm from sparsity 0 to 1.
        r2: share of the variance of log(scale_factor) that the curve explains.
        points: how many (sparsity, scale factor) pairs were used.
        sparsity_range: smallest and largest sparsity of those pairs.
        kv_len_range: smallest and largest mean KV length of those pairs [tokens].
        length_exponent: gamma of threshold ~ kv_len^-gamma; 1 is the law that scale factors assume;
            None: one length.
        refused: why the curve must not be used; None: it may.
    """

    a: float | None
    b: float | None
    r2: float | None
    points: int
    sparsity_range: tuple[float, float] | None
    kv_len_range: tuple[float, float] | None
    length_exponent: float | None
    refused: str | None


def fit_phase(statistics: Statistics, phase: Phase, config: FitConfig) -> dict[str, Any]:
    """Fits the model-wide curve and one curve per layer.

    Args:
        statistics: the histograms.
        phase: `prefill` or `decode`.
        config: the range of points and the smallest R² that is accepted.

    Returns:
        `{"model": curve, "layers": [curve, ...]}`, curves as plain dictionaries.
    """
    edges = statistics.at_edges(phase)
    skipped = edges.skipped.sum(1)  # [layers, lengths, edges]
    visited = statistics.visited(phase).sum(1)  # [layers, lengths]
    kv_len = statistics.mean_kv_len(phase).tolist()

    def curve(skipped: torch.Tensor, visited: torch.Tensor) -> dict[str, Any]:
        return asdict(_fit(edges.scale_factor.tolist(), skipped, visited, kv_len, config))

    return {
        "model": curve(skipped.sum(0), visited.sum(0)),
        "layers": [curve(*layer) for layer in zip(skipped, visited, strict=True)],
    }


def fit_points(
    sparsity: Sequence[float], scale_factor: Sequence[float], kv_len: Sequence[float], min_r2: float
) -> Curve:
    """Fits one curve to points.

    Args:
        sparsity: in [0, 1].
        scale_factor: above 0 [tokens].
        kv_len: KV length of each point [tokens].
        min_r2: below this the curve is refused.

    Returns:
        The curve; refused when there are under three distinct sparsities, it does not rise, or R²
        is too low.
    """
    s, x, length = (
        np.asarray(values, dtype=np.float64) for values in (sparsity, scale_factor, kv_len)
    )
    if len(np.unique(s)) < 3:
        return Curve(None, None, None, len(s), None, None, None, f"only {len(s)} usable points")
    line = scipy_stats.linregress(s, np.log(x))
    slope, intercept, r2 = float(line.slope), float(line.intercept), float(line.rvalue) ** 2
    scale, refused = math.exp(intercept), None
    if slope <= 0:
        refused = f"the scale factor does not grow with sparsity (b={slope:.3g})"
    elif r2 < min_r2:
        refused = f"`R² >= {min_r2:g}` must hold, but the fit reaches {r2:.3f}"
    elif scale == 0.0:
        refused = f"the scale factor grows too fast with sparsity for a curve (b={slope:.3g})"
    return Curve(
        scale,
        slope,
        r2,
        len(s),
        (float(s.min()), float(s.max())),
        (float(length.min()), float(length.max())),
        _length_exponent(s, x, length),
        refused,
    )


def local_curve(
    statistics: Statistics, phase: Phase, factors: Sequence[float], largest: float
) -> dict[str, Any] | None:
    """The curve through a setting, with the slope that the histograms have there.

    Args:
        statistics: the histograms.
        phase: `prefill` or `decode`.
        factors: one per layer [tokens]; all that are above 0 are equal.
        largest: scale factors stay below it [tokens].

    Returns:
        `a` and `b` as in `Curve`, and what `trusted` adds; None where the setting skips nothing, or where the
        sparsity does not grow with the scale factor.
    """
    factor, sparsity = max(factors), _sparsity_of(statistics, phase, factors)
    if factor == 0:
        return None
    half = 2 ** (_OCTAVES / 2)
    rise = sparsity(factor * half) - sparsity(factor / half)
    if rise <= 0:
        return None
    target, b = sparsity(factor), math.log(half**2) / rise
    a = factor * math.exp(-b * target)
    if target == 0 or a == 0.0:
        return None
    return {"a": a, "b": b, **trusted(statistics, phase, factors, largest, a, b)}


def trusted(
    statistics: Statistics,
    phase: Phase,
    factors: Sequence[float],
    largest: float,
    a: float,
    b: float,
) -> dict[str, Any]:
    """How far a curve tells what the histograms count, of all lengths together.

    Args:
        statistics: the histograms.
        phase: `prefill` or `decode`.
        factors: one per layer [tokens]; all that are above 0 are equal.
        largest: scale factors stay below it [tokens].
        a: of the curve [tokens].
        b: of the curve.

    Returns:
        `target`: the sparsity at which the curve gives the setting; `near`: for targets 0.1 away, the
        sparsity that they have; `good`: the smallest and largest target around it with at most 2 points
        between the two, absent where the setting itself has more. Nothing where no target gives the setting.
    """
    sparsity = _sparsity_of(statistics, phase, factors)
    target = math.log(max(factors) / a) / b
    if not 0 <= target <= 1:
        return {}

    def counted(asked: float) -> float | None:
        factor = a * math.exp(b * asked) if 0 <= asked <= 1 else largest
        return sparsity(factor) if factor < largest else None

    def good(asked: float) -> bool:
        found = counted(asked)
        return found is not None and abs(found - asked) <= _POINTS

    near = {f"{one:.4f}": counted(one) for one in (target - 0.1, target + 0.1)}
    found: dict[str, Any] = {
        "target": target,
        "near": {asked: share for asked, share in near.items() if share is not None},
    }
    if good(target):
        found["good"] = _end(good, target, -_STEP), _end(good, target, _STEP)
    return found


def _end(good: Callable[[float], bool], start: float, step: float) -> float:
    while good(start + step):
        start += step
    return start


def _sparsity_of(
    statistics: Statistics, phase: Phase, factors: Sequence[float]
) -> Callable[[float], float]:
    """Sparsity at one number in the layers that skip."""
    skips = torch.tensor([float(factor > 0) for factor in factors], dtype=torch.float64)
    return lambda factor: statistics.sparsity(phase, skips * factor)


def _fit(
    grid: Sequence[float],
    skipped: torch.Tensor,
    visited: torch.Tensor,
    kv_len: Sequence[float],
    config: FitConfig,
) -> Curve:
    """Curve through tiles skipped [lengths, scale factors of the grid] of those visited [lengths]."""
    if not skipped.any():
        reason = "no threshold below 1 skips a tile"
        return Curve(None, None, None, 0, None, None, None, reason)
    low, high = config.sparsity_range
    points: list[tuple[float, float, float]] = []
    for length, at_edges, tiles in zip(kv_len, skipped.tolist(), visited.tolist(), strict=True):
        reachable = 1.0 - (tiles - at_edges[-1]) / tiles if tiles else 0.0
        for factor, count in zip(grid, at_edges, strict=True):
            share = count / tiles if tiles else 0.0
            # Near its ceiling, sparsity stops responding to the scale factor; such points only
            # bend the line.
            if reachable and low <= share / reachable <= high and factor < length:
                points.append((share, factor, length))
    shares, factors, lengths = ([point[i] for point in points] for i in range(3))
    return fit_points(shares, factors, lengths, config.min_r2)


def _length_exponent(s: np.ndarray, x: np.ndarray, length: np.ndarray) -> float | None:
    # Lengths within a third of each other say nothing about growth.
    if np.ptp(np.log(length)) < 0.3:
        return None
    design = np.stack([np.ones_like(s), s, np.log(length)], axis=1)
    coefficients = np.linalg.lstsq(design, np.log(x), rcond=None)[0]
    return 1.0 - float(coefficients[2])
