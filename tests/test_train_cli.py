"""`python -m ringbpt.train` as users run it: the original's commands, bad input, signals, and two processes."""

import argparse
import inspect
import json
import math
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from ringbpt.checkpoint.store import StoredStep
from ringbpt.mesh import start_jax
from ringbpt.training.metrics import read_rows

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "ringbpt.train"]
SECONDS_TO_REFUSE = 5  # beyond the import of jax
TEXT = inspect.getsource(argparse)
DOCUMENTS = [TEXT[i : i + 1000] for i in range(0, 40_000, 1000)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A SentencePiece model and JSONL files, good and bad."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("files")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:40_000].splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    good = [json.dumps({"text": document}) for document in DOCUMENTS]
    (folder / "data.jsonl").write_text("\n".join(good) + "\n")
    (folder / "malformed.jsonl").write_text("\n".join([*good[:2], '{"text": "no end', *good[2:]]) + "\n")
    (folder / "empty.jsonl").write_text("")
    return folder


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "RINGBPT_CACHE": str(folder / "cache")}


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [*TRAIN, *flags, f"--logger.output_dir={folder / 'runs'}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, check=False, timeout=600
    )


# ---------------------------------------------------------------------------------------------- the original's commands

# The manual's words -> what a laptop can do; everything else in the commands stays as it is.
SMALLER = {
    "1,64,4,1": "1,2,4,1",
    "1,1,4,64": "1,1,2,4",
    "--total_steps=480000": "--total_steps=3",
    "'13b'": "'debug'",
    "'7b'": "'debug'",
    "max_sequence_length=32768": "max_sequence_length=256",
    "max_sequence_length=2097152": "max_sequence_length=256",
    "seq_length=32768": "seq_length=256",
    "seq_length=2097152": "seq_length=256",
    "batch_size=64": "batch_size=2",
    "scan_query_chunk_size=2048": "scan_query_chunk_size=32",
    "scan_key_chunk_size=4096": "scan_key_chunk_size=64",
    "scan_mlp_chunk_size=2048": "scan_mlp_chunk_size=32",
    "tokenizer_processes=16": "tokenizer_processes=2",
}
COMMANDS = re.findall(
    r"^python3 -m ringbpt\.train.*?[^\\]$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_the_manual_has_both_commands():
    assert [re.findall(r"attention_type='(\w+)'", command) for command in COMMANDS] == [
        ["blockwise"],
        ["ring_blockwise"],
    ]


# Both go the same way but for the ring: one is slow.
@pytest.mark.parametrize(
    "command", [pytest.param(COMMANDS[0], marks=pytest.mark.slow), COMMANDS[1]], ids=["BPT", "Ring Attention"]
)
def test_an_originals_command_trains(files, tmp_path, command):
    for full, small in SMALLER.items():
        command = command.replace(full, small)
    for name in re.findall(r"<([\w.]+)>", command):
        assert (files / name).exists()
        command = command.replace(f"<{name}>", str(files / name))
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python3", "-m", "ringbpt.train"]
    done = run(tmp_path, *words[3:], "--num_cpu_devices=8")
    assert (done.returncode, done.stderr) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert done.stdout.rstrip().endswith(f"done: {run_dir}")
    (row,) = read_rows(run_dir / "metrics.jsonl")  # log_freq=200: the last step alone
    assert row["step"] == 3 and 0 < row["loss"] < math.log(32000) + 1
    assert (run_dir / "checkpoints" / "3" / "opt_state").is_dir()
    assert (run_dir / "loss.png").exists()


@pytest.mark.slow
def test_virtual_devices_wait_for_each_other_for_minutes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    start_jax(ConfigDict({"num_cpu_devices": 8, "jax_distributed": {"initialize_jax_distributed": False}}))
    assert os.environ["XLA_FLAGS"].split()[1] == "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def test_a_mesh_is_enough(tmp_path):
    done = run(tmp_path, "--mesh_dim=1,1,1,8", "--num_cpu_devices=8", "--total_steps=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ring_blockwise, zigzag layout" in done.stdout and "done: " in done.stdout


# ---------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def seconds_to_import_jax(files, tmp_path_factory) -> float:
    """In a fresh environment the first process that imports a module byte-compiles it: one does, before any counts."""
    run(tmp_path_factory.mktemp("warm"), *words_of("malformed line", files))
    return cpu_seconds(lambda: subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True))[0]


def cpu_seconds(call):
    """(seconds, result): processor time of the child processes; the tests share the machine, so not the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, result


SMALL = (
    "--load_llama_config=debug --llama.vocab_size=400 --mesh_dim=1,1,1,1 "
    "--tokenizer.vocab_file={files}/tokenizer.model "
    "--train_dataset.text_processor.fields=text --train_dataset.json_dataset.path={files}/data.jsonl "
    "--train_dataset.json_dataset.seq_length=64 --train_dataset.json_dataset.batch_size=2"
)
BAD = {
    "unknown flag": ("--totl_steps=3", ("--totl_steps", "--total_steps?")),
    "mesh product": ("--mesh_dim=1,2,1,1", ("--mesh_dim='1,2,1,1'", "'1,1,1,1' fits")),
    "mesh that divides nothing": (
        "--mesh_dim=1,1,1,3 --num_cpu_devices=3 --llama.attention_type=ring_blockwise",
        ("--llama.hidden_size=128", "sp=2 or sp=4"),
    ),
    "seq_length": (
        "--mesh_dim=1,1,1,4 --num_cpu_devices=4 --llama.attention_type=ring_blockwise "
        "--train_dataset.json_dataset.seq_length=66",
        ("--train_dataset.json_dataset.seq_length=66", "=64", "=68"),
    ),
    "no tokenizer": ("--tokenizer.vocab_file={files}/tokeniser.model", ("{files}/tokenizer.model",)),
    "empty data": ("--train_dataset.json_dataset.path={files}/empty.jsonl", ("{files}/empty.jsonl:1: ",)),
    "malformed line": ("--train_dataset.json_dataset.path={files}/malformed.jsonl", ("{files}/malformed.jsonl:3: ",)),
    "ids above the vocabulary": ("--llama.vocab_size=200", ("--llama.vocab_size=200", "--llama.vocab_size=400 works")),
    "no checkpoint": ("--load_checkpoint=params::{files}/none", ("--load_checkpoint=params::{files}/none: no such",)),
}


# Those that are said last, when most has been imported; the others' words are tested in this process, too, by
# test_bad_input.py.
LAST = ("no tokenizer", "malformed line", "ids above the vocabulary")


def words_of(case: str, files: Path) -> list[str]:
    words = f"{SMALL} {BAD[case][0]}".format(files=files).split()
    return [*{word.partition("=")[0]: word for word in words}.values()]


@pytest.mark.parametrize("case", [case if case in LAST else pytest.param(case, marks=pytest.mark.slow) for case in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, seconds_to_import_jax, case):
    _, fragments = BAD[case]
    seconds, done = cpu_seconds(lambda: run(tmp_path, *words_of(case, files)))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
    for fragment in fragments:
        assert fragment.format(files=files) in done.stderr
    assert not (tmp_path / "runs").exists()
    assert seconds < seconds_to_import_jax + SECONDS_TO_REFUSE


@pytest.mark.parametrize("flag", ["--jax_distributed.num_processes=2", "--jax_distributed.local_device_ids=a"])
def test_processes_that_cannot_meet_are_one_line(tmp_path, flag):
    done = run(tmp_path, "--jax_distributed.initialize_jax_distributed", flag)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --jax_distributed")


# ---------------------------------------------------------------------------------------------- signals, two processes

PROCESSES, DEVICES = 2, 4
# Runs the command in its arguments, then prints which rows it asks the loader for where dp is over the processes.
TRAIN_AND_COUNT = """
import sys
from ringbpt.config import run_main
from ringbpt.train import main
code = run_main(main)
import json, jax, numpy as np
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.types import Batch
asked = []
def rows(start, stop):
    asked.append((start, stop))
    return Batch(*[np.zeros((stop - start, 8), np.int32)] * 5)
put_batch(rows, (4, 8), make_mesh((2, 1, 1, 2)), "zigzag")
print(json.dumps({"process": jax.process_index(), "asked": asked}), flush=True)
sys.exit(code)
"""
SPLITS = ("train_dataset.python_dataset", "eval_dataset.python_dataset")
DEBUG = [
    *("--config=configs/debug.py", "--mesh_dim=1,1,1,4", "--log_freq=1", "--eval_steps=2", "--eval_batches=1"),
    "--update_llama_config=dict(hidden_size=32,intermediate_size=64,num_hidden_layers=1,scan_mlp=False)",
    *(f"--{split}.{size}" for split in SPLITS for size in ("seq_length=64", "batch_size=4")),
    *(f"--{split}.path={Path(json.__file__).parent}" for split in SPLITS),  # a few files of the library
    *("--eval_dataset.python_dataset.split=all", "--llama.remat_block=", "--llama.attention_type=ring_standard"),
]
FULL = ("--checkpointer.save_optimizer_state",)
ENDLESS = "--total_steps=1000000"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until(process: subprocess.Popen, steps: int) -> list[str]:
    """What it says, up to so many lines of steps."""
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if len([line for line in said if line.startswith("step") and "held-out" not in line]) >= steps:
            break
    return said


def numbers(run_dir: Path, last: int) -> list[dict]:
    """The rows up to a step, one each, and held-out ones."""
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row["step"] <= last]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, last + 1))
    return rows


def test_a_signal_to_one_process_stops_both_and_their_numbers_are_those_of_one(tmp_path):
    """Four starts that share their work: two processes with two devices each, with the ring going round both, of which
    one is told SIGTERM; one with four devices, whose output is closed at its third line; and one that goes on from
    the checkpoint of the two, until Ctrl-C.
    """
    runs = tmp_path / "with a space"
    together = [
        *(*DEBUG, ENDLESS, f"--logger.output_dir={runs}", "--logger.experiment_id=two", "--save_minutes=0.005"),
        *(f"--num_cpu_devices={DEVICES // PROCESSES}", "--jax_distributed.initialize_jax_distributed"),
        *(
            f"--jax_distributed.num_processes={PROCESSES}",
            f"--jax_distributed.coordinator_address=localhost:{free_port()}",
        ),
    ]
    both = [
        start(tmp_path, "-c", TRAIN_AND_COUNT, *together, f"--jax_distributed.process_id={number}")
        for number in range(PROCESSES)
    ]
    try:
        said = "".join(lines_until(both[0], 3))
        both[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=200) for process in both]
    finally:
        for process in both:
            process.kill()
    begin = r"preempted: saved step (\d+); go on with (python -m ringbpt\.train .*)\n"
    ends = [re.fullmatch(begin, stderr) for _, stderr in outputs]
    assert [process.returncode for process in both] == [75, 75] and all(ends), outputs
    assert ends[0][1] == ends[1][1]
    last = int(ends[0][1])
    step = StoredStep(runs / "two" / "checkpoints" / str(last))
    assert last >= 3 and {"params", "opt_state"} <= step.trees
    # The second process says nothing of steps, and each asks for the rows of its own devices alone.
    asked = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    assert asked == [{"process": 0, "asked": [[0, 2]]}, {"process": 1, "asked": [[2, 4]]}]
    assert "step       3/" in said and "step       3/" not in outputs[1][0]

    words = (*DEBUG, f"--num_cpu_devices={DEVICES}", f"--logger.output_dir={runs}")
    one = start(tmp_path, *TRAIN[1:], *words, "--logger.experiment_id=one", f"--total_steps={last}", *FULL)
    try:
        assert one.stdout is not None
        [one.stdout.readline() for _ in range(3)]
        one.stdout.close()
        assert (one.wait(200), one.stderr.read()) == (0, "")
    finally:
        one.kill()
    for found, wanted in zip(numbers(runs / "two", last), numbers(runs / "one", last), strict=False):
        for key in ("step", "loss", "eval_loss", "gradient_norm", "param_norm"):
            assert found.get(key) == pytest.approx(wanted.get(key), abs=1e-5), (wanted["step"], key)
    other = StoredStep(runs / "one" / "checkpoints" / str(last))
    for name in ("embed", "layers.w_q"):
        np.testing.assert_allclose(*(each.read("params", name) for each in (step, other)), rtol=0, atol=1e-5)

    more = start(
        tmp_path,
        *TRAIN[1:],
        *[word for word in words if "eval_steps" not in word],
        ENDLESS,
        "--logger.experiment_id=two",
        "--autoresume",
        "--eval_steps=0",
    )
    try:
        said = "".join(lines_until(more, 2))
        more.send_signal(signal.SIGINT)
        _, stderr = more.communicate(timeout=200)
    finally:
        more.kill()
    end = re.fullmatch(begin.replace("preempted", "interrupted"), stderr)
    assert more.returncode == 130 and end, stderr
    assert f"{runs / 'two'}, from step {last}\n" in said and int(end[1]) >= last + 2
    numbers(runs / "two", int(end[1]))
    assert (runs / "two" / "loss.png").exists()
    flags = shlex.split(end[2])
    assert flags.count("--autoresume") == 1 and f"--logger.output_dir={runs}" in flags
