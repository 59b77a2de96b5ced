"""At scale factor 0 nothing changes, in any architecture of transformers; its table in the docs is true."""

from __future__ import annotations

import pytest
import transformers
from architectures import architectures
from sweep import PAGE, Row, page, sweep


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()


def committed() -> dict[str, Row]:
    """Rows of the page, by model class."""
    cells = (
        line.strip("|").split("|", 2) for line in PAGE.read_text(encoding="utf-8").splitlines()
    )
    rows = [Row(*(cell.strip() for cell in row)) for row in cells if len(row) == 3]
    return {row.name: row for row in rows if row.name in architectures()}


needs_the_page_s_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}'s mappings" not in PAGE.read_text(encoding="utf-8"),
    reason="the page is of another version of transformers",
)


@pytest.mark.parametrize("name", sorted(architectures()))
def test_nothing_changes_and_the_page_says_so(name: str) -> None:
    found = sweep(name)
    if not needs_the_page_s_version.args[0]:
        assert found == committed()[name], "write the page again: python tests/sweep.py"


@needs_the_page_s_version
def test_the_page_is_what_the_sweep_writes() -> None:
    """Of these rows; each of them is compared above."""
    assert set(committed()) == set(architectures())
    assert PAGE.read_text(encoding="utf-8") == page(list(committed().values()))
