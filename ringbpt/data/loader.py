"""Batches by step: the data tokenised once into a cache on disk, packed by a plan, read at random.

The rows of a step are a pure function of (files, flags, seed, step): there is no state to save or to restore.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import DatasetConfig, TextProcessorConfig, UserError
from ringbpt.data.packing import Plan, make_plan
from ringbpt.data.sources import Source, cached, make_source
from ringbpt.data.text_processor import Chunk, tokenise
from ringbpt.data.tokenizers import Tokenizer
from ringbpt.types import Batch

CACHE_FORMAT = "1"  # part of every key; raise it when the same inputs give other files


@dataclass(frozen=True)
class TokenCache:
    """All documents as tokens, mapped from disk: token int32, mask uint8 [tokens], offset int64 [documents + 1].

    summary: documents, tokens, max_token, loss_tokens (mask 1), loss_bytes (UTF-8 bytes of the text behind those).
    key: the hex digest of everything that decides the content.
    """

    token: np.ndarray
    mask: np.ndarray
    offset: np.ndarray
    summary: dict[str, int]
    key: str


class Loader:
    """The batches of one dataset. Threads may share it.

    batch_size and seq_length are the global batch's; steps_per_epoch counts whole batches, and the rows that fill
    none are dropped. bytes_per_token: UTF-8 bytes of text per token, over what takes loss, so that loss in nats
    / ln 2 / bytes_per_token is bits per byte; inf where special tokens alone take loss. tokens_used, tokens_dropped
    (by reason): of the first epoch. utilisation: the share of the places of its batches that hold a token.
    fingerprint: of the batches, whatever the step.
    """

    def __init__(self, cache: TokenCache, plan: Plan, dataset: DatasetConfig, bos_token_id: int | None, identity: str):
        self.batch_size, self.seq_length = dataset.batch_size, dataset.seq_length
        self.steps_per_epoch = plan.rows // self.batch_size
        self.bytes_per_token = (cache.summary["loss_bytes"] or math.inf) / cache.summary["loss_tokens"]
        self.fingerprint = hashlib.sha256(f"{cache.key} {identity}".encode()).hexdigest()
        rows = self.steps_per_epoch * self.batch_size
        self.tokens_used = plan.tokens_in(0, rows)
        last_batch = plan.tokens_in(0, plan.rows) - self.tokens_used
        reasons = plan.dropped | {"incomplete last batch": last_batch}
        self.tokens_dropped = {reason: count for reason, count in reasons.items() if count}
        self.utilisation = self.tokens_used / (rows * self.seq_length)
        self._cache, self._plan, self._bos_token_id, self._packing = cache, plan, bos_token_id, dataset.packing

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop of the global batch `step` (from 0): numpy arrays [stop - start, T]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        shape = (stop - start, self.seq_length)
        arrays = [np.empty(shape, np.float32 if name == "weight" else np.int32) for name in COLUMNS]
        for place, row in enumerate(range(start, stop)):
            values = self._plan.row(epoch, index * self.batch_size + row, self._cache.token, self._cache.mask)
            for array, value in zip(arrays, values, strict=True):
                array[place] = value
        if self._bos_token_id is not None:
            arrays[0][:, :1] = self._bos_token_id
        return Batch(*arrays)

    def describe(self) -> str:
        """One line: what there is, how it is packed, and what was dropped and why."""
        summary, dropped = self._cache.summary, self.tokens_dropped
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        return (
            f"{summary['documents']:,} documents, {summary['tokens']:,} tokens, {self.bytes_per_token:.2f} bytes a "
            f"token; {self._packing}: {self.steps_per_epoch:,} steps of {self.batch_size} x {self.seq_length:,} an "
            f"epoch, {self.utilisation:.1%} of the places filled, {sum(dropped.values()):,} tokens dropped"
            + (f" ({reasons})" if reasons else "")
        )


COLUMNS = ("token", "target", "weight", "position", "segment")  # of packing.Row and types.Batch


def make_loader(
    dataset: DatasetConfig, tokenizer: Tokenizer, *, seed: int, vocab_size: int, flag: str = "train_dataset"
) -> Loader:
    """The loader of a dataset, tokenised now if its cache is not there yet.

    vocab_size: the model's. flag: the dataset's name on the command line, for the messages. With always_start_with_bos
    the first input token of every row is overwritten by bos, as in the original; its target stays.
    Raises UserError for data that cannot be read or makes no batch, and for token ids that the model doesn't have.
    """
    cache_dir = cache_folder(dataset)
    source = make_source(dataset, cache_dir, flag)
    processor = dataset.text_processor
    if not (processor.fields or processor.fields_from_example):
        processor = replace(processor, fields=source.default_fields)
    cache = _token_cache(source, tokenizer, processor, dataset, cache_dir, vocab_size, flag)
    plan = make_plan(cache.offset, dataset.seq_length, packing=dataset.packing, seed=seed, shuffle=dataset.shuffle)
    _check_size(plan, cache, dataset, flag)
    bos = tokenizer.bos_token_id if getattr(dataset.source, "always_start_with_bos", False) else None
    if bos is None and getattr(dataset.source, "always_start_with_bos", False):
        raise UserError(
            f"--{flag}.{dataset.type}_dataset.always_start_with_bos=True: the tokenizer ({tokenizer.describe()}) has "
            "no bos token; False works"
        )
    order = f"shuffled {seed}" if dataset.shuffle else "in order"
    identity = f"{dataset.packing} {dataset.seq_length} {dataset.batch_size} {order} {bos}"
    return Loader(cache, plan, dataset, bos, identity)


def cache_folder(dataset: DatasetConfig) -> Path:
    """`cache_dir`, else $RINGBPT_CACHE, else ~/.cache/ringbpt; it need not be there yet."""
    return Path(dataset.cache_dir or os.environ.get("RINGBPT_CACHE") or "~/.cache/ringbpt").expanduser()


def _token_cache(
    source: Source,
    tokenizer: Tokenizer,
    processor: TextProcessorConfig,
    dataset: DatasetConfig,
    cache_dir: Path,
    vocab_size: int,
    flag: str,
) -> TokenCache:
    parts = [CACHE_FORMAT, source.fingerprint(), tokenizer.fingerprint(), json.dumps(asdict(processor))]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def build(folder: Path) -> None:
        chunks = tokenise(
            source,
            tokenizer,
            processor,
            flag,
            processes=getattr(dataset.source, "tokenizer_processes", 1),
            chunk_size=getattr(dataset.source, "tokenizer_parallel_chunk_size", 32),
            ahead=getattr(dataset.source, "tokenizer_parallel_batch_size", 1024),
        )
        _write(folder, _with_progress(_checked(chunks, tokenizer, vocab_size), len(source), flag))

    name = f"tokens-{key[:32]}"
    cache = _read_cache(cached(cache_dir, name, build, flag), key)
    if cache is None:  # cut short from outside; it can be made again
        shutil.rmtree(cache_dir / name, ignore_errors=True)
        cache = _read_cache(cached(cache_dir, name, build, flag), key)
    if cache is None:
        raise UserError(f"--{flag}.cache_dir={str(cache_dir)!r}: {name} is damaged; remove it", code=4)
    _check_vocabulary(cache.summary["max_token"], tokenizer, vocab_size)
    return cache


def _write(folder: Path, chunks: Iterable[Chunk]) -> None:
    """The files of a TokenCache. Written one chunk at a time, so the data may be larger than the memory."""
    folder.mkdir()
    lengths = [np.zeros(1, np.int64)]
    summary = {"documents": 0, "tokens": 0, "max_token": 0, "loss_tokens": 0, "loss_bytes": 0}
    with open(folder / "token.bin", "wb") as token, open(folder / "mask.bin", "wb") as mask:
        for chunk in chunks:
            token.write(np.ascontiguousarray(chunk.token, np.int32))
            mask.write(np.ascontiguousarray(chunk.mask, np.uint8))
            lengths.append(chunk.length)
            summary["documents"] += len(chunk.length)
            summary["tokens"] += len(chunk.token)
            summary["max_token"] = max(summary["max_token"], int(chunk.token.max(initial=0)))
            summary["loss_tokens"] += int(np.count_nonzero(chunk.mask))
            summary["loss_bytes"] += chunk.loss_bytes
    np.save(folder / "offset.npy", np.cumsum(np.concatenate(lengths)))
    (folder / "summary.json").write_text(json.dumps(summary))


def _read_cache(folder: Path, key: str) -> TokenCache | None:
    """The cache in a folder, or None where a file is missing or has another length than the summary says."""
    try:
        summary: dict[str, int] = json.loads((folder / "summary.json").read_text())
        offset = np.load(folder / "offset.npy", allow_pickle=False)
        if not summary["tokens"]:  # an empty file cannot be mapped
            return TokenCache(np.zeros(0, np.int32), np.zeros(0, np.uint8), offset, summary, key)
        token = np.memmap(folder / "token.bin", np.int32, "r")
        mask = np.memmap(folder / "mask.bin", np.uint8, "r")
    except (OSError, ValueError, KeyError):
        return None
    if len(token) != summary["tokens"] or len(mask) != len(token) or offset[-1] != len(token):
        return None
    return TokenCache(token, mask, offset, summary, key)


def _checked(chunks: Iterable[Chunk], tokenizer: Tokenizer, vocab_size: int) -> Iterator[Chunk]:
    """Stops at the first chunk that the model cannot take, and not after hours."""
    for chunk in chunks:
        _check_vocabulary(int(chunk.token.max(initial=0)), tokenizer, vocab_size)
        yield chunk


def _check_vocabulary(largest: int, tokenizer: Tokenizer, vocab_size: int) -> None:
    if largest >= vocab_size:
        works = max(tokenizer.vocab_size, largest + 1)
        raise UserError(
            f"--llama.vocab_size={vocab_size} is too small for --tokenizer.vocab_file={tokenizer.config.vocab_file!r} "
            f"({tokenizer.describe()}), which gave the id {largest}: --llama.vocab_size={works} works"
        )


def _check_size(plan: Plan, cache: TokenCache, dataset: DatasetConfig, flag: str) -> None:
    """Raises UserError where there is nothing to learn, or not one whole batch."""
    if not cache.summary["loss_tokens"]:
        raise UserError(
            f"--{flag}.text_processor.fields={dataset.text_processor.fields!r}: no token takes loss; "
            "take the [..] off the fields to be learnt"
        )
    if plan.rows >= dataset.batch_size:
        return
    group, tokens = f"--{flag}.{dataset.type}_dataset", cache.summary["tokens"]
    problem = (
        f"{group}.batch_size={dataset.batch_size} of seq_length={dataset.seq_length} is more than the data: "
        f"{cache.summary['documents']} documents of {tokens} tokens make {plan.rows} rows"
    )
    shorter = (tokens - 1) // dataset.batch_size
    if plan.rows:
        raise UserError(f"{problem}; {group}.batch_size={plan.rows} is the largest that fits")
    if shorter and dataset.packing == "concat":
        raise UserError(f"{problem}; {group}.seq_length={shorter} is the longest that fits")
    raise UserError(f"{problem}; give more data")


def _with_progress(chunks: Iterable[Chunk], total: int, flag: str) -> Iterator[Chunk]:
    """A bar with the time left on a terminal, one line at the end elsewhere; on stdout, as stderr is for errors."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, begin = Console(), time.monotonic()
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    documents = tokens = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"tokenising {flag}", total=total)
        for chunk in chunks:
            documents, tokens = documents + len(chunk.length), tokens + len(chunk.token)
            progress.advance(task, len(chunk.length))
            yield chunk
    seconds = time.monotonic() - begin
    print(f"{flag}: tokenised {documents:,} documents, {tokens:,} tokens in {seconds:.1f} s", flush=True)
