"""Numbers of others: read from every engine's file, marked unvalidated, and measured on the user's model."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import thresholds, write_model

from calibrate import cli
from calibrate.engines import read as importing
from calibrate.engines.catalogue import ENGINES
from calibrate.engines.config_json import read_curve
from calibrate.errors import UserError
from calibrate.loss.above_one import compare_unguarded
from calibrate.proof.assess import as_served
from calibrate.report.lengths import expectations
from skip_softmax.thresholds.file import Thresholds

PUBLISHED = Path(cli.__file__).parent / "engines" / "pages" / "qwen3-30b-a3b-published.json"
# NVIDIA's table for Qwen3-30B-A3B-Instruct-2507: target, prefill, decode.
TABLE = [
    (0.1, 18.76, 0.32), (0.2, 44.37, 0.86), (0.3, 104.97, 2.30), (0.4, 248.40, 6.17), (0.5, 587.18, 16.52),
    (0.6, 1390.63, 44.26), (0.7, 3293.04, 118.62), (0.8, 7799.91, 317.99), (0.9, 18471.56, 852.20),
]  # fmt: skip


@pytest.mark.parametrize(("target", "prefill", "decode"), TABLE)
def test_the_published_table_is_its_curve(target: float, prefill: float, decode: float) -> None:
    found = read_curve(PUBLISHED, target).scale_factor
    assert found["prefill"] == pytest.approx(prefill, rel=0.003)
    assert found["decode"] == pytest.approx(decode, rel=0.01)


def test_published_numbers_become_an_unvalidated_file(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    code, out, err = call(
        "import", PUBLISHED, "--engine", "modelopt", "--model", model, "-o", tmp_path / "t.yaml"
    )
    assert (code, out) == (0, "") and "not validated" in err
    found = Thresholds.load(tmp_path / "t.yaml")
    assert found.scale_factor.prefill == pytest.approx(7.92 * math.exp(8.615 * 0.5))
    assert found.evidence["verdict"] == "not validated"
    assert found.min_kv_len.prefill == 589 and found.min_kv_len.decode == 17
    assert (found.model.layers, found.model.q_heads, found.model.kv_heads) == (4, 8, 2)
    # It cannot be exported before it was measured.
    code, out, err = call("export", tmp_path / "t.yaml", "--engine", "trtllm")
    assert code == 2 and "calibrate validate" in err
    code, out, err = call("show", tmp_path / "t.yaml")
    assert code == 0 and "not validated" in out


TRTLLM = "sparse_attention_config:\n  algorithm: skip_softmax\n"
READ: dict[str, tuple[str, str, dict[str, float]]] = {
    "dictionary": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 587.18, decode: 16.52}\n",
                   {"prefill": 587.18, "decode": 16.52}),
    "one-number": ("trtllm", TRTLLM + "  threshold_scale_factor: 100\n", {"prefill": 100, "decode": 100}),
    "missing-phase": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 5}\n", {"prefill": 5}),
    "zero": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 5, decode: 0}\n",
             {"prefill": 5}),
    "sglang": ("sglang", "export SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=1e4\n",
               {"prefill": 10000}),
    "vllm-json": ("vllm", '{"trtllm_skip_softmax_prefill_threshold_scale_factor": 1000.0}',
                  {"prefill": 1000}),
    "vllm-line": ("vllm", "vllm serve M --attention-config="
                  """'{"trtllm_skip_softmax_decode_threshold_scale_factor": 20}'""",
                  {"decode": 20}),
    "tokenspeed": ("tokenspeed", "# reference KV length: 1000 tokens\n--skip-softmax-threshold 0.018",
                   {"prefill": 18, "decode": 18}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_engines_files_are_read(name: str, tmp_path: Path) -> None:
    engine, text, expected = READ[name]
    (tmp_path / "file").write_text(text)
    found = importing.read_artefact(engine, tmp_path / "file")
    assert found.scale_factor == pytest.approx(expected)
    assert any("dense" in note for note in found.notes) == (name == "zero")


def test_a_target_is_read_with_the_curve_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.5}\n")
    found = importing.read_artefact("trtllm", tmp_path / "skip.yaml", coefficients=PUBLISHED)
    assert found.scale_factor == pytest.approx({"prefill": 587.18}, rel=0.002)
    with pytest.raises(UserError, match="--coefficients"):
        importing.read_artefact("trtllm", tmp_path / "skip.yaml")


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: -1}\n", "number of 0 or more, but got -1"),
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: .nan}\n", "but got nan"),
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefil: 1}\n", r"but got \['prefil'\]"),
        ("trtllm", TRTLLM + "  ignore: [x]\n", "may contain"),
        ("trtllm", "sparse_attention_config: {algorithm: rocket}\n", "but it is `rocket`"),
        ("sglang", "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=abc", "must be a number"),
        ("vllm", "vllm serve --attention-config '{'", "--attention-config must be JSON"),
        ("vllm", "vllm serve --attention-config", "followed by JSON"),
        ("vllm", '{"trtllm_skip_softmax_prefill_threshold_scale_factor": "many"}', "but got 'many'"),
        ("tokenspeed", "--skip-softmax-threshold 0.018", "--at-length"),
        ("modelopt", "{}", "one skip_softmax group, but it has 0"),
        ("modelopt", '{"a": 1, "a": 2}', "given twice"),
        ("flashinfer", '{"prefill": {}}', "'run_kwargs' is missing"),
        ("native", "", "--engine must be one of: trtllm"),
    ],
)  # fmt: skip
def test_what_says_no_number_is_refused(
    engine: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=message):
        importing.read_artefact(engine, tmp_path / "file")


# A misspelt name or a foreign file would read as dense, so it must not read at all.
EMPTY: list[tuple[str, str, str]] = [
    ("sglang", "", "number for prefill or decode, .* SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR, "
     "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR"),
    ("sglang", "export OTHER=1\n", "none was found under SGLANG_SKIP_SOFTMAX_PREFILL"),
    ("sglang", "# export SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=5\n", "none was found under"),
    ("sglang", "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR=5\n"
     "SGLANG_SKIP_SOFTMAX_DECOD_THRESHOLD_SCALE_FACTOR=5\n", r"but got \['SGLANG_SKIP_SOFTMAX_DECOD_"),
    ("vllm", "{}", "none was found under trtllm_skip_softmax_prefill_threshold_scale_factor, "),
    ("vllm", '{"trtllm_skip_softmax_prefil_threshold_scale_factor": 5}', "but got .*prefil_"),
    ("flashinfer", "{}", "none was found under prefill.run_kwargs.skip_softmax_threshold_scale_factor, "),
    ("flashinfer", '{"prefil": {"run_kwargs": {"skip_softmax_threshold_scale_factor": 5}}}',
     r"but got \['prefil'\]"),
    ("trtllm", TRTLLM, "--coefficients"),
    ("trtllm", TRTLLM + "  threshold_scale_factor: {}\n", "scale_factor.prefill or .*target_sparsity"),
    ("trtllm", TRTLLM + "  target_sparsity: {prefil: 0.1}\n", r"target_sparsity may contain .* \['prefil'\]"),
    ("trtllm", TRTLLM + "  target_sparsity: {prefill: null}\n", "none was .*target_sparsity.prefill"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "text", "message"), EMPTY)
def test_a_file_without_a_number_is_refused_and_not_read_as_dense(
    engine: str, text: str, message: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "file").write_text(text)
    curve = ("--coefficients", PUBLISHED) if "target_sparsity" in text else ()
    arguments = (tmp_path / "file", "--engine", engine, *curve, "--model", model)
    code, out, err = call("import", *arguments, "-o", tmp_path / "t.yaml")
    assert (code, out) == (2, "") and re.search(message, err), err
    assert not (tmp_path / "t.yaml").exists()


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "native"])
def test_a_missing_file_is_refused_without_blaming_the_model(
    engine: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    arguments = (tmp_path / "none", "--engine", engine, "--model", model)
    code, _, err = call("import", *arguments, "-o", tmp_path / "t.yaml")
    assert code == 2 and "none" in err and "--model" not in err
    assert not (tmp_path / "t.yaml").exists()


def test_a_target_without_its_curve_is_refused(tmp_path: Path) -> None:
    factors = {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 2.0, "b": 1.0}}
    (tmp_path / "config.json").write_text(config_json(threshold_scale_factor=factors))
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.1, decode: 0.1}\n")
    with pytest.raises(UserError, match=r"gives a target for decode, so .* must give a curve"):
        importing.read_artefact("trtllm", tmp_path / "skip.yaml", coefficients=tmp_path)
    with pytest.raises(UserError, match=r"^--coefficients: `.*none` is missing"):
        importing.read_artefact("trtllm", tmp_path / "skip.yaml", coefficients=tmp_path / "none")


def test_an_explicit_0_is_dense(call: Callable[..., Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "f").write_text(TRTLLM + "  threshold_scale_factor: {prefill: 0, decode: 0}\n")
    (tmp_path / "omni").write_text(
        "# reference KV length: 1000 tokens\n"
        'vllm serve M --diffusion-attention-config \'{"default": {"skip_softmax": {"threshold": 0}}}\''
    )
    for arguments in (
        (tmp_path / "f",),
        (tmp_path / "omni", "--engine", "vllm-omni"),
        ("--threshold", "0", "--at-length", "1000"),
        ("--prefill", "0"),
    ):
        code, _, err = call("import", *arguments, "--model", model, "-o", tmp_path / "t.yaml")
        assert code == 0, err
        found = Thresholds.load(tmp_path / "t.yaml")
        assert found.scale_factor.prefill == found.scale_factor.decode == 0
        assert found.min_kv_len.prefill is None


def test_variables_on_one_line_are_all_read(tmp_path: Path) -> None:
    names = [f"SGLANG_SKIP_SOFTMAX_{p}_THRESHOLD_SCALE_FACTOR" for p in ("PREFILL", "DECODE")]
    line = f"{names[0]}=5 {names[1]}='6'; python -m sglang.launch_server  # {names[0]}=7"
    (tmp_path / "run.sh").write_text(line)
    found = importing.read_artefact("sglang", tmp_path / "run.sh")
    assert found.scale_factor == {"prefill": 5, "decode": 6}


ABSOLUTE = "# reference KV length: 1000 tokens\n--skip-softmax-threshold 0.1\n"


@pytest.mark.parametrize(
    ("engine", "text", "arguments"),
    [
        ("trtllm", TRTLLM + "  threshold_scale_factor: 100\n", ()),
        ("modelopt", None, ("--target", 0.5)),
        ("tokenspeed", ABSOLUTE, ()),
        ("trtllm", None, ("--threshold", 0.1, "--at-length", 1000)),
        ("trtllm", None, ("--prefill", 100, "--decode", 100)),
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_only_the_phase_that_was_asked_for_is_imported(
    phase: str,
    engine: str,
    text: str | None,
    arguments: Any,
    call: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path / "model")
    if text is not None:
        (tmp_path / "f").write_text(text)
        arguments = (tmp_path / "f", *arguments)
    elif engine == "modelopt":
        arguments = (PUBLISHED, *arguments)
    flags = ("--engine", engine, "--phase", phase, "--model", model, "-o", tmp_path / "t.yaml")
    code, _, err = call("import", *arguments, *flags)
    assert code == 0, err
    found = Thresholds.load(tmp_path / "t.yaml")
    other = "decode" if phase == "prefill" else "prefill"
    assert getattr(found.scale_factor, phase) > 0 and getattr(found.scale_factor, other) == 0
    assert list(found.evidence["imported"]["scale_factor"]) == [phase]
    assert not any(note.startswith(other) for note in found.evidence["imported"]["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("F", "--prefill", 5), r"one place, but got SOURCE \(F\) and --prefill"),
        (("F", "--threshold", 0.1, "--at-length", 9), r"one place, but got SOURCE \(F\) and --threshold"),
        (("--threshold", 0.1, "--at-length", 9, "--decode", 5), "but got --threshold and --decode"),
        (("--prefill", 5, "--target", 0.5), "--target is for a SOURCE of --engine modelopt, but got 0.5"),
        (("F", "--target", 0.5), "--target is for a SOURCE of --engine modelopt"),
        (("--prefill", 5, "--coefficients", "c"), "--coefficients is for a SOURCE of --engine trtllm"),
        (("F", "--coefficients", "c"), "--coefficients is for a target_sparsity, but F gives"),
        (("--prefill", 5, "--at-length", 9), "--at-length is for --threshold, or a SOURCE"),
        (("F", "--at-length", 9), "--at-length is for --threshold, or a SOURCE"),
        (("G", "--at-length", 9, "--engine", "tokenspeed"), "that G states, 1000 tokens, but got 9"),
        (("H", "--phase", "decode"), "number for decode, but none was found under"),
        (("--prefill", 5, "--phase", "decode"), "for the phases of --phase"),
        (("--prefill", 5, "--engine", "native", "--gpu", "foo"), "--gpu must be .* but got `foo`"),
        (("--prefill", 5, "--engine", "modelopt", "--gpu", "foo"), "--gpu must be .* but got `foo`"),
        (("--threshold", 0.1, "--at-length", "9" * 400), "--at-length must be a KV length"),
    ],
)  # fmt: skip
def test_flags_that_would_be_ignored_are_refused(
    arguments: tuple[Any, ...],
    message: str,
    call: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    Path("F").write_text(TRTLLM + "  threshold_scale_factor: 100\n")
    Path("G").write_text(ABSOLUTE)
    Path("H").write_text(TRTLLM + "  threshold_scale_factor: {prefill: 100}\n")
    code, out, err = call("import", *arguments, "--model", "model", "-o", "t.yaml")
    assert (code, out) == (2, "") and re.search(message, err), err
    assert not Path("t.yaml").exists()


def test_a_file_s_threshold_gets_its_length_from_the_command_line(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "f").write_text("--skip-softmax-threshold 0.018")
    flags = ("--engine", "tokenspeed", "--model", model, "-o", tmp_path / "t.yaml")
    assert call("import", tmp_path / "f", "--at-length", 1000, *flags)[0] == 0
    assert Thresholds.load(tmp_path / "t.yaml").scale_factor.decode == pytest.approx(18)


CURVE = {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1.0, "b": 1.0}}


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        ("modelopt", {"prefill": {"a": 1, "b": 1e6}}, r"exp\(1e\+06 \* 0.5\).*but got inf"),
        ("modelopt", {"prefill": {"a": 10**400, "b": 1}}, r"prefill.a: .* but got 1000.*\.\.\."),
        ("modelopt", {"prefill": {"a": 1, "b": 10**400}}, "prefill.b: "),
        ("modelopt", {"ignore": [1]}, r"ignore must be a list of layer names, but got \[1\]"),
        ("modelopt", {"ignore": "*"}, r"ignore must be a list of layer names, but got '\*'"),
        ("modelopt", {"target_sparsity": "many"}, "of prefill must lie in .* got 'many'"),
        ("trtllm", "  threshold_scale_factor: {prefill: 1" + "0" * 400 + "}\n", "finite number"),
        ("trtllm", "  threshold_scale_factor: {prefill: 1, 2: 3, x: 4}\n", r"but got \['2', 'x'\]"),
        ("trtllm", "  1: 2\n  x: 3\n", r"may contain .* but got \['1', 'x'\]"),
        ("flashinfer", "[" * 100_000, "must be JSON"),
        ("flashinfer", "[]", "must be a mapping, but it is a list"),
        ("vllm-omni", '{"default": {"skip_softmax": {"threshold": "x"}}}', "got threshold='x'"),
        ("tokenspeed", "--skip-softmax-threshold x", "must be a number, but got `x`"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_without_a_traceback(
    engine: str, text: Any, message: str, tmp_path: Path
) -> None:
    if engine == "modelopt":
        group = {key: text[key] for key in ("ignore", "target_sparsity") if key in text}
        curve = {**CURVE, **{key: text[key] for key in ("prefill",) if key in text}}
        text = config_json(threshold_scale_factor=curve, **group)
    (tmp_path / "file").write_text(TRTLLM + text if engine == "trtllm" else text)
    absolute = 1000 if ENGINES[engine].absolute else None
    with pytest.raises(UserError, match=message):
        importing.read_artefact(engine, tmp_path / "file", at_length=absolute)


def test_a_null_ignore_list_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(config_json(threshold_scale_factor=CURVE, ignore=None))
    assert read_curve(tmp_path / "x.json").ignore == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('"num_hidden_layers": 0', r"must be 1 or more, .* \(0, 8, 2, 128\)"),
        ('"num_key_value_heads": 3', r"multiple of the KV heads, but got .* \(4, 8, 3, 128\)"),
        ('"num_hidden_layers": 1e400', "must name layers, heads and head size"),
        ('"head_dim": -1', "must be 1 or more"),
    ],
)
def test_a_model_without_a_usable_shape_is_refused(
    changes: str, message: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    config = write_model(tmp_path / "model") / "config.json"
    key = changes.split(":")[0]
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if key not in line]
    config.write_text("\n".join([lines[0], f"{changes},", *lines[1:]]), encoding="utf-8")
    code, _, err = call(
        "import", "--prefill", 5, "--model", config.parent, "-o", tmp_path / "t.yaml"
    )
    assert code == 2 and re.search(message, err), err


def test_the_model_is_a_folder(call: Callable[..., Any], tmp_path: Path) -> None:
    # The hash of a lone config.json is no model's: `validate` would refuse the file.
    file = write_model(tmp_path / "model") / "config.json"
    code, _, err = call("import", "--prefill", 5, "--model", file, "-o", tmp_path / "t.yaml")
    assert code == 2 and "is a file; give its folder" in err


def test_notes_say_what_was_read(call: Callable[..., Any], tmp_path: Path) -> None:
    curve = {**CURVE, "prefill": {"a": 10.0, "b": 2.0}, "decode": {"a": 1.0, "b": 1.0}}
    (tmp_path / "c.json").write_text(config_json(threshold_scale_factor=curve, target_sparsity=0.9))
    (tmp_path / "skip.yaml").write_text(TRTLLM + "  target_sparsity: {prefill: 0.1}\n")
    found = importing.read_artefact(
        "trtllm", tmp_path / "skip.yaml", coefficients=tmp_path / "c.json"
    )
    assert found.scale_factor == pytest.approx({"prefill": 10 * math.exp(0.2)})
    assert found.notes == ("prefill: 10 * exp(2 * 0.1)",)


def config_json(**group: Any) -> str:
    return json.dumps(
        {
            "sparse_attention_config": {
                "config_groups": {"g": {"algorithm": "skip_softmax", **group}}
            }
        }
    )


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"threshold_scale_factor": 1000.0}, "fixed threshold of 0.1"),
        ({"threshold_scale_factor": {"formula": "x", "prefill": {"a": 1, "b": 1}}}, "formula must be"),
        ({"threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)"}}, "there are none"),
        (
            {"threshold_scale_factor":
                 {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1, "b": 1}},
             "target_sparsity": 1.5},
            r"\[0, 1\], but got 1.5",
        ),
    ],
)  # fmt: skip
def test_coefficients_that_engines_misread_are_refused(
    group: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config_json(**group))
    with pytest.raises(UserError, match=message):
        read_curve(tmp_path)


def test_shared_coefficients_and_ignore_are_read(tmp_path: Path) -> None:
    factors = {"formula": "a * exp(b * target_sparsity)", "coefficients": {"a": 2.0, "b": 0.0}}
    text = config_json(
        threshold_scale_factor=factors, ignore=["model.layers.1.self_attn", "*layers.3.*"]
    )
    (tmp_path / "x.json").write_text(text)
    found = read_curve(tmp_path / "x.json")
    assert found.scale_factor == {"prefill": 2.0, "decode": 2.0}
    file = importing.to_thresholds(found, thresholds().model, "trtllm", None, "sm90", "x.json")
    assert [max(file.per_head(layer, "prefill")) for layer in range(4)] == [2.0, 0.0, 2.0, 0.0]
    assert file.geometry.prefill is not None and file.geometry.prefill.tile_q == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "0.1"), "give --at-length"),
        (("--threshold", "1.5", "--at-length", "100"), "must hold, but got threshold=1.5"),
        (("--prefill", "-3"), "--prefill: a scale factor must be a finite number"),
        ((), "there must be numbers to import"),
        (("--prefill", "5", "--engine", "none"), "--engine must be one of"),
    ],
)  # fmt: skip
def test_wrong_numbers_on_the_command_line_exit_2(
    arguments: tuple[str, ...], message: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    code, out, err = call("import", *arguments, "--model", model, "-o", tmp_path / "t.yaml")
    assert (code, out) == (2, "") and message in err and not (tmp_path / "t.yaml").exists()


def test_import_needs_a_model(call: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = call("import", "--prefill", "5", "-o", tmp_path / "t.yaml")
    assert code == 2 and "--model DIR, or --config" in err


# What the numbers do to a model.


def import_for(
    smoke_run: Path, target: Path, prefill: float, decode: float, engine: str = "native"
) -> Thresholds:
    run = Thresholds.load(smoke_run / "thresholds.yaml")
    foreign = importing.plain({"prefill": prefill, "decode": decode})
    file = importing.to_thresholds(foreign, run.model, engine, None, None, "a blog")
    # The tiny model's tiles, so that something can be skipped.
    file = file.model_copy(update={"geometry": run.geometry})
    file.save(target)
    return file


def test_numbers_that_hold_pass_and_can_be_written_with_their_evidence(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 100.0, 100.0)
    code, out, err = call(
        "validate", smoke_run, "--thresholds", tmp_path / "t.yaml", "-o", tmp_path / "v.yaml"
    )
    assert code == 0, err
    assert all(word in out for word in ("dense", "given", "calibrated", "256", "384"))
    new = Thresholds.load(tmp_path / "v.yaml")
    assert new.evidence["verdict"] == "passed"
    assert new.evidence["sparsity"]["decode"]["achieved"] > 0
    assert new.min_kv_len.prefill == 256  # nothing shorter was measured


def test_a_threshold_of_1_or_more_fails_and_says_where(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 300.0, 0.0, engine="trtllm")
    code, out, err = call("validate", smoke_run, "--thresholds", tmp_path / "t.yaml", "--json")
    assert code == 1 and "the threshold is 1 or more at 256 tokens" in err
    rows = {(row["length"], row["setting"]): row for row in json.loads(out)["rows"]}
    assert rows[256, "given"]["above_one"] and not rows[384, "given"]["above_one"]
    assert rows[256, "given"]["threshold"]["prefill"] == pytest.approx(300 / 256)
    assert rows[256, "dense"]["kl"] == 0


def test_engines_know_no_shortest_length_but_our_kernel_does(
    smoke_run: Path, tmp_path: Path
) -> None:
    foreign = import_for(smoke_run, tmp_path / "t.yaml", 300.0, 10.0, engine="sglang")
    assert as_served(foreign, 256) == (foreign, True)
    served, above_one = as_served(foreign, 512)
    assert not above_one and served.min_kv_len.prefill == served.min_kv_len.decode == 512
    own = import_for(smoke_run, tmp_path / "t.yaml", 300.0, 10.0)
    assert as_served(own, 256) == (own, False)


def test_numbers_for_another_model_are_refused(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code, out, err = call("validate", smoke_run, "--thresholds", tmp_path / "t.yaml")
    assert (code, out) == (2, "") and "must be for the run's model" in err


def test_a_run_is_not_needed_beforehand(
    call: Callable[..., Any], smoke_run: Path, smoke_model: Path, tmp_path: Path
) -> None:
    import_for(smoke_run, tmp_path / "t.yaml", 0.0, 50.0)
    config = tmp_path / "c.yaml"
    config.write_text((smoke_run / "config.yaml").read_text())
    arguments = ("--thresholds", tmp_path / "t.yaml", "--config", config)
    code, out, err = call("validate", tmp_path / "new", *arguments)
    assert code == 0, err
    assert "calibrated" not in out and (tmp_path / "new" / "prompts.json").exists()
    code, _, err = call("validate", "--thresholds", tmp_path / "t.yaml")
    assert code == 2 and "needs a run folder, or --config" in err


def test_below_1_the_engines_rule_is_ours_and_above_it_skips_what_dominates(
    smoke_run: Path, smoke_model: Path, tmp_path: Path
) -> None:
    from calibrate.loss.measure import compare
    from calibrate.model.load import load
    from calibrate.pipeline import Silent, _Work
    from calibrate.record.folder import open_run
    from calibrate.schema import ModelConfig

    loaded = load(ModelConfig(path=str(smoke_model)))
    shutil.copytree(smoke_run, tmp_path / "run")
    work = _Work(open_run(tmp_path / "run")[1], tmp_path / "run", Silent())
    prompt = work.prompts["heldout"][0]
    dense = work._dense(prompt)
    for prefill, decode in ((150.0, 0.0), (0.0, 120.0), (199.0, 199.0)):
        file = import_for(smoke_run, tmp_path / "t.yaml", prefill, decode)
        ours = compare(loaded, file, prompt, dense)
        theirs = compare_unguarded(loaded, file, prompt, dense)
        assert (theirs.visited, theirs.skipped) == (ours.visited, ours.skipped)
        assert sum(ours.skipped["prefill"]) + sum(ours.skipped["decode"]) > 0
        assert theirs.kl == pytest.approx(ours.kl, rel=1e-3, abs=1e-6)
    huge = import_for(smoke_run, tmp_path / "t.yaml", 1e300, 1e300, engine="trtllm")
    found = compare_unguarded(loaded, huge, prompt, dense)
    # What is left is one tile per vote: the first.
    kept = [v - s for v, s in zip(found.visited["prefill"], found.skipped["prefill"], strict=True)]
    assert kept == [4 * -(-len(prompt.ids) // 16)] * 4
    assert compare(loaded, huge, prompt, dense).kl < 1e-6  # our kernel runs dense


# What a number means, before anything is measured.


def test_show_puts_scale_factor_threshold_and_sparsity_together(
    call: Callable[..., Any], smoke_run: Path
) -> None:
    code, out, _ = call("show", smoke_run / "thresholds.yaml", "--run", smoke_run)
    assert code == 0
    found = Thresholds.load(smoke_run / "thresholds.yaml")
    factor = found.scale_factor.decode
    assert f"{factor / 1024:.4g}" in out and f"{factor / 384:.4g}" in out
    assert "from the run's statistics" in out


def test_expected_sparsity_names_its_source() -> None:
    rows = {(row["phase"], row["kv_len"]): row for row in expectations(thresholds())}
    assert rows["prefill", 8192]["source"] == "measured, held-out"
    assert rows["prefill", 8192]["threshold"] == [587.18 / 8192] * 2
    assert rows["prefill", 1024]["dense"] and rows["prefill", 1024]["sparsity"] == 0
    assert rows["prefill", 65536]["source"] == "from the fitted curve"
    assert rows["prefill", 65536]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_statistics_of_another_run_are_refused(
    call: Callable[..., Any], smoke_run: Path, tmp_path: Path
) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code, out, err = call("show", tmp_path / "t.yaml", "--run", smoke_run)
    assert (code, out) == (2, "") and "must be a run of the file's model" in err
