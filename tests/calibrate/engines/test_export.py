"""What every engine gets, read back by independent readers, and every way in which an export is refused."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import yaml
from engine_files import BLACKWELL, CONFIG, LAYERS, MODELOPT, per_layer, thresholds, write_model
from pydantic import BaseModel, ConfigDict, field_validator

from calibrate import cli
from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export
from calibrate.engines.read import read_artefact
from calibrate.engines.types import Ignored
from calibrate.errors import UserError
from calibrate.model.config_json import read_model_config
from calibrate.schema import TargetConfig
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import DecodeGeometry, UncalibratedLayer

FORMULA = "a * exp(b * target_sparsity)"


# Independent readers: the engines' published rules, written down once more.


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SkipSoftmaxAttentionConfig(_Strict):
    """TensorRT-LLM's rules: three keys, targets in [0, 1], a missing phase is 0."""

    algorithm: Literal["skip_softmax"]
    threshold_scale_factor: float | dict[str, float] | None = None
    target_sparsity: float | dict[str, float] | None = None

    @field_validator("target_sparsity")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        targets = value.values() if isinstance(value, dict) else [value]
        assert all(target is None or 0 <= target <= 1 for target in targets)
        return value

    def phase(self, name: str) -> float:
        value = self.threshold_scale_factor or 0.0
        return value.get(name, 0.0) if isinstance(value, dict) else value


class LlmArgs(_Strict):
    sparse_attention_config: SkipSoftmaxAttentionConfig


def read_trtllm(text: str) -> dict[str, float]:
    config = LlmArgs.model_validate(yaml.safe_load(text)).sparse_attention_config
    assert config.target_sparsity is None
    return {p: f for p in ("prefill", "decode") if (f := config.phase(p)) > 0}


def read_modelopt(config: dict[str, Any]) -> dict[str, float]:
    """Model-Optimizer's vLLM server reads a and b, TensorRT-LLM evaluates the formula."""
    groups = [
        g
        for g in config["sparse_attention_config"]["config_groups"].values()
        if g["algorithm"] == "skip_softmax"
    ]
    assert len(groups) == 1
    factors = groups[0]["threshold_scale_factor"]
    assert factors["formula"] == FORMULA
    found = {}
    for phase in ("prefill", "decode"):
        if phase in factors:
            a, b = factors[phase]["a"], factors[phase]["b"]
            assert a > 0
            target = groups[0]["target_sparsity"][phase]
            assert 0 <= target <= 1
            by_formula = eval(
                factors["formula"], {"exp": math.exp}, {"a": a, "b": b, "target_sparsity": target}
            )
            assert by_formula == a * math.exp(b * target)
            found[phase] = by_formula
    return found


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


def read_vllm(text: str) -> dict[str, float]:
    line = next(line for line in text.splitlines() if not line.startswith("#"))
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("model")
    parser.add_argument("--attention-config", type=json.loads)
    words = shlex.split(line)
    assert words[0] == "vllm"
    config = parser.parse_args(words[1:]).attention_config
    keys = {p: f"trtllm_skip_softmax_{p}_threshold_scale_factor" for p in ("prefill", "decode")}
    assert set(config) <= set(keys.values())
    return {p: config[key] for p, key in keys.items() if key in config}


def read_flashinfer(text: str) -> dict[str, float]:
    data = json.loads(text)
    assert data.pop("normalisation") == "per_request_kv_len"
    for phase in data.values():
        # At any length, both arguments mean the same threshold.
        assert phase["absolute"]["argument"] == "skip_softmax_threshold"
        assert (
            phase["absolute"]["scale_factor"]
            == phase["run_kwargs"]["skip_softmax_threshold_scale_factor"]
        )
    if "decode" in data:
        assert data["decode"]["run_kwargs"]["backend"] == "trtllm-gen"
    return {p: row["run_kwargs"]["skip_softmax_threshold_scale_factor"] for p, row in data.items()}


