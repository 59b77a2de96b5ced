"""Which requests of a batch decode, and where their tensors are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def batch(
    lengths: list[int], kv_lens: list[int], prompts: list[bool] | None, **changes: Any
) -> Any:
    """Of vLLM's own class; padding rows have no tokens and no keys."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(kv_lens, dtype=torch.int32),
        "num_reqs": len(lengths),
        "num_actual_tokens": sum(lengths) + 3,
        "max_query_len": max(lengths),
        "max_seq_len": max(kv_lens),
        "block_table_tensor": torch.arange(4 * len(lengths), dtype=torch.int32).view(-1, 4),
        "slot_mapping": torch.zeros(sum(lengths) + 3, dtype=torch.int64),
        "is_prefilling": None if prompts is None else torch.tensor(prompts),
    }
    return CommonAttentionMetadata(**{**fields, **changes})


def built(common: Any, *, capture: bool = False, decode_from: int | None = None) -> Any:
    from skip_softmax.vllm.batch import SkipSoftmaxBuilder

    self: Any = SimpleNamespace(replays=False, layers=[SimpleNamespace(decode_from=decode_from)])
    if capture:
        return SkipSoftmaxBuilder.build_for_cudagraph_capture(self, common).stretches
    return SkipSoftmaxBuilder.build(self, 0, common).stretches


def test_the_last_token_of_a_prompt_is_prefill_though_it_comes_alone() -> None:
    decode, prefill = built(batch([1, 1, 1, 5], [70, 9, 33, 5], [False, False, True, True]))
    assert (decode.phase, decode.tokens, decode.longest_q) == ("decode", slice(0, 2), 1)
    assert decode.kv_lens.tolist() == [70, 9] and decode.table.tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert (prefill.phase, prefill.tokens, prefill.longest_q) == ("prefill", slice(2, 8), 5)
    assert prefill.q_starts.tolist() == [2, 3, 8] and prefill.kv_lens.tolist() == [33, 5]
    assert prefill.table[0].tolist() == [8, 9, 10, 11]


def test_a_batch_in_any_order_is_cut_where_the_phase_changes() -> None:
    stretches = built(batch([1, 4, 1], [8, 4, 9], [False, True, False]))
    assert [(s.phase, s.tokens) for s in stretches] == [
        ("decode", slice(0, 1)), ("prefill", slice(1, 5)), ("decode", slice(5, 6)),
    ]  # fmt: skip


def test_several_decode_tokens_of_a_request_are_each_a_request_with_the_keys_it_sees() -> None:
    (decode,) = built(batch([1, 3], [70, 12], [False, False]))
    assert decode.kv_lens.tolist() == [70, 10, 11, 12]
    assert decode.table[:, 0].tolist() == [0, 4, 4, 4]
    assert decode.tokens == slice(0, 4)


@pytest.mark.parametrize(
    ("rows", "kv_len", "phases"),
    [
        (5, 8, [("prefill", slice(0, 5), [8])]),
        (5, 12, [("prefill", slice(0, 3), [10]), ("decode", slice(3, 5), [11, 12])]),
        (3, 13, [("decode", slice(0, 3), [11, 12, 13])]),
    ],
    ids=["before", "across", "behind"],
)
def test_a_calibration_says_where_a_prompt_s_continuation_begins(
    rows: int, kv_len: int, phases: list[tuple[str, slice, list[int]]]
) -> None:
    stretches = built(batch([rows], [kv_len], [True]), decode_from=10)
    assert [(s.phase, s.tokens, s.kv_lens.tolist()) for s in stretches] == phases
    for stretch in stretches:
        assert stretch.table[:, 0].tolist() == [0] * len(stretch.kv_lens)
        if stretch.phase == "prefill":
            assert stretch.q_starts.tolist() == [0, stretch.tokens.stop]
            assert stretch.longest_q == stretch.tokens.stop


def test_rows_that_pad_a_batch_belong_to_no_stretch() -> None:
    (decode,) = built(batch([1, 1, 0, 0], [7, 8, 0, 0], [False] * 4))
    assert decode.kv_lens.tolist() == [7, 8] and decode.tokens == slice(0, 2)


def test_a_captured_batch_decodes_in_the_tensors_that_are_filled_at_every_replay() -> None:
    common = batch([1, 1, 1], [5, 5, 5], None)
    (decode,) = built(common, capture=True)
    assert decode.phase == "decode"
    assert decode.kv_lens.data_ptr() == common.seq_lens.data_ptr()
    assert decode.table.data_ptr() == common.block_table_tensor.data_ptr()


def test_a_prompt_s_last_token_stops_skipping_in_the_step_that_may_replay_a_graph() -> None:
    from skip_softmax.vllm.attend import SkipSoftmaxImpl
    from skip_softmax.vllm.batch import SkipSoftmaxBuilder

    read = torch.tensor([3.0, 4.0])
    layer: Any = SimpleNamespace(
        factors={"decode": read}, given={"decode": read.clone()}, decode_from=None
    )
    layer.pause_decode = lambda pause: SkipSoftmaxImpl.pause_decode(layer, pause)
    self: Any = SimpleNamespace(replays=True, paused=False, layers=[layer])

    def step(lengths: list[int], kv_lens: list[int], prompts: list[bool]) -> list[float]:
        lens = torch.tensor(kv_lens, dtype=torch.int32)
        SkipSoftmaxBuilder.build(
            self, 0, batch(lengths, kv_lens, prompts, seq_lens_cpu_upper_bound=lens)
        )
        return read.tolist()

    assert step([1, 1], [9, 70], [False, False]) == [3.0, 4.0]
    assert step([1, 1], [9, 70], [False, True]) == [0.0, 0.0]
    assert step([1, 1], [10, 71], [False, False]) == [3.0, 4.0]
    # A prompt of one token has nothing to skip; a batch with a longer chunk replays no such graph.
    assert step([1, 1], [9, 1], [False, True]) == [3.0, 4.0]
    assert step([1, 2], [9, 70], [True, True]) == [3.0, 4.0]


def test_what_is_not_said_is_not_guessed() -> None:
    with pytest.raises(NotImplementedError, match="which requests still read their prompt"):
        built(batch([1], [5], None))


def test_attention_that_is_not_causal_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="must be causal"):
        built(batch([2], [5], [True], causal=False))
