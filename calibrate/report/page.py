"""`report.html`: one self-contained file to decide from, drawn from the findings of a run.

The page holds its numbers once, as a JSON block; figures are plotly specifications made from the same
numbers, and tables are written from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import optuna
import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from calibrate.errors import UserError
from calibrate.report import figures
from calibrate.report import style as look
from calibrate.report.findings import Findings, findings
from calibrate.report.tables import loss_text, percent_text, tables_of
from calibrate.schema import RunConfig
from calibrate.search.study import read_study
from skip_softmax.thresholds.yaml_file import write_text_atomically

_TRIALS_FOR_IMPORTANCE = 8


def write_report(folder: Path, config: RunConfig, output: Path | None = None) -> Path:
    """Writes the report of one run.

    Args:
        folder: the run folder.
        config: its config.
        output: the file; None: `report.html` in the folder.

    Returns:
        The file's path.

    Raises:
        UserError: the folder lacks statistics, or the file cannot be written.
    """
    found = findings(folder, config)
    study = read_study(config, folder) if found["trials"] else None
    drawn = _figures(found, study)
    html = render(
        "report.html.j2",
        [found],
        drawn,
        verdict=sentence(found).partition(": "),
        keys=_keys(found),
        tables=tables_of(found),
        start={phase: figures.slider_start(found, phase) for phase in found["phases"]},
        config=yaml.safe_dump(found["provenance"]["config"], sort_keys=False),
    )
    return write(html, output or folder / "report.html")


def sentence(found: Findings) -> str:
    """Verdict and budget in one sentence."""
    verdict, budget = found["verdict"]["passed"], found["budget"]
    if verdict is None:
        return (
            f"Not proven: {found['verdict']['reason']}. The budget is {budget['kl']:g} nats/token at "
            f"{percent_text(budget['confidence'])} confidence; until a setting is proven, run dense."
        )
    row = found["heldout"]["searched"]
    kl = row["kl"]
    skipped = " and ".join(
        f"{percent_text(share)} of {phase} tiles" for phase, share in row["sparsity"].items()
    )
    cost = (
        f"a loss of {loss_text(kl['mean'])} nats/token, at most {loss_text(kl['upper'])} with "
        f"{percent_text(kl['confidence'])} confidence, against a budget of {budget['kl']:g}"
    )
    if budget["score_drop"] is not None:
        drop = row["score_drop"]
        cost += (
            f", and a score drop of {drop['mean']:.2f} points, at most {drop['upper']:.2f}, "
            f"against a budget of {budget['score_drop']:g}"
        )
    if verdict:
        return (
            f"Passed: skips {skipped} for {cost}, measured on {row['prompts']} held-out prompts; "
            f"attention is predicted to run {row['speedup']:.2f}× as fast."
        )
    return (
        f"Failed: {found['verdict']['reason']}. The last candidate skips {skipped} for {cost}; "
        "the file says dense."
    )


def _figures(found: Findings, study: optuna.Study | None) -> dict[str, go.Figure]:
    """All figures that this run has the numbers for, by the id of their place in the page."""
    drawn: dict[str, go.Figure] = {}
    if study is not None:
        drawn["tradeoff"] = figures.tradeoff(found, study)
        drawn["history"] = figures.history(found, study)
        if len({trial["kl"] for trial in found["trials"]}) >= _TRIALS_FOR_IMPORTANCE:
            drawn["importances"] = figures.importances(study)
    if any(numbers["sensitivity"] for numbers in found["phases"].values()):
        drawn["sensitivity"] = figures.sensitivity(found)
    for phase, numbers in found["phases"].items():
        if numbers["curve"]["scale_factor"]:
            drawn[f"curves-{phase}"] = figures.curves(found, phase)
            drawn[f"layers-{phase}"] = figures.layers_at(found, phase)
        if _chosen(found, phase):
            drawn[f"map-{phase}"] = figures.skip_map(found, phase)
        if numbers["speed"] is not None:
            drawn[f"speed-{phase}"] = figures.speed(found, phase)
    if found["heldout"]["searched"] is not None:
        drawn["lengths"] = figures.by_length(found)
    if found["tasks"]:
        drawn["tasks"] = figures.by_task(found)
    return drawn


def _chosen(found: Findings, phase: str) -> bool:
    return found["phases"][phase]["scale_factor"] is not None


def _keys(found: Findings) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, what it is compared with."""
    row, budget = found["heldout"]["searched"], found["budget"]
    if row is None:
        return [("Budget", f"{budget['kl']:g}", "nats/token")]
    keys = [("Loss, upper bound", loss_text(row["kl"]["upper"]), f"of {budget['kl']:g} nats/token")]
    if budget["score_drop"] is not None:
        keys.append(
            (
                "Score drop, upper bound",
                f"{row['score_drop']['upper']:.2f}",
                f"of {budget['score_drop']:g} points",
            )
        )
    keys += [
        (f"{phase} skipped".capitalize(), percent_text(share), "of tiles")
        for phase, share in row["sparsity"].items()
    ]
    uniform = found["heldout"]["uniform"]
    against = (
        "predicted" if uniform is None else f"predicted; one number: {uniform['speedup']:.2f}×"
    )
    return [*keys, ("Attention", f"{row['speedup']:.2f}×", against)]


def render(
    template: str, runs: Sequence[Findings], drawn: dict[str, go.Figure], **values: Any
) -> str:
    """One HTML file of a template, the findings and the figures; everything in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calibrate.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    block = json.dumps(
        {
            "runs": list(runs),
            "figures": {name: json.loads(figure.to_json()) for name, figure in drawn.items()},
        },
        allow_nan=False,
        separators=(",", ":"),
    )
    return environment.get_template(template).render(
        runs=runs,
        figures=list(drawn),
        light=look.LIGHT,
        dark=look.DARK,
        plotly=get_plotlyjs(),
        # Inside a script element only `<` could end it.
        block=block.replace("<", "\\u003c"),
        **values,
    )


def write(html: str, path: Path) -> Path:
    """Writes the page so that a reader sees the old one or the new one."""
    try:
        write_text_atomically(path, html)
    except OSError as error:
        raise UserError(
            f"`{path}` cannot be written ({error}); choose another file with -o"
        ) from None
    return path