def test_golden_trtllm() -> None:
    made = export(thresholds(), "trtllm", gpu="sm90", served_min_len=8192)
    assert read_trtllm(made.text) == {"prefill": 587.18, "decode": 16.52}
    body = "".join(line for line in made.text.splitlines(True) if not line.startswith("#"))
    assert body == (
        "sparse_attention_config:\n  algorithm: skip_softmax\n  threshold_scale_factor:\n"
        "    prefill: 587.18\n    decode: 16.52\n"
    )
    assert "trtllm-serve MODEL --config" in made.text
    assert (
        'SkipSoftmaxAttentionConfig(threshold_scale_factor={"prefill": 587.18, "decode": 16.52})'
        in made.text
    )


def test_golden_sglang(tmp_path: Path) -> None:
    made = export(thresholds(), "sglang", gpu="sm90", phases=("prefill",), served_min_len=8192)
    made.write(tmp_path / "sglang.env")
    assert read_sglang(tmp_path / "sglang.env") == {"prefill": 587.18}
    assert "--attention-backend trtllm_mha" in made.text


def test_golden_vllm() -> None:
    made = export(thresholds(geometry=BLACKWELL), "vllm", gpu="sm100", served_min_len=8192)
    assert read_vllm(made.text) == {"prefill": 587.18, "decode": 16.52}
    assert "EXPERIMENTAL" in made.text and "42989" in made.text and "--engine modelopt" in made.text


def test_golden_flashinfer() -> None:
    made = export(thresholds(geometry=BLACKWELL), "flashinfer", gpu="sm103", served_min_len=8192)
    assert read_flashinfer(made.text) == {"prefill": 587.18, "decode": 16.52}


def test_golden_vllm_omni() -> None:
    made = export(
        thresholds(
            prefill=5000.0, geometry=BLACKWELL, min_kv_len={"prefill": 6000, "decode": 4096}
        ),
        "vllm-omni",
        gpu="sm100",
        phases=("prefill",),
        at_length=75_000,
    )
    words = shlex.split(made.text.splitlines()[-1])
    config = json.loads(words[words.index("--diffusion-attention-config") + 1])["default"]
    assert config["backend"] == "TRTLLM_ATTN"
    assert set(config["skip_softmax"]) == {"threshold"}
    assert config["skip_softmax"]["threshold"] == pytest.approx(0.0667, abs=1e-4)
    assert "75000 tokens" in made.text


