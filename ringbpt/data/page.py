"""Batches as one HTML page without anything outside of it: tokens coloured by what takes loss, document and shard."""

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from ringbpt.data.documents import Row, learnt
from ringbpt.data.loader import Loader
from ringbpt.data.text.tokenizers import Tokenizer, reads_as

BINS = 24
TEMPLATE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


class View(NamedTuple):
    """A batch to be shown: its step, its rows in text order, each place's shard on sp, and what each shard's queries
    see, pairs [rows, shards].
    """

    step: int
    rows: Sequence[Row]
    shard_BT: np.ndarray
    pairs_BR: np.ndarray


def colours(kind: str, count: int) -> str:
    """Style rules that colour places by `kind` in hues that stand apart."""
    return "\n".join(
        f'.by-{kind} b[data-{kind[0]}="{number}"] {{ background: hsl({number * 137.5 % 360:.0f} 70% 50% / .3); }}'
        for number in range(count)
    )


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text that can be seen: line ends as signs, what is no text by its number."""
    text = reads_as(tokenizer, token).replace("\n", "⏎\n").replace("\t", "⇥").replace("\r", "␍")
    return text if text and "\ufffd" not in text else f"‹{token}›"


def row_html(row: Row, shard_T: np.ndarray, tokenizer: Tokenizer, most: int) -> str:
    """The first `most` places of a row."""
    parts, learnt_T = [], learnt(row)
    for place in range(min(most, len(row["token"]))):
        token, position, segment = (int(row[name][place]) for name in ("token", "position", "segment"))
        first = segment > 0 and (place == 0 or segment != int(row["segment"][place - 1]))
        kind = "pad" if segment == 0 else "first" if first else ""
        text = "·" if segment == 0 else shown(tokenizer, token)
        target = shown(tokenizer, int(row["target"][place])).strip() or "blank"
        weighs = row["weight"][place] > 0
        learns = ("takes loss" if learnt_T[place] else "no loss") + (f", → {target}" if weighs else "")
        title = f"place {place}, id {token}, position {position}, document {segment}, {learns}"
        marks = f'data-w="{int(learnt_T[place])}" data-d="{segment % 12}" data-s="{int(shard_T[place])}"'
        if weighs:
            marks += f' data-t="{html.escape(target)}"'
        parts.append(f'<b class="{kind}" {marks} title="{html.escape(title)}">{html.escape(text)}</b>')
    return "".join(parts)


def work(pairs_R: np.ndarray) -> str:
    """What the shards of a row see, each a bar, in the average's height the line: an SVG within the text."""
    top, step = max(int(pairs_R.max()), 1), max(2.0, min(10.0, 320 / len(pairs_R)))
    bars = []
    for shard, pairs in enumerate(pairs_R.tolist()):
        tall = 20 * pairs / top
        size = f'x="{shard * step:.1f}" y="{20 - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
        bars.append(f'<rect {size} fill="#4682b4"><title>shard {shard}: {pairs:,} pairs</title></rect>')
    width, mean = len(pairs_R) * step, 20 - 20 * float(pairs_R.mean()) / top
    line = f'<line x1="0" x2="{width:.1f}" y1="{mean:.1f}" y2="{mean:.1f}" stroke="#c33"/>'
    return f'<svg width="{width:.0f}" height="20" role="img" aria-label="work by shard">{"".join(bars)}{line}</svg>'


def histogram(lengths: np.ndarray, seq_length: int) -> str:
    """How many documents have how many tokens, in bins of equal ratio, as an SVG."""
    lengths = lengths[lengths > 0]
    top = max(int(lengths.max(initial=1)), seq_length) + 1
    edges = np.unique(np.geomspace(1, top, BINS + 1).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    width, height = 420, 140
    step = width / len(counts)
    bars = []
    for number, count in enumerate(counts):
        tall = height * count / max(1, counts.max())
        title = f"{edges[number]:,} to {edges[number + 1] - 1:,} tokens: {count:,} documents"
        size = f'x="{number * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
        bars.append(f'<rect {size} fill="#4682b4"><title>{title}</title></rect>')
    at = float(np.interp(np.log(seq_length), np.log(edges), np.arange(len(edges)))) * step
    line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}" stroke="#c33" stroke-dasharray="4 3"/>'
    below = f'y="{height + 16}"'
    text = f'<text x="0" {below}>1</text><text x="{width}" {below} text-anchor="end">{top - 1:,}</text>'
    label = f'<text x="{at:.1f}" {below} text-anchor="middle">seq_length</text>'
    drawing = "".join(bars) + line + (label if 40 < at < width - 60 else "") + text
    return f'<svg width="{width}" height="{height + 22}" role="img" aria-label="lengths of documents">{drawing}</svg>'


def account(loader: Loader) -> str:
    """Where the tokens of an epoch go, as one bar with its legend."""
    parts = [("used", loader.tokens_used), *loader.tokens_dropped.items()]
    width, at, bars, legend = 420, 0.0, [], []
    for number, (name, count) in enumerate(parts):
        share = count / max(1, loader.tokens_in)
        colour = "#2e9e5b" if number == 0 else f"hsl({(number * 67 + 330) % 360} 70% 50%)"
        bars.append(f'<rect x="{at:.2f}" y="0" width="{share * width:.2f}" height="22" fill="{colour}"/>')
        at += share * width
        legend.append(f'<div><span style="color:{colour}">■</span> {html.escape(name)}: {count:,} ({share:.2%})</div>')
    drawing = f'<svg width="{width}" height="22" role="img" aria-label="tokens by use">{"".join(bars)}</svg>'
    return f'{drawing}<div class="note">{"".join(legend)}</div>'


def page(loader: Loader, tokenizer: Tokenizer, views: Sequence[View], shards: int, layout: str, most: int) -> str:
    """The whole page. most: places of a row that are shown."""
    body = []
    for view in views:
        body.append(f"<h2>batch {view.step}</h2>")
        for number, row in enumerate(view.rows):
            filled = np.mean(row["segment"] > 0)
            cut = f", the first {most} shown" if len(row["token"]) > most else ""
            documents = int(row["segment"].max(initial=0))
            weighed, pairs_R = int(np.count_nonzero(row["weight"])), view.pairs_BR[number]
            uneven = float(pairs_R.max()) / max(1.0, float(pairs_R.mean()))
            body.append(
                f'<p class="note">row {number}: {documents} documents, {filled:.1%} filled, '
                f"{weighed:,} tokens take loss{cut}; attention by shard, most over mean {uneven:.2f} "
                f"{work(pairs_R)}</p>"
                f'<div class="row">{row_html(row, view.shard_BT[number], tokenizer, most)}</div>'
            )
    return TEMPLATE.substitute(
        colours=f"{colours('document', 12)}\n{colours('shard', shards)}",
        summary=html.escape(f"{loader.describe()}; {tokenizer.describe()}"),
        histogram=histogram(loader.lengths, loader.seq_length),
        account=account(loader),
        filled=f"{loader.utilisation:.2%} of the places of an epoch's batches hold a token",
        shards=shards,
        layout=layout,
        rows="".join(body),
    )
