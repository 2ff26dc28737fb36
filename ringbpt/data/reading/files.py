"""Files: which ones a path names, what they hold (known again without reading them), and what is kept in the cache."""

import fcntl
import glob
import grp
import gzip
import hashlib
import importlib
import json
import os
import pwd
import re
import shutil
import socket
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ringbpt.config import UserError
from ringbpt.config.foreign import open_regular, read_file, strict_json, user_path
from ringbpt.config.shown import one_line

BOM = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 1 << 26  # of a line of prompts, questions or texts
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# A file written in the same moment in which it was read may change again without its time changing.
SETTLED_SECONDS = 2.0


def split_paths(path: str, flag: str) -> list[tuple[str, float | None]]:
    """`"a,b"` or `"a:0.7,b:0.3"` -> [(path, weight)]; weights are shares, None where none is given.

    A path that exists as it is written is one path, whatever commas it has. Raises UserError.
    """
    if os.path.exists(os.path.expanduser(path)) or "," not in path:
        return [(path, None)]
    parts: list[tuple[str, float | None]] = []
    for part in path.split(","):
        name, weight = part.strip(), None
        match = re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", name)
        if match and not os.path.exists(os.path.expanduser(name)):
            name, weight = match[1], float(match[2])
        if not name:
            raise UserError(f"{flag}={path!r}: an empty name in the list; write a,b or a:0.7,b:0.3")
        if weight == 0:
            raise UserError(f"{flag}={path!r}: the weight of {name!r} is 0; leave it out of the list")
        parts.append((name, weight))
    unweighted = [name for name, weight in parts if weight is None]
    if unweighted and len(unweighted) < len(parts):
        raise UserError(f"{flag}={path!r}: {unweighted[0]!r} has no weight and others do; write {unweighted[0]}:1")
    return parts


def find_files(path: str, flag: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """The regular files that a path or a glob names, sorted; of a folder those that end as `suffixes` say.

    Raises UserError where there is none.
    """
    if not path:
        raise UserError(f"{flag} is empty: give a file, a .gz or .zst of one, a glob, or a list a,b or a:0.7,b:0.3")
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
        if not suffixes:
            raise UserError(f"{flag}={path!r} is a directory: {os.path.join(path, '*.jsonl')!r} takes the files in it")
        files = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.endswith(suffixes) and "/." not in folder[len(path) :]
        ]
        files = [name for name in files if os.path.isfile(name)]
        if not files:
            raise UserError(f"{flag}={path!r} is a folder without {', '.join(suffixes)} files")
        return sorted(files)
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


def read_rows(file: Path, flag: str, wanted: str, make: Callable[[Any], Any]) -> list[Any]:
    """make(value) of each line of a file of JSON lines; as in JsonSource, lines end at \\n alone, and blank ones are
    left out, as is a byte order mark.

    Raises UserError where the file cannot be read or has no rows, and with file and line, and what is `wanted`, where a
    line is no JSON or `make` raises.
    """
    rows = []
    with open_regular(file, f"--{flag}={file}") as stream:
        for number, line in enumerate(iter(partial(stream.readline, MAX_ROW_BYTES), b""), 1):
            where = f"{file}:{number}"
            if len(line) == MAX_ROW_BYTES:
                raise UserError(f"{where}: a line of more than {MAX_ROW_BYTES} bytes; is this JSONL?")
            if not (line := line.removeprefix(BOM) if number == 1 else line).strip():
                continue
            try:
                rows.append(make(strict_json(line.decode("utf-8"), where)))
            except UnicodeDecodeError:
                raise UserError(f"{where}: no UTF-8 text; save it as UTF-8") from None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{where}: {wanted}") from None
    if not rows:
        raise UserError(f"--{flag}={file} holds no row")
    return rows


