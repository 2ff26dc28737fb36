"""The loader: batches that depend on files, flags, seed and step alone, made once and refused in one line."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from glob import glob
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import (
    DatasetConfig,
    JsonDatasetConfig,
    PythonDatasetConfig,
    TextProcessorConfig,
    TokenizerConfig,
    UserError,
)
from ringbpt.data import loader as module
from ringbpt.data.loader import Loader, cache_folder, make_loader
from ringbpt.data.reading import files, sources
from ringbpt.data.stored import tokenise
from ringbpt.data.text.tokenizers import BytesTokenizer

TOKENIZER = BytesTokenizer(TokenizerConfig("bytes"))


@pytest.fixture
def dataset(tmp_path) -> DatasetConfig:
    """40 documents of 6..45 bytes, 1,020 in all."""
    texts = [f"{number:02d} " + "é" * (number % 20) + "abc" * (number // 20) for number in range(40)]
    content = "".join(json.dumps({"text": text, "prompt": "p"}) + "\n" for text in texts)
    (tmp_path / "data.jsonl").write_text(content)
    return DatasetConfig(
        cache_dir=str(tmp_path / "cache"),
        text_processor=TextProcessorConfig(fields="text"),
        json_dataset=JsonDatasetConfig(path=str(tmp_path / "data.jsonl"), seq_length=16, batch_size=4),
    )


def with_json(dataset: DatasetConfig, **values) -> DatasetConfig:
    return replace(dataset, json_dataset=replace(dataset.json_dataset, **values))


def load(dataset: DatasetConfig, seed: int = 1, vocab_size: int = 258, **kwargs) -> Loader:
    return make_loader(dataset, TOKENIZER, seed=seed, vocab_size=vocab_size, **kwargs)


def arrays(loader: Loader, step: int, start: int = 0, stop: int | None = None) -> list[np.ndarray]:
    batch = loader.rows(step, start, loader.batch_size if stop is None else stop)
    assert not batch.columns
    return [getattr(batch, field.name) for field in fields(batch)][:5]


def digest(loader: Loader, steps) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for step in steps for array in arrays(loader, step))).hexdigest()


def error(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folders(dataset: DatasetConfig) -> list[Path]:
    return [path for path in Path(dataset.cache_dir).iterdir() if path.name.startswith("tokens-")]


def test_concat_in_order_is_the_file(dataset):
    loader = load(dataset)
    lines = Path(dataset.json_dataset.path).read_text().splitlines()
    ids = [token for line in lines for token in (256, *json.loads(line)["text"].encode(), 257)]
    token, target, weight, position, segment = arrays(loader, 2)
    first = 2 * 4 * 16
    np.testing.assert_array_equal(token.ravel(), ids[first : first + 64])
    np.testing.assert_array_equal(target.ravel(), ids[first + 1 : first + 65])
    np.testing.assert_array_equal(weight, target != 256)
    np.testing.assert_array_equal(position, np.tile(np.arange(16), (4, 1)))
    assert (segment == 1).all()
    assert [array.dtype.name for array in (token, target, weight, position, segment)] == [
        "int32",
        "int32",
        "float32",
        "int32",
        "int32",
    ]
    assert loader.steps_per_epoch == (len(ids) - 1) // 16 // 4
    text_bytes = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert loader.bytes_per_token == text_bytes / (len(ids) - 40)  # bos takes no loss


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_rows_are_a_function_of_the_step(dataset, packing, tmp_path):
    shuffled = replace(dataset, packing=packing, shuffle=True)
    one = load(shuffled)
    steps = range(3 * one.steps_per_epoch)
    expected = [arrays(one, step) for step in steps]
    other = load(replace(shuffled, cache_dir=str(tmp_path / "elsewhere")))
    for step in reversed(steps):  # another order, one row at a time, out of another cache
        for row in (3, 0, 2, 1):
            for got, whole in zip(arrays(other, step, row, row + 1), expected[step], strict=True):
                np.testing.assert_array_equal(got, whole[row : row + 1])
    assert one.fingerprint == other.fingerprint
    assert arrays(one, 0, 2, 2)[0].shape == (0, 16)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_epochs_wrap_and_shuffle_anew(dataset, packing):
    plain, shuffled = (load(replace(dataset, packing=packing, shuffle=shuffle)) for shuffle in (False, True))
    epoch = plain.steps_per_epoch
    assert digest(plain, range(epoch)) == digest(plain, range(5 * epoch, 6 * epoch))
    size = shuffled.steps_per_epoch
    assert len({digest(shuffled, range(start * size, (start + 1) * size)) for start in range(4)}) == 4
    assert digest(load(replace(dataset, packing=packing, shuffle=True), seed=2), range(size)) != digest(
        shuffled, range(size)
    )


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_tokens_are_used_or_counted_as_dropped(dataset, packing):
    loader = load(replace(dataset, packing=packing, shuffle=True))
    total = sum(
        len(json.loads(line)["text"].encode()) + 2 for line in Path(dataset.json_dataset.path).read_text().splitlines()
    )
    assert loader.tokens_used + sum(loader.tokens_dropped.values()) == total
    real = sum(int((arrays(loader, step)[4] > 0).sum()) for step in range(loader.steps_per_epoch))
    assert real == loader.tokens_used
    assert loader.utilisation == real / (loader.steps_per_epoch * 4 * 16)
    description = loader.describe()
    assert "\n" not in description and "40 documents" in description and packing in description


def test_workers_do_not_change_the_batches(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    one = load(dataset)
    monkeypatch.setattr(tokenise, "SHARD_BYTES", 300)
    parallel = with_json(dataset, tokenizer_processes=2)
    two = load(replace(parallel, cache_dir=str(tmp_path / "two")))
    assert digest(one, range(one.steps_per_epoch)) == digest(two, range(one.steps_per_epoch))
    assert one.fingerprint == two.fingerprint


def test_tokenised_once(dataset, monkeypatch, capsys):
    first = load(dataset)
    assert capsys.readouterr().out.startswith("train_dataset: 40 documents, tokenised: ")
    monkeypatch.setattr(module, "make_store", None)
    again = load(replace(dataset, packing="first_fit", shuffle=True))
    assert again.bytes_per_token == first.bytes_per_token and not capsys.readouterr().out
    assert [path.name[:7] for path in folders(dataset)] == ["tokens-"]


# Imports inside the guard: the workers import this file again, and need not import jax.
KILLED = """
if __name__ == "__main__":
    import os, sys
    from ringbpt.config import DatasetConfig, JsonDatasetConfig, TextProcessorConfig, TokenizerConfig
    from ringbpt.data.loader import make_loader
    from ringbpt.data.text.tokenizers import BytesTokenizer

    from ringbpt.data.stored import tokenise

    os.cpu_count, tokenise.SHARD_BYTES = lambda: 2, 4096
    data = JsonDatasetConfig(path=sys.argv[1], tokenizer_processes=2)
    dataset = DatasetConfig(cache_dir=sys.argv[2], text_processor=TextProcessorConfig(fields="text"), json_dataset=data)
    make_loader(dataset, BytesTokenizer(TokenizerConfig("bytes")), seed=1, vocab_size=258)
