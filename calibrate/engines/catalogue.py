"""All engines, and what speaks against a number on one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from calibrate.engines import (
    flashinfer,
    modelopt,
    native,
    sglang,
    sglang_diffusion,
    tokenspeed,
    trtllm,
    vllm,
    vllm_omni,
)
from calibrate.engines.tiles import ANY_SIZE
from calibrate.engines.types import Engine, Form, Ignored, Server, Votes
from calibrate.errors import UserError
from skip_softmax.thresholds.types import PHASES, DecodeGeometry, Geometry, Phase, PrefillGeometry

ENGINES = {
    engine.name: engine
    for engine in (
        native.ENGINE,
        trtllm.ENGINE,
        modelopt.ENGINE,
        vllm.ENGINE,
        sglang.ENGINE,
        flashinfer.ENGINE,
        vllm_omni.ENGINE,
        sglang_diffusion.ENGINE,
        tokenspeed.ENGINE,
    )
}

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


def find_phases(names: Sequence[str] | None) -> tuple[Phase, ...] | None:
    """Phases in their order; None where none is named.

    Raises:
        UserError: one is not a phase.
    """
    wrong = [name for name in names or [] if name not in PHASES]
    if wrong:
        raise UserError(f"--phase must be prefill or decode, but got `{wrong[0]}`")
    return tuple(phase for phase in PHASES if phase in names) if names else None


def find_gpu(name: str | None, engine: Engine) -> str | None:
    """The GPU family of a name like `sm103`; None for None.

    Raises:
        UserError: it is not the name of a GPU, or the engine has nothing there.
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


_KV_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
}


def find_kv_dtype(name: str | None) -> str | None:
    """Type of a KV cache, from an engine's word for it; `auto` is the model's own 16 bits; None for None.

    Raises:
        UserError: no kernel that skips is known to read such a cache.
    """
    if name is not None and name not in _KV_DTYPES:
        raise UserError(
            f"--kv-dtype must be one of: {', '.join(_KV_DTYPES)}; but got `{name}`, whose kernels' tiles "
            "are not known"
        )
    return None if name is None else _KV_DTYPES[name]


def as_run(engine: Engine, kv_dtype: str | None, speculative: bool | None) -> Engine:
    """The engine with its servers as they are run: with this KV cache, and with drafted tokens or without."""
    fp8, drafts = kv_dtype == "fp8", bool(speculative)
    servers = tuple(server.run_with(fp8=fp8, speculation=drafts) for server in engine.servers)
    return replace(engine, servers=servers)


def servers_for(engine: Engine, gpu: str | None) -> tuple[Server, ...]:
    """Servers of an engine on a GPU family (None: on any)."""
    return tuple(s for s in engine.servers if gpu is None or s.gpu in (gpu, "any"))


@dataclass(frozen=True)
class Objection:
    """Why a number is not valid on a server.

    Attributes:
        text: law and value, one sentence.
        cure: `measure` at the server's tiles, export the other `phase` alone, `compare` tiles that are not
            published; None: no cure on this server.
    """

    text: str
    cure: Literal["measure", "phase", "compare"] | None = None


