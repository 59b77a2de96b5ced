"""Skip-softmax inside a Hugging Face model, for the length of a `with` block.

Attention is replaced through transformers' own attention interface, so the model's code is not
touched. Masks are not built: each call learns from the mask's recipe which keys a row may see,
checks that this is plain causal (or windowed, or full) attention, and otherwise leaves the layer to
the model's own attention.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skip_softmax.api import attention, decode_attention
from skip_softmax.backends import Backend
from skip_softmax.mask_recipe import MaskRecipe
from skip_softmax.thresholds import (
    PHASES,
    DecodeGeometry,
    Phase,
    PrefillGeometry,
    Thresholds,
    shape_of_config,
)

_log = logging.getLogger(__name__)
_NAME = "skip_softmax"
_RUN = 16  # decode tokens per call; what the Triton kernel takes

# What changes the softmax itself; such a layer keeps the model's own attention, and is named.
_UNSUPPORTED = {
    "softcap": "attention soft-cap",
    "s_aux": "attention sink logits",
    "position_bias": "position bias",
}


@dataclass(frozen=True)
class Call:
    """One attention call of one layer, all requests of equal length.

    Attributes:
        layer: layer index.
        phase: `prefill` or `decode`; a decode call holds one or more tokens, each voting alone.
        q: [B, Hq, Sq, D]; the last query stands at position kv_len - 1.
        k: [B, Hkv, kv_len - kv_start, D].
        v: like k.
        scale: factor of the scores.
        causal: whether rows see no later key.
        window: sliding window [tokens] or None.
        kv_start: absolute position of the first key.
    """

    layer: int
    phase: Phase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool
    window: int | None
    kv_start: int

    @property
    def kv_len(self) -> int:
        """KV length of the call [tokens]."""
        return self.kv_start + self.k.shape[2]


Handler = Callable[[Call], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """An attention layer as a probe forward found it.

    Attributes:
        index: layer index.
        name: module path, for example `model.layers.3.self_attn`.
        q_heads: query heads.
        kv_heads: KV heads.
        head_dim: size of a head.
        window: sliding window [tokens] or None.
        reason: why it cannot be calibrated; None: it can.
    """

    index: int
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    reason: str | None


@dataclass
class TileCounts:
    """Tiles that `applied` saw, int64 [layers, heads]: query heads in prefill, KV heads in decode."""

    visited: dict[Phase, torch.Tensor] = field(default_factory=dict)
    skipped: dict[Phase, torch.Tensor] = field(default_factory=dict)

    def sparsity(self, phase: Phase) -> float:
        """Skipped / visited tiles over all layers, in [0, 1]; 0 when nothing was visited."""
        visited = int(self.visited[phase].sum())
        return int(self.skipped[phase].sum()) / visited if visited else 0.0


@contextmanager
def applied(
    model: PreTrainedModel,
    thresholds: Thresholds,
    *,
    decode_from: int | None = None,
    backend: Backend = "auto",
    count: bool = True,
) -> Iterator[TileCounts]:
    """Runs a model with the thresholds of a file; undone on exit, also after an exception.

    Args:
        model: a decoder-only model of transformers.
        thresholds: what to apply, per layer and phase.
        decode_from: absolute position from which tokens count as decode steps, however many come in
            one call (teacher forcing). None: a call with one query token and a non-empty cache is
            decode, every other call is prefill; a last prefill chunk of one token is then taken for
            decode.
        backend: attention backend, see `attention`.
        count: whether tiles are counted; counting costs a little time in every call.

    Yields:
        Tile counts, growing as the model runs.

    Raises:
        ValueError: the thresholds are for a model of another shape, the model has an encoder, or it (or
            one that shares its config) already runs in such a block.
    """
    _check_same_shape(model, thresholds)
    shape = thresholds.model
    heads = {"prefill": shape.q_heads, "decode": shape.kv_heads}
    # Counts stay on the model's device: reading them back in every call would make the GPU wait.
    counts = TileCounts()
    # The block may be entered in inference mode, and the model run outside of it.
    with torch.inference_mode(False):
        for phase in PHASES:
            counts.visited[phase] = torch.zeros(
                shape.layers, heads[phase], dtype=torch.int64, device=model.device
            )
            counts.skipped[phase] = torch.zeros_like(counts.visited[phase])
        factors = {
            (layer, phase): _on_device(thresholds.per_head(layer, phase), model.device)
            for layer in range(shape.layers)
            for phase in PHASES
        }

    def attend(call: Call) -> torch.Tensor:
        outputs = []
        for part, dense in _split_at_floor(call, getattr(thresholds.min_kv_len, call.phase)):
            factor = 0.0 if dense else factors[call.layer, call.phase]
            if not count:
                outputs.append(_attend(part, factor, thresholds, backend, count=False))
                continue
            out, stats = _attend(part, factor, thresholds, backend, count=True)
            device = counts.visited[call.phase].device
            counts.visited[call.phase][call.layer] += stats.visited.sum(0).to(device)
            counts.skipped[call.phase][call.layer] += stats.skipped.sum(0).to(device)
            outputs.append(out)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    left_alone = {entry.layer: entry.reason for entry in thresholds.uncalibrated}
    with intercepted(model, attend, decode_from=decode_from, left_alone=left_alone):
        yield counts


@contextmanager
def intercepted(
    model: PreTrainedModel,
    handler: Handler,
    *,
    decode_from: int | None = None,
    left_alone: dict[int, str] | None = None,
) -> Iterator[None]:
    """Sends every attention call of a model to `handler`, for the length of a `with` block.

    Args:
        model: a model of transformers that uses its attention interface.
        handler: computes one call's output [B, Hq, Sq, D].
        decode_from: see `applied`.
        left_alone: layers that keep the model's own attention, and why.

    Yields:
        Nothing.

    Raises:
        ValueError: the model has an encoder, or it (or one that shares its config) is already inside such
            a block.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the model must be decoder-only, but {type(model).__name__} also has an encoder"
        )
    modules = list(model.modules())
    AttentionInterface.register(_NAME, _attention_forward)
    AttentionMaskInterface.register(_NAME, _mask_recipe)
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if c is not None}
    if any(config._attn_implementation == _NAME for config in configs.values()):
        raise ValueError(
            "this model, or one that shares its config, already runs inside `applied`; leave that block first"
        )
    before = {key: config._attn_implementation for key, config in configs.items()}
    text = type(model.config.get_text_config())
    interceptor = _Interceptor(handler, decode_from, before, dict(left_alone or {}), text)
    try:
        for module in modules:
            _ACTIVE[module] = interceptor
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module in modules:
            _ACTIVE.pop(module, None)