"""


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in Linux's /proc")
def test_a_killed_run_leaves_its_finished_shards_and_no_workers(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "SHARD_BYTES", 4096)
    path, script = Path(dataset.json_dataset.path), tmp_path / "killed.py"
    path.write_text(path.read_text() * 1000)
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, script, path, dataset.cache_dir], env=environment)
    try:
        tokens = f"{dataset.cache_dir}/tokens-*.work/*.json"
        assert until(lambda: glob(tokens), 60)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: not any(running(int(child)) for child in children), 20)
    (work,) = folders(dataset)
    assert work.suffix == ".work"
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert len(load(dataset).fingerprint) == 64
    (whole,) = folders(dataset)
    assert whole.suffix == "" and len(list(whole.glob("0*.json"))) > len(done)
    assert {name: (whole / name).stat().st_mtime_ns for name in done} == done  # what was finished was not made again


def test_another_process_that_is_done_first_is_believed(dataset, monkeypatch):
    """It gives the store its last name between this one's last look at the shards and its joining them."""
    join = tokenise.join_shards

    def join_too_late(folder, *rest):
        join(folder, *rest)
        os.rename(folder, folder.with_suffix(""))
        join(folder, *rest)

    monkeypatch.setattr(tokenise, "join_shards", join_too_late)
    late = load(dataset)
    assert [path.suffix for path in Path(dataset.cache_dir).glob("tokens-*")] == [""]
    monkeypatch.undo()
    assert digest(load(dataset), range(4)) == digest(late, range(4))


