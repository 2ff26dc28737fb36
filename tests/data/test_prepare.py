"""Rows prepared ahead are the rows that training would have made; tokenizers are trained and used; by the scripts."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import DatasetConfig, FilesDatasetConfig, TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.loader import make_loader
from ringbpt.data.stored import prepare as module
from ringbpt.data.stored.prepare import prepare
from ringbpt.data.text.tokenizers import BytesTokenizer, make_tokenizer
from ringbpt.data.text.train_tokenizer import train

ROOT = Path(__file__).parents[2]
BYTES = TokenizerConfig("bytes")


@pytest.fixture
def dataset(tmp_path) -> DatasetConfig:
    texts = [f"{number} " + "word é " * (number % 9) for number in range(300)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = FilesDatasetConfig(path=str(tmp_path / "data.jsonl"), seq_length=64, batch_size=2)
    return DatasetConfig(
        type="files", packing="best_fit", shuffle=True, cache_dir=str(tmp_path / "cache"), files_dataset=files
    )


def make(dataset: DatasetConfig, folder: Path, processes: int = 1, **kwargs) -> dict:
    settings = {"seed": 1, "vocab_size": 258, "processes": processes} | kwargs
    return prepare(dataset, BYTES, folder, say=lambda text: None, **settings)


def load(dataset: DatasetConfig, **kwargs):
    return make_loader(dataset, BytesTokenizer(BYTES), **{"seed": 1, "vocab_size": 258} | kwargs)


def packed(dataset: DatasetConfig, folder: Path) -> DatasetConfig:
    return replace(dataset, type="tokens", files_dataset=replace(dataset.files_dataset, path=str(folder)))


def error(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_are_those_that_training_makes(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 20 * 64 * 20)  # 20 rows a file
    manifest = make(dataset, tmp_path / "rows")
    assert len(manifest["shards"]) == -(-manifest["rows"] // 20) > 4
    plain, rows = load(dataset), load(packed(dataset, tmp_path / "rows"))
    assert rows.steps_per_epoch == plain.steps_per_epoch and rows.tokens_in == plain.tokens_in
    plan = replace(packed(dataset, tmp_path / "rows"), shuffle=False)
    in_order = load(plan)
    for number in (0, 33, manifest["rows"] - 1):
        wanted = plain.row(0, number)
        for name, got in in_order.row(0, number).items():
            np.testing.assert_array_equal(got, wanted[name])
    numbers = range(manifest["rows"])
    both = [{bytes(some.row(epoch, n)["token"]) for n in numbers} for some in (plain, rows) for epoch in (0, 1)]
    assert all(some == both[0] for some in both) and rows.digest(9) != in_order.digest(9)


def test_a_killed_run_goes_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 20 * 64 * 20)
    whole = make(dataset, tmp_path / "whole")
    real, written = module.write_rows, []

    def dies(path, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, rows)

    monkeypatch.setattr(module, "write_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        make(dataset, tmp_path / "rows")
    assert not (tmp_path / "rows" / "manifest.json").exists()
    monkeypatch.setattr(module, "write_rows", lambda path, rows: written.append(path.name) or real(path, rows))
    assert make(dataset, tmp_path / "rows")["rows"] == whole["rows"] and len(set(written)) == len(written)
    assert load(packed(dataset, tmp_path / "rows")).digest(5) == load(packed(dataset, tmp_path / "whole")).digest(5)
    assert "holds rows of other data or flags" in error(make, dataset, tmp_path / "rows", seed=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty: give a new folder" in error(make, dataset, tmp_path / "full")


def test_rows_that_do_not_fit_the_run(dataset, tmp_path):
    make(dataset, tmp_path / "rows")
    config = packed(dataset, tmp_path / "rows")
    longer = replace(config, files_dataset=replace(config.files_dataset, seq_length=128))
    assert error(load, longer).endswith("have 64 tokens: --train_dataset.files_dataset.seq_length=64")
    assert "--llama.vocab_size=258 works" in error(load, config, vocab_size=100)
    (tmp_path / "rows" / "rows-00000.array_record").write_bytes(b"short")
    assert "rows-00000.array_record:1: missing, or not of " in error(load, config)
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    assert "no manifest of 'ringbpt packed rows 1'" in error(load, config)


def test_a_store_of_tokens_is_read_as_it_is(dataset, tmp_path):
    plain = load(dataset)
    (store,) = Path(dataset.cache_dir).glob("tokens-*")
    assert load(packed(dataset, store)).digest(5) == plain.digest(5)
    summary = json.loads((store / "summary.json").read_text())
    del summary["own_crc32"]  # as an older version wrote it: else the change alone would be refused
    (store / "summary.json").write_text(json.dumps(summary | {"tokenizer": "another"}))
    assert "was tokenised with another tokenizer than --tokenizer.vocab_file='bytes'" in error(
        load, packed(dataset, store)
    )


def test_a_flipped_bit_in_a_store_is_no_token(dataset):
    load(dataset)
    (store,) = Path(dataset.cache_dir).glob("tokens-*")
    content = bytearray((store / "00000.token").read_bytes())
    content[len(content) // 2] ^= 1
    (store / "00000.token").write_bytes(content)
    damaged = load(dataset)
    with pytest.raises(UserError, match=r"00000\.token: the bytes from 0 on are not those that were written") as caught:
        damaged.digest(3)
    assert caught.value.code == 4


@pytest.mark.parametrize(("kind", "name"), [("sentencepiece", "tok.model"), ("bpe", "tok")])
def test_a_tokenizer_is_trained_and_used(dataset, tmp_path, kind, name, capsys):
    train(dataset, tmp_path / name, kind, 280, 1000)
    shown = capsys.readouterr()
    assert f"--tokenizer.vocab_file={tmp_path / name}" in shown.out and "300/300" in shown.err
    tokenizer = make_tokenizer(TokenizerConfig(str(tmp_path / name)))
    assert (tokenizer.ends.bos, tokenizer.ends.eos) == (1, 2) and tokenizer.vocab_size <= 300
    text = "17 word é word é 再\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) < len(text.encode())
    loader = make_loader(dataset, tokenizer, seed=1, vocab_size=300)
    assert loader.bytes_per_token > 2
    narrow = replace(dataset, text_processor=TextProcessorConfig(fields="[nothing],text"))
    train(narrow, tmp_path / f"narrow{name}", kind, 280, 1000)


def script(name: str, *flags: str, code: int = 0) -> str:
    command = [sys.executable, str(ROOT / "scripts" / name), *flags]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_the_scripts(dataset, tmp_path):
    data = (
        "--train_dataset.type=files",
        f"--train_dataset.files_dataset.path={dataset.files_dataset.path}",
        f"--train_dataset.cache_dir={tmp_path / 'scripts'}",
    )
    out = script("train_tokenizer.py", f"--output={tmp_path / 'tok.model'}", "--vocab_size=280", *data)
    assert "use it as --tokenizer.vocab_file=" in out
    flags = (*data, f"--tokenizer.vocab_file={tmp_path / 'tok.model'}", "--train_dataset.files_dataset.seq_length=64")
    out = script("prepare_data.py", f"--output={tmp_path / 'rows'}", *flags)
    assert "tokens/s" in out and (tmp_path / "rows" / "manifest.json").exists()
    script("prepare_data.py", f"--output={tmp_path / 'copy.jsonl'}", *flags)
    assert (tmp_path / "copy.jsonl").read_text().count("\n") == 300
    path = dataset.files_dataset.path
    twice = [flag.replace(path, f"{path},{path}") for flag in flags]
    script("prepare_data.py", f"--output={tmp_path / 'twice.jsonl'}", *twice)
    assert (tmp_path / "twice.jsonl").read_text() == 2 * (tmp_path / "copy.jsonl").read_text()
    assert "error: --output is empty" in script("prepare_data.py", *flags, code=2)
