"""What computes attention in a compiled program, and whether it runs once more for the backward: read off its names."""

from ringbpt.attention.api import SCOPE
from ringbpt.planning.hlo import Instruction, Module

# A part of the name that a kernel's call carries -> which of llama.attention_kernel's it is.
KERNELS = {
    "ringbpt_attend": "pallas_tpu",
    "hopper_": "pallas_hopper",
    "dot_product_attention": "cudnn",
    "triton": "pallas_triton",
}
# What jax calls the part of a checkpointed layer that the backward computes again.
AGAIN = "rematted_computation"


def kernel_of(module: Module) -> str:
    """The kernel that computes attention; the quickest of several, as a branch takes it where it can; else blockwise.

    cuDNN's stands first: it gets whole hops, and another kernel beside it those that cuDNN refuses.
    """
    names = {i.op_name for i in _attention(module) if i.opcode == "custom-call"}
    found = {kernel for part, kernel in KERNELS.items() if any(part in name for name in names)}
    return next((kernel for kernel in ("cudnn", *KERNELS.values()) if kernel in found), "blockwise")


def runs_again(module: Module) -> bool:
    """Whether a layer's backward computes the forward of its attention once more."""
    return any(
        AGAIN in i.op_name.rpartition(f"/{SCOPE}/")[0] and i.opcode in ("custom-call", "dot", "convolution")
        for i in _attention(module)
    )


def _attention(module: Module) -> list[Instruction]:
    return [
        i for computation in module.computations.values() for i in computation.instructions if f"/{SCOPE}/" in i.op_name
    ]
