"""Models in and out of Hugging Face folders, by the one table of families.py, a tensor at a time.

Our own converted folder (`params.safetensors`, and the files of the model beside it in `huggingface/`) is read by the
same code with a table that changes nothing: `layers.w_q.3` for the layer 3 of `layers.w_q`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np

from ringbpt.checkpoint.safetensors import FolderWriter, Planned, TensorFolder
from ringbpt.config import Architecture, UserError, complete
from ringbpt.config.families import IGNORED, Family, Row, find_family, hf_settings, llama_fields, read_json, rows_for
from ringbpt.model.llama import COMPUTE_DTYPES, make_dims
from ringbpt.types import Params

STEM = "params"  # of our own folders' files
CARRIED = "huggingface"  # where such a folder keeps what came with the model
# What belongs to a model and is no weight: copied along, both ways.
CARRIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_SHARD_BYTES = 5 << 30


class Layout:
    """One row of a table for a model's sizes: which of their tensors make up a param of ours, and how.

    Ours is [L, E, *letters] (each of L and E where the row has it, L at layer_axis); theirs one tensor per (L, E).
    """

    def __init__(self, row: Row, architecture: Architecture, layer_axis: int = 0):
        self.row = row
        theirs, ours = row.pattern.split(" -> ")
        self.pattern, self.back = row.pattern, f"{ours} -> {theirs}"
        self.letters = ours.split()
        dims = make_dims(architecture)
        self.sizes = {letter: getattr(dims, letter) for letter in {*self.letters}}
        # "(N H) D" -> [["N", "H"], ["D"]]
        parsed = theirs.replace("(", " ( ").replace(")", " ) ").split()
        self.groups: list[list[str]] = []
        inside = False
        for word in parsed:
            if word in "()":
                inside = word == "("
                if inside:
                    self.groups.append([])
            elif inside:
                self.groups[-1].append(word)
            else:
                self.groups.append([word])
        self.their_shape = tuple(int(np.prod([self.sizes[x] for x in group])) for group in self.groups)
        self.one_shape = tuple(self.sizes[letter] for letter in self.letters)
        self.layer_axis = layer_axis if "{L}" in row.theirs else None
        self.counts = (
            dims.L if "{L}" in row.theirs else 1,
            dims.E if "{E}" in row.theirs else 1,
        )

    def name(self, layer: int = 0, expert: int = 0) -> str:
        return self.row.theirs.replace("{L}", str(layer)).replace("{E}", str(expert))

    def names(self) -> Iterator[tuple[str, int, int]]:
        for layer, expert in product(*map(range, self.counts)):
            yield self.name(layer, expert), layer, expert

    def box(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The box of one of their tensors that a box of one of ours comes from; a group is cut by its first letter."""
        at = dict(zip(self.letters, index, strict=True))

        def cut(group: list[str]) -> slice:
            inner = int(np.prod([self.sizes[letter] for letter in group[1:]]))
            for letter in group[1:]:
                assert at[letter].indices(self.sizes[letter])[:2] == (0, self.sizes[letter]), f"{letter} is sharded"
            start, stop, _ = at[group[0]].indices(self.sizes[group[0]])
            return slice(start * inner, stop * inner)

        return tuple(cut(group) for group in self.groups)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One of their tensors, or a box of it, as ours; a view."""
        inner = {letter: self.sizes[letter] for group in self.groups for letter in group[1:]}
        return einops.rearrange(tensor, self.pattern, **inner)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return einops.rearrange(array, self.back)

    def pick(self, array: Any, layer: int, expert: int) -> Any:
        """The (layer, expert) part of a whole param of ours."""
        if self.layer_axis is not None:
            array = np.moveaxis(array, self.layer_axis, 0)[layer]
        return array[expert] if "{E}" in self.row.theirs else array


def layouts(rows: Iterable[Row], architecture: Architecture, layer_axis: int = 0) -> list[Layout]:
    return [Layout(row, architecture, layer_axis) for row in rows]


def own_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The table of our own folders: our names, our shapes."""

    def own(row: Row) -> Row:
        ours = row.pattern.split(" -> ")[1]
        suffix = ".{L}" * ("{L}" in row.theirs) + ".{E}" * ("{E}" in row.theirs)
        return Row(row.ours, row.ours + suffix, f"{ours} -> {ours}")

    return tuple(own(row) for row in rows)


def open_huggingface(folder: Path) -> tuple[TensorFolder, Family, Architecture]:
    """The tensors of a Hugging Face folder, its family, and the model that its config.json describes.

    Raises UserError for whatever is wrong with them, tensors against the model included; reads headers only.
    """
    settings, where = read_json(folder / "config.json"), str(folder / "config.json")
    _, family = find_family(settings, where)
    architecture = complete(replace(Architecture(), **llama_fields(settings, where)))
    files = TensorFolder(folder)
    check_tensors(files, layouts(rows_for(family, architecture), architecture))
    return files, family, architecture


