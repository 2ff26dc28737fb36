"""A source to a store of tokens: shard by shard, in worker processes, shared among all who need it, and restartable.

The shards of a store are made in a folder beside it. Whoever needs the store (several processes of a machine, several
machines on one file system) takes the next shard that nobody has, so that none makes all of them; a killed run leaves
its complete shards to the next one.
"""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import TextProcessorConfig, TokenizerConfig, UserError, printable, say
from ringbpt.data.documents import ALONE
from ringbpt.data.reading.files import make_private, open_lock, remove, unwritable
from ringbpt.data.reading.sources import Source
from ringbpt.data.stored.tokens import ShardWriter, TokenStore, join_shards, open_store, shard_summary
from ringbpt.data.stored.workers import each
from ringbpt.data.text.text_processor import TextProcessor
from ringbpt.data.text.tokenizers import Tokenizer, make_tokenizer

SHARD_BYTES = 1 << 22  # of the source, about; more of a source that would make more than MOST_SHARDS
MOST_SHARDS = 1024
SAY_EVERY = 30.0  # seconds, where there is no terminal


@dataclass(frozen=True)
class Job:
    """What a worker process must know to make a shard.

    vocab_size: the model's. allowed: how many bad examples may be left out. mismatched: each prompt is to come with
    the completion of the example before it too, the first one's with the last one's.
    """

    source: Source
    tokenizer: TokenizerConfig
    processor: TextProcessorConfig
    shape: str
    flag: str
    vocab_size: int
    allowed: int
    mismatched: bool = False

    def token_dtype(self, tokenizer: Tokenizer) -> str:
        """The smallest type for the ids; fields may name any id."""
        any_id = "<|" in self.processor.fields or self.processor.fields_from_example
        return "int32" if any_id or tokenizer.vocab_size > 1 << 16 else "uint16"


def make_store(job: Job, tokenizer: Tokenizer, folder: Path, key: str, processes: int) -> TokenStore:
    """The store in `folder`, made now where it is not there, with what others are making of it at the same time.

    The result depends on the number of processes in nothing. Raises UserError for the first bad example in order, and
    then leaves nothing behind; code 4 where the folder cannot be written, or is damaged again.
    """
    for _ in range(3):
        if folder.exists():
            store = open_store(folder, key)
            if store is not None:
                return store
            shutil.rmtree(folder, ignore_errors=True)  # cut short from outside; it can be made again
        work = folder.with_name(f"{folder.name}.work")
        try:
            make_private(work)
            _make_shards(job, tokenizer, work, processes)
            if not folder.exists():
                os.rename(work, folder)
            remove(work)  # begun again by one that came too late
            for lock in folder.glob("*.lock"):
                lock.unlink(missing_ok=True)
        except FileNotFoundError:  # another process has finished, or has met a bad example and left: look again
            continue
        except OSError as error:
            if not folder.exists():  # another process may have been faster
                raise unwritable(folder.parent, job.flag, error) from None
        except UserError:
            remove(work)
            raise
    store = open_store(folder, key)
    if store is None:
        raise UserError(f"--{job.flag}.cache_dir={str(folder.parent)!r}: {folder.name} is damaged; remove it", code=4)
    return store


