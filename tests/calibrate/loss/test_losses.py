"""The table of losses: closed forms, budgets, shares, and rows that earlier versions wrote."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from calibrate.loss.losses import FINEST, LOSSES, compared, kl_divergence, largest_share, text
from calibrate.loss.measure import Outcome
from calibrate.prompts.build import Prompt
from calibrate.schema import BudgetConfig

PROMPT = Prompt("t", "heldout", 1, (0,), (1, 1), True)
DENSE = torch.log(torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
SPARSE = torch.log(torch.tensor([[0.75, 0.25], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))


def test_both_losses_in_closed_form() -> None:
    losses = compared(DENSE, SPARSE, PROMPT)
    expected = (0.2 * np.log(0.2 / 0.75) + 0.8 * np.log(0.8 / 0.25)) / 3
    assert losses["kl"] == pytest.approx(expected)
    assert losses["score_drop"] == 50.0, "dense ranks one of two tokens first, sparse none"
    assert compared(SPARSE, DENSE, PROMPT)["score_drop"] == -50.0
    assert kl_divergence(DENSE, DENSE + 7.0) == pytest.approx(0.0, abs=1e-15)


def test_every_loss_has_a_budget_key_and_no_value_below_its_least() -> None:
    assert list(LOSSES) == [key for key in BudgetConfig.model_fields if key != "confidence"]
    assert BudgetConfig().limits[FINEST] > 0, "what is predicted always has a budget"
    assert list(BudgetConfig(score_drop=None).limits) == ["kl"]
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for one, other in ((logits, -logits), (-logits, logits), (logits, logits)):
        losses = compared(one, other, PROMPT)
        assert all(losses[name] >= loss.least for name, loss in LOSSES.items())


def test_the_share_is_that_of_the_tightest_budget() -> None:
    losses = {"kl": 0.002, "score_drop": 3.0}
    assert largest_share(losses, {"kl": 0.01, "score_drop": 4.0}) == 0.75
    assert largest_share(losses, {"kl": 0.002, "score_drop": 4.0}) == 1.0
    assert largest_share(losses, {"kl": 0.01}) == 0.2
    assert largest_share({"kl": 0.002}, {"kl": 0.01, "score_drop": 4.0}) == 0.2
    assert text(losses) == "KL 0.00200, score drop 3.00"


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
