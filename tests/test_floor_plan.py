"""The house stays walkable: imports run downward, what is imported is declared, and nothing evaluates text."""

import ast
import graphlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ringbpt"

# The floor plan: a room is a module or a package directly inside ringbpt ("" is ringbpt/__init__.py itself).
LEVELS = [
    {"", "dims", "types", "neighbours", "balanced", "layouts", "hardware", "rates", "config", "ending"},
    {"mesh", "processes", "host_memory", "reduction", "attention", "data"},
    {"model", "objectives"},
    {"checkpoint"},
    {"generation", "evaluation"},
    {"rollout", "serving"},
    {"training"},
    {"planning", "bench"},
    {
        "train",
        "plan",
        "verify",
        "inspect",
        "columns",
        "generate",
        "evaluate",
        "serve",
        "launch",
        "autotune",
        "__main__",
    },
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, inside functions too; the name is "" for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            assert node.module
            yield from ((node.module, alias.name) for alias in node.names)


def arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of the same house that it imports, from {dotted name: source text}."""
    house = set(sources)
    found = {}
    for module, source in sources.items():
        names = set()
        for target, name in imported_names(ast.parse(source)):
            names.add(f"{target}.{name}" if f"{target}.{name}" in house else target)
        found[module] = (names & house) - {module}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} (level {LEVEL_OF[room(module)]}) imports {target} (level {LEVEL_OF[room(target)]})"
        for module, targets in graph.items()
        for target in targets
        if LEVEL_OF[room(target)] > LEVEL_OF[room(module)]
    ]


def rooms_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    merged: dict[str, set[str]] = {}
    for module, targets in graph.items():
        merged.setdefault(room(module), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in merged.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def house() -> dict[str, set[str]]:
    return arrows({name: path.read_text() for name, path in modules().items()})


def test_every_room_is_on_the_plan(house):
    strangers = {room(module) for module in house} - set(LEVEL_OF)
    assert not strangers, f"give {sorted(strangers)} a level in LEVELS, or a place inside another room"


def test_imports_run_downward(house):
    assert upward(house) == []


def test_no_cycles_between_modules_or_rooms(house):
    assert cycle(house) == []
    assert cycle(rooms_graph(house)) == []


def test_the_check_sees_arrows_and_cycles():
    sources = {
        "ringbpt.dims": "def late():\n    from ringbpt.training.loop import train\n",
        "ringbpt.training.loop": "import ringbpt.dims",
        "ringbpt.data.loader": "from ringbpt.attention import layouts",
        "ringbpt.attention": "",
        "ringbpt.attention.layouts": "",
        "ringbpt.attention.api": "from ringbpt.data.packing import pack",
        "ringbpt.data.packing": "",
    }
    graph = arrows(sources)
    assert graph["ringbpt.data.loader"] == {"ringbpt.attention.layouts"}
    assert upward(graph) == ["ringbpt.dims (level 0) imports ringbpt.training.loop (level 6)"]
    assert set(cycle(graph)) == {"ringbpt.dims", "ringbpt.training.loop"}
    del sources["ringbpt.dims"]
    assert cycle(arrows(sources)) == []  # the modules have none, the rooms attention and data do
    assert set(cycle(rooms_graph(arrows(sources)))) == {"attention", "data"}


# --- a file fits one sitting, a function one screen, and the house does not grow by itself ---

LONGEST_FILE, LONGEST_FUNCTION = 520, 80
# All files together. Who needs more raises it in the commit that adds it, and says there what the lines are for.
WHOLE = 35_400
KERNELS = "ringbpt.attention.local.pallas_"  # a kernel is written in one piece


def long_functions(source: str) -> list[tuple[str, int]]:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in found]
    return [(name, length) for name, length in lengths if length > LONGEST_FUNCTION]


def test_files_and_functions_are_short():
    sources = {name: path.read_text() for name, path in modules().items()}
    lengths = {name: source.count("\n") for name, source in sources.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    long = {name: long_functions(source) for name, source in sources.items() if not name.startswith(KERNELS)}
    assert {name: functions for name, functions in long.items() if functions} == {}
    assert sum(lengths.values()) <= WHOLE
    assert long_functions("def f():\n" + "    pass\n" * 80) == [("f", 81)]


# --- nothing evaluates text or unpickles ---

FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"} | {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn", "runpy.run_path",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_METHODS = {"extractall", "unpack_archive"}
FORBIDDEN_KEYWORDS = {"allow_pickle", "trust_remote_code"}


def dangers(source: str) -> list[str]:
    """The lines of a source text that evaluate, unpickle or unpack what somebody else may have written."""
    tree = ast.parse(source)
    found = [f"import {target}" for target, _ in imported_names(tree) if target.split(".")[0] in FORBIDDEN_IMPORTS]
    found += [
        f"from {target} import {name}" for target, name in imported_names(tree) if f"{target}.{name}" in FORBIDDEN_CALLS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute):
            if ast.unparse(node) in FORBIDDEN_CALLS or node.attr in FORBIDDEN_METHODS:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno}: {node.arg}={ast.unparse(node.value)}")
        elif isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno}: shell={ast.unparse(node.value)}")
    return found


OUR_SOURCES = [path for folder in ("ringbpt", "configs", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", OUR_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_evaluates_text(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "f = exec",
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x.pt')",
        "from torch import load",
        "yaml.load(text)",
        "tarfile.open('x').extractall()",
        "__import__('os')",
        "os.system('ls')",
        "from os import popen",
        "subprocess.run(command, shell=True)",
        "np.load('x.npy', allow_pickle=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_dangers_are_seen(source):
    assert dangers(source)


def test_lookalikes_are_let_through():
    assert (
        dangers("jax.eval_shape(f)\nyaml.safe_load(t)\nnp.load(p, allow_pickle=False)\nmodel.eval()\njson.load(f)")
        == []
    )


# --- importing is cheap, and touches no device ---


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    env = {**os.environ, **env}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


# With a platform that does not exist, the first touch of a device raises.
NO_DEVICE = {"JAX_PLATFORMS": "no_such_platform"}


def test_import_is_quick_and_touches_no_device():
    code = "import jax, time; start = time.perf_counter(); import ringbpt; print(time.perf_counter() - start)"
    result = run_python(code, **NO_DEVICE)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2.0


def test_no_module_touches_a_device_or_loads_what_few_need():
    heavy = ["transformers", "matplotlib", "wandb", "datasets", "sentencepiece", "tensorflow", "torch"]
    code = (
        f"import sys\nfor name in {sorted(modules())!r}: __import__(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = run_python(code, **NO_DEVICE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_probe_notices_a_device():
    result = run_python("import jax.numpy; jax.numpy.zeros(3)", **NO_DEVICE)
    assert result.returncode != 0
    assert "no_such_platform" in result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_what_a_script_imports_of_the_house_is_there(path):
    for module, name in imported_names(ast.parse(path.read_text())):
        if module.split(".")[0] == "ringbpt" and name:
            assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")


# --- what is imported is declared ---


# What a target of the Makefile installs by a pin of its own -> the script that it runs, which alone may ask for it. No
# extra of ours can name it: it comes without its dependencies.
PINNED = {"maxtext": "scripts/compare_maxtext.py"}


def declared() -> tuple[set[str], set[str]]:
    """The distributions that pyproject.toml names, normalised: (always installed, those and the extras')."""

    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {normal(name) for name in project["dependencies"]}
    return core, core | {normal(name) for names in project["optional-dependencies"].values() for name in names}


def undeclared(source: str, path: str) -> list[str]:
    """What a file of ours imports and may not: what nothing declares, or at its top what only an extra does."""
    core, anywhere = declared()
    anywhere = anywhere | {name for name, script in PINNED.items() if script == path}
    tree = ast.parse(source)
    eager = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    found = [f"{top} is not in pyproject.toml" for top in third_party(tree) if not distributions(top) & anywhere]
    return found + [
        f"{top} is not always installed: import it inside of the function that needs it"
        for top in third_party(eager)
        if not distributions(top) & core
    ]


def third_party(tree: ast.AST) -> set[str]:
    tops = {target.split(".")[0] for target, _ in imported_names(tree)}
    return tops - set(sys.stdlib_module_names) - {"ringbpt", "configs"}


installed_packages = cache(packages_distributions)  # half a second a call


def distributions(top: str) -> set[str]:
    """The distributions that an import name may come from; where none is installed, the name itself."""
    return {re.sub(r"[-_.]+", "-", name).lower() for name in installed_packages().get(top, [top])}


@pytest.mark.parametrize("path", OUR_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_declared(path):
    assert undeclared(path.read_text(), str(path.relative_to(ROOT))) == []


def test_what_a_target_pins_is_one_scripts_own():
    late, makefile = "def f():\n    import maxtext", (ROOT / "Makefile").read_text()
    for name, script in PINNED.items():
        assert re.search(rf"^[A-Z0-9]+ := {name}==", makefile, re.MULTILINE) and f"bin/python {script} " in makefile
        assert name not in declared()[1]
    assert undeclared(late, "scripts/compare_maxtext.py") == []
    assert len(undeclared("import maxtext", "scripts/compare_maxtext.py")) == 1
    assert undeclared(late, "scripts/demo.py") == undeclared(late, "ringbpt/planning/beside.py") != []
    assert undeclared("import numpy\nimport json", "scripts/demo.py") == []
