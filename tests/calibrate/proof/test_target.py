"""A target sparsity: which number it becomes, when a phase stays dense, what a broken budget would allow."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from calibrate.proof.target import Aim, affordable, aim, attained, candidate, nothing_aimed
from calibrate.proof.validate import Attempt
from calibrate.proof.verdict import Bound
from calibrate.schema import TargetConfig
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import BINS, LOW, NEVER, PER_OCTAVE

CURVE: dict[str, Any] = {
    "a": 2.0, "b": 8.0, "r2": 0.9, "r2_raw": 0.95, "points": 40, "sparsity_range": (0.1, 0.4),
    "refused": None,
}  # fmt: skip


def statistics(layers: int = 2) -> Statistics:
    """Per octave of 1 to 1024 tokens 5 % of the tiles; half are never skipped; mass grows with the octave."""
    found = Statistics.empty({}, layers, 1, 1, [1024])
    for phase in ("prefill", "decode"):
        for octave in range(10):
            index = (octave - LOW) * PER_OCTAVE + 1
            found.counts[phase][:, 0, 0, index] = 50
            found.mass[phase][:, 0, 0, index] = 0.001 * 2**octave
        found.counts[phase][:, 0, 0, NEVER] = 500
        found.rows[phase][:, 0] = 10
    return found


def config(**changes: Any) -> TargetConfig:
    values = {"min_kv_len": {"prefill": 1024, "decode": 1024}, "target_sparsity": 0.3}
    return TargetConfig.model_validate({**values, **changes})


def attempt(aims: dict[str, Aim], upper: float, **changes: Any) -> Attempt:
    setting = candidate(aims, 2, [0, 1])
    losses = {"kl": Bound(upper / 2, upper, 0.95), "score_drop": Bound(0.0, 30.0, 0.95)}
    values: dict[str, Any] = {
        "name": "target", "setting": setting, "losses": losses, "passed": False, "reason": "over",
        "relative_time": 0.9, "sparsity": dict.fromkeys(setting, 0.25),
        "by_length": {phase: {1024: {"target": 0.31, "achieved": 0.25}} for phase in setting},
        "by_task": {}, "prompts": 8,
    }  # fmt: skip
    return Attempt(**{**values, **changes})


def test_the_number_is_the_curve_s() -> None:
    found = aim(statistics(), "prefill", CURVE, config())
    assert found.scale_factor == found.asked == 2.0 * math.exp(8.0 * 0.3)
    assert found.refused is None


def test_a_number_above_the_ceiling_is_lowered_to_it() -> None:
    found = aim(statistics(), "prefill", {**CURVE, "b": 19.0}, config(target_sparsity=0.45))
    assert found.asked == 2.0 * math.exp(19.0 * 0.45)
    assert found.scale_factor == pytest.approx(1024 * 0.98)
    assert found.refused is None


@pytest.mark.parametrize(
    ("curve", "target", "said"),
    [
        (CURVE, 0.6, "its target of 60 % is out of reach"),
        ({**CURVE, "refused": "only 0 points"}, 0.3, "gives no curve for it: only 0 points"),
    ],
)
def test_a_phase_that_cannot_reach_its_target_stays_dense(
    curve: dict[str, Any], target: float, said: str
) -> None:
    found = aim(statistics(), "decode", curve, config(target_sparsity=target))
    assert found.scale_factor == 0.0 and found.refused is not None
    assert said in found.refused


def test_each_phase_for_itself() -> None:
    both = config(target_sparsity={"prefill": 0.6, "decode": 0.3})
    aims = {phase: aim(statistics(), phase, CURVE, both) for phase in ("prefill", "decode")}
    setting = candidate(aims, 2, [1])
    assert setting["prefill"] == (0.0, 0.0)
    assert setting["decode"] == (0.0, 2.0 * math.exp(8.0 * 0.3))
    assert set(attained(attempt(aims, 0.1), fits(aims), statistics(), {"kl": 1.0})) == {"decode"}


def test_no_phase_at_all_says_how_far_each_was() -> None:
    wanted = config(target_sparsity={"prefill": 0.6, "decode": 0.7})
    aims = {phase: aim(statistics(), phase, CURVE, wanted) for phase in ("prefill", "decode")}
    message = nothing_aimed(aims, statistics(), wanted)
    for part in (
        "prefill: its target of 60 % is out of reach (at most 50 % of the tiles at 1003.5 tokens)",
        "decode: its target of 70 %",
        "lower `target.target_sparsity`",
        "raise `target.min_kv_len`",
    ):
        assert part in message


def fits(aims: dict[str, Aim]) -> dict[str, Any]:
    """What `fit.json` holds."""
    ours = {"a": 1.0, "b": 10.0, "refused": None}
    return {
        phase: {"model": ours, "nvidia": CURVE, "target": asdict(one)}
        for phase, one in aims.items()
    }


def test_predictions_stand_beside_what_was_achieved() -> None:
    aims = {phase: aim(statistics(), phase, CURVE, config()) for phase in ("prefill", "decode")}
    found = attained(attempt(aims, 0.001), fits(aims), statistics(), {"kl": 0.01})
    entry = found["prefill"]
    assert (entry["target"], entry["achieved"]) == (0.3, 0.25)
    assert entry["by_length"] == {
        "1024": {
            "nvidia": pytest.approx(0.3),
            "ours": pytest.approx((math.log(2.0) + 2.4) / 10),
            "histogram": 0.31,
            "achieved": 0.25,
        }
    }
    assert "affordable" not in entry, "the budget was kept"
    refused = {p: {**f, "model": {**f["model"], "refused": "R²"}} for p, f in fits(aims).items()}
    found = attained(attempt(aims, 0.001), refused, statistics(), {"kl": 0.01})
    assert "ours" not in found["prefill"]["by_length"]["1024"]


def test_what_the_budget_allows_is_where_the_mass_has_fallen_as_far_as_the_bound_must() -> None:
    aims = {phase: aim(statistics(), phase, CURVE, config()) for phase in ("prefill", "decode")}
    over = attempt(aims, 0.04)
    found = affordable(over, statistics(), {"kl": 0.01})
    assert set(found) == {"prefill", "decode"}
    number = 2.0 * math.exp(8.0 * 0.3)
    assert 0 < found["prefill"] < statistics().sparsity("prefill", number)
    # Mass is spread so that it falls with the number, by octaves: to the power of 1.5 a quarter.
    edges = [number * 2 ** (-step / 8) for step in range(40)]
    mass = [float(statistics().dropped_mass("prefill", edge).sum()) for edge in edges]
    first = next(i for i, m in enumerate(mass) if (m / mass[0]) ** 1.5 <= 0.25)
    assert found["prefill"] == pytest.approx(statistics().sparsity("prefill", edges[first]))
    further = affordable(attempt(aims, 0.5), statistics(), {"kl": 0.01})
    assert further["prefill"] < found["prefill"]


@pytest.mark.parametrize(
    ("upper", "limits"),
    [(0.009, {"kl": 0.01}), (math.inf, {"kl": 0.01}), (0.04, {"kl": 0.01, "score_drop": 3.0})],
    ids=["kept", "no bound", "a bound that few prompts decide"],
)
def test_nothing_is_estimated_where_it_would_mean_nothing(
    upper: float, limits: dict[str, float]
) -> None:
    aims = {"prefill": aim(statistics(), "prefill", CURVE, config())}
    assert affordable(attempt(aims, upper), statistics(), limits) == {}


def test_the_histogram_of_these_tests_is_what_it_says() -> None:
    assert statistics().counts["prefill"].shape[-1] == BINS
    assert statistics().sparsity("prefill", 1024.0) == 0.5
    assert torch.equal(statistics().counts["prefill"], statistics().counts["decode"])
