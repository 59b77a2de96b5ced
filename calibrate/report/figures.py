"""The report's figures, one function each: from `findings` (and the study) to a plotly figure."""

from __future__ import annotations

import math
import warnings
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial
from plotly.subplots import make_subplots

from calibrate.report.findings import Findings
from calibrate.report.style import (
    ACCENT,
    DASHES,
    INK,
    LOW,
    MUTED,
    PAPER,
    SYMBOLS,
    finish,
    percent,
    six,
)
from skip_softmax.thresholds.types import Phase

_CELLS_WITH_TEXT = 640


def tradeoff(found: Findings, study: optuna.Study) -> go.Figure:
    """Loss against predicted speed-up: every trial, the front, the chosen setting, the uniform baseline."""
    figure = optuna.visualization.plot_pareto_front(
        study, targets=_speedup_and_loss, target_names=["speed-up", "loss"]
    )
    about: dict[tuple[float, float], list[str]] = {}
    for trial in found["trials"]:
        about.setdefault((trial["speedup"], trial["kl"]), []).append(_trial_text(trial))
    looks = (
        ("over the budget", {"color": MUTED, "symbol": "x-thin-open", "size": 8}),
        (
            "within the budget",
            {"color": PAPER, "symbol": "circle", "size": 8, "line": {"color": INK, "width": 1.2}},
        ),
        (
            "within the budget, not beaten",
            {"color": INK, "symbol": "circle", "size": 8, "line": {"width": 0}},
        ),
    )
    # Optuna's traces, in this order; the first is missing when no trial carries a constraint.
    for trace, (name, marker) in zip(figure.data[::-1], looks[::-1], strict=False):
        x, y = [six(value) for value in trace.x], [six(value) for value in trace.y]
        text = ["<br>".join(about[point]) for point in zip(x, y, strict=True)]
        trace.marker = marker
        trace.update(
            x=x,
            y=y,
            text=text,
            name=name,
            showlegend=bool(x),
            hovertemplate="%{text}<extra></extra>",
        )
    best = found["front"]
    figure.add_scatter(
        x=[p["speedup"] for p in best],
        y=[p["kl"] for p in best],
        mode="lines",
        name="front",
        line={"color": MUTED, "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    _add_uniform(figure, found)
    add_chosen(figure, found)
    _add_budget(figure, found, "left")
    figure.update_yaxes(type="log", exponentformat="e", dtick=1)
    return finish(figure, "predicted attention speed-up [×]", "loss: KL to dense [nats/token]", 480)


def skip_map(found: Findings, phase: Phase) -> go.Figure:
    """Share of tiles skipped per layer and head at the chosen setting; × marks a layer that is dense."""
    numbers = found["phases"][phase]
    shares = [[percent(value) for value in row] for row in numbers["sparsity"]]
    factors, mass = numbers["scale_factor"], numbers["layer_dropped_mass"]
    layers, heads = len(shares), len(shares[0])
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            zmin=0,
            zmax=100,
            xgap=1,
            ygap=1,
            colorscale=[[0, LOW], [1, ACCENT]],
            customdata=[[[f, percent(mass[i])] for f in row] for i, row in enumerate(factors)],
            hovertemplate=(
                "layer %{y}, head %{x}<br>%{z:.1f} % of tiles skipped<br>"
                "scale factor %{customdata[0]:g} tokens<br>"
                "layer drops %{customdata[1]:.3g} % of the softmax mass<extra></extra>"
            ),
            texttemplate="%{z:.0f}" if layers * heads <= _CELLS_WITH_TEXT and heads <= 16 else None,
            textfont={"color": INK, "size": 9},
            colorbar={
                "orientation": "h",
                "thickness": 8,
                "len": 0.7,
                "y": 1,
                "yanchor": "bottom",
                "outlinewidth": 0,
                "title": {"text": "tiles skipped [%]", "side": "top"},
            },
        )
    )
    dense = [layer for layer, row in enumerate(factors) if max(row) == 0]
    figure.add_scatter(
        x=[-1] * len(dense),
        y=dense,
        mode="markers",
        marker={"symbol": "x", "size": 6, "color": MUTED},
        hovertemplate="layer %{y} is dense<extra></extra>",
    )
    left = -1.5 if dense else -0.5
    columns, rows = (
        range(0, heads, 1 if heads <= 16 else 8),
        range(0, layers, 1 if layers <= 40 else 4),
    )
    figure.update_xaxes(showgrid=False, range=[left, heads - 0.5], tickvals=list(columns))
    figure.update_yaxes(showgrid=False, range=[layers - 0.5, -0.5], tickvals=list(rows))
    kind = "query head" if phase == "prefill" else "KV head"
    return finish(figure, kind, "layer", min(170 + max(layers * 15, 120), 900), legend=False, top=8)


