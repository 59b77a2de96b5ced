"""Numbers from elsewhere: read from every file and option, or refused, and marked as not validated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    CURVE,
    PUBLISHED,
    TRTLLM,
    config_json,
    thresholds,
    write_model,
)

from calibrate.engines import read as importing
from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export
from calibrate.engines.types import Foreign, Source
from calibrate.errors import FileError, UserError
from calibrate.schema import GeometryConfig
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import PrefillGeometry


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


SGLANG = tuple(ENGINES["sglang"].numbers.values())
VLLM = tuple(ENGINES["vllm"].numbers.values())
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
    "yaml-exponent": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 1e2, decode: 5.0e+1}\n",
                      {"prefill": 100, "decode": 50}),
    "yaml-text": ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: ' 1e2 ', decode: '50'}\n",
                  {"prefill": 100, "decode": 50}),
    "yaml-underscore": ("trtllm", "enable_chunked_prefill: on\n" + TRTLLM
                        + "  threshold_scale_factor: 1_000\n", {"prefill": 1000, "decode": 1000}),
    "sglang-quotes": ("sglang", f"{SGLANG[0]}=' 1e2 ' # not 5\nexport {SGLANG[1]} = \"20\"\n",
                      {"prefill": 100, "decode": 20}),
    "sglang-one-line": ("sglang", f"# {SGLANG[0]}=5\nenv {SGLANG[0]}=150.0 {SGLANG[1]}=+2e1 \\\n python -m s",
                        {"prefill": 150, "decode": 20}),
    "sglang-compose": ("sglang", f"environment:\n  {SGLANG[0]}: \"150.0\"\n  - {SGLANG[1]}=20 # x\n",
                       {"prefill": 150, "decode": 20}),
    "sglang-again": ("sglang", f"{SGLANG[0]}=5; export {SGLANG[1]}=6\n{SGLANG[0]}=7\nunset {SGLANG[1]}",
                     {"prefill": 7}),
    "vllm-dots": ("vllm", f"vllm serve m \\\n  --attention-config.{VLLM[0]} 150.0 \\\n"
                  f"  --attention_config.{VLLM[1]}=2e1  # decode", {"prefill": 150, "decode": 20}),
    "vllm-both": ("vllm", f"""vllm serve m -ac '{{"backend": "X", "{VLLM[0]}": "1e2"}}' -ac.{VLLM[1]} '20'""",
                  {"prefill": 100, "decode": 20}),
    "vllm-comment": ("vllm", f"""# vllm serve m -ac.{VLLM[0]} 5\nvllm serve m -ac.{VLLM[1]}=20 # it's""",
                     {"decode": 20}),
    "omni-dots": ("vllm-omni", "# reference KV length: 1000 tokens\nvllm serve m --omni "
                  "--diffusion-attention-config.default.skip_softmax.threshold 1e-1", {"prefill": 100}),
    "tokenspeed-quotes": ("tokenspeed", "# reference KV length: 1000 tokens\n# --skip-softmax-threshold 0.5\n"
                          "ts serve \\\n  --skip-softmax-threshold \\\n  '1.8e-2'", {"prefill": 18}),
    "tokenspeed": ("tokenspeed", "# reference KV length: 1000 tokens\n--skip-softmax-threshold 0.018",
                   {"prefill": 18}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_engines_files_are_read(name: str, tmp_path: Path) -> None:
    engine, text, expected = READ[name]
    (tmp_path / "file").write_text(text)
    found = importing.read_artefact(engine, Source(tmp_path / "file"))
    assert found.scale_factor == pytest.approx(expected)
    assert any("dense" in note for note in found.notes) == (name == "zero")
    assert ("not taken over: backend" in found.notes) == (name == "vllm-both")
    assert any("more than once" in note for note in found.notes) == (name == "sglang-again")


@pytest.mark.parametrize("number", ["010", "1:30", "1:30.5"])
def test_an_engines_yaml_may_not_have_a_number_that_is_another_than_it_looks(
    number: str, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(f"{TRTLLM}  threshold_scale_factor: {{prefill: {number}}}\n")
    with pytest.raises(FileError, match=f"f.yaml:3: .* {number} as it looks; .*leading zeros"):
        importing.read_artefact("trtllm", Source(tmp_path / "f.yaml"))


def test_a_foreign_curve_is_kept_and_exported_again(tmp_path: Path) -> None:
    """Without it a validated import could only be pinned, and a target of its own would be lost."""
    model = write_model(tmp_path / "model")
    made = importing.import_numbers(PUBLISHED, engine="modelopt", model=model)
    curve = {"a": 7.92, "b": 8.615, "target": 0.5, "source": PUBLISHED.name}
    assert made.fit["prefill"] == curve
    (tmp_path / "t.yaml").write_text(made.to_yaml())
    assert Thresholds.load(tmp_path / "t.yaml") == made
    proven = thresholds().evidence | {"imported": made.evidence["imported"]}
    validated = made.model_copy(update={"evidence": proven})
    written = export(validated, "modelopt", gpu="any", phases=["prefill"], model=model)
    assert written.patch is not None and written.sidecar is not None
    group = json.loads(written.patch.after)["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["threshold_scale_factor"]["prefill"] == {"a": 7.92, "b": 8.615}
    assert group["target_sparsity"] == {"prefill": 0.5}
    assert any("relies on the imported curve" in loss for loss in written.sidecar["lost"])


def test_what_an_import_does_not_take_over_is_named(tmp_path: Path) -> None:
    groups = {
        "w": {"algorithm": "sparse24"},
        "g": {
            "algorithm": "skip_softmax",
            "targets": ["X"],
            "br": 128,
            "ignore": ["model.layers.1.self_attn", "lm_head"],
            "threshold_scale_factor": {**CURVE, "decode": {"a": 5.0, "b": 0.0}},
        },
    }
    section = {"config_groups": groups, "kv": 1}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"sparse_attention_config": section}))
    model = write_model(tmp_path / "model")
    made = importing.import_numbers(file, engine="modelopt", model=model)
    notes = made.evidence["imported"]["notes"]
    assert (
        "not taken over: sparse_attention_config.kv, sparse_attention_config.config_groups.w, targets, br"
        in notes
    )
    assert "not taken over: ignore `lm_head`, which names no layer" in notes
    assert [layer.layer for layer in made.layers] == [1]
    assert list(made.fit) == ["prefill"] and made.scale_factor.decode == 5.0
    assert "decode: no curve to keep: it has one number at every target" in notes
    alone = importing.import_numbers(file, engine="modelopt", model=model, phases=["prefill"])
    assert any("threshold_scale_factor.decode" in n for n in alone.evidence["imported"]["notes"])


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
        ("tokenspeed", "# --skip-softmax-threshold 0.018", "must be given"),
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: 'nan'}\n", "but got nan"),
        ("trtllm", TRTLLM + "  threshold_scale_factor: {prefill: yes}\n", "but got True"),
        ("sglang", f"{SGLANG[0]}=150#x", "must be a number, but got `150#x`"),
        ("sglang", f"{SGLANG[0]}=", "must be a number, but got ``"),
        ("vllm", f"vllm serve m -ac.{VLLM[0]}", "followed by JSON or a value"),
        ("vllm", f"vllm serve m -ac.{VLLM[0]} 'abc'", "but got 'abc'"),
        ("vllm", f"""vllm serve m -ac.{VLLM[0]} 5 -ac '{{"{VLLM[0]}": 6}}'""", "given twice; remove one"),
        ("vllm", f"vllm serve m -ac.{VLLM[0]}x 5", r"but got \['trtllm_.*factorx'\]"),
        ("vllm", f"vllm serve m '-ac.{VLLM[0]} 5", "must be a shell line"),
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
        importing.read_artefact(engine, Source(tmp_path / "file"))


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


