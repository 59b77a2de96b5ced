"""One prompt at a time through the engine of a calibration: tiles, numbers and logits as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted_file
import pytest
import tiny
import torch

import skip_softmax as ss
from skip_softmax.thresholds.types import DecodeGeometry, PrefillGeometry

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CHUNK, FLOOR, PROMPT, STEPS = 64, 100, 310, 15  # the continuation crosses the end of a chunk
PREFILL = PrefillGeometry(tile_q=16, tile_kv=32, dense_last=8, chunk=CHUNK)
DECODE = DecodeGeometry(tile_kv=32)
PHASES = ("prefill", "decode")
OPTIONS: dict[str, Any] = {"compilation_config": {"custom_ops": ["none"]}, "block_size": 32}
IDS = tiny.tokens(PROMPT)[0].tolist(), tiny.tokens(STEPS, 1)[0].tolist()


@pytest.fixture(scope="module", params=[None, 170], ids=["full", "window"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with full attention, or with a sliding window."""
    path = tmp_path_factory.mktemp("model")
    built: Any = tiny.model(
        "mistral",
        sharpness=400.0,
        hidden_size=128,
        num_hidden_layers=2,
        head_dim=32,
        sliding_window=request.param,
    )
    built.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    from skip_softmax.vllm.calibrating import Engine

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION")  # plain data is all that is sent
        started = Engine(str(folder), dtype="float32", longest=600, chunk=CHUNK, options=OPTIONS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def thresholds(folder: Path) -> ss.Thresholds:
    return planted_file.thresholds(
        folder,
        geometry={"prefill": PREFILL, "decode": DECODE},
        min_kv_len={"prefill": FLOOR, "decode": FLOOR},
        scale_factor={"prefill": 95.0, "decode": 20.0},
        layers=[{"layer": 1, "prefill": [90.0, 60.0, 0.0, 30.0], "decode": [4.0, 16.0]}],
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def passed(model: Any) -> torch.Tensor:
    """Logits of the last prompt token and the continuation, in one pass."""
    prompt, continuation = IDS
    with torch.no_grad():
        logits: torch.Tensor = model(
            torch.tensor([[*prompt, *continuation]]), use_cache=False
        ).logits
    return logits[0, -STEPS - 1 :]


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted[:, : found.shape[1]], atol=2e-4, rtol=0)


def test_the_layers_are_the_model_s(engine: Any, model: Any) -> None:
    from skip_softmax.huggingface.layers import inspect_layers

    keys = ("index", "name", "q_heads", "kv_heads", "head_dim", "window")
    ours, theirs = (
        [[getattr(layer, key) for key in keys] for layer in layers]
        for layers in (engine.layers, inspect_layers(model))
    )
    assert ours == theirs
    assert (engine.depth, engine.vocabulary, engine.shape) == (2, tiny.VOCABULARY, (4, 2, 32))


@pytest.mark.parametrize("each_step", [False, True])
def test_tiles_of_the_dense_pass_are_those_of_transformers(
    engine: Any, model: Any, each_step: bool
) -> None:
    from calibrate.model.load import LoadedModel
    from calibrate.prompts.build import Prompt
    from calibrate.schema import GeometryConfig
    from calibrate.statistics import capture
    from skip_softmax.huggingface.layers import inspect_layers

    loaded = LoadedModel(model, None, "tiny", "0", inspect_layers(model), 1024, "float32")
    geometry = GeometryConfig(prefill=PREFILL, decode=DECODE)
    wanted = capture.empty_statistics(loaded, geometry, [PROMPT], FLOOR)
    prompt = Prompt("text", "calibration", PROMPT, *map(tuple, IDS), has_answer=False)
    dense = capture.observe(loaded, prompt, wanted, geometry, samples=each_step)
    logits, tiles = engine.tiles(*IDS, PREFILL, DECODE, floor=FLOOR, each_step=each_step)
    near(logits, dense)
    found = wanted.like()
    for layer, phase, _, histogram in tiles:
        found.add(layer, phase, 0, histogram)
    for phase in PHASES:
        assert torch.equal(found.counts[phase], wanted.counts[phase])
        torch.testing.assert_close(found.mass[phase], wanted.mass[phase], rtol=1e-3, atol=1e-4)
    steps = {kv_len for _, phase, kv_len, _ in tiles if phase == "decode"}
    assert len(steps) == (STEPS if each_step else 1)


def test_numbers_skip_what_they_skip_in_transformers(
    engine: Any, model: Any, thresholds: ss.Thresholds
) -> None:
    with ss.applied(model, thresholds, decode_from=PROMPT) as wanted:
        sparse = passed(model)
    logits, counts = engine.logits(*IDS, thresholds)
    near(logits, sparse)
    for phase in PHASES:
        assert (
            counts[phase].tolist()
            == torch.stack([wanted[phase].visited, wanted[phase].skipped], -1).tolist()
        )
        visited, skipped = counts[phase].sum((0, 1)).tolist()
        assert 0.01 < skipped / visited < 0.98, phase
    # And nothing stays behind.
    dense, counts = engine.logits(*IDS)
    near(dense, passed(model))
    assert all(int(counts[phase][..., 1].sum()) == 0 for phase in PHASES)


def test_generated_tokens_are_those_of_transformers(
    engine: Any, model: Any, thresholds: ss.Thresholds
) -> None:
    def by_transformers() -> list[int]:
        given, written = torch.tensor([IDS[0]]), list[int]()
        cache = None
        with torch.no_grad():
            while len(written) < 12:
                out = model(given, past_key_values=cache, use_cache=True)
                cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
                written.append(int(given))
        return written

    dense = by_transformers()
    assert engine.generated(IDS[0], 12, []) == dense
    with ss.applied(model, thresholds):
        assert engine.generated(IDS[0], 12, [], thresholds) == by_transformers()
    end = dense[4]
    assert engine.generated(IDS[0], 12, [end]) == dense[: dense.index(end) + 1]


def test_numbers_for_other_chunks_are_refused(engine: Any, thresholds: ss.Thresholds) -> None:
    whole = thresholds.model_copy(
        update={
            "geometry": thresholds.geometry.model_copy(
                update={"prefill": PREFILL.model_copy(update={"chunk": None})}
            )
        }
    )
    with pytest.raises(ValueError, match="in chunks of 64 tokens, and they are for prompts whole"):
        engine.logits(*IDS, whole)


def test_a_request_that_the_engine_would_cut_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match=r"within the 600 tokens .* got 310 and 291 to generate"):
        engine.generated(IDS[0], 291, [])


def test_two_ranks_count_and_skip_in_their_heads_what_one_does_in_all(
    engine: Any, folder: Path, thresholds: ss.Thresholds, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skip_softmax.vllm.calibrating import Engine

    if engine.layers[0].window is not None:
        pytest.skip("once is enough")
    logits, counts = engine.logits(*IDS, thresholds)
    _, tiles = engine.tiles(*IDS, PREFILL, DECODE, floor=FLOOR)
    engine.close()  # the last test of this model
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # else they want a NUMA node each
    two = Engine(
        str(folder),
        dtype="float32",
        longest=600,
        chunk=CHUNK,
        options={**OPTIONS, "tensor_parallel_size": 2},
    )
    try:
        assert two.layers == engine.layers
        found, theirs = two.logits(*IDS, thresholds)
        near(found, logits)
        for phase in PHASES:
            assert theirs[phase].tolist() == counts[phase].tolist()
        _, split = two.tiles(*IDS, PREFILL, DECODE, floor=FLOOR)
        for ours, whole in zip(split, tiles, strict=True):
            assert ours[:3] == whole[:3]
            assert torch.equal(ours[3].counts, whole[3].counts) and ours[3].rows == whole[3].rows
    finally:
        two.close()
