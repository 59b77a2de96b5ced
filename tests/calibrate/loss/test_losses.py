"""The table of losses: closed forms, budgets, shares, and rows that earlier versions wrote."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from calibrate.loss.losses import FINEST, LOSSES, compared, kl_divergence, largest_share, text
from calibrate.loss.measure import Outcome, by_loss, mean_losses
from calibrate.prompts.build import Prompt
from calibrate.schema import BudgetConfig

PROMPT = Prompt("t", "heldout", 1, (0,), (1, 1), True)
DENSE = torch.log(torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
SPARSE = torch.log(torch.tensor([[0.75, 0.25], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))


def test_kl_and_score_drop_in_closed_form() -> None:
    losses = compared(DENSE, SPARSE, PROMPT)
    expected = (0.2 * np.log(0.2 / 0.75) + 0.8 * np.log(0.8 / 0.25)) / 3
    assert losses["kl"] == pytest.approx(expected)
    assert losses["score_drop"] == 50.0, "dense ranks one of two tokens first, sparse none"
    assert compared(SPARSE, DENSE, PROMPT)["score_drop"] == -50.0
    assert kl_divergence(DENSE, DENSE + 7.0) == pytest.approx(0.0, abs=1e-15)


def test_flips_are_the_positions_at_which_the_first_choice_differs() -> None:
    """Seven positions, five words: two first choices are planted elsewhere, and one second choice."""
    prompt = replace(PROMPT, continuation=(1,) * 6)
    dense = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first, second = dense.topk(2, dim=-1).indices.T
    sparse = dense + 2.5  # the same distribution, so a KL of 0
    assert compared(dense, sparse, prompt)["flips"] == 0.0
    for position in (1, 6):
        sparse[position, second[position]] = sparse[position, first[position]] + 0.5
    least = sparse[3].argmin()
    sparse[3, least] = (sparse[3, first[3]] + sparse[3, second[3]]) / 2
    found = compared(dense, sparse, prompt)
    assert found["flips"] == pytest.approx(200 / 7)
    p, q = dense.softmax(-1), sparse.softmax(-1)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum() / 7)) and found["kl"] > 0


def test_a_prompt_has_only_the_losses_that_it_can_show() -> None:
    text_prompt = replace(PROMPT, has_answer=False)
    answered, other = compared(DENSE, SPARSE, PROMPT), compared(DENSE, DENSE, text_prompt)
    assert set(answered) == {"kl", "kl_answer", "flips", "score_drop"}
    assert set(other) == {"kl", "kl_text", "flips", "score_drop"}
    assert answered["kl_answer"] == answered["kl"] > 0 == other["kl_text"]
    tiles = {"prefill": [4], "decode": [4]}
    outcomes = [
        Outcome(str(i), "t", 256, losses, 50.0, tiles, tiles)
        for i, losses in enumerate((answered, other, answered))
    ]
    means = mean_losses(outcomes)
    assert means["kl"] == pytest.approx(2 / 3 * answered["kl"])
    assert means["kl_answer"] == answered["kl"] and means["kl_text"] == 0.0
    assert means["flips"] == pytest.approx(200 / 9), "one position of three flips in two of three"
    assert by_loss(outcomes[:1])["kl_answer"] == [answered["kl"]]
    assert "kl_text" not in mean_losses(outcomes[:1])


def test_every_loss_has_a_budget_key_and_no_value_below_its_least() -> None:
    assert list(LOSSES) == [key for key in BudgetConfig.model_fields if key != "confidence"]
    assert BudgetConfig().limits[FINEST] > 0, "what is predicted always has a budget"
    assert list(BudgetConfig(score_drop=None).limits) == ["kl"]
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for one, other in ((logits, -logits), (-logits, logits), (logits, logits)):
        losses = compared(one, other, PROMPT)
        assert all(
            LOSSES[name].least <= value <= LOSSES[name].most for name, value in losses.items()
        )


def test_the_share_is_that_of_the_tightest_budget() -> None:
    losses = {"kl": 0.002, "score_drop": 3.0}
    assert largest_share(losses, {"kl": 0.01, "score_drop": 4.0}) == 0.75
    assert largest_share(losses, {"kl": 0.002, "score_drop": 4.0}) == 1.0
    assert largest_share(losses, {"kl": 0.01}) == 0.2
    assert largest_share({"kl": 0.002}, {"kl": 0.01, "score_drop": 4.0}) == 0.2
    assert (
        text(losses, {"kl": 0.01, "flips": 1.0, "score_drop": 4.0}) == "KL 0.00200, score drop 3.00"
    )
    assert text(losses, {"kl": 0.01}) == "KL 0.00200"


def test_rows_of_earlier_versions_are_read() -> None:
    tiles = {"prefill": [4], "decode": [4]}
    ours = Outcome("key", "text", 256, {"kl": 0.5, "score_drop": 12.5}, 75.0, tiles, tiles)
    theirs = {
        "key": "key",
        "task": "text",
        "length": 256,
        "kl": 0.5,
        "score": 62.5,
        "dense_score": 75.0,
        "visited": tiles,
        "skipped": tiles,
    }
    assert Outcome.from_row(theirs) == ours == Outcome.from_row(asdict(ours))
