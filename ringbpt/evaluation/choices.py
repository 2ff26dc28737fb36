"""Which of several continuations a model finds most likely, by log-likelihood, from a JSONL."""

import json
from pathlib import Path
from typing import Any

from ringbpt.data.reading.files import read_rows
from ringbpt.evaluation.score import Encode, Item, Scorer
from ringbpt.types import Params


def read_choices(file: Path) -> list[dict[str, Any]]:
    """Rows {"prompt": text, "choices": [text, ...], "answer": index or one of the choices, if known}.

    Raises UserError with file and line.
    """

    def checked(row: Any) -> dict[str, Any]:
        choices, answer = row["choices"], row.get("answer")
        good = isinstance(row["prompt"], str) and isinstance(choices, list) and len(choices) > 1
        if not good or not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError
        if isinstance(answer, str):
            answer = choices.index(answer)
        if answer is not None and not (type(answer) is int and 0 <= answer < len(choices)):
            raise ValueError
        return row | {"answer": answer}

    wanted = 'not {"prompt": text, "choices": [two texts or more], "answer": which of them}'
    return read_rows(file, "choices", wanted, checked)


def score_choices(scorer: Scorer, params: Params, encode: Encode, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with "logp" of each choice (nats, summed), "best", and "best_per_byte", normalised by its length."""
    items, first = [], len(encode(""))
    for row in rows:
        for choice in row["choices"]:
            whole, prompt = encode(row["prompt"] + choice), encode(row["prompt"])
            if len(prompt) == 0 or (whole[: len(prompt)] != prompt).any() or len(whole) <= len(prompt):
                # Tokens that run across the seam: the choice is tokenised alone, as a continuation would be.
                whole = [*prompt, *encode(choice)[first:]]
            items.append(Item(whole, max(len(prompt), 1)))
    logp = iter(scorer.score(params, items).logp.tolist())
    found = []
    for row in rows:
        mine = [next(logp) for _ in row["choices"]]
        per_byte = [x / len(choice.encode()) for x, choice in zip(mine, row["choices"], strict=True)]
        found.append(
            row | {"logp": mine, "best": mine.index(max(mine)), "best_per_byte": per_byte.index(max(per_byte))}
        )
    return found


def accuracy(rows: list[dict[str, Any]], key: str = "best") -> float | None:
    """The share of rows with a known answer whose `key` is it; None where no answer is known."""
    known = [row[key] == row["answer"] for row in rows if row["answer"] is not None]
    return sum(known) / len(known) if known else None


def report_choices(
    scorer: Scorer, params: Params, encode: Encode, rows: list[dict[str, Any]], output: Path
) -> dict[str, Any]:
    """Writes the scored rows to choices.jsonl, prints and returns the accuracy."""
    scored = score_choices(scorer, params, encode, rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    (output / "choices.jsonl").write_text(lines, encoding="utf-8")
    found = {key: accuracy(scored, key) for key in ("best", "best_per_byte")}
    shown = {key: "unknown" if share is None else f"{100 * share:.1f} %" for key, share in found.items()}
    print(f"choices: right {shown['best']}, by bytes {shown['best_per_byte']}")
    return {"questions": len(rows), **{f"accuracy_{key}": value for key, value in found.items()}}
