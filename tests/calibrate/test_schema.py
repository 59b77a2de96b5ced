"""The run config: traps of YAML, and paths as a shell reads them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

import calibrate
from calibrate.errors import FileError, UserError
from calibrate.model.config_json import read_model_config
from calibrate.record.files import write_output
from calibrate.schema import RunConfig, load_config
from calibrate.terminal import argument, write_path


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budget: {kl: yes}", "run.yaml:2: .*does not read yes as it looks"),
        ("search: {trials: on}", "run.yaml:2: .*does not read on as it looks"),
        ("search: {trials: true}", "run.yaml:2: search.trials: must not be true or false"),
        ("prompts: {lengths: [1024, true]}", "run.yaml:2: prompts.lengths: must not be true"),
        (
            "target: {min_kv_len: {prefill: true}}",
            "run.yaml:2: target.min_kv_len: must not be true",
        ),
        ("prompts: {lengths: [01024]}", "run.yaml:2: .*01024 .*leading zeros"),
        ("search: {trials: 1_000}", "run.yaml:2: .*1_000 .*digits alone"),
        ("cost: {device: 1:30}", "run.yaml:2: .*1:30 .*quote it"),
        ("budget: {kl: 1:30.5}", "run.yaml:2: .*1:30.5 .*digits alone"),
        ("seed: 010", "run.yaml:2: .*010 .*leading zeros"),
        ("seed: !!int '010'", "run.yaml:2: .*010 .*leading zeros"),
        ("budget: {kl: .inf}", "run.yaml:2: budget.kl: .*finite number"),
        ("budget: {kl: .nan}", "run.yaml:2: budget.kl: .*finite number"),
        ("seed: .inf", "run.yaml:2: seed: .*finite number"),
        ("seed: 0o10", "run.yaml:2: seed: .*valid integer.*0o10"),
        ("target: {phase_weight: {decode: .nan}}", "run.yaml:2: target.phase_weight.*finite"),
        ("search: {study_name: 2026-11-29}", "run.yaml:2: .*2026-11-29 as it looks; quote it"),
        (
            "search: {study_name: 7}",
            "run.yaml:2: search.study_name: must be text, but got .* 7; put",
        ),
    ],
)
def test_what_yaml_reads_as_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FileError, match=said):
        load_config(written(tmp_path, f"model: {{path: x}}\n{text}\n"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=010", "`--set seed=010`: .*010 .*leading zeros"),
        ("prompts.lengths=[01024]", "01024 .*leading zeros"),
        ("budget.kl=yes", "does not read yes as it looks"),
        ("search.trials=1_0", "1_0 .*digits alone"),
        ("search.trials=1:30", "1:30 .*digits alone"),
        ("model.path=2026-11-29", "quote it if it is text"),
        ("model.path=[x", "not valid YAML.*put quotes around text"),
        ("model.path=@x", "not valid YAML.*put quotes around text"),
        ("search={trials: 1, trials: 2}", "key 'trials' is given twice"),
    ],
)
def test_set_reads_values_as_the_file_does(override: str, said: str) -> None:
    with pytest.raises(FileError, match=said):
        load_config({"model": {"path": "x"}}, (override,))


@pytest.mark.parametrize(
    "text", ["/runs #1/m", "#1", "&x", "what?now", "50%20", "a 'b", "-dash", 'é"x', "a} b"]
)
def test_set_takes_a_name_as_it_stands(text: str) -> None:
    assert load_config({"model": {"path": "x"}}, (f"model.path={text}",)).model.path == text
    quoted = "'" + text.replace("'", "''") + "'"
    assert load_config({"model": {"path": "x"}}, (f"model.path={quoted}",)).model.path == text


def test_switches_and_plain_numbers_are_read(tmp_path: Path) -> None:
    text = "model: {path: x, trust_remote_code: true}\nbudget: {kl: 1e-3}\nseed: 0x10\n"
    config = load_config(written(tmp_path, text))
    assert (config.model.trust_remote_code, config.budget.kl, config.seed) == (True, 0.001, 16)


def test_merge_keys_are_read(tmp_path: Path) -> None:
    text = """
model: {path: x}
prompts:
  sources:
    - &rows {task: file, path: a.jsonl, prompt_field: question}
    - {<<: *rows, path: b.jsonl, weight: 2}
