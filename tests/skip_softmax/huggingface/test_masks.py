"""What a mask's recipe says of the keys that each row sees, and when it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from transformers.masking_utils import eager_mask, sdpa_mask, sliding_window_causal_mask_function

from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.huggingface.layers import inspect_layers
from skip_softmax.huggingface.masks import MaskRecipe, Seen, mask_recipe, read


def recipe(attention: str = "sdpa", **changes: Any) -> MaskRecipe:
    """One request of five rows behind three keys of a cache."""
    given = {"batch_size": 1, "q_length": 5, "kv_length": 8, "q_offset": 3, **changes}
    found = mask_recipe(eager_mask if attention == "eager" else sdpa_mask, attention, **given)
    assert isinstance(found, MaskRecipe)
    return found


def test_windows_are_known_without_asking_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gemma3")
    inspect_layers(model)
    monkeypatch.setattr("skip_softmax.huggingface.masks.torch.stack", None)
    seen = []
    with torch.no_grad(), intercepted(model, lambda call: seen.append(call.window) or call.q):  # type: ignore[func-returns-value]
        model(tiny.tokens(100), use_cache=False)
    assert seen == [48, None, 48]


@pytest.mark.parametrize("window", [None, 30])
def test_a_mask_that_differs_in_one_row_is_found_out(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skip_softmax.huggingface.masks._ASKED_AT_ONCE", 1000)  # seven rows

    def with_odd(odd: int | None) -> MaskRecipe:
        def mask(batch: Any, head: Any, row: Any, key: Any) -> torch.Tensor:
            seen = (key <= row) | (row == odd if odd is not None else False)
            return seen if window is None else seen & (key > row - window)

        return recipe(
            q_length=140, kv_length=140, q_offset=0, mask_function=mask, allow_is_causal_skip=False
        )

    assert with_odd(None).pattern(window) == (True, window)
    for row in (0, 1, 69, 138):
        assert with_odd(row).pattern(window) is None


def test_a_window_that_the_layer_does_not_name_is_the_mask_s() -> None:
    assert recipe(mask_function=sliding_window_causal_mask_function(4)).pattern() == (True, 4)

    def mine(batch: Any, head: Any, row: Any, key: Any) -> Any:
        return (key <= row) & (key > row - 4)

    assert recipe(mask_function=mine, local_size=4).pattern() == (True, 4)
    assert recipe(mask_function=mine).pattern() is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whoever_reads_a_mask_is_given_it(attention: str) -> None:
    made = recipe(
        attention, dtype=torch.float64, mask_function=sliding_window_causal_mask_function(2)
    )
    rows, keys = torch.arange(5)[:, None] + 3, torch.arange(8)
    wanted = ((keys <= rows) & (keys > rows - 2))[None, None]
    assert (made.shape, made.dim(), len(made)) == (wanted.shape, 4, 1)
    assert made.dtype == (torch.float64 if attention == "eager" else torch.bool)
    assert "_made" not in vars(made), "nothing was read so far"
    cut = made[..., :6]
    assert type(cut) is torch.Tensor
    assert torch.equal((cut == 0) if attention == "eager" else cut, wanted[..., :6])
    assert made.to("cpu").contiguous() is made
    assert torch.equal(made.to(torch.float16), made.built.to(torch.float16))


def test_there_is_no_mask_where_the_model_would_have_none() -> None:
    plain = {"batch_size": 2, "q_length": 4, "kv_length": 4}
    assert mask_recipe(sdpa_mask, "sdpa", **plain) is None
    assert mask_recipe(sdpa_mask, "sdpa", **plain, attention_mask=torch.ones(2, 4).bool()) is None
    assert mask_recipe(eager_mask, "eager", **plain) is not None
    assert mask_recipe(sdpa_mask, "sdpa", **plain, allow_is_causal_skip=False) is not None
    assert mask_recipe(sdpa_mask, "sdpa", **plain, local_size=4) is not None


def with_padding(padding: list[list[int]], q_len: int, q_offset: int = 0) -> MaskRecipe:
    mask = torch.tensor(padding, dtype=torch.bool)
    return recipe(
        batch_size=len(mask), q_length=q_len, q_offset=q_offset, kv_length=q_offset + q_len,
        attention_mask=mask, allow_is_causal_skip=False,
    )  # fmt: skip


def test_padding_on_either_side_leaves_one_span_per_request() -> None:
    spans = with_padding([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], 4).spans
    assert spans == [(2, 4), (0, 3), (0, 0)]
    assert with_padding([[1, 0, 1, 1]], 4).spans is None, "padding between valid tokens"
    assert with_padding([[1, 1]], 4).spans == [(0, 2)], (
        "keys that the mask does not reach are hidden"
    )


def seen_by(found: MaskRecipe, rows: int, keys: int) -> Seen:
    q, k = torch.zeros(found.batch, 1, rows, 4), torch.zeros(found.batch, 1, keys, 4)
    seen = read("sdpa", torch.nn.Identity(), q, k, found, {})
    assert isinstance(seen, Seen), seen
    return seen


def test_a_batch_without_padding_is_one_call() -> None:
    """Two new rows behind three keys of a cache."""
    parts = list(seen_by(with_padding([[1] * 5, [1] * 5], 2, 3), 2, 5).requests(2))
    assert parts == [(slice(0, 2), slice(0, 2), slice(0, 5), 0, 0)]


def test_a_padded_batch_is_one_call_per_request_that_has_rows() -> None:
    """The second request's keys start at position 2 of the batch; the third has only padding."""
    padding = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    parts = list(seen_by(with_padding(padding, 2, 3), 2, 5).requests(2))
    assert parts == [
        (slice(0, 1), slice(0, 2), slice(0, 5), 0, 0),
        (slice(1, 2), slice(0, 2), slice(2, 5), 0, 2),
    ]


