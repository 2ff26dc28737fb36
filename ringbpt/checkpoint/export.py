"""Weights of ours -> a Hugging Face folder, for transformers, vLLM and sglang; and how the two compare."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ringbpt.checkpoint.huggingface import (
    CARRIED,
    MAX_SHARD_BYTES,
    carry,
    is_own,
    open_folder,
    rewrite,
    write_settings,
)
from ringbpt.checkpoint.load import describe_checkpoint, find_checkpoint, load_model
from ringbpt.checkpoint.safetensors import FolderWriter, Planned
from ringbpt.checkpoint.store import StoredStep, newest_step
from ringbpt.checkpoint.tensors import conversions, repack
from ringbpt.config import Architecture, TokenizerConfig, UserError
from ringbpt.config.families import find_family, hf_settings, is_scoring, llama_fields, rows_for
from ringbpt.config.foreign import read_json
from ringbpt.data.text.tokenizers import TOKENIZER_FILES, Tokenizer, keep_tokenizer, make_tokenizer
from ringbpt.layouts import inverse, permutation
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.types import Params, TokenMeta


def to_huggingface(
    spec: str, output: Path, base: Path | None = None, dtype: str = "", max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """The weights of `--load_checkpoint=PREFIX::PATH`, of ours or of a GGUF file -> a Hugging Face folder.

    base: a folder whose config.json and tokenizer go along with a checkpoint; None: what came with the model, if
    anything did. dtype: fp32, bf16 or fp16; empty: as stored. Raises UserError where there is nothing to convert, or no
    family of Hugging Face's has such a model.
    """
    prefix, path = find_checkpoint(spec)
    if prefix == "huggingface":
        raise UserError(f"--load_checkpoint={spec} is a Hugging Face folder already: copy it")
    own = prefix == "params" and is_own(path)
    if own or prefix == "gguf":
        source, base = open_folder(path, own), base or (path / CARRIED if own else path)
        stored = next(iter(source.files.entries.values())).dtype
        settings = hf_settings(source.architecture, _choose(dtype, stored).name, source.settings)
        rewrite(source, output, "model", dtype, max_shard_bytes)
        has_tokenizer = is_scoring(settings) and any((base / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = make_tokenizer(TokenizerConfig(str(base))) if has_tokenizer else None
        carry(base, output)
    else:
        found = describe_checkpoint(spec)
        base, vocab_file = base or found.folder, Path(found.vocab_file)
        step = newest_step(path, f"--load_checkpoint={spec}")
        settings = _write_step(step, found.architecture, output, base, dtype, max_shard_bytes)
        if base:
            carry(base, output)
        tokenizer = None
        if found.vocab_file == "bytes" or vocab_file.exists():  # as training placed them
            tokenizer = make_tokenizer(TokenizerConfig(found.vocab_file))
            keep_tokenizer(tokenizer, output)
            ends = {"bos_token_id": tokenizer.ends.bos, "eos_token_id": tokenizer.ends.eos}
            settings |= {name: token for name, token in ends.items() if not isinstance(settings.get(name), list)}
    if is_scoring(settings):
        settings["pad_token_id"] = _padding(settings, tokenizer, f"--load_checkpoint={spec}")
    write_settings(output, settings)


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


def _write_step(
    step: StoredStep, architecture: Architecture, output: Path, base: Path | None, dtype: str, max_shard_bytes: int
) -> dict[str, Any]:
    """A checkpoint's weights as a Hugging Face folder, one whole weight of ours at a time; returns its config.json."""
    stored = step.dtypes("params")
    cast = _choose(dtype, stored["embed"])
    given = read_json(base / "config.json") if base else {}
    settings = hf_settings(architecture, cast.name, given)
    llama_fields(settings, f"{base}/config.json")  # what of it goes along must be known, as in a folder that is read
    _, family = find_family(settings, "the model")
    table = conversions(rows_for(family, architecture), architecture)
    if strange := stored.keys() ^ {conversion.ours for conversion in table}:
        raise UserError(f"{step.folder}: {sorted(strange)[0]} is in only one of the checkpoint and its config.json")
    # In the order in which a reader wants them, layer after layer, whatever the order in which they come.
    named = [(layer, name, conversion) for conversion in table for name, layer, _ in conversion.parts()]
    plan = [Planned(name, cast, conversion.their_shape) for _, name, conversion in sorted(named, key=lambda x: x[0])]
    with FolderWriter(output, plan, max_shard_bytes) as writer:
        for conversion in table:
            whole = conversion.cut(step.read("params", conversion.ours))
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


def report_parity(spec: str, folder: Path) -> str:
    """One line: our logits of a checkpoint against those of transformers for the same model's folder."""
    found = parity(folder, *load_model(spec, (1, 1, 1, 1)))
    return (
        f"verify: {found['tokens']} tokens, float32: largest difference of a logit {found['largest_difference']:.2e} "
        f"(largest logit {found['largest_logit']:.2f}), same best token {100 * found['same_best_token']:.1f} %"
    )
