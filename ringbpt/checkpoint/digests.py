"""Digests of a step's files: written once the files are, and compared with them before anything reads the step.

`digests.<i>-of-<n>` is what process i of n has read, of every n-th file a line, `<CRC-32> <bytes> <path>`, and at the
end the CRC-32 of these lines. So whatever happens to a file later, of arrays or of JSON, whoever wrote it, is seen,
and named, before a reader stumbles over it.
"""

import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

NAME = "digests.{}-of-{}"
NAMES = re.compile(r"digests\.\d+-of-(\d+)")
CHUNK, THREADS = 1 << 22, 4


class Digest(NamedTuple):
    """Of one file. crc: CRC-32 of its bytes; it sees every change of a few neighbouring bits."""

    crc: int
    size: int


def write(folder: Path, index: int = 0, count: int = 1) -> None:
    """Digests of this process's share of the folder's files, which are on the disk, and not only sent there, when this
    returns. Every process of `count` calls it, once all files are there.
    """
    names = _names(folder)[index::count]
    lines = "".join(f"{d.crc:08x} {d.size} {name}\n" for name, d in zip(names, _read(folder, names, True), strict=True))
    file = folder / NAME.format(index, count)
    unfinished = folder.with_name(f"{folder.name}.{file.name}")
    unfinished.write_text(f"{lines}{zlib.crc32(lines.encode()):08x}\n", encoding="utf-8")
    sync(unfinished)
    unfinished.replace(file)  # from here on the folder may get its name, and another process is at work in it


def has_all(folder: Path, count: int) -> bool:
    """Whether every one of `count` processes has written its share."""
    return all((folder / NAME.format(index, count)).is_file() for index in range(count))


def are_in(folder: Path) -> bool:
    """Whether there are digests of any process."""
    return any(NAMES.fullmatch(path.name) for path in folder.iterdir())


def problem(folder: Path, entries: Iterable[str] | None = None, index: int = 0, count: int = 1) -> str:
    """What is wrong with the first file that is not as it was written, as "<path>: <what>"; empty where all is well.

    entries: names of subfolders, the others' files are not looked at; None: all. Of `count` processes each reads its
    share of the files, and all compare the names and sizes of all. Files that nothing can read are an OSError.
    """
    shares = {path.name: int(match[1]) for path in folder.iterdir() if (match := NAMES.fullmatch(path.name))}
    whole = {NAME.format(index, count) for count in shares.values() for index in range(count)}
    if not shares or whole != shares.keys():
        return f"{min(whole - shares.keys(), default=NAME.format(0, 1))}: it is missing"
    wanted: dict[str, Digest] = {}
    for name in sorted(whole):
        lines, _, end = (folder / name).read_bytes().removesuffix(b"\n").rpartition(b"\n")
        lines += b"\n" if lines else b""
        if f"{zlib.crc32(lines):08x}".encode() != end:
            return f"{name}: it is damaged"
        for line in lines.decode().splitlines():
            crc, length, path = line.split(" ", 2)
            wanted[path] = Digest(int(crc, 16), int(length))
    if entries is not None:
        chosen = {*entries}
        wanted = {path: d for path, d in wanted.items() if "/" not in path or path.split("/")[0] in chosen}
    there = {*_names(folder)}
    for path, digest in wanted.items():
        if path not in there:
            return f"{path}: it is missing"
        if (size := (folder / path).stat().st_size) != digest.size:
            return f"{path}: it has {size:,} bytes of {digest.size:,}"
    names = sorted(wanted)[index::count]
    for name, digest in zip(names, _read(folder, names), strict=True):
        if digest != wanted[name]:
            return f"{name}: it is damaged (CRC-32 {digest.crc:08x}, was {wanted[name].crc:08x})"
    return ""


def sync(path: Path) -> None:
    """Returns once the disk has what the file or folder holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if not NAMES.fullmatch(name))


def _read(folder: Path, names: list[str], synced: bool = False) -> list[Digest]:
    def read(name: str) -> Digest:
        crc, size = 0, 0
        with (folder / name).open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
            if synced:
                os.fsync(file.fileno())
        return Digest(crc, size)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, names))
