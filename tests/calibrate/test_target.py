"""Whole runs with a target sparsity on the tiny model: no search, one number per phase, the same proof."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import SMOKE, Result, refused
from engine_files import BLACKWELL
from report_files import Page, chosen_of, read

import calibrate
from calibrate import pipeline
from calibrate.loss.measure import compare
from calibrate.report.tables import at_the_same_loss
from calibrate.statistics import capture
from skip_softmax import Thresholds

pytestmark = pytest.mark.slow
PHASES = ("prefill", "decode")
TARGET = "target.target_sparsity={prefill: 0.11, decode: 0.5}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke config with the tiny model."""
    folder = tmp_path_factory.mktemp("target")
    tiny.write_smoke_model(folder / "model")
    text = SMOKE.read_text(encoding="utf-8").replace("../runs/smoke-model", str(folder / "model"))
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def kept(config: Path) -> calibrate.Run:
    """A target whose loss is within the budget. To read only."""
    return calibrate.run(config, config.parent / "kept", overrides=(TARGET,))


def test_a_run_has_no_search_and_holds_every_other_result(kept: calibrate.Run) -> None:
    names = {path.name for path in kept.folder.iterdir()}
    assert {"stats.safetensors", "fit.json", "validation.json", "thresholds.yaml"} <= names
    assert not {"study.db", "sensitivity.json"} & names
    assert kept.thresholds.evidence["verdict"] == "passed"


def test_the_number_is_the_curve_at_the_target(kept: calibrate.Run) -> None:
    file, fits = kept.thresholds, read(kept.folder, "fit.json")
    assert file.layers == (), "one number for all layers"
    for phase, target in (("prefill", 0.11), ("decode", 0.5)):
        curve = fits[phase]["nvidia"]
        number = getattr(file.scale_factor, phase)
        assert number == curve["a"] * math.exp(curve["b"] * target) > 0
        assert (file.fit[phase]["a"], file.fit[phase]["b"]) == (curve["a"], curve["b"])
        assert set(fits[phase]["model"]) < set(curve), "our own curve stands beside it"


def test_the_evidence_sets_predictions_against_what_was_achieved(kept: calibrate.Run) -> None:
    found = kept.thresholds.evidence["target_sparsity"]
    chosen = chosen_of(kept.validation)
    for phase, entry in found.items():
        assert entry["achieved"] == pytest.approx(chosen["sparsity"][phase], rel=1e-4)
        assert set(entry["by_length"]) == {"256", "384"}
        for index, (length, row) in enumerate(sorted(entry["by_length"].items())):
            assert row["nvidia"] == pytest.approx(entry["target"], rel=1e-4)
            expected = kept.stats.sparsity(phase, entry["scale_factor"], index)
            assert row["histogram"] == pytest.approx(expected, rel=1e-3)
            measured = chosen["by_length"][phase][length]["achieved"]
            assert row["achieved"] == pytest.approx(measured, rel=1e-4)
            assert abs(row["achieved"] - row["histogram"]) < 0.15
    stored = kept.validation["target_sparsity"]
    assert stored["decode"]["target"] == 0.5 and set(stored) == set(found) == set(PHASES)


def test_it_is_shown(kept: calibrate.Run, call: Callable[..., Result]) -> None:
    shown = call("show", kept.folder / "thresholds.yaml")
    assert shown.code == 0
    html = kept.report().read_text(encoding="utf-8")
    page, entry = Page(html), kept.thresholds.evidence["target_sparsity"]["decode"]
    row = entry["by_length"]["384"]
    cells = [f"{100 * row[key]:.1f} %" for key in ("nvidia", "histogram", "achieved")]
    printed = next(line for line in shown.stdout.splitlines() if "decode, 384 tokens" in line)
    drawn = next(r for r in page.table("phase and length") if r[0] == "decode, 384 tokens")
    for cell in ("50.0 %", *cells):
        assert cell in printed and cell in drawn
    for text in (" ".join(shown.stdout.split()), page.text):
        assert f"* exp({entry['fit']['b']:g} * target_sparsity)" in text
        assert f"R² {entry['fit']['r2']:.3f} of the logarithms" in text
    assert "There was no search" in page.text
    assert "The search has not run yet" not in page.text
    assert page.data["runs"][0]["target_sparsity"]["decode"]["target"] == 0.5


def test_what_searches_is_refused(kept: calibrate.Run, call: Callable[..., Result]) -> None:
    for command in (("search", kept.folder), ("project", kept.folder, "--engine", "trtllm")):
        refused(call(*command), "`target.target_sparsity` must be null", "calibrate export")
    with pytest.raises(calibrate.UserError, match=r"must be null"):
        _ = kept.study


