"""The figures of a run: one method each, from its findings and its study to a plotly figure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial
from plotly.subplots import make_subplots

from calibrate.errors import UserError
from calibrate.loss.losses import FINEST, LOSSES
from calibrate.report.findings import Findings, percent, six
from calibrate.report.style import (
    ACCENT,
    DASHES,
    INK,
    LIGHT,
    LOW,
    MUTED,
    PAPER,
    SYMBOLS,
    finish,
    painted,
    upper_bars,
)
from calibrate.search.study import losses_of
from skip_softmax.thresholds.types import Phase

_CELLS_WITH_TEXT = 640
_TRIALS_FOR_IMPORTANCE = 8


class Figures:
    """The figures of one run, for a notebook or for the report.

    Args:
        found: what `findings` read from the run folder.
        study: the run's study; None: the search's figures cannot be drawn.
        palette: `style.LIGHT` or `style.DARK`; None: the CSS variables of the report.
    """

    def __init__(
        self,
        found: Findings,
        study: optuna.Study | None = None,
        palette: dict[str, str] | None = LIGHT,
    ) -> None:
        self._found = found
        self._study = study
        self._palette = palette

    @property
    def available(self) -> dict[str, go.Figure]:
        """Every figure that this run has the numbers for, by the id of its place in the report."""
        found = self._found
        drawn: dict[str, go.Figure] = {}
        if self._study is not None:
            drawn |= {"tradeoff": self.tradeoff(), "history": self.history()}
            if (
                len({trial["losses"][FINEST] for trial in found["trials"]})
                >= _TRIALS_FOR_IMPORTANCE
            ):
                drawn["importances"] = self.importances()
        if any(numbers["sensitivity"] for numbers in found["phases"].values()):
            drawn["sensitivity"] = self.sensitivity()
        for phase, numbers in found["phases"].items():
            if numbers["curve"]["scale_factor"]:
                drawn[f"curves-{phase}"] = self.curves(phase)
                drawn[f"layers-{phase}"] = self.layers_at(phase)
            if numbers["scale_factor"] is not None:
                drawn[f"map-{phase}"] = self.skip_map(phase)
            if numbers["speed"] is not None:
                drawn[f"speed-{phase}"] = self.speed(phase)
        if found["heldout"]["searched"] is not None:
            drawn["lengths"] = self.by_length()
        if found["tasks"]:
            shown = {name for task in found["tasks"].values() for name in task["losses"]}
            limits = [name for name in found["budget"]["losses"] if name in shown]
            drawn |= {f"tasks-{name}": self.by_task(name) for name in limits}
        return drawn

    def tradeoff(self) -> go.Figure:
        """Loss against predicted speed-up: trials, front, the chosen setting and one number per phase."""
        found = self._found
        figure = optuna.visualization.plot_pareto_front(
            self._searched(), targets=_speedup_and_loss, target_names=["speed-up", "loss"]
        )
        about: dict[tuple[float, float], list[str]] = {}
        for trial in found["trials"]:
            point = trial["speedup"], trial["losses"][FINEST]
            about.setdefault(point, []).append(_trial_text(trial))
        markers: tuple[tuple[str, dict[str, Any]], ...] = (
            ("over the budget", {"color": MUTED, "symbol": "x-thin-open"}),
            ("within the budget", {"color": PAPER, "line": {"color": INK, "width": 1.2}}),
            ("within the budget, not beaten", {"color": INK, "line": {"width": 0}}),
        )
        # Optuna's traces, in this order; the first is missing when no trial carries a constraint.
        for trace, (name, marker) in zip(figure.data[::-1], markers[::-1], strict=False):
            x, y = [six(value) for value in trace.x], [six(value) for value in trace.y]
            text = ["<br>".join(about[point]) for point in zip(x, y, strict=True)]
            trace.marker = {"symbol": "circle", "size": 8, **marker}
            trace.update(x=x, y=y, text=text, name=name, showlegend=bool(x))
            trace.hovertemplate = "%{text}<extra></extra>"
        figure.add_scatter(
            x=[point["speedup"] for point in found["front"]],
            y=[point["losses"][FINEST] for point in found["front"]],
            mode="lines",
            line={"color": MUTED, "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
        _add_uniform(figure, found)
        add_chosen(figure, found)
        _add_budget(figure, found, "left")
        return self._finish(
            figure,
            "Loss against predicted speed-up of every trial",
            "predicted attention speed-up [×]",
            LOSSES[FINEST].axis,
            480,
            log_y=True,
        )

    def skip_map(self, phase: Phase) -> go.Figure:
        """Share of tiles skipped per layer and head at the chosen setting; × marks a layer that is dense."""
        numbers = self._found["phases"][phase]
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
                texttemplate=(
                    "%{z:.0f}" if layers * heads <= _CELLS_WITH_TEXT and heads <= 16 else None
                ),
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
            x=[-0.5 - 0.05 * heads] * len(dense),
            y=dense,
            mode="markers",
            marker={"symbol": "x", "size": 6, "color": MUTED},
            hovertemplate="layer %{y} is dense<extra></extra>",
        )
        left = -0.5 - (0.1 * heads if dense else 0)
        columns = range(0, heads, 1 if heads <= 16 else 8)
        rows = range(0, layers, 1 if layers <= 40 else 4)
        figure.update_xaxes(showgrid=False, range=[left, heads - 0.5], tickvals=list(columns))
        figure.update_yaxes(showgrid=False, range=[layers - 0.5, -0.5], tickvals=list(rows))
        return self._finish(
            figure,
            f"Tiles skipped per layer and head, {phase}",
            "query head" if phase == "prefill" else "KV head",
            "layer",
            min(170 + max(layers * 15, 120), 900),
            legend=False,
            top=8,
        )

    def sensitivity(self) -> go.Figure:
        """Measured loss of each layer when only that layer skips."""
        figure = go.Figure()
        loss = LOSSES[FINEST]
        for index, (phase, numbers) in enumerate(self._found["phases"].items()):
            rows = numbers["sensitivity"]
            figure.add_scatter(
                x=[row["layer"] for row in rows],
                y=[row["loss"] for row in rows],
                mode="markers",
                name=phase,
                marker={"symbol": SYMBOLS[index], "size": 8, "color": (ACCENT, INK)[index]},
                customdata=[[row["scale_factor"], percent(row["sparsity"])] for row in rows],
                hovertemplate=(
                    f"{phase}, layer %{{x}}<br>{loss.title} %{{y:.2e}} {loss.unit}<br>"
                    "%{customdata[1]:.1f} % of its tiles skipped<br>"
                    "scale factor %{customdata[0]:.4g} tokens<extra></extra>"
                ),
            )
        layers = len(next(iter(self._found["phases"].values()))["curve"]["layer_sparsity"])
        figure.update_xaxes(tickformat="d", dtick=1 if layers < 13 else 5)
        title = "Loss of each layer when only that layer skips"
        return self._finish(figure, title, "layer", LOSSES[FINEST].axis, 320, log_y=True)

    def curves(self, phase: Phase) -> go.Figure:
        """Sparsity by length, and dropped mass, against one scale factor; the dotted line is the slider's."""
        numbers = self._found["phases"][phase]["curve"]
        x = numbers["scale_factor"]
        figure = make_subplots(
            rows=2, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.6, 0.4]
        )
        lines = [
            (f"{length} tokens", shares, {"color": MUTED, "dash": DASHES[1 + i % 5], "width": 1.4})
            for i, (length, shares) in enumerate(
                zip(numbers["lengths"], numbers["length_sparsity"], strict=True)
            )
        ]
        thick = {"color": ACCENT, "width": 2.4}
        for name, shares, line in (*lines, ("all lengths", numbers["sparsity"], thick)):
            figure.add_scatter(
                x=x,
                y=[percent(share) for share in shares],
                mode="lines",
                name=name,
                line=line,
                hovertemplate=f"{name}: %{{y:.1f}} % skipped<extra></extra>",
                row=1,
                col=1,
            )
        figure.add_scatter(
            x=x,
            y=[percent(mass) for mass in numbers["dropped_mass"]],
            mode="lines",
            showlegend=False,
            line=thick,
            hovertemplate="%{y:.3g} % of the mass dropped<extra></extra>",
            row=2,
            col=1,
        )
        whole = {"y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
        start = x[slider_start(self._found, phase)]
        dotted = {"color": INK, "width": 1.4, "dash": "dot"}
        figure.add_shape(type="line", x0=start, x1=start, line=dotted, **whole)
        used = _used(self._found, phase)
        if used:
            band = {"layer": "below", "fillcolor": LOW, "line": {"color": MUTED, "width": 0.8}}
            figure.add_shape(type="rect", x0=min(used), x1=max(used), **band, **whole)
        figure = self._finish(
            figure,
            f"Tiles skipped and softmax mass dropped by one scale factor, {phase}",
            "",
            "tiles skipped [%]",
            420,
        )
        figure.update_xaxes(type="log", dtick=1, exponentformat="none")
        return figure.update_layout(
            xaxis2_title_text="scale factor [tokens]",
            yaxis2={"type": "log", "exponentformat": "power", "nticks": 5},
            yaxis2_title_text="mass dropped [%]",
            hovermode="x",
        )

    def layers_at(self, phase: Phase) -> go.Figure:
        """Tiles skipped per layer where the slider starts: one scale factor for all layers."""
        index = slider_start(self._found, phase)
        rows = self._found["phases"][phase]["curve"]["layer_sparsity"]
        figure = go.Figure(
            go.Bar(
                x=list(range(len(rows))),
                y=[percent(row[index]) for row in rows],
                marker={"color": ACCENT},
                hovertemplate="layer %{x}: %{y:.1f} % skipped<extra></extra>",
            )
        )
        figure.update_yaxes(range=[0, 100])
        title = f"Tiles skipped per layer by one scale factor, {phase}"
        return self._finish(figure, title, "layer", "tiles skipped [%]", 220, legend=False)

    def by_length(self) -> go.Figure:
        """Target sparsity, from calibration and search prompts, against what held-out prompts gave."""
        figure = go.Figure()
        asked = self._found["target_sparsity"]
        named = {"target": "our histogram" if asked else "target", "achieved": "achieved"}
        ticks: set[int] = set()
        for index, (phase, numbers) in enumerate(self._found["phases"].items()):
            rows = numbers["by_length"]["searched"] or {}
            lengths = sorted(rows, key=int)
            ticks |= {int(length) for length in lengths}
            colour = (ACCENT, INK)[index]
            for kind, opened, dash in (("target", "-open", "dot"), ("achieved", "", "solid")):
                figure.add_scatter(
                    x=[int(length) for length in lengths],
                    y=[percent(rows[length][kind]) for length in lengths],
                    mode="markers+lines",
                    name=f"{phase}, {named[kind]}",
                    marker={"symbol": SYMBOLS[index] + opened, "size": 9, "color": colour},
                    line={"color": colour, "dash": dash, "width": 1.4},
                    hovertemplate=(
                        f"{phase}, %{{x}} tokens<br>{named[kind]} %{{y:.1f}} %<extra></extra>"
                    ),
                )
            if phase in asked:
                figure.add_hline(
                    y=percent(asked[phase]["target"]),
                    line={"color": colour, "width": 1, "dash": "dash"},
                    annotation_text=f"{phase}, target",
                )
        figure.update_xaxes(type="log", tickvals=sorted(ticks), ticktext=[*map(str, sorted(ticks))])
        figure.update_yaxes(rangemode="tozero")
        title = "Target and achieved sparsity by prompt length"
        return self._finish(figure, title, "prompt length [tokens]", "tiles skipped [%]", 320)

    def by_task(self, loss: str = FINEST) -> go.Figure:
        """Loss of each task that shows it on the held-out prompts: every prompt, the mean, the upper bound.

        Args:
            loss: one of `LOSSES`.
        """
        about = LOSSES[loss]
        tasks = {
            name: task for name, task in self._found["tasks"].items() if loss in task["losses"]
        }
        bounds = [task["losses"][loss] for task in tasks.values()]
        figure = go.Figure()
        figure.add_scatter(
            x=[value for bound in bounds for value in bound["values"]],
            y=[name for name, b in zip(tasks, bounds, strict=True) for _ in b["values"]],
            mode="markers",
            name="one prompt",
            marker={"symbol": "line-ns-open", "size": 12, "color": MUTED},
            hovertemplate=(
                f"%{{y}}, one prompt<br>{about.title} %{{x:.3g}} {about.unit}<extra></extra>"
            ),
        )
        figure.add_scatter(
            x=[bound["mean"] for bound in bounds],
            y=list(tasks),
            mode="markers",
            name="mean, with upper bound",
            marker={"symbol": "diamond", "size": 11, "color": ACCENT},
            error_x=upper_bars(bounds, ACCENT),
            text=[_bound_text(loss, bound) for bound in bounds],
            customdata=[len(bound["values"]) for bound in bounds],
            hovertemplate="%{y}, %{customdata} prompts<br>%{text}<extra></extra>",
        )
        limit = self._found["budget"]["losses"].get(loss)
        if limit is not None:
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
        title = f"Loss of each task with its upper confidence bound: {about.title}"
        return self._finish(figure, title, about.axis, "", 130 + 36 * len(tasks), top=28)

    def speed(self, phase: Phase) -> go.Figure:
        """Measured kernel speed-up against sparsity, its bound, and the prediction for the chosen setting."""
        numbers = self._found["phases"][phase]["speed"]
        measured, law, predicted = numbers["measured"], numbers["law"], numbers["predicted"]
        grid = [step / 50 for step in range(51)]
        figure = go.Figure()

        def add_line(name: str, kind: str, y: Sequence[float], line: dict[str, Any]) -> None:
            figure.add_scatter(
                x=[100 * share for share in grid],
                y=[six(value) for value in y],
                mode="lines",
                name=name,
                line=line,
                hovertemplate=f"{kind} %{{y:.2f}}× at %{{x:.0f}} %<extra></extra>",
            )

        bound = [2 / (2 - share) for share in grid]
        add_line("bound 2/(2−s)", "bound", bound, {"color": INK, "dash": "dash", "width": 1.4})
        if phase == "prefill" and law is not None:
            cost, overhead = law["skipped_tile_cost"], law["overhead"]
            fit = [1 / (1 + overhead - share * (1 - cost)) for share in grid]
            dotted = {"color": MUTED, "dash": "dot", "width": 1.6}
            add_line("fit 1/(1+o−s(1−K/D))", "fit", fit, dotted)
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
            line = {"color": INK, "width": 1.6}
            figure.add_scatter(
                x=[percent(predicted["sparsity"])],
                y=[predicted["speedup"]],
                mode="markers",
                name="chosen, predicted",
                marker={"symbol": "star", "size": 16, "color": PAPER, "line": line},
                hovertemplate=(
                    "chosen: %{x:.1f} % of tiles skipped<br>%{y:.3f}× predicted<extra></extra>"
                ),
            )
        figure.update_xaxes(range=[0, 102])
        title = f"Speed-up against tiles skipped, {phase}"
        times = "speed-up over the dense kernel [×]"
        return self._finish(figure, title, "tiles skipped [%]", times, 340)

    def history(self) -> go.Figure:
        """Loss of each trial in the order they were made (Optuna's plot)."""
        figure = optuna.visualization.plot_optimization_history(
            self._searched(), target=lambda trial: losses_of(trial)[FINEST], target_name="loss"
        )
        kinds = (("trial", "circle", INK), ("over the budget", "x-thin-open", MUTED))
        loss = LOSSES[FINEST]
        for trace, (name, symbol, colour) in zip(figure.data, kinds, strict=False):
            trace.update(
                y=[six(value) for value in trace.y],
                name=name,
                showlegend=bool(trace.y),
                marker={"color": colour, "symbol": symbol, "size": 7},
                hovertemplate=f"trial %{{x}}<br>{loss.title} %{{y:.2e}} {loss.unit}<extra></extra>",
            )
        _add_budget(figure, self._found, "right")
        return self._finish(
            figure, "Loss of each trial in order", "trial", loss.axis, 300, log_y=True
        )

    def importances(self) -> go.Figure:
        """Which search parameters decide the loss (Optuna's plot)."""
        with warnings.catch_warnings():
            # The evaluator points out that it takes small values for good ones, which is what we want.
            warnings.simplefilter("ignore", UserWarning)
            figure = optuna.visualization.plot_param_importances(
                self._searched(),
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: losses_of(trial)[FINEST],
                target_name="loss",
            )
        figure.update_traces(marker={"color": INK}, textfont={"color": INK})
        figure.update_xaxes(range=[0, 1.2 * max(figure.data[0].x)])  # room for the numbers
        title = "Importance of each search parameter for the loss"
        explained = "share of the loss's variation explained"
        return self._finish(figure, title, explained, "", 360, legend=False)

    def _searched(self) -> optuna.Study:
        if self._study is None:
            raise UserError(
                "this figure needs trials, but the run has none; finish its search first"
            )
        return self._study

    def _finish(self, figure: go.Figure, *texts: Any, **options: Any) -> go.Figure:
        finish(figure, *texts, **options)
        return figure if self._palette is None else painted(figure, self._palette)


def slider_start(found: Findings, phase: Phase) -> int:
    """Index of the curve's scale factor that is nearest to the middle one that the setting uses."""
    curve, used = found["phases"][phase]["curve"]["scale_factor"], _used(found, phase)
    if not used or not curve:
        return len(curve) // 2
    middle = sorted(used)[len(used) // 2]
    return min(range(len(curve)), key=lambda index: abs(math.log(curve[index] / middle)))


def add_chosen(figure: go.Figure, found: Findings, prefix: str = "", colour: str = ACCENT) -> None:
    """Adds the chosen trial, on the search prompts and on the held-out ones."""
    for trial in found["trials"]:
        if trial["chosen"]:
            figure.add_scatter(
                x=[trial["speedup"]],
                y=[trial["losses"][FINEST]],
                mode="markers",
                name=f"{prefix}chosen",
                marker={"symbol": "star-open", "size": 18, "color": colour, "line": {"width": 2}},
                text=[_trial_text(trial)],
                hovertemplate="chosen<br>%{text}<extra></extra>",
            )
    searched = found["heldout"]["searched"]
    if searched is not None:
        figure.add_trace(_heldout(searched, f"{prefix}chosen, held-out", "diamond", colour))


def _add_budget(figure: go.Figure, found: Findings, side: str) -> None:
    """The budget as a line across a figure whose loss axis is y and logarithmic."""
    limit = found["budget"]["losses"][FINEST]
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
        y=[row["losses"][FINEST] for row in rows],
        mode="markers",
        name="one number per phase",
        marker={"symbol": "square-open", "size": 14, "color": INK, "line": {"width": 1.6}},
        text=[_trial_text(row) for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )
    uniform = found["heldout"]["uniform"]
    if uniform is not None:
        figure.add_trace(_heldout(uniform, "one number, held-out", "square", INK))


def _heldout(row: dict[str, Any], name: str, symbol: str, colour: str) -> go.Scatter:
    """Mean held-out loss, with a bar up to the upper confidence bound."""
    bound = row["losses"][FINEST]
    return go.Scatter(
        x=[row["speedup"]],
        y=[bound["mean"]],
        mode="markers",
        name=name,
        marker={"symbol": symbol, "size": 10, "color": colour},
        error_y=upper_bars([bound], colour),
        hovertemplate=(
            f"{name}: {row['prompts']} prompts<br>{_bound_text(FINEST, bound)}<br>"
            f"{row['speedup']:.2f}× predicted<extra></extra>"
        ),
    )


def _bound_text(loss: str, bound: dict[str, Any]) -> str:
    about = LOSSES[loss]
    mean, upper = about.text(bound["mean"]), about.text(bound["upper"])
    return f"mean {about.title} {mean}, upper bound {upper} {about.unit}"


def _trial_text(trial: dict[str, Any]) -> str:
    shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in trial["sparsity"].items())
    kinds = {"uniform": "one number per phase", "analytic": "analytic start"}
    losses = (
        f"{LOSSES[name].title} {LOSSES[name].text(value)} {LOSSES[name].unit}<br>"
        for name, value in trial["losses"].items()
    )
    return (
        f"trial {trial['number']} ({kinds.get(trial['name'], trial['name'])})<br>{''.join(losses)}"
        f"{trial['speedup']:.2f}× predicted<br>skips {shares}"
    )


def _used(found: Findings, phase: Phase) -> list[float]:
    """The scale factors of the layers and heads that are not dense."""
    rows = found["phases"][phase]["scale_factor"] or []
    return [factor for row in rows for factor in row if factor > 0]


def _speedup_and_loss(trial: FrozenTrial) -> tuple[float, float]:
    return 1 / trial.values[1], losses_of(trial)[FINEST]
