"""One pass of the model over a prompt and its continuation."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from calibrate.record.files import save_atomically


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
    logits = forward(loaded, prompt).float().cpu()
    folder.mkdir(exist_ok=True)
    save_atomically({"logits": logits.contiguous()}, path)
    return logits
