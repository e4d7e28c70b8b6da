# SPDX-License-Identifier: Apache-2.0
"""Files of models and of training state.

One file is one safetensors file: the model's tensors under their own names and, in the metadata,
one JSON text `ksae` with format and library version, class, constructor arguments and an `extra`
dict. A training checkpoint is such a file too (so `load` reads it as a model) that also holds the
optimizer state and the trainer's state.

A file appears under its name only when it is whole and on disk: it is written to a temporary name
in the same directory, fsynced and renamed, and the directory is fsynced. `kill -9` or a full disk
at any moment leaves the files that were there before.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksae.coders import coder as modules
from ksae.coders import registry
from ksae.errors import UserError
from ksae.files.atomic import write_atomic
from ksae.step.train_step import TrainStep
from ksae.version import VERSION

FORMAT = 1
_OPTIMIZER = "optimizer"  # prefix of a checkpoint's tensors that are not the model's
_TRAINER = "trainer"
_STEP_NAME = re.compile(r"step_(\d{8,})\.safetensors")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_log = logging.getLogger("ksae")


def save(
    model: modules.SparseCoder, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> None:
    """Write `model` to the file `path`, with any JSON-able dict `extra` (see `read_header`)."""
    _write(Path(path), dict(model.state_dict()), _describe(model, "model", extra))


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    k: int | None = None,
    fold: bool = False,
    as_topk: bool = False,
) -> modules.SparseCoder:
    """Read a model from a file of `save`, a training checkpoint, a finished run's folder, or the
    files of another library (`ksae.interop.convert`), recognised by what they hold.

    Args:
        path: the file, or the directory that `ksae train` wrote to; of another library, its file or
            folder, or a Hugging Face id, `owner/name` or `owner/name/folder`.
        device: where to put the tensors; default the CPU.
        dtype: of the parameters; default the dtype they were saved in.
        k, fold, as_topk: for files of other libraries, see `ksae.interop.convert.load`.
    """
    from ksae.interop import convert, hub

    if hub.is_id(path):
        path = hub.download(path)
    file = Path(path)
    if file.is_dir() and (file / "model.safetensors").is_file():
        file = file / "model.safetensors"
    if not convert.is_foreign(file):
        return load_own(path, device, dtype)
    return convert.load(path, device, dtype, k=k, fold=fold, as_topk=as_topk)


def load_own(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> modules.SparseCoder:
    """`load` of ksae's own files only."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    header = read_header(path)
    model = _build(path, header)
    tensors = _model_tensors(path, model)
    parameters = dict(model.named_parameters())  # buffers are accumulators, which keep their dtype
    for name, tensor in tensors.items():
        kind = dtype if dtype is not None and name in parameters else tensor.dtype
        tensors[name] = tensor.to(device=device, dtype=kind)
    model.load_state_dict(tensors, assign=True)
    return model


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON description of a ksae file: format, version, kind, class, config and extra.

    Reads only the header, and checks against the file's size that the file is whole.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            start = file.read(1) if len(prefix) == 8 else b""
            if start != b"{":
                raise UserError(
                    f"load: {path} must be a safetensors file, got {_say_foreign(size)}"
                )
            if 8 + length > size:
                raise UserError(f"load: {path} is truncated: {size} bytes end inside its header")
            entries = json.loads(start + file.read(length - 1))
            metadata = entries.pop("__metadata__", {})
            needed = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    except FileNotFoundError:
        raise UserError(f"load: no such file: {path}") from None
    except OSError as error:
        raise UserError(f"load: cannot read {path}: {error.strerror}") from None
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise UserError(
            f"load: {path} must be a safetensors file, got an unreadable header"
        ) from None
    if size != needed:
        state = "is truncated" if size < needed else "has bytes after its end"
        raise UserError(f"load: {path} {state}: it must have {needed} bytes, got {size}")
    try:
        header: dict[str, Any] = json.loads(metadata["ksae"])
        version, written = int(header["format"]), header["version"]
        header["class"], header["config"], header["kind"]
    except (KeyError, ValueError, TypeError):
        raise UserError(
            f"load: {path} must be written by ksae, got a safetensors file of another library"
        ) from None
    if version > FORMAT:
        raise UserError(
            f"load: {path} must be of format <= {FORMAT}, got {version} "
            f"(written by ksae {written}): update ksae"
        )
    return header


