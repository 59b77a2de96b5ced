"""Every number that the report shows is the run folder's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from optuna.trial import TrialState
from report_files import PHASES, Page, chosen_of, close, read

import calibrate
from calibrate.errors import UserError
from calibrate.loss.joint import errors_of
from calibrate.proof.bounds import FREEDOM, lognormal_upper
from calibrate.record.measured import Measured
from calibrate.record.provenance import digest
from calibrate.search.cost import load_curves
from calibrate.search.study import losses_of
from skip_softmax.meaning.histogram import edges

MEASURED = {"kl", "kl_answer", "kl_text", "flips", "score_drop"}


def test_trials_are_the_study(run: calibrate.Run, found: dict[str, Any]) -> None:
    trials = run.study.get_trials(states=(TrialState.COMPLETE,))
    assert [row["number"] for row in found["trials"]] == [trial.number for trial in trials]
    for row, trial in zip(found["trials"], trials, strict=True):
        assert row["losses"].keys() == losses_of(trial).keys() == MEASURED
        close([*row["losses"].values()], [*losses_of(trial).values()])
    shares = [row["losses"]["kl"] / run.config.budget.kl for row in found["trials"]]
    close(shares, [trial.values[0] for trial in trials])
    close([row["speedup"] for row in found["trials"]], [1 / trial.values[1] for trial in trials])
    for phase in PHASES:
        close(
            [row["sparsity"][phase] for row in found["trials"]],
            [trial.user_attrs["sparsity"][phase] for trial in trials],
        )
    winner = chosen_of(run.validation)["setting"]
    (chosen,) = [row["number"] for row in found["trials"] if row["chosen"]]
    assert trials[chosen].user_attrs["setting"] == winner
    for point in found["front"]:
        beaten = [
            losses_of(t)["kl"] < point["losses"]["kl"] * (1 - 1e-5)
            and 1 / t.values[1] > point["speedup"] * (1 + 1e-5)
            for t in trials
        ]
        assert not any(beaten)


def test_heldout_numbers_are_the_validation(run: calibrate.Run, found: dict[str, Any]) -> None:
    for key, row in (
        ("searched", chosen_of(run.validation)),
        ("uniform", run.validation["baseline"]),
    ):
        shown = found["heldout"][key]
        for name in ("kl", "score_drop"):
            for part in ("mean", "upper", "confidence"):
                close(shown["losses"][name][part], row[name][part])
        close(shown["speedup"], 1 / row["relative_time"])
        for phase in PHASES:
            close(shown["sparsity"][phase], row["sparsity"][phase])
            lengths = found["phases"][phase]["by_length"][key]
            assert list(lengths) == list(row["by_length"][phase])
            for length, pair in row["by_length"][phase].items():
                close(
                    [lengths[length]["target"], lengths[length]["achieved"]],
                    [pair["target"], pair["achieved"]],
                )
    assert found["verdict"]["passed"] == run.validation["passed"]
    assert found["budget"]["losses"] == {"kl": run.config.budget.kl}


def test_the_loss_models_errors_are_those_on_the_trials(
    run: calibrate.Run, found: dict[str, Any], page: Page
) -> None:
    told = read(run.folder, "loss_model.json")
    trials = run.study.get_trials(states=(TrialState.COMPLETE,))
    assert found["loss_model"]["settings"] == len(trials) == told["settings"]
    for phase in PHASES:
        assert len(told["phases"][phase]["weights"]) == run.thresholds.model.layers
    # From the layers alone, again.
    predicted = []
    for trial in trials:
        loss = 0.0
        for phase, factors in trial.user_attrs["setting"].items():
            mass = run.stats.dropped_mass(phase, factors).tolist()
            numbers = told["phases"][phase]
            weighed = zip(numbers["weights"], mass, strict=True)
            loss += sum(weight * m ** numbers["power"] for weight, m in weighed)
        predicted.append(loss)
    ours = errors_of(predicted, [losses_of(trial)["kl"] for trial in trials])
    assert ours is not None
    shown = found["loss_model"]["errors"]["layers"]
    close(
        [shown["log2_error"], shown["rank_correlation"]], [ours.log2_error, ours.rank_correlation]
    )
    assert f"within a factor of {2**ours.log2_error:.2f}" in page.text


@pytest.mark.parametrize("phase", PHASES)
def test_maps_are_the_statistics_at_the_emitted_thresholds(
    run: calibrate.Run, found: dict[str, Any], phase: Any
) -> None:
    numbers = found["phases"][phase]
    layers = range(run.thresholds.model.layers)
    grid = torch.tensor([run.thresholds.per_head(layer, phase) for layer in layers])
    close(numbers["scale_factor"], grid.tolist())
    skipped, visited = run.stats.skipped(phase, grid).sum(2), run.stats.visited(phase).sum(2)
    close(numbers["sparsity"], (skipped / visited).tolist())
    close(numbers["layer_sparsity"], run.stats.layer_sparsity(phase, grid).tolist())
    close(numbers["layer_dropped_mass"], run.stats.dropped_mass(phase, grid).tolist())
    rows = [row for row in read(run.folder, "sensitivity.json") if row["phase"] == phase]
    for name in ("layer", "scale_factor", "sparsity", "dropped_mass"):
        close([row[name] for row in numbers["sensitivity"]], [row[name] for row in rows])
    close([row["loss"] for row in numbers["sensitivity"]], [row["kl"] for row in rows])


@pytest.mark.parametrize("phase", PHASES)
def test_curves_are_the_statistics_at_bin_edges(
    run: calibrate.Run, found: dict[str, Any], phase: Any
) -> None:
    curve = found["phases"][phase]["curve"]
    factors = [float(edge) for edge in edges() if edge < run.config.target.min_kv_len[phase]]
    close(curve["scale_factor"], factors[-len(curve["scale_factor"]) :])
    for index in range(0, len(factors), 7):
        factor = factors[index]
        at = len(curve["scale_factor"]) - len(factors) + index
        if at < 0:
            assert run.stats.sparsity(phase, factor) < 1e-4
            continue
        close(curve["sparsity"][at], run.stats.sparsity(phase, factor))
        close(curve["dropped_mass"][at], float(run.stats.dropped_mass(phase, factor).mean()))
        by_layer = run.stats.layer_sparsity(phase, factor).tolist()
        close([row[at] for row in curve["layer_sparsity"]], by_layer)
        by_length = [run.stats.sparsity(phase, factor, bin_) for bin_ in range(2)]
        close([row[at] for row in curve["length_sparsity"]], by_length)


def test_tasks_are_the_heldout_prompts(run: calibrate.Run, found: dict[str, Any]) -> None:
    winner = chosen_of(run.validation)["setting"]
    keys = {row["key"] for row in map(_with_key, read(run.folder, "prompts.json")["heldout"])}
    rows = [row for row in Measured(run.folder / "heldout.jsonl").of(winner) if row["key"] in keys]
    assert len(rows) == run.config.prompts.heldout
    for task, shown in found["tasks"].items():
        mine = [row for row in rows if row["task"] == task]
        kl = shown["losses"]["kl"]
        close(sorted(kl["values"]), sorted(row["losses"]["kl"] for row in mine))
        close(kl["mean"], np.mean([row["losses"]["kl"] for row in mine]))
        close(kl["mean"], chosen_of(run.validation)["by_task"][task]["kl"])
        losses = [row["losses"]["kl"] for row in mine]
        assert len(mine) >= FREEDOM, "or the task has no bound of its own"
        floor = 0.01 * run.config.budget.kl
        close(kl["upper"], lognormal_upper(losses, kl["confidence"], floor=floor))
        drops = [row["losses"]["score_drop"] for row in mine]
        close(sorted(shown["losses"]["score_drop"]["values"]), sorted(drops))
        assert shown["prompts"] == len(mine)
    for phase in PHASES:
        visited = np.sum([row["visited"][phase] for row in rows], axis=0)
        skipped = np.sum([row["skipped"][phase] for row in rows], axis=0)
        close(found["phases"][phase]["layer_heldout"], skipped / visited)


def _with_key(row: dict[str, Any]) -> dict[str, Any]:
    from calibrate.prompts.build import Prompt

    prompt = Prompt(**{**row, "ids": tuple(row["ids"]), "continuation": tuple(row["continuation"])})
    return {"key": prompt.key}


def test_speed_is_the_measured_curve_and_the_emitted_prediction(
    run: calibrate.Run, found: dict[str, Any]
) -> None:
    evidence = run.thresholds.evidence["predicted_speedup"]
    curves = load_curves(run.config.cost, 384, run.thresholds.model.head_dim).curves
    for phase in PHASES:
        speed = found["phases"][phase]["speed"]
        assert round(speed["predicted"]["speedup"], 3) == evidence[phase]
        close(speed["measured"]["sparsity"], curves[phase].sparsity)
        close(speed["measured"]["speedup"], [1 / time for time in curves[phase].relative_time])


def test_provenance_is_run_json_and_the_config(run: calibrate.Run, found: dict[str, Any]) -> None:
    shown = dict(found["provenance"])
    config = shown.pop("config")
    notes = read(run.folder, "run.json")
    assert shown == notes
    assert config == yaml.safe_load((run.folder / "config.yaml").read_text())


def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder|is not a run folder"):
        calibrate.open_run(tmp_path / "nowhere").report()


def test_missing_statistics_are_named(copy: Path) -> None:
    (copy / "stats.safetensors").unlink()
    with pytest.raises(UserError, match=r"stats\.safetensors: is missing; run again"):
        calibrate.open_run(copy).report()


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("attempts",), None, "attempts"),
        (("attempts",), 3, "attempts"),
        (("attempts", -1, "setting"), None, r"attempts\.\d\.setting"),
        (("attempts", -1, "setting", "decode"), [1.0], "setting must have decode"),
        (("attempts", -1, "sparsity"), {"prefill": 0.5}, "sparsity must have decode"),
        (("attempts", -1, "by_length"), {}, "by_length must have prefill"),
        (("attempts", -1, "relative_time"), "fast", r"attempts\.\d\.relative_time.*'fast'"),
        (("attempts", -1, "kl", "mean"), [], r"attempts\.\d\.kl\.mean"),
        (("baseline",), {"name": "uniform"}, r"baseline\.setting"),
        (("short_prompt",), [], "short_prompt"),
    ],
)
def test_an_edited_validation_is_named_with_its_key(
    copy: Path, keys: tuple[Any, ...], value: Any, told: str
) -> None:
    content = read(copy, "validation.json")
    *path, last = keys
    inner = content
    for key in path:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (copy / "validation.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"validation\.json`: .*{told}.*calibrate validate "):
        calibrate.open_run(copy).report()


@pytest.mark.parametrize(
    "name", ["heldout.jsonl", "fit.json", "sensitivity.json", "run.json", "loss_model.json"]
)
def test_other_edited_files_are_named(copy: Path, name: str) -> None:
    edited = {
        "heldout.jsonl": {
            "setting": digest(chosen_of(read(copy, "validation.json"))["setting"]),
            "prompt": "a",
            "measured": {},
        },
        "fit.json": {"prefill": {}},
        "sensitivity.json": ["a"],
        "run.json": {"model": [], "seconds": {"validation": 1}},
        "loss_model.json": {"errors": {"layers": {}}},
    }
    (copy / name).write_text(json.dumps(edited[name]) + "\n")
    with pytest.raises(UserError, match=f"{name}`"):
        calibrate.open_run(copy).report()
