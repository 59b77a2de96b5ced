"""What is fixed before any held-out prompt is seen: looks, aims, and what can be proven."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.proof.bounds import lognormal_upper, prompts_for, provable_share
from calibrate.proof.plan import (
    ASSUMED_SPREAD,
    Look,
    foresight,
    hopeless_above,
    looks,
    shares,
    spread_seen,
)
from calibrate.proof.verdict import Law

TASKS = ["text", "needle_single", "text", "needle_multikey"]


def tasks(prompts: int) -> list[str]:
    return [TASKS[i % 4] for i in range(prompts)]


@pytest.mark.parametrize("prompts", [2, 3, 10, 24, 50, 200, 1001])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("of", [lambda n: ["text"] * n, tasks], ids=["one task", "three"])
def test_all_looks_together_spend_the_allowed_error_and_no_more(
    prompts: int, confidence: float, of: object
) -> None:
    planned = looks(of(prompts), confidence)  # type: ignore[operator]
    assert sum(1 - look.confidence for look in planned) == pytest.approx(1 - confidence)
    assert all(confidence <= look.confidence <= 1 for look in planned)
    seen = [look.prompts for look in planned]
    assert seen == sorted(set(seen)) and seen[-1] == prompts
    assert planned[-1].confidence < 1, "the last look can pass"
    assert 1 - planned[-1].confidence >= 0.8 * (1 - confidence), "and has most of the error"


def test_a_look_can_pass_from_the_prompts_that_a_bound_needs() -> None:
    assert looks(["text"] * 8, 0.95) == (Look(4, 1.0), Look(8, 0.95))
    assert [look.prompts for look in looks(["text"] * 200, 0.95)] == [25, 50, 100, 200]
    # Three tasks of five prompts each know their own spread.
    early = [look for look in looks(tasks(200), 0.95) if look.confidence < 1]
    assert [look.prompts for look in early] == [25, 50, 100, 200]
    assert [look.prompts for look in looks(tasks(24), 0.95) if look.confidence < 1] == [24]


def test_every_task_has_its_share_at_every_look() -> None:
    """Tasks that come in blocks are not compared before each has been seen."""
    blocks = ["text"] * 30 + ["needle_single"] * 30
    assert [look.prompts for look in looks(blocks, 0.95)] == [59, 60]
    for look in looks(tasks(200), 0.95):
        first = tasks(200)[: look.prompts]
        assert abs(first.count("text") - look.prompts / 2) <= 0.5
        assert abs(first.count("needle_single") - look.prompts / 4) <= 0.5


def test_fewer_prompts_are_less_sure_that_nothing_can_come_of_it() -> None:
    planned = looks(["text"] * 200, 0.95)
    limits = [hopeless_above(look, 200) for look in planned]
    assert limits == sorted(limits, reverse=True) and limits[-1] == 1.0
    assert limits[-2] == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("attempts", [1, 2, 3, 5, 10, 30])
def test_candidates_aim_from_safe_to_past_the_budget_and_most_where_the_proof_may_end(
    attempts: int,
) -> None:
    aims = shares(0.6, attempts)
    assert len(aims) == attempts and aims == sorted(aims) and aims[0] > 0
    assert aims[0] < 0.6, "the first must pass, or nothing does"
    if attempts > 5:
        assert aims[-1] > 1.0
        steps = np.diff(np.log(aims))
        assert min(steps) == pytest.approx(steps[len(steps) // 2], rel=0.1)


@pytest.mark.parametrize(("prompts", "spread"), [(10, 0.5), (24, 1.0), (60, 1.5)])
@pytest.mark.parametrize("of", [lambda n: ["text"] * n, tasks], ids=["one task", "three"])
def test_about_half_of_the_settings_that_lose_the_provable_share_pass(
    prompts: int, spread: float, of: object
) -> None:
    strata = of(prompts)  # type: ignore[operator]
    share = provable_share(strata, 0.95, spread)
    random = np.random.default_rng(0)
    samples = random.lognormal(np.log(share) - spread**2 / 2, spread, (300, prompts))
    passed = np.mean(
        [lognormal_upper(row, 0.95, strata, draws=1000) <= 1 for row in samples.tolist()]
    )
    assert 0.25 < passed < 0.7


def test_prompts_for_a_share_are_as_many_as_it_takes() -> None:
    needed = prompts_for(0.85, ["text"], 0.95, 1.0)
    assert needed is not None and 120 < needed < 220
    assert provable_share(["text"] * needed, 0.95, 1.0) >= 0.85
    assert provable_share(["text"] * int(0.95 * needed), 0.95, 1.0) < 0.85
    more = prompts_for(0.85, tasks(4), 0.95, 1.0)
    assert more is not None and more > needed, "several spreads take more prompts to know"
    assert prompts_for(0.99, ["text"], 0.95, 2.0, most=500) is None
    assert prompts_for(0.01, ["text"], 0.95, 0.3) == 3


def test_the_spread_is_that_of_the_search_prompts_as_far_as_they_are_enough_to_know() -> None:
    assert spread_seen([], tasks(6), 0.01) == pytest.approx(ASSUMED_SPREAD)
    assert spread_seen([[0.001, 0.002, 0.003]], ["a", "b", "c"], 0.01) == pytest.approx(
        ASSUMED_SPREAD
    )
    random = np.random.default_rng(0)
    many = random.lognormal(-7, 1.5, (1, 400)).repeat(3, axis=0) * [[1], [2], [5]]
    known = spread_seen(many.tolist(), ["text"] * 400, 1e-6)
    assert known == pytest.approx(1.5, rel=0.1)
    few = np.exp(1.5 * np.array([-1.0, -1.0, 1.0, 1.0]) * np.sqrt(0.75))  # their spread is 1.5
    assert ASSUMED_SPREAD < spread_seen([few.tolist()], ["text"] * 4, 0.01) < 1.5
    # What differs between tasks is no spread, and what lies far below the budget counts as nothing.
    apart = [[0.001, 0.1] * 200]
    assert spread_seen(apart, ["a", "b"] * 200, 0.01) < 0.1
    assert spread_seen([[1e-9, 1e-8] * 200], ["a"] * 400, 0.01) < 0.1


def test_foresight_says_what_can_be_proven_and_what_more_would_take() -> None:
    law = Law({"kl": 0.01}, 0.95, 0)
    said = foresight(["text"] * 24, law, 1.0, seen=True)
    share = provable_share(["text"] * 24, looks(["text"] * 24, 0.95)[-1].confidence, 1.0)
    assert said.startswith("with 24 held-out prompts and the spread seen on the search prompts")
    assert f"at most {share:.2f} of the KL budget can be proven; 0.85 would take about " in said
    assert "by a factor of 2 within a task" in foresight(["text"] * 24, law, 0.7, seen=False)
    assert "would take" not in foresight(["text"] * 1000, law, 0.5, seen=True)
    assert "more than 10000 prompts" in foresight(["text"] * 24, law, 4.0, seen=True)
    both = Law({"kl": 0.01, "score_drop": 3.0}, 0.95, 0)
    assert foresight(["text"] * 200, both, 0.5, seen=True).endswith(
        "the upper bound of the score drop is 1.60 points if no prompt loses anything, of 3"
    )