def check_tensors(files: TensorFolder, table: list[Layout]) -> None:
    """Raises UserError for the first tensor that is missing, has another shape, or has no place in the model."""
    wanted = {name: layout.their_shape for layout in table for name, *_ in layout.names()}
    for name, shape in wanted.items():
        if name not in files.entries:
            raise UserError(f"{files.folder}: tensor {name} is missing")
        if files.entries[name].shape != shape:
            raise UserError(
                f"{files.folder}: tensor {name} has shape {files.entries[name].shape}, and its config.json (or the "
                f"flags given) means {shape}"
            )
    for name in files.entries:
        if name not in wanted and not name.endswith(IGNORED):
            raise UserError(f"{files.folder}: tensor {name} has no place in this model")


def load_params(files: TensorFolder, table: list[Layout], abstract_params: Params) -> Params:
    """Params placed as the abstract ones say (shape, dtype, sharding); each device's part is read for itself, once.

    No tensor is ever whole on the host, unless a device holds it whole.
    """
    check_tensors(files, table)
    by_name = {layout.row.ours: layout for layout in table}

    def load(path: tuple, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        layout = by_name[jax.tree_util.keystr(path, simple=True, separator=".")]
        cache: dict[tuple, np.ndarray] = {}

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple(part.indices(size)[:2] for part, size in zip(index, abstract.shape, strict=True))
            if key not in cache:
                cache[key] = read_box(files, layout, [slice(*part) for part in key], abstract.dtype)
            return cache[key]

        sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(abstract.shape, sharding, shard)

    return jax.tree.map_with_path(load, abstract_params)


def read_box(files: TensorFolder, layout: Layout, index: list[slice], dtype: Any) -> np.ndarray:
    """A box of one of our params from the tensors that it is made of."""
    index = list(index)
    layers = index.pop(layout.layer_axis) if layout.layer_axis is not None else slice(0, 1)
    experts = index.pop(0) if "{E}" in layout.row.theirs else slice(0, 1)
    box = layout.box(tuple(index))
    shape = [part.stop - part.start for part in index]
    out = np.empty((layers.stop - layers.start, experts.stop - experts.start, *shape), dtype)
    for i, layer in enumerate(range(layers.start, layers.stop)):
        for j, expert in enumerate(range(experts.start, experts.stop)):
            out[i, j] = layout.to_ours(files.read(layout.name(layer, expert), box))
    if "{E}" not in layout.row.theirs:
        out = out[:, 0]
    return out[0] if layout.layer_axis is None else np.moveaxis(out, 0, layout.layer_axis)


def load_folder(folder: Path, architecture: Architecture, abstract_params: Params) -> Params:
    """The params of a Hugging Face folder, or of one that `to_ours` wrote, for a model of these flags."""
    own = is_own(folder)
    settings = read_json((folder / CARRIED if own else folder) / "config.json")
    _, family = find_family(settings, str(folder / "config.json"))
    rows = rows_for(family, architecture)
    files = TensorFolder(folder, STEM if own else "model")
    table = layouts(own_rows(rows) if own else rows, architecture, architecture.param_scan_axis)
    names = {jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree.leaves_with_path(abstract_params)}
    if strange := names ^ {row.ours for row in rows}:
        raise UserError(
            f"{folder}: {sorted(strange)[0]} is in only one of this model and --llama flags: leave them out"
        )
    return load_params(files, table, abstract_params)


def is_own(folder: Path) -> bool:
    return (folder / CARRIED / "config.json").is_file() and any(folder.glob(f"{STEM}*.safetensors"))


# --- conversion, folder to folder ---


def convert(
    files: TensorFolder,
    sources: list[Layout],
    targets: list[Layout],
    output: Path,
    stem: str,
    dtype: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Rewrites a folder's tensors by another table, in the order of its files, one tensor a thread in memory.

    dtype: fp32, bf16 or fp16; empty: each as it is.
    """
    cast = np.dtype(COMPUTE_DTYPES[dtype]) if dtype else None
    pairs = {}
    for source, target in zip(sources, targets, strict=True):
        for (name, *_), (new, *_) in zip(source.names(), target.names(), strict=True):
            pairs[name] = (new, source, target)
    order = sorted(pairs, key=lambda name: (files.entries[name].file.name, files.entries[name].start))
    plan = [Planned(pairs[name][0], cast or files.entries[name].dtype, pairs[name][2].their_shape) for name in order]

    def one(name: str, writer: FolderWriter) -> None:
        new, source, target = pairs[name]
        writer.write(new, repack(files.read(name), lambda x: target.to_theirs(source.to_ours(x)), cast))

    with FolderWriter(output, plan, max_shard_bytes, stem) as writer, ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda name: one(name, writer), order):
            pass


def repack(tensor: np.ndarray, move: Callable[[np.ndarray], np.ndarray], cast: np.dtype | None) -> np.ndarray:
    """The tensor moved and cast, contiguous. Moved as plain integers: numpy copies its own dtypes far quicker."""
    if cast is not None and cast != tensor.dtype:
        tensor = tensor.astype(cast)
    bits = {2: np.uint16, 4: np.uint32}[tensor.dtype.itemsize]
    return transposed(move(tensor.view(bits))).view(tensor.dtype)


def transposed(view: np.ndarray) -> np.ndarray:
    """A contiguous copy of a strided view, in tiles that fit a cache: 2 GB/s a core, eight times a plain copy."""
    merged: list[list[int]] = []  # [size, stride]: neighbouring dims that lie as one, like N and H
    for size, stride in zip(view.shape, view.strides, strict=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) != 2 or view.flags.c_contiguous:
        return np.ascontiguousarray(view)
    flat = view.reshape([size for size, _ in merged])
    out = np.empty(flat.shape, flat.dtype)
    tile = 128
    for i in range(0, flat.shape[0], tile):
        for j in range(0, flat.shape[1], tile):
            # By way of a small copy: the rows of a large matrix, a power of two apart, share a cache's few places.
            out[i : i + tile, j : j + tile] = np.ascontiguousarray(flat[i : i + tile, j : j + tile].T).T
    return out.reshape(view.shape)


def to_ours(folder: Path, output: Path, dtype: str = "", max_shard_bytes: int = MAX_SHARD_BYTES) -> Architecture:
    """A Hugging Face folder -> our own, which `--load_checkpoint=params::` reads. Returns the model it holds."""
    files, family, architecture = open_huggingface(folder)
    rows = rows_for(family, architecture)
    convert(
        files, layouts(rows, architecture), layouts(own_rows(rows), architecture), output, STEM, dtype, max_shard_bytes
    )
    carry(folder, output / CARRIED)
    return architecture


def to_huggingface(folder: Path, output: Path, dtype: str = "", max_shard_bytes: int = MAX_SHARD_BYTES) -> Architecture:
    """One of our own folders -> a Hugging Face folder."""
    settings = read_json(folder / CARRIED / "config.json")
    _, family = find_family(settings, str(folder / CARRIED / "config.json"))
    architecture = complete(replace(Architecture(), **llama_fields(settings, str(folder))))
    rows, files = rows_for(family, architecture), TensorFolder(folder, STEM)
    sources = layouts(own_rows(rows), architecture)
    check_tensors(files, sources)
    convert(files, sources, layouts(rows, architecture), output, "model", dtype, max_shard_bytes)
    kept = dtype or {np.dtype(COMPUTE_DTYPES[d]): d for d in HF_DTYPES}[next(iter(files.entries.values())).dtype]
    carry(folder / CARRIED, output)
    write_settings(output, hf_settings(architecture, HF_DTYPES[kept], settings))
    return architecture


def export(
    read: Callable[[str], np.ndarray],
    architecture: Architecture,
    output: Path,
    base: Path | None = None,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Params -> a Hugging Face folder. `read(name)` gives a whole param of ours; one of them is held at a time.

    base: a folder with the config.json and the tokenizer that the model once came with.
    """
    settings = hf_settings(architecture, HF_DTYPES[dtype], read_json(base / "config.json") if base else None)
    _, family = find_family(settings, "the model")
    table = layouts(rows_for(family, architecture), architecture, architecture.param_scan_axis)
    cast = np.dtype(COMPUTE_DTYPES[dtype])
    # In the order in which a reader wants them, layer after layer, whatever the order in which they come.
    named = [(layer, name, layout) for layout in table for name, layer, _ in layout.names()]
    plan = [Planned(name, cast, layout.their_shape) for _, name, layout in sorted(named, key=lambda item: item[0])]
    with FolderWriter(output, plan, max_shard_bytes) as writer:
        for layout in table:
            whole = read(layout.row.ours)
            for name, layer, expert in layout.names():
                writer.write(name, repack(layout.pick(whole, layer, expert), layout.to_theirs, cast))
    if base:
        carry(base, output)
    write_settings(output, settings)


def carry(source: Path, target: Path) -> None:
    """Copies what belongs to a model beside its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def carry_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files alone."""
    for name in CARRIED_FILES:
        if name not in ("config.json", "generation_config.json") and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- parity ---


def parity(
    folder: Path, logits: Callable[[np.ndarray], np.ndarray], tokens: int = 64, seed: int = 0
) -> dict[str, float]:
    """Our logits against those of transformers (on torch, float32, CPU) for the same random tokens of one sequence.

    logits(token_BT) -> [B, T, V] float32. Raises UserError where torch or transformers is missing.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("--verify needs transformers and torch: pip install 'ringbpt[oracle]'") from None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    token_BT = rng.integers(0, model.config.vocab_size, (1, tokens)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(token_BT, dtype=torch.long)).logits.numpy()
    ours = np.asarray(logits(token_BT), np.float32)
    return {
        "tokens": tokens,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "same_best_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }
