# SPDX-License-Identifier: Apache-2.0
"""The container of models and checkpoints: one safetensors file, read and written.

It holds the tensors under their own names and, in the metadata, one JSON text `ksae` with format
and library version, kind, class, constructor arguments, an `extra` dict and `checksums`, the CRC-32
of each tensor's bytes by name. Files of earlier versions have no checksums; their content is not
checked.

A file appears under its name only when it is whole and on disk (see `atomic`): `kill -9` or a full
disk at any moment leaves the files that were there before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ksae.errors import UserError, first_line
from ksae.files import checksum
from ksae.files.atomic import replacing

FORMAT = 1


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
    """Write tensors and description to `path`, with a checksum of each tensor."""
    whole = _on_host(tensors)
    checksums = {name: checksum.of_tensor(tensor) for name, tensor in whole.items()}
    write_tensors(path, whole, {"ksae": json.dumps({**header, "checksums": checksums})})


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file. A tensor that is contiguous and on the CPU is written from where it
    is; of any other, a copy is held until the file is written."""
    with replacing(path) as new:
        try:
            save_file(_on_host(tensors), new, metadata=metadata)
        except SafetensorError as error:
            reason = first_line(error).removeprefix("Error while serializing: ")
            raise UserError(f"save: cannot write {path}: {reason}") from None


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; these are read apart
        whole[name] = value.clone() if storage in seen else value
        seen.add(whole[name].untyped_storage().data_ptr())
    return whole


class TensorFile:
    """The tensors of an open ksae file. Each is compared with its checksum as it is read.

    Raises:
        UserError: a tensor is not what was written.
    """

    def __init__(self, path: Path, file: Any, checksums: dict[str, int] | None) -> None:
        self._path, self._file, self._checksums = path, file, checksums
        self.names: frozenset[str] = frozenset(file.keys())

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._file.get_slice(name).get_shape()
        return shape

    def read(self, name: str) -> Tensor:
        """A tensor of `names`, in memory of its own."""
        tensor: Tensor = self._file.get_tensor(name).clone()
        self._compare(name, tensor)
        return tensor

    def verify(self) -> None:
        """Compare every tensor with its checksum."""
        for name in sorted(self.names):
            self._compare(name, self._file.get_tensor(name))

    def _compare(self, name: str, tensor: Tensor) -> None:
        if self._checksums is not None and checksum.of_tensor(tensor) != self._checksums.get(name):
            raise UserError(
                f"load: {self._path} is damaged: the content of {name} is not what was saved"
            )


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open the tensors of a ksae file, which are mapped and read when asked for."""
    checksums = read_header(path).get("checksums")
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"load: cannot read {path}: {error}") from None
    with handle as file:
        yield TensorFile(path, file, checksums)


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


def unpack(value: Any, file: TensorFile) -> Any:
    """The state whose JSON form `pack` gave."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return file.read(content)
    if kind == "dict":
        return {key: unpack(v, file) for key, v in content}
    items = [unpack(v, file) for v in content]
    return items if kind == "list" else tuple(items)


def _say_foreign(size: int) -> str:
    return "an empty file" if size == 0 else f"{size} bytes of something else"
