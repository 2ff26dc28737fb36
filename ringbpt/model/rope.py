"""Rotary position embedding, computed from the tokens' own positions: no table, no maximum length."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.config import Architecture
from ringbpt.config.families import yarn_scale


def frequencies(config: Architecture) -> np.ndarray:
    """Radians a position, float32 [H/2]: theta ** (-2i/H), scaled as rope_scaling_type says.

    `linear` divides all by the factor; `llama3` divides those whose wavelength is longer than the trained context,
    leaves the short ones, and blends in between; `yarn` blends linearly in the number of the pair.
    Ref: arXiv:2306.15595 (linear), arXiv:2407.21783 (llama3), arXiv:2309.00071 (yarn).
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
    if config.rope_scaling_type == "yarn":
        keep = 1 - _yarn_ramp(config)
        freq = keep * freq + (1 - keep) * freq / config.rope_scaling_factor
    return freq.astype(np.float32)


def _yarn_ramp(config: Architecture) -> np.ndarray:
    """[H/2]: 0 for pairs that turn beta_fast times or more within the original length, 1 for beta_slow or less."""
    assert config.head_dim is not None
    H = config.head_dim

    def pair_of(turns: float) -> float:
        return H * math.log(config.rope_scaling_original_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_of(config.rope_scaling_beta_fast), pair_of(config.rope_scaling_beta_slow)
    if config.rope_scaling_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    return np.clip((np.arange(H // 2) - low) / max(high - low, 0.001), 0.0, 1.0)


def rope_scale(config: Architecture) -> float:
    """The length of the rotated pairs: 1, but for yarn, which sharpens attention over a longer context by it."""
    if config.rope_scaling_type != "yarn":
        return 1.0
    given = config.rope_scaling_attention_factor
    return yarn_scale(config.rope_scaling_factor) if given is None else given


def rotation(position_BT: jax.Array, frequency: np.ndarray, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of every angle, float32 [B, T, h] with h = H/2, both times `scale`."""
    angle_BTh = position_BT[:, :, None].astype(jnp.float32) * jnp.asarray(frequency)[None, None]
    cos_BTh, sin_BTh = jnp.cos(angle_BTh), jnp.sin(angle_BTh)
    return (cos_BTh, sin_BTh) if scale == 1.0 else (cos_BTh * scale, sin_BTh * scale)


def apply_rope(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + H/2), the Hugging Face convention, in float32; returns x's dtype."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
    # Cast before they are joined: a TPU's compiler would keep a gradient in float32 to take it apart.
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([half.astype(x_BTNH.dtype) for half in turned], axis=-1)
