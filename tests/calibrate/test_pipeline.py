"""A whole run on the tiny model: what the file claims is what serving it gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from report_files import chosen_of

import calibrate
from calibrate import pipeline
from calibrate.errors import UserError
from calibrate.loss import sensitivity
from calibrate.loss.losses import kl_divergence
from calibrate.model.load import LoadedModel, load
from calibrate.model.section import thresholds_for
from calibrate.prompts.build import Prompt
from calibrate.record import folder as run_folder
from calibrate.schema import ModelConfig, RunConfig, load_config
from calibrate.statistics import capture
from skip_softmax import Thresholds, applied
from skip_softmax.huggingface.layers import inspect_layers


@pytest.fixture(scope="module")
def finished(smoke_run: Path) -> calibrate.Run:
    return calibrate.open_run(smoke_run)


def test_a_run_leaves_its_whole_folder(finished: calibrate.Run) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert {
        "config.yaml",
        "stats.safetensors",
        "fit.json",
        "sensitivity.json",
        "study.db",
        "loss_model.json",
        "validation.json",
        "thresholds.yaml",
        "run.json",
    } <= names
    notes = json.loads((finished.folder / "run.json").read_text())
    assert {"versions", "commit", "device", "seed", "config_sha256", "model", "seconds"} <= set(
        notes
    )
    assert finished.thresholds.evidence["verdict"] == "passed"
    assert len(finished.study.trials) == finished.config.search.trials


@pytest.mark.parametrize(
    "lost", ["thresholds.yaml", "validation.json", "study.db", "sensitivity.json", "fit.json"]
)
def test_a_result_that_somebody_deleted_is_made_again(
    finished: calibrate.Run, copied: Path, lost: str
) -> None:
    (copied / lost).unlink()
    calibrate.open_run(copied).report()  # of what is there
    again = calibrate.run(finished.config, copied)
    assert again.thresholds.scale_factor == finished.thresholds.scale_factor
    assert again.thresholds.layers == finished.thresholds.layers
    assert len(again.study.trials) == len(finished.study.trials)
    assert (copied / lost).exists()


def test_a_config_that_led_nowhere_may_be_corrected(
    finished: calibrate.Run, copied: Path, tmp_path: Path
) -> None:
    nowhere = finished.config.model.model_copy(update={"path": "no/such/model"})
    wrong = finished.config.model_copy(update={"model": nowhere})
    for folder in (tmp_path / "new", copied):
        with pytest.raises(UserError, match=r"does not exist|belongs to another config"):
            calibrate.run(wrong, folder)
    run_folder.claimed(tmp_path / "new", finished.config)
    assert run_folder.open_run(tmp_path / "new")[1] == finished.config
    assert run_folder.open_run(copied)[1] == finished.config, "results keep their config"


def test_a_longer_search_is_the_same_run(finished: calibrate.Run, copied: Path) -> None:
    trials = finished.config.search.trials
    with pytest.raises(UserError, match=f"at least the {trials} of the run, but got {trials - 1}"):
        calibrate.open_run(copied).search(trials=trials - 1)
    calibrate.open_run(copied).search(trials=trials + 2)
    with pytest.raises(UserError, match="finish it with `calibrate validate`"):
        _ = calibrate.open_run(copied).thresholds
    again = calibrate.run(finished.config, copied)
    assert len(again.study.trials) == again.config.search.trials == trials + 2


def test_a_search_that_stops_by_itself_says_so_wherever_one_looks(
    finished: calibrate.Run, copied: Path
) -> None:
    said: list[str] = []

    class Watching(pipeline.Silent):
        def step(self, note: str) -> None:
            said.append(note)

    search = finished.config.search.model_copy(update={"min_gain": 0.9})
    run_folder.write_config(copied, finished.config.model_copy(update={"search": search}))
    run = calibrate.open_run(copied, progress=Watching()).search(trials=60)
    mark = json.loads((copied / "run.json").read_text())["search_stopped"]
    assert mark["after"] == len(run.study.trials) < 60 == mark["limit"]
    text = run.findings["stopped"]
    assert (
        text
        == f"stopped after {mark['after']} of at most 60 trials: the last 6 made the predicted "
        + (f"time {mark['gained']:.2g} of the dense one shorter, less than 0.9")
    )
    assert said[-1].startswith(f"{text}; ") and not any("stopped" in note for note in said[:-1])
    assert text in run.report().read_text()
    # It is finished: going on does nothing, and more trials do.
    assert len(run.search().study.trials) == mark["after"]
    assert len(run.search(trials=61).study.trials) == mark["after"] + mark["last"]


def test_a_report_needs_no_right_to_write_the_study(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path).name != "study.db" and allowed(path, mode)
    )
    before = (copied / "study.db").read_bytes()
    (copied / "study.db").chmod(0o444)
    page = calibrate.open_run(copied).report(output=tmp_path / "page.html")
    assert page.stat().st_size > 100_000
    assert (copied / "study.db").read_bytes() == before


@pytest.mark.parametrize("place", ["beside the config", "where the command starts"])
def test_places_of_model_and_tokenizer_become_absolute(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "here" if place.startswith("where") else tmp_path / "configs"
    for folder in (tmp_path / "here", tmp_path / "configs", home / "model", home / "words"):
        folder.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "configs" / "c.yaml"
    file.write_text("model: {path: model, tokenizer: words}\n")
    found = load_config(file).model
    assert (found.path, found.tokenizer) == (str(home / "model"), str(home / "words"))
    file.write_text("model: {path: some/hub-id}\n")
    assert load_config(file).model.path == "some/hub-id"


def test_a_config_whose_prompts_would_all_run_dense_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m}\nprompts: {lengths: [256]}\n")
    with pytest.raises(ValueError, match=r"target.min_kv_len.prefill.* 288 tokens, but is 512"):
        load_config(file)


def test_the_file_reproduces_the_validated_loss_and_sparsity(
    finished: calibrate.Run, smoke_model: Path
) -> None:
    """The saved file, applied to a freshly loaded model that is served token by token."""
    loaded = load(ModelConfig(path=str(smoke_model)))
    thresholds = Thresholds.load(finished.folder / "thresholds.yaml")
    rows = json.loads((finished.folder / "prompts.json").read_text())["heldout"]
    losses, visited, skipped = [], {"prefill": 0, "decode": 0}, {"prefill": 0, "decode": 0}
    for row in rows:
        prompt = Prompt(
            **{**row, "ids": tuple(row["ids"]), "continuation": tuple(row["continuation"])}
        )
        dense = capture.forward(loaded, prompt)
        with torch.no_grad(), applied(loaded.model, thresholds) as tiles:
            out = loaded.model(torch.tensor([prompt.ids]), use_cache=True)
            logits = [out.logits[0, -1]]
            for token in prompt.continuation:
                out = loaded.model(
                    torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
                )
                logits.append(out.logits[0, -1])
        losses.append(kl_divergence(dense, torch.stack(logits)))
        for phase in visited:
            visited[phase] += int(tiles[phase].visited.sum())
            skipped[phase] += int(tiles[phase].skipped.sum())
    claimed = chosen_of(finished.validation)
    assert sum(losses) / len(losses) == pytest.approx(claimed["kl"]["mean"], rel=1e-3)
    for phase in visited:
        assert skipped[phase] > 0
        assert skipped[phase] / visited[phase] == pytest.approx(
            claimed["sparsity"][phase], abs=1e-3
        )


def test_target_and_achieved_sparsity_agree(finished: calibrate.Run) -> None:
    """Other prompts than those that were counted, but the same tasks and lengths."""
    for lengths in chosen_of(finished.validation)["by_length"].values():
        for row in lengths.values():
            assert row["achieved"] == pytest.approx(row["target"], abs=0.15)


def test_one_capture_over_all_prompts_equals_two_that_are_merged(
    finished: calibrate.Run, smoke_model: Path
) -> None:
    loaded = load(ModelConfig(path=str(smoke_model)))
    rows = json.loads((finished.folder / "prompts.json").read_text())["calibration"]
    prompts = [
        Prompt(**{**r, "ids": tuple(r["ids"]), "continuation": tuple(r["continuation"])})
        for r in rows
    ]
    geometry, lengths = finished.config.geometry, finished.config.prompts.lengths
    halves = []
    for part in (prompts[:1], prompts[1:]):
        empty = capture.empty_statistics(loaded, geometry, lengths)
        counted, parts = zip(*capture.capture(loaded, part, empty, geometry), strict=True)
        assert list(counted) == part
        halves.append(parts[-1])
    merged = halves[0].merge(halves[1])
    for phase in ("prefill", "decode"):
        assert torch.equal(merged.counts[phase], finished.stats.counts[phase])
        torch.testing.assert_close(
            merged.mass[phase], finished.stats.mass[phase], rtol=1e-12, atol=0
        )


def test_a_finished_run_returns_at_once_without_the_model(
    finished: calibrate.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda _: pytest.fail("the model was loaded again"))
    before = (finished.folder / "thresholds.yaml").read_bytes()
    again = calibrate.run(finished.config, finished.folder)
    assert again.thresholds == finished.thresholds
    assert (finished.folder / "thresholds.yaml").read_bytes() == before


def one_model(family: str) -> LoadedModel:
    model = tiny.model(family, 400.0)
    return LoadedModel(model, None, family, "0", inspect_layers(model), 1024, "float32")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_measuring_one_layer_by_replay_equals_running_everything(family: str, phase: str) -> None:
    loaded = one_model(family)
    tokens = torch.randint(
        2, tiny.VOCABULARY, (158,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    prompt = Prompt("text", "search", 150, tuple(tokens[:150]), tuple(tokens[150:]), False)
    config = RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"lengths": [150]},
            "sensitivity": {"prompts": 1},
            "geometry": {"prefill": {"tile_q": 16, "tile_kv": 16}, "decode": {"tile_kv": 16}},
            "target": {"min_kv_len": {"prefill": 150, "decode": 150}, "phases": [phase]},
        }
    )
    statistics = capture.empty_statistics(loaded, config.geometry, [150])
    [(_, statistics)] = capture.capture(loaded, [prompt], statistics, config.geometry)
    levels = config.sensitivity.target_sparsity
    todo = sensitivity.plan(loaded, statistics, config.target, levels)

    def measured(steps: list[sensitivity.Step]) -> list[sensitivity.Row]:
        return list(
            sensitivity.measure_layers(
                loaded,
                statistics,
                steps,
                lambda setting: thresholds_for(loaded, config, setting),
                [prompt],
                lambda prompt: capture.forward(loaded, prompt),
            )
        )

    rows = measured(todo)
    assert rows, "no layer can skip: this test shows nothing"
    for row in rows:
        setting = {row.phase: tuple(row.scale_factor if i == row.layer else 0.0 for i in range(3))}
        with applied(
            loaded.model, thresholds_for(loaded, config, setting), decode_from=150
        ) as tiles:
            whole = capture.forward(loaded, prompt)
        expected = kl_divergence(capture.forward(loaded, prompt), whole)
        assert row.kl == pytest.approx(expected, rel=1e-2, abs=1e-7)
        assert int(tiles[row.phase].skipped[row.layer].sum()) > 0
        assert row.sparsity > 0
        assert row.rounding < 1e-9, "float32 rounds finely"
    assert [(row.phase, row.layer, row.scale_factor) for row in rows] == todo
    # An interrupted measurement continues with what is missing.
    assert measured(todo[-1:]) == rows[-1:]
    # What skips nothing loses nothing, also in how kernels round.
    layers = range(len(loaded.layers))
    assert [row.kl for row in measured([(phase, i, 1e-9) for i in layers])] == [0.0] * len(layers)


@pytest.mark.real_model
def test_the_real_model_skips_in_both_phases_at_little_loss(smollm2: LoadedModel) -> None:
    """One needle prompt on SmolLM2: a modest scale factor skips, the answer stays right."""
    from calibrate.prompts.build import build
    from calibrate.schema import PromptsConfig, Source

    sets = build(
        PromptsConfig(
            sources=(Source(task="needle_single"),),
            lengths=(512,),
            calibration=1,
            search=1,
            heldout=2,
        ),
        smollm2.tokenizer,
        seed=0,
        max_context=smollm2.max_context,
    )
    prompt = sets["heldout"][0]
    config = RunConfig.model_validate(
        {"model": {"path": "unused"}, "target": {"min_kv_len": {"prefill": 512, "decode": 512}}}
    )
    setting = {"prefill": (100.0,) * 30, "decode": (16.0,) * 30}
    dense = capture.forward(smollm2, prompt)
    with applied(smollm2.model, thresholds_for(smollm2, config, setting), decode_from=512) as tiles:
        sparse = capture.forward(smollm2, prompt)
    assert tiles.sparsity("prefill") > 0.05
    assert tiles.sparsity("decode") > 0.2
    assert kl_divergence(dense, sparse) < 0.05
    reference = torch.tensor(prompt.continuation)
    assert torch.equal(sparse[:-1].argmax(-1), dense[:-1].argmax(-1))
    assert float((dense[:-1].argmax(-1) == reference).double().mean()) > 0.8
