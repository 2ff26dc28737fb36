"""Weights of ours -> a Hugging Face folder, for transformers, vLLM and sglang; and how the two compare."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.checkpoint.huggingface import (
    CARRIED,
    MAX_SHARD_BYTES,
    carry,
    is_own,
    open_folder,
    rewrite,
    write_settings,
)
from ringbpt.checkpoint.load import Found, describe_checkpoint, find_checkpoint, load_model
from ringbpt.checkpoint.safetensors import FolderWriter, Planned
from ringbpt.checkpoint.store import newest_step
from ringbpt.checkpoint.tensors import conversions, repack
from ringbpt.config import Architecture, TokenizerConfig, UserError
from ringbpt.config.families import find_family, hf_settings, is_scoring, llama_fields, rows_for
from ringbpt.config.foreign import read_json
from ringbpt.config.gguf import FOREIGN
from ringbpt.data.text.tokenizers import TOKENIZER_FILES, Tokenizer, keep_tokenizer, make_tokenizer
from ringbpt.host_memory import fetch
from ringbpt.layouts import inverse, permutation
from ringbpt.model.adapters import IN_OUT, SCALE, A, B, is_of_a_pair
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.model.quantised import IS_QUANTISED, dequantised
from ringbpt.types import Params, TokenMeta


def to_huggingface(
    spec: str,
    output: Path,
    base: Path | None = None,
    dtype: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    adapter: Path | None = None,
) -> None:
    """The weights of `--load_checkpoint=PREFIX::PATH`, of ours or of a GGUF file -> a Hugging Face folder.

    base: a folder whose config.json and tokenizer go along with a checkpoint; None: what came with the model, if
    anything did. dtype: fp32, bf16 or fp16; empty: as stored. adapter: a folder of PEFT's layout, whose pairs are added
    to the weights. Raises UserError where there is nothing to convert, or no family of Hugging Face's has such a model.
    """
    prefix, path = find_checkpoint(spec)
    own = prefix == "params" and is_own(path)
    if prefix == "huggingface" and not adapter:
        raise UserError(f"--load_checkpoint={spec} is a Hugging Face folder already: copy it")
    run = None if own or prefix in FOREIGN else describe_checkpoint(spec)
    base = base or (run.folder if run else path / CARRIED if own else path)
    if run is None and not adapter:
        source = open_folder(path, own)
        stored = next(iter(source.files.entries.values())).dtype
        settings = hf_settings(source.architecture, _choose(dtype, stored).name, source.settings)
        rewrite(source, output, "model", dtype, max_shard_bytes)
    else:
        weights, architecture = merged_weights(spec, adapter) if adapter else _step_weights(spec, path)
        given = read_json(base / "config.json") if base and base.is_dir() else {}
        cast = _choose(dtype, _stored_dtype(prefix, path, own))
        settings = write_weights(
            weights, architecture, cast, given, output, max_shard_bytes, f"--load_checkpoint={spec}"
        )
    if base:
        carry(base, output)
    tokenizer = _tokenizer_of(run, base, output, settings)
    if is_scoring(settings):
        settings["pad_token_id"] = _padding(settings, tokenizer, f"--load_checkpoint={spec}")
    write_settings(output, settings)


def _tokenizer_of(run: Found | None, base: Path | None, output: Path, settings: dict[str, Any]) -> Tokenizer | None:
    """What the model is used with; a run's is written beside its weights, and what texts begin and end with by it into
    settings. A folder's is read for a reward model alone.
    """
    if run is None:
        read = base and is_scoring(settings) and any((base / name).is_file() for name in TOKENIZER_FILES)
        return make_tokenizer(TokenizerConfig(str(base))) if read else None
    if run.vocab_file != "bytes" and not Path(run.vocab_file).exists():  # as training placed them
        return None
    tokenizer = make_tokenizer(TokenizerConfig(run.vocab_file))
    keep_tokenizer(tokenizer, output)
    ends = {"bos_token_id": tokenizer.ends.bos, "eos_token_id": tokenizer.ends.eos}
    settings |= {name: token for name, token in ends.items() if not isinstance(settings.get(name), list)}
    return tokenizer


def _padding(settings: dict[str, Any], tokenizer: Tokenizer | None, where: str) -> int:
    """The token by which transformers finds where a padded text ends, which is where its score is read: behind the last
    token that is another one. So none that a text may end with: the model's own, else what texts begin with, else a
    special token. Raises UserError where there is none.
    """
    said = settings.get("eos_token_id")
    ends = {*said} if isinstance(said, list) else {said}
    tokens = [settings.get("pad_token_id"), settings.get("bos_token_id")]
    if tokenizer:
        ends |= tokenizer.ends.stop
        tokens += [tokenizer.ends.bos, *sorted(tokenizer.special_ids)]
    for token in tokens:
        if token is not None and token not in ends:
            return token
    raise UserError(
        f"{where}: no token is left to pad with: the score is read at a text's last token that is none, and texts may "
        "end with every special token: give a --huggingface_dir whose config.json has another pad_token_id"
    )


def _stored_dtype(prefix: str, path: Path, own: bool) -> np.dtype:
    """In which a checkpoint's weights are, or most of them."""
    if own or prefix in FOREIGN:
        return next(iter(open_folder(path, own).files.entries.values())).dtype
    return np.dtype(np.float32) if path.is_file() else newest_step(path, str(path)).dtypes("params")["embed"]


