"""A column added to COLUMNS goes from disk to an objective, and stands where its token does, or is predicted."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.config import Config, DatasetConfig, FilesDatasetConfig, OptimizerConfig, TokenizerConfig, UserError
from ringbpt.data.loader import Loader, make_loader
from ringbpt.data.stored.columns import add_column
from ringbpt.data.stored.prepare import prepare
from ringbpt.data.stored.tokens import ShardWriter, TokenStore, join_shards, open_store
from ringbpt.data.text.tokenizers import BytesTokenizer
from ringbpt.mesh import put_batch
from ringbpt.objectives.objective import Objective
from ringbpt.training.step import make_gradients
from ringbpt.types import COLUMNS, Column, Mean
from tests.flags import llama_flags
from tests.model.helpers import make_model

BYTES = TokenizerConfig("bytes")
VOCAB, T, B = 512, 16, 4
TOY = {
    "toy_logp": Column("float32", -7.0, "target", "a log-probability of the target, in nats"),
    "toy_rank": Column("int32", -1, "token", "a number of the token"),
}
# No token stands in two documents, so that a token says what its columns must be.
LOGP, RANK = -np.arange(VOCAB) / 8.0, np.arange(VOCAB) * 3 + 1
LENGTHS = ((9, 5, 16, 3, 30, 7, 1, 12, 6, 8, 2, 11), (4, 13, 10, 6, 25, 8, 3, 9, 14, 5))


@pytest.fixture(autouse=True)
def toy_columns(monkeypatch):
    for name, column in TOY.items():
        monkeypatch.setitem(COLUMNS, name, column)


def write_store(folder: Path, lengths: Sequence[int], first: int, units: Sequence[int] | None = None) -> TokenStore:
    """Documents of the tokens first, first + 1, ... in two shards; every fifth token takes no loss."""
    folder.mkdir()
    tokens, half = first, len(lengths) // 2
    for shard, some in enumerate((lengths[:half], lengths[half:])):
        writer = ShardWriter(folder, shard, "int32", lambda largest: None)
        for length in some:
            ids = np.arange(tokens, tokens + length, dtype=np.int32)
            writer.add(ids, (ids % 5 != 0).astype(np.uint8), length)
            tokens += length
        writer.close()
    join_shards(folder, 2, {"shape": "", "tokenizer": "bytes"})
    if units is not None:
        np.save(folder / "units.npy", np.array(units, np.int64))
    store = open_store(folder, "key")
    assert store is not None and store.summary["max_token"] < VOCAB
    return store


def values(store: TokenStore, of_token: np.ndarray):
    return lambda document: of_token[store.values["token"][slice(*store.offset[document : document + 2].tolist())]]


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two stores with both of the toy columns."""
    for name, lengths, first in (("a", LENGTHS[0], 1), ("b", LENGTHS[1], 1 + sum(LENGTHS[0]))):
        store = write_store(tmp_path / name, lengths, first)
        add_column(store, "toy_logp", values(store, LOGP))
        add_column(store, "toy_rank", values(store, RANK))
    return [tmp_path / "a", tmp_path / "b"]


def dataset(path: str, tmp_path: Path, **kwargs) -> DatasetConfig:
    files = FilesDatasetConfig(path=path, seq_length=T, batch_size=B)
    settings = {"packing": "best_fit", "shuffle": True} | kwargs
    return DatasetConfig(type="tokens", cache_dir=str(tmp_path / "cache"), files_dataset=files, **settings)


def load(config: DatasetConfig, columns: Sequence[str] = tuple(TOY)) -> Loader:
    return make_loader(config, BytesTokenizer(BYTES), seed=3, vocab_size=VOCAB, columns=columns)


def check(batch) -> None:
    """Each place has its token's rank and its target's log-prob; where there is none, the padding."""
    token, target, segment, logp, rank = map(
        np.asarray,
        (batch.token_BT, batch.target_BT, batch.segment_BT, batch.columns["toy_logp"], batch.columns["toy_rank"]),
    )
    np.testing.assert_array_equal(rank, np.where(segment > 0, RANK[token], -1))
    predicts = target > 0  # no document has the token 0; its last token has nothing to predict
    np.testing.assert_array_equal(logp, np.where(predicts, LOGP[target], -7))
    np.testing.assert_array_equal(batch.weight_BT, predicts & (target % 5 != 0))


@pytest.fixture(scope="module")
def gradients():
    """(model, numbers(params, batch)): the step's own gradients with a toy objective, in two micro-batches."""
    model = make_model((1, 2, 1, 2), vocab_size=VOCAB, num_hidden_layers=1, sequence_layout="zigzag")

    def function(stats, batch, config):
        weight = jnp.sum(batch.weight_BT)
        logp, rank, real_BT = batch.columns["toy_logp"], batch.columns["toy_rank"], batch.segment_BT > 0
        return {
            "loss": Mean(-jnp.sum((stats.logp_BT - logp) * batch.weight_BT), weight),
            "reference": Mean(jnp.sum(logp * batch.weight_BT * batch.target_BT), weight),
            "rank": Mean(jnp.sum(jnp.where(real_BT, rank * batch.position_BT, 0)), jnp.sum(real_BT)),
        }

    objective = Objective(function, parts=lambda config: {"loss": 1.0}, shapes=(), columns=tuple(TOY))
    config = Config(optimizer=OptimizerConfig(accumulate_gradient_steps=2), **llama_flags())
    return model, jax.jit(make_gradients(config, model, objective))


