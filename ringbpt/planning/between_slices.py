"""What travels over the network between a TPU's slices: sends that the compiler hands to the host."""

import re
from collections import Counter

from ringbpt.planning.hlo import Module

# What such a send is part of -> the collective's name, and for n slices what each device sends of its operand.
_KINDS = {
    "ALL_REDUCE": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "ALL_GATHER": ("all-gather", lambda n: n - 1),
    "REDUCE_SCATTER": ("reduce-scatter", lambda n: (n - 1) / n),
    "ALL_TO_ALL": ("all-to-all", lambda n: (n - 1) / n),
    "ONE_TO_ONE": ("collective-permute", lambda n: 1),
}
_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
NETWORK = "slices"  # how a report calls it, beside the axes of the mesh


def bytes_between(module: Module, slices: int) -> Counter[str]:
    """{kind: bytes} that one device sends to other slices in one call."""
    found: Counter[str] = Counter()
    for instruction, computation, times in module.executed():
        if instruction.opcode == "send" and (match := _TYPE.search(instruction.attributes)):
            kind, share = _KINDS.get(match.group(1), (match.group(1).lower(), lambda n: 1))
            found[kind] += int(times * computation.operand_bytes(instruction) * share(slices))
    return found
