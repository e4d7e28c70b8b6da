# SPDX-License-Identifier: Apache-2.0
"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ksae.errors import UserError

NAME = ".lock"  # of the file in the folder that is locked
_log = logging.getLogger("ksae")


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep all others out of `folder`, which is made if needed, until the end of the block.

    The lock (flock) ends with the process however that ends. It keeps out a second block in the
    same process too. The file is removed at the end.

    Args:
        what: the folder is of, for messages.

    Raises:
        UserError: another one holds it, or the folder cannot be used.
    """
    place = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = _open_locked(place / NAME)
    except BlockingIOError:
        raise UserError(
            f"{what}: {folder} is in use by {_holder(place / NAME)}: wait for its end, stop it, or "
            "choose another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{what}: cannot use {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (place / NAME).unlink(missing_ok=True)  # still locked: nobody else's
        os.close(fd)


def _open_locked(path: Path) -> int:
    """A descriptor of the locked file, which holds who locks it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):  # else its last holder has removed it since it was opened
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return fd
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                _log.warning(
                    "%s: this file system has no locks; nothing keeps a second process from using "
                    "the folder",
                    path.parent,
                )
                return fd
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """The process that holds the lock, as it has written."""
    try:
        pid, host = path.read_text().split()
    except (OSError, ValueError):  # it is just taking or leaving it
        return "another process"
    return f"process {pid}" + ("" if host == socket.gethostname() else f" on {host}")
