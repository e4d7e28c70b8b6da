# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a coder that is spread over ranks: a folder of torch.distributed.checkpoint that
each rank writes its part of, and that any number of ranks reads.

The folder has a file of tensors for each rank, their index `.metadata`, and `sharded.json`, which
holds what the header of a model's file holds. It appears under its name once all of it is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..coders import registry
from ..coders.coder import SparseCoder
from ..coders.file import describe
from ..errors import UserError
from ..files.atomic import write_atomic
from .one_device import OneDevice
from .shard import BY_LATENT
from .shards import Shards

if TYPE_CHECKING:
    from ..step.train_step import TrainStep

HEADER = "sharded.json"
KIND = "sharded checkpoint"


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that `save_sharded` has written."""
    return (Path(path) / HEADER).is_file()


def save_sharded(
    path: str | os.PathLike[str],
    model: SparseCoder,
    step: TrainStep,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the parts of all ranks, which all call it, to the new folder `path` on a disk that they
    share: parameters, counters and the state of `step`. extra: on rank 0, what JSON can hold.

    Raises:
        UserError: on every rank, if one cannot write.
    """
    path = Path(path)
    ranks: Shards | OneDevice = model.ranks or OneDevice()
    everyone = getattr(ranks, "everyone", None)
    temporary = path.parent / f".{path.name}.tmp"
    failed = None
    if ranks.leads:
        failed = _try(path, lambda: _fresh(temporary))
    _same_end(ranks, path, failed)
    own = {
        name if split else f"all/{name}": t
        for name, t, split in _named(model, step, f"{ranks.rank}/")
        if (ranks.writes if split else ranks.leads)
    }
    group = None if everyone is None else everyone.group
    failed = _try(path, lambda: _write(own, temporary, group))
    _same_end(ranks, path, failed)
    if ranks.leads:
        header = describe(model, KIND, extra) | {"ranks": ranks.size, "saved": time.time()}
        failed = _try(path, lambda: _finish(temporary, path, header))
    _same_end(ranks, path, failed)


def load_sharded(
    path: str | os.PathLike[str], model: SparseCoder, step: TrainStep | None = None
) -> dict[str, Any]:
    """Put the state of `path` into a coder, whole or a part, and its step; returns `extra`. Each
    rank reads what it needs, whatever the number of ranks that wrote.

    Raises:
        UserError: no such checkpoint, one that is not whole, or one of another coder.
    """
    path = Path(path)
    header = read_header(path)
    _compare(path, header, model)
    ranks: Shards | OneDevice = model.ranks or OneDevice()
    read = {}
    for name, t, split in _named(model, step, ""):
        if split:
            read[name] = _own_rows(path, name, t, header["ranks"], model.d_sae, ranks)
        else:
            read[name] = _read(path, f"all/{name}", torch.empty_like(t, device="cpu"))
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(read[f"model.{name}"])
    if step is not None:
        step.load_state_dict({n: read[f"step.{n}"].to(t) for n, t in step.state_dict().items()})
    extra: dict[str, Any] = header["extra"]
    return extra


def load_whole(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> SparseCoder:
    """The whole coder of a sharded checkpoint, in one process that needs no process group."""
    header = read_header(Path(path))
    kind = registry.find(header["class"])
    if kind is None:
        got = header["class"]
        raise UserError(f"load: {path} must hold a class of ksae.coders, got {got!r}")
    model = kind(**header["config"], device=device)
    load_sharded(path, model)
    return model


def read_header(path: Path) -> dict[str, Any]:
    """What `sharded.json` says.

    Raises:
        UserError: there is none, or the checkpoint is not whole.
    """
    try:
        header: dict[str, Any] = json.loads((path / HEADER).read_text())
    except FileNotFoundError:
        raise UserError(
            f"load: {path} must be a sharded checkpoint, got no {HEADER} there"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"load: {path / HEADER} must be readable JSON, got: {error}") from None
    if not (path / ".metadata").is_file():
        raise UserError(f"load: {path} must be whole, got a folder without .metadata")
    return header


def _named(
    model: SparseCoder, step: TrainStep | None, prefix: str
) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it has a row a latent, whose names get the prefix."""
    state = {f"model.{n}": t for n, t in model.state_dict().items()}
    if step is not None:
        state |= {f"step.{n}": t for n, t in step.state_dict().items()}
    for name, t in state.items():
        split = name.rsplit(".", 1)[1] in BY_LATENT
        yield (prefix if split else "") + name, t.detach(), split


def _own_rows(
    path: Path, name: str, like: Tensor, saved_by: int, F: int, ranks: Shards | OneDevice
) -> Tensor:
    """The rows of this rank's latents, of the parts that `saved_by` ranks wrote, one at a time."""
    rows = torch.empty_like(like, device="cpu")
    latents = torch.arange(ranks.rank, F, ranks.size)
    for r in range(saved_by):
        here = latents % saved_by == r
        if not bool(here.any()):
            continue
        part = torch.empty(len(range(r, F, saved_by)), *like.shape[1:], dtype=like.dtype)
        rows[here] = _read(path, f"{r}/{name}", part)[latents[here] // saved_by]
    return rows


def _read(path: Path, name: str, into: Tensor) -> Tensor:
    from torch.distributed.checkpoint.api import CheckpointException  # slow to import
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it may be
            load({name: into}, checkpoint_id=path, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        why = str(error).strip().split("\n")[-1]
        raise UserError(f"load: {name} of {path} cannot be read: {why}") from error
    return into


def _compare(path: Path, header: dict[str, Any], model: SparseCoder) -> None:
    want = describe(model, KIND, None)
    want = {"class": want["class"], **want["config"]}
    got = {"class": header["class"], **header["config"]}
    for name in want | got:
        if want.get(name) != got.get(name):
            raise UserError(
                f"load: {path} must be of a coder with {name} = {want.get(name)}, got"
                f" {got.get(name)}"
            )


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
    folder.mkdir(parents=True)


def _write(own: dict[str, Tensor], folder: Path, group: Any) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save(own, checkpoint_id=folder, process_group=group, no_dist=group is None)


def _finish(folder: Path, path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header, indent=1)
    write_atomic(folder / HEADER, lambda file: file.write(text.encode()))
    old = path.parent / f".{path.name}.old.tmp"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(folder, path)
    shutil.rmtree(old, ignore_errors=True)


def _try(path: Path, work: Any) -> str | None:
    """What went wrong, in one line."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        work()
    except OSError as error:
        return f"save: cannot write {path}: {error.strerror or error}"
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        return f"save: cannot write {path}: {str(error).strip().splitlines()[-1]}"
    return None


def _same_end(ranks: Shards | OneDevice, path: Path, failed: str | None) -> None:
    """An error on every rank if one has failed."""
    error = None if failed is None else UserError(failed)
    if error is not None:
        ranks.refuse("save", error)
        raise error
    ranks.agree("save", {"the path": str(path)})
