"""cuDNN's attention for the hops of a ring that are dense; it knows neither positions nor a mask of ours.

What a device's queries and keys look like at a hop is known when it runs. Halves of a share, as zigzag deals them
out, see each other wholly, not at all, or as a triangle: such hops are a few calls of cuDNN. One device's whole causal
sequence, and every hop of contiguous and zigzag layouts without packing, are of this kind. Any other hop (packed
documents, padding, a striped layout) is computed in the same program by pallas_hopper or, elsewhere, pallas_triton.

Global out and lse go into its backward by jax's private binding, whose names are checked before they are used.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.attention.core import Local, MaskSpec, Partial, block_visibility, merge
from ringbpt.attention.local.pallas_hopper import make_pallas_hopper
from ringbpt.attention.local.pallas_triton import make_pallas_triton, or_blockwise
from ringbpt.hardware import cuda_capability
from ringbpt.types import TokenMeta

_LEAST_VERSION = 90100  # cuDNN 9.1

# How one half of the queries sees one half of the keys.
_NOTHING, _ALL, _TRIANGLE, _OTHER = range(4)


@dataclass(frozen=True)
class _Call:
    """One call of cuDNN: some halves of the queries against some halves of the keys."""

    queries: slice
    keys: slice
    causal: bool = False


_FIRST, _SECOND, _BOTH = slice(0, 1), slice(1, 2), slice(0, 2)
# What is dense: how halves see each other (queries, then keys), and the calls that compute it.
_TWO_BY_TWO: dict[tuple[int, ...], list[_Call]] = {
    (_NOTHING, _NOTHING, _NOTHING, _NOTHING): [],
    (_TRIANGLE, _NOTHING, _ALL, _TRIANGLE): [_Call(_BOTH, _BOTH, causal=True)],
    (_ALL, _ALL, _ALL, _ALL): [_Call(_BOTH, _BOTH)],
    (_ALL, _NOTHING, _ALL, _NOTHING): [_Call(_BOTH, _FIRST)],
    (_NOTHING, _NOTHING, _ALL, _ALL): [_Call(_SECOND, _BOTH)],
}
# The ring's backward takes the queries of its own keys in two halves.
_ONE_BY_TWO: dict[tuple[int, ...], list[_Call]] = {
    (_NOTHING, _NOTHING): [],
    (_TRIANGLE, _NOTHING): [_Call(_FIRST, _FIRST, causal=True)],
    (_ALL, _TRIANGLE): [_Call(_FIRST, _FIRST), _Call(_FIRST, _SECOND, causal=True)],
    (_ALL, _NOTHING): [_Call(_FIRST, _FIRST)],
    (_ALL, _ALL): [_Call(_FIRST, _BOTH)],
}


@dataclass(frozen=True)
class Binding:
    """forward(q, k, v, causal) -> out, lse_BNT; backward(q, k, v, out, lse_BNT, d_out, causal) -> dq, dk, dv."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


_INPUTS = ["query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
           "page_table_k", "page_table_v"]  # fmt: skip
_STATICS = ["scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"]
_SINCE_0_12 = {"score_mod_args", "score_mod"}


def jax_binding() -> Binding:
    """cuDNN as this version of jax binds it. Raises NotImplementedError where it is bound otherwise."""
    from jax._src.cudnn import fused_attention_stablehlo as bound

    forward, backward = (getattr(bound, f"_dot_product_attention_{name}_impl", None) for name in ("fwd", "bwd"))
    wanted = {
        forward: {*_INPUTS, *_STATICS, "is_training"},
        backward: {*_INPUTS, *_STATICS, "activation", "fwd_output", "grad_output"},
    }
    for function, names in wanted.items():
        if function is None or set(inspect.signature(function).parameters) - _SINCE_0_12 != names:
            raise NotImplementedError(f"jax {jax.__version__} binds cuDNN's attention otherwise: use pallas_hopper")

    def call(function, q, k, v, causal: bool, **more):
        nothing = jnp.zeros(0, q.dtype)
        statics = {
            "scale": q.shape[-1] ** -0.5, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False),
            "mask_type": bound.MaskType.CAUSAL if causal else bound.MaskType.NO_MASK,
            "layout": bound.AttentionLayout.BTNH.value, "sliding_window_length": None,
            "score_mod_args": (), "score_mod": None,
        }  # fmt: skip
        known = inspect.signature(function).parameters
        arrays = dict(zip(_INPUTS, (q, k, v, *[nothing] * 7), strict=True))
        return function(**arrays, **more, **{name: value for name, value in statics.items() if name in known})

    return Binding(
        forward=lambda q, k, v, causal: call(forward, q, k, v, causal, is_training=True),
        backward=lambda q, k, v, out, lse, d_out, causal: call(
            backward, q, k, v, causal, activation=lse, fwd_output=out, grad_output=d_out
        ),
    )


