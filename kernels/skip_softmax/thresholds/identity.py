"""What a thresholds file's `model.sha256` is the hash of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

EXPORT_KEY = "sparse_attention_config"
"""The one key of a `config.json` that an export may write; it does not belong to the model's identity."""


def hash_of_files(location: Path) -> str:
    """SHA-256 of a model's file, or of every file of its folder that decides its numbers.

    Raises:
        OSError: a file cannot be read.
        ValueError: `config.json` is not JSON.
    """
    digest = hashlib.sha256()
    files = (
        [location]
        if location.is_file()
        else sorted(
            path
            for path in location.iterdir()
            if path.suffix in {".json", ".safetensors", ".bin", ".gguf"}
            and not path.name.endswith(".evidence.json")
        )
    )
    for file in files:
        if file.name == "config.json":
            digest.update(bytes.fromhex(hash_of_config(json.loads(file.read_bytes()))))
            continue
        with file.open("rb") as stream:
            digest.update(
                hashlib.file_digest(stream, "sha256").digest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(stream.read()).digest()
            )
    return digest.hexdigest()


def hash_of_hub_id(name: str, commit: str) -> str:
    """SHA-256 of a hub id, which names a moving target, and the commit it resolved to, which does not."""
    return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()


def hash_of_config(data: dict[str, Any]) -> str:
    """SHA-256 of a `config.json`, without the key that an export writes."""
    kept = {key: value for key, value in data.items() if key != EXPORT_KEY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
