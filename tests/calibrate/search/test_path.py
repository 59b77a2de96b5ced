"""The path from safe to bold: what lies between and beyond measured settings, where the loss is known."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from planted_space import LAYERS, config, planted_loss, space

from calibrate.errors import WorkFailed
from calibrate.search.cost import Cost, Curve
from calibrate.search.path import candidates, walked
from calibrate.search.points import Point, front
from calibrate.search.space import Space

LIMITS = {"kl": 0.01, "score_drop": 2.0}
SHARES = [0.1, 0.3, 0.6, 1.0, 1.7]


def point(kl: float, time: float, name: str = "search", share: float = 0.5) -> Point:
    factors = (10.0,) * LAYERS
    losses = {"kl": kl, "score_drop": 0.0}
    setting = {"prefill": factors, "decode": factors}
    return Point(name, setting, losses, time, {"prefill": share, "decode": share})


def measured(here: Space, params: dict[str, float], name: str, times: float = 1.0) -> Point:
    """A trial on search prompts that lose `times` what is predicted."""
    setting = here.setting(params)
    skipped = {
        phase: here.statistics.sparsity(phase, factors) for phase, factors in setting.items()
    }
    losses = {"kl": times * planted_loss(here, setting), "score_drop": 0.0}
    return Point(name, setting, losses, here.relative_time(setting), skipped)


def trials(here: Space, times: float = 1.0) -> list[Point]:
    return [measured(here, params, name, times) for name, params in here.seeds()]


def test_the_front() -> None:
    slow, good, wild, beaten = (
        point(0.001, 0.9),
        point(0.004, 0.7),
        point(0.02, 0.5),
        point(0.005, 0.8),
    )
    assert front([slow, good, wild, beaten], LIMITS) == [wild, good, slow]
    dropping = dataclasses.replace(point(0.001, 0.5), losses={"kl": 0.001, "score_drop": 1.8})
    assert dropping.share(LIMITS) == pytest.approx(0.9)
    assert front([slow, dropping], {"kl": 0.01}) == [dropping]
    assert front([slow, dropping], LIMITS) == [dropping, slow]


@pytest.mark.parametrize("times", [0.3, 1.0, 4.0])
def test_candidates_spend_the_shares_that_they_aim_at_whatever_the_search_prompts_say(
    times: float,
) -> None:
    """Between the measured settings and beyond them, also where all predictions are off by a factor."""
    here = space(config())
    found = candidates(trials(here, times), here, LIMITS, SHARES, 0.6)
    assert [step.share for step in found] == pytest.approx(SHARES, rel=0.02)
    for step in found:
        assert times * planted_loss(here, step.setting) == pytest.approx(0.01 * step.share)
        assert step.relative_time == here.relative_time(step.setting) < 1.0


def test_a_bolder_candidate_skips_whatever_a_safer_one_skips() -> None:
    here = space(config())
    found = candidates(trials(here), here, LIMITS, SHARES, 0.6)
    assert len({id(step.of) for step in found}) == 1, "all on one path"
    for safer, bolder in itertools.pairwise(found):
        assert bolder.relative_time < safer.relative_time
        for phase in safer.setting:
            pairs = zip(safer.setting[phase], bolder.setting[phase], strict=True)
            assert all(low < high or low == high == 0.0 for low, high in pairs)


def test_the_path_is_that_of_the_setting_which_is_fastest_where_the_proof_will_end() -> None:
    """A trial that is slower as it was measured, because it spends less, may be the faster one at a share."""
    here = space(config())
    *_, (_, analytic), (_, uniform) = here.seeds()
    bold = measured(here, uniform, "uniform")
    lower = {f"{phase}.log2_scale": analytic[f"{phase}.log2_scale"] - 3 for phase in bold.setting}
    safe = measured(here, {**analytic, **lower}, "search")
    assert safe.relative_time > bold.relative_time and safe.share(LIMITS) < bold.share(LIMITS)
    found = candidates([bold, safe], here, LIMITS, SHARES, 0.6)
    assert {step.name for step in found} == {"search"}
    # And one on which the search prompts lose a hundred times as much loses its path.
    unlucky = dataclasses.replace(safe, losses={"kl": 100 * safe.losses["kl"], "score_drop": 0.0})
    found = candidates([bold, unlucky], here, LIMITS, SHARES, 0.6)
    assert {step.name for step in found} == {"uniform"}


def test_no_estimate_contradicts_a_measured_setting() -> None:
    """A cliff that no prediction knows of: above twice the first setting everything is lost."""
    here = space(config())
    (name, params), *_ = here.seeds()
    first = measured(here, params, name, 0.1)
    double = {f"{phase}.log2_scale": params[f"{phase}.log2_scale"] + 1 for phase in first.setting}
    cliff = dataclasses.replace(measured(here, {**params, **double}, "search"), losses={"kl": 9.0})
    found = candidates([first, cliff], here, LIMITS, SHARES, 0.6)
    bounds = [factor * 1.001 for factor in cliff.setting["prefill"]]
    for step in found:
        assert all(f < top for f, top in zip(step.setting["prefill"], bounds, strict=True))


def test_nothing_is_tried_before_what_was_measured_has_passed() -> None:
    here = space(config())
    points = trials(here, 0.01)
    found = candidates(points, here, LIMITS, SHARES, 0.6)
    assert found[0].share < SHARES[0] and found[0].setting == found[0].of.setting
    assert found[0].of in points
    found = candidates(trials(here), here, LIMITS, SHARES, 0.6)
    assert found[0].share == pytest.approx(SHARES[0], rel=0.02)


def test_single_numbers_have_a_path_of_their_own() -> None:
    here = space(config())
    uniform = [p for p in trials(here) if p.name == "uniform"]
    found = walked(uniform, here, LIMITS, SHARES, 0.6)
    assert [step.share for step in found] == pytest.approx(SHARES, rel=0.02)
    for step in found:
        assert all(len(set(factors)) == 1 for factors in step.setting.values())
    best = candidates(trials(here), here, LIMITS, SHARES, 0.6)
    assert best[2].relative_time < found[2].relative_time
    assert walked([], here, LIMITS, SHARES, 0.6) == []


def test_a_path_ends_at_the_largest_scale_factor_that_is_allowed() -> None:
    here = space(config())
    top = here.target.largest_scale_factor("prefill")
    found = candidates(trials(here, 1e-4), here, LIMITS, [0.001, 0.01, 0.1, 1.0, 9.0], 0.1)
    assert max(max(factors) for factors in found[-1].setting.values()) == pytest.approx(top)
    assert len(found) < 5, "the same setting is not tried twice"
    assert found[-1].share < 1.0, "and is not said to spend what it cannot"


def test_a_phase_that_skips_nothing_is_left_dense_and_the_other_one_is_proven() -> None:
    here = space(config())
    (name, params), *_ = here.seeds()
    both = measured(here, params, name)
    idle = dataclasses.replace(both, sparsity={**both.sparsity, "decode": 0.0})
    dense = idle.without_idle(here.relative_time)
    assert dense.setting["decode"] == (0.0,) * LAYERS and dense.losses == idle.losses
    assert both.without_idle(here.relative_time) is both
    found = candidates([dense], here, LIMITS, SHARES, 0.6)
    for step in found:
        assert step.setting["decode"] == (0.0,) * LAYERS and any(step.setting["prefill"])


def test_a_phase_in_which_the_safe_end_skips_nothing_is_dense_there_only() -> None:
    here = space(config())
    (name, params), *_ = here.seeds()
    # Below a scale factor of 1 no tile of the planted statistics is skipped.
    low = {"decode.log2_scale": 5.0, "decode.tilt": 0.0, "decode.dense_below": 0.0}
    found = candidates([measured(here, {**params, **low}, name)], here, LIMITS, [1e-5, 0.5], 0.5)
    assert not any(found[0].setting["decode"]) and any(found[0].setting["prefill"])
    assert any(found[1].setting["decode"])


def refused(points: list[Point], match: str) -> None:
    with pytest.raises(WorkFailed, match=match):
        candidates(points, space(config()), {"kl": 1e-15, "score_drop": 1e-12}, SHARES, 0.6)


def test_a_run_that_skips_nothing_within_the_budget_fails_and_says_so() -> None:
    refused([point(0.0, 1.0, share=0.0)], r"within the budget: none that ran to its end skips")
    refused([point(0.5, 0.7)], r"nearest one that skips has KL 0.500 nats.*raise `budget.kl`")
    dropping = dataclasses.replace(point(1e-20, 0.7), losses={"kl": 1e-20, "score_drop": 6.0})
    refused([dropping], r"has score drop 6.00 points, .*raise `budget.score_drop`")


def test_a_setting_that_lost_nothing_on_the_search_prompts_has_a_path_to_the_top() -> None:
    here = space(config())
    gained = dataclasses.replace(trials(here)[0], losses={"kl": 0.0, "score_drop": -3.0})
    found = candidates([gained], here, LIMITS, SHARES, 0.6)
    top = here.target.largest_scale_factor("prefill")
    assert max(found[-1].setting["prefill"]) == pytest.approx(top)
    assert found[-1].share < 0.01, "and is expected to lose next to nothing"


def test_a_drop_of_the_score_counts_as_much_as_kl() -> None:
    here = space(config())
    points = trials(here)
    drops: list[Any] = [
        dataclasses.replace(p, losses={**p.losses, "score_drop": 800 * p.losses["kl"]})
        for p in points
    ]
    alone = candidates(points, here, LIMITS, SHARES, 0.6)
    found = candidates(drops, here, LIMITS, SHARES, 0.6)
    # 800 points per nat spend the 2 points four times as fast as the 0.01 nats.
    assert planted_loss(here, found[2].setting) == pytest.approx(
        planted_loss(here, alone[2].setting) / 4, rel=0.02
    )


def test_what_is_predicted_no_faster_than_dense_is_no_candidate() -> None:
    here = space(config())
    points = trials(here)
    # A kernel that costs 30 % more before it skips anything.
    slow = Curve((0.0, 1.0), (1.3, 0.8), 4096)
    dear = dataclasses.replace(here, cost=Cost({"prefill": slow, "decode": slow}, {}))
    found = candidates(points, dear, LIMITS, [0.01, 1.0, 30.0], 30.0)
    assert len(found) < 3 and all(step.relative_time < 1.0 for step in found)
    with pytest.raises(
        WorkFailed, match=r"no setting .* faster than dense: the fastest takes 1\.\d"
    ):
        candidates(points, dear, LIMITS, [0.01], 0.01)
    assert walked(points, dear, LIMITS, [0.01], 0.01) == []
