"""What an implementation cannot do it refuses by NotImplementedError, which names one that can; all of them, traced."""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import pytest

from ringbpt.attention.api import LOCALS
from ringbpt.attention.core import MaskSpec
from ringbpt.types import TokenMeta
from tests.planning.test_overlap import compiler


@dataclass(frozen=True)
class Request:
    dtype: str = "bfloat16"
    head_dim: int = 64
    mask: MaskSpec = MaskSpec()
    lengths: tuple[int, int] = (256, 256)
    blocks: tuple[int | None, int | None] = (None, None)
    trees: bool = False


KERNELS = [name for name in LOCALS if re.fullmatch("cudnn|pallas_[a-z]+", name)]  # blockwise refuses nothing
PLAIN = Request()
REQUESTS = [
    PLAIN,
    *[Request(dtype=dtype) for dtype in ("float16", "float32", "float64")],
    *[Request(head_dim=head_dim) for head_dim in (1, 12, 96, 100, 128, 256, 512)],
    *[Request(dtype="float32", head_dim=head_dim) for head_dim in (12, 256)],
    *[Request(mask=mask) for mask in (MaskSpec(False), MaskSpec(window=50), MaskSpec(False, 50))],
    *[Request(lengths=lengths) for lengths in ((77, 201), (1, 256), (128, 256), (256, 128))],
    Request(trees=True),
    *[Request(blocks=blocks) for blocks in ((16, 16), (1000, 1000), (None, 64))],
]


def refusal(name: str, request: Request, device: jax.Device) -> str | None:
    """Why it won't, forward or backward; None where it will."""
    T, S = request.lengths
    q, k = (jax.ShapeDtypeStruct((1, n, 2, request.head_dim), request.dtype) for n in (T, S))
    out, lse = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, q.shape[:-1]))
    columns = 3 if request.trees else 2
    q_meta, kv_meta = (TokenMeta(*[jax.ShapeDtypeStruct((1, n), jnp.int32)] * columns) for n in (T, S))

    def both(q, k, out, lse, q_meta, kv_meta):
        local = LOCALS[name](device, *request.blocks)
        part = local.attend(q, k, k, q_meta, kv_meta, request.mask)
        return part, local.attend_bwd(q, k, k, out, lse, q, q_meta, kv_meta, request.mask)

    with jax.enable_x64(True) if request.dtype == "float64" else nullcontext():
        try:
            jax.eval_shape(both, q, k, out, lse, q_meta, kv_meta)
        except NotImplementedError as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    "machine", ["h200", *[pytest.param(name, marks=pytest.mark.slow) for name in ("cpu-1", "a100", "v4-8", "v5e-4")]]
)
def test_a_refusal_names_what_does_it(machine):
    """Not only auto, but where it is the device that is refused and not the request."""
    device = jax.devices()[0] if machine == "cpu-1" else compiler(machine).devices[0]
    answer = cache(partial(refusal, device=device))
    refused = set()
    for name, request in product(KERNELS, REQUESTS):
        why = answer(name, request=request)
        if why is not None:
            refused.add(name)
            named = set(re.findall(r"\w+", why.partition("use ")[2])) & set(LOCALS)
            named -= set() if answer(name, request=PLAIN) else {"auto"}
            assert any(answer(other, request=request) is None for other in named), (name, request, why)
    assert refused == set(KERNELS)
    assert all(answer("auto", request=request) is None for request in REQUESTS)
