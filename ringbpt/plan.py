"""`python -m ringbpt.plan <flags of ringbpt.train> --topology=v4-512`: does it fit, and how long will a step take?

The train step of that run is compiled ahead of time for a machine that need not be here, and nothing is allocated:
memory by name, arithmetic, transfers by mesh axis, whether every hop of the ring hides, and a bracket of the time.
"""

import json
import sys
from dataclasses import asdict, replace

from ringbpt.config import (
    JSON,
    Flag,
    UserError,
    check_folders,
    complain,
    json_to,
    parse,
    parse_args,
    printed_help,
    run_main,
    split_flags,
    user_path,
)

FLAGS = {
    "topology": Flag(str, "", "v4-8, 2xv5p-128 (slices), v6e-N, tpu7x-4x4x4, 4x8xh100 (nodes x GPUs), 72xgb200, cpu-8"),
    "find": Flag(str, "", "the largest value that fits: seq_length, batch_size, or sp (the smallest that fits)"),
    "check_run": Flag(str, "", "a run's metrics.jsonl: does it lie in this plan's bracket?"),
    "suggest": Flag(bool, False, "a few changes that make it fit or go faster, each with its own compiled figures"),
    "json": JSON,
    "png": Flag(str, "", "a picture of the memory"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, "plan", __doc__, FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    if not own["topology"]:
        raise UserError("--topology is missing: the machine to plan for, as --topology=v4-512, 8xh100 or cpu-8")
    check_folders(own, "json", "png")
    tree = parse_args(rest)
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever is here, nothing runs on it
    kind, _, count = own["topology"].lower().rpartition("-")
    if kind == "cpu" and count.isdigit() and 0 < int(count) <= 4096:
        jax.config.update("jax_num_cpu_devices", int(count))
    from ringbpt.planning.check import check, checked, read_run, typical
    from ringbpt.planning.report import draw, make_plan, suggestion, table
    from ringbpt.planning.search import find, suggest
    from ringbpt.planning.topologies import topology

    run = read_run(user_path(own["check_run"])) if own["check_run"] else []
    machine = topology(own["topology"])
    if run and machine.hardware is None:
        raise UserError(f"--check_run: nobody knows the speed of {machine.name}: name the run's machine, as 8xh100")
    config = parse(tree, len(machine.devices))
    with json_to(own["json"]) as write:
        plan = find(tree, machine, own["find"], complain) if own["find"] else make_plan(config, machine)
        plan = replace(plan, pairs=typical(run, "visible_pairs")) if run else plan
        report = plan.as_dict()
        print(table(report))
        found = check(report, run) if run else []
        if found:
            report["run"] = [asdict(each) | {"inside": each.inside} for each in found]
            print(f"\n{checked(found, len(run))}")
        if own["suggest"]:
            print("\nwith                                                      total    a step, s")
            for flags, other in suggest(tree, machine):
                print(suggestion(flags, other), flush=True)
        write(json.dumps(report, indent=1) + "\n")
    if own["png"]:
        draw(report, user_path(own["png"]))
    return 0 if plan.fits and not any(each.inside is False for each in found) else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
