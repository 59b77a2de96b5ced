"""The search space, its warm starts, and the search itself on a model whose loss is known."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from planted_space import LAYERS, config, planted_loss, space

from calibrate.loss.measure import Outcome
from calibrate.prompts.build import Prompt
from calibrate.schema import RunConfig
from calibrate.search.space import Space
from calibrate.search.study import (
    Evaluate,
    losses_of,
    open_study,
    points,
    read_study,
    search,
    stopped,
)

PROMPTS = [Prompt("text", "search", 4096, (i,), (1,), False) for i in range(3)]


def run_search(study: optuna.Study, of: Space, chosen: RunConfig, evaluate: Evaluate) -> Iterator:
    return search(
        study,
        of,
        PROMPTS,
        evaluate,
        chosen.search,
        limits=chosen.budget.limits,
        seed=chosen.seed,
    )


def outcome(of: Space, setting: dict, prompt: Prompt) -> Outcome:
    skipped = {
        phase: (10 * of.statistics.layer_sparsity(phase, factors)).int().tolist()
        for phase, factors in setting.items()
    }
    visited = {phase: [10] * LAYERS for phase in setting}
    return Outcome(
        prompt.key,
        prompt.task,
        4096,
        {"kl": planted_loss(of, setting), "score_drop": 0.0},
        100.0,
        visited,
        skipped,
    )


@pytest.mark.parametrize("name", ["a b", "a%20b", "what?now", "é#'x"])
def test_a_study_stays_in_its_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    config = RunConfig.model_validate({"model": {"path": "x"}})
    open_study(config.search, folder)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [folder / "study.db"]
    assert not read_study(config.search, folder).trials


def test_uniform_and_analytic_warm_starts_are_points_of_the_space() -> None:
    here = space(config())
    bounds = here.bounds()
    assert len(bounds) <= 20
    for name, params in here.seeds():
        assert set(params) == set(bounds)
        assert all(low <= params[key] <= high for key, (low, high) in bounds.items())
        setting = here.setting(params)
        if name == "uniform":
            assert all(len(set(factors)) == 1 for factors in setting.values())
        else:
            # The less a layer costs, the more it may skip.
            assert list(setting["prefill"]) == sorted(setting["prefill"])
            assert setting["prefill"][0] < setting["prefill"][-1]


def test_each_phase_can_be_dense_and_skip_alone() -> None:
    here = space(config())
    bounds = here.bounds()
    measured = [
        (here.setting(params), 2.0 * planted_loss(here, here.setting(params)))
        for name, params in here.seeds()
        if name == "analytic"
    ]
    for phase, other in (("prefill", "decode"), ("decode", "prefill")):
        assert here.lines[f"{phase} alone"] == "analytic"
        params = here.aimed(f"{phase} alone", 0.01, measured)
        assert params is not None
        assert all(low <= params[key] <= high for key, (low, high) in bounds.items())
        setting = here.setting(params)
        assert any(setting[phase]) and not any(setting[other])
        # What was measured was twice what was predicted.
        assert 0.003 < planted_loss(here, setting) <= 0.005
        least = {**params, f"{other}.log2_scale": bounds[f"{other}.log2_scale"][0] + 0.5}
        assert any(here.setting({**least, f"{other}.dense_below": 0.0})[other])
    alone = space(config(), phases=("prefill",))
    assert set(alone.lines) == {"analytic", "uniform"}


def test_the_analytic_seed_beats_the_uniform_one_at_the_same_loss() -> None:
    here = space(config())
    seeds = here.seeds()
    for (_, analytic), (_, uniform) in zip(seeds[::2], seeds[1::2], strict=True):
        ours, theirs = here.setting(analytic), here.setting(uniform)
        assert planted_loss(here, ours) <= 0.011
        assert here.relative_time(ours) < here.relative_time(theirs)


def test_the_allocation_is_the_best_of_all_combinations() -> None:
    """Brute force over three levels per layer of one phase, at the loss that the allocation spends."""
    chosen = config()
    here = space(chosen, phases=("prefill",))
    setting = here.setting(next(params for name, params in here.seeds() if name == "analytic"))
    spent, time = planted_loss(here, setting), here.relative_time(setting)
    levels = [0.0, 4.0, 16.0, 64.0, 256.0, 1024.0]
    best = min(
        here.relative_time({"prefill": factors})
        for factors in itertools.product(levels, repeat=LAYERS)
        if planted_loss(here, {"prefill": factors}) <= spent
    )
    assert time <= best + 0.01


def test_settings_stay_below_the_shortest_served_length_and_leave_other_layers_dense() -> None:
    chosen = config()
    here = space(chosen, layers=(1, 3))
    top = {key: high for key, (_, high) in here.bounds().items()}
    setting = here.setting({**top, "prefill.dense_below": 0.0, "decode.dense_below": 0.0})
    for phase, factors in setting.items():
        assert max(factors) < chosen.target.min_kv_len[phase]
        assert factors[0] == factors[2] == 0.0
        assert factors[1] > 0


def test_layers_that_skip_too_little_are_left_dense() -> None:
    here = space(config())
    low = {key: low for key, (low, _) in here.bounds().items()}
    params = {**low, "prefill.log2_scale": 2.0, "prefill.dense_below": 0.3}
    assert here.setting(params)["prefill"] == (0.0,) * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_every_sampler_searches_and_starts_from_the_seeds(tmp_path, sampler: str) -> None:
    chosen = config(sampler=sampler, trials=10, prune_factor=1000.0)
    here = space(chosen)
    study = open_study(chosen.search, tmp_path)
    found = list(
        run_search(study, here, chosen, lambda setting, prompt: outcome(here, setting, prompt))
    )
    assert len(found) == 10
    names = [point.name for point in found if point is not None]
    assert names[:8] == ["analytic", "uniform"] * 4 and names.count("search") >= 2
    assert points(study) == found
    assert study.metric_names == ["largest share of a budget", "predicted attention time"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_every_sampler_takes_every_seed(tmp_path, sampler: str) -> None:
    chosen = config(sampler=sampler, trials=8, prune_factor=1000.0)
    chosen = chosen.model_copy(update={"seed": 2**32 - 1})
    here = space(chosen)
    study = open_study(chosen.search, tmp_path)
    found = run_search(study, here, chosen, lambda s, prompt: outcome(here, s, prompt))
    assert len(list(found)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.2, 10.0])
def test_later_warm_starts_spend_the_budget_that_predictions_missed(
    tmp_path, factor: float
) -> None:
    chosen = config(trials=18, prune_factor=1000.0)
    here = space(chosen)
    study = open_study(chosen.search, tmp_path)

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        found = outcome(here, setting, prompt)
        return dataclasses.replace(
            found, losses={**found.losses, "kl": factor * found.losses["kl"] ** 1.1}
        )

    found = list(run_search(study, here, chosen, evaluate))
    budget = chosen.budget.kl
    for name in ("analytic", "uniform"):
        first = [point.losses["kl"] / budget for point in found[:6] if point.name == name]
        later = [point.losses["kl"] / budget for point in found[6:] if point.name == name]
        assert max(first) < 0.2 or min(first) > 1.0, "the first ones miss"
        # A step of the scale changes the loss by a quarter.
        assert any(0.4 < share <= 0.7 for share in later)


@pytest.mark.slow
def test_a_search_that_gains_too_little_stops_and_stays_stopped(tmp_path: Path) -> None:
    chosen = config(trials=60, min_gain=0.5, prune_factor=1000.0)
    here = space(chosen)

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        return outcome(here, setting, prompt)

    study = open_study(chosen.search, tmp_path)
    found = list(run_search(study, here, chosen, evaluate))
    end = stopped(study, 60)
    assert end is not None and end.after == len(found) < 60
    names = [point.name for point in found]
    assert names[-end.last :] == ["search"] * end.last
    assert {"prefill alone", "decode alone"} <= set(names)
    assert "stopped after" in end.text and "less than 0.5" in end.text
    # In another process, and in a copy, it has stopped as well.
    again = open_study(chosen.search, tmp_path)
    assert list(run_search(again, here, chosen, evaluate)) == []
    assert stopped(read_study(chosen.search, tmp_path), 60) == end
    # More trials take it up again: as many, at least, as show that they gain too little.
    more = config(trials=70, min_gain=0.5, prune_factor=1000.0)
    assert stopped(again, 70) is None
    assert len(list(run_search(again, here, more, evaluate))) == end.last
    assert stopped(again, 70).after == end.after + end.last
    # It never stops by itself if it must gain nothing.
    forever = config(trials=75, min_gain=0, prune_factor=1000.0)
    list(run_search(again, here, forever, evaluate))
    assert stopped(again, 75) is None and len(points(again)) == 75


WARM = [(0.1, 0.9), (0.5, 0.8), (0.9, 0.7)] * 6
"""Shares of the budget and times of all the warm starts of 30 trials."""
NONE = (0.9, 0.75)


@pytest.mark.parametrize(
    ("warm", "sampled", "gained"),
    [
        pytest.param(WARM, [NONE] * 6, 0.0, id="no gain"),
        pytest.param(WARM, [NONE] * 5, None, id="too few trials to tell"),
        pytest.param(WARM, [NONE, None, None, NONE, None, NONE], 0.0, id="pruned trials count"),
        pytest.param(WARM, [(0.9, 0.699), *[NONE] * 5], 0.001, id="too small a gain"),
        pytest.param(WARM, [(0.9, 0.699), (0.9, 0.6975), *[NONE] * 4], None, id="gains add up"),
        pytest.param(WARM, [(0.9, 0.69), *[NONE] * 6], 0.0, id="a gain before the last six"),
        pytest.param(WARM, [NONE, (0.05, 0.89), *[NONE] * 4], None, id="a gain of the safest"),
        pytest.param(WARM, [(1.01, 0.1), *[NONE] * 5], 0.0, id="a gain beyond the budget"),
        pytest.param([(1.5, 0.7)] * 18, [(1.2, 0.7)] * 6, None, id="nothing within the budget"),
        pytest.param([(1.5, 0.7)] * 18, [(0.9, 0.7), *[(1.2, 0.7)] * 5], None, id="first within"),
    ],
)
def test_when_the_search_stops(
    tmp_path: Path,
    warm: list[tuple[float, float]],
    sampled: list[tuple[float, float] | None],
    gained: float | None,
) -> None:
    chosen = config(trials=30)
    here, study = space(chosen), open_study(chosen.search, tmp_path)
    for index, values in enumerate([*warm, *sampled]):
        name = {"name": "analytic"} if index < len(warm) else {}
        state = TrialState.COMPLETE if values else TrialState.PRUNED
        trial = optuna.trial.create_trial(state=state, values=values, user_attrs=name)
        study.add_trial(trial)

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        raise KeyboardInterrupt

    if gained is None:
        with pytest.raises(KeyboardInterrupt):
            list(run_search(study, here, chosen, evaluate))
        assert stopped(study, 30) is None
    else:
        assert list(run_search(study, here, chosen, evaluate)) == []
        end = stopped(study, 30)
        assert end is not None and end.after == len(warm) + len(sampled)
        assert end.gained == pytest.approx(gained)


def test_workers_obey_the_first_mark(tmp_path: Path) -> None:
    """A worker that sees another's mark begins no trial, whatever it would find itself."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    chosen = config(trials=60, min_gain=0.5, prune_factor=1000.0, storage=url)
    here = space(chosen)

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        return outcome(here, setting, prompt)

    one, two = (open_study(chosen.search, tmp_path) for _ in range(2))
    first = run_search(one, here, chosen, evaluate)
    second = run_search(two, here, chosen, evaluate)
    # Trials in turn, until one of them has stopped.
    made = sum(point is not None for pair in zip(first, second, strict=False) for point in pair)
    assert list(second) == [] == list(first)
    end = stopped(one, 60)
    assert end is not None and end == stopped(two, 60) and made <= end.after <= made + 1
    assert len(points(one)) == end.after


