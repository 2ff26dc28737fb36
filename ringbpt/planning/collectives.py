"""What travels between devices in one step, by mesh axis, read off the compiled program."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ringbpt.attention.api import SCOPE as ATTENTION
from ringbpt.attention.parallel.ring import GRADIENTS_SCOPE
from ringbpt.dims import AXES
from ringbpt.planning.hlo import Computation, Instruction, Module
from ringbpt.reduction import SCOPE as SUMMED

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Transfer(NamedTuple):
    """One collective. axis: as collective_bytes names it. bytes: what one device sends by it in a call."""

    instruction: Instruction
    computation: Computation
    axis: str
    kind: str
    bytes: int


def transfers(module: Module, mesh_shape: Sequence[int], axes: Sequence[str] = AXES) -> Iterator[Transfer]:
    """Every collective between devices, in a program of ours or, by the names of its mesh's axes, of others.

    An all-gather over n devices counts what a device must receive, (n-1)/n of the result; an all-reduce twice that; a
    permute its whole array. A loop whose length depends on data counts once (ours hold no transfers).
    """
    for instruction, computation, times in module.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:  # nor is an "async-start": what it wraps is walked through by itself
            continue
        axis, size = _axis(instruction, mesh_shape, axes)
        if size > 1:
            others = (size - 1) / size  # what of an array goes to the other devices, or comes from them
            share = {"all-gather": size - 1, "all-reduce": 2 * others, "collective-permute": 1}.get(kind, others)
            sent = times * int(computation.operand_bytes(instruction) * share)
            yield Transfer(with_name(module, computation, instruction), computation, axis, kind, sent)


# What a permute of ours is part of: scopes in its name.
_PARTS = tuple(f"/{scope}/" for scope in (ATTENTION, GRADIENTS_SCOPE, SUMMED))


def with_name(module: Module, computation: Computation, permute: Instruction) -> Instruction:
    """A permute under the name of what it belongs to, where the compiler has dropped those of all permutes, as it does
    for several slices: of the nearest that it gives its array to or takes it from, else of most that is computed there.
    """
    if permute.opcode != "collective-permute-start" or permute.op_name or not module.permutes_are_nameless:
        return permute
    beside = next(filter(None, map(_part, _around(module, computation, permute))), "")
    if not beside:
        found = Counter(filter(None, (_part(name) for i in computation.instructions for name in _names(module, i))))
        if not found:
            return permute
        [(beside, _)] = found.most_common(1)
    return replace(permute, attributes=f'{permute.attributes}, metadata={{op_name="{beside}ppermute"}}')


def _part(name: str) -> str:
    """What of an operation's name says which part of the step it is, up to the last of _PARTS; "" where none is."""
    ends = [name.rfind(part) + len(part) for part in _PARTS if part in name]
    return name[: max(ends)] if ends else ""


def _names(module: Module, instruction: Instruction) -> Iterator[str]:
    """Its own name, else those of what it calls."""
    if instruction.op_name:
        yield instruction.op_name
    else:
        yield from (inner.op_name for inner in module.inside(instruction) if inner.op_name)


def _around(module: Module, computation: Computation, start: Instruction) -> Iterator[str]:
    """The names of what an instruction gives its result to, the nearest first, through what has no name; then of what
    it takes its operands from.
    """

    def after(name: str) -> list[str]:
        return computation.users.get(name, [])

    def before(name: str) -> list[str]:
        return [operand for operand in computation.by_name[name].operands if operand in computation.by_name]

    for beside in (after, before):
        queue = [start.name]
        for name in queue:
            names = list(_names(module, computation.by_name[name]))
            yield from names
            if not names:
                queue += [x for x in beside(name) if x not in queue]


def collective_bytes(module: Module, mesh_shape: Sequence[int]) -> dict[str, Counter[str]]:
    """{axis or axes: {kind: bytes}} that one device sends in one call: the transfers, added up.

    Axes that one transfer spans at once are written together, as "fsdp+sp".
    """
    found: dict[str, Counter[str]] = {}
    for transfer in transfers(module, mesh_shape):
        found.setdefault(transfer.axis, Counter())[transfer.kind] += transfer.bytes
    return found


def _axis(instruction: Instruction, mesh_shape: Sequence[int], axes: Sequence[str]) -> tuple[str, int]:
    """(the axes along which the group's devices differ, how many devices it has)."""
    group = _group(instruction.attributes, int(np.prod(mesh_shape)))
    places = np.stack(np.unravel_index(group, tuple(mesh_shape)))
    names = [name for name, place in zip(axes, places, strict=True) if len(set(place.tolist())) > 1]
    return "+".join(names) or "none", len(group)


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',?)+)\}"
)


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2 ... as an array of these dims, transposed: "2,4", "1,0" -> [4, 2]."""
    shape = [int(dim) for dim in dims.split(",")]
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _group(attributes: str, device_count: int) -> list[int]:
    """The first group of devices: {{0,1},{2,3}} written out, [2,2]<=[4] or [2,2]<=[2,2]T(1,0) as iota, or by names of a
    mesh's axes, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, the ids in order where none are said.

    Raises ValueError for what is none of these.
    """
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return [int(match.group(1)), int(match.group(2))]
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(text) for text in match.group(1).split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, columns, dims, order = match.groups()
        return _iota(dims, order).reshape(int(rows), int(columns))[0].tolist()
    if match := _MESH_GROUPS.search(attributes):
        axes, dims, order, names = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        ids = _iota(dims or str(device_count), order).reshape(list(sizes.values()))
        along = re.findall(r"'(\w+)'", names)
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"no group of devices is read from {attributes[:200]!r}")
    return list(range(device_count))
