"""Every recipe in configs/ parses for the machine it names, and says how to run it."""

import ast
import math
import re
from pathlib import Path

import pytest

from ringbpt.config import parse, parse_args

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def mesh_devices(mesh_dim: str, free: int) -> int:
    """How many devices a mesh_dim asks for, with `free` in the place of a -1: "!dp:1,fsdp:-1,tp:1,sp:4" -> free * 4."""
    sizes = [int(size) for size in re.findall(r"-?\d+", mesh_dim)]
    return math.prod(free if size == -1 else size for size in sizes)


def test_mesh_devices():
    assert mesh_devices("1,1,4,64", free=8) == 256
    assert mesh_devices("!dp:1,fsdp:-1,tp:1,sp:4", free=2) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    tree = parse_args([f"--config=configs/{path.name}"])
    devices = tree.num_cpu_devices or mesh_devices(tree.mesh_dim, free=8)
    config = parse(tree, devices)
    assert math.prod(config.mesh_shape) == devices


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_docstring_says_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"configs/{path.name}" in docstring
    assert "python -m ringbpt." in docstring or "make train" in docstring


def test_there_is_a_first_recipe():
    assert ROOT / "configs" / "debug.py" in RECIPES  # what a run without arguments starts from
