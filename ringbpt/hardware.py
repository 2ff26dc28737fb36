"""What each accelerator can do at most, and what is reached of it: for MFU, plans, strategies and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Peaks of ONE jax device (on TPU v2, v3 and v7x that is one of the chip's two cores).

    bf16_tflops: dense bf16 TFLOP/s. hbm_gib: memory a program can use, GiB. hbm_gb_per_s: its bandwidth, 1e9 bytes/s.
    link_gb_per_s: one link, one direction, 1e9 bytes/s. links: how many of them a device has.
    """

    name: str
    device_kinds: tuple[str, ...]  # as jax.Device.device_kind spells it
    bf16_tflops: float
    hbm_gib: float
    hbm_gb_per_s: float
    link_gb_per_s: float
    links: int


# Nominal vendor numbers.
HARDWARE = (
    Hardware("v2", ("TPU v2",), 23.0, 8.0, 350, 62, 4),
    Hardware("v3", ("TPU v3",), 61.5, 16.0, 450, 70, 4),
    Hardware("v4", ("TPU v4",), 275.0, 30.75, 1228, 50, 6),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197.0, 16.0, 819, 50, 4),
    Hardware("v5p", ("TPU v5p", "TPU v5"), 459.0, 95.7, 2765, 100, 6),
    Hardware("v6e", ("TPU v6 lite", "TPU v6e"), 918.0, 32.0, 1640, 100, 4),
    # A chip: 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, six links of 100 GB/s each way, which its two devices share.
    Hardware("v7x", ("TPU7x", "TPU v7x"), 1153.5, 94.75, 3690, 100, 6),
    Hardware("A100", ("NVIDIA A100-SXM4-80GB",), 312.0, 79.2, 2039, 25, 12),
    Hardware("A100-40", ("NVIDIA A100-SXM4-40GB",), 312.0, 39.4, 1555, 25, 12),
    Hardware("H100", ("NVIDIA H100 80GB HBM3",), 989.0, 79.1, 3352, 25, 18),
    # In pairs over a bridge of 300 GB/s each way; more than two reach each other over 16 lanes of PCIe 5.
    Hardware("H100-NVL", ("NVIDIA H100 NVL",), 835.0, 93.1, 3938, 64, 1),
    Hardware("H200", ("NVIDIA H200",), 989.0, 141.0, 4800, 25, 18),
    Hardware("B200", ("NVIDIA B200",), 2250.0, 178.3, 7700, 50, 18),
    # NVLink joins up to 72 of them, over the four of a tray.
    Hardware("GB200", ("NVIDIA GB200",), 2500.0, 184.5, 7700, 50, 18),
    # 24 GiB, of which the driver keeps some; no NVLink: 16 lanes of PCIe 4.
    Hardware("RTX4090", ("NVIDIA GeForce RTX 4090",), 165.0, 23.65, 1008, 32, 1),
)

# What is reached, (at best, at worst), of the bf16 peak: by large matrix products; by a fused attention kernel; by
# blockwise attention in plain XLA, which writes each block of scores out.
MATMUL_SHARE = (0.75, 0.45)
KERNEL_SHARE = (0.65, 0.30)
BLOCKWISE_SHARE = (0.35, 0.08)
ATTENTION_SHARE = 0.6  # by whichever attention, where strategies are compared
# float32 products take this many times the time of bf16 ones.
FLOAT32_COST = 6
# Between hosts with GPUs: what one GPU sends and receives over an adapter of its own (InfiniBand), 1e9 bytes/s.
NETWORK_GB_PER_S = (50.0, 25.0)
# Between a device and its host's memory, 1e9 bytes/s one way: PCIe 5 with 16 lanes, and what is left of less where
# several devices share it.
HOST_GB_PER_S = (50.0, 10.0)
# A collective takes this long with nothing to send.
COLLECTIVE_SECONDS = 20e-6


def find(device_kind: str) -> Hardware | None:
    """The hardware of a `jax.Device.device_kind` or of a short name ("v4", "H200"), upper or lower case.

    None when unknown (a CPU, a variant with other peaks): then MFU is not reported.
    """
    wanted = device_kind.strip().lower()
    for hardware in HARDWARE:
        if wanted in {hardware.name.lower(), *(kind.lower() for kind in hardware.device_kinds)}:
            return hardware
    return None
