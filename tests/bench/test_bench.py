"""`calibrate bench` and the bench programs: what they run, print and refuse. The clock is a stand-in."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Result
from fresh_process import HEAVY, command, loaded_by

import skip_softmax as ss
from calibrate import bench
from calibrate.errors import UserError, WorkFailed
from calibrate.schema import CostConfig
from calibrate.search import cost
from skip_softmax import Thresholds
from skip_softmax.thresholds import types as th

pytestmark = pytest.mark.slow
PROGRAMS = ROOT / "kernels" / "bench"
SMALL = ("--dtype", "float16", "--length", "256", "--head-dim", "64", "--decode", "2x256")


@pytest.fixture
def verb(call: Callable[..., Result]) -> Callable[..., Result]:
    """`calibrate bench` in this process."""
    return partial(call, "bench")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of the bench folder, by name."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    return importlib.import_module


@pytest.fixture
def small(program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`timings` with a stand-in for the clock and the device, so that all else really runs."""
    pytest.importorskip("triton")
    timings, rivals = program("timings"), program("rivals")
    for cached in (rivals.say, rivals._flashinfer, rivals._fmha_v2):
        cached.cache_clear()

    def ready(call: Callable[[], object]) -> Callable[[], object]:
        call()
        return call

    def clock(call: Callable[[], object], repeats: int) -> float:
        call()
        return 4.0

    monkeypatch.setattr(timings, "ready", ready)
    monkeypatch.setattr(timings, "median_times", lambda calls, repeats: dict.fromkeys(calls, 2.0))
    monkeypatch.setattr(timings, "milliseconds", clock)
    monkeypatch.setattr(timings, "copy_bandwidth", lambda: 3.0)
    monkeypatch.setattr(timings, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(timings, "HEADS", 2)
    monkeypatch.setattr(timings, "KV_HEADS", 1)
    monkeypatch.setattr(timings, "SPARSITIES", (0.0, 0.57))
    monkeypatch.setattr(timings, "SINK_SPARSITIES", (0.57,))
    monkeypatch.setattr(timings, "DECODE_SPARSITIES", (0.0, 0.5))
    monkeypatch.setattr(timings, "gate", lambda dtype, backend, pages: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Abacus")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return timings


@pytest.fixture
def one_input(small: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`small` with a single, dense input per phase, where the number of inputs shows nothing."""
    monkeypatch.setattr(small, "SPARSITIES", (0.0,))
    monkeypatch.setattr(small, "SINK_SPARSITIES", ())
    monkeypatch.setattr(small, "DECODE_SPARSITIES", (0.0,))
    return small


# What it measures.


def test_a_graph_keeps_the_tensors_that_only_its_call_holds(
    program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    timings = program("timings")
    replays = []

    class Graph:
        def replay(self) -> None:
            replays.append(held())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    keys = torch.zeros(2)
    held = weakref.ref(keys)
    replay = timings.ready(partial(keys.add, 1))
    del keys
    gc.collect()
    replay()
    assert replays[0] is not None


def test_every_phase_is_measured_and_shown(
    small: Any, verb: Callable[..., Result], tmp_path: Path
) -> None:
    output = tmp_path / "rows.jsonl"
    code, out, err = verb(*SMALL, "--commit", "abc", "--output", output, "--json")
    assert code == 0, err
    document = json.loads(out)
    rows = document["rows"]
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    ours = [row for row in rows if row["backend"] == "triton"]
    assert [(row["phase"], row["inputs"], row.get("requested_sparsity")) for row in ours] == [
        ("decode", "blocks", 0.0),
        ("decode", "blocks", 0.5),
        ("prefill", "blocks", 0.0),
        ("prefill", "blocks", 0.57),
        ("prefill", "sink", 0.57),
        ("statistics", "blocks", None),
    ]
    assert all(row["device"] == "Abacus" and row["commit"] == "abc" for row in rows)
    for row in ours[:5]:
        assert (row["sparsity"] > 0) == (row["requested_sparsity"] > 0)
        assert row["speedup_to_dense"] == 1.0
        assert row["share_of_bound"] == pytest.approx(1 - row["sparsity"] / 2, abs=1e-3)
    assert ours[2]["tflops"] == pytest.approx(4 * 2 * 256 * 256 / 2 * 64 / 2.0 / 1e9, abs=1e-4)
    # PyTorch has flash attention on a CPU too; it has no cuDNN there, and says so.
    flash = [row for row in rows if row["backend"] == "flash"]
    assert [row["phase"] for row in flash] == ["decode", "prefill"]
    assert all(row["sparsity"] == 0.0 and row["ms"] == row["dense_ms"] for row in flash)
    if small.DEVICE == "cpu":
        assert err.count("cudnn refuses") == 2
        assert ours[2]["speedup_to_cudnn"] is None
    assert "flashinfer is not installed" in err or "flashinfer" in {r["backend"] for r in rows}


def test_the_table_goes_to_stdout_and_the_rest_to_stderr(
    small: Any, verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "SPARSITIES", (0.57,))
    monkeypatch.setattr(small, "sdpa_ready", lambda *_, causal: {"cudnn": int, "flash": int})
    theirs = {"cudnn": 3.0, "flash": 2.5}
    monkeypatch.setattr(
        small, "median_times", lambda calls, repeats: dict.fromkeys(calls, 2.0) | theirs
    )
    code, out, err = verb(*SMALL, "--phase", "prefill", "decode")
    assert code == 0, err
    for cell in (
        "Abacus",
        "float16",
        "to cuDNN dense",
        "1.50×",
        "TFLOP/s",
        "TB/s",
        "cudnn",
        "sink",
    ):
        assert cell in out, cell
    assert "2 × 2/1 heads × 1/256 × 64" in out and "…" not in out
    assert "Abacus" not in err and "2 × 2/1 heads × 1/256 × 64" in err


def test_each_backend_has_rows_under_its_name_beside_the_same_rivals(
    one_input: Any, verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = ss.attention, []

    def attention(*arguments: Any, backend: str, **keywords: Any) -> Any:
        asked.append(backend)
        return plain(*arguments, backend="triton", **keywords)

    monkeypatch.setattr(ss, "attention", attention, raising=False)
    code, out, err = verb(
        *SMALL, "--phase", "prefill", "decode", "--backend", "hopper,triton", "--json"
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    names = [row["backend"] for row in rows if row["phase"] == "prefill"]
    assert names.count("hopper") == names.count("triton") == 1
    assert names.count("flash") == 1 and asked.count("hopper") == asked.count("triton")
    assert "hopper" not in {row["backend"] for row in rows if row["phase"] == "decode"}
    assert "hopper has no kernel for decode" in err


def test_calls_through_a_block_table_take_turns_with_contiguous_ones(
    small: Any, verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "sdpa_ready", lambda *_, causal: {})
    monkeypatch.setattr(small, "SPARSITIES", (0.57,))
    monkeypatch.setattr(small, "SINK_SPARSITIES", ())
    monkeypatch.setattr(
        small,
        "median_times",
        lambda calls, repeats: {name: 3.0 if "pages" in name else 2.0 for name in calls},
    )
    code, out, err = verb(*SMALL, "--phase", "prefill", "--page", "64", "128", "--json")
    assert code == 0, err
    rows = [row for row in json.loads(out)["rows"] if row["backend"] == "triton"]
    assert [row.get("page") for row in rows] == [None, 64, 128]
    assert len({row["sparsity"] for row in rows}) == 1 and rows[0]["sparsity"] > 0
    assert [row.get("to_contiguous") for row in rows] == [None, 1.5, 1.5]
    assert "blocks, pages of 64" in err and "1.500×" in err


# FlashInfer.


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """The reference on one request of [tokens, heads, D]."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = ss.attention(*heads_first, scale_factor=scale_factor, backend="reference")
    return out[0].transpose(0, 1)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for FlashInfer with its documented signatures and layouts."""
    package, prefill = ModuleType("flashinfer"), ModuleType("flashinfer.prefill")
    package.__spec__ = ModuleSpec("flashinfer", None)

    def single_prefill_with_kv_cache(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, kv_layout: str
    ) -> torch.Tensor:
        assert causal and kv_layout == "NHD" and all(x.is_contiguous() for x in (q, k, v))
        assert q.shape == (256, 2, 128) and k.shape == v.shape == (256, 1, 128)
        return attend(q, k, v, 0.0)

    def trtllm_fmha_v2_prefill(
        qkv: tuple[torch.Tensor, torch.Tensor],
        input_layout: str,
        workspace_buffer: torch.Tensor,
        seq_lens: torch.Tensor,
        max_q_len: int,
        max_kv_len: int,
        bmm1_scale: float,
        bmm2_scale: float,
        batch_size: int,
        cum_seq_lens_q: torch.Tensor,
        cum_seq_lens_kv: torch.Tensor,
        block_tables: torch.Tensor | None = None,
        mask_mode: str = "causal",
        skip_softmax_threshold_scale_factor: float = 0,
    ) -> torch.Tensor:
        query, keys_values = qkv
        assert input_layout == "CONTIGUOUS_Q_KV" and mask_mode == "causal" and batch_size == 1
        assert query.shape == (256, 2, 128) and keys_values.shape == (256, 2, 1, 128)
        assert query.is_contiguous() and keys_values.is_contiguous()
        assert seq_lens.tolist() == [256] and seq_lens.dtype == torch.int32
        assert cum_seq_lens_q.tolist() == cum_seq_lens_kv.tolist() == [0, 256]
        assert max_q_len == max_kv_len == 256 and workspace_buffer.dtype == torch.uint8
        assert bmm1_scale == pytest.approx(128**-0.5) and bmm2_scale == 1.0
        factor = skip_softmax_threshold_scale_factor
        return attend(query, keys_values[:, 0], keys_values[:, 1], factor)

    package.single_prefill_with_kv_cache = single_prefill_with_kv_cache  # type: ignore[attr-defined]
    prefill.trtllm_fmha_v2_prefill = trtllm_fmha_v2_prefill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.prefill", prefill)
    return package


AT_128 = (
    "--dtype",
    "float16",
    "--length",
    "256",
    "--head-dim",
    "128",
    "--phase",
    "prefill",
    "--json",
)


def test_flashinfer_has_a_dense_row_and_its_hopper_kernel_one_per_input(
    small: Any, flashinfer: ModuleType, verb: Callable[..., Result]
) -> None:
    code, out, err = verb(*AT_128)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    (single,) = [row for row in rows if row["backend"] == "flashinfer"]
    assert (single["ms"], single["sparsity"], single["timing"]) == (4.0, 0.0, "queued calls")
    theirs = [row for row in rows if row["backend"] == "fmha_v2"]
    ours = [row for row in rows if row["backend"] == "triton"]
    for key in ("inputs", "requested_sparsity", "sparsity", "tile_q", "tile_kv"):
        assert [row[key] for row in theirs] == [row[key] for row in ours], key
    assert "not measured" not in err.replace("cudnn refuses prefill, so it is not measured", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("wrong", "flashinfer computes something else"),
        ("broken", "flashinfer fails, so it is not measured: no compiler"),
        ("older", "trtllm_fmha_v2_prefill has no ['batch_size', 'bmm1_scale', "),
        ("oldest", "has no trtllm_fmha_v2_prefill"),
    ],
)
def test_a_rival_that_cannot_be_trusted_has_no_row_and_is_named(
    one_input: Any, flashinfer: Any, verb: Callable[..., Result], change: str, said: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nmore lines")

    prefill: Any = sys.modules["flashinfer.prefill"]
    if change == "wrong":
        flashinfer.single_prefill_with_kv_cache = lambda q, k, v, **_: torch.zeros_like(q)
    elif change == "broken":
        flashinfer.single_prefill_with_kv_cache = broken
    elif change == "older":
        prefill.trtllm_fmha_v2_prefill = lambda query, kv_cache, workspace_buffer, **_: None
    else:
        del prefill.trtllm_fmha_v2_prefill
    code, out, err = verb(*AT_128)
    assert code == 0, err
    missing = "flashinfer" if change in ("wrong", "broken") else "fmha_v2"
    backends = {row["backend"] for row in json.loads(out)["rows"]}
    assert missing not in backends and {"flashinfer", "fmha_v2"} & backends
    assert err.count(said) == 1


# The gate, and what else goes wrong.


def test_the_gate_is_green_for_the_kernels_and_red_for_others(
    program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    timings = program("timings")
    monkeypatch.setattr(timings, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    assert timings.gate(torch.float16, "triton", 130, 300, pages=[64]) == []
    plain = ss.attention

    def never_skips(*arguments: Any, backend: str, **keywords: Any) -> Any:
        if backend != "reference":
            keywords["scale_factor"] = 0.0
        return plain(*arguments, backend="reference", **keywords)

    monkeypatch.setattr(ss, "attention", never_skips, raising=False)
    wrong = timings.gate(torch.float16, "hopper", 130, 300, pages=[64])
    assert len(wrong) == 4 and all(
        "hopper prefill" in line and "tiles, not" in line for line in wrong
    )
    assert ["in pages of 64" in line for line in wrong] == [False, True, False, True]


def test_a_red_gate_exits_1_and_times_nothing(
    small: Any, verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "gate", lambda dtype, backend, pages: [f"{backend} is wrong"])
    monkeypatch.setattr(small, "median_times", lambda *_: pytest.fail("it was timed"))
    code, out, err = verb(*SMALL)
    assert (code, out) == (1, "")
    assert err == "error: the gate is red, nothing is timed: triton is wrong\n"


def test_a_backend_that_cannot_run_here_is_refused(
    small: Any, verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gate(dtype: torch.dtype, backend: str, pages: Any) -> list[str]:
        raise NotImplementedError("this device is no sm_90")

    monkeypatch.setattr(small, "gate", gate)
    code, out, err = verb(*SMALL, "--backend", "hopper")
    assert (code, out) == (2, "")
    assert (
        err
        == "error: --backend hopper must run on this device, but it says: this device is no sm_90\n"
    )


def test_full_memory_exits_1_with_the_rows_so_far(
    one_input: Any, verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(one_input, "statistics_rows", full)
    code, out, err = verb(*SMALL, "--phase", "prefill", "statistics", "--json")
    assert code == 1 and {row["phase"] for row in json.loads(out)["rows"]} == {"prefill"}
    assert "CUDA out of memory.; lower --length" in err and "Traceback" not in err


def test_without_a_gpu_it_says_so_and_exits_2(
    verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = verb()
    assert (code, out) == (2, "")
    assert err.startswith("error: kernels are timed on a CUDA device, but torch ")
    assert "run this on a machine with an NVIDIA GPU" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--phase", "prefil"), "invalid choice: 'prefil'"),
        (("--backend", "triton,hoper"), "must be of triton, hopper, but got `hoper`"),
        (("--backend", "hopper", "--phase", "decode"), "no kernel for --phase decode"),
        (("--decode", "64"), "must be BATCHxTOKENS, but got `64`"),
        (("--decode", "0x64"), "must be BATCHxTOKENS, but got `0x64`"),
        (("--length", "0"), "above 0, but got `0`"),
        (("--repeats", "1.5"), "above 0, but got `1.5`"),
        (("--output", "nowhere/rows.jsonl"), "folder that exists, but got `nowhere/rows.jsonl`"),
        (("--speed",), "unrecognized arguments: --speed"),
    ],
)
def test_wrong_arguments_exit_2_before_torch_is_asked(
    verb: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    part: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    code, out, err = verb(*arguments)
    assert (code, out) == (2, "")
    assert part in err and "calibrate bench: error: " in err and "Traceback" not in err


def test_help_is_light() -> None:
    assert not loaded_by(command("bench", "--help")) & HEAVY


def test_help_names_the_verb_and_every_flag(
    verb: Callable[..., Result], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = verb("--help")
    assert (code, err) == (0, "") and out.startswith("usage: calibrate bench ")
    for flag in (
        "--phase",
        "--backend",
        "--length",
        "--head-dim",
        "--page",
        "--decode",
        "--dtype",
        "--json",
    ):
        assert flag in out


# Where it lies.


def test_a_wheel_holds_the_folder_under_the_name_that_is_looked_for(
    verb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside = bench._FOLDERS[0]
    assert inside.parent == ROOT / "calibrate" and not inside.exists()
    packaged = f'"kernels/bench" = "calibrate/{inside.name}"'
    assert packaged in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    shutil.copytree(PROGRAMS, tmp_path / inside.name)
    monkeypatch.setattr(bench, "_FOLDERS", (tmp_path / inside.name, PROGRAMS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = list(sys.path)
    assert verb()[0] == 2 and sys.path == before
    assert cost.load_curves(CostConfig(), 16384, 128).source["files"] == ["h100.jsonl"]


def test_an_installation_without_the_folder_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "_FOLDERS", (tmp_path / "missing",))
    with pytest.raises(UserError, match=r"must lie in .*missing.*install the package again"):
        bench.folder()


# A whole model.


@pytest.fixture(scope="module")
def file(smoke_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thresholds file that skips tiles of the tiny model in both phases."""
    pytest.importorskip("transformers")
    from calibrate.model.load import load
    from calibrate.schema import ModelConfig

    loaded = load(ModelConfig(path=str(smoke_model), device="cpu"))
    layer = loaded.calibratable[0]
    path = tmp_path_factory.mktemp("thresholds") / "thresholds.yaml"
    Thresholds(
        model=th.ModelSection(
            name=loaded.name, sha256=loaded.sha256, layers=len(loaded.layers), q_heads=layer.q_heads,
            kv_heads=layer.kv_heads, head_dim=layer.head_dim, dtype="float32",
        ),
        geometry=th.Geometry(
            prefill=th.PrefillGeometry(tile_q=16, tile_kv=16), decode=th.DecodeGeometry(tile_kv=16)
        ),
        min_kv_len=th.MinKvLen(prefill=200, decode=200),
        scale_factor=th.ScaleFactors(prefill=50, decode=50),
    ).save(path)  # fmt: skip
    return path


@pytest.fixture
def end_to_end(
    program: Callable[[str], Any], file: Path, smoke_model: Path
) -> Callable[..., tuple[Any, int]]:
    """The module, and its exit code on the tiny model."""
    module = program("end_to_end")

    def call(*arguments: object) -> tuple[Any, int]:
        usual = ("--thresholds", file, "--model", smoke_model, "--device", "cpu", "--length", 256)
        return module, module.main(
            [str(a) for a in (*usual, "--repeats", 2, "--steps", 4, *arguments)]
        )

    return call


def test_a_model_is_measured_end_to_end(
    end_to_end: Callable[..., tuple[Any, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "end-to-end.json"
    _, code = end_to_end("--batch", 2, "--commit", "abc", "--output", output)
    assert code == 0
    document, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert document["commit"] == "abc" and document["versions"]["torch"] == torch.__version__
    assert document["shape"]["length"] == 256 and document["shape"]["batch"] == 2
    assert 0 < document["sparsity"]["prefill"] < 1 and 0 < document["sparsity"]["decode"] < 1
    assert document["kl_nothing_skipped"] < 1e-6 < document["kl_calibrated"]
    assert [row["setting"] for row in document["rows"]] == [
        "own attention (sdpa)", "kernels, nothing skipped", "kernels, calibrated",
    ]  # fmt: skip
    for row in document["rows"]:
        assert row["setting"] in printed
        for phase in ("ttft", "tpot"):
            assert row[phase]["wall_ms"] > 0 and row[phase]["device_ms"] is None
            own = document["rows"][0][phase]["wall_ms"]
            assert row[phase]["wall_ratio"] == pytest.approx(own / row[phase]["wall_ms"], rel=0.01)
    assert document["capture"]["wall_ratio"] > 0 and document["capture"]["device_ratio"] is None
    assert "Capture takes" in printed and "None" not in printed


def event(name: str, microseconds: float, device: str = "CUDA") -> SimpleNamespace:
    from torch.autograd import DeviceType

    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=getattr(DeviceType, device), time_range=span)


ATTENTION_KERNELS = (
    "_prefill",
    "_hopper_prefill",
    "_decode",
    "_combine",
    "_statistics",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(Flash_fwd_params)",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
    "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<half_t>::Params)",
)


@pytest.mark.parametrize("name", ATTENTION_KERNELS)
def test_device_time_is_that_of_kernels_and_copies_and_knows_attention(
    program: Callable[[str], Any], name: str
) -> None:
    found = program("end_to_end").device_times(
        [
            event(name, 3000.0),
            event(name, 1000.0),
            event("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64", 10000.0),
            event("Memcpy DtoD (Device -> Device)", 2000.0),
            event("Stream Sync", 50000.0),
            event("cudaLaunchKernel", 70000.0, "CPU"),
        ],
        calls=2,
    )
    assert found["device_ms"] == 8.0 and found["attention_ms"] == 2.0
    assert found["attention_share"] == 0.25
    assert found["attention_kernels"] == {name: 2.0}


def test_a_profile_without_attention_is_no_result(program: Callable[[str], Any]) -> None:
    module = program("end_to_end")
    with pytest.raises(WorkFailed, match="saw none"):
        module.device_times([event("cudaLaunchKernel", 1.0, "CPU")], calls=1)
    with pytest.raises(WorkFailed, match=r"known as attention.*sm90_xmma_gemm"):
        module.device_times([event("sm90_xmma_gemm", 1.0)], calls=1)


def test_the_table_has_ratios_and_shares_of_the_device(program: Callable[[str], Any]) -> None:
    module = program("end_to_end")
    row = {"wall_ms": 8.0, "device_ms": 4.0, "attention_ms": 1.0, "attention_share": 0.25}
    half = {"wall_ms": 8.0, "device_ms": 2.0, "attention_ms": 0.5, "attention_share": 0.25}
    rows = [
        {"setting": "own", "ttft": dict(row), "tpot": dict(row)},
        {"setting": "ours", "ttft": dict(half), "tpot": dict(row)},
    ]
    module.with_ratios(rows)
    assert rows[1]["ttft"]["attention_ratio"] == 2.0
    document = {
        "model": "m",
        "dtype": "float16",
        "shape": {"length": 8128, "batch": 1},
        "device": "Abacus",
        "sparsity": {"prefill": 0.4, "decode": 0.6},
        "rows": rows,
        "capture": {"wall_ratio": 1.5, "device_ratio": 1.25},
    }
    text = module.table(document)
    assert "| ours | 8.000 | 1.00× | 2.000 | 2.00× | 25% | 8.000 | 1.00× | 4.000 | 1.00× |" in text
    assert "Capture takes 1.50 times a plain forward, 1.25 times on the device." in text


def test_a_red_gate_of_a_model_exits_1(
    end_to_end: Callable[..., tuple[Any, int]],
    program: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program("end_to_end"), "kl_divergence", lambda *_: 0.5)
    _, code = end_to_end()
    printed = capsys.readouterr()
    assert (code, printed.out) == (1, "")
    assert (
        "error: the gate is red" in printed.err and "0.0001 nats/token, but is 0.5" in printed.err
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--thresholds", "missing.yaml"), "missing.yaml"),
        (("--model", "./missing"), "model.path: `./missing` does not exist"),
        (("--length", "2000"), "2000 + 4 > 1024"),
    ],
)
def test_wrong_input_of_a_model_exits_2(
    end_to_end: Callable[..., tuple[Any, int]],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    part: str,
) -> None:
    _, code = end_to_end(*arguments)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("error: ") and part in printed.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--steps", "0"), "--steps must be above 0"),
        (("--length", "8"), "at least 16 tokens"),
        (("--output", "nowhere/x.json"), "folder that exists"),
    ],
)
def test_wrong_numbers_of_a_model_exit_2(
    end_to_end: Callable[..., tuple[Any, int]],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    part: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        end_to_end(*arguments)
    assert stop.value.code == 2 and part in capsys.readouterr().err


def test_thresholds_of_another_shape_exit_2(
    end_to_end: Callable[..., tuple[Any, int]],
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        file.read_text().replace("layers: 4", "layers: 5").replace("sha256: ", "sha256: 0")
    )
    _, code = end_to_end("--thresholds", other)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert "was made for weights other than" in printed.err
    assert "error: --thresholds: (layers, q_heads, kv_heads, head_dim)" in printed.err
