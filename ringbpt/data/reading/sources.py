"""Where examples come from: random access to the examples of some files, and where each of them stands."""

import hashlib
import json
import os
import re
import sysconfig
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ringbpt.config import JsonDatasetConfig, PythonDatasetConfig, UserError
from ringbpt.config.foreign import DEPTH, check_depth, read_file, user_path
from ringbpt.data.reading.files import (
    cached,
    digest_of,
    find_files,
    json_type,
    known_digest,
    load_array,
    nearest_path,
    plain_file,
    remember_digest,
    remove,
)

MAX_LINE_BYTES = 1 << 28  # a longer "line" is a binary file, and would fill the memory before it is refused
MAX_ARRAY_BYTES = 1 << 30  # of a file that is one JSON array, which is read whole
INDEX_BYTES = 1 << 20  # of a larger file, where its lines are is kept in the cache
HELD_OUT_SHARE = 20  # one file in so many
# The standard library's own tests are on some machines and not on others, and full of deliberately broken files.
STDLIB_EXCLUDED = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test")


class Source(Protocol):
    """A finite sequence of examples, which can be sent to a worker process.

    size: bytes of it, about; it decides only into how many parts the work is cut.
    """

    size: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example. Raises UserError that begins with `location(index)` where it cannot be read."""

    def location(self, index: int) -> str:
        """`file:line`, for error messages."""

    def fingerprint(self) -> str:
        """Hex digest of the examples and their order; the files' names and dates don't enter. Reads nothing twice."""


class JsonSource:
    """JSON objects, one a line (JSONL) or in one array, of a file, a .gz or .zst file or a glob of them (by name).

    Lines end at LF only, so U+2028, CR and NUL stand inside a text; blank lines are no examples; a UTF-8 byte order
    mark is skipped. The examples from byte `start_seek_loc` of the (joined, decompressed) files on, or else from
    example `example_index_at_start` on, come first and the ones before it last, as in a reader that starts there and
    wraps around.
    """

    kind = "json"

    def __init__(self, config: JsonDatasetConfig, cache_dir: Path, flag: str = "train_dataset.json_dataset"):
        self._flag, self._config, self._cache_dir = f"--{flag}", config, cache_dir
        self._group = flag.partition(".")[0]
        self._names = find_files(config.path, f"{self._flag}.path")
        self._files = [plain_file(name, cache_dir, self._group) for name in self._names]
        self._index: list[np.ndarray] | None = None
        self._digests: dict[str, str] = {}  # of the files that this process has read
        self._open: tuple[int, int] | None = None  # which file, and its descriptor
        self.size = sum(map(os.path.getsize, self._files))

    def _lines(self) -> list[np.ndarray]:
        """int64 [examples, 3] of each file (first byte, byte after the last, line number from 1), made when needed."""
        if self._index is None:
            self._index = [self._index_of(name, file) for name, file in zip(self._names, self._files, strict=True)]
            self._ends = np.cumsum([len(lines) for lines in self._index]).tolist()
            if not self._ends[-1]:
                raise UserError(f"{self._names[-1]}:1: no examples: {self._flag}.path holds nothing but blank lines")
            self._first = self._first_example()
        return self._index

    def _index_of(self, name: str, file: str) -> np.ndarray:
        digest = known_digest(file, self._cache_dir)
        path = self._cache_dir / f"{self.kind}-lines-{digest[:32]}.npy" if digest else None
        if path and path.exists() and (known := _load(path, os.path.getsize(file))) is not None:
            return known
        seen = time.time()
        try:
            index, digest = self._scan(name, file)
        except OSError as error:
            raise UserError(f"{name}:1: {error.strerror}") from None
        remember_digest(file, self._cache_dir, digest, seen)
        self._digests[file] = digest
        size = os.path.getsize(file)
        if size > INDEX_BYTES:
            kept = f"{self.kind}-lines-{digest[:32]}.npy"
            known = _load(cached(self._cache_dir, kept, partial(_save, index), self._group), size)
            return index if known is None else known
        return index

    def _scan(self, name: str, path: str) -> tuple[np.ndarray, str]:
        """Where the examples of a file are, int64 [examples, 3], and the file's digest."""
        with open(path, "rb") as file:
            head = file.read(1 << 12)
            if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                if os.fstat(file.fileno()).st_size > MAX_ARRAY_BYTES:
                    what = f"one JSON array of more than {MAX_ARRAY_BYTES} bytes"
                    raise UserError(f"{name}:1: {what}; give one JSON object a line")
                return scan_array(name, head + file.read())
        return scan_lines(name, path)

    def _first_example(self) -> int:
        config, index, ends = self._config, self._index, self._ends
        assert index is not None
        if config.start_seek_loc:
            bytes_before = np.cumsum([0, *map(os.path.getsize, self._files)])
            starts = np.concatenate([lines[:, 0] + before for lines, before in zip(index, bytes_before, strict=False)])
            if not 0 <= config.start_seek_loc <= starts[-1]:
                raise UserError(
                    f"{self._flag}.start_seek_loc={config.start_seek_loc} is outside of the data ({bytes_before[-1]} "
                    f"bytes): the last example begins at {starts[-1]}"
                )
            return int(np.searchsorted(starts, config.start_seek_loc))
        if not 0 <= config.example_index_at_start < ends[-1]:
            raise UserError(
                f"{self._flag}.example_index_at_start={config.example_index_at_start} is outside of the data: "
                f"the last example is {ends[-1] - 1}"
            )
        return config.example_index_at_start

    def __len__(self) -> int:
        self._lines()
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int, int, int]:
        """Which file, first byte, byte after the last, line."""
        lines = self._lines()
        index = (index + self._first) % self._ends[-1]
        file = bisect_right(self._ends, index)
        start, stop, line = lines[file][index - (self._ends[file - 1] if file else 0)].tolist()
        return file, start, stop, line

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, start, stop, number = self._place(index)
        line = self._pread(file, start, stop - start)
        where = f"{self._names[file]}:{number}"
        try:
            return self._parse(line.decode("utf-8"), where, file)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: invalid UTF-8 at byte {start + error.start} of the file "
                f"(0x{line[error.start]:02x}); save it as UTF-8"
            ) from None

    def _parse(self, line: str, where: str, file: int) -> dict[str, Any]:
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            column = min(error.pos, len(error.doc.rstrip())) + 1
            raise UserError(
                f"{where}: malformed JSON at column {column}: {error.msg}; each line must be one JSON object"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{where}: JSON that cannot be read: {error}") from None
        if line.count("[") + line.count("{") > DEPTH:
            check_depth(example, where)
        if not isinstance(example, dict):
            raise UserError(f"{where}: a line must be a JSON object, not {json_type(example)}")
        return example

    def _pread(self, file: int, start: int, length: int) -> bytes:
        if self._open is None or self._open[0] != file:  # one open file at a time: a glob may name thousands
            if self._open is not None:
                os.close(self._open[1])
            self._open = (file, os.open(self._files[file], os.O_RDONLY))
        return os.pread(self._open[1], length, start)

    def location(self, index: int) -> str:
        file, _, _, line = self._place(index)
        return f"{self._names[file]}:{line}"

    def fingerprint(self) -> str:
        digests = []
        for file in self._files:
            digest = known_digest(file, self._cache_dir) or self._digests.get(file)
            if digest is None:  # finding the lines reads the whole file anyway
                self._lines()
                digest = self._digests[file]
            digests.append(digest)
        config = self._config
        start = f"byte {config.start_seek_loc}" if config.start_seek_loc else f"{config.example_index_at_start}"
        return digest_of([self.kind, *digests, start])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_index": None}  # neither travels to a worker, which reads its own


class TextSource:
    """Files that are a document each, {"text": ...}, sorted by their names below `root`.

    Empty files and files that aren't UTF-8 are left out and counted in `left_out`.
    """

    def __init__(self, root: Path, names: Iterable[str], nothing: str, cache_dir: Path | None = None):
        """nothing: the message where no file is left. cache_dir: where it is kept what the files hold."""
        self._root, self._names, self.size = root, [], 0
        self.left_out = {"empty": 0, "not UTF-8": 0}
        digests = []
        for name in names:
            path = str(root / name)
            digest = known_digest(path, cache_dir) if cache_dir else None
            if digest is None:  # one that is known was text when it was read
                seen, content = time.time(), self._read(name)
                if reason := _no_text(content):
                    self.left_out[reason] += 1
                    continue
                digest = hashlib.sha256(content).hexdigest()
                if cache_dir:
                    remember_digest(path, cache_dir, digest, seen)
            self._names.append(name)
            self.size += os.path.getsize(path)
            digests.append(digest)
        if not self._names:
            raise UserError(nothing)
        self._fingerprint = digest_of(digests)

    def _read(self, name: str) -> bytes:
        return read_file(self._root / name, MAX_LINE_BYTES, f"{self._root / name}:1")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self._read(self._names[index]).decode("utf-8-sig")}

    def location(self, index: int) -> str:
        return f"{self._root / self._names[index]}:1"

    def fingerprint(self) -> str:
        return self._fingerprint


