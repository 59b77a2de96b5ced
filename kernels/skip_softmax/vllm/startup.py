"""What a server checks before it serves a thresholds file, and the line that says what runs.

Everything that would make the file's evidence say nothing about this server is refused at start. A user who
insists names the refusal: `"allow": ["model", ...]` beside the file's path.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from skip_softmax.choose import Backend, Operation, backends, choose
from skip_softmax.meaning.call import Call
from skip_softmax.thresholds.evidence import EvidenceSection
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.identity import hash_of_files, hash_of_hub_id
from skip_softmax.thresholds.types import PHASES, Phase
from skip_softmax.thresholds.yaml_file import user_path

KEY = "skip_softmax"
"""Of `--additional-config`."""

ALLOWED = {
    "model": "the weights, or how they are run, are not those that were calibrated",
    "dtype": "the model runs in another dtype than it was calibrated in",
    "unvalidated": "the numbers did not pass on held-out prompts, or were not tried",
    "chunks": "prompts are computed in other pieces than they were calibrated in",
    "cache": "a cache outside of this server may hold keys and values of other numbers",
}
"""What a user may insist on, and what that means."""

# vLLM's own logger: others have no handler in its processes.
_log = init_logger(f"vllm.{KEY}")


@dataclass(frozen=True)
class Plan:
    """What a server runs.

    Attributes:
        thresholds: the file, or None: every layer is dense.
        sha256: of the file's bytes, or empty.
        allow: what the user insisted on.
        q_heads: query heads of the model.
        kv_heads: KV heads of the model.
    """

    thresholds: Thresholds | None
    sha256: str
    allow: tuple[str, ...]
    q_heads: int
    kv_heads: int
    # Which layer has which index: two that share one would share its numbers.
    known: dict[int, str]

    @property
    def tiles(self) -> dict[Phase, dict[str, Any]]:
        """Keywords of the operations; a phase without tiles is dense, which is the same for any tiles."""
        found: dict[Phase, dict[str, Any]] = {}
        for phase in PHASES:
            geometry = getattr(self.thresholds and self.thresholds.geometry, phase, None)
            found[phase] = geometry.model_dump(exclude={"chunk"}) if geometry else {}
        return found

    @property
    def min_kv_len(self) -> dict[Phase, int]:
        """Shortest KV length that may skip [tokens]."""
        floors = self.thresholds and self.thresholds.min_kv_len
        return {phase: getattr(floors, phase, None) or 0 for phase in PHASES}

    def factors(
        self, name: str, rank: int, heads: dict[Phase, int]
    ) -> dict[Phase, tuple[float, ...]]:
        """Scale factors of a layer [tokens], one per head that this worker has.

        Args:
            name: vLLM's name of the layer.
            rank: this worker's, of those that share the model's heads.
            heads: how many it has, query heads by `prefill` and KV heads by `decode`.

        Raises:
            ValueError: two layers have the same index.
        """
        dense: dict[Phase, tuple[float, ...]] = {phase: (0.0,) * heads[phase] for phase in PHASES}
        if self.thresholds is None:
            return dense
        index = _index(name)
        if index is None or index >= self.thresholds.model.layers:
            _log.warning(
                "skip-softmax: layer %s is dense: the thresholds file does not know it", name
            )
            return dense
        if self.known.setdefault(index, name) != name:
            raise ValueError(
                f"each layer must have an index of its own, but {self.known[index]} and {name} are both layer "
                f"{index} of the thresholds file; serve this model with another backend"
            )
        found: dict[Phase, tuple[float, ...]] = {}
        totals: dict[Phase, int] = {"prefill": self.q_heads, "decode": self.kv_heads}
        for phase, total in totals.items():
            # With fewer heads than workers, several workers have a copy of the same one.
            workers = max(self.q_heads // heads["prefill"], 1)
            first = rank * total // workers
            found[phase] = self.thresholds.per_head(index, phase)[first : first + heads[phase]]
        return found


_latest: list[tuple[Any, Plan]] = []


def plan_of(config: Any) -> Plan:
    """Checks a server's configuration and says what it runs, once per process.

    Args:
        config: vLLM's whole configuration.

    Raises:
        ValueError: the file and the server do not fit, and the user does not insist.
    """
    if not _latest or _latest[0][0] is not config:
        _latest[:] = [(config, _plan(config))]
    return _latest[0][1]


def _plan(config: Any) -> Plan:
    path, allow = _options(config.additional_config)
    q_heads = config.model_config.hf_text_config.num_attention_heads
    kv_heads = config.model_config.get_total_num_kv_heads()
    _check_server(config)
    if path is None:
        _log.info("skip-softmax: no thresholds file, every layer is dense")
        return Plan(None, "", allow, q_heads, kv_heads, {})
    thresholds = Thresholds.load(path)
    sha256 = hashlib.sha256(user_path(path).read_bytes()).hexdigest()
    plan = Plan(thresholds, sha256, allow, q_heads, kv_heads, {})
    _check_shape(config, thresholds)
    if _largest(thresholds) > 0:
        found = {
            "dtype": _other_dtype(config, thresholds),
            "unvalidated": _unproven(thresholds),
            "chunks": _other_chunks(config, thresholds),
            "cache": _outside_cache(config),
        }
        found["model"] = None if "model" in allow else _other_model(config, thresholds)
        for word, problem in found.items():
            if problem is not None and word not in allow:
                raise ValueError(f'{problem}; to insist, add "{word}" to `allow` ({ALLOWED[word]})')
    _log.info("%s", _line(path, plan))
    return plan


def _options(given: Any) -> tuple[str | None, tuple[str, ...]]:
    section = given.get(KEY, {}) if isinstance(given, dict) else {}
    if not isinstance(section, dict) or not set(section) <= {"thresholds", "allow"}:
        raise ValueError(
            f'`--additional-config` must hold {{"{KEY}": {{"thresholds": PATH, "allow": [...]}}}}, but got '
            f"{section!r}"
        )
    path, allow = section.get("thresholds"), section.get("allow", [])
    if path is not None and not isinstance(path, str):
        raise ValueError(f"`thresholds` must be the path of a thresholds file, but got {path!r}")
    if not isinstance(allow, list) or not set(allow) <= set(ALLOWED):
        raise ValueError(f"`allow` must be a list of {', '.join(ALLOWED)}, but got {allow!r}")
    return path, tuple(sorted(allow))


def _check_server(config: Any) -> None:
    """Refuses what the plug-in cannot run at all; on a GPU vLLM refuses some of it itself."""
    model, parallel, speculative = (
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
        # A drafter's layers have the numbers of the model's own, or names that look like theirs.
        f"drafts by {getattr(speculative, 'method', None)}": speculative is not None
        and speculative.method not in ("ngram", "suffix"),
    }
    named = [name for name, value in refused.items() if value]
    if named:
        raise ValueError(
            f"the backend CUSTOM of skip_softmax cannot serve {', '.join(named)}; serve without, or with another "
            "backend"
        )


def _check_shape(config: Any, thresholds: Thresholds) -> None:
    model, made_for = config.model_config, thresholds.model
    served = (
        model.get_total_num_hidden_layers(), model.hf_text_config.num_attention_heads,
        model.get_total_num_kv_heads(), model.get_head_size(),
    )  # fmt: skip
    shape = (made_for.layers, made_for.q_heads, made_for.kv_heads, made_for.head_dim)
    if served != shape:
        raise ValueError(
            "(layers, q_heads, kv_heads, head_dim) of the thresholds file and of the served model must agree, but "
            f"the file is for {made_for.name} with {shape} and {model.model} has {served}; calibrate this model"
        )


def _other_dtype(config: Any, thresholds: Thresholds) -> str | None:
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if dtype == thresholds.model.dtype:
        return None
    return (
        f"the served dtype must be the calibrated one, but it is {dtype} instead of {thresholds.model.dtype}; "
        f"serve with --dtype {thresholds.model.dtype}, or calibrate in {dtype}"
    )


def _other_model(config: Any, thresholds: Thresholds) -> str | None:
    """Why the served weights are not those that were calibrated; reads every weight once per process."""
    model = config.model_config
    changed = {
        "LoRA adapters": config.lora_config is not None,
        "--hf-overrides": bool(model.hf_overrides),
        f"--quantization {model.quantization}": model.quantization is not None
        and not hasattr(model.hf_config, "quantization_config"),
        "--load-format dummy": config.load_config.load_format == "dummy",
    }
    named = [name for name, value in changed.items() if value]
    if named:
        return f"the served model must be the calibrated one, but {', '.join(named)} changes it; serve without"
    wanted, commit = thresholds.model.sha256, getattr(model.hf_config, "_commit_hash", None) or ""
    if wanted in _identities(str(model.model), commit):
        return None
    return (
        f"the served model must be the calibrated one, but the thresholds file is for {thresholds.model.name} "
        f"with hash {wanted[:12]} and {model.model} has another; serve the files that were calibrated, or "
        "calibrate these"
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


def _unproven(thresholds: Thresholds) -> str | None:
    verdict = EvidenceSection.model_validate(thresholds.evidence).verdict
    if verdict == "passed":
        return None
    return (
        f"evidence.verdict must be `passed`, but it is `{verdict}`; calibrate with held-out prompts, or with a "
        "larger budget"
    )


def _other_chunks(config: Any, thresholds: Thresholds) -> str | None:
    """Why prompts are not computed in the pieces that were calibrated.

    A chunk's threshold is scale_factor / KV length at its end, so that early chunks skip more than the whole
    prompt would.
    """
    if _largest(thresholds, "prefill") == 0:
        return None
    calibrated = getattr(thresholds.geometry.prefill, "chunk", None)
    longest = min(
        _longest(thresholds) or config.model_config.max_model_len, config.model_config.max_model_len
    )
    served = chunk_of(config)
    if served == calibrated or (calibrated is None and served is not None and served >= longest):
        return None
    if calibrated is None:
        cure = (
            f"serve with --max-num-batched-tokens {longest} or more, or --no-enable-chunked-prefill, or "
            "calibrate with geometry.prefill.chunk"
        )
        return (
            f"prompts were calibrated whole, up to {longest} tokens, but this server cuts them into chunks of "
            f"{served}; {cure}"
        )
    return (
        f"prompts were calibrated in chunks of {calibrated} tokens, but this server "
        f"{'computes them whole' if served is None else f'cuts them into chunks of {served}'}; serve with "
        f"--enable-chunked-prefill --max-num-batched-tokens {calibrated}"
    )


def chunk_of(config: Any) -> int | None:
    """Largest piece of a prompt that a server computes in one step [tokens]; None: it computes prompts whole."""
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


def _outside_cache(config: Any) -> str | None:
    transfer = config.kv_transfer_config
    if transfer is None:
        return None
    return (
        f"cached prefixes must come from this server, which skips with this file from its start, but the KV "
        f"connector {transfer.kv_connector} may bring others; serve without, or empty its store"
    )


def check_kernels(config: Any, spec: Any, device: torch.device) -> None:
    """Refuses a geometry that no kernel can run on this device's pages: the reference is far too slow.

    Args:
        config: vLLM's whole configuration.
        spec: of the KV cache group.
        device: where it is.

    Raises:
        ValueError: no kernel can.
    """
    if device.type == "cpu":
        return
    plan = plan_of(config)
    group = plan.q_heads // plan.kv_heads
    for phase in PHASES:
        tiles = (
            {"tile_q": 64, "tile_kv": 128}
            if phase == "prefill"
            else {"tile_q": None, "tile_kv": 64}
        )
        call = Call(
            q_len=1, kv_len=config.model_config.max_model_len, q_heads=spec.num_kv_heads * group,
            kv_heads=spec.num_kv_heads, head_dim=spec.head_size, value_dim=spec.head_size, dtype=spec.dtype,
            scale=1.0, page=spec.block_size, **{**tiles, **plan.tiles[phase]},
        )  # fmt: skip
        reasons = [_why_not(phase, name, call, device) for name in backends(phase)]
        if None not in reasons:
            raise ValueError(
                f"a kernel must be able to run {phase}, but none can: {'; '.join(filter(None, reasons))}; choose "
                "another --block-size, or calibrate with other tiles"
            )


def _why_not(operation: Operation, name: str, call: Call, device: torch.device) -> str | None:
    backend: Backend = next(known for known in get_args(Backend) if known == name)
    try:
        choose(operation, backend, call, device)
    except NotImplementedError as error:
        return str(error)
    return None


def _index(name: str) -> int | None:
    try:
        return int(extract_layer_index(name))
    except AssertionError:  # no number in the name, or several
        return None


def _largest(thresholds: Thresholds, *phases: Phase) -> float:
    layers = range(thresholds.model.layers)
    return max(
        max(thresholds.per_head(layer, phase)) for phase in phases or PHASES for layer in layers
    )


def _line(path: str, plan: Plan) -> str:
    """What runs, in one line."""
    thresholds = plan.thresholds
    assert thresholds is not None
    layers = range(thresholds.model.layers)
    parts = [f"skip-softmax: {path} (sha256 {plan.sha256[:12]}) for {thresholds.model.name}"]
    for phase in PHASES:
        numbers = {layer: thresholds.per_head(layer, phase) for layer in layers}
        armed = [x for row in numbers.values() if any(row) for x in row if x]
        if not armed:
            parts.append(f"{phase} dense")
            continue
        dense = [str(layer) for layer, row in numbers.items() if not any(row)]
        tiles = plan.tiles[phase]
        shape = (
            f"{tiles['tile_q']}x{tiles['tile_kv']}" if "tile_q" in tiles else f"{tiles['tile_kv']}"
        )
        said = (
            f"{phase} armed in {len(layers) - len(dense)} of {len(layers)} layers with scale factors {min(armed):g} "
            f"to {max(armed):g}, tiles {shape}, from {plan.min_kv_len[phase]} keys on"
        )
        parts.append(f"{said}, dense layers {', '.join(dense)}" if dense else said)
    parts.append(_proof(thresholds))
    if plan.allow:
        parts.append(f"allowed by the user: {', '.join(plan.allow)}")
    return "; ".join(parts)


def _proof(thresholds: Thresholds) -> str:
    evidence = EvidenceSection.model_validate(thresholds.evidence)
    said = f"evidence: {evidence.verdict}"
    if evidence.loss is not None:
        kl = evidence.loss.kl
        said += (
            f", KL {kl.mean:.2g} (at most {kl.upper:.2g}) nats per token on {evidence.loss.heldout_prompts} held-out "
            "prompts"
        )
    budget = thresholds.evidence.get("budget")
    if isinstance(budget, dict):
        limits = [
            f"{name} {value:g}" for name, value in budget.items() if isinstance(value, int | float)
        ]
        said += f", budget {', '.join(limits)}"
    return said
