"""The report's file: what it says of passed, failed and unfinished runs, its size, its safety."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from report_files import Page, disown, read

import calibrate
from calibrate.cli import main
from calibrate.errors import UserError

LIMIT = 6_000_000  # bytes


def test_the_page_of_a_small_and_of_a_large_run_stays_below_the_limit(
    smoke_run: Path, large: Path
) -> None:
    assert (smoke_run / "report.html").stat().st_size < LIMIT
    assert large.stat().st_size < LIMIT


def test_nothing_is_loaded_from_elsewhere(page: Page, smoke_run: Path) -> None:
    html = (smoke_run / "report.html").read_text(encoding="utf-8")
    tags = html.split("<body>")[0] + html.split("</main>")[1].split("<script>")[-1]
    assert "http" not in tags
    assert 'src="' not in tags


def test_what_a_user_wrote_is_escaped(copy: Path) -> None:
    bad = "</script><script>alert(1)</script>&<b>"
    notes = read(copy, "run.json")
    notes["model"]["name"] = bad
    (copy / "run.json").write_text(json.dumps(notes))
    html = calibrate.open_run(copy).report().read_text(encoding="utf-8")
    assert "alert(1)</script>" not in html
    assert "<b>" not in html.split("<main>")[1].split("</main>")[0]
    assert Page(html).data["runs"][0]["name"] == bad


def test_a_failed_run_says_dense(copy: Path) -> None:
    validation = read(copy, "validation.json")
    for attempt in validation["attempts"]:
        attempt |= {"passed": False, "reason": "KL 0.3 above the budget"}
    validation["passed"] = False
    (copy / "validation.json").write_text(json.dumps(validation))
    file = copy / "thresholds.yaml"
    data = yaml.safe_load(file.read_text())
    data["evidence"] |= {"verdict": "failed", "reason": "KL 0.3 above the budget"}
    file.write_text(yaml.safe_dump(data))
    text = " ".join(Page(calibrate.open_run(copy).report().read_text()).text.split())
    assert "Failed: KL 0.3 above the budget. The last candidate skips" in text
    assert "The thresholds file has skipping disabled." in text


@pytest.mark.parametrize("stopped_at", ["search", "validation"])
def test_an_unfinished_run_shows_what_it_has(copy: Path, stopped_at: str) -> None:
    notes = read(copy, "run.json")
    for stage in ("search", "validation")[("search", "validation").index(stopped_at) :]:
        del notes["seconds"][stage]
    (copy / "run.json").write_text(json.dumps(notes))
    if stopped_at == "search":
        (copy / "study.db").unlink()
    page = Page(calibrate.open_run(copy).report().read_text())
    assert "Not proven" in page.text
    assert ("tradeoff" in page.data["figures"]) == (stopped_at == "validation")
    assert "curves-prefill" in page.data["figures"]
    assert "map-prefill" not in page.data["figures"]
    with pytest.raises(UserError, match="its validation is not finished"):
        _ = calibrate.open_run(copy).thresholds


def test_nothing_within_the_budget_is_reported_too(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "report.html").unlink()
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["budget"]["kl"] = 1e-12
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    disown(copy)
    monkeypatch.setattr(sys, "argv", ["calibrate", "validate", str(copy)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "within the budget" in capsys.readouterr().err
    assert "Not proven" in Page((copy / "report.html").read_text()).text


def test_the_command_prints_the_path(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "elsewhere.html"
    monkeypatch.setattr(sys, "argv", ["calibrate", "report", str(copy), "-o", str(target)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    printed = capsys.readouterr()
    assert printed.out == f"{target}\n"
    assert printed.err == ""
    assert Page(target.read_text()).data["runs"][0]["folder"] == "copy"


def test_only_a_report_loads_plotly() -> None:
    program = (
        "import sys, calibrate, calibrate.cli, calibrate.pipeline; "
        "print([m for m in ('plotly', 'jinja2.loaders', 'calibrate.report.page') if m in sys.modules])"
    )
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": paths, "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert "plotly" not in done.stdout
    assert "calibrate.report.page" not in done.stdout


def test_an_output_that_cannot_be_written_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        calibrate.open_run(copy).report(output=tmp_path / "missing" / "report.html")


def test_servers_that_were_measured_are_shown(copy: Path) -> None:
    """What `calibrate serve-bench -o RUN` left, as a table with ratios."""
    row = {"completed": 2, "total_input_tokens": 20, "total_output_tokens": 8}
    results = {
        "dense": {**row, "median_ttft_ms": 300.0, "request_goodput": 2.0},
        "calibrated": {**row, "median_ttft_ms": 200.0, "request_goodput": 3.0},
    }
    told = {"model": "m", "thresholds": "t.yaml", "sha256": "ab" * 32, "serve": [], "load": []}
    tiles = [{"phase": "prefill", "visited": 8, "skipped": 2}]
    page = Page(calibrate.open_run(copy).report().read_text())
    assert not any("TTFT" in str(table) for table in page.tables)
    (copy / "serving.json").write_text(json.dumps({**told, "tiles": tiles, "results": results}))
    page = Page(calibrate.open_run(copy).report().read_text())
    (table,) = (table for table in page.tables if "TTFT" in str(table))
    assert table[0] == ["", "dense", "calibrated", "ratio"]
    assert ["TTFT, median [ms]", "300", "200", "1.50×"] in table
    assert ["goodput [1/s]", "2", "3", "1.50×"] in table
    assert "25.0 % of prefill tiles" in page.text
