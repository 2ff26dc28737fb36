"""Where examples come from: random access to the examples of some files, and where each of them stands."""

import fcntl
import glob
import gzip
import hashlib
import json
import os
import shutil
import socket
import stat
import sysconfig
import zlib
from array import array
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ringbpt.config import DatasetConfig, JsonDatasetConfig, PythonDatasetConfig, UserError

MAX_LINE_BYTES = 1 << 30  # a longer "line" is a binary file, and would fill the memory before it is refused
HELD_OUT_SHARE = 20  # one file in so many
# The standard library's own tests are on some machines and not on others, and full of deliberately broken files.
STDLIB_EXCLUDED = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test")


class Source(Protocol):
    """A finite sequence of examples; `default_fields` is the text_processor's `fields` where the user names none."""

    default_fields: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example. Raises UserError that begins with `location(index)` where it cannot be read."""
        ...

    def location(self, index: int) -> str:
        """`file:line`, for error messages."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the examples and their order; the files' names and dates don't enter."""
        ...


def make_source(dataset: DatasetConfig, cache_dir: Path, flag: str) -> Source:
    """The source that `dataset.type` names; `flag` is the group's name on the command line, for error messages."""
    if dataset.type == "json":
        return JsonSource(dataset.json_dataset, cache_dir, flag)
    if dataset.type == "python":
        return PythonSource(dataset.python_dataset, flag)
    raise UserError(f"--{flag}.type={dataset.type!r} is not supported yet: 'json' reads a .jsonl file of the same data")


class JsonSource:
    """One JSON object per line, of a file, a .gz file or a glob of them (sorted by name).

    Lines end at LF only, so U+2028, CR and NUL stand inside a text; blank lines are no examples; a UTF-8 byte order
    mark is skipped. The examples from byte `start_seek_loc` of the (joined, decompressed) files on, or else from
    example `example_index_at_start` on, come first and the ones before it last, as in a reader that starts there and
    wraps around.
    """

    default_fields = ""

    def __init__(self, config: JsonDatasetConfig, cache_dir: Path, flag: str = "train_dataset"):
        self._flag = f"--{flag}.json_dataset"
        self._names = find_files(config.path, f"{self._flag}.path")
        self._files = [_plain_file(name, cache_dir, flag) for name in self._names]
        scans = [_scan_lines(name, file) for name, file in zip(self._names, self._files, strict=True)]
        self._file = np.repeat(np.arange(len(scans)), [len(lines) for lines, _, _ in scans])
        self._start, self._stop, self._line = np.concatenate([lines for lines, _, _ in scans]).T
        if not len(self._start):
            raise UserError(f"{self._names[-1]}:1: no examples: {self._flag}.path holds nothing but blank lines")
        bytes_before = np.cumsum([0] + [size for _, _, size in scans])
        first = self._first_example(config, self._start + bytes_before[self._file], bytes_before[-1])
        for name in ("_file", "_start", "_stop", "_line"):
            setattr(self, name, np.roll(getattr(self, name), -first))
        self._fingerprint = _digest([*(digest for _, digest, _ in scans), str(first)])
        self._open: tuple[int, int] | None = None  # which file, and its descriptor

    def _first_example(self, config: JsonDatasetConfig, byte: np.ndarray, size: int) -> int:
        """Where to begin; `byte` is each example's place in the joined files."""
        if config.start_seek_loc:
            if not 0 <= config.start_seek_loc <= byte[-1]:
                raise UserError(
                    f"{self._flag}.start_seek_loc={config.start_seek_loc} is outside of the data ({size} bytes): "
                    f"the last example begins at {byte[-1]}"
                )
            return int(np.searchsorted(byte, config.start_seek_loc))
        if not 0 <= config.example_index_at_start < len(byte):
            raise UserError(
                f"{self._flag}.example_index_at_start={config.example_index_at_start} is outside of the data: "
                f"the last example is {len(byte) - 1}"
            )
        return config.example_index_at_start

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, start, stop = int(self._file[index]), int(self._start[index]), int(self._stop[index])
        line = self._pread(file, start, stop - start)
        try:
            example = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.location(index)}: invalid UTF-8 at byte {start + error.start} of the file "
                f"(0x{line[error.start]:02x}); save it as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            column = min(error.pos, len(error.doc.rstrip())) + 1
            raise UserError(
                f"{self.location(index)}: malformed JSON at column {column}: {error.msg}; "
                "each line must be one JSON object"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{self.location(index)}: JSON that cannot be read: {error}") from None
        if not isinstance(example, dict):
            raise UserError(f"{self.location(index)}: a line must be a JSON object, not {json_type(example)}")
        return example

    def _pread(self, file: int, start: int, length: int) -> bytes:
        if self._open is None or self._open[0] != file:  # one open file at a time: a glob may name thousands
            if self._open is not None:
                os.close(self._open[1])
            self._open = (file, os.open(self._files[file], os.O_RDONLY))
        return os.pread(self._open[1], length, start)

    def location(self, index: int) -> str:
        return f"{self._names[int(self._file[index])]}:{int(self._line[index])}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}  # an open file does not travel to a worker process


class PythonSource:
    """The .py files of the standard library, or of a folder, as documents {"text": ...}, sorted by name.

    Empty files and files that aren't UTF-8 are left out and counted in `left_out`. Which files are held out depends
    on the relative name alone, so a file stays in its split when others come and go.
    """

    default_fields = "text"

    def __init__(self, config: PythonDatasetConfig, flag: str = "train_dataset"):
        self._root = Path(os.path.expanduser(config.path) or sysconfig.get_path("stdlib"))
        excluded = ("__pycache__",) if config.path else STDLIB_EXCLUDED
        if not self._root.is_dir():
            raise UserError(
                f"--{flag}.python_dataset.path={config.path!r} is not a folder{nearest_path(self._root)}; "
                "empty, it is the standard library"
            )
        self._names: list[str] = []
        self.left_out = {"empty": 0, "not UTF-8": 0}
        digests = []
        for name in _python_files(self._root, excluded):
            if config.split != "all" and is_held_out(name) != (config.split == "heldout"):
                continue
            content = self._read(name)
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                self.left_out["not UTF-8"] += 1
                continue
            if not content.strip():
                self.left_out["empty"] += 1
                continue
            self._names.append(name)
            digests.append(hashlib.sha256(content).hexdigest())
        if not self._names:
            raise UserError(
                f"--{flag}.python_dataset.path={str(self._root)!r}: no .py file in the split {config.split!r}"
                + ("; split='all' takes every file" if config.split != "all" else "")
            )
        self._fingerprint = _digest(digests)

    def _read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self._root / name}:1: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self._read(self._names[index]).decode("utf-8-sig")}

    def location(self, index: int) -> str:
        return f"{self._root / self._names[index]}:1"

    def fingerprint(self) -> str:
        return self._fingerprint


