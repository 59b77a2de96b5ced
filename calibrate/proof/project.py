"""Projection: the nearest setting that an engine can express, measured again.

Nobody has measured the mean of per-layer numbers. The projection starts from the number per phase whose
predicted loss is that of the run's winner, and steps down until the measured loss is within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibrate.engines.catalogue import find_gpu, geometry_of, objections, servers_for
from calibrate.engines.types import Engine
from calibrate.errors import UserError
from calibrate.loss.losses import FINEST, LOSSES
from calibrate.loss.measure import Outcome, mean_losses, sparsity
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.proof.plan import provable, shares, spread_seen
from calibrate.proof.validate import Validation, validate
from calibrate.proof.verdict import Law
from calibrate.search.path import Candidate, candidates
from calibrate.search.points import BOLDEST, Point
from calibrate.search.space import Space, grid
from skip_softmax.thresholds.types import Geometry, Phase

_STEP = 0.5  # octaves between tried projections
_STEPS = 12
_PER_OCTAVE = 8


@dataclass(frozen=True)
class Projection:
    """What the projection found.

    Attributes:
        direct: the straight projection of the winner.
        refused: why the straight projection fails; None: it passes.
        validation: the proof of the nearest setting that passes.
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
    latent: bool = False,
) -> Geometry:
    """Tiles at which an engine's numbers must be measured: the run's own if they serve, else the engine's.

    Args:
        engine: who will serve.
        gpu: GPU family; None: the first that can.
        geometry: the run's tiles.
        phases: phases to project.
        head_dim: size of a head.
        group: query heads per KV head.
        latent: whether the model has latent attention (MLA).

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
        reasons = list(
            objections(
                server, tiles, phases, head_dim, group, latent=latent, trust_unpublished=True
            )
        )
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
    law: Law,
    attempts: int,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    evaluate: Callable[[Setting, Prompt], Outcome],
) -> Projection:
    """Finds the fastest expressible setting near the winner that meets the budget on the held-out prompts.

    Args:
        winner: the run's validated setting, in the phases to project; it skips in one of them.
        known: trials of the run; those that the engine can express are candidates too.
        space: the run's search space; predicts losses and times.
        engine: what can be expressed.
        law: what the projection must meet.
        attempts: how many settings the validation may try.
        prompts: search and held-out prompts.
        evaluate: runs a prompt as the engine would.

    Returns:
        The projection; its validation may have failed.

    Raises:
        WorkFailed: nothing that the engine can express skips within the budget.
    """
    search, heldout = prompts
    limits = law.limits
    kl: list[list[float]] = []

    def measured(name: str, setting: Setting) -> Point:
        outcomes = [evaluate(setting, prompt) for prompt in search]
        kl.append([outcome.losses[FINEST] for outcome in outcomes])
        return Point(
            name,
            setting,
            mean_losses(outcomes),
            space.relative_time(setting),
            {phase: sparsity(outcomes, phase) for phase in setting},
        )

    dense = _dense_layers(winner, engine)
    factors = {phase: _nearest(winner, phase, dense, space) for phase in winner}
    points = [measured("projection", space.one_number(factors, dense))]
    for setting in _expressible(known, engine, winner, limits)[:2]:
        points.append(measured("search", setting))
    for step in range(1, _STEPS + 1):
        if min(point.share(limits) for point in points) <= BOLDEST:
            break
        lower = {
            phase: float(f"{factor * 2 ** (-_STEP * step):.5g}")
            for phase, factor in factors.items()
        }
        points.append(measured("projection", space.one_number(lower, dense)))
    direct = points[0]
    over = [name for name, loss in direct.losses.items() if loss > limits.get(name, math.inf)]
    spread = spread_seen(kl, [prompt.task for prompt in search], limits[FINEST])
    tasks = [prompt.task for prompt in heldout]
    share = provable(tasks, law, spread)
    tried = candidates(points, space, limits, shares(share, attempts), share)
    if not over and direct.skips:
        itself = Candidate(direct, direct.setting, direct.share(limits), direct.relative_time)
        tried = sorted([itself, *tried], key=lambda candidate: candidate.share or 0.0)
    result = validate(
        tried, (), heldout, evaluate, space.statistics, law, None, space.relative_time
    )
    refused = None
    if over:
        refused = "; ".join(
            f"{LOSSES[name].title} {LOSSES[name].text(direct.losses[name])} on the search prompts, above "
            f"the budget of {limits[name]:g} {LOSSES[name].unit}"
            for name in over
        )
    else:
        found = [a for a in result.attempts if a.setting == direct.setting]
        refused = found[0].reason if found else _behind(result)
    return Projection(direct, refused, result)


def _behind(result: Validation) -> str:
    """Why a setting that was not tried is not believed: a safer one failed, or foretold that it would."""
    last = result.attempts[-1]
    return f"a safer setting failed before it: {last.reason}" if last.reason else str(result.ended)


def describe(setting: Setting) -> dict[str, Any]:
    """A one-number setting as the engine takes it."""
    dense = [i for i, values in enumerate(zip(*setting.values(), strict=True)) if not any(values)]
    return {"scale_factor": {p: max(f) for p, f in setting.items()}, "dense_layers": dense}


def _dense_layers(winner: Setting, engine: Engine) -> set[int]:
    if engine.form == "scalar":
        return set()
    return set(describe(winner)["dense_layers"])


def _nearest(winner: Setting, phase: Phase, dense: set[int], space: Space) -> float:
    """The largest single number whose predicted loss is at most the winner's [tokens]; 0: dense."""
    if not any(winner[phase]):
        return 0.0
    allowed = space.predicted_loss({phase: winner[phase]})[phase]
    log2_factors = grid(math.log2(space.target.largest_scale_factor(phase)), _PER_OCTAVE)
    for log2_factor in reversed(log2_factors):
        factors = space.one_number({phase: 2.0**log2_factor}, dense)
        if space.predicted_loss(factors)[phase] <= allowed:
            return float(f"{2.0**log2_factor:.5g}")
    return float(f"{2.0 ** log2_factors[0]:.5g}")


def _expressible(
    known: Sequence[Point], engine: Engine, winner: Setting, limits: Mapping[str, float]
) -> list[Setting]:
    """Settings of trials that the engine can express and that were within the budget, fastest first."""
    found: list[Setting] = []
    skipping = [phase for phase in winner if any(winner[phase])]
    for point in sorted(known, key=lambda p: p.relative_time):
        setting = {phase: point.setting[phase] for phase in skipping}
        zeros = [{i for i, f in enumerate(factors) if f == 0} for factors in setting.values()]
        single = all(len(set(factors) - {0.0}) == 1 for factors in setting.values())
        same = all(zero == zeros[0] for zero in zeros) and (
            engine.form == "scalar+ignore" or not zeros[0]
        )
        # A phase that the winner leaves dense stays dense.
        whole = {phase: setting.get(phase, factors) for phase, factors in winner.items()}
        if single and same and point.share(limits) <= 1.0 and whole not in found:
            found.append(whole)
    return found
