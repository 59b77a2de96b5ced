"""What a program loads, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

HEAVY = {"torch", "triton", "optuna", "transformers", "datasets", "scipy", "numpy"}


def loaded_by(program: str, *, paths: list[Path] | None = None, cwd: Path = ROOT) -> set[str]:
    """Top-level modules that a fresh process holds after a program."""
    report = "import sys, json; sys.stderr.write(json.dumps(sorted(sys.modules)))"
    source = f"try:\n    {program}\nexcept SystemExit as stop:\n    assert not stop.code\n{report}"
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = filter(None, [*(paths or []), ROOT, ROOT / "kernels", *given])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))}
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def command(*arguments: str) -> str:
    return f"import sys; sys.argv = {['calibrate', *arguments]}; from calibrate.cli import main; main()"
