"""What every attention shares: who sees whom, a partial result, and how two partial results become one."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ringbpt.types import TokenMeta


@dataclass(frozen=True)
class MaskSpec:
    """The static half of a mask. A query sees a key of its own segment (0, padding, sees and is seen by none) ...

    causal: ... at its own position or before it. window: ... at most window - 1 positions away.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"MaskSpec(window={self.window}): a window holds at least the token itself: use window=1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: out_BTNH float32, normalised over them, and lse_BTN float32, their weight.

    A row that saw no key has out = 0 and lse = -inf.
    """

    out_BTNH: jax.Array
    lse_BTN: jax.Array

    @staticmethod
    def empty(shape_BTNH: tuple[int, ...]) -> "Partial":
        return Partial(jnp.zeros(shape_BTNH, jnp.float32), jnp.full(shape_BTNH[:-1], -jnp.inf, jnp.float32))


@dataclass(frozen=True)
class Local:
    """One device's share of attention: the two functions that every implementation under local/ provides.

    attend(q_BTNH, k_BSKH, v_BSKH, q_meta, kv_meta, mask, carry=None) -> Partial, carry merged in;
    attend_bwd(q, k, v, out, lse, d_out, q_meta, kv_meta, mask) -> (dq, dk, dv), float32, where out and lse are
    the GLOBAL ones: over all keys, not only those given.
    """

    attend: Callable[..., Partial]
    attend_bwd: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def visible(q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> Bool[Array, "B T S"]:
    """The mask itself, dense: only blocks of it are ever made outside local/reference.py."""
    distance_BTS = q_meta.position_BT[:, :, None] - kv_meta.position_BT[:, None, :]
    q_segment_BT1, kv_segment_B1S = q_meta.segment_BT[:, :, None], kv_meta.segment_BT[:, None, :]
    seen_BTS = (q_segment_BT1 == kv_segment_B1S) & (q_segment_BT1 != 0)
    if mask.causal:
        seen_BTS &= distance_BTS >= 0
    if mask.window is not None:
        seen_BTS &= jnp.abs(distance_BTS) < mask.window
    return seen_BTS


def merge(a: Partial, b: Partial) -> Partial:
    """The attention over both sets of keys. Neither exp overflows, and two empty rows make an empty row."""
    lse_BTN = jnp.logaddexp(a.lse_BTN, b.lse_BTN)
    finite_BTN = jnp.where(lse_BTN == -jnp.inf, 0.0, lse_BTN)
    out_BTNH = sum(part.out_BTNH * jnp.exp(part.lse_BTN - finite_BTN)[..., None] for part in (a, b))
    return Partial(out_BTNH, lse_BTN)


def gather_meta(meta: TokenMeta, axis: str) -> TokenMeta:
    """Inside shard_map: the places of the tokens of every device of the axis, one after the other."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), meta)


def row_delta(out_BTNH: jax.Array, d_out_BTNH: jax.Array) -> Float[Array, "B T N"]:
    """sum_H out * d_out, the term every score's gradient subtracts. Ref: FlashAttention-2, arXiv:2307.08691, eq. 4."""
    return jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32), axis=-1)
