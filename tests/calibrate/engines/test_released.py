"""Artefacts given to the released packages that read them; `make released` makes their environment.

Outside the default run: the packages are large, and their releases are not ours to time. A test skips where
its package is missing. What needs a GPU is not run: configs are built, signatures bound, tables read.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_files import BLACKWELL, HOPPER, MODELOPT, PAGES, TOKENSPEED, thresholds, write_model

from calibrate.engines import tiles
from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export
from calibrate.engines.types import Votes

pytestmark = pytest.mark.released
FACTOR, DECODE = 587.18, 16.52


def folder_of(package: str, page: str, module: str) -> Path:
    """The installed package's folder; its version must be the one in the page's heading."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: make released")
    heading = (PAGES / f"{page}.md").read_text(encoding="utf-8").partition("\n")[0]
    assert f" {version}" in heading, (
        f"checked with {version}: write it into the heading of {page}.md"
    )
    found = importlib.util.find_spec(module)  # does not import it
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def functions(path: Path) -> dict[str, list[str]]:
    """Arguments of the functions of a source file that cannot be imported without a GPU's packages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


# FlashInfer.


def test_flashinfer_s_functions_and_wrappers_take_what_is_written() -> None:
    folder_of("flashinfer-python", "flashinfer", "flashinfer")
    for gpu, geometry, phases in (
        ("sm90", HOPPER, ("prefill",)),
        ("sm100", BLACKWELL, ("prefill", "decode")),
    ):
        made = export(thresholds(geometry=geometry), "flashinfer", gpu=gpu, phases=phases)
        data = json.loads(made.text)
        for phase in phases:
            kwargs, takers = data[phase]["run_kwargs"], data[phase]["takers"][gpu]
            for name in takers["functions"]:
                module, _, function = name.rpartition(".")
                signature = inspect.signature(getattr(importlib.import_module(module), function))
                signature.bind_partial(**kwargs, **takers.get("function_kwargs", {}))
            if "wrapper" in takers:
                module, _, wrapper = takers["wrapper"].rpartition(".")
                kind = getattr(importlib.import_module(module), wrapper)
                inspect.signature(kind.__init__).bind_partial(None, **takers["init_kwargs"])
                inspect.signature(kind.run).bind_partial(None, **kwargs)
                assert "backend" not in inspect.signature(kind.run).parameters


def test_flashinfer_s_threshold_itself_is_for_two_functions_of_sm120() -> None:
    folder = folder_of("flashinfer-python", "flashinfer", "flashinfer")
    for file in ("decode.py", "prefill.py"):
        taking = [n for n, a in functions(folder / file).items() if "skip_softmax_threshold" in a]
        assert taking == []
    fp8 = functions(folder / "attention" / "cute_dsl" / "sm120_fmha.py")
    assert {n for n, a in fp8.items() if "skip_softmax_threshold" in a and n[0] != "_"} == {
        "sm120_fmha_fp8_ragged_prefill",
        "sm120_fmha_fp8_paged_prefill",
    }
    kernel = folder / "cute_dsl" / "attention" / "fmha" / "sm120" / "fmha_prefill_fp8_tma.py"
    assert "K/V runs right-to-left" in kernel.read_text(encoding="utf-8")


def test_flashinfer_s_generator_has_our_tiles_on_hopper_and_none_on_sm120() -> None:
    folder_of("flashinfer-python", "flashinfer", "flashinfer")
    library = importlib.import_module("flashinfer.jit.attention.fmha_v2.fmha_library")
    for dtype, votes in (
        ("bf16", tiles.HOPPER_PREFILL),
        ("fp16", tiles.HOPPER_PREFILL),
        ("e4m3", tiles.HOPPER_PREFILL_FP8),
    ):
        for size in (32, 64, 80, 128, 192, 256):
            kernel = library.generate_kernel_spec(90, size, dtype, enable_skip_softmax=True)
            assert (kernel.loop_step, (kernel.kv_loop_step,)) == (votes.tile_q, votes.keys(size))
    source = inspect.getsource(library.generate_jit_sources)
    configs = source[source.index("sm120_configs") :]
    assert "[False],  # no skip-softmax" in configs[: configs.index(")\n")]


# SGLang.


def test_sglang_reads_our_variables(tmp_path: Path) -> None:
    folder_of("sglang", "sglang", "sglang")
    export(thresholds(geometry=BLACKWELL), "sglang", gpu="sm100").write(tmp_path / "both.env")
    export(thresholds(), "sglang", gpu="sm90", phases=("prefill",)).write(tmp_path / "one.env")
    code = (
        "from sglang.srt.environ import envs; import json; print(json.dumps(["
        "envs.SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR.get(), "
        "envs.SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR.get()]))"
    )
    for file, expected in (("both.env", [FACTOR, DECODE]), ("one.env", [FACTOR, None])):
        line = f". {shlex.quote(str(tmp_path / file))}; {shlex.quote(sys.executable)} -c '{code}'"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_sglang_does_not_start_on_sm120_with_a_number() -> None:
    folder = folder_of("sglang", "sglang", "sglang")
    hook = (folder / "srt" / "arg_groups" / "attention_hook.py").read_text(encoding="utf-8")
    assert '"fp8_e4m3 KV cache or skip-softmax."' in hook
    why = next(server.prefill for server in ENGINES["sglang"].servers if server.gpu == "sm120")
    assert "skip-softmax" in why.why


def test_sglang_s_diffusion_takes_our_request() -> None:
    folder_of("sglang", "sglang-diffusion", "sglang")
    params = importlib.import_module("sglang.multimodal_gen.configs.sample.sampling_params")
    made = json.loads(export(thresholds(), "sglang-diffusion", gpu="sm90").text)
    found = params.resolve_skip_softmax_params(made["skip_softmax_params"])
    assert (found.threshold_scale_factor, found.start_step) == (FACTOR, 0)


# Model-Optimizer.


def test_model_optimizer_reads_our_config(tmp_path: Path) -> None:
    folder_of("nvidia-modelopt", "modelopt", "modelopt")
    plugins = "modelopt.torch.sparsity.attention_sparsity.plugins"
    reader = importlib.import_module(f"{plugins}.sparse_attn_config")
    names = "transformer.h.{layer}.attn"
    file = thresholds(
        geometry=MODELOPT, kv_heads=8, dense=(1,), provenance={"attention_modules": names}
    )
    made = export(
        file, "modelopt", gpu="any", model=write_model(tmp_path / "model", num_key_value_heads=8)
    )
    assert made.patch is not None
    config, preset = reader.load_from_checkpoint_metadata(
        SimpleNamespace(**json.loads(made.patch.after))
    )
    assert preset == "CHECKPOINT_CALIBRATED_SOFTMAX_SKIP"
    for name, skips in (
        ("transformer.h.0.attn.attn", True),
        ("transformer.h.1.attn.attn", False),
        ("transformer.h.10.attn.attn", True),
        ("model.layers.1.self_attn.attn", False),
    ):
        layer = reader.match_sparse_config(name, config)
        assert layer["enable"] == skips, name
        if skips:
            factors, targets = layer["threshold_scale_factor"], layer["target_sparse_ratio"]
            read = {phase: _at(factors[phase], targets[phase]) for phase in targets}
            assert read == pytest.approx({"prefill": FACTOR, "decode": DECODE}, rel=1e-12)


def _at(curve: dict[str, float], target: float) -> float:
    return curve["a"] * math.exp(curve["b"] * target)


def test_model_optimizer_s_server_refuses_what_we_refuse() -> None:
    folder = folder_of("nvidia-modelopt", "modelopt", "modelopt")
    runtime = folder / "torch" / "sparsity" / "attention_sparsity" / "plugins" / "vllm_runtime.py"
    text = runtime.read_text(encoding="utf-8")
    assert "speculative decoding is unsupported" in text
    assert "must be fp16 or bf16" in text


# vLLM and vLLM-Omni.


def test_vllm_refuses_our_line() -> None:
    """The day on which this fails, a release of vLLM has skip-softmax."""
    folder_of("vllm", "vllm", "vllm")
    attention = importlib.import_module("vllm.config.attention")
    made = export(thresholds(geometry=BLACKWELL), "vllm", gpu="sm100", experimental=True)
    words = shlex.split(made.text.splitlines()[-1])
    config = json.loads(words[words.index("--attention-config") + 1])
    with pytest.raises(ValueError, match="Unexpected keyword argument"):
        attention.AttentionConfig(**config)


def omni(text: str) -> Any:
    """The attention of vLLM-Omni's own config, from our line."""
    words = shlex.split(text.splitlines()[-1])
    config = json.loads(words[words.index("--diffusion-attention-config") + 1])
    data = importlib.import_module("vllm_omni.diffusion.data")
    backend = importlib.import_module("vllm_omni.diffusion.attention.backends.trtllm_attn")
    spec = data.parse_attention_config(config).default
    assert spec.backend == "TRTLLM_ATTN"
    return backend.SkipSoftmaxConfig.from_backend_kwargs(spec.backend_kwargs())


