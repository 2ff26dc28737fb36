"""Does anything get lost? Real runs are killed, damaged, starved of disk and told to stop; a table at the end.

  python scripts/chaos.py [--parts=kills,damage,...] [--scale=1] [--seed=0] [--minutes=0] [--json=FILE] [--folder=DIR]

Each part is one line of the scoreboard of docs/reliability.md, and --scale=1 asks all that stands there; a run of
minutes is --scale=0.02. Every random choice comes from the seed. Exit code 1 where something was lost.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringbpt.config import JSON, Flag, UserError, json_to, parse, parse_args, printed_help, read_flags, run_main

ROOT = Path(__file__).resolve().parents[1]
SAY_EVERY = 60.0  # seconds
TIMEOUT = 12  # seconds without a word after which a process is lost, in the parts with several
MODEL = (
    "--update_llama_config=dict(vocab_size=288,hidden_size=32,intermediate_size=64,num_hidden_layers=2,"
    "num_attention_heads=4,max_sequence_length=64,attention_type='{attention}')",
    *("--dtype=fp32", "--tokenizer.vocab_file=bytes", "--log_freq=1", "--optimizer.adamw_optimizer.lr=0.01"),
    *("--optimizer.adamw_optimizer.lr_warmup_steps=2", "--optimizer.adamw_optimizer.lr_decay_steps=1000"),
    *("--train_dataset.text_processor.fields=text", "--train_dataset.json_dataset.seq_length=64"),
    "--train_dataset.json_dataset.batch_size=4",
    *("--checkpointer.save_optimizer_state", "--save_model_freq=1", "--autoresume"),
)


@dataclass
class Score:
    """Of one part. failures: a line each; facts: numbers that belong into the table."""

    done: int = 0
    failures: list[str] = field(default_factory=list)
    facts: Counter = field(default_factory=Counter)

    def check(self, holds: bool, what: str) -> bool:
        if not holds:
            self.failures.append(what)
            print(f"    {what}", file=sys.stderr, flush=True)
        return holds

    def __add__(self, other: "Score") -> "Score":
        return Score(self.done + other.done, self.failures + other.failures, self.facts + other.facts)


@dataclass
class Place:
    """Where a part works. limit: the time.monotonic() at which no new trial begins. processes: of runs that are told to
    stop, how many one may have."""

    folder: Path
    random: random.Random
    limit: float
    processes: tuple[int, ...] = (1, 2, 4)

    def trials(self, count: int, scale: float) -> Iterator[int]:
        total, begin = max(1, round(count * scale)), time.monotonic()
        said = begin
        for number in range(total):
            now = time.monotonic()
            if now > self.limit:
                return
            if now - said > SAY_EVERY:
                said, left = now, (now - begin) / number * (total - number) / 60
                print(f"  {number} of {total}, {left:.0f} min left", file=sys.stderr, flush=True)
            yield number

    def flags(self, name: str, *more: str, devices: int = 1, attention: str = "standard") -> list[str]:
        """Of a run of that name; of `more` the last of each name counts."""
        words = [word.replace("{attention}", attention) for word in MODEL]
        words += [f"--train_dataset.json_dataset.path={write_text(self.folder)}", f"--logger.output_dir={self.folder}"]
        words += [f"--train_dataset.cache_dir={self.folder / 'cache'}", f"--mesh_dim=1,1,1,{devices}"]
        words += [f"--logger.experiment_id={name}", *more]
        return list({word.partition("=")[0]: word for word in words}.values())

    def start(self, *words: str, program: list[str] | None = None) -> "Process":
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        return Process([*(program or [sys.executable, "-m", "ringbpt.train"]), *words], environment, self.folder)


class Process:
    """A process whose output goes into files: a pipe that nobody reads would hold it up."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path):
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self._out, "stderr": self._err}
        self._process = subprocess.Popen(command, env=environment, cwd=folder, **streams)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def ended(self, seconds: float = 240) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); -1 where it had to be killed."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = -1
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return code, texts[0], texts[1]


def write_text(folder: Path) -> Path:
    path = folder / "text.jsonl"
    if not path.exists():
        chosen = random.Random(0)
        words = ["".join(chosen.choices("abcdefgh", k=3)) for _ in range(30)]
        lines = (json.dumps({"text": " ".join(chosen.choices(words, k=60))}) for _ in range(400))
        path.write_text("\n".join(lines) + "\n")
    return path


