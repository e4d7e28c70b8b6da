# SPDX-License-Identifier: Apache-2.0
"""Writing a file so that it is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ksae.errors import UserError


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file beside `path`; once whole and on disk, it becomes `path`."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the group
            write(file)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"save: cannot write {path}: {error.strerror}") from None
        raise


def clean(directory: Path) -> None:
    """Delete what killed saves left. Only for the one process that writes to `directory`."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # there is no call that only reads it
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
