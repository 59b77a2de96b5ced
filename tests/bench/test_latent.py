"""The bound that the bench of latent attention compares with."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import latent


def test_skipping_saves_products_of_a_latent_cache_and_no_byte() -> None:
    """One tile of 64 keys for 128 heads: 1152 bytes and 256 * (576 + 512) operations per key."""
    dense, half, all_but = (latent.bounds(1, 64, s) for s in (0.0, 0.5, 1.0))
    assert dense["bytes_ms"] == half["bytes_ms"] == all_but["bytes_ms"] == 64 * 1152 / 4.8e9
    assert dense["products_ms"] == pytest.approx(64 * 256 * 1088 / 989e9)
    assert half["products_ms"] / dense["products_ms"] == pytest.approx((576 + 256) / 1088)
    # Products bind while all tiles are kept; from a third skipped on, the bytes do.
    assert dense["products_ms"] > dense["bytes_ms"] > half["products_ms"] > all_but["products_ms"]
