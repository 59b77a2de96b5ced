"""Greedy generation as a server does it: the prompt in one pass, then token by token with a KV cache."""

from __future__ import annotations

import torch

from calibrate.model.load import LoadedModel
from calibrate.prompts.build import Prompt
from skip_softmax.thresholds.file import Thresholds


def greedy(
    loaded: LoadedModel, prompt: Prompt, tokens: int, thresholds: Thresholds | None = None
) -> list[int]:
    """Continues a prompt with the token ranked first, again and again, with whatever attention the model has.

    Sampling, penalties and whatever else a model's generation config asks for are left out: they would hide
    or add differences that are not those of attention.

    Args:
        loaded: the model.
        prompt: what to continue.
        tokens: how many tokens at most.
        thresholds: what a serving engine is to run; None: it skips nothing. A transformers model has the
            attention that it has.

    Returns:
        The tokens; the last one may be one that ends the text.
    """
    ends = _ends(loaded)
    if loaded.engine is not None:
        served: list[int] = loaded.engine.generated(prompt.ids, tokens, sorted(ends), thresholds)
        return served
    given = torch.tensor([prompt.ids], device=loaded.model.device)
    cache, written = None, list[int]()
    with torch.no_grad():
        while len(written) < tokens and not (written and written[-1] in ends):
            out = loaded.model(
                input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, given = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            written.append(int(given))
    return written


def greedy_text(
    loaded: LoadedModel, prompt: Prompt, tokens: int, thresholds: Thresholds | None = None
) -> str:
    """What `greedy` writes, as text without special tokens."""
    written = greedy(loaded, prompt, tokens, thresholds)
    text: str = loaded.tokenizer.decode(written, skip_special_tokens=True)
    return text


def _ends(loaded: LoadedModel) -> set[int]:
    """Tokens that end a text, by the model's generation config and by the tokenizer."""
    named = getattr(loaded.model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return {*ids, loaded.tokenizer.eos_token_id} - {None}
