"""The house rules that a machine can check.

1. calibrate: a file imports its own room and those that stand left of it.
2. skip_softmax: the same, a floor at a time; kernel rooms know neither each other nor the reference.
3. An engine's room knows no other engine; only the catalogue knows rooms.

Then: what an import loads, the README's tree, habits, and in how many places a name is typed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import ROOT
from fresh_process import HEAVY, command, loaded_by

import skip_softmax
from calibrate.schema import Engine, Task, load_config
from skip_softmax.thresholds import yaml_file

PACKAGES = {"calibrate": ROOT / "calibrate", "skip_softmax": ROOT / "kernels" / "skip_softmax"}
CODE = [*PACKAGES.values(), ROOT / "kernels" / "bench", ROOT / "tests"]


# Who imports whom.


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def modules(package: str) -> dict[str, Path]:
    """Every file by its dotted name inside the package; a folder's `__init__.py` has the folder's name."""
    found = {}
    for path in sorted(PACKAGES[package].rglob("*.py")):
        parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
        folder = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(folder) or "__init__"] = path
    return found


def code_files() -> list[Path]:
    return [path for folder in CODE for path in sorted(folder.rglob("*.py"))]


@cache
def imported(package: str, name: str) -> frozenset[str]:
    """Dotted names that a file imports anywhere: at its top, in functions, for type checking.

    `from a.b import c` is `a.b.c`, whether c is a module or something inside `a.b`.
    """
    found: set[str] = set()
    for node in ast.walk(tree_of(modules(package)[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}.{name}: relative import; write the package's name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and name == "__init__":
            # Names of modules that `__getattr__` imports when they are asked for.
            found |= set(re.findall(rf"^{package}(?:\.\w+)+$", str(node.value)))
    return frozenset(found)


def module_of(package: str, dotted: str) -> str:
    """The file behind a dotted name of the package: the longest part of the name that is a file."""
    parts = dotted.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in modules(package):
            return ".".join(parts[:end])
    return "__init__"


@cache
def neighbours(package: str, name: str) -> frozenset[str]:
    """Files of the same package that a file imports."""
    own = {dotted for dotted in imported(package, name) if dotted.split(".")[0] == package}
    return frozenset(module_of(package, dotted) for dotted in own)


def reached(package: str, name: str) -> set[str]:
    """Files of the same package that a file imports, or that those import."""
    found: set[str] = set()
    open_ends = [name]
    while open_ends:
        new = neighbours(package, open_ends.pop()) - found
        found |= new
        open_ends += new
    return found


def room(module: str) -> str:
    """The folder of a file, or the file itself where it stands at the top."""
    return module.split(".")[0]


# Law 1.

ORDER = [
    "errors",
    "bench",
    "terminal",
    "schema",
    "prompts",
    "record",
    "model",
    "engines",
    "statistics",
    "loss",
    "search",
    "proof",
    "serving",
    "report",
    "pipeline",
    "transfer",
    "api",
    "__init__",  # the package itself is what the command line calls
    "cli",
]


@pytest.mark.parametrize("name", sorted(modules("calibrate")))
def test_law_1_a_file_imports_its_own_room_and_those_left_of_it(name: str) -> None:
    allowed = set(ORDER[: ORDER.index(room(name)) + 1])
    too_far = {other for other in neighbours("calibrate", name) if room(other) not in allowed}
    assert not too_far, f"calibrate.{name} imports {sorted(too_far)}, which stand right of it"


def test_law_1_names_every_room() -> None:
    assert {room(name) for name in modules("calibrate")} == set(ORDER)


# Law 2.

KERNELS = {"triton", "hopper", "blackwell"}
ADAPTORS = {"huggingface", "vllm"}
FLOORS = [
    {"launch", "meaning", "thresholds"},
    KERNELS,
    {"choose"},
    {"api"},
    ADAPTORS,
    {"__init__"},
]
FOREIGN = {
    "thresholds": {"yaml", "pydantic"},
    "launch": {"triton"},
    "triton": {"triton"},
    "hopper": {"triton"},
    "blackwell": {"triton"},
    "huggingface": {"transformers"},
    "vllm": {"vllm", "prometheus_client"},
}


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


@pytest.mark.parametrize("name", sorted(modules("skip_softmax")))
def test_law_2_a_file_imports_its_own_floor_and_those_below(name: str) -> None:
    allowed = set().union(*FLOORS[: floor(name) + 1])
    too_far = {other for other in neighbours("skip_softmax", name) if room(other) not in allowed}
    assert not too_far, f"skip_softmax.{name} imports {sorted(too_far)} of a floor above"


@pytest.mark.parametrize("name", sorted(modules("skip_softmax")))
def test_law_2_rooms_that_are_alternatives_do_not_know_each_other(name: str) -> None:
    found = neighbours("skip_softmax", name)
    for alternatives in (KERNELS, ADAPTORS):
        if room(name) in alternatives:
            assert not {room(other) for other in found} & (alternatives - {room(name)}), name
    if room(name) in KERNELS:
        # Two implementations of one meaning that share code share their mistakes.
        assert not found & {"meaning.reference", "meaning.literal"}, name
    if room(name) == "meaning":
        assert "launch" not in found, name


@pytest.mark.parametrize("package", PACKAGES)
def test_law_2_only_choose_knows_the_kernels(package: str) -> None:
    for name in modules(package):
        if package == "skip_softmax" and room(name) in {"choose", *KERNELS}:
            continue
        inside = [other.split(".") for other in imported(package, name)]
        known = {parts[1] for parts in inside if parts[0] == "skip_softmax" and len(parts) > 1}
        assert not known & KERNELS, f"{package}.{name} imports a kernel"


@pytest.mark.parametrize("name", sorted(modules("skip_softmax")))
def test_law_2_each_room_has_its_own_foreign_packages(name: str) -> None:
    allowed = {"skip_softmax", "torch", *sys.stdlib_module_names, *FOREIGN.get(room(name), ())}
    found = {other.split(".")[0] for other in imported("skip_softmax", name)}
    assert found <= allowed, f"skip_softmax.{name} must not import {sorted(found - allowed)}"


# Law 3.

# What stands in `engines/` beside the engines' own rooms: what rooms may use, and what uses the catalogue.
SHARED = {"engines.types", "engines.tiles", "engines.config_json"}
USERS = {"engines.numbers", "engines.guards", "engines.export", "engines.read"}
ENGINE_ROOMS = {
    name
    for name in modules("calibrate")
    if name.startswith("engines.") and name not in {*SHARED, *USERS, "engines.catalogue"}
}


@pytest.mark.parametrize("name", sorted(ENGINE_ROOMS))
def test_law_3_an_engine_s_room_imports_no_other(name: str) -> None:
    inside = {other for other in neighbours("calibrate", name) if room(other) == "engines"}
    assert inside <= SHARED, f"calibrate.{name} imports {sorted(inside - SHARED)}"


def test_law_3_only_the_catalogue_imports_rooms_and_it_imports_all() -> None:
    for name in modules("calibrate"):
        found = neighbours("calibrate", name) & ENGINE_ROOMS
        assert found == (ENGINE_ROOMS if name == "engines.catalogue" else set()), name


# All of them.


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_circles(package: str) -> None:
    # A package's own `__init__` names what it offers; it is nobody's part.
    circles = [
        name for name in modules(package) if name != "__init__" and name in reached(package, name)
    ]
    assert circles == []


def test_nothing_is_patched_at_import() -> None:
    """No assignment to a name inside another module, outside functions."""
    found = []
    for package in PACKAGES:
        for path in modules(package).values():
            tree = tree_of(path)
            foreign = {
                (alias.asname or alias.name).split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            for node in run_at_import(tree):
                targets: list[ast.expr] = []
                if isinstance(node, (ast.Assign, ast.Delete)):
                    targets = node.targets
                elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
                    targets = [node.target]
                elif (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in ("setattr", "delattr")
                ):
                    targets = [ast.Attribute(node.args[0], "")]
                for target in targets:
                    if isinstance(target, (ast.Attribute, ast.Subscript)):
                        base: ast.expr = target
                        while isinstance(base, (ast.Attribute, ast.Subscript)):
                            base = base.value
                        if isinstance(base, ast.Name) and base.id in foreign:
                            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from run_at_import(child)


# What an import loads.


@pytest.mark.parametrize(
    "program",
    [
        "import calibrate",
        "import skip_softmax",
        "import skip_softmax; skip_softmax.Thresholds",
        command("--help"),
        command("run", "--help"),
        command("show", "--help"),
    ],
    ids=["calibrate", "skip_softmax", "Thresholds", "--help", "run --help", "show --help"],
)
def test_a_fresh_process_loads_nothing_heavy(program: str) -> None:
    loaded = loaded_by(program)
    assert {"calibrate", "skip_softmax"} & loaded
    assert not loaded & HEAVY


def test_both_imports_work_beside_the_package_that_is_called_kernels(tmp_path: Path) -> None:
    """`kernels` is Hugging Face's on PyPI; ours is a folder, and must neither hide it nor need it."""
    spec = importlib.util.find_spec("kernels")
    paths = []
    if spec is None or spec.origin is None:  # only our folder was found: stand in for the package
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): return name\n")
        paths = [tmp_path]
    program = (
        "import calibrate, skip_softmax, kernels; "
        "assert kernels.__file__.endswith('__init__.py'), kernels; "
        "assert callable(kernels.get_kernel), kernels"
    )
    # Our folder first or last on the path: without an `__init__.py` it never wins.
    for order in ([*paths, ROOT], [ROOT, *paths]):
        assert {"calibrate", "skip_softmax", "kernels"} <= loaded_by(program, paths=order)


