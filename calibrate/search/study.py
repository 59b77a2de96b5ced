"""Optuna over the search space: the largest share of any budget against predicted attention time.

The study is Optuna's own, so `optuna-dashboard` and `optuna.visualization` read it. Every trial
draws from a sampler seeded by how many trials have finished: an interrupted search continues as if
it had never been interrupted.

The search refines the analytic warm starts, and stops by itself when the sampler gains too little:
`search.min_gain`. The mark of that is an attribute of the study, so that all workers see it.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from calibrate.errors import UserError
from calibrate.loss.losses import FINEST, LOSSES, largest_share
from calibrate.loss.measure import Outcome, by_loss, sparsity
from calibrate.model.section import Setting
from calibrate.prompts.build import Prompt
from calibrate.record.interrupts import AtOnce, held_back
from calibrate.schema import SearchConfig
from calibrate.search.owner import differences
from calibrate.search.points import BOLDEST, MIDDLE, SAFEST, Point
from calibrate.search.space import ALONE, Params, Space
from skip_softmax.thresholds.types import PHASES

Evaluate = Callable[[Setting, Prompt], Outcome]

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_METRICS = ["largest share of a budget", "predicted attention time"]
_METRIC_BEFORE = "loss [nats/token]"  # of studies that earlier versions made: the KL
# After the first warm starts, later ones target these shares of the budget, using the losses measured so
# far, so that the proof's path has measured points near it. A second try corrects the first. Then each
# phase skips alone, in case the other one is not worth its loss.
_BOTH = ("analytic", "uniform")
_AIMS = (
    *((name, share) for share in (MIDDLE, SAFEST, BOLDEST, MIDDLE) for name in _BOTH),
    *((f"{phase}{ALONE}", BOLDEST) for phase in PHASES),
    *((name, BOLDEST) for name in _BOTH),
)
_SAMPLED = 4  # one trial in so many, at least, is the sampler's
_PATIENCE = 6  # trials of the sampler, one after the other, that together gained too little
_STOPPED = "stopped"  # the mark of a stopped search
_OWNER = "belongs_to"  # whose trials a study holds, of `owner_of`
_SEARCHED = ("loss_model.json", "validation.json")  # written after the search
_SQLITE = "sqlite:///study.db"  # the kind of database; `_in_file` says which file
_HEARTBEAT = 60  # seconds; a worker that stays silent for two of them has died


@dataclass(frozen=True)
class Stopped:
    """A search that ended before its last trial.

    Attributes:
        after: trials that had finished.
        last: so many of them, the last ones, gained too little.
        gained: by how much they lowered the predicted time of the fastest trial [of the dense time], the
            most within any of the shares of the budget that warm starts aim at.
        min_gain: what they should have gained; see `SearchConfig`.
        limit: `SearchConfig.trials` at that time. A higher one takes the search up again.
    """

    after: int
    last: int
    gained: float
    min_gain: float
    limit: int

    @property
    def text(self) -> str:
        """The reason in words."""
        return (
            f"stopped after {self.after} of at most {self.limit} trials: the last {self.last} made the "
            f"predicted time {self.gained:.2g} of the dense one shorter, less than {self.min_gain:g}"
        )


@held_back()
def open_study(
    config: SearchConfig, folder: Path, owner: dict[str, Any] | None = None
) -> optuna.Study:
    """Creates or reopens the study.

    Args:
        config: storage and name of the study.
        folder: the run folder; holds `study.db` unless `storage` is set.
        owner: whose it is, or becomes, of `owner_of`; None: nobody asks.

    Raises:
        UserError: the storage URL cannot be used, or the study there is another run's.
    """
    # Otherwise Optuna would answer Ctrl-C with a warning about the trial, and a traceback.
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    file = folder / "study.db"
    try:
        storage = (
            optuna.storages.RDBStorage(config.storage, heartbeat_interval=_HEARTBEAT)
            if config.storage is not None
            else optuna.storages.RDBStorage(_SQLITE, engine_kwargs=_in_file(file))
        )
        study = optuna.create_study(
            study_name=config.study_name,
            storage=storage,
            load_if_exists=True,
            directions=["minimize", "minimize"],
        )
    except Exception as error:  # SQLAlchemy's errors, whose classes depend on the database driver
        reason = str(error).splitlines()[0]
        raise UserError(
            f"search.storage: `{_place(config, folder)}` cannot be used by Optuna: {reason}; "
            + (
                "make the folder writable, or use another output folder"
                if config.storage is None
                else "give the URL of a database that can be written, for example sqlite:////FOLDER/study.db"
            )
        ) from error
    _require_two_objectives(study, config, folder)
    if owner is not None:
        _claim(study, config, folder, owner)
    if study.metric_names is None:
        study.set_metric_names(_METRICS)
    return study


def _require_two_objectives(study: optuna.Study, config: SearchConfig, folder: Path) -> None:
    minimise = optuna.study.StudyDirection.MINIMIZE
    if study.directions != [minimise, minimise]:
        goals = ", ".join(direction.name.lower() for direction in study.directions)
        raise UserError(
            f"{_study(config, folder)} must have two objectives to minimise, but another program made it "
            f"with: {goals}; {_own(config)}"
        )


def _claim(study: optuna.Study, config: SearchConfig, folder: Path, owner: dict[str, Any]) -> None:
    """Makes the study this run's, or refuses that of another run: its trials would be taken for ours."""
    shared, trials = config.storage is not None, study.get_trials(deepcopy=False)
    _require_ours(study, config, folder, owner)
    mark, searched = study.user_attrs.get(_OWNER), any((folder / f).exists() for f in _SEARCHED)
    if shared and trials and mark is None and not searched:
        raise UserError(
            f"{_study(config, folder)} must say whose its trials are, but an earlier version or another "
            f"program made them; {_own(config)}"
        )
    known = {part: value for part, value in owner.items() if value is not None}
    if mark != {**(mark or {}), **known}:
        study.set_user_attr(_OWNER, {**(mark or {}), **known})


