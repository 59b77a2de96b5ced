"""What a process needs to run vLLM on a CPU with our plug-in, and engines for tests."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PAGE = ROOT / "calibrate" / "engines" / "pages" / "vllm_plugin.md"

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # of use in 0.32 only: 0.22 has workers of its own on a CPU
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to workers
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",  # tests read the log, which a calibration would silence
    "TORCHDYNAMO_DISABLE": "1",  # log-probabilities would be compiled for a minute
    "HF_HUB_OFFLINE": "1",
}


def prepare(site: Path) -> None:
    """Makes this process, and those it starts, find our entry point and the test's platform.

    Entry points come from packages that are installed. `site` gets a package that has those of
    `pyproject.toml`, so that a source tree is tested as if it were installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import tomllib  # not in Python 3.10, which vLLM's environments are not

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {
        **project["entry-points"],
        "vllm.platform_plugins": {"custom_cpu": "cpu_platform:platform"},
    }
    about = site / "plugins_under_test-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins_under_test\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in groups.items()
        )
    )
    _command_works(site)
    paths = [str(path) for path in (ROOT, ROOT / "kernels", HERE, site)]
    sys.path += [path for path in paths if path not in sys.path]
    given = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, given]))


def _command_works(site: Path) -> None:
    """The command `vllm` asks for the version of a package of that name; the build for CPUs has another."""
    from importlib import metadata

    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        about = site / "vllm-0.dist-info"
        about.mkdir()
        number = metadata.version("vllm-cpu")
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n"
        )


def version() -> tuple[int, ...]:
    """Of the vLLM that this process imports; (0,) without one."""
    from importlib import util

    if util.find_spec("vllm") is None:
        return (0,)
    from vllm import __version__

    return tuple(int(part) for part in __version__.split(".")[:2])


def engine(model: Path, thresholds: Path | None = None, **options: Any) -> Any:
    """An engine with our backend; without thresholds it is dense."""
    from vllm import LLM

    section: dict[str, Any] = {"allow": options.pop("allow", [])}
    if thresholds is not None:
        section["thresholds"] = str(thresholds)
    defaults: dict[str, Any] = {
        "attention_backend": "CUSTOM",
        "additional_config": {"skip_softmax": section},
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "block_size": 64,
        "disable_log_stats": True,
        "compilation_config": {"custom_ops": ["none"]},
    }
    return LLM(str(model), **{**defaults, **options})


def generated(llm: Any, prompts: list[list[int]], count: int = 16) -> list[list[int]]:
    """Greedy tokens of prompts that are sent together."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    done = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False
    )
    return [list(request.outputs[0].token_ids) for request in done]


def closed(llm: Any) -> None:
    """Frees an engine, so that the process can have another."""
    import gc

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def commands() -> dict[str, list[str]]:
    """Words of the page's commands by their first two."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [
        shlex.split(line, comments=True)
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    return {" ".join(words[:2]): words for words in lines}
