"""The studies of generalisation and of the length law: what they compute, with planted answers."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from studies import opened

from calibrate.model.forward import forward
from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.statistics.counts import PARTS, Statistics
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.meaning.histogram import BINS, NEVER, TileHistogram, bin_index
from skip_softmax.thresholds.types import PHASES


@pytest.fixture(scope="module")
def general() -> ModuleType:
    return opened("generalisation")


@pytest.fixture(scope="module")
def law(general: ModuleType) -> ModuleType:
    return opened("length_law")


def length_table(law: ModuleType, exponent: float, lengths: tuple[int, ...] = (512, 1024, 2048)):
    """Layers that drop as much at every length when the threshold goes as kv_len ** -exponent."""
    table = law.Table.__new__(law.Table)
    table.lengths = list(lengths)
    steps = [step / law.PER_OCTAVE for step in range(8 * law.PER_OCTAVE + 1)]
    table.factors = {phase: [0.0, *(2.0**step for step in steps)] for phase in PHASES}
    reduced = [
        [0.0, *(2.0 ** (step - (1 - exponent) * math.log2(n / lengths[0]) - 8) for step in steps)]
        for n in lengths
    ]
    share = np.array(reduced)[:, :, None].clip(0, 1).repeat(16, axis=2)
    table.share = table.mass = dict.fromkeys(PHASES, share)
    table.time = dict.fromkeys(PHASES, 1 - 0.5 * share)
    table.loss = dict.fromkeys(PHASES, share**4 * 2.0 ** (np.arange(16) / 4))
    return table


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_the_planted_length_exponent_is_found_and_gains_what_freedom_gains(
    law: ModuleType, exponent: float
) -> None:
    table = length_table(law, exponent)
    ways = {way: table.best(way, 1.0) for way in law.WAYS}
    assert ways["exponent"][1]["exponents"] == dict.fromkeys(PHASES, exponent)
    times = {way: note["time"] for way, (_, note) in ways.items()}
    assert all(note["loss"] <= 1.0 for _, note in ways.values())
    # The steps of the grid leave a part of the loss unspent.
    assert times["free"] <= times["exponent"] + 1e-3 and times["exponent"] <= times["one"] + 1e-3
    assert (times["one"] - times["exponent"] > 3e-3) == (exponent != 1.0)
    for length, setting in ways["exponent"][0].items():
        kept = setting["prefill"][0] * (length / 512) ** (exponent - 1)
        assert kept == pytest.approx(ways["exponent"][0][512]["prefill"][0])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_the_exponent_of_equal_mass_is_the_planted_one(law: ModuleType, exponent: float) -> None:
    table = length_table(law, exponent)
    found = table.exponents()
    for phase in PHASES:
        assert found[phase]["mass"] == pytest.approx([exponent] * 16, abs=0.05)


def test_time_gained_at_equal_loss_is_the_distance_of_the_curves(law: ModuleType) -> None:
    def levels(times: list[float]) -> list[list[dict[str, Any]]]:
        losses = (0.001, 0.01, 0.1)
        return [
            [{"kl": kl, "time": dict.fromkeys(PHASES, time)}]
            for kl, time in zip(losses, times, strict=True)
        ]

    assert law.gain(levels([0.9, 0.8, 0.7]), levels([0.88, 0.78, 0.68])) == pytest.approx(0.02)
    assert law.gain(levels([0.9, 0.8, 0.7]), levels([0.9, 0.8, 0.7])) == 0.0


def test_statistics_of_one_length_are_a_run_with_that_length_alone(law: ModuleType) -> None:
    both = Statistics.empty({}, 2, 4, 2, [128, 256])
    alone = both.like()
    generator = torch.Generator().manual_seed(0)
    for length_bin in (0, 1):
        counts = torch.randint(0, 9, (4, BINS), generator=generator)
        for statistics in (both, alone)[: 2 - length_bin]:
            statistics.add(1, "prefill", length_bin, TileHistogram(counts, counts / 3, 64))
    found = law.only(both, 0)
    for name in PARTS:
        assert torch.equal(getattr(found, name)["prefill"], getattr(alone, name)["prefill"])
    assert found.dropped_mass("prefill", 8.0)[1] == alone.dropped_mass("prefill", 8.0)[1]


def test_two_sets_of_prompts_share_none_and_have_the_shares_of_the_list(
    general: ModuleType,
) -> None:
    prompts = [
        Prompt("text" if i % 2 else "needle_single", "calibration", 512, (i,), (1,), False)
        for i in range(12)
    ]
    one, other = general._apart(prompts, 5, np.random.default_rng(0))
    assert not {p.key for p in one} & {p.key for p in other}
    for part in (one, other):
        assert [p.task for p in part] == [p.task for p in prompts[:5]]


def test_a_prompt_in_chunks_is_the_same_prompt(general: ModuleType) -> None:
    model = tiny.model("llama", sharpness=20.0)
    loaded = LoadedModel(model, None, "tiny", "0", inspect_layers(model), 1024, "float32")
    ids = tiny.tokens(210)[0].tolist()
    prompt = Prompt("text", "heldout", 200, tuple(ids[:200]), tuple(ids[200:]), False)
    for size in (64, 200, 500):
        torch.testing.assert_close(
            general.in_chunks(loaded, prompt, size), forward(loaded, prompt), rtol=1e-4, atol=1e-4
        )


def test_sparsity_at_a_length_that_was_left_out_is_read_on_a_line(general: ModuleType) -> None:
    """Ten tiles each, of which a scale factor of 8 skips 2 at 512 and 4 at 1024: 6 at 2048."""
    statistics = Statistics.empty({}, 1, 1, 1, [512, 1024, 2048])
    for length_bin, skipped in ((0, 2), (1, 4)):
        counts = torch.zeros(1, BINS, dtype=torch.int64)
        counts[0, bin_index(torch.tensor(1.0))], counts[0, NEVER] = skipped, 10 - skipped
        statistics.add(0, "prefill", length_bin, TileHistogram(counts, counts.double(), 64))
        statistics.calls["prefill"][length_bin] = 1
    setting = {"prefill": (8.0,)}

    def at(*lengths: int) -> float:
        prompts = [Prompt("text", "heldout", n, (n,), (1,), False) for n in lengths]
        return float(general._predicted(statistics, "prefill", setting, prompts))

    assert [at(512), at(1024), at(512, 1024), at(2048)] == pytest.approx([0.2, 0.4, 0.3, 0.6])


def test_the_errors_of_few_prompts_are_taken_from_what_a_run_achieves(general: ModuleType) -> None:
    """Counted 3 points too high, of which 1 is what skipping moves: 0.5 of that the search prompts know."""
    few = {
        "decode": {"8": [{"chosen": [1.0, 3.0], "others": [0.0, 0.0]}]},
        "moved": {"decode": {"heldout": -1.0, "search": -0.5}},
    }
    found = general._few([few], "decode")
    assert found["8"]["counted"] == {"bias": [3.0, None], "mean": [3.0, None], "worst": 4.0}
    assert found["8"]["moved"]["bias"] == [2.5, None]
    assert found["8"]["others"]["mean"] == [1.0, None]
