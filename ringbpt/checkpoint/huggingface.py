"""Hugging Face folders by the tables of config/families.py: read onto the mesh, and rewritten as folders of our own.

A folder of our own (`params.safetensors`, and the files of the model beside it in `huggingface/`) is read by the same
code with a table that changes nothing: `layers.w_q.3` for the layer 3 of `layers.w_q`.
"""

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ringbpt.checkpoint.gguf import GgufTensors, gguf_rows
from ringbpt.checkpoint.safetensors import FolderWriter, Planned, TensorFolder
from ringbpt.checkpoint.store import Wanted
from ringbpt.checkpoint.tensors import Conversion, conversions, fill, flatten, place, repack
from ringbpt.config import Architecture, TokenizerConfig, UserError, complete
from ringbpt.config.families import (
    EMBED,
    HEAD,
    IGNORED,
    TensorRow,
    find_family,
    is_scoring,
    llama_fields,
    rows_for,
)
from ringbpt.config.gguf import TOKENIZER, model_settings, read_gguf
from ringbpt.data.text.tokenizers import TOKENIZER_FILES, keep_tokenizer, make_tokenizer
from ringbpt.model.llama import COMPUTE_DTYPES
from ringbpt.types import Params

STEM = "params"  # of our own folders' files
CARRIED = "huggingface"  # where such a folder keeps what came with the model
# What belongs to a model and is no weight: copied along, both ways.
CARRIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
MAX_SHARD_BYTES = 5 << 30
COMPARED_BYTES = 64 << 20  # of a tensor at a time, where two must be the same


class Folder(NamedTuple):
    """A model's folder, or its GGUF file, of which no tensor has been read.

    settings: its config.json. table: from its tensors to our weights. theirs, ours: the same weights' tables in a
    folder of Hugging Face's and in one of our own.
    """

    files: TensorFolder | GgufTensors
    settings: dict[str, Any]
    architecture: Architecture
    table: list[Conversion]
    theirs: list[Conversion]
    ours: list[Conversion]


def open_folder(folder: Path, own: bool = False, architecture: Architecture | None = None) -> Folder:
    """A Hugging Face folder, one of our own, or a GGUF file, for the model that it describes, or for another.

    Raises UserError for whatever is wrong with them, tensors against the model included. Reads headers only, and a
    head that stands beside the embedding it is tied to: the two must be the same.
    """
    settings, where = model_settings(folder / CARRIED if own else folder)
    _, family = find_family(settings, where)
    architecture = architecture or describe_settings(settings, where)
    rows = rows_for(family, architecture)
    theirs, ours = conversions(rows, architecture), conversions(_own_rows(rows), architecture)
    files: TensorFolder | GgufTensors
    if folder.is_file():
        header = read_gguf(folder)
        table = conversions(gguf_rows(rows, header.metadata["general.architecture"]), architecture)
        files = GgufTensors(header)
    else:
        table, files = ours if own else theirs, TensorFolder(folder, STEM if own else "model")
    _check_tensors(files, table)
    return Folder(files, settings, architecture, table, theirs, ours)


def describe_settings(settings: dict[str, Any], where: str) -> Architecture:
    """The model that a config.json describes. Raises UserError, with `where` as the culprit, for what ours is not."""
    return whole_architecture(llama_fields(settings, where), where)


def whole_architecture(said: dict[str, Any], where: str) -> Architecture:
    """The architecture of what a file says of it, by our names. Raises UserError, with `where` as the culprit."""
    try:
        return complete(Architecture(**said))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def is_own(folder: Path) -> bool:
    return (folder / CARRIED / "config.json").is_file() and any(folder.glob(f"{STEM}*.safetensors"))


def _own_rows(rows: Iterable[TensorRow]) -> list[TensorRow]:
    """The table of our own folders: our names, our shapes."""

    def own(row: TensorRow) -> TensorRow:
        ours = row.pattern.split(" -> ")[1]
        suffix = ".{L}" * ("{L}" in row.theirs) + ".{E}" * ("{E}" in row.theirs)
        return TensorRow(row.ours, row.ours + suffix, f"{ours} -> {ours}")

    return [own(row) for row in rows]