@pytest.mark.slow
def test_a_resumed_search_goes_as_if_it_had_not_stopped(tmp_path) -> None:
    results = []
    for stop in (None, 3, 8):
        folder = tmp_path / str(stop)
        folder.mkdir()
        chosen = config(trials=11)
        here = space(chosen)
        calls = 0

        def evaluate(
            setting: dict, prompt: Prompt, here: Space = here, stop: int | None = stop
        ) -> Outcome:
            nonlocal calls
            calls += 1
            if stop is not None and calls == 3 * stop + 2:  # in the middle of a trial
                raise KeyboardInterrupt
            return outcome(here, setting, prompt)

        study = open_study(chosen.search, folder)
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                list(run_search(study, here, chosen, evaluate))
            study = open_study(chosen.search, folder)
        list(run_search(study, here, chosen, evaluate))
        results.append(points(study))
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_a_study_of_an_earlier_version_opens_and_continues_with_its_own_values(tmp_path) -> None:
    """Its values are the KL, as its metric's name says; a study may not mix them with shares."""
    chosen = config(trials=10, prune_factor=1.5)
    here = space(chosen)

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        found = outcome(here, setting, prompt)
        return dataclasses.replace(found, losses={**found.losses, "score_drop": 1.0})

    # As version 0.1 wrote it.
    url = f"sqlite:///{tmp_path / 'study.db'}"
    old = optuna.create_study(
        study_name="calibrate", storage=url, directions=["minimize", "minimize"]
    )
    old.set_metric_names(["loss [nats/token]", "predicted attention time"])
    distributions = {
        key: optuna.distributions.FloatDistribution(*ends) for key, ends in here.bounds().items()
    }
    for (name, params), pruned in zip(here.seeds()[:3], (False, False, True), strict=True):
        setting = here.setting(params)
        kl = planted_loss(here, setting)
        attributes = {"name": name, "setting": {p: list(f) for p, f in setting.items()}}
        if pruned:
            attributes["kl_at_least"] = kl
        else:
            attributes |= {"kl": [kl] * 3, "sparsity": {"prefill": 0.5, "decode": 0.5}}
        old.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                values=None if pruned else [kl, here.relative_time(setting)],
                params=params,
                distributions=distributions,
                user_attrs=attributes,
            )
        )
    before = points(open_study(chosen.search, tmp_path))
    assert [list(point.losses) for point in before] == [["kl"], ["kl"]]
    assert before[0].share({"kl": 0.01, "score_drop": 2.0}) == before[0].losses["kl"] / 0.01

    study = open_study(chosen.search, tmp_path)
    found = list(run_search(study, here, chosen, evaluate))
    assert len(found) == 7
    assert study.metric_names == ["loss [nats/token]", "predicted attention time"]
    later = study.get_trials(states=(TrialState.COMPLETE,))[2:]
    assert len(later) > 2
    for trial, point in zip(later, points(study)[2:], strict=True):
        assert trial.values[0] == point.losses["kl"] == losses_of(trial)["kl"]
        assert point.losses["score_drop"] == 1.0
    assert read_study(chosen.search, tmp_path).metric_names == study.metric_names


