"""Why a phase or a layer is left dense: planted statistics and trials, and the words for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from thresholds_files import GOOD, write

from calibrate.proof.dense import COSTS_MORE, NOTHING, left_dense, reach
from calibrate.proof.validate import Attempt
from calibrate.report.tables import left_dense as lines
from calibrate.schema import TargetConfig
from calibrate.search.points import Point
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import LOW, NEVER, PER_OCTAVE
from skip_softmax.thresholds.file import Thresholds

LIMITS = {"kl": 0.01}
TARGET = TargetConfig(min_kv_len={"prefill": 1000, "decode": 100})


def statistics(decode_at: int | None) -> Statistics:
    """One tile in four can be skipped at 64 tokens, not in layer 2; in decode at 2^`decode_at`."""
    found = Statistics.empty({}, 4, 2, 2, [1024])
    for phase, log2 in (("prefill", 6), ("decode", decode_at)):
        found.counts[phase][..., NEVER] = 3
        if log2 is not None:
            found.counts[phase][..., (log2 - LOW) * PER_OCTAVE] = 1  # below this edge
        else:
            found.counts[phase][..., NEVER] = 4
    found.counts["prefill"][2] = 0
    found.counts["prefill"][2, ..., NEVER] = 4
    return found


def point(kl: float, time: float, decode: float) -> Point:
    setting = {"prefill": (64.0, 0.0, 0.0, 0.0), "decode": (64.0 if decode else 0.0,) * 4}
    return Point("search", setting, {"kl": kl}, time, {"prefill": 0.2, "decode": decode})


def attempt(**changes: Any) -> Attempt:
    setting = {"prefill": (64.0, 0.0, 0.0, 0.0), "decode": (0.0,) * 4}
    shares = {"prefill": 0.2, "decode": 0.0}
    made = Attempt("search", setting, {}, True, None, 0.9, shares, {}, {}, 12)
    return replace(made, **changes)


def why(decode_at: int | None, found: list[Point], **changes: Any) -> dict[str, Any]:
    made = left_dense(
        attempt(**changes), found, statistics(decode_at), TARGET, LIMITS, (0, 1, 2, 3)
    )
    return made["dense"]["decode"]


def test_layers_are_named_with_the_reason() -> None:
    made = left_dense(attempt(), [], statistics(None), TARGET, LIMITS, (0, 1, 2))
    assert made["layers_dense"] == {"prefill": {COSTS_MORE: [1], NOTHING: [2]}}, "3 is uncalibrated"


def test_the_reach_of_a_phase_is_what_its_statistics_say() -> None:
    assert reach(statistics(5), "decode", TARGET) == {"most": 0.25, "at": 98.0}
    assert reach(statistics(8), "decode", TARGET) == {"most": 0.0, "at": 98.0, "first": 256.0}
    assert reach(statistics(None), "decode", TARGET) == {"most": 0.0, "at": 98.0}


@pytest.mark.parametrize(
    ("decode_at", "found", "changes", "reason"),
    [
        (8, [], {}, "no tile can be skipped below the largest scale factor"),
        (5, [point(0.001, 0.9, 0.0)], {}, "no trial that ran to its end skipped a tile there"),
        (
            5,
            [point(0.5, 0.6, 0.2), point(0.05, 0.7, 0.1)],
            {},
            "every trial that skipped there cost more than the budget: the nearest had KL 0.0500 nats/token, "
            "where a candidate may have 0.01",
        ),
        (
            5,
            [point(0.001, 0.95, 0.2)],
            {},
            "no time is saved there: the fastest trial within the budget that skipped there takes 0.95 of "
            "the dense time, this one 0.9",
        ),
        (
            5,
            [point(0.001, 0.8, 0.2)],
            {},
            "the faster trials that skipped there cost more than what passed on the held-out prompts",
        ),
        (
            5,
            [point(0.001, 0.8, 0.2)],
            {"setting": point(0.001, 0.8, 0.2).setting},
            "no tile was skipped there on the 12 held-out prompts",
        ),
    ],
)
def test_a_phase_says_why(
    decode_at: int, found: list[Point], changes: dict[str, Any], reason: str
) -> None:
    assert why(decode_at, found, **changes)["reason"] == reason


def test_lines_for_a_reader() -> None:
    evidence = {
        "dense": {"decode": {"reason": "why", "most": 0.0, "at": 98.0, "first": 256.0}},
        "layers_dense": {"prefill": {NOTHING: [0, 3, 4, 5], COSTS_MORE: [7]}},
    }
    assert lines(evidence) == [
        "decode is left dense: why (at most 0 % of the tiles at 98 tokens, the first at 256)",
        "prefill: layers 0, 3 to 5 are left dense: nothing to skip",
        "prefill: layer 7 is left dense: skipping costs more than it saves",
    ]
    assert lines({}) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('dense: {decode: {reason: "x", most: 2.0, at: 1.0}}', "evidence.dense.decode.most"),
        ("dense: {decode: {most: 0.0, at: 1.0}}", "evidence.dense.decode.reason"),
        ("layers_dense: {prefill: {nothing to skip: [-1]}}", "evidence.layers_dense.prefill"),
    ],
)
def test_a_file_with_other_evidence_of_it_is_refused(
    tmp_path: Path, entry: str, message: str
) -> None:
    fine = 'dense: {decode: {reason: "x", most: 0.0, at: 1.0, more: 3}}'
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith("evidence:"))
    assert Thresholds.load(write(tmp_path, f"{text}\nevidence:\n  {fine}\n")).evidence["dense"]
    with pytest.raises(ValueError, match=message):
        Thresholds.load(write(tmp_path, f"{text}\nevidence:\n  {entry}\n"))
