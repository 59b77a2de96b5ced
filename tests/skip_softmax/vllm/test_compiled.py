"""Inside a model that `torch.compile` compiled, as vLLM does by default, the plug-in skips the same tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_file
import pytest
import torch
import vllm_serving as serving
from test_skipping import COUNT, WHOLE, by_applied, cleared, counted, prompts

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def compiled(_worker: Any) -> int:
    """How often this worker has compiled since it started."""
    from torch._dynamo.utils import get_compilation_metrics

    return len(get_compilation_metrics())


def test_a_compiled_model_skips_what_applied_skips(
    little: Path, tmp_path: Path, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests run without a compiler; workers of their own read the variable.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr("torch._dynamo.config.disable", False)
    file = planted_file.saved(little, tmp_path / "t.yaml")
    llm = cleared(served(little, file, enforce_eager=False, **WHOLE))
    tokens = serving.generated(llm, prompts(), COUNT)
    wanted, _, tiles = by_applied(little, file, prompts())
    found = counted(llm)
    assert tokens == wanted
    for phase in ("prefill", "decode"):
        assert torch.equal(found[phase], tiles[phase].to(found[phase].dtype)), phase
        assert found[phase][..., 1].sum() > 0
    (times,) = llm.collective_rpc(compiled)
    assert times > 0