def _check_version() -> None:
    from jax._src.lib import cuda_versions

    try:
        version = cuda_versions.cudnn_get_version() if cuda_versions else None
    except RuntimeError:  # compiling for a GPU that is not here, without cuDNN
        return
    if version is not None and version < _LEAST_VERSION:
        raise NotImplementedError(f"cudnn wants cuDNN {_LEAST_VERSION} or later, not {version}: use pallas_triton")


def make_cudnn(device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None) -> Local:
    """Blocks are cuDNN's own; the sizes are for the hops that another kernel computes.

    Raises NotImplementedError for a device that is no NVIDIA GPU from Ampere on, and for another cuDNN or jax.
    """
    capability = cuda_capability(device)
    if capability < 8:
        raise NotImplementedError(
            f"cudnn runs on NVIDIA GPUs from compute capability 8.0 (Ampere) on, and this is {device.device_kind}: "
            "use blockwise, or auto"
        )
    _check_version()
    try:
        otherwise = make_pallas_hopper(device, query_chunk_size, key_chunk_size)
    except NotImplementedError:
        otherwise = make_pallas_triton(device, query_chunk_size, key_chunk_size)
    return with_binding(jax_binding(), otherwise, widest=256 if capability >= 9 else 128)


def with_binding(binding: Binding, otherwise: Local, widest: int = 128) -> Local:
    """binding for what is dense, `otherwise` for the rest. widest: numbers of a head that the device's cuDNN takes."""
    return Local(
        attend=partial(attend, binding=binding, otherwise=otherwise, widest=widest),
        attend_bwd=partial(attend_bwd, binding=binding, otherwise=otherwise, widest=widest),
    )


