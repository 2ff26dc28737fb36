"""Batches by step: the data tokenised once into a cache on disk, packed by a plan, read at random.

The rows of a step are a pure function of (files, flags, seed, step): there is no state to save or to restore.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ringbpt.config import DatasetConfig, UserError, bad_lines_allowed, printable
from ringbpt.config.foreign import user_path
from ringbpt.data.documents import Row
from ringbpt.data.packing import PACKINGS, Arrays, Corpus, Packing, interleave, mix
from ringbpt.data.reading.catalogue import Part, make_source, parts_of
from ringbpt.data.reading.files import cached, check_cache, default_cache, digest_of, load_array, remove
from ringbpt.data.reading.sources import Source
from ringbpt.data.stored.columns import with_columns
from ringbpt.data.stored.megatron import open_megatron
from ringbpt.data.stored.rows import open_rows
from ringbpt.data.stored.tokenise import Job, check_tokenizer, check_vocabulary, make_store
from ringbpt.data.stored.tokens import COUNTED, FORMAT, FORMAT_OF_SHAPES, Joined, TokenStore, open_store
from ringbpt.data.text.shapes import AS_TEXT, LEARNT_AS_TEXT, detect
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.types import ALWAYS, COLUMNS, Batch

PLAN_FORMAT = "2"  # part of a kept plan's key
KEPT_DOCUMENTS = 100_000  # the plan of more documents is kept on disk: making it takes longer than a start should
SAMPLED_TOKENS = 100_000  # to tell how many bytes a token has, where only tokens are there
# Rows are counted that take no loss: all of them where they are few, else in a sample, which a start has time for.
COUNTED_ROWS, COUNTED_TOKENS, SAMPLED_ROWS = 4096, 1 << 22, 256
WARNED_SHARE = 0.1  # of documents, or of rows, that may take no loss without a warning


class Taken(NamedTuple):
    """What an epoch takes of one part of a list: documents and tokens, as often as they are taken."""

    path: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Request:
    """What a loader is made of.

    vocab_size: the model's. flag: the dataset's name on the command line, for the messages. columns: of COLUMNS, what
    its batches have besides those of every batch. shapes: of the examples that are taken, and what takes them, for the
    message.
    """

    dataset: DatasetConfig
    tokenizer: Tokenizer
    seed: int
    vocab_size: int
    flag: str = "train_dataset"
    columns: tuple[str, ...] = ()
    shapes: tuple[str, ...] = LEARNT_AS_TEXT
    taker: str = "training on text"

    @property
    def group(self) -> str:
        """Before the name of a flag of the dataset's own type."""
        return f"--{self.flag}.{self.dataset.group}"

    @property
    def bos_token_id(self) -> int | None:
        """always_start_with_bos overwrites the first input token of each row by this, as in the original."""
        always = getattr(self.dataset.source, "always_start_with_bos", False)
        if always and self.tokenizer.ends.bos is None:
            raise UserError(
                f"{self.group}.always_start_with_bos=True: the tokenizer ({self.tokenizer.describe()}) has "
                "no bos token; False works"
            )
        return self.tokenizer.ends.bos if always else None


class Loader:
    """The batches of one dataset. Threads may share it.

    batch_size and seq_length are the global batch's; steps_per_epoch counts whole batches, and the rows that fill
    none are dropped. bytes_per_token: UTF-8 bytes of text per token, over what takes loss, so that loss in nats
    / ln 2 / bytes_per_token is bits per byte; inf where special tokens alone take loss. tokens_in: of the documents
    as often as an epoch has them; tokens_used, tokens_dropped (by reason) of the first epoch add up to it.
    utilisation: the share of the places of its batches that hold a token. fingerprint: of the batches, whatever the
    step. lengths: tokens of each document, int64. epoch_rows: with those that fill no batch; packing_dropped: what
    stands in none of them. summary: see TokenStore. columns: of its batches. taken: of each part of a list.
    """

    def __init__(self, data: TokenStore, plan: Packing, request: Request, identity: str, taken: Sequence[Taken] = ()):
        dataset = request.dataset
        self.columns, self.taken = (*ALWAYS, *request.columns), taken
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
        said = {"bad": "bad examples left out", "split": "conversations split", "without_loss": "without loss"}
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
        data, plan = packed[0], packed[1]
        check_vocabulary(data.summary["max_token"], tokenizer, vocab_size)
        identity = f"packed {dataset.batch_size} {order}"
    else:
        stores = [_store(request, part) for part in parts]
        data = _joined(stores)
        plan, shares, taken = _plan(request, stores, parts, data)
        dropping = "" if dataset.long_documents == "split" else f" {dataset.long_documents}"
        identity = f"{dataset.packing} {dataset.seq_length} {dataset.batch_size} {order}{shares}{dropping}"
    _check_size(plan, data, request)
    return Loader(data, plan, request, " ".join([identity, str(bos), *request.columns]), taken)


