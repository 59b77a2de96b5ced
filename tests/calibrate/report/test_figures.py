"""The figures draw the findings, in the report and in a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_files import PHASES, Page, close, read

import calibrate
from calibrate.errors import UserError


def test_figures_draw_the_findings(page: Page, found: dict[str, Any]) -> None:
    figures = page.data["figures"]

    def trace(figure: str, name: str) -> dict[str, Any]:
        return dict(next(t for t in figures[figure]["data"] if t.get("name") == name))

    drawn = {
        (x, y)
        for trace_ in figures["tradeoff"]["data"][:3]
        for x, y in zip(trace_["x"], trace_["y"], strict=True)
    }
    assert drawn >= {(row["speedup"], row["losses"]["kl"]) for row in found["trials"]}
    chosen = next(row for row in found["trials"] if row["chosen"])
    assert trace("tradeoff", "chosen")["x"] == [chosen["speedup"]]
    assert trace("tradeoff", "chosen, held-out")["y"] == [
        found["heldout"]["searched"]["losses"]["kl"]["mean"]
    ]
    assert trace("tradeoff", "one number, held-out")["y"] == [
        found["heldout"]["uniform"]["losses"]["kl"]["mean"]
    ]
    assert [y for trace_ in figures["history"]["data"] for y in trace_["y"]] == [
        row["losses"]["kl"] for row in found["trials"]
    ]
    for phase in PHASES:
        numbers = found["phases"][phase]
        close(figures[f"map-{phase}"]["data"][0]["z"], 100 * np.array(numbers["sparsity"]))
        curve = numbers["curve"]
        *lengths, total, dropped = figures[f"curves-{phase}"]["data"]
        close([t["y"] for t in lengths], 100 * np.array(curve["length_sparsity"]))
        close(total["y"], 100 * np.array(curve["sparsity"]))
        close(dropped["y"], 100 * np.array(curve["dropped_mass"]))
        assert total["x"] == dropped["x"] == curve["scale_factor"]
        rows = trace("sensitivity", phase)
        assert rows["y"] == [row["loss"] for row in numbers["sensitivity"]]
        for kind in ("target", "achieved"):
            shares = [row[kind] for row in numbers["by_length"]["searched"].values()]
            close(trace("lengths", f"{phase}, {kind}")["y"], 100 * np.array(shares))
        measured = trace(f"speed-{phase}", f"measured, {numbers['speed']['kv_len']} tokens")
        assert measured["y"] == numbers["speed"]["measured"]["speedup"]
        bound = trace(f"speed-{phase}", "bound 2/(2−s)")
        close(bound["y"], [2 / (2 - x / 100) for x in bound["x"]])
        assert trace(f"speed-{phase}", "chosen, predicted")["y"] == [
            numbers["speed"]["predicted"]["speedup"]
        ]
    means = trace("tasks-kl", "mean, with upper bound")
    bounds = [task["losses"]["kl"] for task in found["tasks"].values()]
    assert means["x"] == [bound["mean"] for bound in bounds]
    bars = [bound["upper"] - bound["mean"] for bound in bounds]
    close(means["error_x"]["array"], bars)


def test_in_a_notebook_a_figure_has_a_title_and_real_colours(
    run: calibrate.Run, page: Page
) -> None:
    for name, figure in run.figures.available.items():
        assert "var(--" not in figure.to_json()
        assert figure.layout.title.text
        assert "text" not in page.data["figures"][name]["layout"].get("title", {})


def test_a_run_without_trials_has_the_other_figures(copy: Path) -> None:
    notes = read(copy, "run.json")
    for stage in ("search", "validation"):
        del notes["seconds"][stage]
    (copy / "run.json").write_text(json.dumps(notes))
    (copy / "study.db").unlink()
    figures = calibrate.open_run(copy).figures
    assert "curves-prefill" in figures.available and "tradeoff" not in figures.available
    with pytest.raises(UserError, match="needs trials, but the run has none"):
        figures.tradeoff()
