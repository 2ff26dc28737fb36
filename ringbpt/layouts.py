"""How the tokens of one sequence are dealt out to the devices of the sp axis.

A layout is only a permutation, applied once to the host's batch: positions travel with their tokens, so no
attention code knows which one is in use. Under a causal mask `contiguous` leaves the first device idle while
the last one works; `zigzag` and `striped` give every device the same number of visible pairs.
"""

import numpy as np

LAYOUTS = ("contiguous", "zigzag", "striped")


def permutation(layout: str, seq_len: int, sp: int) -> np.ndarray:
    """int64 [seq_len]: place i of the laid-out sequence holds token permutation[i] of the text.

    Device r of sp holds places r * seq_len/sp up to (r + 1) * seq_len/sp. `zigzag`: chunks r and 2sp-1-r of 2sp;
    `striped`: tokens r, r + sp, r + 2sp, ... Ref: zigzag after ring-flash-attention; striped: arXiv:2311.09431.
    Raises ValueError for an unknown layout and for a length that cannot be dealt out evenly.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
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


def row_length(longest: int, sp: int, *chunks: int) -> int:
    """The shortest row for `longest` tokens that sp can split, twice for zigzag, and then each of the chunks."""
    step = 2 * sp if longest <= sp * min(chunks) else sp * int(np.lcm.reduce(chunks))
    return -(-longest // step) * step


def inverse(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes `order`: laid_out[inverse(order)] is in text order again."""
    return np.argsort(order)
