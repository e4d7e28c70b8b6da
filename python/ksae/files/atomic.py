# SPDX-License-Identifier: Apache-2.0
"""Writing a file so that it is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ksae.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write a new `path` to: at the end of the block it is on disk and becomes `path`.

    The name is in a folder of its own beside `path`, so that temporaries which a library makes for
    itself are found by `clean` too. An OSError becomes a UserError; after any error `path` is what
    it was.
    """
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        new = folder / path.name
        yield new
        with new.open("rb") as file:
            # a library's temporary may be 0600, which would hide the file from the group
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"save: cannot write {path}: {error.strerror}") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a new file, which becomes `path` once it is whole and on disk."""
    with replacing(path) as new, new.open("wb") as file:
        write(file)


def clean(directory: Path) -> None:
    """Delete what killed saves left. Only for the one process that writes to `directory`."""
    for path in directory.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:  # of an earlier version
            path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Put a directory's entries on disk: without it a rename may be lost with the power."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)  # there is no call that only reads it
    os.umask(mask)
    return mask
