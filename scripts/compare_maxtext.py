"""docs/peers.md: one train step of Llama-2-7B by this house and by MaxText, both compiled for the same TPUs, not run.

    make peers ARGS="--only='v5p-16 32K'"

Both are compiled by the same jax for the same abstract devices, and one reader reads memory and transfers off both
programs. Each side of a row is a process of its own, and is kept in docs/peers.json as soon as it is known, so that a
night's run can be stopped and gone on with; the page and its picture are written from that file.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from ringbpt.config import Flag, UserError, nearest_name, parse, parse_args, printed_help, read_flags, run_main
from ringbpt.planning.collectives import Transfer, transfers
from ringbpt.planning.hlo import parse as parse_hlo
from ringbpt.planning.overlap import products_meanwhile, ring_hops
from ringbpt.planning.program import Program, compile_program, read_program
from ringbpt.planning.report import size
from ringbpt.planning.topologies import Topology, topology

FLAGS = {
    "only": Flag(str, "", "rows whose name contains this text, as 'v5p-16 32K'"),
    "minutes": Flag(float, 60.0, "a side of a row that compiles for longer is left for another run", above=0),
    "page": Flag(bool, False, "compile nothing: write the page again"),
    "side": Flag(str, "", "of one row alone, ours, theirs or plain: print what is read off it, as JSON"),
}
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
K = 1024
LENGTHS = {"32K": 32 * K, "256K": 256 * K, "1M": 1024 * K}
MACHINES = ("v5p-16", "v5p-128", "v6e-64")
# The name of a strategy here -> of MaxText's. 32 heads can't be dealt to 64 devices, but to fewer, in a ring of such.
STRATEGIES = {"ring": "ring", "all_gather": "all_gather", "ulysses": "ulysses", "ulysses_ring": "usp"}
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
OURS = [
    "--load_llama_config=7b",
    "--dtype=bf16",
    "--llama.attention_type=ring_blockwise",
    "--llama.remat_block=nothing_saveable",
    "--llama.scan_mlp",
    "--llama.scan_mlp_chunk_size=4096",
    "--train_dataset.json_dataset.batch_size=1",
]
# Attention in groups of heads, where not the heads are what is dealt out.
GROUPS = {"ring": ["--llama.kv_heads_at_a_time=8"], "all_gather": ["--llama.kv_heads_at_a_time=8"]}
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


def sides(name: str) -> list[str]:
    """Which a row has: MaxText's defaults where their memory is another, in a ring."""
    return [side for side in SIDES if side != "plain" or (name.endswith(" ring") and LONGEST not in name)]


def our_flags(machine: str, count: int, length: int, strategy: str) -> list[str]:
    """The run's flags for the machine, which has so many devices."""
    sizes = [f"--train_dataset.json_dataset.seq_length={length}", f"--llama.max_sequence_length={length}"]
    degree = [f"--llama.ulysses_degree={DEGREES[machine]}"] if strategy == "ulysses_ring" else []
    dealt = [f"--mesh_dim=1,1,1,{count}", f"--llama.sequence_parallel={strategy}", *degree]
    return [*OURS, *GROUPS.get(strategy, []), *sizes, *dealt]


def ours(machine: Topology, length: int, strategy: str) -> tuple[Program, tuple[int, ...], tuple[str, ...]]:
    """(the step as the loop runs it, the shape of its mesh, the names of the mesh's axes)."""
    count = len(machine.devices)
    config = parse(parse_args(our_flags(machine.name, count, length, strategy)), count)
    return compile_program(config, machine), tuple(config.mesh_shape), config.mesh_shape._fields


