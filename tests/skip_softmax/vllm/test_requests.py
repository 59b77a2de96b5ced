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
COUNT = 20


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


def test_dense_requests_that_share_prefixes_chunks_and_too_small_a_cache(
    little: Path, served: Any
) -> None:
    prompts = requests(REQUESTS, shared=True)
    wanted = alone(served(little, **ONE_BY_ONE), prompts)
    # Its pages hold little more than the longest request, so that others are preempted when they grow.
    crowded = served(
        little, max_model_len=8192, max_num_batched_tokens=1024, max_num_seqs=32,
        num_gpu_blocks_override=540, block_size=16, disable_log_stats=False,
    )  # fmt: skip
    assert together(crowded, prompts) == wanted
    found = {metric.name: metric for metric in crowded.get_metrics()}
    assert found["vllm:num_preemptions"].value > 0
    assert found["vllm:prefix_cache_hits"].value > 0


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