def sensitivity(found: Findings) -> go.Figure:
    """Measured loss of each layer when it alone skips."""
    figure = go.Figure()
    for index, (phase, numbers) in enumerate(found["phases"].items()):
        rows = numbers["sensitivity"]
        figure.add_scatter(
            x=[row["layer"] for row in rows],
            y=[row["kl"] for row in rows],
            mode="markers",
            name=phase,
            marker={"symbol": SYMBOLS[index], "size": 8, "color": (ACCENT, INK)[index]},
            customdata=[[row["scale_factor"], percent(row["sparsity"])] for row in rows],
            hovertemplate=(
                f"{phase}, layer %{{x}}<br>KL %{{y:.2e}} nats/token<br>%{{customdata[1]:.1f}} % of its tiles "
                "skipped<br>scale factor %{customdata[0]:.4g} tokens<extra></extra>"
            ),
        )
    layers = len(next(iter(found["phases"].values()))["curve"]["layer_sparsity"])
    figure.update_xaxes(tickformat="d", dtick=1 if layers < 13 else 5)
    figure.update_yaxes(type="log", exponentformat="e", dtick=1)
    return finish(figure, "layer", "loss when it alone skips [nats/token]", 320)


def curves(found: Findings, phase: Phase) -> go.Figure:
    """Sparsity by length, and dropped mass, against one scale factor; the dotted line is the slider's."""
    numbers = found["phases"][phase]["curve"]
    x = numbers["scale_factor"]
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.6, 0.4])
    lengths = [*zip(numbers["lengths"], numbers["length_sparsity"], strict=True)]
    for index, (length, shares) in enumerate(lengths):
        figure.add_scatter(
            x=x,
            y=[percent(share) for share in shares],
            mode="lines",
            name=f"{length} tokens",
            line={"color": MUTED, "dash": DASHES[1 + index % 5], "width": 1.4},
            hovertemplate=f"{length} tokens: %{{y:.1f}} %<extra></extra>",
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=x,
        y=[percent(share) for share in numbers["sparsity"]],
        mode="lines",
        name="all lengths",
        line={"color": ACCENT, "width": 2.4},
        hovertemplate="all: %{y:.1f} % skipped<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=[percent(mass) for mass in numbers["dropped_mass"]],
        mode="lines",
        showlegend=False,
        line={"color": ACCENT, "width": 2.4},
        hovertemplate="%{y:.3g} % of the mass dropped<extra></extra>",
        row=2,
        col=1,
    )
    start = x[slider_start(found, phase)]
    figure.add_shape(
        type="line",
        x0=start,
        x1=start,
        y0=0,
        y1=1,
        xref="x",
        yref="paper",
        line={"color": INK, "width": 1.4, "dash": "dot"},
    )
    used = _used(found, phase)
    if used:
        figure.add_shape(
            type="rect",
            x0=min(used),
            x1=max(used),
            y0=0,
            y1=1,
            xref="x",
            yref="paper",
            layer="below",
            fillcolor=LOW,
            line={"color": MUTED, "width": 0.8},
        )
    finish(figure, "", "tiles skipped [%]", 420)
    figure.update_xaxes(type="log", dtick=1, exponentformat="none")
    figure.update_xaxes(title={"text": "scale factor [tokens]"}, row=2, col=1)
    figure.update_yaxes(
        type="log", exponentformat="e", nticks=5, title={"text": "mass dropped [%]"}, row=2, col=1
    )
    return figure.update_layout(hovermode="x")