"""
    first, second = load_config(written(tmp_path, text)).prompts.sources
    paths = [Path(source.path or "").name for source in (first, second)]
    assert paths == ["a.jsonl", "b.jsonl"]
    assert (second.prompt_field, second.weight) == ("question", 2)


def test_a_repeated_key_beside_a_merge_is_still_refused(tmp_path: Path) -> None:
    text = "model: &m {path: x}\nbudget: {<<: {kl: 0.1}, kl: 0.2, kl: 0.3}\n"
    with pytest.raises(FileError, match="key 'kl' is given twice"):
        load_config(written(tmp_path, text))


def test_keys_are_given_once_before_merges_are_followed(tmp_path: Path) -> None:
    """What `<<` stands for may be built, and merged itself, before or after the place that uses it."""
    text = "model: {path: x}\nsearch: &s {<<: &t {trials: 3}, trials: 4, groups: 2}\n"
    read = load_config(written(tmp_path, text)).search
    assert (read.trials, read.groups) == (4, 2)
    deep = "target: {phase_weight: &w {<<: &v {prefill: 1, decode: 1}, decode: 2}, min_kv_len: {<<: *w}}"
    target = load_config(written(tmp_path, f"model: {{path: x}}\n{deep}\n")).target
    assert target.phase_weight == target.min_kv_len == {"prefill": 1, "decode": 2}
    with pytest.raises(FileError, match=r"run.yaml:1: .*'<<' is given twice"):
        load_config(written(tmp_path, "model: {<<: {path: x}, <<: {path: y}}\n"))


def test_a_file_of_a_package_is_not_looked_for_beside_the_config(tmp_path: Path) -> None:
    paths = ("package://novel/a.txt", "a.txt")
    sources = [{"task": "text", "path": path} for path in paths]
    read = load_config(written(tmp_path, f"model: {{path: x}}\nprompts: {{sources: {sources}}}\n"))
    assert [source.path for source in read.prompts.sources] == [paths[0], str(tmp_path / "a.txt")]


def test_a_tilde_is_the_users_folder() -> None:
    model = {"path": "~/model", "tokenizer": "~/tokenizer"}
    places = {"output": "~/runs/x", "search": {"storage": "sqlite:///~/study.db"}}
    places |= {"cost": {"curves": "~/c.jsonl"}}
    config = RunConfig.model_validate({"model": model, **places})
    home = os.path.expanduser("~")
    assert config.search.storage == f"sqlite:///{home}/study.db"
    assert config.cost.curves == f"{home}/c.jsonl"
    assert config.model.path == f"{home}/model"
    assert (config.model.tokenizer, config.output) == (f"{home}/tokenizer", f"{home}/runs/x")


def test_a_tilde_is_the_users_folder_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    written(tmp_path, "model: {path: x}\nprompts: {sources: [{task: file, path: a.jsonl}]}\n")
    source = load_config("~/run.yaml").prompts.sources[0]
    assert source.path == str(tmp_path / "a.jsonl")
    assert write_output(Path("~/out.json"), "{}") == tmp_path / "out.json"
    assert (tmp_path / "out.json").read_text() == "{}"
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    assert read_model_config(Path("~")).data == {"num_hidden_layers": 1}
    with pytest.raises(UserError, match=f"`{tmp_path}/none` is not a run folder"):
        calibrate.open_run("~/none")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("run", "run"), ("a b", "'a b'"), ("-x", "./-x"), ("it's", "'it'\"'\"'s'"), ("#1", "'#1'"),
        ("what?", "'what?'"), ("50%20", "50%20"), ("é", "'é'"),
    ],
)  # fmt: skip
def test_a_path_in_a_command_that_a_message_names_is_one_argument(name: str, shown: str) -> None:
    assert argument(Path(name)) == shown
    assert shlex.split(shown)[0].removeprefix("./") == name


def test_a_path_is_printed_in_the_bytes_of_its_name(capfdbinary: Any) -> None:
    """Whatever the terminal's encoding is, a script that reads it finds the file."""
    name = os.fsdecode("é'\"".encode() + b"\xff")
    write_path(Path(name))
    assert capfdbinary.readouterr().out == os.fsencode(name) + b"\n"


def test_a_retired_key_of_an_old_run_folder_is_read_over_and_others_are_not(tmp_path: Path) -> None:
    text = "model: {path: x}\nvalidation: {attempts: 2, bootstrap: 9999}\n"
    assert load_config(written(tmp_path, text)).validation.attempts == 2
    with pytest.raises(FileError, match=r"run.yaml:2: validation.bootstraps: unknown key"):
        load_config(written(tmp_path, text.replace("bootstrap", "bootstraps")))


def test_text_is_generated_if_the_budget_or_the_key_asks_for_it() -> None:
    def asked(drop: float | None = None, generate: int | None = None) -> int | None:
        sections = {"budget": {"generated_drop": drop}, "validation": {"generate": generate}}
        return RunConfig.model_validate({"model": {"path": "x"}, **sections}).generated_tokens

    assert (asked(), asked(drop=5.0), asked(5.0, 300), asked(generate=129)) == (None, 128, 300, 129)
    with pytest.raises(ValueError, match="greater than or equal to 128"):
        asked(generate=127)
