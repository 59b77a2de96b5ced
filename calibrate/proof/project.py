"""Projection: the nearest setting that an engine can express, measured again.

A mean of per-layer numbers is not a setting that anybody has measured. The projection starts from the number
per phase whose predicted loss is that of the run's winner, and steps down until the measured loss fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calibrate.engines.catalogue import find_gpu, geometry_of, objections, servers_for
from calibrate.engines.types import Engine
from calibrate.errors import UserError
from calibrate.loss.measure import Outcome, sparsity
from calibrate.loss.sensitivity import largest_scale_factor
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.proof.validate import Validation, validate
from calibrate.schema import RunConfig
from calibrate.search.points import Point, candidates
from calibrate.search.space import Space
from skip_softmax.thresholds.types import Geometry, Phase

_STEP = 0.5  # octaves between tried projections
_STEPS = 12
_PER_OCTAVE = 8


@dataclass(frozen=True)
class Projection:
    """What the projection found.

    Attributes:
        direct: the straight projection of the winner.
        refused: why the straight projection does not hold; None: it does.
        validation: the proof of the nearest setting that holds.
    """

    direct: Point
    refused: str | None
    validation: Validation


def tiles_for(
    engine: Engine,
    gpu: str | None,
    geometry: Geometry,
    phases: tuple[Phase, ...],
    head_dim: int,
    group: int,
) -> Geometry:
    """Tiles at which an engine's numbers must be measured: the run's own if they serve, else the engine's.

    Args:
        engine: who will serve.
        gpu: GPU family; None: the first that can.
        geometry: the run's tiles.
        phases: phases to project.
        head_dim: size of a head.
        group: query heads per KV head.

    Returns:
        The geometry.

    Raises:
        UserError: no server of the engine runs these phases as they can be measured here.
    """
    servers = servers_for(engine, find_gpu(gpu, engine))
    refused = []
    options = [(server, geometry) for server in servers]
    options += [(server, geometry_of(server, head_dim, geometry)) for server in servers]
    for server, tiles in options:
        reasons = objections(server, tiles, phases, head_dim, group, trust_unpublished=True)
        if not reasons:
            return tiles
        refused += reasons
    cure = "cure: project one phase with `--phase prefill`, or choose another --gpu or engine"
    lasting = [reason for reason in refused if reason.cure != "measure"] or refused
    raise UserError("\n  ".join([*dict.fromkeys(reason.text for reason in lasting), cure]))


def project(
    winner: Setting,
    known: Sequence[Point],
    space: Space,
    engine: Engine,
    config: RunConfig,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    evaluate: tuple[Callable[[Setting, Prompt], Outcome], Callable[[Setting, Prompt], Outcome]],
) -> Projection:
    """Finds the fastest expressible setting near the winner that meets the budget on the held-out prompts.

    Args:
        winner: the run's validated setting.
        known: trials of the run; those that the engine can express are candidates too.
        space: the run's search space; predicts losses and times.
        engine: what can be expressed.
        config: the run's config with the engine's geometry and phases.
        prompts: search and held-out prompts.
        evaluate: runs a search prompt, runs a held-out prompt, both as the engine would.

    Returns:
        The projection; its validation may have failed.

    Raises:
        WorkFailed: nothing that the engine can express skips within the budget.
    """
    search, heldout = prompts
    budget = config.budget.kl

    def measured(name: str, setting: Setting) -> Point:
        outcomes = [evaluate[0](setting, prompt) for prompt in search]
        return Point(
            name,
            setting,
            sum(o.kl for o in outcomes) / len(outcomes),
            space.relative_time(setting),
            {phase: sparsity(outcomes, phase) for phase in config.target.phases},
        )

    dense = _dense_layers(winner, engine)
    factors = {
        phase: _nearest(winner, phase, dense, space, config) for phase in config.target.phases
    }
    points = [measured("projection", _one_number(factors, dense, space))]
    for setting in _expressible(known, engine, config)[:2]:
        points.append(measured("search", setting))
    for step in range(1, _STEPS + 1):
        if min(point.kl for point in points) <= 0.25 * budget:
            break
        lower = {
            phase: float(f"{factor * 2 ** (-_STEP * step):.5g}")
            for phase, factor in factors.items()
        }
        points.append(measured("projection", _one_number(lower, dense, space)))
    direct = points[0]
    tried = [point for point in candidates(points, config) if point is not direct]
    if direct.kl <= budget and all(direct.sparsity.values()):
        tried = [direct, *tried][: max(config.validation.attempts, 2)]
    result = validate(tried, (), heldout, evaluate[1], space.statistics, config, None)
    refused = None
    if direct.kl > budget:
        refused = (
            f"KL {direct.kl:.3g} on the search prompts, above the budget of {budget:g} nats/token"
        )
    elif result.attempts[0].setting == direct.setting:
        refused = result.attempts[0].reason
    return Projection(direct, refused, result)


def describe(setting: Setting) -> dict[str, Any]:
    """A one-number setting as the engine takes it."""
    dense = [i for i, values in enumerate(zip(*setting.values(), strict=True)) if not any(values)]
    return {"scale_factor": {p: max(f) for p, f in setting.items()}, "dense_layers": dense}


def _dense_layers(winner: Setting, engine: Engine) -> set[int]:
    if engine.form == "scalar":
        return set()
    return set(describe(winner)["dense_layers"])


def _nearest(
    winner: Setting, phase: Phase, dense: set[int], space: Space, config: RunConfig
) -> float:
    """The largest single number whose predicted loss is at most the winner's [tokens]."""
    allowed = space.predicted_loss({phase: winner[phase]})[phase]
    top = math.log2(largest_scale_factor(config, phase))
    grid = [top - step / _PER_OCTAVE for step in range(int((top + 2) * _PER_OCTAVE))]
    for log2_factor in grid:
        factors = _one_number({phase: 2.0**log2_factor}, dense, space)
        if space.predicted_loss(factors)[phase] <= allowed:
            return float(f"{2.0**log2_factor:.5g}")
    return float(f"{2.0 ** grid[-1]:.5g}")


def _one_number(factors: dict[Phase, float], dense: set[int], space: Space) -> Setting:
    armed = set(space.layers) - dense
    return {
        phase: tuple(
            factor if layer in armed else 0.0
            for layer in range(space.statistics.counts[phase].shape[0])
        )
        for phase, factor in factors.items()
    }


def _expressible(known: Sequence[Point], engine: Engine, config: RunConfig) -> list[Setting]:
    """Settings of trials that the engine can express and that kept the budget, fastest first."""
    found = []
    for point in sorted(known, key=lambda p: p.relative_time):
        setting = {phase: point.setting[phase] for phase in config.target.phases}
        zeros = [{i for i, f in enumerate(factors) if f == 0} for factors in setting.values()]
        single = all(len(set(factors) - {0.0}) == 1 for factors in setting.values())
        same = all(zero == zeros[0] for zero in zeros) and (
            engine.form == "scalar+ignore" or not zeros[0]
        )
        if single and same and point.kl <= config.budget.kl and setting not in found:
            found.append(setting)
    return found
