"""Optuna over the search space: measured loss against predicted attention time.

The study is Optuna's own, so `optuna-dashboard` and `optuna.visualization` read it. Every trial
draws from a sampler seeded by how many trials have finished: an interrupted search continues as if
it had not been.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from calibrate.errors import UserError, WorkFailed
from calibrate.interrupts import AtOnce, held_back
from calibrate.measure import Outcome, Setting, sparsity
from calibrate.prompts import Prompt
from calibrate.schema import RunConfig
from calibrate.space import Params, Space
from skip_softmax.thresholds import PHASES, Phase

Evaluate = Callable[[Setting, Prompt], Outcome]

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_METRICS = ["loss [nats/token]", "predicted attention time"]
# Warm starts after the first: by what those measured, they aim at these shares of the budget. 0.7 is what
# validation asks for first; the second time corrects the first.
_AIMS = (
    ("analytic", 0.7),
    ("uniform", 0.7),
    ("analytic", 0.35),
    ("analytic", 0.7),
    ("uniform", 0.7),
)
_HEARTBEAT = 60  # seconds; a worker that stays silent for two of them has died


@dataclass(frozen=True)
class Point:
    """A finished trial.

    Attributes:
        name: `analytic`, `uniform` (warm starts) or `search`.
        setting: scale factors per phase and layer.
        kl: mean over the search prompts [nats/token].
        relative_time: predicted attention time relative to dense.
        sparsity: achieved on the search prompts, per phase.
    """

    name: str
    setting: Setting
    kl: float
    relative_time: float
    sparsity: dict[Phase, float]


@held_back()
def open_study(config: RunConfig, folder: Path) -> optuna.Study:
    """Creates or reopens the study.

    Args:
        config: the run config.
        folder: the run folder; holds `study.db` unless `search.storage` is set.

    Raises:
        UserError: the storage URL cannot be used.
    """
    # On Ctrl-C it would warn of the trial that ends, with a traceback.
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    shared = config.search.storage is not None
    url = config.search.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
    try:
        storage = optuna.storages.RDBStorage(url, heartbeat_interval=_HEARTBEAT if shared else None)
        study = optuna.create_study(
            study_name=config.search.study_name,
            storage=storage,
            load_if_exists=True,
            directions=["minimize", "minimize"],
        )
    except Exception as error:  # SQLAlchemy's errors, whose classes depend on the database driver
        reason = str(error).splitlines()[0]
        raise UserError(f"search.storage: `{url}` cannot be used by Optuna: {reason}") from error
    study.set_metric_names(_METRICS)
    return study


@held_back()
def read_study(config: RunConfig, folder: Path) -> optuna.Study:
    """A copy of the study in memory, for those who only look; arguments and errors of `open_study`."""
    file = folder / "study.db"
    if config.search.storage is None and not os.access(file, os.W_OK):
        # Nothing is written, so nothing has to be locked.
        url = f"sqlite:///file:{quote(str(file.resolve()))}?mode=ro&immutable=1&uri=true"
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        study = optuna.load_study(study_name=config.search.study_name, storage=storage)
    else:
        study = open_study(config, folder)
    copy = optuna.create_study(study_name=study.study_name, directions=study.directions)
    copy.set_metric_names(_METRICS)
    copy.add_trials(study.get_trials(deepcopy=False))
    return copy


def search(
    study: optuna.Study,
    space: Space,
    config: RunConfig,
    prompts: Sequence[Prompt],
    evaluate: Evaluate,
) -> Iterator[Point | None]:
    """Runs the trials that are still missing.

    Args:
        study: from `open_study`.
        space: the search space with its warm starts.
        config: trials, sampler, seed, pruning.
        prompts: search prompts; a trial sees them in this order.
        evaluate: runs one prompt with a setting.

    Yields:
        Each finished trial's point, or None for a pruned one.
    """
    shared = config.search.storage is not None
    seeds = space.seeds()
    bounds = space.bounds()
    # At least as many trials are left to the sampler.
    most = max(config.search.trials - len(seeds), 0) // 2
    aims = [(name, share * config.budget.kl) for name, share in _AIMS[:most]]

    def objective(trial: optuna.Trial, at_once: AtOnce) -> tuple[float, float]:
        params = {key: trial.suggest_float(key, low, high) for key, (low, high) in bounds.items()}
        setting = space.setting(params)
        trial.set_user_attr("setting", {phase: list(factors) for phase, factors in setting.items()})
        outcomes: list[Outcome] = []
        for prompt in prompts:
            with at_once():
                outcomes.append(evaluate(setting, prompt))
            so_far = sum(outcome.kl for outcome in outcomes) / len(prompts)
            if so_far > config.search.prune_factor * config.budget.kl:
                trial.set_user_attr("kl_at_least", so_far)
                trial.set_constraint("budget", so_far - config.budget.kl)
                raise optuna.TrialPruned
        trial.set_constraint("budget", so_far - config.budget.kl)
        trial.set_user_attr("kl", [outcome.kl for outcome in outcomes])
        trial.set_user_attr("sparsity", {phase: sparsity(outcomes, phase) for phase in PHASES})
        return so_far, space.relative_time(setting)

    def one_more(finished: int, at_once: AtOnce) -> Point | None:
        # A fresh sampler per trial: its state is a function of seed and history, so a resumed
        # search goes the same way.
        # Workers of one study must not all draw the same point: there the trials that run count too.
        study.sampler = _sampler(
            config, len(study.get_trials(deepcopy=False)) if shared else finished
        )
        start: tuple[str, Params] | None = None
        if finished < len(seeds):
            start = seeds[finished]
        elif finished - len(seeds) < len(aims):
            start = _aimed(study, space, bounds, *aims[finished - len(seeds)])
        if start is not None:
            name, params = start
            study.enqueue_trial(
                _inside(params, bounds), user_attrs={"name": name}, skip_if_exists=shared
            )
        elif config.search.sampler == "qmc":
            study.enqueue_trial(_sobol(bounds, finished - len(seeds), config.seed))
        study.optimize(lambda trial: objective(trial, at_once), n_trials=1)
        last = study.get_trials(deepcopy=False)[-1]
        return _point(last) if last.state == TrialState.COMPLETE else None

    with held_back():
        _drop_unfinished(study, shared=shared)
        finished = _finished(study)
    while finished < config.search.trials:
        # Only the model's work can be interrupted: what the database is told, it is told whole.
        with held_back() as at_once:
            point = one_more(finished, at_once)
            finished = _finished(study)
        yield point


@held_back()
def points(study: optuna.Study) -> list[Point]:
    """All completed trials, in the order they were made."""
    return [
        _point(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def front(candidates: Sequence[Point]) -> list[Point]:
    """Points that no other point beats in both loss and time, fastest first."""
    best: list[Point] = []
    for point in sorted(candidates, key=lambda p: (p.relative_time, p.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def candidates(all_points: Sequence[Point], config: RunConfig) -> list[Point]:
    """What the validation should try: the fastest points within shrinking shares of the budget.

    The search prompts are few, and the winner was chosen on them, so its loss there is too good:
    the first candidate already keeps a margin.

    Args:
        all_points: completed trials.
        config: budget, phases, number of attempts.

    Returns:
        At most `validation.attempts` points, the fastest first.

    Raises:
        WorkFailed: no point skips anything in every phase within the budget.
    """
    useful = _skipping(all_points, config)
    chosen = _within_shares(useful, config)
    if not chosen:
        least = min((p.kl for p in useful), default=None)
        raise WorkFailed(
            "no trial skips tiles in every phase within the budget: the smallest loss of one that skips is "
            f"{'unknown (none skips)' if least is None else f'{least:.3g} nats/token'}, the budget is "
            f"{config.budget.kl:g}; raise `budget.kl`, or give the search more trials"
        )
    return chosen


def uniform_candidates(all_points: Sequence[Point], config: RunConfig) -> list[Point]:
    """As `candidates`, of the points with one number per phase; empty where none skips within the budget."""
    uniform = [point for point in all_points if point.name == "uniform"]
    return _within_shares(_skipping(uniform, config), config)


def _skipping(all_points: Sequence[Point], config: RunConfig) -> list[Point]:
    return [p for p in all_points if all(p.sparsity[phase] > 0 for phase in config.target.phases)]


def _within_shares(useful: Sequence[Point], config: RunConfig) -> list[Point]:
    """The fastest point within each of shrinking shares of the budget."""
    chosen: list[Point] = []
    for attempt in range(config.validation.attempts):
        share = 0.7 * 0.5**attempt
        within = [p for p in useful if p.kl <= share * config.budget.kl and p not in chosen]
        if within:
            chosen.append(min(within, key=lambda p: (p.relative_time, p.kl)))
    return chosen


def _aimed(
    study: optuna.Study,
    space: Space,
    bounds: dict[str, tuple[float, float]],
    name: str,
    loss: float,
) -> tuple[str, Params] | None:
    """A warm start that aims at a loss [nats/token], or None if there is none that was not tried."""
    tried = [
        # A pruned trial's loss is at least this.
        (_setting(trial), trial.values[0] if trial.values else trial.user_attrs["kl_at_least"])
        for trial in study.get_trials(deepcopy=False, states=_FINISHED)
        if trial.user_attrs.get("name") == name
    ]
    params = space.aimed(name, loss, tried)
    if params is None or space.setting(_inside(params, bounds)) in [s for s, _ in tried]:
        return None
    return name, params


def _sampler(config: RunConfig, finished: int) -> optuna.samplers.BaseSampler:
    seed = (config.seed * 100_003 + finished) % 2**32  # what numpy takes
    startup = min(10, max(1, config.search.trials // 4))
    match config.search.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, n_startup_trials=startup, constant_liar=True
            )
        case "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=startup, deterministic_objective=True
            )
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        case "qmc" | "random":
            return optuna.samplers.RandomSampler(seed=seed)


def _sobol(bounds: dict[str, tuple[float, float]], index: int, seed: int) -> dict[str, float]:
    """Point of one low-discrepancy sequence; Optuna's own counts trials that were never finished."""
    engine = qmc.Sobol(len(bounds), rng=seed)
    if index:  # scipy cannot skip nothing
        engine.fast_forward(index)
    drawn = engine.random(1)[0].tolist()
    return {
        key: low + share * (high - low)
        for (key, (low, high)), share in zip(bounds.items(), drawn, strict=True)
    }


def _drop_unfinished(study: optuna.Study, *, shared: bool) -> None:
    """Trials that a killed process left running or waiting are failed; their points are drawn again."""
    if shared:
        # Other workers may be alive; only those without a heartbeat are dead.
        optuna.storages.fail_stale_trials(study)
        return
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        # Only a running trial can be told; `ask` starts the one that waits.
        study.tell(study.ask(), state=TrialState.FAIL)


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=_FINISHED))


def _inside(params: dict[str, float], bounds: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {key: min(max(value, bounds[key][0]), bounds[key][1]) for key, value in params.items()}


def _setting(trial: FrozenTrial) -> Setting:
    return {phase: tuple(factors) for phase, factors in trial.user_attrs["setting"].items()}


def _point(trial: FrozenTrial) -> Point:
    attributes: dict[str, Any] = trial.user_attrs
    return Point(
        name=attributes.get("name", "search"),
        setting=_setting(trial),
        kl=trial.values[0],
        relative_time=trial.values[1],
        sparsity=attributes["sparsity"],
    )
