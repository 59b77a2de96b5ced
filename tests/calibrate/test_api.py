"""What a program calls: public names, a model and prompts in memory, wrong arguments, unfinished runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT, SMOKE

import calibrate
from calibrate.prompts.build import Prompt

SMALL: dict[str, Any] = {
    "geometry": {"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}},
    "prompts": {
        "sources": [{"task": "needle_single"}],
        "lengths": [256],
        "decode_tokens": 8,
        "calibration": 2,
        "search": 1,
        "heldout": 2,
    },
    "budget": {"kl": 0.5, "score_drop": None},
    "target": {"min_kv_len": {"prefill": 200, "decode": 200}},
    "sensitivity": {"prompts": 1},
    "search": {"trials": 3},
    "validation": {"short_prompt": 64},
}


def small_model(sharpness: float = 400.0) -> Any:
    return tiny.model("llama", sharpness=sharpness, num_hidden_layers=2)


def texts(count: int) -> Iterator[str]:
    """Different texts of about 256 tokens of the tiny tokenizer."""
    whole = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    for number in range(count):
        yield whole[700 * number : 700 * (number + 1)]


def test_public_names_are_there_and_listed() -> None:
    assert {"run", "open_run", "export", "import_numbers", "Run", "RunConfig"} <= set(
        dir(calibrate)
    )
    assert {"UserError", "FileError", "WorkFailed", "Progress"} <= set(calibrate.__all__)
    for name in calibrate.__all__:
        assert getattr(calibrate, name).__doc__, name
    assert calibrate.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="has no attribute 'tune'"):
        _ = calibrate.tune


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Run:
    """A run of a model and prompts that are nowhere on disk."""
    return calibrate.run(
        SMALL,
        tmp_path_factory.mktemp("in-memory") / "run",
        model=small_model(),
        tokenizer=tiny.tokenizer(),
        prompts=list(texts(8)),
    )


def test_a_model_and_prompts_in_memory_are_calibrated(in_memory: calibrate.Run) -> None:
    assert in_memory.config.model.path == "memory://LlamaForCausalLM"
    assert in_memory.thresholds.model.sha256 == in_memory.stats.identity["model"]
    assert in_memory.validation["attempts"]
    in_a_clone = (ROOT / ".git").exists()
    assert bool(in_memory.thresholds.provenance["commit"]) == in_a_clone
    assert in_memory.figures.curves("prefill")
    prompts = in_memory._stages.prompts
    assert {split: len(members) for split, members in prompts.items()} == {
        "calibration": 2,
        "search": 1,
        "heldout": 2,
    }
    every = [prompt for members in prompts.values() for prompt in members]
    assert len({prompt.ids for prompt in every}) == 5
    assert {prompt.task for prompt in every} == {"memory"}
    given, tokenizer = set(texts(8)), tiny.tokenizer()
    for prompt in every:
        text = tokenizer.decode([*prompt.ids, *prompt.continuation], skip_special_tokens=True)
        assert any(text.strip() in whole for whole in given)


def test_the_same_model_and_prompts_resume_and_others_are_refused(in_memory: calibrate.Run) -> None:
    before = (in_memory.folder / "thresholds.yaml").read_bytes()
    given: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "prompts": list(texts(8))}
    again = calibrate.run(SMALL, in_memory.folder, model=small_model(), **given)
    assert again.thresholds == in_memory.thresholds
    with pytest.raises(calibrate.UserError, match="was made with another model"):
        calibrate.run(SMALL, in_memory.folder, model=small_model(399.0), **given)
    with pytest.raises(calibrate.UserError, match=r"another config \(different: prompts\)"):
        other = {**given, "prompts": list(texts(9))}
        calibrate.run(SMALL, in_memory.folder, model=small_model(), **other)
    assert (in_memory.folder / "thresholds.yaml").read_bytes() == before


def test_a_run_in_memory_that_is_opened_later_has_its_results_but_no_model(
    in_memory: calibrate.Run, tmp_path: Path
) -> None:
    shutil.copytree(in_memory.folder, tmp_path / "run")
    opened = calibrate.open_run(tmp_path / "run")
    assert opened.thresholds == in_memory.thresholds
    (tmp_path / "run" / "prompts.json").unlink()
    with pytest.raises(calibrate.UserError, match=r"pass it again: calibrate\.run\("):
        opened.validate()


def test_verbs_are_methods_that_give_the_run_back(in_memory: calibrate.Run, tmp_path: Path) -> None:
    searched = in_memory.search(trials=4)
    assert searched is in_memory
    with pytest.raises(calibrate.UserError, match=r"its validation is not finished.*validate"):
        _ = in_memory.thresholds
    assert in_memory.validate().thresholds.evidence["verdict"]
    assert in_memory.report(output=tmp_path / "page.html").stat().st_size > 100_000
    assessed, measured = in_memory.assess(in_memory.thresholds)
    assert assessed.evidence == measured.evidence


def test_answers_and_datasets_are_understood(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from calibrate.prompts.rows import from_memory
    from calibrate.prompts.rows import texts as cells

    rows = [{"prompt": text, "continuation": "yes"} for text in texts(3)]
    source, taken = from_memory(rows)
    assert (source.task, source.answer_field) == ("memory", "continuation")
    assert [cells(source, "", row) for row in taken] == [(row["prompt"], "yes") for row in rows]
    same, _ = from_memory(datasets.Dataset.from_list(rows))
    assert same == source
    renamed = [{"prompt": row["prompt"], "answer": "yes"} for row in rows]
    assert from_memory(renamed)[0].answer_field == "answer"


def test_a_prompt_survives_json() -> None:
    prompt = Prompt("text", "search", 64, (1, 2, 3), (4,), has_answer=False)
    assert Prompt.from_json(prompt.to_json()) == prompt


def test_an_unfinished_run_opens_and_names_what_is_missing(smoke_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(smoke_run / "config.yaml", tmp_path / "run")
    run = calibrate.open_run(tmp_path / "run")
    for name, stage in (
        ("thresholds", "validation"),
        ("validation", "validation"),
        ("study", "sensitivity"),
        ("stats", "capture"),
    ):
        with pytest.raises(
            calibrate.UserError, match=f"its {stage} is not finished.*`calibrate run`"
        ):
            getattr(run, name)


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        (
            {"config": 3},
            "`config` must be the path of a run config, a dict or a RunConfig, but got int: 3",
        ),
        ({"config": {"modle": {}}}, "the config: modle: unknown key; did you mean `model`?"),
        ({"config": {}}, "the config: model: this key is required"),
        ({"output": 3}, "`output` must be a path, but got int: 3"),
        (
            {"overrides": "seed=1"},
            "`overrides` must be a list of `section.key=value`, but got a str",
        ),
        (
            {"model": "some/model"},
            "`model` and `tokenizer` must be given together, but got a model",
        ),
        (
            {"tokenizer": "some/model"},
            "must be given together, but got a tokenizer alone; pass model=",
        ),
        (
            {"model": "some/model", "tokenizer": 1},
            "`model` must be a transformers model in memory, but got",
        ),
        ({"prompts": "text"}, "`prompts` must be a list of texts, .*, but got str; pass a list"),
        ({"prompts": {"train": []}}, "but got dict; choose one split"),
        ({"prompts": 3}, "but got int; pass a list"),
        ({"prompts": ["a", 3]}, r"but prompts\[1\] is int: 3"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_words(
    arguments: dict[str, Any], law: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "config": {"model": {"path": "nowhere/x"}, **SMALL},
        "output": tmp_path,
    }
    with pytest.raises((calibrate.UserError, calibrate.FileError), match=law):
        calibrate.run(**{**given, **arguments})


def test_overrides_of_a_config_object_are_refused(smoke_model: Path) -> None:
    config = calibrate.RunConfig.model_validate({"model": {"path": str(smoke_model)}})
    with pytest.raises(
        calibrate.UserError, match="`overrides` must be applied to a path or a dict"
    ):
        calibrate.run(config, overrides=["seed=1"])


def test_too_few_prompts_and_wrong_models_are_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": small_model(), "tokenizer": tiny.tokenizer()}
    with pytest.raises(
        calibrate.UserError, match="prompts: 5 different prompts are needed, but only 1 of 2 rows"
    ):
        calibrate.run(SMALL, tmp_path / "few", prompts=list(texts(2)), **given)
    with pytest.raises(
        calibrate.UserError, match=r"prompts\[0\]: there is no column `prompt`.*rename"
    ):
        calibrate.run(SMALL, tmp_path / "column", prompts=[{"promt": "a"}] * 5, **given)
    with pytest.raises(calibrate.UserError, match="`tokenizer` must be a transformers tokenizer"):
        calibrate.run(SMALL, tmp_path / "tokenizer", model=small_model(), tokenizer=str)
    with pytest.raises(calibrate.UserError, match="but it is of float64; convert it"):
        calibrate.run(
            SMALL,
            tmp_path / "dtype",
            model=small_model().to(torch.float64),
            tokenizer=tiny.tokenizer(),
        )


def test_prompts_of_memory_cannot_be_named_in_a_file(smoke_model: Path, tmp_path: Path) -> None:
    with pytest.raises(calibrate.UserError, match=r"needs prompts that are in memory; pass them"):
        calibrate.run(
            SMOKE,
            tmp_path / "run",
            overrides=[f"model.path={smoke_model}", "prompts.sources=[{task: memory}]"],
        )


def test_a_run_of_an_older_version_opens_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/data/run-211ca9d` is `configs/smoke.yaml`, run by the code of that commit."""
    shutil.copytree(ROOT / "tests" / "data" / "run-211ca9d", tmp_path / "run")
    before = (tmp_path / "run" / "thresholds.yaml").read_bytes()
    run = calibrate.open_run(tmp_path / "run")
    assert run.thresholds.evidence["verdict"] == "passed"
    assert len(run.study.trials) == 8
    assert len(run.stats.prompts) == 4
    assert run.validation["attempts"] and run.figures.curves("prefill")
    assert run.report().stat().st_size > 100_000
    monkeypatch.setattr("calibrate.pipeline.load", lambda _: pytest.fail("a model was loaded"))
    again = calibrate.run(run.config, run.folder)
    assert again.thresholds == run.thresholds
    assert (tmp_path / "run" / "thresholds.yaml").read_bytes() == before
