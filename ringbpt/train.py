"""`python -m ringbpt.train`: trains a model; `--help` lists the flags."""

import sys

from ringbpt.config import ENTRY_FLAGS, format_config, parse, parse_args, printed_help, run_main, split_flags


def main(argv: list[str]) -> int:
    if printed_help(argv, "train"):
        return 0
    asked, argv = split_flags(argv, {"print_config": ENTRY_FLAGS["print_config"]})
    tree = parse_args(argv)
    from ringbpt.mesh import start_jax  # after the flags: a mistyped one is answered before jax is even imported

    config = parse(tree, start_jax(tree))
    if asked["print_config"]:
        print(format_config(config))
        return 0
    from ringbpt.training.loop import train

    train(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
