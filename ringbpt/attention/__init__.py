"""Attention over sequences longer than a device: `make_attention` for the model, `permutation` for the data."""

from ringbpt.attention.api import AttentionSpec, make_attention
from ringbpt.attention.core import MaskSpec
from ringbpt.layouts import permutation

__all__ = ["AttentionSpec", "MaskSpec", "make_attention", "permutation"]
