"""Rotary position embedding, computed from the tokens' own positions: no table, no maximum length."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ringbpt.config import LlamaConfig


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position, float32 [H/2]: theta ** (-2i/H), scaled as rope_scaling_type says.

    `linear` divides all by the factor; `llama3` divides those whose wavelength is longer than the trained context,
    leaves the short ones, and blends in between. Ref: transformers modeling_rope_utils (llama3), arXiv:2306.15595.
    """
    assert config.head_dim is not None
    freq = config.theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if config.rope_scaling_type == "linear":
        freq = freq / config.rope_scaling_factor
    if config.rope_scaling_type == "llama3":
        low, high = config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor
        turns = config.rope_scaling_original_length * freq / (2 * np.pi)  # within the context it was trained on
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / config.rope_scaling_factor
    return freq.astype(np.float32)


def rotation(
    position_BT: Int[Array, "B T"], frequency: np.ndarray
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """(cos, sin) of every angle, float32, h = H/2."""
    angle_BTh = position_BT[:, :, None].astype(jnp.float32) * jnp.asarray(frequency)[None, None]
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def apply_rope(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + H/2), the Hugging Face convention, in float32; returns x's dtype."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