def test_golden_tokenspeed() -> None:
    made = export(thresholds(), "tokenspeed", at_length=32_768, trust_geometry=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-softmax-threshold", type=float)
    line = made.text.splitlines()[-1]
    assert parser.parse_args(shlex.split(line)).skip_softmax_threshold == 16.52 / 32_768
    assert any("the smaller number is written" in loss for loss in made.sidecar["lost"])


def test_golden_modelopt_merges_without_touching_anything_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    before = (model / "config.json").read_text(encoding="utf-8")
    file = thresholds(geometry=MODELOPT, kv_heads=8)
    write_model(model, num_key_value_heads=8)
    before = (model / "config.json").read_text(encoding="utf-8")
    made = export(file, "modelopt", model=model, served_min_len=8192)
    diff = made.patch.diff()
    # A diff of pure additions but for the comma after the last key.
    assert [
        line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")
    ] == ['-  "name": "Ünïcode"']
    assert (model / "config.json").read_text(encoding="utf-8") == before
    backup = made.apply()
    assert backup.name == "config.json.bak" and backup.read_text(encoding="utf-8") == before
    after = json.loads((model / "config.json").read_text(encoding="utf-8"))
    found = read_modelopt(after)
    assert found == {
        "prefill": pytest.approx(587.18, rel=1e-12),
        "decode": pytest.approx(16.52, rel=1e-12),
    }
    assert after.pop("sparse_attention_config")["config_groups"]["group_0"]["targets"] == [
        "Qwen3Attention"
    ]
    assert after == json.loads(before)
    assert json.loads((model / "config.json.evidence.json").read_text())["engine"] == "modelopt"
    # Again: nothing to do, no second backup; other numbers: another backup.
    assert export(file, "modelopt", model=model).apply() == model / "config.json"
    assert not (model / "config.json.bak1").exists()
    changed = thresholds(prefill=100.0, geometry=MODELOPT, kv_heads=8)
    assert export(changed, "modelopt", model=model).apply().name == "config.json.bak1"
    assert read_modelopt(json.loads((model / "config.json").read_text()))[
        "prefill"
    ] == pytest.approx(100)


@pytest.mark.parametrize("section", [None, {"config_groups": {}, "kept": "\\n"}])
def test_apply_keeps_bytes_and_line_ends(
    section: Any, call: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {} if section is None else {"sparse_attention_config": section}
    config = write_model(tmp_path / "model", **changes) / "config.json"
    before = config.read_bytes().replace(b"\n", b"\r\n")
    config.write_bytes(before)
    thresholds().save(tmp_path / "t.yaml")
    flags = ("--engine", "modelopt", "--model", config.parent, "--apply")
    code, _, err = call("export", tmp_path / "t.yaml", *flags)
    assert code == 0 and "merged into" in err
    assert (config.parent / "config.json.bak").read_bytes() == before
    after = config.read_bytes()
    assert after.count(b"\r\n") == after.count(b"\n") > before.count(b"\n")
    assert section is not None or after.startswith(before.rstrip().rstrip(b"}").rstrip())
    # Again: nothing is merged, and that is what is said.
    code, _, err = call("export", tmp_path / "t.yaml", *flags)
    assert code == 0 and "nothing was merged" in err and "merged into" not in err
    assert config.read_bytes() == after


@pytest.mark.parametrize("engine", ["trtllm", "modelopt"])
def test_apply_without_a_model_writes_nothing(
    engine: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    code, out, err = run(
        thresholds(), "--engine", engine, "--apply", "-o", tmp_path / "applied.yaml"
    )
    assert (code, out) == (2, "") and f"but got {engine} without --model" in err
    assert [path.name for path in tmp_path.iterdir()] == ["t.yaml"]


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["Qwen3ForCausalLM"], "Qwen3Attention"),
        ({"a": 1}, None),
        ("LlamaForCausalLM", None),
        ([], None),
        (5, None),
    ],
)
def test_the_attention_class_comes_from_a_list_of_architectures(
    architectures: Any, expected: str | None, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", architectures=architectures)
    assert read_model_config(model).attention_class == expected


def test_modelopt_keeps_other_groups_and_producer(tmp_path: Path) -> None:
    other = {"algorithm": "sparse_softmax", "targets": ["A"], "sparsity_n": 2}
    section = {
        "config_groups": {"group_0": other},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
    model = write_model(tmp_path / "model", sparse_attention_config=section)
    export(thresholds(), "modelopt", model=model).apply()
    after = json.loads((model / "config.json").read_text())["sparse_attention_config"]
    assert after["config_groups"]["group_0"] == other and after["producer"] == section["producer"]
    assert after["config_groups"]["group_1"]["algorithm"] == "skip_softmax"


def group(formula: Any) -> dict[str, Any]:
    return {
        "algorithm": "skip_softmax",
        "threshold_scale_factor": {"formula": formula, "prefill": {"a": 1, "b": 1}},
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"config_groups": {"g": group("1 - exp(-a)")}}, "formula must be .* but it is `1 - exp"),
        ({"config_groups": {"g": group(None)}}, "formula must be"),
        (
            {"config_groups": {"g": group(FORMULA), "h": group(FORMULA)}},
            "one skip_softmax group, but it has 2",
        ),
        ({"sparse_algo": "softmax_skip"}, "older or foreign schema"),
    ],
)
def test_a_config_that_is_not_ours_to_replace_is_refused(
    tmp_path: Path, section: Any, message: str
) -> None:
    model = write_model(tmp_path / "model", sparse_attention_config=section)
    with pytest.raises(UserError, match=message):
        export(thresholds(), "modelopt", model=model)


