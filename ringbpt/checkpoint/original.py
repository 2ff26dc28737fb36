"""Files of the original project, streaming or flax msgpack: their weights, onto the mesh by one table.

Of a stream, no more than one weight at a time is held on the host.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from ringbpt.checkpoint.store import Wanted
from ringbpt.checkpoint.tensors import conversions, fill, flatten, place
from ringbpt.config import Architecture, UserError
from ringbpt.config.families import TensorRow
from ringbpt.config.foreign import open_regular
from ringbpt.types import Params

# Its attention rotates neighbouring channels (0, 1), (2, 3), ..., ours a channel of the first half with one of the
# second, so within each head of the queries and keys the channels are regrouped: (pair two) -> (two pair).
ROWS = (
    TensorRow("embed", "transformer/wte/embedding", "V D -> V D"),
    TensorRow("layers.attention_norm", "transformer/h/{L}/attention_norm/kernel", "D -> D"),
    TensorRow("layers.w_q", "transformer/h/{L}/attention/wq/kernel", "D (N pair two) -> D N (two pair)"),
    TensorRow("layers.w_k", "transformer/h/{L}/attention/wk/kernel", "D (K pair two) -> D K (two pair)"),
    TensorRow("layers.w_v", "transformer/h/{L}/attention/wv/kernel", "D (K H) -> D K H"),
    TensorRow("layers.w_o", "transformer/h/{L}/attention/wo/kernel", "(N H) D -> N H D"),
    TensorRow("layers.feedforward_norm", "transformer/h/{L}/ffn_norm/kernel", "D -> D"),
    TensorRow("layers.w_gate", "transformer/h/{L}/feed_forward/w1/kernel", "D F -> D F"),
    TensorRow("layers.w_up", "transformer/h/{L}/feed_forward/w3/kernel", "D F -> D F"),
    TensorRow("layers.w_down", "transformer/h/{L}/feed_forward/w2/kernel", "F D -> F D"),
    TensorRow("norm", "transformer/ln_f/kernel", "D -> D"),
    TensorRow("unembed", "lm_head/kernel", "D V -> D V"),
)
LONGEST_PATH = 64  # names
DAMAGED = (ValueError, TypeError, AttributeError)
STACKED = "scan_decoder"  # stands for the layer's number where the file was saved with scan_layers


def load_original(path: Path, where: str, train_state: bool, architecture: Architecture, params: Wanted) -> Params:
    """The weights of a file, placed as the abstract ones say (ShapeDtypeStructs with shardings).

    train_state: whether the file must hold a train state, of which the weights are taken, or weights alone. Raises
    UserError, with `where` as the culprit, where it holds the other, for a pickle and a damaged file, and for a tensor
    that is missing, has no place in the model or has another shape.
    """
    wanted = flatten(params.abstract)
    rows = conversions((row for row in ROWS if row.ours in {*wanted, *params.left}), architecture)
    table = {name: conversion for conversion in rows for name in (*conversion.names(), conversion.name(STACKED))}
    held: dict[str, np.ndarray] = {}  # what has come of weights that are not whole yet, a layer a tensor
    loaded: dict[str, jax.Array] = {}
    for name, tensor in _tensors(path, where, train_state):
        if name not in table:
            raise UserError(f"{where}: tensor {name} has no place in this model")
        conversion, names = table[name], table[name].names()
        axes, shapes = [0], [conversion.their_shape]
        if name not in names:  # stacked, with either of the original's two param_scan_axis
            axes = [architecture.param_scan_axis, 0, 1]
            shapes = [(*shapes[0][:axis], len(names), *shapes[0][axis:]) for axis in axes]
        if tensor.shape not in shapes:
            raise UserError(
                f"{where}: tensor {name} has shape {tensor.shape}, this model wants {shapes[0]}; "
                "give the --load_llama_config it was trained with"
            )
        parts = [name] if name in names else names
        layers = [tensor] if name in names else np.moveaxis(tensor, axes[shapes.index(tensor.shape)], 0)
        if conversion.ours in loaded or held.keys() & {*parts}:
            raise UserError(f"{where}: tensor {name} stands there twice, and which one counts is not known")
        held.update(zip(parts, layers, strict=True))
        if held.keys() >= {*names}:
            ours = conversion.ours
            how = params.quantised.get(ours)
            loaded[ours] = (
                place(conversion, wanted[ours], lambda name, box: held[name][box], how) if ours in wanted else None
            )
            for part in names:
                del held[part]
    for conversion in rows:
        if conversion.ours not in {*loaded, *params.left}:
            missing = [name for name in conversion.names() if name not in held]
            name = missing[0] if missing != conversion.names() else conversion.name(STACKED)
            raise UserError(f"{where}: tensor {name} is missing from the file")
    if strange := wanted.keys() - loaded.keys() - params.fresh:
        raise UserError(
            f"{where}: the original's models have no {sorted(strange)[0]}: leave out the --llama flag of it"
        )
    return fill(params.abstract, dict.fromkeys(params.fresh) | loaded)


def _tensors(path: Path, where: str, train_state: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(path below "params", tensor) of every parameter, in the file's order."""
    read = _reader(path, where)
    try:
        for key, value in read(path):
            in_train_state = key[0] in ("step", "opt_state") or key[:2] == ("params", "params")
            if in_train_state != train_state:
                found, prefix = ("a train state", "trainstate_params") if in_train_state else ("params alone", "params")
                raise UserError(f"{where}: the file holds {found}; use {prefix}::{path}")
            if key[0] in ("step", "opt_state"):
                continue
            tensor = flax.serialization.msgpack_restore(value) if isinstance(value, bytes) else value
            if not jnp.issubdtype(getattr(tensor, "dtype", np.dtype(object)), jnp.floating):
                raise UserError(f"{where}: {'/'.join(key)} is not a tensor of floats")
            while key[0] == "params":
                key = key[1:]
            yield "/".join(key), np.asarray(tensor)
    # What msgpack and flax raise on a file that ends too early or isn't what its first byte promises.
    except (ArithmeticError, LookupError, MemoryError, RecursionError, *DAMAGED, msgpack.UnpackException) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where}: the file is truncated or damaged: {type(error).__name__} {reason}") from error


