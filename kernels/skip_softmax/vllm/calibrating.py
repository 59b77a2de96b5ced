"""An engine of vLLM that a calibration runs its prompts through: paging, chunks and kernels of the server.

A prompt is sent with its continuation, alone, and its tokens from the continuation on are decode steps. What
is measured is what `SkipSoftmaxImpl` serves, with numbers that it is given at run time; only the dense pass
that counts tiles computes attention otherwise, see `passes.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from skip_softmax.meaning.histogram import BINS, TileHistogram
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, DecodeGeometry, Phase, PrefillGeometry

# Read when vLLM is imported, and when it starts. Its log goes to stdout by default, which is the caller's.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other does not say who reads a prompt, see `batch.py`
}


@dataclass(frozen=True)
class ServedLayer:
    """An attention layer that runs with our backend.

    Attributes:
        index: layer index.
        name: vLLM's name of the module around it, for example `model.layers.3.self_attn`.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: size of a head.
        window: sliding window [tokens] or None.
    """

    index: int
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None


LayerTiles = tuple[int, Phase, int, TileHistogram]
"""Layer, phase, KV length of the prompt (of each decode step if they are told apart) [tokens], its tiles."""


class Engine:
    """A model inside vLLM, with the backend CUSTOM; it is dense until a call gives it numbers.

    Attributes:
        chunk: prompts are computed in chunks of so many tokens; None: whole.
        longest: most tokens of a request, the generated ones included.
        depth: layers of the model, of whatever kind.
        shape: query heads, KV heads and head size that the model says it has.
        layers: those that run with our backend, in order.
        vocabulary: token ids that the model can read, from 0 on.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        longest: int,
        chunk: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts vLLM, which takes minutes for a large model.

        Args:
            model: folder or hub id.
            dtype: of the weights as run.
            longest: most tokens of a request, the generated ones included: one more than the longest prompt
                with its continuation.
            chunk: prefill chunk [tokens]; None: whole prompts.
            revision: of a hub id.
            trust_remote_code: whether to run code that comes with a hub model.
            options: more keywords of `vllm.LLM`, for the machine (`gpu_memory_utilization`) and not for what
                is computed.

        Raises:
            ValueError: vLLM ignores the backend, or has layers that it cannot tell apart.
            Exception: vLLM's own, of whatever kind: it cannot start.
        """
        self.chunk, self.longest = chunk, longest
        self._llm: Any = _started(
            model=model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            skip_tokenizer_init=True,
            attention_backend="CUSTOM",
            worker_extension_cls="skip_softmax.vllm.passes.Passes",
            enforce_eager=True,
            # One request at a time, which only the chunk cuts, and which reads nothing from a cache.
            max_num_seqs=1,
            max_model_len=longest,
            max_num_batched_tokens=longest if chunk is None else chunk,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **(options or {}),
        )
        try:
            found: list[dict[str, Any]] = self._llm.collective_rpc("skip_softmax_model")
            about = found[0]
            self.depth, self.vocabulary = int(about["layers"]), int(about["vocabulary"])
            self.shape = int(about["q_heads"]), int(about["kv_heads"]), int(about["head_dim"])
            self.layers = _layers(found)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees the memory; the engine cannot be used afterwards."""
        self._llm.llm_engine.engine_core.shutdown()

    def logits(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        thresholds: Thresholds | None = None,
    ) -> tuple[torch.Tensor, dict[Phase, torch.Tensor]]:
        """Runs a prompt with its continuation, whose tokens are decode steps.

        Args:
            prompt: its tokens.
            continuation: tokens behind it.
            thresholds: what to run; None: every layer is dense.

        Returns:
            Logits [continuation + 1, vocabulary], float32: of the last prompt token and of every token behind
            it; and visited and skipped tiles per phase, int64 [layers, heads that vote, 2].

        Raises:
            ValueError: the thresholds are for other chunks, or the request is too long for this engine.
        """
        answers = self._teacher_forced(prompt, continuation, thresholds)
        counts = {phase: self._counts(answers, phase) for phase in PHASES}
        return _logits(answers), counts

    def tiles(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        prefill: PrefillGeometry,
        decode: DecodeGeometry,
        *,
        floor: int = 0,
        each_step: bool = False,
    ) -> tuple[torch.Tensor, list[LayerTiles]]:
        """Runs a prompt with its continuation densely, and counts tiles by critical scale factor.

        Args:
            prompt: its tokens.
            continuation: tokens behind it, which are decode steps.
            prefill: tiles of the prompt.
            decode: tiles of the continuation.
            floor: prefill chunks that end before so many tokens never skip.
            each_step: whether to tell the decode steps apart.

        Returns:
            The logits, as of `logits`, and the tiles of every layer and phase.

        Raises:
            ValueError: the tiles are for other chunks, or the request is too long for this engine.
        """
        self._require_chunk(prefill.chunk)
        asked = {
            "prefill": prefill.keywords,
            "decode": decode.keywords,
            "floor": floor,
            "each_step": each_step,
        }
        answers = self._teacher_forced(prompt, continuation, None, asked)
        rows = zip(*(answer["tiles"] for answer in answers), strict=True)
        return _logits(answers), [_tiles(list(of_workers)) for of_workers in rows]

    def generated(
        self,
        prompt: Sequence[int],
        tokens: int,
        ends: Sequence[int],
        thresholds: Thresholds | None = None,
    ) -> list[int]:
        """Continues a prompt with the token ranked first, again and again, as the server does.

        Args:
            prompt: its tokens.
            tokens: how many to write at most.
            ends: tokens that end the text.
            thresholds: what to run; None: every layer is dense.

        Returns:
            The tokens; the last one may be one of `ends`.

        Raises:
            ValueError: the thresholds are for other chunks, or the request is too long for this engine.
        """
        written, _ = self._run(
            prompt, {"keep": 0, "decode_from": None, "tiles": None}, thresholds, tokens, ends
        )
        return written

    def _teacher_forced(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        thresholds: Thresholds | None,
        tiles: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        asked = {"keep": len(continuation) + 1, "decode_from": len(prompt), "tiles": tiles}
        ids = [*prompt, *continuation]
        _, answers = self._run(ids, asked, thresholds)
        if any(answer["tokens"] != len(ids) for answer in answers):
            raise RuntimeError(
                f"each step must run this request alone, but of {len(ids)} tokens vLLM ran "
                f"{answers[0]['tokens']}; start again"
            )
        return answers

    def _run(
        self,
        ids: Sequence[int],
        asked: dict[str, Any],
        thresholds: Thresholds | None,
        tokens: int = 1,
        ends: Sequence[int] = (),
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Tokens that were written, and the answer of each worker."""
        from vllm import SamplingParams

        if len(ids) + tokens > self.longest:
            raise ValueError(
                f"a request must be within the {self.longest} tokens that this engine was started for, but "
                f"got {len(ids)} and {tokens} to generate; start another"
            )
        if thresholds is not None:
            self._require_chunk(thresholds.geometry.chunk)
        given = None if thresholds is None else thresholds.model_dump(mode="json")
        asked = {**asked, "tokens": len(ids), "thresholds": given}
        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            stop_token_ids=list(ends),
            detokenize=False,
        )
        self._llm.collective_rpc("skip_softmax_begin", args=(asked,))
        try:
            (done,) = self._llm.generate([{"prompt_token_ids": list(ids)}], greedy, use_tqdm=False)
        finally:
            answers: list[dict[str, Any]] = self._llm.collective_rpc("skip_softmax_end")
        return list(done.outputs[0].token_ids), answers

    def _require_chunk(self, chunk: int | None) -> None:
        if chunk != self.chunk:
            ours, theirs = (
                "whole" if size is None else f"in chunks of {size} tokens"
                for size in (self.chunk, chunk)
            )
            raise ValueError(
                f"numbers must be measured in the chunks that they are for, but this engine computes prompts "
                f"{ours}, and they are for prompts {theirs}; start another with geometry.prefill.chunk"
            )

    def _counts(self, answers: list[dict[str, Any]], phase: Phase) -> torch.Tensor:
        heads = max(
            layer.q_heads if phase == "prefill" else layer.kv_heads for layer in self.layers
        )
        found = torch.zeros(self.depth, heads, 2, dtype=torch.int64)
        for rows in zip(*(answer["counts"] for answer in answers), strict=True):
            index, of_phase, _ = rows[0]
            if of_phase == phase:
                counts = torch.tensor([head for _, _, heads in rows for head in heads])
                found[index, : len(counts)] = counts
        return found


def _started(**keywords: Any) -> Any:
    """An engine of vLLM, whose processes find our environment where the user's says nothing."""
    unsaid = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(unsaid)
    try:
        from vllm import LLM

        return LLM(**keywords)
    finally:
        for name in unsaid:
            os.environ.pop(name, None)


def _layers(found: list[dict[str, Any]]) -> list[ServedLayer]:
    """The layers from what each worker says of them; workers share the heads of each."""
    first = found[0]
    if not first["ours"]:
        raise ValueError(
            "vLLM must run attention with the backend CUSTOM, but it ignores that choice on this platform; "
            "use a CUDA device"
        )
    indices = [one["index"] for one in first["ours"]]
    if None in indices or len(set(indices)) < len(indices):
        names = ", ".join(one["name"] for one in first["ours"])
        raise ValueError(
            f"each attention layer must have an index of its own, but this model has {names}; calibrate it "
            "with another engine"
        )
    if len(found) * first["ours"][0]["kv_heads"] > first["kv_heads"] and len(found) > 1:
        raise ValueError(
            f"each KV head must be on one worker, but {len(found)} workers share {first['kv_heads']}; use a "
            "smaller tensor_parallel_size"
        )
    return sorted(
        (
            ServedLayer(
                one["index"],
                one["name"].removesuffix(".attn"),
                one["q_heads"] * len(found),
                one["kv_heads"] * len(found),
                one["head_dim"],
                one["window"],
            )
            for one in first["ours"]
        ),
        key=lambda layer: layer.index,
    )


def _logits(answers: list[dict[str, Any]]) -> torch.Tensor:
    found, shape = next(answer["logits"] for answer in answers if answer["logits"] is not None)
    return _tensor(found, torch.float32).view(*shape)


def _tiles(of_workers: list[list[Any]]) -> LayerTiles:
    """One entry of all workers, each of which has some of the heads."""
    layer, phase, kv_len, _, rows = of_workers[0]
    counts, mass = (
        torch.cat([_tensor(entry[3][i], dtype).view(-1, BINS) for entry in of_workers])
        for i, dtype in enumerate((torch.int64, torch.float64))
    )
    return layer, phase, kv_len, TileHistogram(counts, mass, rows)


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