def theirs(
    machine: Topology, length: int, strategy: str, tuned: bool = True
) -> tuple[Program, tuple[int, ...], tuple[str, ...]]:
    """The same of MaxText, which makes its step as its own train_compile does, for our devices."""
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile says
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    import maxtext
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    count = len(machine.devices)
    dealt = DEGREES[machine.name] if strategy == "ulysses_ring" else 1
    blocks = [f"{name}={min(BLOCK, length // count)}" for name in BLOCKS]
    asked = [
        f"compile_topology={machine.name}",
        f"max_target_length={length}",
        f"per_device_batch_size={1 / count}",
        f"ici_context_parallelism={count // dealt}",
        f"ici_context_usp_ulysses_parallelism={dealt}",
        f"context_parallel_strategy={STRATEGIES[strategy]}",
        f"context_parallel_load_balance={strategy != 'ulysses'}",  # which refuses it: a device has the whole sequence
        *([*TUNED, *blocks] if tuned else []),
    ]
    config = pyconfig.initialize(["", f"{Path(maxtext.__file__).parent}/configs/base.yml", *THEIRS, *asked])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config, machine.devices), config.mesh_axes)
    (state, batch), _, of_state, _, model = train_compile.get_shaped_inputs(mesh, config)
    of_params, of_state = sharding.maybe_update_params_sharding_with_opt(config, of_state)
    of_batch = sharding.get_input_data_sharding(config, mesh)
    step, in_shardings, out_shardings, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step, of_batch, of_state, model, config, of_params
    )
    rules = logical_axis_rules(config.logical_axis_rules)
    with jax.set_mesh(mesh), rules:
        jitted = jax.jit(
            step, in_shardings=in_shardings, out_shardings=out_shardings, static_argnums=static, donate_argnums=donated
        )
        lowered = jitted.lower(state, batch)
    arguments = {"state": _bytes(state, of_state), "batch": _bytes(batch, dict.fromkeys(batch, of_batch))}
    program = read_program(lambda options: lowered.compile(compiler_options=options), arguments, "jit_train_step")
    return program, mesh.devices.shape, tuple(mesh.axis_names)


def _bytes(tree: Any, shardings: Any) -> int:
    """Of a tree of abstract arrays, what one device has."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)  # noqa: E731
    parts = jax.tree.leaves(jax.tree.map(place, tree, shardings))
    return sum(part.size * part.dtype.itemsize for part in parts)


def read(side: str, program: Program, mesh_shape: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, Any]:
    """What the page says of a program; bytes of one device, in one step.

    sent: by axis, kind of transfer and dtype. attention, rest: of these. exposed: of attention and of the rest, what no
    product or kernel is scheduled behind. behind: what is, by its name.
    """
    memory = {"arguments": sum(program.arguments.values()), "total": program.total}
    if not program.text:
        return memory
    module = parse_hlo(program.text)
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
    hops = ring_hops(program.text)
    most = max((hop.bytes for hop in hops), default=0)
    hops = [hop for hop in hops if 100 * hop.bytes > most]  # not those of positions
    counts = {"hops": sum(hop.times for hop in hops), "hidden": sum(hop.times for hop in hops if hop.hidden)}
    return memory | counts | parts | {"exposed": exposed, "sent": dict(sent), "behind": dict(behind)}


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


def compile_side(name: str, side: str, known: dict[str, Any]) -> dict[str, Any]:
    """A side of a row, compiled and read; what it refuses is an answer too."""
    jax.config.update("jax_platforms", "cpu")
    machine_name, length, strategy = name.split()
    machine = topology(machine_name)
    make = {"ours": ours, "theirs": theirs, "plain": partial(theirs, tuned=False)}[side]
    packages = ["jax", "libtpu", *([] if side == "ours" else ["maxtext"])]
    made_by = {"with": ", ".join(f"{package} {version(package)}" for package in packages)}
    points = {LENGTHS[n]: known.get(f"{machine_name} {n} {strategy}", {}).get(side, {}) for n in LENGTHS}
    totals = {tokens: found["total"] for tokens, found in points.items() if "total" in found}
    if length == LONGEST and len(totals) < 2:
        raise UserError(f"--only={name!r} needs two of the lengths of {machine_name} {strategy} first, of {side}")
    try:
        if length == LONGEST:
            total = lambda tokens: make(machine, tokens, strategy)[0].total  # noqa: E731
            return made_by | longest(total, totals, machine.memory or 0, len(machine.devices) * K)
        return made_by | read(side, *make(machine, LENGTHS[length], strategy))
    except Exception as error:
        return made_by | {"refused": reason(error)}


def longest(total: Callable[[int], int], known: dict[int, int], limit: int, unit: int, most: int = 3) -> dict[str, int]:
    """{"tokens", "total"} of a length that fits and is near the longest, a multiple of unit.

    total: bytes of a length, by compiling it; known: of lengths, two or more; limit: bytes. Memory grows by the token:
    the line through the two longest known is followed to the limit, and each compile is one more known.
    """
    known, fitting = dict(known), {}
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


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def cells(found: dict[str, Any] | None) -> list[str]:
    """Of one side: memory, sent in all, by attention, by the rest, exposed, and hops with those that hide."""
    if found is None or "refused" in found:
        return ["" if found is None else "refused", *[""] * 5]
    if "attention" not in found:
        return [f"{_gib(found['total'])}, too much", *[""] * 5]
    sent = found["attention"] + found["rest"]
    exposed = f"{_gib(found['exposed']['attention'])} + {_gib(found['exposed']['rest'])}"
    hops = f"{found['hidden']:,} of {found['hops']:,}" if found["hops"] else "none"
    return [*map(_gib, (found["total"], sent, found["attention"], found["rest"])), exposed, hops]


HEAD = """# Beside MaxText