def inspect_layers(model: PreTrainedModel) -> list[Layer]:
    """Finds a model's attention layers by running four tokens through it.

    Args:
        model: a decoder-only model.

    Returns:
        One entry per layer index of the config; a layer that never called the attention interface
        has a reason.

    Raises:
        ValueError: the model has an encoder, or adds masks to scores itself.
    """
    config = model.config.get_text_config()
    seen: dict[int, Layer] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def note(
        module: torch.nn.Module, q: Any, k: Any, window: int | None, reason: str | None
    ) -> None:
        index = int(cast(int, module.layer_idx))
        if index in seen:
            reason = "two attention modules share this layer index"
        seen[index] = Layer(
            index, names.get(id(module), "?"), q.shape[1], k.shape[1], q.shape[3], window, reason
        )

    def dense(call: Call) -> torch.Tensor:
        return attention(
            call.q,
            call.k,
            call.v,
            causal=call.causal,
            scale=call.scale,
            window=call.window,
            kv_start=call.kv_start,
        )

    try:
        with intercepted(model, dense), torch.no_grad():
            _ACTIVE[model].note = note
            tokens = torch.zeros(1, 4, dtype=torch.long, device=model.device)
            model(input_ids=tokens, use_cache=False)
    except RuntimeError as error:
        if seen:
            raise
        raise ValueError(
            f"a model must use transformers' attention interface, but {type(model).__name__} computes "
            f"attention itself ({str(error).splitlines()[0]})"
        ) from error
    layers = []
    main = _most_common([(s.q_heads, s.kv_heads, s.head_dim) for s in seen.values()])
    for index in range(config.num_hidden_layers):
        layer = seen.get(index) or Layer(
            index, "?", 0, 0, 0, None, "no softmax attention of transformers"
        )
        if layer.reason is None and (layer.q_heads, layer.kv_heads, layer.head_dim) != main:
            layer = Layer(*_fields(layer), reason="other head counts or head size than most layers")
        layers.append(layer)
    return layers