def test_our_source_root_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


# The README's tree.


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def tree_in_readme() -> dict[str, set[str]]:
    """Files and folders named under each heading of the README's tree."""
    block = next((block for block in readme_blocks() if "kernels/skip_softmax/" in block), None)
    assert block is not None, "README.md needs a fenced tree that holds kernels/skip_softmax/"
    named: dict[str, set[str]] = {}
    heading = ""
    for line in block.splitlines():
        if not line.startswith(" "):
            heading = line.split()[0].rstrip("/")
            named[heading] = set()
        else:
            named[heading].add(line.split()[0])
    return named


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_in_the_readme_names_every_room_and_no_other(package: str) -> None:
    folder = PACKAGES[package]
    there = {path.name for path in folder.glob("*.py")}
    there |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    named = tree_in_readme()[folder.relative_to(ROOT).as_posix()]
    assert named == there, f"missing: {sorted(there - named)}; gone: {sorted(named - there)}"


def test_every_file_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:configs|notebooks|tests|kernels|calibrate)/[\w./-]+\w", text))
    linked = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text))
    missing = sorted(name for name in named | linked if not (ROOT / name).exists())
    assert missing == []


# Habits.


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file that belongs to the project."""
    skipped = {"runs", "build", "dist", "__pycache__", "node_modules"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] not in (
            ".ci",
            ".pre-commit-config.yaml",
            ".gitignore",
        )
        if hidden or skipped & set(parts) or any(part.endswith(".egg-info") for part in parts):
            continue
        if path.is_file():
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        (
            "a folder of one machine",
            r"(?<![\w.~<*-])/(?:home|root|Users|work|mnt|opt|data)/[\w.-]+",
        ),
        ("a package index", r"(?:--|\b)(?:extra-)?index-url|\bPIP_INDEX|\[\[tool\.uv\.index\]\]"),
        (
            "a host that is not public",
            r"https?://(?:localhost|\d+\.\d+\.\d+\.\d+|[\w.-]+\.(?:internal|local|corp|lan))\b",
        ),
        ("a secret", r"\bhf_[A-Za-z0-9]{30,}|\bghp_[A-Za-z0-9]{30,}|BEGIN [A-Z ]*PRIVATE KEY"),
    ],
    ids=["machine", "index", "host", "secret"],
)
def test_no_file_names(what: str, pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path, text in texts()
        if path != Path(__file__).resolve()
        for number, line in enumerate(text.splitlines(), 1)
        for match in re.finditer(pattern, line)
    ]
    assert found == [], f"these lines name {what}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_config_fits_the_schema_and_says_what_it_is(path: Path) -> None:
    load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# "), "a config starts with what it is for"


def test_the_demo_config_explains_every_key() -> None:
    """Its first comment promises that."""
    from calibrate.schema import RunConfig

    path = ROOT / "configs" / "smollm2-135m.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(data) == set(RunConfig.model_fields)
    for section, field in RunConfig.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            assert set(data[section]) == set(field.annotation.model_fields), section


@pytest.mark.parametrize("name", skip_softmax.__all__)
def test_every_public_name_of_the_kernels_is_explained(name: str) -> None:
    thing = getattr(skip_softmax, name)
    text = inspect.getdoc(thing) or ""
    assert re.match(r"[A-Z`].*\.", text), f"skip_softmax.{name} needs a docstring"
    if inspect.isfunction(thing):
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"^\s*{parameter}: ", text, re.MULTILINE), f"{name}: {parameter}"


def test_public_names_are_those_that_programs_rely_on() -> None:
    fixed = {"attention", "decode_attention", "tile_gaps", "Thresholds", "applied"}
    assert fixed <= set(skip_softmax.__all__)
    assert set(skip_softmax.__all__) <= set(dir(skip_softmax))


def test_pre_commit_runs_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:[^\n]*\n((?:\t[^\n]*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    linted = [shlex.split(line.replace("$(BIN)/", "")) for line in recipe[1].splitlines()]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooked = [
        shlex.split(hook["entry"].replace(".venv/bin/", ""))
        for repo in hooks["repos"]
        for hook in repo["hooks"]
    ]
    assert linted == hooked != []


def test_ci_runs_what_a_laptop_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set "))]
    assert commands[-1] == "make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test:[^\n]*\blint\b", makefile, re.MULTILINE), "tests come with the linters"


def test_no_file_is_read_by_running_it() -> None:
    """No pickle, no unsafe YAML: a file that a user was sent must not be able to run code."""
    found = []
    for path in code_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if {name.split(".")[0] for name in names} & {"pickle", "dill", "shelve", "marshal"}:
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                loaders = [word.value for word in node.keywords if word.arg == "Loader"]
                safe = called != "yaml.load" or (
                    len(loaders) == 1
                    and ast.unparse(loaders[0])
                    in ("_UniqueKeyLoader", "_ForeignLoader", "yaml.SafeLoader")
                )
                ours = (
                    ROOT / "tests" not in path.parents
                )  # a test may evaluate what it wrote itself
                if not safe or called in UNSAFE or (ours and called in ("eval", "exec")):
                    found.append(f"{path.name}:{node.lineno}: {called}")
    assert found == []
    for loader in (yaml_file._UniqueKeyLoader, yaml_file._ForeignLoader):
        assert issubclass(loader, yaml.SafeLoader)


UNSAFE = {
    "torch.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "yaml.full_load_all",
    "yaml.unsafe_load_all",
    "numpy.load",
    "np.load",
}


def test_only_the_command_line_prints() -> None:
    """The library logs; data and messages of the command go through one file."""
    allowed = {PACKAGES["calibrate"] / "cli.py"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for path in modules(package).values()
        if path not in allowed
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_drawer_for_everything(package: str) -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "manager", "base", "core"}
    assert not drawers & {part for name in modules(package) for part in name.split(".")}
    assert (PACKAGES[package] / "py.typed").exists()


# Places to touch: what is added is named where its likes are named, and nowhere else.

SCHEMA = "calibrate/schema.py"  # lists engines and tasks, and the budget's defaults


@cache
def words(path: Path) -> frozenset[str]:
    """Names and whole strings in a file's code; not its comments, nor words inside strings."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        for _, value in ast.iter_fields(node):
            if isinstance(value, str):
                found |= {value, *value.split(".")}
    return frozenset(found)


