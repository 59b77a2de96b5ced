"""The table of engines: complete, and true where it says that nothing skips."""

from __future__ import annotations

from typing import get_args

from engine_files import MODELOPT, PAGES, thresholds

from calibrate.engines.catalogue import ENGINES
from calibrate.engines.export import export
from calibrate.engines.types import Ignored
from calibrate.schema import TargetConfig
from skip_softmax.thresholds.types import PHASES


def test_every_engine_can_be_a_search_target() -> None:
    engines = set(get_args(TargetConfig.model_fields["engine"].annotation))
    assert engines == set(ENGINES) | {"scalar", "scalar+ignore"}


def test_there_is_a_page_for_every_engine() -> None:
    # The plug-in takes the thresholds file itself: it has a page, but nothing to export.
    others = {"README", "vllm_plugin"}
    assert {page.stem for page in PAGES.glob("*.md")} == set(ENGINES) | others


def test_every_engine_has_a_room_of_its_name() -> None:
    for name, engine in ENGINES.items():
        room = f"calibrate.engines.{name.replace('-', '_')}"
        assert engine.write.__module__ == room
        assert engine.read is None or engine.read.__module__ == room


def test_facts_fit_together() -> None:
    for engine in ENGINES.values():
        assert (engine.read is None) == (engine.form == "native") == (not engine.servers)
        assert engine.absolute == ("at_length" in engine.options)
        assert (engine.config_json in ("layers", "all")) == (engine.form == "scalar+ignore")
        # Where a phase has no name in the artefact, no server runs it.
        for phase in PHASES:
            ignored = all(isinstance(server.phase(phase), Ignored) for server in engine.servers)
            assert ignored == (phase not in engine.numbers), (engine.name, phase)


def test_hopper_decode_is_a_no_op_exactly_where_the_engines_say() -> None:
    ignoring = {
        name
        for name, engine in ENGINES.items()
        for server in engine.servers
        if server.gpu == "sm90"
        and isinstance(server.decode, Ignored)
        and "decode" in engine.numbers
    }
    assert ignoring == {"sglang", "flashinfer", "vllm"}


def test_any_engine_takes_a_gpu_that_exists() -> None:
    for gpu in ("sm80", "sm90a", "SM103", "gfx942"):
        assert export(thresholds(), "native", gpu=gpu).text == thresholds().to_yaml()
    file = thresholds(geometry=MODELOPT, kv_heads=8)
    assert export(file, "modelopt", gpu="sm80").sidecar["holds_for"][0]["gpu"] == "any"