def cache_folder(dataset: DatasetConfig, flag: str = "train_dataset") -> Path:
    """`cache_dir`, else $RINGBPT_CACHE, else ~/.cache/ringbpt; it need not be there yet. flag: the data set's name.

    Raises UserError for one that others could have written.
    """
    if not dataset.cache_dir:
        return default_cache()
    return check_cache(user_path(dataset.cache_dir), flag)


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
    return with_columns(store, request.columns, where)


def _tokenised(request: Request, part: Part) -> TokenStore:
    dataset, tokenizer, flag = request.dataset, request.tokenizer, request.flag
    cache_dir, processor = cache_folder(dataset, flag), dataset.text_processor
    source = make_source(dataset, part, cache_dir, flag)
    allowed = bad_lines_allowed(dataset.on_bad_line, f"--{flag}.on_bad_line")
    bad = f"skip {allowed}" if allowed else ""
    how = {name: value for name, value in asdict(processor).items() if value or name != "chat_template_kwargs"}
    version = FORMAT if processor.fields or processor.fields_from_example else FORMAT_OF_SHAPES
    parts = [version, source.fingerprint(), tokenizer.fingerprint(), json.dumps(how), bad]
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
        works = f"--{flag}.{AS_TEXT[shape]}" if shape in AS_TEXT else f"it takes {', '.join(shapes)}"
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
    values = {name: Joined([store.values[name] for store in stores], totals) for name in stores[0].values}
    units = None
    if any(store.units is not None for store in stores):
        counts = np.cumsum([0, *map(_units_in, stores)]).tolist()
        numbers = [np.arange(_units_in(s)) if s.units is None else s.units for s in stores]
        units = np.concatenate([some + before for some, before in zip(numbers, counts, strict=False)])
    key = digest_of([store.key for store in stores])
    return TokenStore(values, offset, summary, key, units)


def _units_in(store: TokenStore) -> int:
    return len(store.offset) - 1 if store.units is None else int(store.units[-1]) + 1


# --- the plan ---


def _plan(
    request: Request, stores: list[TokenStore], parts: list[Part], data: TokenStore
) -> tuple[Packing, str, list[Taken]]:
    """(the plan, what its mixture adds to the data's identity, what it takes of each part of a list)."""
    dataset, flag, seq_length = request.dataset, request.flag, request.dataset.seq_length
    seed, weights = request.seed if dataset.shuffle else None, [part.weight for part in parts]
    corpus = Corpus(data.offset[:-1], data.offset[1:], seq_length, seed, units=data.units)
    if corpus.units is not None and dataset.packing == "concat":
        raise UserError(
            f"--{flag}.packing=concat: some documents must share a row: --{flag}.packing=best_fit keeps them"
        )
    dropped, mixture, taken = dict[str, int](), "", list[Taken]()
    if len(parts) > 1 or corpus.units is not None or dataset.long_documents != "split":
        corpus, dropped, mixture, taken = _choose(corpus, request, stores, parts)
    shares = json.dumps([weights, seed, dataset.packing, seq_length, dataset.long_documents])
    key = digest_of([PLAN_FORMAT, data.key, shares + mixture])
    if len(corpus.starts) >= KEPT_DOCUMENTS:
        corpus = replace(corpus, store=partial(_kept, cache_folder(dataset, flag), key, flag))
    plan = PACKINGS[dataset.packing](corpus)
    plan.dropped |= dropped
    return plan, ("" if weights[0] is None else f" {weights}") + mixture, taken