def rows(run: Path) -> dict[int, float]:
    """Losses by step."""
    from ringbpt.training.metrics import read_rows

    file = run / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in read_rows(file) if "loss" in row} if file.exists() else {}


def last_row(run: Path) -> int:
    return max(rows(run), default=0)


def last_step(run: Path) -> int:
    return max(steps(run), default=0)


def steps(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def await_(condition: Callable[[], Any], seconds: float, pause: float = 0.005) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
    return True


def one_line(err: str) -> bool:
    return err.count("\n") <= 1 and "Traceback" not in err


# --- kills ---


def kills(place: Place, scale: float) -> Score:
    """SIGKILL at any moment, most of them in a save; then the run ends, and is compared with an undisturbed one."""
    from ringbpt.checkpoint import digests

    run, score = place.folder / "killed", Score()
    for number in place.trials(200, scale):
        before, seen = last_step(run), last_row(run)
        process = place.start(*place.flags("killed", "--total_steps=100000"))
        if number % 10 == 9:  # at any moment of its start
            time.sleep(place.random.uniform(0, 8))
        else:
            went_on = lambda seen=seen, process=process: last_row(run) > seen or not process.is_running()  # noqa: E731
            await_(went_on, 120, 0.05)
            score.check(last_row(run) > seen, f"kill {number}: it did not go on")
            if number % 10 < 7:
                await_(lambda: list((run / "checkpoints").glob("*.saving*")), 10, 0.0005)
                time.sleep(place.random.uniform(0, 0.1))
            else:
                time.sleep(place.random.uniform(0, 0.4))
        process.signal(signal.SIGKILL)
        _, _, err = process.ended()
        score.check("rror" not in err, f"kill {number}: {err[-300:]}")
        score.facts["in a save"] += bool(list((run / "checkpoints").glob("*.saving*")))
        after = steps(run)
        score.check(last_step(run) >= before, f"kill {number}: step {before} is lost")
        bad = [step for step in after if digests.problem(run / "checkpoints" / str(step))]
        score.check(not bad, f"kill {number}: steps {bad} are not whole")
        score.done += 1
    total = last_row(run) + 3
    code, _, err = place.start(*place.flags("killed", f"--total_steps={total}")).ended()
    score.check(code == 0, f"the last run: {code} {err[-300:]}")
    calm = place.flags("calm", f"--total_steps={total}", "--save_model_freq=0")
    code, _, err = place.start(*calm).ended()
    score.check(code == 0, f"the undisturbed run: {code} {err[-300:]}")
    score.check(rows(run) == rows(place.folder / "calm"), "losses differ from the undisturbed run's")
    score.check(contents(run, total) == contents(place.folder / "calm", total), "the last weights differ")
    score.facts["losses compared"] = total
    return score


def contents(run: Path, step: int) -> dict[str, bytes]:
    """Every leaf of a checkpoint."""
    from ringbpt.checkpoint.store import StoredStep

    stored = StoredStep(run / "checkpoints" / str(step))
    return {f"{e}/{name}": stored.read(e, name).tobytes() for e in sorted(stored.trees) for name in stored.dtypes(e)}


# --- damage ---

CHANGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flips": lambda data, chosen: flipped(data, chosen.randrange(8 * len(data))),
    "truncations": lambda data, chosen: data[: chosen.randrange(len(data))],
    "deletions": lambda data, chosen: None,
    "zeroed": lambda data, chosen: bytes(len(data)),
}
COUNTS = {"flips": 300, "truncations": 100, "deletions": 100, "zeroed": 100}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damage(place: Place, scale: float) -> Score:
    """A file of the newest step, of arrays or JSON, is changed: it is named, and the older step is gone on from."""
    code, _, err = place.start(*place.flags("whole", "--total_steps=4")).ended()
    score, whole = Score(), place.folder / "whole"
    if not score.check(code == 0 and steps(whole) == [3, 4], f"the run to damage: {code} {err[-300:]}"):
        return score
    good = contents(whole, 3)
    files = sorted(path.relative_to(whole) for path in (whole / "checkpoints" / "4").rglob("*") if path.is_file())
    for kind, change in CHANGES.items():
        for number in place.trials(COUNTS[kind], scale):
            name = f"{kind}{number}"
            run, file = place.folder / name, place.random.choice(files)
            shutil.copytree(whole, run)
            changed = change((run / file).read_bytes(), place.random)
            (run / file).unlink() if changed is None else (run / file).write_bytes(changed)
            if changed == (whole / file).read_bytes():  # a file of zeros, zeroed
                shutil.rmtree(run)
                continue
            told = str(file.relative_to("checkpoints/4"))
            if number % 25 == 3:  # as a user meets it; the others as far as the state, in this process
                code, out, err = place.start(*place.flags(name, "--total_steps=5")).ended()
                said, start = out + err, 3 if ", from step 3" in out else -1
                score.check(code == 0 and "Traceback" not in said, f"{name} {file}: {code} {said[-300:]}")
                score.facts["by processes"] += 1
            else:
                said, start, read = resumed(place.flags(name, "--total_steps=5"))
                score.check(read == good, f"{name} {file}: other weights")
            score.check(told in said, f"{name} {file}: not named in {said[-300:]!r}")
            score.check(start == 3, f"{name} {file}: did not fall back")
            score.facts[kind] += 1
            score.done += 1
            shutil.rmtree(run)
    return score