def test_ignored_layers_match_exactly_themselves_in_every_reader(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    made = export(thresholds(dense=(1, 2)), "trtllm", model=model, gpu="sm90")
    config = json.loads(made.patch.after)["sparse_attention_config"]["config_groups"]["group_0"]
    names = [f"model.layers.{i}.self_attn" for i in range(LAYERS * 10)]
    for pattern_of in (
        lambda name: name,
        lambda name: f"*{name}*",
    ):  # TensorRT-LLM, Model-Optimizer
        hit = [
            i
            for i, n in enumerate(names)
            if any(fnmatch(n, pattern_of(p)) for p in config["ignore"])
        ]
        assert hit == [1, 2]
    # Without coefficients Model-Optimizer would take a threshold of 0.1.
    assert all(
        {"a", "b"} <= set(config["threshold_scale_factor"][p]) for p in ("prefill", "decode")
    )
    assert read_trtllm(made.text) == {"prefill": 587.18, "decode": 16.52}


def test_pinned_numbers_say_that_the_target_has_no_effect(tmp_path: Path) -> None:
    file = thresholds(fit={"prefill": {"refused": "R² too low", "points": 5}})
    with pytest.raises(
        UserError, match=r"needs a curve .* for prefill, but it has no fitted curve .*--pin"
    ):
        export(file, "modelopt")
    made = export(file, "modelopt", pin=True)
    assert read_modelopt(json.loads(made.text)) == {"prefill": 587.18, "decode": 16.52}
    assert sum("target_sparsity has no effect" in loss for loss in made.sidecar["lost"]) == 2


# Every export can be read back, or says what it lost.

ABSOLUTE = {"vllm-omni", "tokenspeed"}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "native"])
def test_numbers_come_back_or_their_loss_is_listed(engine: str, tmp_path: Path) -> None:
    draw = random.Random(engine)
    model = write_model(tmp_path / "model")
    for _ in range(40):
        blackwell = engine in ("vllm", "vllm-omni") or draw.random() < 0.5
        numbers = {p: 10 ** draw.uniform(-2, 3.5) for p in ("prefill", "decode")}
        phases = draw.choice([("prefill",), ("decode",), ("prefill", "decode")])
        phases = {"vllm-omni": ("prefill",), "tokenspeed": ("prefill", "decode")}.get(
            engine, phases
        )
        if engine in ("sglang", "flashinfer") and not blackwell:
            phases = ("prefill",)
        dense = (
            tuple(sorted(draw.sample(range(LAYERS), draw.randint(0, 3))))
            if engine in ("trtllm", "modelopt")
            else ()
        )
        file = thresholds(
            **numbers, geometry=BLACKWELL if blackwell else thresholds().geometry, dense=dense
        )
        made = export(
            file,
            engine,
            phases=phases,
            pin=True,
            model=model,
            trust_geometry=True,
            at_length=50_000 if engine in ABSOLUTE else None,
        )
        lost = " ".join(made.sidecar["lost"])
        path = tmp_path / "artefact"
        made.write(path)
        text = made.patch.after if engine == "modelopt" else made.text
        (tmp_path / "config.json").write_text(made.patch.after if made.patch else "{}")
        found = read_artefact(engine, tmp_path / "config.json" if engine == "modelopt" else path)
        for phase in phases:
            same = math.isclose(found.scale_factor[phase], numbers[phase], rel_tol=1e-12)
            assert same or (engine == "tokenspeed" and "the smaller number is written" in lost), (
                phase,
                text,
            )
        assert set(found.scale_factor) == set(phases)
        ignored = read_artefact("modelopt", tmp_path / "config.json").ignore if made.patch else ()
        assert ignored == tuple(f"model.layers.{i}.self_attn" for i in dense)
        # What no artefact can hold is always listed.
        assert "min_kv_len" in lost and "geometry" in lost
        if len(phases) == 1:
            assert "skips in one only" in lost
        if engine in ABSOLUTE:
            assert "1/length law" in lost
        assert json.loads((tmp_path / "artefact.evidence.json").read_text()) == made.sidecar


def test_native_loses_nothing(tmp_path: Path) -> None:
    made = export(per_layer(), "native")
    made.write(tmp_path / "t.yaml")
    assert Thresholds.load(tmp_path / "t.yaml") == per_layer()
    assert made.sidecar is None and not (tmp_path / "t.yaml.evidence.json").exists()


def test_the_sidecar_holds_the_evidence_of_exactly_these_numbers() -> None:
    own = export(thresholds(), "trtllm", gpu="sm90", served_min_len=8192).sidecar
    assert own["evidence"]["loss"]["kl"]["mean"] == 0.003
    assert own["holds_for"] == [{"server": "TensorRT-LLM", "gpu": "sm90"}]
    best = export(per_layer(), "trtllm", served_min_len=8192).sidecar
    assert best["evidence"]["loss"]["kl"]["mean"] == 0.004
    assert any("numbers per layer" in loss for loss in best["lost"])
    assert best["scale_factor"] == {"prefill": 587.18, "decode": 16.52}


