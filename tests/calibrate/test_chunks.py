"""A whole run whose prompts are computed in chunks, as servers compute them."""

from __future__ import annotations

import json

import pytest
import tiny
from conftest import SMOKE

import calibrate
from calibrate.loss.measure import compare
from calibrate.pipeline import Stages
from calibrate.schema import load_config

CHANGES = (
    "geometry.prefill.chunk=64",
    "target.target_sparsity={prefill: 0.11, decode: 0.5}",
    "target.min_kv_len={prefill: 128, decode: 200}",
    "prompts.lengths=[384]",
    "prompts.calibration=2",
    "prompts.heldout=8",
    "budget.kl=100",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    """A target in place of a search, and a budget that few prompts can prove. To read only."""
    folder = tmp_path_factory.mktemp("chunks")
    tiny.write_smoke_model(folder / "model")
    text = SMOKE.read_text(encoding="utf-8").replace("../runs/smoke-model", str(folder / "model"))
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return calibrate.run(folder / "c.yaml", folder / "run", overrides=CHANGES)


def test_a_run_counts_and_proves_chunks_and_its_file_says_so(run: calibrate.Run) -> None:
    file, statistics = run.thresholds, run.stats
    assert file.evidence["verdict"] == "passed", file.evidence
    assert "chunk: 64" in (run.folder / "thresholds.yaml").read_text(encoding="utf-8")
    assert file.geometry.prefill is not None and file.geometry.prefill.chunk == 64
    assert statistics.identity["geometry"]["prefill"]["chunk"] == 64
    assert statistics.identity["min_kv_len"] == 128
    assert "chunk 64" in (run.folder / "report.html").read_text(encoding="utf-8")
    stages = Stages(run.folder, load_config(run.folder / "config.yaml"))
    prompt = stages.prompts["heldout"][0]
    # What the proof measured is what the file does, and that is not what whole prompts would give.
    outcome = compare(stages.loaded, file, prompt, stages.dense(prompt))
    lines = (run.folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    proven = [row["measured"] for row in rows if row["prompt"] == prompt.key]
    assert outcome.skipped in [row["skipped"] for row in proven]
    prefill = file.geometry.prefill.model_copy(update={"chunk": None})
    geometry = file.geometry.model_copy(update={"prefill": prefill})
    whole = file.model_copy(update={"geometry": geometry})
    other = compare(stages.loaded, whole, prompt, stages.dense(prompt))
    assert sum(outcome.skipped["prefill"]) > sum(other.skipped["prefill"]) > 0
    assert outcome.visited == other.visited
