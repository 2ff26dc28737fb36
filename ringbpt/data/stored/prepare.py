"""A data set tokenised and packed ahead of training: rows on disk with a manifest, by many processes, restartable."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import DatasetConfig, TokenizerConfig, UserError, printable
from ringbpt.config.foreign import read_json
from ringbpt.data.loader import Loader, make_loader
from ringbpt.data.reading.files import digest_of, replacing, write_whole
from ringbpt.data.reading.sources import Source
from ringbpt.data.stored.rows import FORMAT, column_dtypes, write_rows
from ringbpt.data.stored.tokens import COUNTED
from ringbpt.data.stored.workers import each
from ringbpt.data.text.tokenizers import make_tokenizer

FILE_BYTES = 1 << 28  # of a file of rows, before compression
BYTES_A_TOKEN = 20


def prepare(
    dataset: DatasetConfig,
    tokenizer: TokenizerConfig,
    folder: Path,
    *,
    seed: int,
    vocab_size: int,
    processes: int = 1,
    columns: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: print(printable(line)),
) -> dict[str, Any]:
    """Writes the rows of an epoch into `folder`, with further columns; returns the manifest, which is written last.

    A killed run goes on with the files that are complete. Raises UserError for a folder that holds other rows.
    """
    begin = time.monotonic()
    start = partial(_loader, dataset, tokenizer, seed=seed, vocab_size=vocab_size, columns=tuple(columns))
    loader = start()
    say(loader.describe())
    rows_per_file = max(1, FILE_BYTES // (BYTES_A_TOKEN * loader.seq_length))
    files = -(-loader.epoch_rows // rows_per_file)
    _claim(folder, digest_of([loader.fingerprint, str(rows_per_file)]))
    todo = [number for number in range(files) if not _part(folder, number).exists()]
    if len(todo) < files:
        say(f"{files - len(todo)} of {files} files are there from an earlier run")
    done = 0
    items = [(folder, number, rows_per_file) for number in todo]
    written = each(_write, items, start, lambda: loader, processes)
    for number, rows in zip(todo, written, strict=True):
        done += rows * loader.seq_length
        seconds = time.monotonic() - begin
        left = seconds / (todo.index(number) + 1) * (len(todo) - todo.index(number) - 1)
        say(f"file {number + 1} of {files}: {done / seconds:,.0f} tokens/s, {left:.0f} s left")
    parts = [_read_part(folder, number) for number in range(files)]
    for name, values in (("row_tokens", [t for part in parts for t in part["tokens"]]), ("lengths", loader.lengths)):
        np.save(folder / f"{name}.npy", np.asarray(values, np.int64))
    manifest = {
        "format": FORMAT,
        "seq_length": loader.seq_length,
        "columns": column_dtypes(loader.columns),
        "rows": loader.epoch_rows,
        "packing": dataset.packing,
        "seed": seed,
        "shuffle": dataset.shuffle,
        "tokenizer": make_tokenizer(tokenizer).fingerprint(),
        **{name: loader.summary.get(name, 0) for name in (*COUNTED, "max_token")},
        "dropped": loader.packing_dropped,
        "shards": [{key: part[key] for key in ("file", "rows", "bytes", "sha256")} for part in parts],
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1))
    seconds = time.monotonic() - begin
    say(f"{loader.epoch_rows:,} rows in {files} files: {seconds:.1f} s, {loader.tokens_in / seconds:,.0f} tokens/s")
    return manifest


def _claim(folder: Path, key: str) -> None:
    """Makes the folder, or checks that what is in it was begun with the same data and flags."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = folder / "begun.json"
        if not claim.exists():
            if any(folder.iterdir()):
                raise UserError(f"--output={str(folder)!r} is not empty: give a new folder")
            write_whole(claim, json.dumps({"key": key}))
        if read_json(claim).get("key") != key:
            raise UserError(f"--output={str(folder)!r} holds rows of other data or flags: give a new folder")
    except OSError as error:
        raise UserError(f"--output={str(folder)!r}: {error.strerror}; give a folder with room", code=4) from None


def _part(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.json"


def _read_part(folder: Path, number: int) -> dict[str, Any]:
    """What was written of a file of rows, by this run or by one before."""
    part = read_json(_part(folder, number))
    if {*part} != {"file", "rows", "bytes", "sha256", "tokens"}:
        raise UserError(f"{_part(folder, number)}:1: it does not say what its file holds: remove it, and go on", code=4)
    return part


def _loader(dataset: DatasetConfig, tokenizer: TokenizerConfig, **rest: Any) -> Loader:
    return make_loader(dataset, make_tokenizer(tokenizer), **rest)


def _write(loader: Loader, folder: Path, number: int, rows_per_file: int) -> int:
    first = number * rows_per_file
    count = min(rows_per_file, loader.epoch_rows - first)
    path = folder / f"rows-{number:05d}.array_record"
    tokens, digest = write_rows(path, map(partial(loader.row, 0), range(first, first + count)))
    part = {"file": path.name, "rows": count, "bytes": path.stat().st_size, "sha256": digest, "tokens": tokens}
    write_whole(_part(folder, number), json.dumps(part))
    return count


def write_jsonl(sources: Sequence[Source], path: Path, say: Callable[[str], None] = print) -> int:
    """Writes the sources' examples as JSON lines, complete or not at all; returns how many. Prints the throughput."""
    begin, size = time.monotonic(), 0
    count = sum(map(len, sources))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "w") as out:
            for source in sources:
                for index in range(len(source)):
                    size += out.write(json.dumps(source[index], ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--output={str(path)!r}: {error.strerror}; give a folder with room", code=4) from None
    seconds = time.monotonic() - begin
    say(f"{path}: {count:,} examples, {size / 1e6 / seconds:.1f} MB/s")
    return count
