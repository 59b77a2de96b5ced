"""The Hopper kernel against the reference, on an H100; what it refuses, anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planting import Planted, check_decisions_near_the_threshold, check_prefill, plant

import skip_softmax as ss

pytest.importorskip("triton")
from skip_softmax.hopper import prefill as hopper
from skip_softmax.hopper import prefill_kernel
from skip_softmax.launch import Device
from skip_softmax.meaning.call import call_of

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs an sm_90 device",
)
DTYPES = [torch.bfloat16, torch.float16]
ROWS = 64
SM_90 = Device(9)


HEAD_DIMS = [64, 128, 192]


def planted(head_dim: int = 128, **shape: Any) -> Planted:
    """Values of 128 columns where keys have 192."""
    shape = {"tile_kv": 128, "dtype": torch.bfloat16, **shape}
    return plant(head_dim=head_dim, value_dim=min(head_dim, 128), **shape)


def run(p: Planted, **keywords: Any) -> tuple[torch.Tensor, ss.TileCounts]:
    keywords = {"scale_factor": p.scale_factor, "return_stats": True, **keywords}
    return ss.attention(p.q, p.k, p.v, backend="hopper", **keywords)


def check(p: Planted, **call: Any) -> tuple[torch.Tensor, ss.TileCounts]:
    return check_prefill(p, "hopper", **call)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "q_len, kv_len",
    [(1, 1), (63, 63), (64, 128), (129, 129), (200, 333), (1, 700), (500, 500), (257, 1111)],
)
def test_output_and_decisions_match_the_reference(
    q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype
) -> None:
    p = planted(q_len=q_len, kv_len=kv_len, head_dim=head_dim, dtype=dtype)
    _, stats = check(p)
    assert kv_len < 400 or stats.skipped.sum() > 0
    check(p, causal=False)


@on_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len, kv_len", [(1, 700), (200, 333), (257, 1111), (2000, 3003)])
def test_votes_with_one_of_the_last_rows_skip_nothing(
    q_len: int, kv_len: int, causal: bool, head_dim: int
) -> None:
    """257 rows: the last vote holds one, so that 64 dense rows touch two votes."""
    p = planted(heads=8, kv_heads=2, q_len=q_len, kv_len=kv_len, head_dim=head_dim)
    _, plain = check(p, causal=causal)
    skipped = [int(plain.skipped.sum())]
    for dense_last in (1, 64, 65, q_len):
        _, stats = check(p, causal=causal, dense_last=dense_last)
        assert torch.equal(stats.visited, plain.visited)
        skipped.append(int(stats.skipped.sum()))
    assert skipped == sorted(skipped, reverse=True) and skipped[-1] == 0
    assert kv_len < 400 or skipped[0] > skipped[1]
    dense = ss.attention(p.q, p.k, p.v, causal=causal, backend="hopper")
    assert torch.equal(run(p, causal=causal, dense_last=q_len)[0], dense)


@on_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_long_prompts_at_every_sparsity(sparsity: float, head_dim: int) -> None:
    """More items than processors, so that every program takes several."""
    shape = {"heads": 8, "kv_heads": 2, "q_len": 4000, "kv_len": 5003, "head_dim": head_dim}
    _, stats = check(planted(sparsity=sparsity, **shape))
    assert (stats.skipped.sum() > 0) == (sparsity > 0)


@on_hopper
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (8, 1), (4, 2), (5, 5)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    check(planted(batch=2, heads=heads, kv_heads=kv_heads, q_len=300, kv_len=400))


@on_hopper
@pytest.mark.parametrize("near", [1, 2, 3, 6])
def test_every_order_of_the_work_gives_the_same_bits(
    near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = planted(batch=2, heads=12, kv_heads=6, q_len=700, kv_len=900)
    out, stats = check(p)
    monkeypatch.setattr(hopper, "_near", lambda *_: near)
    monkeypatch.setattr(hopper, "_plans", {})
    again, counted = run(p)
    assert torch.equal(again, out)
    assert torch.equal(counted.skipped, stats.skipped)


@pytest.mark.parametrize(
    "kv_heads, size, near",
    [(8, 2**10, 8), (8, 2**22, 8), (8, 2**23, 4), (6, 2**23, 3), (7, 2**23, 1), (4, 2**30, 1)],
)
def test_kv_heads_at_a_time_are_an_equal_part_that_fits(
    kv_heads: int, size: int, near: int
) -> None:
    assert hopper._near(kv_heads, size) == near


@on_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_more_queries_than_keys_leaves_early_rows_empty(head_dim: int) -> None:
    p = planted(q_len=700, kv_len=240, head_dim=head_dim)
    out, _ = check(p)
    assert (out[:, :, :460] == 0).all()
    assert (out[:, :, 460:] != 0).any(-1).all()


@on_hopper
@pytest.mark.parametrize("dense_last", [0, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_padded_requests_equal_each_one_alone(head_dim: int, dense_last: int) -> None:
    p = planted(batch=4, q_len=300, kv_len=600, head_dim=head_dim)
    q_lens, kv_lens = [300, 33, 0, 130], [600, 177, 450, 0]
    for b, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        p.k[b, :, kv_len:] = torch.nan  # what a cache holds behind its end
        p.v[b, :, kv_len:] = torch.nan
        p.q[b, :, q_len:] = torch.nan
    out, stats = check(p, q_lens=q_lens, kv_lens=kv_lens, dense_last=dense_last)
    assert stats.visited[2:].sum() == 0 and stats.skipped.sum() > 0
    for b in range(2):
        alone = ss.attention(
            p.q[b : b + 1, :, : q_lens[b]], p.k[b : b + 1, :, : kv_lens[b]],
            p.v[b : b + 1, :, : kv_lens[b]],
            scale_factor=p.scale_factor, dense_last=dense_last, backend="hopper",
        )  # fmt: skip
        assert torch.equal(alone[0], out[b, :, : q_lens[b]])


@on_hopper
@pytest.mark.parametrize("dense_last", [0, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packed_requests_equal_each_one_alone(head_dim: int, dense_last: int) -> None:
    p = planted(heads=4, kv_heads=2, q_len=800, kv_len=1333, head_dim=head_dim)
    cu_q, cu_k = [0, 270, 271, 271, 800], [0, 450, 460, 500, 1333]
    tokens_first = [x[0].transpose(0, 1) for x in (p.q, p.k, p.v)]
    lengths = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (cu_q, cu_k)]
    keywords = {"scale_factor": p.scale_factor, "backend": "hopper", "return_stats": True}
    keywords["dense_last"] = dense_last
    out, stats = ss.attention_varlen(*tokens_first, *lengths, 529, 833, **keywords)
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone, counted = ss.attention(p.q[:, :, rows], p.k[:, :, keys], p.v[:, :, keys], **keywords)
        assert torch.equal(out[rows], alone[0].transpose(0, 1))
        assert stats.visited[b].tolist() == counted.visited[0].tolist()
        assert stats.skipped[b].tolist() == counted.skipped[0].tolist()
    assert stats.skipped.sum() > 0


@on_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_beyond_short_requests_hold_nothing_up(head_dim: int) -> None:
    """A long request among short ones: most blocks have no tiles, and come one after another to a program."""
    p = planted(heads=14, kv_heads=2, q_len=4432, kv_len=4432, head_dim=head_dim, sparsity=0.95)
    q_lens, kv_lens = [1233, 1, 1899, 1, 1, 1242], [1250, 1, 1900, 1, 1, 1279]
    starts = [torch.tensor([0, *n], device="cuda").cumsum(0).int() for n in (q_lens, kv_lens)]
    tokens_first = [x[0].transpose(0, 1) for x in (p.q[:, :, : sum(q_lens)], p.k, p.v)]
    tokens_first = [tokens_first[0], *(x[: sum(kv_lens)] for x in tokens_first[1:])]
    keywords = {"scale_factor": p.scale_factor, "return_stats": True}
    place = (*starts, max(q_lens), max(kv_lens))
    _, true = ss.attention_varlen(*tokens_first, *place, backend="triton", **keywords)
    assert true.skipped.sum() > 0
    for _ in range(20):  # which program takes which block differs from run to run
        _, stats = ss.attention_varlen(*tokens_first, *place, backend="hopper", **keywords)
        assert torch.equal(stats.visited, true.visited)
        assert (stats.skipped - true.skipped).abs().sum() <= 0.001 * true.visited.sum()


@on_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_that_see_no_key_hold_nothing_up(head_dim: int) -> None:
    """More queries than keys: the first blocks have no tiles, and are given out last, after sparse ones."""
    p = planted(heads=14, kv_heads=2, q_len=2048, kv_len=2048, head_dim=head_dim, sparsity=0.95)
    q = torch.cat([torch.randn(1, 14, 9000, head_dim).to(p.q), p.q], dim=2)
    keywords = {"scale_factor": p.scale_factor, "return_stats": True}
    _, true = ss.attention(q, p.k, p.v, backend="triton", **keywords)
    assert true.skipped.sum() > 0
    for _ in range(20):
        out, stats = ss.attention(q, p.k, p.v, backend="hopper", **keywords)
        assert not out[:, :, :9000].any()
        assert torch.equal(stats.visited, true.visited)
        assert (stats.skipped - true.skipped).abs().sum() <= 0.001 * true.visited.sum()


@on_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_zero_is_bit_identical_to_the_kernel_without_skipping(head_dim: int) -> None:
    p = planted(heads=8, q_len=3000, kv_len=3333, head_dim=head_dim)
    dense = ss.attention(p.q, p.k, p.v, backend="hopper")
    zeros = torch.zeros(8, device="cuda")  # not known on the host: the kernel that may skip runs
    out, stats = run(p, scale_factor=zeros)
    assert torch.equal(dense, out) and stats.skipped.sum() == 0


@on_hopper
def test_one_number_per_head() -> None:
    p = planted(heads=4, kv_heads=2, q_len=430, kv_len=900)
    factors = torch.tensor(
        [0.0, p.scale_factor, 1e9, torch.nan], device="cuda"
    )  # dense, ., dense, dense
    _, stats = run(p, scale_factor=factors)
    _, same = run(p)
    assert stats.skipped[0, [0, 2, 3]].tolist() == [0, 0, 0]
    assert stats.skipped[0, 1] == same.skipped[0, 1] > 0


@on_hopper
def test_tokens_before_heads_in_memory() -> None:
    p = planted(heads=4, kv_heads=2, q_len=300, kv_len=530)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.q, p.k, p.v))
    out = ss.attention(q, k, v, scale_factor=p.scale_factor, backend="hopper")
    assert out.stride() == q.stride()
    assert torch.equal(out, run(p)[0])


@on_hopper
def test_part_of_a_cache() -> None:
    """Keys of a longer cache: strides that are not those of a dense tensor, and a shifted start."""
    p = planted(heads=4, kv_heads=2, q_len=100, kv_len=500)
    k, v = (
        torch.full((1, 2, 900, 128), torch.nan, device="cuda", dtype=x.dtype) for x in (p.k, p.v)
    )
    k[:, :, 300:800], v[:, :, 300:800] = p.k, p.v
    out = ss.attention(
        p.q, k[:, :, 300:800], v[:, :, 300:800], scale_factor=p.scale_factor, backend="hopper"
    )
    assert torch.equal(out, run(p)[0])


@on_hopper
def test_auto_takes_this_kernel_where_it_can() -> None:
    p = planted(heads=4, kv_heads=2, q_len=600, kv_len=600)
    chosen = ss.attention(p.q, p.k, p.v, scale_factor=p.scale_factor)
    assert torch.equal(chosen, run(p)[0])
    windowed = {"scale_factor": p.scale_factor, "window": 300}
    assert torch.equal(
        ss.attention(p.q, p.k, p.v, **windowed),
        ss.attention(p.q, p.k, p.v, backend="triton", **windowed),
    )


@on_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_thousand_runs_are_bit_identical(head_dim: int) -> None:
    p = planted(heads=16, kv_heads=4, q_len=2500, kv_len=2500, head_dim=head_dim)
    first, counted = run(p)
    for _ in range(1000):
        out, stats = run(p)
        assert torch.equal(first, out)
    assert torch.equal(stats.skipped, counted.skipped) and counted.skipped.sum() > 0


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decisions_differ_only_within_rounding_of_the_threshold(head_dim: int) -> None:
    check_decisions_near_the_threshold("hopper", head_dim, torch.bfloat16, 4096)


@on_hopper
def test_128k_tokens() -> None:
    n = 131072
    check(planted(heads=1, q_len=512, kv_len=n))
    p = planted(heads=2, q_len=n, kv_len=n, head_dim=64)
    out, stats = run(p)
    tail = ss.attention(
        p.q[:, :, -512:], p.k, p.v, scale_factor=p.scale_factor, backend="reference"
    )
    assert (out[:, :, -512:] - tail).abs().max() < 0.01
    assert 0.4 < (stats.skipped.sum() / stats.visited.sum()).item() < 0.7


@on_hopper
def test_lengths_and_thresholds_recompile_nothing() -> None:
    p = planted(heads=4, q_len=1100, kv_len=1100)

    def compiled() -> int:
        return sum(len(cache[0]) for cache in prefill_kernel._hopper.device_caches.values())

    def call(q_len: int, kv_len: int, factor: float):
        ss.attention(
            p.q[:, :, :q_len].contiguous(), p.k[:, :, :kv_len].contiguous(), p.v[:, :, :kv_len].contiguous(),
            scale_factor=factor, backend="hopper",
        )  # fmt: skip

    call(1000, 1024, 3.0)
    call(1024, 1024, 3.0)  # the first row is the first of a vote
    before = compiled()
    for q_len, kv_len, factor in [
        (17, 1099, 0.1), (1024, 1024, 7.0), (16, 16, 2.5), (513, 600, 1.0), (2, 1100, 30.0)
    ]:  # fmt: skip
        call(q_len, kv_len, factor)
    assert compiled() == before


@on_hopper
def test_a_captured_graph_follows_new_thresholds_and_lengths() -> None:
    p = planted(batch=2, heads=40, kv_heads=4, q_len=500, kv_len=700)
    factors = torch.zeros(40, device="cuda")
    kv_lens = torch.tensor([700, 650], dtype=torch.int32, device="cuda")
    run(p, scale_factor=factors, kv_lens=kv_lens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = run(p, scale_factor=factors, kv_lens=kv_lens)
    factors.fill_(p.scale_factor)
    kv_lens.copy_(torch.tensor([600, 700]))
    for _ in range(3):  # the counter of items starts at zero each time
        graph.replay()
    eager, counted = run(p, scale_factor=factors, kv_lens=kv_lens)
    assert torch.equal(out, eager)
    assert torch.equal(stats.skipped, counted.skipped) and counted.skipped.sum() > 0


@on_hopper
def test_torch_compile_sees_one_graph() -> None:
    p = planted(q_len=165, kv_len=300)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return ss.attention(q, k, v, scale_factor=0.05, backend="hopper") * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.q, p.k, p.v), call(p.q, p.k, p.v))
    counts = torch.zeros(1, p.q.shape[1], 2, dtype=torch.int64, device=p.q.device)
    rest = 0.05, None, True, 0.2, 64, 0, None, None, None, None, None, 165, 300, False
    torch.library.opcheck(
        torch.ops.skip_softmax.hopper.default,
        (p.q, p.k, p.v, torch.empty_like(p.q), counts, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


def refusal(
    q: torch.Tensor | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    value_dim: int | None = None,
    device: Device = SM_90,
    **change: Any,
) -> str | None:
    """What the kernel says of a call, on a device that need not be here."""
    about = {"tile_q": 64, "tile_kv": 128, "window": None, "scale": 0.1, **change}
    q = torch.zeros(1, 2, 64, head_dim, dtype=dtype) if q is None else q
    v = torch.zeros(1, 2, 64, value_dim or head_dim, dtype=dtype)
    return hopper.why_not(call_of(q, q, v, **about), device)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float32}, "dtype torch.float32 is not fp16 or bf16"),
        ({"head_dim": 96}, "head_dim 96"),
        ({"value_dim": 64}, "of values 64"),
        ({"head_dim": 192}, "head_dim 192 (of values 192) is not 64, 128, or 192 (of values 128)"),
        ({"tile_q": 128}, "votes of 128 x 128 are not 64 x 128"),
        ({"tile_kv": 64}, "votes of 64 x 64"),
        ({"window": 9}, "sliding window"),
        ({"kv_start": 8}, "kv_start 8"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"q": torch.zeros(1, 2, 64, 256, dtype=torch.bfloat16)[..., ::2]}, "strides"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    assert refusal() is None
    assert refusal(dense_last=64) is None
    assert refusal(head_dim=192, value_dim=128) is None
    assert refusal(min_kv_len=9, q_len=63, ragged=True) is None
    assert words in refusal(**change)


def test_another_device_is_refused() -> None:
    assert "on the CPU" in refusal(device=Device(9, on_cpu=True))
    assert "compute capability 8.x, not 9.0" in refusal(device=Device(8))
    q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="on the CPU"):
        ss.attention(q, q, q, backend="hopper")
    with pytest.raises(
        NotImplementedError, match="'hopper' does not implement decode; use 'triton'"
    ):
        ss.decode_attention(q[:, :, 0], q, q, backend="hopper")