def given(rows: int, keys: int, mask: Any, **keywords: Any) -> tuple[Any, ...]:
    q, k = torch.zeros(1, 1, rows, 4), torch.zeros(1, 1, keys, 4)
    return torch.nn.Identity(), q, k, mask, keywords


@pytest.mark.parametrize(
    ("attention", "rows", "keys", "causal", "wanted"),
    [
        ("sdpa", 4, 4, None, (True, 0, 4)),  # a module that does not say is causal
        ("sdpa", 4, 4, False, (False, 0, 4)),
        ("sdpa", 4, 9, True, (True, 0, 4)),  # a static cache that nothing else was written into
        ("sdpa", 4, 9, False, (False, 5, 9)),  # an encoder's states
        ("sdpa", 1, 9, True, (True, 8, 9)),
        ("eager", 4, 9, True, (False, 5, 9)),  # without a mask it hides nothing
        ("flash_attention_2", 4, 9, True, (True, 5, 9)),
    ],
)
def test_what_no_mask_means_is_said_by_the_attention(
    attention: str, rows: int, keys: int, causal: bool | None, wanted: tuple[bool, int, int]
) -> None:
    seen = read(attention, *given(rows, keys, None, is_causal=causal))
    assert isinstance(seen, Seen)
    assert (seen.causal, seen.q_offset, seen.kv_len) == wanted


@pytest.mark.parametrize(
    ("attention", "arguments", "reason"),
    [
        ("mine", lambda: given(4, 4, None), "attention implementation 'mine'"),
        ("sdpa", lambda: given(5, 8, torch.zeros(5, 8)), "outside transformers' mask interface"),
        ("sdpa", lambda: given(5, 9, recipe()), "keys or rows that its mask does not speak of"),
        ("sdpa", lambda: given(4, 8, recipe()), "keys or rows that its mask does not speak of"),
        ("sdpa", lambda: given(5, 6, recipe(kv_length=6)), "rows behind the last of their keys"),
        (
            "flash_attention_2",
            lambda: given(5, 8, recipe("flash_attention_2"), sliding_window=3),
            "a mask and a layer that disagree",
        ),
        ("flex_attention", lambda: given(4, 4, None), "no mask where one was expected"),
    ],
)
def test_what_cannot_be_told_has_a_reason(
    attention: str, arguments: Callable[[], tuple[Any, ...]], reason: str
) -> None:
    assert reason in str(read(attention, *arguments()))