def _require_ours(
    study: optuna.Study, config: SearchConfig, folder: Path, owner: Mapping[str, Any]
) -> None:
    different = differences(study.user_attrs.get(_OWNER, {}), owner)
    # A study in its own run folder belongs to whom the folder belongs to.
    if different and config.storage is not None:
        raise UserError(
            f"{_study(config, folder)} belongs to another run (different: {', '.join(different)}); "
            f"{_own(config)}"
        )


def _study(config: SearchConfig, folder: Path) -> str:
    return f"search.storage: the study `{config.study_name}` in `{_place(config, folder)}`"


def _place(config: SearchConfig, folder: Path) -> str:
    """For messages, which may be copied into a report: without the password of a database."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", config.storage or str(folder / "study.db"))


def _own(config: SearchConfig) -> str:
    """The cure where a study is not this run's."""
    if config.storage is None:
        return "delete the file, or use another output folder"
    return (
        "give this run a study of its own with `search.study_name`, and a folder of its own if this one "
        "has searched before"
    )


def _in_file(file: Path, options: str = "") -> dict[str, Any]:
    """What makes SQLAlchemy open this file: a plain URL would mangle a name that contains ?, % or #."""
    uri = f"file:{quote(str(file.resolve()))}?{options}"
    return {"creator": lambda: sqlite3.connect(uri, uri=True, check_same_thread=False)}


@held_back()
def read_study(
    config: SearchConfig, folder: Path, owner: dict[str, Any] | None = None
) -> optuna.Study:
    """A copy of the study in memory, to look at; arguments and errors of `open_study`."""
    file = folder / "study.db"
    if config.storage is None and not os.access(file, os.W_OK):
        # Nothing is written, so nothing has to be locked.
        storage = optuna.storages.RDBStorage(
            _SQLITE, engine_kwargs=_in_file(file, "mode=ro&immutable=1"), skip_table_creation=True
        )
        study = optuna.load_study(study_name=config.study_name, storage=storage)
    else:
        study = open_study(config, folder)
    if owner is not None:
        _require_ours(study, config, folder, owner)
    copy = optuna.create_study(study_name=study.study_name, directions=study.directions)
    copy.set_metric_names(study.metric_names or _METRICS)
    copy.add_trials(study.get_trials(deepcopy=False))
    for key, value in study.user_attrs.items():
        copy.set_user_attr(key, value)
    return copy


def stopped(study: optuna.Study, trials: int) -> Stopped | None:
    """Whether and why the search stopped by itself.

    Args:
        study: from `open_study` or `read_study`.
        trials: `SearchConfig.trials` of today.

    Returns:
        None if it did not stop, or has been given more trials since.
    """
    mark = study.user_attrs.get(_STOPPED)
    return Stopped(**mark) if mark is not None and mark["limit"] >= trials else None