def test_another_process_that_gives_up_takes_nothing_with_it(dataset, monkeypatch):
    """It removes the folder of the shards; this one begins again, and finds by itself what is wrong, if anything is."""
    real, calls = tokenise._make_shards, []

    def robbed(job, tokenizer, work, processes):
        calls.append(work)
        real(job, tokenizer, work, processes)
        if len(calls) == 1:
            shutil.rmtree(work)

    monkeypatch.setattr(tokenise, "_make_shards", robbed)
    assert load(dataset).steps_per_epoch > 0 and len(calls) == 2


def test_an_old_file_is_not_read_again(dataset, monkeypatch):
    past = time.time() - 100
    os.utime(dataset.json_dataset.path, (past, past))
    monkeypatch.setattr(files, "SETTLED_SECONDS", -10)  # its ctime is of now
    first = load(dataset)
    monkeypatch.setattr(sources, "scan_lines", lambda *_: pytest.fail("read again"))
    assert load(dataset).fingerprint == first.fingerprint
    monkeypatch.undo()
    path = Path(dataset.json_dataset.path)
    path.write_text(path.read_text().replace("00 ", "99 "))  # the same size
    assert load(dataset).fingerprint != first.fingerprint


def test_what_decides_the_tokens_is_in_the_key(dataset):
    prints = {load(dataset).fingerprint}
    for other in (
        replace(dataset, text_processor=replace(dataset.text_processor, add_eos_token=False)),
        replace(dataset, text_processor=replace(dataset.text_processor, prepend_text="x")),
        with_json(dataset, example_index_at_start=3),
    ):
        prints.add(load(other).fingerprint)
    assert len(folders(dataset)) == 4
    prints |= {
        load(replace(dataset, packing="first_fit")).fingerprint,
        load(replace(dataset, shuffle=True)).fingerprint,
    }
    prints |= {load(with_json(dataset, seq_length=8)).fingerprint, load(with_json(dataset, batch_size=2)).fingerprint}
    with open(dataset.json_dataset.path, "a") as file:
        file.write('{"text": "one more"}\n')
    prints.add(load(dataset).fingerprint)
    assert len(prints) == 9
    assert (
        load(replace(dataset, shuffle=True), seed=1).fingerprint
        != load(replace(dataset, shuffle=True), seed=2).fingerprint
    )
    assert load(dataset, seed=1).fingerprint == load(dataset, seed=2).fingerprint


def test_a_failure_leaves_no_tokens(dataset):
    with open(dataset.json_dataset.path, "a") as file:
        file.write('{"text": 3}\n')
    assert error(dataset) == f"{dataset.json_dataset.path}:41: field 'text' is a number; it must be a string"
    assert folders(dataset) == []


