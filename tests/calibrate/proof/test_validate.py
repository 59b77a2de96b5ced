"""The proof: bounds that hold, verdicts with reasons, and a file that says dense when nothing was proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from thresholds_files import GOOD, write

from calibrate.errors import UserError
from calibrate.loss.losses import LOSSES, Loss
from calibrate.loss.measure import Outcome
from calibrate.prompts.build import Prompt
from calibrate.proof.bounds import lognormal_upper
from calibrate.proof.emit import emit
from calibrate.proof.validate import Validation, targets, validate
from calibrate.proof.verdict import Law, judge, require_provable, upper_bound
from calibrate.report.tables import phases
from calibrate.schema import CostConfig, RunConfig, load_config
from calibrate.search.cost import Cost, Curve, load_curves
from calibrate.search.path import Candidate
from calibrate.search.points import Point
from calibrate.statistics.counts import Statistics
from skip_softmax import Thresholds
from skip_softmax.meaning.histogram import NEVER, bin_index

HELDOUT = [Prompt("text", "heldout", 1024, (i,), (1,) * 8, False) for i in range(12)]
COST = Cost(
    {"prefill": Curve((0.0, 1.0), (1.0, 0.5), 1), "decode": Curve((0.0, 1.0), (1.0, 0.5), 1)},
    {"device": "x"},
)


def config(**budget: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"lengths": [1024], "decode_tokens": 8},
            # 12 prompts that lose nothing prove 23.5 points.
            "budget": {"kl": 0.01, "score_drop": 30.0, **budget},
        }
    )


def candidate(factor: float, name: str = "search", share: float = 0.1) -> Candidate:
    setting = {"prefill": (factor,) * 4, "decode": (factor,) * 4}
    losses, skipped = {"kl": 0.001, "score_drop": 0.0}, {"prefill": 0.5, "decode": 0.5}
    return Candidate(Point(name, setting, losses, 0.8, skipped), setting, share, 0.8)


def evaluator(kl: float, drop: float = 0.0, skipped: int = 5, short_skips: int = 0):
    def evaluate(setting: Any, prompt: Prompt) -> Outcome:
        short = prompt.task == "short"
        spread = 1 + 0.1 * (len(prompt.ids) + sum(prompt.ids)) / 12
        tiles = short_skips if short else skipped
        return Outcome(
            prompt.key,
            prompt.task,
            1024,
            {"kl": 0.0 if short else kl * spread, "score_drop": drop},
            50.0,
            {"prefill": [10] * 4, "decode": [10] * 4},
            {"prefill": [tiles] * 4, "decode": [tiles] * 4},
        )

    return evaluate


TEN = candidate(10.0)
LENIENT = Law.of(config(score_drop=60.0))


def run(evaluate: Any, points: Any = (TEN,), baselines: Any = (), short: Any = None, **budget: Any):
    return validate(
        points,
        baselines,
        HELDOUT,
        evaluate,
        Statistics.empty({}, 4, 4, 2, [1024]),
        Law.of(config(**budget)),
        short,
        lambda setting: 0.9 if any(setting["prefill"]) else 1.0,
    )


def counted(skipped: int, prompt: str) -> Statistics:
    """Ten tiles per layer and KV head, of which a scale factor of 10 skips some; two lengths."""
    statistics = Statistics.empty({}, 4, 4, 2, [1024, 2048])
    below = bin_index(torch.tensor(1.0))
    for phase in ("prefill", "decode"):
        statistics.counts[phase][..., below] = skipped
        statistics.counts[phase][:, :, 1, below] += 2
        statistics.counts[phase][..., NEVER] = 10 - statistics.counts[phase].sum(-1)
    statistics.prompts.append(prompt)
    return statistics


def test_the_target_is_what_was_counted_less_what_skipping_itself_moves() -> None:
    statistics, searched = counted(6, "a"), counted(4, "b")
    tried = replace(TEN, of=replace(TEN.of, sparsity={"prefill": 0.5, "decode": 0.45}))
    alone = targets(tried, statistics)
    assert alone == {phase: {1024: 0.6, 2048: 0.8} for phase in ("prefill", "decode")}
    # Both counts together, less what the search prompts lost between counting (0.5) and running.
    found = targets(tried, statistics, searched)
    assert found["prefill"] == pytest.approx({1024: 0.5, 2048: 0.7})
    assert found["decode"] == pytest.approx({1024: 0.45, 2048: 0.65})
    gone = replace(TEN, of=replace(TEN.of, sparsity={"prefill": 0.5, "decode": -9.0}))
    assert targets(gone, statistics, searched)["decode"] == {1024: 0.0, 2048: 0.0}
    # A setting on the path that skips nothing is moved as far as the measured one.
    dense = replace(TEN, setting=dict.fromkeys(TEN.setting, (0.0,) * 4))
    assert targets(dense, statistics)["prefill"] == {1024: 0.0, 2048: 0.0}


def test_a_true_loss_at_the_budget_passes_no_more_often_than_promised() -> None:
    """Two tasks, one of which loses 10 times as much and spreads more: 12 prompts each."""
    random, law = np.random.default_rng(1), Law.of(config(kl=1.0, score_drop=None))
    light = random.lognormal(np.log(2 / 11) - 0.125, 0.5, (200, 12))
    heavy = random.lognormal(np.log(20 / 11) - 1.125, 1.5, (200, 12))
    template = evaluator(0.0)({}, HELDOUT[0])

    def passes(light: Any, heavy: Any) -> bool:
        outcomes = [
            replace(template, task=task, losses={"kl": float(loss), "score_drop": 0.0})
            for task, losses in (("text", light), ("needle_single", heavy))
            for loss in losses
        ]
        return judge(outcomes, ("prefill",), law).passed

    # With a chance of 5 % each, more than 20 of 200 pass in one of 1000 runs of this test.
    assert sum(map(passes, light, heavy)) <= 20
    assert sum(map(passes, light / 20, heavy / 20)) >= 180, "but what is well within must pass"


def test_every_task_is_a_stratum_and_the_bound_does_not_depend_on_the_order() -> None:
    law = Law.of(config())
    outcomes = [evaluator(0.004)({}, prompt) for prompt in HELDOUT]
    tasked = [replace(o, task="ab"[i % 2]) for i, o in enumerate(outcomes)]
    heavy = [
        replace(o, losses={**o.losses, "kl": o.losses["kl"] * (0.1 if o.task == "a" else 1.0)})
        for o in tasked
    ]
    blind = [replace(o, task="a") for o in heavy]
    bound = upper_bound("kl", heavy, law)
    assert bound.upper < upper_bound("kl", blind, law).upper
    assert upper_bound("kl", heavy[::-1], law).upper == pytest.approx(bound.upper, rel=1e-12)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["kl", "score_drop"])
def test_a_loss_that_is_no_number_does_not_pass(loss: float, name: str) -> None:
    outcomes = [evaluator(0.004)({}, prompt) for prompt in HELDOUT]
    broken = replace(outcomes[3], losses={**outcomes[3].losses, name: loss})
    verdict = judge([*outcomes[:3], broken, *outcomes[4:]], ("prefill",), LENIENT)
    assert judge(outcomes, ("prefill",), LENIENT).passed and not verdict.passed


def test_prompts_that_lose_their_answer_are_counted_among_those_answered() -> None:
    outcomes = [evaluator(0.004)({}, prompt) for prompt in HELDOUT]  # dense: 50 points
    none = judge(outcomes, ("prefill",), LENIENT).failing
    assert (none.seen, none.of, none.upper) == (0, 0, 1.0), "nothing to lose says nothing"
    full = [replace(o, dense_score=100.0) for o in outcomes[:10]]
    lost = replace(full[0], losses={**full[0].losses, "score_drop": 12.5})
    better = replace(outcomes[11], losses={**outcomes[11].losses, "score_drop": 12.5})
    kept = judge([*full, *outcomes[10:]], ("prefill",), LENIENT)
    assert (kept.failing.seen, kept.failing.of) == (0, 10)
    assert kept.failing.upper == pytest.approx(1 - 0.05**0.1)
    some = judge([lost, *full[1:], outcomes[10], better], ("prefill",), LENIENT)
    assert (some.failing.seen, some.failing.of) == (1, 10), (
        "a drop from 50 points is no lost answer"
    )
    assert some.failing.upper > kept.failing.upper
    assert some.passed, "reported, not judged"


def test_within_the_budget_passes() -> None:
    result = run(evaluator(0.004))
    assert result.passed
    assert result.attempts[0].losses["kl"].mean < result.attempts[0].losses["kl"].upper <= 0.01
    assert result.attempts[0].sparsity == {"prefill": 0.5, "decode": 0.5}


@pytest.mark.parametrize(
    ("evaluate", "reason"),
    [
        (evaluator(0.0095), "upper bound .* above the budget of 0.01 nats/token"),
        (
            evaluator(0.001, drop=20.0),
            "score drop 20.00, upper bound .* above the budget of 30 points",
        ),
        (evaluator(0.001, skipped=0), "nothing was skipped in prefill and decode"),
    ],
)
def test_a_failure_says_why(evaluate: Any, reason: str) -> None:
    import re

    result = run(evaluate)
    assert not result.passed
    assert re.search(reason, result.attempts[0].reason or "")


def idle_in(phase: str, kl: float = 0.004):
    """Measures what `evaluator` does, but nothing is skipped in a phase."""
    measure = evaluator(kl)

    def evaluate(setting: Any, prompt: Prompt) -> Outcome:
        outcome = measure(setting, prompt)
        return replace(outcome, skipped={**outcome.skipped, phase: [0] * 4})

    return evaluate


def test_a_phase_that_skips_nothing_does_not_fail_the_other(tmp_path: Path) -> None:
    result = run(idle_in("decode"), baselines=(candidate(7.0, "uniform"),))
    attempt = result.attempts[0]
    assert result.passed and attempt.sparsity == {"prefill": 0.5, "decode": 0.0}
    assert attempt.setting["decode"] == (10.0,) * 4, "as it was measured"
    assert attempt.served == {"prefill": (10.0,) * 4, "decode": (0.0,) * 4}
    assert attempt.relative_time == 0.9, "of what is served"
    file = emitted(tmp_path, result)
    assert {file.per_head(layer, "decode") for layer in range(4)} == {(0.0,) * 2}
    assert {file.per_head(layer, "prefill") for layer in range(4)} == {(10.0,) * 4}
    assert (file.scale_factor.prefill, file.scale_factor.decode) == (7.0, 0.0)
    assert not run(idle_in("decode", kl=0.02)).passed, "its loss counts as before"


def test_another_loss_in_the_table_is_judged_like_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stalls = Loss("stalls", "tokens", lambda *_: 0.0, ".1f", least=0.0)
    monkeypatch.setitem(LOSSES, "stalls", stalls)
    law = replace(Law.of(config()), limits={"kl": 0.01, "stalls": 2.0})
    for count, reasons in (
        (1.0, ()),
        (3.0, ("stalls 3.0, upper bound 3.0 above the budget of 2 tokens",)),
    ):
        outcomes = [evaluator(0.004)({}, prompt) for prompt in HELDOUT]
        outcomes = [replace(o, losses={**o.losses, "stalls": count}) for o in outcomes]
        verdict = judge(outcomes, ("prefill", "decode"), law)
        assert verdict.reasons == reasons and verdict.passed == (not reasons)
        assert verdict.losses["stalls"].mean == count


JOINT = {"kl": 0.01, "kl_answer": 0.02, "kl_text": 0.005, "flips": 40.0, "score_drop": 40.0}


def shown_by_tasks() -> list[Outcome]:
    """Seven prompts with an answer and five without, each loss well within its budget of `JOINT`."""
    outcomes = [evaluator(0.0)({}, prompt) for prompt in HELDOUT]
    return [
        replace(
            outcome,
            task=task,
            losses={"kl": kl * spread, f"kl_{kind}": kl * spread, "flips": 1.0, "score_drop": 0.0},
        )
        for i, outcome in enumerate(outcomes)
        for task, kind, kl in (("needle", "answer", 0.004) if i < 7 else ("text", "text", 0.001),)
        for spread in (1 + 0.01 * i,)
    ]


@pytest.mark.parametrize("broken", [None, *JOINT])
def test_a_setting_passes_only_if_every_loss_with_a_budget_passes(broken: str | None) -> None:
    law = replace(Law.of(config()), limits=JOINT)
    outcomes = shown_by_tasks()
    if broken is not None:
        over = JOINT[broken] * (1.5 if broken.startswith("kl") else 1.0)
        outcomes = [
            replace(o, losses={**o.losses, broken: over}) if broken in o.losses else o
            for o in outcomes
        ]
    verdict = judge(outcomes, ("prefill",), law)
    assert set(verdict.losses) == set(JOINT)
    assert {bound.confidence for bound in verdict.losses.values()} == {0.95}, (
        "each at the full level"
    )
    failed = [name for name in JOINT if verdict.losses[name].upper > JOINT[name]]
    assert failed == ([] if broken is None else [broken])
    assert verdict.passed == (broken is None) and len(verdict.reasons) == len(failed)


def test_means_and_bounds_are_of_the_prompts_that_show_a_loss() -> None:
    outcomes = shown_by_tasks()
    law = replace(Law.of(config()), limits=JOINT)
    bound = judge(outcomes, ("prefill",), law).losses["kl_answer"]
    assert bound == upper_bound("kl_answer", outcomes[:7], law)
    assert bound.mean == pytest.approx(0.004 * 1.03)
    verdict = judge(outcomes[7:], ("prefill",), law)
    assert "kl_answer" not in verdict.losses
    assert verdict.reasons[0] == "KL on answers: no prompt shows it" and not verdict.passed


def test_no_observed_drop_is_no_proof_of_no_drop() -> None:
    result = run(evaluator(0.001, drop=0.0), score_drop=0.5)
    assert result.attempts[0].losses["score_drop"].mean == 0.0
    assert result.attempts[0].losses["score_drop"].upper > 0.5
    assert not result.passed
    assert run(evaluator(0.001, drop=20.0), score_drop=None).passed


def by_factor(*failing: float):
    """Settings with one of these factors lose too much."""

    def evaluate(setting: Any, prompt: Any):
        return evaluator(0.02 if setting["prefill"][0] in failing else 0.002)(setting, prompt)

    return evaluate


def test_candidates_are_tried_at_the_full_level_until_one_fails() -> None:
    """Fixed sequence: what lies behind the first failure is not believed, and not even run."""
    four = tuple(candidate(factor) for factor in (1.0, 2.0, 3.0, 4.0))
    found = run(by_factor(3.0), points=four, score_drop=None)
    assert [attempt.setting["prefill"][0] for attempt in found.attempts] == [1.0, 2.0, 3.0]
    assert {attempt.losses["kl"].confidence for attempt in found.attempts} == {0.95}
    assert found.passed and found.chosen == found.attempts[1]
    assert run(by_factor(), points=four, score_drop=None).chosen.setting == four[3].setting
    none = run(by_factor(1.0), points=four, score_drop=None)
    assert not none.passed and len(none.attempts) == 1 and none.chosen == none.attempts[0]


def test_a_validation_of_an_earlier_version_went_from_bold_to_safe() -> None:
    bold, safe = (
        run(by_factor(10.0), points=(candidate(f),), score_drop=None).attempts[0]
        for f in (10.0, 5.0)
    )
    assert Validation((bold, safe), None, None).chosen == safe


def test_single_numbers_are_tried_in_the_same_way() -> None:
    """A file for an engine that takes one number should hold one, if a slower one would do."""
    ten, five = candidate(10.0), candidate(5.0)
    evaluate = by_factor(10.0)
    found = run(evaluate, points=(five,), baselines=(five, ten), score_drop=None)
    assert found.baseline is not None and found.baseline.passed
    assert found.baseline.setting == five.setting
    none_holds = run(evaluate, points=(five,), baselines=(ten,), score_drop=None)
    assert none_holds.baseline is not None and not none_holds.baseline.passed


def test_a_short_prompt_that_skips_fails_the_file() -> None:
    short = Prompt("short", "heldout", 1024, (1, 2), (1,), False)
    assert run(evaluator(0.004), short=short).passed
    leaking = run(evaluator(0.004, short_skips=1), short=short)
    assert leaking.attempts[0].passed
    assert not leaking.passed


def emitted(tmp_path: Path, result: Any, dense: Any = MappingProxyType({})) -> Thresholds:
    template = Thresholds.load(write(tmp_path, GOOD)).model_copy(
        update={"layers": (), "evidence": {}}
    )
    curve = {
        "a": 1.0,
        "b": 2.0,
        "r2": 0.5,
        "points": 9,
        "sparsity_range": (0.1, 0.2),
        "kv_len_range": (1.0, 2.0),
        "length_exponent": None,
        "refused": None,
    }
    fits = {"prefill": {"model": curve}, "decode": {"model": {**curve, "refused": "poor"}}}
    file = emit(
        template,
        result,
        fits,
        {"prefill": 0.8, "decode": 0.5},
        COST,
        config().budget,
        {"seed": 0},
        dense,
    )
    file.save(tmp_path / "out.yaml")
    return Thresholds.load(tmp_path / "out.yaml")


def test_what_passed_is_emitted_with_its_evidence(tmp_path: Path) -> None:
    file = emitted(tmp_path, run(evaluator(0.004), baselines=(candidate(7.0, "uniform"),)))
    assert file.evidence["verdict"] == "passed"
    assert {file.per_head(layer, "prefill") for layer in range(4)} == {(10.0,) * 4}
    assert file.scale_factor.prefill == 7.0
    assert file.evidence["predicted_speedup"]["decode"] == 2.0
    assert file.evidence["loss"]["heldout_prompts"] == 12
    none = {"seen": 0, "of": 0, "upper": 1.0, "confidence": 0.95}
    assert file.evidence["failing_prompts"] == none
    assert "answers no held-out prompt in full" in " ".join(phases(file).notes)
    some = {"seen": 1, "of": 10, "upper": 0.394, "confidence": 0.95}
    lost = file.model_copy(update={"evidence": {**file.evidence, "failing_prompts": some}})
    assert phases(lost).notes[-1].startswith("1 of 10 held-out prompts that the dense run answers")
    assert "(upper bound 39.4 % of such prompts)" in phases(lost).notes[-1]
    assert file.fit["prefill"]["a"] == 1.0
    assert "a" not in file.fit["decode"], "nobody can use a refused curve by mistake"


def test_what_failed_is_emitted_dense_and_says_failed(tmp_path: Path) -> None:
    file = emitted(tmp_path, run(evaluator(0.02), baselines=(candidate(7.0, "uniform"),)))
    assert file.evidence["verdict"] == "failed"
    assert "above the budget" in file.evidence["reason"]
    assert all(
        max(file.per_head(layer, phase)) == 0
        for layer in range(4)
        for phase in ("prefill", "decode")
    )


def test_predicted_time_comes_from_measured_points() -> None:
    cost = load_curves(CostConfig(), 16384, 128)
    for phase in ("prefill", "decode"):
        curve = cost.curves[phase]
        for share, time in zip(curve.sparsity, curve.relative_time, strict=True):
            assert curve.at(share) == time
        assert curve.at(1.0) == curve.relative_time[-1]
        assert 0.0 <= curve.break_even < 0.5
    assert cost.relative_time("decode", [0.0, 1.0], [False, True]) == pytest.approx(
        (1 + cost.curves["decode"].at(1.0)) / 2
    )
    assert Curve((0.0, 1.0), (1.1, 0.6), 1).break_even == pytest.approx(0.2, abs=2e-3)


def test_cost_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no prefill measurement of `Abacus`.*devices there: NVIDIA H100"
    ):
        load_curves(CostConfig(device="Abacus"), 1024, 64)
    (tmp_path / "rows.jsonl").write_text('{"device": "x"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:1: a row needs the keys"):
        load_curves(CostConfig(curves=str(tmp_path / "rows.jsonl")), 1024, 64)
    (tmp_path / "rows.jsonl").write_text("\n{oops\n")
    with pytest.raises(UserError, match=r"rows.jsonl:2: not valid JSON"):
        load_curves(CostConfig(curves=str(tmp_path / "rows.jsonl")), 1024, 64)
    with pytest.raises(UserError, match="cannot be read"):
        load_curves(CostConfig(curves=str(tmp_path / "none.jsonl")), 1024, 64)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_budget_that_its_heldout_prompts_can_prove(path: Path) -> None:
    require_provable(load_config(path))


def test_a_budget_that_nothing_could_prove_says_how_many_prompts_it_takes() -> None:
    require_provable(config())
    assert run(evaluator(0.004, drop=0.0)).passed, "no drop at all is what it allows for"
    for budget, said in (
        ({"score_drop": 20.0}, r"of at most 20 points must be possible, .* 12` it is 23.51 even"),
        ({"score_drop": 3.0}, r"at least 106 held-out prompts .*`budget.score_drop: null`"),
        ({"confidence": 0.99}, r"at most 30 points must be possible"),
    ):
        with pytest.raises(UserError, match=said):
            require_provable(config(**budget))
        assert budget.get("confidence") or not run(evaluator(0.004, drop=0.0), **budget).passed
    require_provable(config(score_drop=None))


NEEDLE, TEXT = {"task": "needle_single"}, {"task": "text"}


@pytest.mark.parametrize(
    ("sources", "heldout", "budget", "said"),
    [
        (
            [TEXT],
            12,
            {"kl_answer": 0.01},
            r"kl_answer: at least 2 .* with a reference .* has 0; add a",
        ),
        (
            [NEEDLE],
            12,
            {"kl_text": 0.01},
            r"kl_text: at least 2 .* without a reference .* has 0; add",
        ),
        (
            [NEEDLE, {**TEXT, "weight": 9}],
            7,
            {"kl_answer": 0.01},
            r"`prompts.heldout: 7` .* has 1;",
        ),
        (
            [NEEDLE, TEXT],
            12,
            {"flips": 20.0},
            r"flips: .* 20 % .* `prompts.heldout: 12` it is 23.51",
        ),
        (
            [TEXT],
            12,
            {"generated_drop": 50.0},
            r"generated_drop: at least 5 .* reference .* has 0; add",
        ),
        (
            [NEEDLE, TEXT],
            12,
            {"generated_drop": 30.0},
            r"12` \(6 with a reference answer\) it is 41",
        ),
        ([{"task": "hub", "dataset": "d"}], 9, {"kl_answer": 0.01}, r"or `budget.kl_answer: null`"),
    ],
)
def test_a_budget_on_a_loss_that_too_few_prompts_can_show_is_refused(
    sources: list[dict[str, Any]], heldout: int, budget: dict[str, float], said: str
) -> None:
    def asking(**prompts: Any) -> RunConfig:
        prompts = {"lengths": [1024], "sources": sources, "heldout": heldout, **prompts}
        return RunConfig.model_validate(
            {"model": {"path": "unused"}, "prompts": prompts, "budget": {"kl": 0.01, **budget}}
        )

    with pytest.raises(UserError, match=said):
        require_provable(asking())
    answered = {"task": "hub", "dataset": "d", "answer_field": "a"}
    require_provable(asking(sources=[NEEDLE, TEXT, answered], heldout=50))


def test_generating_without_anything_to_compare_with_is_refused() -> None:
    def asking(*sources: dict[str, str]) -> RunConfig:
        prompts = {"lengths": [1024], "sources": list(sources), "heldout": 7}
        return RunConfig.model_validate(
            {"model": {"path": "unused"}, "prompts": prompts, "validation": {"generate": 131}}
        )

    with pytest.raises(UserError, match=r"validation.generate: what .* none of the 7 held-out"):
        require_provable(asking(TEXT))
    require_provable(asking(NEEDLE, TEXT))


# Prompts are spent where a test is undecided.

MANY = [Prompt("text", "heldout", 1024, (i,), (1,) * 8, False) for i in range(200)]
SPREAD = np.random.default_rng(0).lognormal(-0.125, 0.5, 200)


class Planted:
    """Losses whose true mean is a factor's share of the budget, and every run that was made."""

    def __init__(self, law: Law, drop: float = 0.0) -> None:
        self.law, self.drop = law, drop
        self.runs: list[tuple[float, int]] = []

    def __call__(self, setting: Any, prompt: Prompt) -> Outcome:
        factor, index = setting["prefill"][0], prompt.ids[0]
        self.runs.append((factor, index))
        kl = factor * self.law.limits["kl"] * float(SPREAD[index])
        return replace(evaluator(0.0)(setting, prompt), losses={"kl": kl, "score_drop": self.drop})

    def validated(self, *factors: float, expected: Any = None) -> Validation:
        sequence = [
            candidate(factor, share=share)
            for factor, share in zip(factors, expected or factors, strict=True)
        ]
        empty = Statistics.empty({}, 4, 4, 2, [1024])
        return validate(sequence, (), MANY, self, empty, self.law, None, lambda _: 1.0)