@pytest.mark.slow
def test_the_search_minimises_the_largest_share_of_any_budget(tmp_path) -> None:
    """A drop of the score that comes of prefill alone: what spends it must not look cheap."""
    chosen = config(trials=12, prune_factor=1.5)
    here = space(chosen)
    assert chosen.budget.limits == {"kl": 0.01, "score_drop": 2.0}

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        found = outcome(here, setting, prompt)
        spent = here.predicted_loss({"prefill": setting["prefill"]})["prefill"] / 0.01
        # Single prompts may gain; the mean over prompts is 12 points per spent budget.
        drop = 36.0 * spent * (1 if prompt is not PROMPTS[0] else -1)
        return dataclasses.replace(found, losses={**found.losses, "score_drop": drop})

    study = open_study(chosen.search, tmp_path)
    list(run_search(study, here, chosen, evaluate))
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    shares = [point.share(chosen.budget.limits) for point in points(study)]
    assert [trial.values[0] for trial in complete] == shares
    assert any(
        losses_of(trial)["score_drop"] / 2.0 == trial.values[0] > losses_of(trial)["kl"] / 0.01
        for trial in complete
    )
    pruned = study.get_trials(states=(TrialState.PRUNED,))
    assert pruned, "the drop must prune, or this test shows nothing of it"
    assert all(trial.user_attrs["at_least"] > 1.5 for trial in pruned)
    # The second warm starts were aimed with the drop in mind.
    aimed = [point.share(chosen.budget.limits) for point in points(study) if point.name != "search"]
    assert any(0.3 < share <= 0.8 for share in aimed)


