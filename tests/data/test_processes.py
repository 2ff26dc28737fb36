"""The same global batches for any number of processes, workers and restarts, by real processes.

A server that has imported the loader is forked for each of them (no device is touched), so that a process costs
milliseconds; each makes its own loader, as a restarted run does.
"""

import hashlib
import json
import multiprocessing
import random
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ringbpt.config import DatasetConfig, JsonDatasetConfig, TextProcessorConfig, TokenizerConfig
from ringbpt.data.loader import make_loader
from ringbpt.data.stored.tokenise import SHARD_BYTES
from ringbpt.data.stored.tokens import COUNTED, ShardWriter, join_shards, open_store
from ringbpt.data.text.tokenizers import BytesTokenizer
from ringbpt.types import ALWAYS

STEPS, ROWS = 200, 8


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ringbpt.data.loader", "tests.data.test_processes"])
    return context


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DatasetConfig:
    """Several shards of documents; first epochs of a shuffled, packed data set."""
    folder = tmp_path_factory.mktemp("processes")
    numbers = random.Random(1)
    with open(folder / "data.jsonl", "w") as file:
        for number in range(1500):
            file.write(json.dumps({"text": f"{number} " + "word " * numbers.randrange(1, 40)}) + "\n")
    with open(folder / "long.jsonl", "w") as file:
        file.write((json.dumps({"text": "x" * 99_000}) + "\n") * (SHARD_BYTES // 50_000))
    return DatasetConfig(
        packing="best_fit",
        shuffle=True,
        cache_dir=str(folder / "cache"),
        text_processor=TextProcessorConfig(fields="text"),
        long_documents="drop",
        json_dataset=JsonDatasetConfig(
            path=f"{folder}/data.jsonl:0.9,{folder}/long.jsonl:0.1", seq_length=256, batch_size=ROWS
        ),
    )


def loader_of(dataset: DatasetConfig):
    return make_loader(dataset, BytesTokenizer(TokenizerConfig("bytes")), seed=3, vocab_size=258)


def rows_of(loader, step: int, start: int, stop: int) -> list[bytes]:
    """Each column's bytes of some rows of a global batch."""
    batch = loader.rows(step, start, stop)
    return [array.tobytes() for array in batch.by_name().values()]


def give(dataset: DatasetConfig, steps: range, start: int, stop: int, pipe) -> None:
    """One process: its rows of the global batches of some steps, and which loader gave them."""
    loader = loader_of(dataset)
    pipe.send((loader.fingerprint, [rows_of(loader, step, start, stop) for step in steps]))


def digest(context, dataset: DatasetConfig, processes: int) -> str:
    """sha256 over the first global batches, put together of what `processes` processes give at the same time."""
    pipes, share = [], ROWS // processes
    for process in range(processes):
        mine, theirs = context.Pipe(duplex=False)
        arguments = (dataset, range(STEPS), process * share, (process + 1) * share, theirs)
        context.Process(target=give, args=arguments).start()
        pipes.append(mine)
    parts = [pipe.recv() for pipe in pipes]
    assert len({fingerprint for fingerprint, _ in parts}) == 1
    found = hashlib.sha256()
    for step in range(STEPS):
        for column in range(len(ALWAYS)):
            found.update(b"".join(rows[step][column] for _, rows in parts))
    return found.hexdigest()


@pytest.mark.parametrize(
    ("processes", "workers"),
    [
        pytest.param(*both, marks=() if both in ((1, 0), (2, 4), (4, 1)) else pytest.mark.slow)
        for both in product((1, 2, 4), (0, 1, 4))
    ],
)
def test_processes_and_workers_change_nothing(server, dataset, tmp_path, processes, workers):
    """Each tokenises anew, the processes of a run together."""
    source = replace(dataset.json_dataset, tokenizer_processes=workers)
    elsewhere = replace(dataset, json_dataset=source, cache_dir=str(tmp_path))
    assert digest(server, elsewhere, processes) == loader_of(dataset).digest(STEPS)
    stores = sorted(path.name for path in tmp_path.glob("tokens-*"))
    assert len(stores) == 2 and not any(".work" in name for name in stores)


def run_on(dataset: DatasetConfig, step: int, steps: int, pipe) -> None:
    """A run from `step` on that is stopped `steps` later."""
    loader = loader_of(dataset)
    for number in range(step, step + steps):
        pipe.send(rows_of(loader, number, 0, ROWS))


def test_fifty_restarts_at_random_steps_change_nothing(server, dataset):
    expected = loader_of(dataset).digest(STEPS)
    stops = sorted(random.Random(7).sample(range(1, STEPS), 50))
    found = hashlib.sha256()
    for start, stop in zip([0, *stops], [*stops, STEPS], strict=True):
        mine, theirs = server.Pipe(duplex=False)
        process = server.Process(target=run_on, args=(dataset, start, stop - start + 1, theirs))  # one step too far
        process.start()
        for _ in range(start, stop):
            found.update(b"".join(mine.recv()))
        process.kill()
        process.join()
    assert found.hexdigest() == expected


def test_tokens_in_are_tokens_used_and_dropped(dataset):
    loader = loader_of(dataset)
    assert loader.tokens_in == loader.tokens_used + sum(loader.tokens_dropped.values())
    steps = range(loader.steps_per_epoch)
    real = sum(int((loader.rows(step, 0, ROWS).segment_BT > 0).sum()) for step in steps)
    assert real == loader.tokens_used and loader.tokens_dropped["documents longer than seq_length"] > 90_000


def resume(dataset: DatasetConfig, step: int, pipe) -> None:
    begin, wall = time.process_time(), time.perf_counter()
    loader = loader_of(dataset)
    token = loader.rows(step, 0, 1).token_BT[0]
    took = time.process_time() - begin, time.perf_counter() - wall
    pipe.send((took, len(loader.lengths), loader.steps_per_epoch, token.tolist()))


@pytest.mark.parametrize(
    ("packing", "documents"),
    [
        ("concat", 10**6),
        pytest.param("concat", 10**7, marks=pytest.mark.slow),
        pytest.param("best_fit", 10**7, marks=pytest.mark.slow),
    ],
)
def test_resuming_is_quick_in_the_middle_of_many_documents(server, tmp_path, packing, documents):
    """The tokens are laid down as tokenising would have left them; then a new process resumes."""
    name = tmp_path / "store"
    name.mkdir()
    writer = ShardWriter(name, 0, "uint16", lambda largest: None)
    tokens = np.arange(documents, dtype=np.int32) % 250
    writer.add(np.repeat(tokens, 4), np.ones(4 * documents, np.uint8), 4 * documents)
    writer._lengths = [4] * documents
    writer.close()
    join_shards(name, 1, {"shape": "text", "tokenizer": "bytes"})
    assert set(COUNTED) < set(open_store(name, "key").summary)
    data = DatasetConfig(type="tokens", packing=packing, shuffle=True, cache_dir=str(tmp_path / "cache"))
    data = replace(data, files_dataset=replace(data.files_dataset, path=str(name), seq_length=16, batch_size=1))
    step = documents // 10
    expected = loader_of(data).rows(step, 0, 1).token_BT[0]  # this run made the plan, as every run's first start does
    mine, theirs = server.Pipe(duplex=False)
    server.Process(target=resume, args=(data, step, theirs)).start()
    (seconds, wall), count, steps, token = mine.recv()
    print(f"resumed in {seconds:.3f} s of CPU time, {wall:.3f} s of the clock")
    assert (count, token) == (documents, expected.tolist()) and steps > step
    assert seconds < 1, seconds  # not the clock's: other tests run beside this one
