"""`python -m ringbpt.train`: trains a model; `--help` lists the flags."""

import shlex
import sys

from ringbpt.config import (
    DEFAULT_RECIPE,
    ENTRY_FLAGS,
    RUN_FLAGS,
    check_output,
    format_config,
    parse,
    parse_args,
    printable,
    printed_help,
    run_main,
    scan,
    split_flags,
)


def main(argv: list[str]) -> int:
    if printed_help(argv, "train"):
        return 0
    asked, argv = split_flags(argv, {"print_config": ENTRY_FLAGS["print_config"]})
    tree = parse_args(argv)
    if not asked["print_config"]:
        check_output(tree)
    from ringbpt.mesh import start_jax  # after the flags: a mistyped one is answered before jax is even imported

    config = parse(tree, start_jax(tree))
    if asked["print_config"]:
        print(printable(format_config(config)))
        return 0
    from ringbpt.training.agreement import Interrupted
    from ringbpt.training.loop import train

    try:
        train(config)
    except Interrupted as stop:
        raise KeyboardInterrupt(f"go on with {goes_on(argv, stop.experiment_id)}") from None
    return 0


def goes_on(argv: list[str], experiment_id: str) -> str:
    """The command that goes on with a run of these flags, for a shell."""
    names = ("autoresume", "logger.experiment_id")
    _, words = scan(argv, {name: RUN_FLAGS[name] for name in names})
    more = ["--autoresume", f"--logger.experiment_id={experiment_id}"]
    return shlex.join(["python", "-m", "ringbpt.train", *(words or [f"--config={DEFAULT_RECIPE}"]), *more])


if __name__ == "__main__":
    sys.exit(run_main(main))
