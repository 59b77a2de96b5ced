"""How many tiles attention visited, and how many of them it skipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileCounts:
    """Tiles per head, counted over one call or many.

    Attributes:
        visited: int64 [batch or layers, heads]; query heads in prefill, those that vote in decode.
        skipped: those of them that were skipped, in the same shape.
    """

    visited: torch.Tensor
    skipped: torch.Tensor

    @property
    def sparsity(self) -> float:
        """Skipped / visited tiles, in [0, 1]; 0 when nothing was visited. Waits for the GPU."""
        visited = int(self.visited.sum())
        return int(self.skipped.sum()) / visited if visited else 0.0

    def __repr__(self) -> str:
        visited, skipped = int(self.visited.sum()), int(self.skipped.sum())
        return f"TileCounts(visited={visited}, skipped={skipped}, sparsity={self.sparsity:.3f})"