def resumed(words: list[str]) -> tuple[str, int, dict[str, bytes]]:
    """(what was said, from which step, the state) of a run that begins here and does not train."""
    import logging
    from contextlib import closing

    import jax
    import numpy as np

    from ringbpt.checkpoint.tensors import flatten
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.mesh import make_mesh
    from ringbpt.model.llama import Model
    from ringbpt.training.loop import loader_of
    from ringbpt.training.run import open_run
    from ringbpt.training.state import StateLayout

    config, lines = parse(parse_args(words), jax.device_count()), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("ringbpt")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        loader = loader_of(config, make_tokenizer(config.tokenizer))
        layout = StateLayout(config, Model.of(config, make_mesh(config.mesh_shape)))
        with closing(open_run(config)) as run:
            state = run.first_state(layout, loader.fingerprint)
        trees = {"params": state.trained, "opt_state": state.opt_state, "guard": state.guard}
        leaves = ((f"{e}/{name}", x) for e, tree in trees.items() for name, x in flatten(tree).items())
        read = {name: np.asarray(x).tobytes() for name, x in leaves}
        return "\n".join(lines), run.start, read
    except UserError as error:
        return f"{' '.join(lines)} {error}", -1, {}
    finally:
        log.removeHandler(handler)


# --- full disks ---


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=False)
    if done.returncode:
        raise UserError("--parts=fills: a small disk has to be mounted, which this user may not")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fills(place: Place, scale: float) -> Score:
    """The disk fills while a run saves, and has room again: no good step goes, and the same process saves again."""
    from ringbpt.checkpoint import digests

    score = Score()
    with small_disk(place.folder / "disk", 12) as disk:
        run, ballast = disk / "full", disk / "ballast"
        flags = place.flags("full", "--total_steps=1000000", f"--logger.output_dir={disk}")
        process = place.start(*flags)
        for number in place.trials(20, scale):
            last = last_step(run)
            if not score.check(await_(lambda last=last: last_step(run) > last + 1, 120), f"fill {number}: no save"):
                break
            time.sleep(place.random.uniform(0, 0.3))
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 14))
            time.sleep(place.random.uniform(0.3, 1.0))
            good = [step for step in steps(run) if not digests.problem(run / "checkpoints" / str(step))]
            score.check(len(good) >= 2, f"fill {number}: {good} are whole of {steps(run)}")
            score.check(process.is_running(), f"fill {number}: the run ended")
            ballast.unlink()
            score.done += 1
        last = last_step(run)
        score.check(await_(lambda: last_step(run) > last + 2, 120), "no save after the last")
        process.signal(signal.SIGKILL)
        _, out, err = process.ended()
        score.facts["saves that failed"] = out.count("not saved; the run goes on")
        score.check("Traceback" not in out + err, err[-300:])
    return score


# --- no numbers ---


