"""A compiled program's text as computations of instructions: enough of XLA's HLO to read schedules and collectives."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+)(?:e[0-9]m[0-9]\w*)?\[([0-9,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def op_name(self) -> str:
        """Where in the traced program it comes from, as jit(step)/while/body/...; "" where the compiler made it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @cached_property
    def called(self) -> tuple[str, ...]:
        lists = [
            name.strip().lstrip("%") for text in _CALLED_LISTS.findall(self.attributes) for name in text.split(",")
        ]
        return (*_CALLED.findall(self.attributes), *lists)

    def attribute(self, name: str) -> str:
        """The text of one attribute, as in `body=%loop`: "loop"; "" where it is missing."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""


@dataclass(frozen=True)
class Computation:
    name: str
    entry: bool
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[str]]:
        """Which instructions take each one's result."""
        found: dict[str, list[str]] = {}
        for instruction in self.instructions:
            for name in instruction.operands:
                found.setdefault(name, []).append(instruction.name)
        return found

    def operand_bytes(self, instruction: Instruction) -> int:
        """The bytes of what an instruction of this computation is given."""
        return sum(shape_bytes(self.by_name[name].shape) for name in instruction.operands if name in self.by_name)


@dataclass(frozen=True)
class Module:
    """scheduled: the instructions of each computation stand in the order in which they are run."""

    scheduled: bool
    computations: dict[str, Computation]

    @property
    def entry(self) -> Computation:
        return next(computation for computation in self.computations.values() if computation.entry)

    @cached_property
    def permutes_are_nameless(self) -> bool:
        everywhere = (i for computation in self.computations.values() for i in computation.instructions)
        return not any(i.op_name for i in everywhere if i.opcode == "collective-permute-start")

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Everything that the instruction calls, at any depth."""
        for name in instruction.called:
            if computation := self.computations.get(name):
                for inner in computation.instructions:
                    yield inner
                    yield from self.inside(inner)

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop runs: as the compiler noted it, or read off `counter < constant` and what a turn adds.

        None where it depends on data. A matrix product in steps, each behind the next shard's way, adds 2 at a time.
        """
        if match := _TRIPS.search(loop.attributes):
            return int(match.group(1))
        condition = self.computations.get(loop.attribute("condition"))
        if condition is None:
            return None
        bounds = [int(i.operands[0]) for i in condition.instructions if _is_int(i)]
        compares = [i for i in condition.instructions if i.opcode == "compare" and "direction=LT" in i.attributes]
        fused = [i for i in condition.instructions if i.opcode == "fusion"]
        if len(bounds) != 1 or len(compares) + len(fused) != 1:
            return None
        return -(-bounds[0] // self._added(loop, condition, (compares + fused)[0]))

    def _added(self, loop: Instruction, condition: Computation, compare: Instruction) -> int:
        """What a turn adds to the loop's counter; 1 where the program does not say it in a sum of its own."""
        read = [condition.by_name[name] for name in compare.operands if name in condition.by_name]
        places = [int(i.attribute("index")) for i in read if i.opcode == "get-tuple-element"]
        body = self.computations[loop.attribute("body")]
        results = body.instructions[-1].operands
        if len(places) != 1 or len(results) <= places[0]:
            return 1
        after = body.by_name.get(results[places[0]])
        if after is None or after.opcode != "add":
            return 1
        terms = [body.by_name[name] for name in after.operands if name in body.by_name]
        steps = [int(i.operands[0]) for i in terms if _is_int(i)]
        return steps[0] if len(steps) == 1 and steps[0] > 0 else 1

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, the computation it stands in, how often it runs in one call) of everything that is scheduled.

        A loop whose count depends on data counts once; so do all branches of a conditional.
        """

        def walk(computation: Computation, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
            for instruction in computation.instructions:
                yield instruction, computation, times
                if instruction.opcode == "while":
                    yield from walk(
                        self.computations[instruction.attribute("body")], times * (self.trips(instruction) or 1)
                    )
                elif instruction.opcode in ("call", "conditional", "async-start"):
                    for name in instruction.called:
                        if name in self.computations:
                            yield from walk(self.computations[name], times)

        yield from walk(self.entry, 1)


def _is_int(instruction: Instruction) -> bool:
    """Whether it is a constant whole number: s32[] constant(4)."""
    scalar = re.match(r"[su](?:32|64)\[\]", instruction.shape)
    return (
        instruction.opcode == "constant"
        and bool(scalar)
        and re.fullmatch(r"-?\d+", instruction.operands[0]) is not None
    )


def parse(text: str) -> Module:
    """`compiled.as_text()` -> its computations. Raises ValueError for text without an entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in _joined(text):
        if header := _HEADER.match(line):
            current = Computation(header.group(2), entry=bool(header.group(1)))
            computations[current.name] = current
        elif current is not None and (start := _INSTRUCTION.match(line)):
            current.instructions.append(_instruction(start.group(1), line[start.end() :]))
    if not any(computation.entry for computation in computations.values()):
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return Module("is_scheduled=true" in text[: text.find("\n")], computations)


def _joined(text: str) -> Iterator[str]:
    """The lines, each instruction in one: what a kernel says of itself may go over several."""
    whole = ""
    for line in text.splitlines():
        if whole and not (line == "}" or _INSTRUCTION.match(line) or _HEADER.match(line)):
            whole += line
            continue
        if whole:
            yield whole
        whole = line if _INSTRUCTION.match(line) else ""
        if not whole:
            yield line
    if whole:
        yield whole


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    assert opcode, rest[:200]
    close = _closing(rest, opcode.end() - 1)
    inner = rest[opcode.end() : close]
    names = re.findall(r"%([\w.\-]+)", inner) if "%" in inner else [part.strip() for part in inner.split(",")]
    return Instruction(name, opcode.group(1), shape, tuple(names), rest[close + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis stays open: {text[opening : opening + 80]}")


def shape_bytes(shape: str) -> int:
    """The bytes of an array's or a tuple's shape, without padding: "(bf16[2,8]{1,0}, u32[])" -> 36."""
    total = 0.0
    for kind, dims in _ARRAY.findall(shape):
        count = 1
        for dim in dims.split(","):
            count *= int(dim) if dim else 1
        total += count * _BYTES.get(kind, int(re.sub(r"\D", "", kind) or 8) / 8)
    return int(total)
