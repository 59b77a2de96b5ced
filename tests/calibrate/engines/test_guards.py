"""Every way in which an export is refused, or warns."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_files import (
    BLACKWELL,
    HOPPER,
    MODELOPT,
    TOKENSPEED,
    per_layer,
    thresholds,
    write_model,
)

from calibrate import cli
from calibrate.engines.catalogue import ENGINES, as_run, find_engine
from calibrate.engines.export import export, needed_options
from calibrate.engines.types import Votes
from calibrate.errors import UserError
from calibrate.model.config_json import read_model_config
from calibrate.proof.project import tiles_for
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import (
    DecodeGeometry,
    Geometry,
    PrefillGeometry,
    UncalibratedLayer,
)


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
PAIRS = thresholds().geometry.model_copy(
    update={"decode": thresholds().geometry.decode.model_copy(update={"tile_heads": 2})}
)


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
    "geometry-votes-of-part-of-a-group": (
        thresholds(geometry=PAIRS),
        ("--engine", "trtllm"),
        r"the 4 query heads of a KV head vote together, .* for votes of 2; calibrate without",
    ),
    "geometry-latent-decode": (
        thresholds(
            model=thresholds().model.model_copy(update={"head_dim": 192, "head_dim_v": 128})
        ),
        ("--engine", "trtllm", "--gpu", "sm100", "--phase", "decode"),
        r"compressed cache of latent attention \(MLA\).* no geometry holds there",
    ),
    "geometry-unpublished": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm120", "--phase", "prefill"),
        "prefill tiles of TensorRT-LLM on sm120 are not published.*cure: `--trust-geometry`",
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
        ("--engine", "vllm", "--gpu", "sm90", "--experimental"),
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
        ("--engine", "vllm", "--experimental"),
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
        thresholds(geometry=TOKENSPEED),
        ("--engine", "tokenspeed"),
        "with --at-length",
    ),
    "reference-length-too-short": (
        thresholds(geometry=TOKENSPEED),
        ("--engine", "tokenspeed", "--at-length", 500),
        "`--at-length > scale_factor` must hold, but got 500 and 587.18",
    ),
    "reference-length-for-nothing": (
        thresholds(),
        ("--engine", "trtllm", "--at-length", 9000),
        "leave it out for trtllm",
    ),
    # XQA's supportConfigCommon: with as many KV heads as query heads MMHA runs, and says nothing.
    "trtllm-hopper-decode-mha": (
        thresholds(kv_heads=8),
        ("--engine", "trtllm", "--gpu", "sm90"),
        r"a KV head must have 2 to 32 query heads for decode of TensorRT-LLM on sm90, but the model's has 1: "
        r".*silently ignores the number\n  cure: `--phase prefill` exports the prefill number only",
    ),
    "trtllm-sm120-decode-is-slower": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm120", "--phase", "decode"),
        r"a number even costs its fast one \(XQA\)",
    ),
    # SGLang 0.5.23 raises at start; FlashInfer 0.7.2 has no skipping fmha_v2 kernel there.
    "sglang-sm120": (
        thresholds(),
        ("--engine", "sglang", "--gpu", "sm120", "--phase", "prefill", "--trust-geometry"),
        "SGLang on sm120 does not start with the prefill number",
    ),
    "flashinfer-sm120": (
        thresholds(),
        ("--engine", "flashinfer", "--gpu", "sm120", "--phase", "prefill", "--trust-geometry"),
        "FlashInfer on sm120 cannot be given the prefill number: trtllm_fmha_v2_prefill .*"
        "sm120_fmha_fp8_ragged_prefill.*from the last to the first",
    ),
    "nothing-cures-a-phase-that-no-kernel-has": (
        thresholds(geometry=TOKENSPEED),
        ("--engine", "tokenspeed", "--at-length", 9000, "--phase", "decode"),
        "tokenspeed on gfx950 silently ignores the decode number",
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
        ("--engine", "vllm", "--gpu", "sm90", "--phase", "prefill", "--experimental"),
        "cure: choose another --gpu or engine",
    ),
    "apply-without-model": (
        thresholds(),
        ("--engine", "modelopt", "--apply"),
        "--apply needs --model",
    ),
    # fmha_v2 for e4m3: 64x256 up to head size 128.
    "fp8-cache-on-hopper": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm90", "--kv-dtype", "fp8"),
        r"geometry.prefill must be 64x256 for TensorRT-LLM on sm90 .* numbers are for 64x128"
        r".*--gpu sm90 --kv-dtype fp8` measures",
    ),
    "fp8-cache-sglang": (
        thresholds(),
        ("--engine", "sglang", "--gpu", "sm90", "--phase", "prefill", "--kv-dtype", "fp8_e4m3"),
        "geometry.prefill must be 64x256 for SGLang",
    ),
    "fp8-cache-flashinfer": (
        thresholds(),
        ("--engine", "flashinfer", "--gpu", "sm90", "--phase", "prefill", "--kv-dtype", "fp8"),
        "geometry.prefill must be 64x256 for FlashInfer",
    ),
    "fp8-cache-modelopt": (
        thresholds(geometry=MODELOPT),
        ("--engine", "modelopt", "--gpu", "any", "--phase", "prefill", "--kv-dtype", "fp8"),
        "Model-Optimizer's vLLM server refuses the prefill number: its KV cache must be",
    ),
    "fp8-cache-tokenspeed": (
        thresholds(geometry=TOKENSPEED),
        ("--engine", "tokenspeed", "--at-length", 9000, "--kv-dtype", "fp8"),
        "silently ignores the prefill number: no batch with such a KV cache",
    ),
    "kv-dtype-unknown": (
        thresholds(),
        ("--engine", "trtllm", "--kv-dtype", "int4"),
        "--kv-dtype must be one of: auto, bfloat16, .* but got `int4`",
    ),
    "kv-dtype-without-a-cache": (
        thresholds(geometry=BLACKWELL),
        ("--engine", "vllm-omni", "--at-length", 9000, "--kv-dtype", "fp8"),
        "--kv-dtype changes nothing for vllm-omni, but got fp8; leave it out",
    ),
    # decoderXQAImplJIT: TLLM_CHECK(!isSpecDec); vllm_runtime.py: "speculative decoding is unsupported".
    "speculative-trtllm-hopper": (
        thresholds(),
        ("--engine", "trtllm", "--gpu", "sm90", "--speculative"),
        r"TensorRT-LLM on sm90 refuses the decode number: XQA stops .*cure: `--phase prefill`",
    ),
    "speculative-modelopt": (
        thresholds(geometry=MODELOPT),
        ("--engine", "modelopt", "--gpu", "any", "--phase", "prefill", "--speculative"),
        "refuses the prefill number: it does not start with speculative decoding",
    ),
    "speculative-native": (
        thresholds(),
        ("--engine", "native", "--speculative"),
        "--speculative changes nothing for native",
    ),
    "backend-cake": (
        thresholds(geometry=BLACKWELL),
        ("--engine", "flashinfer", "--gpu", "sm100", "--backend", "cake"),
        "--backend must be trtllm-gen for flashinfer, but got cake: none of its own routes takes",
    ),
    "backend-cute-dsl": (
        thresholds(geometry=BLACKWELL),
        ("--engine", "flashinfer", "--gpu", "sm100", "--backend", "cute-dsl"),
        "got cute-dsl: its ragged prefill divides by the longest KV length of the batch",
    ),
    "backend-nobody-knows": (
        thresholds(),
        ("--engine", "trtllm", "--backend", "VANILLA"),
        "--backend must be TRTLLM for trtllm, but got VANILLA: .*; serve with TRTLLM",
    ),
    "backend-of-a-file": (
        thresholds(geometry=MODELOPT),
        ("--engine", "modelopt", "--backend", "triton"),
        "--backend changes nothing for modelopt",
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


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"native"}))
def test_no_other_engine_gets_numbers_of_dense_rows(engine: str, run: Callable[..., Any]) -> None:
    """Whatever its tiles are, published or not: it would skip in the last rows too."""
    for server in find_engine(engine).servers:
        votes = server.prefill
        if not isinstance(votes, Votes):
            continue
        keys = votes.keys(128) or (128,)
        prefill = PrefillGeometry(tile_q=votes.tile_q or 64, tile_kv=keys[0], dense_last=64)
        file = thresholds(geometry=Geometry(prefill=prefill, decode=SEEDED.decode))
        gpu = () if server.gpu == "any" else ("--gpu", server.gpu)
        code, out, err = run(
            file,
            "--engine",
            engine,
            "--phase",
            "prefill",
            "--trust-geometry",
            "--experimental",
            *gpu,
        )
        assert (code, out) == (2, "")
        law = f"geometry.prefill.dense_last must be 0 for {server.name}"
        assert law in err and "the numbers are for 64; calibrate with" in err, err


def test_our_own_engine_takes_dense_rows_and_a_projection_does_without_them(
    run: Callable[..., Any],
) -> None:
    prefill = PrefillGeometry(tile_q=64, tile_kv=128, dense_last=64)
    file = thresholds(geometry=thresholds().geometry.model_copy(update={"prefill": prefill}))
    code, out, _ = run(file, "--engine", "native")
    assert code == 0 and "dense_last: 64" in out
    tiles = tiles_for(find_engine("trtllm"), "sm90", file.geometry, ("prefill", "decode"), 128, 4)
    assert tiles == thresholds().geometry


def in_chunks(chunk: int, floor: int = 4096, geometry: Geometry = HOPPER) -> Thresholds:
    assert geometry.prefill is not None
    prefill = geometry.prefill.model_copy(update={"chunk": chunk})
    file = thresholds(geometry=geometry.model_copy(update={"prefill": prefill}))
    limits = file.min_kv_len.model_copy(update={"prefill": floor})
    return file.model_copy(update={"min_kv_len": limits})


@pytest.mark.parametrize(
    ("file", "served", "told"),
    [
        (
            in_chunks(8192),
            (),
            "was measured in chunks of 8192 tokens: serve with this prefill chunk",
        ),
        (in_chunks(8192), (8192,), None),
        (in_chunks(8192), (16384,), "chunks of 16384 have smaller thresholds, and skip less than"),
        (
            thresholds(),
            (8192,),
            "measured on whole prompts: with chunks of 8192 tokens all chunks but a prompt's last have "
            "larger thresholds, and skip more, than was measured; calibrate with "
            "`geometry.prefill.chunk: 8192`",
        ),
        (thresholds(), (), None),
    ],
    ids=["unknown", "the same", "larger", "measured on whole prompts", "whole prompts"],
)
def test_chunks_that_are_served_are_compared_with_those_that_were_measured(
    file: Thresholds, served: tuple[int, ...], told: str | None, run: Callable[..., Any]
) -> None:
    options = [part for size in served for part in ("--chunk-size", size)]
    code, _, err = run(file, "--engine", "trtllm", "--gpu", "sm90", *options)
    assert code == 0, err
    assert ("the prefill number was measured" in err) == (told is not None)
    assert told is None or told in err


@pytest.mark.parametrize(
    ("file", "options", "law"),
    [
        (
            in_chunks(8192),
            ("--engine", "sglang", "--phase", "prefill", "--chunk-size", 4096),
            r"`--chunk-size >= geometry.prefill.chunk` must hold, but got 4096 and 8192: smaller chunks have "
            "larger thresholds, so the engine skips more than was measured; serve with chunks of 8192, or",
        ),
        (
            in_chunks(2048),
            ("--engine", "trtllm", "--gpu", "sm90", "--chunk-size", 8192),
            r"`geometry.prefill.chunk >= min_kv_len` must hold in prefill, but got 2048 and min_kv_len=4096: "
            "nothing was measured below 4096 tokens, and the engine skips there too",
        ),
        (
            in_chunks(8192, geometry=TOKENSPEED),
            ("--engine", "tokenspeed", "--phase", "prefill", "--at-length", 8192),
            "geometry.prefill.chunk must be left out for tokenspeed on gfx950: its second chunk of a prompt "
            "and all later ones run dense, but the numbers are for chunks of 8192",
        ),
    ],
    ids=["smaller", "shorter than the floor", "second chunks are dense"],
)
def test_chunks_in_which_the_numbers_do_not_hold_are_refused(
    file: Thresholds, options: tuple[Any, ...], law: str, run: Callable[..., Any]
) -> None:
    code, out, err = run(file, *options)
    assert (code, out) == (2, "")
    assert law in err


def test_our_own_engine_takes_chunks_and_a_projection_keeps_them_where_they_are_served(
    run: Callable[..., Any],
) -> None:
    file = in_chunks(8192, 4096, BLACKWELL)
    code, out, _ = run(file, "--engine", "native")
    assert code == 0 and "chunk: 8192" in out
    for name, gpu, wanted in (("trtllm", "sm90", 8192), ("tokenspeed", "gfx950", None)):
        tiles = tiles_for(find_engine(name), gpu, file.geometry, ("prefill",), 128, 4)
        assert tiles.prefill is not None and tiles.prefill.chunk == wanted


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


def test_little_sparsity_is_said() -> None:
    file = thresholds()
    evidence = {
        **file.evidence,
        "sparsity": {"prefill": {"achieved": 0.05}, "decode": {"achieved": 0.5}},
    }
    made = export(file.model_copy(update={"evidence": evidence}), "trtllm")
    said = [text for text in made.warnings if "slower than their dense" in text]
    assert len(said) == 1 and said[0].startswith("prefill skips 5.0 %")


def wide(**changes: Any) -> Thresholds:
    """Numbers at the tiles of fmha_v2 for e4m3."""
    prefill = PrefillGeometry(tile_q=64, tile_kv=256)
    return thresholds(geometry=HOPPER.model_copy(update={"prefill": prefill}), **changes)


@pytest.mark.parametrize("engine", ["trtllm", "sglang", "flashinfer"])
def test_numbers_at_the_tiles_of_an_fp8_cache_hold_with_it_alone(engine: str) -> None:
    options: Any = {"gpu": "sm90", "phases": ("prefill",)}
    made = export(wide(), engine, kv_dtype="fp8", **options)
    assert made.sidecar["served"]["kv_dtype"] == "fp8"
    assert any("rounding of an FP8 KV cache" in loss for loss in made.sidecar["lost"])
    for cache in (None, "auto", "bf16"):
        with pytest.raises(UserError, match=r"must be 64x128 .* the numbers are for 64x256"):
            export(wide(), engine, kv_dtype=cache, **options)


def test_numbers_for_an_fp8_cache_are_exported_for_one_alone() -> None:
    plain = wide()
    section = plain.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})
    file = plain.model_copy(update={"model": section})
    options: Any = {"gpu": "sm90", "phases": ("prefill",)}
    made = export(file, "trtllm", kv_dtype="fp8", **options)
    assert not any("rounding" in loss for loss in made.sidecar["lost"])
    assert made.sidecar["model"]["kv_cache_dtype"] == "fp8_e4m3"
    for cache in (None, "bf16"):
        with pytest.raises(
            UserError, match=r"must have the KV cache that was calibrated, fp8_e4m3"
        ):
            export(file, "trtllm", kv_dtype=cache, **options)
    with pytest.raises(UserError, match="it has no KV cache and the numbers are for one of fp8"):
        export(file, "vllm-omni", experimental=True)
    assert "fp8_e4m3" in export(file, "native").text


def test_what_the_numbers_depend_on_is_asked_for() -> None:
    unsaid = export(thresholds(), "trtllm", gpu="sm90").warnings
    assert sum("--kv-dtype checks yours" in text for text in unsaid) == 1
    assert sum("--no-speculative" in text for text in unsaid) == 1
    said = export(thresholds(), "trtllm", gpu="sm90", kv_dtype="bf16", speculative=False).warnings
    assert not any("--kv-dtype" in text or "speculative" in text for text in said)
    # Prefill runs beside speculation, and 128 keys are a tile on Blackwell whatever the cache is.
    prefill = export(thresholds(), "trtllm", gpu="sm90", phases=("prefill",)).warnings
    assert not any("speculative" in text for text in prefill)
    blackwell = export(thresholds(geometry=BLACKWELL), "trtllm", gpu="sm100", kv_dtype="fp8")
    assert blackwell.sidecar["holds_for"] == [{"server": "TensorRT-LLM", "gpu": "sm100"}]


def test_a_projection_for_an_fp8_cache_measures_at_its_tiles() -> None:
    options: Any = ("sm90", HOPPER, ("prefill", "decode"), 128, 4)
    for cache, keys in ((None, 128), ("bfloat16", 128), ("fp8", 256)):
        engine = as_run(find_engine("trtllm"), cache, None)
        found = tiles_for(engine, *options).prefill
        assert found is not None and (found.tile_q, found.tile_kv) == (64, keys)
    made = needed_options(wide(), "trtllm", "sm90", "fp8")
    assert made == ["--gpu sm90", "--kv-dtype fp8"]


def test_a_cure_is_named_only_where_it_cures(run: Callable[..., Any]) -> None:
    """Prefill alone is no cure where prefill cannot have a number either."""
    _, _, err = run(thresholds(geometry=BLACKWELL), "--engine", "flashinfer", "--gpu", "sm120")
    assert "--phase prefill" not in err and "cure: choose another --gpu or engine" in err
    _, _, err = run(thresholds(), "--engine", "flashinfer", "--gpu", "sm90")
    assert "`--phase prefill` exports the prefill number only" in err
    _, _, err = run(thresholds(geometry=BLACKWELL), "--engine", "flashinfer", "--gpu", "sm90")
    assert "`--phase prefill`" in err and "calibrate project" in err


def test_speculation_costs_hopper_its_decode_number_only() -> None:
    options: Any = {"gpu": "sm90", "speculative": True}
    made = export(thresholds(), "trtllm", phases=("prefill",), **options)
    assert made.sidecar["scale_factor"] == {"prefill": 587.18}
    assert export(thresholds(geometry=BLACKWELL), "trtllm", gpu="sm100", speculative=True).text


@pytest.mark.parametrize(("kv_heads", "holds"), [(1, True), (2, True), (4, True), (8, False)])
def test_hopper_decode_needs_query_heads_that_share_a_kv_head(kv_heads: int, holds: bool) -> None:
    file = thresholds(kv_heads=kv_heads)
    export(file, "trtllm", gpu="sm90", phases=("prefill",))
    if holds:
        export(file, "trtllm", gpu="sm90")
        return
    with pytest.raises(UserError, match="2 to 32 query heads"):
        export(file, "trtllm", gpu="sm90")


def test_the_backend_that_skips_is_accepted() -> None:
    file = thresholds(geometry=BLACKWELL)
    assert (
        export(file, "flashinfer", backend="trtllm-gen").sidecar["served"]["backend"]
        == "trtllm-gen"
    )
    assert export(file, "sglang", backend="trtllm_mha").text


def test_an_export_for_one_reader_of_a_file_names_the_others(run: Callable[..., Any]) -> None:
    """TensorRT-LLM and Model-Optimizer's vLLM server read one `config.json`."""
    code, _, err = run(thresholds(), "--engine", "modelopt", "--gpu", "sm90")
    assert code == 0
    assert "holds for: TensorRT-LLM on sm90\n" in err
    assert re.search(
        r"does not hold for Model-Optimizer's vLLM server, .*: geometry.prefill must be 128x128 .*"
        "every query head votes alone",
        err,
    )
    assert "divides by the longest" not in err  # a note of the server for which it does not hold
    made = export(thresholds(geometry=MODELOPT, kv_heads=8), "modelopt", gpu="any")
    assert made.sidecar["does_not_hold_for"] == []
    assert any("divides by the longest" in loss for loss in made.sidecar["lost"])
