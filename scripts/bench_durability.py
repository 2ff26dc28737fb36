"""What durability costs a step: guards against none, taking turns in one run, and how long a save holds the loop up.

  python scripts/bench_durability.py [--steps=40] [--saves=20] [--json=FILE] [--name=value ...]

The guards are the select that skips a step that is no number and, spread over its interval, the comparison of
replicas. A save is what the loop does of it: the copies that leave the devices; the rest is another thread's.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ringbpt.config import JSON, Flag, json_to, parse, parse_args, printed_help, run_main, split_flags

FLAGS = {
    "steps": Flag(int, 40, "timed steps of each kind", at_least=4),
    "saves": Flag(int, 20, "timed saves", at_least=3),
    "json": JSON,
}


def main(argv: list[str]) -> int:
    if printed_help(argv, "train", __doc__, FLAGS):
        return 0
    asked, argv = split_flags(argv, FLAGS)
    tree = parse_args(argv)
    from ringbpt.mesh import start_jax

    config = parse(tree, start_jax(tree))
    with json_to(asked["json"]) as write:
        report = measure(config, asked["steps"], asked["saves"])
        ms = {name: report[f"{name}_seconds"] * 1e3 for name in ("step", "save")}
        print(f"step {ms['step']:.1f} ms; guards {report['guards_share']:+.2%} of it, ", end="")
        print(f"replicas {report['replicas_share']:.2%}")
        print(
            f"save {ms['save']:.1f} ms of the loop's, {report['save_share']:.2%} of a step (median of {asked['saves']})"
        )
        write(json.dumps(report, indent=2) + "\n")
    return 0


def measure(config, steps: int, saves: int) -> dict[str, float]:
    import jax

    from ringbpt.checkpoint.checkpointer import Checkpointer
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.mesh import make_mesh
    from ringbpt.model.llama import Model
    from ringbpt.objectives import objective_of
    from ringbpt.training.loop import _put, loader_of
    from ringbpt.training.replicas import Replicas
    from ringbpt.training.run import entries
    from ringbpt.training.state import StateLayout
    from ringbpt.training.step import make_train_step

    loader = loader_of(config, make_tokenizer(config.tokenizer))
    kinds = {}
    for name in ("guarded", "plain"):
        own = replace(config, guard=replace(config.guard, skip=name == "guarded"))
        layout = StateLayout(own, Model.of(own, make_mesh(own.mesh_shape)))
        kinds[name] = [make_train_step(layout, objective_of(own)), layout.start(layout.model.init(jax.random.key(0)))]
    batches = [_put(layout.model, loader, number) for number in range(4)]

    def step(name: str, number: int) -> float:
        program, state = kinds[name]
        start = time.perf_counter()
        kinds[name][1], metrics = program(state, batches[number % len(batches)])
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    for name in kinds:
        for number in range(3):  # compiled, and warm
            step(name, number)
    times = {name: [] for name in kinds}
    for number in range(steps):  # each in turn the first
        for name in sorted(kinds, reverse=bool(number % 2)):
            times[name].append(step(name, number))
    replicas = Replicas(layout.model.mesh, jax.tree.map(lambda s: s.spec, layout.shardings.trained))
    compared = []
    for _ in range(5):
        start = time.perf_counter()
        replicas.check(replicas.send(kinds["guarded"][1].trained), 0)
        compared.append(time.perf_counter() - start)
    held, while_saving = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder) / "checkpoints")
        whole = replace(config.checkpointer, save_optimizer_state=True)
        for number in range(saves):
            checkpointer.wait()
            step("guarded", number)
            start = time.perf_counter()
            checkpointer.save(number, {**entries(kinds["guarded"][1], whole), "meta": {}}, milestone=False)
            held.append(time.perf_counter() - start)
            while_saving.append(step("guarded", number))
        checkpointer.close()
    seconds = statistics.median(times["guarded"])
    shares = [a / b - 1 for a, b in zip(times["guarded"], times["plain"], strict=True)]
    return {
        "step_seconds": seconds,
        "guards_share": statistics.median(shares),
        "replicas_share": statistics.median(compared) / max(1, config.guard.replicas) / seconds,
        "save_seconds": statistics.median(held),
        "save_share": statistics.median(held) / seconds,
        "step_while_saving": statistics.median(while_saving),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
