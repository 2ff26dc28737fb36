"""What each accelerator can do at most: for MFU, plans, strategies and benchmarks. What is reached: rates.py."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """Peaks of ONE jax device (on TPU v2, v3 and v7x that is one of the chip's two cores).

    bf16_tflops: dense bf16 TFLOP/s. hbm_gib: memory a program can use, GiB. hbm_gb_per_s: its bandwidth, 1e9 bytes/s.
    link_gb_per_s: one link, one direction, 1e9 bytes/s. links: how many of them a device has. network_gb_per_s: of a
    TPU, what it sends over the network between slices, 1e9 bytes/s; GPUs have adapters of many kinds (rates.py).
    """

    name: str
    device_kinds: tuple[str, ...]  # as jax.Device.device_kind spells it
    bf16_tflops: float
    hbm_gib: float
    hbm_gb_per_s: float
    link_gb_per_s: float
    links: int
    network_gb_per_s: float = 0.0

    @property
    def platform(self) -> str:
        """tpu or gpu."""
        return "tpu" if self.network_gb_per_s else "gpu"

    @property
    def generation(self) -> str:
        """By which rates are known: chips that differ in memory, bandwidth or power alone are one."""
        return {"H100-NVL": "H100", "H200": "H100", "A100-40": "A100", "GB200": "B200"}.get(self.name, self.name)


# Nominal vendor numbers.
HARDWARE = (
    Hardware("v2", ("TPU v2",), 23.0, 8.0, 350, 62, 4, 3.1),
    Hardware("v3", ("TPU v3",), 61.5, 16.0, 450, 70, 4, 3.1),
    Hardware("v4", ("TPU v4",), 275.0, 30.75, 1228, 50, 6, 6.25),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197.0, 16.0, 819, 50, 4, 3.1),
    Hardware("v5p", ("TPU v5p", "TPU v5"), 459.0, 95.7, 2765, 100, 6, 6.25),
    Hardware("v6e", ("TPU v6 lite", "TPU v6e"), 918.0, 32.0, 1640, 100, 4, 12.5),
    # A chip: 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, six links of 100 GB/s each way, which its two devices share.
    Hardware("v7x", ("TPU7x", "TPU v7x"), 1153.5, 94.75, 3690, 100, 6, 6.25),
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


def find(device_kind: str) -> Hardware | None:
    """The hardware of a `jax.Device.device_kind` or of a short name ("v4", "H200"), upper or lower case.

    None when unknown (a CPU, a variant with other peaks): then MFU is not reported.
    """
    wanted = device_kind.strip().lower()
    for hardware in HARDWARE:
        if wanted in {hardware.name.lower(), *(kind.lower() for kind in hardware.device_kinds)}:
            return hardware
    return None


def cuda_capability(device: Any) -> float:
    """A jax device's compute capability, 8.0 and up from Ampere on; 0 of whatever is no NVIDIA GPU."""
    with suppress(TypeError, ValueError):  # AMD's are names: gfx942
        return float(getattr(device, "compute_capability", 0))
    return 0.0
