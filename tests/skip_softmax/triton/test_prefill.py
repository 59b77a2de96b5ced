"""The prefill kernel against the reference: on a CPU through Triton's interpreter, on a GPU as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from planting import (
    DEVICE,
    DTYPES,
    KINDS,
    Planted,
    check_decisions_near_the_threshold,
    check_prefill,
    paged,
    plant,
)

import skip_softmax as ss

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from skip_softmax import launch
from skip_softmax.choose import Backend
from skip_softmax.triton import prefill_kernel

pytestmark = pytest.mark.slow


def check(p: Planted, *, tile_kv: int = 32, **call: Any) -> tuple[torch.Tensor, ss.TileCounts]:
    return check_prefill(p, "triton", tile_kv=tile_kv, **call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (63, 63), (129, 129), (200, 333), (1, 70)])
def test_output_and_decisions_match_the_reference(
    q_len: int, kv_len: int, dtype: torch.dtype
) -> None:
    _, stats = check(plant(q_len=q_len, kv_len=kv_len, dtype=dtype))
    assert kv_len < 100 or stats.skipped.sum() > 0


def test_skipped_tiles_are_the_planted_ones() -> None:
    p = plant(q_len=256, kv_len=256)
    _, stats = check(p)
    count = 0
    for vote in range(4):
        seen = range(
            1, (vote + 1) * 2
        )  # two tiles of 32 keys per vote of 64 rows; tile 0 is the sink
        count += sum(bool(p.quiet[0, 0, vote % KINDS, tile]) for tile in seen)
    # A quiet tile on the diagonal is skipped as well: no row of it holds anything louder.
    assert stats.skipped.tolist() == [[count, count]]


@pytest.mark.parametrize("dense_last", [1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("q_len", [256, 193])
def test_the_last_votes_keep_what_was_planted_to_be_skipped(q_len: int, dense_last: int) -> None:
    """Votes of 64 rows, the last of 193 rows with a single one; all others skip as they did."""
    p = plant(q_len=q_len, kv_len=q_len)
    _, stats = check(p, dense_last=dense_last)
    count = 0
    for vote in range((q_len - dense_last) // 64 if dense_last < q_len else 0):
        count += sum(bool(p.quiet[0, 0, vote % KINDS, tile]) for tile in range(1, (vote + 1) * 2))
    assert stats.skipped.tolist() == [[count, count]]
    last = p.quiet[0, 0, (q_len - 1) // 64 % KINDS, 1 : -(-q_len // 32)]
    assert last.any(), "the last vote must have a tile to keep, or this test shows nothing"


@pytest.mark.parametrize("causal, window", [(True, None), (True, 100), (False, None)])
@pytest.mark.parametrize(
    "head_dim, tile_q, tile_kv, dense_last, dtype, q_len, kv_len",
    [
        # blocks of several votes, of which some are dense
        (32, 16, 16, 40, torch.float32, 157, 250),
        (32, 4, 32, 41, torch.float32, 157, 250),
        # two paths through the same tiles
        (128, 64, 128, 64, torch.float16, 333, 700),
        (128, 128, 128, 1, torch.float16, 333, 700),
        (64, 64, 128, 64, torch.float16, 333, 700),
    ],
    ids=str,
)
def test_dense_rows_in_every_kind_of_block(
    head_dim: int, tile_q: int, tile_kv: int, dense_last: int, dtype: torch.dtype, q_len: int, kv_len: int,
    causal: bool, window: int | None,
) -> None:  # fmt: skip
    p = plant(
        q_len=q_len, kv_len=kv_len, head_dim=head_dim, tile_q=tile_q, tile_kv=tile_kv, dtype=dtype
    )
    call = {"tile_q": tile_q, "tile_kv": tile_kv, "causal": causal, "window": window}
    _, plain = check(p, **call)
    _, stats = check(p, dense_last=dense_last, **call)
    if window is None:
        assert 0 < stats.skipped.sum() < plain.skipped.sum()
    else:  # one as narrow as a tile may leave the last votes nothing to skip
        assert stats.skipped.sum() <= plain.skipped.sum()
    assert torch.equal(stats.visited, plain.visited)


def test_all_rows_dense_is_bit_identical_to_the_kernel_without_skipping() -> None:
    p = plant(q_len=200, kv_len=333)
    call = {"tile_kv": 32, "backend": "triton"}
    dense = ss.attention(p.q, p.k, p.v, **call)
    factors = {"scale_factor": p.scale_factor, "return_stats": True}
    out, stats = ss.attention(p.q, p.k, p.v, dense_last=200, **factors, **call)
    assert torch.equal(dense, out) and stats.skipped.sum() == 0


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (8, 1), (4, 2)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    check(plant(heads=heads, kv_heads=kv_heads, q_len=70, kv_len=130))


@pytest.mark.parametrize("tile_q, tile_kv", [(16, 16), (32, 64), (64, 128), (128, 32), (64, 256)])
def test_vote_geometry_is_honoured(tile_q: int, tile_kv: int) -> None:
    p = plant(q_len=150, kv_len=600, tile_q=tile_q, tile_kv=tile_kv)
    _, stats = check(p, tile_q=tile_q, tile_kv=tile_kv)
    assert stats.skipped.sum() > 0


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check(plant(q_len=65, kv_len=100, head_dim=head_dim))


@pytest.mark.parametrize(
    "head_dim, dtype, columns",
    [
        (192, torch.bfloat16, (128, 64)),
        (576, torch.bfloat16, (512, 64)),
        (96, torch.float16, (64, 32)),
        (72, torch.float16, (64, 16)),
        (60, torch.float16, (64, 0)),
        (128, torch.bfloat16, (128, 0)),
        (96, torch.float32, (128, 0)),
        (192, torch.float32, (256, 0)),
    ],
)
def test_keys_come_in_two_pieces_at_most(
    head_dim: int, dtype: torch.dtype, columns: tuple[int, int]
) -> None:
    assert launch.pieces(head_dim, dtype) == columns


# Keys of latent attention in prefill (192, 128), and heads cut as 32 + 16, 64 + 16, one piece of 64.
VALUE_DIMS = [(192, 128), (48, 32), (72, 128), (60, 16)]


@pytest.mark.parametrize("head_dim, value_dim", VALUE_DIMS)
@pytest.mark.parametrize("causal, window", [(True, None), (False, 40)])
def test_values_of_another_head_dim(
    head_dim: int, value_dim: int, causal: bool, window: int | None
) -> None:
    p = plant(q_len=65, kv_len=130, head_dim=head_dim, value_dim=value_dim, dtype=torch.float16)
    out, stats = check(p, causal=causal, window=window)
    assert out.shape[-1] == value_dim
    assert window is not None or stats.skipped.sum() > 0


@pytest.mark.parametrize("head_dim, value_dim", VALUE_DIMS[:2])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_values_of_another_head_dim_in_pages_and_packed(
    backend: Backend, head_dim: int, value_dim: int
) -> None:
    p = plant(q_len=40, kv_len=128, head_dim=head_dim, value_dim=value_dim, dtype=torch.float16)
    call = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": backend, "return_stats": True}
    plain, counted = ss.attention(p.q, p.k, p.v, **call)
    assert counted.skipped.sum() > 0
    k, v, table = paged(p, 16)
    starts = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (40, 128)]
    first = [x[0].transpose(0, 1) for x in (p.q, p.k, p.v)]
    for out, stats in (
        ss.attention(p.q, k, v, block_table=table, kv_lens=[128], **call),
        ss.attention_varlen(*first, *starts, 40, 128, **call),
    ):
        assert torch.equal(out if out.dim() == 4 else out.transpose(0, 1)[None], plain)
        assert torch.equal(stats.skipped, counted.skipped)


@pytest.mark.gpu
@pytest.mark.parametrize("tile_kv", [64, 128])
@pytest.mark.parametrize("head_dim, value_dim", [(192, 128), (128, 64), (64, 256), (96, 64)])
def test_long_prompts_with_values_of_another_head_dim(
    head_dim: int, value_dim: int, tile_kv: int
) -> None:
    p = plant(
        heads=4, kv_heads=4, q_len=2000, kv_len=3003, head_dim=head_dim, value_dim=value_dim,
        tile_kv=tile_kv, dtype=torch.bfloat16,
    )  # fmt: skip
    _, stats = check(p, tile_kv=tile_kv)
    assert stats.skipped.sum() > 0
    check(p, tile_kv=tile_kv, scale_factor=0.0)
    k, v, table = paged(p, tile_kv)
    call = {"scale_factor": p.scale_factor, "tile_kv": tile_kv, "backend": "triton"}
    alike = ss.attention(p.q, k, v, block_table=table, kv_lens=[3003], **call)
    assert torch.equal(alike, ss.attention(p.q, p.k, p.v, **call))


@pytest.mark.parametrize("armed", [True, False])
@pytest.mark.parametrize(
    "head_dim, tile_q, tile_kv, dtype",
    [
        (64, 128, 128, torch.float32),
        (64, 64, 256, torch.float32),
        (128, 64, 128, torch.float32),
        (128, 128, 128, torch.float32),
        (256, 64, 64, torch.float32),
        (128, 128, 256, torch.float16),
        (256, 128, 128, torch.float16),
    ],
    ids=str,
)
def test_the_largest_tiles_fit_shared_memory(
    head_dim: int, tile_q: int, tile_kv: int, dtype: torch.dtype, armed: bool
) -> None:
    p = plant(q_len=140, kv_len=600, head_dim=head_dim, tile_q=tile_q, tile_kv=tile_kv, dtype=dtype)
    factor = p.scale_factor if armed else 0.0
    check(p, tile_q=tile_q, tile_kv=tile_kv, scale_factor=factor)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 40, 150, 1000])
def test_windows(causal: bool, window: int | None) -> None:
    check(plant(q_len=200, kv_len=230), causal=causal, window=window)


@pytest.mark.parametrize("kv_len", [96, 130])
def test_not_causal(kv_len: int) -> None:
    _, stats = check(plant(q_len=100, kv_len=kv_len), causal=False)
    assert stats.skipped.sum() > 0


def test_more_queries_than_keys_leaves_early_rows_empty() -> None:
    p = plant(q_len=100, kv_len=40)
    out = ss.attention(p.q, p.k, p.v, scale_factor=p.scale_factor, tile_kv=32, backend="triton")
    assert (out[:, :, :60] == 0).all()
    assert (out[:, :, 60:] != 0).any(-1).all()


@pytest.mark.parametrize("dense_last", [0, 40])
def test_padded_requests_equal_each_one_alone(dense_last: int) -> None:
    p = plant(batch=3, q_len=130, kv_len=200)
    q_lens, kv_lens = [130, 33, 0], [200, 77, 150]
    for b, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        p.k[b, :, kv_len:] = torch.nan  # what a cache holds behind its end
        p.v[b, :, kv_len:] = torch.nan
        p.q[b, :, q_len:] = torch.nan
    out, stats = check(p, q_lens=q_lens, kv_lens=kv_lens, dense_last=dense_last)
    assert stats.visited[2].sum() == 0
    for b in range(2):
        q_len, kv_len = q_lens[b], kv_lens[b]
        alone = ss.attention(
            p.q[b : b + 1, :, :q_len], p.k[b : b + 1, :, :kv_len], p.v[b : b + 1, :, :kv_len],
            scale_factor=p.scale_factor, tile_kv=32, dense_last=dense_last, backend="triton",
        )  # fmt: skip
        assert torch.equal(alone[0], out[b, :, :q_len])


@pytest.mark.parametrize("dense_last", [0, 40])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_packed_requests_equal_each_one_alone(backend: str, dense_last: int) -> None:
    p = plant(heads=4, kv_heads=2, q_len=200, kv_len=333)
    cu_q, cu_k = [0, 70, 71, 200], [0, 150, 160, 333]
    tokens_first = [x[0].transpose(0, 1) for x in (p.q, p.k, p.v)]
    lengths = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu_q, cu_k)]
    out, stats = ss.attention_varlen(
        *tokens_first,
        *lengths,
        129,
        173,
        scale_factor=p.scale_factor,
        tile_kv=32,
        dense_last=dense_last,
        backend=backend,
        return_stats=True,
    )
    assert out.shape == tokens_first[0].shape
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone, counted = ss.attention(
            p.q[:, :, rows], p.k[:, :, keys], p.v[:, :, keys], scale_factor=p.scale_factor, tile_kv=32,
            dense_last=dense_last, backend=backend, return_stats=True,
        )  # fmt: skip
        torch.testing.assert_close(out[rows], alone[0].transpose(0, 1))
        assert stats.visited[b].tolist() == counted.visited[0].tolist()
        assert stats.skipped[b].tolist() == counted.skipped[0].tolist()


def test_zero_is_bit_identical_to_the_kernel_without_skipping() -> None:
    p = plant(q_len=200, kv_len=333)
    dense = ss.attention(p.q, p.k, p.v, tile_kv=32, backend="triton")
    zeros = torch.zeros(2, device=DEVICE)  # not known on the host: the kernel that may skip runs
    assert torch.equal(
        dense, ss.attention(p.q, p.k, p.v, scale_factor=zeros, tile_kv=32, backend="triton")
    )
    check(p, scale_factor=0.0)


def test_one_number_per_head() -> None:
    p = plant(heads=4, kv_heads=2, q_len=130, kv_len=200)
    factors = torch.tensor(
        [0.0, p.scale_factor, 1e9, p.scale_factor], device=DEVICE
    )  # dense, ., dense, .
    _, stats = ss.attention(
        p.q, p.k, p.v, scale_factor=factors, tile_kv=32, backend="triton", return_stats=True
    )
    _, same = ss.attention(
        p.q, p.k, p.v, scale_factor=p.scale_factor, tile_kv=32, backend="triton", return_stats=True
    )
    assert stats.skipped[0, [0, 2]].tolist() == [0, 0]
    assert stats.skipped[0, [1, 3]].tolist() == same.skipped[0, [1, 3]].tolist() != [0, 0]


def test_a_threshold_of_one_is_dense_and_said() -> None:
    p = plant()
    with pytest.warns(ss.DenseCallWarning, match="`scale_factor` must be below `kv_len`"):
        _, stats = ss.attention(
            p.q, p.k, p.v, scale_factor=200.0, tile_kv=32, backend="triton", return_stats=True
        )
    assert stats.skipped.sum() == 0


def test_more_is_skipped_at_a_higher_threshold() -> None:
    p = plant(q_len=130, kv_len=300)
    skipped = [
        ss.attention(
            p.q, p.k, p.v, scale_factor=f, tile_kv=32, backend="triton", return_stats=True
        )[1].skipped.sum()
        for f in (0.0, 0.001, 0.1, 10.0, 200.0)
    ]
    assert skipped == sorted(skipped) and skipped[0] == 0 < skipped[-1]


def test_tokens_before_heads_in_memory() -> None:
    p = plant(heads=4, kv_heads=2, q_len=100, kv_len=130)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.q, p.k, p.v))
    keywords = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    out = ss.attention(q, k, v, **keywords)
    assert out.stride() == q.stride()
    assert torch.equal(out, ss.attention(p.q, p.k, p.v, **keywords))


def test_torch_compile_sees_one_graph() -> None:
    p = plant(q_len=65, kv_len=100)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return ss.attention(q, k, v, scale_factor=0.05, tile_kv=32, backend="triton") * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.q, p.k, p.v), call(p.q, p.k, p.v))
    counts = torch.zeros(1, 2, 2, dtype=torch.int64, device=DEVICE)
    rest = 0.05, None, True, 0.2, None, 64, 32, 64, 0, *[None] * 5, 65, 100, False, *[None] * 4
    for counted in (counts, counts[0], None):
        torch.library.opcheck(
            torch.ops.skip_softmax.prefill.default,
            (p.q, p.k, p.v, torch.empty_like(p.q), counted, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"kv_start": 8}, "kv_start 8"),
        ({"tile_q": 256}, "tile_q 256 is not between 4 and 128"),
        (
            {"head_dim": 256, "tile_kv": 128},
            "128 x 256 numbers of torch.float32 at once are 128 KiB",
        ),
        ({"tile_kv": 8}, "tile_kv 8"),
        ({"page": 24, "tile_kv": 16}, "page size 24 is no multiple of 16"),
        (
            {"page": 48, "tile_kv": 32},
            "page size 48 is no multiple of 16 that divides tile_kv 32 or is divided",
        ),
        ({"scale": -1.0}, "scale -1.0"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    shape = {"dtype": torch.float32, "head_dim": 64} | change
    p = plant(q_len=10, kv_len=20, dtype=shape.pop("dtype"), head_dim=shape.pop("head_dim"))
    call = {key: value for key, value in change.items() if key in shape}
    if page := call.pop("page", 0):
        k, v, table = paged(p, page)
        with pytest.raises(NotImplementedError, match=words):
            ss.attention(p.q, k, v, block_table=table, kv_lens=[20], backend="triton", **call)
        return
    with pytest.raises(NotImplementedError, match=words):
        ss.attention(p.q, p.k, p.v, backend="triton", **call)


def test_a_kernel_that_does_not_fit_the_gpu_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Large:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **keywords: Any):
                raise OutOfResources(262144, 166912, "shared memory")

            return launch

    monkeypatch.setattr(prefill_kernel, "_prefill", Large())
    p = plant(q_len=10, kv_len=20)
    words = "need 262144 bytes of shared memory and it has 166912; take smaller tiles"
    with pytest.raises(NotImplementedError, match=words):
        ss.attention(p.q, p.k, p.v, backend="triton")


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    p = plant(device="cpu", q_len=10, kv_len=20)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        ss.attention(p.q, p.k, p.v, backend="triton")


@pytest.mark.gpu
def test_auto_names_once_what_it_runs_on_the_reference() -> None:
    p = plant(dtype=torch.float64, q_len=10, kv_len=20)
    with pytest.warns(ss.FallbackWarning, match="dtype torch.float64"):
        ss.attention(p.q, p.k, p.v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_prompts(head_dim: int, dtype: torch.dtype) -> None:
    p = plant(
        heads=8,
        kv_heads=2,
        q_len=4000,
        kv_len=5003,
        head_dim=head_dim,
        tile_kv=128,
        dtype=dtype,
        sparsity=0.7,
    )
    check(p, tile_kv=128)
    check(p, tile_kv=128, window=1500)


@pytest.mark.gpu
def test_128k_tokens() -> None:
    n = 131072
    p = plant(
        heads=1, kv_heads=1, q_len=512, kv_len=n, head_dim=128, tile_kv=128, dtype=torch.bfloat16
    )
    check(p, tile_kv=128)
    whole = plant(
        heads=2, kv_heads=1, q_len=n, kv_len=n, head_dim=64, tile_kv=128, dtype=torch.bfloat16
    )
    out, stats = ss.attention(
        whole.q,
        whole.k,
        whole.v,
        scale_factor=whole.scale_factor,
        backend="triton",
        return_stats=True,
    )
    tail, _ = ss.attention(
        whole.q[:, :, -512:],
        whole.k,
        whole.v,
        scale_factor=whole.scale_factor,
        backend="reference",
        return_stats=True,
    )
    assert (out[:, :, -512:] - tail).abs().max() < 0.01
    assert 0.4 < (stats.skipped.sum() / stats.visited.sum()).item() < 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decisions_differ_only_within_rounding_of_the_threshold(dtype: torch.dtype) -> None:
    check_decisions_near_the_threshold("triton", 128, dtype, 4096 if DEVICE == "cuda" else 512)


@pytest.mark.gpu
def test_lengths_and_thresholds_recompile_nothing() -> None:
    p = plant(heads=4, q_len=1100, kv_len=1100, head_dim=64, tile_kv=128, dtype=torch.bfloat16)

    def call(q_len: int, kv_len: int, factor: float):
        ss.attention(
            p.q[:, :, :q_len].contiguous(), p.k[:, :, :kv_len].contiguous(), p.v[:, :, :kv_len].contiguous(),
            scale_factor=factor, backend="triton",
        )  # fmt: skip

    def compiled() -> int:
        return sum(len(cache[0]) for cache in prefill_kernel._prefill.device_caches.values())

    call(1000, 1024, 3.0)
    call(1000, 1000, 3.0)  # without a cached prefix no query tile is cut
    before = compiled()
    for q_len, kv_len, factor in [
        (17, 1099, 0.1), (1024, 1024, 7.0), (16, 16, 2.5), (513, 600, 1.0), (2, 1100, 30.0)
    ]:  # fmt: skip
        call(q_len, kv_len, factor)
    assert compiled() == before


@pytest.mark.gpu
def test_a_captured_graph_follows_new_thresholds_and_lengths() -> None:
    p = plant(
        batch=2, heads=4, q_len=500, kv_len=700, head_dim=64, tile_kv=128, dtype=torch.bfloat16
    )
    factors = torch.zeros(4, device="cuda")
    kv_lens = torch.tensor([700, 650], dtype=torch.int32, device="cuda")
    keywords = {"backend": "triton", "return_stats": True}
    ss.attention(p.q, p.k, p.v, scale_factor=factors, kv_lens=kv_lens, **keywords)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = ss.attention(p.q, p.k, p.v, scale_factor=factors, kv_lens=kv_lens, **keywords)
    factors.fill_(p.scale_factor)
    kv_lens.copy_(torch.tensor([600, 700]))
    graph.replay()
    eager, counted = ss.attention(p.q, p.k, p.v, scale_factor=factors, kv_lens=kv_lens, **keywords)
    assert torch.equal(out, eager)
    assert torch.equal(stats.skipped, counted.skipped) and counted.skipped.sum() > 0


def test_scores_that_are_no_numbers_show() -> None:
    p = plant(q_len=70, kv_len=130)
    p.q[:, :, 3] = torch.nan
    out = ss.attention(p.q, p.k, p.v, scale_factor=p.scale_factor, tile_kv=32, backend="triton")
    assert out[:, :, 3].isnan().all()
    assert torch.isfinite(out[:, :, 64:]).all()
    with pytest.raises(NotImplementedError, match="scale nan"):
        ss.attention(p.q, p.k, p.v, scale=math.nan, backend="triton")


@pytest.mark.parametrize("tile_q", [1, 2, 4])
def test_more_votes_than_bits_are_refused(tile_q: int) -> None:
    p = plant(q_len=150, kv_len=100, tile_q=tile_q)
    if tile_q == 4:
        check(p, tile_q=tile_q)
        return
    with pytest.raises(NotImplementedError, match=f"tile_q {tile_q} is not between 4 and 128"):
        ss.attention(p.q, p.k, p.v, tile_q=tile_q, backend="triton")


def test_lengths_need_not_be_contiguous() -> None:
    p = plant(batch=3, q_len=90, kv_len=90)
    call = {"scale_factor": p.scale_factor, "tile_kv": 32, "backend": "triton"}
    wide = torch.tensor([[77, 0], [90, 0], [30, 0]], dtype=torch.int32, device=DEVICE)
    compiled = torch.compile(
        lambda lengths: ss.attention(p.q, p.k, p.v, kv_lens=lengths, **call), backend="aot_eager"
    )
    assert torch.equal(
        compiled(wide[:, 0]), ss.attention(p.q, p.k, p.v, kv_lens=[77, 90, 30], **call)
    )
    tokens_first = [x[0].transpose(0, 1) for x in (p.q, p.k, p.v)]
    starts = torch.tensor([[0, 7], [40, 8], [90, 9]], dtype=torch.int32, device=DEVICE)[:, 0]
    packed = [
        ss.attention_varlen(*tokens_first, x, x, 50, 50, **call) for x in (starts, starts.clone())
    ]
    assert torch.equal(*packed)


@pytest.mark.parametrize(
    "starts, longest", [([0, 50, 40], 50), ([-1, 40, 90], 50), ([0, 40, 91], 51), ([0, 40, 90], 49)]
)
def test_packed_lengths_on_the_host_are_checked(starts: list[int], longest: int) -> None:
    x = torch.zeros(90, 2, 32)
    starts = torch.tensor(starts, dtype=torch.int32)
    for backend in ("triton", "reference"):
        with pytest.raises(
            ValueError, match=f"rise within 0 to 90 by at most max_seqlen_q {longest}"
        ):
            ss.attention_varlen(x, x, x, starts, starts, longest, longest, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_who_asks_for_a_gradient_is_told_that_there_is_none(backend: str) -> None:
    p = plant(q_len=70, kv_len=70)
    q = p.q.clone().requires_grad_()
    cu = torch.tensor([0, 70], dtype=torch.int32)
    tokens_first = [x[0].transpose(0, 1) for x in (q, p.k, p.v)]
    call = {"tile_kv": 32, "backend": backend}
    outputs = [
        ss.attention(q, p.k, p.v, scale_factor=1.0, **call),
        ss.attention_varlen(*tokens_first, cu, cu, 70, 70, scale_factor=1.0, **call),
        ss.decode_attention(q[:, :, :2], p.k, p.v, **call),
        ss.tile_statistics(q, p.k, p.v, **call)[0],
    ]
    for out in outputs:
        with pytest.raises(RuntimeError, match="skip-softmax attention has no backward pass"):
            (out.sum() + q.sum()).backward()
    with torch.no_grad():
        assert torch.equal(outputs[0], ss.attention(q, p.k, p.v, scale_factor=1.0, **call))


def test_a_list_of_factors_is_one_number_per_head() -> None:
    p = plant(q_len=70, kv_len=130)
    call = {"tile_kv": 32, "backend": "triton"}
    factors = [p.scale_factor, 0.0]
    listed = ss.attention(p.q, p.k, p.v, scale_factor=factors, **call)
    assert torch.equal(
        listed, ss.attention(p.q, p.k, p.v, scale_factor=torch.tensor(factors), **call)
    )


def test_odd_places_in_memory() -> None:
    """Keys that are one key, and queries whose last dimension is not the innermost."""
    p = plant(q_len=70, kv_len=128, head_dim=64, dtype=torch.float16)
    call = {"tile_kv": 32, "backend": "triton"}
    one = p.k[:, :, :1].expand(-1, -1, 128, -1)
    assert torch.equal(
        ss.attention(p.q, one, p.v, **call), ss.attention(p.q, one.contiguous(), p.v, **call)
    )
    q = p.q.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert q.stride(-1) != 1
    whole = torch.compile(
        lambda q: ss.attention(q, p.k, p.v, **call) * 1,
        backend="inductor" if DEVICE == "cuda" else "aot_eager",
    )
    assert torch.equal(whole(q), ss.attention(p.q, p.k, p.v, **call))
