"""Upper confidence bounds that hold for few prompts; `notebooks/studies/false_passes.py` shows how well.

| bound | of | what it assumes |
|---|---|---|
| `lognormal_upper` | the mean of a loss that is never negative (KL) | lognormal within each task |
| `bounded_upper` | the mean of a loss that has a largest value (score drop) | nothing |
| `failing_share_upper` | the share of prompts that fail | nothing |

All of them take prompts as independent, and none depends on their order. A resampled bound (bootstrap)
is not among them: from 10 to 24 skewed losses it lets a mean at the budget pass in 13 to 30 % of cases
where 5 % are promised.

How much of a limit prompts can prove, and how many it takes, is known before they are run, for a spread
that is assumed or was seen elsewhere: `provable_share` and `prompts_for`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]

FREEDOM = 4
"""Degrees of freedom that the spread of a task has at least: one less than its prompts; what these lack is
borrowed from the spread of all tasks."""

_TAIL = 20  # draws that should lie beyond a quantile: it is then within a quarter of its level
_MOST_DRAWS = 500_000

# Bets as shares of the largest that can never lose more than everything, and the capital on each. The
# largest needs the fewest prompts where no prompt loses; the others survive prompts that lose everything.
_BETS = np.array([1.0, 0.8, 0.6, 0.4])
_CAPITAL = np.array([0.7, 0.1, 0.1, 0.1])


def lognormal_upper(
    values: Sequence[float],
    confidence: float,
    strata: Sequence[str] | None = None,
    *,
    floor: float = 0.0,
    seed: int = 0,
    draws: int = 10_000,
) -> float:
    """One-sided upper bound of the mean of losses that are lognormal within each stratum.

    Each stratum has the generalised confidence limit of a lognormal mean (Krishnamoorthy and Mathew 2003,
    doi:10.1016/S0378-3758(02)00153-2): its mean and spread are drawn as often as the sample makes them
    plausible, and the limit is a quantile. Strata are independent, so how far their limits lie above their
    estimates adds up as variances do (Zou and Donner 2008, doi:10.1002/sim.3095). Where the bound from
    the sample's moments is larger, it counts: many values may show that they are not lognormal.

    A stratum of five values or more has its own spread. Two or three values say almost nothing about it, so
    smaller strata fill up to `FREEDOM` with what the spread of all strata says: where such a stratum spreads
    more and decides the mean, the bound is too low. If no stratum has two values, all values are one
    stratum. What no value hints at, such as a rare failure that no prompt met, is not covered.

    Args:
        values: one per prompt, not negative.
        confidence: level of the bound, in (0, 1).
        strata: the stratum of each value, weighted by its share of the values; None: one stratum.
        floor: smaller values count as this much, so that zeros have a logarithm; raises the mean by at
            most as much. Without it, zeros must not occur unless all values are 0.
        seed: of the draws.
        draws: how many at least; 10 000 put a level of 0.95 within 0.4 points. Levels near 1 take more.

    Returns:
        The bound, in the unit of the values; infinite for a single value, or where the level is so near to 1
        that no draws can tell.

    Raises:
        ValueError: there is no value, or a value is negative or not finite.
    """
    measured = _checked(values)
    if measured.min() < 0:
        raise ValueError(f"losses must not be negative, but one is {measured.min():g}")
    sample = np.maximum(measured, floor)
    if len(sample) == 1:
        return math.inf
    if np.ptp(sample) == 0:
        return float(sample[0])  # measured losses differ: all of these are below the floor
    if sample.min() == 0:
        raise ValueError(
            "a loss of 0 has no logarithm; pass a `floor`, for example 1 % of the budget"
        )
    names = np.asarray(["" for _ in sample] if strata is None else strata)
    groups = [np.log(sample[names == name]) for name in np.unique(names)]
    if len(groups) == len(sample):
        groups = [np.log(sample)]
    draws = min(max(draws, math.ceil(_TAIL / (1 - confidence))), _MOST_DRAWS)
    if draws * (1 - confidence) < _TAIL / 2:
        return math.inf
    random = np.random.default_rng(seed)
    squares = [float(((group - group.mean()) ** 2).sum()) for group in groups]
    freedom = len(sample) - len(groups)
    shared = sum(squares) / random.chisquare(freedom, draws)
    estimate, above = 0.0, []
    for group, square in zip(groups, squares, strict=True):
        size, share = len(group), len(group) / len(sample)
        borrowed = max(FREEDOM - (size - 1), 0) if len(groups) > 1 else 0
        known = size - 1 + borrowed
        variance = (square + borrowed * shared) / random.chisquare(known, draws)
        centre = group.mean() + random.standard_normal(draws) * np.sqrt(variance / size)
        with np.errstate(over="ignore"):
            limit = float(np.quantile(np.exp(centre + variance / 2), confidence, method="higher"))
        likely = (square + borrowed * sum(squares) / freedom) / known
        mean = math.exp(group.mean() + likely / 2)
        estimate += share * mean
        above.append(share * (limit - mean))
    plausible = estimate + math.hypot(*above)
    return max(plausible, _from_moments([np.exp(group) for group in groups], confidence))


def bounded_upper(values: Sequence[float], confidence: float, *, high: float) -> float:
    """One-sided upper bound of the mean of values that are never above `high`.

    Betting (Waudby-Smith and Ramdas 2024, arXiv 2010.09686). Against each candidate mean m one starts
    with a capital of 1 and stakes it, prompt after prompt, on values below m: with `b` of the largest
    safe bet a value x multiplies the capital by `1 + b (m - x) / (high - m)`. If the mean is m or more,
    capital does not grow on average, so it reaches `1 / (1 - confidence)` with a probability of at most
    `1 - confidence` (Markov), and every m at which it does is refuted. Bets are fixed before the data and
    averaged over `_BETS`: the capital is a sum of products, so the order of the prompts does not matter.

    Nothing else is assumed: prompts may follow different distributions, and m is then the mean of theirs.

    Args:
        values: one per prompt.
        confidence: level of the bound, in (0, 1).
        high: the largest value a prompt can have.

    Returns:
        The bound, above the mean and at most `high`.

    Raises:
        ValueError: there is no value, or a value is above `high` or not finite.
    """
    sample = _checked(values)
    if sample.max() > high:
        raise ValueError(f"values must be at most {high:g}, but one is {sample.max():g}")
    # The capital grows with m, and is below 1 at the sample's mean: halve to the m where it is enough.
    refuted, kept = high, float(sample.mean())
    while refuted - kept > 1e-9 * max(1.0, abs(high)):
        middle = (refuted + kept) / 2
        if _capital(sample, middle, high) >= -math.log1p(-confidence):
            refuted = middle
        else:
            kept = middle
    return refuted


def failing_share_upper(failures: int, prompts: int, confidence: float) -> float:
    """One-sided upper bound of the share of prompts that fail: exact binomial (Clopper and Pearson 1934).

    Args:
        failures: prompts that failed.
        prompts: all prompts; 0 of them say nothing, and the bound is 1.
        confidence: level of the bound, in (0, 1).

    Returns:
        The bound, in [0, 1]: at 0.95, 0 of 24 give 0.117, 0 of 200 give 0.015.

    Raises:
        ValueError: there are more failures than prompts, or fewer than none.
    """
    if not 0 <= failures <= prompts:
        raise ValueError(f"0 <= failures <= prompts must hold, but got {failures} of {prompts}")
    if failures == prompts:
        return 1.0
    return float(stats.beta.ppf(confidence, failures + 1, prompts - failures))


def prompts_needed(limit: float, confidence: float, *, high: float) -> int:
    """Prompts with which `bounded_upper` is within a limit if none of them loses anything.

    Args:
        limit: above 0 and at most `high`.
        confidence: level of the bound, in (0, 1).
        high: the largest value a prompt can have.

    Returns:
        The smallest such number; with fewer, nothing can prove the limit.
    """
    if limit >= high:
        return 1
    # Without a loss each prompt multiplies a bet's capital by the same number.
    growth = np.log1p(_BETS * limit / (high - limit))

    def proven(prompts: int) -> bool:
        return _together(prompts * growth) >= -math.log1p(-confidence)

    too_few, enough = 0, 1
    while not proven(enough):
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if proven(middle) else (middle, enough)
    return enough


def provable_share(strata: Sequence[str], confidence: float, spread: float) -> float:
    """The largest share of a limit that a loss's true mean may be, to be proven in about half of all cases.

    A true mean over its `lognormal_upper` of an ideal sample: in each stratum, the logarithms lie at the
    normal quantiles. Strata are taken to lose alike.

    Args:
        strata: the stratum of each prompt.
        confidence: level of the bound, in (0, 1).
        spread: standard deviation of the logarithm of the loss within each stratum, above 0.

    Returns:
        The share, in [0, 1).
    """
    logarithms = np.zeros(len(strata))
    # As in `lognormal_upper`: where no stratum has two values, all are one.
    names = np.asarray(strata if len(set(strata)) < len(strata) else [""] * len(strata))
    for name in np.unique(names):
        size = int((names == name).sum())
        if size > 1:
            scores = stats.norm.ppf((np.arange(size) + 0.5) / size)
            logarithms[names == name] = spread * scores / scores.std(ddof=1)
    upper = lognormal_upper(np.exp(logarithms).tolist(), confidence, names.tolist())
    return math.exp(spread**2 / 2) / upper


def prompts_for(
    share: float, strata: Sequence[str], confidence: float, spread: float, *, most: int = 10_000
) -> int | None:
    """How many prompts `provable_share` needs for a share, with these strata in the same proportions.

    Args:
        share: of a limit, in (0, 1).
        strata: the strata in the order in which prompts come; they repeat.
        confidence: level of the bound, in (0, 1).
        spread: standard deviation of the logarithm of the loss within each stratum, above 0.
        most: where to stop looking.

    Returns:
        The number, to 2 %; None: more than `most`.
    """

    def proven(prompts: int) -> bool:
        repeated = [strata[i % len(strata)] for i in range(prompts)]
        return provable_share(repeated, confidence, spread) >= share

    too_few, enough = 1, 2
    while not proven(enough):
        if enough >= most:
            return None
        too_few, enough = enough, min(2 * enough, most)
    while enough - too_few > max(1, enough // 50):
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if proven(middle) else (middle, enough)
    return enough


def _from_moments(groups: Sequence[Values], confidence: float) -> float:
    """Upper bound of a mean whatever the distribution, for many values: Johnson's t (1978), by group.

    The mean, plus its standard error times a quantile of Student's t that is corrected for the skewness.
    """
    whole, freedom = np.concatenate(groups), sum(map(len, groups)) - len(groups)
    inside = np.concatenate([group - group.mean() for group in groups])
    error = math.sqrt((inside**2).sum() / freedom / len(whole))
    if error == 0.0:
        return float(whole.mean())
    skewness = (inside**3).mean() / (inside**2).mean() ** 1.5 / math.sqrt(len(whole))
    quantile = float(stats.t.ppf(confidence, freedom))
    return float(whole.mean() + error * (quantile + skewness * (2 * quantile**2 + 1) / 6))


def _capital(sample: Values, mean: float, high: float) -> float:
    """Logarithm of the capital against a mean, all prompts bet on."""
    factors = 1.0 + _BETS[:, None] * (mean - sample) / (high - mean)
    with np.errstate(divide="ignore"):
        # Rounding can leave -1e-17 where a prompt takes everything.
        return _together(np.log(factors.clip(0)).sum(1))


def _together(logarithms: Values) -> float:
    """Logarithm of the capital of all bets, from each one's."""
    return float(np.logaddexp.reduce(logarithms + np.log(_CAPITAL)))


def _checked(values: Sequence[float]) -> Values:
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(
            f"needs at least one value, all of them finite numbers, but got {list(values)}"
        )
    return sample
