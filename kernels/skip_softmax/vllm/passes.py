"""What a worker does for a calibration: one prompt at a time, dense and counted, or with given numbers.

vLLM adds `Passes` to its class of workers (`worker_extension_cls`), and `calibrating.py` calls it by name.
Arguments and answers are plain data, which vLLM sends between processes without pickle.
"""

from __future__ import annotations

from typing import Any

import torch

from skip_softmax.api import tile_statistics
from skip_softmax.meaning.call import gathered
from skip_softmax.meaning.histogram import TileHistogram
from skip_softmax.thresholds.file import Thresholds
from skip_softmax.vllm import checks, counters, startup
from skip_softmax.vllm.stretch import Stretch

Key = tuple[int, str, int]
"""Layer, phase, and KV length where the tiles end [tokens]."""


class Passes:
    """Methods of a worker; between `begin` and `end` it runs one request."""

    vllm_config: Any
    model_runner: Any

    def skip_softmax_model(self) -> dict[str, Any]:
        """Shape of the model, and of the layers that this worker runs with our backend.

        Returns:
            `layers`, `q_heads`, `kv_heads` and `head_dim` of the whole model, `vocabulary`, and `ours`: per
            layer its name, index (None: it has none), heads of this worker, head size and window.
        """
        model = self.vllm_config.model_config
        ours = [
            {
                "name": name,
                "index": startup.index_of(name),
                "q_heads": impl.num_heads,
                "kv_heads": impl.num_kv_heads,
                "head_dim": impl.head_size,
                "window": impl.sliding_window,
            }
            for name, impl in counters.impls(self.vllm_config).items()
        ]
        return {
            "layers": model.get_total_num_hidden_layers(),
            "q_heads": model.hf_text_config.num_attention_heads,
            "kv_heads": model.get_total_num_kv_heads(),
            "head_dim": model.get_head_size(),
            "vocabulary": model.get_vocab_size(),
            "ours": ours,
        }

    def skip_softmax_begin(self, asked: dict[str, Any]) -> None:
        """Prepares for one request.

        Args:
            asked: `thresholds`, a file's content, or None for dense; `decode_from`, the position from which
                tokens are decode, or None as in service; `tokens`, how many there are; `keep`, of how many at
                the end logits are wanted; `tiles`, None or the tiles of each phase (keywords of
                `tile_statistics`), `floor` and `each_step` (see `calibrating.Engine.tiles`).

        Raises:
            ValueError: the thresholds are of another shape, or no kernel runs their tiles here.
        """
        plan = startup.plan_of(self.vllm_config)
        thresholds = None
        if asked["thresholds"] is not None:
            thresholds = Thresholds.model_validate(asked["thresholds"])
            reason = checks.other_shape(self.vllm_config, thresholds)
            reason = reason or checks.other_votes(self.vllm_config, thresholds)
            if reason is not None:
                raise ValueError(reason)
        plan = plan.running(thresholds)
        for group in self.model_runner.kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            # Layers whose pages differ in size may be one group.
            for one in getattr(spec, "kv_cache_specs", {"all": spec}).values():
                startup.check_pages(self.vllm_config, one, self.model_runner.device, plan)
        ours = counters.impls(self.vllm_config)
        self._skip_softmax = watching = _Watching(asked, self.model_runner.model, next(iter(ours)))
        for impl in ours.values():
            impl.run(plan)
            impl.decode_from = asked["decode_from"]
            impl.watch = watching.count if asked["tiles"] is not None else None

    def skip_softmax_end(self) -> dict[str, Any]:
        """What the request left behind; the layers are as in service again.

        Returns:
            `tokens`, how many were read; `logits`, None or float32 [keep, vocabulary] as bytes, and their
            shape; `counts`, per layer and phase [visited, skipped] of each head; `tiles`, per layer, phase
            and KV length the counts (int64) and mass (float64) [heads, bins] as bytes, and the rows.
        """
        watching = self._skip_softmax
        watching.close()
        ours = counters.impls(self.vllm_config)
        counts = [
            [startup.index_of(name), phase, counts.tolist()]
            for name, impl in ours.items()
            for phase, counts in impl.counts.items()
        ]
        for impl in ours.values():
            impl.decode_from = impl.watch = None
        return {
            "tokens": watching.tokens,
            "logits": watching.logits(),
            "counts": counts,
            "tiles": [
                [*key, [_bytes(found.counts), _bytes(found.mass)], found.rows]
                for key, found in watching.seen.items()
            ],
        }


