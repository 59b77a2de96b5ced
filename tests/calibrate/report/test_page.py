"""The report: every number is the run folder's, and a real browser draws it all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from optuna.trial import TrialState

import calibrate
from calibrate import pipeline
from calibrate.cli import main
from calibrate.errors import UserError
from calibrate.record.provenance import digest
from calibrate.search.cost import load_curves
from calibrate.statistics.counts import Statistics
from skip_softmax.meaning.histogram import BINS, NEVER, edges

PHASES = ("prefill", "decode")
LIMIT = 6_000_000  # bytes


class Page(HTMLParser):
    """The report's JSON block, its tables as text, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._block = ""
        self._inside: str | None = None
        self._cell: list[str] | None = None
        self.feed(html)

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self._block))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None
        elif tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._inside == "findings":
            self._block += data
        elif self._inside is None:
            self.text += data
            if self._cell is not None:
                self._cell.append(data)

    def table(self, first: str) -> list[list[str]]:
        """The table whose first heading is `first`, without its headings."""
        return next(rows[1:] for rows in self.tables if rows[0][0] == first)


def close(actual: Any, expected: Any) -> None:
    """Equal up to the six digits that the report keeps."""
    assert np.asarray(actual).shape == np.asarray(expected).shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def loss_text(value: float) -> str:
    return f"{value:#.3g}"


@pytest.fixture(scope="module")
def run(smoke_run: Path) -> pipeline.Run:
    return calibrate.open_run(smoke_run)


