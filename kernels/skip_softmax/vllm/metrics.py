"""The tile counters of a server on its page of metrics, as they are when the page is read.

Workers count on their devices, in processes that do not know the API server's page. So each worker answers on
a Unix socket (`answers.py`), and the API server asks all of them whenever its page is read.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from vllm.logger import init_logger

FOLDER = "SKIP_SOFTMAX_WORKERS"
"""Variable that names the folder of the workers' sockets; the processes of a server inherit it."""

PATIENCE = 0.5
"""How long a worker may take to answer [s]; the API server does nothing else meanwhile."""

_log = init_logger("vllm.skip_softmax")
_offered: list[Any] = []


def offer() -> None:
    """Puts the counters on this process's page of metrics; may be called again.

    Called in every process. The first of a server makes the folder; only the API server's page is ever read.
    """
    if _offered:
        return
    # A server that was started from within another one's process is not part of it.
    if FOLDER not in os.environ or multiprocessing.parent_process() is None:
        folder = tempfile.mkdtemp(prefix="skip-softmax-")  # of this user alone
        os.environ[FOLDER] = folder
        atexit.register(_forget, folder, os.getpid())
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        # Then vLLM builds its page from files of plain counters, and asks no collector.
        _log.warning(
            "skip-softmax: tile counters are on the page of metrics only where one API server writes it; use "
            "--api-server-count 1, and unset PROMETHEUS_MULTIPROC_DIR"
        )
    _offered.append(_Collector())
    REGISTRY.register(_offered[0])


def _forget(folder: str, owner: int) -> None:
    # A forked process inherits this, and must leave the folder to its owner.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class _Collector:
    """Asks the workers when the page is read."""

    def describe(self) -> list[Metric]:
        """Nothing: else the workers would be asked already when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families on the page; none where no worker of ours runs."""
        answers, silent = _ask(Path(os.environ[FOLDER]))
        if not answers and not silent:
            return
        workers = GaugeMetricFamily(
            "skip_softmax_workers", "Workers whose tiles are counted, or missing.", labels=["state"]
        )
        workers.add_metric(["answering"], len(answers))
        workers.add_metric(["silent"], silent)
        yield workers
        # Layers are on several workers, or each worker has heads of all layers.
        armed = {index for told in answers for index in told["armed"]}
        infos = {tuple(sorted(told["info"].items())) for told in answers}
        for labels in sorted(infos):
            names = [name for name, _ in labels]
            info = GaugeMetricFamily(
                "skip_softmax_info",
                "The thresholds file that is served.",
                labels=[*names, "armed_layers"],
            )
            info.add_metric([value for _, value in labels] + [str(len(armed))], 1)
            yield info
        sums: dict[tuple[str, str], list[int]] = {}
        for told in answers:
            for phase, groups in told["tiles"].items():
                for group, row in groups.items():
                    total = sums.setdefault((phase, group), [0, 0])
                    total[0] += row[0]
                    total[1] += row[1]
        for column, (name, what) in enumerate(
            (("visited", "KV tiles that attention visited."), ("skipped", "Those that it skipped."))
        ):
            family = CounterMetricFamily(
                f"skip_softmax_{name}_tiles", what, labels=["phase", "layers"]
            )
            for (phase, group), row in sums.items():
                family.add_metric([phase, group], row[column])
            yield family


def _ask(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Answers of the workers in a folder, and how many did not answer."""
    answers, silent = [], 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(str(path))
                parts = list(iter(lambda: connection.recv(65536), b""))
            answers.append(json.loads(b"".join(parts)))
        except (OSError, ValueError):
            silent += 1
    return answers, silent