def test_a_loss_that_some_prompts_show_is_a_mean_over_those(tmp_path: Path) -> None:
    """One prompt of three has an answer, and what it loses there decides; no prompt is generated from."""
    chosen = config(trials=3, prune_factor=1e6)
    here = space(chosen)
    limits = {"kl": 0.01, "kl_answer": 0.001, "generated_drop": 0.5}

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        found = outcome(here, setting, prompt)
        kind = "kl_answer" if prompt is PROMPTS[1] else "kl_text"
        return dataclasses.replace(found, losses={**found.losses, kind: found.losses["kl"]})

    study = open_study(chosen.search, tmp_path)
    list(search(study, here, PROMPTS, evaluate, chosen.search, limits=limits, seed=0))
    found = points(study)
    assert len(found) == 3 and all(point.losses["kl"] > 0 for point in found)
    for trial, point in zip(study.get_trials(), found, strict=True):
        assert len(trial.user_attrs["losses"]["kl_answer"]) == 1
        assert point.losses["kl_answer"] == pytest.approx(point.losses["kl"])
        assert trial.values[0] == point.share(limits) == point.losses["kl_answer"] / 0.001


def test_a_trial_is_pruned_only_on_what_its_missing_prompts_cannot_mend(tmp_path: Path) -> None:
    chosen = config(trials=1, prune_factor=1.5)
    here = space(chosen)
    limits = {"kl": 1e6, "kl_answer": 0.01}

    def asked(first: float) -> int:
        """Prompts that were run, if the first loses so much on its answer and the others nothing."""
        run: list[str] = []

        def evaluate(setting: dict, prompt: Prompt) -> Outcome:
            run.append(prompt.key)
            losses = {"kl": 0.0, "kl_answer": first if prompt is PROMPTS[0] else 0.0}
            return dataclasses.replace(outcome(here, setting, prompt), losses=losses)

        study = open_study(chosen.search.model_copy(update={"study_name": str(first)}), tmp_path)
        list(search(study, here, PROMPTS, evaluate, chosen.search, limits=limits, seed=0))
        return len(run)

    assert asked(0.044) == 3, "a mean of at least 1.47 budgets"
    assert asked(0.046) == 1, "a mean of at least 1.53 budgets"


@pytest.mark.slow
def test_hopeless_trials_stop_after_the_first_prompts(tmp_path) -> None:
    chosen = config(trials=6, prune_factor=1.01)
    here = space(chosen)
    asked: list[str] = []

    def evaluate(setting: dict, prompt: Prompt) -> Outcome:
        asked.append(prompt.key)
        good = outcome(here, setting, prompt)
        return dataclasses.replace(good, losses={"kl": 1.0, "score_drop": 0.0})

    found = list(run_search(open_study(chosen.search, tmp_path), here, chosen, evaluate))
    assert found == [None] * 6
    assert asked == [PROMPTS[0].key] * 6


@pytest.mark.slow
def test_an_idle_phase_costs_exactly_the_dense_time() -> None:
    here = space(config())
    setting = here.setting(here.seeds()[0][1])
    times = here.phase_times({**setting, "decode": (0.0,) * len(setting["decode"])})
    assert times["decode"] == 1.0 and times["prefill"] < 1.0