@pytest.fixture(scope="module")
def page(smoke_run: Path) -> Page:
    return Page((smoke_run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(page: Page) -> dict[str, Any]:
    return dict(page.data["runs"][0])


@pytest.fixture
def copy(smoke_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smoke_run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def large(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a made-up run of 64 layers, 64 heads and 4 lengths."""
    folder = Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("large") / "large"))
    layers, heads, lengths = 64, 64, [4096, 8192, 16384, 32768]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["prompts"]["lengths"] = lengths
    config["target"]["min_kv_len"] = {"prefill": 4096, "decode": 4096}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
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
    factors = (20 * torch.exp(3 * torch.rand(layers, heads, generator=generator))).tolist()
    validation = read(folder, "validation.json")
    for attempt in [*validation["attempts"], validation["baseline"]]:
        attempt["setting"] = dict.fromkeys(PHASES, factors)
        by_length = {str(length): {"target": 0.4, "achieved": 0.39} for length in lengths}
        attempt["by_length"] = dict.fromkeys(PHASES, by_length)
    (folder / "validation.json").write_text(json.dumps(validation))
    return pipeline.write_report(folder)


# The numbers.


def test_trials_are_the_study(run: pipeline.Run, found: dict[str, Any]) -> None:
    trials = run.study.get_trials(states=(TrialState.COMPLETE,))
    assert [row["number"] for row in found["trials"]] == [trial.number for trial in trials]
    close([row["kl"] for row in found["trials"]], [trial.values[0] for trial in trials])
    close([row["speedup"] for row in found["trials"]], [1 / trial.values[1] for trial in trials])
    for phase in PHASES:
        close(
            [row["sparsity"][phase] for row in found["trials"]],
            [trial.user_attrs["sparsity"][phase] for trial in trials],
        )
    winner = run.validation["attempts"][-1]["setting"]
    (chosen,) = [row["number"] for row in found["trials"] if row["chosen"]]
    assert trials[chosen].user_attrs["setting"] == winner
    for point in found["front"]:
        beaten = [
            t.values[0] < point["kl"] * (1 - 1e-5)
            and 1 / t.values[1] > point["speedup"] * (1 + 1e-5)
            for t in trials
        ]
        assert not any(beaten)


def test_heldout_numbers_are_the_validation(run: pipeline.Run, found: dict[str, Any]) -> None:
    for key, row in (
        ("searched", run.validation["attempts"][-1]),
        ("uniform", run.validation["baseline"]),
    ):
        shown = found["heldout"][key]
        for name in ("kl", "score_drop"):
            for part in ("mean", "upper", "confidence"):
                close(shown[name][part], row[name][part])
        close(shown["speedup"], 1 / row["relative_time"])
        for phase in PHASES:
            close(shown["sparsity"][phase], row["sparsity"][phase])
            lengths = found["phases"][phase]["by_length"][key]
            assert list(lengths) == list(row["by_length"][phase])
            for length, pair in row["by_length"][phase].items():
                close(
                    [lengths[length]["target"], lengths[length]["achieved"]],
                    [pair["target"], pair["achieved"]],
                )
    assert found["verdict"]["passed"] == run.validation["passed"]
    assert found["budget"]["kl"] == run.config.budget.kl


@pytest.mark.parametrize("phase", PHASES)
def test_maps_are_the_statistics_at_the_emitted_thresholds(
    run: pipeline.Run, found: dict[str, Any], phase: Any
) -> None:
    numbers = found["phases"][phase]
    layers = range(run.thresholds.model.layers)
    grid = torch.tensor([run.thresholds.per_head(layer, phase) for layer in layers])
    close(numbers["scale_factor"], grid.tolist())
    skipped, visited = run.stats.skipped(phase, grid).sum(2), run.stats.visited(phase).sum(2)
    close(numbers["sparsity"], (skipped / visited).tolist())
    close(numbers["layer_sparsity"], run.stats.layer_sparsity(phase, grid).tolist())
    close(numbers["layer_dropped_mass"], run.stats.dropped_mass(phase, grid).tolist())
    rows = [row for row in read(run.folder, "sensitivity.json") if row["phase"] == phase]
    for name in ("layer", "scale_factor", "sparsity", "dropped_mass", "kl"):
        close([row[name] for row in numbers["sensitivity"]], [row[name] for row in rows])


@pytest.mark.parametrize("phase", PHASES)
def test_curves_are_the_statistics_at_bin_edges(
    run: pipeline.Run, found: dict[str, Any], phase: Any
) -> None:
    curve = found["phases"][phase]["curve"]
    factors = [float(edge) for edge in edges() if edge < run.config.target.min_kv_len[phase]]
    close(curve["scale_factor"], factors[-len(curve["scale_factor"]) :])
    for index in range(0, len(factors), 7):
        factor = factors[index]
        at = len(curve["scale_factor"]) - len(factors) + index
        if at < 0:
            assert run.stats.sparsity(phase, factor) < 1e-4
            continue
        close(curve["sparsity"][at], run.stats.sparsity(phase, factor))
        close(curve["dropped_mass"][at], float(run.stats.dropped_mass(phase, factor).mean()))
        by_layer = run.stats.layer_sparsity(phase, factor).tolist()
        close([row[at] for row in curve["layer_sparsity"]], by_layer)
        by_length = [run.stats.sparsity(phase, factor, bin_) for bin_ in range(2)]
        close([row[at] for row in curve["length_sparsity"]], by_length)


def test_tasks_are_the_heldout_prompts(run: pipeline.Run, found: dict[str, Any]) -> None:
    winner = digest(run.validation["attempts"][-1]["setting"])
    keys = {row["key"] for row in map(_with_key, read(run.folder, "prompts.json")["heldout"])}
    rows = [
        row
        for key, row in read(run.folder, "heldout.json").items()
        if key.startswith(winner) and row["key"] in keys
    ]
    assert len(rows) == run.config.prompts.heldout
    for task, shown in found["tasks"].items():
        mine = [row for row in rows if row["task"] == task]
        close(sorted(shown["kl"]["values"]), sorted(row["kl"] for row in mine))
        close(shown["kl"]["mean"], np.mean([row["kl"] for row in mine]))
        close(shown["kl"]["mean"], run.validation["attempts"][-1]["by_task"][task]["kl"])
        assert shown["kl"]["mean"] <= shown["kl"]["upper"] <= max(shown["kl"]["values"])
        assert shown["prompts"] == len(mine)
    for phase in PHASES:
        visited = np.sum([row["visited"][phase] for row in rows], axis=0)
        skipped = np.sum([row["skipped"][phase] for row in rows], axis=0)
        close(found["phases"][phase]["layer_heldout"], skipped / visited)


def _with_key(row: dict[str, Any]) -> dict[str, Any]:
    from calibrate.prompts.build import Prompt

    prompt = Prompt(**{**row, "ids": tuple(row["ids"]), "continuation": tuple(row["continuation"])})
    return {"key": prompt.key}


def test_speed_is_the_measured_curve_and_the_emitted_prediction(
    run: pipeline.Run, found: dict[str, Any]
) -> None:
    evidence = run.thresholds.evidence["predicted_speedup"]
    curves = load_curves(run.config.cost, 384, run.thresholds.model.head_dim).curves
    for phase in PHASES:
        speed = found["phases"][phase]["speed"]
        assert round(speed["predicted"]["speedup"], 3) == evidence[phase]
        close(speed["measured"]["sparsity"], curves[phase].sparsity)
        close(speed["measured"]["speedup"], [1 / time for time in curves[phase].relative_time])


def test_provenance_is_run_json_and_the_config(run: pipeline.Run, found: dict[str, Any]) -> None:
    shown = dict(found["provenance"])
    config = shown.pop("config")
    notes = read(run.folder, "run.json")
    assert shown == notes
    assert config == yaml.safe_load((run.folder / "config.yaml").read_text())


def test_figures_draw_the_findings(page: Page, found: dict[str, Any]) -> None:
    figures = page.data["figures"]

    def trace(figure: str, name: str) -> dict[str, Any]:
        return dict(next(t for t in figures[figure]["data"] if t.get("name") == name))

    drawn = {
        (x, y)
        for trace_ in figures["tradeoff"]["data"][:3]
        for x, y in zip(trace_["x"], trace_["y"], strict=True)
    }
    assert drawn >= {(row["speedup"], row["kl"]) for row in found["trials"]}
    chosen = next(row for row in found["trials"] if row["chosen"])
    assert trace("tradeoff", "chosen")["x"] == [chosen["speedup"]]
    assert trace("tradeoff", "chosen, held-out")["y"] == [
        found["heldout"]["searched"]["kl"]["mean"]
    ]
    assert trace("tradeoff", "one number, held-out")["y"] == [
        found["heldout"]["uniform"]["kl"]["mean"]
    ]
    assert [y for trace_ in figures["history"]["data"] for y in trace_["y"]] == [
        row["kl"] for row in found["trials"]
    ]
    for phase in PHASES:
        numbers = found["phases"][phase]
        close(figures[f"map-{phase}"]["data"][0]["z"], 100 * np.array(numbers["sparsity"]))
        curve = numbers["curve"]
        *lengths, total, dropped = figures[f"curves-{phase}"]["data"]
        close([t["y"] for t in lengths], 100 * np.array(curve["length_sparsity"]))
        close(total["y"], 100 * np.array(curve["sparsity"]))
        close(dropped["y"], 100 * np.array(curve["dropped_mass"]))
        assert total["x"] == dropped["x"] == curve["scale_factor"]
        rows = trace("sensitivity", phase)
        assert rows["y"] == [row["kl"] for row in numbers["sensitivity"]]
        for kind in ("target", "achieved"):
            shares = [row[kind] for row in numbers["by_length"]["searched"].values()]
            close(trace("lengths", f"{phase}, {kind}")["y"], 100 * np.array(shares))
        measured = trace(f"speed-{phase}", f"measured, {numbers['speed']['kv_len']} tokens")
        assert measured["y"] == numbers["speed"]["measured"]["speedup"]
        bound = trace(f"speed-{phase}", "bound 2/(2−s)")
        close(bound["y"], [2 / (2 - x / 100) for x in bound["x"]])
        assert trace(f"speed-{phase}", "chosen, predicted")["y"] == [
            numbers["speed"]["predicted"]["speedup"]
        ]
    means = trace("tasks", "mean, with upper bound")
    assert means["x"] == [task["kl"]["mean"] for task in found["tasks"].values()]
    bars = [task["kl"]["upper"] - task["kl"]["mean"] for task in found["tasks"].values()]
    close(means["error_x"]["array"], bars)


def test_text_and_tables_say_the_same(page: Page, run: pipeline.Run, smoke_run: Path) -> None:
    row = run.validation["attempts"][-1]
    text = " ".join(page.text.split())
    assert (
        f"Passed: skips {100 * row['sparsity']['prefill']:.1f} % of prefill tiles and "
        f"{100 * row['sparsity']['decode']:.1f} % of decode tiles for a loss of "
        f"{loss_text(row['kl']['mean'])} nats/token, at most {loss_text(row['kl']['upper'])} with "
        f"{100 * row['kl']['confidence']:.1f} % confidence, against a budget of 0.2, "
        f"measured on {row['prompts']} held-out prompts; attention is predicted to run "
        f"{1 / row['relative_time']:.2f}× as fast."
    ) in text
    for layer, cells in enumerate(page.table("layer")):
        assert cells[0] == str(layer)
        for phase, factor, share, mass in zip(
            PHASES, cells[1::4], cells[2::4], cells[4::4], strict=True
        ):
            factors = run.thresholds.per_head(layer, phase)  # type: ignore[arg-type]
            assert factor.removesuffix(" (dense)") == f"{factors[0]:g}"
            grid = [run.thresholds.per_head(i, phase)[0] for i in range(4)]  # type: ignore[arg-type]
            expected = run.stats.layer_sparsity(phase, grid)[layer]  # type: ignore[arg-type]
            assert share == f"{100 * float(expected):.1f} %"
            dropped = run.stats.dropped_mass(phase, grid)[layer]  # type: ignore[arg-type]
            assert mass == f"{100 * float(dropped):.3g} %"
    chosen, uniform = page.table("on held-out prompts")
    assert chosen[1:3] == [loss_text(row["kl"]["mean"]), loss_text(row["kl"]["upper"])]
    assert uniform[1] == loss_text(run.validation["baseline"]["kl"]["mean"])
    trials = run.study.get_trials(states=(TrialState.COMPLETE,))
    shown = [cells[1:3] for cells in page.table("trial")]
    assert shown == [[loss_text(t.values[0]), f"{1 / t.values[1]:.2f}×"] for t in trials]
    lengths = {cells[0]: cells[1:3] for cells in page.table("phase and length")}
    for phase in PHASES:
        for length, pair in row["by_length"][phase].items():
            assert lengths[f"{phase}, {length} tokens"] == [
                f"{100 * pair['target']:.1f} %",
                f"{100 * pair['achieved']:.1f} %",
            ]
    tasks = {cells[0]: cells[2] for cells in page.table("task")}
    assert tasks == {task: loss_text(values["kl"]) for task, values in row["by_task"].items()}
    notes = dict(page.table(""))
    assert run.thresholds.model.sha256 in notes["model"]
    assert read(smoke_run, "run.json")["config_sha256"] in notes["config"]


# The file.


def test_size(smoke_run: Path, large: Path) -> None:
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
    html = pipeline.write_report(copy).read_text(encoding="utf-8")
    assert "alert(1)</script>" not in html
    assert "<b>" not in html.split("<main>")[1].split("</main>")[0]
    assert Page(html).data["runs"][0]["name"] == bad


def test_a_failed_run_says_dense(copy: Path) -> None:
    validation = read(copy, "validation.json")
    validation["attempts"][-1] |= {"passed": False, "reason": "KL 0.3 above the budget"}
    validation["passed"] = False
    (copy / "validation.json").write_text(json.dumps(validation))
    file = copy / "thresholds.yaml"
    data = yaml.safe_load(file.read_text())
    data["evidence"] |= {"verdict": "failed", "reason": "KL 0.3 above the budget"}
    file.write_text(yaml.safe_dump(data))
    text = " ".join(Page(pipeline.write_report(copy).read_text()).text.split())
    assert "Failed: KL 0.3 above the budget. The last candidate skips" in text
    assert "the file says dense." in text


@pytest.mark.parametrize("stopped_at", ["search", "validation"])
def test_an_unfinished_run_shows_what_it_has(copy: Path, stopped_at: str) -> None:
    notes = read(copy, "run.json")
    for stage in ("search", "validation")[("search", "validation").index(stopped_at) :]:
        del notes["seconds"][stage]
    (copy / "run.json").write_text(json.dumps(notes))
    if stopped_at == "search":
        (copy / "study.db").unlink()
    page = Page(pipeline.write_report(copy).read_text())
    assert "Not proven" in page.text
    assert ("tradeoff" in page.data["figures"]) == (stopped_at == "validation")
    assert "curves-prefill" in page.data["figures"]
    assert "map-prefill" not in page.data["figures"]
    with pytest.raises(UserError, match="its validation is not finished"):
        calibrate.open_run(copy)


def test_nothing_within_the_budget_is_reported_too(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "report.html").unlink()
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["budget"]["kl"] = 1e-12
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
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


def test_two_runs_side_by_side(copy: Path, smoke_run: Path, run: pipeline.Run) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["seed"] = 7
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    target = pipeline.write_report(smoke_run, copy, copy / "both.html")
    page = Page(target.read_text())
    assert len(page.data["runs"]) == 2
    assert {"fronts", "layers-prefill", "layers-decode", "tasks"} == set(page.data["figures"])
    numbers = {row[0]: row[1:] for row in page.tables[0]}
    kl = loss_text(run.validation["attempts"][-1]["kl"]["mean"])
    assert numbers["loss [nats/token]"] == [kl, kl]
    assert page.table("key") == [["seed", "0", "7"]]


@pytest.mark.parametrize("change", ["no folder", "no statistics", "not writable"])
def test_mistakes_have_a_name(copy: Path, tmp_path: Path, change: str) -> None:
    if change == "no folder":
        with pytest.raises(UserError, match="is no run folder"):
            pipeline.write_report(tmp_path / "nowhere")
    elif change == "no statistics":
        (copy / "stats.safetensors").unlink()
        with pytest.raises(UserError, match="cannot be read as tile statistics"):
            pipeline.write_report(copy)
    else:
        with pytest.raises(UserError, match="cannot be written"):
            pipeline.write_report(copy, output=tmp_path / "missing" / "report.html")


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


# The page, in a real browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-quic", "--disable-background-networking", "--disable-component-update",
        "--disable-sync",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    started = webdriver.Chrome(options=options, service=service)
    yield started
    started.quit()


def opened(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> Any:
    """Opens a page at a size and waits until all its figures are drawn."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.drawn"))
    return browser


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.02)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn(browser: Any, smoke_run: Path, width: int, scheme: str) -> None:
    opened(browser, smoke_run / "report.html", width, scheme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    counts = browser.execute_script(
        """return [...document.querySelectorAll(".plot")].map((plot) => [
          plot.id, plot.querySelectorAll("svg.main-svg").length,
          plot.querySelectorAll(".point, .points path, .lines path, .hm image, .js-line").length,
          plot.querySelector("svg.main-svg").getBoundingClientRect().width > 200,
        ])"""
    )
    figures = browser.execute_script("return Object.keys(page.figures)")
    assert sorted(row[0] for row in counts) == sorted(figures)
    assert len(figures) >= 13
    for name, roots, marks, wide in counts:
        assert roots >= 2 and marks > 0 and wide, name
    # No horizontal scrolling of the page; wide tables scroll inside themselves.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper, text = browser.execute_script(
        """const ink = document.querySelector("#tradeoff .xtitle").style.fill;
        return [getComputedStyle(document.documentElement).backgroundColor, ink]"""
    )
    assert (brightness(paper) > 0.5) == (scheme == "light")
    assert abs(brightness(paper) - brightness(text)) > 0.5


def brightness(colour: str) -> float:
    channels = colour[colour.index("(") + 1 : -1].split(",")[:3]
    return sum(float(channel) for channel in channels) / 3 / 255


@pytest.mark.browser
def test_figures_follow_the_theme(browser: Any, smoke_run: Path) -> None:
    opened(browser, smoke_run / "report.html")
    fill = 'return document.querySelector("#tradeoff .xtitle").style.fill'
    before = browser.execute_script(fill)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    until(lambda: browser.execute_script(fill) != before)
    assert brightness(browser.execute_script(fill)) > 0.5 > brightness(before)


@pytest.mark.browser
def test_the_slider_answers_the_keyboard(browser: Any, smoke_run: Path, run: pipeline.Run) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, smoke_run / "report.html")
    slider = browser.find_element(By.ID, "slider-decode")
    answer = browser.find_element(By.ID, "answer-decode")
    before = answer.text
    bars = "return document.querySelector('#layers-decode .point path').getAttribute('d')"
    line = "return document.querySelector('#curves-decode').layout.shapes[0].x0"
    drawn, moved = browser.execute_script(bars), browser.execute_script(line)
    slider.send_keys(*[Keys.ARROW_LEFT] * 16)
    assert answer.text != before
    until(lambda: browser.execute_script(bars) != drawn)
    until(lambda: browser.execute_script(line) != moved)
    factor = browser.execute_script(line)
    share = run.stats.sparsity("decode", factor)
    dropped = float(run.stats.dropped_mass("decode", factor).mean())
    assert f"skips {100 * share:.3g} %" in answer.text
    assert f"drops {100 * dropped:.3g} %" in answer.text
    expected = f"scale factor {factor:.4g} tokens"
    assert answer.text.startswith(expected)
    assert slider.get_attribute("aria-valuetext") == expected
    heights = browser.execute_script("return document.querySelector('#layers-decode').data[0].y")
    close(heights, (100 * run.stats.layer_sparsity("decode", factor)).tolist())


