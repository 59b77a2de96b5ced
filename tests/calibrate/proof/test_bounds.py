"""The bounds hold as often as they say, and each says no more than it knows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from calibrate.proof.bounds import (
    bounded_upper,
    failing_share_upper,
    lognormal_upper,
    prompts_needed,
)

REPS = 300


def most_misses(level: float) -> int:
    """Misses in REPS samples that a bound with a false-pass rate of 5 % stays within in 99.9 % of runs."""
    return int(stats.binom.ppf(0.999, REPS, 1 - level))


def misses(bounds: list[float], mean: float) -> int:
    return sum(bound < mean for bound in bounds)


@pytest.mark.parametrize("prompts", [10, 24, 100])
@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_a_lognormal_mean_is_above_its_bound_no_more_often_than_promised(
    prompts: int, spread: float
) -> None:
    samples = np.random.default_rng(prompts).lognormal(-(spread**2) / 2, spread, (REPS, prompts))
    found = [
        lognormal_upper(row.tolist(), 0.95, floor=0.01, seed=i, draws=1000)
        for i, row in enumerate(samples)
    ]
    assert misses(found, 1.0) <= most_misses(0.95)
    assert np.median(found) < (3.0 if prompts == 100 or spread < 1 else 30.0)


def test_tasks_with_spreads_of_their_own_keep_the_promise_and_the_power() -> None:
    """Half the prompts lose a tenth; with one spread for all, the bound passes far too often here."""
    random = np.random.default_rng(0)
    light = random.lognormal(math.log(2 / 11) - 0.125, 0.5, (REPS, 12))
    heavy = random.lognormal(math.log(20 / 11) - 1.125, 1.5, (REPS, 12))
    tasks = ["light"] * 12 + ["heavy"] * 12
    rows = np.concatenate([light, heavy], axis=1).tolist()
    found = [lognormal_upper(row, 0.95, tasks, seed=i, draws=1000) for i, row in enumerate(rows)]
    blind = [lognormal_upper(row, 0.95, seed=i, draws=1000) for i, row in enumerate(rows)]
    assert misses(found, 1.0) <= most_misses(0.95)
    assert misses(blind, 1.0) > most_misses(0.95), "the tasks decide this, so the test can fail"

    even = np.concatenate([light / 0.2, light / 0.2 * 10], axis=1).tolist()
    knowing = np.mean([lognormal_upper(row, 0.95, tasks, draws=1000) for row in even])
    assert knowing < np.mean([lognormal_upper(row, 0.95, draws=1000) for row in even])


def test_strata_are_weighted_by_their_prompts_and_their_order_does_not_matter() -> None:
    random = np.random.default_rng(3)
    values = [*random.lognormal(0, 0.3, 30), *random.lognormal(3, 0.3, 10)]
    tasks = ["a"] * 30 + ["b"] * 10
    found = lognormal_upper(values, 0.95, tasks)
    assert np.mean(values) < found < 1.4 * np.mean(values)
    order = random.permutation(40)
    shuffled = lognormal_upper([values[i] for i in order], 0.95, [tasks[i] for i in order])
    assert shuffled == pytest.approx(found, rel=1e-12)


def test_observed_failures_count_although_they_are_not_lognormal() -> None:
    """Of 200 prompts ten lose 60 times as much: their mean is known better than any shape."""
    values = [*np.random.default_rng(4).lognormal(0, 0.3, 190), *[60.0] * 10]
    logarithms = np.log(values)
    lognormal = math.exp(logarithms.mean() + logarithms.var(ddof=1) / 2)
    assert lognormal < np.mean(values) < lognormal_upper(values, 0.95)


@pytest.mark.filterwarnings("error")
def test_tasks_of_equal_values_are_known_exactly() -> None:
    found = lognormal_upper([0.25] * 6 + [0.75] * 6, 0.95, ["a"] * 6 + ["b"] * 6)
    assert found == pytest.approx(0.5)


def test_edges_of_the_lognormal_bound() -> None:
    assert lognormal_upper([0.3], 0.95) == math.inf, "one prompt says nothing about the spread"
    assert lognormal_upper([0.2] * 9, 0.95) == 0.2
    assert lognormal_upper([0.0] * 9, 0.95) == 0.0
    assert lognormal_upper([0.0] * 9, 0.95, floor=0.01) == 0.01
    assert lognormal_upper([1.0, 1.1], 0.95) > 1.5
    # With one prompt per task there is no spread within tasks: all prompts are one stratum.
    values, tasks = [0.5, 1.0, 2.0], ["a", "b", "c"]
    assert lognormal_upper(values, 0.95, tasks) == lognormal_upper(values, 0.95)
    # A task below FREEDOM borrows the others' spread: its own two values would allow anything.
    few = [1.0, 1.2, 0.9, 1.1, 0.8, 1.0, 2.0, 1.0]
    small = ["a"] * 6 + ["b"] * 2
    assert np.mean(few) < lognormal_upper(few, 0.95, small) < 2 * np.mean(few)
    with pytest.raises(ValueError, match="pass a `floor`"):
        lognormal_upper([0.0, 1.0], 0.95)
    with pytest.raises(ValueError, match="must not be negative, but one is -1"):
        lognormal_upper([-1.0, 1.0], 0.95)


def test_levels_near_one_take_more_draws_or_have_no_bound() -> None:
    values = np.random.default_rng(5).lognormal(0, 1, 24).tolist()
    found = [lognormal_upper(values, level, seed=1) for level in (0.99, 0.999, 0.9999, 0.99995)]
    assert found == sorted(found) and len(set(found)) == 4
    # A quantile that is beyond all draws would be too low: 10 000 of them know nothing of 1 in 100 000.
    many = [lognormal_upper(values, 0.9999, seed=seed) for seed in range(5)]
    assert max(many) < 1.25 * min(many)
    assert lognormal_upper(values, 1 - 1e-6) == math.inf


def test_a_higher_confidence_needs_a_higher_bound() -> None:
    values = np.random.default_rng(5).lognormal(0, 1, 24).tolist()
    drops = [0.0] * 20 + [3.0] * 4
    for bound in (lognormal_upper, lambda v, c: bounded_upper(v, c, high=100.0)):
        found = [bound(drops if bound is not lognormal_upper else values, c) for c in (0.9, 0.95)]
        assert found[0] < found[1]


@pytest.mark.parametrize("kind", ["answers", "tokens"])
@pytest.mark.parametrize("prompts", [24, 200])
def test_a_drop_is_above_its_bound_no_more_often_than_promised(kind: str, prompts: int) -> None:
    random, mean = np.random.default_rng(prompts), 5.0
    if kind == "answers":
        samples = np.where(random.random((REPS, prompts)) < mean / 100, 100.0, 0.0)
    else:
        samples = 12.5 * random.binomial(4, (1 + mean / 12.5) / 4, (REPS, prompts)) - 12.5
    found = [bounded_upper(row.tolist(), 0.95, high=100.0) for row in samples]
    assert misses(found, mean) <= most_misses(0.95)


def test_what_prompts_without_a_drop_prove() -> None:
    found = [bounded_upper([0.0] * n, 0.95, high=100.0) for n in (10, 24, 200)]
    # All on the largest bet gives 100 (1 - 0.05^(1/n)); keeping some back costs little.
    exact = [100 * (1 - 0.05 ** (1 / n)) for n in (10, 24, 200)]
    assert all(a < b < 1.1 * a for a, b in zip(exact, found, strict=True))


def test_the_bound_of_a_drop_survives_lost_answers_in_any_order() -> None:
    drops = [100.0, *[0.0] * 199]
    found = bounded_upper(drops, 0.95, high=100.0)
    assert 100 * failing_share_upper(1, 200, 0.95) < found < 4.0
    assert bounded_upper(drops[::-1], 0.95, high=100.0) == pytest.approx(found, abs=1e-6)
    assert bounded_upper([100.0] * 3, 0.95, high=100.0) == 100.0
    assert bounded_upper([-100.0, 0.0], 0.95, high=100.0) < 100.0
    with pytest.raises(ValueError, match="at most 100, but one is 101"):
        bounded_upper([101.0], 0.95, high=100.0)


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 1.0], []], ids=str)
def test_what_is_no_number_has_no_bound(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value, all of them finite"):
        lognormal_upper(values, 0.95)
    with pytest.raises(ValueError, match="at least one value, all of them finite"):
        bounded_upper(values, 0.95, high=math.inf)


def test_the_share_of_failing_prompts_is_exact() -> None:
    assert failing_share_upper(0, 24, 0.95) == pytest.approx(1 - 0.05 ** (1 / 24))
    assert failing_share_upper(0, 200, 0.95) == pytest.approx(0.0149, abs=1e-4)
    assert failing_share_upper(5, 5, 0.95) == failing_share_upper(0, 0, 0.95) == 1.0
    # At the bound, as few failures as were seen have a probability of exactly 5 %.
    for seen, prompts in ((1, 100), (4, 200)):
        upper = failing_share_upper(seen, prompts, 0.95)
        assert stats.binom.cdf(seen, prompts, upper) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="got 3 of 2"):
        failing_share_upper(3, 2, 0.95)


@pytest.mark.parametrize("limit", [1.0, 3.0, 12.5])
def test_as_many_prompts_as_needed_and_not_one_fewer(limit: float) -> None:
    needed = prompts_needed(limit, 0.95, high=100.0)
    assert bounded_upper([0.0] * needed, 0.95, high=100.0) <= limit
    assert bounded_upper([0.0] * (needed - 1), 0.95, high=100.0) > limit


def test_a_limit_that_cannot_be_broken_needs_one_prompt() -> None:
    assert prompts_needed(100.0, 0.95, high=100.0) == 1
