"""`python -m ringbpt.plan <flags of ringbpt.train> --topology=v4-512`: does it fit, and how long will a step take?

The train step of that run is compiled ahead of time for a machine that need not be here, and nothing is allocated:
memory by name, arithmetic, transfers by mesh axis, whether every hop of the ring hides, and a bracket of the time.

    --topology=v4-512    v4-8 ... v4-4096, v5p-N, v5e-N, v6e-N, 8xa100-80g, 4x8xh100 (nodes x GPUs), h200, cpu-8
    --find=seq_length    the largest value that fits: seq_length, batch_size, or sp (the smallest that fits)
    --suggest            a few changes that make it fit or go faster, each with its own compiled figures
    --json=FILE          the report as JSON
    --png=FILE           a picture of the memory
"""

import json
import sys
from pathlib import Path
from typing import Any

from ringbpt.config import UserError, help_text, parse, parse_args, read_value, run_main

OWN_FLAGS = {"topology": str, "find": str, "suggest": bool, "json": str, "png": str}


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{help_text('plan')}")
        return 0
    own, argv = own_flags(argv)
    if not own.get("topology"):
        raise UserError("--topology is missing: the machine to plan for, as --topology=v4-512, 8xh100 or cpu-8")
    for name in ("json", "png"):
        if own.get(name) and not Path(own[name]).resolve().parent.is_dir():
            raise UserError(f"--{name}={own[name]}: there is no folder {Path(own[name]).parent}: make it first")
    tree = parse_args(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever is here, nothing runs on it
    kind, _, count = own["topology"].lower().rpartition("-")
    if kind == "cpu" and count.isdigit() and 0 < int(count) <= 4096:
        jax.config.update("jax_num_cpu_devices", int(count))
    from ringbpt.planning.report import draw, make_plan, suggestion, table
    from ringbpt.planning.search import find, suggest
    from ringbpt.planning.topologies import topology

    machine = topology(own["topology"])
    config = parse(tree, len(machine.devices))
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    plan = find(tree, machine, own["find"], say) if own.get("find") else make_plan(config, machine)
    report = plan.as_dict()
    print(table(report))
    if own.get("suggest"):
        print("\nwith                                                      total    a step, s")
        for flags, other in suggest(tree, machine):
            print(suggestion(flags, other), flush=True)
    if own.get("json"):
        Path(own["json"]).write_text(json.dumps(report, indent=1) + "\n")
    if own.get("png"):
        draw(report, Path(own["png"]))
    return 0 if plan.fits else 1


def own_flags(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(this verb's own flags, read; the words that are ringbpt.train's). Both --name=value and --name value."""
    own: dict[str, Any] = {}
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OWN_FLAGS:
            rest.append(word)
            continue
        if not equals and OWN_FLAGS[name] is bool:
            text = "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=...")
            text = words.pop(0)
        if name in own:
            raise UserError(f"--{name} is given twice, the second time as '{text}': leave one of them out")
        own[name] = read_value(f"--{name}", text, OWN_FLAGS[name], None)
    return own, rest


if __name__ == "__main__":
    sys.exit(run_main(main))
