"""One attention layer inside vLLM: writes the cache, and calls the operations on its pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from skip_softmax.meaning.call import FP8, quantised
from skip_softmax.thresholds.types import PHASES, Phase
from skip_softmax.vllm import checks, startup, warm
from skip_softmax.vllm.batch import SkipSoftmaxMetadata
from skip_softmax.vllm.stretch import Stretch

Watch = Callable[
    ["SkipSoftmaxImpl", torch.Tensor, torch.Tensor, torch.Tensor, Stretch, torch.Tensor], None
]
"""Layer, queries of the batch, pages of keys and of values, stretch, and the output, which it writes."""


class SkipSoftmaxImpl(AttentionImpl[SkipSoftmaxMetadata]):
    """Attention of one layer, over the heads that this worker has.

    Attributes:
        counts: visited and skipped tiles per phase, int64 [heads that vote, 2] on the layer's device; empty
            until the layer has run.
        factors: scale factors per phase, [heads that vote] on the device, or 0.0 where the layer is dense.
        given: the file's, of those that are tensors.
        decode_from: position from which a prompt's tokens are decode; None in service, see `batch.py`.
        watch: computes a stretch in the place of the operations, see `passes.py`; None in service.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        config = get_current_vllm_config()
        refused = {name: value for name, value in others.items() if value is not None}
        if alibi_slopes is not None:
            refused["alibi_slopes"] = "given"
        if logits_soft_cap:
            refused["logits_soft_cap"] = logits_soft_cap
        if attn_type != AttentionType.DECODER:
            refused["attn_type"] = attn_type
        own = "auto", str(config.model_config.dtype).removeprefix("torch.")
        if kv_cache_dtype not in (*own, *checks.FP8_CACHES):
            refused["kv_cache_dtype"] = kv_cache_dtype
        if refused:
            named = ", ".join(f"{name}={value}" for name, value in sorted(refused.items()))
            raise ValueError(
                "attention must be causal softmax attention over a cache of the model's dtype or FP8, but "
                f"this model asks for {named}, which the backend CUSTOM does not have; serve it with another "
                "backend"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.scales: dict[str, torch.Tensor] = {}  # of an FP8 cache
        self.sliding_window = sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.plan = startup.plan_of(config)
        self.rank = get_tensor_model_parallel_rank()
        self.counts: dict[Phase, torch.Tensor] = {}
        self.factors: dict[Phase, float | torch.Tensor] = {}
        self.given: dict[Phase, torch.Tensor] = {}
        self.longest = config.model_config.max_model_len
        drafts = config.speculative_config
        self.requests = config.scheduler_config.max_num_seqs
        self.requests *= 1 + (drafts.num_speculative_tokens if drafts is not None else 0)
        self.warm = False
        self.name = ""  # known when the layer first runs
        self.decode_from: int | None = None
        self.watch: Watch | None = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes new keys and values [tokens, KV heads, head_dim] to their slots; slot -1 is padding."""
        fp8 = self.kv_cache_dtype in checks.FP8_CACHES
        if key.is_cuda:
            from vllm import _custom_ops

            k, v = _halves(kv_cache, self.head_size)
            _custom_ops.reshape_and_cache_flash(
                key, value, k.transpose(1, 2), v.transpose(1, 2), slot_mapping, "fp8" if fp8 else "auto",
                layer._k_scale, layer._v_scale,
            )  # fmt: skip
            return
        k, v = _pages(kv_cache, self.head_size)
        if fp8:
            key, value = quantised(key / layer._k_scale), quantised(value / layer._v_scale)
        tokens = (slot_mapping >= 0).nonzero().squeeze(1)
        slots, size = slot_mapping[tokens], k.shape[2]
        k[slots // size, :, slots % size] = key[tokens]
        v[slots // size, :, slots % size] = value[tokens]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SkipSoftmaxMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a batch; this step's keys are in the cache already.

        Args:
            layer: vLLM's own module, which knows its name.
            query: [tokens, heads, head_dim], of which the last may pad the batch.
            key: unused.
            value: unused.
            kv_cache: pages of this layer, see `backend.py`.
            attn_metadata: the batch; None: vLLM measures memory, and no result is read.
            output: is written, [tokens, heads, head_dim]. Rows that pad the batch keep what they hold.
            output_scale: vLLM would have the output quantised, which is refused.
            output_block_scale: the same.

        Returns:
            `output`.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "attention writes its output as it is, but vLLM asks for a quantised one; turn the fusion of "
                "attention and quantisation off"
            )
        if not self.counts:
            self._arm(layer.layer_name, query.device)
            self._scale(layer)
        if not self.warm and kv_cache.numel() and not _captures(query):
            self._warm_up(kv_cache, query.dtype)
        if attn_metadata is None:
            return output.fill_(0)
        out = output.view(-1, self.num_heads, self.head_size)
        k, v = _pages(kv_cache, self.head_size)
        attend = self.watch
        for stretch in attn_metadata.stretches:
            if attend is not None:
                attend(self, query, k, v, stretch, out)
            else:
                stretch.attend(query, k, v, out, **self._keywords(stretch.phase))
        return output

    def _keywords(self, phase: Phase) -> dict[str, Any]:
        return {
            "scale_factor": self.factors[phase],
            "scale": self.scale,
            "window": self.sliding_window,
            "min_kv_len": self.plan.min_kv_len[phase],
            "counts": self.counts[phase],
            **self.scales,
            **self.plan.tiles[phase],
        }

    def _scale(self, layer: Any) -> None:
        """Takes the scales of an FP8 cache from vLLM's layer."""
        if self.kv_cache_dtype not in checks.FP8_CACHES:
            return
        reason = checks.other_scales(layer, self.plan.thresholds)
        if reason is not None and "dtype" not in self.plan.allow:
            raise ValueError(f'{reason}. To serve in spite of it, add "dtype" to `allow`')
        self.scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}

    def pause_decode(self, pause: bool) -> None:
        """Stops skipping in decode, or goes on; in graphs too, which read the same tensor. Never waits."""
        read = self.factors.get("decode")
        if isinstance(read, torch.Tensor):
            read.zero_() if pause else read.copy_(self.given["decode"])

    def _warm_up(self, kv_cache: torch.Tensor, dtype: torch.dtype) -> None:
        """Compiles the kernels of this layer before the first request, once for all layers alike."""
        self.warm = True
        armed = tuple(isinstance(self.factors[phase], torch.Tensor) for phase in PHASES)
        k, v = _pages(kv_cache, self.head_size)
        kind = self.num_heads, self.sliding_window, armed, k.shape[1:], k.stride(), k.dtype
        if not k.is_cuda or kind in self.plan.warm:
            return
        self.plan.warm.add(kind)
        began = time.perf_counter()
        keywords = {phase: self._keywords(phase) for phase in PHASES}
        warm.compile_for(keywords, self.num_heads, dtype, k, v, self.longest, self.requests)
        torch.cuda.synchronize(k.device)
        startup.say_compiled(time.perf_counter() - began, self.sliding_window, armed)

    def run(self, plan: startup.Plan) -> None:
        """Runs other numbers from the next step on, and counts from 0; not under graphs."""
        self.plan = plan
        self.counts.clear()  # so that the next step arms anew

    def _arm(self, name: str, device: torch.device) -> None:
        """Puts this layer's numbers and counts on its device: in vLLM's first run, before any graph."""
        self.name = name
        heads: dict[Phase, int] = {"prefill": self.num_heads, "decode": self.num_kv_heads}
        numbers = self.plan.factors(name, self.rank, heads)
        with torch.inference_mode(False):  # a later step may run outside of it
            for phase in PHASES:
                self.factors[phase] = 0.0
                if any(numbers[phase]):
                    # Kernels read fp32 without a copy; the reference compares in fp64, as `applied` does.
                    dtype = torch.float32 if device.type == "cuda" else torch.float64
                    self.factors[phase] = torch.tensor(numbers[phase], dtype=dtype, device=device)
                    self.given[phase] = torch.tensor(numbers[phase], dtype=dtype, device=device)
                self.counts[phase] = torch.zeros(heads[phase], 2, dtype=torch.int64, device=device)


def _captures(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured now, in which nothing can be compiled."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages, KV heads, page, head_dim] of a layer's cache as operations take them."""
    # vLLM has FP8 as bytes.
    return _halves(kv_cache.view(FP8) if kv_cache.dtype == torch.uint8 else kv_cache, head_size)


def _halves(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages, KV heads, page, head_dim] of a layer's cache, in 0.22 and in 0.32."""
    if kv_cache.dim() == 5:
        return kv_cache[:, 0], kv_cache[:, 1]
    return kv_cache[..., :head_size], kv_cache[..., head_size:]
