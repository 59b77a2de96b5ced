"""Why a server cannot serve a thresholds file, or cannot serve with the plug-in at all.

Everything that would make the file's evidence say nothing about this server is a reason; each check returns
one, or None. Those of `INSISTED` a user may overrule.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from skip_softmax.choose import why_not
from skip_softmax.launch import Device
from skip_softmax.meaning.call import FP8, Call
from skip_softmax.thresholds.evidence import EvidenceSection
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.identity import hash_of_files, hash_of_hub_id
from skip_softmax.thresholds.types import PHASES, KvCacheDtype, Phase

FP8_CACHES = ("fp8", "fp8_e4m3")
"""vLLM's words for a KV cache in e4m3."""

WITHOUT_A_MODEL = ("ngram", "suffix")
"""Ways of drafting that have no attention layers of their own."""


def cannot_serve(config: Any) -> str | None:
    """What the plug-in does not have; on a GPU vLLM refuses some of it itself.

    Args:
        config: vLLM's whole configuration, like everywhere here.
    """
    model, parallel, drafts = (
        config.model_config,
        config.parallel_config,
        config.speculative_config,
    )
    refused = {
        "latent attention (MLA)": model.use_mla,
        "an encoder": model.is_encoder_decoder,
        "prompts that see ahead": model.is_mm_prefix_lm,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        # A drafter's layers have the indices of the model's own.
        f"drafts by {getattr(drafts, 'method', None)}": drafts is not None
        and drafts.method not in WITHOUT_A_MODEL,
    }
    named = [name for name, value in refused.items() if value]
    if not named:
        return None
    return (
        f"the backend CUSTOM of skip_softmax cannot serve {', '.join(named)}; serve without, or with "
        "another backend"
    )


def other_shape(config: Any, thresholds: Thresholds) -> str | None:
    """Another model altogether."""
    model, made_for = config.model_config, thresholds.model
    served = (
        model.get_total_num_hidden_layers(), model.hf_text_config.num_attention_heads,
        model.get_total_num_kv_heads(), model.get_head_size(),
    )  # fmt: skip
    shape = (made_for.layers, made_for.q_heads, made_for.kv_heads, made_for.head_dim)
    if served == shape:
        return None
    return (
        "(layers, q_heads, kv_heads, head_dim) of the thresholds file and of the served model must agree, "
        f"but the file is for {made_for.name} with {shape} and {model.model} has {served}; calibrate this "
        "model"
    )


def other_votes(config: Any, thresholds: Thresholds) -> str | None:
    """Other query heads voting together in decode than those of a KV head, by which the plug-in counts."""
    decode, model = thresholds.geometry.decode, thresholds.model
    group = model.q_heads // model.kv_heads
    if decode is None or decode.tile_heads in (None, group):
        return None
    return (
        f"the {group} query heads of a KV head vote together in this server's decode, but the numbers are "
        f"for votes of {decode.tile_heads}; calibrate without geometry.decode.tile_heads"
    )


def other_dtype(config: Any, thresholds: Thresholds) -> str | None:
    """The same weights, or the same keys and values, rounded differently."""
    wanted = thresholds.model.dtype
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if dtype != wanted:
        return (
            f"the served dtype must be the calibrated one, but it is {dtype} instead of {wanted}; serve with "
            f"--dtype {wanted}, or calibrate in {dtype}"
        )
    cached, calibrated = cache_of(config), thresholds.model.kv_cache_dtype
    if cached != calibrated:
        return (
            "the KV cache must have the calibrated dtype, on which decisions depend, but it is "
            f"{cached or dtype} instead of {calibrated or dtype}; serve with --kv-cache-dtype "
            f"{calibrated or 'auto'}, or calibrate with `model.kv_cache_dtype: {cached or 'auto'}`"
        )
    changed = [
        f"--{name.replace('_', '-')}"
        for name in ("kv_cache_dtype_skip_layers", "calculate_kv_scales")
        if cached is not None and getattr(config.cache_config, name, None)
    ]
    if changed:
        return (
            "every layer must keep keys and values as they were calibrated, in FP8 with scales of 1, but "
            f"{' and '.join(changed)} changes that; serve without"
        )
    return None


def cache_of(config: Any) -> KvCacheDtype | None:
    """Dtype of a server's KV cache, in the file's words."""
    return "fp8_e4m3" if config.cache_config.cache_dtype in FP8_CACHES else None


def other_scales(layer: Any, thresholds: Thresholds | None) -> str | None:
    """An FP8 cache of other scales than the calibrated ones, which are 1.

    Args:
        layer: vLLM's attention layer, its scales loaded.
        thresholds: the file, or None.
    """
    scales = float(layer._k_scale_float), float(layer._v_scale_float)
    if thresholds is None or not largest(thresholds) or scales == (1.0, 1.0):
        return None
    return (
        f"{layer.layer_name} must keep keys and values as they were calibrated, with scales of 1, but the "
        f"checkpoint's are {scales[0]:g} and {scales[1]:g}; serve a checkpoint without them, or with "
        "--kv-cache-dtype auto"
    )


def other_model(config: Any, thresholds: Thresholds) -> str | None:
    """Other weights of the same shape; reads every weight once per process."""
    model, made_for = config.model_config, thresholds.model
    changed = {
        "LoRA adapters": config.lora_config is not None,
        "--hf-overrides": bool(model.hf_overrides),
        f"--quantization {model.quantization}": model.quantization is not None
        and not hasattr(model.hf_config, "quantization_config"),
        "--load-format dummy": config.load_config.load_format == "dummy",
    }
    law = "the served model must be the calibrated one"
    named = [name for name, value in changed.items() if value]
    if named:
        return f"{law}, but {', '.join(named)} changes it; serve without"
    commit = getattr(model.hf_config, "_commit_hash", None) or ""
    if made_for.sha256 in _identities(str(model.model), commit):
        return None
    return (
        f"{law}, but the thresholds file is for {made_for.name} with hash {made_for.sha256[:12]} and "
        f"{model.model} has another; serve the files that were calibrated, or calibrate these"
    )


