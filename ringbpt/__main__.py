# PYTHON_ARGCOMPLETE_OK
"""`ringbpt <verb> ...`, or `python -m ringbpt <verb> ...`: the same as `python -m ringbpt.<verb> ...`."""

import argparse
import os
import sys
from importlib import import_module
from typing import Any

import ringbpt
from ringbpt.config import ALIASES, ENTRY_FLAGS, RUN_FLAGS, Flag, UserError, nearest_name, run_main

VERBS = {
    "train": "trains a model, or goes on from a checkpoint",
    "launch": "trains in several processes of this machine, and starts them again when one is lost",
    "plan": "does a run fit a machine that need not be here, and how long does a step take",
    "verify": "is the step the same on other meshes, layouts, strategies and kernels",
    "columns": "what the reference model of a preference run says of each token, before the run",
    "inspect": "the first batches: what takes loss, as text, as a page or as JSON",
    "generate": "text from a checkpoint: completions, or a conversation",
    "serve": "a checkpoint behind OpenAI's routes, for clients and for rollouts",
    "evaluate": "what a checkpoint knows: perplexity, passkeys, choices",
    "rollout": "answers to a file of prompts, what they are worth, and data sets of the better ones",
    "checkpoint": "what a run has saved, and whether it is as it was written",
    "autotune": "measures block sizes of attention on the device that is here",
}
OF_A_RUN = ("train", "plan", "verify", "inspect", "columns")  # besides their own, these take the flags of a run


def main(argv: list[str]) -> int:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print("\n".join(["usage: ringbpt <verb> [--name=value ...]", ""]))
        print("\n".join(f"  {name:<10} {line}" for name, line in VERBS.items()))
        print("\nthe flags of a verb: ringbpt <verb> --help; which ringbpt this is: ringbpt --version")
        return 0
    if verb == "--version":
        print(f"ringbpt {ringbpt.__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(f"'{verb}' is no verb ({', '.join(VERBS)}): did you mean ringbpt {nearest_name(verb, VERBS)}?")
    return module_of(verb).main(rest)


def module_of(verb: str) -> Any:
    """The module of a verb, which may be a room's."""
    module = import_module(f"ringbpt.{verb}")
    return module if hasattr(module, "main") else import_module(f"ringbpt.{verb}.__main__")


def flags_of(verb: str) -> dict[str, Flag]:
    """Every flag that a verb takes, by its name, without importing jax."""
    own = getattr(module_of(verb), "FLAGS", {})
    return own | (ENTRY_FLAGS | RUN_FLAGS | ALIASES if verb in OF_A_RUN else {"help": ENTRY_FLAGS["help"]})


def make_parser(words: list[str]) -> argparse.ArgumentParser:
    """What a shell completes from: the verbs, and the flags and choices of the one that is among the words so far."""
    parser = argparse.ArgumentParser(prog="ringbpt", add_help=False, allow_abbrev=False)
    parser.add_argument("verb", choices=VERBS)
    for name, flag in flags_of(words[0]).items() if words and words[0] in VERBS else ():
        names = [one for one in flag.choices if one] or (["True", "False"] if flag.kind is bool else None)
        values = "?" if flag.kind is bool or flag.bare else None
        parser.add_argument(f"--{name}", choices=names, nargs=values, help=flag.help.replace("%", "%%"))
    return parser


def complete() -> None:
    """Answers a shell that asks for completions, and ends the process; without argcomplete there are none."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    argcomplete.autocomplete(make_parser(os.environ["COMP_LINE"].split()[1:]))


def entry() -> int:
    """The console script `ringbpt`."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    return run_main(main)


if __name__ == "__main__":
    sys.exit(entry())
