"""A whole run whose prompts are computed in chunks, as servers compute them."""

from __future__ import annotations

import json

import pytest
from conftest import aimed_run

import calibrate
from calibrate.loss.measure import compare
from calibrate.pipeline import Stages
from calibrate.schema import load_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    """To read only."""
    return aimed_run(tmp_path_factory.mktemp("chunks"), "geometry.prefill.chunk=64")


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
