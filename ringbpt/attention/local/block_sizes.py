"""The table of block sizes: kernel, hardware, head dim -> blocks of (queries, keys), forward and backward.

`python -m ringbpt.autotune` measures and writes it. An entry's "from" says where it comes from: "arithmetic" (what
fits the memory and keeps the matrix units fed by a device's nominal numbers) or the date and version of a measurement.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ringbpt import hardware

FILE = Path(__file__).with_suffix(".json")
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


@cache
def table() -> Table:
    return json.loads(FILE.read_text())


def row_name(device_kind: str) -> str:
    """How the table calls a device: "v5e", "H200"; a kind that hardware.py doesn't know keeps its own name."""
    known = hardware.find(device_kind)
    return known.name if known else device_kind


def entry(kernel: str, device_kind: str, head_dim: int) -> dict[str, Any] | None:
    """The entry of the least head dim in the table that holds this one, else of the greatest; None: not in the table.

    {"forward": [queries, keys], "backward": [queries, keys], "from": ...}; a kernel may keep more in its own.
    """
    entries = table().get(kernel, {}).get(row_name(device_kind))
    if not entries:
        return None
    sizes = sorted(int(size) for size in entries)
    return entries[str(next((size for size in sizes if size >= head_dim), sizes[-1]))]


def sizes(kernel: str, device_kind: str, head_dim: int, direction: str, default: tuple[int, int]) -> tuple[int, int]:
    """The table's (queries, keys) of a block, or `default`. direction: "forward" or "backward"."""
    queries, keys = (entry(kernel, device_kind, head_dim) or {}).get(direction, default)
    return queries, keys


def at_most(size: int, limit: int | None) -> int:
    """A block of the table's size, or of what the user's chunk size allows."""
    return size if limit is None else min(size, limit)


def write(found: Table) -> None:
    """Puts these entries into the table's file, beside those that are there; the file is whole at any time."""
    whole = json.loads(FILE.read_text())
    for kernel, kinds in found.items():
        for kind, entries in kinds.items():
            whole.setdefault(kernel, {}).setdefault(kind, {}).update(entries)
    new = FILE.with_name(FILE.name + ".new")
    new.write_text(_format(whole))
    new.replace(FILE)
    table.cache_clear()


def _format(whole: Table) -> str:
    """One line an entry, as a diff is read."""
    kernels = []
    for kernel, kinds in whole.items():
        lines = []
        for kind, entries in kinds.items():
            rows = ",\n".join(
                f"   {json.dumps(size)}: {json.dumps(entries[size])}" for size in sorted(entries, key=int)
            )
            lines.append(f"  {json.dumps(kind)}: {{\n{rows}\n  }}")
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"
