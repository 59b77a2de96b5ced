"""The laws of an export: which numbers an engine may get, and how it may then be run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calibrate.engines.catalogue import Objection, objections, servers_for
from calibrate.engines.config_json import attention_modules
from calibrate.engines.numbers import Numbers
from calibrate.engines.types import Engine, Ignored, Server, Votes
from calibrate.errors import UserError
from calibrate.model.config_json import ModelConfigFile
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.thresholds.types import Phase

_WORTH_IT = 0.15  # below this sparsity engines' skipping kernels are slower than their dense ones


@dataclass(frozen=True)
class Served:
    """How the engine will be run; None: unknown.

    Attributes:
        min_len: shortest request [tokens].
        chunk_size: prefill chunk [tokens].
        at_length: KV length at which an absolute threshold is to be right [tokens].
        kv_dtype: type of the KV cache: `fp8`, or a 16-bit one.
        speculative: whether tokens are drafted and verified.
        backend: attention backend, by the engine's own name.
    """

    min_len: int | None = None
    chunk_size: int | None = None
    at_length: int | None = None
    kv_dtype: str | None = None
    speculative: bool | None = None
    backend: str | None = None


def check_options(engine: Engine, phases: Sequence[Phase] | None, served: Served) -> None:
    """Refuses options that are wrong whatever the file says.

    Raises:
        UserError: a length below 1, or an option that this engine has no use for.
    """
    for option, tokens in (
        ("--served-min-len", served.min_len),
        ("--chunk-size", served.chunk_size),
        ("--at-length", served.at_length),
    ):
        if tokens is not None and tokens < 1:
            raise UserError(f"{option} must be at least 1 token, but got {tokens}; correct it")
    if served.at_length is not None and not engine.absolute:
        raise UserError(
            f"--at-length is for engines that take the threshold itself; leave it out for {engine.name}"
        )
    for option, given, applies in (
        ("--kv-dtype", served.kv_dtype, engine.kv_cache),
        ("--speculative", served.speculative, engine.kv_cache),
        ("--backend", served.backend, engine.backends),
    ):
        if given is not None and not applies:
            raise UserError(
                f"{option} changes nothing for {engine.name}, but got {given}; leave it out"
            )
    if served.backend is not None and engine.backends.get(served.backend, "unknown"):
        right = " or ".join(name for name, wrong in engine.backends.items() if not wrong)
        wrong = engine.backends.get(served.backend, f"{engine.title} is not known to skip with it")
        raise UserError(
            f"--backend must be {right} for {engine.name}, but got {served.backend}: {wrong}; serve with "
            f"{right}"
        )
    if phases is not None and engine.form == "native":
        raise UserError(
            f"--phase must be left out for {engine.name}, which takes the whole file, but got "
            f"{' and '.join(phases)}; leave it out"
        )


def require_release(engine: Engine, experimental: bool) -> None:
    """Refuses engines that no release of theirs lets read the artefact, unless the user asked for that.

    Raises:
        UserError: the artefact would work in no release.
    """
    if engine.experimental and not experimental:
        raise UserError(
            f"a release of {engine.title} must read the artefact, but {engine.experimental}, or "
            "--experimental for a build of your own"
        )


def require_verdict(thresholds: Thresholds) -> None:
    """Refuses numbers that were not proven.

    Raises:
        UserError: the file's validation is missing or did not pass.
    """
    verdict = thresholds.evidence.get("verdict", "not validated")
    if verdict != "passed":
        cure = (
            "`calibrate validate RUN_DIR --thresholds FILE -o NEW_FILE` measures it on your model"
            if verdict == "not validated"
            else "raise the budget or give the search more trials"
        )
        raise UserError(
            f"evidence.verdict must be `passed` for an export, but it is `{verdict}`; {cure}"
        )


def require_cache(thresholds: Thresholds, engine: Engine, kv_dtype: str | None) -> None:
    """Refuses an FP8 cache's numbers for an engine that is run with another one.

    Raises:
        UserError: decisions would be taken on keys that are rounded otherwise.
    """
    if thresholds.model.kv_cache_dtype is None or (engine.kv_cache and kv_dtype == "fp8"):
        return
    if not engine.kv_cache:
        raise UserError(
            f"{engine.title} must attend to keys as they were calibrated, but it has no KV cache and the "
            f"numbers are for one of {thresholds.model.kv_cache_dtype}; calibrate with "
            "`model.kv_cache_dtype: auto`"
        )
    raise UserError(
        f"{engine.title} must have the KV cache that was calibrated, {thresholds.model.kv_cache_dtype}, but "
        f"--kv-dtype is {kv_dtype or 'not given'}; serve with an FP8 cache and pass --kv-dtype fp8, or "
        "calibrate with `model.kv_cache_dtype: auto`"
    )


def valid_servers(
    thresholds: Thresholds,
    engine: Engine,
    numbers: Numbers,
    gpu: str | None,
    *,
    trust_geometry: bool = False,
    kv_dtype: str | None = None,
) -> list[Server]:
    """The engine's servers on which the numbers are valid.

    Args:
        thresholds: the file.
        engine: its servers as they are run, see `as_run`.
        numbers: what is exported.
        gpu: GPU family; None: any.
        trust_geometry: the user has compared tiles that are not published.
        kv_dtype: type of the KV cache, for the cure.

    Raises:
        UserError: there is none; with every reason and its cures.
    """
    against = {
        server.name: against_numbers(thresholds, server, numbers, trust_geometry=trust_geometry)
        for server in servers_for(engine, gpu)
    }
    valid = [server for server in servers_for(engine, gpu) if not against[server.name]]
    if valid:
        return valid
    phases = tuple(numbers.scale_factor)
    refused = [reason for reasons in against.values() for reason in reasons]
    wanted = {reason.cure for reason in refused}
    cures = []
    prefill = replace(
        numbers, scale_factor={p: f for p, f in numbers.scale_factor.items() if p == "prefill"}
    )
    alone = [
        {reason.cure for reason in against_numbers(thresholds, server, prefill)}
        for server in servers_for(engine, gpu)
    ]
    if (
        "phase" in wanted
        and len(phases) > 1
        and any(left <= {"measure", "compare"} for left in alone)
    ):
        cures.append("`--phase prefill` exports the prefill number only")
    if "measure" in wanted:
        cache = f" --kv-dtype {kv_dtype}" if kv_dtype is not None else ""
        cures.append(
            f"`calibrate project RUN_DIR --engine {engine.name} --gpu {gpu or 'GPU'}{cache}` measures at the "
            "engine's own tiles"
        )
    if "compare" in wanted:
        cures.append("`--trust-geometry` once you have compared the tiles yourself")
    if not cures:
        cures.append("choose another --gpu or engine")
    reasons_once = dict.fromkeys(reason.text for reason in refused)
    raise UserError("\n  ".join([*reasons_once, "cure: " + "; or ".join(cures)]))


def against_numbers(
    thresholds: Thresholds, server: Server, numbers: Numbers, *, trust_geometry: bool = False
) -> list[Objection]:
    """Why these numbers are not valid on a server; empty: they are."""
    model = thresholds.model
    found = objections(
        server,
        thresholds.geometry,
        tuple(numbers.scale_factor),
        model.head_dim,
        model.q_heads // model.kv_heads,
        latent=model.latent,
        trust_unpublished=trust_geometry,
    )
    unnamed = server.by_name and numbers.dense_layers and attention_modules(thresholds) is None
    why = (
        f"{server.name} leaves layers dense by their modules' names, so the file must record them "
        f"(provenance.attention_modules), but it does not name those of layers {list(numbers.dense_layers)}"
    )
    return [*found, *([Objection(why, "measure")] if unnamed else [])]


def other_readers(
    thresholds: Thresholds,
    engine: Engine,
    numbers: Numbers,
    gpu: str | None,
    valid: Sequence[Server],
) -> list[tuple[Server, list[str]]]:
    """Servers that read the artefact too, on this GPU, and why the numbers do not hold there."""
    return [
        (server, [reason.text for reason in against_numbers(thresholds, server, numbers)])
        for server in servers_for(engine, gpu)
        if server not in valid
    ]


def unknown_service(numbers: Numbers, servers: Sequence[Server], served: Served) -> list[str]:
    """Warnings where the numbers depend on how the server is run, and the user has not said how."""
    warnings = []
    for server in servers:
        for phase in numbers.scale_factor:
            if served.kv_dtype is None and phase in server.fp8:
                other = server.fp8[phase]
                what = (
                    f"it {other.how} the {phase} number: {other.why}"
                    if isinstance(other, Ignored)
                    else f"its {phase} votes on other tiles"
                )
                warnings.append(
                    f"{server.name} must have a 16-bit KV cache: with an FP8 one {what} (--kv-dtype checks "
                    "yours)"
                )
            votes = server.phase(phase)
            if served.speculative is None and isinstance(votes, Votes) and votes.speculation:
                warnings.append(
                    f"{server.name} must run without speculative decoding, or without the {phase} number: "
                    f"{votes.speculation} (--no-speculative says that it does)"
                )
    return warnings


def check_lengths(
    thresholds: Thresholds, numbers: Numbers, servers: Sequence[Server], served: Served
) -> list[str]:
    """Engines do not run short requests densely, so the user must not send any.

    Returns:
        Warnings.

    Raises:
        UserError: requests or chunks are shorter than the numbers allow, and the engine would skip there.
    """
    warnings = []
    harmless = all(server.above_one == "dense" for server in servers)
    for phase, factor in numbers.scale_factor.items():
        floor = getattr(thresholds.min_kv_len, phase)
        given = {"--served-min-len": served.min_len}
        if phase == "prefill":
            given["--chunk-size"] = served.chunk_size
            given["geometry.prefill.chunk"] = thresholds.geometry.chunk
        for option, tokens in given.items():
            if tokens is None or tokens >= floor:
                continue
            law = f"`{option} > scale_factor`" if tokens <= factor else f"`{option} >= min_kv_len`"
            effect = (
                f"a threshold of {factor / tokens:.3g} is 1 or more: "
                + ("these requests run dense" if harmless else "the engine skips almost every tile")
                if tokens <= factor
                else f"nothing was measured below {floor} tokens, and the engine skips there too"
            )
            message = (
                f"{law} must hold in {phase}, but got {tokens} and "
                f"{f'scale_factor={factor:g}' if tokens <= factor else f'min_kv_len={floor}'}: {effect}"
            )
            if not harmless:
                raise UserError(
                    f"{message}; keep shorter requests away from this server, calibrate with "
                    f"`target.min_kv_len.{phase}` of {tokens} or less, or use a larger chunk"
                )
            warnings.append(message)
        if served.min_len is None:
            warnings.append(
                f"no {phase} request may be shorter than {floor} tokens: the engine does not read min_kv_len "
                f"(--served-min-len checks yours)"
            )
    return warnings


def check_chunks(
    thresholds: Thresholds, engine: Engine, numbers: Numbers, served: Served
) -> list[str]:
    """Compares the chunks of a prompt that were measured with those that are served.

    A chunk's threshold is the number / the KV length at its end: of two sizes the smaller one skips more. It
    makes no difference to engines that take the threshold itself.

    Returns:
        Warnings.

    Raises:
        UserError: the engine's chunks are smaller.
    """
    if engine.absolute or "prefill" not in numbers.scale_factor:
        return []
    measured, size = thresholds.geometry.chunk, served.chunk_size
    if measured is None and size is not None:
        return [
            f"the prefill number was measured on whole prompts: with chunks of {size} tokens all chunks but "
            "a prompt's last have larger thresholds, and skip more, than was measured; calibrate with "
            f"`geometry.prefill.chunk: {size}`"
        ]
    if measured is None or size == measured:
        return []
    if size is None:
        return [
            f"the prefill number was measured in chunks of {measured} tokens: serve with this prefill chunk "
            "(--chunk-size checks yours)"
        ]
    if size < measured:
        raise UserError(
            f"`--chunk-size >= geometry.prefill.chunk` must hold, but got {size} and {measured}: smaller "
            "chunks have larger thresholds, so the engine skips more than was measured; serve with chunks of "
            f"{measured}, or calibrate with `geometry.prefill.chunk: {size}`"
        )
    return [
        f"the prefill number was measured in chunks of {measured} tokens: chunks of {size} have smaller "
        "thresholds, and skip less than was measured"
    ]


def reference_length(engine: Engine, numbers: Numbers, served: Served) -> int | None:
    """KV length of an absolute threshold [tokens]; None for engines that divide by the length themselves.

    Raises:
        UserError: it is missing, or the threshold would be 1 or more.
    """
    if not engine.absolute or (served.at_length is None and engine.config_json == "curve"):
        return None
    if served.at_length is None:
        raise UserError(
            f"{engine.title} takes the threshold itself, which is right at one KV length; give the longest "
            "served one with --at-length"
        )
    largest = max(numbers.scale_factor.values())
    if served.at_length <= largest:
        raise UserError(
            f"`--at-length > scale_factor` must hold, but got {served.at_length} and {largest:g}: the "
            "threshold would be 1 or more; give the longest served length"
        )
    return served.at_length


def check_model(thresholds: Thresholds, config: ModelConfigFile) -> list[str]:
    """Compares the served model's `config.json` with the model that was calibrated.

    Returns:
        Warnings.

    Raises:
        UserError: they differ.
    """
    made_for = thresholds.model
    shape = (made_for.layers, made_for.q_heads, made_for.kv_heads, made_for.head_dim)
    if config.shape != shape:
        raise UserError(
            "(layers, q_heads, kv_heads, head_dim) of file and --model must agree, but the file is for "
            f"{made_for.name} with {shape} and `{config.path}` says {config.shape}; calibrate this model"
        )
    recorded = thresholds.provenance.get("model_config_sha256")
    if recorded is None:
        return [
            "the file does not record its model's config hash; only layers and heads were compared"
        ]
    if recorded != config.sha256:
        raise UserError(
            f"the config hash of file and --model must agree, but the file is for {made_for.name} with "
            f"{recorded[:12]} and `{config.path}` has {config.sha256[:12]}; calibrate this model"
        )
    return []


def check_config(engine: Engine, numbers: Numbers, config: ModelConfigFile | None) -> None:
    """Asks for the `config.json` that holds dense layers, and refuses models that the engine cannot serve.

    Raises:
        UserError: it is missing, or names such a model.
    """
    if config is None:
        if engine.config_json == "layers" and numbers.dense_layers:
            raise UserError(
                f"{engine.title} reads the layers left dense ({len(numbers.dense_layers)} here) from the "
                "model's config.json only; give --model DIR, and --apply to write it"
            )
        return
    for key, why in engine.unfit.items():
        if key in config.data:
            raise UserError(f"{why}; serve this model dense or with another engine")


def low_sparsity(numbers: Numbers) -> list[str]:
    """Warnings where skipping so little costs more than it saves."""
    return [
        f"{phase} skips {100 * found['achieved']:.1f} % of the tiles: below about {100 * _WORTH_IT:.0f} % "
        f"the engines' skipping kernels are slower than their dense ones; consider leaving {phase} out"
        for phase, found in numbers.sparsity.items()
        if "achieved" in found and found["achieved"] < _WORTH_IT
    ]
