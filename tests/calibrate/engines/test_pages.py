"""The pages of the engines: every command in them runs."""

from __future__ import annotations

import json
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
from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export


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
    thresholds(decode=0.0, geometry=BLACKWELL, kv_heads=8).save(folder / "blackwell-prefill.yaml")
    thresholds(decode=0.0).save(folder / "prefill.yaml")
    (folder / "transformer").mkdir()
    config = {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 128}
    (folder / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **config})
    )
    thresholds(geometry=TOKENSPEED).save(folder / "gfx950.yaml")
    shutil.copytree(smoke_run, folder / "run")
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_every_page_names_its_release_and_says_what_a_prefix_cache_means(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    heading = text.partition("\n")[0]
    assert name == "native" or re.search(r"\d+\.\d+", heading), heading
    assert "\nPrefix caches" in text and "README.md#prefix-caches" in text


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "native"])
def test_every_sidecar_says_what_a_prefix_cache_means(name: str) -> None:
    engine = ENGINES[name]
    geometry = TOKENSPEED if engine.servers[0].gpu == "gfx950" else BLACKWELL
    file = thresholds(decode=0.0, geometry=geometry)
    length = 9000 if engine.absolute else None
    made = export(file, name, pin=True, experimental=True, at_length=length)
    said = made.sidecar["prefix_cache"]
    assert ("keeps the number that it was computed with" in said) == engine.kv_cache
    assert engine.prefix_cache and said.endswith(engine.prefix_cache)


# What the plug-in's page says needs vLLM: tests/skip_softmax/vllm/test_server.py runs it.
@pytest.mark.parametrize(
    "page",
    sorted({*PAGES.glob("*.md")} - {PAGES / "vllm_plugin.md"}),
    ids=lambda page: page.stem,
)
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


def test_the_plug_in_s_page_names_every_refusal_that_a_user_may_overrule() -> None:
    from skip_softmax.vllm.checks import INSISTED

    text = (PAGES / "vllm_plugin.md").read_text(encoding="utf-8")
    refusals = text.partition("## What is refused")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", refusals, re.MULTILINE)) == set(INSISTED)


def test_the_plug_in_s_page_names_every_metric() -> None:
    """`calibrate probe` reads them; a server writes them."""
    from calibrate.serving import probe

    text = (PAGES / "vllm_plugin.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(skip_softmax_\w+)` \|", text, re.MULTILINE))
    assert named == {probe.VISITED, probe.SKIPPED, probe.INFO, probe.WORKERS}
