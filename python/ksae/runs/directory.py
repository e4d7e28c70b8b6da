# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: who may begin or go on there, and what is left when a start fails."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ksae.errors import UserError
from ksae.files import lock
from ksae.runs import checkpoint

FILES = frozenset(["run.yaml", "metrics.jsonl", "checkpoints"])  # one of which a run has at once
# All that a run writes; `run_step_*.yaml` are the configurations before a change.
WRITTEN = (*sorted(FILES), "run_step_*.yaml", "model.safetensors", "evaluation.json")
WRITTEN += ("training.png", "latents.png", "tensorboard", "wandb", "wandb_id.txt", ".*.tmp")


def open_directory(out: Path, resume: bool = False, restart: bool = False) -> Path | None:
    """Make the directory of a run, or refuse one that is not as asked; nothing is deleted.

    Args:
        resume: it must be that of a run, or empty: a run that was stopped before it began.
        restart: it may be that of a run, which is to be dropped.

    Returns:
        The checkpoint to go on from; None for a run from its first step on.

    Raises:
        UserError: the folder cannot be used, holds something else, or has no usable checkpoint to
            resume from.
    """
    if resume and restart:
        raise UserError("train: resume and restart cannot be given together: choose one")
    try:
        found = {path.name for path in out.iterdir()} - {lock.NAME} if out.is_dir() else None
        if resume and (found is None or (found and not found & FILES)):
            raise UserError(f"train: out must be the folder of a run to resume, got {out}")
        if found and not resume and not (restart and found & FILES):
            hint = "resume it, start over (restart)" if found & FILES else "it holds other files"
            raise UserError(f"train: out must be a new folder, got {out}: {hint} or choose another")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train: cannot use {out} as out: {error.strerror}") from None
    if not resume or not found:
        return None
    newest = checkpoint.latest(out / "checkpoints")
    if newest is None:
        raise UserError(
            f"train: {out} must have a usable checkpoint to resume from, got none: start over with "
            "restart (--restart), which drops what the run left there"
        )
    return newest


def drop(out: Path) -> None:
    """Delete what a run left in `out`, and nothing else."""
    for pattern in WRITTEN:
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(out: Path, resume: bool = False, restart: bool = False) -> Iterator[Path | None]:
    """`open_directory`, kept from other processes during the block; for a failure of the block see
    `nothing_left`."""
    if resume and not out.is_dir():
        raise UserError(f"train: out must be the folder of a run to resume, got {out}")
    with nothing_left(out), lock.locked(out, "train"):
        yield open_directory(out, resume, restart)


@contextlib.contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """If the block fails, remove the empty folders that it made for `out`."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: there is something to keep
                path.rmdir()
        raise
