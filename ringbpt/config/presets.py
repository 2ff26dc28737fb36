"""Sizes of models by their names, for --load_llama_config."""

from typing import Any


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads), strict=True))


# The sizes of the original's models.
PRESETS: dict[str, dict[str, Any]] = {
    "debug": _sizes(128, 256, 2, 4),
    "200m": _sizes(1024, 2048, 14, 8),
    "1b": _sizes(2048, 5504, 22, 16),
    "3b": _sizes(3200, 8640, 26, 32),
    "7b": _sizes(4096, 11008, 32, 32),
    "13b": _sizes(5120, 13824, 40, 40),
    "30b": _sizes(6656, 17920, 60, 52),
    "65b": _sizes(8192, 22016, 80, 64) | {"rms_norm_eps": 1e-5},
}
