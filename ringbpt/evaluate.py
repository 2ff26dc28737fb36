"""`python -m ringbpt.evaluate`: what a checkpoint knows, on any mesh: numbers as JSON, pictures as PNG.

--load_checkpoint=huggingface::DIR --perplexity=texts.jsonl    loss and perplexity by position
--load_checkpoint=params::runs/<run> --passkey=512,1024        keys found, over length and depth
--load_checkpoint=... --choices=questions.jsonl                log-likelihood of {"prompt", "choices", "answer"}
"""

import json
import sys
from pathlib import Path
from typing import Any

from ringbpt.config import Flag, UserError, printed_help, read_flags, run_main
from ringbpt.generate import MODEL_FLAGS, start_model

FLAGS = MODEL_FLAGS | {
    "perplexity": Flag(str, "", 'a .jsonl file of {"text"}, or "python": source files held out from training'),
    "seq_length": Flag(int, 1024, "of perplexity: longer texts are cut", at_least=1),
    "batches": Flag(int, 8, "of perplexity, at most", at_least=1),
    "buckets": Flag(int, 32, "of positions", at_least=1),
    "passkey": Flag(str, "", "lengths in tokens, as 512,1024"),
    "depths": Flag(int, 5, "how many depths, from the start of the text to its end", at_least=1),
    "samples": Flag(int, 8, "texts for each length and depth", at_least=1),
    "choices": Flag(str, "", "a .jsonl file of questions"),
    "batch_size": Flag(int, 8, "rows at a time", at_least=1),
    "seed": Flag(int, 0, "of the passkeys"),
    "output": Flag(str, "evaluation", "the folder for results.json, passkey.png, perplexity.png, choices.jsonl"),
}


def read_lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--passkey={text!r} is no list of lengths: as --passkey=512,1024")
    return [int(part) for part in parts]


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    if not any(flags[name] for name in ("perplexity", "passkey", "choices")):
        raise UserError("give at least one of --perplexity=FILE, --passkey=LENGTHS and --choices=FILE")
    lengths = read_lengths(flags["passkey"]) if flags["passkey"] else []
    from ringbpt.evaluation.choices import read_choices

    rows = read_choices(Path(flags["choices"])) if flags["choices"] else []
    from ringbpt.evaluation.score import Scorer
    from ringbpt.generation.text import find_tokenizer

    found, model, params = start_model(flags)
    tokenizer, scorer = find_tokenizer(found, flags["tokenizer"]), Scorer(model, flags["batch_size"])
    output = Path(flags["output"])
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"load_checkpoint": flags["load_checkpoint"], "mesh": list(model.mesh.shape.values())}
    if flags["perplexity"]:
        results["perplexity"] = perplexity(model, params, tokenizer, flags, output)
    if lengths:
        results["passkey"] = passkey(scorer, params, tokenizer, lengths, flags, output)
    if rows:
        results["choices"] = choices(scorer, params, tokenizer, rows, output)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}/results.json")
    return 0


def perplexity(model: Any, params: Any, tokenizer: Any, flags: dict[str, Any], output: Path) -> dict[str, Any]:
    """Each document from its own first token, packed into rows; what is longer than a row is cut."""
    import numpy as np

    from ringbpt.config import PythonDatasetConfig
    from ringbpt.data.reading.files import read_rows
    from ringbpt.data.reading.sources import PythonSource
    from ringbpt.evaluation.passkey import draw_curve
    from ringbpt.evaluation.score import Item, Scorer, make_loss_by_position

    limit = flags["seq_length"]
    if flags["perplexity"] == "python":
        source = PythonSource(PythonDatasetConfig(split="heldout"))
        texts = [str(source[i]["text"]) for i in range(len(source))]
    else:
        texts = read_rows(Path(flags["perplexity"]), "perplexity", 'no {"text": ...}', lambda row: str(row["text"]))
    scorer = Scorer(model, flags["batch_size"])
    length = scorer.row_length(limit)
    items = []
    for text in texts:
        tokens = tokenizer.encode_prompt(text)[:limit]
        if len(tokens) > 1:
            items.append(Item(tokens, 1))
        if sum(len(item.tokens) for item in items) > scorer.rows * length * flags["batches"]:
            break
    if not items:
        raise UserError(f"--perplexity={flags['perplexity']} holds no text of two tokens or more")
    measure = make_loss_by_position(model, limit, flags["buckets"])
    curve = measure(params, (batch for batch, _ in scorer.batches(items, length)))
    draw_curve(output / "perplexity.png", curve, f"{flags['perplexity']}, {int(curve.tokens.sum()):,} tokens")
    loss = float((curve.loss * curve.tokens).sum() / curve.tokens.sum())
    print(f"perplexity {np.exp(loss):.3f} (loss {loss:.4f} nats a token, {int(curve.tokens.sum()):,} tokens)")
    columns = {"from": curve.edges[:-1], "to": curve.edges[1:], "loss": curve.loss, "tokens": curve.tokens}
    by_position = {name: column.tolist() for name, column in columns.items()}
    return {"loss": loss, "perplexity": float(np.exp(loss)), "by_position": by_position}


def passkey(
    scorer: Any, params: Any, tokenizer: Any, lengths: list[int], flags: dict[str, Any], output: Path
) -> dict[str, Any]:
    import numpy as np

    from ringbpt.evaluation.passkey import draw_grid, passkey_grid

    depths = [float(depth) for depth in np.linspace(0, 1, flags["depths"])]
    grid = passkey_grid(scorer, params, tokenizer.encode_prompt, lengths, depths, flags["samples"], flags["seed"])
    mesh = ",".join(map(str, scorer.model.mesh.shape.values()))
    title = f"{flags['samples']} keys a cell, mesh {mesh}"
    draw_grid(output / "passkey.png", grid, lengths, depths, title)
    for length, row in zip(lengths, grid, strict=True):
        print(f"passkey {length:>8,} tokens: {100 * row.mean():.1f} % found")
    return {"lengths": lengths, "depths": depths, "samples": flags["samples"], "found": grid.tolist()}


def choices(scorer: Any, params: Any, tokenizer: Any, rows: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    from ringbpt.evaluation.choices import accuracy, score_choices

    scored = score_choices(scorer, params, tokenizer.encode_prompt, rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    (output / "choices.jsonl").write_text(lines, encoding="utf-8")
    found = {key: accuracy(scored, key) for key in ("best", "best_per_byte")}
    shown = {key: "unknown" if share is None else f"{100 * share:.1f} %" for key, share in found.items()}
    print(f"choices: right {shown['best']}, by bytes {shown['best_per_byte']}")
    return {"questions": len(rows), **{f"accuracy_{key}": value for key, value in found.items()}}


if __name__ == "__main__":
    sys.exit(run_main(main))
