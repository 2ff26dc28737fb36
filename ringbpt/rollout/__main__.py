"""Answers of a model to a file of prompts, what they are worth, and data sets of the better ones.

--load_checkpoint=huggingface::DIR --prompts=in.jsonl --output=out.jsonl                 every answer, a line each
... --reward=FILE.py:NAME --samples=8 --keep=best     each prompt's best: rows to fine-tune on (rejection sampling)
... --reward=params::runs/<reward run> --keep=pair    the best and the worst: rows for DPO, with their margin

With a reward every line has it, so that a prompt's template may ask for it: conditional fine-tuning.
"""

import math
import sys
import time
from typing import Any

from ringbpt.checkpoint.given import MODEL_FLAGS, start_model
from ringbpt.config import (
    Flag,
    RolloutConfig,
    UserError,
    check_writable,
    json_line,
    printed_help,
    read_flags,
    run_main,
    user_path,
)
from ringbpt.config.fields import LARGEST_POSITION

FLAGS = MODEL_FLAGS | {
    "prompts": Flag(str, "", 'a .jsonl file of {"prompt"} or {"messages"}', required=True),
    "output": Flag(str, "", "the .jsonl file to write", required=True),
    "keep": Flag(str, "all", "of each prompt's answers", choices=("all", "best", "pair")),
    "samples": Flag(int, 1, "answers to each prompt", at_least=1, at_most=1 << 12),
    "max_new_tokens": Flag(int, 256, "of an answer", at_least=1, at_most=LARGEST_POSITION),
    "temperature": Flag(float, 1.0, "of sampling", above=0, at_most=100),
    "reward": Flag(str, "", "FILE.py:NAME, PREFIX::PATH of a reward model, or http://HOST/PATH; several with commas"),
    "reward_weights": Flag(str, "", "of several, as 1,0.5; empty: all 1"),
    "reward_timeout": Flag(float, 60.0, "seconds that a reward may take", above=0),
    "batch_size": Flag(int, 8, "prompts at a time", at_least=1, at_most=1 << 20),
    "seed": Flag(int, 0, "the same seed draws the same answers", at_least=0, at_most=2**32 - 1),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    check_writable("--output", user_path(flags["output"]), folder=False)
    if flags["keep"] != "all" and not flags["reward"]:
        raise UserError(f"--keep={flags['keep']} is by what answers are worth: --reward=FILE.py:NAME")
    if flags["keep"] == "pair" and flags["samples"] < 2:
        raise UserError("--keep=pair keeps two answers of each prompt: --samples=4")
    from ringbpt.checkpoint.load import describe_predicting
    from ringbpt.data.prompts import read_prompts
    from ringbpt.generation.text import encode_prompts, find_tokenizer

    rows = read_prompts(user_path(flags["prompts"]))
    tokenizer = find_tokenizer(
        describe_predicting(flags["load_checkpoint"]), flags["tokenizer"], flags["chat_template"]
    )
    lines = _answered(flags, rows, encode_prompts(rows, tokenizer, flags["prompts"]), tokenizer)
    output = user_path(flags["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    from ringbpt.data.reading.files import write_whole

    write_whole(output, "".join(json_line(line) + "\n" for line in lines))
    print(f"wrote {output}: {len(lines)} lines")
    return 0


def _answered(flags: dict[str, Any], rows: list[dict[str, Any]], prompts: list[Any], tokenizer: Any) -> list[dict]:
    """The lines to write, some prompts at a time."""
    import numpy as np

    from ringbpt.rollout.engine import LocalEngine
    from ringbpt.rollout.rewards import Answer, Rewards

    model, params = start_model(flags)
    longest, most = max(map(len, prompts)), flags["max_new_tokens"]
    engine = LocalEngine(model, longest, most, frozenset(tokenizer.ends.stop))
    engine.update(params)
    names = ("reward", "reward_weights", "reward_timeout")
    config = RolloutConfig(**{name: flags[name] for name in names}, reward_failures=1.0)
    rewards = Rewards(config, model, longest + most) if flags["reward"] else None
    lines: list[dict[str, Any]] = []
    all_of_them: list[float] = []
    begin, size = time.monotonic(), flags["batch_size"]
    for at in range(0, len(prompts), size):
        own, own_rows = prompts[at : at + size], rows[at : at + size]
        filled = own + [own[0]] * (size - len(own))  # one program for all
        seed = (flags["seed"] + at) % 2**32
        sampled = engine.generate(filled, flags["samples"], flags["temperature"], seed)[: len(own)]
        asked = [
            [Answer.of(tokenizer, prompt, sample, row) for sample in answers]
            for row, prompt, answers in zip(own_rows, own, sampled, strict=True)
        ]
        flat = [answer for answers in asked for answer in answers]
        found = rewards(flat) if rewards else np.full(len(flat), math.nan)
        all_of_them += found.tolist()
        values = found.reshape(len(own), -1).tolist()
        for row, samples, answers, worth in zip(own_rows, sampled, asked, values, strict=True):
            texts, finishes = [answer.completion for answer in answers], [sample.finish for sample in samples]
            lines += kept(flags["keep"], row, texts, finishes, worth)
        done, seconds = min(at + size, len(prompts)), time.monotonic() - begin
        mean = f", mean reward {np.nanmean(all_of_them):.3f}" if rewards and np.isfinite(all_of_them).any() else ""
        print(f"{done}/{len(prompts)} prompts{mean}, {seconds / done * (len(prompts) - done):.0f} s left")
    if rewards:
        rewards.close()
        shown = [line["reward"] for line in lines if "reward" in line]
        if shown:
            print(f"mean reward of all answers {np.nanmean(all_of_them):.3f}, of what is kept {np.mean(shown):.3f}")
    return lines


def kept(keep: str, row: dict[str, Any], texts: list[str], finishes: list[str], rewards: list[float]) -> list[dict]:
    """The lines of one prompt. An answer whose reward has failed (NaN) is left out, as is a pair of equal worth."""
    known = [number for number, reward in enumerate(rewards) if not math.isnan(reward)]
    order = sorted(known, key=lambda number: -rewards[number])
    if keep == "all":
        chosen = known if known else range(len(texts))
        return [
            _learnt(row, texts[n]) | {"finish_reason": finishes[n]} | ({"reward": rewards[n]} if known else {})
            for n in chosen
        ]
    if keep == "best":
        return [_learnt(row, texts[order[0]]) | {"reward": rewards[order[0]]}] if order else []
    if len(order) < 2 or rewards[order[0]] == rewards[order[-1]]:
        return []
    best, worst = order[0], order[-1]
    own = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
    talks = "messages" in row
    said = [[{"role": "assistant", "content": texts[n]}] if talks else texts[n] for n in (best, worst)]
    pair = {"prompt": row["messages"] if talks else row["prompt"], "chosen": said[0], "rejected": said[1]}
    return [own | pair | {"margin": rewards[best] - rewards[worst], "reward": rewards[best]}]


def _learnt(row: dict[str, Any], text: str) -> dict[str, Any]:
    """A prompt's row with an answer, as fine-tuning takes it."""
    if isinstance(row.get("prompt"), str):
        return row | {"completion": text}
    return row | {"messages": [*row["messages"], {"role": "assistant", "content": text}]}


if __name__ == "__main__":
    sys.exit(run_main(main))
