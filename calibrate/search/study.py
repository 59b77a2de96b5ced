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
from pathlib import Path
from urllib.parse import quote

import optuna
from optuna.trial import TrialState
from scipy.stats import qmc

from calibrate.errors import UserError
from calibrate.loss.measure import Outcome, sparsity
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.record.interrupts import AtOnce, held_back
from calibrate.schema import RunConfig
from calibrate.search.points import Point, _point, _setting
from calibrate.search.space import Params, Space
from skip_softmax.thresholds.types import PHASES

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
