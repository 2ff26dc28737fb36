"""`python -m ringbpt.inspect <flags of train>`: the first batches in the terminal and as a page, or their digest."""

import sys
from pathlib import Path
from typing import Any

from ringbpt.config import Flag, UserError, parse, parse_args, printed_help, run_main, split_flags

FLAGS = {
    "digest": Flag(int, 0, "print only the sha256 of the first so many global batches, for two machines to compare"),
    "html": Flag(str, "inspect.html", "the page; empty: none"),
    "batches": Flag(int, 2, "how many batches are shown", at_least=1),
    "rows": Flag(int, 4, "how many rows of each", at_least=1),
    "tokens": Flag(int, 1024, "how many places of a row", at_least=1),
    "split": Flag(str, "train_dataset", "train_dataset or eval_dataset"),
}
IN_TERMINAL = 160  # places of a row


def main(argv: list[str]) -> int:
    if printed_help(argv, "inspect", __doc__, FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    if own["split"] not in ("train_dataset", "eval_dataset"):
        raise UserError(f"--split={own['split']} is none of train_dataset, eval_dataset: try --split=train_dataset")
    tree = parse_args(rest)
    from ringbpt.mesh import start_jax

    config = parse(tree, start_jax(tree))
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.training.loop import loader_of

    tokenizer = make_tokenizer(config.tokenizer)
    loader = loader_of(config, tokenizer, own["split"])
    if own["digest"]:
        print(f"{loader.digest(own['digest'])}  the first {own['digest']} batches")
        return 0
    layout, sp = config.execution.sequence_layout, config.mesh_shape[3]
    views = make_views(loader, own["batches"], own["rows"], layout, sp)
    show(loader, tokenizer, views)
    if own["html"]:
        from ringbpt.data.page import page

        path = Path(own["html"]).expanduser()
        try:
            path.write_text(page(loader, tokenizer, views, sp, layout, own["tokens"]), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html={str(path)!r}: {error.strerror}; give another name", code=4) from None
        print(f"page: {path}")
    return 0


def make_views(loader: Any, batches: int, rows: int, layout: str, sp: int) -> list[Any]:
    """The first rows of the first batches, in text order, and which shard of sp each place goes to."""
    from ringbpt.data.page import View
    from ringbpt.layouts import inverse, permutation

    place_T = inverse(permutation(layout, loader.seq_length, sp))
    shard_T = place_T // (loader.seq_length // sp)
    shown = range(min(rows, loader.batch_size))
    steps = range(min(batches, loader.steps_per_epoch))
    return [View(step, [loader.row(0, step * loader.batch_size + row) for row in shown], shard_T) for step in steps]


def show(loader: Any, tokenizer: Any, views: list[Any]) -> None:
    """The begin of each row in the terminal: green takes loss, a bar begins a document, dots are padding."""
    from rich.console import Console
    from rich.text import Text

    from ringbpt.data.page import shown

    console = Console()
    console.print(loader.describe(), highlight=False)
    console.print("green takes loss, a bar begins a document, dots are padding", style="dim")
    for view in views:
        for number, row in enumerate(view.rows):
            line = Text(f"batch {view.step} row {number}  ", style="bold")
            for place in range(min(IN_TERMINAL, len(row["token"]))):
                segment = int(row["segment"][place])
                if segment and (place == 0 or segment != int(row["segment"][place - 1])):
                    line.append("│", style="bold red")
                text = shown(tokenizer, int(row["token"][place])).replace("\n", "") if segment else "·"
                line.append(text, style="green" if row["weight"][place] else "dim")
            console.print(line)


if __name__ == "__main__":
    sys.exit(run_main(main))
