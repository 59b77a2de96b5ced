"""Every kernel compiles for every promised GPU without one, and spills no more than is written here.

Registers and spills go to the file that SKIP_SOFTMAX_RESOURCES names, when it is set. A second Triton (a
folder that SKIP_SOFTMAX_TRITON36 names) is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Runs in a process without the interpreter, which cannot compile, and with the Triton under test.
COMPILE = """
import json, os, re, subprocess, sys
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from skip_softmax import launch
from skip_softmax.hopper import prefill as hopper
from skip_softmax.hopper.prefill_kernel import _hopper
from skip_softmax.meaning import histogram
from skip_softmax.meaning.call import Call
from skip_softmax.triton import decode, prefill
from skip_softmax.triton.decode_kernel import _combine, _decode
from skip_softmax.triton.prefill_kernel import _prefill
from skip_softmax.triton.statistics_kernel import _statistics

D, TILE = 128, 128
KNOWS_BLACKWELL = tuple(map(int, triton.__version__.split(".")[:2])) >= launch.KNOWS_BLACKWELL


def assemble_plainly(backend=None, stages=None, options=None, language=None, arch=None):
    '''Makes Triton's last stage ptxas as it is by default, and keeps what it says: it need not run twice.'''
    if stages is None:
        return "ptxas by default", None  # what the cache's key says of it

    def assemble(ptx, metadata):
        binary = Path(os.environ["TRITON_CACHE_DIR"], f"{os.getpid()}.cubin")
        command = [get_ptxas(arch).path, "-v", "--gpu-name", sm_arch_from_capability(arch), "-", "-o", binary]
        done = subprocess.run(command, input=ptx, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        metadata["ptxas"] = done.stderr
        return binary.read_bytes()

    stages["cubin"] = assemble


triton.knobs.runtime.add_stages_inspection_hook = assemble_plainly


def compile(kernel, types, constants, arch, warps, registers=None, source=ASTSource):
    names = kernel.arg_names
    types = {**{n: "i32" for n in names if n.startswith("stride")}, **types}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    free = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    there = {n: t for n, t in signature.items() if n not in free}
    aligned = [n for n, t in there.items() if t[0] == "*" or (t == "i32" and n.startswith("stride"))]
    source = source(
        kernel, signature, {(names.index(n),): v for n, v in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": warps, **({"maxnreg": registers} if registers else {})}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = compiled.metadata.ptxas
    return {
        "registers": max(map(int, re.findall(r"Used (\\d+) registers", said))),
        # ptxas gives up running products in the background when it does not follow their registers.
        "serialized": "serialized" in said,
        "spilled_bytes": sum(map(int, re.findall(r"(\\d+) bytes spill stores", said))),
        "shared_bytes": compiled.metadata.shared,
    }


SHARED = {80: 166912, 90: 232448, 100: 232448}
MOST = {80: 32, 90: 64, 100: 64}  # heads of a latent cache that vote together


def tile_type(on, rows, columns, fp8=False):
    number = "fp8e4nv" if fp8 else "bf16"
    return f"tensordesc<{number}[{rows}, {columns}]>" if on else f"*{number}"


def fp8_types(fp8):
    # With a scale per head on the device, which takes most code.
    types = {"k_scales": "*fp32", "v_scales": "*fp32", "v_scale": "fp32"}
    there = dict(v_scale=None) if fp8 else dict.fromkeys(types)
    return types, {**there, "K_EACH": fp8, "V_EACH": fp8}


def prefill_case(
    arch, head_dim, armed, packed=False, window=False, single=False, dense_last=False, served=False, page=0,
    value_dim=None, fp8=False,
):
    value_dim = value_dim or head_dim
    first, rest = launch.pieces(head_dim, torch.float32 if single else torch.bfloat16)
    config = prefill.choose(
        arch // 10, SHARED[arch], 4 if single else 2, first + rest, value_dim, 64, TILE, page
    )
    number = "*fp32" if single else "*bf16"
    tma = config.tma and not single
    scales, scaled = fp8_types(fp8)
    types = {"q": number, "k": number if single else tile_type(tma, TILE, first, fp8),
             "k_tail": tile_type(tma, TILE, rest),
             "v": number if single else tile_type(tma, TILE, value_dim, fp8),
             "out": number, "stats": "*i64", "factor": "fp32",
    "scale": "fp32",
             "q_len": "i32", "kv_len": "i32", "window": "i32", "dense_last": "i32", "min_kv_len": "i32",
             "q_starts": "*i32", "kv_starts": "*i32", "factors": "*fp32", "table": "*i32", "kv_lens": "*i32",
             **scales}
    constants = dict(
        **scaled,
        q_lens=None, PAGE=page, GROUP=16, HEAD_DIM=head_dim, HEAD_DIM_V=value_dim, WIDTH=first, TAIL=rest,
        WIDTH_V=value_dim, BLOCK_M=config.block_m, TILE_Q=64, TILE_KV=TILE, CAUSAL=True, WINDOWED=window,
        ARMED=armed,
        TWO_WAYS=config.two_ways, PRIVATE=config.private, PROBE=config.probe, SPAN=config.span,
        TMA=config.tma, LEADS=packed, STATS=window or served, SUMMED=served,
        PRECISION="bf16x6" if single else "tf32", STAGES=config.stages,
        SPARSE_STAGES=config.sparse_stages,
    )
    if not rest:
        constants["k_tail"] = None
    if not dense_last:
        constants["dense_last"] = None
    if not packed:
        constants.update(q_starts=None, kv_starts=None)
    constants |= dict(kv_starts=None) if page else dict(table=None, stride_table=None, kv_lens=None)
    if not served:
        constants |= dict(factors=None, min_kv_len=None)
    return compile(_prefill, types, constants, arch, config.warps, config.registers)


def latent_call(head_dim, heads, tile):
    dtype = torch.bfloat16
    return Call(1, 4096, 128, 1, head_dim, launch.pieces(head_dim, dtype)[0], dtype, 1.0, None, tile,
                running_max="seeded", tile_heads=heads, aliased=True)


def decode_case(
    arch, page, armed, tokens=1, batch=64, head_dim=D, tile=64, single=False, served=False, split=True,
    fp8=False, heads=16
):
    first, rest = launch.pieces(head_dim, torch.float32 if single else torch.bfloat16)
    value_dim = first if head_dim > 256 else head_dim
    size = tile * head_dim * (4 if single else 1 if fp8 else 2)
    scales, scaled = fp8_types(fp8)
    kv = "*fp8e4nv" if fp8 else "*fp32" if single else "*bf16"
    ahead = 2 * size <= decode.AHEAD_BYTES and not fp8
    config, stages = decode.choose(
        batch * 4, 256, 132, 16 * tokens, 2 * size, ahead=ahead, paged=page > 0, fp8=fp8, armed=armed
    )
    if head_dim > 256:
        call, on = latent_call(head_dim, heads, tile), launch.Device(arch // 10, SHARED[arch])
        assert decode.why_not(call, on) is None
        config, stages = decode.latent_config(call, heads * tokens, on)
    elif not ahead:
        stages = decode.stages_that_fit(stages, size, size, 16 * tokens, single, armed, SHARED[arch])
    number = "*fp32" if single else "*bf16"
    types = {**scales, "q": number, "k": kv, "v": kv, "out": "*bf16", "parts": "*fp32", "lse": "*fp32",
             "stats": "*i64", "kv_lens": "*i32", "table": "*i32", "factor": "fp32", "scale": "fp32",
             "kv_len": "i32", "window": "i32", "min_kv_len": "i32", "factors": "*fp32",
             "requests": "i32", "programs": "i32"}
    constants = dict(
        **scaled,
        HALVES=fp8, TOKENS=tokens, GROUP=heads, SHARE=128 // heads, ROWS=heads * tokens, HEAD_DIM=head_dim,
        HEAD_DIM_V=value_dim, WIDTH=first, TAIL=rest, WIDTH_V=value_dim,
        ALIASED=head_dim > 256, TILE_KV=tile, PAGE=page, WINDOWED=False, ARMED=armed, SEEDED=True,
        SPLIT=split, LEAST=4, EARLY=split and arch >= 90, STATS=served, SUMMED=served,
        PRECISION="bf16x6" if single else "tf32", AHEAD=ahead, STAGES=stages,
    )
    if not page:
        constants["table"] = None
    if not served:
        constants |= dict(factors=None, min_kv_len=None)
        if not page:
            constants["kv_lens"] = None
    if not split:
        constants |= dict(parts=None, lse=None)
    return compile(_decode, types, constants, arch, config.warps, config.registers)


def combine_case(arch, alike):
    types = {"parts": "*fp32", "lse": "*fp32", "out": "*bf16", "kv_lens": "*i32", "kv_len": "i32",
             "window": "i32", "requests": "i32", "programs": "i32"}
    constants = dict(TOKENS=1, GROUP=16, HEAD_DIM_V=D, WIDTH_V=32, TILE_KV=64, WINDOWED=False, LEAST=4,
                     BLOCK=64, EARLY=arch >= 90)
    if alike:
        constants["kv_lens"] = None
    return compile(_combine, types, constants, arch, 4)


def statistics_case(arch, in_decode, dense_last=False, lead=False, fp8=False):
    tma = arch >= 90
    kv = tile_type(tma, TILE, D, fp8)
    scales, scaled = fp8_types(fp8)
    types = {"q": "*bf16", "k": kv, "v": kv, "out": "*bf16", "counts": "*i64", "mass": "*i64",
    "gaps": "*fp32",
             "weights_log2": "*fp32", "row_lse": "*fp32", "cache_scale": "fp32", "q_len": "i32",
             "kv_len": "i32", **scales, "window": "i32", "dense_last": "i32", "lead": "i32", "items": "i32",
             "blocks": "i32", "note_blocks": "i32"}
    pack = 16 if in_decode else 1
    constants = dict(
        **scaled,
        HEADS=4 if in_decode else 64, Q_GROUP=pack, KV_GROUP=1 if in_decode else 16, PACK=pack, HEAD_DIM=D,
        HEAD_DIM_V=D, WIDTH=D, TAIL=0, WIDTH_V=D, BLOCK_M=128, SUBS=1, VOTE_ROWS=pack if in_decode else 64,
        BLOCK_N=TILE,
        PARTS=1, CHUNK=16, CAUSAL=True, WINDOWED=False, SEEDED=in_decode, DECODE=in_decode, LOW=histogram.LOW,
        PER_OCTAVE=histogram.PER_OCTAVE, BINS=histogram.BINS, TMA=tma, TMA_V=tma, PRECISION="tf32",
        STAGES=3, k_tail=None,
    )
    if not dense_last:
        constants["dense_last"] = None
    if not lead:
        constants["lead"] = None
    return compile(_statistics, types, constants, arch, 8)


def hopper_case(
    head_dim, armed, lengths="", causal=True, dense_last=False, page=0, min_kv_len=False, value_dim=None
):
    value_dim = value_dim or head_dim
    first, rest = launch.pieces(head_dim, torch.bfloat16)
    groups, box = hopper.GROUPS[head_dim, value_dim], hopper.box_of(page)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    types = {name: f"tensordesc<bf16[1, 1, {rows}, {columns}],{layout!r}>"
             for name, rows, columns in (("q", 64, first), ("k", box, first), ("v", box, value_dim),
                                         ("q_tail", 64, rest), ("k_tail", box, rest))}
    types |= {"out": "*bf16", "stats": "*i64", "counter": "*i32", "factors": "*fp32", "factor": "fp32",
              "scale": "fp32", "items": "i32", "group": "i32", "kv_heads": "i32", "blocks": "i32",
              "near": "i32", "q_len": "i32", "kv_len": "i32", "dense_last": "i32", "min_kv_len": "i32",
              "table": "*i32", "pages": "i32",
              "q_starts": "*i32", "kv_starts": "*i32", "q_lens": "*i32", "kv_lens": "*i32"}
    warps, heavy, light = hopper.partition(groups, box)
    constants = dict(GROUPS=groups, D=head_dim, TAIL=rest, DV=value_dim,
                     V_SLOTS=hopper.V_SLOTS.get((head_dim, value_dim), 3), TILE=TILE, CAUSAL=causal,
                     ARMED=armed, EMPTY=bool(lengths),
                     LEADS=bool(lengths), PAGE=page, BOX=box, SUMMED=page > 0, WARPS=warps, HEAVY=heavy,
                     LIGHT=light)
    given = {
        "q_starts": lengths == "packed", "kv_starts": lengths == "packed" and not page,
        "q_lens": lengths == "padded", "kv_lens": lengths == "padded" or page, "table": page, "pages": page,
        "q_tail": rest, "k_tail": rest,
        "factors": lengths, "stats": lengths, "dense_last": dense_last, "min_kv_len": min_kv_len,
    }
    constants |= {name: None for name, there in given.items() if not there}
    return compile(_hopper, types, constants, 90, 4, source=GluonASTSource)


arch = int(sys.argv[1])
cases = {
    "decode": lambda: decode_case(arch, 0, True),
    "decode dense": lambda: decode_case(arch, 0, False),
    "decode 64": lambda: decode_case(arch, 0, True, head_dim=64),
    "decode 64 dense": lambda: decode_case(arch, 0, False, head_dim=64),
    "decode 64 paged 16": lambda: decode_case(arch, 16, True, head_dim=64),
    "decode whole": lambda: decode_case(arch, 0, True, split=False),
    "decode whole paged 64": lambda: decode_case(arch, 64, False, split=False, served=True),
    "decode paged 16": lambda: decode_case(arch, 16, True, tokens=2),
    "decode paged 128": lambda: decode_case(arch, 128, True),
    "decode paged 64, served": lambda: decode_case(arch, 64, True, served=True),
    "decode 64 paged 64, served": lambda: decode_case(arch, 64, True, head_dim=64, served=True),
    "decode 256 dense": lambda: decode_case(arch, 0, False, batch=1, head_dim=256, tile=128),
    "decode fp32": lambda: decode_case(arch, 0, True, batch=1, tile=128, single=True),
    "combine": lambda: combine_case(arch, True),
    "combine of any lengths": lambda: combine_case(arch, False),
}
if arch < 100 or KNOWS_BLACKWELL:
    cases |= {
        "decode latent": lambda: decode_case(arch, 0, True, head_dim=576, heads=MOST[arch]),
        "decode latent dense": lambda: decode_case(arch, 0, False, head_dim=576, heads=MOST[arch]),
        "decode latent paged 64, served": lambda: decode_case(
            arch, 64, True, head_dim=576, heads=MOST[arch], served=True
        ),
        "decode latent 16": lambda: decode_case(arch, 0, True, head_dim=576, heads=16),
        "prefill 128": lambda: prefill_case(arch, 128, True),
        "prefill 128 dense": lambda: prefill_case(arch, 128, False),
        "prefill 64": lambda: prefill_case(arch, 64, True),
        "prefill 64 dense": lambda: prefill_case(arch, 64, False),
        "prefill 64 window packed, dense last": lambda: prefill_case(
            arch, 64, True, packed=True, window=True, dense_last=True
        ),
        "prefill 192 to 128": lambda: prefill_case(arch, 192, True, value_dim=128),
        "prefill 192 to 128 dense": lambda: prefill_case(arch, 192, False, value_dim=128),
        "prefill fp32": lambda: prefill_case(arch, 128, True, single=True),
        "prefill 128 dense last": lambda: prefill_case(arch, 128, True, dense_last=True),
        "prefill 128 packed, served": lambda: prefill_case(arch, 128, True, packed=True, served=True),
        # A tile of several pages, by pointers; a page of one tile, by TMA where there is one.
        **{
            f"prefill {d} paged {page}": lambda d=d, page=page: prefill_case(
                arch, d, True, packed=True, served=True, page=page
            )
            for d, page in ((64, 16), (128, 64), (128, 128))
        },
        "statistics": lambda: statistics_case(arch, False),
        "statistics, lead, dense last": lambda: statistics_case(arch, False, dense_last=True, lead=True),
        "statistics decode": lambda: statistics_case(arch, True),
    }
if arch >= 90:  # sm_80 has no instruction for e4m3, and Triton no other way
    cases |= {
        "decode fp8": lambda: decode_case(arch, 0, True, fp8=True),
        "decode fp8 dense": lambda: decode_case(arch, 0, False, fp8=True),
        "decode fp8 paged 64, served": lambda: decode_case(arch, 64, True, served=True, fp8=True),
    }
    if KNOWS_BLACKWELL or arch == 90:
        cases |= {
            "prefill fp8": lambda: prefill_case(arch, 128, True, fp8=True),
            "prefill fp8 paged 64": lambda: prefill_case(
                arch, 128, True, packed=True, served=True, page=64, fp8=True
            ),
            "statistics fp8": lambda: statistics_case(arch, False, fp8=True),
        }
if arch == 90:
    for d in (64, 128):
        cases |= {
            f"hopper {d}": lambda d=d: hopper_case(d, True),
            f"hopper {d} dense": lambda d=d: hopper_case(d, False),
            f"hopper {d} paged 64": lambda d=d: hopper_case(d, True, "packed", page=64, min_kv_len=True),
        }
    cases |= {
        "hopper 64 packed, dense last": lambda: hopper_case(64, True, "packed", dense_last=True),
        "hopper 128 packed": lambda: hopper_case(128, True, "packed"),
        "hopper 64 padded, not causal": lambda: hopper_case(64, True, "padded", False),
        "hopper 128 padded, not causal, dense last": lambda: hopper_case(
            128, True, "padded", False, dense_last=True
        ),
        "hopper 192 to 128": lambda: hopper_case(192, True, value_dim=128),
        "hopper 192 to 128 dense": lambda: hopper_case(192, False, value_dim=128),
        "hopper 192 to 128 paged 64": lambda: hopper_case(
            192, True, "packed", page=64, min_kv_len=True, value_dim=128
        ),
        "hopper 128 paged 16": lambda: hopper_case(128, True, "packed", page=16, min_kv_len=True),
        "hopper 128 paged 256 dense": lambda: hopper_case(128, False, "packed", page=256),
    }
# Every branch of every kernel once, at the shapes that take the most shared memory: the oldest Triton has the
# same cases otherwise, and asks for as much.
BRANCHES = (
    "decode", "decode paged 16", "decode 64 paged 64, served", "decode whole paged 64", "decode 256 dense",
    "decode fp32", "combine of any lengths", "prefill 128 dense", "prefill 192 to 128",
    "prefill 64 window packed, dense last", "prefill 128 paged 64", "prefill 128 paged 128",
    "statistics, lead, dense last", "statistics decode", "hopper 64 dense", "hopper 64 packed, dense last",
    "hopper 128 padded, not causal, dense last", "hopper 128 paged 16", "decode latent paged 64, served",
    "hopper 192 to 128 paged 64", "decode fp8 paged 64, served", "prefill fp8 paged 64", "statistics fp8",
)
assert arch != 90 or set(BRANCHES) <= set(cases)
if not KNOWS_BLACKWELL:
    cases = {n: case for n, case in cases.items() if n in BRANCHES}
print(json.dumps({"triton": triton.__version__, "arch": arch, "kernels": {n: case() for n,
case in cases.items()}}))
"""
# Bytes that may spill, by reason: what ptxas says, rounded up. What is not named here must not spill at all.
# This is ptxas as it is by default. Triton 3.9 itself passes --regAllocOptLevel=2, to avoid a fault of
# ptxas 13, and the Hopper kernel then spills 200 to 600 bytes more.
MAY_SPILL = {
    # Without TMA the addresses of every row, and of every page, take registers too.
    (80, "prefill 64"): 256, (80, "prefill 64 dense"): 256, (80, "prefill 64 window packed"): 512,
    (80, "prefill 128 dense"): 64, (80, "decode paged 16"): 32, (90, "decode paged 16"): 32,
    (90, "decode dense"): 16,
    # Three programs share a processor, which leaves each thread 168 registers.
    (90, "prefill 64"): 64, (90, "prefill 64 window packed"): 64,
    # At head_dim 64 three warpgroups share the registers, and the producer has 32: nearly all of it is there.
    (90, "hopper 64"): 2400, (90, "hopper 64 dense"): 400, (90, "hopper 64 packed"): 2400,
    (90, "hopper 64 padded, not causal"): 2100,
    (90, "hopper 64 paged 64"): 2400,
    # The rings of 192 columns are two more places to keep.
    (90, "hopper 192 to 128"): 160, (90, "hopper 192 to 128 dense"): 32,
    (90, "hopper 192 to 128 paged 64"): 96,
    # At head_dim 128 the producer has 24, and settles the last tiles after an item without any.
    (90, "hopper 128"): 64, (90, "hopper 128 packed"): 64, (90, "hopper 128 padded, not causal"): 64,
    # A page number for each of two tiles that are not settled, and what TMA wants to know of every load.
    (90, "hopper 128 paged 16"): 320, (90, "hopper 128 paged 64"): 128,
    (90, "hopper 128 paged 256 dense"): 16,
    # Products of fp32 are made of parts, which take registers: the speed of fp32 is no goal.
    **{(arch, name): 4096 for arch in (80, 90, 100) for name in ("prefill fp32", "decode fp32")},
    # Half of the registers are the output of 64 heads, 512 columns each.
    (90, "decode latent"): 256, (90, "decode latent dense"): 64, (90, "decode latent paged 64, served"): 160,
    (100, "decode latent"): 864, (100, "decode latent paged 64, served"): 736,
    # A block of head_dim 256 takes all 255 registers of a thread.
    **{(arch, "decode 256 dense"): 128 for arch in (80, 90, 100)},
    # Statistics keep a weight per bin beside the products, and are taken once per model.
    **{
        (arch, f"statistics{what}"): 512 if arch == 100 else 256
        for arch in (80, 90, 100) for what in ("", " decode", ", lead")
    },
    # Products arrive in tensor memory, and are read through registers.
    (100, "prefill 128"): 512, (100, "prefill 64 window packed"): 256,
    (100, "prefill 128 packed, served"): 512,
    # Four programs of four warps share a processor, which leaves each thread 128 registers.
    **{(arch, "decode fp8 paged 64, served"): 64 for arch in (90, 100)},
    # What is converted from FP8 stands in registers before it is in shared memory again.
    **{(arch, f"{what} fp8{how}"): 192 for arch in (90, 100)
       for what, how in (("prefill", ""), ("prefill", " paged 64"), ("statistics", ""))},
    # The addresses of every row of every page take registers too.
    **{
        (arch, f"prefill {where}"): 256
        for arch in (90, 100) for where in ("64 paged 16", "128 paged 64", "128 paged 128")
    },
}  # fmt: skip


@pytest.fixture
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What ptxas says of every kernel; a kernel that has not changed since is not compiled again."""
    pytest.importorskip("triton")
    # Triton reads the source of what it compiles, so the cases must lie in a file.
    program = tmp_path / "cases.py"
    program.write_text(COMPILE)

    def compile_for(arch: int, folder: str | None = None) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, program, str(arch)],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "TRITON_INTERPRET": "0",
                "TRITON_CACHE_DIR": str(request.config.cache.mkdir("compiled")),
                "PYTHONPATH": os.pathsep.join(filter(None, [folder, *sys.path])),
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        report = dict(json.loads(done.stdout))
        if target := os.environ.get("SKIP_SOFTMAX_RESOURCES"):
            with Path(target).open("a") as file:
                file.write(json.dumps(report) + "\n")
        return report

    return compile_for


def fits(used: dict[str, Any], arch: int) -> bool:
    return used["shared_bytes"] <= {80: 166912}.get(arch, 232448)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_and_spill_as_promised(
    arch: int, compiled: Callable[..., dict[str, Any]]
) -> None:
    report = compiled(arch)
    for name, used in report["kernels"].items():
        plain = re.sub(",? dense last$", "", name)  # dense rows add nothing that must spill
        assert used["spilled_bytes"] <= MAY_SPILL.get((arch, plain), 0), (name, used)
        assert not used["serialized"], name
        assert fits(used, arch), (name, used)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.skipif(
    "SKIP_SOFTMAX_TRITON36" not in os.environ, reason="needs a folder with Triton 3.6"
)
def test_kernels_compile_with_the_oldest_triton(
    arch: int, compiled: Callable[..., dict[str, Any]]
) -> None:
    report = compiled(arch, os.environ["SKIP_SOFTMAX_TRITON36"])
    assert re.match(r"3\.6", report["triton"])
    for name, used in report["kernels"].items():
        assert fits(used, arch), (name, used)