def _check(q, k, kv_meta: TokenMeta, mask: MaskSpec, widest: int) -> None:
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        raise NotImplementedError(f"cudnn takes bfloat16 or float16, not {q.dtype}: use {or_blockwise(q, k)}")
    if widest < H or H % 8:
        raise NotImplementedError(
            f"cudnn takes heads of at most {widest} here, a multiple of 8, not {H}: use {or_blockwise(q, k)}"
        )
    if mask.window is not None:
        raise NotImplementedError("cudnn knows no window by positions: use pallas_hopper or pallas_triton")
    if kv_meta.last_BT is not None:
        raise NotImplementedError(
            "cudnn knows no documents that share their beginning: use pallas_hopper or pallas_triton"
        )
    if S % 2 or T not in (S, S // 2):
        raise NotImplementedError(
            f"cudnn takes an even number of keys and as many queries or half of them, not {T} x {S}: use pallas_triton"
        )


def _how_halves_see(q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, half: int) -> jax.Array:
    """int32 [halves of the queries * halves of the keys]: _NOTHING, _ALL, _TRIANGLE or _OTHER."""
    some, every = block_visibility(q_meta, kv_meta, mask, half, half)

    def halves(x_BT):
        return x_BT.reshape(x_BT.shape[0], -1, half)

    def same(q_BT, kv_BS):
        return jnp.all(halves(q_BT)[:, :, None] == halves(kv_BS)[:, None], axis=(0, 3))

    q_position, q_segment = halves(q_meta.position_BT), halves(q_meta.segment_BT)
    rising = jnp.all(q_position[:, :, 1:] > q_position[:, :, :-1], axis=(0, 2))
    one = jnp.all((q_segment == q_segment[:, :, :1]) & (q_segment != 0), axis=(0, 2))
    same_places = same(q_meta.position_BT, kv_meta.position_BT) & same(q_meta.segment_BT, kv_meta.segment_BT)
    triangle = same_places & (rising & one)[:, None] & mask.causal
    see = jnp.where(some, jnp.where(every, _ALL, jnp.where(triangle, _TRIANGLE, _OTHER)), _NOTHING)
    return see.astype(jnp.int32).ravel()


def _switch(q, k, q_meta, kv_meta, mask: MaskSpec, dense: Callable, otherwise: Callable, *operands):
    """dense(calls, *operands) where halves see each other as the tables say, in tokens; else otherwise(*operands)."""
    half = k.shape[1] // 2
    table = _TWO_BY_TWO if q.shape[1] == k.shape[1] else _ONE_BY_TWO
    see = _how_halves_see(q_meta, kv_meta, mask, half)
    matches = jnp.all(see[None] == jnp.array(list(table), jnp.int32), axis=1)
    which = jnp.where(jnp.any(matches), jnp.argmax(matches), len(table))

    def tokens(halves: slice) -> slice:
        return slice(halves.start * half, halves.stop * half)

    branches = [
        partial(dense, [_Call(tokens(c.queries), tokens(c.keys), c.causal) for c in calls]) for calls in table.values()
    ]
    return lax.switch(which, [*branches, otherwise], *operands)


def attend(
    q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, carry: Partial | None = None,
    *, binding: Binding, otherwise: Local, widest: int,
) -> Partial:  # fmt: skip
    """See core.Local; cuDNN rounds its out to the dtype of q before it is merged."""
    _check(q, k, kv_meta, mask, widest)
    otherwise_attend = partial(otherwise.attend, q_meta=q_meta, kv_meta=kv_meta, mask=mask)

    def dense(calls: list[_Call], q, k, v, carry):
        part = Partial.empty(q.shape) if carry is None else carry
        for call in calls:
            rows = (slice(None), call.queries)
            out, lse_BNT = binding.forward(q[rows], k[:, call.keys], v[:, call.keys], call.causal)
            new = Partial(out.astype(jnp.float32), jnp.swapaxes(lse_BNT, 1, 2))
            merged = merge(jax.tree.map(lambda x, rows=rows: x[rows], part), new)
            part = jax.tree.map(lambda x, y, rows=rows: x.at[rows].set(y), part, merged)
        return part

    def rest(q, k, v, carry):
        return otherwise_attend(q, k, v, carry=carry)

    return _switch(q, k, q_meta, kv_meta, mask, dense, rest, q, k, v, carry)


def attend_bwd(
    q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    *, binding: Binding, otherwise: Local, widest: int,
):  # fmt: skip
    """See core.Local."""
    _check(q, k, kv_meta, mask, widest)

    def dense(calls: list[_Call], q, k, v, out, lse, d_out):
        grads = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
        lse_BNT = jnp.swapaxes(lse, 1, 2)
        for call in calls:
            rows, keys = (slice(None), call.queries), (slice(None), call.keys)
            found = binding.backward(
                q[rows], k[keys], v[keys], out[rows].astype(q.dtype), lse_BNT[:, :, call.queries],
                d_out[rows].astype(q.dtype), call.causal,
            )  # fmt: skip
            for i, (where, grad) in enumerate(zip((rows, keys, keys), found, strict=True)):
                grads[i] = grads[i].at[where].add(grad.astype(jnp.float32))
        return tuple(grads)

    def rest(q, k, v, out, lse, d_out):
        return tuple(otherwise.attend_bwd(q, k, v, out, lse, d_out, q_meta, kv_meta, mask))

    return _switch(q, k, q_meta, kv_meta, mask, dense, rest, q, k, v, out, lse, d_out)
