"""Random requests through one engine: each gets the tokens that it gets alone."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import planted_file
import pytest
import tiny
import vllm_serving as serving

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

REQUESTS = int(os.environ.get("SKIP_SOFTMAX_REQUESTS", "100"))
LONGEST = 8000
COUNT = 6


def requests(count: int, *, shared: bool) -> list[list[int]]:
    """Prompts of 1 to 8000 tokens, evenly by logarithm; with `shared` half of them begin like another."""
    draw = random.Random(count)
    found: list[list[int]] = []
    for seed in range(count):
        length = round(2 ** draw.uniform(0, 12.96))
        prompt = tiny.tokens(length, seed)[0].tolist()
        if shared and found and draw.random() < 0.5:
            before = draw.choice(found)
            same = draw.randint(0, min(len(before), LONGEST - 1))
            prompt = [*before[:same], *prompt][:LONGEST]
        found.append(prompt)
    return found


def together(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    return serving.generated(llm, prompts, COUNT)


def alone(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [serving.generated(llm, [prompt], COUNT)[0] for prompt in prompts]


ONE_BY_ONE: dict[str, Any] = {
    "max_model_len": 8192, "max_num_batched_tokens": 8192, "enable_prefix_caching": False, "max_num_seqs": 1,
}  # fmt: skip


def test_dense_requests_that_share_prefixes_and_chunks(little: Path, served: Any) -> None:
    prompts = requests(REQUESTS, shared=True)
    wanted = alone(served(little, **ONE_BY_ONE), prompts)
    crowded = served(
        little, max_model_len=8192, max_num_batched_tokens=1024, max_num_seqs=32,
        num_gpu_blocks_override=540, block_size=16, disable_log_stats=False,
    )  # fmt: skip
    assert together(crowded, prompts) == wanted
    assert metric(crowded, "prefix_cache_hits") > 0


def test_dense_requests_that_outgrow_their_cache(little: Path, served: Any) -> None:
    prompts = [tiny.tokens(180 + seed, seed)[0].tolist() for seed in range(24)]
    wanted = [
        serving.generated(llm, [prompt], 80)[0]
        for llm in [served(little, **ONE_BY_ONE)]
        for prompt in prompts
    ]
    # Pages for the prompts of a dozen, and for what half of these generate.
    small = served(
        little, max_model_len=1024, max_num_batched_tokens=1024, max_num_seqs=24,
        num_gpu_blocks_override=160, block_size=16, disable_log_stats=False,
    )  # fmt: skip
    assert serving.generated(small, prompts, 80) == wanted
    assert metric(small, "num_preemptions") > 0


def metric(llm: Any, name: str) -> int:
    (found,) = (metric for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
    count: int = found.value
    return count


def test_requests_whose_prompts_are_not_cut_skip_as_they_do_alone(
    little: Path, tmp_path: Path, served: Any
) -> None:
    prompts = requests(REQUESTS // 2, shared=False)
    file = planted_file.saved(little, tmp_path / "t.yaml")
    wanted = alone(served(little, file, **ONE_BY_ONE), prompts)
    whole = served(
        little, file, max_model_len=8192, max_num_batched_tokens=8192, enable_prefix_caching=False,
        enable_chunked_prefill=False,
    )  # fmt: skip
    assert together(whole, prompts) == wanted
