"""Batches by step: the data tokenised once into a cache on disk, packed by a plan, read at random.

The rows of a step are a pure function of (files, flags, seed, step): there is no state to save or to restore.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ringbpt.config import DatasetConfig, UserError, bad_lines_allowed
from ringbpt.data.packing import Arrays, Plan, Row, Store, interleave, make_plan, mix
from ringbpt.data.reading.catalogue import Part, make_source, parts_of
from ringbpt.data.reading.files import cached, digest_of
from ringbpt.data.reading.sources import Source
from ringbpt.data.stored.rows import open_rows
from ringbpt.data.stored.tokenise import Job, check_vocabulary, make_store, token_dtype
from ringbpt.data.stored.tokens import FORMAT, Column, TokenStore, open_megatron, open_store
from ringbpt.data.text.shapes import detect
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.types import Batch

PLAN_FORMAT = "2"  # part of a kept plan's key
KEPT_DOCUMENTS = 100_000  # the plan of more documents is kept on disk: making it takes longer than a start should
SAMPLED_TOKENS = 100_000  # to tell how many bytes a token has, where only tokens are there
NOT_FOR_SFT = {
    "preference": "output_key=chosen learns the chosen answers",
    "kto": "output_key=completion learns all completions",
    "rl": "a prompt alone has nothing to learn: output_key names the answer",
}


class Loader:
    """The batches of one dataset. Threads may share it.

    batch_size and seq_length are the global batch's; steps_per_epoch counts whole batches, and the rows that fill
    none are dropped. bytes_per_token: UTF-8 bytes of text per token, over what takes loss, so that loss in nats
    / ln 2 / bytes_per_token is bits per byte; inf where special tokens alone take loss. tokens_in: of the documents
    as often as an epoch has them; tokens_used, tokens_dropped (by reason) of the first epoch add up to it.
    utilisation: the share of the places of its batches that hold a token. fingerprint: of the batches, whatever the
    step. lengths: tokens of each document, int64. epoch_rows: with those that fill no batch; packing_dropped: what
    stands in none of them. summary: see TokenStore.
    """

    def __init__(
        self, data: TokenStore, plan: Plan, dataset: DatasetConfig, tokenizer: Tokenizer, vocab_size: int, identity: str
    ):
        self.batch_size, self.seq_length = dataset.batch_size, dataset.seq_length
        self.steps_per_epoch = plan.rows // self.batch_size
        self.bytes_per_token = (data.summary["loss_bytes"] or math.inf) / data.summary["loss_tokens"]
        self.fingerprint = hashlib.sha256(f"{data.key} {identity}".encode()).hexdigest()
        rows = self.steps_per_epoch * self.batch_size
        self.tokens_used = plan.tokens_in(0, rows)
        last_batch = plan.tokens_in(0, plan.rows) - self.tokens_used
        reasons = plan.dropped | {"incomplete last batch": last_batch}
        self.tokens_dropped = {reason: count for reason, count in reasons.items() if count}
        self.tokens_in = self.tokens_used + sum(self.tokens_dropped.values())
        self.utilisation = self.tokens_used / (rows * self.seq_length)
        self.epoch_rows, self.packing_dropped, self.summary = plan.rows, plan.dropped, data.summary
        self._data, self._plan, self._dataset = data, plan, dataset
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._bos_token_id = tokenizer.bos_token_id if getattr(dataset.source, "always_start_with_bos", False) else None

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self._data.offset)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop of the global batch `step` (from 0): numpy arrays [stop - start, T]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        shape = (stop - start, self.seq_length)
        arrays = [np.empty(shape, np.float32 if name == "weight" else np.int32) for name in COLUMNS]
        for place, row in enumerate(range(start, stop)):
            values = self.row(epoch, index * self.batch_size + row)
            for array, value in zip(arrays, values, strict=True):
                array[place] = value
        if self._data.summary["max_token"] < 0 and stop > start:  # not known before
            check_vocabulary(int(max(arrays[0].max(), arrays[1].max())), self._tokenizer, self._vocab_size)
        if self._bos_token_id is not None:
            arrays[0][:, :1] = self._bos_token_id
        return Batch(*arrays)

    def row(self, epoch: int, row: int) -> Row:
        """Row `row` of an epoch, of epoch_rows."""
        return self._plan.row(epoch, row, self._data.token, self._data.mask)

    def digest(self, steps: int) -> str:
        """sha256 of the first `steps` global batches: every column's bytes, little-endian, batch by batch."""
        found = hashlib.sha256()
        for step in range(steps):
            batch = self.rows(step, 0, self.batch_size)
            for name in COLUMNS:
                array = getattr(batch, f"{name}_BT")
                found.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
        return found.hexdigest()

    def describe(self) -> str:
        """One line: what there is, how it is packed, and what was dropped and why."""
        summary, dropped = self._data.summary, self.tokens_dropped
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        repeated = self.tokens_in - summary["tokens"]
        bad = f" ({summary['bad']:,} bad examples left out)" if summary["bad"] else ""
        return (
            f"{summary['documents']:,} documents{bad}, {summary['tokens']:,} tokens"
            + (f" and {repeated:,} repeated by the weights" if repeated > 0 else "")
            + f", {self.bytes_per_token:.2f} bytes a token; {self._dataset.packing}: {self.steps_per_epoch:,} steps of "
            f"{self.batch_size} x {self.seq_length:,} an "
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
    if getattr(dataset.source, "always_start_with_bos", False) and tokenizer.bos_token_id is None:
        raise UserError(
            f"--{flag}.{dataset.group}.always_start_with_bos=True: the tokenizer ({tokenizer.describe()}) has "
            "no bos token; False works"
        )
    plan: Plan
    cache_dir = cache_folder(dataset)
    parts = parts_of(dataset, flag)
    order = f"shuffled {seed}" if dataset.shuffle else "in order"
    if parts[0].kind == "tokens" and (packed := open_rows(parts[0].path, dataset, tokenizer, seed, flag)):
        if len(parts) > 1:
            raise UserError(f"--{flag}.{dataset.group}.path: packed rows cannot be mixed; pack them together")
        data, plan = packed[0], packed[1]
        check_vocabulary(data.summary["max_token"], tokenizer, vocab_size)
        identity = f"packed {dataset.batch_size} {order}"
    else:
        stores = [_store(dataset, part, tokenizer, cache_dir, vocab_size, flag) for part in parts]
        data = _joined(stores)
        weights = [part.weight for part in parts]
        plan = _plan(dataset, stores, weights, data, seed, cache_dir, flag)
        shares = "" if weights[0] is None else f" {weights}"
        dropping = "" if dataset.long_documents == "split" else f" {dataset.long_documents}"
        identity = f"{dataset.packing} {dataset.seq_length} {dataset.batch_size} {order}{shares}{dropping}"
    _check_size(plan, data, dataset, flag)
    bos = tokenizer.bos_token_id if getattr(dataset.source, "always_start_with_bos", False) else None
    return Loader(data, plan, dataset, tokenizer, vocab_size, f"{identity} {bos}")


def cache_folder(dataset: DatasetConfig) -> Path:
    """`cache_dir`, else $RINGBPT_CACHE, else ~/.cache/ringbpt; it need not be there yet."""
    return Path(dataset.cache_dir or os.environ.get("RINGBPT_CACHE") or "~/.cache/ringbpt").expanduser()


# --- tokens ---


def _store(
    dataset: DatasetConfig, part: Part, tokenizer: Tokenizer, cache_dir: Path, vocab_size: int, flag: str
) -> TokenStore:
    """The tokens of one part of a dataset."""
    path_flag = f"--{flag}.{dataset.group}.path"
    if part.kind == "megatron":
        return _measured(open_megatron(part.path, cache_dir, path_flag), tokenizer)
    if part.kind == "tokens":
        folder = Path(part.path).expanduser()
        try:
            key = hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()
        except OSError:
            raise UserError(
                f"{path_flag}={part.path!r} has neither a manifest.json nor a summary.json: give a folder that "
                "scripts/prepare_data.py wrote"
            ) from None
        store = open_store(folder, key)
        if store is None:
            raise UserError(f"{folder}/summary.json:1: the folder is damaged; copy it again", code=4)
        check_tokenizer(store.summary["tokenizer"], tokenizer, path_flag, part.path)
    else:
        store = _tokenised(dataset, part, tokenizer, cache_dir, vocab_size, flag)
    check_vocabulary(store.summary["max_token"], tokenizer, vocab_size)
    return store


def check_tokenizer(fingerprint: str, tokenizer: Tokenizer, path_flag: str, path: str) -> None:
    """Raises UserError for tokens that another tokenizer has made."""
    if fingerprint != tokenizer.fingerprint():
        raise UserError(
            f"{path_flag}={path!r} was tokenised with another tokenizer than --tokenizer.vocab_file="
            f"{tokenizer.config.vocab_file!r} ({tokenizer.describe()}): give the one it was made with"
        )


def _tokenised(
    dataset: DatasetConfig, part: Part, tokenizer: Tokenizer, cache_dir: Path, vocab_size: int, flag: str
) -> TokenStore:
    source = make_source(dataset, part, cache_dir, flag)
    processor = dataset.text_processor
    allowed = bad_lines_allowed(dataset.on_bad_line, f"--{flag}.on_bad_line")
    bad = f"skip {allowed}" if allowed else ""
    parts = [FORMAT, source.fingerprint(), tokenizer.fingerprint(), json.dumps(asdict(processor)), bad]
    key = digest_of(parts)
    folder = cache_dir / f"tokens-{key[:32]}"
    if (store := open_store(folder, key)) is not None:  # without a look at the source
        return store
    shape = "" if processor.fields or processor.fields_from_example else _shape(source, dataset, allowed, flag)
    job = Job(
        source=source,
        tokenizer=tokenizer.config,
        processor=processor,
        shape=shape,
        flag=flag,
        vocab_size=vocab_size,
        allowed=allowed,
        dtype=token_dtype(tokenizer, processor),
        fingerprint=tokenizer.fingerprint(),
    )
    return make_store(job, tokenizer, folder, key, getattr(dataset.source, "tokenizer_processes", 1))


def _shape(source: Source, dataset: DatasetConfig, allowed: int, flag: str) -> str:
    """The shape of the first example that can be read."""
    for index in range(min(len(source), allowed + 1)):
        try:
            shape = detect(source[index], dataset.text_processor, f"{flag}.text_processor", source.location(index))
            break
        except UserError:
            if index == allowed or index == len(source) - 1:
                raise
    if shape in NOT_FOR_SFT:
        raise UserError(
            f"{source.location(index)}: a {shape!r} example does not go with --objective=sft: "
            f"--{flag}.text_processor.{NOT_FOR_SFT[shape]}"
        )
    return shape


def _measured(store: TokenStore, tokenizer: Tokenizer) -> TokenStore:
    """The store with its loss_bytes, as a sample of its tokens tells them."""
    sampled = size = 0
    for start, stop in zip(store.offset[:-1].tolist(), store.offset[1:].tolist(), strict=True):
        stop = min(stop, start + SAMPLED_TOKENS - sampled)
        tokens = store.token[start:stop]
        size += len(tokenizer.decode(tokens[tokens < tokenizer.vocab_size]).encode("utf-8", errors="replace"))
        sampled += stop - start
        if sampled >= SAMPLED_TOKENS:
            break
    total = store.summary["loss_tokens"]
    return replace(store, summary=store.summary | {"loss_bytes": round(size * total / max(1, sampled))})


def _joined(stores: list[TokenStore]) -> TokenStore:
    """Several stores as one, one after the other."""
    if len(stores) == 1:
        return stores[0]
    totals = [store.summary["tokens"] for store in stores]
    before = np.cumsum([0, *totals]).tolist()
    offset = np.concatenate([np.zeros(1, np.int64), *(s.offset[1:] + b for s, b in zip(stores, before, strict=False))])
    names = ("documents", "tokens", "loss_tokens", "loss_bytes", "bad")
    summary = {name: sum(store.summary[name] for store in stores) for name in names}
    largest = [store.summary["max_token"] for store in stores]
    summary["max_token"] = -1 if -1 in largest else max(largest)
    token = Column([store.token for store in stores], totals)
    mask = Column([store.mask for store in stores], totals)
    return TokenStore(token, mask, offset, summary, digest_of([store.key for store in stores]))


# --- the plan ---


def _plan(
    dataset: DatasetConfig,
    stores: list[TokenStore],
    weights: list[float | None],
    data: TokenStore,
    seed: int,
    cache_dir: Path,
    flag: str,
) -> Plan:
    seq_length, shuffle = dataset.seq_length, dataset.shuffle
    starts, stops = data.offset[:-1], data.offset[1:]
    dropped: dict[str, int] = {}
    if weights[0] is not None:
        counts = [len(store.offset) - 1 for store in stores]
        times = list(mix(counts, [weight or 0.0 for weight in weights], seed if shuffle else None))
        dropped["left out by the weights"] = int((stops - starts)[np.concatenate(times) == 0].sum())
        documents = interleave(times)
        starts, stops = starts[documents], stops[documents]
    if dataset.long_documents != "split":
        fits = stops - starts <= seq_length
        long = np.flatnonzero(~fits)
        if dataset.long_documents == "refuse" and len(long):
            length = int((stops - starts)[long[0]])
            raise UserError(
                f"--{flag}.long_documents=refuse: {len(long)} documents are longer than --{flag}.{dataset.group}."
                f"seq_length={seq_length}, the first of them document {int(long[0]) + 1} with {length} tokens: "
                f"--{flag}.long_documents=split or =drop, or seq_length={int((stops - starts).max())}"
            )
        dropped["documents longer than seq_length"] = int((stops - starts)[long].sum())
        starts, stops = starts[fits], stops[fits]
    shares = json.dumps([weights, seed if shuffle else None, dataset.packing, seq_length, dataset.long_documents])
    key = digest_of([PLAN_FORMAT, data.key, shares])
    store: Store = partial(_kept, cache_dir, key, flag) if len(starts) >= KEPT_DOCUMENTS else _made
    plan = make_plan(starts, stops, seq_length, packing=dataset.packing, seed=seed, shuffle=shuffle, store=store)
    plan.dropped |= dropped
    return plan


def _made(name: str, build) -> Arrays:  # type: ignore[no-untyped-def]
    return build()


def _kept(cache_dir: Path, key: str, flag: str, name: str, build) -> Arrays:  # type: ignore[no-untyped-def]
    """The arrays of a plan, kept in the cache and mapped from there."""

    def write(folder: Path) -> None:
        folder.mkdir()
        for array_name, array in build().items():
            np.save(folder / f"{array_name}.npy", array)

    folder = cached(cache_dir, f"plan-{key[:32]}-{name.replace(' ', '-')}", write, flag)
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")}


def _check_size(plan: Plan, data: TokenStore, dataset: DatasetConfig, flag: str) -> None:
    """Raises UserError where there is nothing to learn, or not one whole batch."""
    if not data.summary["loss_tokens"]:
        processor = dataset.text_processor
        if not processor.fields:
            raise UserError(
                f"--{flag}.text_processor.roles_to_train={processor.roles_to_train!r}: no token takes loss; name a "
                "role that says something, as assistant"
            )
        raise UserError(
            f"--{flag}.text_processor.fields={processor.fields!r}: no token takes loss; "
            "take the [..] off the fields to be learnt"
        )
    if plan.rows >= dataset.batch_size:
        return
    group, tokens = f"--{flag}.{dataset.group}", data.summary["tokens"]
    problem = (
        f"{group}.batch_size={dataset.batch_size} of seq_length={dataset.seq_length} is more than the data: "
        f"{data.summary['documents']} documents of {tokens} tokens make {plan.rows} rows"
    )
    shorter = (tokens - 1) // dataset.batch_size
    if plan.rows:
        raise UserError(f"{problem}; {group}.batch_size={plan.rows} is the largest that fits")
    if shorter and dataset.packing == "concat":
        raise UserError(f"{problem}; {group}.seq_length={shorter} is the longest that fits")
    raise UserError(f"{problem}; give more data")
