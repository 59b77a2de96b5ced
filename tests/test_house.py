"""The house rules of CONTRIBUTING and README that a machine can check: arrows, imports, tree, habits."""

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

import pytest
import yaml
from conftest import ROOT
from fresh_process import HEAVY, command, loaded_by

import skip_softmax
from calibrate.schema import load_config
from skip_softmax.thresholds import yaml_file

FOLDERS = {"calibrate": ROOT / "calibrate", "skip_softmax": ROOT / "kernels" / "skip_softmax"}
# Law 1: a file imports its own room and those that stand left of it. The package itself is what the command
# line calls, so it stands between.
ROOMS = [
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
    "report",
    "pipeline",
    "transfer",
    "__init__",
    "cli",
]
# Law 2: the same for the kernels, a floor at a time.
KERNEL_ROOMS = {"triton", "hopper", "blackwell"}
ADAPTORS = {"huggingface", "vllm"}
FLOORS: list[set[str]] = [
    {"launch", "meaning", "thresholds"},
    KERNEL_ROOMS,
    {"choose"},
    {"api"},
    ADAPTORS,
    {"__init__"},
]
# Law 3: what stands in `engines/` beside the engines' own rooms.
SHARED_BY_ENGINES = {"types", "tiles", "config_json"}
ABOUT_ENGINES = {"__init__", "catalogue", "guards", "export", "read"}
ENGINE_ROOMS = (
    {path.stem for path in (FOLDERS["calibrate"] / "engines").glob("*.py")}
    - SHARED_BY_ENGINES
    - ABOUT_ENGINES
)
CODE = [*FOLDERS.values(), ROOT / "kernels" / "bench", ROOT / "tests"]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def modules(package: str) -> dict[str, Path]:
    """Name inside the package -> file; folders with an `__init__.py` count too."""
    folder = FOLDERS[package]
    names = {
        path: ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in sorted(folder.rglob("*.py"))
    }
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def code_files() -> list[Path]:
    return [path for folder in CODE for path in sorted(folder.rglob("*.py"))]


