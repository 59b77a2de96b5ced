"""The thresholds file: what it refuses, what it says, and that it comes back as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from skip_softmax import Thresholds
from skip_softmax.thresholds import FileError

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


def test_load_save_load_gives_the_same(tmp_path: Path) -> None:
    loaded = Thresholds.load(write(tmp_path, GOOD))
    loaded.save(tmp_path / "again.yaml")
    assert Thresholds.load(tmp_path / "again.yaml") == loaded
    assert list(tmp_path.glob(".*")) == [], "an atomic write leaves no temporary file"


def test_overrides_come_before_model_wide_numbers(tmp_path: Path) -> None:
    loaded = Thresholds.load(write(tmp_path, GOOD))
    assert loaded.per_head(0, "prefill") == (0.0,) * 4
    assert loaded.per_head(1, "prefill") == (180.0,) * 4
    assert loaded.per_head(2, "prefill") == (90.0, 0.0, 240.0, 1e-5)
    assert loaded.per_head(2, "decode") == (4.0, 9.5)
    assert loaded.per_head(3, "decode") == (12.5, 12.5)


def test_a_missing_phase_and_an_uncalibrated_layer_are_dense(tmp_path: Path) -> None:
    text = GOOD.replace(
        "scale_factor: {prefill: 180.0, decode: 12.5}", "scale_factor: {prefill: 180.0}"
    )
    loaded = Thresholds.load(
        write(tmp_path, text + "uncalibrated: [{layer: 1, reason: soft-cap}]\n")
    )
    assert loaded.per_head(3, "decode") == (0.0, 0.0)
    assert loaded.per_head(1, "prefill") == (0.0,) * 4


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "min_kv_len:",
            "min_kv_length:",
            r"thresholds.yaml:5: min_kv_length: unknown key; did you mean `min_kv_len`\?",
        ),
        (
            "tile_q: 64",
            "tile_queue: 64",
            r"thresholds.yaml:4: geometry.prefill.tile_queue: unknown key; did you mean `tile_q`",
        ),
        (
            "layer: 0, prefill",
            "layer: 0, prefil",
            "thresholds.yaml:8: layers.0.prefil: unknown key; did you mean `prefill`",
        ),
        (
            "prefill: 180.0",
            "prefill: many",
            "thresholds.yaml:6: scale_factor.prefill: .*number.*'many'",
        ),
        (
            "prefill: 180.0",
            "prefill: -1",
            "scale_factor.prefill: .*greater than or equal to 0, but got -1",
        ),
        ("prefill: 180.0", "prefill: .nan", "scale_factor.prefill: .*finite number.*nan"),
        (
            "prefill: 1024",
            "prefill: 240",
            r"`min_kv_len.prefill > scale_factor` must hold, but got min_kv_len=240",
        ),
        (
            "min_kv_len: {prefill: 1024, decode: 512}",
            "",
            "`min_kv_len.prefill > scale_factor` must hold, but got min_kv_len=None",
        ),
        ("layer: 2", "layer: 4", r"layers\[1\] \(layer 4\): layer must be below model.layers=4"),
        ("layer: 2", "layer: 0", "this layer is listed twice"),
        (
            "decode: [4.0, 9.5]",
            "decode: [4.0]",
            r"decode needs one number, or 2 \(one per KV head\), got 1",
        ),
        (
            "tile_kv: 64}",
            "tile_kv: 48}",
            "`tile_kv` must be a power of two from 16 to 512, but got 48",
        ),
        (
            "geometry: {prefill: {tile_q: 64, tile_kv: 128}, ",
            "geometry: {",
            "geometry.prefill is required when a prefill scale factor is above 0",
        ),
        ("criterion: max", "criterion: min", "thresholds.yaml:3: criterion: .*'max'.*'min'"),
        ("format: skip-softmax/1", "format: skip-softmax/2", "thresholds.yaml:1: format"),
        (
            "kv_heads: 2",
            "kv_heads: 3",
            "`q_heads` must be a multiple of `kv_heads`, but got 4 and 3",
        ),
        (
            "criterion: max",
            "criterion: max\ncriterion: max",
            "thresholds.yaml:4: not valid YAML: key 'criterion' is given twice",
        ),
        ("criterion: max", "criterion: [", "not valid YAML"),
        (GOOD, "just a sentence\n", "the file must be a YAML mapping, but it holds a str"),
        (GOOD, "", "the file must be a YAML mapping, but it holds nothing"),
        ("criterion: max", "criterion: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_broken_files_are_refused_with_line_key_and_cure(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in GOOD
    with pytest.raises(FileError, match=message):
        Thresholds.load(write(tmp_path, GOOD.replace(before, after)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere.yaml: no such file"):
        Thresholds.load(tmp_path / "nowhere.yaml")