def _reader(path: Path, where: str) -> Callable[[Path], Iterator[tuple[tuple[str, ...], Any]]]:
    """Told by the first bytes, whatever the file's name: unpickling runs what its author wrote."""
    with open_regular(path, where) as file:
        head = file.read(2)
    convert = "never opened, it could run code; save it as safetensors and convert it with scripts/hf2jax.py"
    if head[:1] == b"\x80" and b"\x02" <= head[1:] <= b"\x05":
        raise UserError(f"{where}: a pickle: {convert}")
    if head == b"PK":
        raise UserError(f"{where}: a zip archive, as torch.save writes: {convert}")
    if head[:1] == b"\x92":  # an array of two: the first pair of a stream
        return _stream
    if b"\x81" <= head[:1] <= b"\x8f":  # a map
        return _flax
    raise UserError(
        f"{where}: neither a streaming nor a flax msgpack file; for a Hugging Face folder use huggingface::DIR"
    )


def _stream(path: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    with path.open("rb") as file:
        # 0: up to 4 GiB a tensor, as msgpack allows; but what holds others is no longer than a tensor's path.
        unpacker = msgpack.Unpacker(file, max_buffer_size=0, max_array_len=LONGEST_PATH, max_map_len=LONGEST_PATH)
        end = 0
        for pair in unpacker:
            key, value = pair if isinstance(pair, list) and len(pair) == 2 else ((), None)
            if (
                not isinstance(key, list)
                or not all(isinstance(part, str) for part in key)
                or not key
                or not isinstance(value, bytes)
            ):
                raise ValueError("not a stream of (key, tensor) pairs")
            yield tuple(key), value
            end = unpacker.tell()
    # An Unpacker takes the end of the file in the middle of a pair for the end of the stream.
    if end != path.stat().st_size:
        raise ValueError(f"the pair that begins at byte {end} has no end")


def _flax(path: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(path.read_bytes())).items()