def imported(package: str, name: str) -> set[str]:
    """Dotted names that a module imports anywhere: at its top, in functions, for type checking."""
    found: set[str] = set()
    for node in ast.walk(tree_of(modules(package)[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}.{name}: relative import; write the package's name"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} - {package}
        elif isinstance(node, ast.Constant) and name == "__init__":
            # Names of modules that `__getattr__` imports when they are asked for.
            found |= set(re.findall(rf"^{package}(?:\.\w+)+$", str(node.value)))
    return found


def neighbours(package: str, name: str) -> set[str]:
    """Modules of the same package that a module imports."""
    known = modules(package)
    found = imported(package, name)
    inside = {o.removeprefix(f"{package}.") for o in found if o.startswith(f"{package}.")}
    there = {other for other in inside if other in known}
    # The package itself, for a name that it offers.
    offers = package in found or any(other.split(".")[0] not in known for other in inside)
    # A folder's own `__init__` is empty: what counts is the file behind it.
    folders = {other for other in there if known[other].name == "__init__.py"}
    return (there - folders) | ({"__init__"} if offers else set())


@cache
def reached(package: str, name: str) -> frozenset[str]:
    """Modules of the same package that a module imports, or that those import."""
    found: set[str] = set()
    open_ends = [name]
    while open_ends:
        new = neighbours(package, open_ends.pop()) - found
        found |= new
        open_ends += new
    return frozenset(found)


# Arrows.


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands at the top."""
    return module.split(".")[0]


@pytest.mark.parametrize("name", sorted(modules("calibrate")))
def test_law_1_a_file_imports_its_own_room_and_those_left_of_it(name: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room(name)) + 1])
    too_far = {other for other in neighbours("calibrate", name) if room(other) not in allowed}
    assert not too_far, f"calibrate.{name} imports {sorted(too_far)}, which stand right of it"


def test_law_1_names_every_room() -> None:
    assert {room(name) for name in modules("calibrate")} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(modules("skip_softmax")))
def test_law_2_a_kernel_file_imports_its_own_floor_and_those_below(name: str) -> None:
    floor = next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)
    allowed = set().union(*FLOORS[: floor + 1])
    if room(name) in KERNEL_ROOMS | ADAPTORS:
        allowed -= FLOORS[floor] - {room(name)}  # rooms of one kind do not know each other
    found = neighbours("skip_softmax", name)
    too_far = {other for other in found if room(other) not in allowed}
    if room(name) in KERNEL_ROOMS:
        # Two implementations of one meaning that share code share their mistakes.
        too_far |= found & {"meaning.reference", "meaning.literal"}
    if name.startswith("meaning."):
        too_far |= found & {"launch"}
    assert not too_far, f"skip_softmax.{name} must not import {sorted(too_far)}"


@pytest.mark.parametrize("name", sorted(modules("skip_softmax")))
def test_law_2_each_folder_has_its_own_foreign_packages(name: str) -> None:
    allowed = {"skip_softmax", "torch", *sys.stdlib_module_names}
    allowed |= {
        "triton": {"triton"},
        "hopper": {"triton"},
        "blackwell": {"triton"},
        "launch": {"triton"},
        "thresholds": {"yaml", "pydantic"},
        "huggingface": {"transformers"},
        "vllm": {"vllm"},
    }.get(room(name), set())
    found = {other.split(".")[0] for other in imported("skip_softmax", name)}
    assert found <= allowed, f"skip_softmax.{name} must not import {sorted(found - allowed)}"


@pytest.mark.parametrize("name", sorted(n for n in modules("calibrate") if room(n) == "engines"))
def test_law_3_an_engine_imports_no_other_and_only_the_catalogue_imports_engines(name: str) -> None:
    own = name.removeprefix("engines.")
    found = {other.removeprefix("engines.") for other in neighbours("calibrate", name)}
    if own != "catalogue":
        assert not (found - {own}) & ENGINE_ROOMS, name
    if own in ENGINE_ROOMS:
        inside = {o for o in neighbours("calibrate", name) if o.startswith("engines.")}
        assert {o.removeprefix("engines.") for o in inside} <= SHARED_BY_ENGINES


def test_law_3_only_the_engines_folder_knows_its_rooms() -> None:
    wanted = {f"engines.{engine}" for engine in ENGINE_ROOMS}
    for name in modules("calibrate"):
        if room(name) != "engines":
            assert not neighbours("calibrate", name) & wanted, name


@pytest.mark.parametrize("package", FOLDERS)
def test_there_are_no_circles(package: str) -> None:
    # A package's own `__init__` names what it offers; it is nobody's part.
    circles = [
        name for name in modules(package) if name != "__init__" and name in reached(package, name)
    ]
    assert circles == []


def test_nothing_is_patched_at_import() -> None:
    """No assignment to a name inside another module, outside functions."""
    found = []
    for package in FOLDERS:
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


@pytest.mark.parametrize("package", FOLDERS)
def test_the_tree_in_the_readme_names_every_room_and_no_other(package: str) -> None:
    folder = FOLDERS[package]
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
                    and ast.unparse(loaders[0]) in ("_UniqueKeyLoader", "yaml.SafeLoader")
                )
                ours = (
                    ROOT / "tests" not in path.parents
                )  # a test may evaluate what it wrote itself
                if not safe or called in UNSAFE or (ours and called in ("eval", "exec")):
                    found.append(f"{path.name}:{node.lineno}: {called}")
    assert found == []
    assert issubclass(yaml_file._UniqueKeyLoader, yaml.SafeLoader)


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
    allowed = {FOLDERS["calibrate"] / "cli.py"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in FOLDERS
        for path in modules(package).values()
        if path not in allowed
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert found == []


@pytest.mark.parametrize("package", FOLDERS)
def test_there_is_no_drawer_for_everything(package: str) -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "manager", "base", "core"}
    assert not drawers & {part for name in modules(package) for part in name.split(".")}
    assert (FOLDERS[package] / "py.typed").exists()
