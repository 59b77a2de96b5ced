"""A thresholds file for a model folder, with planted numbers and evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import skip_softmax as ss
from skip_softmax.thresholds.identity import hash_of_files


def thresholds(folder: Path, **changes: Any) -> ss.Thresholds:
    """Numbers per layer and per head, for tiles of 16 x 32 and 32, that passed on prompts of up to 1024."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    kv_heads, q_heads = config.num_key_value_heads, config.num_attention_heads
    sections: dict[str, Any] = {
        "model": {
            "name": "planted",
            "sha256": hash_of_files(folder),
            "layers": config.num_hidden_layers,
            "q_heads": q_heads,
            "kv_heads": kv_heads,
            "head_dim": config.head_dim,
            "dtype": "float32",
        },
        "geometry": {
            "prefill": {"tile_q": 16, "tile_kv": 32, "dense_last": 8},
            "decode": {"tile_kv": 32},
        },
        "min_kv_len": {"prefill": 256, "decode": 100},
        "scale_factor": {"prefill": 200.0, "decode": 20.0},
        "layers": [
            {
                "layer": 1,
                "prefill": [240.0 / (1 + head) for head in range(q_heads)],
                "decode": [4.0 * (1 + head) for head in range(kv_heads)],
            }
        ],
        "evidence": {
            "verdict": "passed",
            "budget": {"kl": 0.2, "confidence": 0.95},
            "loss": {
                "kl": {"mean": 0.01, "upper": 0.02},
                "score_drop": {"mean": 0.0, "upper": 1.0},
                "heldout_prompts": 8,
            },
            "sparsity": {"prefill": {"achieved": 0.3, "by_length": {"1024": {"achieved": 0.3}}}},
        },
    }
    return ss.Thresholds(**{**sections, **changes})


def saved(folder: Path, path: Path, **changes: Any) -> Path:
    """The file of `thresholds`."""
    thresholds(folder, **changes).save(path)
    return path
