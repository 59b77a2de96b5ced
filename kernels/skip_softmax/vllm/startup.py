"""What a server runs: decided once per process when it starts, and said in one line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from skip_softmax.launch import device_of
from skip_softmax.thresholds.evidence import EvidenceSection
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PHASES, Phase
from skip_softmax.thresholds.yaml_file import user_path
from skip_softmax.vllm import checks

KEY = "skip_softmax"
"""Of `--additional-config`."""

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
        tiles: keywords of the operations per phase; empty for a phase without tiles, which is dense.
        min_kv_len: shortest KV length that may skip, per phase [tokens].
        names: the layers that have asked for their numbers, by index.
        warm: the kinds of layer whose kernels are compiled.
    """

    thresholds: Thresholds | None
    sha256: str
    allow: tuple[str, ...]
    q_heads: int
    kv_heads: int
    tiles: dict[Phase, dict[str, Any]]
    min_kv_len: dict[Phase, int]
    names: dict[int, str] = field(default_factory=dict)
    warm: set[Any] = field(default_factory=set)

    def factors(
        self, name: str, rank: int, heads: dict[Phase, int]
    ) -> dict[Phase, tuple[float, ...]]:
        """Scale factors of a layer [tokens], one per head that this worker has.

        Args:
            name: vLLM's name of the layer.
            rank: this worker's, of those that share the model's heads.
            heads: how many it has, query heads in `prefill` and KV heads in `decode`.

        Raises:
            ValueError: two layers have the same index.
        """
        dense: dict[Phase, tuple[float, ...]] = {phase: (0.0,) * heads[phase] for phase in PHASES}
        if self.thresholds is None:
            return dense
        index = index_of(name)
        if index is None or index >= self.thresholds.model.layers:
            _log.warning("%s is dense: the thresholds file does not know this layer", name)
            return dense
        if self.names.setdefault(index, name) != name:
            raise ValueError(
                f"each layer must have an index of its own, but {self.names[index]} and {name} are both "
                f"layer {index} of the thresholds file; serve this model with another backend"
            )
        totals: dict[Phase, int] = {"prefill": self.q_heads, "decode": self.kv_heads}
        workers = self.q_heads // heads["prefill"]
        found: dict[Phase, tuple[float, ...]] = {}
        for phase, total in totals.items():
            # With fewer heads than workers, several workers have a copy of the same one.
            first = rank * total // workers
            found[phase] = self.thresholds.per_head(index, phase)[first : first + heads[phase]]
        return found

    def running(self, thresholds: Thresholds | None) -> Plan:
        """The same server with other numbers; None: every layer is dense."""
        tiles: dict[Phase, dict[str, Any]] = {phase: {} for phase in PHASES}
        floors: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        if thresholds is not None:
            tiles = {phase: thresholds.geometry.keywords(phase) for phase in PHASES}
            floors = {phase: getattr(thresholds.min_kv_len, phase) or 0 for phase in PHASES}
        return replace(self, thresholds=thresholds, tiles=tiles, min_kv_len=floors)


_latest: list[tuple[Any, Plan]] = []


def plan_of(config: Any) -> Plan:
    """Checks a server's configuration and says what it runs, once per process.

    Args:
        config: vLLM's whole configuration.

    Raises:
        FileError: the thresholds file breaks a law.
        ValueError: the file and the server do not fit, and the user does not insist.
    """
    if not _latest or _latest[0][0] is not config:
        _latest[:] = [(config, _plan(config))]
    return _latest[0][1]


def check_pages(config: Any, spec: Any, device: torch.device, plan: Plan | None = None) -> None:
    """Refuses pages or tiles that no kernel can run; on a CPU the reference is all there is.

    Args:
        config: vLLM's whole configuration.
        spec: of a KV cache group.
        device: where its cache is.
        plan: what is to run; None: what the server runs.

    Raises:
        ValueError: no kernel can.
    """
    if device.type == "cpu":
        return
    reason = checks.no_kernel(config, spec, device_of(device), (plan or plan_of(config)).tiles)
    if reason is not None:
        raise ValueError(reason)


def say_compiled(seconds: float, window: int | None, armed: tuple[bool, ...]) -> None:
    """Says how long it took until one kind of layer had its kernels."""
    phases = ", ".join(
        f"{phase} {'armed' if there else 'dense'}"
        for phase, there in zip(PHASES, armed, strict=True)
    )
    where = "" if window is None else f" with a window of {window}"
    _log.info("kernels of layers%s (%s) are compiled, in %.1f s", where, phases, seconds)


