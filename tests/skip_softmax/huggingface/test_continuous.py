"""Continuous batching inside `applied`: requests of a packed step skip as they would alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers.generation.continuous_batching import (
    continuous_api,
    initialization,
    model_runner,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from skip_softmax import Thresholds, applied, decode_attention
from skip_softmax.huggingface.applied import PhaseCounts
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.meaning.counts import TileCounts
from skip_softmax.thresholds.types import (
    LayerOverride,
)

LENGTHS = (120, 35, 97)  # in tiles of 16; the second stays below the floor
NEW = 4
FACTOR = 55.0


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every manager collects the garbage of the whole process when it ends, which takes most of the time."""
    monkeypatch.setattr(continuous_api.gc, "collect", lambda: 0)


def model(family: str = "llama", attention: str = "sdpa") -> Any:
    built: Any = tiny.model(family, 400.0)  # so sharp that tiles can be skipped
    built.set_attn_implementation(attention)
    built.generation_config.eos_token_id = None  # random models end by chance
    return built


def file(of: Any, factor: float) -> Thresholds:
    """One number for the model, and in one layer one per head."""
    layers = inspect_layers(of)
    q_heads, kv_heads, _ = layers[0].shape
    prefill = tuple(factor * (1 - head / 8) for head in range(q_heads))
    decode = tuple(factor * (1 - head / 8) for head in range(kv_heads))
    each = LayerOverride(layer=1, prefill=prefill, decode=decode)
    return tiny.thresholds(layers, factor, layers=(each,))


def prompts(*lengths: int) -> list[list[int]]:
    return [tiny.tokens(length, length)[0].tolist() for length in lengths]


def batched(of: Any, texts: list[list[int]], new: int = NEW, **settings: Any) -> list[Any]:
    """Tokens that continuous batching writes, or the error of a request."""
    settings = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 512, **settings}
    kept = {key: settings.pop(key) for key in ("persistent_manager", "warmup") if key in settings}
    outputs = of.generate_batch(
        texts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
        **kept,
    )
    return [output.error or output.generated_tokens for output in outputs.values()]


def alone(of: Any, texts: list[list[int]], new: int = NEW) -> list[Any]:
    """Tokens that `generate` writes, one request after another."""
    arguments = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    written = [of.generate(torch.tensor([text]), **arguments)[0] for text in texts]
    return [ids[len(text) :].tolist() for ids, text in zip(written, texts, strict=True)]