def nans(place: Place, scale: float) -> Score:
    """One batch of a run is no number: exactly one update is skipped, and no checkpoint holds anything that is none."""
    import numpy as np

    from ringbpt.checkpoint.store import StoredStep

    score = Score()
    program = [sys.executable, "-c", "import sys; from scripts.chaos import broken; sys.exit(broken(sys.argv[1:]))"]
    for number in place.trials(20, scale):
        at = place.random.randrange(1, 8)
        words = place.flags(f"nan{number}", "--total_steps=9", "--checkpointer.keep=99")
        code, out, err = place.start(str(at), *words, program=program).ended()
        run = place.folder / f"nan{number}"
        score.check(code == 0, f"nan {number}: {code} {err[-300:]}")
        score.check(out.count("this update is skipped, 1 so far") == 1, f"nan {number}: {out[-300:]}")
        for step in steps(run):
            stored = StoredStep(run / "checkpoints" / str(step))
            leaves = [stored.read(entry, name) for entry in stored.trees for name in stored.dtypes(entry)]
            score.check(all(np.isfinite(leaf).all() for leaf in leaves), f"nan {number}: step {step} is not finite")
            score.facts["checkpoints read"] += 1
        score.done += 1
    return score


def broken(words: list[str]) -> int:
    """A run whose batch number words[0] is no number."""
    from dataclasses import replace

    from ringbpt import train
    from ringbpt.data.loader import Loader

    at, own = int(words[0]), Loader.rows

    def some_broken(self, step, *args):
        found = own(self, step, *args)
        return replace(found, weight_BT=found.weight_BT * float("nan")) if step == at else found

    Loader.rows = some_broken
    return run_main(train.main, words[1:])


# --- signals and peers ---


