"""Our own count of a step's arithmetic: the compiler's counts a loop's body once."""

from ringbpt.config import Architecture
from ringbpt.model.llama import make_dims


def forward_flops(config: Architecture, tokens: float, visible_pairs: float) -> float:
    """Multiply-adds of one forward pass, two FLOPs each: every weight once a token, and 2 H a visible pair and head.

    visible_pairs: (query, key) pairs that the mask lets through, over the whole batch. Norms, RoPE and the
    softmax are left out, as in everybody's MFU. A training step is three times this, recomputation apart.
    """
    d = make_dims(config)
    feedforwards = config.num_experts_per_tok if config.num_experts else 1
    layer = d.D * (d.N + 2 * d.K) * d.H + d.N * d.H * d.D + 3 * d.D * d.F * feedforwards + d.D * d.E
    head = d.D * (d.V if config.head == "unembed" else 1)
    return 2.0 * tokens * (d.L * layer + head) + 4.0 * visible_pairs * d.L * d.N * d.H
