"""The report in a real browser: drawn, followed by theme, reached by mouse and keyboard, fast."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_files import close

import calibrate


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
def test_the_slider_answers_the_keyboard(browser: Any, smoke_run: Path, run: calibrate.Run) -> None:
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
@pytest.mark.parametrize("figure", ["tradeoff", "map-prefill", "tasks-kl", "speed-decode"])
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
    target = calibrate.open_run(smoke_run).report(smoke_run, tmp_path / "both.html")
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