# Guards.


@pytest.fixture
def run(tmp_path: Path, call: Callable[..., Any]) -> Callable[..., Any]:
    """`calibrate export` of a file."""

    def export(file: Thresholds, *arguments: object) -> tuple[int, str, str]:
        file.save(tmp_path / "t.yaml")
        return call("export", tmp_path / "t.yaml", *arguments)

    return export


SEEDED = thresholds().geometry.model_copy(
    update={"decode": DecodeGeometry(tile_kv=64, running_max="seeded")}
)
MANY = ("--served-min-len", 8192)
GUARDS: dict[str, tuple[Thresholds, tuple[Any, ...], str]] = {
    "threshold-1-at-length": (
        thresholds(),
        ("--engine", "trtllm", "--served-min-len", 512),
        r"`--served-min-len > scale_factor` must hold in prefill, but got 512 and .*587.*1.15 is 1 or more",
    ),
    "threshold-1-in-a-chunk": (
        thresholds(),
        ("--engine", "trtllm", "--chunk-size", 512),
        r"`--chunk-size > scale_factor` must hold .* larger chunk",
    ),
    "below-what-was-measured": (
        thresholds(),
        ("--engine", "trtllm", "--served-min-len", 2048),
        r"`--served-min-len >= min_kv_len` must hold .* min_kv_len=4096: nothing was measured below",
    ),
    "length-0": (thresholds(), ("--engine", "trtllm", "--served-min-len", 0), "at least 1 token"),
    "geometry": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm100"),
        r"geometry.prefill must be 32x128 for TensorRT-LLM on sm100 .* the numbers are for 64x128",
    ),
    "geometry-running-max": (
        thresholds(geometry=SEEDED),
        ("--engine", "trtllm"),
        "running_max must be ascending",
    ),
    "geometry-modelopt-heads": (
        thresholds(geometry=MODELOPT),
        ("--engine", "modelopt"),
        "every query head votes alone, but the numbers are for the 4 query heads",
    ),
    "geometry-unpublished": (
        thresholds(),
        ("--engine", "tokenspeed", "--at-length", 9000),
        "not published.*--trust-geometry",
    ),
    "sglang-hopper-decode": (
        thresholds(),
        ("--engine", "sglang", "--gpu", "sm90"),
        r"SGLang on sm90 silently ignores the decode number: .*XQA.*--phase prefill",
    ),
    "flashinfer-hopper-decode": (
        thresholds(),
        ("--engine", "flashinfer", "--gpu", "sm90"),
        "FlashInfer on sm90 silently ignores the decode",
    ),
    "trtllm-sm120-decode": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm121", "--phase", "decode"),
        "TensorRT-LLM on sm120 silently ignores the decode number",
    ),
    "vllm-hopper": (
        thresholds(),
        ("--engine", "vllm", "--gpu", "sm90"),
        "vLLM on sm90 silently ignores the prefill number",
    ),
    "gpu-unknown": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm80"),
        "--gpu must be one of: sm100, sm120, sm90",
    ),
    "phase": (
        thresholds(),
        ("--engine", "trtllm", "--phase", "both"),
        "--phase must be prefill or decode",
    ),
    "nothing": (thresholds(prefill=0.0, decode=0.0), ("--engine", "trtllm"), "nothing to export"),
    "phase-dense": (
        thresholds(decode=0.0),
        ("--engine", "trtllm", "--phase", "decode"),
        "above 0 in decode, but the file leaves it dense",
    ),
    "per-layer": (
        per_layer().model_copy(update={"scale_factor": thresholds(0.0, 0.0).scale_factor}),
        ("--engine", "sglang"),
        "the file's numbers differ by layer.*calibrate project RUN_DIR --engine sglang",
    ),
    "dense-layers": (
        thresholds(dense=(1,)),
        ("--engine", "sglang"),
        "differ by layer, and nothing that it can express was measured",
    ),
    "ignore-needs-config": (
        thresholds(dense=(1,)),
        ("--engine", "trtllm"),
        "config.json only; give --model",
    ),
    "uncalibrated": (
        thresholds(uncalibrated=(UncalibratedLayer(layer=1, reason="soft-cap"),)),
        ("--engine", "vllm"),
        r"layers \[1\] cannot be calibrated and must stay dense",
    ),
    "failed": (
        thresholds(evidence={"verdict": "failed"}),
        ("--engine", "trtllm"),
        "must be `passed` .* `failed`",
    ),
    "not-validated": (
        thresholds(evidence={}),
        ("--engine", "trtllm"),
        "`not validated`; .calibrate validate",
    ),
    "no-reference-length": (
        thresholds(),
        ("--engine", "tokenspeed", "--trust-geometry"),
        "with --at-length",
    ),
    "reference-length-too-short": (
        thresholds(),
        ("--engine", "tokenspeed", "--trust-geometry", "--at-length", 500),
        "`--at-length > scale_factor` must hold, but got 500 and 587.18",
    ),
    "reference-length-for-nothing": (
        thresholds(),
        ("--engine", "trtllm", "--at-length", 9000),
        "leave it out for trtllm",
    ),
    "one-phase-tokenspeed": (
        thresholds(),
        ("--engine", "tokenspeed", "--trust-geometry", "--at-length", 9000, "--phase", "prefill"),
        "one threshold to both phases, but only prefill",
    ),
    "length-0-native": (
        thresholds(),
        ("--engine", "native", "--served-min-len", "-3"),
        "--served-min-len must be at least 1 token, but got -3",
    ),
    "chunk-0-native": (
        thresholds(),
        ("--engine", "native", "--chunk-size", 0),
        "--chunk-size must be at least 1 token, but got 0",
    ),
    "chunk-0-for-decode": (
        thresholds(prefill=0.0),
        ("--engine", "trtllm", "--chunk-size", 0),
        "--chunk-size must be at least 1 token",
    ),
    "gpu-native": (
        thresholds(),
        ("--engine", "native", "--gpu", "banana"),
        "--gpu must be the name of a GPU family.*but got `banana`",
    ),
    "gpu-modelopt": (
        thresholds(),
        ("--engine", "modelopt", "--gpu", "banana"),
        "--gpu must be the name of a GPU family.*but got `banana`",
    ),
    "at-length-native": (
        thresholds(),
        ("--engine", "native", "--at-length", 9000),
        "leave it out for native",
    ),
    "phase-native": (
        thresholds(),
        ("--engine", "native", "--phase", "prefill"),
        "--phase must be left out for native",
    ),
    "model-missing-native": (
        thresholds(),
        ("--engine", "native", "--model", "/no/such"),
        "has no config.json",
    ),
    "nothing-cures": (
        thresholds(geometry=BLACKWELL),
        ("--engine", "vllm", "--gpu", "sm90", "--phase", "prefill"),
        "cure: choose another --gpu or engine",
    ),
    "apply-without-model": (
        thresholds(),
        ("--engine", "modelopt", "--apply"),
        "--apply needs --model",
    ),
    "model-missing": (
        thresholds(),
        ("--engine", "modelopt", "--model", "/no/such"),
        "has no config.json",
    ),
}


