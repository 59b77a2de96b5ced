"""The pages of the engines: every command in them runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_files import (
    BLACKWELL,
    PAGES,
    TOKENSPEED,
    thresholds,
    write_model,
)

from calibrate import cli


def commands(page: Path) -> list[str]:
    blocks = re.findall(
        r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, smoke_run: Path) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_model(folder / "model")
    thresholds().save(folder / "thresholds.yaml")
    thresholds(geometry=BLACKWELL).save(folder / "blackwell.yaml")
    thresholds(decode=0.0, geometry=BLACKWELL).save(folder / "blackwell-prefill.yaml")
    thresholds(geometry=TOKENSPEED).save(folder / "gfx950.yaml")
    shutil.copytree(smoke_run, folder / "run")
    return folder


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_every_command_of_the_pages_runs(
    page: Path, prepared: Path, smoke_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    if page.stem == "README":  # its last command needs a model that can run
        shutil.rmtree(folder / "model")
        shutil.copytree(smoke_model, folder / "model")
    monkeypatch.chdir(folder)
    found = commands(page)
    assert found
    for line in found:
        expected = int(line.rpartition("# exit ")[2]) if "# exit " in line else 0
        words = shlex.split(line, comments=True)
        if words[0] == "calibrate":
            monkeypatch.setattr(sys, "argv", words)
            try:
                cli.main()
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        else:
            code = subprocess.run(["bash", "-ec", line], check=False).returncode
        assert code == expected, line
