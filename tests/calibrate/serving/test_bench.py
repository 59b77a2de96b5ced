"""`calibrate serve-bench`, with a planted command in the place of vLLM's."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, environment, refused

from calibrate.errors import UserError, WorkFailed
from calibrate.serving import bench

PLANTED = Path(__file__).with_name("planted_vllm.py")


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_command", lambda: [sys.executable, str(PLANTED)])
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("VLLM_API_KEY", "of another server")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "thresholds.yaml"
    path.write_text(THRESHOLDS)
    return path


THRESHOLDS = """\
format: skip-softmax/1
model: {name: tiny, sha256: abc, layers: 3, q_heads: 4, kv_heads: 2, head_dim: 16, dtype: float32}
geometry: {prefill: {tile_q: 64, tile_kv: 128}}
min_kv_len: {prefill: 1024}
scale_factor: {prefill: 180.0}
"""


def test_both_servers_are_measured_and_compared(
    call: Callable[..., Result], tmp_path: Path, file: Path
) -> None:
    folder = tmp_path / "run"
    result = call(
        "serve-bench", "MODEL", "--thresholds", file, "-o", folder, "--allow", "model",
        "--serve", "--max-model-len 99", "--load", "--num-prompts 2",
    )  # fmt: skip
    assert result.code == 0, result
    lines = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert ["TTFT,", "median", "[ms]", "200", "100", "2.00×"] in lines
    assert ["TPOT,", "median", "[ms]", "20", "10", "2.00×"] in lines
    assert ["requests", "[1/s]", "0.5", "1", "2.00×"] in lines
    words = " ".join(result.stdout.split())  # notes are wrapped to their table
    assert "25.0 % of prefill tiles, 75.0 % of decode tiles" in words
    assert "goodput" not in result.stdout  # nobody said what is good
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha256[:12] in result.stdout
    found = json.loads((folder / "serving.json").read_text())
    assert found["sha256"] == sha256 and found["serve"] == ["--max-model-len", "99"]
    assert found["load"][-2:] == ["--num-prompts", "2"]
    # Two requests of the load; those that were there before are not counted.
    assert found["tiles"][0] == {"phase": "prefill", "visited": 80, "skipped": 20}
    assert bench.read_measured(folder) == bench.Measured.from_json(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serve": "--fail"}, "the server ended with 3: ValueError: no room for the cache"),
        ({"load": "--lose"}, "1 failed"),
        ({"load": "--other-work"}, r"\[2, 20, 8\] and \[2, 20, 7\]"),
        ({"load": "--crash"}, "`vllm bench serve` failed: ValueError: the load makes no sense"),
    ],
    ids=["server", "requests", "work", "load"],
)
def test_what_fails_is_named(
    tmp_path: Path, file: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(WorkFailed, match=message):
        bench.measure("MODEL", file, tmp_path / "run", say=lambda _: None, **options)
    assert not (tmp_path / "run" / "serving.json").exists()


def test_no_server_outlives_its_block(tmp_path: Path) -> None:
    command = [sys.executable, str(PLANTED), "serve"]
    with bench.serving(command, tmp_path / "log") as server:
        assert server.model() == "m"
    with pytest.raises(UserError, match="nobody answers"):
        server.model()
    with pytest.raises(KeyboardInterrupt), bench.serving(command, tmp_path / "log") as server:
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="nobody answers"):
        server.model()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(WorkFailed, match="did not answer within 0 s"),
        bench.serving(sleeper, tmp_path / "log", patience=0.2),
    ):
        pass


def test_vllm_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UserError, match=r"skip-softmax-calibrate\[vllm\]"):
        bench._command()


def test_a_file_that_is_none_is_refused_before_a_server_starts(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(THRESHOLDS.replace("skip-softmax/1", "other"))
    refused(call("serve-bench", "MODEL", "--thresholds", path, "-o", tmp_path / "run"), "format")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"model": "m"}', "{"], ids=repr)
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(UserError, match="must be what `calibrate serve-bench` wrote"):
        bench.read_measured(tmp_path)
