"""Whoever is killed or stopped, and whenever: the same rollouts, the same rewards. Real processes, minutes long."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ringbpt.rollout.http_engine import LOST_SECONDS
from tests.rollout.test_ahead import STALE, base, of, serving, words  # noqa: F401
from tests.rollout.test_rollouts import data, rewards, stored  # noqa: F401
from tests.rollout.test_serve import ROOT, Server
from tests.training.test_loop import flags

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]
SLOWLY = """
import time

def letters(prompt, completion, row):
    time.sleep({})
    return sum(map(str.isalpha, completion)) / 6
"""


def start(folder: Path, *words: str, name: str) -> subprocess.Popen[str]:  # noqa: F811
    where = f"--logger.output_dir={folder}", f"--logger.experiment_id={name}", "--autoresume", "--save_model_freq=2"
    command = [sys.executable, "-m", "ringbpt.train", *flags(*words, *where)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out


def assert_the_same(run: Path, other: Path, served: bool) -> None:
    """To the last bit: rewards, tokens, and the files of rollouts; but a server's log-probabilities have the last digit
    of the batch that they were computed in.
    """
    assert rewards(run) == rewards(other)
    ours, theirs = stored(run), stored(other)
    assert ours.keys() == theirs.keys()
    for name, arrays in ours.items():
        for column, array in arrays.items():
            limit = 1e-4 if served and column in ("rollout_logp", "old_logp") else 0.0
            np.testing.assert_allclose(array, theirs[name][column], rtol=0, atol=limit, err_msg=f"{name} {column}")


def slowly(tmp_path: Path, seconds: float) -> str:
    (tmp_path / "slowly.py").write_text(SLOWLY.format(seconds))
    return f"--rollout.reward={tmp_path}/slowly.py:letters"


@pytest.mark.parametrize("served", (False, True), ids=("own devices", "served, one step off"))
def test_a_run_that_is_killed_ten_times(words, base, tmp_path, served):  # noqa: F811
    rng, words = random.Random(served), (*words, "--total_steps=40")
    with serving(base) as server:
        words = (*words, *((of(server), *STALE) if served else ()))
        ended(start(tmp_path, *words, name="whole"))
        words, kills = (*words, slowly(tmp_path, 0.02)), 0
        while True:
            process = start(tmp_path, *words, name="run")
            if kills == 10:
                break
            assert process.stdout
            for line in process.stdout:
                if line.startswith(("step ", "rollout ")):
                    break
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL, "it was over before: let it have more steps"
            kills += 1
        ended(process)
    assert_the_same(tmp_path / "run", tmp_path / "whole", served)


def test_a_server_that_is_killed_ten_times_and_stopped_three(words, base, tmp_path):  # noqa: F811
    """One of two; each time it comes back, at the same address, with the weights that it began with."""
    words = (*words, *STALE, "--total_steps=80", "--rollout.prompts_per_step=24", "--rollout.max_new_tokens=24")
    with serving(base, "--batch_size=4") as other:
        lost = Server(base, "--tokenizer=bytes", "--batch_size=4")
        port = lost.url.rpartition(":")[2]
        ended(start(tmp_path, *words, of(other), name="whole"))
        run = start(tmp_path, *words, of(lost, other), name="run")
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.extend(run.stdout or ()))
        reading.start()
        while not any(line.startswith("rollout ") for line in said):
            time.sleep(0.1)
        rng, kills, stops = random.Random(0), 0, 0
        try:
            while stops < 3:
                time.sleep(rng.uniform(0.5, 3))
                assert run.poll() is None, "it was over before: let it have more steps"
                if kills < 10:
                    lost.process.kill()
                    lost.process.communicate()
                    lost, kills = Server(base, "--tokenizer=bytes", "--batch_size=4", f"--port={port}"), kills + 1
                else:
                    lost.process.send_signal(signal.SIGSTOP)
                    time.sleep(LOST_SECONDS + 2)
                    lost.process.send_signal(signal.SIGCONT)
                    stops += 1
        finally:
            if stops < 3:
                run.kill()
        run.wait(900)
        reading.join()
        used = lost.ask("/weight_info")[1]["version"]
        lost.process.kill()
        lost.process.communicate()
    assert run.returncode == 0, said[-5:]
    assert_the_same(tmp_path / "run", tmp_path / "whole", served=True)
    assert sum(" again" in line for line in said if line.startswith("http:")) > 5 and used > 0
