"""The delivery benchmark: the same text in several formats, tokenised by one and two workers, then read as batches."""

import contextlib
import gzip
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ringbpt.config import DatasetConfig, FilesDatasetConfig, TextProcessorConfig, TokenizerConfig
from ringbpt.config.foreign import user_path
from ringbpt.data.loader import make_loader
from ringbpt.data.reading.files import optional
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.data.text.train_tokenizer import train
from ringbpt.evaluation.texts import python_texts

SEQ_LENGTH, BATCH_SIZE, STEPS = 2048, 8, 200


def texts(size: int) -> list[str]:
    """About `size` bytes of the standard library's source, over and over in another order."""
    source, found = python_texts("all"), []
    numbers, total = np.random.default_rng(0), 0
    while total < size:
        for index in numbers.permutation(len(source)):
            text = source[index]
            found += [text[at : at + 8192] for at in range(0, len(text), 8192)]
            total += len(text)
            if total >= size:
                break
    return found


def write(folder: Path, some: list[str]) -> dict[str, Path]:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    pyarrow = optional("pyarrow", "bench_data")
    optional("pyarrow.parquet", "bench_data").write_table(pyarrow.table({"text": some}), folder / "c.parquet")
    return {"jsonl": folder / "a.jsonl", "jsonl.gz": folder / "b.jsonl.gz", "parquet": folder / "c.parquet"}


def bench(megabytes: int, tokenizer: str, folder: str, say: Callable[[str], None] = print) -> dict[str, float]:
    """Prints a table; returns MB/s of text by what was measured, and `two_workers`, one worker's time over two's."""
    place = user_path(folder) if folder else Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    some = texts(megabytes << 20)
    size = sum(len(text.encode()) for text in some) / 1e6
    names = write(place, some)
    if tokenizer == "train":
        dataset = _dataset(names["jsonl"], place / "cache", 1)
        train(dataset, place / "tok.model", "sentencepiece", 8000, 2000)
        tokenizer = str(place / "tok.model")
    made = make_tokenizer(TokenizerConfig(tokenizer))
    found: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, path, workers in [(n, p, 1) for n, p in names.items()] + [("jsonl, 2 workers", names["jsonl"], 2)]:
        cache = place / f"cache-{len(seconds)}"
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            loader = make_loader(_dataset(path, cache, workers), made, seed=0, vocab_size=made.vocab_size)
        seconds[name] = time.perf_counter() - begin
        found[name] = size / seconds[name]
        say(f"{name:<18} {found[name]:8.1f} MB/s {loader.tokens_in / seconds[name]:14,.0f} tokens/s, tokenised")
    begin = time.perf_counter()
    for step in range(STEPS):
        loader.rows(step, 0, BATCH_SIZE)
    took = time.perf_counter() - begin
    tokens = STEPS * BATCH_SIZE * SEQ_LENGTH
    found["cache"] = tokens * loader.bytes_per_token / took / 1e6
    say(f"{'cache':<18} {found['cache']:8.1f} MB/s {tokens / took:14,.0f} tokens/s, packed into rows")
    found["two_workers"] = seconds["jsonl"] / seconds["jsonl, 2 workers"]
    say(f"2 workers: {found['two_workers']:.2f} x one ({made.describe()}, {size:.0f} MB of text)")
    if not folder:
        shutil.rmtree(place)
    return found


def _dataset(path: Path, cache: Path, workers: int) -> DatasetConfig:
    files = FilesDatasetConfig(
        path=str(path), seq_length=SEQ_LENGTH, batch_size=BATCH_SIZE, tokenizer_processes=workers
    )
    dataset = DatasetConfig(type="files", packing="best_fit", shuffle=True, cache_dir=str(cache), files_dataset=files)
    return replace(dataset, text_processor=TextProcessorConfig(fields="text"))
