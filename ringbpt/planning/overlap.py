"""Does every hop of a ring hide behind computation? Read off the schedule that the compiler chose.

A hop is a transfer that ring.py asked for (a ppermute). It is hidden where it starts before, and is waited for after,
at least one attention computation: a loop over blocks or a kernel. A test asks so:

    hops = ring_hops(compiled.as_text())          # of a gradient on sp > 2: forward and backward
    assert hops and all(hop.hidden for hop in hops), list(map(str, hops))

The program must be scheduled: compiled for a TPU or a GPU (planning.topologies), here or not; the CPU's is not.
Kernels count by their being custom calls; what they are called does not matter.
"""

from dataclasses import dataclass

from ringbpt.attention.api import SCOPE
from ringbpt.planning.attention_runs import AGAIN
from ringbpt.planning.collectives import with_name
from ringbpt.planning.hlo import Computation, Instruction, Module, parse
from ringbpt.reduction import SCOPE as SUMS

# Custom calls that compute nothing.
_PLUMBING = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "MoveTo")


@dataclass(frozen=True)
class Hop:
    """One transfer in the program, run `times` times a call.

    hidden_by: the attention computations between its start and its end. synchronous: nothing else can run meanwhile.
    in_loop: it stands in a loop's body. again: of a forward that a checkpointed layer's backward runs once more. bytes:
    what one device sends each time.
    """

    name: str
    computation: str
    bytes: int
    times: int
    in_loop: bool
    backward: bool
    synchronous: bool
    hidden_by: tuple[str, ...]
    again: bool = False

    @property
    def hidden(self) -> bool:
        return bool(self.hidden_by) and not self.synchronous

    def __str__(self) -> str:
        how = "synchronous" if self.synchronous else f"behind {', '.join(self.hidden_by) or 'nothing'}"
        which = "backward" if self.backward else "forward"
        return f"{which} {self.name} in {self.computation}, {self.bytes} bytes x {self.times}: {how}"


def ring_hops(program: str | Module) -> list[Hop]:
    """Every hop of a program: `compiled.as_text()`, or what was parsed of it. Raises ValueError where it is not
    scheduled.
    """
    module = parse(program) if isinstance(program, str) else program
    if not module.scheduled:
        raise ValueError("the program has no schedule to read: compile it for a TPU or a GPU")
    bodies = {i.attribute("body") for c in module.computations.values() for i in c.instructions if i.opcode == "while"}
    hops, seen = [], set()
    for instruction, computation, times in module.executed():
        instruction = with_name(module, computation, instruction)
        if not _is_hop(module, instruction) or (computation.name, instruction.name) in seen:
            continue
        seen.add((computation.name, instruction.name))
        between = _between(computation, instruction)
        hops.append(
            Hop(
                name=instruction.name,
                computation=computation.name,
                bytes=computation.operand_bytes(instruction),
                times=times,
                in_loop=computation.name in bodies,
                backward="transpose(" in instruction.op_name,
                synchronous=not between,
                hidden_by=tuple(i.name for i in between if _is_attention(module, i, instruction)),
                again=AGAIN in instruction.op_name,
            )
        )
    return hops


def counted(hops: list[Hop]) -> dict[str, int]:
    """How often a call sends any of them, `hops`, and how many of these are `hidden`."""
    return {"hops": sum(hop.times for hop in hops), "hidden": sum(hop.times for hop in hops if hop.hidden)}


def products_meanwhile(module: Module, computation: Computation, start: Instruction) -> tuple[str, ...]:
    """The kernels, loops and products, of attention or not, that are scheduled while any transfer is under way."""
    between = _between(computation, start)
    return tuple(i.name for i in between if any(map(_multiplies, (i, *module.inside(i)))))


def _is_hop(module: Module, instruction: Instruction) -> bool:
    """A permute that attention asked for: the partitioner's own carry another operation's name, sums of gradients their
    scope's.
    """
    permutes = instruction.opcode in ("collective-permute", "collective-permute-start") or (
        instruction.opcode == "async-start"
        and any(i.opcode == "collective-permute" for i in module.inside(instruction))
    )
    # Of several that a compiler sends at once the names are joined: .../(ppermute:other/ppermute).
    return permutes and instruction.op_name.rstrip(")").endswith("ppermute") and f"/{SUMS}/" not in instruction.op_name


def _between(computation: Computation, start: Instruction) -> list[Instruction]:
    """What is scheduled while the transfer is under way; [] for one that is synchronous."""
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return []
    first = [i.name for i in computation.instructions].index(start.name)
    for i, instruction in enumerate(computation.instructions[first + 1 :], first + 1):
        if instruction.opcode.endswith("-done") and start.name in instruction.operands:
            return computation.instructions[first + 1 : i]
    # It ends in another computation (the next turn of a loop): all that follows here runs meanwhile.
    return computation.instructions[first + 1 :]


def _scope(op_name: str) -> str:
    """What of an operation's name it shares with all of the same attention: up to its scope, or to its shard_map."""
    before, scope, _ = op_name.rpartition(f"/{SCOPE}/")
    return before + scope or op_name.rpartition("shard_map/")[0]


def _is_attention(module: Module, instruction: Instruction, hop: Instruction) -> bool:
    """A loop, a branch or a kernel of the hop's own attention that multiplies matrices."""
    if instruction.opcode not in ("while", "conditional", "call", "custom-call", "fusion", "async-start"):
        return False
    products = [i for i in (instruction, *module.inside(instruction)) if _multiplies(i)]
    # What a GPU's compiler wraps around a kernel and the slices that it takes has no name of its own.
    named = [instruction] if instruction.op_name else products
    return bool(products) and any(_scope(i.op_name) == _scope(hop.op_name) for i in named)


def _multiplies(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return not any(name in instruction.attributes for name in _PLUMBING)
    return instruction.opcode in ("dot", "convolution")
