"""Tiles of kernels that more than one engine runs, and the servers that more than one artefact reaches.

Every rule names the release and the file that it was read in. trtllm-gen's kernels are shipped as binaries;
their tiles are those of their generated source and of FlashInfer's pull request 4991.
"""

from __future__ import annotations

from dataclasses import replace

from calibrate.engines.types import Ignored, Server, Votes

ANY_SIZE = 1 << 20
"""A limit above every head size."""

# fmha_v2, 16-bit and e4m3: flashinfer-python 0.7.2.post1, jit/attention/fmha_v2/fmha_library.py
# (kv_loop_step). Both compute warpgroups vote for their own 64 rows:
# data/csrc/fmha_v2/fmha/warpspec/epilogue.h.
HOPPER_PREFILL = Votes(((64, (256,)), (128, (128,)), (ANY_SIZE, (64,))), tile_q=64)
HOPPER_PREFILL_FP8 = Votes(((128, (256,)), (ANY_SIZE, (128,))), tile_q=64)
# A warp's 32 rows zero their own P; P·V is left out where all warps of a tile agree.
BLACKWELL_PREFILL = Votes(((ANY_SIZE, (128,)),), tile_q=32)
BLACKWELL_DECODE = Votes(((ANY_SIZE, (128,)),))


def with_sizes(kernel: Votes, head_dims: tuple[int, ...]) -> Votes:
    """The kernel as an engine calls it that lets it have these head sizes only."""
    return replace(kernel, head_dims=head_dims)


# TensorRT-LLM main, cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention/decoderXQAImplJIT
# (supportConfigCommon, supportConfigQGMMA): outside these sizes MMHA runs, which knows no number; a
# draft's tokens end in TLLM_CHECK(!isSpecDec).
_XQA = Votes(
    ((ANY_SIZE, (64, 128)),),
    head_dims=range(16, 257, 16),
    groups=(2, 32),
    speculation="XQA stops with an error where a number meets speculative decoding",
)

# flashinfer-python 0.7.2.post1, decode.py: `auto` is trtllm-gen on compute capability 10 and XQA
# elsewhere, whose call hands no number on.
NO_XQA = Ignored("its decode falls back to XQA, which never receives the number")

SPLITS = (
    "decode kernels that split the keys restart the running max in every split: "
    "they skip less than measured"
)
BLACKWELL_TWO = (
    "Blackwell kernels vote per 32-row group for softmax and per whole tile for P·V: "
    "the sparsity here is the softmax's"
)


def by_flashinfer_on_hopper(title: str) -> Server:
    """An engine that calls FlashInfer's functions on Hopper."""
    return Server(title, "sm90", HOPPER_PREFILL, NO_XQA, fp8={"prefill": HOPPER_PREFILL_FP8})


def by_flashinfer_on_blackwell(title: str) -> Server:
    """An engine that calls FlashInfer's functions on Blackwell."""
    notes = (SPLITS, BLACKWELL_TWO)
    return Server(title, "sm100", BLACKWELL_PREFILL, BLACKWELL_DECODE, notes=notes)


TRTLLM_SERVERS = (
    Server(
        "TensorRT-LLM",
        "sm90",
        HOPPER_PREFILL,
        _XQA,
        fp8={"prefill": HOPPER_PREFILL_FP8},  # its pull request 15417: queries are FP8 too then
        notes=(SPLITS,),
    ),
    Server(
        "TensorRT-LLM",
        "sm100",
        BLACKWELL_PREFILL,
        BLACKWELL_DECODE,
        notes=(
            SPLITS,
            BLACKWELL_TWO,
            # `_torch/attention/backends`, PrimTS: it declines every layer with sparse parameters.
            "both phases of every layer that skips leave PrimTS, the default kernels there: compare with "
            "dense on PrimTS",
        ),
    ),
    Server(
        "TensorRT-LLM",
        "sm120",
        Votes(head_dims=(128, 256)),
        # decoderXQAImplJIT, supportConfigHMMA: a number turns its fast decode kernel off.
        Ignored("it has no kernel that skips there, and a number even costs its fast one (XQA)"),
    ),
)
"""They read TensorRT-LLM's YAML and Model-Optimizer's `config.json`."""
