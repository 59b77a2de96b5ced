"""Tiles that NVIDIA publishes, and the servers that more than one engine's artefact reaches.

Sources: the engines' public sources, documentation and pull requests.
"""

from __future__ import annotations

from calibrate.engines.types import Ignored, Server, Votes

ANY_SIZE = 1 << 20
"""A limit above every head size."""

HOPPER_PREFILL = Votes(
    ((64, (256,)), (128, (128,)), (ANY_SIZE, (64,))), tile_q=64
)  # 16-bit fmha_v2
XQA = Votes(((ANY_SIZE, (64, 128)),))
BLACKWELL_PREFILL = Votes(((ANY_SIZE, (128,)),), tile_q=32)  # a warp's rows zero their own P
BLACKWELL_DECODE = Votes(((ANY_SIZE, (128,)),))

NO_XQA = Ignored("its decode falls back to XQA, which never receives the number")
NO_KERNEL = Ignored("it has no kernel that skips there")

TRTLLM_SERVERS = (
    Server("TensorRT-LLM", "sm90", HOPPER_PREFILL, XQA),
    Server("TensorRT-LLM", "sm100", BLACKWELL_PREFILL, BLACKWELL_DECODE),
    Server("TensorRT-LLM", "sm120", Votes(head_dims=(128, 256)), NO_KERNEL),
)
"""They read TensorRT-LLM's YAML and Model-Optimizer's `config.json`."""

SPLITS = (
    "decode kernels that split the keys restart the running max in every split: "
    "they skip less than measured"
)
BLACKWELL_TWO = (
    "Blackwell kernels vote per 32-row group for softmax and per whole tile for P·V: "
    "the sparsity here is the softmax's"
)
