"""SGLang's variables, read back by a shell."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from engine_files import (
    thresholds,
    write_model,
)

from calibrate.engines import read as importing
from calibrate.engines.export import export
from calibrate.engines.types import Source
from calibrate.errors import UserError


def read_sglang(path: Path) -> dict[str, float]:
    names = {
        p: f"SGLANG_SKIP_SOFTMAX_{p.upper()}_THRESHOLD_SCALE_FACTOR" for p in ("prefill", "decode")
    }
    # A value left over from another run must not survive.
    left_over = " ".join(f"{name}=99" for name in names.values())
    shell = f"export {left_over}; . {shlex.quote(str(path))} && env"
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return {p: float(environment[n]) for p, n in names.items() if n in environment}


def test_golden_sglang(tmp_path: Path) -> None:
    made = export(thresholds(), "sglang", gpu="sm90", phases=("prefill",), served_min_len=8192)
    made.write(tmp_path / "sglang.env")
    assert read_sglang(tmp_path / "sglang.env") == {"prefill": 587.18}
    assert "--attention-backend trtllm_mha" in made.text


def test_a_zero_phase_is_left_unset_not_zero(tmp_path: Path) -> None:
    made = export(thresholds(decode=0.0), "sglang", gpu="sm90")
    assert "unset SGLANG_SKIP_SOFTMAX_DECODE" in made.text and "=0" not in made.text
    assert (
        "decode"
        not in export(thresholds(decode=0.0), "trtllm").text.split("sparse_attention_config:\n")[-1]
    )


def test_models_with_sparse_attention_of_their_own_are_refused_for_sglang(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", index_topk=2048)
    with pytest.raises(UserError, match="NSA, DSA"):
        export(thresholds(), "sglang", gpu="sm90", phases=("prefill",), model=model)


def test_variables_on_one_line_are_all_read(tmp_path: Path) -> None:
    names = [f"SGLANG_SKIP_SOFTMAX_{p}_THRESHOLD_SCALE_FACTOR" for p in ("PREFILL", "DECODE")]
    line = f"{names[0]}=5 {names[1]}='6'; python -m sglang.launch_server  # {names[0]}=7"
    (tmp_path / "run.sh").write_text(line)
    found = importing.read_artefact("sglang", Source(tmp_path / "run.sh"))
    assert found.scale_factor == {"prefill": 5, "decode": 6}
