"""What each serving engine does with the number: facts, one table, no code of theirs.

`Votes` says which rows and keys decide together. A number holds for one such geometry only, so every export
compares it with the file's. Sources: the engines' public sources, documentation and pull requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from calibrate.errors import UserError
from skip_softmax.thresholds.types import DecodeGeometry, Geometry, Phase, PrefillGeometry

Form = Literal["native", "scalar+ignore", "scalar"]
"""What an engine can express: every layer; one number per phase and dense layers; one number per phase."""


@dataclass(frozen=True)
class Votes:
    """Tiles of one kernel.

    Attributes:
        tile_kv: (largest head_dim, keys per tile that occur [tokens]); empty: not published.
        tile_q: query rows that vote together [tokens]; None in decode.
        voters: in decode, `group`: the query heads of a KV head vote together; `head`: each alone.
        head_dims: the only head sizes of this kernel; empty: any.
    """

    tile_kv: tuple[tuple[int, tuple[int, ...]], ...] = ()
    tile_q: int | None = None
    voters: Literal["group", "head"] = "group"
    head_dims: tuple[int, ...] = ()

    def keys(self, head_dim: int) -> tuple[int, ...]:
        """Keys per tile at this head size [tokens]; empty: not published."""
        return next((sizes for limit, sizes in self.tile_kv if head_dim <= limit), ())


@dataclass(frozen=True)
class Ignored:
    """This phase takes no notice of the number, without an error."""

    why: str


@dataclass(frozen=True)
class Server:
    """One engine on one family of GPUs."""

    title: str
    gpu: str
    prefill: Votes | Ignored
    decode: Votes | Ignored
    above_one: Literal["skips", "dense"] = "skips"
    """What it does at a threshold of 1 or more: skip almost everything, or run dense."""

    def phase(self, phase: Phase) -> Votes | Ignored:
        """The kernel of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.title} on {self.gpu}" if self.gpu != "any" else self.title


@dataclass(frozen=True)
class Engine:
    """An engine as an export target.

    Attributes:
        name: as in `--engine`.
        title: its name as people write it.
        form: what it can express.
        absolute: it takes the threshold itself, which holds at one KV length only.
        joint: one number serves both phases, so both must have one.
        servers: kernels that read the artefact.
        notes: what this engine cannot express; stands in every sidecar.
    """

    name: str
    title: str
    form: Form
    servers: tuple[Server, ...]
    absolute: bool = False
    joint: bool = False
    notes: tuple[str, ...] = ()


_ANY = 1 << 20
_HOPPER_PREFILL = Votes(((64, (256,)), (128, (128,)), (_ANY, (64,))), tile_q=64)  # 16-bit fmha_v2
_XQA = Votes(((_ANY, (64, 128)),))
_BLACKWELL_PREFILL = Votes(((_ANY, (128,)),), tile_q=32)  # a warp's rows zero their own P
_BLACKWELL_DECODE = Votes(((_ANY, (128,)),))
_NO_XQA = Ignored("its decode falls back to XQA, which is not handed the number")
_NO_KERNEL = Ignored("it has no skipping kernel there")

_TRTLLM = (
    Server("TensorRT-LLM", "sm90", _HOPPER_PREFILL, _XQA),
    Server("TensorRT-LLM", "sm100", _BLACKWELL_PREFILL, _BLACKWELL_DECODE),
    Server("TensorRT-LLM", "sm120", Votes(head_dims=(128, 256)), _NO_KERNEL),
)
_FLASHINFER = (
    Server("FlashInfer", "sm90", _HOPPER_PREFILL, _NO_XQA),
    Server("FlashInfer", "sm100", _BLACKWELL_PREFILL, _BLACKWELL_DECODE),
    Server("FlashInfer", "sm120", Votes(head_dims=(128,)), _NO_XQA),
)
_SGLANG = (
    Server("SGLang", "sm90", _HOPPER_PREFILL, _NO_XQA),
    Server("SGLang", "sm100", _BLACKWELL_PREFILL, _BLACKWELL_DECODE),
    Server("SGLang", "sm120", Votes(), _NO_XQA),
)
_MODELOPT = (
    Server(
        "Model-Optimizer's vLLM server",
        "any",
        Votes(((_ANY, (128,)),), tile_q=128),
        Votes(((_ANY, (128,)),), voters="head"),
        above_one="dense",
    ),
)

