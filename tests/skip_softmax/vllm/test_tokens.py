"""Dense, the plug-in generates what vLLM's own attention generates, and what transformers generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vllm_serving as serving

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

OLD = serving.version() < (0, 23)


def eight(vocabulary: int) -> list[list[int]]:
    """Prompts of 1 to 893 tokens; the last two share 480 tokens with the third."""
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> list[int]:
        return torch.randint(2, vocabulary, (count,), generator=generator).tolist()

    long = text(513)
    return [
        text(1),
        text(5),
        long,
        text(893),
        text(64),
        text(257),
        long[:480] + text(33),
        long[:480],
    ]


def by_transformers(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            done = model.generate(
                torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None,
                attention_mask=torch.ones(1, len(prompt)),
            )  # fmt: skip
            found.append(done[0, len(prompt) :].tolist())
    return found


# Chunks of 256 at most, shared with whatever decodes; a page holds 32 tokens.
OPTIONS: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 256, "block_size": 32}


def check(folder: Path, served: Any, vocabulary: int, count: int) -> None:
    prompts = eight(vocabulary)
    ours = served(folder, **OPTIONS)
    together = serving.generated(ours, prompts[:6], count) + serving.generated(
        ours, prompts[6:], count
    )
    if OLD:  # its own attention needs its binaries
        wanted = by_transformers(folder, prompts, count)
    else:
        stock = served(folder, attention_backend="CPU_ATTN", **OPTIONS)
        wanted = serving.generated(stock, prompts[:6], count)
        wanted += serving.generated(stock, prompts[6:], count)
    assert together == wanted


def test_a_little_model_s_tokens(little: Path, served: Any) -> None:
    check(little, served, tiny.VOCABULARY, 16)


def test_a_real_model_s_tokens(smollm2_folder: Path, served: Any) -> None:
    check(smollm2_folder, served, 49152, 12)
