"""Params of a tiny model on a mesh of fsdp and sp, and how they are loaded."""

import resource
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ringbpt.checkpoint.load import load_checkpoint
from ringbpt.checkpoint.store import Rule, Wanted
from ringbpt.config import Architecture

L, D, N, K, H, F, V = 3, 8, 2, 1, 4, 12, 16
SHAPES = {
    "embed": (V, D),
    "layers": {
        "attention_norm": (L, D),
        "w_q": (L, D, N, H),
        "w_k": (L, D, K, H),
        "w_v": (L, D, K, H),
        "w_o": (L, N, H, D),
        "feedforward_norm": (L, D),
        "w_gate": (L, D, F),
        "w_up": (L, D, F),
        "w_down": (L, F, D),
    },
    "norm": (D,),
    "unembed": (D, V),
}
ARCHITECTURE = Architecture(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
    num_key_value_heads=K, head_dim=H,
)  # fmt: skip
MESH = jax.make_mesh((2, 4), ("fsdp", "sp"), axis_types=(AxisType.Auto,) * 2)


def wanted(params, opt_state=None):
    fresh = Wanted(rule=Rule.IGNORED) if opt_state is None else Wanted(opt_state, Rule.FRESH_IF_ABSENT)
    return {"params": Wanted(params), "opt_state": fresh}


def load(spec, params, opt_state=None, architecture=ARCHITECTURE) -> SimpleNamespace:
    entries, note = load_checkpoint(spec, wanted(params, opt_state), architecture)
    return SimpleNamespace(**entries, note=note)


def params_like(shapes=SHAPES, seed=0, axis="fsdp"):
    rng = np.random.default_rng(seed)
    sharding = NamedSharding(MESH, P(axis))

    def leaf(shape):
        place = sharding if shape[0] % MESH.shape[axis] == 0 else NamedSharding(MESH, P())
        return jax.device_put(rng.normal(size=shape).astype(np.float32), place)

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@contextmanager
def no_file_above(size: int):
    """A disk that is full, for this process: the system refuses what is longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