_SPLITS = (
    "decode kernels that split the keys restart the running max in every split: "
    "they skip less than measured"
)
_BLACKWELL_TWO = (
    "Blackwell kernels vote per 32-row group for softmax and per whole tile for P·V: "
    "the sparsity here is the softmax's"
)

_ALL = (
    Engine("native", "the kernel of this package", "native", ()),
    Engine("trtllm", "TensorRT-LLM", "scalar+ignore", _TRTLLM, notes=(_SPLITS, _BLACKWELL_TWO)),
    Engine(
        "modelopt",
        "Model-Optimizer's config.json",
        "scalar+ignore",
        (*_MODELOPT, *_TRTLLM),
        notes=(
            "Model-Optimizer's vLLM server divides by the longest KV length of the batch: shorter "
            "requests skip less",
        ),
    ),
    Engine(
        "vllm",
        "vLLM (open pull request 42989, in no release)",
        "scalar",
        (
            Server("vLLM", "sm90", _NO_KERNEL, _NO_KERNEL),
            Server("vLLM", "sm100", _BLACKWELL_PREFILL, _BLACKWELL_DECODE),
            Server("vLLM", "sm120", _NO_KERNEL, _NO_KERNEL),
        ),
        notes=(_SPLITS, _BLACKWELL_TWO),
    ),
    Engine("sglang", "SGLang", "scalar", _SGLANG, notes=(_SPLITS, _BLACKWELL_TWO)),
    Engine("flashinfer", "FlashInfer", "scalar", _FLASHINFER, notes=(_SPLITS, _BLACKWELL_TWO)),
    Engine(
        "vllm-omni",
        "vLLM-Omni",
        "scalar",
        (
            Server(
                "vLLM-Omni",
                "sm100",
                Votes(((_ANY, (128,)),), tile_q=32, head_dims=(128,)),
                Ignored("diffusion models do not decode token by token"),
            ),
        ),
        absolute=True,
        notes=(_BLACKWELL_TWO,),
    ),
    Engine(
        "tokenspeed",
        "tokenspeed",
        "scalar",
        (Server("tokenspeed", "gfx950", Votes(), Votes()),),
        absolute=True,
        joint=True,
    ),
)
ENGINES = {engine.name: engine for engine in _ALL}

_SAME_GPU = {
    "sm90a": "sm90",
    "sm100a": "sm100",
    "sm103": "sm100",
    "sm103a": "sm100",
    "sm121": "sm120",
}


def find_engine(name: str) -> Engine:
    """The engine of this name.

    Raises:
        UserError: there is none.
    """
    if name not in ENGINES:
        raise UserError(f"--engine must be one of: {', '.join(ENGINES)}; but got `{name}`")
    return ENGINES[name]


def form_of(name: str) -> Form:
    """Search space of `target.engine`: an engine's, or the form itself."""
    if name in ("scalar", "scalar+ignore"):
        return "scalar" if name == "scalar" else "scalar+ignore"
    return find_engine(name).form


def find_gpu(name: str | None, engine: Engine) -> str | None:
    """The GPU family of a name like `sm103`; None for None.

    Raises:
        UserError: it is no GPU's name, or the engine has nothing there.
    """
    if name is None:
        return None
    family = _SAME_GPU.get(name.lower(), name.lower())
    known = sorted({server.gpu for server in engine.servers} - {"any"})
    anywhere = not engine.servers or any(server.gpu == "any" for server in engine.servers)
    if anywhere and not re.fullmatch(r"any|sm\d{2,3}[a-z]?|gfx[0-9a-f]{3,4}", family):
        raise UserError(
            f"--gpu must be the name of a GPU family, like sm90 or gfx950; but got `{name}`"
        )
    if not anywhere and family not in known:
        raise UserError(
            f"--gpu must be one of: {', '.join(known)} for {engine.title}; but got `{name}`"
        )
    return family