class _Watching:
    """Collects hidden states of the last tokens of a request, and tiles if they are asked for."""

    def __init__(self, asked: dict[str, Any], model: Any, layer: str) -> None:
        self.asked, self.model, self.layer = asked, model, layer
        self.tokens = 0
        self.seen: dict[Key, TileHistogram] = {}
        self._hidden: list[torch.Tensor] = []
        self._hook = model.register_forward_hook(self._collect) if asked["keep"] else None

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _collect(self, _module: Any, _arguments: Any, hidden: torch.Tensor) -> None:
        from vllm.forward_context import get_forward_context

        batch = get_forward_context().attn_metadata
        if batch is None:
            return
        rows = batch[self.layer].stretches[-1].tokens.stop  # the rest pads the batch
        first = max(self.asked["tokens"] - self.asked["keep"] - self.tokens, 0)
        self._hidden.append(hidden[min(first, rows) : rows].clone())
        self.tokens += rows

    def logits(self) -> list[Any] | None:
        """All workers must ask for them: each has a part of the vocabulary."""
        if not self._hidden:
            return None
        with torch.inference_mode():
            found = self.model.compute_logits(torch.cat(self._hidden))
        return None if found is None else [_bytes(found.float()), list(found.shape)]

    def count(
        self,
        impl: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        s: Stretch,
        out: torch.Tensor,
    ) -> None:
        """Dense attention of one request, whose tiles are counted; `attend.Watch`.

        Its pages become one piece, which takes memory for the keys and values of one layer.
        """
        asked, index = self.asked["tiles"], startup.index_of(impl.name)
        assert index is not None  # `calibrating.py` refuses such a model
        first_row, rows = int(s.kv_lens[-1]) - (s.tokens.stop - s.tokens.start), s.tokens
        # Pages behind the window may hold anything.
        start = 0
        if impl.sliding_window is not None:
            start = max(first_row - impl.sliding_window + 1, 0) // k.shape[2] * k.shape[2]
        size, decode = rows.stop - rows.start, s.phase == "decode"
        steps = [(i, i + 1) for i in range(size)] if decode and asked["each_step"] else [(0, size)]
        keys, values = (_gathered(x, s.table[-1], start, first_row + size) for x in (k, v))
        for begin, stop in steps:
            kv_len = first_row + stop
            tiles = dict(asked[s.phase])
            if not decode and kv_len < asked["floor"]:
                tiles["dense_last"] = size  # all of its rows are dense
            here = slice(rows.start + begin, rows.start + stop)
            found, histogram = tile_statistics(
                q[here].transpose(0, 1)[None], keys[:, :, : kv_len - start], values[:, :, : kv_len - start],
                decode=decode, scale=impl.scale, window=impl.sliding_window, kv_start=start,
                **impl.scales, **tiles,
            )  # fmt: skip
            out[here] = found[0].transpose(0, 1)
            # A prompt is one sample, in how many chunks it may be computed.
            key = (
                index,
                s.phase,
                kv_len if asked["each_step"] and decode else self.asked["decode_from"],
            )
            self.seen[key] = self.seen[key] + histogram if key in self.seen else histogram


def _gathered(pages: torch.Tensor, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Keys or values [1, KV heads, stop - start, head_dim] of one request; `start` begins a page."""
    size = pages.shape[2]
    used = table[start // size : -(-stop // size)]
    return gathered(pages, used)[None, :, : stop - start]


def _bytes(x: torch.Tensor) -> bytes:
    return x.cpu().contiguous().numpy().tobytes()