def same(ours: PhaseCounts, theirs: PhaseCounts) -> bool:
    def equal(a: TileCounts, b: TileCounts) -> bool:
        return torch.equal(a.visited, b.visited) and torch.equal(a.skipped, b.skipped)

    return all(equal(ours[phase], theirs[phase]) for phase in ours)


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("gemma3", "sdpa")])
def test_a_batch_writes_and_counts_what_generate_does_for_each_request(
    family: str, attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`generate_batch` turns eager attention into `paged|eager`; windowed layers keep few keys."""
    one, texts = model(family, attention), prompts(*LENGTHS)
    own = batched(one, texts)
    assert own == alone(one, texts)
    with applied(one, file(one, 0.0)) as counts:
        assert batched(one, texts) == own
    assert int(counts["prefill"].visited.min()) > 0
    with applied(one, file(one, FACTOR)) as counts, caplog.at_level(logging.WARNING):
        ours = batched(one, texts)
    with applied(one, file(one, FACTOR)) as expected:
        assert ours == alone(one, texts)
    assert same(counts, expected)
    assert all(int(counts[phase].skipped.sum()) > 0 for phase in counts)
    assert "model's own attention" not in caplog.text
    assert type(one.config._attn_implementation) is str
    assert one.config._attn_implementation == attention


def test_requests_of_a_step_decode_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In full layers, whose keys are in pages; a window's keys are in a ring."""
    one, texts, sizes = model("gemma3"), prompts(*LENGTHS), []

    def decode(q: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(q.shape[0])
        return decode_attention(q, *arguments, **keywords)

    monkeypatch.setattr("skip_softmax.huggingface.applied.decode_attention", decode)
    with applied(one, file(one, FACTOR)):
        batched(one, texts)
    assert sizes == ([1] * 3 + [3] + [1] * 3) * (NEW - 1), "layers 0 and 2 have a window"


def test_flash_attention_is_given_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function, which a CPU cannot run, is asked for the four tokens of the inspection alone."""
    one, texts = model("gemma3"), prompts(120)
    with applied(one, file(one, FACTOR)) as expected:
        written = alone(one, texts)

    def flash(module: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
        assert "cache" not in given
        return sdpa_attention_forward(module, q, k, v, None, scaling=given["scaling"])

    name = "flash_attention_2"
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, name, flash)
    one.config._attn_implementation_internal = name
    with applied(one, file(one, FACTOR)) as counts:
        assert batched(one, texts) == written
    assert same(counts, expected)


def test_steps_of_single_tokens_whose_keys_a_kernel_would_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flash attention's fast path on CUDA; it also takes a prompt of one token, which is no decode step."""
    one, texts = model(), prompts(*LENGTHS)
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    tables = []
    with applied(one, file(one, FACTOR)) as counts:
        hook = one.model.register_forward_pre_hook(
            lambda _, __, keywords: tables.append(keywords["block_table"]), with_kwargs=True
        )
        ours = batched(one, texts)
        single = batched(one, prompts(1))
        hook.remove()
    assert [table is None for table in tables] == [True, *[False] * (NEW - 1), *[False] * NEW]
    with applied(one, file(one, FACTOR)) as expected:
        assert [*ours, *single] == alone(one, [*texts, *prompts(1)])
    assert same(counts, expected)


def test_chunks_of_a_prompt_take_the_threshold_of_their_end() -> None:
    """The last chunk is one token of the prompt, not a decode step."""
    one, [text] = model(), prompts(129)
    with applied(one, file(one, FACTOR)) as counts:
        ours = batched(one, [text], max_batch_tokens=64)
    cache = transformers.DynamicCache(config=one.config)
    with torch.no_grad(), applied(one, file(one, FACTOR), decode_from=129) as expected:
        for chunk in (text[:64], text[64:128], text[128:]):
            logits = one(torch.tensor([chunk]), past_key_values=cache).logits
        written = [int(logits[0, -1].argmax())]
        while len(written) < NEW:
            logits = one(torch.tensor([written[-1:]]), past_key_values=cache).logits
            written.append(int(logits[0, -1].argmax()))
    assert [written] == ours
    assert same(counts, expected)
    assert int(counts["prefill"].skipped.sum()) > 0
    tiles = sum(-(-(129 + step) // 16) for step in range(1, NEW))
    assert counts["decode"].visited.tolist() == [[tiles] * 2] * 3


def test_generated_tokens_that_are_read_again_are_decode_steps() -> None:
    """A cache for one request and a half: the second request loses its keys while it writes."""
    one, texts = model(), prompts(60, 61)
    calls: list[tuple[str, int, int]] = []

    def handler(call: LayerCall) -> torch.Tensor:
        if call.layer == 0:
            calls.append((call.phase, call.position, call.q.shape[2]))
        scores = torch.nn.functional.scaled_dot_product_attention
        rows = torch.arange(call.position, call.kv_len)[:, None]
        seen = torch.arange(call.kv_len) <= rows
        return scores(call.q, call.k, call.v, seen, scale=call.scale, enable_gqa=True)

    own = alone(one, texts, 40)
    with intercepted(one, handler):
        assert batched(one, texts, 40, num_blocks=10, safety_margin=0.0) == own
    assert all(position + rows <= 61 for phase, position, rows in calls if phase == "prefill")
    steps = [(position, rows) for phase, position, rows in calls if phase == "decode"]
    assert all(position >= 60 for position, _ in steps)
    assert max(rows for _, rows in steps) > 1, "nothing was read again: this test shows nothing"


def test_rows_and_keys_that_pad_a_step_belong_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and compiled steps, which we refuse, pad; here a plain step is padded."""
    one, texts = model("gemma3"), prompts(*LENGTHS)
    before, widths = model_runner.ModelRunner.__init__, set()

    def padding(self: Any, *arguments: Any, **keywords: Any) -> None:
        before(self, *arguments, **keywords)
        self.pad_inputs = True

    monkeypatch.setattr(model_runner.ModelRunner, "__init__", padding)
    with applied(one, file(one, FACTOR)) as counts:
        hook = one.model.register_forward_pre_hook(
            lambda _, __, keywords: widths.add(keywords["input_ids"].shape[1]), with_kwargs=True
        )
        ours = batched(one, texts, warmup=False)
        hook.remove()
    assert widths == {256, 64}, "252 rows, and 3 in a step of decode"
    with applied(one, file(one, FACTOR)) as expected:
        assert ours == alone(one, texts)
    assert same(counts, expected)


def test_a_prompt_that_is_in_the_cache_is_not_read_again() -> None:
    """The manager that keeps it ends with the block, whose numbers its keys come from."""
    one, [text] = model(), prompts(97)
    with applied(one, file(one, 0.0)) as counts:
        first = batched(one, [text], persistent_manager=True)
        visited = int(counts["prefill"].visited.sum())
        assert batched(one, [text], persistent_manager=True) == first
        assert 0 < int(counts["prefill"].visited.sum()) - visited < visited / 2
        assert hasattr(one, "_cached_continuous_batching_manager")
    assert not hasattr(one, "_cached_continuous_batching_manager")
    assert batched(one, [text]) == first


@contextlib.contextmanager
def refused(of: Any, message: str) -> Iterator[None]:
    """The call raises, and leaves the model as it was."""
    with applied(of, file(of, FACTOR)) as counts:
        with pytest.raises(ValueError, match=message):
            yield
        assert of.config._attn_implementation == "eager"
        alone(of, prompts(70), 2)
        assert counts.sparsity("prefill") > 0.01
    assert type(of.config._attn_implementation) is str


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cuda_graph": (False, True)}, r"without CUDA graphs, .* is \(False, True\); pass"),
        ({"decode_compile_config": object()}, r"without torch.compile, .* `decode_compile_config`"),
    ],
)
def test_steps_that_could_not_tell_requests_apart_are_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU transformers itself drops these settings, so what it would resolve is planted."""
    settings = {"use_cuda_graph": False, **settings}
    resolved = transformers.ContinuousBatchingConfig(**settings)
    monkeypatch.setattr(
        continuous_api, "resolve_continuous_batching_config", lambda *_, **__: resolved
    )
    one = model(attention="eager")
    with refused(one, message):
        batched(one, prompts(70))


def test_an_fp8_cache_is_refused() -> None:
    of = model()
    own = file(of, FACTOR)
    fp8 = own.model_copy(
        update={"model": own.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})}
    )
    with applied(of, fp8), pytest.raises(ValueError, match="cache in the model's dtype, but these"):
        of.init_continuous_batching()


def test_compiled_steps_are_refused() -> None:
    one = model(attention="eager")
    with refused(one, "without torch.compile"):
        batched(one, prompts(70), default_compile_level=1)


def test_a_manager_from_outside_is_refused() -> None:
    one, texts = model(attention="eager"), prompts(70)
    own = batched(one, texts, persistent_manager=True)
    with refused(one, r"must be made in the `applied` block .*destroy_cached_continuous"):
        batched(one, texts)
    assert batched(one, texts, persistent_manager=True) == own
    one.destroy_cached_continuous_batching_manager()
    one.set_attn_implementation("sdpa")
    manager = one.init_continuous_batching(
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=16, num_blocks=64, max_batch_tokens=512
        )
    )
    with applied(one, file(one, FACTOR)) as counts:
        manager.start()
        manager.add_requests(texts, max_new_tokens=2)
        error = manager.get_result(timeout=20).error
        manager.stop()
    assert "this one was made outside" in error
    assert int(counts["prefill"].visited.sum()) == 0


def test_attention_that_is_set_inside_a_block_stays_inside_it() -> None:
    one, text = model(), torch.tensor(prompts(97))
    with torch.no_grad(), applied(one, file(one, FACTOR)) as counts:
        sdpa = one(text).logits
        skipped = counts["prefill"].skipped
        one.set_attn_implementation({"": "eager"})
        torch.testing.assert_close(one(text).logits, sdpa, atol=2e-4, rtol=2e-4)
        assert one.config._attn_implementation == "eager"
    assert torch.equal(counts["prefill"].skipped, 2 * skipped)
    assert int(skipped.sum()) > 0
    assert type(one.config._attn_implementation) is str
    assert one.config._attn_implementation == "sdpa", "as it was before the block"


def test_nothing_is_left_of_a_block() -> None:
    def patched() -> list[Any]:
        owners = transformers.PreTrainedModel, transformers.GenerationMixin
        return [dict(vars(owner)) for owner in (*owners, model_runner.ModelRunner)]

    before, one = patched(), model()
    with applied(one, file(one, 0.0)):
        assert patched() != before
    assert patched() == before
