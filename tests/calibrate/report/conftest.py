"""The smoke run's report, a copy of the run to damage, and the report of a large one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from report_files import PHASES, Page, disown, read

import calibrate
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import BINS, NEVER


@pytest.fixture(scope="session")
def run(smoke_run: Path) -> calibrate.Run:
    return calibrate.open_run(smoke_run)


@pytest.fixture(scope="session")
def page(smoke_run: Path) -> Page:
    return Page((smoke_run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def found(page: Page) -> dict[str, Any]:
    return dict(page.data["runs"][0])


@pytest.fixture
def copy(smoke_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smoke_run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def large(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a made-up run of 64 layers, 64 heads and 4 lengths."""
    folder = Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("large") / "large"))
    layers, heads, lengths = 64, 64, [4096, 8192, 16384, 32768]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["prompts"]["lengths"] = lengths
    config["target"]["min_kv_len"] = {"prefill": 4096, "decode": 4096}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    disown(folder)
    statistics = Statistics.empty({}, layers, heads, heads, lengths)
    generator = torch.Generator().manual_seed(0)
    for phase in PHASES:
        centre = torch.rand(layers, heads, 1, 1, generator=generator) * 120 + 60
        bell = 1e4 * torch.exp(-(((torch.arange(BINS) - centre) / 30) ** 2))
        statistics.counts[phase] = bell.long().expand(layers, heads, 4, BINS).contiguous()
        statistics.counts[phase][..., NEVER] += 50_000
        statistics.mass[phase] = statistics.counts[phase].double() * 1e-4
        for values in (statistics.rows, statistics.kv_tokens, statistics.calls):
            values[phase] += 10**6
    statistics.save(folder / "stats.safetensors")
    factors = (20 * torch.exp(3 * torch.rand(layers, generator=generator))).tolist()
    validation = read(folder, "validation.json")
    for attempt in [*validation["attempts"], validation["baseline"]]:
        attempt["setting"] = dict.fromkeys(PHASES, factors)
        by_length = {str(length): {"target": 0.4, "achieved": 0.39} for length in lengths}
        attempt["by_length"] = dict.fromkeys(PHASES, by_length)
    (folder / "validation.json").write_text(json.dumps(validation))
    return calibrate.open_run(folder).report()
