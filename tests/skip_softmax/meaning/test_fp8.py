"""An FP8 cache: what the reference makes of it, and the laws of its scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planting import graded

import skip_softmax as ss

FP8 = torch.float8_e4m3fn


def cache(
    kv_heads: int = 2, kv_len: int = 150
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any], torch.Tensor, torch.Tensor]:
    """Queries, a cache in FP8, its scales, and what it means in fp32."""
    q, k, v = graded(2 * kv_heads, kv_heads, kv_len, kv_len, dtype=torch.float32)
    scales = {"k_scale": torch.tensor([0.37, 2.1]), "v_scale": 0.9}
    k8, v8 = (x.to(FP8) for x in (k / scales["k_scale"].view(-1, 1, 1), v / scales["v_scale"]))
    return q, k8, v8, scales, k8.float() * scales["k_scale"].view(-1, 1, 1), v8.float() * 0.9


def same(found: Any, true: Any) -> None:
    (out, stats), (truth, counts) = found, true
    assert torch.equal(out, truth) and out.dtype == torch.float32
    for one, other in zip(vars(stats).values(), vars(counts).values(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_the_reference_is_attention_over_what_the_cache_means() -> None:
    q, k8, v8, scales, k, v = cache()
    keywords = {"scale_factor": 40.0, "tile_kv": 16, "return_stats": True}
    found = ss.attention(q, k8, v8, tile_q=16, **scales, **keywords)
    same(found, ss.attention(q, k, v, tile_q=16, **keywords))
    assert 0 < found[1].skipped.sum() < found[1].visited.sum()
    same(
        ss.decode_attention(q[:, :, -3:], k8, v8, **scales, **keywords),
        ss.decode_attention(q[:, :, -3:], k, v, **keywords),
    )
    for decode in (False, True):
        geometry = {"tile_q": 16, "tile_kv": 16, "decode": decode}
        same(
            ss.tile_statistics(q, k8, v8, **scales, **geometry),
            ss.tile_statistics(q, k, v, **geometry),
        )
    gaps = ss.tile_gaps(q, k8, tile_q=16, tile_kv=16, k_scale=scales["k_scale"])
    assert torch.equal(gaps, ss.tile_gaps(q, k, tile_q=16, tile_kv=16))
    assert not torch.equal(gaps, ss.tile_gaps(q, k8, tile_q=16, tile_kv=16, k_scale=1.0))


def test_packed_requests_and_pages() -> None:
    q, k8, v8, scales, k, v = cache(kv_len=160)
    starts = torch.tensor([0, 100, 160], dtype=torch.int32)
    keywords = {"scale_factor": 40.0, "tile_q": 16, "tile_kv": 16, "return_stats": True}
    packed = [x[0].transpose(0, 1) for x in (q, k8, v8, k, v)]
    lengths = (starts, starts, 100, 100)
    true = ss.attention_varlen(packed[0], *packed[3:], *lengths, **keywords)
    same(ss.attention_varlen(*packed[:3], *lengths, **scales, **keywords), true)
    pages = [x[0].view(2, 10, 16, -1).transpose(0, 1) for x in (k8, v8)]
    table = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [6, 7, 8, 9, -1, 10**9, 3]])
    paged = ss.attention(
        q[:, :, :100].expand(2, -1, -1, -1), *pages, kv_lens=[100, 64], block_table=table, **scales,
        **keywords,
    )  # fmt: skip
    same((paged[0][:1], ss.TileCounts(*(x[:1] for x in vars(paged[1]).values()))),
         ss.attention(q[:, :, :100], k[:, :, :100], v[:, :, :100], **keywords))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_queries_dtype(dtype: torch.dtype) -> None:
    q, k8, v8, scales, k, v = cache()
    out = ss.decode_attention(q[:, :, -1].to(dtype), k8, v8, **scales)
    assert out.dtype == dtype
    true = ss.decode_attention(q[:, :, -1].to(dtype).double(), k.double(), v.double())
    assert (out.double() - true).abs().max() <= max(torch.finfo(dtype).eps, 1e-6) * 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k_scale": None}, "`k_scale` must be a number, or a tensor .* but got None; pass"),
        ({"v_scale": None}, "`v_scale` must be a number.*got None"),
        ({"v_scale": 0.0}, "`v_scale` must be finite and above 0, but got 0.0"),
        ({"k_scale": float("nan")}, "`k_scale` must be finite"),
        ({"k_scale": torch.tensor([1.0, -1.0])}, r"finite and above 0, but got \[1.0, -1.0\]"),
        ({"k_scale": torch.ones(3)}, r"one per KV head \[2\], but got torch.float32 \(3,\)"),
        ({"v_scale": torch.ones(2, dtype=torch.int64)}, "but got torch.int64"),
    ],
)
def test_laws_of_scales(change: dict[str, Any], words: str) -> None:
    q, k8, v8, scales, _, _ = cache()
    with pytest.raises(ValueError, match=words):
        ss.attention(q, k8, v8, **{**scales, **change})


def test_laws_of_dtypes() -> None:
    q, k8, v8, scales, k, v = cache()
    with pytest.raises(ValueError, match="`k_scale` must be None unless k and v are float8"):
        ss.attention(q, k, v, k_scale=1.0)
    with pytest.raises(TypeError, match=r"`v_scale` must be a number.*got \[1.0, 1.0\]"):
        ss.attention(q, k8, v8, k_scale=1.0, v_scale=[1.0, 1.0])  # type: ignore[arg-type]
    for wrong in ((q, k8, v), (q, k, v8), (q.to(FP8), k8, v8), (q, k.half(), v.half())):
        with pytest.raises(ValueError, match="must share one floating dtype"):
            ss.attention(*wrong, **scales)
    with pytest.raises(ValueError, match="must share one floating dtype"):
        ss.attention(q, k.to(torch.float8_e5m2), v.to(torch.float8_e5m2), **scales)
