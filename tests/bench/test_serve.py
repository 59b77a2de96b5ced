"""The vLLM benchmark without vLLM: what it reads, compares and sets beside one another."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest
import serve


def result(tokens: list[int], *positions: dict[int, float]) -> Any:
    return tokens, list(positions)


EVEN = {1: math.log(0.405), 2: math.log(0.40)}
CLEAR = {1: math.log(0.7), 2: math.log(0.1)}


@pytest.mark.parametrize(
    ("one", "other", "ties", "wrong"),
    [
        (result([1, 1], CLEAR, CLEAR), result([1, 1], CLEAR, CLEAR), 0, ""),
        # A near-tie may turn out either way, and what follows is another text.
        (result([1, 1], EVEN, CLEAR), result([2, 9], EVEN, {9: -0.1}), 1, ""),
        (result([1, 1], CLEAR, CLEAR), result([2, 1], CLEAR, CLEAR), 1, "1.946 nats apart"),
        (result([1], CLEAR), result([9], {9: -0.1, 2: -3.0}), 0, "differ by"),
        (
            result([1], CLEAR),
            result([1], {1: math.log(0.6), 2: math.log(0.1)}),
            0,
            "differ by 0.154",
        ),
        (result([1, 1], CLEAR, CLEAR), result([1], CLEAR), 0, "2 tokens and 1"),
    ],
)
def test_runs_agree_up_to_near_ties(one: Any, other: Any, ties: int, wrong: str) -> None:
    _, found, said = serve.difference([one], [other])
    assert found == ties
    assert bool(said) == bool(wrong) and wrong in "".join(said)


def test_settings_and_points_are_read_or_refused() -> None:
    assert serve.setting("armed:64") == serve.Setting("armed", 64)
    assert serve.point("65536x8@0.75") == serve.Point(65536, 8, 0.75)
    for text in ("flash:64", "armed", "armed:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="a setting must be"):
            serve.setting(text)
    for text in ("65536", "65536x8", "65536x0@0.5", "16x1@1.5", "200000x1@0"):
        with pytest.raises(argparse.ArgumentTypeError, match="a point must"):
            serve.point(text)


def test_points_belong_to_the_settings_right_before_them() -> None:
    stock, dense, armed = (serve.Setting(name, 16) for name in ("stock", "dense", "armed"))
    one, two = serve.Point(10, 1, 0.0), serve.Point(20, 1, 0.0)
    assert serve.grouped([stock, dense, one, armed, one, two]) == [
        ([stock, dense], [one]),
        ([armed], [one, two]),
    ]


@pytest.mark.parametrize(
    "work",
    [
        ["time", "16x1@0", "stock:16"], ["time", "stock:16"], ["time", "stock:16", "16x1@0", "dense:16"],
        ["gate", "stock:16", "16x1@0"],
    ],
)  # fmt: skip
def test_work_that_makes_no_sense_is_refused(work: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as refused:
        serve.main(work)
    assert refused.value.code == 2
    assert ", as " in capsys.readouterr().err


def test_rows_stand_beside_the_default_and_the_fastest_stock_row_of_the_same_work() -> None:
    def row(backend: str, block: int, length: int, first: float, step: float) -> dict[str, Any]:
        return {
            "backend": backend, "block": block, "length": length, "batch": 1, "ttft_ms": first,
            "tpot_ms": step, "sparsity": {"prefill": 0.731} if backend == "armed" else {},
        }  # fmt: skip

    rows = [
        row("stock", 16, 1000, 110.0, 5.0),
        row("stock", 128, 1000, 100.0, 6.0),
        row("armed", 64, 1000, 80.0, 4.0),
        row("armed", 64, 2000, 80.0, 4.0),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in serve.table(rows).splitlines()
    ]
    assert lines[4] == [
        "1000", "1", "armed", "64", "73.1%", "–", "80.0", "1.375×", "1.250×", "4.000", "1.250×", "1.250×",
    ]  # fmt: skip
    assert lines[5][-6:] == ["80.0", "–", "–", "4.000", "–", "–"]


def test_random_requests_share_prefixes_and_have_every_length() -> None:
    requests = serve.soak_requests(300, 8192, 8192)
    starts = [tuple(ids[:2]) for ids, _ in requests if len(ids) > 1]
    assert len(set(starts)) < len(starts)
    lengths = [len(ids) for ids, _ in requests]
    assert min(lengths) < 4 and max(lengths) > 7000 and max(lengths) <= 8192
    assert {most for _, most in requests} == set(range(1, 13))
