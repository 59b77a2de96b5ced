"""With a thresholds file the plug-in skips what `applied` skips on the same tokens, and gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_file
import pytest
import tiny
import torch
import vllm_serving as serving

import skip_softmax as ss

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

LENGTHS = (1, 90, 129, 400, 777, 1000)
COUNT = 12
# Prompts are computed whole, as they were calibrated, and no two share a page.
WHOLE: dict[str, Any] = {
    "max_model_len": 1100,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": False,
}


def prompts() -> list[list[int]]:
    return [tiny.tokens(length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]


def counted(llm: Any) -> dict[str, torch.Tensor]:
    """Tiles per phase [layers, heads, visited and skipped]."""
    from skip_softmax.vllm import counters

    (of_worker,) = llm.collective_rpc(counters.read)
    return {phase: torch.tensor(list(layers.values())) for phase, layers in of_worker.items()}


def cleared(llm: Any) -> Any:
    from skip_softmax.vllm import counters

    llm.collective_rpc(counters.clear)
    return llm


def by_applied(
    folder: Path, file: Path, requests: list[list[int]]
) -> tuple[list[list[int]], list[list[float]], dict[str, torch.Tensor]]:
    """Greedy tokens, their log-probabilities, and tiles as `counted` has them."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, logs = [], []
    with ss.applied(model, file) as counts, torch.inference_mode():
        for prompt in requests:
            done = model.generate(
                torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None,
                attention_mask=torch.ones(1, len(prompt)), output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
            tokens.append(done.sequences[0, len(prompt) :].tolist())
            logs.append([float(score[0].log_softmax(-1).max()) for score in done.scores])
    found = {phase: torch.stack([c.visited, c.skipped], -1) for phase, c in counts.items()}
    return tokens, logs, found


def log_probabilities(
    llm: Any, requests: list[list[int]]
) -> tuple[list[list[int]], list[list[float]]]:
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0.0, max_tokens=COUNT, ignore_eos=True, detokenize=False, logprobs=1
    )
    done = llm.generate([{"prompt_token_ids": p} for p in requests], greedy, use_tqdm=False)
    outputs = [request.outputs[0] for request in done]
    logs = [
        [step[token].logprob for token, step in zip(out.token_ids, out.logprobs, strict=True)]
        for out in outputs
    ]
    return [list(out.token_ids) for out in outputs], logs


def check(
    folder: Path, file: Path, served: Any, requests: list[list[int]], **changes: Any
) -> dict[str, torch.Tensor]:
    llm = cleared(served(folder, file, **{**WHOLE, **changes}))
    tokens, logs = log_probabilities(llm, requests)
    wanted_tokens, wanted_logs, wanted = by_applied(folder, file, requests)
    found = counted(llm)
    for phase in ("prefill", "decode"):
        assert found[phase].tolist() == wanted[phase].tolist(), phase
    assert tokens == wanted_tokens
    torch.testing.assert_close(torch.tensor(logs), torch.tensor(wanted_logs), atol=1e-4, rtol=0)
    return found


def test_tiles_and_log_probabilities_are_those_of_applied(
    little: Path, tmp_path: Path, served: Any
) -> None:
    file = planted_file.saved(little, tmp_path / "t.yaml")
    found = check(little, file, served, prompts())
    for phase, tiles in found.items():
        visited, skipped = tiles.sum((0, 1)).tolist()
        assert 0.05 < skipped / visited < 0.95, phase


def test_an_fp8_cache_skips_what_applied_skips_over_one(
    little: Path, tmp_path: Path, served: Any
) -> None:
    planted = planted_file.thresholds(little)
    section = planted.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})
    file = tmp_path / "t.yaml"
    planted.model_copy(update={"model": section}).save(file)
    found = check(little, file, served, prompts(), kv_cache_dtype="fp8")
    other = planted_file.saved(little, tmp_path / "own.yaml")
    own = by_applied(little, other, prompts())[2]
    for phase, tiles in found.items():
        visited, skipped = tiles.sum((0, 1)).tolist()
        assert 0.05 < skipped / visited < 0.95, phase
        assert tiles.tolist() != own[phase].tolist()  # the cache's dtype changes decisions


def test_chunks_are_those_that_were_calibrated_and_a_last_token_alone_is_prefill(
    little: Path, tmp_path: Path, served: Any
) -> None:
    geometry = {
        "prefill": {"tile_q": 16, "tile_kv": 32, "dense_last": 8, "chunk": 256},
        "decode": {"tile_kv": 32},
    }
    file = planted_file.saved(little, tmp_path / "t.yaml", geometry=geometry)
    requests = [tiny.tokens(length, length)[0].tolist() for length in (257, 513, 700)]
    # One request at a time: several would share a step, and be cut elsewhere.
    found = check(little, file, served, requests, max_num_batched_tokens=256, max_num_seqs=1)
    visited, skipped = found["prefill"].sum((0, 1)).tolist()
    assert 0.05 < skipped / visited < 0.95


def test_a_real_model_skips_what_applied_skips(
    smollm2_folder: Path, tmp_path: Path, served: Any
) -> None:
    file = planted_file.saved(
        smollm2_folder, tmp_path / "t.yaml", layers=[{"layer": 3, "decode": [0.0, 9.0, 30.0]}],
        min_kv_len={"prefill": 256, "decode": 40},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    requests = [
        torch.randint(2, 49152, (length,), generator=generator).tolist()
        for length in (50, 300, 450)
    ]
    found = check(smollm2_folder, file, served, requests)
    for phase, tiles in found.items():
        assert tiles[..., 1].sum() > 0, phase


def test_two_ranks_skip_in_their_own_heads_what_one_skips_in_all(
    little: Path, tmp_path: Path, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skip_softmax.vllm import counters

    file = planted_file.saved(little, tmp_path / "t.yaml")
    alone = cleared(served(little, file, **WHOLE))
    tokens = serving.generated(alone, prompts(), COUNT)
    found = counted(alone)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # else they want a NUMA node each
    two = cleared(served(little, file, tensor_parallel_size=2, **WHOLE))
    assert serving.generated(two, prompts(), COUNT) == tokens
    ranks = two.collective_rpc(counters.read)
    for phase, tiles in found.items():
        split = torch.cat([torch.tensor(list(rank[phase].values())) for rank in ranks], 1)
        assert split.tolist() == tiles.tolist(), phase