ABSOLUTE = "# reference KV length: 1000 tokens\n--skip-softmax-threshold 0.1\n"


@pytest.mark.parametrize(
    ("engine", "text", "arguments"),
    [
        ("trtllm", TRTLLM + "  threshold_scale_factor: 100\n", ()),
        ("modelopt", None, ("--target", 0.5)),
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
    found = Thresholds.load(tmp_path / "t.yaml").scale_factor
    assert found.prefill == pytest.approx(18) and found.decode == 0.0


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
        importing.read_artefact(engine, Source(tmp_path / "file", at_length=absolute))


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


def test_dense_rows_of_a_config_are_for_our_own_engine_alone() -> None:
    prefill = PrefillGeometry(tile_q=64, tile_kv=128, dense_last=64)
    found = Foreign({"prefill": 100.0, "decode": 10.0})
    for engine in ENGINES:
        made = importing.to_thresholds(
            found, thresholds().model, engine, GeometryConfig(prefill=prefill), None, "a test"
        )
        assert made.geometry.prefill is not None
        assert made.geometry.prefill.dense_last == (64 if engine == "native" else 0)


def test_import_needs_a_model(call: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = call("import", "--prefill", "5", "-o", tmp_path / "t.yaml")
    assert code == 2 and "--model DIR, or --config" in err


def test_a_program_imports_with_the_same_laws(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    found = importing.import_numbers(prefill=5.0, model=model)
    assert found.scale_factor.prefill == 5.0 and found.evidence["verdict"] == "not validated"
    with pytest.raises(UserError, match="one place, but got --threshold and --prefill"):
        importing.import_numbers(prefill=5.0, threshold=0.1, at_length=100, model=str(model))
    with pytest.raises(UserError, match="--phase must be prefill or decode"):
        importing.import_numbers(prefill=5.0, phases=["both"], model=model)
    with pytest.raises(UserError, match="valid for one model only"):
        importing.import_numbers(prefill=5.0, model=model, config="run.yaml")