def test_vllm_omni_reads_a_threshold_at_one_length() -> None:
    folder_of("vllm-omni", "vllm-omni", "vllm_omni")
    file = thresholds(decode=0.0, geometry=BLACKWELL)
    skip = omni(export(file, "vllm-omni", at_length=75_000).text)
    assert skip.resolve_factor(75_000, None) == pytest.approx(FACTOR)


def test_vllm_omni_reads_a_curve_of_each_expert(tmp_path: Path) -> None:
    folder_of("vllm-omni", "vllm-omni", "vllm_omni")
    backends = "vllm_omni.diffusion.attention.backends"
    reader = importlib.import_module(f"{backends}.trtllm_calibration")
    by_expert, file = {}, thresholds(decode=0.0, geometry=BLACKWELL)
    for expert in ("transformer", "transformer_2"):
        made = export(file, "vllm-omni", model=write_model(tmp_path / expert))
        made.apply()
        config = json.loads((tmp_path / expert / "config.json").read_text())
        by_expert[expert] = reader.parse_sparse_attention_config(config["sparse_attention_config"])
    skip = omni(made.text)
    for name in ("transformer.blocks.0.attn1.attn", "transformer_2.blocks.3.attn1.attn"):
        curve = reader.resolve_layer_calibration(name, {"by_expert": by_expert})
        calibrated = replace(skip, a=curve["a"], b=curve["b"])
        for kv_len in (1000, 75_000):
            assert calibrated.resolve_factor(kv_len, None) == pytest.approx(FACTOR, rel=1e-12)