@pytest.mark.parametrize("packing", ["concat", "first_fit", "best_fit", "balanced"])
@pytest.mark.parametrize("mixed", [False, True])
def test_from_disk_to_an_objective(folders, tmp_path, gradients, packing, mixed):
    path = f"{folders[0]}:0.6,{folders[1]}:0.4" if mixed else str(folders[0])
    loader, (model, numbers) = load(dataset(path, tmp_path, packing=packing)), gradients
    params = model.init(jax.random.key(0))
    for step in range(loader.steps_per_epoch):
        host = loader.rows(step, 0, B)
        check(host)
        batch = put_batch(lambda a, b, step=step: loader.rows(step, a, b), (B, T), model.mesh, "zigzag")
        check(batch)
        assert not np.array_equal(np.asarray(batch.columns["toy_rank"]), host.columns["toy_rank"])  # in layout order
    _, found = numbers(params, batch)
    weighted = host.weight_BT > 0
    target, real = host.target_BT[weighted], host.segment_BT > 0
    assert found["reference"].value() == pytest.approx((LOGP[target] * target).mean(), rel=1e-6)
    assert found["rank"].value() == pytest.approx((RANK[host.token_BT] * host.position_BT)[real].mean(), rel=1e-6)
    plain = replace(batch, columns={"toy_logp": batch.columns["toy_logp"] * 0, "toy_rank": batch.columns["toy_rank"]})
    difference = found["loss"].value() - numbers(params, plain)[1]["loss"].value()
    assert float(difference) == pytest.approx(LOGP[target].mean(), rel=1e-4)


def test_packed_rows_have_them_too(folders, tmp_path):
    config = dataset(str(folders[0]), tmp_path)
    manifest = prepare(
        config, BYTES, tmp_path / "rows", seed=3, vocab_size=VOCAB, columns=tuple(TOY), say=lambda text: None
    )
    assert manifest["columns"] == {
        "token": "<i4", "target": "<i4", "weight": "<f4", "position": "<i4", "segment": "<i4",
        "toy_logp": "<f4", "toy_rank": "<i4",
    }  # fmt: skip
    rows = dataset(str(tmp_path / "rows"), tmp_path, shuffle=False)
    loader, made = load(rows), load(config)
    for number in range(loader.epoch_rows):
        row, wanted = loader.row(0, number), made.row(0, number)
        assert row.keys() == wanted.keys()
        assert all(np.array_equal(row[name], wanted[name]) for name in row)
    check(loader.rows(0, 0, B))
    assert load(rows, ["toy_rank"]).rows(0, 0, B).columns.keys() == {"toy_rank"}
    assert not load(rows, []).rows(0, 0, B).columns
    plain = prepare(config, BYTES, tmp_path / "plain", seed=3, vocab_size=VOCAB, say=lambda text: None)
    with pytest.raises(UserError, match=r"rows have no column 'toy_(logp|rank)'; pack them again"):
        load(replace(rows, files_dataset=replace(rows.files_dataset, path=str(tmp_path / "plain"))))
    del plain["columns"]  # as it was written before there were others
    (tmp_path / "plain" / "manifest.json").write_text(json.dumps(plain))
    old = replace(rows, files_dataset=replace(rows.files_dataset, path=str(tmp_path / "plain")))
    assert load(old, []).digest(2) == load(rows, []).digest(2)


def test_they_change_nothing_else(folders, tmp_path):
    config = dataset(str(folders[0]), tmp_path)
    without, bare = load(config, []), write_store(tmp_path / "bare", LENGTHS[0], 1)
    assert bare.values.keys() == {"token", "mask"} and not without.rows(0, 0, B).columns
    other = load(dataset(str(tmp_path / "bare"), tmp_path), [])
    assert (other.digest(2), other.fingerprint) == (without.digest(2), without.fingerprint)
    assert load(config).fingerprint not in (without.fingerprint, load(config, ["toy_rank"]).fingerprint)
    batch = load(config).rows(1, 1, 3)
    for name, array in without.rows(1, 1, 3).by_name().items():
        np.testing.assert_array_equal(batch.by_name()[name], array)


def test_a_column_that_is_not_there_in_full(tmp_path):
    store = write_store(tmp_path / "a", LENGTHS[0], 1)
    config = dataset(str(tmp_path / "a"), tmp_path)

    def error(columns=("toy_rank",)) -> str:
        with pytest.raises(UserError) as caught:
            load(config, columns).digest(2)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"path='{tmp_path / 'a'}' has no column 'toy_rank'" in error()
    add_column(store, "toy_rank", values(store, RANK), shards=[0])
    assert "has no column 'toy_rank'" in error()
    asked: list[int] = []
    with pytest.raises(ValueError, match=r"toy_rank: \(3,\) values for the 1 tokens of 6"):
        add_column(store, "toy_rank", lambda document: asked.append(document) or np.zeros(3))
    assert "has no column 'toy_rank'" in error() and asked == [6]  # the first shard was there
    add_column(store, "toy_rank", values(store, RANK))
    load(config, ["toy_rank"]).digest(2)
    content = bytearray((tmp_path / "a" / "00001.toy_rank").read_bytes())
    content[5] ^= 1
    (tmp_path / "a" / "00001.toy_rank").write_bytes(content)
    assert "00001.toy_rank: the bytes from 0 on are not those that were written" in error()
    (tmp_path / "a" / "00001.toy_rank").write_bytes(content[:-1])
    assert "has no column 'toy_rank'" in error()
