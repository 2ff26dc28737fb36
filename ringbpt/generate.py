"""`python -m ringbpt.generate`: text from a checkpoint of ours, a Hugging Face folder or a GGUF file, on any mesh.

--load_checkpoint=huggingface::DIR --prompt="Once upon"                 one completion
--load_checkpoint=params::runs/<run> --prompts=in.jsonl --output=out.jsonl
                     a line each, {"prompt"} or {"messages"} in, with "completion", "tokens", "finish_reason" out
--load_checkpoint=huggingface::DIR --chat                               a conversation; an empty line ends it
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from ringbpt.checkpoint.given import MODEL_FLAGS, start_model
from ringbpt.config import (
    Flag,
    UserError,
    check_writable,
    for_terminal,
    json_line,
    printed_help,
    read_flags,
    run_main,
    user_path,
)
from ringbpt.config.fields import LARGEST_POSITION

FLAGS = MODEL_FLAGS | {
    "prompt": Flag(str, "", "a text to go on with"),
    "prompts": Flag(str, "", "a .jsonl file of prompts"),
    "output": Flag(str, "", "the .jsonl file to write; empty: the terminal"),
    "chat": Flag(bool, False, "talk, by the model's chat template"),
    "system": Flag(str, "", "the system message of a chat"),
    "max_new_tokens": Flag(int, 256, "of each completion", at_least=1, at_most=LARGEST_POSITION),
    "batch_size": Flag(int, 8, "prompts generated at a time; short ones share a row", at_least=1, at_most=1 << 20),
    "stop": Flag(list, [], "text at which a completion ends; may be given several times"),
    "temperature": Flag(float, 0.0, "0: always the most likely token"),
    "top_k": Flag(int, 0, "only the k most likely; 0: all"),
    "top_p": Flag(float, 1.0, "only the most likely that hold this much probability"),
    "min_p": Flag(float, 0.0, "only those at least this likely, relative to the most likely"),
    "repetition_penalty": Flag(float, 1.0, "above 1: tokens of the text so far become less likely"),
    "seed": Flag(int, 0, "the same seed draws the same texts, whatever the batch or the mesh"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    if sum(bool(flags[name]) for name in ("prompt", "prompts", "chat")) != 1:
        raise UserError("give one of --prompt=TEXT, --prompts=FILE and --chat")
    if flags["output"]:
        check_writable("--output", user_path(flags["output"]), folder=False)
    from ringbpt.data.prompts import read_prompts, whole_text

    rows = read_prompts(Path(flags["prompts"])) if flags["prompts"] else [{"prompt": flags["prompt"]}]
    if flags["chat"]:
        rows = []
    whole_text(flags["system"], "--system")
    from ringbpt.generation.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: flags[name] for name in names})
    from ringbpt.checkpoint.load import describe_predicting
    from ringbpt.generation.generator import Generator, check_lengths, check_vocabulary
    from ringbpt.generation.text import complete, encode_prompts, find_tokenizer, make_chat_encoder

    found = describe_predicting(flags["load_checkpoint"])
    tokenizer = find_tokenizer(found, flags["tokenizer"], flags["chat_template"])
    encode = make_chat_encoder(tokenizer) if flags["chat"] else None
    prompts = encode_prompts(rows, tokenizer, flags["prompts"] or "--prompt")
    count, size, stops = (flags[name] for name in ("max_new_tokens", "batch_size", "stop"))
    check_vocabulary(prompts, found.architecture.vocab_size)
    limit = flags["max_sequence_length"] or found.architecture.max_sequence_length
    check_lengths(max(map(len, prompts), default=1), count, limit)
    text = sys.stdout
    with redirect_stdout(sys.stderr):  # standard output has the text alone
        model, params = start_model(flags)
        generator = Generator(model, params)
        del params
        if flags["chat"]:
            from ringbpt.generation.chat import chat

            assert encode is not None
            return chat(generator, tokenizer, encode, sampling, count, stops, flags["system"], text)
        done = dict(complete(generator, tokenizer, prompts, sampling, count, size, stops))
    if flags["prompt"] and not flags["output"]:
        print(for_terminal(done[0].text))
        return 0
    pairs = [(row, done[i]) for i, row in enumerate(rows)]
    shown = [row | {"completion": x.text, "tokens": x.tokens, "finish_reason": x.reason} for row, x in pairs]
    lines = [json_line(row) + "\n" for row in shown]
    if not flags["output"]:
        sys.stdout.writelines(lines)
        return 0
    output = user_path(flags["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {output}: {len(lines)} completions", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