def slider_start(found: Findings, phase: Phase) -> int:
    """Index of the curve's scale factor that is nearest to the middle one that the setting uses."""
    curve, used = found["phases"][phase]["curve"]["scale_factor"], _used(found, phase)
    if not used or not curve:
        return len(curve) // 2
    middle = sorted(used)[len(used) // 2]
    return min(range(len(curve)), key=lambda index: abs(math.log(curve[index] / middle)))


def layers_at(found: Findings, phase: Phase) -> go.Figure:
    """Tiles skipped per layer where the slider starts: one scale factor for all layers."""
    numbers, index = found["phases"][phase]["curve"], slider_start(found, phase)
    shares = [percent(row[index]) for row in numbers["layer_sparsity"]]
    figure = go.Figure(
        go.Bar(
            x=list(range(len(shares))),
            y=shares,
            marker={"color": ACCENT},
            hovertemplate="layer %{x}: %{y:.1f} % skipped<extra></extra>",
        )
    )
    figure.update_yaxes(range=[0, 100])
    return finish(figure, "layer", "tiles skipped [%]", 220, legend=False)


def by_length(found: Findings) -> go.Figure:
    """Target sparsity (from the calibration prompts) against what held-out prompts gave."""
    figure = go.Figure()
    for index, (phase, numbers) in enumerate(found["phases"].items()):
        rows = numbers["by_length"]["searched"] or {}
        lengths = sorted(rows, key=int)
        for kind, opened in (("target", "-open"), ("achieved", "")):
            figure.add_scatter(
                x=[int(length) for length in lengths],
                y=[percent(rows[n][kind]) for n in lengths],
                mode="markers+lines",
                name=f"{phase}, {kind}",
                marker={
                    "symbol": SYMBOLS[index] + opened,
                    "size": 9,
                    "color": (ACCENT, INK)[index],
                },
                line={
                    "color": (ACCENT, INK)[index],
                    "dash": "dot" if kind == "target" else "solid",
                    "width": 1.4,
                },
                hovertemplate=f"{phase}, %{{x}} tokens<br>{kind} %{{y:.1f}} %<extra></extra>",
            )
    ticks = sorted(
        {int(n) for p in found["phases"].values() for n in p["by_length"]["searched"] or {}}
    )
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, "prompt length [tokens]", "tiles skipped [%]", 320)


def by_task(found: Findings) -> go.Figure:
    """Loss of each task on the held-out prompts: every prompt, the mean, the upper confidence bound."""
    tasks = found["tasks"]
    figure = go.Figure()
    figure.add_scatter(
        x=[value for task in tasks.values() for value in task["kl"]["values"]],
        y=[name for name, task in tasks.items() for _ in task["kl"]["values"]],
        mode="markers",
        name="one prompt",
        marker={"symbol": "line-ns-open", "size": 12, "color": MUTED},
        hovertemplate="%{y}, one prompt<br>KL %{x:.2e} nats/token<extra></extra>",
    )
    bounds = [task["kl"] for task in tasks.values()]
    figure.add_scatter(
        x=[bound["mean"] for bound in bounds],
        y=list(tasks),
        mode="markers",
        name="mean, with upper bound",
        marker={"symbol": "diamond", "size": 11, "color": ACCENT},
        error_x={
            "type": "data",
            "symmetric": False,
            "color": ACCENT,
            "thickness": 2,
            "width": 6,
            "array": [0.0 if b["upper"] is None else six(b["upper"] - b["mean"]) for b in bounds],
            "arrayminus": [0.0] * len(bounds),
        },
        customdata=[
            [bound["upper"], task["prompts"]]
            for bound, task in zip(bounds, tasks.values(), strict=True)
        ],
        hovertemplate=(
            "%{y}, %{customdata[1]} prompts<br>mean KL %{x:.2e} nats/token<br>"
            "upper bound %{customdata[0]:.2e}<extra></extra>"
        ),
    )
    limit = found["budget"]["kl"]
    figure.add_vline(x=limit, line={"color": INK, "width": 1, "dash": "dash"})
    figure.add_annotation(
        x=limit,
        y=1,
        yref="paper",
        text=f"budget {limit:g}",
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
        font={"color": INK},
    )
    figure.update_xaxes(rangemode="tozero", exponentformat="e")
    return finish(figure, "loss: KL to dense [nats/token]", "", 150 + 46 * len(tasks), top=28)