def test_the_curve_and_the_target_are_exported(
    kept: calibrate.Run, call: Callable[..., Result], tmp_path: Path
) -> None:
    """Both artefacts give back the numbers of the file; the formula and the target are the user's."""
    file = tmp_path / "thresholds.yaml"
    # The tiny prompts have tiny tiles, which no engine has.
    kept.thresholds.model_copy(update={"geometry": BLACKWELL}).save(file)
    model = Path(shutil.copytree(kept.config.model.path, tmp_path / "model"))
    numbers = {phase: getattr(kept.thresholds.scale_factor, phase) for phase in PHASES}
    made = calibrate.export(file, "trtllm", gpu="sm100", model=model)
    for phase, target in (("prefill", 0.11), ("decode", 0.5)):
        fit = kept.thresholds.fit[phase]
        curve = f"{fit['a']} * exp({fit['b']} * target_sparsity)"
        assert f"# {phase}: {curve} at target_sparsity: {{{phase}: {target}}}\n" in made.text
    assert made.patch is not None
    group = json.loads(made.patch.after)["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["target_sparsity"] == {"prefill": 0.11, "decode": 0.5}
    for phase, number in numbers.items():
        curve = group["threshold_scale_factor"][phase]
        by_formula = curve["a"] * math.exp(curve["b"] * group["target_sparsity"][phase])
        assert by_formula == pytest.approx(number, rel=1e-12)
    options = ("--gpu", "sm100", "--model", model, "--apply")
    written = call("export", file, "--engine", "modelopt", *options)
    assert written.code == 0, written.stderr
    back = call(
        "import", model / "config.json", "--engine", "modelopt", "--model", model, "-o", tmp_path / "b.yaml"
    )  # fmt: skip
    assert back.code == 0, back.stderr
    again = Thresholds.load(tmp_path / "b.yaml").scale_factor
    assert (again.prefill, again.decode) == pytest.approx(tuple(numbers.values()), rel=1e-12)


def test_a_broken_budget_leaves_everything_dense_and_says_what_it_would_allow(
    config: Path, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ran = call(
        "run", config, "-o", folder, "--set", TARGET, "--set", "budget.kl=1e-6", "--json"
    )  # fmt: skip
    assert ran.code == 1 and "Traceback" not in ran.stderr
    message = ran.message
    assert len(message.splitlines()) == 1
    assert "above the budget of 1e-06" in message and "skipping disabled" in message
    allowed = re.search(
        r"Lower `target.target_sparsity` \(by the statistics, about ([\d.]+) % in prefill and ([\d.]+) % in "
        r"decode would keep within it\), or raise the budget",
        message,
    )
    assert allowed is not None, message
    evidence = json.loads(ran.stdout)["evidence"]
    assert evidence["verdict"] == "failed"
    for phase, share in zip(PHASES, allowed.groups(), strict=True):
        entry = evidence["target_sparsity"][phase]
        assert f"{100 * entry['affordable']:.1f}" == share
        assert 0 <= entry["affordable"] < entry["by_length"]["384"]["histogram"]
    file = Thresholds.load(folder / "thresholds.yaml")
    for layer in range(file.model.layers):
        for phase in PHASES:
            assert set(file.per_head(layer, phase)) == {0.0}
    again = call("validate", folder)
    assert (again.code, again.message) == (1, message)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "Failed" in page.text and page.table("phase and length")


def test_a_phase_that_cannot_reach_its_target_is_dense_and_the_other_is_proven(
    config: Path, call: Callable[..., Result], tmp_path: Path
) -> None:
    target = "target.target_sparsity={prefill: 0.95, decode: 0.5}"
    run = calibrate.run(config, tmp_path / "run", overrides=(target,))
    evidence = run.thresholds.evidence
    assert evidence["verdict"] == "passed"
    assert evidence["dense"]["prefill"]["reason"] == "its target of 95 % is out of reach"
    assert 0 < evidence["dense"]["prefill"]["most"] < 0.95
    assert run.thresholds.scale_factor.prefill == 0.0 < run.thresholds.scale_factor.decode
    assert set(evidence["target_sparsity"]) == {"decode"}
    assert "left dense" in run.thresholds.fit["prefill"]["refused"]
    shown = call("show", run.folder / "thresholds.yaml")
    assert "prefill is left dense: its target of 95 % is out of reach (at most" in shown.stdout


def test_no_phase_that_reaches_its_target_exits_1_and_says_how_far_each_was(
    config: Path, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ran = call("run", config, "-o", folder, "--set", "target.target_sparsity=0.99")
    assert ran.code == 1
    assert "no phase can be brought to its target sparsity" in ran.message
    assert re.search(r"prefill: its target of 99 % is out of reach \(at most [\d.]+ %", ran.message)
    assert re.search(r"decode: its target of 99 % is out of reach \(at most [\d.]+ %", ran.message)
    assert "lower `target.target_sparsity`" in ran.message
    assert (folder / "report.html").exists() and not (folder / "thresholds.yaml").exists()


@pytest.mark.parametrize("stop", ["capture", "validation"])
def test_a_stopped_run_goes_on_where_it_was(
    config: Path, kept: calibrate.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    worked: list[str] = []

    def observed(loaded: Any, prompt: Any, *rest: Any) -> Any:
        if stop == "capture" and len(worked) == 2:
            raise KeyboardInterrupt
        worked.append(prompt.key)
        return observe(loaded, prompt, *rest)

    def compared(loaded: Any, thresholds: Any, prompt: Any, dense: Any) -> Any:
        if stop == "validation" and len(worked) == 7:
            raise KeyboardInterrupt
        worked.append(prompt.key)
        return compare(loaded, thresholds, prompt, dense)

    observe = capture.observe
    monkeypatch.setattr(capture, "observe", observed)
    monkeypatch.setattr(pipeline, "compare", compared)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(config, folder, overrides=(TARGET,))
    stop = "nowhere"
    again = calibrate.run(config, folder, overrides=(TARGET,))
    assert len(worked) == len(set(worked)), "no prompt is counted or measured twice"
    assert again.thresholds == kept.thresholds
    assert again.validation == kept.validation
    calibrate.run(config, folder, overrides=(TARGET,))
    assert len(worked) == len(set(worked))


def test_fits_of_another_run_are_named(
    kept: calibrate.Run, call: Callable[..., Result], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(kept.folder, tmp_path / "run"))
    fits = read(folder, "fit.json")
    for fit in fits.values():
        del fit["nvidia"]
    (folder / "fit.json").write_text(json.dumps(fits))
    refused(call("validate", folder), "fit.json` does not hold what a run writes", "run again")


def test_a_folder_without_the_target_belongs_to_another_config(
    config: Path, kept: calibrate.Run, call: Callable[..., Result]
) -> None:
    refused(call("run", config, "-o", kept.folder), "belongs to another config", "target")


def test_a_searched_run_beside_it_says_what_the_same_loss_would_buy(
    smoke_run: Path, config: Path, tmp_path: Path
) -> None:
    """Of the same model, at whatever path."""
    target = calibrate.run(config, tmp_path / "run", overrides=(TARGET,))
    page = Page(target.report(smoke_run, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "At the same loss" in page.text
    # As much as the median trial costs: the fastest of the cheaper half is the answer.
    aimed, searched = target.findings, calibrate.open_run(smoke_run).findings
    by_loss = sorted(searched["trials"], key=lambda trial: trial["losses"]["kl"])
    cheaper = by_loss[: len(by_loss) // 2]
    spent = cheaper[-1]["losses"]["kl"]
    aimed["heldout"]["searched"]["losses"]["kl"]["mean"] = spent
    fastest = max(cheaper, key=lambda trial: float(trial["speedup"]))
    for pair in ([aimed, searched], [searched, aimed]):
        table = at_the_same_loss(pair)
        assert table is not None
        assert table.rows[0][:2] == ["target sparsity", f"{spent:#.3g}"]
        assert table.rows[1][0] == f"search: trial {fastest['number']}"
        assert table.rows[1][-1] == f"{fastest['speedup']:.2f}×"
    aimed["heldout"]["searched"]["losses"]["kl"]["mean"] = 0.0
    table = at_the_same_loss([aimed, searched])
    assert table is not None and table.rows[1] == ["search: no trial costs as little", *"––––"]
    # Two runs that were searched, or two targets, have no such table.
    page = Page(target.report(target, tmp_path / "d.html").read_text(encoding="utf-8"))
    assert "At the same loss" not in page.text


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("50", ("`0 < target_sparsity < 1` must hold", "50 for prefill", "for example 0.5")),
        ("0", ("`0 < target_sparsity < 1` must hold", "0 for prefill")),
        ("1.0", ("`0 < target_sparsity < 1` must hold", "1 for prefill")),
        ("half", ("target.target_sparsity", "'half'")),
        ("true", ("target.target_sparsity", "must not be true or false")),
        (".nan", ("target.target_sparsity", "nan")),
        ("{prefill: 0.5}", ("each of `phases`, prefill and decode", "but gives prefill;")),
        ("{prefill: 0.5, decode: 2}", ("`0 < target_sparsity < 1` must hold", "2 for decode")),
        ("{prefil: 0.5, decode: 0.5}", ("target_sparsity", "prefil")),
        ("{}", ("each of `phases`", "but gives none;")),
    ],
)
def test_a_wrong_target_exits_2(
    config: Path, call: Callable[..., Result], tmp_path: Path, value: str, parts: tuple[str, ...]
) -> None:
    command = ("run", config, "-o", tmp_path / "run", "--set", f"target.target_sparsity={value}")
    refused(call(*command), *parts)
    assert not (tmp_path / "run").exists()