def _no_text(content: bytes) -> str:
    """Why a file is left out, if it is."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return "" if content.strip() else "empty"


class PythonSource(TextSource):
    """The .py files of the standard library, or of a folder.

    Which files are held out depends on the relative name alone, so a file stays in its split when others come and go.
    """

    def __init__(self, config: PythonDatasetConfig, flag: str = "train_dataset.python_dataset"):
        root = user_path(config.path or sysconfig.get_path("stdlib"))
        excluded = ("__pycache__",) if config.path else STDLIB_EXCLUDED
        if not os.path.isdir(root):
            raise UserError(
                f"--{flag}.path={config.path!r} is not a folder{nearest_path(root)}; empty, it is the standard library"
            )
        names = [
            name
            for name in _python_files(root, excluded)
            if config.split == "all" or is_held_out(name) == (config.split == "heldout")
        ]
        nothing = f"--{flag}.path={str(root)!r}: no .py file in the split {config.split!r}"
        every = "; split='all' takes every file" if config.split != "all" else ""
        super().__init__(root, names, nothing + every)


class FirstExamples:
    """The first `count` examples of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.size = source.size  # an upper bound

    def __len__(self) -> int:
        return min(self._count, len(self._source))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def location(self, index: int) -> str:
        return self._source.location(index)

    def fingerprint(self) -> str:
        return digest_of([self._source.fingerprint(), f"first {self._count}"])