# tokenspeed, whose packages cannot be imported without a GPU's.


def test_tokenspeed_hands_its_option_to_prefill_alone() -> None:
    folder = folder_of("tokenspeed", "tokenspeed", "tokenspeed")
    made = export(thresholds(geometry=TOKENSPEED), "tokenspeed", at_length=32_768)
    assert made.text.splitlines()[-1] == f"--skip-softmax-threshold {FACTOR / 32_768!r}"
    arguments = (folder / "runtime" / "utils" / "server_args.py").read_text(encoding="utf-8")
    assert '"--skip-softmax-threshold",' in arguments
    layer = folder / "runtime" / "layers" / "attention" / "backends" / "paged" / "mha.py"
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(layer.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if any(keyword.arg == "skip_softmax_threshold" for keyword in node.keywords)
    ]
    assert calls == ["mha_prefill"]


def test_tokenspeed_s_kernel_has_our_tiles() -> None:
    try:
        files = importlib.metadata.files("tokenspeed-kernel-amd") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tokenspeed-kernel-amd is not installed: make released")
    path = next(f for f in files if str(f).endswith("gfx950/attention/mha/prefill.py"))
    tree = ast.parse(Path(os.fspath(path.locate())).read_text(encoding="utf-8"))
    config = next(n for n in ast.walk(tree) if getattr(n, "name", "") == "get_config")
    found = {
        node.targets[0].id: node.value.value
        for node in ast.walk(config)
        if isinstance(node, ast.Assign)
        if isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    votes = ENGINES["tokenspeed"].servers[0].prefill
    assert isinstance(votes, Votes)
    assert (found["block_m"], (found["block_n"],)) == (votes.tile_q, votes.keys(128))