One train step of Llama-2-7B, one sequence, by this house and by [MaxText](https://pypi.org/project/maxtext/), each
compiled ahead of time for TPUs that were not there: nothing was run, and nothing here is a time. One compiler makes
both for the same devices, and one reader reads both programs. Weights and AdamW are in float32, products in bfloat16;
nothing is kept of a layer but its input; tokens stand in the order by which all devices have the same work. The devices
share the one sequence, and the weights are dealt out over them. The rest of MaxText's settings are its own, but for two
that its runs of long sequences were published with: the queries' gradients in three parts, and blocks of 1,024. Without
them it needs more memory in a ring, as *its defaults* say.
[scripts/compare_maxtext.py](../scripts/compare_maxtext.py) has every flag of both. Made by {versions}.

<!-- test: make -->
```bash
make peers                            # what is missing below, a night of compiling; it goes on where it was stopped
make peers ARGS="--only='v5p-16 32K'"
```

![Memory of a device, and what it sends in a step, here and by MaxText](peers.png)

Of one device, in GiB. *Memory*: as the compiler's own assignment of buffers says, which is what has to fit;
`memory_analysis()` says more of both. *Sent*: in one step; *attention*: keys, values and their gradients; *the rest*:
weights, their gradients, the embedding. *Exposed*: of these two, what no product and no kernel is scheduled behind.
*Hops*: of a ring, and those behind a kernel of attention. All by count: that a kernel lasts as long as its hop is not
said.

| | by | memory | sent | attention | the rest | exposed | hops hidden |
|---|---|---|---|---|---|---|---|"""


def page(known: dict[str, Any]) -> str:
    """The text of docs/peers.md."""
    found = [side for row in known.values() for side in row.values()]
    packages = sorted({package for side in found for package in side["with"].split(", ")})
    lines = HEAD.replace("{versions}", ", ".join(packages)).splitlines()
    rows = [name for name in ROWS if name in known and LONGEST not in name]
    every = [(name, side, known.get(name, {}).get(side)) for name in ROWS for side in sides(name)]
    for name in rows:
        for side in sides(name):
            lines.append(
                f"| {name if side == 'ours' else ''} | {SIDES[side]} | {' | '.join(cells(known[name].get(side)))} |"
            )
    sent = [f"- {name}, {SIDES[side]}: {kinds(found)}" for name, side, found in every if found and "sent" in found]
    far = [
        f"- {name.replace(' longest', ',')}, {SIDES[side]}: {found['tokens']:,} tokens fit, in {size(found['total'])}"
        for name, side, found in every
        if found and "tokens" in found
    ]
    refused = [
        f"- {name}, {SIDES[side]}: {found['refused']}" for name, side, found in every if found and "refused" in found
    ]
    absent = {name: [SIDES[side] for side in sides(name) if side not in known.get(name, {})] for name in ROWS}
    for title, part in (
        ("What is sent", sent),
        ("How long a sequence fits", far),
        ("What is refused", refused),
        ("Not compiled yet", [f"- {name}: {', '.join(by)}" for name, by in absent.items() if by]),
    ):
        if part:
            lines += ["", f"## {title}", "", *part]
    return "\n".join(lines) + "\n"


def kinds(found: dict[str, Any]) -> str:
    """What is sent in which dtype, from a hundredth of all on: "44.0 GiB collective-permute bf16 of attention"."""
    sent = Counter(found.get("sent", {}))
    large = [(what.partition(" ")[2], count) for what, count in sent.most_common() if count > 0.01 * sent.total()]
    return ", ".join(f"{_gib(count)} {what}" for what, count in large)


def draw(known: dict[str, Any], path: Path) -> None:
    """Bars for each row, ours on top: memory on the left; on the right what is sent, the exposed part darker."""
    from matplotlib.figure import Figure

    rows = [name for name in ROWS if any("attention" in side for side in known.get(name, {}).values())]
    figure = Figure(figsize=(11, 1.8 + 0.7 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = (("#155a73", "#8cc4d6"), ("#a8481f", "#ecb79c"), ("#6b6b6b", "#c9c9c9"))
    for offset, (side, by), (dark, light) in zip((-0.27, 0, 0.27), SIDES.items(), colors, strict=True):
        found = {place: known[name].get(side, {}) for place, name in enumerate(rows)}
        found = {place: side for place, side in found.items() if "attention" in side}
        places = [place + offset for place in found]
        exposed = [sum(side["exposed"].values()) / 2**30 for side in found.values()]
        hidden = [
            (side["attention"] + side["rest"]) / 2**30 - e for side, e in zip(found.values(), exposed, strict=True)
        ]
        left.barh(places, [side["total"] / 2**30 for side in found.values()], 0.25, color=light, label=by)
        right.barh(places, exposed, 0.25, color=dark, label=f"{by}: exposed")
        right.barh(places, hidden, 0.25, left=exposed, color=light, label=f"{by}: behind a product or a kernel")
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set_xlabel("GiB of one device")
    right.set_xlabel("GiB that one device sends in a step")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own = read_flags(argv, FLAGS)
    file = DOCS / "peers.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    names = [name for name in ROWS if own["only"] in name]
    if not names:
        raise UserError(
            f"--only={own['only']!r} is in no row's name; did you mean --only={nearest_name(own['only'], ROWS)!r}?"
        )
    if own["side"]:
        if own["side"] not in SIDES or own["only"] not in ROWS:
            raise UserError(f"--side={own['side']}: {', '.join(SIDES)}, of one row: --side=ours --only={names[0]!r}")
        print(json.dumps(compile_side(own["only"], own["side"], known)))
        return 0
    try:
        version("maxtext")
    except PackageNotFoundError:
        if not own["page"]:
            raise UserError("maxtext is not installed here: make peers builds its environment and runs this") from None
    for name in [] if own["page"] else names:
        for side in sides(name):
            if side in known.get(name, {}):
                continue
            command = [sys.executable, __file__, f"--side={side}", f"--only={name}"]
            try:
                done = subprocess.run(
                    command, check=False, stdout=subprocess.PIPE, text=True, timeout=60 * own["minutes"]
                )
                known.setdefault(name, {})[side] = json.loads(done.stdout.splitlines()[-1])
            except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
                print(f"{name}, {side}: left out: {reason(error)}", flush=True)
                continue
            print(f"{name}, {side}: {' | '.join(cells(known[name][side]))}", flush=True)
            file.write_text(json.dumps(known, indent=1) + "\n")
    (DOCS / "peers.md").write_text(page(known))
    draw(known, DOCS / "peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