@pytest.mark.parametrize("name", ["00000.token", "00000.mask", "00000.check", "offset.npy", "summary.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_made_again(dataset, name, damage):
    before = digest(load(dataset), range(3))
    (folder,) = folders(dataset)
    if damage == "cut":
        os.truncate(folder / name, os.path.getsize(folder / name) // 2)
    else:
        (folder / name).unlink()
    assert digest(load(dataset), range(3)) == before


def test_always_start_with_bos(dataset):
    plain, bos = load(dataset), load(with_json(dataset, always_start_with_bos=True))
    for before, after in zip(arrays(plain, 1), arrays(bos, 1), strict=True):
        np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert (arrays(bos, 1)[0][:, 0] == 256).all() and (arrays(plain, 1)[0][:, 0] != 256).any()
    np.testing.assert_array_equal(arrays(plain, 1)[1], arrays(bos, 1)[1])
    assert plain.fingerprint != bos.fingerprint


def test_python_files_are_the_default_corpus(tmp_path):
    dataset = DatasetConfig(type="python", cache_dir=str(tmp_path), python_dataset=PythonDatasetConfig(split="heldout"))
    loader = load(dataset, flag="eval_dataset")
    token, *_ = arrays(loader, 0)
    assert token[0, 0] == 256 and "import" in TOKENIZER.decode(token.ravel())
    assert 0.99 < loader.bytes_per_token <= 1


def test_a_token_id_that_the_model_lacks(dataset):
    expected = "--llama.vocab_size=257 is too small for --tokenizer.vocab_file='bytes' (bytes), which gave the id 257: "
    assert error(dataset, vocab_size=257) == expected + "--llama.vocab_size=258 works"
    assert folders(dataset) == []
    load(dataset)
    assert error(dataset, vocab_size=257).endswith("--llama.vocab_size=258 works")  # and out of the cache
    large = replace(dataset, text_processor=TextProcessorConfig(fields="text,<|70000|>"))
    assert "--llama.vocab_size=70001 works" in error(large)


def test_data_that_makes_no_batch(dataset):
    group = "--eval_dataset.json_dataset"
    message = error(with_json(dataset, batch_size=500), flag="eval_dataset")
    assert message.startswith(f"{group}.batch_size=500 of seq_length=16 is more than the data: 40 documents of ")
    rows = int(message.split(" make ")[1].split(" rows")[0])
    assert message.endswith(f"{group}.batch_size={rows} is the largest that fits")
    assert load(with_json(dataset, batch_size=rows)).steps_per_epoch == 1
    message = error(with_json(dataset, seq_length=100_000), flag="eval_dataset")
    longest = int(message.split(f"{group}.seq_length=")[1].split(" ")[0])
    assert load(with_json(dataset, seq_length=longest)).steps_per_epoch == 1
    assert "seq_length" in error(with_json(dataset, seq_length=longest + 1))
    Path(dataset.json_dataset.path).write_text('{"text": "a"}\n')
    bare = replace(dataset.text_processor, add_bos_token=False, add_eos_token=False)
    assert error(replace(dataset, text_processor=bare, packing="first_fit")).endswith("give more data")
    assert error(replace(dataset, text_processor=bare)).endswith("give more data")


def test_labels_all_masked(dataset):
    masked = replace(dataset, text_processor=TextProcessorConfig(fields="[text]", add_eos_token=False))
    assert error(masked).startswith("--train_dataset.text_processor.fields='[text]': no token takes loss")


def test_special_tokens_alone_take_loss(dataset):
    loader = load(replace(dataset, text_processor=TextProcessorConfig(fields="[text]")))
    assert loader.bytes_per_token == float("inf") and "no text takes loss" in loader.describe()
    assert sum(arrays(loader, step)[2].sum() for step in range(loader.steps_per_epoch)) > 0


def rows_in_which_nothing_takes_loss(loader: Loader) -> int:
    return sum(int((arrays(loader, step)[2].sum(axis=1) == 0).sum()) for step in range(loader.steps_per_epoch))


def with_prompts(dataset: DatasetConfig, lengths: list[tuple[int, int]], **values) -> DatasetConfig:
    """Documents of so many bytes without loss, and with loss."""
    rows = [{"prompt": "q" * without, "completion": "a" * learnt} for without, learnt in lengths]
    Path(dataset.json_dataset.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_json(replace(dataset, text_processor=TextProcessorConfig(), packing="best_fit"), **values)


def test_rows_without_loss_are_counted_and_many_of_them_warned_of(dataset):
    """R29 of the reports: 8 prompts of 300 bytes and 3 bytes to learn, in rows of 64."""
    long = with_prompts(dataset, [(300, 3)] * 8, seq_length=64)
    loader = load(long)
    assert loader.rows_without_loss == (32, 40) and rows_in_which_nothing_takes_loss(loader) == 32
    said = loader.describe()
    assert "WARNING: nothing takes loss in 32 of 40 rows: " in said and "\n" not in said
    assert said.endswith("--train_dataset.json_dataset.seq_length=305 would keep the longest whole")
    whole = load(with_json(long, seq_length=305))
    assert whole.rows_without_loss == (0, 8) and "without loss" not in whole.describe()
    assert "WARNING" not in whole.describe()
    joined = load(replace(long, packing="concat"))
    assert joined.rows_without_loss == (rows_in_which_nothing_takes_loss(joined), joined.epoch_rows // 4 * 4)
    few = load(with_prompts(dataset, [(10, 3)] * 76 + [(64, 3)], seq_length=64, batch_size=1))
    assert few.rows_without_loss == (1, few.epoch_rows) and "WARNING" not in few.describe()
    assert f", 1 of {few.epoch_rows} rows without loss" in few.describe()


def test_documents_without_loss_are_warned_of(dataset):
    bare = TextProcessorConfig(fields="[prompt],completion", add_eos_token=False)
    some = with_prompts(dataset, [(10, 3)] * 17 + [(10, 0)] * 3)
    said = load(replace(some, text_processor=bare)).describe()
    assert "3 without loss" in said and "WARNING: nothing takes loss in" in said and "3 of 20 documents" in said
    assert said.endswith("python -m ringbpt.inspect with these flags shows what does")
    fewer = with_prompts(dataset, [(10, 3)] * 18 + [(10, 0)] * 2, seq_length=64, batch_size=1)
    said = load(replace(fewer, text_processor=bare)).describe()
    assert "2 without loss" in said and "WARNING" not in said


def test_of_many_rows_a_sample_is_looked_at_and_said_to_be_one(dataset, monkeypatch):
    monkeypatch.setattr(module, "COUNTED_ROWS", 100)
    monkeypatch.setattr(module, "SAMPLED_ROWS", 60)
    many = with_prompts(dataset, [(60, 30)] * 400, seq_length=32)
    loader = load(many)
    found, looked = loader.rows_without_loss
    assert loader.rows_without_loss == load(many).rows_without_loss and 50 <= looked <= 60 < loader.epoch_rows
    share = rows_in_which_nothing_takes_loss(loader) / loader.epoch_rows
    assert abs(found / looked - share) < 0.2
    rows = loader.steps_per_epoch * 4
    assert f"nothing takes loss in {found} of the {looked} rows looked at (of {rows:,})" in loader.describe()


def test_the_shape_is_told_and_said_once(dataset, capsys):
    unnamed = replace(dataset, text_processor=TextProcessorConfig())
    assert digest(load(unnamed), range(3)) == digest(load(dataset), range(3))
    out = capsys.readouterr().out
    assert out.startswith("train_dataset: text, 40 rows, tokenised: ") and out.count("text, 40 rows") == 1
    Path(dataset.json_dataset.path).write_text('{"a": "x", "b": 3}\n')
    assert error(unnamed) == (
        f"{dataset.json_dataset.path}:1: no shape that is known here in 'a', 'b': "
        "--train_dataset.text_processor.fields=a names the text to learn"
    )


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RINGBPT_CACHE", raising=False)
    assert cache_folder(DatasetConfig()) == tmp_path / ".cache" / "ringbpt"
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "env"))
    assert cache_folder(DatasetConfig()) == tmp_path / "env"
    assert cache_folder(DatasetConfig(cache_dir="~/mine")) == tmp_path / "mine"


def test_a_cache_that_cannot_be_written(dataset, tmp_path):
    (tmp_path / "file").touch()
    message = error(replace(dataset, cache_dir=str(tmp_path / "file")))
    assert message.startswith(f"--train_dataset.cache_dir='{tmp_path}/file': ")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_gzip_and_plain_give_the_same_batches(dataset, tmp_path):
    import gzip

    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(Path(dataset.json_dataset.path).read_bytes()))
    plain, packed = load(dataset), load(with_json(dataset, path=str(path)))
    assert plain.fingerprint == packed.fingerprint and digest(plain, range(4)) == digest(packed, range(4))