def _check_tensors(files: TensorFolder | GgufTensors, table: list[Conversion]) -> None:
    """Raises UserError for the first tensor that is missing, has another shape, or has no place in the model."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in ((name, conversion.their_shape) for conversion in table for name in conversion.names()):
        wanted[name] = shape
        if name not in files.entries:
            raise UserError(f"{files.folder}: tensor {name} is missing")
        if files.entries[name].shape != shape:
            raise UserError(
                f"{files.folder}: tensor {name} has shape {files.entries[name].shape}, and its config.json (or the "
                f"flags given) means {shape}"
            )
    strange = [name for name in files.entries if name not in wanted and not name.endswith(IGNORED)]
    if strange == [HEAD] and EMBED in wanted:
        _check_tied(files)
    elif strange:
        raise UserError(f"{files.folder}: tensor {strange[0]} has no place in this model")


def _check_tied(files: TensorFolder | GgufTensors) -> None:
    """Raises UserError where the head has not the bits of the embedding that it is tied to. Reads blocks of both."""
    head, embed = files.entries[HEAD], files.entries[EMBED]

    def block(name: str, start: int, stop: int) -> np.ndarray:
        array = files.read(name, (slice(start, stop),))
        return (array if head.dtype == embed.dtype else array.astype(np.float32)).view(np.uint8)

    step = max(1, COMPARED_BYTES // (head.dtype.itemsize * head.shape[-1])) if head.shape == embed.shape else 0
    starts = range(0, head.shape[0], step) if step else ()
    if not step or any(not np.array_equal(block(HEAD, i, i + step), block(EMBED, i, i + step)) for i in starts):
        raise UserError(
            f"{files.folder}: {HEAD} is not {EMBED}, and its config.json (or --llama.tie_word_embeddings) says that "
            "they are one: tie_word_embeddings=False there takes each as it is"
        )


def load_folder(folder: Path, architecture: Architecture, params: Wanted) -> Params:
    """The params of a Hugging Face folder, or of one of our own, placed as the abstract ones say; those that may be
    fresh are None where the folder has none.

    Raises UserError for what `open_folder` refuses, and where the folder's family has other weights than the model.
    """
    own, wanted = is_own(folder), flatten(params.abstract)
    if architecture.head != "unembed" and not is_scoring(model_settings(folder / CARRIED if own else folder)[0]):
        architecture = replace(architecture, head="unembed")  # the base that it begins from
    found = open_folder(folder, own, architecture)
    table = [row for row in found.table if row.ours in wanted or row.ours not in params.left]
    if strange := (wanted.keys() ^ {row.ours for row in table}) - params.fresh:
        raise UserError(
            f"{folder}: {sorted(strange)[0]} is in only one of this model and --llama flags: leave them out"
        )
    weights = {
        row.ours: place(row, wanted[row.ours], found.files.read, params.quantised.get(row.ours)) for row in table
    }
    return fill(params.abstract, dict.fromkeys(params.fresh) | weights)


def to_ours(folder: Path, output: Path, dtype: str = "", max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """A Hugging Face folder, or a GGUF file, -> one of our own, which `--load_checkpoint=params::` reads.

    dtype: see `rewrite`.
    """
    found = open_folder(folder)
    rewrite(found, output, STEM, dtype, max_shard_bytes)
    carry(folder, output / CARRIED)
    if folder.is_file():
        write_settings(output / CARRIED, found.settings)


def rewrite(source: Folder, output: Path, stem: str, dtype: str, max_shard_bytes: int) -> None:
    """The tensors of a folder in another form, in the order of its files, one tensor a thread in memory.

    stem: of the files to write: STEM for a folder of our own, else one of Hugging Face's. dtype: fp32, bf16 or fp16;
    empty: each as it is.
    """
    files, cast = source.files, np.dtype(COMPUTE_DTYPES[dtype]) if dtype else None
    pairs = {
        name: (new, before, after)
        for before, after in zip(source.table, source.ours if stem == STEM else source.theirs, strict=True)
        for name, new in zip(before.names(), after.names(), strict=True)
    }
    order = sorted(pairs, key=lambda name: (files.entries[name].file.name, files.entries[name].start))
    plan = [Planned(pairs[name][0], cast or files.entries[name].dtype, pairs[name][2].their_shape) for name in order]

    def one(name: str, writer: FolderWriter) -> None:
        new, before, after = pairs[name]
        writer.write(new, repack(files.read(name), lambda x: after.to_theirs(before.to_ours(x)), cast))

    with FolderWriter(output, plan, max_shard_bytes, stem) as writer, ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda name: one(name, writer), order):
            pass


def carry(source: Path, target: Path, names: Iterable[str] = CARRIED_FILES) -> None:
    """Copies what belongs to a model beside its weights; of a GGUF file its tokenizer, if it has one."""
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        if TOKENIZER in read_gguf(source).metadata:
            keep_tokenizer(make_tokenizer(TokenizerConfig(str(source))), target)
        return
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