def step_path(directory: Path, step: int) -> Path:
    """Name of the checkpoint after `step` steps."""
    return directory / f"step_{step:08d}.safetensors"


def save_training(
    path: Path,
    model: modules.SparseCoder,
    step: TrainStep,
    trainer: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write model, optimizer and `trainer` to one file.

    Args:
        trainer: the trainer's state, nested dicts of tensors and plain values.
    """
    tensors = dict(model.state_dict())
    header = _describe(model, "checkpoint", extra)
    header[_OPTIMIZER] = _pack(step.state_dict(), tensors, _OPTIMIZER)
    header[_TRAINER] = _pack(dict(trainer), tensors, _TRAINER)
    _write(path, tensors, header)


def load_training(path: Path, model: modules.SparseCoder, step: TrainStep) -> dict[str, Any]:
    """Put a checkpoint's state into `model` and `step`; returns the trainer's state."""
    header = read_header(path)
    if header["kind"] != "checkpoint":
        raise UserError(
            f"load: {path} must be a training checkpoint, got a model without optimizer state"
        )
    tensors = _model_tensors(path, model)
    with _open(path) as file:
        optimizer = _unpack(header[_OPTIMIZER], file)
        trainer: dict[str, Any] = _unpack(header[_TRAINER], file)
    model.load_state_dict(tensors)
    step.load_state_dict(optimizer)
    return trainer


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint, None without one; warns of each newer file it passes over."""
    for _, path in reversed(_list(directory)):
        try:
            read_header(path)
        except UserError as error:
            _log.warning("%s; trying the checkpoint before it", error)
            continue
        return path
    return None


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of `directory`."""
    for _, path in _list(directory)[:-keep]:
        path.unlink(missing_ok=True)


def _describe(
    model: modules.SparseCoder, kind: str, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    config = model.config()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "class": config.pop("class"),
        "config": config,
        "extra": dict(extra or {}),
    }


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # Not safetensors' own save_file: it renames inside, without fsync, and leaves temporaries when
    # killed.
    description = {"__metadata__": {"ksae": json.dumps(header)}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps all aligned
    entries: dict[str, Any] = dict(description)
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    write_atomic(path, write)


def _build(path: Path, header: dict[str, Any]) -> modules.SparseCoder:
    name = str(header["class"])
    kind = registry.find(name)
    if kind is None:
        raise UserError(f"load: {path} must hold a class of ksae.coders, got {header['class']!r}")
    try:
        # On the meta device: no memory, no random numbers drawn.
        model = kind(**header["config"], device="meta")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"load: {path} has a config that does not fit {header['class']}: {error}"
        ) from None
    return model


def _model_tensors(path: Path, model: modules.SparseCoder) -> dict[str, Tensor]:
    expected = model.state_dict()
    with _open(path) as file:
        names = set(file.keys())
        for name, tensor in expected.items():
            if name not in names:
                raise UserError(f"load: {path} must hold the tensor {name}, got none of that name")
            shape = list(file.get_slice(name).get_shape())
            if shape != list(tensor.shape):
                raise UserError(
                    f"load: {name} of {path} must have the shape {list(tensor.shape)}, got {shape}"
                )
        return {name: file.get_tensor(name).clone() for name in expected}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"load: cannot read {path}: {error}") from None


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON form of nested state; keys keep their type. Tensors go to `tensors`, by their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(v, tensors, f"{name}.{key}")] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save: {name} must be a tensor or a plain value, got {type(value).__name__}")


def _unpack(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return file.get_tensor(content).clone()
    if kind == "dict":
        return {key: _unpack(v, file) for key, v in content}
    items = [_unpack(v, file) for v in content]
    return items if kind == "list" else tuple(items)


def _list(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    found = ((_STEP_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _say_foreign(size: int) -> str:
    return "an empty file" if size == 0 else f"{size} bytes of something else"
