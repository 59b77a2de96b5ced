"""One attention call of a layer as data: where it stands, and what is cut out of it."""

from __future__ import annotations

from typing import Any

import tiny
import torch

import skip_softmax as ss
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.meaning.call import quantised


def call(rows: int, kv_start: int = 0) -> LayerCall:
    """A call on 20 positions whose keys and queries say where they stand."""
    k = torch.arange(kv_start, 20.0).expand(2, 1, 4, -1).transpose(2, 3)
    q = torch.arange(20.0 - rows, 20.0).expand(2, 2, 4, -1).transpose(2, 3)
    return LayerCall(3, "prefill", q, k, -k, 0.5, True, 8, kv_start)


def test_a_call_knows_where_it_stands() -> None:
    for kv_start in (0, 5):
        assert (call(6, kv_start).kv_len, call(6, kv_start).position) == (20, 14)


def test_rows_come_with_the_keys_that_they_see() -> None:
    for kv_start in (0, 5):
        part = call(6, kv_start).rows(1, 4)
        assert part.q[0, 0, :, 0].tolist() == [15.0, 16.0, 17.0]
        assert part.k[0, 0, :, 0].tolist() == [float(i) for i in range(kv_start, 18)]
        assert torch.equal(part.v, -part.k)
        assert (part.position, part.kv_len, part.kv_start) == (15, 18, kv_start)
        assert (part.layer, part.phase, part.scale, part.window) == (3, "prefill", 0.5, 8)


def test_a_request_of_a_padded_batch_stands_where_it_would_alone() -> None:
    """The second request's first valid key is position 4 of the batch: its own position 0."""
    part = call(20).part(slice(1, 2), slice(4, 20), slice(4, 20), 0)
    assert part.q.shape == (1, 2, 16, 4)
    assert (part.position, part.kv_len) == (0, 16)


def test_rows_one_after_another_are_the_whole_call() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 6, 16), torch.randn(1, 1, 15, 16), torch.randn(1, 1, 15, 16)
    whole = LayerCall(0, "prefill", q, k, v, 0.25, True, 9, 5)

    def dense(part: LayerCall) -> torch.Tensor:
        out: torch.Tensor = ss.attention(part.q, part.k, part.v, **part.keywords)
        return out

    parts = [dense(whole.rows(start, start + 2)) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts, 2), dense(whole))


def test_an_fp8_cache_rounds_keys_and_values_in_every_call() -> None:
    model = tiny.model("llama", 400.0)
    tokens = tiny.tokens(60)

    def logits(handler: Any, **about: Any) -> torch.Tensor:
        with torch.no_grad(), intercepted(model, handler, **about):
            first = model(tokens[:, :50], use_cache=True)
            rest = model(tokens[:, 50:], past_key_values=first.past_key_values)
            return torch.cat([first.logits, rest.logits], 1)

    def dense(call: LayerCall) -> torch.Tensor:
        out: torch.Tensor = ss.attention(call.q, call.k, call.v, **call.keywords)
        return out

    def rounded(call: LayerCall) -> torch.Tensor:
        k, v = (x.clamp(-448, 448).to(torch.float8_e4m3fn).float() for x in (call.k, call.v))
        out: torch.Tensor = ss.attention(call.q, k, v, **call.keywords)
        return out

    found = logits(dense, kv_cache_dtype="fp8_e4m3")
    assert torch.equal(found, logits(rounded)) and not torch.equal(found, logits(dense))


def test_what_e4m3_cannot_hold_becomes_its_largest() -> None:
    x = torch.tensor([449.0, -1e9, 1.03, 2.0**-9, 2.0**-11, torch.inf])
    assert quantised(x).float().tolist() == [448.0, -448.0, 1.0, 2.0**-9, 0.0, 448.0]


def test_handlers_see_absolute_positions() -> None:
    model = tiny.model("gemma3")
    seen: list[tuple[int, str, int, int]] = []

    def handler(call: LayerCall) -> torch.Tensor:
        seen.append((call.layer, call.phase, call.kv_start, call.kv_len))
        return call.q.new_zeros(call.q.shape)

    with torch.no_grad(), intercepted(model, handler):
        out = model(tiny.tokens(100), use_cache=True)
        model(tiny.tokens(1), past_key_values=out.past_key_values)
    assert seen[:3] == [(i, "prefill", 0, 100) for i in range(3)]
    # A sliding cache holds the last 47 keys and the new one; the full layer holds all.
    assert seen[3:] == [(0, "decode", 53, 101), (1, "decode", 0, 101), (2, "decode", 53, 101)]
