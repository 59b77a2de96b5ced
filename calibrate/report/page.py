"""`report.html`: one self-contained file to decide from, drawn from the findings of a run.

The page holds its numbers once, as a JSON block; figures are plotly specifications made from the same
numbers, and tables are written from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from calibrate.loss.losses import FINEST, LOSSES
from calibrate.record.files import write_output
from calibrate.report.figures import Figures, slider_start
from calibrate.report.findings import Findings, findings
from calibrate.report.style import DARK, LIGHT
from calibrate.report.tables import left_dense, percent_text, speedup_text, tables_of
from calibrate.schema import RunConfig
from calibrate.search.study import read_study
from calibrate.serving.bench import read_measured


def write_report(folder: Path, config: RunConfig, output: Path | None = None) -> Path:
    """Writes the report of one run.

    Args:
        folder: the run folder.
        config: its config.
        output: the file; None: `report.html` in the folder.

    Returns:
        The file's path.

    Raises:
        UserError: the folder lacks statistics, its `serving.json` is damaged, or the file cannot be written.
    """
    found = findings(folder, config)
    study = read_study(config.search, folder) if found["trials"] else None
    served = read_measured(folder)
    html = render(
        "report.html.j2",
        [found],
        Figures(found, study, palette=None).available,
        verdict=sentence(found).partition(": "),
        keys=_keys(found),
        tables=tables_of(found) | ({"served": served.to_table()} if served else {}),
        dense=left_dense(found),
        prediction=prediction(found),
        start={phase: slider_start(found, phase) for phase in found["phases"]},
        config=yaml.safe_dump(found["provenance"]["config"], sort_keys=False),
    )
    return write_output(output or folder / "report.html", html)


def sentence(found: Findings) -> str:
    """The verdict, and what it rests on."""
    limits = found["budget"]["losses"]
    if found["verdict"]["passed"] is None:
        budgets = " and ".join(f"{limit:g} {LOSSES[name].unit}" for name, limit in limits.items())
        return (
            f"Not proven: {found['verdict']['reason']}. The budget is {budgets} at "
            f"{percent_text(found['budget']['confidence'])} confidence; until a setting is proven, run dense."
        )
    row = found["heldout"]["searched"]
    shares = [f"{percent_text(share)} of {phase} tiles" for phase, share in row["sparsity"].items()]
    bounds = []
    for name, bound in _tested(row, limits).items():
        loss, limit = LOSSES[name], limits[name]
        upper, mean = loss.text(bound["upper"]), loss.text(bound["mean"])
        bounds.append(
            f"a {loss.title} of at most {upper} {loss.unit} (mean {mean}, budget {limit:g})"
        )
    measured = (
        f"skips {' and '.join(shares)}. On {row['prompts']} held-out prompts this costs, with "
        f"{percent_text(row['confidence'])} confidence, {' and '.join(bounds)}."
    )
    if found["verdict"]["passed"]:
        times = speedup_text(row["speedup"])
        return f"Passed: {measured} Attention is predicted to run {times} as fast."
    return (
        f"Failed: {found['verdict']['reason']}. The last candidate {measured} "
        "The thresholds file has skipping disabled."
    )


def _tested(row: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """The bounds of the losses that have a budget, of those that a held-out prompt showed."""
    return {name: row["losses"][name] for name in limits if name in row["losses"]}


def prediction(found: Findings) -> str | None:
    """How well the loss model predicts settings that it has not seen; None if too few were measured."""
    model = found["loss_model"]
    if model is None:
        return None
    before, after = (
        f"a factor of {2 ** error['log2_error']:.2f} (rank correlation "
        f"{'–' if error['rank_correlation'] is None else format(error['rank_correlation'], '.2f')})"
        for error in (model["errors"]["layers"], model["errors"]["corrected"])
    )
    return (
        f"From these alone, the loss model predicts the {LOSSES[FINEST].title} of {model['settings']} trials "
        f"within {before}, root mean square; each corrected by all other trials, within {after}."
    )


def _keys(found: Findings) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, what it is compared with."""
    row, limits = found["heldout"]["searched"], found["budget"]["losses"]
    if row is None:
        return [
            (f"Budget, {LOSSES[name].title}", f"{limit:g}", LOSSES[name].unit)
            for name, limit in limits.items()
        ]
    uniform = found["heldout"]["uniform"]
    against = "predicted"
    if uniform is not None:
        against += f"; best single number: {speedup_text(uniform['speedup'])}"
    return [
        *(
            (
                f"{LOSSES[name].title[:1].upper()}{LOSSES[name].title[1:]}, upper bound",
                LOSSES[name].text(bound["upper"]),
                f"of {limits[name]:g} {LOSSES[name].unit}",
            )
            for name, bound in _tested(row, limits).items()
        ),
        *(
            (f"{phase.capitalize()} skipped", percent_text(share), "of tiles")
            for phase, share in row["sparsity"].items()
        ),
        ("Attention", speedup_text(row["speedup"]), against),
    ]


def render(
    template: str, runs: Sequence[Findings], drawn: dict[str, go.Figure], **values: Any
) -> str:
    """Fills a template with findings and figures: one HTML file, in which all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calibrate.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # In the page a figure stands under a heading: its title is read aloud instead.
    titles = {name: figure.layout.title.text for name, figure in drawn.items()}
    specifications = {
        name: json.loads(figure.update_layout(title=None).to_json())
        for name, figure in drawn.items()
    }
    block = json.dumps(
        {"runs": list(runs), "figures": specifications}, allow_nan=False, separators=(",", ":")
    )
    return environment.get_template(template).render(
        runs=runs,
        figures=titles,
        losses=LOSSES,
        light=LIGHT,
        dark=DARK,
        plotly=get_plotlyjs(),
        # Inside a script element only `<` could end it.
        block=block.replace("<", "\\u003c"),
        **values,
    )
