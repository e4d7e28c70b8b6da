# SPDX-License-Identifier: Apache-2.0
"""Files of models: saved by `Coder.save`, read by class name through the registry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksae.coders import registry
from ksae.errors import UserError
from ksae.files import container
from ksae.version import VERSION

if TYPE_CHECKING:
    from ksae.coders.coder import SparseCoder


def save(
    model: SparseCoder, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> None:
    """Write `model` to the file `path`; extra: any dict that JSON can hold."""
    container.write(Path(path), plain_state(model), describe(model, "model", extra))


def plain_state(model: SparseCoder) -> dict[str, Tensor]:
    """The tensors of a model by the names that its class gives them: of a parametrised matrix its
    value, which is what the model computes with."""
    state = dict(model.state_dict())
    for name in getattr(model, "parametrizations", {}):
        for key in [key for key in state if key.startswith(f"parametrizations.{name}.")]:
            del state[key]
        state[name] = getattr(model, name).detach()
    return state


def load_own(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SparseCoder:
    """Read a model: a file of `save`, a training checkpoint, or the folder of a finished run."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    header = container.read_header(path)
    model = _build(path, header)
    tensors = model_tensors(path, model)
    parameters = dict(model.named_parameters())  # buffers are accumulators, which keep their dtype
    for name, tensor in tensors.items():
        kind = dtype if dtype is not None and name in parameters else tensor.dtype
        tensors[name] = tensor.to(device=device, dtype=kind)
    model.load_state_dict(tensors, assign=True)
    return model


def describe(model: SparseCoder, kind: str, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    config = model.config()
    return {
        "format": container.FORMAT,
        "version": VERSION,
        "kind": kind,
        "class": config.pop("class"),
        "config": config,
        "extra": dict(extra or {}),
    }


def _build(path: Path, header: dict[str, Any]) -> SparseCoder:
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


def model_tensors(path: Path, model: SparseCoder) -> dict[str, Tensor]:
    expected = model.state_dict()
    with container.open_tensors(path) as file:
        start = {}
        if "mean_active" in expected and "mean_active" not in file.names:
            del expected["mean_active"]  # a file from before there was one
            start["mean_active"] = torch.tensor(torch.inf, dtype=torch.float64)
        for name, tensor in expected.items():
            if name not in file.names:
                raise UserError(f"load: {path} must hold the tensor {name}, got none of that name")
            shape = file.shape(name)
            if shape != list(tensor.shape):
                raise UserError(
                    f"load: {name} of {path} must have the shape {list(tensor.shape)}, got {shape}"
                )
        return {name: file.read(name) for name in expected} | start
