"""Files of prompts that are missing, damaged or too long: each refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    Result,
    refused,
)


def text_row(number: int, words: int = 120) -> str:
    return json.dumps({"prompt": f"Row {number}. " + "one two three four " * (words // 4)})


@pytest.fixture
def run_prompts(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> Callable[..., Result]:
    """Runs the smoke config with one file of prompts, which lies beside the config."""

    def run(name: str, content: str) -> Result:
        (tmp_path / name).write_text(content, encoding="utf-8")
        source = f"prompts.sources=[{{task: file, path: {name}}}]"
        return call("run", smoke(), "-o", tmp_path / "run", "--set", source)

    return run


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
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    result = call("run", smoke(), "-o", tmp_path / "run", "--set", "prompts.lengths=[256, 1020]")
    refused(result, "1020 + 8 > 1024", "context", "lower `prompts.lengths`")


def test_a_file_of_prompts_that_is_not_there_is_refused(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> None:
    source = "prompts.sources=[{task: file, path: nowhere.jsonl}]"
    result = call("run", smoke(), "-o", tmp_path / "run", "--set", source)
    refused(result, str(tmp_path / "nowhere.jsonl"), "no such file")