KL_ONLY = Law({"kl": 0.01}, 0.95, 0)


def test_the_last_candidate_within_the_budget_is_the_last_to_pass() -> None:
    """The search prompts were wrong by a factor of 2, so the right one stands past the nominal budget."""
    planted = Planted(KL_ONLY)
    true = (0.1, 0.4, 0.6, 0.75, 0.85, 1.05, 1.3)
    found = planted.validated(*true, expected=[2 * share for share in true])
    assert found.chosen is not None and found.passed
    assert found.chosen.setting["prefill"][0] == 0.85 and found.chosen.expected == 1.7
    assert found.chosen.losses["kl"].upper <= 0.01 < found.chosen.losses["kl"].upper * 1.05 / 0.85
    assert {attempt.losses["kl"].confidence for attempt in found.attempts} == {0.95}


def test_safe_candidates_pass_at_an_early_look_and_bold_ones_take_all_prompts() -> None:
    planted = Planted(KL_ONLY)
    found = planted.validated(0.1, 0.75, 0.85)
    used = [attempt.prompts for attempt in found.attempts]
    assert used[0] == 25 and used == sorted(used) and used[-1] == 200
    levels = {25: 0.999, 50: 0.9985, 100: 0.995, 200: 0.9575}
    assert [a.level for a in found.attempts] == pytest.approx([levels[n] for n in used])
    assert len(planted.runs) == sum(used), "and no other prompt is run"
    # The bound is that of the prompts that were run, at the look's level.
    first = [0.001 * float(x) for x in SPREAD[:25]]
    bound = found.attempts[0].losses["kl"]
    assert bound.mean == pytest.approx(np.mean(first))
    assert bound.upper == pytest.approx(lognormal_upper(first, 0.999, floor=1e-4))


