"""`python -m ringbpt.autotune`: measures block sizes of attention on the device that is here, and keeps the best.

Forward and backward are timed apart, causal, for each head dim; the table that every run reads
(ringbpt/attention/local/block_sizes.json) gets the fastest of each as they are found, so that a run that is stopped
keeps what it has.
"""

import faulthandler
import re
import time
from datetime import date
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from ringbpt.attention.api import FASTEST, LOCALS
from ringbpt.attention.local import block_sizes
from ringbpt.bench import AUTOTUNE_FLAGS as FLAGS
from ringbpt.bench.kernels import Problem, own_arguments, own_programs, seconds
from ringbpt.config import UserError, printed_help, read_flags, say
from ringbpt.model.llama import COMPUTE_DTYPES

TUNABLE = ("blockwise", "pallas_tpu", "pallas_triton")  # those that read the table
BLOCKS = {"pallas_triton": "32,64,128"}  # what fits a GPU's registers; of the others:
MOST_BLOCKS = "128,256,512,1024"


def _numbers(name: str, text: str, default: str) -> list[int]:
    words = (text or default).split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in words):
        raise UserError(f"--{name}={text} is no list of numbers: --{name}={default}")
    return [int(word) for word in words]


def measure(kernel: str, problem: Problem, blocks: list[int], dtype: Any, until: float, write: bool) -> dict[str, Any]:
    """The table's entry for one head dim: the fastest sizes, forward and backward; {} where there was no time for any.

    Sizes that do not run are said. until: of time.monotonic. write: into the table, as the entry gets better.
    """
    device, head_dim = jax.devices()[0], problem.head_dim
    row_name = block_sizes.row_name(device.device_kind)
    arguments = own_arguments(problem, *problem.inputs(dtype))
    best: dict[str, tuple[float, list[int]]] = {}
    entry: dict[str, Any] = {}
    todo = list(product([b for b in blocks if b <= problem.length], repeat=2))
    for number, sizes in enumerate(todo):
        if time.monotonic() > until:
            say(f"  {head_dim}: left out, for want of time: {', '.join(map(str, todo[number:]))}")
            return entry
        row = block_sizes.table().setdefault(kernel, {}).setdefault(row_name, {})
        row[str(head_dim)] = {"forward": list(sizes), "backward": list(sizes)}  # what a kernel reads when it is traced
        programs = own_programs(LOCALS[kernel](device, None, None), problem.spec)
        for way, program in zip(("forward", "backward"), programs, strict=True):
            try:
                spent = seconds(program, arguments)
                if way == "forward":
                    arguments[4:6] = program(*arguments)
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                say(f"  {head_dim} {way} {sizes}: {str(error).splitlines()[0][:100]}")
                break  # without a forward there is no backward
            say(f"  {head_dim} {way} {sizes}: {spent * 1e3:.3f} ms")
            best[way] = min(best.get(way, (spent, list(sizes))), (spent, list(sizes)))
        if len(best) == 2:
            source = (
                f"measured {date.today()}, jax {jax.__version__}, {problem.length} tokens, "
                f"{jnp.dtype(dtype).name}, the best of {number + 1} tried"
            )
            entry = {way: sizes for way, (_, sizes) in best.items()} | {"from": source}
            if write:
                block_sizes.write({kernel: {row_name: {str(head_dim): entry}}})
    if not entry:
        raise UserError(f"--blocks={','.join(map(str, blocks))}: none of these sizes runs {kernel} on this device")
    return entry


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    shape = {name: flags[name] for name in ("tokens", "heads", "kv_heads")}
    if shape["heads"] % shape["kv_heads"]:
        raise UserError(f"--kv_heads={shape['kv_heads']} does not divide --heads={shape['heads']}: --kv_heads=1 does")
    device = jax.devices()[0]
    kernel = flags["kernel"] or next(k for k in FASTEST.get(device.platform, TUNABLE) if k in TUNABLE)
    if kernel not in TUNABLE:
        raise UserError(
            f"--kernel={kernel} does not read the table of block sizes; those that do: {', '.join(TUNABLE)}"
        )
    blocks = _numbers("blocks", flags["blocks"], BLOCKS.get(kernel, MOST_BLOCKS))
    head_dims = _numbers("head_dim", flags["head_dim"], FLAGS["head_dim"].default)
    say(f"{kernel} on {device.device_kind}: {shape}")
    until = time.monotonic() + flags["budget_s"]

    # A kernel that hangs ends the run; what was measured is in the table.
    faulthandler.dump_traceback_later(flags["budget_s"] + 50, exit=True, file=2)
    try:
        for head_dim in sorted(head_dims):
            problem = Problem(shape["tokens"], head_dim, shape["heads"], shape["kv_heads"])
            entry = measure(
                kernel, problem, blocks, COMPUTE_DTYPES[flags["dtype"]], until, write=not flags["print_only"]
            )
            say(f"{head_dim}: {entry or 'left out'}")
    except NotImplementedError as refusal:
        raise UserError(f"--kernel={kernel}: {refusal}") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    print("nothing written" if flags["print_only"] else f"written: {block_sizes.FILE}")
    return 0