@lru_cache(maxsize=4)
def _identities(model: str, commit: str) -> tuple[str, ...]:
    """Every hash that `model.sha256` may be for a path or hub id."""
    path = Path(model)
    if not path.exists():
        return (hash_of_hub_id(model, commit),)
    found = [hash_of_files(path)]
    # Where it is offline, vLLM replaces a hub id by the folder of the cache that holds its files.
    cached = re.fullmatch(r".*/models--(.+)/snapshots/([^/]+)/?", str(path))
    if cached:
        found.append(hash_of_hub_id(cached[1].replace("--", "/", 1), cached[2]))
    return tuple(found)


def unproven(config: Any, thresholds: Thresholds) -> str | None:
    """Numbers that did not pass on held-out prompts, or were not tried."""
    verdict = EvidenceSection.model_validate(thresholds.evidence).verdict
    if verdict == "passed":
        return None
    return (
        f"evidence.verdict must be `passed`, but it is `{verdict}`; calibrate with held-out prompts, or with "
        "a larger budget"
    )


def other_chunks(config: Any, thresholds: Thresholds) -> str | None:
    """Prompts in other pieces than those that were calibrated.

    A chunk's threshold is scale_factor / KV length at its end, so that early chunks skip more than the whole
    prompt would. Only the limits are compared: prompts that share a step may be cut anywhere below them.
    """
    if largest(thresholds, "prefill") == 0 or thresholds.geometry.prefill is None:
        return None
    calibrated = thresholds.geometry.prefill.chunk
    most = config.model_config.max_model_len
    longest = min(_longest(thresholds) or most, most)
    served = chunk_of(config)
    if served == calibrated or (calibrated is None and served is not None and served >= longest):
        return None
    if calibrated is None:
        return (
            f"prompts were calibrated whole, up to {longest} tokens, but this server cuts them into chunks "
            f"of {served}; serve with --max-num-batched-tokens {longest} or more, or with "
            "--no-enable-chunked-prefill, or calibrate with geometry.prefill.chunk"
        )
    does = "computes them whole" if served is None else f"cuts them into chunks of {served}"
    return (
        f"prompts were calibrated in chunks of {calibrated} tokens, but this server {does}; serve with "
        f"--enable-chunked-prefill --max-num-batched-tokens {calibrated}"
    )


def chunk_of(config: Any) -> int | None:
    """Most tokens of a prompt that a server computes in one step; None: it computes prompts whole."""
    scheduler = config.scheduler_config
    if not scheduler.enable_chunked_prefill:
        return None
    limits = (
        scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold,
        getattr(scheduler, "max_num_scheduled_tokens", None),
    )  # fmt: skip
    return int(min(limit for limit in limits if limit))


def _longest(thresholds: Thresholds) -> int | None:
    """Longest prompt that the numbers were measured on [tokens], if the file says."""
    evidence = EvidenceSection.model_validate(thresholds.evidence)
    measured = evidence.sparsity["prefill"].by_length if "prefill" in evidence.sparsity else {}
    fitted = thresholds.fit.get("prefill", {}).get("kv_len_range", [0])
    return max([*map(int, measured), int(max(fitted))]) or None


def outside_cache(config: Any, thresholds: Thresholds) -> str | None:
    """Cached prefixes of other numbers; the cache of the server itself lives and dies with its numbers."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return None
    return (
        "cached prefixes must come from this server, which skips with this file from its start, but the KV "
        f"connector {transfer.kv_connector} may bring others; serve without it"
    )


INSISTED = {
    "model": other_model,
    "dtype": other_dtype,
    "unvalidated": unproven,
    "chunks": other_chunks,
    "cache": outside_cache,
}
"""Reasons that a user may overrule, by the word that does."""


def no_kernel(
    config: Any, spec: Any, device: Device, tiles: dict[Phase, dict[str, Any]]
) -> str | None:
    """Pages or tiles that no kernel can run: the reference is far too slow to serve with.

    Args:
        config: vLLM's whole configuration.
        spec: of a KV cache group.
        device: where its cache is.
        tiles: keywords of the operations per phase.
    """
    model = config.model_config
    group = model.hf_text_config.num_attention_heads // model.get_total_num_kv_heads()
    usual: dict[Phase, dict[str, Any]] = {
        "prefill": {"tile_q": 64, "tile_kv": 128},
        "decode": {"tile_q": None, "tile_kv": 64},
    }
    for phase in PHASES:
        call = Call(
            q_len=1, kv_len=model.max_model_len, q_heads=spec.num_kv_heads * group,
            kv_heads=spec.num_kv_heads, head_dim=spec.head_size, value_dim=spec.head_size, dtype=model.dtype,
            kv_dtype=None if cache_of(config) is None else FP8, scale=1.0, ragged=True,
            page=spec.block_size, **{**usual[phase], **tiles[phase]},
        )  # fmt: skip
        reason = why_not(phase, call, device)
        if reason is not None:
            return (
                f"a kernel must be able to run {phase} in pages of {spec.block_size} tokens, but none can "
                f"({reason}); choose another --block-size, or calibrate with other tiles"
            )
    return None


def largest(thresholds: Thresholds, *phases: Phase) -> float:
    """Largest scale factor of any layer in the phases, or in both [tokens]."""
    layers = range(thresholds.model.layers)
    return max(
        max(thresholds.per_head(layer, phase)) for phase in phases or PHASES for layer in layers
    )
