"""Tile statistics of a model: what every scale factor would skip, per layer, head, phase and length.

Histograms add: batches, prompts, GPUs and hosts merge by addition.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from calibrate.errors import UserError
from calibrate.prompts.causes import unreadable
from calibrate.record.files import save_atomically
from skip_softmax.meaning.histogram import (
    BINS,
    EDGES,
    LOW,
    NEVER,
    PER_OCTAVE,
    TileHistogram,
    edges,
)
from skip_softmax.thresholds.types import PHASES, Phase
from skip_softmax.thresholds.yaml_file import user_path

ScaleFactors = float | Sequence[float] | torch.Tensor

PARTS = ("counts", "mass", "rows", "kv_tokens", "calls")
"""The fields of `Statistics` that hold one tensor per phase; statistics merge by adding them."""


@dataclass(frozen=True)
class AtEdges:
    """What the scale factors at the bin edges skip; there the histograms are exact.

    Attributes:
        scale_factor: rising, float64 [EDGES] [tokens].
        skipped: tiles, int64 [layers, heads, lengths, EDGES]; the last column is all that any
            threshold below 1 can skip.
        dropped_mass: mean over rows and heads, float64 [layers, EDGES].
    """

    scale_factor: torch.Tensor
    skipped: torch.Tensor
    dropped_mass: torch.Tensor


@dataclass
class Statistics:
    """Histograms of log2(critical scale factor) for a model.

    Attributes:
        identity: what statistics must share to be merged: model hash, geometry, lengths, shape.
        counts: per phase int64 [layers, heads, lengths, BINS]; in decode those that vote.
        mass: per phase float64, like `counts`: softmax probability summed over rows.
        rows: per phase int64 [layers, lengths]: softmax rows per head.
        kv_tokens: per phase int64 [lengths]: sum of KV lengths over calls [tokens].
        calls: per phase int64 [lengths]: calls (prefill) or decode steps.
        prompts: keys of the prompts that were counted.
        samples: per phase float64 [samples, 1 + thresholds], the rows of `nvidia.sample`; empty unless a
            target sparsity asks for them.
    """

    identity: dict[str, Any]
    counts: dict[Phase, torch.Tensor]
    mass: dict[Phase, torch.Tensor]
    rows: dict[Phase, torch.Tensor]
    kv_tokens: dict[Phase, torch.Tensor]
    calls: dict[Phase, torch.Tensor]
    prompts: list[str]
    samples: dict[Phase, torch.Tensor] = field(
        default_factory=lambda: {phase: torch.zeros(0, 0, dtype=torch.float64) for phase in PHASES}
    )

    @classmethod
    def empty(
        cls,
        identity: dict[str, Any],
        layers: int,
        q_heads: int,
        decode_heads: int,
        lengths: Sequence[int],
    ) -> Statistics:
        """Statistics of nothing, ready to be added to."""
        heads: dict[Phase, int] = {"prefill": q_heads, "decode": decode_heads}
        bins = len(lengths)

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        return cls(
            identity={**identity, "lengths": list(lengths)},
            counts={p: zeros(torch.int64, layers, heads[p], bins, BINS) for p in PHASES},
            mass={p: zeros(torch.float64, layers, heads[p], bins, BINS) for p in PHASES},
            rows={p: zeros(torch.int64, layers, bins) for p in PHASES},
            kv_tokens={p: zeros(torch.int64, bins) for p in PHASES},
            calls={p: zeros(torch.int64, bins) for p in PHASES},
            prompts=[],
        )

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths that name the length bins [tokens]."""
        return list(self.identity["lengths"])

    def like(self) -> Statistics:
        """Statistics of nothing, of the same model, geometry and lengths."""
        layers, q_heads = self.counts["prefill"].shape[:2]
        decode_heads = self.counts["decode"].shape[1]
        return Statistics.empty(self.identity, layers, q_heads, decode_heads, self.lengths)

    def add(self, layer: int, phase: Phase, length_bin: int, histogram: TileHistogram) -> None:
        """Adds one call's tiles."""
        self.counts[phase][layer, :, length_bin] += histogram.counts.cpu()
        self.mass[phase][layer, :, length_bin] += histogram.mass.cpu()
        self.rows[phase][layer, length_bin] += histogram.rows

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both: one run over all prompts gives the same.

        Raises:
            UserError: they are of different models, geometries or lengths, or share a prompt.
        """
        if self.identity != other.identity:
            keys = dict.fromkeys([*self.identity, *other.identity])
            differing = [k for k in keys if self.identity.get(k) != other.identity.get(k)]
            raise UserError(
                "statistics can be merged only if they share model, geometry and lengths, "
                f"but {differing} differ"
            )
        common = set(self.prompts) & set(other.prompts)
        if common:
            raise UserError(
                f"statistics can be merged only if no prompt is in both, but {len(common)} are"
            )
        both = {
            name: {p: getattr(self, name)[p] + getattr(other, name)[p] for p in PHASES}
            for name in PARTS
        }
        samples = {phase: _stacked(self.samples[phase], other.samples[phase]) for phase in PHASES}
        return Statistics(
            self.identity, **both, prompts=[*self.prompts, *other.prompts], samples=samples
        )

    def visited(self, phase: Phase) -> torch.Tensor:
        """Visited tiles, int64 [layers, heads, lengths]."""
        return self.counts[phase].sum(-1)

    def at_edges(self, phase: Phase) -> AtEdges:
        """What each bin edge, taken as one scale factor for all layers, skips."""
        mass = _at_edges(self.mass[phase].sum((1, 2)))
        return AtEdges(
            edges(), _at_edges(self.counts[phase]), mass / self._mass_rows(phase)[:, None]
        )

    def skipped(self, phase: Phase, scale_factor: ScaleFactors) -> torch.Tensor:
        """Skipped tiles, float64 [layers, heads, lengths]; exact at bin edges, linear between them.

        Args:
            phase: `prefill` or `decode`.
            scale_factor: a number, [layers] or [layers, heads] [tokens].
        """
        return _below(self.counts[phase].double(), self._factors(phase, scale_factor))

    def sparsity(
        self, phase: Phase, scale_factor: ScaleFactors, length_bin: int | None = None
    ) -> float:
        """Skipped / visited tiles over layers and heads, of one length bin or all."""
        pick = slice(None) if length_bin is None else slice(length_bin, length_bin + 1)
        visited = self.visited(phase)[..., pick].sum()
        skipped = self.skipped(phase, scale_factor)[..., pick].sum()
        return float(skipped / visited) if visited else 0.0

    def layer_sparsity(self, phase: Phase, scale_factor: ScaleFactors) -> torch.Tensor:
        """Sparsity of each layer over heads and lengths, float64 [layers]; 0 where nothing was counted."""
        skipped = self.skipped(phase, scale_factor).sum((1, 2))
        return skipped / self.visited(phase).sum((1, 2)).clamp_min(1)

    def dropped_mass(self, phase: Phase, scale_factor: ScaleFactors) -> torch.Tensor:
        """Softmax probability that skipping removes, mean over rows and heads, float64 [layers]."""
        dropped = _below(self.mass[phase], self._factors(phase, scale_factor)).sum((1, 2))
        return dropped / self._mass_rows(phase)

    def mean_kv_len(self, phase: Phase) -> torch.Tensor:
        """Mean KV length of each length bin [tokens], float64 [lengths]."""
        return self.kv_tokens[phase].double() / self.calls[phase].clamp_min(1)

    def _mass_rows(self, phase: Phase) -> torch.Tensor:
        """Softmax rows of all heads, int64 [layers]; at least 1, to divide by."""
        return (self.rows[phase].sum(1) * self.mass[phase].shape[1]).clamp_min(1)

    def _factors(self, phase: Phase, scale_factor: ScaleFactors) -> torch.Tensor:
        layers, heads = self.counts[phase].shape[:2]
        factors = torch.as_tensor(scale_factor, dtype=torch.float64)
        if factors.dim() == 1:
            factors = factors[:, None]
        return factors.expand(layers, heads)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file atomically.

        Args:
            path: a `.safetensors` file in an existing folder.
        """
        tensors = {
            f"{name}.{phase}": getattr(self, name)[phase].contiguous()
            for name in PARTS
            for phase in PHASES
        }
        tensors |= {f"samples.{phase}": rows for phase, rows in self.samples.items() if len(rows)}
        metadata = {"identity": json.dumps(self.identity), "prompts": json.dumps(self.prompts)}
        save_atomically(tensors, user_path(path), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or of another bin layout.
        """
        try:
            with safe_open(user_path(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            parts = {
                name: {phase: tensors[f"{name}.{phase}"] for phase in PHASES} for name in PARTS
            }
            identity, prompts = json.loads(metadata["identity"]), json.loads(metadata["prompts"])
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; run again") from None
        except (OSError, KeyError, SafetensorError, ValueError) as error:
            helps = unreadable(error, "delete it and run again")
            raise UserError(
                f"{path}: cannot be read as tile statistics ({error}); {helps}"
            ) from None
        if parts["counts"]["prefill"].shape[-1] != BINS:
            raise UserError(
                f"{path}: counted with other bins than this version uses; delete it and run again"
            )
        statistics = cls(identity, **parts, prompts=prompts)
        for phase in PHASES:
            statistics.samples[phase] = tensors.get(f"samples.{phase}", statistics.samples[phase])
        return statistics


def scale_factor_at(
    statistics: Statistics, phase: Phase, sparsity: float, layer: int | None = None
) -> float:
    """The scale factor that skips a given share of the tiles of a layer (or of all layers).

    Args:
        statistics: the histograms.
        phase: `prefill` or `decode`.
        sparsity: wanted skipped / visited, in [0, 1]; above what can be reached gives the largest
            edge.
        layer: one layer, or None for the whole model.

    Returns:
        The scale factor [tokens], interpolated within a bin.
    """
    counts = statistics.counts[phase].double()
    counts = counts.sum((0, 1, 2)) if layer is None else counts[layer].sum((0, 1))
    wanted = sparsity * float(counts.sum())
    cumulative = _at_edges(counts)
    index = int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64)))
    index = min(max(index, 0), EDGES - 1)
    below = float(cumulative[index - 1]) if index else 0.0
    inside = float(cumulative[index]) - below
    fraction = min(max((wanted - below) / inside, 0.0), 1.0) if inside and index else 1.0
    return float(2.0 ** (LOW + (index - 1 + fraction) / PER_OCTAVE))


def _stacked(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The rows of both; without rows a tensor has no width yet."""
    return torch.cat([one, other]) if len(one) and len(other) else one if len(one) else other


def _at_edges(histogram: torch.Tensor) -> torch.Tensor:
    """Sum of the bins below each edge: [..., BINS] -> [..., EDGES]."""
    return histogram[..., :NEVER].cumsum(-1)


def _below(histogram: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Sum of the bins below a scale factor, [layers, heads, lengths]."""
    cumulative = _at_edges(histogram)
    position = (torch.log2(factors.clamp_min(2.0**LOW)) - LOW) * PER_OCTAVE
    position = position.clamp(0, EDGES - 1)
    # Scale factors at an edge must hit it exactly, but log2 of 2^(n/8) is off by an ulp.
    nearest = position.round()
    position = torch.where((position - nearest).abs() < 1e-9, nearest, position)
    low = position.floor().long()
    fraction = (position - low)[..., None]
    index = low[..., None, None].expand(*low.shape, histogram.shape[2], 1)
    lower = cumulative.gather(-1, index)[..., 0]
    upper = cumulative.gather(-1, (index + 1).clamp_max(EDGES - 1))[..., 0]
    result = lower + fraction * (upper - lower)
    # Below the lowest edge nothing is known to be skipped; 0 is dense.
    return torch.where((factors >= 2.0**LOW)[..., None], result, 0.0)
