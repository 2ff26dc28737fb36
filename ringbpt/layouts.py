"""How the tokens of one sequence are dealt out to the devices of the sp axis.

A layout is only a permutation, applied once to the host's batch: positions travel with their tokens, so no
attention code knows which one is in use. Under a causal mask `contiguous` leaves the first device idle while
the last one works; `zigzag` and `striped` give every device the same number of visible pairs of a row that is one
document, and `balanced` of a row of any documents.
"""

from dataclasses import dataclass, replace

import numpy as np

from ringbpt.balanced import Documents, deal
from ringbpt.types import Batch, TokenMeta

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


def permutation(layout: str, seq_len: int, sp: int) -> np.ndarray:
    """int64 [seq_len]: place i of the laid-out sequence holds token permutation[i] of the text.

    Device r of sp holds places r * seq_len/sp up to (r + 1) * seq_len/sp. `zigzag`: chunks r and 2sp-1-r of 2sp;
    `striped`: tokens r, r + sp, r + 2sp, ... `balanced`, of which only the length is told here: zigzag.
    Ref: zigzag after ring-flash-attention; striped: arXiv:2311.09431.
    Raises ValueError for an unknown layout and for a length that cannot be dealt out evenly.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    layout = by_length(layout)
    parts = 2 * sp if layout == "zigzag" else sp
    if seq_len % parts:
        below = seq_len // parts * parts
        raise ValueError(
            f"layout {layout} over sp={sp} needs a length divisible by {parts}: {seq_len} is not; "
            f"nearest: {f'{below} or ' if below else ''}{below + parts}"
        )
    tokens = np.arange(seq_len)
    if layout == "striped":
        return tokens.reshape(-1, sp).T.ravel()
    if layout == "zigzag" and sp > 1:
        chunks = tokens.reshape(2 * sp, -1)
        return np.concatenate([np.concatenate([chunks[r], chunks[2 * sp - 1 - r]]) for r in range(sp)])
    return tokens


def by_length(layout: str) -> str:
    """The layout of rows whose order, and whose documents' numbers, must be known from their length alone: that of
    `permutation`, whatever stands in them.
    """
    return "zigzag" if layout == "balanced" else layout


@dataclass(frozen=True)
class Order:
    """How some rows are dealt out. order: int64 [T], or [B, T] where each row has an order of its own; number: int32
    [B, documents], new numbers of the documents, of 0, padding, 0; None: as they are.
    """

    order: np.ndarray
    number: np.ndarray | None = None

    def lay_out(self, x_BT: np.ndarray, places: slice = slice(None)) -> np.ndarray:
        """Places of the laid-out rows, of a host array [B, T, ...] in text order that holds no documents' numbers."""
        if self.order.ndim == 1:
            return x_BT[:, self.order[places]]
        return np.take_along_axis(x_BT, self._of_rows(x_BT)[:, places], axis=1)

    def in_text_order(self, x_BT: np.ndarray) -> np.ndarray:
        """What lay_out undoes."""
        found = np.empty_like(x_BT)
        if self.order.ndim == 1:
            found[:, self.order] = x_BT
        else:
            np.put_along_axis(found, self._of_rows(x_BT), x_BT, axis=1)
        return found

    def _of_rows(self, x_BT: np.ndarray) -> np.ndarray:
        """The order of each row, with as many dims as the array has."""
        return self.order.reshape(self.order.shape + (1,) * (x_BT.ndim - 2))

    def meta(self, meta: TokenMeta) -> TokenMeta:
        """The places of the tokens in text order, with their documents' new numbers."""
        if self.number is None:
            return meta
        last_BT = None if meta.last_BT is None else np.take_along_axis(self.number, meta.last_BT, axis=1)
        return replace(meta, segment_BT=np.take_along_axis(self.number, meta.segment_BT, axis=1), last_BT=last_BT)

    def batch(self, batch: Batch) -> Batch:
        """A host batch in text order, with its documents' new numbers."""
        meta = self.meta(batch.meta)
        columns = batch.columns if meta.last_BT is None else batch.columns | {"last": meta.last_BT}
        return replace(batch, segment_BT=meta.segment_BT, columns=columns)


def order_of(layout: str, meta: TokenMeta, sp: int, window: int | None = None) -> Order:
    """How rows whose tokens stand at these places, host arrays in text order, are dealt out.

    window: how many tokens a token sees, for `balanced`. Raises ValueError as permutation does.
    """
    order = permutation(layout, meta.position_BT.shape[1], sp)
    if layout != "balanced" or sp == 1 or not len(meta.position_BT):
        return Order(order)
    lasts = meta.segment_BT if meta.last_BT is None else meta.last_BT
    dealt = deal(Documents.of(meta.position_BT, meta.segment_BT, lasts, window), sp)
    return Order(dealt.order(), dealt.number)


def row_length(longest: int, sp: int, *chunks: int) -> int:
    """The shortest row for `longest` tokens that sp can split, twice for zigzag, and then each of the chunks."""
    step = 2 * sp if longest <= sp * min(chunks) else sp * int(np.lcm.reduce(chunks))
    return -(-longest // step) * step


def inverse(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes `order`: laid_out[inverse(order)] is in text order again."""
    return np.argsort(order)
