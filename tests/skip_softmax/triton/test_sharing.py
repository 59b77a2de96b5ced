"""How the requests of a batch share the programs of the decode kernel: found on the device, by law."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from planting import DEVICE

pytest.importorskip("triton")
import triton
import triton.language as tl

from skip_softmax.triton.decode_kernel import _share

pytestmark = pytest.mark.slow

TILE = 32


@triton.jit(do_not_specialize=["requests", "programs", "window"])
def _shares(
    found, items, kv_lens, kv_len, window, requests, programs, TOKENS: tl.constexpr, WINDOWED: tl.constexpr,
    LEAST: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    item = tl.load(items + row)
    owner, begin, count = _share(
        item, kv_lens, kv_len, window, requests, programs, TOKENS, 32, WINDOWED, LEAST, JOINED
    )
    tl.store(found + 3 * row, owner)
    tl.store(found + 3 * row + 1, begin)
    tl.store(found + 3 * row + 2, count)


def shares(
    kv_lens: list[int] | None, requests: int, programs: int, items: Sequence[int], *, joined: bool = False,
    window: int | None = None, kv_len: int = 10**6, least: int = 4,
) -> list[list[int]]:  # fmt: skip
    """[request, first program, programs] of some programs, or of some of the requests that have several."""
    found = torch.full((len(items), 3), -1, dtype=torch.int32, device=DEVICE)
    which = torch.tensor(items, dtype=torch.int32, device=DEVICE)
    lengths = None if kv_lens is None else torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
    _shares[(len(items),)](
        found, which, lengths, kv_len, window or 0, requests, programs, TOKENS=1, WINDOWED=window is not None,
        LEAST=least, JOINED=joined,
    )  # fmt: skip
    return found.tolist()


def law(tiles: list[int], programs: int, least: int = 4) -> list[int]:
    """Programs of each request, by the sentence in `decode_kernel.py`."""
    total = max(sum(tiles), 1)
    return [max(1, min(programs * n // total, n // least)) for n in tiles]


def test_a_long_request_among_short_ones_gets_the_programs() -> None:
    # 2048 tiles and 7 times 32, of 33 programs: 33 * 2048 / 2272 is 29.7, and the others have one each.
    kv_lens = [1024, 1024, 1024, 65536, 1024, 1024, 1024, 1024]
    found = shares(kv_lens, 8, 33, range(33 + 7))
    assert [owner for owner, _, count in found if count] == [0, 1, 2, *[3] * 29, 4, 5, 6, 7]
    assert found[3:32] == [[3, 3, 29]] * 29 and found[32] == [4, 32, 1]
    assert [count for *_, count in found[36:]] == [0] * 4  # the rest of the grid has nothing to do
    assert shares(kv_lens, 8, 33, range(8), joined=True)[0] == [3, 3, 29]
    assert [count for *_, count in shares(kv_lens, 8, 33, range(8), joined=True)[1:]] == [0] * 7


@pytest.mark.parametrize("kv_len, count", [(65536, 33), (1024, 8), (128, 1), (31, 1), (0, 1)])
def test_a_request_alone_has_all_programs_but_no_more_than_tiles_for_them(
    kv_len: int, count: int
) -> None:
    for lengths, most in (([kv_len], 10**6), (None, kv_len)):
        found = shares(lengths, 1, 33, range(33), kv_len=most)
        assert found[:count] == [[0, 0, count]] * count
        assert all(left[2] == 0 for left in found[count:])


def test_equal_requests_share_alike_whether_the_host_knows_it_or_not() -> None:
    known = shares(None, 5, 33, range(30), kv_len=65536)
    assert shares([65536] * 5, 5, 33, range(30)) == known
    assert known == [[i // 6, i // 6 * 6, 6] for i in range(30)]


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("requests", [2, 60, 300])  # 128 are looked at together
def test_any_batch_is_shared_by_the_law(requests: int, window: int | None) -> None:
    draw = Random(requests)
    kv_lens = [
        draw.choice([0, 1, 33, draw.randint(1, 300), draw.randint(1, 60000)])
        for _ in range(requests)
    ]
    kv_lens[requests // 2] = 70000
    programs = 70
    tiles = [-(-n // TILE) - (0 if window is None else max(n - window, 0) // TILE) for n in kv_lens]
    counts = law(tiles, programs, least=2)
    grid = programs + requests - 1
    assert sum(counts) <= grid  # so every request finds its programs
    starts = [sum(counts[:i]) for i in range(requests)]
    nobody = [0, 0, 0]
    wanted = [[i, starts[i], n] for i, n in enumerate(counts) for _ in range(n)]
    wanted += [nobody] * (grid - len(wanted))
    items = sorted(draw.sample(range(grid), 30))
    found = shares(kv_lens, requests, programs, items, window=window, least=2)
    assert found == [wanted[item] for item in items]
    several = [[i, starts[i], n] for i, n in enumerate(counts) if n > 1]
    assert several or window is not None  # a window leaves seven tiles
    several += [nobody] * (programs // 2 - len(several))
    joined = range(0, programs // 2, 4)
    found = shares(kv_lens, requests, programs, joined, window=window, least=2, joined=True)
    assert found == several[::4]


def test_lengths_beyond_the_cache_count_as_the_cache() -> None:
    assert shares([10**9, 3200], 2, 20, range(20), kv_len=3200) == [
        *[[0, 0, 10]] * 10,
        *[[1, 10, 10]] * 10,
    ]