def _plan(config: Any) -> Plan:
    path, allow = _options(config.additional_config)
    reason = checks.cannot_serve(config)
    if reason is not None:
        raise ValueError(reason)
    heads = (
        config.model_config.hf_text_config.num_attention_heads,
        config.model_config.get_total_num_kv_heads(),
    )
    dense = Plan(None, "", allow, *heads, {}, {}).running(None)
    if path is None:
        _log.info("no thresholds file is given: every layer is dense, with skip_softmax's kernels")
        return dense
    thresholds = Thresholds.load(path)
    reason = checks.other_shape(config, thresholds) or checks.other_votes(config, thresholds)
    if reason is not None:
        raise ValueError(reason)
    # A file that is dense everywhere has nothing to prove.
    for word, check in checks.INSISTED.items() if checks.largest(thresholds) else ():
        if word in allow:
            continue
        reason = check(config, thresholds)
        if reason is not None:
            raise ValueError(f'{reason}. To serve in spite of it, add "{word}" to `allow`')
    sha256 = hashlib.sha256(user_path(path).read_bytes()).hexdigest()
    plan = replace(dense.running(thresholds), sha256=sha256)
    _log.info("%s", _line(path, plan, thresholds))
    return plan


def _options(given: Any) -> tuple[str | None, tuple[str, ...]]:
    section = given.get(KEY, {}) if isinstance(given, dict) else {}
    if not isinstance(section, dict) or not set(section) <= {"thresholds", "allow"}:
        raise ValueError(
            f'`--additional-config` must be {{"{KEY}": {{"thresholds": PATH, "allow": [...]}}}}, but '
            f"{KEY} is {section!r}"
        )
    path, allow = section.get("thresholds"), section.get("allow", [])
    if path is not None and not isinstance(path, str):
        raise ValueError(f"`thresholds` must be the path of a thresholds file, but got {path!r}")
    if not isinstance(allow, list) or not set(allow) <= set(checks.INSISTED):
        raise ValueError(
            f"`allow` must be a list of words from {', '.join(checks.INSISTED)}, but got {allow!r}"
        )
    return path, tuple(sorted(allow))


def index_of(name: str) -> int | None:
    """The number in a layer's name; None: it has none, or several."""
    try:
        return int(extract_layer_index(name))
    except AssertionError:  # no number in the name, or several
        return None


def _line(path: str, plan: Plan, thresholds: Thresholds) -> str:
    """What runs, in one line."""
    layers = range(thresholds.model.layers)
    parts = [f"{path} (sha256 {plan.sha256[:12]}) for {thresholds.model.name}"]
    for phase in PHASES:
        rows = [thresholds.per_head(layer, phase) for layer in layers]
        numbers = [number for row in rows for number in row if number]
        if not numbers:
            parts.append(f"{phase} dense")
            continue
        dense = [str(layer) for layer, row in zip(layers, rows, strict=True) if not any(row)]
        but = f" (not in {', '.join(dense)})" if dense else ""
        tiles = [plan.tiles[phase].get(name) for name in ("tile_q", "tile_kv")]
        parts.append(
            f"{phase} skips in {len(layers) - len(dense)} of {len(layers)} layers{but}, scale factors "
            f"{min(numbers):g} to {max(numbers):g}, tiles {'x'.join(str(tile) for tile in tiles if tile)}, "
            f"from {plan.min_kv_len[phase]} keys on"
        )
    parts.append(_proof(thresholds))
    if plan.allow:
        parts.append(f"the user allows {', '.join(plan.allow)}")
    return "; ".join(parts)


def _proof(thresholds: Thresholds) -> str:
    evidence = EvidenceSection.model_validate(thresholds.evidence)
    said = f"evidence {evidence.verdict}"
    if evidence.loss is not None:
        kl, prompts = evidence.loss.kl, evidence.loss.heldout_prompts
        said += f", KL {kl.mean:.2g} (at most {kl.upper:.2g}) on {prompts} held-out prompts"
    budget = thresholds.evidence.get("budget")
    if isinstance(budget, dict):
        limits = [
            f"{key} {value:g}" for key, value in budget.items() if isinstance(value, int | float)
        ]
        said += f", budget {', '.join(limits)}"
    return said
