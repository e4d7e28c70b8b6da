# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the files of all formats: weights, configurations, and what travels beside.

What a target's own files have no place for, and the output does not depend on (training settings,
counters, metadata), goes to a second file beside them, so that converting back restores it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as from_file
from torch import Tensor

from ksae.errors import UserError, first_line
from ksae.files.atomic import write_atomic
from ksae.files.container import write_tensors

BESIDE = "ksae.safetensors"
_EXTRA = "ksae_extra"


@dataclass
class Source:
    """A weights file with the configurations that lie beside it."""

    path: Path
    state: dict[str, Any]  # tensors; of a pickle, also what else it holds
    metadata: dict[str, str] = field(default_factory=dict)
    configs: list[dict[str, Any]] = field(default_factory=list)

    def config(self, *keys: str) -> dict[str, Any] | None:
        """The configuration that has all of `keys`."""
        return next((c for c in self.configs if all(key in c for key in keys)), None)

    def tensors(self, needed: set[str], allowed: set[str] = frozenset()) -> dict[str, Tensor]:  # type: ignore[assignment]
        """The tensors `needed` and those `allowed` that are there; any other name is an error."""
        return pick(self.state, needed, allowed, str(self.path))


def pick(state: dict[str, Any], needed: set[str], allowed: set[str], owner: str) -> dict[str, Any]:
    for name in sorted(needed - set(state)):
        raise UserError(f"load: {owner} must hold the tensor {name}, got none of that name")
    for name in sorted(set(state) - needed - allowed):
        raise UserError(f"load: {owner} holds {name}, which its format does not have")
    for name in sorted(needed):
        if not isinstance(state[name], Tensor):
            raise UserError(
                f"load: {name} of {owner} must be a tensor, got {type(state[name]).__name__}"
            )
    return dict(state)


def sources(path: Path) -> list[Source]:
    """The weights files at `path`: itself, or those directly in the folder."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
        files = [p for p in files if not p.name.endswith(BESIDE) and not p.name.startswith(".")]
    else:
        files = [path]
    found = []
    for file in files:
        try:
            found.append(read(file))
        except UserError:
            if not path.is_dir():
                raise
    return found


def read(path: Path) -> Source:
    """One weights file, safetensors or a pickle that holds only tensors and plain values."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"load: cannot read {path}: {error.strerror}") from None
    source = Source(path, {}) if start[8:9] == b"{" else Source(path, _unpickle(path))
    if start[8:9] == b"{":
        try:
            with safe_open(path, framework="pt") as tensors:
                source.metadata = dict(tensors.metadata() or {})
                if "ksae" not in source.metadata:  # its own reader takes what it needs
                    source.state = {n: tensors.get_tensor(n) for n in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"load: cannot read {path}: {error}") from None
    source.configs = _configs(path.parent)
    return source


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"load: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"load: {path} must be JSON, got: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"load: {path} must hold keys with values, got {type(value).__name__}")
    return value


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    if not path.is_file():
        raise UserError(f"load: no such file: {path}")
    try:
        return from_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"load: cannot read {path}: {first_line(error)}") from None


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # Never without weights_only: a pickle can run any code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise errors of any class, safetensors' too
        raise UserError(
            f"load: {path} must be a safetensors file or a pickle of tensors and plain values; "
            f"nothing else is unpickled: {first_line(error)}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"load: {path} must hold a dict, got {type(state).__name__}")
    return state


def _configs(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".yaml") or path.name.startswith("."):
            continue
        if not path.is_file() or path.stat().st_size > 1 << 20:
            continue
        try:
            text = path.read_text()
            value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, OSError, yaml.YAMLError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def integer(config: dict[str, Any], name: str, owner: Path) -> int:
    """An integer of a configuration."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise UserError(f"load: {name} in the config of {owner} must be an integer, got {value!r}")
    return int(value)


# ------------------------------------------------------------------------------------------ writing


def write_pickle(path: Path, value: Any) -> None:
    write_atomic(path, lambda file: torch.save(value, file))


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, lambda file: file.write(yaml.safe_dump(value, sort_keys=False).encode()))


def beside(path: Path) -> Path:
    """The file for the rest, of the weights file `path`."""
    return path.with_name(f"{path.name}.{BESIDE}")


def write_extra(path: Path, extra: dict[str, Any]) -> None:
    """Write `extra` beside the weights file `path`, if there is any."""
    if not extra:
        beside(path).unlink(missing_ok=True)
        return
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(extra, tensors, "extra"))
    write_tensors(beside(path), tensors, {_EXTRA: text})


def read_extra(path: Path) -> dict[str, Any]:
    """What `write_extra` left beside the weights file `path`."""
    if not beside(path).is_file():
        return {}
    rest = read(beside(path))
    try:
        extra: dict[str, Any] = _unpack(json.loads(rest.metadata[_EXTRA]), rest.state)
    except (KeyError, ValueError, TypeError):
        raise UserError(f"load: {beside(path)} must be written by ksae convert") from None
    return extra


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {str(k): _pack(v, tensors, f"{name}.{k}") for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"convert: {name} must be a tensor or a plain value, got {value!r}")


def _unpack(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {k: _unpack(v, tensors) for k, v in value["dict"].items()}
