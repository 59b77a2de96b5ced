"""The `calibrate` command: verbs, printing, progress. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from calibrate.errors import UserError, WorkFailed
from skip_softmax.strict_yaml import FileError
from skip_softmax.thresholds import PHASES, Thresholds

app = typer.Typer(
    name="calibrate",
    help="Find, prove and export skip-softmax thresholds for your model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_stderr = Console(stderr=True)
_RUNS_MODELS = ("transformers", "gguf", "accelerate")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a `calibrate run`.")]
ThresholdsFile = Annotated[Path, typer.Argument(help="A thresholds file.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Run config, see configs/.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Run folder.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate a model. The same command resumes an interrupted run."""
    import calibrate

    with _Watch() as watch:
        finished = calibrate.run(config, output, overrides=tuple(overrides or ()), progress=watch)
    _finish(finished, as_json)


@app.command()
def search(
    folder: RunFolder,
    trials: Annotated[int | None, typer.Option(min=1, help="New total number of trials.")] = None,
) -> None:
    """Continue the search of a run, for example to more trials."""
    from calibrate.pipeline import search_again

    with _Watch() as watch:
        search_again(folder, trials, watch)
    _say(f"searched; now prove the winner: calibrate validate {folder}")


@app.command()
def validate(folder: RunFolder, as_json: AsJson = False) -> None:
    """Choose and prove again, from the trials of a run."""
    from calibrate.pipeline import validate_again

    with _Watch() as watch:
        finished = validate_again(folder, watch)
    _finish(finished, as_json)


@app.command()
def show(file: ThresholdsFile, as_json: AsJson = False) -> None:
    """Print a thresholds file as a table, with its evidence."""
    thresholds = Thresholds.load(file)
    if as_json:
        _print_json(thresholds.model_dump(mode="json", exclude_none=True))
        return
    console = _stdout()
    for table in (_phase_table(thresholds), _layer_table(thresholds)):
        console.print(table)
    for entry in thresholds.uncalibrated:
        console.print(
            f"layer {entry.layer} is dense: {entry.reason}", markup=False, highlight=False
        )


@app.command()
def export(
    file: ThresholdsFile,
    engine: Annotated[str, typer.Option(help="Which engine's artefact to write.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Target file; unset: stdout.")
    ] = None,
) -> None:
    """Write what an engine reads."""
    if engine != "native":
        raise UserError(f"--engine must be one of: native; but got `{engine}`")
    thresholds = Thresholds.load(file)
    if output is None:
        sys.stdout.write(thresholds.to_yaml())
        return
    try:
        thresholds.save(output)
    except OSError as error:
        raise UserError(
            f"--output: `{output}` cannot be written ({error}); choose another file"
        ) from None