def ranks(place: Place, name: str, count: int, *more: str, missing: int = 0, odd: tuple[str, ...] = ()) -> list:
    """The processes of one run, two devices each; odd: flags of the last one alone."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = place.flags(name, *more, devices=2 * count if count > 1 else 1, attention="ring_standard")
    if count == 1:
        return [place.start(*place.flags(name, *more))]
    words += ["--num_cpu_devices=2", f"--jax_distributed.heartbeat_timeout={TIMEOUT}"]
    words += ["--jax_distributed.initialize_jax_distributed", f"--jax_distributed.coordinator_address=127.0.0.1:{port}"]
    words += [f"--jax_distributed.num_processes={count}", f"--jax_distributed.initialization_timeout={TIMEOUT}"]
    words += [f"--jax_distributed.step_timeout={TIMEOUT}"]
    return [
        place.start(*words, *(odd if rank == count - 1 else ()), f"--jax_distributed.process_id={rank}")
        for rank in range(count - missing)
    ]


def together(processes: list, seconds: float) -> list[tuple[int, str, str]]:
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: process.ended(seconds), processes))


def signals(place: Place, scale: float) -> Score:
    """SIGTERM to one process of 1, 2 and 4: all save after the same step and exit with 75; then they go on."""
    score = Score()
    for count in place.processes:
        run = place.folder / f"told{count}"
        for number in place.trials(50, scale):
            trial = f"{count} processes, {number}"
            processes, seen = ranks(place, run.name, count, "--total_steps=1000000"), last_row(run)
            grown = await_(lambda seen=seen, run=run: last_row(run) > seen + 1, 240, 0.05)
            score.check(grown, f"{trial}: it did not go on")
            time.sleep(place.random.uniform(0, 1))
            reached = last_row(run)
            place.random.choice(processes).signal(signal.SIGTERM)
            found = together(processes, 120)
            codes, errors = [code for code, _, _ in found], [err[-300:] for _, _, err in found]
            score.check(codes == [75] * count and all(map(one_line, errors)), f"{trial}: {codes} {errors}")
            score.check(last_step(run) >= last_row(run) - 1, f"{trial}: step {last_row(run)} is lost")
            score.facts["steps after the signal"] += last_step(run) - reached
            score.facts[f"{count} processes"] += 1
            score.done += 1
    return score


def peers(place: Place, scale: float) -> Score:
    """A peer is killed, stopped, asleep, never started or differently configured: the others end, and say so."""
    score = Score()
    for kind in ("lost", "stopped", "asleep", "never started", "configured otherwise"):
        for number in place.trials(20, scale):
            name, run = f"{kind.replace(' ', '_')}{number}", place.folder / f"{kind.replace(' ', '_')}{number}"
            odd = ("--seed=7",) if kind == "configured otherwise" else ()
            started = time.monotonic()
            processes = ranks(place, name, 2, "--total_steps=1000000", missing=int(kind == "never started"), odd=odd)
            victim, others = processes[-1], processes[:-1]
            if kind in ("lost", "stopped", "asleep"):
                score.check(await_(lambda run=run: len(rows(run)) > 2, 240), f"{name}: it did not begin")
                if place.random.random() < 0.5:
                    victim, others = processes[0], processes[1:]
                started = time.monotonic()
                victim.signal(signal.SIGKILL if kind == "lost" else signal.SIGSTOP)
            expected = 2 if odd else 5
            found = together(others if not odd and kind != "never started" else processes, 240)
            seconds = time.monotonic() - started
            if kind == "asleep":  # it wakes up alone
                victim.signal(signal.SIGCONT)
                found += together([victim], 240)
            elif kind in ("lost", "stopped"):
                victim.signal(signal.SIGKILL)
                victim.ended()
            codes = [code for code, _, _ in found]
            # jax ends a process by SIGABRT before it can be asked; the supervisor calls that 5.
            score.facts["ended by jax's abort"] += codes.count(-signal.SIGABRT)
            right = {5 if code == -signal.SIGABRT else code for code in codes} == {expected}
            score.check(right, f"{name}: {codes} {found[0][2][-300:]}")
            if not odd and kind != "never started":
                score.check(seconds <= TIMEOUT + 5, f"{name}: {seconds:.0f} s")
                score.facts["longest, seconds"] = max(score.facts["longest, seconds"], round(seconds))
            score.facts[kind] += 1
            score.done += 1
            shutil.rmtree(run, ignore_errors=True)
    return score


PARTS = {"kills": kills, "damage": damage, "fills": fills, "nans": nans, "signals": signals, "peers": peers}
FLAGS = {
    "parts": Flag(str, ",".join(PARTS), "which lines of the scoreboard"),
    "scale": Flag(float, 1.0, "how much of the scoreboard's counts", above=0),
    "seed": Flag(int, 0, "of every choice"),
    "processes": Flag(str, "1,2,4", "of the runs of the part signals", choices=("1,2,4", "1", "2", "4")),
    "minutes": Flag(float, 0.0, "no trial begins after so many, for all parts together; 0: no limit", at_least=0),
    "folder": Flag(str, "", "where the runs are, and stay; empty: a temporary one"),
    "json": JSON,
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    asked = read_flags(argv, FLAGS)
    names = asked["parts"].split(",")
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts={asked['parts']}: {name!r} is none of {', '.join(PARTS)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    end = time.monotonic() + 60 * asked["minutes"] if asked["minutes"] else float("inf")
    with tempfile.TemporaryDirectory() as temporary, json_to(asked["json"]) as write:
        report: dict[str, Any] = {}
        print(f"{'part':<9} {'trials':>6} {'failed':>6} {'minutes':>8}  what else", flush=True)
        for number, name in enumerate(names):
            folder = Path(asked["folder"] or temporary).absolute() / name
            folder.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            # What is left of the time is shared by the parts that are left.
            limit = began + max(0.0, end - began) / (len(names) - number)
            processes = tuple(map(int, asked["processes"].split(",")))
            place = Place(folder, random.Random(f"{asked['seed']} {name}"), limit, processes)
            score = PARTS[name](place, asked["scale"])
            facts = ", ".join(f"{what} {count}" for what, count in score.facts.items())
            minutes = (time.monotonic() - began) / 60
            print(f"{name:<9} {score.done:>6} {len(score.failures):>6} {minutes:>8.1f}  {facts}", flush=True)
            for failure in score.failures[:10]:
                print(f"    {' '.join(failure.split())[:600]}", flush=True)
            report[name] = {"trials": score.done, "failures": score.failures, "minutes": minutes, **score.facts}
        write(json.dumps(report, indent=2) + "\n")
    return int(any(part["failures"] for part in report.values()))


if __name__ == "__main__":
    sys.exit(run_main(main))
