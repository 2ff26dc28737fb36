"""The launcher: what ends mean, with processes that import nothing; and, slow, real runs that lose a process."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ringbpt import launch
from ringbpt.config import UserError, run_main
from ringbpt.launch import newest_step, supervise, verdict
from ringbpt.training.metrics import read_rows
from tests.test_train_cli import DEBUG, ENDLESS, FULL, ROOT, TRAIN, environment, free_port, lines_until, start

SIGTERM, SIGINT = int(signal.SIGTERM), int(signal.SIGINT)


@pytest.mark.parametrize(
    ("codes", "asked", "code", "again"),
    [
        ((0, 0), 0, 0, False),
        ((-9, 5), 0, 5, True),
        ((-6, -6), 0, 5, True),  # jax's own abort
        ((75, 75), 0, 75, True),  # somebody else's SIGTERM
        ((75, 5), 0, 5, True),
        ((143, 5), 0, 5, True),
        ((5, 2), 0, 2, False),
        ((4, 5), 0, 4, False),
        ((3, 3), 0, 3, False),
        ((5, 1), 0, 1, False),
        ((0, -9), 0, 5, False),  # done: nothing is left to do again
        ((75, 75), SIGTERM, 75, False),
        ((130, 130), SIGINT, 130, False),
        ((0, 75), SIGTERM, 75, False),
        ((75, -9), SIGTERM, 5, False),
        ((0, 0), SIGTERM, 0, False),
    ],
)
def test_what_ends_mean(codes, asked, code, again):
    assert verdict(dict(enumerate(codes)), asked) == (code, again)


# A rank: `say` on stdout and stderr, then an end of its own, or waiting for a signal that it answers with 75.
RANK = """
import os, signal, sys, time
number, attempt, ends = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
print("out", flush=True); print("the same", file=sys.stderr, flush=True)
print(f"    @     0x7f1b7ed4063{number}  absl::Stack()", file=sys.stderr, flush=True)
end = ends[min(attempt, len(ends) - 1)]
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    print("waiting", flush=True)
    time.sleep(60)
if end.startswith("-"):
    os.kill(os.getpid(), -int(end))
