"""What workers count is on the page of metrics of the process that asks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_file
import pytest
import tiny
import vllm_serving as serving

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WHOLE: dict[str, Any] = {"max_model_len": 1100, "max_num_batched_tokens": 4096}


def on_the_page() -> tuple[dict[str, list[int]], dict[str, str]]:
    """Visited and skipped tiles per phase, and the labels of the info, as this process would show them."""
    from prometheus_client import REGISTRY

    tiles: dict[str, list[int]] = {"prefill": [0, 0], "decode": [0, 0]}
    info: dict[str, str] = {}
    for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
        for column, name in enumerate(("visited", "skipped")):
            if sample.name == f"skip_softmax_{name}_tiles_total":
                tiles[sample.labels["phase"]][column] += int(sample.value)
        if sample.name == "skip_softmax_info":
            info = dict(sample.labels)
    return tiles, info


def counted(llm: Any) -> dict[str, list[int]]:
    """The same from the workers themselves."""
    from skip_softmax.vllm import counters

    found = {"prefill": [0, 0], "decode": [0, 0]}
    for worker in llm.collective_rpc(counters.read):
        for phase, layers in worker.items():
            for visited, skipped in (head for heads in layers.values() for head in heads):
                found[phase][0] += visited
                found[phase][1] += skipped
    return found


def test_the_page_has_what_the_workers_count(little: Path, tmp_path: Path, served: Any) -> None:
    """0.22 on a CPU always has workers in processes of their own; here 0.32 has none."""
    file = planted_file.saved(little, tmp_path / "t.yaml")
    llm = served(little, file, **WHOLE)
    for seed in range(2):
        prompts = [tiny.tokens(length, seed)[0].tolist() for length in (1, 300, 900)]
        serving.generated(llm, prompts, 6)
        tiles, info = on_the_page()
        assert tiles == counted(llm)
        assert all(0 < skipped < visited for visited, skipped in tiles.values())
    assert (info["verdict"], info["armed_layers"]) == ("passed", "2")


def test_a_server_without_a_file_says_so(little: Path, served: Any) -> None:
    llm = served(little, **WHOLE)
    serving.generated(llm, [tiny.tokens(900)[0].tolist()], 4)
    tiles, info = on_the_page()
    assert (info["verdict"], info["thresholds_sha256"], info["armed_layers"]) == ("none", "", "0")
    assert all(visited > 0 == skipped for visited, skipped in tiles.values())