@pytest.mark.parametrize("name", GUARDS)
def test_guards_say_law_value_and_cure_and_exit_2(name: str, run: Callable[..., Any]) -> None:
    file, arguments, message = GUARDS[name]
    code, out, err = run(file, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert re.search(message, err, re.DOTALL), err


def test_a_projection_is_no_cure_for_tiles_that_are_not_published() -> None:
    with pytest.raises(UserError, match="cure: `--trust-geometry`") as refused:
        export(thresholds(), "tokenspeed", at_length=9000)
    assert "calibrate project" not in str(refused.value)


def test_any_engine_takes_a_gpu_that_exists() -> None:
    for gpu in ("sm80", "sm90a", "SM103", "gfx942"):
        assert export(thresholds(), "native", gpu=gpu).text == thresholds().to_yaml()
    file = thresholds(geometry=MODELOPT, kv_heads=8)
    assert export(file, "modelopt", gpu="sm80").sidecar["holds_for"][0]["gpu"] == "any"


@pytest.mark.parametrize("number", ["-1.0", ".nan", ".inf"])
def test_a_number_that_engines_would_swallow_is_refused(
    number: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    text = thresholds().to_yaml().replace("587.18", number)
    (tmp_path / "bad.yaml").write_text(text)
    sys.argv = ["calibrate", "export", str(tmp_path / "bad.yaml"), "--engine", "trtllm"]
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_model_mismatch_is_refused_by_shape_and_by_config_hash(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    digest = read_model_config(model).sha256
    known = thresholds(provenance={"model_config_sha256": digest})
    export(known, "modelopt", model=model).apply()
    export(known, "modelopt", model=model)  # our own key does not change the hash
    other = write_model(tmp_path / "other", rope_theta=5e5)
    with pytest.raises(UserError, match="config hash of file and --model must agree"):
        export(known, "modelopt", model=other)
    deeper = write_model(tmp_path / "deeper", num_hidden_layers=5)
    with pytest.raises(
        UserError, match=r"must agree, but the file is for tiny with \(4, 8, 2, 128\)"
    ):
        export(thresholds(), "modelopt", model=deeper)
    unknown = export(thresholds(), "modelopt", model=other)
    assert any("does not record its model's config hash" in text for text in unknown.warnings)


def test_dense_at_one_is_a_warning_where_the_engine_runs_dense() -> None:
    file = thresholds(geometry=MODELOPT, kv_heads=8)
    made = export(file, "modelopt", served_min_len=512)
    assert any("run dense" in text for text in made.warnings)
    assert made.sidecar["warnings"] == list(made.warnings)


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


def test_little_sparsity_is_said() -> None:
    file = thresholds()
    evidence = {
        **file.evidence,
        "sparsity": {"prefill": {"achieved": 0.05}, "decode": {"achieved": 0.5}},
    }
    made = export(file.model_copy(update={"evidence": evidence}), "trtllm")
    said = [text for text in made.warnings if "slower than their dense" in text]
    assert len(said) == 1 and said[0].startswith("prefill skips 5.0 %")


# The table of engines.


def test_every_engine_can_be_a_search_target() -> None:
    engines = set(get_args(TargetConfig.model_fields["engine"].annotation))
    assert engines == set(ENGINES) | {"scalar", "scalar+ignore"}


def test_hopper_decode_is_a_no_op_exactly_where_the_engines_say() -> None:
    ignoring = {
        name
        for name, engine in ENGINES.items()
        for server in engine.servers
        if server.gpu == "sm90" and isinstance(server.decode, Ignored)
    }
    assert ignoring == {"sglang", "flashinfer", "vllm"}


def test_an_export_needs_no_torch(tmp_path: Path) -> None:
    thresholds().save(tmp_path / "t.yaml")
    code = (
        "import sys; sys.argv = ['calibrate', 'export', sys.argv[1], '--engine', 'trtllm']\n"
        "from calibrate.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code, error\n"
        "assert not {'torch', 'transformers', 'optuna'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.yaml")], check=True, capture_output=True
    )


# The pages: every command in them runs.

PAGES = sorted((Path(cli.__file__).parent / "engines" / "pages").glob("*.md"))


def commands(page: Path) -> list[str]:
    blocks = re.findall(
        r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, smoke_run: Path) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_model(folder / "model")
    thresholds().save(folder / "thresholds.yaml")
    thresholds(geometry=BLACKWELL).save(folder / "blackwell.yaml")
    thresholds(decode=0.0, geometry=BLACKWELL).save(folder / "blackwell-prefill.yaml")
    shutil.copytree(smoke_run, folder / "run")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_pages_runs(
    page: Path, prepared: Path, smoke_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    if page.stem == "README":  # its last command needs a model that can run
        shutil.rmtree(folder / "model")
        shutil.copytree(smoke_model, folder / "model")
    monkeypatch.chdir(folder)
    found = commands(page)
    assert found
    for line in found:
        expected = int(line.rpartition("# exit ")[2]) if "# exit " in line else 0
        words = shlex.split(line, comments=True)
        if words[0] == "calibrate":
            monkeypatch.setattr(sys, "argv", words)
            try:
                cli.main()
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        else:
            code = subprocess.run(["bash", "-ec", line], check=False).returncode
        assert code == expected, line


def test_there_is_a_page_for_every_engine() -> None:
    assert {page.stem for page in PAGES} == set(ENGINES) | {"README"}
    assert CONFIG["num_hidden_layers"] == LAYERS
