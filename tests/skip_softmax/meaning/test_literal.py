"""Algorithm 1 to the letter: the reference below a threshold of 1, and what engines do above it."""

from __future__ import annotations

import math

import pytest
import torch
from planting import graded

from skip_softmax.meaning import literal, reference
from skip_softmax.meaning.call import Call


def call(q: torch.Tensor, k: torch.Tensor, tile_q: int | None, **about: object) -> Call:
    (_, heads, q_len, dim), (_, kv_heads, kv_len, _) = q.shape, k.shape
    return Call(q_len, kv_len, heads, kv_heads, dim, dim, q.dtype, 0.25, tile_q, 16, **about)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 70], ids=["full", "window"])
@pytest.mark.parametrize("tile_q", [32, None], ids=["prefill", "decode"])
def test_below_one_it_is_the_reference(tile_q: int | None, window: int | None) -> None:
    q, k, v = graded(4, 2, 100, 200)
    one = call(q, k, tile_q, window=window)
    factors = torch.linspace(20.0, 90.0, one.vote_heads, dtype=torch.float64)
    found = literal.attend(q[0], k[0], v[0], one, factors)
    true = reference.attend(q[0], k[0], v[0], one, factors)
    assert torch.equal(found[1], true[1]) and torch.equal(found[2], true[2])
    assert 0 < int(found[2].sum()) < int(found[1].sum())
    torch.testing.assert_close(found[0], true[0], atol=1e-12, rtol=0)


def test_it_knows_no_dense_rows() -> None:
    q, k, v = graded(4, 2, 100, 200)
    with pytest.raises(ValueError, match=r"`dense_last` must be 0 .* but got 64; pass 0"):
        literal.attend(q[0], k[0], v[0], call(q, k, 32, dense_last=64), torch.ones(4).double())


def test_above_one_only_what_exceeds_all_kept_tiles_is_kept() -> None:
    """Tile maxima of 0, 1, 3, 2.5 and 6 nats; a threshold of e^2.2 keeps the first, third and last."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    tops = torch.tensor([0.0, 1.0, 3.0, 2.5, 6.0], dtype=torch.float64)
    k = (4 * tops).repeat_interleave(16)[None, None, :, None]
    v = torch.arange(5, dtype=torch.float64).repeat_interleave(16)[None, None, :, None]
    one = call(q, k, None)
    factor = torch.tensor([80 * math.exp(2.2)], dtype=torch.float64)
    out, visited, skipped = literal.attend(q[0], k[0], v[0], one, factor)
    assert (int(visited), int(skipped)) == (5, 2)
    weights = tops[[0, 2, 4]].softmax(0)
    torch.testing.assert_close(out[0, 0], weights @ torch.tensor([[0.0], [2.0], [4.0]]).double())
