"""The curve that NVIDIA's Model-Optimizer fits, from the same prompts as ours.

Its procedure, as read in nvidia-modelopt 0.47.0 (github.com/NVIDIA/Model-Optimizer, `calibrator.py` in
modelopt/torch/sparsity/attention_sparsity/calibration):

1. A sample is one prompt's prefill, or one decode step. Its sparsity at a threshold is the plain mean over
   layers, and it is taken at 20 thresholds.
2. Each sample and threshold is a point: scale factor = threshold * KV length, and sparsity. Those of 10 to
   90 % sparsity go into one fit for the whole model.
3. `scale_factor = a * exp(b * sparsity)` is fitted to the scale factors themselves, not to their logarithms
   (its `fit_logspace` is off for language models), with 0 <= a and 0 <= b <= 20.
4. R² of that fit is printed, and any curve is used.

Two things are ours. A number holds for one geometry only, so tiles and votes are those of the kernel that
will serve; Model-Optimizer always counts tiles of 128 x 128, and each query head votes alone. And a prompt is
one sample, which is Model-Optimizer with `chunk_size: -1`; where it is computed in chunks, a sample still
holds all of its tiles.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, curve_fit

from calibrate.statistics.fit import Curve
from skip_softmax.meaning.histogram import EDGES, LOW, NEVER, PER_OCTAVE

THRESHOLDS = (
    1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9,
    0.95, 0.99,
)  # fmt: skip
_SPARSITY = 0.10, 0.90  # of the points that are fitted
_COLLECTED, _FITTED = 10, 3  # fewest points
_START = 1.0, 5.0
_STEEPEST = 20.0
_FLATTEST = 1e-3  # b ends near 0 where the best curve would fall


def sample(counts: list[torch.Tensor], kv_len: int) -> torch.Tensor:
    """One sample of Model-Optimizer's, from the histograms of its layers.

    Exact at bin edges and linear in the logarithm between them; a threshold below the lowest edge counts as
    one that skips nothing, which leaves it out of the fit.

    Args:
        counts: visited tiles of each layer, int64 [heads, BINS].
        kv_len: KV length of the call [tokens].

    Returns:
        float64 [1 + thresholds]: the KV length, then the mean sparsity over layers at each of `THRESHOLDS`.
    """
    at = (np.log2(np.asarray(THRESHOLDS) * kv_len) - LOW) * PER_OCTAVE
    shares = []
    for layer in counts:
        tiles = layer.sum(0).double()
        below = np.interp(at, np.arange(EDGES), tiles[:NEVER].cumsum(0).numpy(), left=0.0)
        shares.append(below / float(tiles.sum()))
    return torch.tensor([kv_len, *np.mean(shares, axis=0)], dtype=torch.float64)


def fit(samples: torch.Tensor) -> dict[str, Any]:
    """Fits one phase's curve as Model-Optimizer does.

    Args:
        samples: rows of `sample`, float64 [samples, 1 + thresholds].

    Returns:
        A `Curve` as a dictionary, whose `r2` is of the logarithms, as our own curve's; `r2_raw`, of the scale
        factors, which Model-Optimizer prints; and `collected`, how many points there were before those that
        are fitted were chosen. `a` and `b` have five digits, as a thresholds file states them.
    """
    lengths = samples[:, 0].numpy() if len(samples) else np.zeros(0)
    shares = samples[:, 1:].numpy() if len(samples) else np.zeros((0, len(THRESHOLDS)))
    factors = lengths[:, None] * np.asarray(THRESHOLDS)
    low, high = _SPARSITY
    kept = (shares >= low) & (shares <= high)
    s, x = shares[kept], factors[kept]
    length = np.broadcast_to(lengths[:, None], shares.shape)[kept]

    found = asdict(Curve(None, None, None, len(s), _span(s), _span(length), None, None))
    found |= {"r2_raw": None, "collected": shares.size}
    if shares.size < _COLLECTED:
        return found | {"refused": f"only {shares.size} points, where {_COLLECTED} are needed"}
    if len(s) < _FITTED:
        return found | {
            "refused": f"only {len(s)} of {shares.size} points have a sparsity of {100 * low:g} to "
            f"{100 * high:g} %, where {_FITTED} are needed; they have {100 * shares.min():.3g} to "
            f"{100 * shares.max():.3g} %"
        }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of a covariance that nobody reads
            (a, b), _ = curve_fit(
                lambda share, a, b: a * np.exp(b * share),
                s,
                x,
                p0=_START,
                bounds=([0.0, 0.0], [np.inf, _STEEPEST]),
                maxfev=10_000,
            )
    except RuntimeError as error:
        return found | {"refused": f"the least-squares fit does not end ({error})"}
    found |= {"a": float(f"{a:.5g}"), "b": float(f"{b:.5g}")}
    if found["b"] < _FLATTEST or found["a"] == 0:
        reason = f"the scale factor does not grow with sparsity (a={a:.3g}, b={b:.3g})"
        return found | {"refused": reason}
    log_predicted = math.log(found["a"]) + found["b"] * s
    return found | {
        "r2": _r2(np.log(x), log_predicted),
        "r2_raw": _r2(x, np.exp(log_predicted)),
    }


def _span(values: np.ndarray) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if len(values) else None


def _r2(values: np.ndarray, predicted: np.ndarray) -> float:
    """Share of the variance that a prediction explains; below 0 it is worse than the mean."""
    spread = float(((values - values.mean()) ** 2).sum())
    return 1.0 - float(((values - predicted) ** 2).sum()) / spread if spread else 0.0
