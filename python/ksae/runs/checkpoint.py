# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: model, optimizer and trainer in one file, which also loads as a model."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksae.coders.coder import SparseCoder
from ksae.coders.file import describe, model_tensors
from ksae.errors import UserError
from ksae.files import container
from ksae.parallel.checkpoint import load_sharded, read_header
from ksae.step.train_step import TrainStep

_OPTIMIZER = "optimizer"  # prefix of a checkpoint's tensors that are not the model's
_TRAINER = "trainer"
_STEP_NAME = re.compile(r"step_(\d{8,})(?:\.safetensors)?")  # a folder: of several processes
_log = logging.getLogger("ksae")


def step_path(directory: Path, step: int) -> Path:
    """Name of the checkpoint after `step` steps."""
    return directory / f"step_{step:08d}.safetensors"


def save_training(
    path: Path,
    model: SparseCoder,
    step: TrainStep,
    trainer: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write model, optimizer and `trainer` to one file.

    Args:
        trainer: the trainer's state, nested dicts of tensors and plain values.
    """
    tensors = dict(model.state_dict())
    header = describe(model, "checkpoint", extra)
    header[_OPTIMIZER] = container.pack(step.state_dict(), tensors, _OPTIMIZER)
    header[_TRAINER] = container.pack(dict(trainer), tensors, _TRAINER)
    container.write(path, tensors, header)


def load_training(path: Path, model: SparseCoder, step: TrainStep) -> dict[str, Any]:
    """Put a checkpoint's state into `model` and `step`; returns the trainer's state."""
    if path.is_dir():
        return load_sharded(path, model, step)
    if model.ranks is not None:
        raise UserError(
            f"load: {path} must be a checkpoint of several processes, got one of a single process:"
            " go on with one"
        )
    header = container.read_header(path)
    if header["kind"] != "checkpoint":
        raise UserError(
            f"load: {path} must be a training checkpoint, got a model without optimizer state"
        )
    tensors = model_tensors(path, model)
    with container.open_tensors(path) as file:
        optimizer = container.unpack(header[_OPTIMIZER], file)
        trainer: dict[str, Any] = container.unpack(header[_TRAINER], file)
    model.load_state_dict(tensors)
    step.load_state_dict(optimizer)
    return trainer


def identity(path: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint is of."""
    header = read_header(path) if path.is_dir() else container.read_header(path)
    settings: dict[str, Any] = header["extra"]["identity"]
    return settings


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole and unchanged, None without one; reads it once, and warns
    of each newer file it passes over."""
    for _, path in reversed(_list(directory)):
        try:
            if path.is_dir():
                read_header(path)
                return path
            with container.open_tensors(path) as file:
                file.verify()
        except UserError as error:
            _log.warning("%s; trying the checkpoint before it", error)
            continue
        return path
    return None


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of `directory`."""
    for _, path in _list(directory)[:-keep]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _list(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    found = ((_STEP_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)
