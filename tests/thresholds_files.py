"""A good thresholds file to break."""

from __future__ import annotations

from pathlib import Path

GOOD = """\
format: skip-softmax/1
model: {name: m, sha256: "0", layers: 4, q_heads: 4, kv_heads: 2, head_dim: 64, dtype: float32}
criterion: max
geometry: {prefill: {tile_q: 64, tile_kv: 128}, decode: {tile_kv: 64}, order: ascending}
min_kv_len: {prefill: 1024, decode: 512}
scale_factor: {prefill: 180.0, decode: 12.5}
layers:
  - {layer: 0, prefill: 0.0, decode: 0.0}
  - {layer: 2, prefill: [90.0, 0.0, 240.0, 1.0e-5], decode: [4.0, 9.5]}
evidence: {verdict: passed}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "thresholds.yaml"
    path.write_text(text)
    return path