def servers_for(engine: Engine, gpu: str | None) -> tuple[Server, ...]:
    """Servers of an engine on a GPU family (None: on any)."""
    return tuple(s for s in engine.servers if gpu is None or s.gpu in (gpu, "any"))


def objections(
    server: Server,
    geometry: Geometry,
    phases: tuple[Phase, ...],
    head_dim: int,
    group: int,
    *,
    trust_unpublished: bool = False,
) -> list[str]:
    """Why numbers of this geometry do not hold on a server.

    Args:
        server: who would run them.
        geometry: tiles that the numbers were measured at.
        phases: phases with a number above 0.
        head_dim: size of a head.
        group: query heads per KV head.
        trust_unpublished: the user has checked tiles that are not published.

    Returns:
        One sentence per reason: law and value; empty when the numbers hold.
    """
    found = []
    for phase in phases:
        votes = server.phase(phase)
        tiles = getattr(geometry, phase)
        if isinstance(votes, Ignored):
            found.append(f"{server.name} ignores the {phase} number without a word: {votes.why}")
            continue
        if votes.head_dims and head_dim not in votes.head_dims:
            sizes = " or ".join(map(str, votes.head_dims))
            found.append(
                f"head_dim must be {sizes} for {phase} of {server.name}, but the model has {head_dim}"
            )
        keys = votes.keys(head_dim)
        if not keys:
            if not trust_unpublished:
                found.append(
                    f"the {phase} tiles of {server.name} are not published, so {_tiles(tiles)} cannot be "
                    "checked"
                )
            continue
        if tiles is None:
            found.append(f"the file has no geometry.{phase}")
            continue
        wanted = " or ".join(f"{votes.tile_q}x{n}" if phase == "prefill" else str(n) for n in keys)
        if tiles.tile_kv not in keys or (phase == "prefill" and tiles.tile_q != votes.tile_q):
            found.append(
                f"geometry.{phase} must be {wanted} for {server.name} at head_dim {head_dim}, "
                f"but the numbers are for {_tiles(tiles)}"
            )
        if phase == "decode" and tiles.running_max != "ascending":
            found.append(
                f"geometry.decode.running_max must be ascending for {server.name}, but the numbers are for "
                f"{tiles.running_max}"
            )
        if phase == "decode" and votes.voters == "head" and group > 1:
            found.append(
                f"in decode of {server.name} every query head votes alone, but the numbers are for the "
                f"{group} query heads of a KV head voting together"
            )
    return found


def geometry_of(server: Server, head_dim: int, like: Geometry) -> Geometry:
    """Tiles of a server; sizes that fit already are kept, phases that it cannot run stay as they are.

    Args:
        server: the server.
        head_dim: size of a head.
        like: the geometry to start from.
    """
    prefill, decode = like.prefill, like.decode
    if isinstance(server.prefill, Votes) and server.prefill.tile_q is not None:
        keys = server.prefill.keys(head_dim)
        kept = prefill.tile_kv if prefill is not None and prefill.tile_kv in keys else keys[0]
        prefill = PrefillGeometry(tile_q=server.prefill.tile_q, tile_kv=kept)
    if isinstance(server.decode, Votes) and server.decode.keys(head_dim):
        keys = server.decode.keys(head_dim)
        kept = decode.tile_kv if decode is not None and decode.tile_kv in keys else keys[0]
        decode = DecodeGeometry(tile_kv=kept)
    return Geometry(prefill=prefill, decode=decode)


def _tiles(tiles: PrefillGeometry | DecodeGeometry | None) -> str:
    if tiles is None:
        return "no tiles"
    if isinstance(tiles, PrefillGeometry):
        return f"{tiles.tile_q}x{tiles.tile_kv}"
    return str(tiles.tile_kv)
