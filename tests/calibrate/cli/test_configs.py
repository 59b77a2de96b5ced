"""Mistakes in a run config or on the command line: each named with file, line, key and cure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    Result,
    refused,
)

from calibrate.engines.catalogue import ENGINES
from calibrate.schema import WHOLE_PROMPTS, load_config


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
        pytest.param(
            "seed: 0",
            "criterion: {prefill: max, decode: mass}",
            ("criterion", "unknown key"),
            id="criterion",
        ),
        pytest.param("seed: 0", "12: 3", ("12", "string"), id="a number as a key"),
        pytest.param("seed: 0", "prompts: {}", ("'prompts' is given twice",), id="same key"),
    ],
)
def test_a_wrong_config_is_refused_with_file_line_and_key(
    call: Callable[..., Result],
    smoke: Callable[..., Path],
    tmp_path: Path,
    old: str,
    new: str,
    parts: tuple[str, ...],
) -> None:
    config = smoke(old, new)
    text = config.read_text()
    line = text[: text.index(new)].count("\n") + 1
    refused(call("run", config, "-o", tmp_path / "run"), f"{config}:{line}: ", *parts)
    assert not (tmp_path / "run").exists()


def test_a_config_without_a_model_is_refused(call: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\n")
    refused(call("run", config), str(config), "model", "required")


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
    call: Callable[..., Result],
    smoke: Callable[..., Path],
    old: str,
    new: str,
    parts: tuple[str, ...],
) -> None:
    config = smoke(old, new)
    refused(call("run", config), str(config), *parts)


@pytest.mark.parametrize("engine", ["trtllm", "sglang", "scalar"])
def test_dense_rows_are_for_our_own_engine_alone(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path, engine: str
) -> None:
    config = smoke("{tile_q: 16, tile_kv: 16}", "{tile_q: 16, tile_kv: 16, dense_last: 16}")
    run = call("run", config, "-o", tmp_path / "run", "--set", f"target.engine={engine}")
    law = f"`geometry.prefill.dense_last` must be 0 for `target.engine: {engine}`"
    refused(run, str(config), law, "but got 16; set it to 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", WHOLE_PROMPTS)
def test_chunks_are_for_engines_that_skip_in_every_chunk(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path, engine: str
) -> None:
    config = smoke("{tile_q: 16, tile_kv: 16}", "{tile_q: 16, tile_kv: 16, chunk: 64}")
    run = call("run", config, "-o", tmp_path / "run", "--set", f"target.engine={engine}")
    law = f"`geometry.prefill.chunk` must be left out for `target.engine: {engine}`"
    refused(run, str(config), law, "but got 64; leave it out")
    assert not (tmp_path / "run").exists()


def test_first_chunks_below_the_floor_are_for_our_own_engine_alone(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    config = smoke("{tile_q: 16, tile_kv: 16}", "{tile_q: 16, tile_kv: 16, chunk: 64}")
    run = call("run", config, "-o", tmp_path / "run", "--set", "target.engine=trtllm")
    law = "`geometry.prefill.chunk >= target.min_kv_len.prefill` must hold for trtllm"
    refused(run, str(config), law, "but got 64 and 200")
    for change in (
        "target.engine=native",
        "geometry.prefill.chunk=208",
        "target.phases=[decode]",
    ):
        load_config(config, ("target.engine=trtllm", change))


def test_engines_that_serve_whole_prompts_are_those_whose_servers_say_so() -> None:
    """The config cannot ask the engines' rooms, which stand above it."""
    found = {name for name, one in ENGINES.items() if any(s.whole_prompts for s in one.servers)}
    assert found == set(WHOLE_PROMPTS)


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
    call: Callable[..., Result],
    smoke: Callable[..., Path],
    override: str,
    parts: tuple[str, ...],
) -> None:
    refused(call("run", smoke(), "--set", override), "--set", *parts)


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
    call: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = call(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert "Usage" in result.stderr and "Traceback" not in result.stderr


def test_an_interrupted_command_says_how_to_go_on(
    call: Callable[..., Result], smoke: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibrate.pipeline.Stages.run", interrupted)
    result = call("run", smoke())
    assert (result.code, result.stdout) == (130, "")
    assert result.message == "interrupted: run the same command again to resume\n"
