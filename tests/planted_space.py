"""A search space whose layers, tiles and losses are known."""

from __future__ import annotations

import torch

from calibrate.loss.sensitivity import LossModel
from calibrate.schema import RunConfig
from calibrate.search.cost import Cost, Curve
from calibrate.search.space import Space, build_space
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import LOW, NEVER, PER_OCTAVE

LAYERS = 4
WEIGHTS = (5.0, 0.5, 0.05, 0.005)


def config(**search_changes: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"lengths": [4096]},
            "budget": {"kl": 0.01, "score_drop": 2.0},
            "target": {"min_kv_len": {"prefill": 4000, "decode": 4000}},
            "search": {"trials": 12, **search_changes},
        }
    )


def statistics() -> Statistics:
    """Every layer: 40 tiles from critical scale factor 1 to 1024, a quarter octave apart."""
    result = Statistics.empty({}, LAYERS, 2, 2, [4096])
    for phase in ("prefill", "decode"):
        bins = torch.arange(40) * PER_OCTAVE // 4 - LOW * PER_OCTAVE + 1
        result.counts[phase][:, :, 0, bins] = 1
        result.counts[phase][:, :, 0, NEVER] = 10
        result.mass[phase][:, :, 0, bins] = torch.logspace(-4, -1, 40, dtype=torch.float64)
        result.rows[phase][:] = 10
        result.kv_tokens[phase][:], result.calls[phase][:] = 4096, 1
    return result


def space(
    chosen: RunConfig,
    layers: tuple[int, ...] = tuple(range(LAYERS)),
    phases: tuple[str, ...] = ("prefill", "decode"),
) -> Space:
    target = chosen.target.model_copy(update={"phases": phases})
    line = Curve((0.0, 1.0), (1.02, 0.5), 4096)
    losses = LossModel(
        {"prefill": WEIGHTS, "decode": WEIGHTS}, dict.fromkeys(("prefill", "decode"), 1.5)
    )
    return build_space(
        statistics(),
        Cost({"prefill": line, "decode": line}, {}),
        losses,
        layers,
        target,
        budget=chosen.budget.kl,
        groups=chosen.search.groups,
    )


def planted_loss(of: Space, setting: dict) -> float:
    return sum(of.predicted_loss(setting).values())
