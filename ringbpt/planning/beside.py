"""One train step of Llama-2-7B here and by MaxText, for the same abstract TPUs: what each is asked for, and what is
read off its program. What needs MaxText itself stands in scripts/compare_maxtext.py.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from ringbpt.attention.api import OVER_SP
from ringbpt.config import UserError, parse, parse_args
from ringbpt.planning.collectives import Transfer, transfers
from ringbpt.planning.overlap import counted, products_meanwhile, ring_hops
from ringbpt.planning.program import Program, compile_program
from ringbpt.planning.topologies import Topology, topology

K = 1024
LENGTHS = {"32K": 32 * K, "256K": 256 * K, "1M": 1024 * K}
MACHINES = ("v5p-16", "v5p-128", "v6e-64")
STRATEGIES = [name for name in OVER_SP if name != "none"]
THEIR_NAMES = {"ulysses_ring": "usp"}  # MaxText's, of a strategy that goes by another name there
# 32 heads can't be dealt to 64 devices, but to fewer, in a ring of such.
DEGREES = {"v5p-128": 16, "v6e-64": 8}  # devices that trade heads: whole axes of the machine, 4 x 4 x 4 and 8 x 8
LONGEST = "longest"  # the length of a row that looks for one
ROWS = [
    f"{machine} {length} {strategy}"
    for length in (*LENGTHS, LONGEST)
    for machine in MACHINES
    for strategy in STRATEGIES
    if (strategy == "ulysses_ring") <= (machine != "v5p-16") and (length != LONGEST or strategy == "ring")
]
# Where in a step a transfer is attention's; all others are of weights, their gradients, and the embedding.
ATTENTION = {"ours": r"/attention/", "theirs": r"/shard_map/|/sharding_constraint$"}
SIDES = {"ours": "ours", "theirs": "MaxText", "plain": "MaxText's defaults"}
CHUNK = 4 * K  # of our feedforward, tokens of a device, which a longer share has to be a multiple of
OURS = [
    "--load_llama_config=7b",
    "--dtype=bf16",
    "--llama.attention_type=ring_blockwise",
    "--llama.remat_block=nothing_saveable",
    "--llama.scan_mlp",
    f"--llama.scan_mlp_chunk_size={CHUNK}",
    "--train_dataset.json_dataset.batch_size=1",
]
# Attention in groups of heads, where not the heads are what is dealt out.
GROUPS = {"ring": ["--llama.kv_heads_at_a_time=2"], "all_gather": ["--llama.kv_heads_at_a_time=8"]}
THEIRS = [
    "model_name=llama2-7b",
    "dtype=bfloat16",
    "weight_dtype=float32",
    "remat_policy=full",
    "attention=flash",
    "use_tokamax_splash=true",  # ring and ulysses want it
    "ici_fsdp_parallelism=1",
    "compile_topology_num_slices=1",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "jax_cache_dir=",  # a program from a cache is not compiled, and says nothing of its buffers
    "run_name=peers",
]
# As its recipes for long sequences have it: not a gradient of the queries for every block of keys, and larger blocks.
TUNED = ["dq_reduction_steps=3"]
BLOCKS = ("sa_block_q", "sa_block_kv", "sa_block_q_dkv", "sa_block_kv_dkv")
BLOCK = 1024

Step = tuple[Program, tuple[int, ...], tuple[str, ...]]  # the program, the shape of its mesh, the names of its axes


def sides(name: str) -> list[str]:
    """Which a row has: MaxText's defaults where their memory is another, in a ring."""
    return [side for side in SIDES if side != "plain" or (name.endswith(" ring") and LONGEST not in name)]


def our_flags(machine: str, count: int, length: int, strategy: str) -> list[str]:
    """The run's flags for the machine, which has so many devices."""
    sizes = [f"--train_dataset.json_dataset.seq_length={length}", f"--llama.max_sequence_length={length}"]
    degree = [f"--llama.ulysses_degree={DEGREES[machine]}"] if strategy == "ulysses_ring" else []
    dealt = [f"--mesh_dim=1,1,1,{count}", f"--llama.sequence_parallel={strategy}", *degree]
    return [*OURS, *GROUPS.get(strategy, []), *sizes, *dealt]


def their_flags(machine: str, count: int, length: int, strategy: str, tuned: bool) -> list[str]:
    """MaxText's for the same. tuned: beyond its defaults, as its recipes for long sequences are."""
    dealt = DEGREES[machine] if strategy == "ulysses_ring" else 1
    return [
        *THEIRS,
        f"compile_topology={machine}",
        f"max_target_length={length}",
        f"per_device_batch_size={1 / count}",
        f"ici_context_parallelism={count // dealt}",
        f"ici_context_usp_ulysses_parallelism={dealt}",
        f"context_parallel_strategy={THEIR_NAMES.get(strategy, strategy)}",
        f"context_parallel_load_balance={strategy != 'ulysses'}",  # which refuses it: a device has the whole sequence
        *([*TUNED, *(f"{name}={min(BLOCK, length // count)}" for name in BLOCKS)] if tuned else []),
    ]


def ours(machine: Topology, flags: list[str]) -> Step:
    """The step as our loop runs it."""
    config = parse(parse_args(flags), len(machine.devices))
    return compile_program(config, machine), tuple(config.mesh_shape), config.mesh_shape._fields


