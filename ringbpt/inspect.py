"""`python -m ringbpt.inspect <flags of train>`: the first batches in the terminal, as a page, or as JSON for programs.

--json[=FILE] writes a line for each document, {"batch", "row", "document", "tokens": [id], "texts": [str],
"loss": [0 or 1], "positions": [...]}: loss is 1 where that token is itself learnt. A document that a row's end cuts is
told in its pieces. A token that the end of a row predicts stands last in the piece where it is learnt, and in the next
piece, if there is one, first, without loss.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringbpt.config import (
    JSON,
    STDOUT,
    Config,
    Flag,
    UserError,
    check_folders,
    json_line,
    json_to,
    parse,
    parse_args,
    printable,
    printed_help,
    run_main,
    split_flags,
    user_path,
)

PAGE = "auto"
FLAGS = {
    "digest": Flag(
        int, 0, "print only the sha256 of the first so many global batches, for two machines to compare", at_least=0
    ),
    "html": Flag(str, None, "the page; alone: inspect.html in the run or a temporary folder; empty: none", bare=PAGE),
    "json": JSON,
    "batches": Flag(int, 2, "how many batches are shown", at_least=1, at_most=1 << 20),
    "rows": Flag(int | None, None, "how many rows of each; None: 4, and in JSON all", at_least=1),
    "tokens": Flag(int, 1024, "how many places of a row the page has", at_least=1),
    "split": Flag(str, "train_dataset", "train_dataset or eval_dataset"),
}
IN_TERMINAL = 160  # places of a row
ROWS = 4


def main(argv: list[str]) -> int:
    if printed_help(argv, "inspect", __doc__, FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    if own["split"] not in ("train_dataset", "eval_dataset"):
        raise UserError(f"--split={own['split']} is none of train_dataset, eval_dataset: try --split=train_dataset")
    check_folders(own, "json")
    if own["html"] not in (None, PAGE):
        check_folders(own, "html")
    if own["html"] is None:
        own["html"] = "" if own["json"] else PAGE
    tree = parse_args(rest)
    from ringbpt.mesh import start_jax

    config = parse(tree, start_jax(tree))
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.training.loop import loader_of

    with json_to(own["json"]) as write:
        tokenizer = make_tokenizer(config.tokenizer)
        loader = loader_of(config, tokenizer, own["split"])
        if own["digest"]:
            digest = loader.digest(own["digest"])
            print(f"{digest}  the first {own['digest']} batches")
            write(json.dumps({"digest": digest, "batches": own["digest"]}) + "\n")
            return 0
        layout, sp = config.execution.sequence_layout, config.mesh_shape.sp
        dealt = layout, sp, config.architecture.sliding_window
        if own["json"]:
            told = make_views(loader, own["batches"], own["rows"] or loader.batch_size, *dealt)
            write("".join(json_line(one) + "\n" for one in documents(tokenizer, told)))
        views = make_views(loader, own["batches"], own["rows"] or ROWS, *dealt)
        if own["json"] != STDOUT:
            show(loader, tokenizer, views)
            print("\n".join(work_of(loader, min(own["batches"], loader.steps_per_epoch), *dealt)))
        if own["html"]:
            from ringbpt.data.page import page

            path = page_path(own["html"], config)
            try:
                path.write_text(page(loader, tokenizer, views, sp, layout, own["tokens"]), encoding="utf-8")
            except OSError as error:
                raise UserError(f"--html={str(path)!r}: {error.strerror}; give another name", code=4) from None
            print(printable(f"page: {path}"))
    return 0


def page_path(name: str, config: Config) -> Path:
    """Where the page goes: the file that was named, or one in the run's folder, if it is there, or a temporary one."""
    if name != PAGE:
        return user_path(name)
    run = user_path(config.logger.output_dir) / config.logger.experiment_id
    folder = run if config.logger.experiment_id and run.is_dir() else Path(tempfile.mkdtemp(prefix="ringbpt-"))
    return folder / "inspect.html"


