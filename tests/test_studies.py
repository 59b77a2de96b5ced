"""The studies behind a design decision: what they compute, with planted answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from planting import graded
from studies import STUDIES, opened

import skip_softmax as ss
from calibrate.loss.measure import Outcome
from calibrate.loss.sensitivity import LossModel
from calibrate.prompts.build import Prompt
from calibrate.schema import RunConfig
from calibrate.search.cost import Cost, Curve
from calibrate.search.space import build_space
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import LOW, NEVER, PER_OCTAVE


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return opened("per_head")


@pytest.fixture(scope="module")
def samplers() -> ModuleType:
    return opened("samplers")


@pytest.fixture(scope="module")
def loss_models() -> ModuleType:
    module = opened("loss_model")
    module.__dict__["RESAMPLES"] = 100  # of intervals, which here are as good from fewer
    return module


CURVE = Curve((0.0, 1.0), (1.0, 0.5), 1024)


def planted(study: ModuleType, mass: list[list[float]]) -> Any:
    """Two layers of two heads, in which every head skips the same tiles and drops `mass`."""
    tiles = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)[:, None, None].expand(3, 2, 2)
    steps = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None]
    return study.PerHead([0.0, 1.0, 2.0], tiles, steps * torch.tensor(mass, dtype=torch.float64))


def best(study: ModuleType, table: Any, power: float | None, allowed: float) -> list[Any]:
    choices = {"prefill": study.options(table, CURVE, [1.0, 1.0], power)}
    return list(study.optimum(choices, allowed)["prefill"])


def test_the_head_that_loses_nothing_skips_more(study: ModuleType) -> None:
    table = planted(study, [[1e-6, 0.9], [1e-6, 0.9]])
    for option in best(study, table, 1.0, 0.001):
        assert option.factors == (2.0, 0.0)
    for option in best(study, table, None, 0.001):
        assert option.factors == (0.0, 0.0)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_never_predicted_slower_than_per_layer_and_falls_with_the_loss(
    study: ModuleType, power: float
) -> None:
    table = planted(study, [[0.01, 0.2], [0.05, 0.4]])
    both = {"prefill": study.options(table, CURVE, [1.0, 1.0], power)}
    # Of the same loss: how heads are averaged is not what is compared.
    one = {"prefill": [[o for o in layer if len(set(o.factors)) == 1] for layer in both["prefill"]]}
    for price in torch.arange(-6.0, 12.0, 0.5).tolist():
        layer, head = (
            sum(
                min(o.time + 2.0**price * o.loss for o in options) for options in choices["prefill"]
            )
            for choices in (one, both)
        )
        assert head <= layer + 1e-12
    times = [
        sum(option.time for option in best(study, table, power, allowed))
        for allowed in (0.0, 0.005, 0.02, 0.1, 1.0)
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] == 2.0 and times[-1] == pytest.approx(2 * CURVE.at(0.8))


# Samplers: the whole study on a model whose loss is a formula.

PROMPTS = [Prompt("text", "search", 4096, (i, i), (1,), False) for i in range(24)]
FRESH = [Prompt("text", "heldout", 4096, (100 + i, i), (1,), False) for i in range(4)]


@pytest.fixture
def stages(tmp_path: Path) -> SimpleNamespace:
    """Four equal layers; what the first of them skips costs ten times as much as predicted."""
    config = RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"lengths": [4096]},
            "budget": {"kl": 0.01},
            "target": {"min_kv_len": {"prefill": 4000, "decode": 4000}},
        }
    )
    counted = Statistics.empty({}, 4, 2, 2, [4096])
    for phase in ("prefill", "decode"):
        bins = torch.arange(40) * PER_OCTAVE // 4 - LOW * PER_OCTAVE + 1
        counted.counts[phase][:, :, 0, bins] = 1
        counted.counts[phase][:, :, 0, NEVER] = 10
        counted.mass[phase][:, :, 0, bins] = torch.logspace(-4, -1, 40, dtype=torch.float64)
        counted.rows[phase][:] = 10
    line = Curve((0.0, 1.0), (1.02, 0.5), 4096)
    cost = Cost({"prefill": line, "decode": line}, {})
    powers = dict.fromkeys(("prefill", "decode"), 1.5)
    model = LossModel(dict.fromkeys(powers, (0.2,) * 4), powers)
    space = build_space(counted, cost, model, (0, 1, 2, 3), config.target, budget=0.01, groups=2)
    truth = LossModel(dict.fromkeys(powers, (2.0, 0.2, 0.2, 0.2)), powers)

    def evaluate(setting: dict[str, Any], prompt: Prompt) -> Outcome:
        loss = sum(
            truth.loss(phase, layer, mass)
            for phase, factors in setting.items()
            for layer, mass in enumerate(counted.dropped_mass(phase, factors).tolist())
        )
        scale = 0.5 + (prompt.ids[0] % 6) / 5  # prompts differ, on average 1
        skipped = {
            p: (50 * counted.layer_sparsity(p, f)).int().tolist() for p, f in setting.items()
        }
        visited = {phase: [50] * 4 for phase in setting}
        losses = {"kl": scale * loss, "score_drop": 0.0}
        return Outcome(prompt.key, "text", 4096, losses, 100.0, visited, skipped)

    return SimpleNamespace(
        space=space,
        config=config,
        cost=cost,
        folder=tmp_path,
        evaluate=evaluate,
        prompts={"search": PROMPTS, "heldout": FRESH},
    )


@pytest.mark.slow
def test_every_method_stays_within_its_passes_and_the_budget(
    samplers: ModuleType, stages: SimpleNamespace
) -> None:
    rows = {method: samplers.done(stages, method, 120) for method in samplers.METHODS}
    for method, row in rows.items():
        assert row["passes"] <= 120, method
        times = [time for _, _, time in row["curve"]]
        assert times == sorted(times, reverse=True), method
        if method != "native-cold":  # which may find nothing
            assert row["kl"] <= 0.01 and times[-1] == row["time"], method
            assert row["fresh"][0]["kl"] and abs(row["fresh"][-1]["octaves"]) >= 0.2, method
    # The path comes close to the budget, and cannot know about the first layer.
    assert 0.009 < rows["path"]["kl"] <= 0.01
    assert rows["path"]["passes"] <= 42
    ours = samplers.summary([row | {"seed": 0} for row in rows.values()])
    assert ours["path"]["saves_over_path_at_equal_loss"] == [0.0]
    for method in ("around-tpe", "around-gp", "around-random"):
        assert ours[method]["saves_over_path_at_equal_loss"][0] > 0.002, method
        assert ours[method]["passes_to_95_percent_of_own_gain"][0] <= 120


def test_zero_is_the_path_and_all_points_are_predicted_to_lose_as_much(
    samplers: ModuleType, stages: SimpleNamespace
) -> None:
    space = stages.space
    centre = space.aimed("analytic", 0.01, [(space.setting(space.seeds()[0][1]), 0.01)])
    predicted = sum(space.predicted_loss(space.setting(centre)).values())
    bend = samplers.Around(space, centre, predicted)
    zero = dict.fromkeys(bend.distributions(), 0)
    # The statistics have no tiles between two scales, so these may differ where it changes nothing.
    same = bend.setting(zero)
    assert space.phase_times(same) == space.phase_times(space.setting(centre))
    bent = bend.setting({**zero, "prefill.depth": 1.0, "split": -1.0, "dense_first": 1})
    assert sum(space.predicted_loss(bent).values()) == pytest.approx(predicted, rel=0.02)
    assert bent["prefill"][0] == 0.0 and bent["prefill"][1] < bent["prefill"][3]
    assert bent["prefill"][3] < bent["decode"][3]


def test_the_time_at_equal_loss_is_read_off_a_line(samplers: ModuleType) -> None:
    rows = [
        {"kl": [0.005, 0.005], "time": 0.9},
        {"kl": [0.01, 0.03], "time": 0.8},
        {"kl": [9.0, 9.0], "time": 0.1},
    ]
    assert samplers.at_budget(rows, 0.01) == pytest.approx(0.85)
    assert samplers.at_budget(rows, 0.01, [0, 0]) == pytest.approx(0.8)
    assert samplers.reached([(6, 1, 0.9), (12, 2, 0.8)], 0.85) == 12
    assert samplers.reached([(6, 1, 0.9)], 0.85) is None


def test_processes_share_the_work(samplers: ModuleType, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
    one, two = (samplers.jobs(tmp_path, [0, 1], ["path", "native-tpe"]) for _ in range(2))
    taken = [next(one), next(two), *one, *two]
    assert len(taken) == len(set(taken)) == 4


def planted_set(seed: int) -> dict[str, Any]:
    """Two layers that lose mass squared, measured alone at three levels, and settings that lose their sum."""
    rows = [
        {"phase": phase, "layer": layer, "scale_factor": 1.0, "sparsity": sparsity,
         "dropped_mass": mass, "kl": (layer + 1) * mass**2}
        for phase in ("prefill", "decode")
        for layer in range(2)
        for sparsity, mass in ((0.3, 0.01), (0.5, 0.03), (0.7, 0.09))
    ]  # fmt: skip
    mass = [[0.004 * 1.3**i, 0.05 / 1.2**i] for i in range(6)]
    kl = [sum((layer + 1) * m**2 for layer, m in enumerate(setting)) for setting in mass]
    joint: list[list[Any]] = [[i, None, kl[i]] for i in range(6)]
    joint += [[None, i, kl[i]] for i in range(6)]
    joint += [[i, j, kl[i] + kl[j]] for i in range(6) for j in range(0, 6, 2)]
    return {
        "seed": seed,
        "alone": rows,
        "mass": {"prefill": mass, "decode": mass},
        "joint": joint,
    }


def test_the_loss_models_are_told_apart_by_a_planted_power(loss_models: ModuleType) -> None:
    sets = [planted_set(seed) for seed in range(2)]
    errors = {name: loss_models.error(name, sets) for name in loss_models.MODELS}
    exact = errors["one level, power 2"]
    assert exact["log2_error"]["mean"] == 0.0 and exact["rank_correlation"]["mean"] == 1.0
    assert errors[loss_models.BEFORE]["log2_error"]["interval"][0] > 0.1
    # The prior of the power is 2, and what is fitted agrees.
    assert errors["four levels everywhere, fitted power"]["log2_error"]["mean"] < 0.001
    assert [loss_models.together(each) for each in sets] == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("correction", ["one factor", "a factor and a power per phase (now)"])
def test_a_correction_is_judged_on_settings_it_was_not_fitted_to(
    loss_models: ModuleType, correction: str
) -> None:
    doubled = planted_set(0)
    doubled["joint"] = [[*pair, 2 * kl] for *pair, kl in doubled["joint"]]
    name = "one level, power 2"
    assert loss_models.error(name, [doubled])["log2_error"]["mean"] == 1.0
    assert loss_models.error(name, [doubled], correction, 12)["log2_error"]["mean"] < 0.1
    # One setting loses 64 times as much: the fits that have seen it do not judge it.
    odd = planted_set(0)
    odd["joint"][-1] = [*odd["joint"][-1][:2], 64 * odd["joint"][-1][2]]
    squares, ratios = loss_models.misses(name, odd, correction, 12)
    assert ratios.argmin() == len(ratios) - 1
    assert math.sqrt(squares[-1]) == pytest.approx(6.0, abs=0.7)


def test_the_loss_models_table_is_made_from_the_measurements_beside_it(
    loss_models: ModuleType,
) -> None:
    found = json.loads((STUDIES / "loss_model.json").read_text(encoding="utf-8"))
    for row in found["errors"]:
        if row["correction"] in (None, "one factor") and row["fitted_to"] < 12:
            again = loss_models.error(
                row["model"], found["measured"], row["correction"], row["fitted_to"]
            )
            for key in ("log2_error", "rank_correlation"):
                assert again[key]["mean"] == pytest.approx(row[key]["mean"], abs=0.005), row[
                    "model"
                ]
    assert found["powers"] == [loss_models.powers(each) for each in found["measured"]]


def test_shares_keep_many_small_keys_and_skip_a_lone_one_maxima_do_the_opposite() -> None:
    """First and last tile weigh 1 each; between them 64 keys at -4 nats, and one key at -2."""
    criteria = opened("criteria")
    scores = torch.full((4, 64), -1e3)
    scores[0, 3] = scores[3, 9] = 0.0
    scores[1], scores[2, 5] = -4.0, -2.0
    call = SimpleNamespace(
        phase="decode", layer=0, position=255, kv_len=256, scale=1.0, q=torch.ones(1, 1, 1, 1),
        k=scores.view(1, 1, 256, 1), v=torch.arange(4.0).repeat_interleave(64).view(1, 1, 256, 1),
    )  # fmt: skip
    tiles, many, spike = criteria.Tiles(call), 64 * math.exp(-4), math.exp(-2)
    for rule, critical, kept in (
        ("max, edges", [256 * math.exp(-4), 256 * spike], (2 * spike + 3) / (2 + spike)),
        ("share, edges", [256 * many / 2, 256 * spike / 2], (many + 3) / (2 + many)),
    ):
        levels = tiles.levels(criteria.RULES["decode"][rule])[0, 0]
        assert levels[[0, 3]].tolist() == [math.inf, math.inf]
        assert levels[1:3].exp2().tolist() == pytest.approx(critical, rel=1e-5)
        skip = levels < math.log2(25.0)
        assert int(skip.sum()) == 1
        assert tiles.attend(skip[None, None]).item() == pytest.approx(kept, rel=1e-5)


def test_decisions_of_a_schedule_are_those_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that end inside a vote too; and at one threshold chunks of whole votes move nothing."""
    chunks = opened("chunks")
    monkeypatch.setattr(chunks, "TILE_Q", 16)
    monkeypatch.setattr(chunks, "TILE_KV", 16)
    q, k, v = graded(4, 2, 200, 200, dtype=torch.float32)
    gaps = ss.tile_gaps(q, k, tile_q=1, tile_kv=16)[0]
    whole = chunks.decided(gaps, chunks.Schedule(None), 20.0, 200)[0]
    found = {}
    for size in (None, 64, 40):
        schedule = chunks.Schedule(size)
        rows, visited, skipped = chunks.decided(gaps, schedule, 20.0)
        total, step = torch.zeros(2, dtype=torch.int64), size or 200
        for start in range(0, 200, step):
            part, end = q[:, :, start : start + step], min(start + step, 200)
            call = {"scale_factor": 20.0, "tile_q": 16, "tile_kv": 16, "return_stats": True}
            _, stats = ss.attention(part, k[:, :, :end], v[:, :, :end], **call)
            total += torch.stack([stats.visited.sum(), stats.skipped.sum()])
        assert [int(visited.sum()), int(skipped.sum())] == total.tolist()
        moved = rows != chunks.decided(gaps, schedule, 20.0, 200)[0]
        at_one = int((chunks.decided(gaps, schedule, 20.0, 200)[0] != whole).sum())
        found[size] = int(skipped.sum()), at_one, bool(moved.any())
    assert found[None][1:] == (0, False)
    assert found[64][1:] == (0, True)
    assert found[40][1] > 0
    assert found[None][0] < found[64][0] < found[40][0]
    by_chunk = chunks.Schedule(40, by_position=False)
    assert [vote[:2] for vote in by_chunk.votes(50)] == [(0, 16), (16, 32), (32, 40), (40, 50)]
    cut = [(0, 16), (16, 32), (32, 40), (40, 48), (48, 50)]
    assert [vote[:2] for vote in chunks.Schedule(40).votes(50)] == cut


def test_caches_are_compared_prompt_by_prompt() -> None:
    """Prompts that differ much more than the caches do: only paired differences see those."""
    study = opened("fp8_cache")
    rows = [
        {
            "cache": 0.5,
            "nudge": {"own": 0.0, "fp8": 0.25},
            **{
                name: {
                    cache: {"prefill": base + shift, "decode": base, "kl": base + 2 * shift}
                    for cache, shift in (("own", 0.0), ("fp8", 0.125))
                }
                for name in study.SETTINGS
            },
        }
        for base in (1.0, 2.0, 4.0)
    ]
    found = study.summed_up(rows)
    assert found["cache"] == {"mean": 0.5, "95 %": 0.0} and found["nudge"]["fp8"]["mean"] == 0.25
    for name in study.SETTINGS:
        assert found[name]["prefill"]["difference"] == {"mean": 0.125, "95 %": 0.0}
        assert found[name]["decode"]["difference"] == {"mean": 0.0, "95 %": 0.0}
        assert found[name]["kl"]["largest difference"] == 0.25
        # Student's t for two degrees of freedom, 4.3027, times the standard error of 1, 2 and 4.
        assert found[name]["decode"]["own"]["95 %"] == pytest.approx(4.30265 * (7 / 9) ** 0.5)