def speed(found: Findings, phase: Phase) -> go.Figure:
    """Measured kernel speed-up against sparsity, its limits, and what is predicted for the chosen setting."""
    numbers = found["phases"][phase]["speed"]
    measured, law, predicted = numbers["measured"], numbers["law"], numbers["predicted"]
    grid = [step / 50 for step in range(51)]
    figure = go.Figure()
    figure.add_scatter(
        x=[100 * s for s in grid],
        y=[six(2 / (2 - s)) for s in grid],
        mode="lines",
        name="bound 2/(2−s)",
        line={"color": INK, "dash": "dash", "width": 1.4},
        hovertemplate="bound %{y:.2f}× at %{x:.0f} %<extra></extra>",
    )
    if phase == "prefill" and law is not None:
        cost, overhead = law["skipped_tile_cost"], law["overhead"]
        figure.add_scatter(
            x=[100 * s for s in grid],
            y=[six(1 / (1 + overhead - s * (1 - cost))) for s in grid],
            mode="lines",
            name="fit 1/(1+o−s(1−K/D))",
            line={"color": MUTED, "dash": "dot", "width": 1.6},
            hovertemplate="fit %{y:.2f}× at %{x:.0f} %<extra></extra>",
        )
    figure.add_scatter(
        x=[percent(share) for share in measured["sparsity"]],
        y=measured["speedup"],
        mode="markers+lines",
        name=f"measured, {numbers['kv_len']} tokens",
        line={"color": ACCENT, "width": 1.6},
        marker={"symbol": "circle", "size": 8, "color": ACCENT},
        hovertemplate="measured %{y:.2f}× at %{x:.0f} %<extra></extra>",
    )
    if predicted is not None:
        figure.add_scatter(
            x=[percent(predicted["sparsity"])],
            y=[predicted["speedup"]],
            mode="markers",
            name="chosen, predicted",
            marker={
                "symbol": "star",
                "size": 16,
                "color": PAPER,
                "line": {"color": INK, "width": 1.6},
            },
            hovertemplate="chosen: %{x:.1f} % of tiles skipped<br>%{y:.3f}× predicted<extra></extra>",
        )
    figure.update_xaxes(range=[0, 102])
    return finish(figure, "tiles skipped [%]", "speed-up over the dense kernel [×]", 340)


def history(found: Findings, study: optuna.Study) -> go.Figure:
    """Loss of each trial in the order they were made (Optuna's plot)."""
    figure = optuna.visualization.plot_optimization_history(
        study, target=lambda trial: float(trial.values[0]), target_name="loss"
    )
    for trace, (name, symbol) in zip(
        figure.data, (("trial", "circle"), ("over the budget", "x-thin-open")), strict=False
    ):
        trace.update(
            y=[six(value) for value in trace.y],
            name=name,
            showlegend=bool(trace.y),
            marker={"color": INK if symbol == "circle" else MUTED, "symbol": symbol, "size": 7},
            hovertemplate="trial %{x}<br>KL %{y:.2e} nats/token<extra></extra>",
        )
    _add_budget(figure, found, "right")
    figure.update_yaxes(type="log", exponentformat="e", dtick=1)
    return finish(figure, "trial", "loss [nats/token]", 300)