def read(side: str, program: Program, mesh_shape: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, Any]:
    """What the page says of a program; bytes of one device, in one step.

    sent: by axis, kind of transfer and dtype. attention, rest: of these. exposed: of attention and of the rest, what no
    product or kernel is scheduled behind. behind: what is, by its name.
    """
    memory = {"arguments": sum(program.arguments.values()), "total": program.total}
    module = program.module
    if module is None:
        return memory
    sent, behind = Counter[str](), Counter[str]()
    parts = dict.fromkeys(("attention", "rest"), 0)
    exposed = dict(parts)
    for transfer in transfers(module, mesh_shape, axes):
        part = "attention" if re.search(ATTENTION.get(side, ATTENTION["theirs"]), _origin(transfer)) else "rest"
        hiding = products_meanwhile(module, transfer.computation, transfer.instruction)
        sent[f"{transfer.axis} {transfer.kind} {_dtypes(transfer)} of {part}"] += transfer.bytes
        parts[part] += transfer.bytes
        exposed[part] += 0 if hiding else transfer.bytes
        if part == "attention":
            behind.update({re.sub(r"[.\d]+$", "", name): transfer.bytes for name in hiding[:1]})
    hops = ring_hops(module)
    most = max((hop.bytes for hop in hops), default=0)
    hops = [hop for hop in hops if 100 * hop.bytes > most]  # not those of positions
    return memory | counted(hops) | parts | {"exposed": exposed, "sent": dict(sent), "behind": dict(behind)}


def _origin(transfer: Transfer) -> str:
    """Where in the step it comes from; of one that the compiler made, what it sends does."""
    known, instruction = transfer.computation.by_name, transfer.instruction
    while not instruction.op_name and instruction.operands and instruction.operands[0] in known:
        instruction = known[instruction.operands[0]]
    return instruction.op_name


def _dtypes(transfer: Transfer) -> str:
    known = transfer.computation.by_name
    shapes = [known[name].shape for name in transfer.instruction.operands if name in known]
    return "+".join(sorted({shape.lstrip("(").partition("[")[0] for shape in shapes}))


def compile_side(
    name: str, side: str, known: dict[str, Any], theirs: Callable[[Topology, list[str]], Step]
) -> dict[str, Any]:
    """A side of a row, compiled and read; what it refuses is an answer too.

    known: {row: {side: what was read}} of before. theirs: compiles MaxText's step for a machine by its flags. Raises
    UserError for a row that looks for a length where fewer than two are known.
    """
    machine_name, length, strategy = name.split()
    machine = topology(machine_name)
    make, flags = (ours, our_flags) if side == "ours" else (theirs, partial(their_flags, tuned=side == "theirs"))
    packages = ["jax", "libtpu", *([] if side == "ours" else ["maxtext"])]
    made_by = {"with": ", ".join(f"{package} {version(package)}" for package in packages)}
    points = {LENGTHS[n]: known.get(f"{machine_name} {n} {strategy}", {}).get(side, {}) for n in LENGTHS}
    totals = {tokens: found["total"] for tokens, found in points.items() if "total" in found}
    if length == LONGEST and len(totals) < 2:
        raise UserError(f"--only={name!r} needs two of the lengths of {machine_name} {strategy} first, of {side}")
    step = lambda tokens: make(machine, flags(machine_name, len(machine.devices), tokens, strategy))  # noqa: E731
    try:
        if length == LONGEST:
            total = lambda tokens: step(tokens)[0].total  # noqa: E731
            unit = len(machine.devices) * (CHUNK if side == "ours" else K)
            return made_by | longest(total, totals, machine.memory or 0, unit)
        return made_by | read(side, *step(LENGTHS[length]))
    except Exception as error:
        return made_by | {"refused": reason(error)}


def longest(total: Callable[[int], int], known: dict[int, int], limit: int, unit: int, most: int = 3) -> dict[str, int]:
    """{"tokens", "total"} of a length that fits and is near the longest, a multiple of unit.

    total: bytes of a length, by compiling it; known: of lengths, two or more; limit: bytes. Memory grows by the token:
    the line through the two longest known is followed to the limit, and each compile is one more known. Raises
    UserError where none of `most` compiles fits.
    """
    known = dict(known)
    fitting: dict[str, int] = {}
    for _ in range(most):
        (less, small), (more, large) = sorted(known.items())[-2:]
        if large <= small:
            break
        tokens = int((more + (limit - large) * (more - less) / (large - small)) / unit) * unit
        while tokens in known:
            tokens -= unit
        known[tokens] = total(tokens)
        if known[tokens] <= limit and tokens > fitting.get("tokens", 0):
            fitting = {"tokens": tokens, "total": known[tokens]}
        if 0.95 * limit < known[tokens] <= limit:
            break
    if not fitting:
        raise UserError(f"{most} compiles, down to {min(known):,} tokens, found no length that fits")
    return fitting


def reason(error: Exception) -> str:
    """In one line: what a validator says first, or the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = [line for line in lines if line.startswith("Value error, ")] or lines
    return re.sub(r"^Value error, | \[type=.*", "", said[0])[:200]
