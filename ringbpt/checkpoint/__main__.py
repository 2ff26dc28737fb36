"""The checkpoints of a run: which there are, and whether they are as they were written.

  python -m ringbpt.checkpoint ls runs/<run>        a line a step: what it holds, how large it is, and from when
  python -m ringbpt.checkpoint verify runs/<run>    the same, every byte read; exit code 4 where anything is damaged

A run's folder, its checkpoints/ or one step of it. Reads, and changes nothing.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from ringbpt.config import (
    JSON,
    UserError,
    check_folders,
    json_to,
    nearest_name,
    printable,
    printed_help,
    run_main,
    split_flags,
    user_path,
)

FLAGS = {"json": JSON}
WORDS = ("ls", "verify")


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    asked, words = split_flags(argv, FLAGS)
    if len(words) != 2 or words[0] not in WORDS or words[1].startswith("--"):
        near = nearest_name(words[0], WORDS) if words else "ls"
        raise UserError(f"'{' '.join(words)}': did you mean python -m ringbpt.checkpoint {near} runs/<run>?")
    check_folders(asked, "json")
    import jax

    jax.config.update("jax_platforms", "cpu")  # no device is asked for anything
    with json_to(asked["json"]) as write:
        steps = [describe(folder, words[0] == "verify") for folder in step_folders(user_path(words[1]))]
        write(json.dumps(steps, indent=2) + "\n")
    bad = [step for step in steps if step["problem"]]
    if words[0] == "verify" and bad:
        raise UserError(f"{len(bad)} of {len(steps)} checkpoints are damaged; {bad[-1]['problem']}", code=4)
    return 0


def step_folders(path: Path) -> list[Path]:
    """The steps that a folder means, the oldest first. Raises UserError where there is none."""
    from ringbpt.checkpoint.store import is_whole, numbered

    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder")
    if path.name.isdecimal() and is_whole(path):
        return [path]
    for directory in (path / "checkpoints", path):
        if steps := numbered(directory):
            return [directory / str(step) for step in steps]
    raise UserError(f"{path}: no checkpoints in this folder", code=4)


def describe(folder: Path, read: bool) -> dict[str, Any]:
    """One step, and prints it as a line. read: every byte is compared with its digest."""
    from ringbpt.checkpoint.store import StoredStep, read_object

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found: dict[str, Any] = {"step": int(folder.name), "folder": str(folder), "bytes": size, "entries": []}
    found |= {"milestone": None, "problem": "", "written": datetime.fromtimestamp(folder.stat().st_mtime).isoformat()}
    try:
        step = StoredStep(folder)
        found |= {"entries": sorted(step.trees), "milestone": bool(read_object(folder).get("milestone"))}
        if read:
            step.verify()
    except (UserError, OSError, ValueError, AttributeError) as error:
        found["problem"] = str(error) if isinstance(error, UserError) else f"checkpoint {folder}: {error}"
    kind = "milestone" if found["milestone"] else ""
    state = found["problem"] or ("as it was written" if read else "")
    when = found["written"][:16].replace("T", " ")
    line = f"{folder.name:>10}  {when}  {size / 1e6:>12,.1f} MB  {', '.join(found['entries']):<28}  {kind:<9}  {state}"
    print(printable(line.rstrip()), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(run_main(main))