sys.exit(int(end))
"""


def supervised(*ends: str, restarts: int = 2, newest=lambda: -1) -> tuple[int, int]:
    """(the exit code, how often it was started) of processes with these ends, one a start."""
    starts = []

    def commands(attempt: int) -> list[list[str]]:
        starts.append(attempt)
        return [[sys.executable, "-c", RANK, str(number), str(attempt), end] for number, end in enumerate(ends)]

    return supervise(commands, restarts, newest, "command", pause=0.01), len(starts)


def test_restarts_are_bounded_and_said(capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    assert supervised("-9,0", "wait,0") == (0, 2)
    out, err = capfd.readouterr()
    assert out.splitlines().count("out") == 2 and out.splitlines().count("[1] out") == 2  # two starts
    # What both say comes once a start, and no C++ stack.
    assert err.count("the same") == 2 and "absl" not in err
    assert (
        "launch: process 0 was ended by SIGKILL, process 1 was ended by SIGKILL: starting again from the start" in err
    )
    assert supervised("5", "5") == (5, 3)
    assert "--restarts=2 in a row without a new checkpoint, giving up" in capfd.readouterr().err
    steps = iter(range(100))
    assert supervised("75,-6,5,75,5,0", newest=lambda: next(steps)) == (0, 6)  # each start has left a checkpoint
    assert supervised("wait", "2") == (2, 1)


@pytest.mark.parametrize("unbuffered", ["", "1"])  # most containers set it
def test_lines_of_several_come_whole(tmp_path, unbuffered):
    says = (  # some of them longer than a pipe takes in one piece
        "import sys\nfor line in range(500):\n    rest = 'x' * (line % 50 // 49 * 100_000)\n"
        "    print('out', line, rest, flush=True); print('err', line, rest, file=sys.stderr, flush=True)"
    )
    code = (
        "import sys\nfrom ringbpt.launch import supervise\n"
        f"ranks = [[sys.executable, '-c', {says!r}]] * 3\n"
        "sys.exit(supervise(lambda attempt: ranks, 0, lambda: -1, ''))"
    )
    command, told = [sys.executable, "-c", code], environment(tmp_path) | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=True, timeout=60)
    lines = [f"{line} {'x' * (line % 50 // 49 * 100_000)}" for line in range(500)]
    assert sorted(done.stdout.splitlines()) == sorted(f"{p}out {line}" for p in ("", "[1] ", "[2] ") for line in lines)
    said = [re.sub(r"^\[[012]\] ", "", line) for line in done.stderr.splitlines()]
    assert sorted(said) == sorted(f"err {line}" for line in lines)  # once, whoever came first


def test_what_one_process_repeats_is_repeated(capfd):
    says = "import sys\nfor _ in range(3): print('again', file=sys.stderr)"
    assert supervise(lambda attempt: [[sys.executable, "-c", says]], 0, lambda: -1, "") == 0
    assert capfd.readouterr().err == "again\n" * 3


def test_a_signal_is_handed_on_and_ends_it(tmp_path):
    code = (
        "import sys\nfrom ringbpt.launch import supervise\n"
        f"ranks = [[sys.executable, '-c', {RANK!r}, str(number), '0', 'wait'] for number in range(2)]\n"
        "sys.exit(supervise(lambda attempt: ranks, 3, lambda: -1, ''))"
    )
    process = start(tmp_path, "-c", code)
    said = [process.stdout.readline() for _ in range(4)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and sorted(said) == ["[1] out\n", "[1] waiting\n", "out\n", "waiting\n"]


def test_what_the_processes_are_told(monkeypatch, tmp_path):
    told = {}

    def note(commands, restarts, newest, command):
        told.update(first=commands(0), again=commands(1), newest=newest(), restarts=restarts, command=command)
        return 0

    monkeypatch.setattr(launch, "supervise", note)
    (tmp_path / "a" / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "9").mkdir()
    (tmp_path / "a" / "checkpoints" / "20.tmp").mkdir()
    words = [f"--logger.output_dir={tmp_path}", "--logger.experiment_id=a", "--seed=1"]
    assert run_main(launch.main, ["--nproc=2", "--devices_each=2", "--restarts=5", "--", "train", *words]) == 0
    assert told["newest"] == newest_step(tmp_path / "a") == 12 and told["restarts"] == 5
    assert newest_step(tmp_path / "none") == -1
    for number, command in enumerate(told["first"]):
        assert command[1:6] == ["-m", "ringbpt.train", *words]
        assert command[-2:] == [
            f"--jax_distributed.process_id={number}",
            f"--jax_distributed.local_device_ids={2 * number},{2 * number + 1}",
        ]
    addresses = [re.findall(r"coordinator_address=(127\.0\.0\.1:\d+)", " ".join(words)) for words in told["again"]]
    assert (
        addresses[0] == addresses[1] and "--autoresume" in told["again"][0] and "--autoresume" not in told["first"][0]
    )
    launched = "python -m ringbpt.launch --nproc=2 --devices_each=2 --restarts=5 -- train"
    assert told["command"].startswith(f"{launched} {words[0]} --seed=1 --autoresume")
    # Without a name each start would be a run of its own.
    assert run_main(launch.main, ["--", "train"]) == 0
    assert any(word.startswith("--logger.experiment_id=2") for word in told["first"][0])
    for wrong in (["--nproc=2"], ["--", "verify"], ["--nproc=0", "--", "train"], ["--", "train", "--sead=1"]):
        with pytest.raises(UserError):
            launch.main(wrong)


# --- scripts/launch ---

SCRIPTS = ROOT / "scripts" / "launch"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.s*")), ids=lambda path: path.name)
def test_a_script_is_bash_and_its_flags_are_ours(path):
    subprocess.run(["bash", "-n", path], check=True)
    held_to_flags(path.read_text())


def test_the_jobset_is_yaml_and_its_flags_are_ours():
    text = (SCRIPTS / "gke_jobset.yaml").read_text()
    [job] = list(yaml.safe_load_all(text))
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    [container] = spec["template"]["spec"]["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    subprocess.run(["bash", "-n"], input=container["command"][2], text=True, check=True)
    fatal = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert fatal[0] == [1, 2, 3, 4]
    held_to_flags(container["command"][2])


def held_to_flags(text: str) -> None:
    """A dry run of what a script gives to ringbpt.train: its words, with numbers for what only a cluster knows."""
    from ringbpt.config import parse_args

    [words] = re.findall(r"python3? -m ringbpt\.train((?: \\\n|[^\n])+)", text)
    words = re.sub(r"\$\{[^}]*\}|\$[A-Z_]+|\"", lambda found: "" if found[0] == '"' else "1", words)
    parse_args([word for word in shlex.split(words.replace("\\\n", " ")) if word.startswith("--")])


# --- slow: real processes ---


def rows_of(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row}


SLEEPS = """
import sys, time
from ringbpt.config import run_main
from ringbpt.data.loader import Loader
from ringbpt.train import main
rows, calls = Loader.rows, []
def slow(*arguments):
    calls.append(1)
    if len(calls) > 12:
        time.sleep(600)
    return rows(*arguments)
