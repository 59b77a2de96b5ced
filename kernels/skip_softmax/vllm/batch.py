"""Reads a batch of vLLM: which requests decode, which read their prompt, and where their pages are.

What is decode follows the thresholds file, not the shape of the batch: a token behind the prompt is decode,
and every token of the prompt is prefill, also the last chunk of a prompt if it holds one token. Three things
limit that, because vLLM does not say where a prompt ends:

- A batch in which every request has one token may replay a graph, in which all of them decode. If one of them
  is the last of its prompt, decode skips nothing in that step.
- A request that was preempted reads again what it had generated; where that shares a chunk with the end of
  its prompt, it is prefill.
- Drafts that are verified are decode, each with the keys that it sees, as if they came one by one.

A calibration sends a prompt and its continuation as one prompt, and says where the continuation begins
(`SkipSoftmaxImpl.decode_from`): from there on tokens are decode, like verified drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from skip_softmax.vllm import answers, startup
from skip_softmax.vllm.stretch import Stretch


@dataclass(frozen=True)
class SkipSoftmaxMetadata(AttentionMetadata):
    """A batch, as every layer of a KV cache group reads it.

    Attributes:
        stretches: its requests in order, without the rows that pad it.
    """

    stretches: tuple[Stretch, ...]


class SkipSoftmaxBuilder(AttentionMetadataBuilder[SkipSoftmaxMetadata]):
    """Reads a batch once per step and KV cache group. Nothing here waits for the device."""

    # A captured batch is one in which every request has one token, padded with requests of no keys.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1  # decode first, so that a batch has two stretches

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        startup.check_pages(vllm_config, kv_cache_spec, device)
        answers.answer(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name].impl for name in layer_names]
        self.paused = False
        mode = vllm_config.compilation_config.cudagraph_mode
        self.replays = mode is not None and mode.has_full_cudagraphs()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SkipSoftmaxMetadata:
        """Called by vLLM in every step.

        Raises:
            NotImplementedError: attention is not causal, or vLLM does not say who reads a prompt.
        """
        prompts = common_attn_metadata.is_prefilling
        if prompts is None:
            raise NotImplementedError(
                "vLLM must say which requests still read their prompt, but this model runner does not; use "
                "VLLM_USE_V2_MODEL_RUNNER=0"
            )
        reading: list[bool] = prompts.tolist()
        if self.replays and self.paused != _ends_alone(common_attn_metadata, reading):
            self.paused = not self.paused
            for layer in self.layers:
                layer.pause_decode(self.paused)
        return _read(common_attn_metadata, reading, self.layers[0].decode_from)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SkipSoftmaxMetadata:
        """A batch that only decodes; its tensors are those of the batches that replay it."""
        return _read(common_attn_metadata, [False] * common_attn_metadata.num_reqs, None)


def _ends_alone(batch: CommonAttentionMetadata, prompts: list[bool]) -> bool:
    """Whether a request reads one token behind others of its prompt, in a batch that may replay a graph."""
    if batch.max_query_len > 1:
        return False
    kv_lens = batch.seq_lens_cpu_upper_bound
    return any(
        prompt and (kv_lens is None or int(kv_lens[request]) > 1)
        for request, prompt in enumerate(prompts)
    )


def _read(
    batch: CommonAttentionMetadata, prompts: list[bool], decode_from: int | None
) -> SkipSoftmaxMetadata:
    if batch.causal is not True:
        raise NotImplementedError(
            "attention must be causal, but vLLM asks for attention that is not; serve this model with "
            "another backend"
        )
    starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    # Requests without tokens pad a batch at its end.
    requests = [request for request, length in enumerate(lengths) if length]
    stretches: list[Stretch] = []
    for prompt, group in groupby(requests, key=prompts.__getitem__):
        there = list(group)
        if prompt and decode_from is not None:
            for request in there:
                stretches += _cut(batch, request, starts[request], lengths[request], decode_from)
            continue
        first, last = there[0], there[-1] + 1
        tokens = slice(starts[first], starts[last])
        longest = max(lengths[first:last])
        kv_lens, table = batch.seq_lens[first:last], batch.block_table_tensor[first:last]
        if not prompt and longest > 1:
            kv_lens, table = _by_token(kv_lens, table, lengths[first:last])
        stretches.append(
            Stretch(
                "prefill" if prompt else "decode",
                tokens,
                batch.query_start_loc[first : last + 1],
                kv_lens,
                table,
                longest,
                batch.max_seq_len,
            )
        )
    return SkipSoftmaxMetadata(tuple(stretches))


def _cut(
    batch: CommonAttentionMetadata, request: int, start: int, length: int, decode_from: int
) -> list[Stretch]:
    """A request's rows before and from a position on; asks the device for its KV length."""
    kv_lens, table = (
        batch.seq_lens[request : request + 1],
        batch.block_table_tensor[request : request + 1],
    )
    first = int(kv_lens) - length  # position of its first row
    split = min(max(decode_from - first, 0), length)
    found = []
    if split:
        q_starts = batch.query_start_loc.new_tensor([start, start + split])
        found.append(
            Stretch(
                "prefill", slice(start, start + split), q_starts, kv_lens - (length - split), table, split,
                batch.max_seq_len,
            )
        )  # fmt: skip
    if split < length:
        steps = length - split
        found.append(
            Stretch(
                "decode", slice(start + split, start + length), batch.query_start_loc[request : request + 2],
                *_by_token(kv_lens, table, [steps]), steps, batch.max_seq_len,
            )
        )  # fmt: skip
    return found


def _by_token(
    kv_lens: torch.Tensor, table: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One entry per decode token where requests have several, each with the keys that it sees."""
    to = kv_lens.device
    request = [i for i, length in enumerate(lengths) for _ in range(length)]
    behind = [back for length in lengths for back in reversed(range(length))]
    index, unseen = (
        torch.tensor(x, dtype=torch.int32).to(to, non_blocking=True) for x in (request, behind)
    )
    return kv_lens[index] - unseen, table[index]
