"""A user's python file in a process of its own, which is asked with a time limit and begun again when it is lost."""

import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringbpt.config import UserError, printable
from ringbpt.config.foreign import user_path

START_SECONDS = 60.0  # in which the file must have been read


class Process:
    """FILE.py:NAME behind ringbpt.rollout.worker: a question is a JSON object, and so is what it answers."""

    def __init__(self, flag: str, spec: str, kind: str, seconds: float, choices: str = "no FILE.py:NAME"):
        """flag: as rollout.reward, for messages. kind: a key of worker.KINDS. seconds: for an answer.

        Raises UserError for what is no FILE.py:NAME (choices: what is said then), and where file or name are not there.
        """
        self.where, self._kind, self._seconds = f"--{flag}={spec}", kind, seconds
        if not (match := re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", spec)):
            raise UserError(f"{self.where}: {choices}")
        file = user_path(match[1])
        if not file.is_file():
            raise UserError(f"{self.where}: no such file")
        self._file, self._name = file.absolute(), match[2]
        self._process: subprocess.Popen[bytes] | None = None
        self._unread, self._closed = b"", False
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ringbpt.rollout.worker", str(self._file), self._name, self._kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(self._file).parent)])},
        )
        self._unread = b""
        found = self._answer(max(self._seconds, START_SECONDS))
        if "error" in found:
            self._end()
            raise UserError(f"{self.where}: {printable(found['error'])}")

    def ask(self, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What it answers to each, one after the other; {"error": why} where it raises, is late or has ended."""
        found: list[dict[str, Any]] = []
        while len(found) < len(questions):
            found += self._ask(questions[len(found) :])
        return found

    def _ask(self, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to the first of them: to all, unless the process is lost."""
        if self._closed:  # by another thread: no other process begins
            return [{"error": "the run ends"} for _ in questions]
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            left = memoryview(json.dumps(list(questions)).encode() + b"\n")
            while left:
                left = left[self._process.stdin.write(left) :]
        except OSError:
            self._end()
            return [{"error": "its process has ended"}]
        found: list[dict[str, Any]] = []
        while self._process is not None and len(found) < len(questions):
            found.append(self._answer(self._seconds))
        return found

    def _answer(self, seconds: float) -> dict[str, Any]:
        line = self._line(seconds)
        if line:
            return json.loads(line)
        self._end()
        if line is None:
            return {"error": f"no answer after {seconds:g} s: its process is ended, another begins"}
        return {"error": "its process has ended: another begins"}

    def _line(self, seconds: float) -> bytes | None:
        """A line, b"" at the end of the stream, None where none comes in time."""
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                if not (more := self._process.stdout.read(1 << 16)):
                    return b""
                self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """For good: what is asked after it has no answer."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # waits for it, and closes its pipes
                pass
            self._process = None