def settings_beside(spec: str) -> dict[str, Any]:
    """The config.json of Hugging Face's that the model of PREFIX::PATH came with; empty where none did."""
    folder = describe_checkpoint(spec).folder
    return read_json(folder / "config.json") if folder and folder.is_dir() else {}


Weights = dict[str, Callable[[], np.ndarray]]  # by our names; each is read or made, whole, when it is asked for


def _step_weights(spec: str, path: Path) -> tuple[Weights, Architecture]:
    """A checkpoint's weights as they are stored; and what they are of."""
    step = newest_step(path, f"--load_checkpoint={spec}")
    weights: Weights = {name: partial(step.read, "params", name) for name in step.dtypes("params")}
    return weights, describe_checkpoint(spec).architecture


def merged_weights(spec: str, adapter: Path) -> tuple[Weights, Architecture]:
    """A model's weights with an adapter's pairs added to them, w + scale a b in float32; and what they are of."""
    model, params = load_model(spec, (1, 1, 1, 1), adapter=adapter)
    return make_weights(model, np.dtype(np.float32))(params), model.architecture


def make_weights(model: Model, cast: np.dtype) -> Callable[[Params], Weights]:
    """weights(params): those on a model's mesh, as `cast`: a layer at a time is fetched, its pair added to it and its
    codes made numbers, in float32. Of several processes all ask for each, in one order, and each gets all of it.
    What is compiled is kept for other params.
    """
    axis = model.architecture.param_scan_axis
    everywhere = NamedSharding(model.mesh, PartitionSpec()) if jax.process_count() > 1 else None

    @partial(jax.jit, static_argnames="weight", out_shardings=everywhere)
    def layer(parts: dict[str, Any], i: jax.Array, weight: str) -> jax.Array:
        def taken(x: jax.Array) -> jax.Array:
            return fetch(lax.dynamic_index_in_dim(x, i, min(axis, x.ndim - 1), keepdims=False))

        one = jax.tree.map(taken, parts)
        w = one[""]
        w = dequantised(w, " ".join(IN_OUT[weight]), jnp.float32) if IS_QUANTISED(w) else w.astype(jnp.float32)
        if A in one:
            a, b = (one[part].astype(jnp.float32) for part in (A, B))
            w = w + one[SCALE] * jnp.tensordot(a, b, 1, precision="highest")
        return w.astype(cast)

    @partial(jax.jit, out_shardings=everywhere)
    def fetched(x: jax.Array) -> jax.Array:
        return fetch(x).astype(cast)

    def of_itself(x: jax.Array) -> np.ndarray:
        return np.asarray(fetched(x))

    def of_layers(layers: Params, name: str) -> np.ndarray:
        parts = {part: layers[name + part] for part in ("", A, B, SCALE) if name + part in layers}
        stacked = jax.tree.leaves(parts[""])[0]
        count = stacked.shape[min(axis, stacked.ndim - 1)]
        first = np.asarray(layer(parts, jnp.int32(0), name))
        whole = np.empty((count, *first.shape), first.dtype)
        for i in range(count):
            whole[i] = first if i == 0 else np.asarray(layer(parts, jnp.int32(i), name))
        return np.moveaxis(whole, 0, min(axis, first.ndim))

    def weights(params: Params) -> Weights:
        layers = params["layers"]
        own = [name for name in layers if not is_of_a_pair(name) and not name.endswith(SCALE)]
        found: Weights = {name: partial(of_itself, x) for name, x in params.items() if name != "layers"}
        return found | {f"layers.{name}": partial(of_layers, layers, name) for name in own}

    return weights


def report_merged(spec: str, adapter: Path, folder: Path) -> str:
    """One line: the logits of a model with its adapter beside it against those of the folder that both were merged to,
    on the same random tokens, computed in float32: what rounding the sum to the folder's dtype has done.
    """
    said = []
    for model, params in (
        load_model(spec, (1, 1, 1, 1), adapter=adapter),
        load_model(f"huggingface::{folder}", (1, 1, 1, 1)),
    ):
        token_BT = np.random.default_rng(0).integers(0, model.architecture.vocab_size, (1, 64)).astype(np.int32)
        said.append(logits(model, params, token_BT))
    what = "score" if model.architecture.head == "score" else "logit"
    return (
        f"merged: 64 random tokens: largest change of a {what} {np.abs(said[1] - said[0]).max():.2e} (largest {what} "
        f"{np.abs(said[0]).max():.2f})"
    )


