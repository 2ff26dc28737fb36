"""Where things are to be written, and where processes are to meet: judged before anything is started or written."""

import errno
import os
import re
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from ringbpt.config.fields import RUN_FLAGS
from ringbpt.config.foreign import user_path
from ringbpt.config.values import UserError, check_value, read_value

# Bytes of a name: file systems take 255, and something stands behind a name while its file is being written.
LONGEST_NAME = 240


def check_writable(flag: str, path: Path, folder: bool = True) -> None:
    """Raises UserError where a folder, or a file, of this name could not be written; nothing of it stays.

    Code 4 where it is the storage that refuses.
    """
    shown = f"{flag}={str(path)!r}"
    for part in path.parts:
        if (size := len(os.fsencode(part))) > LONGEST_NAME:
            raise UserError(f"{shown}: a name of {size} bytes: one of {LONGEST_NAME} bytes at most works")
    path = path.absolute()
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    wants_folder = folder or there != path
    if wants_folder != os.path.isdir(there) or (not wants_folder and not os.path.exists(there)):
        what = "no folder" if wants_folder else "no file"
        raise UserError(f"{shown}: {there} is there already, and is {what}: give another name")
    try:
        if wants_folder:
            tempfile.TemporaryFile(dir=there).close()  # without a name, where the system can do that
        elif not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{shown}: {there}: {error.strerror}; give another name", code=4) from None


def check_output(tree: ConfigDict) -> None:
    """Raises UserError where a run's folder could not be made, before jax is started for it."""
    logger = tree.logger
    name, folder = str(logger.experiment_id), user_path(str(logger.output_dir))
    check_writable("--logger.output_dir", folder)
    if name and "/" not in name:  # what else a name may not be, check_run says
        try:
            check_writable("--logger.experiment_id", folder / name)
        except UserError as error:
            raise UserError(str(error).replace(str(folder / name), name, 1), error.code) from None


def check_start(tree: ConfigDict) -> None:
    """Raises UserError for what jax would be started with and cannot be: how many devices, and where processes meet."""
    name = "num_cpu_devices"
    check_value(name, RUN_FLAGS[name], read_value(f"--{name}", tree[name], int, 8))
    address = tree.jax_distributed.coordinator_address
    if address is None:
        return
    flag = "--jax_distributed.coordinator_address"
    match = re.fullmatch(
        r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?):([0-9]{1,9})", str(address)
    )
    if not match:
        raise UserError(f"{flag}={str(address)!r} is no <host>:<port>: as {flag}=10.0.0.1:1234")
    if not 0 < int(match[3]) < 1 << 16:
        raise UserError(f"{flag}={str(address)!r}: port {match[3]} is not between 1 and 65535: as {flag}=10.0.0.1:1234")