def _choose(
    corpus: Corpus, request: Request, stores: list[TokenStore], parts: list[Part]
) -> tuple[Corpus, dict[str, int], str, list[Taken]]:
    """(what is packed of the joined stores, the tokens that are left out, by reason, how they were mixed where it was
    in another way than by documents and in their order, what is taken of each part of a list).
    """
    dataset, weights, seed = request.dataset, [part.weight for part in parts], corpus.seed
    lengths, fits, edges = corpus.unit_lengths(), _fits(corpus, request), np.cumsum([0, *map(_units_in, stores)])
    order, dropped, mixture, taken = np.arange(len(lengths)), dict[str, int](), "", list[Taken]()
    if weights[0] is not None:
        by_tokens = dataset.weights_by == "tokens"
        # What is left out for its length counts for no tokens.
        own = np.split(lengths * fits if by_tokens else lengths, edges[1:-1])
        times = list(mix(own, [weight or 0.0 for weight in weights], seed, by_tokens))
        dropped["left out by the weights"] = int(lengths[np.concatenate(times) == 0].sum())
        order = interleave(times, own if by_tokens else None)
        repeats = max(int(each.max(initial=0)) for each in times) > 1
        mixture = " by tokens" * by_tokens + " apart" * (repeats and dataset.packing == "best_fit")
    if not fits.all():
        dropped["documents longer than seq_length"] = int(lengths[order[~fits[order]]].sum())
        order = order[fits[order]]
    if len(parts) > 1:
        part_of = np.searchsorted(edges, order, side="right") - 1
        documents = np.ones(len(lengths)) if corpus.units is None else np.bincount(corpus.units)
        counts = [np.bincount(part_of, each[order], len(parts)).astype(int).tolist() for each in (documents, lengths)]
        taken = [Taken(part.path, *of_part) for part, *of_part in zip(parts, *counts, strict=True)]
    return corpus.take(order), dropped, mixture, taken


def _fits(corpus: Corpus, request: Request) -> np.ndarray:
    """Which units are packed, bool: those that are split, and those that are no longer than a row.

    Raises UserError where there are others, unless these are to be dropped.
    """
    dataset, flag, lengths = request.dataset, request.flag, corpus.unit_lengths()
    alone = np.ones(len(lengths), bool) if corpus.units is None else np.bincount(corpus.units) == 1
    fits = (lengths <= dataset.seq_length) | (alone & (dataset.long_documents == "split"))
    long = np.flatnonzero(~fits)
    if dataset.long_documents != "drop" and len(long):
        what, works = ("document", "split or =drop") if corpus.units is None else ("packing unit", "drop")
        raise UserError(
            f"--{flag}.long_documents={dataset.long_documents}: {len(long)} {what}s are longer than "
            f"{request.group}.seq_length={dataset.seq_length}, the first of them {what} {int(long[0]) + 1} with "
            f"{int(lengths[long[0]])} tokens: --{flag}.long_documents={works}, or seq_length={int(lengths.max())}"
        )
    return fits


def _kept(cache_dir: Path, key: str, flag: str, name: str, build) -> Arrays:  # type: ignore[no-untyped-def]
    """The arrays of a plan, kept in the cache and mapped from there."""

    def write(folder: Path) -> None:
        folder.mkdir()
        for array_name, array in build().items():
            np.save(folder / f"{array_name}.npy", array)

    kept = f"plan-{key[:32]}-{name.replace(' ', '-')}"
    for again in (True, False):
        folder = cached(cache_dir, kept, write, flag)
        try:
            return {path.stem: load_array(path, mapped=True) for path in folder.glob("*.npy")}
        except UserError:
            if not again:
                raise
            remove(folder)  # damaged: it can be made again
    raise AssertionError(kept)


def _check_size(plan: Packing, data: TokenStore, request: Request) -> None:
    """Raises UserError where there is nothing to learn, or not one whole batch."""
    dataset, flag, group = request.dataset, request.flag, request.group
    if not data.summary["loss_tokens"]:
        fields, roles = dataset.text_processor.fields, dataset.text_processor.roles_to_train
        given, works = f"fields={fields!r}", "take the [..] off the fields to be learnt"
        if not fields:
            given, works = f"roles_to_train={roles!r}", "name a role that says something, as assistant"
        raise UserError(f"--{flag}.text_processor.{given}: no token takes loss; {works}")
    if plan.rows >= dataset.batch_size:
        return
    tokens, works = data.summary["tokens"], "give more data"
    shorter = (tokens - 1) // dataset.batch_size
    if plan.rows:
        works = f"{group}.batch_size={plan.rows} is the largest that fits"
    elif shorter and dataset.packing == "concat":
        works = f"{group}.seq_length={shorter} is the longest that fits"
    raise UserError(
        f"{group}.batch_size={dataset.batch_size} of seq_length={dataset.seq_length} is more than the data: "
        f"{data.summary['documents']} documents of {tokens} tokens make {plan.rows} rows; {works}"
    )
