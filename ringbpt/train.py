"""`python -m ringbpt.train`: trains a model; `--help` lists the flags."""

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from ringbpt.config import (
    DEFAULT_RECIPE,
    ENTRY_FLAGS,
    RUN_FLAGS,
    Config,
    check_output,
    flag_values,
    format_config,
    parse,
    parse_args,
    printable,
    printed_help,
    run_main,
    scan,
    split_flags,
)
from ringbpt.config.foreign import user_path
from ringbpt.ending import COMMAND, Signals, Stopped, listening


def main(argv: list[str]) -> int:
    if printed_help(argv, "train"):
        return 0
    with listening() as signals:
        return _train(argv, signals)


def _train(argv: list[str], signals: Signals) -> int:
    asked, argv = split_flags(argv, {"print_config": ENTRY_FLAGS["print_config"]})
    tree = parse_args(argv)
    if not asked["print_config"]:
        check_output(tree)
    from ringbpt.mesh import start_jax  # after the flags: a mistyped one is answered before jax is even imported

    config = parse(tree, start_jax(tree))
    if asked["print_config"]:
        print(printable(format_config(config)))
        return 0
    from ringbpt import processes
    from ringbpt.training.loop import train

    try:
        with processes.guarded():
            processes.agree("the flags", agreed_flags(config))
            train(config, signals)
    except Stopped as stop:
        command = os.environ.get(COMMAND) or goes_on(argv, stop.experiment_id)
        raise Stopped(stop.code, f"{stop}; go on with {command}", stop.experiment_id) from None
    return 0


def agreed_flags(config: Config) -> dict[str, Any]:
    """What all processes of a run must be given alike: not where each is, and how they meet."""
    return {f"--{name}": value for name, value in flag_values(config).items() if not name.startswith("jax_distributed")}


def named(argv: list[str]) -> tuple[list[str], Path]:
    """(a run's flags with a name for it, the run's folder): flags that give no name would give each start another."""
    tree = parse_args(argv)
    name = tree.logger.experiment_id or f"{datetime.now():%Y%m%d-%H%M%S}-{tree.load_llama_config or 'run'}"
    words = argv if tree.logger.experiment_id else [*argv, f"--logger.experiment_id={name}"]
    return words or [f"--config={DEFAULT_RECIPE}"], user_path(tree.logger.output_dir) / name


def going_on(argv: list[str], experiment_id: str) -> list[str]:
    """The flags that go on with a run of these."""
    names = ("autoresume", "logger.experiment_id")
    _, words = scan(argv, {name: RUN_FLAGS[name] for name in names})
    return [*(words or [f"--config={DEFAULT_RECIPE}"]), "--autoresume", f"--logger.experiment_id={experiment_id}"]


def goes_on(argv: list[str], experiment_id: str) -> str:
    """The command that goes on with a run of these flags, for a shell."""
    return shlex.join(["python", "-m", "ringbpt.train", *going_on(argv, experiment_id)])


if __name__ == "__main__":
    sys.exit(run_main(main))
