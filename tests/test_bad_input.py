"""Bad input to every entry and script, by the table of bad_inputs.py: one line, the right code, and nothing written."""

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringbpt.config import printable, run_main
from tests.bad_inputs import CASES, ENTRIES, SCRIPTS, Case, make_files

ROOT = Path(__file__).parent.parent
SMALL = (
    "--load_llama_config=debug --llama.vocab_size=400 --mesh_dim=1,1,1,-1 --tokenizer.vocab_file=bytes "
    "--train_dataset.json_dataset.path={f}/good.jsonl --train_dataset.json_dataset.seq_length=64 "
    "--train_dataset.json_dataset.batch_size=2 --logger.output_dir={out} --html="
)
SECONDS, BYTES = 5, 1 << 30  # of a process, the seconds beyond the import of jax


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    before = names_below(folder)
    yield folder
    assert names_below(folder) == before


def words(case: Case, f: Path, out: Path) -> list[str]:
    """The command line: of flags that are given again, the last."""
    text = case.flags.replace("{small}", SMALL)
    if case.entry != "inspect":
        text = text.replace(" --html=", "", text.count("{f}") and 1)
    text = text.replace("{f}", str(f)).replace("{out}", str(out))
    flags = [word for word in re.split(" " if case.entry == "checkpoint" else " (?=--)", text) if word]
    if "{small}" not in case.flags:
        return flags
    return [*{word.partition("=")[0]: word for word in flags}.values()]


def main_of(entry: str) -> Callable[[list[str]], Any]:
    if not entry.endswith(".py"):
        room = entry in ("checkpoint", "rollout")
        return importlib.import_module(f"ringbpt.{entry}{'.__main__' * room}").main
    spec = importlib.util.spec_from_file_location(Path(entry).stem, ROOT / entry)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(case: Case, code: int, out: str, err: str) -> None:
    assert code == case.code, err[-2000:]
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1 and len(err) < 5000
    assert printable(err) == err and case.said in err
    assert printable(out) == out and "Traceback" not in out


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, monkeypatch, capfd, name):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    for variable in ("LIBTPU_INIT_ARGS", "JAX_PLATFORMS"):  # tpu_bundles.py writes both when it is read
        monkeypatch.setenv(variable, os.environ.get(variable, ""))

    def late(*_: Any) -> None:
        raise TimeoutError(f"{name} takes more than a minute")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        main = main_of(case.entry)
        capfd.readouterr()
        code = run_main(main, words(case, files, tmp_path / "out"))
    finally:
        signal.alarm(0)
    check(case, code, *capfd.readouterr())
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.fixture(scope="module")
def seconds_to_import_jax() -> float:
    return used([sys.executable, "-c", "import jax; jax.devices()"], {})[1]


def used(
    command: list[str], environment: dict[str, str], cwd: Path = ROOT
) -> tuple[subprocess.CompletedProcess, float, int]:
    """(what a command did, its processor time in seconds, its memory at most in bytes)."""
    with subprocess.Popen(
        command, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # What it says is less than a pipe holds: it is read when all is over.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out, err = (stream.read() for stream in (process.stdout, process.stderr) if stream)
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    return done, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_process_says_so_at_once(files, tmp_path, seconds_to_import_jax, name):
    case = CASES[name]
    entry = [str(ROOT / case.entry)] if case.entry.endswith(".py") else ["-m", f"ringbpt.{case.entry}"]
    environment = {"RINGBPT_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done, seconds, memory = used([sys.executable, *entry, *words(case, files, tmp_path / "out")], environment, tmp_path)
    check(case, done.returncode, done.stdout, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    print(f"{name}: {seconds - seconds_to_import_jax:.1f} s, {memory >> 20} MiB")
    assert seconds < seconds_to_import_jax + SECONDS and memory < BYTES


def test_there_are_enough():
    assert len(CASES) >= 250 and {case.entry for case in CASES.values()} == {*ENTRIES, *SCRIPTS}