def write_weights(
    weights: Weights,
    architecture: Architecture,
    cast: np.dtype,
    given: dict[str, Any],
    output: Path,
    max_shard_bytes: int,
    where: str,
) -> dict[str, Any]:
    """Weights as a Hugging Face folder, one whole weight of ours at a time; returns its config.json, `given` completed.

    Of several processes each asks for all weights, and process 0 writes them. Raises UserError, with `where` as the
    culprit, where the family has other weights.
    """
    settings = hf_settings(architecture, cast.name, given)
    llama_fields(settings, f"{where}: config.json")  # what of it goes along must be known, as in a folder that is read
    _, family = find_family(settings, "the model")
    table = conversions(rows_for(family, architecture), architecture)
    critic = {"score"} if architecture.head == "both" else set()  # which is of training alone
    if strange := (weights.keys() - critic) ^ {conversion.ours for conversion in table}:
        raise UserError(f"{where}: {sorted(strange)[0]} is in only one of the checkpoint and its config.json")
    # In the order in which a reader wants them, layer after layer, whatever the order in which they come.
    named = [(layer, name, conversion) for conversion in table for name, layer, _ in conversion.parts()]
    plan = [Planned(name, cast, conversion.their_shape) for _, name, conversion in sorted(named, key=lambda x: x[0])]
    is_main = jax.process_index() == 0
    with FolderWriter(output, plan, max_shard_bytes) if is_main else nullcontext() as writer:
        for conversion in table:
            whole = conversion.cut(weights[conversion.ours]())
            if writer is None:
                continue
            for name, layer, expert in conversion.parts():
                writer.write(name, repack(conversion.pick(whole, layer, expert), conversion.to_theirs, cast))
    return settings


def _choose(dtype: str, stored: np.dtype) -> np.dtype:
    return np.dtype(COMPUTE_DTYPES[dtype]) if dtype else stored


def logits(model: Model, params: Params, token_BT: np.ndarray) -> np.ndarray:
    """[B, T, V] float32, each row one text, or of a reward model its scores, [B, T, 1]; for tests and reports, where T
    and V are small.
    """
    order = permutation(model.execution.sequence_layout, token_BT.shape[1], model.mesh.shape["sp"])
    position_BT = np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape)[:, order]
    meta = TokenMeta(position_BT, np.ones_like(position_BT))
    hidden_BTD = jax.jit(model.hidden)(params, token_BT[:, order], meta)
    hidden_BTD = np.asarray(hidden_BTD, np.float32)[:, inverse(order)]
    if model.architecture.head == "score":
        return hidden_BTD @ np.asarray(params["score"], np.float32)[:, None]
    return hidden_BTD @ np.asarray(model.unembed(params), np.float32)[:, : model.architecture.vocab_size]


def parity(folder: Path, model: Model, params: Params, tokens: int = 64) -> dict[str, float]:
    """Our logits, or a reward model's score of each beginning, against those of transformers (on torch, float32, CPU)
    for the same random tokens of one sequence.

    folder: a Hugging Face folder, or a GGUF file, which transformers reads with a reader of its own.
    Raises UserError where torch or transformers is missing.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError:
        raise UserError("--verify needs transformers and torch: pip install 'ringbpt[oracle]'") from None
    if folder.is_file():
        oracle = AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file=folder.name, dtype=torch.float32)
    elif model.architecture.head == "score":
        oracle = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocab_size, padding = oracle.config.vocab_size, oracle.config.pad_token_id
    allowed = np.setdiff1d(np.arange(vocab_size), padding if model.architecture.head == "score" else [])
    token_BT = np.random.default_rng(0).choice(allowed, (1, tokens)).astype(np.int32)
    ours = logits(model, params, token_BT)
    with torch.no_grad():
        if model.architecture.head == "score":  # one number of a text: of each beginning of it in turn
            texts = [torch.tensor(token_BT[:, :end], dtype=torch.long) for end in range(1, tokens + 1)]
            theirs = np.stack([oracle(text).logits.numpy() for text in texts], axis=1)
        else:
            theirs = oracle(torch.tensor(token_BT, dtype=torch.long)).logits.numpy()
    return {
        "tokens": tokens,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "same_best_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def report_parity(spec: str, folder: Path, adapter: Path | None = None) -> str:
    """One line: our logits of a checkpoint against those of transformers for the same model's folder."""
    found = parity(folder, *load_model(spec, (1, 1, 1, 1), adapter=adapter))
    return (
        f"verify: {found['tokens']} tokens, float32: largest difference of a logit {found['largest_difference']:.2e} "
        f"(largest logit {found['largest_logit']:.2f}), same best token {100 * found['same_best_token']:.1f} %"
    )
