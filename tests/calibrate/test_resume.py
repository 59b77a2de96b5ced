"""A run that is stopped at any point goes on there, and ends as if nothing had happened.

Runs are processes of their own, so that signals are real. They are forked from a server that has
imported everything, which saves seconds each. Every model pass is noted in a work log: what a run had
finished when it was stopped must not be in the log of the same command's next process.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT
from sqlalchemy.engine.default import DefaultDialect

from calibrate.loss.measure import Outcome, compare
from calibrate.prompts.build import Prompt
from calibrate.record.provenance import digest
from calibrate.schema import RunConfig
from calibrate.search.study import open_study, search
from calibrate.statistics.capture import observe
from calibrate.statistics.counts import Statistics

pytestmark = pytest.mark.slow
SMOKE = ROOT / "configs" / "smoke.yaml"
CALIBRATION, TRIALS, HELDOUT = 6, 9, 24
RESULTS = ("thresholds.yaml", "validation.json", "fit.json", "sensitivity.json")
PATIENCE = 120.0  # seconds; longer than any of these runs takes on a busy machine


# A run in a process of its own.


def _child(arguments: list[str], output: str, work_log: str) -> None:
    """The console command, with its output in a file and every model pass in the work log."""
    import torch

    import calibrate.pipeline
    import calibrate.statistics.capture
    from calibrate.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def note(*what: str) -> None:
        with open(work_log, "a", encoding="utf-8") as log:
            log.write(json.dumps(what) + "\n")

    def noted_observe(loaded: Any, prompt: Any, *rest: Any) -> Any:
        # Search prompts are counted too, by the validation.
        note("capture" if prompt.split == "calibration" else "count", prompt.key)
        return observe(loaded, prompt, *rest)

    def noted_compare(loaded: Any, thresholds: Any, prompt: Any, dense: Any) -> Any:
        setting = {
            phase: [getattr(layer, phase) for layer in thresholds.layers]
            for phase in ("prefill", "decode")
        }
        note(prompt.split, f"{digest(setting)}:{prompt.key}")
        return compare(loaded, thresholds, prompt, dense)

    calibrate.statistics.capture.observe = noted_observe
    calibrate.pipeline.compare = noted_compare
    sys.argv = ["calibrate", *arguments]
    main()


@dataclass
class Process:
    """A started run and what it wrote so far."""

    folder: Path
    process: Any
    output: Path
    work_log: Path

    def wait(self) -> int:
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "the run hangs"
        return int(self.process.exitcode)

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def work(self, kind: str) -> list[str]:
        lines = self.work_log.read_text().splitlines() if self.work_log.exists() else []
        return [key for what, key in map(json.loads, lines) if what == kind]


PRELOADED = [
    "calibrate.cli",
    "calibrate.pipeline",
    "calibrate.report.page",
    "datasets",
    "optuna.storages._rdb.alembic",
    "optuna.visualization",
    "plotly.io",
    "scipy.stats",
    "transformers.models.llama.modeling_llama",
    __name__,
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, Path], Process]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    logs = tmp_path_factory.mktemp("logs")
    started: list[Process] = []

    def call(config: Path, folder: Path) -> Process:
        name = f"{len(started)}"
        arguments = (
            ["run", str(config), "-o", str(folder)],
            str(logs / name),
            str(logs / f"{name}.w"),
        )
        process = context.Process(target=_child, args=arguments)
        process.start()
        started.append(Process(folder, process, logs / name, logs / f"{name}.w"))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        # Read when torch is loaded; sums in another order would end in other last digits.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield call
    for one in started:
        if one.process.is_alive():
            one.process.kill()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, smoke_model: Path) -> Path:
    """A smoke run with more prompts, so that every stage is long enough to be hit."""
    data = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    data["model"]["path"] = str(smoke_model)
    data["prompts"] |= {"calibration": CALIBRATION, "heldout": HELDOUT}
    data["search"] = {"trials": TRIALS}
    path = tmp_path_factory.mktemp("config") / "resume.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def undisturbed(
    start: Callable[[Path, Path], Process], config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Process:
    process = start(config, tmp_path_factory.mktemp("undisturbed") / "run")
    assert process.wait() == 0, process.said
    return process


# What a run folder holds, read without touching it.


def captured(folder: Path) -> list[str]:
    path = folder / "stats.safetensors"
    return list(Statistics.load(path).prompts) if path.exists() else []


def trials(folder: Path) -> list[tuple[Any, ...]]:
    """Finished trials in their order: number, end, and what was drawn and found."""
    path = folder / "study.db"
    if not path.exists():
        return []
    try:
        # Not read-only: what a killed process left half written is rolled back by who reads next.
        with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True)) as connection:
            rows, params, values = (
                connection.execute(query).fetchall()
                for query in (
                    "SELECT trial_id, number, datetime_complete, state FROM trials "
                    "WHERE state IN ('COMPLETE', 'PRUNED') ORDER BY number",
                    "SELECT trial_id, param_name, param_value FROM trial_params ORDER BY 1, 2",
                    "SELECT trial_id, objective, value FROM trial_values ORDER BY 1, 2",
                )
            )
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return []  # they are just being made
    found = defaultdict(list)
    for trial, *pair in (*params, *values):
        found[trial].append(tuple(pair))
    return [(number, end, state, tuple(found[trial])) for trial, number, end, state in rows]


def drawn(folder: Path) -> list[tuple[Any, ...]]:
    """Finished trials without what an interruption may change: numbers and times."""
    return [trial[2:] for trial in trials(folder)]


def heldout(folder: Path) -> list[str]:
    path = folder / "heldout.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [f"{row['setting']}:{row['prompt']}" for row in rows]


def results(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    files = {
        # Somebody may commit while the tests run; that alone changes a file's provenance.
        name: re.sub(rb"commit: \w+", b"", (folder / name).read_bytes())
        for name in RESULTS
    }
    statistics = Statistics.load(folder / "stats.safetensors")
    tables = {
        f"{name}.{phase}": table.tolist()
        for name in ("counts", "mass", "rows", "kv_tokens", "calls")
        for phase, table in getattr(statistics, name).items()
    }
    return {**files, **tables, "prompts": statistics.prompts, "trials": drawn(folder)}


def same_results(folder: Path, undisturbed: Process) -> None:
    ours, theirs = results(folder), results(undisturbed.folder)
    for name in theirs:
        assert ours[name] == theirs[name], f"{name} differs from the undisturbed run's"


# Stopping it.

PROGRESS: dict[str, tuple[Callable[[Path], list[Any]], int]] = {
    "capture": (captured, CALIBRATION),
    "search": (trials, TRIALS),
    "validation": (heldout, HELDOUT),
}


def stop_at(process: Process, stage: str, number: signal.Signals) -> None:
    """Sends a signal at a random moment of a stage: after a random step, within the next."""
    (progress, total), rng = PROGRESS[stage], Random(f"{stage} {number}")
    steps, pause = rng.randrange(1, total // 2), rng.uniform(0.0, 0.03)
    deadline = time.monotonic() + PATIENCE
    while len(progress(process.folder)) < steps:
        assert process.process.is_alive(), f"ended before it could be stopped: {process.said}"
        assert time.monotonic() < deadline, (
            f"never reached {steps} steps of {stage}: {process.said}"
        )
        time.sleep(0.002)
    time.sleep(pause)
    os.kill(process.process.pid, number)
    code = process.wait()
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL), (
        f"stopped after {steps} of {total} steps of {stage}, but ended with {code}: {process.said}"
    )
    assert "Traceback" not in process.said
    assert number == signal.SIGKILL or "interrupted: run the same command again" in process.said


# Every stage is stopped by both signals: in a run that then ends, and in one that is stopped three times.
STOPS = (
    [("capture", signal.SIGINT)],
    [("search", signal.SIGKILL)],
    [("validation", signal.SIGINT)],
    [("capture", signal.SIGKILL), ("search", signal.SIGINT), ("validation", signal.SIGKILL)],
)


@pytest.mark.parametrize(
    "stops", STOPS, ids=lambda stops: "-".join(f"{stage}-{number.name}" for stage, number in stops)
)
def test_a_stopped_run_goes_on_without_repeating_anything_and_ends_the_same(
    start: Callable[[Path, Path], Process],
    config: Path,
    undisturbed: Process,
    tmp_path: Path,
    stops: list[tuple[str, signal.Signals]],
) -> None:
    folder = tmp_path / "run"
    before: dict[str, list[Any]] = {name: [] for name in PROGRESS}
    for stop in [*stops, None]:
        process = start(config, folder)
        if stop is None:
            assert process.wait() == 0, process.said
        else:
            stop_at(process, *stop)
        for stage, work in (("capture", "capture"), ("validation", "heldout")):
            assert not set(process.work(work)) & set(before[stage]), "a prompt was read twice"
        assert trials(folder)[: len(before["search"])] == before["search"], (
            "a finished trial was touched"
        )
        if stop is None:
            assert len(process.work("capture")) == CALIBRATION - len(before["capture"])
        before = {name: progress(folder) for name, (progress, _) in PROGRESS.items()}
        assert stop is None or before[stop[0]], "nothing was finished when the run was stopped"
    assert len(trials(folder)) == TRIALS
    same_results(folder, undisturbed)


def test_an_undisturbed_run_does_everything_once(undisturbed: Process) -> None:
    """What the tests above count means something only if the work log sees all work."""
    folder = undisturbed.folder
    assert undisturbed.work("capture") == captured(folder)
    assert len(captured(folder)) == CALIBRATION
    rows = json.loads((folder / "prompts.json").read_text())["search"]
    counted = Statistics.load(folder / "stats-search.safetensors").prompts
    assert undisturbed.work("count") == counted == [Prompt.from_json(row).key for row in rows]
    assert sorted(undisturbed.work("heldout")) == sorted(heldout(folder))
    assert len(heldout(folder)) >= HELDOUT
    assert len(trials(folder)) == TRIALS <= len(undisturbed.work("search"))


def test_a_second_run_of_a_finished_folder_computes_nothing(
    start: Callable[[Path, Path], Process], config: Path, undisturbed: Process
) -> None:
    names = {"thresholds.yaml", "validation.json", "sensitivity.json", "stats.safetensors"}
    files = [
        undisturbed.folder / name for name in sorted({*names, "heldout.jsonl", "prompts.json"})
    ]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    trials_before, started = trials(undisturbed.folder), time.monotonic()
    second = start(config, undisturbed.folder)
    assert second.wait() == 0, second.said
    assert time.monotonic() - started < 10
    assert not second.work_log.exists()
    assert "load model" not in second.said
    assert trials(undisturbed.folder) == trials_before
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


# The search alone: every sampler, stopped in the middle of a trial, with a stand-in for the model.

BOUNDS = {"x": (0.0, 1.0), "y": (0.0, 1.0)}


class Killed(BaseException):
    """Leaves a trial as SIGKILL does: Optuna knows nothing of it."""


def small_search(
    folder: Path, sampler: str, stop: dict[int, type[BaseException]], seed: int = 0
) -> list[Any]:
    """A search with two prompts; `stop` raises at that evaluation of this call."""
    folder.mkdir(exist_ok=True)
    config = RunConfig.model_validate(
        {
            "model": {"path": "none"},
            "budget": {"kl": 0.3},
            "seed": seed,
            "search": {"trials": 20, "min_gain": 0, "sampler": sampler, "prune_factor": 3.0},
        }
    )
    space = SimpleNamespace(
        seeds=lambda: [("analytic", {"x": 0.5, "y": 0.5}), ("uniform", {"x": 0.1, "y": 0.9})],
        bounds=lambda: BOUNDS,
        setting=lambda p: {"prefill": (p["x"],), "decode": (p["y"],)},
        relative_time=lambda s: 2.0 - s["prefill"][0] - s["decode"][0],
        lines={"analytic": "analytic", "uniform": "uniform"},
        aimed=lambda name, loss, tried: {"x": loss, "y": sum(kl for _, kl in tried)},
    )
    evaluations = iter(range(10_000))

    def evaluate(setting: dict[str, tuple[float]], prompt: float) -> Outcome:
        number = next(evaluations)
        if number in stop:
            raise stop[number]
        kl = prompt * (setting["prefill"][0] ** 2 + setting["decode"][0] ** 3)
        tiles = {"prefill": [4], "decode": [4]}
        return Outcome(str(prompt), "text", 256, {"kl": kl, "score_drop": 0.0}, 0.0, tiles, tiles)

    study = open_study(config.search, folder)
    limits = config.budget.limits
    for _ in search(
        study,
        space,
        [0.8, 1.2],
        evaluate,
        config.search,
        limits=limits,
        seed=seed,  # type: ignore[arg-type, list-item]
    ):
        pass
    return drawn(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a sampler draws when nobody stops it."""
    return functools.cache(
        lambda sampler: small_search(tmp_path_factory.mktemp("whole"), sampler, {})
    )


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("tpe", KeyboardInterrupt),
        ("tpe", Killed),
        ("gp", Killed),
        ("nsga2", Killed),
        ("qmc", Killed),
        ("random", Killed),
    ],
)
def test_every_sampler_draws_the_same_trials_after_an_interruption(
    whole: Callable[[str], list[Any]], tmp_path: Path, sampler: str, kind: type[BaseException]
) -> None:
    expected = whole(sampler)
    assert len(expected) == 20
    assert {state for state, _ in expected} == {"COMPLETE", "PRUNED"}, "some trials must be pruned"
    for stop in (1, 24, 3):  # evaluations of each process: in a warm start, then in drawn trials
        with pytest.raises(kind):
            small_search(tmp_path / "stopped", sampler, {stop: kind})
    assert small_search(tmp_path / "stopped", sampler, {}) == expected


