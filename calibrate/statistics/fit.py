"""Curves `scale_factor = a * exp(b * sparsity)` per layer and phase, with their error.

This is the form that TensorRT-LLM and Model-Optimizer read. It is fitted in log space: a fit of the
raw values would follow the largest scale factors only. The 1/length law behind a scale factor is
tested, not assumed: a second fit frees the length exponent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from calibrate.schema import FitConfig
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import EDGES, NEVER, edges
from skip_softmax.thresholds.types import Phase


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

    def scale_factor(self, sparsity: float) -> float:
        """The curve's value [tokens].

        Raises:
            ValueError: the curve was refused.
        """
        if self.a is None or self.b is None or self.refused is not None:
            raise ValueError(f"this curve must not be used: {self.refused}")
        return self.a * math.exp(self.b * sparsity)


def fit_phase(statistics: Statistics, phase: Phase, config: FitConfig) -> dict[str, Any]:
    """Fits the model-wide curve and one curve per layer.

    Args:
        statistics: the histograms.
        phase: `prefill` or `decode`.
        config: the range of points and the smallest R² that is accepted.

    Returns:
        `{"model": curve, "layers": [curve, ...]}`, curves as plain dictionaries.
    """
    counts = statistics.counts[phase].sum(1)  # [layers, lengths, BINS]
    kv_len = statistics.mean_kv_len(phase)
    return {
        "model": asdict(_fit(counts.sum(0), kv_len, config)),
        "layers": [asdict(_fit(layer, kv_len, config)) for layer in counts],
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


def _fit(counts: torch.Tensor, kv_len: torch.Tensor, config: FitConfig) -> Curve:
    """Curve through the bin edges of a [lengths, BINS] histogram."""
    low, high = config.sparsity_range
    points: list[tuple[float, float, float]] = []
    grid = edges().tolist()
    for length, histogram in zip(kv_len.tolist(), counts.double(), strict=True):
        visited = float(histogram.sum())
        reachable = 1.0 - float(histogram[NEVER]) / visited if visited else 0.0
        cumulative = histogram[:NEVER].cumsum(0).tolist()
        for i in range(EDGES):
            share = cumulative[i] / visited if visited else 0.0
            # Near its ceiling sparsity stops answering to the scale factor; such points only bend
            # the line.
            if reachable and low <= share / reachable <= high and grid[i] < length:
                points.append((share, grid[i], length))
    shares = [point[0] for point in points]
    factors = [point[1] for point in points]
    lengths = [point[2] for point in points]
    return fit_points(shares, factors, lengths, config.min_r2)


def _length_exponent(s: np.ndarray, x: np.ndarray, length: np.ndarray) -> float | None:
    if (
        np.ptp(np.log(length)) < 0.3
    ):  # lengths within a third of each other say nothing about growth
        return None
    design = np.stack([np.ones_like(s), s, np.log(length)], axis=1)
    coefficients = np.linalg.lstsq(design, np.log(x), rcond=None)[0]
    return 1.0 - float(coefficients[2])
