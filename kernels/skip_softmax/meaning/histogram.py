"""Bins of log2(critical scale factor): the sufficient statistic that answers every threshold at once.

A tile is skipped exactly when `scale_factor > critical_scale_factor = kv_len * exp(gap)` (`criterion.py`).
Bin 0 counts the tiles below `LOW`, the last bin ("never") those that no threshold below 1 can skip: gap >= 0,
first tiles, and the tiles of votes that must stay dense. Between them every octave is cut into `PER_OCTAVE`
bins, so cumulative sums are exact at bin edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOW = -8  # log2 of the lowest edge; a tile below 2^-8 is skipped by any useful scale factor
HIGH = 21  # log2 of the highest edge: kv_len up to 2M tokens
PER_OCTAVE = 8
EDGES = (HIGH - LOW) * PER_OCTAVE + 1
BINS = EDGES + 1
NEVER = BINS - 1


@dataclass(frozen=True)
class TileHistogram:
    """The tiles of one attention call by critical scale factor.

    Attributes:
        counts: visited tiles, int64 [heads, BINS]; query heads in prefill, those that vote in decode.
        mass: softmax probability inside those tiles, summed over rows, float64 [heads, BINS].
        rows: softmax rows per head, to turn `mass` into a mean.
    """

    counts: torch.Tensor
    mass: torch.Tensor
    rows: int

    def __add__(self, other: TileHistogram) -> TileHistogram:
        """The tiles of both calls."""
        return TileHistogram(
            self.counts + other.counts, self.mass + other.mass, self.rows + other.rows
        )

    def __repr__(self) -> str:
        heads, tiles = self.counts.shape[0], int(self.counts.sum())
        return f"TileHistogram(heads={heads}, tiles={tiles}, rows={self.rows})"


def edges() -> torch.Tensor:
    """The scale factors at the bin edges [tokens], float64 [EDGES]; edge i is the lower end of bin i + 1."""
    return torch.exp2(LOW + torch.arange(EDGES, dtype=torch.float64) / PER_OCTAVE)


def bin_index(critical: torch.Tensor) -> torch.Tensor:
    """Bin of each tile, int64, from `criterion.critical_log2`."""
    index = torch.floor((critical - LOW) * PER_OCTAVE) + 1
    return torch.where(
        torch.isinf(critical) & (critical > 0), NEVER, index.clamp(0, NEVER - 1)
    ).long()
