"""One pass of the model over a prompt and its continuation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.record.files import save_atomically
from skip_softmax.api import attention
from skip_softmax.huggingface.calls import LayerCall
from skip_softmax.huggingface.intercept import intercepted


def forward(loaded: LoadedModel, prompt: Prompt) -> torch.Tensor:
    """Runs prompt and continuation in one pass, with whatever attention the model has now.

    A serving engine runs the attention that it has when it skips nothing.

    Returns:
        Logits [continuation + 1, vocabulary]: of the last prompt token and of every continuation
        token.
    """
    if loaded.engine is not None:
        dense: torch.Tensor = loaded.engine.logits(prompt.ids, prompt.continuation)[0]
        return dense
    tokens = torch.tensor([[*prompt.ids, *prompt.continuation]], device=loaded.model.device)
    keep = len(prompt.continuation) + 1
    with torch.no_grad():
        out = loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0, -keep:]
    return logits


@contextmanager
def served_densely(loaded: LoadedModel) -> Iterator[None]:
    """The model as a server without skipping has it: with keys and values as its KV cache keeps them."""
    if loaded.kv_cache_dtype is None:
        yield
        return

    def dense(call: LayerCall) -> torch.Tensor:
        out: torch.Tensor = attention(call.q, call.k, call.v, **call.keywords)
        return out

    left_alone = {layer.index: layer.reason for layer in loaded.layers if layer.reason is not None}
    with intercepted(
        loaded.model, dense, left_alone=left_alone, kv_cache_dtype=loaded.kv_cache_dtype
    ):
        yield


def dense_logits(loaded: LoadedModel, prompt: Prompt, folder: Path) -> torch.Tensor:
    """Dense logits [continuation + 1, vocabulary], float32, kept in `folder` for the next time."""
    path = folder / f"{prompt.key}.safetensors"
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                kept: torch.Tensor = file.get_tensor("logits")
                return kept
        except (SafetensorError, OSError):
            path.unlink()  # damaged: computed again
    with served_densely(loaded):
        logits = forward(loaded, prompt).float().cpu()
    folder.mkdir(exist_ok=True)
    save_atomically({"logits": logits.contiguous()}, path)
    return logits