def test_a_search_stopped_between_planning_a_trial_and_starting_it_goes_on(
    whole: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "stopped").mkdir()
    config = RunConfig.model_validate({"model": {"path": "none"}})
    study = open_study(config.search, tmp_path / "stopped")
    study.enqueue_trial({"x": 0.5, "y": 0.5}, user_attrs={"name": "analytic"})
    assert small_search(tmp_path / "stopped", "tpe", {}) == whole("tpe")


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C raises, also where the tests were started in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("moment", ["do_rollback", "do_commit", "do_execute"])
def test_ctrl_c_inside_the_database_says_nothing_and_loses_nothing(
    whole: Callable[[str], list[Any]],
    tmp_path: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    caplog: Any,
) -> None:
    """SQLAlchemy logs a traceback when it is interrupted, or swallows the interruption."""
    expected = whole("tpe")
    untouched = getattr(DefaultDialect, moment)
    for stop in (5, 40, 120):
        calls = iter(range(stop))

        def pressed(*arguments: Any, calls: Iterator[int] = calls) -> Any:
            if next(calls, None) is None:
                monkeypatch.setattr(DefaultDialect, moment, untouched)
                signal.raise_signal(signal.SIGINT)
            return untouched(*arguments)

        monkeypatch.setattr(DefaultDialect, moment, pressed)
        with pytest.raises(KeyboardInterrupt):
            small_search(tmp_path / "stopped", "tpe", {})
        assert getattr(DefaultDialect, moment) is untouched, "never pressed"
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert small_search(tmp_path / "stopped", "tpe", {}) == expected


def test_another_seed_draws_other_trials(whole: Callable[[str], list[Any]], tmp_path: Path) -> None:
    """If it did not, equal trials after an interruption would prove nothing."""
    ours, theirs = whole("tpe"), small_search(tmp_path, "tpe", {}, seed=1)
    assert ours[:9] == theirs[:9], "warm starts do not depend on the seed"
    assert not set(ours[12:]) & set(theirs[12:])
