"""Two runs side by side: figures, tables and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from calibrate.loss.losses import FINEST, LOSSES
from calibrate.record.files import write_output
from calibrate.report.figures import add_chosen
from calibrate.report.findings import Findings, findings, percent
from calibrate.report.page import render, sentence
from calibrate.report.style import ACCENT, DASHES, INK, SYMBOLS, finish, upper_bars
from calibrate.report.tables import at_the_same_loss, compared, config_differences, provenance
from calibrate.schema import RunConfig
from skip_softmax.thresholds.types import Phase

# Per run: name, colour, dash and symbol.
_RUNS = tuple(zip("AB", (ACCENT, INK), DASHES, SYMBOLS, strict=False))


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
        limits = {name for run in runs for name in run["budget"]["losses"]}
        shown = {name for run in runs for task in run["tasks"].values() for name in task["losses"]}
        names = [name for name in LOSSES if name in limits & shown]
        drawn |= {f"tasks-{name}": compared_tasks(runs, name) for name in names}
    html = render(
        "comparison.html.j2",
        runs,
        drawn,
        verdicts=[sentence(run).partition(": ") for run in runs],
        phases=phases,
        tables={
            "numbers": compared(runs),
            "same": at_the_same_loss(runs),
            "config": config_differences([run["provenance"]["config"] for run in runs]),
            "a": provenance(runs[0]),
            "b": provenance(runs[1]),
        },
    )
    return write_output(output or one[0] / "comparison.html", html)


def compared_fronts(runs: Sequence[Findings]) -> go.Figure:
    """The fronts of two runs, with what each chose."""
    figure, loss = go.Figure(), LOSSES[FINEST]
    for (name, colour, dash, symbol), found in zip(_RUNS, runs, strict=True):
        figure.add_scatter(
            x=[point["speedup"] for point in found["front"]],
            y=[point["losses"][FINEST] for point in found["front"]],
            mode="lines+markers",
            name=f"{name}: front",
            line={"color": colour, "dash": dash, "width": 1.6},
            marker={"symbol": symbol, "size": 7, "color": colour},
            hovertemplate=(
                f"{name}<br>%{{x:.2f}}×<br>{loss.title} %{{y:.2e}} {loss.unit}<extra></extra>"
            ),
        )
        add_chosen(figure, found, f"{name}: ", colour)
    times = "predicted attention speed-up [×]"
    return finish(figure, "Fronts of both runs", times, loss.axis, 420, log_y=True)


def compared_layers(runs: Sequence[Findings], phase: Phase) -> go.Figure:
    """Tiles skipped per layer in two runs."""
    figure = go.Figure()
    for (name, colour, dash, symbol), found in zip(_RUNS, runs, strict=True):
        shares = [percent(share) for share in found["phases"][phase]["layer_sparsity"]]
        figure.add_scatter(
            x=list(range(len(shares))),
            y=shares,
            mode="lines+markers",
            name=name,
            line={"color": colour, "dash": dash, "width": 1.4},
            marker={"symbol": symbol, "size": 6, "color": colour},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.1f}} %<extra></extra>",
        )
    figure.update_yaxes(range=[0, 102])
    title = f"Tiles skipped per layer in both runs, {phase}"
    return finish(figure, title, "layer", "tiles skipped [%]", 300)


def compared_tasks(runs: Sequence[Findings], loss: str = FINEST) -> go.Figure:
    """Held-out loss by task of two runs, with upper confidence bounds."""
    figure, about = go.Figure(), LOSSES[loss]
    for (name, colour, _, symbol), found in zip(_RUNS, runs, strict=True):
        showing = {name: task for name, task in found["tasks"].items() if loss in task["losses"]}
        bounds = [task["losses"][loss] for task in showing.values()]
        figure.add_scatter(
            x=[bound["mean"] for bound in bounds],
            y=list(showing),
            mode="markers",
            name=name,
            marker={"symbol": symbol, "size": 10, "color": colour},
            error_x=upper_bars(bounds, colour),
            hovertemplate=f"{name}, %{{y}}: %{{x:.3g}} {about.unit}<extra></extra>",
        )
    figure.update_xaxes(rangemode="tozero", exponentformat="e")
    tasks = {name for run in runs for name, task in run["tasks"].items() if loss in task["losses"]}
    title = f"Loss of each task in both runs: {about.title}"
    return finish(figure, title, about.axis, "", 130 + 36 * len(tasks))
