"""`python -m ringbpt.train` as users run it: the original's commands, bad input, Ctrl-C, and two processes."""

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

from ringbpt.checkpoint.store import StoredStep
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


# ---------------------------------------------------------------------------------------------- Ctrl-C


def interrupted(tmp_path: Path, command: list[str], steps: int) -> tuple[str, str]:
    """(stdout up to so many lines of steps, stderr) of a command that is then told Ctrl-C."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and so perhaps these tests, are started with SIGINT ignored, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if len([line for line in said if line.startswith("step")]) >= steps:
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    return "".join(said), stderr


def test_ctrl_c_is_one_line_that_says_how_to_go_on_and_nothing_is_lost(files, tmp_path):
    flags = (*SMALL.format(files=files).split(), "--total_steps=1000000", "--log_freq=1", "--num_cpu_devices=1")
    run_dir = tmp_path / "with a space" / "stopped"
    folder = f"--logger.output_dir={run_dir.parent}", "--logger.experiment_id=stopped"
    _, stderr = interrupted(tmp_path, [*TRAIN, *flags, *folder], 3)
    begin = "interrupted: go on with python -m ringbpt.train "
    assert stderr.startswith(begin) and stderr.count("\n") == 1
    rows = read_rows(run_dir / "metrics.jsonl")
    last = len(rows)
    assert [row["step"] for row in rows] == list(range(1, last + 1)) and last >= 3
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [str(last)]
    assert StoredStep(run_dir / "checkpoints" / str(last)).trees == {"params", "opt_state"}
    assert (run_dir / "loss.png").exists()
    said, stderr = interrupted(tmp_path, [*TRAIN, *shlex.split(stderr.removeprefix(begin))], 2)
    assert f"{run_dir}, from step {last}\n" in said and stderr.startswith(begin)
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > last + 1
    assert shlex.split(stderr.removeprefix(begin)).count("--autoresume") == 1


# ---------------------------------------------------------------------------------------------- two processes

PROCESSES, DEVICES = 2, 4
# Runs the command in its arguments, then prints which rows it asks the loader for where dp is over the processes.
TRAIN_AND_COUNT = """
import sys
from ringbpt.config import run_main
from ringbpt.train import main
assert run_main(main) == 0
import json, jax, numpy as np
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.types import Batch
asked = []
def rows(start, stop):
    asked.append((start, stop))
    return Batch(*[np.zeros((stop - start, 8), np.int32)] * 5)
put_batch(rows, (4, 8), make_mesh((2, 1, 1, 2)), "zigzag")
print(json.dumps({"process": jax.process_index(), "asked": asked}), flush=True)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_are_one_run(tmp_path):
    """Two processes with two devices each, with the ring going round both: the losses of one with four devices."""
    splits = ("train_dataset.python_dataset", "eval_dataset.python_dataset")
    debug = [
        *("--config=configs/debug.py", "--mesh_dim=1,1,1,4", "--total_steps=4", "--log_freq=1", "--eval_steps=2"),
        *("--eval_batches=1", "--update_llama_config=dict(hidden_size=32,intermediate_size=64,scan_mlp=False)"),
        *(f"--{split}.{size}" for split in splits for size in ("seq_length=64", "batch_size=4")),
        *(f"--{split}.path={Path(json.__file__).parent}" for split in splits),  # a few files of the library
        *("--eval_dataset.python_dataset.split=all", "--llama.remat_block=", "--llama.attention_type=ring_standard"),
        *("--save_model_freq=2", "--save_minutes=1e-9", "--checkpointer.save_optimizer_state"),
    ]
    together = [
        *debug,
        *(f"--logger.output_dir={tmp_path / 'runs'}", "--logger.experiment_id=two"),
        f"--num_cpu_devices={DEVICES // PROCESSES}",
        *("--jax_distributed.initialize_jax_distributed", f"--jax_distributed.num_processes={PROCESSES}"),
        f"--jax_distributed.coordinator_address=127.0.0.1:{free_port()}",
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_AND_COUNT, *together, f"--jax_distributed.process_id={number}"],
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    alone = run(tmp_path, *debug, "--logger.experiment_id=one", f"--num_cpu_devices={DEVICES}")
    assert alone.returncode == 0, alone.stderr
    rows = [read_rows(tmp_path / "runs" / name / "metrics.jsonl") for name in ("two", "one")]
    for two, one in zip(*rows, strict=True):
        for key in ("step", "loss", "eval_loss", "gradient_norm", "param_norm"):
            assert two.get(key) == pytest.approx(one.get(key), abs=1e-6), (one["step"], key)
    assert [path.name for path in (tmp_path / "runs" / "two" / "checkpoints").iterdir()] == ["4"]
    steps = [StoredStep(tmp_path / "runs" / name / "checkpoints" / "4") for name in ("two", "one")]
    assert steps[0].dtypes("opt_state") == steps[1].dtypes("opt_state")
    for name in ("embed", "layers.w_q"):
        np.testing.assert_allclose(*(step.read("params", name) for step in steps), rtol=0, atol=1e-5)
    # The second process says nothing, and each asks for the rows of its own devices alone.
    asked = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    assert asked == [{"process": 0, "asked": [[0, 2]]}, {"process": 1, "asked": [[2, 4]]}]
    assert "step 4/4" in outputs[0][0] and "step 4/4" not in outputs[1][0]
