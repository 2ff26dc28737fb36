"""After which step a run saves or stops: by a clock and by a signal, and the same on two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ringbpt.ending import INTERRUPTED, PREEMPTED
from ringbpt.train import goes_on
from ringbpt.training.agreement import MOST_STEPS, Agreement, Pace, Wish


def test_the_clock_of_one_process():
    now, told = [0.0], [0]
    agreement = Agreement(10, lambda: told[0], lambda: now[0])
    wishes = []
    for minute in (0, 5, 9.9, 10, 10.5):  # saved after that of ten minutes
        now[0] = minute * 60
        wishes.append(agreement.after(len(wishes)))
        if wishes[-1]:
            agreement.saved()
    assert wishes == [Wish.GO_ON, Wish.GO_ON, Wish.GO_ON, Wish.SAVE, Wish.GO_ON]
    now[0] += 3600
    assert Agreement(0, lambda: 0, lambda: now[0]).after(1) is Wish.GO_ON
    told[0] = PREEMPTED
    assert agreement.after(9) is Wish.STOP and Wish.STOP.code == PREEMPTED
    told[0] = INTERRUPTED
    assert agreement.after(9) is Wish.INTERRUPT and Wish.INTERRUPT.code == INTERRUPTED
    assert Wish.GO_ON.code == Wish.SAVE.code == 0


def test_a_run_that_goes_on_asks_soon():
    """At step 1,500 of another start, whose steps take ten seconds: it took the 1,500 for its own, and did not ask for
    a hundred more, however long; SIGTERM was not heard for so long.
    """
    pace = Pace()
    assert [pace.steps_apart(1500 + step, 10.0 * step) for step in (0, 1, 2)] == [1, 1, 1]
    assert [Pace().steps_apart(step, 5.0) for step in (0, 1, 10**6)] == [1, 1, 1]
    quick = Pace()
    assert [quick.steps_apart(step, 0.01 * step) for step in (0, 1, 101, 201)] == [
        1,
        MOST_STEPS,
        MOST_STEPS,
        MOST_STEPS,
    ]
    quick = Pace()
    assert [quick.steps_apart(step, 0.1 * step) for step in (0, 1, 21)] == [1, 20, 20]


def test_the_command_that_goes_on():
    more = "--autoresume --logger.experiment_id=x"
    train = "python -m ringbpt.train"
    assert goes_on(["--seed=1", "--mesh_dim", "1,1,1,8"], "x") == f"{train} --seed=1 --mesh_dim 1,1,1,8 {more}"
    assert goes_on(["--seed=1", "--logger.experiment_id", "x", "--noautoresume"], "x") == f"{train} --seed=1 {more}"
    assert (
        goes_on(["--update_llama_config=dict(a='b')"], "x").split(" ")[3].startswith("'--update_llama_config=dict(a=")
    )
    assert goes_on([], "x") == f"{train} --config=configs/debug.py {more}"  # what no flags at all mean


# Trains nothing: a program of both processes stands for a step, of a hundredth of a second by a clock of its own, and
# process 1 is interrupted after step 250. It prints what came of it.
PROCESS = """
import json, sys
import jax, numpy as np
number = int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, number)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ringbpt.training.agreement import Agreement, Wish
mesh = Mesh(np.array(jax.devices()), "all")
step = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
ones = jax.make_array_from_callback((4,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(1))
found, pending, done = [], None, 0
# Process 0's clock alone counts: that of process 1 runs ten times as fast.
agreement = Agreement(1.5 / 60, lambda: 75 * (number == 1 and done > 250), lambda: done * 0.01 * 10**number)
for done in range(1, 1000):
    result = step(ones)
    assert pending is None or float(pending) == 4
    pending, wish = result, agreement.after(done)
    if wish:
        found.append((done, wish.name))
        agreement.saved()
    if wish is Wish.STOP:
        break
print(json.dumps(found), flush=True)
"""


# What tests/test_train_cli.py does with a real run, by clocks that are known.
@pytest.mark.slow
def test_two_processes_save_and_stop_after_the_same_step():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    first, second = (json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs)
    assert first == second
    (saved, save), (stopped, stop) = first
    assert (save, stop) == ("SAVE", "STOP") and 150 < saved <= 255 and 250 < stopped <= 355
