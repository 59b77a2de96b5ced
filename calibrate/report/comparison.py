"""Two runs side by side: figures, tables and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from calibrate.report.figures import add_chosen
from calibrate.report.findings import Findings, findings
from calibrate.report.page import render, sentence, write
from calibrate.report.style import ACCENT, DASHES, INK, SYMBOLS, finish, percent, six
from calibrate.report.tables import Table, loss_text, percent_text, provenance_table
from calibrate.schema import RunConfig
from skip_softmax.thresholds.types import Phase


def write_comparison(
    one: tuple[Path, RunConfig], other: tuple[Path, RunConfig], output: Path | None = None
) -> Path:
    """Writes two runs side by side.

    Args:
        one: folder and config of run A.
        other: folder and config of run B.
        output: the file; None: `comparison.html` in A's folder.

    Returns:
        The file's path.

    Raises:
        UserError: a folder lacks statistics, or the file cannot be written.
    """
    runs = [findings(*one), findings(*other)]
    drawn = {"fronts": compared_fronts(runs)} if all(run["trials"] for run in runs) else {}
    phases = [
        phase
        for phase in runs[0]["phases"]
        if all(phase in run["phases"] and run["phases"][phase]["scale_factor"] for run in runs)
    ]
    drawn |= {f"layers-{phase}": compared_layers(runs, phase) for phase in phases}
    if all(run["tasks"] for run in runs):
        drawn["tasks"] = compared_tasks(runs)
    html = render(
        "comparison.html.j2",
        runs,
        drawn,
        verdicts=[sentence(run).partition(": ") for run in runs],
        phases=phases,
        tables=_comparison_tables(runs),
    )
    return write(html, output or one[0] / "comparison.html")


def compared_fronts(runs: Sequence[Findings]) -> go.Figure:
    """The fronts of two runs, with what each chose."""
    figure = go.Figure()
    for index, found in enumerate(runs):
        colour, label = (ACCENT, INK)[index], "AB"[index]
        figure.add_scatter(
            x=[p["speedup"] for p in found["front"]],
            y=[p["kl"] for p in found["front"]],
            mode="lines+markers",
            name=f"{label}: front",
            line={"color": colour, "dash": DASHES[index], "width": 1.6},
            marker={"symbol": SYMBOLS[index], "size": 7, "color": colour},
            hovertemplate=f"{label}<br>%{{x:.2f}}×<br>KL %{{y:.2e}} nats/token<extra></extra>",
        )
        add_chosen(figure, found, f"{label}: ", colour)
    figure.update_yaxes(type="log", exponentformat="e", dtick=1)
    return finish(figure, "predicted attention speed-up [×]", "loss: KL to dense [nats/token]", 420)


def compared_layers(runs: Sequence[Findings], phase: Phase) -> go.Figure:
    """Tiles skipped per layer in two runs."""
    figure = go.Figure()
    for index, found in enumerate(runs):
        shares = [percent(share) for share in found["phases"][phase]["layer_sparsity"]]
        figure.add_scatter(
            x=list(range(len(shares))),
            y=shares,
            mode="lines+markers",
            name="AB"[index],
            line={"color": (ACCENT, INK)[index], "dash": DASHES[index], "width": 1.4},
            marker={"symbol": SYMBOLS[index], "size": 6, "color": (ACCENT, INK)[index]},
            hovertemplate=f"{'AB'[index]}, layer %{{x}}: %{{y:.1f}} %<extra></extra>",
        )
    figure.update_yaxes(range=[0, 102])
    return finish(figure, "layer", "tiles skipped [%]", 300)


def compared_tasks(runs: Sequence[Findings]) -> go.Figure:
    """Held-out loss by task of two runs, with upper confidence bounds."""
    figure = go.Figure()
    for index, found in enumerate(runs):
        bounds = [task["kl"] for task in found["tasks"].values()]
        figure.add_scatter(
            x=[bound["mean"] for bound in bounds],
            y=list(found["tasks"]),
            mode="markers",
            name="AB"[index],
            marker={"symbol": SYMBOLS[index], "size": 10, "color": (ACCENT, INK)[index]},
            error_x={
                "type": "data",
                "symmetric": False,
                "color": (ACCENT, INK)[index],
                "width": 6,
                "array": [
                    0.0 if b["upper"] is None else six(b["upper"] - b["mean"]) for b in bounds
                ],
                "arrayminus": [0.0] * len(bounds),
            },
            hovertemplate=f"{'AB'[index]}, %{{y}}: %{{x:.2e}} nats/token<extra></extra>",
        )
    figure.update_xaxes(rangemode="tozero", exponentformat="e")
    tasks = {task for found in runs for task in found["tasks"]}
    return finish(figure, "loss: KL to dense [nats/token]", "", 150 + 46 * len(tasks))


def _comparison_tables(runs: Sequence[Findings]) -> dict[str, Table]:
    verdicts = {True: "passed", False: "failed", None: "not proven"}
    lines: list[list[str]] = [["verdict", *(verdicts[run["verdict"]["passed"]] for run in runs)]]
    lines.append(["budget [nats/token]", *(f"{run['budget']['kl']:g}" for run in runs)])
    rows = [run["heldout"]["searched"] for run in runs]
    if all(row is not None for row in rows):
        lines += [
            ["loss [nats/token]", *(loss_text(row["kl"]["mean"]) for row in rows)],
            ["loss, upper bound", *(loss_text(row["kl"]["upper"]) for row in rows)],
            ["score drop [points]", *(f"{row['score_drop']['mean']:.2f}" for row in rows)],
            *(
                [f"{phase} skipped", *(percent_text(row["sparsity"].get(phase)) for row in rows)]
                for phase in runs[0]["phases"]
            ),
            ["predicted speed-up", *(f"{row['speedup']:.2f}×" for row in rows)],
            ["held-out prompts", *(str(row["prompts"]) for row in rows)],
        ]
    configs = [_flat(run["provenance"]["config"]) for run in runs]
    keys = [
        key
        for key in dict.fromkeys([*configs[0], *configs[1]])
        if configs[0].get(key) != configs[1].get(key)
    ]
    return {
        "numbers": Table(("", "A", "B"), lines),
        "config": Table(
            ("key", "A", "B"), [[key, *(str(c.get(key, "–")) for c in configs)] for key in keys]
        ),
        "a": provenance_table(runs[0]),
        "b": provenance_table(runs[1]),
    }


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if not isinstance(section, dict):
        return {prefix: section}
    return {
        key: value
        for name, inner in section.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
