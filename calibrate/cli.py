"""The `calibrate` command: verbs, printing, progress. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from calibrate import terminal
from calibrate.errors import UserError, WorkFailed
from calibrate.record.files import write_output
from skip_softmax.thresholds.file import Thresholds

app = typer.Typer(
    name="calibrate",
    help="Find, prove and export skip-softmax thresholds for your model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a `calibrate run`.")]
Gpu = Annotated[
    str | None, typer.Option(help="GPU family that will serve: sm90, sm100, sm120; unset: any.")
]
KvDtype = Annotated[
    str | None, typer.Option(help="Type of its KV cache: bfloat16, float16, fp8; unset: 16 bits.")
]
PhaseChoice = Annotated[list[str] | None, typer.Option(help="Only this phase; may be repeated.")]
ThresholdsFile = Annotated[Path, typer.Argument(help="A thresholds file.")]


def _version(asked: bool) -> None:
    if asked:
        import calibrate

        terminal.write(f"{calibrate.__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Run config, see configs/.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Run folder.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, may be repeated.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Who runs the model: transformers, or vllm-native, the plug-in that will serve it; unset: "
            "the config's `model.engine`."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate a model. The same command resumes an interrupted run."""
    import calibrate

    chosen = [*(overrides or ()), *([] if engine is None else [f"model.engine={engine}"])]
    with terminal.Bars() as bars:
        finished = calibrate.run(config, output, overrides=chosen, progress=bars)
    _finish(finished, as_json)


@app.command()
def search(
    folder: RunFolder,
    trials: Annotated[int | None, typer.Option(min=1, help="New total number of trials.")] = None,
) -> None:
    """Continue the search of a run, for example to more trials."""
    import calibrate

    with terminal.Bars() as bars:
        calibrate.open_run(folder, progress=bars).search(trials)
    terminal.say(f"searched; now prove the winner: calibrate validate {terminal.argument(folder)}")


