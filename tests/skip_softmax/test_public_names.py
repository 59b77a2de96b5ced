"""What `import skip_softmax` offers, and that it loads nothing heavy to say so."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

import pytest
from fresh_process import HEAVY, loaded_by

import skip_softmax as ss


def test_every_public_name_is_there_and_listed() -> None:
    assert set(dir(ss)) == {*ss.__all__, "__version__"}
    for name in dir(ss):
        assert getattr(ss, name) is not None


def test_a_type_checker_sees_the_same_names() -> None:
    tree = ast.parse(Path(ss.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == ss._HOME


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'skip_softmax' has no attribute 'atention'"):
        ss.atention  # noqa: B018


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"version of {name}")
    assert ss.__version__ == "version of skip-softmax-calibrate"

    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert ss.__version__ == "unknown"


@pytest.mark.parametrize("name", ["__version__", "Geometry", "PrefillGeometry", "FileError"])
def test_words_of_the_file_load_nothing_heavy(name: str) -> None:
    assert not loaded_by(f"import skip_softmax; skip_softmax.{name}; dir(skip_softmax)") & HEAVY