def is_held_out(name: str) -> bool:
    """Whether the file of this relative name (with forward slashes) belongs to the held-out split."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) % HELD_OUT_SHARE == 0


def _load(path: Path, size: int) -> np.ndarray | None:
    """The index of a file of `size` bytes that was kept; a damaged one is removed."""
    try:
        index = load_array(path, mapped=True).view(np.ndarray)  # whose items cost less
        whole = index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == 3
        if whole and (not len(index) or 0 <= index[0, 0] < index[-1, 1] <= size):
            return index
    except UserError:
        pass
    remove(path)
    return None


def _save(index: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, index)


def scan_lines(name: str, path: str, quoted: bool = False) -> tuple[np.ndarray, str]:
    """The lines that are not blank. quoted: a line ends only where all quotes are closed, as in CSV."""
    rows, digest, position, number = array("q"), hashlib.sha256(), 0, 0
    begin: tuple[int, int] | None = None  # first byte and line of what is not closed yet
    with open(path, "rb") as file:
        for line in iter(partial(file.readline, MAX_LINE_BYTES), b""):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"{name}:{number}: a line of more than {MAX_LINE_BYTES} bytes; is this JSONL?")
            digest.update(line)
            skip = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            if quoted and begin is not None:  # inside of a quoted field
                if line.count(b'"') % 2:
                    rows.extend((begin[0], position + len(line), begin[1]))
                    begin = None
            elif quoted and line.count(b'"') % 2:
                begin = (position + skip, number)
            elif not (line[skip:] if skip else line).isspace() and len(line) > skip:
                rows.extend((position + skip, position + len(line), number))
            position += len(line)
    if begin is not None:
        raise UserError(f"{name}:{begin[1]}: a quote is opened here and never closed")
    return np.frombuffer(rows, np.int64).reshape(-1, 3), digest.hexdigest()


def scan_array(name: str, content: bytes) -> tuple[np.ndarray, str]:
    """The elements of one JSON array; whether each is well formed is seen when it is read."""
    rows, depth, start, end, counted, line = array("q"), 0, 0, None, 0, 1
    for match in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', content, re.DOTALL):
        character = match[0]
        if character in b"[{":
            depth += 1
            start = match.end() if depth == 1 else start
        elif character in b"]},":
            depth -= character != b","
            if depth == 0 or (depth == 1 and character == b","):
                first = start + len(content[start : match.start()]) - len(content[start : match.start()].lstrip())
                if first < match.start():
                    line += content.count(b"\n", counted, first)
                    counted = first
                    rows.extend((first, match.start(), line))
                start = match.end()
            if depth == 0:
                end = match.end()
                break
    if end is None or content[end:].strip():
        number = content.count(b"\n", 0, len(content.rstrip()) if end is None else end) + 1
        what = "the JSON array is not closed" if end is None else "there is more after the end of the JSON array"
        raise UserError(f"{name}:{number}: {what}; give one JSON object a line, or one array of them")
    return np.frombuffer(rows, np.int64).reshape(-1, 3), hashlib.sha256(content).hexdigest()


def _python_files(root: Path, excluded: tuple[str, ...]) -> Iterator[str]:
    """Relative names of the .py files below `root`, sorted, with forward slashes."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return (name for name in sorted(names) if (root / name).is_file())
