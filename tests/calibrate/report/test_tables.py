"""Tables say what the findings say, on the page and on a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from optuna.trial import TrialState
from report_files import PHASES, Page, chosen_of, loss_text, read

import calibrate
from calibrate.report import tables
from calibrate.report.lengths import expectations
from calibrate.search.study import losses_of


def test_text_and_tables_say_the_same(page: Page, run: calibrate.Run, smoke_run: Path) -> None:
    row = chosen_of(run.validation)
    text = " ".join(page.text.split())
    assert (
        f"Passed: skips {100 * row['sparsity']['prefill']:.1f} % of prefill tiles and "
        f"{100 * row['sparsity']['decode']:.1f} % of decode tiles. On {row['prompts']} held-out prompts this "
        f"costs, with {100 * row['kl']['confidence']:.1f} % confidence, a KL of at most "
        f"{loss_text(row['kl']['upper'])} nats/token (mean {loss_text(row['kl']['mean'])}, budget 0.2). "
        f"Attention is predicted to run {1 / row['relative_time']:.2f}× as fast."
    ) in text
    for layer, cells in enumerate(page.table("layer")):
        assert cells[0] == str(layer)
        for phase, factor, share, mass in zip(
            PHASES, cells[1::4], cells[2::4], cells[4::4], strict=True
        ):
            factors = run.thresholds.per_head(layer, phase)  # type: ignore[arg-type]
            assert factor.removesuffix(" (dense)") == f"{factors[0]:g}"
            grid = [run.thresholds.per_head(i, phase)[0] for i in range(4)]  # type: ignore[arg-type]
            expected = run.stats.layer_sparsity(phase, grid)[layer]  # type: ignore[arg-type]
            assert share == f"{100 * float(expected):.1f} %"
            dropped = run.stats.dropped_mass(phase, grid)[layer]  # type: ignore[arg-type]
            assert mass == f"{100 * float(dropped):.3g} %"
    chosen, uniform = page.table("setting")
    assert chosen[1:3] == [loss_text(row["kl"]["mean"]), loss_text(row["kl"]["upper"])]
    assert uniform[1] == loss_text(run.validation["baseline"]["kl"]["mean"])
    trials = run.study.get_trials(states=(TrialState.COMPLETE,))
    shown = [cells[1:7] for cells in page.table("trial")]
    assert shown == [
        [
            *(loss_text(losses[name]) for name in ("kl", "kl_answer", "kl_text")),
            *(f"{losses[name]:.2f}" for name in ("flips", "score_drop")),
            f"{1 / trial.values[1]:.2f}×",
        ]
        for trial, losses in zip(trials, map(losses_of, trials), strict=True)
    ]
    lengths = {cells[0]: cells[1:3] for cells in page.table("phase and length")}
    for phase in PHASES:
        for length, pair in row["by_length"][phase].items():
            assert lengths[f"{phase}, {length} tokens"] == [
                f"{100 * pair['target']:.1f} %",
                f"{100 * pair['achieved']:.1f} %",
            ]
    tasks = {cells[0]: cells[2] for cells in page.table("task")}
    assert tasks == {task: loss_text(values["kl"]) for task, values in row["by_task"].items()}
    answered = {cells[0]: cells[4:6] for cells in page.table("task")}
    kl = {task: loss_text(values["kl"]) for task, values in row["by_task"].items()}
    assert answered == {"needle_single": [kl["needle_single"], "–"], "text": ["–", kl["text"]]}
    notes = dict(page.table(""))
    assert run.thresholds.model.sha256 in notes["model"]
    assert read(smoke_run, "run.json")["config_sha256"] in notes["config"]


def test_every_row_has_a_cell_per_column(run: calibrate.Run) -> None:
    shown = {**tables.tables_of(run.findings), "phases": tables.phases(run.thresholds)}
    shown["layers"] = tables.layers(run.thresholds)
    shown["expected"] = tables.expected(expectations(run.thresholds, run.stats))
    shown["compared"] = tables.compared([run.findings, run.findings])
    assert len(shown) == 11
    for name, table in shown.items():
        assert table.rows and {len(row) for row in table.rows} == {len(table.columns)}, name
        assert set(table.words) <= set(table.columns), name


def test_candidates_are_listed_as_they_were_tried(copy: Path) -> None:
    content = read(copy, "validation.json")
    best = chosen_of(content)
    safer = {**best, "relative_time": best["relative_time"] + 0.01}
    bolder = {**best, "passed": False, "reason": "KL"}
    content["attempts"] = [safer, best, bolder]
    (copy / "validation.json").write_text(json.dumps(content))
    rows = Page(calibrate.open_run(copy).report().read_text()).table("setting")
    assert [(row[0], row[-1]) for row in rows[:3]] == [
        ("candidate 1", "yes"), ("chosen", "yes"), ("candidate 3", "no")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mean", "drop", "said"),
    [
        (0.004, 1.0, "What 40 held-out prompts lose is within the budget, but they are too few"),
        (0.006, 1.0, "Raise the budget, or give the search more trials"),
        (0.004, 4.0, "Raise the budget, or give the search more trials"),
    ],
)
def test_the_cure_of_a_failed_proof_follows_its_cause(mean: float, drop: float, said: str) -> None:
    losses = {"kl": {"mean": mean, "prompts": 40}, "score_drop": {"mean": drop, "prompts": 40}}
    budget = {"kl": 0.005, "score_drop": 3.0, "flips": None, "confidence": 0.95}
    evidence = {"loss": {**losses, "flips": {"mean": 9.0}, "heldout_prompts": 40}, "budget": budget}
    assert tables.cure(evidence).startswith(said)
    assert tables.cure({}) == "Raise the budget, or give the search more trials"
