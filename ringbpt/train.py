"""`python -m ringbpt.train`: trains a model; `--help` lists the flags."""

import sys

from ringbpt.config import format_config, help_text, parse, parse_args, run_main


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(help_text("train"))
        return 0
    tree = parse_args(argv)
    from ringbpt.mesh import start_jax  # after the flags: a mistyped one is answered before jax is even imported

    config = parse(tree, start_jax(tree))
    if "--print_config" in argv:
        print(format_config(config))
        return 0
    from ringbpt.training.loop import train

    train(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
