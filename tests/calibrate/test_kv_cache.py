"""A whole run over an FP8 KV cache: statistics, losses and proof are of it, and the file says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import aimed_run

import calibrate
from calibrate.errors import UserError
from calibrate.loss.measure import compare, compare_unguarded
from calibrate.model.forward import forward, served_densely
from calibrate.pipeline import Stages
from calibrate.report import tables
from calibrate.schema import load_config
from calibrate.statistics.capture import empty_statistics, observe
from calibrate.transfer import assess_thresholds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    """To read only."""
    return aimed_run(tmp_path_factory.mktemp("fp8"), "model.kv_cache_dtype=fp8_e4m3")


def test_the_file_and_the_statistics_say_which_cache(run: calibrate.Run) -> None:
    file = run.thresholds
    assert file.evidence["verdict"] == "passed", file.evidence
    assert file.model.kv_cache_dtype == "fp8_e4m3" == run.stats.identity["kv_cache_dtype"]
    assert "for a KV cache of fp8_e4m3 with scales of 1" in tables.phases(file).notes
    own = file.model_copy(update={"model": file.model.model_copy(update={"kv_cache_dtype": None})})
    with pytest.raises(UserError, match="tiles and KV cache; leave --run out"):
        run.stats_for(own)
    stages = Stages(run.folder, load_config(run.folder / "config.yaml"))
    with pytest.raises(UserError, match="KV cache, but it is for auto and the run's is fp8_e4m3"):
        assess_thresholds(stages, own)


def test_every_pass_reads_rounded_keys(run: calibrate.Run) -> None:
    stages = Stages(run.folder, load_config(run.folder / "config.yaml"))
    prompt, fp8 = stages.prompts["heldout"][0], stages.loaded
    own = replace(fp8, kv_cache_dtype=None)
    dense = stages.dense(prompt)
    with served_densely(fp8):
        assert torch.equal(forward(fp8, prompt).float(), dense)
    assert not torch.equal(forward(own, prompt).float(), dense)
    counted = []
    for loaded in (fp8, own):
        statistics = empty_statistics(loaded, stages.config.geometry, [384])
        logits = observe(loaded, prompt, statistics, stages.config.geometry)
        counted.append(statistics.counts["prefill"])
        assert ((logits - dense).abs().max() < 1e-4) == (loaded is fp8)
    assert not torch.equal(*counted)
    for measure in (compare, compare_unguarded):
        outcome = measure(fp8, run.thresholds, prompt, dense)
        assert sum(map(sum, outcome.skipped.values())) > 0 and 0 < outcome.losses["kl"] < 100
    dense_file = run.thresholds.model_copy(update={"scale_factor": {}, "layers": ()})
    dense_file = type(run.thresholds).model_validate(dense_file.model_dump())
    assert compare(fp8, dense_file, prompt, dense).losses["kl"] < 1e-6


def test_a_serving_engine_is_refused() -> None:
    model = {"path": "some/model", "engine": "vllm-native", "kv_cache_dtype": "fp8_e4m3"}
    with pytest.raises(ValueError, match="`kv_cache_dtype` must be auto for `engine: vllm-native`"):
        load_config({"model": model})
