"""Perplexity of texts, as a whole and by position inside a document."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import UserError
from ringbpt.data.reading.files import read_rows
from ringbpt.evaluation.pictures import plain_log, set_title, thousands
from ringbpt.evaluation.score import Encode, Item, Scorer
from ringbpt.evaluation.texts import python_texts
from ringbpt.model.llama import Model
from ringbpt.types import Batch, Params


class Curve(NamedTuple):
    """Loss in nats a token, over positions edges[i] <= p < edges[i + 1]; NaN where tokens is 0: nothing was there."""

    edges: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray


def make_loss_by_position(model: Model, length: int, buckets: int = 32) -> Callable[[Params, Iterable[Batch]], Curve]:
    """measure(params, batches) -> Curve over positions inside a document, in equal buckets up to `length`."""
    buckets = min(buckets, length)
    edges = np.round(np.linspace(0, length, buckets + 1)).astype(np.int64)

    @partial(jax.jit, out_shardings=NamedSharding(model.mesh, PartitionSpec()))
    def sums(params: Params, batch: Batch) -> jax.Array:
        stats = model.token_stats(params, batch)
        bucket_BT = jnp.searchsorted(jnp.asarray(edges[1:-1]), batch.position_BT, side="right")
        total = jnp.zeros(buckets, jnp.float32)
        return jnp.stack([total.at[bucket_BT].add(x * batch.weight_BT) for x in (-stats.logp_BT, 1.0)])

    def measure(params: Params, batches: Iterable[Batch]) -> Curve:
        total = sum(np.asarray(sums(params, batch), np.float64) for batch in batches)
        loss, tokens = np.asarray(total)
        return Curve(edges, np.where(tokens > 0, loss / np.maximum(tokens, 1), np.nan), tokens)

    return measure


def draw_curve(file: Path, curve: Curve, title: str) -> None:
    """Perplexity by position as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    seen = curve.tokens > 0
    middles = (curve.edges[:-1] + curve.edges[1:]) / 2
    axes.plot(middles[seen], np.exp(curve.loss[seen]), marker=".")
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    thousands(axes.xaxis)
    plain_log(axes.yaxis)
    set_title(axes, title)
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})  # the same picture, the same bytes


def read_texts(file: str) -> list[str]:
    """The "text" of each line of a .jsonl file; "python" is the source files held out from training."""
    if file == "python":
        return python_texts("heldout")

    def checked(row: Any) -> str:
        if not isinstance(row["text"], str):
            raise ValueError
        return row["text"]

    return read_rows(Path(file), "perplexity", 'no {"text": ...}', checked)


def report_perplexity(
    scorer: Scorer, params: Params, encode: Encode, texts: Iterable[str], file: str, limit: int, batches: int,
    buckets: int, output: Path, model: str,
) -> dict[str, Any]:  # fmt: skip
    """Draws perplexity.png, prints and returns the loss, of a file's texts, cut at `limit` tokens, packed into rows.

    Each document counts from its own first token on, and no more texts are taken than fill so many `batches`.
    """
    length = scorer.row_length(limit)
    items: list[Item] = []
    for text in texts:
        tokens = encode(text)[:limit]
        if len(tokens) > 1:
            items.append(Item(tokens, 1))
        if sum(len(item.tokens) for item in items) > scorer.rows * length * batches:
            break
    if not items:
        raise UserError(f"--perplexity={file} holds no text of two tokens or more")
    measure = make_loss_by_position(scorer.model, limit, buckets)
    curve = measure(params, (batch for batch, _ in scorer.batches(items, length)))
    tokens, seen = curve.tokens.sum(), curve.tokens > 0
    draw_curve(output / "perplexity.png", curve, f"{model}\n{file}, {int(tokens):,} tokens")
    loss = float((curve.loss * curve.tokens)[seen].sum() / tokens)
    print(f"perplexity {np.exp(loss):.3f} (loss {loss:.4f} nats a token, {int(tokens):,} tokens)")
    columns = {"from": curve.edges[:-1], "to": curve.edges[1:], "tokens": curve.tokens}
    by_position = {name: column.tolist() for name, column in columns.items()}
    by_position["loss"] = np.where(seen, curve.loss, None).tolist()
    return {"loss": loss, "perplexity": float(np.exp(loss)), "by_position": by_position}
