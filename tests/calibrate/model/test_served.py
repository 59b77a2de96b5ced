"""A model that a serving engine runs: a planted one, which computes with transformers what vLLM's would."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import Result

import calibrate
from calibrate.errors import UserError
from calibrate.loss.measure import compare, require_measurable, with_generated
from calibrate.model import served
from calibrate.model.generate import greedy_text
from calibrate.model.load import load
from calibrate.model.section import thresholds_for
from calibrate.prompts.build import Prompt
from calibrate.schema import GeometryConfig, ModelConfig, RunConfig, load_config
from calibrate.statistics import capture
from skip_softmax import Thresholds, applied
from skip_softmax.thresholds.yaml_file import FileError

CONFIG: dict[str, Any] = {
    "geometry": {
        "prefill": {"tile_q": 16, "tile_kv": 16, "chunk": 64},
        "decode": {"tile_kv": 16},
    },
    "prompts": {
        "sources": [{"task": "text"}],
        "lengths": [272],
        "decode_tokens": 7,
        "calibration": 1,
        "search": 1,
        "heldout": 4,
    },
    "budget": {"kl": 0.5},
    "target": {"min_kv_len": {"prefill": 200, "decode": 200}},
    "sensitivity": {"prompts": 1},
    "search": {"trials": 2},
    "validation": {"short_prompt": 61, "attempts": 2},
}
ENGINE = "vllm-native"


class Planted:
    """Answers as `skip_softmax.vllm.calibrating.Engine`."""

    def __init__(self, path: str, chunk: int | None, longest: int) -> None:
        self.loaded = load(ModelConfig(path=path))
        self.chunk, self.longest = chunk, longest
        self.layers = self.loaded.layers
        self.depth, self.shape = len(self.layers), self.layers[0].shape
        self.vocabulary = tiny.VOCABULARY
        self.asked: list[tuple[str, Any]] = []

    def _prompt(self, prompt: Sequence[int], continuation: Sequence[int]) -> Prompt:
        assert len(prompt) + len(continuation) < self.longest
        return Prompt("any", "heldout", 272, tuple(prompt), tuple(continuation), has_answer=False)

    def logits(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        thresholds: Thresholds | None = None,
    ) -> Any:
        self.asked.append(("logits", thresholds))
        one = self._prompt(prompt, continuation)
        if thresholds is None:
            return capture.forward(self.loaded, one).float(), {}
        with applied(self.loaded.model, thresholds, decode_from=len(prompt)) as tiles:
            logits = capture.forward(self.loaded, one).float()
        phases: tuple[Any, Any] = ("prefill", "decode")
        counts = {p: torch.stack([tiles[p].visited, tiles[p].skipped], -1) for p in phases}
        return logits, counts

    def tiles(
        self, prompt: Sequence[int], continuation: Sequence[int], *tiles: Any, **options: Any
    ) -> Any:
        self.asked.append(("tiles", options))
        geometry = GeometryConfig(prefill=tiles[0], decode=tiles[1])
        one = self._prompt(prompt, continuation)
        return capture._counted(self.loaded, one, geometry, options["floor"], options["each_step"])

    def generated(
        self,
        prompt: Sequence[int],
        tokens: int,
        ends: Sequence[int],
        thresholds: Thresholds | None = None,
    ) -> list[int]:
        self.asked.append(("generated", thresholds))
        assert list(ends) == [1]  # the tokenizer's
        return [5, 6, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "model"
    tiny.model("llama", sharpness=400.0, num_hidden_layers=2).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[Planted]:
    """Engines that were started."""
    started: list[Planted] = []

    def start(model: ModelConfig, location: Any, most: int, chunk: int | None) -> Planted:
        started.append(Planted(str(location), chunk, most))
        return started[-1]

    monkeypatch.setattr(served, "_started", start)
    return started


def config(folder: Path, **model: Any) -> RunConfig:
    return load_config({**CONFIG, "model": {"path": str(folder), **model}})


def rows(run: calibrate.Run, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def test_a_run_through_an_engine_is_the_run_through_transformers(
    folder: Path, tmp_path: Path, planted: list[Planted]
) -> None:
    wanted = calibrate.run(config(folder), tmp_path / "own")
    run = calibrate.run(config(folder, engine=ENGINE), tmp_path / "served")
    (engine,) = planted
    assert (engine.chunk, engine.longest) == (64, 272 + 7 + 1)
    assert {name for name, _ in engine.asked} == {"logits", "tiles"}
    assert run.stats.identity == wanted.stats.identity
    for phase in ("prefill", "decode"):
        assert torch.equal(run.stats.counts[phase], wanted.stats.counts[phase])
    for ours, theirs in zip(rows(run, "heldout.jsonl"), rows(wanted, "heldout.jsonl"), strict=True):
        assert ours == theirs  # settings, losses, tiles
    sections = [one.thresholds.model_dump(mode="json") for one in (run, wanted)]
    for section in sections:
        del section["provenance"]
    assert sections[0] == sections[1] and sections[0]["evidence"]["verdict"] == "passed"
    # Who measured stands in the file and in the folder.
    assert run.thresholds.provenance["engine"] == ENGINE
    assert wanted.thresholds.provenance["engine"] == "transformers"
    assert json.loads((run.folder / "run.json").read_text())["engine"] == ENGINE
    with pytest.raises(UserError, match=r"belongs to another config \(different: model\)"):
        calibrate.run(config(folder), run.folder)


def test_a_file_for_other_chunks_or_thresholds_of_1_is_not_measured(
    folder: Path, planted: list[Planted]
) -> None:
    chosen = config(folder, engine=ENGINE)
    loaded = served.serve(chosen)
    file = thresholds_for(loaded, chosen, {"prefill": (9.0, 9.0)})
    require_measurable(loaded, file, unguarded=False)
    with pytest.raises(UserError, match=r"must be below 1 .* `model.engine: transformers`"):
        require_measurable(loaded, file, unguarded=True)
    other = chosen.geometry.model_copy(
        update={"prefill": chosen.geometry.prefill.model_copy(update={"chunk": None})}
    )
    whole = thresholds_for(
        loaded, chosen.model_copy(update={"geometry": other}), {"prefill": (9.0, 9.0)}
    )
    with pytest.raises(UserError, match=r"chunks of 64 tokens, but .* for whole prompts"):
        require_measurable(loaded, whole, unguarded=False)


def test_generation_is_the_engine_s(folder: Path, planted: list[Planted]) -> None:
    chosen = config(folder, engine=ENGINE)
    loaded = served.serve(chosen)
    file = thresholds_for(loaded, chosen, {"decode": (9.0, 9.0)})
    written = tiny.tokenizer().decode([5, 6])
    prompt = Prompt("any", "heldout", 272, (7, 8), (9,), has_answer=True, answers=(written,))
    assert greedy_text(loaded, prompt, 9) == written
    dense = loaded.engine.logits(prompt.ids, prompt.continuation)[0]
    measured = compare(loaded, file, prompt, dense)
    found = with_generated(measured, loaded, file, prompt, "nothing", 9)
    assert found.losses["generated_drop"] == -100.0 and found.dense_generated == 0.0
    assert [one for one in planted[0].asked if one[0] == "generated"] == [
        ("generated", None),
        ("generated", file),
    ]


@pytest.mark.parametrize(
    ("changes", "context", "wanted"),
    [
        ({}, None, 272 + 7 + 1),
        ({}, 275, 275),
        ({"validation.generate": 128}, None, 272 + 128 + 1),
        ({"prompts.sources": [{"task": "file", "path": "a.csv"}]}, None, 385 + 7 + 1),
    ],
)
def test_the_longest_request_holds_prompt_continuation_and_a_token(
    folder: Path, changes: dict[str, Any], context: int | None, wanted: int
) -> None:
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())
    chosen = load_config({**CONFIG, "model": {"path": str(folder)}}, overrides)
    assert served.longest(chosen, context) == wanted


def test_other_votes_than_the_engine_s_are_refused_before_it_starts(
    folder: Path, planted: list[Planted]
) -> None:
    chosen = config(folder, engine=ENGINE)
    for heads in (1, 2):
        decode = chosen.geometry.decode.model_copy(update={"tile_heads": heads})
        geometry = chosen.geometry.model_copy(update={"decode": decode})
        other = chosen.model_copy(update={"geometry": geometry})
        if heads == 2:  # as many as share a KV head
            served.serve(other)
        else:
            with pytest.raises(UserError, match=r"tile_heads must be left out .* 2 query heads"):
                served.serve(other)
            assert planted == []


def test_layers_that_the_engine_does_not_run_have_a_reason(
    folder: Path, planted: list[Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(folder, engine=ENGINE)
    engine = Planted(str(folder), 64, 280)
    engine.depth = 4
    layers = served._layers(chosen.model, engine)
    assert [layer.reason is None for layer in layers] == [True, True, False, False]
    engine.shape = (8, 2, 16)
    with pytest.raises(UserError, match="no layer that can be calibrated"):
        served._layers(chosen.model, engine)


def test_what_an_engine_cannot_load_is_refused_before_anything_is_run(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"must load a folder or a hub id|truncated or damaged"):
        served.serve(config(file, engine=ENGINE))
    with pytest.raises(UserError, match=r"needs vLLM, which is not installed"):
        served.serve(config(folder, engine=ENGINE))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for given in (
        {**CONFIG, "model": {"path": str(folder), "engine": ENGINE}},
        config(folder, engine=ENGINE),
    ):
        with pytest.raises(UserError, match=r"must load the model itself, .* in memory"):
            calibrate.run(given, tmp_path / "run", model=model, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize(
    ("model", "law"),
    [
        ({"engine": ENGINE, "device": "cuda:1"}, "`device` must be auto"),
        ({"engine_options": {"block_size": 32}}, "`engine_options` must be left out"),
        ({"engine": ENGINE, "engine_options": {"quantization": "fp8"}}, "quantization"),
        ({"engine": "vllm"}, "vllm-native"),
    ],
)
def test_a_config_that_no_engine_fits_is_refused(
    folder: Path, model: dict[str, Any], law: str
) -> None:
    with pytest.raises(FileError, match=law):
        config(folder, **model)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (ENGINE, "model.engine: `vllm-native` needs vLLM, which is not installed"),
        ("vllm", "model.engine"),
    ],
)
def test_the_command_line_chooses_the_engine(
    folder: Path, tmp_path: Path, call: Callable[..., Result], engine: str, said: str
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({**CONFIG, "model": {"path": str(folder)}}))
    result = call("run", tmp_path / "c.yaml", "--engine", engine, "-o", tmp_path / "run")
    assert result.code == 2 and said in result.stderr
