"""The statistics kernel against the reference: on a CPU through Triton's interpreter, on a GPU as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planting import DEVICE, Planted, plant

import skip_softmax as ss
from skip_softmax.meaning import histogram

pytest.importorskip("triton")

pytestmark = pytest.mark.slow


def compare(p: Planted, moved: float = 0.0, **keywords: Any) -> ss.TileHistogram:
    """`moved`: share of tiles that rounding may put into the next bin."""
    out, found = ss.tile_statistics(p.q, p.k, p.v, backend="triton", **keywords)
    truth_out, truth = ss.tile_statistics(p.q, p.k, p.v, backend="reference", **keywords)
    eps = torch.finfo(p.q.dtype).eps
    assert (out - truth_out).abs().max() <= max(4 * eps, 1e-5) * truth_out.abs().max()
    assert found.rows == truth.rows
    assert found.counts.sum(1).tolist() == truth.counts.sum(1).tolist()
    assert found.counts[:, -1].tolist() == truth.counts[:, -1].tolist()  # never skipped
    # Rounding moves a tile to the next bin at most: cumulative counts differ by what moved.
    cumulative = (found.counts.cumsum(1) - truth.counts.cumsum(1)).abs().max().item()
    assert cumulative <= moved * truth.counts.sum().item()
    visible = truth.rows * truth.counts.shape[0]
    torch.testing.assert_close(found.mass.sum(), truth.mass.sum(), rtol=1e-3, atol=1e-3)
    if not moved:
        torch.testing.assert_close(found.mass, truth.mass, rtol=2e-3, atol=2e-4 * visible)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (63, 63), (200, 333)])
def test_every_tile_of_a_prompt_is_counted_as_the_reference_counts_it(
    q_len: int, kv_len: int, dtype: torch.dtype
) -> None:
    compare(
        plant(heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, dtype=dtype), tile_kv=32, moved=0.02
    )


@pytest.mark.parametrize("tile_q, tile_kv", [(16, 16), (64, 128), (128, 64), (256, 256), (32, 512)])
def test_any_vote_geometry(tile_q: int, tile_kv: int) -> None:
    p = plant(q_len=300, kv_len=600, tile_q=tile_q, tile_kv=tile_kv)
    compare(p, tile_q=tile_q, tile_kv=tile_kv, moved=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_large_heads_fit_shared_memory(head_dim: int, dtype: torch.dtype) -> None:
    p = plant(q_len=140, kv_len=300, head_dim=head_dim, tile_kv=128, dtype=dtype)
    compare(p, tile_q=64, tile_kv=128, moved=0.02)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("head_dim, value_dim", [(192, 128), (48, 32)])
def test_values_of_another_head_dim(head_dim: int, value_dim: int, decode: bool) -> None:
    p = plant(q_len=70, kv_len=130, head_dim=head_dim, value_dim=value_dim, dtype=torch.float16)
    compare(p, decode=decode, tile_kv=32, running_max="seeded", moved=0.02)


@pytest.mark.parametrize("tile_heads", [1, 2])
def test_heads_that_vote_together(tile_heads: int) -> None:
    p = plant(heads=8, kv_heads=2, q_len=10, kv_len=130, tile_q=1)
    found = compare(p, decode=True, tile_kv=32, tile_heads=tile_heads, moved=0.02)
    assert found.counts.shape[0] == 8 // tile_heads and found.rows == 10 * tile_heads
    with pytest.raises(NotImplementedError, match="votes of 8 query heads span KV heads, of 4"):
        ss.tile_statistics(p.q, p.k, p.v, decode=True, tile_heads=8, backend="triton")


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("window", [30, 150])
def test_windows(window: int | None, decode: bool) -> None:
    p = plant(q_len=130, kv_len=200)
    compare(p, window=window, decode=decode, tile_kv=32, running_max="seeded", moved=0.02)


# Every pair of the three.
@pytest.mark.parametrize(
    "dense_last, tile_q, tile_kv, window",
    [
        (1, 16, 16, None), (1, 64, 32, 150), (1, 256, 64, None),
        (64, 16, 16, 150), (64, 64, 32, None), (64, 256, 64, 150),
        (1000, 16, 16, None), (1000, 64, 32, 150), (1000, 256, 64, None),
    ],
)  # fmt: skip
def test_tiles_of_dense_rows_can_never_be_skipped(
    dense_last: int, tile_q: int, tile_kv: int, window: int | None
) -> None:
    q_len = tile_q + 74  # two votes, three or several, the last of them not whole
    p = plant(q_len=q_len, kv_len=q_len + 70, tile_q=tile_q, tile_kv=tile_kv)
    call = {"tile_q": tile_q, "tile_kv": tile_kv, "window": window}
    found = compare(p, moved=0.02, dense_last=dense_last, **call)
    never = found.counts[:, -1].sum()
    plain = compare(p, moved=0.02, **call)
    assert never > plain.counts[:, -1].sum()
    assert dense_last < q_len or never == found.counts.sum()
    assert dense_last > q_len or window is not None or never < found.counts.sum()
    assert torch.equal(found.counts.sum(1), plain.counts.sum(1))


def test_not_causal() -> None:
    compare(plant(q_len=100, kv_len=130), causal=False, tile_kv=32, moved=0.02)


@pytest.mark.parametrize("running_max", ["seeded", "ascending"])
@pytest.mark.parametrize("heads, kv_heads, tokens", [(4, 2, 1), (3, 1, 5), (6, 2, 130), (2, 2, 70)])
def test_every_tile_of_decode_is_counted_as_the_reference_counts_it(
    heads: int, kv_heads: int, tokens: int, running_max: str
) -> None:
    p = plant(heads=heads, kv_heads=kv_heads, q_len=tokens, kv_len=300, tile_q=1)
    compare(p, decode=True, tile_kv=32, running_max=running_max, moved=0.02)


def test_decode_tiles_wider_than_a_block() -> None:
    compare(
        plant(q_len=20, kv_len=700, tile_q=1),
        decode=True,
        tile_kv=256,
        running_max="seeded",
        moved=0.05,
    )


def test_batches_add() -> None:
    p = plant(batch=2, q_len=70, kv_len=130)
    whole = compare(p, tile_kv=32, moved=0.02)
    parts = [
        ss.tile_statistics(*(x[b : b + 1] for x in (p.q, p.k, p.v)), tile_kv=32, backend="triton")[
            1
        ]
        for b in (0, 1)
    ]
    assert torch.equal(whole.counts, parts[0].counts + parts[1].counts)
    assert torch.equal(whole.mass, parts[0].mass + parts[1].mass)


@pytest.mark.parametrize("dense_last", [0, 64])
def test_the_histogram_predicts_what_the_kernel_skips(dense_last: int) -> None:
    p = plant(heads=4, kv_heads=2, q_len=130, kv_len=200)
    call = {"tile_kv": 32, "dense_last": dense_last, "backend": "triton"}
    _, found = ss.tile_statistics(p.q, p.k, p.v, **call)
    edge = int((histogram.edges() <= p.scale_factor).sum()) - 1
    factor = histogram.edges()[edge].item()
    _, stats = ss.attention(p.q, p.k, p.v, scale_factor=factor, return_stats=True, **call)
    assert stats.skipped[0].tolist() == found.counts[:, : edge + 1].sum(1).tolist()
    assert stats.skipped.sum() > 0


def test_the_output_is_dense_attention() -> None:
    p = plant(q_len=130, kv_len=200)
    out, _ = ss.tile_statistics(p.q, p.k, p.v, tile_kv=32, backend="triton")
    dense = ss.attention(p.q, p.k, p.v, tile_kv=32, backend="triton")
    torch.testing.assert_close(out, dense)


def test_what_the_kernel_cannot_do_is_refused_by_name() -> None:
    p = plant(q_len=10, kv_len=20)
    with pytest.raises(NotImplementedError, match="kv_start 4"):
        ss.tile_statistics(p.q, p.k, p.v, kv_start=4, backend="triton")
    with pytest.raises(
        NotImplementedError, match="'triton' does not implement gaps; use 'reference'"
    ):
        ss.tile_gaps(p.q, p.k, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("decode", [False, True])
def test_long_prompts(decode: bool, head_dim: int) -> None:
    p = plant(
        heads=8, kv_heads=2, q_len=3000, kv_len=5003, head_dim=head_dim, dtype=torch.bfloat16,
        tile_q=1 if decode else 64, tile_kv=128,
    )  # fmt: skip
    compare(p, decode=decode, tile_kv=128, running_max="seeded", moved=0.01)


@pytest.mark.gpu
def test_memory_grows_with_length_not_with_its_square() -> None:
    torch.cuda.empty_cache()
    q = torch.randn(1, 16, 131072, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 1, 131072, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def peak(call: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()

    plain = peak(lambda: ss.attention(q, k, v, backend="triton"))
    noted = peak(lambda: ss.tile_statistics(q, k, v, backend="triton"))
    print(f"peak memory at 128K: {noted / plain:.3f} of plain attention")
    assert noted <= 1.2 * plain


def test_rows_that_see_no_key_weigh_nothing() -> None:
    p = plant(q_len=100, kv_len=70)
    found = compare(p, tile_q=64, tile_kv=16, moved=0.02)
    assert found.mass.sum().item() == pytest.approx(2 * 70)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_empty_batch_counts_nothing(backend: str) -> None:
    p = plant(q_len=10, kv_len=20)
    out, found = ss.tile_statistics(p.q[:0], p.k[:0], p.v[:0], backend=backend)
    assert out.shape == (0, *p.q.shape[1:]) and found.counts.shape[0] == 2
    assert found.counts.sum() == found.mass.sum() == found.rows == 0
