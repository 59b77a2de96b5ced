"""The correction of summed losses by measured settings: planted ones come back, errors are of unseen ones."""

from __future__ import annotations

import math
import random

import pytest

from calibrate.loss.joint import PhaseLosses, correct, described, errors_of, left_out
from calibrate.loss.sensitivity import LossModel


def settings(count: int) -> list[PhaseLosses]:
    drawn = random.Random(1)
    return [
        {"prefill": 10 ** drawn.uniform(-4, -2), "decode": 10 ** drawn.uniform(-4, -2)}
        for _ in range(count)
    ]


def lost(losses: PhaseLosses) -> float:
    """Prefill interacts, decode does not."""
    return 1.8 * losses["prefill"] ** 1.2 / 0.001**0.2 + losses["decode"]


def test_before_anything_is_measured_losses_add() -> None:
    assert correct([], []).loss({}) == 0.0
    [only] = settings(1)
    correction = correct([only], [sum(only.values())])
    assert correction.loss(only) == pytest.approx(sum(only.values()))
    assert correction.loss({"prefill": 0.002, "decode": 0.0}) == pytest.approx(0.002)


def test_a_planted_interaction_comes_back() -> None:
    seen = settings(30)
    correction = correct(seen, [lost(losses) for losses in seen])
    assert correction.power["prefill"] == pytest.approx(1.2, abs=0.06)
    assert correction.power["decode"] == pytest.approx(1.0, abs=0.06)
    for losses in settings(60)[30:]:
        assert correction.loss(losses) == pytest.approx(lost(losses), rel=0.1)


def test_few_settings_move_the_sum_part_of_the_way() -> None:
    one, many = settings(1), settings(40)
    doubled = [2 * sum(losses.values()) for losses in many]
    near = correct(one, doubled[:1]).loss(one[0]) / sum(one[0].values())
    far = correct(many, doubled).loss(one[0]) / sum(one[0].values())
    assert 1.5 < near < far == pytest.approx(2.0, rel=0.02)


def test_a_phase_that_is_dense_costs_nothing() -> None:
    seen = [{"prefill": losses["prefill"], "decode": 0.0} for losses in settings(8)]
    correction = correct(seen, [3 * losses["prefill"] for losses in seen])
    assert correction.loss({"prefill": 0.0, "decode": 0.0}) == 0.0
    assert correction.factor["decode"] == pytest.approx(1.0)
    assert correction.loss({"prefill": 0.001}) == pytest.approx(0.003, rel=0.1)


def test_a_setting_is_predicted_without_its_own_loss() -> None:
    seen = settings(6)
    measured = [lost(losses) for losses in seen]
    before = left_out(seen, measured)
    after = left_out(seen, [*measured[:-1], 100 * measured[-1]])
    assert after[-1] == before[-1]
    assert all(a != b for a, b in zip(after[:-1], before[:-1], strict=True))


def test_errors_are_octaves_and_ranks() -> None:
    found = errors_of([0.001, 0.004, 0.002, 0.016], [0.002, 0.004, 0.004, 0.032])
    assert found is not None
    assert found.log2_error == pytest.approx(math.sqrt(3 / 4))
    assert found.rank_correlation == pytest.approx(0.949, abs=1e-3)
    assert errors_of([0.001] * 3, [0.002] * 3) is None, "too few to tell"
    equal = errors_of([0.001] * 4, [0.002, 0.002, 0.002, 0.001])
    assert equal is not None and equal.rank_correlation is None
    # What rounding leaves is no error.
    rounding = errors_of([0.0] * 4, [1e-9, 1e-8, 1e-7, 0.0])
    assert rounding is not None and rounding.log2_error == 0.0


def test_the_description_says_what_the_correction_gains() -> None:
    model = LossModel(
        {"prefill": (1.0, 2.0), "decode": (3.0, 4.0)}, {"prefill": 1.7, "decode": 2.0}
    )
    seen = settings(12)
    told = described(model, seen, [lost(losses) for losses in seen])
    assert told["settings"] == 12
    assert told["phases"]["prefill"]["weights"] == [1.0, 2.0]
    assert told["phases"]["prefill"]["power"] == 1.7
    assert told["phases"]["prefill"]["factor"] > 1.2 > told["phases"]["decode"]["factor"]
    assert told["errors"]["corrected"]["log2_error"] < told["errors"]["layers"]["log2_error"] / 2
    few = described(model, seen[:3], [lost(losses) for losses in seen[:3]])
    assert few["errors"] == {"layers": None, "corrected": None}
    assert described(model, [], [])["phases"]["decode"]["factor"] == 1.0