def main() -> None:
    """Entry point: turns the project's two kinds of failure into exit codes 1 and 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars are ours; libraries' would cut through them
    try:
        app()
    except (UserError, FileError) as error:
        _fail(str(error), 2)
    except WorkFailed as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if error.name not in _RUNS_MODELS:
            raise
        _fail(
            f"`{error.name}` must be installed to run models; install it with the extra [hf]: "
            "pip install 'skip-softmax-calibrate[hf]'",
            2,
        )


class _Watch:
    """Progress bars on a terminal; plain lines, one per stage, elsewhere."""

    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=_stderr,
            disable=not _stderr.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> _Watch:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bars.stop()
        if kind is KeyboardInterrupt:
            _say("interrupted: the same command goes on from here")

    def stage(self, name: str, total: int, done: int) -> None:
        """Starts a bar."""
        self._task = self._bars.add_task(name, total=total, completed=done, note="")
        if not _stderr.is_terminal:
            _say(f"{name}: {done} of {total} done")

    def step(self, note: str) -> None:
        """Moves the bar."""
        self._bars.update(self._task, advance=1, note=note)


def _finish(finished: Any, as_json: bool) -> None:
    evidence = finished.thresholds.evidence
    path = finished.folder / "thresholds.yaml"
    if as_json:
        _print_json({"folder": str(finished.folder), "thresholds": str(path), "evidence": evidence})
    else:
        _stdout().print(_tradeoff_table(finished.validation))
    if evidence["verdict"] != "passed":
        raise WorkFailed(
            f"validation failed: {evidence.get('reason', 'a short prompt did not come out dense')}; "
            f"`{path}` says dense. Raise the budget, or give the search more trials"
        )
    _say(f"passed: {path}")


def _tradeoff_table(validation: dict[str, Any]) -> Table:
    table = Table(title="Held-out prompts: loss against sparsity", title_justify="left")
    for column in (
        "setting",
        "KL [nats/token]",
        "upper bound",
        "score drop [points]",
        "upper bound",
        *(f"{phase} skipped" for phase in PHASES),
        "predicted speed-up",
    ):
        table.add_column(column, justify="left" if column == "setting" else "right")
    rows = [("searched", attempt) for attempt in validation["attempts"]]
    if validation["baseline"] is not None:
        rows.append(("best single number", validation["baseline"]))
    for name, row in rows:
        shares = [row["sparsity"].get(phase) for phase in PHASES]
        table.add_row(
            f"{name}{'' if row['passed'] else ' (failed)'}",
            f"{row['kl']['mean']:.2e}",
            f"{row['kl']['upper']:.2e}",
            f"{row['score_drop']['mean']:.2f}",
            f"{row['score_drop']['upper']:.2f}",
            *("–" if share is None else f"{100 * share:.1f} %" for share in shares),
            f"{1 / row['relative_time']:.2f}×",
        )
    return table


def _phase_table(thresholds: Thresholds) -> Table:
    evidence = thresholds.evidence
    table = Table(
        title=f"{thresholds.model.name}: {evidence.get('verdict', 'not validated')}",
        title_justify="left",
    )
    for column in (
        "phase",
        "tiles",
        "min KV length",
        "one number",
        "layers skipping",
        "sparsity",
        "speed-up",
    ):
        table.add_column(column)
    for phase in PHASES:
        tiles = getattr(thresholds.geometry, phase)
        skipping = sum(
            max(thresholds.per_head(layer, phase)) > 0 for layer in range(thresholds.model.layers)
        )
        share = evidence.get("sparsity", {}).get(phase, {}).get("achieved")
        speed = evidence.get("predicted_speedup", {}).get(phase)
        table.add_row(
            phase,
            "–" if tiles is None else "×".join(str(v) for k, v in tiles if k.startswith("tile")),
            str(getattr(thresholds.min_kv_len, phase) or "–"),
            f"{getattr(thresholds.scale_factor, phase):g}",
            f"{skipping} of {thresholds.model.layers}",
            "–" if share is None else f"{100 * share:.1f} %",
            "–" if speed is None else f"{speed:.2f}× (predicted)",
        )
    loss = evidence.get("loss")
    if loss is not None:
        kl, drop = loss["kl"], loss["score_drop"]
        table.caption = (
            f"KL {kl['mean']:.2e} (upper {kl['upper']:.2e}) nats/token, score drop {drop['mean']:.2f} "
            f"(upper {drop['upper']:.2f}) points on {loss['heldout_prompts']} held-out prompts"
        )
    return table


def _layer_table(thresholds: Thresholds) -> Table:
    table = Table(title="Scale factor per layer [tokens]; 0 is dense", title_justify="left")
    for column in ("layer", *PHASES):
        table.add_column(column, justify="right")
    for layer in range(thresholds.model.layers):
        cells = []
        for phase in PHASES:
            values = thresholds.per_head(layer, phase)
            same = len(set(values)) == 1
            cells.append(f"{values[0]:g}" if same else f"{min(values):g} to {max(values):g}")
        table.add_row(str(layer), *cells)
    return table


def _stdout() -> Console:
    # A pipe or a file has no width: rich would cut tables at 80 columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _say(message: str) -> None:
    # A path in the message must not be taken for markup or wrapped.
    _stderr.print(message, markup=False, highlight=False, soft_wrap=True)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _fail(message: str, code: int) -> None:
    # Plain text: a path in the message must not be taken for markup or wrapped.
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(code)
