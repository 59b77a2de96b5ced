"""What a run generates: on held-out prompts with answers only, the dense text once, and with a verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from report_files import Page, chosen_of

import calibrate
from calibrate import pipeline
from calibrate.model.generate import greedy_text
from calibrate.pipeline import Stages
from calibrate.record.folder import open_run
from calibrate.report import tables
from calibrate.search.study import losses_of

CONFIG: dict[str, Any] = {
    "geometry": {"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}},
    "prompts": {
        "sources": [{"task": "needle_multivalue"}, {"task": "text"}],
        "lengths": [272],
        "decode_tokens": 7,
        "calibration": 2,
        "search": 2,
        "heldout": 5,
    },
    # Three held-out prompts have an answer; none loses anything, which proves 65.4 points.
    "budget": {"kl": 0.5, "generated_drop": 75.0},
    "target": {"min_kv_len": {"prefill": 200, "decode": 200}},
    "sensitivity": {"prompts": 1},
    "search": {"trials": 3},
    "validation": {"short_prompt": 61, "attempts": 2},
}


def given() -> dict[str, Any]:
    model = tiny.model("llama", sharpness=400.0, num_hidden_layers=2)
    return {"model": model, "tokenizer": tiny.tokenizer()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    folder = tmp_path_factory.mktemp("generated") / "run"
    return calibrate.run(CONFIG, folder, **given())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(run: calibrate.Run) -> dict[str, list[Any]]:
    return Stages(*open_run(run.folder)).prompts


def test_the_drop_is_measured_in_the_validation_only_and_judged(run: calibrate.Run) -> None:
    assert all("generated_drop" not in losses_of(trial) for trial in run.study.trials)
    row = chosen_of(run.validation)
    assert row["generated_drop"]["mean"] == 0.0, "a random model gives no answer that it could lose"
    assert 65 < row["generated_drop"]["upper"] < 66 and row["passed"]
    assert run.thresholds.evidence["loss"]["generated_drop"]["mean"] == 0.0
    assert run.thresholds.evidence["budget"]["generated_drop"] == 75.0
    tasks = row["by_task"]
    assert tasks["needle_multivalue"]["dense_generated"] == 0.0
    assert not {"generated_drop", "dense_generated"} & set(tasks["text"])
    outcomes = [row["measured"] for row in lines(run.folder / "heldout.jsonl")]
    shown = [(o["task"], "generated_drop" in o["losses"]) for o in outcomes]
    assert set(shown) == {("needle_multivalue", True), ("text", False), ("short", False)}


def test_the_dense_text_is_generated_once_per_prompt_and_kept(run: calibrate.Run) -> None:
    kept = lines(run.folder / "generated.jsonl")
    answered = [prompt for prompt in prompts(run)["heldout"] if prompt.has_answer]
    assert len(kept) == len(answered) == 3
    stages = Stages(*open_run(run.folder), model=_loaded())
    for prompt in answered:
        [text] = [row["measured"]["text"] for row in kept if row["prompt"] == prompt.key]
        assert text == greedy_text(stages.loaded, prompt, 128)
        assert len(stages.loaded.tokenizer.encode(text)) > 60


def _loaded() -> Any:
    from calibrate.model.load import from_memory

    return from_memory(*given().values())[0]


def test_an_interrupted_validation_generates_only_what_is_missing(
    run: calibrate.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    before = {name: (folder / name).read_bytes() for name in ("validation.json", "thresholds.yaml")}
    for name in ("generated.jsonl", "heldout.jsonl", *before):
        (folder / name).unlink()
    calls: list[str] = []

    def counted(loaded: Any, prompt: Any, tokens: int) -> str:
        if len(calls) == 2:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(prompt.key)
        return greedy_text(loaded, prompt, tokens)

    monkeypatch.setattr(pipeline, "greedy_text", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(run.config, folder, **given())
    calibrate.run(run.config, folder, **given())
    assert len(calls) == 4 and len(set(calls)) == 4, (
        "three dense texts, one of them at the second try"
    )
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_what_only_the_dense_run_writes_is_lost(run: calibrate.Run, tmp_path: Path) -> None:
    """Answers are planted: the beginning of what the dense run writes. Search prompts stay unmeasured."""
    from dataclasses import replace

    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    stages = Stages(*open_run(folder), model=_loaded())
    asked = next(prompt for prompt in stages.prompts["heldout"] if prompt.has_answer)
    planted = replace(asked, answers=(stages.dense_text(asked, 128)[:23], "no run writes this"))
    boldest = dict.fromkeys(("prefill", "decode"), (199.0,) * 2)
    lost = stages.evaluate(boldest, planted)
    assert sum(lost.skipped["prefill"]) > 0 < sum(lost.skipped["decode"])
    assert (lost.dense_generated, lost.losses["generated_drop"]) == (50.0, 50.0)
    dense = dict.fromkeys(boldest, (0.0,) * 2)
    assert stages.evaluate(dense, planted).losses["generated_drop"] == 0.0
    assert "generated_drop" not in stages.evaluate(boldest, replace(planted, split="search")).losses


def test_the_report_and_the_tables_have_the_generated_score(
    run: calibrate.Run, call: Callable[..., Any]
) -> None:
    page = Page(run.report().read_text())
    text = " ".join(page.text.split())
    assert "a generated score drop of at most 65.40 points" in text and "budget 75)" in text
    assert {"tasks-kl", "tasks-generated_drop"} <= set(page.data["figures"])
    [drawn] = [
        trace["y"]
        for trace in page.data["figures"]["tasks-generated_drop"]["data"]
        if trace["name"].startswith("mean")
    ]
    assert drawn == ["needle_multivalue"]
    table = tables.tables_of(run.findings)["tasks"]
    assert table.columns[-1] == "dense generated score [points]"
    assert [row[-1] for row in table.rows] == ["0.0", "–"]
    code, out, err = call("show", run.folder / "thresholds.yaml")
    assert code == 0, err
    assert "generated score drop 0.00 (upper bound 65.40) points (3 prompts)" in " ".join(
        out.split()
    )