def _make_shards(job: Job, tokenizer: Tokenizer, work: Path, processes: int) -> None:
    begin, source = time.monotonic(), job.source
    # Their number depends on the source alone, so that a later run goes on with those of an earlier one.
    shards = max(1, min(len(source), MOST_SHARDS, -(-source.size // SHARD_BYTES)))
    edges = np.linspace(0, len(source), shards + 1).astype(np.int64).tolist()
    count, bad = 0, list[str]()
    with _progress(job.flag, len(source)) as advance:
        for wait in (False, True):  # first what nobody works on, then what the others have not finished
            todo = [shard for shard in range(shards) if shard_summary(work, shard) is None]
            for shard, summary in zip(todo, _run(job, tokenizer, work, edges, todo, processes, wait), strict=True):
                advance(edges[shard + 1] - edges[shard])
                if summary:
                    count, bad = count + summary["bad"], bad + summary["bad_lines"]
                    _check_bad(count, job, bad)
    totals = join_shards(work, shards, {"shape": job.shape, "tokenizer": tokenizer.fingerprint()})
    count, bad = totals["bad"], totals["bad_lines"]
    _check_bad(count, job, bad)
    seconds = time.monotonic() - begin
    left_out = f", {count:,} bad ones left out, the first: {bad[0]}" if count else ""
    rows = f"{job.shape}, {totals['documents']:,} rows" if job.shape else f"{totals['documents']:,} documents"
    said = f"{job.flag}: {rows}, tokenised: {totals['tokens']:,} tokens in {seconds:.1f} s{left_out}"
    say(printable(said))


def _check_bad(count: int, job: Job, lines: list[str]) -> None:
    if count > job.allowed:
        first = f" (the first: {lines[0]})" if lines else ""
        raise UserError(
            f"--{job.flag}.on_bad_line=skip:{job.allowed}: {count} bad examples{first}; "
            f"--{job.flag}.on_bad_line=skip:{count} would leave them out"
        )


def _run(
    job: Job, tokenizer: Tokenizer, work: Path, edges: list[int], todo: list[int], processes: int, wait: bool
) -> Iterator[dict[str, Any] | None]:
    """Makes the shards of `todo` in order; a summary is None where another process has the shard."""
    items = [(work, shard, edges[shard], edges[shard + 1], wait) for shard in todo]
    try:
        yield from each(_make_shard, items, partial(_begin, job), partial(_begin, job, tokenizer), processes)
    except BrokenProcessPool:
        raise UserError(
            f"--{job.flag}: a tokenizer process of {processes} died (out of memory, or a script without "
            "`if __name__ == '__main__'`); tokenizer_processes=1 works in this process",
            code=4,
        ) from None


def _begin(job: Job, tokenizer: Tokenizer | None = None) -> tuple[Job, TextProcessor]:
    return job, TextProcessor(job.processor, tokenizer or make_tokenizer(job.tokenizer), job.flag, job.shape)


def _make_shard(
    made: tuple[Job, TextProcessor], work: Path, shard: int, start: int, stop: int, wait: bool
) -> dict[str, Any] | None:
    """Makes a shard, or returns None where another process is at it; with `wait`, waits for that one to end."""
    job, processor = made
    try:
        lock = open_lock(work / f"{shard:05d}.lock")
    except FileNotFoundError:  # the whole store is finished, and has its own name
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        done = shard_summary(work, shard)
        if done is not None:
            return done
        check = partial(check_vocabulary, tokenizer=processor.tokenizer, vocab_size=job.vocab_size)
        writer = ShardWriter(work, shard, job.token_dtype(processor.tokenizer), check)
        try:
            for index in range(start, stop):
                try:
                    other = job.source[(index or len(job.source)) - 1] if job.mismatched else None
                    documents = processor.documents(job.source[index], Where(job.source, index), other)
                except UserError as error:
                    if not job.allowed:
                        raise
                    count, lines = writer.add_bad(str(error))
                    _check_bad(count, job, lines)
                    continue
                if len(documents) > 1 and documents[0].known is ALONE:
                    writer.add_split()
                if job.shape == "preference" and np.array_equal(documents[0].token, documents[1].token):
                    writer.add_alike()
                for document in documents:
                    writer.add(*document)
            return writer.close()
        finally:
            writer.abandon()


@dataclass(frozen=True)
class Where:
    """The place of an example; as text it is `file:line`, which is looked up only for a message."""

    source: Source
    index: int

    def __str__(self) -> str:
        return self.source.location(self.index)


def check_vocabulary(largest: int, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError where the model has no such token."""
    if largest >= vocab_size:
        works = max(tokenizer.vocab_size, largest + 1)
        raise UserError(
            f"--llama.vocab_size={vocab_size} is too small for --tokenizer.vocab_file={tokenizer.config.vocab_file!r} "
            f"({tokenizer.describe()}), which gave the id {largest}: --llama.vocab_size={works} works"
        )


def check_tokenizer(fingerprint: str, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError for tokens that another tokenizer has made; where: the flag that gave them, and its value."""
    if fingerprint != tokenizer.fingerprint():
        raise UserError(
            f"{where} was tokenised with another tokenizer than --tokenizer.vocab_file={tokenizer.config.vocab_file!r} "
            f"({tokenizer.describe()}): give the one it was made with"
        )


@contextmanager
def _progress(flag: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what is told of the examples that are done.

    It shows a bar with the time left on a terminal, a line now and then elsewhere; on stdout, as stderr is for errors.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    done, console = 0, Console()
    said = begin = time.monotonic()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenising {flag}", total=total)

        def advance(examples: int) -> None:
            nonlocal done, said
            done = min(total, done + examples)
            bar.update(task, completed=done)
            now = time.monotonic()
            if now - said > SAY_EVERY and not sys.stdout.isatty():
                said, left = now, (now - begin) / done * (total - done)
                say(f"{flag}: tokenised {done:,} of {total:,} examples, {left:.0f} s left")

        yield advance
