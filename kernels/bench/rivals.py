"""Attention of other libraries, as calls without arguments: what our kernels are compared with."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FMHA_V2_KEYWORDS = {
    "qkv",
    "input_layout",
    "workspace_buffer",
    "seq_lens",
    "max_q_len",
    "max_kv_len",
    "bmm1_scale",
    "bmm2_scale",
    "batch_size",
    "cum_seq_lens_q",
    "cum_seq_lens_kv",
    "mask_mode",
    "skip_softmax_threshold_scale_factor",
}
_WORKSPACE = 128 << 20  # of fmha_v2 [bytes]


@cache
def say(message: str) -> None:
    """Prints a line on stderr, once per message."""
    print(message, file=sys.stderr, flush=True)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Attention of cuDNN and of flash, through PyTorch.

    For a causal call the keys are repeated here, outside the timing, which favours the rivals. A decode call
    is bound by memory traffic, so there the kernel itself shares keys between heads.
    """
    group = q.shape[1] // k.shape[1]
    if causal:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))

    def call(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=not causal and group > 1
            )

    return {name: partial(call, backend) for name, backend in SDPA.items()}


@cache
def _flashinfer() -> ModuleType | None:
    if importlib.util.find_spec("flashinfer") is None:
        say("flashinfer is not installed, so it is not measured")
        return None
    return importlib.import_module("flashinfer")


def flashinfer_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor] | None:
    """FlashInfer's own prefill kernel on one request, output [tokens, heads, D]; None: not installed."""
    flashinfer = _flashinfer()
    if flashinfer is None:
        return None
    tokens_first = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return lambda: flashinfer.single_prefill_with_kv_cache(
        *tokens_first, causal=True, kv_layout="NHD"
    )


@cache
def _fmha_v2() -> Callable[..., torch.Tensor] | None:
    """TensorRT-LLM's Hopper kernel as FlashInfer offers it, if its signature is the one known here."""
    if _flashinfer() is None:
        return None
    prefill = importlib.import_module("flashinfer.prefill")
    function: Callable[..., torch.Tensor] | None = getattr(prefill, "trtllm_fmha_v2_prefill", None)
    if function is None:
        say("this flashinfer has no trtllm_fmha_v2_prefill, so it is not measured")
        return None
    missing = FMHA_V2_KEYWORDS - set(inspect.signature(function).parameters)
    if missing:
        say(f"flashinfer's trtllm_fmha_v2_prefill has no {sorted(missing)}, so it is not measured")
        return None
    return function


def fmha_v2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[float], torch.Tensor] | None:
    """TensorRT-LLM's kernel on one request as a function of the scale factor, output [tokens, heads, D].

    Only where it votes on the tiles that are measured here: 64 x 128, on sm_90 at head_dim 128.
    """
    tokens, head_dim = q.shape[2], q.shape[3]
    if head_dim != 128 or torch.cuda.get_device_capability() != (9, 0):
        return None
    function = _fmha_v2()
    if function is None:
        return None
    query = q[0].transpose(0, 1).contiguous()
    keys_values = torch.stack([x[0].transpose(0, 1) for x in (k, v)], dim=1)
    lengths = torch.tensor([tokens], dtype=torch.int32, device=q.device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=q.device)

    def call(scale_factor: float) -> torch.Tensor:
        return function(
            qkv=(query, keys_values),
            input_layout="CONTIGUOUS_Q_KV",
            workspace_buffer=workspace,
            seq_lens=lengths,
            max_q_len=tokens,
            max_kv_len=tokens,
            bmm1_scale=head_dim**-0.5,
            bmm2_scale=1.0,
            batch_size=1,
            cum_seq_lens_q=starts,
            cum_seq_lens_kv=starts,
            mask_mode="causal",
            skip_softmax_threshold_scale_factor=scale_factor,
        )

    return call
