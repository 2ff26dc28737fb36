"""Examples out of tables: CSV, Parquet, Arrow files and the folders that `save_to_disk` writes."""

import csv
import io
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import JsonDatasetConfig, UserError
from ringbpt.config.foreign import read_json, user_path
from ringbpt.config.shown import one_line
from ringbpt.data.reading.files import digest_of, file_digest, nearest_path, optional
from ringbpt.data.reading.sources import JsonSource, scan_lines

MOST_ROWS_A_BYTE = 1000
WINDOW_ROWS = 256  # turned into Python objects at a time


class CsvSource(JsonSource):
    """Rows of CSV or TSV files as {column: text}; the first row of each file names the columns.

    The delimiter is the one of `,`, `;` and tab that the first row has most of.
    """

    kind = "csv"

    def __init__(self, path: str, cache_dir: Path, flag: str):
        super().__init__(JsonDatasetConfig(path=path), cache_dir, flag)
        csv.field_size_limit(sys.maxsize)
        self._header: dict[int, tuple[list[str], str]] = {}

    def _scan(self, name: str, path: str) -> tuple[np.ndarray, str]:
        rows, digest = scan_lines(name, path, quoted=True)
        return rows[1:], digest

    def _columns(self, file: int) -> tuple[list[str], str]:
        """The names of a file's columns, and its delimiter."""
        if file not in self._header:
            try:
                with open(self._files[file], encoding="utf-8-sig", newline="") as lines:
                    first = lines.readline()
                    delimiter = max(",;\t", key=first.count)
                    lines.seek(0)
                    columns = next(csv.reader(lines, delimiter=delimiter), [])
            except (UnicodeDecodeError, csv.Error) as error:
                what = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                raise UserError(
                    f"{self._names[file]}:1: the row that names the columns cannot be read: {what}"
                ) from None
            if not columns:
                raise UserError(f"{self._names[file]}:1: the first row is blank, and should name the columns")
            if len({*columns}) < len(columns):
                twice = max(columns, key=columns.count)
                raise UserError(f"{self._names[file]}:1: two columns are called {twice!r}")
            self._header[file] = (columns, delimiter)
        return self._header[file]

    def _parse(self, line: str, where: str, file: int) -> dict[str, Any]:
        columns, delimiter = self._columns(file)
        try:
            rows = list(csv.reader(io.StringIO(line, newline=""), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise UserError(f"{where}: malformed CSV: {error}") from None
        if len(rows) != 1 or len(rows[0]) != len(columns):
            found = len(rows[0]) if rows else 0
            raise UserError(f"{where}: {found} fields, but the first row names {len(columns)} columns: quote the text")
        return dict(zip(columns, rows[0], strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_header": {}}


class TableSource:
    """Rows of Arrow tables, read a block at a time. A subclass opens the files; they are read where they are needed."""

    def __init__(self, names: list[str], cache_dir: Path):
        optional("pyarrow", names[0])
        self._names, self._cache_dir = names, cache_dir
        self.size = sum(map(os.path.getsize, names))
        self._start()

    def _start(self) -> None:
        self._blocks: list[tuple[int, int, int]] | None = None  # (file, block inside the file, rows) in order
        self._table: tuple[int, Any] | None = None  # number of the block, and its table
        self._valid: set[int] = set()  # blocks that this process has looked through
        self._window: tuple[int, list[dict[str, Any]]] = (0, [])  # number of its first row, and the rows
        self._file = lru_cache(maxsize=1)(self._open)

    def _open(self, name: str) -> tuple[list[int], Callable[[int], Any]]:
        """The rows of each block of a file, and what reads a block as a pyarrow table."""
        raise NotImplementedError

    def _all_blocks(self) -> list[tuple[int, int, int]]:
        if self._blocks is None:
            self._blocks = []
            for file, name in enumerate(self._names):
                with _refusing(name):
                    counts, _ = self._file(name)
                    # Each row of text takes a byte, unless it stands there again and again.
                    if not all(0 <= rows <= MOST_ROWS_A_BYTE * os.path.getsize(name) for rows in counts):
                        raise ValueError("it says that it has more rows, or fewer, than its bytes can hold")
                self._blocks += [(file, block, rows) for block, rows in enumerate(counts) if rows]
            self._ends = np.cumsum([rows for _, _, rows in self._blocks], dtype=np.int64).tolist()
            if not self._blocks:
                raise UserError(f"{self._names[-1]}:1: no examples: the table has no rows")
        return self._blocks

    def __len__(self) -> int:
        self._all_blocks()
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, rows = self._window
        if not first <= index < first + len(rows):
            blocks = self._all_blocks()
            number = bisect_right(self._ends, index)
            start = index - (self._ends[number - 1] if number else 0)
            if self._table is None or self._table[0] != number:
                file, inside, _ = blocks[number]
                with _refusing(self._names[file]):
                    _, read = self._file(self._names[file])
                    table = read(inside)
                    if number not in self._valid:
                        _check(table, self._blocks[number][2] if self._blocks else 0)
                        self._valid.add(number)
                    self._table = (number, table)
            begin = start - start % WINDOW_ROWS
            with _refusing(self.location(index)):
                rows = self._table[1].slice(begin, WINDOW_ROWS).to_pylist()
            first = index - start + begin
            self._window = (first, rows)
        return rows[index - first]

    def location(self, index: int) -> str:
        """`file:row`, from 1."""
        blocks = self._all_blocks()
        file = blocks[bisect_right(self._ends, index)][0]
        before = sum(rows for other, _, rows in blocks if other < file)
        return f"{self._names[file]}:{index - before + 1}"

    def fingerprint(self) -> str:
        return digest_of([type(self).__name__, *(file_digest(name, self._cache_dir) for name in self._names)])

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_names", "_cache_dir", "size")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever the library says of a file becomes one line with the file's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # ArrowException, and what Python's own types say of a time that no calendar has
        where = name if ":" in name else f"{name}:1"
        raise UserError(f"{where}: cannot be read: {one_line(error)}; write it again") from None


def _check(table: Any, rows: int) -> None:
    """Raises ValueError for a table or record batch that cannot be followed: a bad offset would end the process."""
    table.validate(full=True)
    if table.num_rows != rows:
        raise ValueError(f"it has {table.num_rows} rows where {rows} are announced")
    names = table.schema.names
    if len({*names}) < len(names):
        raise ValueError(f"two columns are called {max(names, key=names.count)!r}")


class ParquetSource(TableSource):
    """Rows of Parquet files; a row group is held at a time."""

    def _open(self, name: str) -> tuple[list[int], Callable[[int], Any]]:
        from pyarrow import parquet

        file = parquet.ParquetFile(name, memory_map=True, page_checksum_verification=True)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        return [group.num_rows for group in groups], file.read_row_group


class ArrowSource(TableSource):
    """Record batches of Arrow files, streamed or not, mapped from disk."""

    def _open(self, name: str) -> tuple[list[int], Callable[[int], Any]]:
        import pyarrow

        mapped = pyarrow.memory_map(name)
        magic = mapped.read(6)
        mapped.seek(0)
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            batches = list(pyarrow.ipc.open_stream(mapped))
        return [batch.num_rows for batch in batches], batches.__getitem__


def saved_folder(path: str, split: str, flag: str) -> list[str]:
    """The Arrow files of a folder that `save_to_disk` wrote, in their order; `split` chooses among several.

    Raises UserError for a folder that is none, or that has not the split, and for what its JSON files may not say.
    """
    folder = user_path(path)
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = read_json(splits).get("splits")
        if not isinstance(names, list) or not names or not all(map(_is_plain, names)):
            raise UserError(f"{splits}:1: splits is no list of the names of folders; copy it again")
        if split not in names:
            raise UserError(f"{flag}.split={split!r} is none of {', '.join(names)} in {path!r}: try split={names[0]}")
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(f"{flag}.path={path!r} is no folder of save_to_disk (no state.json){nearest_path(folder)}")
    said = read_json(state)
    files = said.get("_data_files")
    names = [item.get("filename") if isinstance(item, dict) else None for item in files or ()]
    if not isinstance(files, list) or not names or not all(map(_is_plain, names)):
        raise UserError(f"{state}:1: _data_files is no list of the names of files; copy it again")
    for key in ("_indices_files", "_indices_data_files"):  # of old versions: which rows there are, and in what order
        if said.get(key):
            raise UserError(
                f"{state}:1: {key}: rows chosen by an index are not read: save the data set again, flattened"
            )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{state}:1: _data_files: {name} is not there; copy it again")
    return [str(folder / name) for name in names]


def _is_plain(name: Any) -> bool:
    """Whether it is the name of something inside of a folder."""
    return isinstance(name, str) and Path(name).name == name


def is_saved_folder(path: str) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    folder = user_path(path)
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
