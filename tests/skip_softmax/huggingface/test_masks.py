"""What a mask's recipe says of the keys that each row sees."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from skip_softmax.huggingface.intercept import intercepted
from skip_softmax.huggingface.masks import MaskRecipe


def test_windows_are_known_without_asking_the_mask() -> None:
    model = tiny.model("gemma3")
    asked = MaskRecipe._recognise
    with torch.no_grad(), intercepted(model, lambda call: call.q):
        MaskRecipe._recognise = None  # type: ignore[assignment, method-assign]
        try:
            model(tiny.tokens(100))
        finally:
            MaskRecipe._recognise = asked  # type: ignore[method-assign]


@pytest.mark.parametrize("window", [None, 30])
def test_a_mask_that_differs_in_one_row_is_found_out(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skip_softmax.huggingface.masks._ASKED_AT_ONCE", 1000)  # seven rows

    def recipe(odd: int | None) -> MaskRecipe:
        def mask(batch: Any, head: Any, row: Any, key: Any) -> torch.Tensor:
            seen = (key <= row) | (row == odd if odd is not None else False)
            return seen if window is None else seen & (key > row - window)

        return MaskRecipe({"batch_size": 1, "q_length": 140, "mask_function": mask}, {})

    assert recipe(None).causal(window) is True
    for row in (0, 1, 69, 138):
        assert recipe(row).causal(window) is None


def recipe_of(padding: list[list[int]], q_len: int, q_offset: int = 0) -> MaskRecipe:
    mask = torch.tensor(padding)
    arguments = {
        "batch_size": len(mask),
        "q_length": q_len,
        "q_offset": q_offset,
        "attention_mask": mask,
    }
    return MaskRecipe(arguments, {None: True})


def test_padding_on_either_side_leaves_one_span_per_request() -> None:
    assert recipe_of([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], 4).spans == [
        (2, 4),
        (0, 3),
        (0, 0),
    ]
    assert recipe_of([[1, 0, 1, 1]], 4).spans is None, "padding between valid tokens"


def test_a_batch_without_padding_is_one_call() -> None:
    """Two new rows behind three keys of a cache."""
    q = torch.zeros(2, 1, 2, 4)
    parts = list(recipe_of([[1] * 5, [1] * 5], 2, q_offset=3).requests(q))
    assert parts == [(slice(0, 2), slice(0, 2), slice(0, 5), 0)]


def test_a_padded_batch_is_one_call_per_request_that_has_rows() -> None:
    """The second request's keys start at position 2 of the batch; the third has only padding."""
    q = torch.zeros(3, 1, 2, 4)
    padding = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    parts = list(recipe_of(padding, 2, q_offset=3).requests(q))
    assert parts == [
        (slice(0, 1), slice(0, 2), slice(0, 5), 0),
        (slice(1, 2), slice(0, 2), slice(2, 5), 0),
    ]