def importances(study: optuna.Study) -> go.Figure:
    """Which search parameters decide the loss (Optuna's plot)."""
    with warnings.catch_warnings():
        # The evaluator reminds that it takes small values for good ones, which is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        figure = optuna.visualization.plot_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
            target=lambda trial: float(trial.values[0]),
            target_name="loss",
        )
    figure.update_traces(marker={"color": INK}, textfont={"color": INK})
    shares = figure.data[0].x
    figure.update_xaxes(range=[0, 1.2 * max(shares)])  # room for the numbers beside the bars
    return finish(figure, "share of the loss's variation explained", "", 360, legend=False)


def _add_budget(figure: go.Figure, found: Findings, side: str) -> None:
    """The budget as a line across a figure whose loss axis is y and logarithmic."""
    limit = found["budget"]["kl"]
    figure.add_hline(y=limit, line={"color": INK, "width": 1, "dash": "dash"})
    figure.add_annotation(
        x=0 if side == "left" else 1,
        xref="x domain",
        xanchor=side,
        y=math.log10(limit),
        yanchor="bottom",
        showarrow=False,
        text=f"budget {limit:g}",
        font={"color": INK},
    )


def _add_uniform(figure: go.Figure, found: Findings) -> None:
    """Trials with one number per phase, and the held-out loss of the best of them."""
    rows = [trial for trial in found["trials"] if trial["name"] == "uniform"]
    figure.add_scatter(
        x=[row["speedup"] for row in rows],
        y=[row["kl"] for row in rows],
        mode="markers",
        name="one number per phase",
        marker={"symbol": "square-open", "size": 14, "color": INK, "line": {"width": 1.6}},
        text=[_trial_text(row) for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )
    uniform = found["heldout"]["uniform"]
    if uniform is not None:
        figure.add_trace(_heldout(uniform, "one number, held-out", "square", INK))


def add_chosen(figure: go.Figure, found: Findings, prefix: str = "", colour: str = ACCENT) -> None:
    """The chosen trial on the search prompts and on the held-out ones."""
    for trial in found["trials"]:
        if trial["chosen"]:
            figure.add_scatter(
                x=[trial["speedup"]],
                y=[trial["kl"]],
                mode="markers",
                name=f"{prefix}chosen",
                marker={"symbol": "star-open", "size": 18, "color": colour, "line": {"width": 2}},
                text=[_trial_text(trial)],
                hovertemplate="chosen<br>%{text}<extra></extra>",
            )
    searched = found["heldout"]["searched"]
    if searched is not None:
        figure.add_trace(_heldout(searched, f"{prefix}chosen, held-out", "diamond", colour))


def _heldout(row: dict[str, Any], name: str, symbol: str, colour: str) -> go.Scatter:
    """Mean held-out loss, with a bar up to the upper confidence bound."""
    kl = row["kl"]
    return go.Scatter(
        x=[row["speedup"]],
        y=[kl["mean"]],
        mode="markers",
        name=name,
        marker={"symbol": symbol, "size": 10, "color": colour},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [six(kl["upper"] - kl["mean"])],
            "arrayminus": [0.0],
            "color": colour,
            "thickness": 2,
            "width": 6,
        },
        hovertemplate=(
            f"{name}: {row['prompts']} prompts<br>mean KL {kl['mean']:.2e}, "
            f"upper bound {kl['upper']:.2e} nats/token<br>{row['speedup']:.2f}× predicted<extra></extra>"
        ),
    )


def _trial_text(trial: dict[str, Any]) -> str:
    shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in trial["sparsity"].items())
    kind = {"uniform": "one number per phase", "analytic": "analytic start"}.get(
        trial["name"], "search"
    )
    return (
        f"trial {trial['number']} ({kind})<br>KL {trial['kl']:.2e} nats/token<br>"
        f"{trial['speedup']:.2f}× predicted<br>skips {shares}"
    )


def _used(found: Findings, phase: Phase) -> list[float]:
    """The scale factors of the layers and heads that are not dense."""
    rows = found["phases"][phase]["scale_factor"] or []
    return [factor for row in rows for factor in row if factor > 0]


def _speedup_and_loss(trial: FrozenTrial) -> tuple[float, float]:
    return 1 / trial.values[1], trial.values[0]
