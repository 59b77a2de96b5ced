"""vLLM's engine in this process with the planted model: how it is built, run and read.

Only this file of the bench knows vLLM (0.22 and 0.32). The caller sets VLLM_ENABLE_V1_MULTIPROCESSING=0
before it is imported, so that the engine runs in the caller's process.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planted_model
import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    PHASES,
    DecodeGeometry,
    Geometry,
    MinKvLen,
    ModelSection,
    PrefillGeometry,
    ScaleFactors,
)
from skip_softmax.vllm import counters

# Backends of vLLM by what we call them: its own, ours without a file, ours with one.
BACKENDS = {"stock": "FLASH_ATTN", "dense": "CUSTOM", "armed": "CUSTOM"}
_names = itertools.count()


@register_model_loader("planted")
class PlantedLoader(BaseModelLoader):
    """Makes the weights where the model lies, instead of reading them."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Sets every weight."""
        device = next(model.parameters()).device
        config = json.loads((Path(model_config.model) / "config.json").read_text(encoding="utf-8"))
        model.load_weights(planted_model.weights(config, device, model_config.dtype))


def thresholds(config: dict[str, Any], dtype: str) -> Thresholds:
    """A file that skips the planted model's quiet tiles, at the Hopper kernel's geometry."""
    return Thresholds(
        model=ModelSection(
            name="planted", sha256="none", layers=config["num_hidden_layers"],
            q_heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"], dtype=dtype,
        ),
        geometry=Geometry(
            prefill=PrefillGeometry(tile_q=64, tile_kv=128),
            decode=DecodeGeometry(tile_kv=64, running_max="seeded"),
        ),
        min_kv_len=MinKvLen(**dict.fromkeys(PHASES, planted_model.MIN_KV_LEN)),
        scale_factor=ScaleFactors(**dict.fromkeys(PHASES, planted_model.SCALE_FACTOR)),
    )  # fmt: skip


def engine(
    config: dict[str, Any],
    backend: str,
    *,
    block: int,
    chunk: int,
    longest: int,
    requests: int,
    dtype: str,
    **options: Any,
) -> LLM:
    """An engine with CUDA graphs for decode, and nothing compiled.

    Args:
        config: the model's, see `planted_model`.
        backend: a key of `BACKENDS`.
        block: page of the cache [tokens].
        chunk: most tokens of one step.
        longest: most tokens of a request.
        requests: most requests at a time.
        dtype: of weights and cache.
        options: others of `LLM`.
    """
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    own: dict[str, Any] = {}
    if backend == "armed":
        path = folder / "thresholds.yaml"
        thresholds(config, dtype).save(path)
        # Nobody calibrated a model of noise.
        allow = ["model", "unvalidated", "chunks"]
        own = {"skip_softmax": {"thresholds": str(path), "allow": allow}}
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < requests] + [requests]
    return LLM(
        str(folder), load_format="planted", skip_tokenizer_init=True, dtype=dtype, block_size=block,
        attention_backend=BACKENDS[backend], additional_config=own, max_model_len=longest,
        max_num_batched_tokens=chunk, max_num_seqs=requests,
        compilation_config={
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes,
        },
        **options,
    )  # fmt: skip


def version() -> dict[str, str]:
    """Of the vLLM that runs."""
    return {"vllm": vllm.__version__}


def attention_class(llm: LLM) -> str:
    """Name of the class that computes attention: vLLM on a CPU may choose another than was asked for."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    (name,) = {type(layer.impl).__name__ for layer in layers.values() if hasattr(layer, "impl")}
    return name


@dataclass(frozen=True)
class Pass:
    """What one batch of requests gave.

    Attributes:
        first_ms: from the batch's arrival to each request's first token [ms].
        step_ms: each decode step after the last of these [ms].
        tokens: what each request generated.
        top: log-probabilities by token at each of these [nats], if they were asked for.
    """

    first_ms: list[float]
    step_ms: list[float]
    tokens: list[list[int]]
    top: list[list[dict[int, float]]]


def run(
    llm: LLM, prompts: list[list[int]], steps: int | list[int], *, top: int | None = None
) -> Pass:
    """Serves a batch that arrives at once.

    Args:
        llm: the engine.
        prompts: token ids of each request.
        steps: decode steps with all requests running, after which the batch is dropped; or how many tokens
            each request generates.
        top: how many log-probabilities to return at each token.
    """
    core = llm.llm_engine
    asked = steps if isinstance(steps, list) else [1 << 20] * len(prompts)
    limit = llm.llm_engine.vllm_config.model_config.max_model_len
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    names = [str(next(_names)) for _ in prompts]
    for name, ids, most in zip(names, prompts, asked, strict=True):
        params = SamplingParams(
            temperature=0.0, max_tokens=min(most, limit - len(ids)), ignore_eos=True, detokenize=False,
            logprobs=top,
        )  # fmt: skip
        core.add_request(name, {"prompt_token_ids": ids}, params)
    first: dict[str, float] = {}
    after: list[float] = []  # when each step with all requests running ended
    latest: dict[str, Any] = {}
    while core.has_unfinished_requests() and steps != len(after) - 1:
        found = core.step()
        now = 1000 * (time.perf_counter() - started)
        for output in found:
            latest[output.request_id] = output.outputs[0]
            first.setdefault(output.request_id, now)
        if found and len(first) == len(names):
            after.append(now)
    if core.has_unfinished_requests():
        core.abort_request(names)
    for _ in range(2):  # a step that was scheduled ahead
        core.step()
    outputs = [latest[name] for name in names]
    return Pass(
        [first[name] for name in names],
        [later - earlier for earlier, later in itertools.pairwise(after)],
        [list(output.token_ids) for output in outputs],
        [
            [{token: x.logprob for token, x in position.items()} for position in output.logprobs or []]
            for output in outputs
        ],
    )  # fmt: skip


def clear_counts(llm: LLM) -> None:
    """Starts counting tiles anew."""
    llm.collective_rpc(counters.clear)


def sparsity(llm: LLM) -> dict[str, float | None]:
    """Skipped / visited tiles per phase, over all layers and heads; None: no tile was counted."""
    found = {}
    for phase, layers in llm.collective_rpc(counters.read)[0].items():
        total = (
            torch.tensor([pair for heads in layers.values() for pair in heads]).view(-1, 2).sum(0)
        )
        visited, skipped = total.tolist()
        found[phase] = skipped / visited if visited else None
    return found
