"""Every list of names has one owner, the choices of its flag, and every table of the code is held to it.

Tables are found by their names, wherever in the house they stand.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from ringbpt import dims
from ringbpt.config import (
    ALIASES,
    DTYPES,
    RUN_FLAGS,
    WITHOUT_EFFECT,
    Config,
    DatasetConfig,
    OptimizerConfig,
    choices,
    complete_rates,
    values,
    without_effect,
)

ROOT = Path(__file__).parent.parent
SOURCES = {path: path.read_text() for path in sorted((ROOT / "ringbpt").rglob("*.py"))}
OWNERS = [ROOT / "ringbpt" / "config" / name for name in ("fields.py", "fields_of_data.py")]
NEUTRAL = {"", "auto", "none"}  # nothing, or left to the house: what a flag or a table may have besides its names

# The tables of the code, and the flag whose choices their keys are.
TABLES = {
    "LOCALS": "llama.attention_kernel",
    "OVER_SP": "llama.sequence_parallel",
    "LAYOUTS": "llama.sequence_layout",
    "ATTENTION_TYPES": "llama.attention_type",
    "REMAT_POLICIES": "llama.remat_block",
    "COMPUTE_DTYPES": "dtype",
    "OBJECTIVES": "objective",
    "OPTIMIZERS": "optimizer.type",
    "PACKINGS": "train_dataset.packing",
    "SHAPES": "train_dataset.text_processor.shape",
    "_ROPE": "llama.rope_scaling_type",
    "DIVERGENCES": "policy.kl",
}


def names_of(flag: str) -> set[str]:
    """What a flag may be; of two names for one thing, as those of dtypes, the short one."""
    return {DTYPES.get(name, name) for name in choices(flag)} - NEUTRAL


OWNED: dict[str, set[str]] = {flag: names_of(flag) for flag in RUN_FLAGS if len(names_of(flag)) > 1} | {
    "mesh_dim": set(dims.AXES)
}


def assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Name -> value, of a module's own assignments."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def table(name: str) -> Any:
    """The table of this name, imported from the one module outside the flags' that has it."""
    modules = [path for path, source in SOURCES.items() if path not in OWNERS and name in assigned(ast.parse(source))]
    assert len(modules) == 1, f"{name} stands in {modules}"
    dotted = ".".join(modules[0].relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return getattr(importlib.import_module(dotted), name)


def second_owners(source: str) -> Iterator[str]:
    """The lines of a source that list the names of a flag again, as a tuple, a list, a set, or the keys of a dict."""
    tree = ast.parse(source)
    tables = {id(node) for name, node in assigned(tree).items() if name in TABLES}
    for node in ast.walk(tree):
        match node:
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items) | ast.Dict(keys=items):
                pass
            case _:
                continue
        found = {item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)}
        found -= NEUTRAL
        if id(node) in tables or len(found) < 3:
            continue
        for flag, names in OWNED.items():
            if found == names:
                yield f"line {node.lineno}: the names of --{flag} again"
                break


@pytest.mark.parametrize(("name", "flag"), TABLES.items())
def test_a_table_has_the_names_of_its_flag(name, flag):
    assert set(table(name)) - NEUTRAL == names_of(flag)


@pytest.mark.parametrize("path", sorted(set(SOURCES) - set(OWNERS)), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_listed_once(path):
    assert list(second_owners(SOURCES[path])) == []


@pytest.mark.parametrize(
    "source",
    [
        'MINE = ("contiguous", "zigzag", "striped", "balanced")',
        'def f(x):\n    assert x in ["ring", "all_gather", "ulysses", "ulysses_ring"]',
        'RATES = {"adamw": 1, "palm": 2, "lion": 3, "muon": 4}',
        'x: Literal["concat", "first_fit", "best_fit", "balanced"]',
        'AXES = ("dp", "fsdp", "tp", "sp")',
    ],
)
def test_a_second_list_is_seen(source):
    assert list(second_owners(source))


def test_a_table_of_another_subject_is_let_through():
    assert not list(second_owners('LAYOUTS = ("contiguous", "zigzag", "striped")\nSOME = ("zigzag", "striped", "x")'))


# --- names that are no table's ---


def test_axes():
    from ringbpt.mesh import make_mesh

    assert values.AXES is dims.AXES
    assert make_mesh(dims.MeshShape()).axis_names == dims.AXES


def test_a_type_has_its_group_of_flags():
    for kind in choices("optimizer.type"):
        assert OptimizerConfig(type=kind).chosen
    groups = {DatasetConfig(type=kind).group for kind in choices("train_dataset.type")}
    below = {name.split(".")[1] for name in RUN_FLAGS if name.startswith("train_dataset.") and name.count(".") > 1}
    assert groups == below - {"text_processor"}


def test_schedules_and_optimizers_are_built():
    from ringbpt.training.optimizer import make_optimizer

    def made(**flags):
        return make_optimizer(complete_rates(Config(optimizer=OptimizerConfig(**flags))))

    rates = [made(schedule=name)[1](6000) for name in choices("optimizer.schedule")]
    assert len({float(rate) for rate in rates}) == len(rates)
    optimizers = [made(type=name)[0] for name in choices("optimizer.type")]
    states = {str(jax.tree.structure(each.init({"w_q": jax.numpy.ones((2, 2))}))) for each in optimizers}
    assert len(states) == len(optimizers)


def test_objectives_take_shapes_that_there_are():
    shapes = {shape for objective in table("OBJECTIVES").values() for shape in objective.shapes}
    assert shapes and shapes <= names_of("train_dataset.text_processor.shape")


def test_endings_of_files_are_formats():
    assert set(table("ENDINGS")) <= set(choices("train_dataset.type"))


# --- names without effect ---


def read_names() -> set[str]:
    """Every attribute, and every text that could be one, outside of where flags are declared and renamed."""
    found: set[str] = set()
    for path, source in SOURCES.items():
        if path in OWNERS or path.name == "aliases.py":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_only_what_is_declared_to_have_no_effect_has_none():
    read = read_names()
    idle = {name for name in RUN_FLAGS if name.rpartition(".")[2] not in read}
    # Elsewhere something else is called so, or they are looked at to be refused.
    excused = {"llama.resid_pdrop", "llama.embd_pdrop", "llama.attn_pdrop", "llama.mesh_dim"}
    assert idle | excused == {name for name in RUN_FLAGS if without_effect(name)}
    assert all(any(f".{name}".endswith(f".{end}") for name in RUN_FLAGS) for end in WITHOUT_EFFECT)


def test_the_manual_names_every_alias():
    manual = "".join((ROOT / "docs" / name).read_text() for name in ("training.md", "migrating.md"))
    assert [name for name in ALIASES if f"`{name}`" not in manual and f"`{name}=" not in manual] == []
