"""What all figures look like: colours, dashes, symbols and axes.

Colours are CSS variables, so that a figure follows the reader's light or dark theme; `painted` replaces them
with real ones. Nothing is told by colour alone: lines differ in dash, points in symbol.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from calibrate.report.findings import six

ACCENT, INK, MUTED, LINE, PAPER, LOW = (
    f"var(--{name})" for name in ("accent", "ink", "muted", "line", "paper", "low")
)

LIGHT = {
    "accent": "#1f6fc4",
    "ink": "#1c2127",
    "muted": "#646e78",
    "line": "#dfe3e8",
    "paper": "#ffffff",
    "low": "#f3f6f9",
}
DARK = {
    "accent": "#5b9fe6",
    "ink": "#e4e8ec",
    "muted": "#98a2ac",
    "line": "#323940",
    "paper": "#14181d",
    "low": "#1d2329",
}

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def painted(figure: go.Figure, palette: dict[str, str]) -> go.Figure:
    """The figure in a palette's colours, to show outside of the report.

    Args:
        figure: a figure whose colours are CSS variables.
        palette: `LIGHT` or `DARK`.
    """
    text = re.sub(r"var\(--(\w+)\)", lambda match: palette[match[1]], figure.to_json())
    return go.Figure(json.loads(text)).update_layout(paper_bgcolor=palette["paper"])


def finish(
    figure: go.Figure,
    title: str,
    x: str,
    y: str,
    height: int,
    *,
    log_y: bool = False,
    legend: bool = True,
    top: int = 16,
) -> go.Figure:
    """Gives a figure the look that all share.

    Args:
        figure: what was drawn.
        title: what it shows.
        x: title of the x axis, with its unit.
        y: title of the y axis, with its unit.
        height: of the whole figure [pixels].
        log_y: whether the y axis is logarithmic.
        legend: whether a legend names the traces.
        top: free space above [pixels].
    """
    label = {"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK, "size": 12}}
    figure.update_layout(
        template="none",
        title={"text": title, "font": {"size": 14}, "x": 0, "xanchor": "left", "automargin": True},
        height=height,
        dragmode=False,
        showlegend=legend,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        margin={"l": 8, "r": 12, "t": top, "b": 44 if x else 8},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        hoverlabel={**label, "align": "left"},
    )
    axis = {
        "automargin": True,
        "gridcolor": LINE,
        "linecolor": LINE,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": MUTED},
        "fixedrange": True,
    }
    figure.update_xaxes(**axis, title={"text": x, "font": {"size": 12}, "standoff": 8})
    figure.update_yaxes(**axis, title={"text": y, "font": {"size": 12}, "standoff": 8})
    if log_y:
        figure.update_yaxes(type="log", tickformat=".0e", dtick=1)
    return figure


def upper_bars(bounds: Sequence[dict[str, Any]], colour: str) -> dict[str, Any]:
    """Error bars from each mean up to its upper confidence bound; none where the bound is not known."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if b["upper"] is None else six(b["upper"] - b["mean"]) for b in bounds],
        "arrayminus": [0.0] * len(bounds),
        "color": colour,
        "thickness": 2,
        "width": 6,
    }