@held_back()
def points(study: optuna.Study) -> list[Point]:
    """All completed trials, in the order they were made."""
    return [
        _point(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


@held_back()
def least_pruned(study: optuna.Study, limits: Mapping[str, float]) -> float | None:
    """The least share of a budget that a pruned trial would have spent; None: none was pruned."""
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    whole = limits[FINEST] if _values_are_kl(study) else 1.0
    return min((_pruned_at(trial) / whole for trial in pruned), default=None)


def losses_of(trial: FrozenTrial) -> dict[str, float]:
    """A completed trial's losses, mean over the search prompts; its KL only if an earlier version made it."""
    measured = trial.user_attrs.get("losses")
    if measured is None:
        return {FINEST: trial.values[0]}
    return {name: sum(values) / len(values) for name, values in measured.items()}


@held_back()
def prompt_losses(study: optuna.Study) -> list[list[float]]:
    """`FINEST` of each search prompt, for each completed trial that noted it [nats/token]."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    measured = (trial.user_attrs.get("losses") for trial in complete)
    return [losses[FINEST] for losses in measured if losses is not None]


def search(
    study: optuna.Study,
    space: Space,
    prompts: Sequence[Prompt],
    evaluate: Evaluate,
    config: SearchConfig,
    *,
    limits: Mapping[str, float],
    seed: int,
) -> Iterator[Point | None]:
    """Runs the trials that are still missing, until there are `config.trials` or the search stops by itself.

    It stops when no warm start is left and the last `_PATIENCE` trials, all of them the sampler's, made the
    fastest trial within none of `SAFEST`, `MIDDLE` and `BOLDEST` of the budget faster by `config.min_gain`
    in all. Before any trial is within the budget it does not.

    Args:
        study: from `open_study`.
        space: the search space with its warm starts.
        prompts: search prompts; a trial sees them in this order.
        evaluate: runs one prompt with a setting.
        config: trials, sampler, pruning.
        limits: the budgets.
        seed: of the samplers.

    Yields:
        Each finished trial's point, or None for a pruned one.
    """
    shared = config.storage is not None
    seeds = space.seeds()
    bounds = space.bounds()
    known = [(name, share) for name, share in _AIMS if name in space.lines]
    aims = known[: max(config.trials - len(seeds) - config.trials // _SAMPLED, 0)]
    # The value of a trial is its largest loss / scale; `whole` is the value that spends the budget. Values
    # of one study must compare, so a study that began with the KL itself keeps it.
    scales, whole = limits, 1.0
    if _values_are_kl(study):
        scales, whole = {FINEST: 1.0}, limits[FINEST]
    nats = limits[FINEST] / whole

    def objective(trial: optuna.Trial, at_once: AtOnce) -> tuple[float, float]:
        params = {key: trial.suggest_float(key, low, high) for key, (low, high) in bounds.items()}
        setting = space.setting(params)
        trial.set_user_attr("setting", {phase: list(factors) for phase, factors in setting.items()})
        outcomes: list[Outcome] = []
        for prompt in prompts:
            with at_once():
                outcomes.append(evaluate(setting, prompt))
            value = largest_share(_at_least(outcomes, len(prompts)), scales)
            if value > config.prune_factor * whole:
                trial.set_user_attr("at_least", value)
                trial.set_constraint("budget", value - whole)
                raise optuna.TrialPruned
        trial.set_constraint("budget", value - whole)
        trial.set_user_attr("losses", by_loss(outcomes))
        trial.set_user_attr("sparsity", {phase: sparsity(outcomes, phase) for phase in PHASES})
        return value, space.relative_time(setting)

    def one_more(finished: int, at_once: AtOnce) -> Point | None:
        # A fresh sampler per trial: its state is a function of seed and history, so a resumed
        # search goes the same way. With several workers, running trials count too, or all of them
        # would draw the same point.
        study.sampler = _sampler(
            config, seed, len(study.get_trials(deepcopy=False)) if shared else finished
        )
        start: tuple[str, Params] | None = None
        if finished < len(seeds):
            start = seeds[finished]
        elif finished - len(seeds) < len(aims):
            name, share = aims[finished - len(seeds)]
            start = _aimed(study, space, bounds, name, share * limits[FINEST], nats)
        if start is not None:
            name, params = start
            study.enqueue_trial(
                _inside(params, bounds), user_attrs={"name": name}, skip_if_exists=shared
            )
        elif config.sampler == "qmc":
            study.enqueue_trial(_sobol(bounds, finished - len(seeds), seed))
        study.optimize(lambda trial: objective(trial, at_once), n_trials=1)
        last = study.get_trials(deepcopy=False)[-1]
        return _point(last) if last.state == TrialState.COMPLETE else None

    @held_back()
    def enough() -> bool:
        if stopped(study, config.trials) is not None:
            return True  # perhaps another worker's mark
        trials = study.get_trials(deepcopy=False, states=_FINISHED)
        found = _stop(trials, len(seeds) + len(aims), whole, config, study.user_attrs.get(_STOPPED))
        if found is not None:
            study.set_user_attr(_STOPPED, asdict(found))
        return found is not None

    with held_back():
        _drop_unfinished(study, shared=shared)
        finished = _finished(study)
    while finished < config.trials and not enough():
        # Only the model's work can be interrupted; each database update is atomic.
        with held_back() as at_once:
            point = one_more(finished, at_once)
            finished = _finished(study)
            enough()  # so that who is told of the point can say that it was the last
        yield point


def _stop(
    trials: Sequence[FrozenTrial],
    warm: int,
    whole: float,
    config: SearchConfig,
    before: Mapping[str, Any] | None,
) -> Stopped | None:
    """The mark, if the sampler's last trials gained too little.

    Args:
        trials: that have finished, in the order they were begun.
        warm: how many warm starts there are.
        whole: the value of a trial that spends the budget.
        config: what they should gain, and how many trials there may be.
        before: an earlier mark, after which the search has been taken up again.
    """
    if config.min_gain == 0:
        return None
    last = trials[-_PATIENCE:]
    begun = max(warm, before["after"] if before is not None else 0)
    if len(trials) < begun + _PATIENCE or any("name" in trial.user_attrs for trial in last):
        return None

    def fastest(trials: Sequence[FrozenTrial], share: float) -> float:
        within = (t.values[1] for t in trials if t.values and t.values[0] <= share * whole)
        return min(within, default=math.inf)

    if fastest(trials, BOLDEST) == math.inf:
        return None
    pairs = [
        (fastest(trials[:-_PATIENCE], share), fastest(trials, share))
        for share in (SAFEST, MIDDLE, BOLDEST)
    ]
    gained = max(earlier - now for earlier, now in pairs if now < math.inf)
    if gained >= config.min_gain:
        return None
    return Stopped(len(trials), _PATIENCE, gained, config.min_gain, config.trials)


def _aimed(
    study: optuna.Study,
    space: Space,
    bounds: dict[str, tuple[float, float]],
    name: str,
    loss: float,
    nats: float,
) -> tuple[str, Params] | None:
    """A warm start that should come to a loss [nats/token]; None if there is none that was not tried.

    What a trial spent of its tightest budget counts as the KL that spends as much: its value times
    `nats`.
    """
    tried = [
        (_setting(trial), nats * (trial.values[0] if trial.values else _pruned_at(trial)))
        for trial in study.get_trials(deepcopy=False, states=_FINISHED)
        if trial.user_attrs.get("name") == space.lines[name]
    ]
    params = space.aimed(name, loss, tried)
    if params is None or space.setting(_inside(params, bounds)) in [s for s, _ in tried]:
        return None
    return name, params


def _at_least(outcomes: Sequence[Outcome], prompts: int) -> dict[str, float]:
    """The smallest mean over all prompts that each loss can still come to."""
    # A missing prompt may not show a loss, but no mean falls below that in which all of them show the least.
    missing = prompts - len(outcomes)
    return {
        name: (sum(values) + missing * LOSSES[name].least) / (len(values) + missing)
        for name, values in by_loss(outcomes).items()
    }


def _values_are_kl(study: optuna.Study) -> bool:
    return study.metric_names is not None and study.metric_names[0] == _METRIC_BEFORE


def _pruned_at(trial: FrozenTrial) -> float:
    """The least value that a pruned trial would have had; earlier versions had another name for it."""
    return float(trial.user_attrs.get("at_least", trial.user_attrs.get("kl_at_least")))


def _setting(trial: FrozenTrial) -> Setting:
    return {phase: tuple(factors) for phase, factors in trial.user_attrs["setting"].items()}


def _point(trial: FrozenTrial) -> Point:
    return Point(
        name=trial.user_attrs.get("name", "search"),
        setting=_setting(trial),
        losses=losses_of(trial),
        relative_time=trial.values[1],
        sparsity=trial.user_attrs["sparsity"],
    )


def _sampler(config: SearchConfig, seed: int, finished: int) -> optuna.samplers.BaseSampler:
    seed = (seed * 100_003 + finished) % 2**32  # what numpy takes
    startup = min(10, max(1, config.trials // 4))
    match config.sampler:
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
    """A point of a low-discrepancy sequence; Optuna's own counts trials that never finished."""
    engine = qmc.Sobol(len(bounds), rng=seed)
    if index:  # scipy cannot skip nothing
        engine.fast_forward(index)
    drawn = engine.random(1)[0].tolist()
    return {
        key: low + share * (high - low)
        for (key, (low, high)), share in zip(bounds.items(), drawn, strict=True)
    }


def _drop_unfinished(study: optuna.Study, *, shared: bool) -> None:
    """Fails the trials that a killed process left running or waiting; their points are drawn again."""
    if shared:
        # Other workers may be alive; only those without a heartbeat are dead.
        optuna.storages.fail_stale_trials(study)
        return
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        # Optuna can be told only of running trials; `ask` starts the waiting one.
        study.tell(study.ask(), state=TrialState.FAIL)


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=_FINISHED))


def _inside(params: dict[str, float], bounds: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {key: min(max(value, bounds[key][0]), bounds[key][1]) for key, value in params.items()}