@dataclass
class _Interceptor:
    handler: Handler
    decode_from: int | None
    original: dict[int, str]
    left_alone: dict[int, str]
    text: type  # class of the config that text layers have, and those of images and sound have not
    note: Callable[..., None] | None = None
    named: set[int] = field(default_factory=set)  # layers that a warning has named

    def forward(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        index = getattr(module, "layer_idx", None)
        config = getattr(module, "config", None)
        if index is None or (config is not None and not isinstance(config, self.text)):
            return self._own_attention(module, q, k, v, mask, scale, kwargs)
        window = kwargs.get("sliding_window")
        reason, causal = self._reason(q, mask, window, kwargs)
        if self.note is not None:
            self.note(module, q, k, window, reason)
        if reason is not None or index in self.left_alone:
            # Another call of the layer may be one that is understood.
            if reason is not None and index not in self.left_alone and index not in self.named:
                self.named.add(index)
                _log.warning("layer %d keeps the model's own attention: %s", index, reason)
            return self._own_attention(module, q, k, v, mask, scale, kwargs)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        requests = list(_requests(q, k, mask))
        if requests and requests[0][:2] == (slice(0, q.shape[0]), slice(0, q.shape[2])):
            _, _, keys, kv_start, position = requests[0]  # the whole batch is one call: no copies
            out = self._by_phase(
                index,
                q,
                k[:, :, keys],
                v[:, :, keys],
                scale,
                causal,
                window,
                kv_start,
                position=position,
            )
            return out.transpose(1, 2).contiguous(), None
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for b, rows, keys, kv_start, position in requests:
            call = (k[b, :, keys], v[b, :, keys], scale, causal, window, kv_start)
            out[b, :, rows] = self._by_phase(index, q[b, :, rows], *call, position=position)
        return out.transpose(1, 2).contiguous(), None

    def _by_phase(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        kv_start: int,
        *,
        position: int,
    ) -> torch.Tensor:
        """Splits the rows of a call at `decode_from`; the keys that the earlier rows see end there too."""
        rows = q.shape[2]
        if self.decode_from is None:
            phase: Phase = "decode" if rows == 1 and position > 0 else "prefill"
            return self.handler(Call(layer, phase, q, k, v, scale, causal, window, kv_start))
        split = min(max(self.decode_from - position, 0), rows)
        outputs = []
        if split:
            seen = position + split - kv_start
            outputs.append(
                self.handler(
                    Call(
                        layer,
                        "prefill",
                        q[:, :, :split],
                        k[:, :, :seen],
                        v[:, :, :seen],
                        scale,
                        causal,
                        window,
                        kv_start,
                    )
                )
            )
        if split < rows:
            outputs.append(
                self.handler(
                    Call(layer, "decode", q[:, :, split:], k, v, scale, causal, window, kv_start)
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _reason(
        self, q: torch.Tensor, mask: Any, window: int | None, kwargs: dict[str, Any]
    ) -> tuple[str | None, bool]:
        for key, name in _UNSUPPORTED.items():
            if kwargs.get(key) is not None:
                return name, True
        if kwargs.get("dropout"):
            return "attention dropout (training)", True
        if not isinstance(mask, MaskRecipe):
            if isinstance(mask, torch.Tensor) and not mask.shape[-1]:
                raise RuntimeError(
                    "a mask must reach its layers as transformers' mask interface made it, but something "
                    "copied it on the way; remove the hook, or run this model without `applied`"
                )
            return "a mask that was built outside transformers' mask interface", True
        causal = mask.causal(window)
        if causal is None:
            return "an attention pattern other than full, causal or sliding window", True
        if not causal and self.decode_from is not None:
            return "attention that sees later tokens", True
        if mask.spans() is None:
            return "padding between valid tokens", True
        return None, causal

    def _own_attention(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        config = getattr(module, "config", None)
        name = self.original.get(id(config), "sdpa")
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        if isinstance(mask, MaskRecipe):
            mask = ALL_MASK_ATTENTION_FUNCTIONS[name](**mask.arguments)
        out: tuple[torch.Tensor, Any] = function(module, q, k, v, mask, scaling=scale, **kwargs)  # type: ignore[misc]
        return out


_ACTIVE: weakref.WeakKeyDictionary[torch.nn.Module, _Interceptor] = weakref.WeakKeyDictionary()


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    interceptor = _ACTIVE.get(module)
    if interceptor is not None:
        return interceptor.forward(module, query, key, value, attention_mask, scaling, kwargs)
    # Another model that shares a config with one inside a block.
    config = id(getattr(module, "config", None))
    for interceptor in _ACTIVE.values():
        if config in interceptor.original:
            call = (query, key, value, attention_mask, scaling, kwargs)
            return interceptor._own_attention(module, *call)
    raise RuntimeError(
        f"a model must be copied outside `applied`, but this {type(module).__name__} was copied inside; "
        "copy it again"
    )


def _mask_recipe(**kwargs: Any) -> MaskRecipe:
    return MaskRecipe(kwargs, {} if kwargs.get("use_vmap") else _known(kwargs["mask_function"]))


def _known(function: Any) -> dict[int | None, bool]:
    """Window of a mask function and whether it is causal, of those that transformers makes itself."""
    if function is causal_mask_function:
        return {None: True}
    if function is bidirectional_mask_function:
        return {None: False}
    parts = _closed_over(function).get("mask_functions", ())
    overlay = "sliding_window_overlay.<locals>.inner_mask"
    if [getattr(part, "__qualname__", "") for part in parts] == [overlay, "causal_mask_function"]:
        return {_closed_over(parts[0])["sliding_window"]: True}
    return {}


def _closed_over(function: Any) -> dict[str, Any]:
    if getattr(function, "__module__", "") != causal_mask_function.__module__:
        return {}
    cells = getattr(function, "__closure__", None) or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def _requests(
    q: torch.Tensor, k: torch.Tensor, mask: MaskRecipe
) -> Iterator[tuple[slice, slice, slice, int, int]]:
    """Cuts a batch into calls of equal length: batch slice, rows, keys, kv_start, first row's position.

    Positions of a padded request count from its first valid token, as they would without the batch.
    """
    spans = mask.spans()
    assert spans is not None
    if all(span == (0, mask.kv_len) for span in spans):
        keys = slice(0, mask.kv_len - mask.kv_offset)
        yield slice(0, q.shape[0]), slice(0, q.shape[2]), keys, mask.kv_offset, mask.q_offset
        return
    for b, (first, last) in enumerate(spans):
        rows = slice(max(first - mask.q_offset, 0), max(last - mask.q_offset, 0))
        if rows.start >= rows.stop:
            continue
        start = max(first, mask.kv_offset)
        keys = slice(start - mask.kv_offset, last - mask.kv_offset)
        position = max(mask.q_offset - first, 0)
        yield slice(b, b + 1), rows, keys, start - first, position


def _attend(
    call: Call,
    factor: float | torch.Tensor,
    thresholds: Thresholds,
    backend: Backend,
    *,
    count: bool,
) -> Any:
    # A phase without tiles is dense, and dense attention is the same for any tiles.
    if call.phase == "decode":
        tokens = thresholds.geometry.decode or DecodeGeometry(tile_kv=64)
        return decode_attention(
            call.q,
            call.k,
            call.v,
            scale_factor=factor,
            scale=call.scale,
            window=call.window,
            tile_kv=tokens.tile_kv,
            running_max=tokens.running_max,
            kv_start=call.kv_start,
            backend=backend,
            return_stats=count,  # type: ignore[call-overload]
        )
    tiles = thresholds.geometry.prefill or PrefillGeometry(tile_q=64, tile_kv=128)
    return attention(
        call.q,
        call.k,
        call.v,
        scale_factor=factor,
        causal=call.causal,
        scale=call.scale,
        window=call.window,
        tile_q=tiles.tile_q,
        tile_kv=tiles.tile_kv,
        kv_start=call.kv_start,
        backend=backend,
        return_stats=count,  # type: ignore[call-overload]
    )


def _on_device(factors: tuple[float, ...], device: torch.device) -> float | torch.Tensor:
    """One number where all heads share it, so that a dense layer is known to be dense on the host."""
    if len(set(factors)) == 1:
        return factors[0]
    return torch.tensor(factors, dtype=torch.float64, device=device)


def _split_at_floor(call: Call, floor: int | None) -> Iterator[tuple[Call, bool]]:
    """Parts of a call with whether they run dense because their KV length is below `min_kv_len`."""
    if call.phase == "prefill":
        yield call, floor is not None and call.kv_len < floor
        return
    floor = floor or 0
    tokens = call.q.shape[2]
    first = call.kv_len - tokens + 1  # KV length of the first token
    short = min(max(floor - first, 0), tokens)
    for start, stop, dense in ((0, short, True), (short, tokens, False)):
        # Tokens vote alone, so a long teacher-forced run may go through the kernel in short ones.
        for begin in range(start, stop, _RUN):
            end = min(begin + _RUN, stop)
            seen = first + end - 1 - call.kv_start
            q, k, v = call.q[:, :, begin:end], call.k[:, :, :seen], call.v[:, :, :seen]
            yield (
                Call(call.layer, call.phase, q, k, v, call.scale, True, call.window, call.kv_start),
                dense,
            )


def _check_same_shape(model: PreTrainedModel, thresholds: Thresholds) -> None:
    config = model.config.get_text_config()
    found = shape_of_config(lambda key: getattr(config, key, None))
    wanted = thresholds.model
    made_for = (wanted.layers, wanted.q_heads, wanted.kv_heads, wanted.head_dim)
    if found != made_for:
        raise ValueError(
            "(layers, q_heads, kv_heads, head_dim) of file and model must agree, but the file is for "
            f"{wanted.name} with {made_for} and the model has {found}; calibrate this model"
        )


def _most_common(values: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    return max(set(values), key=values.count) if values else (0, 0, 0)


def _fields(layer: Layer) -> tuple[int, str, int, int, int, int | None]:
    return layer.index, layer.name, layer.q_heads, layer.kv_heads, layer.head_dim, layer.window
