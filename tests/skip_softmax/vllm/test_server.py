"""A server as users start it, `vllm serve`: its counters, and the commands of the plug-in's page."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted_file
import pytest
import tiny
import vllm_serving as serving

import skip_softmax as ss
from calibrate import cli
from calibrate.serving import bench
from calibrate.serving.client import Server
from calibrate.serving.probe import probe, totals

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

OLD = serving.version() < (0, 23)
LONGEST = 1100
# What a CPU needs, and a model of this size.
OPTIONS = (
    f"--dtype float32 --enforce-eager --max-model-len {LONGEST} --max-num-batched-tokens 4096 "
    "--max-num-seqs 8 "
    '--compilation-config \'{"custom_ops": ["none"]}\''
)
LOAD = "--random-input-len 300 --random-output-len 8 --num-prompts 6 --goodput ttft:60000"
PROMPT = "The standard type hierarchy has numbers, sequences and mappings. " * 12
COUNT = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, little: Path) -> Iterator[Path]:
    """The folder in which the page's commands run."""
    here = tmp_path_factory.mktemp("here")
    shutil.copytree(little, here / "MODEL")
    tiny.tokenizer().save_pretrained(here / "MODEL")
    planted_file.saved(here / "MODEL", here / "thresholds.yaml")
    (here / "prompt.txt").write_text(PROMPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("no_proxy", "*")
        patch.delenv(
            "VLLM_ENABLE_V1_MULTIPROCESSING"
        )  # a server's workers are processes of their own
        yield here


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """The page's server."""
    command = [*bench._command(), *serving.commands()["vllm serve"][1:], *shlex.split(OPTIONS)]
    with bench.serving(command, folder / "log", patience=300) as started:
        yield started


def by_applied(folder: Path, count: int) -> dict[str, list[int]]:
    """Visited and skipped tiles per phase of the prompt and its greedy continuation."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "MODEL", dtype=torch.float32
    )
    prompt = torch.tensor([tiny.tokenizer()(PROMPT).input_ids])
    with ss.applied(model, folder / "thresholds.yaml") as counts, torch.inference_mode():
        model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return {
        phase: [int(tiles.visited.sum()), int(tiles.skipped.sum())]
        for phase, tiles in counts.items()
    }


def test_a_prompt_s_tiles_on_the_page_of_metrics_are_those_of_applied(
    server: Server, folder: Path
) -> None:
    for _ in range(2):  # the second time the prompt is not taken from the prefix cache
        found = probe(server, PROMPT, tokens=COUNT)
        assert (found.skipping, found.exact, found.notes) == ("on", True, [])
        assert found.generated == COUNT
        tiles = {row.phase: [row.visited, row.skipped] for row in totals(found.tiles)}
        assert tiles == by_applied(folder, COUNT)
        assert 0 < tiles["prefill"][1] < tiles["prefill"][0]
        assert {row.layers for row in found.tiles} == {"0-7"}
    log = (folder / "log").read_text()
    assert log.count("for planted; ") == 1, "a probe must not read the file again"
    assert found.serving is not None
    sha256 = hashlib.sha256((folder / "thresholds.yaml").read_bytes()).hexdigest()
    assert (found.serving.sha256, found.serving.verdict) == (sha256, "passed")
    file = ss.Thresholds.load(folder / "thresholds.yaml")
    assert found.serving.armed_layers == file.model.layers
    assert found.serving.min_kv_len == {
        "prefill": file.min_kv_len.prefill,
        "decode": file.min_kv_len.decode,
    }


def test_the_page_s_probe(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        server.url if word.startswith("http") else word
        for word in serving.commands()["calibrate probe"]
    ]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None), printed.err
    assert "skipping  on" in printed.out and "verdict passed" in printed.out


def test_beside_itself_a_server_shows_no_sign(server: Server) -> None:
    """Its log-probabilities are read, and every answer is computed anew."""
    before = probe(server)
    found = probe(server, PROMPT, tokens=COUNT, against=server, repeats=2).against
    assert found is not None
    assert (found.tokens_compared, found.tokens, found.differs) == (2 * COUNT, 2 * COUNT, False)
    assert found.largest_difference < 1e-4
    visited = [
        {row.phase: row.visited for row in totals(page.tiles)} for page in (before, probe(server))
    ]
    own = {row.phase: row.visited for row in totals(probe(server, PROMPT, tokens=COUNT).tiles)}
    # The one whose tiles are counted; two to warm up, and three for each repeat.
    assert {phase: visited[1][phase] - visited[0][phase] for phase in own} == {
        phase: 9 * count for phase, count in own.items()
    }


@pytest.mark.skipif(OLD, reason="its own attention, the dense server's, needs its binaries")
def test_a_dense_and_a_calibrated_server_under_the_same_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*serving.commands()["calibrate serve-bench"], "--serve", OPTIONS, "--load", LOAD]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None), printed.err
    for heading in ("TTFT, median [ms]", "TPOT, median [ms]", "output [tokens/s]", "goodput [1/s]"):
        assert heading in printed.out
    (made,) = folder.glob("**/serving.json")
    found = json.loads(made.read_text())
    dense, calibrated = found["results"]["dense"], found["results"]["calibrated"]
    assert dense["completed"] == calibrated["completed"] == 6
    assert dense["total_output_tokens"] == calibrated["total_output_tokens"] == 48
    skipped = {row["phase"]: row["skipped"] for row in found["tiles"]}
    assert skipped["prefill"] > 0 and skipped["decode"] > 0
