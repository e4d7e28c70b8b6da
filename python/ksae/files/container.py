# SPDX-License-Identifier: Apache-2.0
"""The container of models and checkpoints: one safetensors file, read and written.

It holds the tensors under their own names and, in the metadata, one JSON text `ksae` with format
and library version, kind, class, constructor arguments and an `extra` dict.

A file appears under its name only when it is whole and on disk: it is written to a temporary name
in the same directory, fsynced and renamed, and the directory is fsynced. `kill -9` or a full disk
at any moment leaves the files that were there before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksae.errors import UserError
from ksae.files.atomic import write_atomic

FORMAT = 1
DTYPES = {
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


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # Not safetensors' own save_file: it renames inside, without fsync, and leaves temporaries when
    # killed.
    description = {"__metadata__": {"ksae": json.dumps(header)}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps all aligned
    entries: dict[str, Any] = dict(description)
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)

    def body(file: IO[bytes]) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    write_atomic(path, body)


def open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"load: cannot read {path}: {error}") from None


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON form of nested state; keys keep their type. Tensors go to `tensors`, by their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, pack(v, tensors, f"{name}.{key}")] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save: {name} must be a tensor or a plain value, got {type(value).__name__}")


def unpack(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return file.get_tensor(content).clone()
    if kind == "dict":
        return {key: unpack(v, file) for key, v in content}
    items = [unpack(v, file) for v in content]
    return items if kind == "list" else tuple(items)


def _say_foreign(size: int) -> str:
    return "an empty file" if size == 0 else f"{size} bytes of something else"
