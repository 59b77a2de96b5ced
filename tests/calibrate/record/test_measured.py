"""What was measured is kept, once, whatever happens while it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibrate.errors import UserError
from calibrate.prompts.build import Prompt
from calibrate.record.measured import Measured
from calibrate.record.provenance import digest

SETTINGS = ({"prefill": [1.0, 0.0]}, {"prefill": [2.0, 0.0]})


def prompt(token: int) -> Prompt:
    return Prompt("text", "heldout", 4, (token, 1, 2, 3), (4,), has_answer=False)


def fill(path: Path, measured: list[Any] | None = None) -> dict[tuple[int, int], Any]:
    """Asks for two settings on three prompts; notes which were measured."""
    kept, found = Measured(path), {}
    for number, setting in enumerate(SETTINGS):
        for token in range(3):

            def measure(key: tuple[int, int] = (number, token)) -> dict[str, Any]:
                if measured is not None:
                    measured.append(key)
                return {"kl": 0.1 * key[0] + 1e-9 * key[1], "task": "é"}

            found[number, token] = kept.once(setting, prompt(token), measure)
    return found


def test_nothing_is_measured_twice_and_nothing_changes(tmp_path: Path) -> None:
    path, measured = tmp_path / "heldout.jsonl", []
    first = fill(path, measured)
    written = path.read_bytes()
    assert len(measured) == len(set(measured)) == 6 == len(written.splitlines())
    assert fill(path, measured) == first and len(measured) == 6
    assert path.read_bytes() == written
    assert Measured(path).of(SETTINGS[1]) == [first[1, token] for token in range(3)]
    assert Measured(path).of({"prefill": [3.0, 0.0]}) == []


@pytest.mark.parametrize("cut", [1, 30, 10**6])
def test_a_line_that_was_cut_is_measured_again(tmp_path: Path, cut: int) -> None:
    path, measured = tmp_path / "heldout.jsonl", []
    first = fill(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][: min(cut, len(lines[4]) - 1)])
    assert fill(path, measured) == first and measured == [(1, 1), (1, 2)]
    assert path.read_bytes() == whole


def test_a_full_disk_costs_only_the_line_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    kept = Measured(tmp_path / "heldout.jsonl")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            kept.once(SETTINGS[0], prompt(0), lambda: {"kl": 0.5})
    assert kept.once(SETTINGS[0], prompt(0), lambda: {"kl": 0.25}) == {"kl": 0.25}
    assert Measured(kept.path).of(SETTINGS[0]) == [{"kl": 0.25}]


def test_rows_of_older_runs_count(tmp_path: Path) -> None:
    known = {f"{digest(SETTINGS[0])}:{prompt(1).key}": {"kl": 7.0}}
    (tmp_path / "heldout.json").write_text(json.dumps(known))
    found = fill(tmp_path / "heldout.jsonl")
    assert found[0, 1] == {"kl": 7.0} and found[0, 2]["kl"] == 2e-9
    assert len((tmp_path / "heldout.jsonl").read_bytes().splitlines()) == 5


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"setting": "a", "prompt": "b"}', "5"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "heldout.jsonl"
    fill(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"heldout\.jsonl`, line 3: .*delete the line"):
        fill(path)