@app.command()
def validate(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a `calibrate run`.")] = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="Measure this thresholds file instead, per length.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --thresholds: run config, if there is no run yet.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file with its new evidence.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose and prove again, from the trials of a run; or measure numbers from elsewhere on your model."""
    if thresholds is not None:
        _assess(thresholds, folder, config, output, as_json)
        return
    if folder is None or config is not None or output is not None:
        raise UserError(
            "`calibrate validate` takes a run folder alone, or --thresholds FILE with a run folder or "
            "--config"
        )
    import calibrate

    with terminal.Bars() as bars:
        proven = calibrate.open_run(folder, progress=bars).validate()
    _finish(proven, as_json)


@app.command()
def report(
    folder: RunFolder,
    other: Annotated[
        Path | None, typer.Argument(help="Another run's folder, to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The HTML file; unset: in the run folder.")
    ] = None,
) -> None:
    """Write report.html of a run, or compare two runs side by side; prints the file's path."""
    import calibrate

    terminal.write_path(calibrate.open_run(folder).report(other, output))


@app.command()
def show(
    file: ThresholdsFile,
    run: Annotated[
        Path | None, typer.Option(help="Run folder whose statistics give the expected sparsity.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a thresholds file as a table, with its evidence."""
    thresholds = Thresholds.load(file)
    if as_json:
        terminal.write_json(thresholds.model_dump(mode="json", exclude_none=True))
        return
    from calibrate.report import tables
    from calibrate.report.lengths import expectations

    statistics = None
    if run is not None:
        import calibrate

        statistics = calibrate.open_run(run).stats_for(thresholds)
    rows = expectations(thresholds, statistics)
    dense = [f"layer {entry.layer} is dense: {entry.reason}" for entry in thresholds.uncalibrated]
    shown = [tables.phases(thresholds), *([tables.expected(rows)] if rows else [])]
    attained = thresholds.evidence.get("target_sparsity")
    if attained:
        shown.append(tables.targets(attained))
    left = tables.left_dense(thresholds.evidence)
    terminal.show(*shown, *left, tables.layers(thresholds), *dense)


@app.command()
def export(
    file: ThresholdsFile,
    engine: Annotated[str, typer.Option(help="Which engine's artefact to write.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Target file; unset: stdout.")
    ] = None,
    served_min_len: Annotated[
        int | None, typer.Option(help="Shortest request that the engine will get [tokens].")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="The engine's prefill chunk [tokens].")
    ] = None,
    at_length: Annotated[
        int | None, typer.Option(help="KV length of an absolute threshold [tokens].")
    ] = None,
    gpu: Gpu = None,
    phase: PhaseChoice = None,
    kv_dtype: KvDtype = None,
    speculative: Annotated[
        bool | None,
        typer.Option("--speculative/--no-speculative", help="Does it decode speculatively?"),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Its attention backend, to be checked.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The served model's folder, with its config.json.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Merge into --model's config.json; keeps a backup.")
    ] = False,
    pin: Annotated[
        bool, typer.Option("--pin", help="Without a fitted curve: a = scale_factor, b = 0.")
    ] = False,
    trust_geometry: Annotated[
        bool, typer.Option("--trust-geometry", help="You compared tiles that are not published.")
    ] = False,
    experimental: Annotated[
        bool, typer.Option("--experimental", help="Write what no release of the engine reads.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write what an engine reads, with a sidecar of evidence; refused where the numbers would be invalid."""
    import calibrate

    made = calibrate.export(
        file,
        engine,
        phases=phase,
        gpu=gpu,
        served_min_len=served_min_len,
        chunk_size=chunk_size,
        at_length=at_length,
        kv_dtype=kv_dtype,
        speculative=speculative,
        backend=backend,
        model=model,
        pin=pin,
        trust_geometry=trust_geometry,
        experimental=experimental,
    )
    patch = made.require_patch() if apply else made.patch
    lost = [] if made.sidecar is None else made.sidecar["lost"]
    for text in (*made.warnings, *(f"not in the artefact: {loss}" for loss in lost)):
        terminal.say(f"note: {text}")
    if output is not None:
        made.write(output)
    if apply and patch is not None:
        old = made.apply()
        there = f"{old} is already up to date: nothing was merged"
        terminal.say(there if old == patch.path else f"merged into {model}; the old file is {old}")
    diff = None if patch is None else patch.diff()
    if as_json:
        terminal.write_json(
            {"engine": engine, "artefact": made.text, "diff": diff, "sidecar": made.sidecar}
        )
    elif made.is_patch and diff is not None:
        terminal.write(diff)
    else:
        if diff:
            terminal.say(diff)
        if output is None:
            terminal.write(made.text)


@app.command()
def project(
    folder: RunFolder,
    engine: Annotated[str, typer.Option(help="Which engine will serve.")],
    gpu: Gpu = None,
    phase: PhaseChoice = None,
    kv_dtype: KvDtype = None,
    as_json: AsJson = False,
) -> None:
    """Find and measure the best setting near a run's result that an engine can express."""
    import calibrate
    from calibrate.engines.export import needed_options

    with terminal.Bars() as bars:
        path = calibrate.open_run(folder, progress=bars).project(
            engine, gpu=gpu, phases=phase, kv_dtype=kv_dtype
        )
    thresholds = Thresholds.load(path)
    report = thresholds.evidence["projection"]
    direct = report["direct"]
    if not direct["holds"]:
        terminal.say(
            f"refused: the straight projection {direct['scale_factor']} breaks the budget "
            f"({direct['refused']}); the nearest within it is {report['used']}"
        )
    if as_json:
        terminal.write_json({"thresholds": str(path), "projection": report})
    else:
        from calibrate.report.tables import phases

        terminal.show(phases(thresholds))
    options = " ".join(["--engine", engine, *needed_options(thresholds, engine, gpu, kv_dtype)])
    terminal.say(f"passed: {path}; now: calibrate export {terminal.argument(path)} {options}")


@app.command("import")
def import_numbers(
    output: Annotated[Path, typer.Option("-o", "--output", help="Thresholds file to write.")],
    source: Annotated[Path | None, typer.Argument(help="The engine's file.")] = None,
    engine: Annotated[str, typer.Option(help="Whose file it is, and who will serve.")] = "trtllm",
    prefill: Annotated[float | None, typer.Option(help="Scale factor, without a file.")] = None,
    decode: Annotated[float | None, typer.Option(help="Scale factor, without a file.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Plain threshold, without a file.")
    ] = None,
    at_length: Annotated[
        int | None, typer.Option(help="KV length of a threshold, if its file names none [tokens].")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Target sparsity at which a curve is read.")
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="config.json with the curve of a YAML's target_sparsity.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Your model's folder.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Or the run config that names your model.")
    ] = None,
    gpu: Gpu = None,
    phase: PhaseChoice = None,
) -> None:
    """Read numbers from elsewhere into a thresholds file marked as not validated."""
    import calibrate

    thresholds = calibrate.import_numbers(
        source,
        engine=engine,
        prefill=prefill,
        decode=decode,
        threshold=threshold,
        at_length=at_length,
        target=target,
        coefficients=coefficients,
        model=model,
        config=config,
        gpu=gpu,
        phases=phase,
    )
    write_output(output, thresholds.to_yaml())
    for note in thresholds.evidence["imported"]["notes"]:
        terminal.say(f"note: {note}")
    terminal.say(
        f"not validated: {output}; what it does to your model: "
        f"calibrate validate RUN_DIR --thresholds {terminal.argument(output)}"
    )


@app.command()
def probe(
    url: Annotated[str, typer.Argument(help="A running server with the OpenAI interface.")],
    prompt: Annotated[
        Path | None, typer.Option(help="A prompt to send: a text file; unset: nothing is sent.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer to it [tokens].")] = 32,
    thresholds: Annotated[
        Path | None, typer.Option(help="The thresholds file that it should serve, to be checked.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A dense server of the same model, to compare with.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=2, help="With --against: how many times both answer.")
    ] = 5,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="The API key that the servers want.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a running server whether it skips, which file it serves, and what it skips on a prompt."""
    from calibrate.serving.client import Server
    from calibrate.serving.probe import check_file, probe, read_prompt

    found = probe(
        Server(url, api_key),
        None if prompt is None else read_prompt(prompt),
        tokens=tokens,
        against=None if against is None else Server(against, api_key),
        repeats=repeats,
    )
    if as_json:
        terminal.write_json(found.to_json())
    else:
        terminal.show(*found.to_terminal())
    for text in found.notes:
        terminal.say(f"note: {text}")
    if thresholds is not None:
        check_file(found, thresholds)
    if found.skipping == "unknown" and found.against is None:
        raise WorkFailed(f"whether {found.url} skips is unknown; the note above says what it takes")
    if found.exact is False:
        raise WorkFailed("what this request skipped is not known exactly; the note above says why")


@app.command("serve-bench")
def serve_bench(
    model: Annotated[str, typer.Argument(help="The model to serve: a folder or a hub id.")],
    thresholds: Annotated[Path, typer.Option(help="The calibrated server's thresholds file.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where results go; a run folder shows them.")
    ],
    serve: Annotated[str, typer.Option(help="More options of `vllm serve`, for both.")] = "",
    load: Annotated[str, typer.Option(help="More options of `vllm bench serve`.")] = "",
    allow: Annotated[
        list[str] | None, typer.Option(help="What the plug-in should accept all the same.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model dense, then calibrated, with vLLM, and compare both under the same load."""
    from calibrate.serving.bench import measure

    found = measure(
        model, thresholds, output, serve=serve, load=load, allow=allow or (), say=terminal.say
    )
    if as_json:
        terminal.write_json(found.to_json())
    else:
        terminal.show(found.to_table())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Time the kernels on this GPU, behind a correctness gate; `calibrate bench --help` says what."""
    from calibrate.bench import run as run_bench

    raise SystemExit(run_bench(context.args))


def main() -> None:
    """Entry point: turns failures into exit codes 1 and 2."""
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # the bars are ours; libraries' would cut through them
    with terminal.exit_codes():
        app()


def _finish(finished: Any, as_json: bool) -> None:
    evidence = finished.thresholds.evidence
    path = finished.folder / "thresholds.yaml"
    if as_json:
        terminal.write_json(
            {"folder": str(finished.folder), "thresholds": str(path), "evidence": evidence}
        )
    else:
        from calibrate.report.tables import heldout, left_dense, targets

        found = evidence.get("target_sparsity")
        attained = [targets(found)] if found else []
        terminal.show(heldout(finished.findings), *attained, *left_dense(evidence))
    if evidence["verdict"] != "passed":
        from calibrate.report.tables import cure

        raise WorkFailed(
            f"validation failed: {evidence.get('reason', 'a short prompt did not come out dense')}; "
            f"`{path}` was written with skipping disabled. {cure(evidence)}"
        )
    terminal.say(f"passed: {path}")


def _assess(
    file: Path, folder: Path | None, config: Path | None, output: Path | None, as_json: bool
) -> None:
    import calibrate
    from calibrate.report.tables import assessed

    if folder is None and config is None:
        raise UserError(
            "--thresholds needs a run folder, or --config with the run config of your model"
        )
    with terminal.Bars() as bars:
        run = calibrate.open_run(folder, config=config, progress=bars)
        thresholds, result = run.assess(file)
    if as_json:
        terminal.write_json(result.to_json())
    else:
        terminal.show(assessed(result.rows))
    if output is not None:
        write_output(output, thresholds.to_yaml())
    if result.evidence["verdict"] != "passed":
        raise WorkFailed(f"`{file}` breaks the budget on this model: {result.evidence['reason']}")
    terminal.say(
        f"passed: `{file}` keeps within the budget on this model"
        + (f"; written: {output}" if output else "")
    )


if __name__ == "__main__":
    main()