@pytest.mark.browser
@pytest.mark.parametrize("figure", ["tradeoff", "map-prefill", "tasks", "speed-decode"])
def test_hovering_says_what_a_mark_is(browser: Any, smoke_run: Path, figure: str) -> None:
    opened(browser, smoke_run / "report.html")
    place = browser.execute_script(
        """const plot = document.getElementById(arguments[0]);
        plot.scrollIntoView({block: "center"});
        const mark = plot.querySelector(".points path, .hm image").getBoundingClientRect();
        return [mark.x + mark.width / 2, mark.y + mark.height / 2]""",
        figure,
    )
    for nudge in (0, 1):  # plotly answers to movement
        where = {"type": "mouseMoved", "x": place[0] + nudge, "y": place[1] + nudge}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", where)
        time.sleep(0.1)
    label = f"return document.querySelector('#{figure} .hoverlayer .hovertext')?.textContent"
    until(lambda: browser.execute_script(label))
    assert any(word in browser.execute_script(label) for word in ("KL", "%"))


@pytest.mark.browser
def test_everything_can_be_reached_with_the_keyboard(browser: Any, smoke_run: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, smoke_run / "report.html")
    reached = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = "const e = document.activeElement; return e.id || e.tagName + e.className"
        reached.add(browser.execute_script(active))
    assert {"slider-prefill", "slider-decode", "SUMMARY", "DIVscroll", "A"} <= reached


@pytest.mark.browser
def test_the_comparison_is_drawn(browser: Any, smoke_run: Path, tmp_path: Path) -> None:
    target = pipeline.write_report(smoke_run, smoke_run, tmp_path / "both.html")
    opened(browser, target, 390)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return document.querySelectorAll('svg.main-svg').length") >= 8
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_a_large_run_opens_in_two_seconds(browser: Any, large: Path) -> None:
    """Until it can be read: wall time, best of three. Until all is drawn: the page's own CPU time."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    loads, drawn = [], []
    for _ in range(3):
        browser.get("about:blank")
        spent = task_seconds(browser)
        opened(browser, large)
        navigation = "return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
        loads.append(browser.execute_script(navigation))
        drawn.append(task_seconds(browser) - spent)
    print(f"load {min(loads):.2f} s, drawn {min(drawn):.2f} s of CPU")
    assert min(loads) < 2.0
    assert 0.1 < min(drawn) < 2.0


def task_seconds(browser: Any) -> float:
    """CPU time of the page's main thread."""
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))
