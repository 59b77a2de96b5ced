"""Kernels over an FP8 cache, against the reference over what it means; more sizes on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import inputs
import pytest
import torch
from planting import DEVICE, DTYPES, Planted, assert_accurate, call_alone, expected, in_fp8, plant

import skip_softmax as ss
from skip_softmax import choose
from skip_softmax.launch import Device
from skip_softmax.meaning.call import call_of

pytest.importorskip("triton")
from skip_softmax.triton import decode

pytestmark = pytest.mark.slow
GPU = DEVICE == "cuda"


@pytest.fixture(autouse=True)
def planned_anew() -> Iterator[None]:
    decode._plans.clear()
    yield
    decode._plans.clear()


def planted(**shape: Any) -> Any:
    return in_fp8(plant(**{"batch": 2, "heads": 4, "kv_heads": 2, **shape}))


def agree(
    found: tuple[torch.Tensor, ss.TileCounts],
    p: Planted,
    lengths: list[tuple[int, int]],
    **geometry: Any,
) -> None:
    """Each request (query rows, keys) alone in the reference: tiles exactly, output within rounding."""
    out, stats = found
    for b, (rows, keys) in enumerate(lengths):
        call = call_alone(p, rows, keys, **geometry)
        _, visited, skipped = expected(p, call, b)
        assert stats.visited[b].tolist() == visited.tolist()
        assert stats.skipped[b].tolist() == skipped.tolist()
        assert_accurate(out[b, :, :rows], p, call, b)
    assert 0 < stats.skipped.sum() < stats.visited.sum()


# A GPU has time for every dtype with everything.
ALL = [
    (dtype, *rest)
    for dtype in DTYPES
    for rest in (("seeded", 0), ("seeded", 16), ("ascending", 64))
]


@pytest.mark.parametrize(
    "dtype, running_max, page",
    ALL if GPU else [(torch.float16, "seeded", 16), (torch.float32, "ascending", 0)],
    ids=str,
)
@pytest.mark.parametrize(
    "head_dim, kv_len", [(128, 9000), (64, 3000), (80, 777)] if GPU else [(32, 200)]
)
def test_decode(
    head_dim: int, kv_len: int, running_max: str, page: int, dtype: torch.dtype
) -> None:
    p, k, v, scales = planted(
        q_len=2, kv_len=kv_len, tile_q=1, tile_kv=32, head_dim=head_dim, dtype=dtype
    )
    table, lengths = None, [kv_len, kv_len // 2 + 3]
    if page:
        k, v, table = inputs.in_pages(k, v, page)
    found = ss.decode_attention(
        p.q, k, v, lengths, block_table=table, scale_factor=p.scale_factor, tile_kv=32,
        running_max=running_max, backend="triton", return_stats=True, **scales,
    )  # fmt: skip
    geometry = {"tile_q": None, "tile_kv": 32, "running_max": running_max}
    agree(found, p, [(2, n) for n in lengths], **geometry)


def test_decode_of_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Device(9, processors=12, on_cpu=not GPU)
    monkeypatch.setattr(decode, "device_of", lambda of: on)
    monkeypatch.setattr(decode, "LEAST_TILES", 1)
    monkeypatch.setattr(decode, "FP8_ARMED", decode.FP8_ARMED._replace(per_processor=1))
    p, k, v, scales = planted(q_len=1, kv_len=500, tile_q=1, tile_kv=32, heads=2)
    out, stats = ss.decode_attention(
        p.q, k, v, scale_factor=p.scale_factor, tile_kv=32, window=400, running_max="seeded",
        backend="triton", return_stats=True, **scales,
    )  # fmt: skip
    geometry = {"tile_q": None, "tile_kv": 32, "running_max": "seeded", "window": 400}
    agree((out, stats), p, [(1, 500)] * 2, **geometry)


@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float16], ids=str)
@pytest.mark.parametrize(
    "page, window",
    [(0, None), (16, 170), (64, None), (128, None)] if GPU else [(0, None), (16, 130)],
)
@pytest.mark.parametrize(
    "head_dim, q_len, kv_len", [(64, 900, 2000), (128, 3000, 3000)] if GPU else [(32, 40, 180)]
)
def test_prefill(
    head_dim: int, q_len: int, kv_len: int, page: int, window: int | None, dtype: torch.dtype
) -> None:
    tile_kv = 32 if kv_len < 1000 else 128
    p, k, v, scales = planted(
        batch=1,
        heads=2,
        q_len=q_len,
        kv_len=kv_len,
        tile_kv=tile_kv,
        head_dim=head_dim,
        dtype=dtype,
    )
    table, lengths = None, [kv_len]
    if page:
        k, v, table = inputs.in_pages(k, v, page)
    found = ss.attention(
        p.q, k, v, block_table=table, kv_lens=lengths, scale_factor=p.scale_factor, tile_kv=tile_kv,
        window=window, backend="triton", return_stats=True, **scales,
    )  # fmt: skip
    agree(found, p, [(q_len, n) for n in lengths], tile_q=64, tile_kv=tile_kv, window=window)


def test_packed_prefill() -> None:
    p, k, v, scales = planted(batch=1, heads=2, q_len=110, kv_len=110)
    starts = torch.tensor([0, 80, 110], dtype=torch.int32, device=DEVICE)
    q, k, v = (x[0].transpose(0, 1) for x in (p.q, k, v))
    keywords = {"scale_factor": p.scale_factor, "tile_kv": 32, "return_stats": True, **scales}
    (out, stats), (true, counts) = (
        ss.attention_varlen(q, k, v, starts, starts, 80, 80, backend=backend, **keywords)
        for backend in ("triton", "reference")
    )
    assert torch.equal(stats.skipped, counts.skipped) and stats.skipped.sum() > 0
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float16], ids=str)
@pytest.mark.parametrize("in_decode, running_max", [(False, "ascending"), (True, "seeded")])
def test_statistics(in_decode: bool, running_max: str, dtype: torch.dtype) -> None:
    shape = (
        {"q_len": 70, "kv_len": 5000}
        if GPU
        else {"batch": 1, "heads": 2, "q_len": 33, "kv_len": 130}
    )
    p, k, v, scales = planted(**shape, head_dim=64, dtype=dtype)
    keywords = {"decode": in_decode, "running_max": running_max, "tile_kv": 32}
    out, found = ss.tile_statistics(p.q, k, v, backend="triton", **scales, **keywords)
    wide = [x.double() for x in (p.q, p.k, p.v)]
    truth, true = ss.tile_statistics(*wide, backend="reference", **keywords)
    # Gaps near a bin's edge may fall to either side of it.
    assert (found.counts - true.counts).abs().sum() <= 0.02 * true.counts.sum()
    assert torch.equal(found.counts.sum(1), true.counts.sum(1))
    torch.testing.assert_close(found.mass.sum(1), true.mass.sum(1), rtol=1e-4, atol=1e-4)
    tolerance = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert (out.double() - truth).abs().max() <= tolerance


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.full((2,), 0.5)])
def test_one_scale_however_it_is_given(scale: torch.Tensor) -> None:
    p, k, v, _ = planted(batch=1, heads=2, q_len=2, kv_len=70)
    given = scale.to(DEVICE)
    keywords = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    for operation in (ss.attention, ss.decode_attention):
        true = operation(p.q, k, v, k_scale=0.5, v_scale=0.5, **keywords)
        for k_scale, v_scale in ((given, given), (0.5, given), (given, 0.5)):
            found = operation(p.q, k, v, k_scale=k_scale, v_scale=v_scale, **keywords)
            assert torch.equal(found, true)  # a power of two changes no digit


def test_devices_that_cannot() -> None:
    q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 64, 128).to(torch.float8_e4m3fn)
    prefill = call_of(q, k, k, tile_q=64, tile_kv=128, scale=None, window=None)
    one = call_of(q[:, :, :1], k, k, tile_q=None, tile_kv=64, scale=None, window=None)
    law = "FP8, which a device of compute capability 8.0 does not convert; it must be 8.9 or more"
    for operation, call in (("prefill", prefill), ("decode", one), ("statistics", prefill)):
        assert law in (choose.why_not(operation, call, Device(8)) or "")
        assert choose.why_not(operation, call, Device(8, minor=9)) is None
    # Hopper's own kernel knows no FP8 yet: `auto` takes Triton there.
    assert choose.able("prefill", prefill, Device(9)) == ["triton"]
    reasons = choose._room("hopper.prefill").why_not(prefill, Device(9))
    assert reasons == "keys and values are torch.float8_e4m3fn, not torch.bfloat16"


@pytest.mark.gpu
def test_graphs_read_scales_anew() -> None:
    p, k, v, scales = planted(q_len=1, kv_len=4000, tile_q=1, tile_kv=64, dtype=torch.bfloat16)
    out = torch.empty_like(p.q)
    keywords = {"scale_factor": p.scale_factor, "running_max": "seeded", "out": out, **scales}
    ss.decode_attention(p.q, k, v, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ss.decode_attention(p.q, k, v, **keywords)
    scales["k_scale"].mul_(0.5)
    scales["v_scale"].mul_(4.0)
    graph.replay()
    true = ss.decode_attention(p.q, k, v, **{**keywords, "out": None})
    assert torch.equal(out, true)