Loader.rows = slow
sys.exit(run_main(main))
"""
HEARTBEAT, INITIALIZATION, STEP, SPARE = 10, 15, 10, 5
SMALL = [word for word in DEBUG if "mesh_dim" not in word and "eval_steps" not in word] + ["--eval_steps=0"]


def ranks(folder: Path, count: int, *flags: str, missing: int = -1, sleeps: int = -1, other: int = -1) -> dict:
    """`count` processes with two devices each and one ring round all of them; `other` has a flag of its own."""
    address = f"127.0.0.1:{free_port()}"
    words = [
        *(*SMALL, f"--mesh_dim=1,1,1,{2 * count}", "--num_cpu_devices=2", f"--logger.output_dir={folder}"),
        *(f"--logger.experiment_id=run{count}", "--jax_distributed.initialize_jax_distributed", *flags),
        *(f"--jax_distributed.num_processes={count}", f"--jax_distributed.heartbeat_timeout={HEARTBEAT}"),
        f"--jax_distributed.initialization_timeout={INITIALIZATION}",
        f"--jax_distributed.coordinator_address={address}",
        *([f"--jax_distributed.step_timeout={STEP}"] if sleeps >= 0 else []),
    ]
    found = {}
    for number in sorted({*range(count)} - {missing}):
        program = ["-c", SLEEPS] if number == sleeps else TRAIN[1:]
        own = [f"--jax_distributed.process_id={number}", *(["--seed=7"] if number == other else [])]
        found[number] = start(folder, *program, *words, *own)
    return found


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(tmp_path):
    four = ranks(tmp_path, 4, "--total_steps=12")
    outputs = {number: process.communicate(timeout=400) for number, process in four.items()}
    assert [process.returncode for process in four.values()] == [0] * 4, outputs
    more = ("--mesh_dim=1,1,1,8", "--num_cpu_devices=8", "--total_steps=12", f"--logger.output_dir={tmp_path}")
    one = start(tmp_path, *TRAIN[1:], *SMALL, *more, "--logger.experiment_id=one")
    assert one.communicate(timeout=400)[1] == ""
    found, wanted = rows_of(tmp_path / "run4"), rows_of(tmp_path / "one")
    assert sorted(found) == sorted(wanted) == list(range(1, 13))
    worst = max(abs(found[step] - wanted[step]) for step in wanted)
    print(f"4 processes against 1, 12 steps: {worst:.2g}")
    assert worst < 1e-5


# The case: who, what is done to it, the exit code of the others, seconds that they may take, and what they say.
LOST = {
    "killed": (1, signal.SIGKILL, 5, HEARTBEAT, r"error: process 1 has not been heard of for [0-9.]+ s.*"),
    "the first is killed": (0, signal.SIGKILL, 5, HEARTBEAT, r"error: process 0, which coordinates at .*, is gone.*"),
    "stopped": (1, signal.SIGSTOP, 5, HEARTBEAT, r"error: process 1 has not been heard of for 10 s.*"),
    "the first is stopped": (0, signal.SIGSTOP, 5, HEARTBEAT, r"error: process 0, .* has not answered for 10 s.*"),
    "sleeps": (1, None, 5, STEP, r"error: step \d+ has taken more than 10 s.*process 1 has been at step \d+ since.*"),
    "never started": (1, None, 5, INITIALIZATION, r"error: not all processes came within 15 s.*"),
    "the first is never started": (0, None, 5, INITIALIZATION, r"error: not all .*: process 0 does not listen at .*"),
    "other flags": (1, None, 2, 60, r"error: --seed differs: 42 in process 0, 7 in process 1: .*"),
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", LOST)
def test_a_lost_process_ends_the_others_in_time(tmp_path, case, count):
    lost, number, code, limit, says = LOST[case]
    roles = {
        "sleeps": "sleeps",
        "never started": "missing",
        "the first is never started": "missing",
        "other flags": "other",
    }
    running = ranks(tmp_path, count, ENDLESS, **({roles[case]: lost} if case in roles else {}))
    try:
        begin = time.monotonic()
        if number is not None or case == "sleeps":
            lines_until(running[0], 3)
        if number is not None:
            begin = time.monotonic()
            running[lost].send_signal(number)
        others = {one: process for one, process in running.items() if one != lost}
        ends = {one: (process.communicate(timeout=200)[1], process.returncode) for one, process in others.items()}
        seconds = time.monotonic() - begin
        if case == "sleeps":  # since the last row
            seconds = time.time() - (tmp_path / f"run{count}" / "metrics.jsonl").stat().st_mtime
    finally:
        for process in running.values():
            process.kill()
    print(f"{case}, {count} processes: {seconds:.1f} s")
    for stderr, found in ends.values():
        assert found == code, ends
        plain = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(plain) == 1 and re.fullmatch(says, plain[0]), stderr
        if case != "the first is killed":  # jax prints its stack before it aborts, and is held then
            assert stderr.count("\n") == 1, stderr
    starts = 60 if "never" in case else 0  # that case begins with the start of the processes, imports and all
    assert seconds < limit + SPARE + starts


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_launcher_goes_on_where_a_process_was_killed(tmp_path, lost):
    words = [*SMALL, "--mesh_dim=1,1,1,4", "--num_cpu_devices=2", "--total_steps=60", "--save_model_freq=5", *FULL]
    folder = (f"--logger.output_dir={tmp_path}", "--logger.experiment_id=run")
    begin = time.monotonic()
    launcher = start(tmp_path, "-m", "ringbpt.launch", "--nproc=2", "--", "train", *words, *folder)
    try:
        lines_until(launcher, 20)
        [rank] = [pid for pid in children(launcher.pid) if f"process_id={lost}" in command_of(pid)]
        os.kill(rank, signal.SIGKILL)
        out, err = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    print(f"process {lost} killed: done after {time.monotonic() - begin:.1f} s")
    assert launcher.returncode == 0, err
    assert re.search(rf"launch: process {lost} was ended by SIGKILL, .*: starting again from step \d+", err)
    assert sorted(rows_of(tmp_path / "run")) == list(range(1, 61)) and "from step" in out
    alone = start(
        tmp_path, "-m", "ringbpt.launch", "--nproc=2", "--", "train", *words, folder[0], "--logger.experiment_id=whole"
    )
    alone.communicate(timeout=300)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")  # bit for bit


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