def is_held_out(name: str) -> bool:
    """Whether the file of this relative name (with forward slashes) belongs to the held-out split."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) % HELD_OUT_SHARE == 0


def find_files(path: str, flag: str) -> list[str]:
    """The regular files that a path or a glob names, sorted. Raises UserError where there is none."""
    if not path:
        raise UserError(f"{flag} is empty: give a .jsonl file, a .jsonl.gz file or a glob of them")
    if "://" in path:
        raise UserError(f"{flag}={path!r}: only local files are read; copy it here and give the local path")
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        if not glob.has_magic(path):
            raise UserError(f"{flag}={path!r} does not exist{nearest_path(Path(path))}")
        files = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not files:
            raise UserError(f"{flag}={path!r} matches no file{nearest_path(Path(path))}")
        return files
    if os.path.isdir(path):
        raise UserError(f"{flag}={path!r} is a directory: {os.path.join(path, '*.jsonl')!r} takes the files in it")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{flag}={path!r} is a pipe or a device: it is read more than once, so save it to a file first")
    return [path]


def nearest_path(path: Path) -> str:
    """`"; the nearest name is ..."` for a path that doesn't exist, or the empty string."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"; neither does the folder {str(path.parent)!r}"
    close = get_close_matches(path.name, names, 1)
    return f"; the nearest name is {str(path.parent / close[0])!r}" if close else ""


def json_type(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def cached(cache_dir: Path, name: str, build: Callable[[Path], None], flag: str) -> Path:
    """`cache_dir/name`, a file or a folder; `build(path)` makes it where it is not there yet.

    It is built under another name and renamed when complete, so a killed run leaves nothing that looks finished. One
    process of a machine builds, the others wait for it. Raises UserError (code 4) where the cache cannot be written.
    """
    final = cache_dir / name
    if final.exists():
        return final
    partial_path = cache_dir / f"{name}.partial-{socket.gethostname()}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.exists():
                return final
            _remove(partial_path)  # of a killed run
            try:
                build(partial_path)
                os.rename(partial_path, final)
            finally:
                _remove(partial_path)
    except OSError as error:
        if not final.exists():  # another machine, with the same cache, may have been faster
            message = f"--{flag}.cache_dir={str(cache_dir)!r}: {error.strerror or error}"
            raise UserError(f"{message}; give a folder with room, here or in $RINGBPT_CACHE", code=4) from None
    return final


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _plain_file(name: str, cache_dir: Path, flag: str) -> str:
    """The file itself, or, for a gzip file, its decompressed copy in the cache, which random access needs."""
    try:
        with open(name, "rb") as file:
            if file.read(2) != b"\x1f\x8b" and not name.endswith(".gz"):
                return name
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{name}:1: {error.strerror}") from None
    return str(cached(cache_dir, f"gunzip-{digest[:32]}", partial(_gunzip, name), flag))


def _gunzip(name: str, target: Path) -> None:
    line = 1
    with gzip.open(name) as file, open(target, "wb") as out:
        while True:
            try:
                chunk = file.read(1 << 20)
            except EOFError:
                raise UserError(f"{name}:{line}: the gzip file is truncated; copy it again") from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{name}:{line}: the gzip file is corrupt ({error}); copy it again") from None
            if not chunk:
                return
            line += chunk.count(b"\n")
            out.write(chunk)


def _scan_lines(name: str, path: str) -> tuple[np.ndarray, str, int]:
    """int64 [examples, 3] (first byte, byte after the last, line number from 1), digest and bytes of a file."""
    rows, digest, position, number = array("q"), hashlib.sha256(), 0, 0
    try:
        with open(path, "rb") as file:
            for line in iter(partial(file.readline, MAX_LINE_BYTES), b""):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(f"{name}:{number}: a line of more than {MAX_LINE_BYTES} bytes; is this JSONL?")
                digest.update(line)
                skip = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                if not (line[skip:] if skip else line).isspace() and len(line) > skip:
                    rows.extend((position + skip, position + len(line), number))
                position += len(line)
    except OSError as error:
        raise UserError(f"{name}:{number + 1}: {error.strerror}") from None
    return np.frombuffer(rows, np.int64).reshape(-1, 3), digest.hexdigest(), position


def _python_files(root: Path, excluded: tuple[str, ...]) -> list[str]:
    """Relative names of the .py files below `root`, sorted, with forward slashes."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(name for name in names if (root / name).is_file())
