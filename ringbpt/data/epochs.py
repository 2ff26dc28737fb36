"""Which documents an epoch of a data set takes of each of its parts, and the plan of their rows."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringbpt.config import DatasetConfig, UserError
from ringbpt.config.foreign import user_path
from ringbpt.data.packing import PACKINGS, Arrays, Corpus, Packing, interleave, mix
from ringbpt.data.reading.catalogue import Part
from ringbpt.data.reading.files import cached, check_cache, default_cache, digest_of, load_array, remove
from ringbpt.data.stored.tokens import TokenStore
from ringbpt.data.text.shapes import LEARNT_AS_TEXT
from ringbpt.data.text.tokenizers import Tokenizer

PLAN_FORMAT = "2"  # part of a kept plan's key
KEPT_DOCUMENTS = 100_000  # the plan of more documents is kept on disk: making it takes longer than a start should


class Taken(NamedTuple):
    """What an epoch takes of one part of a list: documents and tokens, as often as they are taken."""

    path: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Request:
    """What a loader is made of.

    vocab_size: the model's. flag: the dataset's name on the command line, for the messages. columns: of COLUMNS, what
    its batches have besides those of every batch; optional: those that they have where the data do. shapes: of the
    examples that are taken, and what takes them, for the message. whole_documents: none may be cut. mismatched: each
    prompt comes with another example's completion too. window: how many tokens a token sees; None: all.
    """

    dataset: DatasetConfig
    tokenizer: Tokenizer
    seed: int
    vocab_size: int
    flag: str = "train_dataset"
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    shapes: tuple[str, ...] = LEARNT_AS_TEXT
    taker: str = "training on text"
    whole_documents: bool = False
    mismatched: bool = False
    window: int | None = None

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


def cache_folder(dataset: DatasetConfig, flag: str = "train_dataset") -> Path:
    """`cache_dir`, else $RINGBPT_CACHE, else ~/.cache/ringbpt; it need not be there yet. flag: the data set's name.

    Raises UserError for one that others could have written.
    """
    if not dataset.cache_dir:
        return default_cache()
    return check_cache(user_path(dataset.cache_dir), flag)


def make_plan(
    request: Request, stores: list[TokenStore], parts: list[Part], data: TokenStore
) -> tuple[Packing, str, list[Taken]]:
    """(the plan, what its mixture adds to the data's identity, what it takes of each part of a list)."""
    dataset, flag, seq_length = request.dataset, request.flag, request.dataset.seq_length
    seed, weights = request.seed if dataset.shuffle else None, [part.weight for part in parts]
    shared = data.shared if dataset.share_prompts else None
    corpus = Corpus(
        data.offset[:-1],
        data.offset[1:],
        seq_length,
        seed,
        units=data.units,
        shared=shared,
        batch_size=dataset.batch_size,
        window=request.window,
    )
    whole = request.whole_documents or corpus.units is not None
    if whole and dataset.packing == "concat":
        what = "some documents must share a row" if data.units is not None else f"{request.taker} wants whole documents"
        raise UserError(f"--{flag}.packing=concat: {what}: --{flag}.packing=best_fit keeps them")
    dropped, mixture, taken = dict[str, int](), "", list[Taken]()
    if len(parts) > 1 or whole or dataset.long_documents != "split":
        corpus, dropped, mixture, taken = _choose(corpus, request, stores, parts)
    shares = json.dumps([weights, seed, dataset.packing, seq_length, dataset.long_documents])
    mixture += " shared" * (shared is not None) + " whole" * request.whole_documents
    if dataset.packing == "balanced":
        mixture += f" steps of {dataset.batch_size}" + (f", window {request.window}" if request.window else "")
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
    lengths, fits, edges = corpus.unit_lengths(), _fits(corpus, request), np.cumsum([0, *map(units_in, stores)])
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
    alone &= not request.whole_documents
    fits = (lengths <= dataset.seq_length) | (alone & (dataset.long_documents == "split"))
    long = np.flatnonzero(~fits)
    if dataset.long_documents != "drop" and len(long):
        what, works = ("document", "split or =drop") if alone.all() else ("packing unit", "drop")
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


def check_size(plan: Packing, data: TokenStore, request: Request) -> None:
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


def units_in(store: TokenStore) -> int:
    return len(store.offset) - 1 if store.units is None else int(store.units[-1]) + 1