def make_views(loader: Any, batches: int, rows: int, layout: str, sp: int, window: int | None) -> list[Any]:
    """The first rows of the first batches, in text order, and which shard of sp each place goes to."""
    import numpy as np

    from ringbpt.attention.work import loads
    from ringbpt.data.page import View
    from ringbpt.layouts import order_of

    views = []
    for step in range(min(batches, loader.steps_per_epoch)):
        batch = loader.rows(step, 0, min(rows, loader.batch_size))
        columns, places = batch.by_name(), np.arange(loader.seq_length) // (loader.seq_length // sp)
        order = order_of(layout, batch.meta, sp, window)
        shard_BT = order.in_text_order(np.broadcast_to(places, batch.token_BT.shape))
        shown = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        views.append(View(step, shown, shard_BT, loads(batch.meta, layout, sp, window)[0]))
    return views


def work_of(loader: Any, batches: int, layout: str, sp: int, window: int | None) -> Iterator[str]:
    """Lines: how uneven attention's work is over the devices of sp, by layout, and over the rows of each batch."""
    from ringbpt.attention.work import loads
    from ringbpt.layouts import LAYOUTS

    for step in range(batches):
        meta, parts = loader.rows(step, 0, loader.batch_size).meta, []
        for name in LAYOUTS if sp > 1 and loader.seq_length % (2 * sp) == 0 else (layout,):
            pairs_BR, hops = loads(meta, name, sp, window)
            pairs_BR = pairs_BR[pairs_BR.any(axis=1)]
            uneven = (pairs_BR.max(axis=1) / pairs_BR.mean(axis=1)).mean()
            parts.append(f"{name} {uneven:.2f} and {hops} hops" + ", in use" * (name == layout))
        pairs_B = pairs_BR.sum(axis=1)
        over_sp = f"over sp={sp} {'; '.join(parts)}; " if sp > 1 else ""
        yield f"batch {step}: attention's most over its mean, {over_sp}over rows {pairs_B.max() / pairs_B.mean():.2f}"


def documents(tokenizer: Any, views: list[Any]) -> Iterator[dict[str, Any]]:
    """What --json tells, a document at a time."""
    from ringbpt.data.documents import pieces_of
    from ringbpt.data.text.tokenizers import reads_as

    for view in views:
        for number, row in enumerate(view.rows):
            for document, (length, values, *_) in enumerate(pieces_of(row, apart=True), start=1):
                loss = [int(weight > 0) for weight in values["mask"]]
                # What the last place predicts stands in no place of this row.
                count = length + loss[-1]
                tokens = [int(token) for token in values["token"][:count]]
                positions = [int(position) for position in values["position"]]
                yield {
                    "batch": view.step,
                    "row": number,
                    "document": document,
                    "tokens": tokens,
                    "texts": [reads_as(tokenizer, token) for token in tokens],
                    "loss": loss[:count],
                    "positions": [*positions, positions[-1] + 1][:count],
                }


def show(loader: Any, tokenizer: Any, views: list[Any]) -> None:
    """The begin of each row in the terminal."""
    from rich.console import Console
    from rich.text import Text

    from ringbpt.data.documents import learnt
    from ringbpt.data.page import shown

    console = Console()
    console.print(printable(loader.describe()), highlight=False, markup=False)
    console.print("green is learnt, a bar begins a document, dots are padding", style="dim")
    for view in views:
        for number, row in enumerate(view.rows):
            line, learnt_T = Text(f"batch {view.step} row {number}  ", style="bold"), learnt(row)
            for place in range(min(IN_TERMINAL, len(row["token"]))):
                segment = int(row["segment"][place])
                if segment and (place == 0 or segment != int(row["segment"][place - 1])):
                    line.append("│", style="bold red")
                text = printable(shown(tokenizer, int(row["token"][place])).replace("\n", "")) if segment else "·"
                line.append(text, style="green" if learnt_T[place] else "dim")
            console.print(line)


if __name__ == "__main__":
    sys.exit(run_main(main))
