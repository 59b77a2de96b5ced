"""`calibrate show` and `export`: thresholds files, good and damaged."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    PROGRAM,
    Finished,
    Result,
    environment,
    refused,
)

from skip_softmax.thresholds.file import Thresholds

THRESHOLDS = """\
format: skip-softmax/1
model: {name: tiny, sha256: abc, layers: 3, q_heads: 4, kv_heads: 2, head_dim: 16, dtype: float32}
criterion: max
geometry:
  prefill: {tile_q: 64, tile_kv: 128}
  decode: {tile_kv: 64}
min_kv_len: {prefill: 1024, decode: 512}
scale_factor:
  prefill: 180.0
  decode: 12.5
layers:
- {layer: 0, prefill: 0.0, decode: 0.0}
- {layer: 2, prefill: [90.0, 0.0, 240.0, 1.0], decode: [4.0, 9.5]}
"""


def test_show_prints_every_phase_and_layer(call: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "thresholds.yaml"
    file.write_text(THRESHOLDS)
    result = call("show", file)
    assert (result.code, result.stderr) == (0, "")
    assert "not validated" in result.stdout
    for cell in ("64×128", "1024", "12.5", "180", "0 to 240", "4 to 9.5", "2 of 3"):
        assert cell in result.stdout, result.stdout


def test_show_prints_chunks_and_dense_rows(call: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "thresholds.yaml"
    tiles = "tile_kv: 128, dense_last: 64, chunk: 1024"
    file.write_text(THRESHOLDS.replace("tile_kv: 128", tiles))
    result = call("show", file)
    assert (result.code, result.stderr) == (0, "")
    assert "64×128, last 64 rows dense, chunks of 1024" in " ".join(result.stdout.split())


def test_a_loss_that_too_few_prompts_show_has_no_bound_and_the_file_opens(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    """One held-out prompt with an answer, one without: neither KL of its own has a bound."""
    (tmp_path / "plain.yaml").write_text(THRESHOLDS)
    bound = {"mean": 0.004, "upper": 0.006, "confidence": 0.95}
    loss = {
        "kl": bound,
        "kl_text": {**bound, "upper": math.inf, "prompts": 1},
        "score_drop": bound,
        "heldout_prompts": 2,
    }
    file = Thresholds.load(tmp_path / "plain.yaml").model_copy(
        update={"evidence": {"verdict": "passed", "loss": loss}}
    )
    file.save(tmp_path / "thresholds.yaml")
    result = call("show", tmp_path / "thresholds.yaml")
    assert (result.code, result.stderr) == (0, "")
    assert "0.00400 (upper bound –) nats/token (1 prompts)" in " ".join(result.stdout.split())


def test_show_prints_the_evidence_of_a_run(finished: Finished, call: Callable[..., Result]) -> None:
    result = call("show", finished.folder / "thresholds.yaml")
    assert (result.code, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())  # a caption is wrapped to its table
    assert "passed" in words and "on 8 held-out prompts" in words
    assert "…" not in result.stdout
    achieved = Thresholds.load(finished.folder / "thresholds.yaml").evidence["sparsity"]
    for phase in ("prefill", "decode"):
        assert f"{100 * achieved[phase]['achieved']:.1f} %" in result.stdout


def test_show_prints_names_and_reasons_as_they_are(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    file, name = tmp_path / "thresholds.yaml", "org/[bold]a[/b]:smile:"
    text = THRESHOLDS.replace("name: tiny", f"name: '{name}'")
    file.write_text(f"{text}uncalibrated: [{{layer: 1, reason: 'soft[cap] :smile:'}}]\n")
    result = call("show", file)
    assert (result.code, result.stderr) == (0, "")
    assert f"{name}: not validated" in result.stdout
    assert "layer 1 is dense: soft[cap] :smile:" in result.stdout


def test_show_reads_a_curve_whose_numbers_are_far_apart(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    text = re.sub(r"layers:\n(- .*\n)+", "", THRESHOLDS).replace("180.0", "1.0e-300")
    curve = "{a: 1.0e+300, b: 1.0, sparsity_range: [0, 1]}"
    (tmp_path / "t.yaml").write_text(f"{text}fit: {{prefill: {curve}}}\n")
    result = call("show", tmp_path / "t.yaml")
    assert (result.code, result.stderr) == (0, "")


@pytest.mark.parametrize(("encoding", "times"), [("latin-1", "×"), ("ascii", "?")])
def test_show_prints_to_a_terminal_without_unicode(
    tmp_path: Path, encoding: str, times: str
) -> None:
    (tmp_path / "t.yaml").write_text(THRESHOLDS.replace("name: tiny", "name: 模型"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "show", tmp_path / "t.yaml"],
        capture_output=True,
        check=False,
        env=environment(PYTHONIOENCODING=encoding),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode(encoding)
    assert f"64{times}128" in printed and "??: not validated" in printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "t.yaml"),
        ("show", "t.yaml", "--json"),
        ("export", "t.yaml", "--engine", "native"),
        ("export", "t.yaml", "--engine", "native", "--json"),
    ],
)
def test_a_full_disk_is_one_message(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "t.yaml").write_text(THRESHOLDS)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            # Buffered, as by default: what is left in the buffer is written once more at exit.
            env=environment(PYTHONUNBUFFERED=""),
        )
    refused(Result(done.returncode, "", done.stderr), "stdout cannot be written", "No space left")


def test_show_as_json_is_one_document_that_is_the_file(
    finished: Finished, call: Callable[..., Result]
) -> None:
    result = call("show", finished.folder / "thresholds.yaml", "--json")
    assert (result.code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    loaded = Thresholds.load(finished.folder / "thresholds.yaml")
    assert Thresholds.model_validate(document) == loaded


def test_export_to_native_gives_the_file_back_byte_for_byte(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    original = finished.folder / "thresholds.yaml"
    printed = call("export", original, "--engine", "native")
    assert (printed.code, printed.stderr) == (0, "")
    assert printed.stdout.encode() == original.read_bytes()
    target = tmp_path / "exported.yaml"
    saved = call("export", original, "--engine", "native", "-o", target)
    assert (saved.code, saved.stdout) == (0, "")
    assert target.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        pytest.param(
            "  prefill: 180.0",
            "  prefil: 180.0",
            (":9: scale_factor.prefil: unknown key", "did you mean `prefill`?"),
            id="misspelt key",
        ),
        pytest.param(
            "criterion: max",
            "colour: red",
            (":3: colour: unknown key", "known keys here: ", "criterion"),
            id="unknown key",
        ),
        pytest.param(
            "- {layer: 0, prefill", "- {layer: 0, prefix", ("layers.0.prefix",), id="key in a list"
        ),
        pytest.param(
            "  prefill: 180.0", "  prefill: lots", (":9: scale_factor.prefill", "'lots'"), id="type"
        ),
        pytest.param(
            "  prefill: 180.0", "  prefill: -1.0", (":9: scale_factor.prefill", "-1"), id="negative"
        ),
        pytest.param(
            "  decode: 12.5", "  decode: .nan", (":10: scale_factor.decode", "nan"), id="NaN"
        ),
        pytest.param(
            "  decode: 12.5", "  decode: .inf", (":10: scale_factor.decode", "inf"), id="inf"
        ),
        pytest.param(
            "[4.0, 9.5]", "[4.0, -9.5]", (":13: layers.1.decode.1", "-9.5"), id="negative head"
        ),
        pytest.param("[4.0, 9.5]", "[4.0, .nan]", (":13: layers.1.decode.1", "nan"), id="NaN head"),
        pytest.param(
            "prefill: 1024,",
            "prefill: 240,",
            ("`min_kv_len.prefill > scale_factor` must hold", "min_kv_len=240", "240", "raise"),
            id="min_kv_len not above",
        ),
        pytest.param(
            "min_kv_len: {prefill: 1024, decode: 512}\n",
            "",
            ("`min_kv_len.prefill > scale_factor` must hold", "min_kv_len=None"),
            id="min_kv_len missing",
        ),
        pytest.param(
            "  decode: {tile_kv: 64}\n", "", ("geometry.decode is required",), id="geometry missing"
        ),
        pytest.param("tile_kv: 64", "tile_kv: 96", ("tile_kv", "power of two", "96"), id="tile"),
        pytest.param(
            "layer: 2",
            "layer: 3",
            ("layers[1] (layer 3)", "below model.layers=3"),
            id="layer outside",
        ),
        pytest.param("layer: 2", "layer: 0", ("layer 0", "listed twice"), id="layer twice"),
        pytest.param(
            "[4.0, 9.5]", "[4.0]", ("layers[1]", "2 (one per KV head)", "got 1"), id="head count"
        ),
        pytest.param(
            "  decode: 12.5",
            "  prefill: 12.5",
            (":10: ", "'prefill' is given twice"),
            id="same key",
        ),
        pytest.param("criterion: max", "criterion: [", (":5: ", "not valid YAML"), id="no YAML"),
        pytest.param("criterion: max", "? [a]\n: b", ("not valid YAML",), id="list as a key"),
        pytest.param(
            "skip-softmax/1", "skip-softmax/2", (":1: format", "skip-softmax/2"), id="format"
        ),
        pytest.param(THRESHOLDS, "", ("must be a YAML mapping", "nothing"), id="empty"),
        pytest.param(
            "criterion: max",
            "criterion: 0b_",
            (":3: not valid YAML", "'0b_' is not a valid int"),
            id="0b_",
        ),
        pytest.param(
            "criterion: max",
            "evidence: {loss: {kl: {mean: 1, upper: 1}, score_drop: {mean: 1}, heldout_prompts: 2}}",
            (":3: evidence.loss.score_drop.upper: this key is required",),
            id="evidence",
        ),
        pytest.param(
            "criterion: max", "fit: {prefill: {a: 0, b: 1}}", (":3: fit.prefill.a: ",), id="fit"
        ),
        pytest.param(THRESHOLDS, "- 1\n", ("must be a YAML mapping", "list"), id="a list"),
    ],
)
def test_a_wrong_thresholds_file_is_refused(
    call: Callable[..., Result], tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
) -> None:
    assert old in THRESHOLDS
    file = tmp_path / "thresholds.yaml"
    file.write_text(THRESHOLDS.replace(old, new, 1))
    for result in (call("show", file), call("export", file, "--engine", "native")):
        refused(result, str(file), *parts)


def test_several_mistakes_in_one_file_are_all_named(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "thresholds.yaml"
    file.write_text(THRESHOLDS.replace("180.0", "-1").replace("tile_q", "tile_p"))
    result = call("show", file)
    assert result.code == 2
    assert ":9: scale_factor.prefill" in result.stderr and ":5: geometry.prefill" in result.stderr


def test_a_file_that_is_no_text_is_refused(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(call("show", tmp_path / "binary.yaml"), "binary.yaml", "cannot be read")
    refused(call("show", tmp_path), str(tmp_path), "cannot be read")
    refused(call("show", tmp_path / "missing.yaml"), "missing.yaml", "no such file")


def test_an_unknown_engine_is_refused(finished: Finished, call: Callable[..., Result]) -> None:
    file = finished.folder / "thresholds.yaml"
    refused(call("export", file, "--engine", "nativ"), "--engine", "native", "`nativ`")


def test_an_export_that_cannot_be_written_is_refused(
    finished: Finished, call: Callable[..., Result], tmp_path: Path
) -> None:
    file, target = finished.folder / "thresholds.yaml", tmp_path / "missing" / "out.yaml"
    result = call("export", file, "--engine", "native", "-o", target)
    refused(result, str(target), "cannot be written")
    assert f".{target.name}." not in result.stderr, "the hidden temporary file is not the user's"
