# SPDX-License-Identifier: Apache-2.0
"""The lock of a folder: one process at a time, and nothing of it is left."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ksae.errors import UserError
from ksae.files import lock

HOLD = """
import sys, time
from pathlib import Path
from ksae.files.lock import locked
with locked(Path(sys.argv[1]), "train"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "locked\n"
    return child


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_a_second_process_is_refused_until_the_first_one_ends(end: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with holder(folder) as child:
        for _ in range(2):  # a refusal leaves the lock as it is
            with pytest.raises(UserError) as caught, lock.locked(folder, "train"):
                pass
            assert str(caught.value).startswith(
                f"train: {folder} is in use by process {child.pid}:"
            )
        with lock.locked(tmp_path / "other", "train"):
            pass
        if end == "is killed":
            child.send_signal(signal.SIGKILL)
        else:
            child.communicate("")
        child.wait()
    assert (folder / lock.NAME).exists() == (end == "is killed")
    with lock.locked(folder, "train"):
        assert (folder / lock.NAME).read_text().split()[0] == str(os.getpid())
    assert list(folder.iterdir()) == []


def test_a_second_block_of_the_process_is_refused_and_does_not_end_the_first(
    tmp_path: Path,
) -> None:
    with lock.locked(tmp_path, "train"):
        for folder in (tmp_path, tmp_path / ".." / tmp_path.name):
            with (
                pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
                lock.locked(folder, "train"),
            ):
                pass
        with (tmp_path / lock.NAME).open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_lock_ends_with_an_error_in_the_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock.locked(tmp_path, "train"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with holder(tmp_path) as child:
        child.communicate("")


def test_a_lock_file_that_was_removed_in_between_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before its holder removed it: then the name must be opened anew."""
    flock, seen = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not seen:
            (tmp_path / lock.NAME).unlink()
        seen.append(fd)
        flock(fd, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.locked(tmp_path, "train"):
        assert (tmp_path / lock.NAME).read_text().split()[0] == str(os.getpid())
    assert len(seen) == 2


def test_folders_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"train: cannot use .*file"),
        lock.locked(tmp_path / "file", "train"),
    ):
        pass

    def unknown(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with caplog.at_level(logging.WARNING, "ksae"), lock.locked(tmp_path, "train"):
        pass
    assert "no locks" in caplog.text  # said, and gone on with
