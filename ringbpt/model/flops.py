"""Our own count of a step's arithmetic: the compiler's counts a loop's body once."""

from ringbpt.config import Architecture, Config
from ringbpt.model.llama import make_dims


def forward_flops(config: Architecture, tokens: float, visible_pairs: float) -> float:
    """Multiply-adds of one forward pass, two FLOPs each: every weight once a token, and 2 H a visible pair and head.

    visible_pairs: (query, key) pairs that the mask lets through, over the whole batch. Norms, RoPE and the
    softmax are left out, as in everybody's MFU.
    """
    d = make_dims(config)
    feedforwards = config.num_experts_per_tok if config.num_experts else 1
    layer = d.D * (d.N + 2 * d.K) * d.H + d.N * d.H * d.D + 3 * d.D * d.F * feedforwards + d.D * d.E
    head = d.D * (1 if config.head == "score" else d.V)
    return 2.0 * tokens * (d.L * layer + head) + 4.0 * visible_pairs * d.L * d.N * d.H


def training_flops(config: Config, tokens: float, visible_pairs: float) -> float:
    """Of a training step, recomputation apart: the forward pass, and twice that backward, towards inputs and weights.

    With adapters nothing is computed towards the weights that stay; the pairs' own products, a hundredth, are left out.
    """
    forward = forward_flops(config.architecture, tokens, visible_pairs)
    towards_weights = forward_flops(config.architecture, tokens, 0) if config.lora.rank else 0.0
    return 3 * forward - towards_weights
