"""Counts of tiles, and how they print."""

from __future__ import annotations

import torch

import skip_softmax as ss


def test_sparsity_is_skipped_over_visited() -> None:
    counts = ss.TileCounts(torch.tensor([[6, 2], [1, 1]]), torch.tensor([[3, 0], [0, 1]]))
    assert counts.sparsity == 0.4
    assert repr(counts) == "TileCounts(visited=10, skipped=4, sparsity=0.400)"


def test_sparsity_of_nothing_is_zero() -> None:
    assert ss.TileCounts(torch.zeros(2, 3), torch.zeros(2, 3)).sparsity == 0.0


def test_counts_of_a_call_say_their_sparsity() -> None:
    """One row on three tiles of 16 keys: the two after the first hold scores far below it."""
    k = torch.zeros(1, 1, 48, 16)
    k[:, :, :16] = 10.0
    q, v = torch.ones(1, 1, 1, 16), torch.randn(1, 1, 48, 16)
    _, counts = ss.attention(q, k, v, scale_factor=1.0, tile_q=16, tile_kv=16, return_stats=True)
    assert isinstance(counts, ss.TileCounts)
    assert counts.sparsity == 2 / 3


def test_a_histogram_prints_in_one_line() -> None:
    q = torch.randn(1, 2, 40, 16)
    _, histogram = ss.tile_statistics(q, q, q, tile_q=16, tile_kv=16)
    # Three blocks of rows see one, two and three tiles, on each of two heads.
    assert repr(histogram) == "TileHistogram(heads=2, tiles=12, rows=40)"