def test_a_hopeless_candidate_is_given_up_early() -> None:
    planted = Planted(KL_ONLY)
    found = planted.validated(0.1, 5.0, expected=(0.1, 0.2))
    given_up = found.attempts[-1]
    assert not given_up.passed and given_up.prompts == 25 and given_up.level is None
    assert given_up.reason is not None
    assert given_up.reason.startswith("given up after 25 of 200 held-out prompts: KL 0.0")
    assert given_up.losses["kl"].upper > 0.01
    assert found.chosen == found.attempts[0] and found.ended is None


def test_what_the_last_one_foretells_is_not_run_at_all() -> None:
    planted = Planted(KL_ONLY)
    found = planted.validated(0.1, 0.8, 2.0, 2.5)
    assert [attempt.setting["prefill"][0] for attempt in found.attempts] == [0.1, 0.8]
    assert found.passed and {factor for factor, _ in planted.runs} == {0.1, 0.8}
    assert found.ended is not None
    assert found.ended.startswith("2 bolder candidates were not tried: the next would have KL 0.0")
    assert Validation((), None, None).ended is None, "earlier versions did not say"


def test_a_drop_that_nothing_suggests_does_not_end_a_sequence() -> None:
    """Its bound is near the margin although no prompt loses anything: that does not grow with boldness."""
    law = Law({"kl": 0.01, "score_drop": 1.7}, 0.95, 0)
    found = Planted(law).validated(0.1, 0.3, 0.6)
    assert [attempt.passed for attempt in found.attempts] == [True] * 3
    assert all(1.5 <= attempt.losses["score_drop"].upper <= 1.7 for attempt in found.attempts)
    assert {attempt.prompts for attempt in found.attempts} == {200}, "fewer prompts cannot prove it"
    lost = Planted(law, drop=3.0).validated(0.1)
    assert lost.attempts[0].prompts < 200 and "score drop 3.00" in str(lost.attempts[0].reason)


def test_a_single_look_at_few_prompts_has_the_whole_level() -> None:
    result = run(evaluator(0.004))
    assert (result.attempts[0].prompts, result.attempts[0].level) == (12, 0.95)


def test_a_file_says_what_was_proven_on_how_many_prompts(tmp_path: Path) -> None:
    found = Planted(KL_ONLY).validated(0.1, 5.0)
    evidence = emitted(tmp_path, found).evidence
    assert evidence["loss"]["heldout_prompts"] == 25
    upper = LOSSES["kl"].text(evidence["loss"]["kl"]["upper"])
    assert evidence["claim"].startswith(
        "with 95 % confidence, over prompts like the 25 held-out ones on which it was run: "
        f"a mean KL of at most {upper} nats/token"
    )
    assert "claim" not in emitted(tmp_path, run(evaluator(0.02))).evidence
