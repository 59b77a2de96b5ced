"""Drafted tokens. The file's name puts it last: after drafts, vLLM 0.32.0 can start no other engine.

Drafts import numba, and vLLM's search of all modules for kernels trips over its llvmlite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_file
import pytest
import tiny
import vllm_serving as serving

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WHOLE: dict[str, Any] = {
    "max_model_len": 1100,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": False,
}


@pytest.mark.skipif(serving.version() < (0, 23), reason="its check of drafts needs its binaries")
def test_drafts_are_verified_as_if_they_came_one_by_one(
    little: Path, tmp_path: Path, served: Any
) -> None:
    prompts = [tiny.tokens(length, length)[0].tolist() for length in (1, 90, 400, 1000)]
    file = planted_file.saved(little, tmp_path / "t.yaml")
    wanted = serving.generated(served(little, file, **WHOLE), prompts)
    drafting = served(
        little, file, disable_log_stats=False, **WHOLE,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1,
        },
    )  # fmt: skip
    assert serving.generated(drafting, prompts) == wanted
    found = {metric.name: metric for metric in drafting.get_metrics()}
    assert found["vllm:spec_decode_num_draft_tokens"].value > 0
