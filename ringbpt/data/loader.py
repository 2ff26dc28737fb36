"""Batches by step: the data tokenised once into a cache on disk, packed by a plan, read at random.

The rows of a step are a pure function of (files, flags, seed, step): there is no state to save or to restore.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ringbpt.config import DatasetConfig, UserError, bad_lines_allowed, printable
from ringbpt.config.foreign import user_path
from ringbpt.data.documents import Row
from ringbpt.data.epochs import Request, Taken, cache_folder, check_size, make_plan, units_in
from ringbpt.data.packing import Packing
from ringbpt.data.reading.catalogue import Part, make_source, parts_of
from ringbpt.data.reading.files import digest_of
from ringbpt.data.reading.sources import Source
from ringbpt.data.stored.columns import with_columns
from ringbpt.data.stored.megatron import open_megatron
from ringbpt.data.stored.rows import open_rows
from ringbpt.data.stored.tokenise import Job, check_tokenizer, check_vocabulary, make_store
from ringbpt.data.stored.tokens import COUNTED, FORMAT, FORMAT_OF_SHAPES, Joined, TokenStore, open_store
from ringbpt.data.text.shapes import AS_TEXT, LEARNT_AS_TEXT, detect
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.types import ALWAYS, COLUMNS, Batch

SAMPLED_TOKENS = 100_000  # to tell how many bytes a token has, where only tokens are there
# Rows are counted that take no loss: all of them where they are few, else in a sample, which a start has time for.
COUNTED_ROWS, COUNTED_TOKENS, SAMPLED_ROWS = 4096, 1 << 22, 256
WARNED_SHARE = 0.1  # of documents, or of rows, that may take no loss without a warning


class Loader:
    """The batches of one dataset. Threads may share it.

    batch_size and seq_length are the global batch's; steps_per_epoch counts whole batches, and the rows that fill
    none are dropped. bytes_per_token: UTF-8 bytes of text per token, over what takes loss, so that loss in nats
    / ln 2 / bytes_per_token is bits per byte; inf where special tokens alone take loss. tokens_in: of the documents
    as often as an epoch has them; tokens_used, tokens_dropped (by reason) of the first epoch add up to it.
    utilisation: the share of the places of its batches that hold a token. fingerprint: of the batches, whatever the
    step. lengths: tokens of each document, int64. epoch_rows: with those that fill no batch; packing_dropped: what
    stands in none of them. summary: see TokenStore. columns: of its batches. taken: of each part of a list. stores: of
    its parts, whose documents it has one after the other; none where the rows were packed before. shares: whether what
    documents share stands in a row once.
    """

    def __init__(
        self,
        data: TokenStore,
        plan: Packing,
        request: Request,
        identity: str,
        taken: Sequence[Taken] = (),
        stores: Sequence[TokenStore] = (),
    ):
        dataset = request.dataset
        self.columns, self.taken, self.stores = (*ALWAYS, *request.columns), taken, stores
        self.shares = "last" in request.columns
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
        self._data, self._plan, self._request, self._bos_token_id = data, plan, request, request.bos_token_id

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self._data.offset)

    @cached_property
    def rows_without_loss(self) -> tuple[int, int]:
        """(those in which no token takes loss, how many were looked at), of the first epoch's: all, or a sample."""
        rows = self.steps_per_epoch * self.batch_size
        looked: Any = range(rows)
        if rows > COUNTED_ROWS or rows * self.seq_length > COUNTED_TOKENS:
            count = max(8, min(SAMPLED_ROWS, COUNTED_TOKENS // self.seq_length))
            looked = np.unique(np.random.Philox(self._request.seed).random_raw(count) % np.uint64(rows)).tolist()
        # Only weights are looked at, so that tokens need not be read.
        values = dict.fromkeys(self._data.values, self._data.values.get("mask"))
        found = sum(not self._plan.row(0, row, values)["weight"].any() for row in looked)
        return found, len(looked)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop of the global batch `step` (from 0): numpy arrays [stop - start, T]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        shape = (stop - start, self.seq_length)
        arrays = {name: np.empty(shape, COLUMNS[name].dtype) for name in self.columns}
        for place, row in enumerate(range(start, stop)):
            values = self.row(epoch, index * self.batch_size + row)
            for name, array in arrays.items():
                array[place] = values[name]
        if stop > start:  # whatever was said of the data beforehand; a device does not notice an id that is none
            largest = max(arrays["token"].max(), arrays["target"].max())
            check_vocabulary(int(largest), self._request.tokenizer, self._request.vocab_size)
        if self._bos_token_id is not None:
            arrays["token"][:, :1] = self._bos_token_id
        return Batch.of(arrays)

    def row(self, epoch: int, row: int) -> Row:
        """Row `row` of an epoch, of epoch_rows."""
        return self._plan.row(epoch, row, self._data.values)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The columns of its batches that a document's own values and the row give."""
        return tuple(name for name in self.columns if name in ALWAYS or COLUMNS[name].of == "row")

    def with_column(self, name: str, values: Sequence[Any]) -> "Loader":
        """This loader with one more column, whose values are given for each of `stores`."""
        found = copy(self)
        joined = Joined(values, [store.summary["tokens"] for store in self.stores])
        found._data = replace(self._data, values=self._data.values | {name: joined})
        found.columns = (*self.columns, name)
        return found

    def digest(self, steps: int) -> str:
        """sha256 of the first `steps` global batches: every column's bytes, little-endian, batch by batch."""
        found = hashlib.sha256()
        for step in range(steps):
            for array in self.rows(step, 0, self.batch_size).by_name().values():
                found.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
        return found.hexdigest()

    def describe(self) -> str:
        """One line: what there is, how it is packed, and what was dropped and why."""
        summary, dropped = self._data.summary, self.tokens_dropped
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        repeated = self.tokens_in - summary["tokens"]
        said = {
            "bad": "bad examples left out",
            "split": "conversations split",
            "without_loss": "without loss",
            "alike": "pairs whose answers are the same",
        }
        counts = ", ".join(f"{summary[name]:,} {what}" for name, what in said.items() if summary.get(name))
        bad = f" ({counts})" if counts else ""
        bytes_per_token = self.bytes_per_token
        said_bytes = "no text takes loss" if math.isinf(bytes_per_token) else f"{bytes_per_token:.2f} bytes a token"
        return printable(
            f"{summary['documents']:,} documents{bad}, {summary['tokens']:,} tokens"
            + (f" and {repeated:,} repeated by the weights" if repeated > 0 else "")
            + f", {said_bytes}; {self._request.dataset.packing}: "
            f"{self.steps_per_epoch:,} steps of {self.batch_size} x {self.seq_length:,} an epoch, "
            f"{self.utilisation:.1%} of the places filled, {sum(dropped.values()):,} tokens dropped"
            + (f" ({reasons})" if reasons else "")
            + self._shares()
            + self._without_loss()
        )

    def _shares(self) -> str:
        """What is said of a list: what an epoch really takes of each part."""
        if not self.taken:
            return ""
        tokens, documents = (sum(part.tokens for part in self.taken), sum(part.documents for part in self.taken))
        shares = (
            f"{part.path} {part.tokens / tokens:.1%} of the tokens, {part.documents / documents:.1%} of the documents"
            for part in self.taken
        )
        return f"; taken in an epoch: {'; '.join(shares)}"

    def _without_loss(self) -> str:
        """What is said of rows, and of many documents, that teach nothing; "" where there are none."""
        (found, looked), documents = self.rows_without_loss, self.summary.get("without_loss", 0)
        rows = self.steps_per_epoch * self.batch_size
        what = f"{found:,} of {rows:,} rows"
        if looked < rows:
            what = f"{found:,} of the {looked:,} rows looked at (of {rows:,})"
        too_many = [what] if found > WARNED_SHARE * looked else []
        if documents > WARNED_SHARE * self.summary["documents"]:
            too_many.append(f"{documents:,} of {self.summary['documents']:,} documents")
        if not too_many:
            return f", {what} without loss" if found else ""
        longest, works = int(self.lengths.max()), "python -m ringbpt.inspect with these flags shows what does"
        if longest > self.seq_length and found:
            works = f"documents are cut, and {self._request.group}.seq_length={longest} would keep the longest whole"
        return f"; WARNING: nothing takes loss in {' and '.join(too_many)}: {works}"


def make_loader(dataset: DatasetConfig, tokenizer: Tokenizer, **rest: Any) -> Loader:
    """The loader of a dataset, tokenised now if its cache is not there yet. rest: of the Request.

    Raises UserError for data that cannot be read, makes no batch or lacks a column, and for token ids that the model
    doesn't have.
    """
    request = Request(dataset, tokenizer, **rest)
    bos, flag, seed, vocab_size = request.bos_token_id, request.flag, request.seed, request.vocab_size
    plan: Packing
    taken: list[Taken] = []
    parts = parts_of(dataset, flag)
    if dataset.weights_by == "tokens" and parts[0].weight is None:
        raise UserError(
            f"--{flag}.weights_by=tokens: {request.group}.path has no shares; it is a list with some, as "
            f"{request.group}.path=a.jsonl:0.7,b.jsonl:0.3"
        )
    order = f"shuffled {seed}" if dataset.shuffle else "in order"
    every = (*ALWAYS, *request.columns)
    if parts[0].kind == "tokens" and (packed := open_rows(parts[0].path, dataset, tokenizer, seed, flag, every)):
        if len(parts) > 1:
            raise UserError(f"{request.group}.path: packed rows cannot be mixed; pack them together")
        data, plan, stores = packed[0], packed[1], list[TokenStore]()
        check_vocabulary(data.summary["max_token"], tokenizer, vocab_size)
        identity = f"packed {dataset.batch_size} {order}"
    else:
        stores = [_store(request, part) for part in parts]
        data = _joined(stores)
        if dataset.packing == "auto":
            whole = request.whole_documents or data.units is not None
            dataset = replace(dataset, packing="best_fit" if whole else "concat")
            request = replace(request, dataset=dataset)
        more = [name for name in request.optional if name in data.values]
        if data.shared is not None and dataset.share_prompts:
            more.append("last")
        request = replace(request, columns=(*request.columns, *more))
        plan, shares, taken = make_plan(request, stores, parts, data)
        dropping = "" if dataset.long_documents == "split" else f" {dataset.long_documents}"
        identity = f"{dataset.packing} {dataset.seq_length} {dataset.batch_size} {order}{shares}{dropping}"
    check_size(plan, data, request)
    return Loader(data, plan, request, " ".join([identity, str(bos), *request.columns]), taken, stores)


# --- tokens ---


def _store(request: Request, part: Part) -> TokenStore:
    """The tokens of one part of a dataset, with the columns that are asked for."""
    tokenizer, path_flag, folder = request.tokenizer, f"{request.group}.path", user_path(part.path)
    where = f"{path_flag}={part.path!r}"
    if part.kind == "megatron":
        store = _measured(open_megatron(part.path, cache_folder(request.dataset, request.flag), path_flag), tokenizer)
    elif part.kind == "tokens":
        try:
            key = hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()
        except OSError:
            what = "neither a manifest.json nor a summary.json"
            raise UserError(f"{where} has {what}: give a folder that scripts/prepare_data.py wrote") from None
        found = open_store(folder, key, foreign=True)
        assert found is not None
        store = found
        check_tokenizer(store.summary.get("tokenizer", ""), tokenizer, where)
    else:
        store = _tokenised(request, part)
    check_vocabulary(store.summary["max_token"], tokenizer, request.vocab_size)  # Megatron's is -1: not known yet
    further = [name for name in request.columns if name not in store.values and COLUMNS[name].of != "row"]
    return with_columns(store, further, where)


def _tokenised(request: Request, part: Part) -> TokenStore:
    dataset, tokenizer, flag = request.dataset, request.tokenizer, request.flag
    cache_dir, processor = cache_folder(dataset, flag), dataset.text_processor
    source = make_source(dataset, part, cache_dir, flag)
    allowed = bad_lines_allowed(dataset.on_bad_line, f"--{flag}.on_bad_line")
    bad = f"skip {allowed}" if allowed else ""
    how = {name: value for name, value in asdict(processor).items() if value or name != "chat_template_kwargs"}
    version = FORMAT if processor.fields or processor.fields_from_example else FORMAT_OF_SHAPES
    mismatched = "mismatched" * request.mismatched
    parts = [version, source.fingerprint(), tokenizer.fingerprint(), json.dumps(how), bad + mismatched]
    key = digest_of(parts)
    folder = cache_dir / f"tokens-{key[:32]}"
    if (store := open_store(folder, key)) is not None:  # without a look at the source
        return store
    job = Job(
        source=source,
        tokenizer=tokenizer.config,
        processor=processor,
        shape="" if processor.fields or processor.fields_from_example else _shape(request, source, allowed),
        flag=flag,
        vocab_size=request.vocab_size,
        allowed=allowed,
        mismatched=request.mismatched,
    )
    return make_store(job, tokenizer, folder, key, getattr(dataset.source, "tokenizer_processes", 1))


def _shape(request: Request, source: Source, allowed: int) -> str:
    """The shape of the first example that can be read."""
    flag, shapes = f"{request.flag}.text_processor", request.shapes
    for index in range(min(len(source), allowed + 1)):
        try:
            shape = detect(source[index], request.dataset.text_processor, flag, source.location(index))
            break
        except UserError:
            if index == allowed or index == len(source) - 1:
                raise
    if shape not in shapes:
        as_text = shape in AS_TEXT and not {*shapes}.isdisjoint(LEARNT_AS_TEXT)
        works = f"--{flag}.{AS_TEXT[shape]}" if as_text else f"it takes {', '.join(shapes)}"
        raise UserError(f"{source.location(index)}: a {shape!r} example does not go with {request.taker}: {works}")
    return shape


def _measured(store: TokenStore, tokenizer: Tokenizer) -> TokenStore:
    """The store with its loss_bytes, as a sample of its tokens tells them."""
    sampled = store.offset[: np.searchsorted(store.offset, SAMPLED_TOKENS) + 1]
    size, edges = 0, np.minimum(sampled, SAMPLED_TOKENS).tolist()
    for start, stop in pairwise(edges):
        tokens = store.values["token"][start:stop]
        size += len(tokenizer.decode(tokens[tokens < tokenizer.vocab_size]).encode("utf-8", errors="replace"))
    total = store.summary["loss_tokens"]
    return replace(store, summary=store.summary | {"loss_bytes": round(size * total / max(1, edges[-1]))})


def _joined(stores: list[TokenStore]) -> TokenStore:
    """Several stores as one, one after the other."""
    if len(stores) == 1:
        return stores[0]
    totals = [store.summary["tokens"] for store in stores]
    before = np.cumsum([0, *totals]).tolist()
    offset = np.concatenate([np.zeros(1, np.int64), *(s.offset[1:] + b for s, b in zip(stores, before, strict=False))])
    summary = {name: sum(store.summary.get(name, 0) for store in stores) for name in COUNTED}
    largest = [store.summary["max_token"] for store in stores]
    summary["max_token"] = -1 if -1 in largest else max(largest)
    names = [name for name in stores[0].values if all(name in store.values for store in stores)]
    values = {name: Joined([store.values[name] for store in stores], totals) for name in names}
    units, shared = None, None
    if any(store.units is not None for store in stores):
        counts = np.cumsum([0, *map(units_in, stores)]).tolist()
        numbers = [np.arange(units_in(s)) if s.units is None else s.units for s in stores]
        units = np.concatenate([some + before for some, before in zip(numbers, counts, strict=False)])
    if any(store.shared is not None for store in stores):
        none = [np.zeros(len(store.offset) - 1, np.int64) if store.shared is None else store.shared for store in stores]
        shared = np.concatenate(none)
    key = digest_of([store.key for store in stores])
    return TokenStore(values, offset, summary, key, units, shared=shared)
