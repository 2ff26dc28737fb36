"""Eight CPU devices and no silent rank promotion, before anything touches jax."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANDB_MODE"] = "disabled"
# The tests compile far longer than they run: the least optimised code takes half the time to make, and loops that are
# emitted straight as LLVM's, not through MLIR, half of that again. Later compilers refuse to start with that flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
# What one test has compiled, in whatever process, no other compiles again, nor the next run of the tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Nor does any process byte-compile what another has, wherever the environment was installed without: a second each of
# jax and transformers, in every command that a test runs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode"))

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import shapes

shapes.install()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What a module compiles comes from a cache of its own: what it compares bit by bit, the same executable made."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Compiled programs stay mapped; at the kernel's limit of mappings (65,530 unless raised) the compiler aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


# Whole runs in processes of their own, and programs that take long to compile: at the end of all others one of two
# test processes would wait for them.
FIRST = ("tests/test_golden.py", "tests/test_train_cli.py", "tests/planning/test_plan.py", "tests/test_chaos.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, in the order of FIRST; the others as they come."""
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(FIRST)))