def places(name: str) -> set[str]:
    """Files that type a name, tests left out."""
    folders = [folder for folder in CODE if folder.name != "tests"]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    spellings = {name, name.replace("-", "_")}
    return {path.relative_to(ROOT).as_posix() for path in paths if spellings & words(path)}


# The bench times FlashInfer and its kernel of TensorRT-LLM; `import` reads TensorRT-LLM's numbers by default.
@pytest.mark.parametrize(
    "name", sorted({*get_args(Engine)} - {"native", "scalar", "scalar+ignore"})
)
def test_an_engine_is_its_room_one_line_of_the_catalogue_and_a_name_in_the_schema(
    name: str,
) -> None:
    own = f"calibrate/engines/{name.replace('-', '_')}.py"
    other = {
        "trtllm": {"calibrate/cli.py", "calibrate/engines/read.py", "kernels/bench/timings.py"},
        "flashinfer": {"kernels/bench/rivals.py", "kernels/bench/timings.py"},
        # The plug-in is code of its own, which no engine's room knows.
        "vllm": {
            "calibrate/serving/bench.py",
            "calibrate/model/served.py",
            "kernels/bench/served.py",  # start it
            "calibrate/record/provenance.py",  # its version
        }
        | {file for file in places(name) if file.startswith("kernels/skip_softmax/vllm/")},
    }.get(name, set())
    assert places(name) - other == {own, "calibrate/engines/catalogue.py", SCHEMA}


@pytest.mark.parametrize("name", sorted({*get_args(Task)} - {"text", "file", "hub", "memory"}))
def test_a_task_is_a_function_and_a_name_in_the_schema(name: str) -> None:
    assert places(name) == {"calibrate/prompts/tasks.py", SCHEMA}


@pytest.mark.parametrize("name", ["kl_answer", "kl_text", "flips", "score_drop", "generated_drop"])
def test_a_loss_is_an_entry_of_losses_a_budget_and_a_line_of_the_format(name: str) -> None:
    other = {
        "score_drop": {
            "calibrate/loss/measure.py",  # reads rows that earlier versions wrote
            "calibrate/proof/assess.py",  # turns the drop back into a score
        }
    }.get(name, set())
    assert places(name) - other == {
        "calibrate/loss/losses.py",
        "kernels/skip_softmax/thresholds/evidence.py",
        SCHEMA,
    }


def test_a_backend_is_its_folder_and_a_name_in_choose() -> None:
    folder = "kernels/skip_softmax/hopper/"
    outside = {path for path in places("hopper") if not path.startswith(folder)}
    assert outside == {
        "kernels/skip_softmax/choose.py",
        "kernels/bench/hopper_checks.py",  # what only this kernel must prove on its GPU
    }