def objections(
    server: Server,
    geometry: Geometry,
    phases: tuple[Phase, ...],
    head_dim: int,
    group: int,
    *,
    latent: bool = False,
    trust_unpublished: bool = False,
) -> Iterator[Objection]:
    """Why numbers of this geometry are not valid on a server.

    Args:
        server: who would run them.
        geometry: tiles that the numbers were measured at.
        phases: phases with a number above 0.
        head_dim: size of a head.
        group: query heads per KV head.
        latent: whether the model has latent attention (MLA).
        trust_unpublished: the user has compared tiles that are not published.

    Yields:
        One per reason; none when the numbers are valid.
    """
    for phase in phases:
        votes = server.phase(phase)
        tiles = getattr(geometry, phase)
        if isinstance(votes, Ignored):
            yield Objection(f"{server.name} {votes.how} the {phase} number: {votes.why}", "phase")
            continue
        if phase == "decode" and latent:
            # trtllm-gen's choice of a kernel for MLA: 16 heads to a tile or more, by batch and length.
            yield Objection(
                f"decode of {server.name} reads the compressed cache of latent attention (MLA), with as many "
                "query heads to a tile as its kernel takes, which changes with batch and length: no geometry "
                "holds there",
                "phase",
            )
            continue
        if votes.head_dims and head_dim not in votes.head_dims:
            yield Objection(
                f"head_dim must be {_sizes(votes.head_dims)} for {phase} of {server.name}, but the model has "
                f"{head_dim}"
            )
        if votes.groups is not None and not votes.groups[0] <= group <= votes.groups[1]:
            yield Objection(
                f"a KV head must have {votes.groups[0]} to {votes.groups[1]} query heads for {phase} of "
                f"{server.name}, but the model's has {group}: another kernel would run, which silently "
                "ignores the number",
                "phase",
            )
        if isinstance(tiles, PrefillGeometry) and tiles.dense_last:
            yield Objection(
                f"geometry.prefill.dense_last must be 0 for {server.name}, which skips in the last rows too, "
                f"but the numbers are for {tiles.dense_last}; calibrate with geometry.prefill.dense_last: 0",
                "measure",
            )
        if isinstance(tiles, PrefillGeometry) and tiles.chunk and server.whole_prompts:
            yield Objection(
                f"geometry.prefill.chunk must be left out for {server.name}: {server.whole_prompts}, but the "
                f"numbers are for chunks of {tiles.chunk}; calibrate without geometry.prefill.chunk",
                "measure",
            )
        keys = votes.keys(head_dim)
        if not keys:
            if not trust_unpublished:
                yield Objection(
                    f"the {phase} tiles of {server.name} are not published, so {_tiles(tiles)} cannot be "
                    "checked",
                    "compare",
                )
            continue
        if tiles is None:
            yield Objection(f"the file has no geometry.{phase}", "measure")
            continue
        wanted = " or ".join(f"{votes.tile_q}x{n}" if phase == "prefill" else str(n) for n in keys)
        if tiles.tile_kv not in keys or (phase == "prefill" and tiles.tile_q != votes.tile_q):
            yield Objection(
                f"geometry.{phase} must be {wanted} for {server.name} at head_dim {head_dim}, "
                f"but the numbers are for {_tiles(tiles)}",
                "measure",
            )
        if phase == "decode" and tiles.running_max != "ascending":
            yield Objection(
                f"geometry.decode.running_max must be ascending for {server.name}, but the numbers are for "
                f"{tiles.running_max}",
                "measure",
            )
        if isinstance(tiles, DecodeGeometry):
            together = tiles.tile_heads or group
            if votes.voters == "head" and together > 1:
                heads = f"{together} query heads"
                whose = heads if tiles.tile_heads else f"the {heads} of a KV head"
                yield Objection(
                    f"in decode of {server.name} every query head votes alone, but the numbers are for "
                    f"{whose} voting together; calibrate with geometry.decode.tile_heads: 1",
                    "phase",
                )
            if votes.voters == "group" and together != group:
                yield Objection(
                    f"in decode of {server.name} the {group} query heads of a KV head vote together, but the "
                    f"numbers are for votes of {together}; calibrate without geometry.decode.tile_heads",
                    "measure",
                )


def geometry_of(server: Server, head_dim: int, like: Geometry) -> Geometry:
    """Tiles of a server; sizes that fit already are kept, phases that it cannot run stay as they are.

    Args:
        server: the server.
        head_dim: size of a head.
        like: the geometry to start from.
    """
    prefill, decode = skipping_everywhere(like).prefill, like.decode
    if prefill is not None and server.whole_prompts:
        prefill = prefill.model_copy(update={"chunk": None})
    if isinstance(server.prefill, Votes) and server.prefill.tile_q is not None:
        keys = server.prefill.keys(head_dim)
        kept = prefill.tile_kv if prefill is not None and prefill.tile_kv in keys else keys[0]
        chunk = None if prefill is None else prefill.chunk
        prefill = PrefillGeometry(tile_q=server.prefill.tile_q, tile_kv=kept, chunk=chunk)
    if isinstance(server.decode, Votes) and server.decode.keys(head_dim):
        keys = server.decode.keys(head_dim)
        kept = decode.tile_kv if decode is not None and decode.tile_kv in keys else keys[0]
        heads = None if decode is None or server.decode.voters == "group" else decode.tile_heads
        decode = DecodeGeometry(tile_kv=kept, tile_heads=heads)
    return Geometry(prefill=prefill, decode=decode)


def skipping_everywhere(geometry: Geometry) -> Geometry:
    """The geometry without `dense_last`, which only the kernels of this package know."""
    if geometry.prefill is None:
        return geometry
    prefill = geometry.prefill.model_copy(update={"dense_last": 0})
    return geometry.model_copy(update={"prefill": prefill})


def _sizes(sizes: tuple[int, ...] | range) -> str:
    if isinstance(sizes, range):
        return f"a multiple of {sizes.step}" + (
            f" up to {sizes[-1]}" if sizes[-1] < ANY_SIZE else ""
        )
    return " or ".join(map(str, sizes))


def _tiles(tiles: PrefillGeometry | DecodeGeometry | None) -> str:
    if tiles is None:
        return "no tiles"
    if isinstance(tiles, PrefillGeometry):
        return f"{tiles.tile_q}x{tiles.tile_kv}"
    return str(tiles.tile_kv)
