"""The flags `llama.*` as the two dataclasses that they belong to."""

from dataclasses import fields
from typing import Any

from ringbpt.config import Architecture, Execution


def llama_flags(**values: Any) -> dict[str, Any]:
    """`Config(**llama_flags(vocab_size=8, scan_mlp=True))`: each value goes to the architecture or to the execution."""
    names = {item.name for item in fields(Architecture)}
    return {
        "architecture": Architecture(**{name: value for name, value in values.items() if name in names}),
        "execution": Execution(**{name: value for name, value in values.items() if name not in names}),
    }
