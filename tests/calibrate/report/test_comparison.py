"""Two runs side by side."""

from __future__ import annotations

from pathlib import Path

import yaml
from report_files import Page, chosen_of, loss_text

import calibrate


def test_two_runs_side_by_side(copy: Path, smoke_run: Path, run: calibrate.Run) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["seed"] = 7
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    target = calibrate.open_run(smoke_run).report(copy, copy / "both.html")
    page = Page(target.read_text())
    assert len(page.data["runs"]) == 2
    assert {"fronts", "layers-prefill", "layers-decode", "tasks-kl"} == set(page.data["figures"])
    numbers = {row[0]: row[1:] for row in page.tables[0]}
    kl = loss_text(chosen_of(run.validation)["kl"]["mean"])
    assert numbers["KL [nats/token]"] == [kl, kl]
    assert page.table("key") == [["seed", "0", "7"]]
