"""How all figures look: colours, dashes, shapes and axes.

Colours are CSS variables, so that a figure follows the reader's light or dark theme; `painted` puts real ones
in their place. Nothing is told by colour alone: lines differ in dash, points in shape.
"""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go

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


def painted(figure: go.Figure, palette: dict[str, str] = LIGHT) -> go.Figure:
    """The figure with a palette's colours, to show outside of the report.

    Args:
        figure: from a function of this module.
        palette: `LIGHT` or `DARK`.
    """
    text = re.sub(r"var\(--(\w+)\)", lambda match: palette[match[1]], figure.to_json())
    return go.Figure(json.loads(text)).update_layout(paper_bgcolor=palette["paper"])


def finish(
    figure: go.Figure, x: str, y: str, height: int, *, legend: bool = True, top: int = 16
) -> go.Figure:
    """The look that all figures share."""
    figure.update_layout(
        template="none",
        title=None,
        height=height,
        dragmode=False,
        showlegend=legend,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        margin={"l": 8, "r": 12, "t": top, "b": 8},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        hoverlabel={
            "bgcolor": PAPER,
            "bordercolor": MUTED,
            "font": {"color": INK, "size": 12},
            "align": "left",
        },
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
    return figure


def percent(share: float) -> float:
    """Percent of a share, to six significant digits."""
    return six(100 * share)


def six(value: float) -> float:
    """Six significant digits, as in the findings."""
    return float(f"{value:.6g}")