def load_array(path: Path, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, in memory or mapped. Raises UserError (code 4) where it holds none."""
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("several arrays in an archive")
        return array
    except Exception as error:  # numpy parses the header as Python, and raises what that parser does
        raise UserError(f"{path}:1: it holds no array: {one_line(error)}; copy it again", code=4) from None


def digest_of(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


# --- what a file holds ---


def file_digest(name: str, cache_dir: Path) -> str:
    """sha256 of a file's bytes; read once, and known again by the file's place, size, times and inode."""
    known = known_digest(name, cache_dir)
    if known:
        return known
    seen = time.time()
    try:
        with open(name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{name}:1: {error.strerror}") from None
    remember_digest(name, cache_dir, digest, seen)
    return digest


def _stamp(name: str) -> list[int]:
    status = os.stat(name)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _ledger(name: str, cache_dir: Path) -> Path:
    return cache_dir / "digests" / digest_of([os.path.realpath(name)])[:32]


def known_digest(name: str, cache_dir: Path) -> str | None:
    """The digest that was remembered of the file, if the file is still the same one."""
    try:
        known = json.loads(read_file(_ledger(name, cache_dir)))
        return known["sha256"] if known["stamp"] == _stamp(name) else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def remember_digest(name: str, cache_dir: Path, digest: str, seen: float) -> None:
    """Keeps the digest that was read at the time `seen`; a file that was changed just before is read again."""
    path = _ledger(name, cache_dir)
    try:
        stamp = _stamp(name)
        if max(stamp[1], stamp[2]) / 1e9 > seen - SETTLED_SECONDS:
            return
        make_private(path.parent)
        write_whole(path, json.dumps({"stamp": stamp, "sha256": digest, "path": os.path.realpath(name)}))
    except OSError:
        return  # a cache that cannot be written is reported where it is needed; here it only saves time


# --- the cache ---


def default_cache() -> Path:
    """$RINGBPT_CACHE, or ~/.cache/ringbpt; it need not be there yet. Raises UserError as `check_cache` does."""
    return check_cache(user_path(os.environ.get("RINGBPT_CACHE") or "~/.cache/ringbpt"), "")


def check_cache(folder: Path, flag: str) -> Path:
    """The folder, whose files are believed: so nobody but its owner and root may write there.

    flag: the group whose cache_dir names it; empty: $RINGBPT_CACHE does. Raises UserError (code 4).
    """
    try:
        status = os.stat(folder)
    except OSError:  # not there yet, or not to be looked at, which is said where it is written
        return folder
    what = f"--{flag}.cache_dir={str(folder)!r}" if flag else f"the cache {str(folder)!r}"
    others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid))
    if others:
        mode = f"{stat.S_IMODE(status.st_mode):o}"
        raise UserError(
            f"{what} can be written by others (mode {mode}), and what is in it would be believed: chmod go-w it, or "
            "give a folder of your own",
            code=4,
        )
    if os.geteuid() not in (0, status.st_uid) and status.st_uid != 0:
        raise UserError(f"{what} belongs to another user, and what is in it would be believed: give your own", code=4)
    return folder


def _is_own_group(number: int) -> bool:
    """Whether a group is this user's alone, as many systems give each user one."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and number == user.pw_gid and {*group.gr_mem} <= {user.pw_name}


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone. Raises OSError."""
    for each in reversed((folder, *folder.parents)):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)


def open_lock(path: Path) -> BinaryIO:
    """A file to be locked, made where there is none. What is there is not emptied, and a link not followed: where
    others could place one, it would name a file of this user's. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "rb+", buffering=0)


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[Any]:
    """An open file that takes its name, and another's place, when it is complete, and only then."""
    partial_path = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(partial_path, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


def write_whole(path: Path, content: str) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    with replacing(path, "w") as file:
        file.write(content)


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
        make_private(cache_dir)
        with open_lock(cache_dir / f"{name}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.exists():
                return final
            remove(partial_path)  # of a killed run
            try:
                build(partial_path)
                os.rename(partial_path, final)
            finally:
                remove(partial_path)
    except OSError as error:
        if not final.exists():  # another machine, with the same cache, may have been faster
            raise unwritable(cache_dir, flag, error) from None
    return final


def unwritable(cache_dir: Path, flag: str, error: OSError) -> UserError:
    """flag: the group whose cache_dir names the folder; empty: $RINGBPT_CACHE alone does."""
    what = f"--{flag}.cache_dir=" if flag else "the cache "
    where = "here or in" if flag else "in"
    message = f"{what}{str(cache_dir)!r}: {error.strerror or error}; give a folder with room, {where} $RINGBPT_CACHE"
    return UserError(message, code=4)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- compressed files ---

# Real text becomes a hundred times smaller at most; and a disk is not filled to its last byte.
MOST_TIMES, ALWAYS_BYTES, ROOM_LEFT = 200, 1 << 26, 1 << 28


def plain_file(name: str, cache_dir: Path, flag: str) -> str:
    """The file itself, or, of a gzip or zstd file, its decompressed copy in the cache, which random access needs."""
    try:
        with open(name, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{name}:1: {error.strerror}") from None
    if magic.startswith(GZIP) or name.endswith(".gz"):
        kind, expand = "gunzip", _gunzip
    elif magic == ZSTD or name.endswith(".zst"):
        kind, expand = "unzstd", _unzstd
    else:
        return name
    digest = file_digest(name, cache_dir)
    return str(cached(cache_dir, f"{kind}-{digest[:32]}", partial(expand, name), flag))


def _gunzip(name: str, target: Path) -> None:
    with gzip.open(name) as file:
        chunks = iter(partial(file.read, 1 << 20), b"")
        _copy(name, chunks, target, "gzip", (gzip.BadGzipFile, zlib.error))


def _unzstd(name: str, target: Path) -> None:
    zstandard = optional("zstandard", f"{name}:1")

    def chunks() -> Iterator[bytes]:
        decoder, whole = zstandard.ZstdDecompressor().decompressobj(), False
        with open(name, "rb") as file:
            for rest in iter(partial(file.read, 1 << 20), b""):
                while rest:
                    yield decoder.decompress(rest)
                    whole, rest = decoder.eof, decoder.unused_data
                    if whole:  # another frame may follow
                        decoder = zstandard.ZstdDecompressor().decompressobj()
        if not whole:
            raise EOFError

    _copy(name, chunks(), target, "zstd", (zstandard.ZstdError,))


def _copy(name: str, chunks: Iterator[bytes], target: Path, kind: str, corrupt: tuple[type[Exception], ...]) -> None:
    line, size = 1, 0
    most = MOST_TIMES * os.path.getsize(name) + ALWAYS_BYTES
    with open(target, "wb") as out:
        try:
            for chunk in chunks:
                line += chunk.count(b"\n")
                size += len(chunk)
                if size > most:
                    raise UserError(
                        f"{name}:{line}: the {kind} file becomes more than {MOST_TIMES} times its own size, as no text "
                        "does: decompress it yourself if that is meant"
                    )
                room = shutil.disk_usage(target.parent)
                if room.free < min(ROOM_LEFT, room.total // 20):
                    raise UserError(f"{name}: decompressed, it would fill the disk of {target.parent}", code=4)
                out.write(chunk)
        except EOFError:
            raise UserError(f"{name}:{line}: the {kind} file is truncated; copy it again") from None
        except corrupt as error:
            raise UserError(f"{name}:{line}: the {kind} file is corrupt ({error}); copy it again") from None


# --- packages that few need ---

EXTRAS = {
    "data": ("datasets", "pyarrow", "zstandard"),
    "hf": ("jinja2", "tokenizers"),
    "tfds": ("tensorflow_datasets",),
}


def optional(name: str, where: str) -> Any:
    """The module of a package that only an extra installs. Raises UserError that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        extra = next(extra for extra, packages in EXTRAS.items() if name.partition(".")[0] in packages)
        raise UserError(f"{where}: this needs the package {name}: pip install 'ringbpt[{extra}]'") from None
