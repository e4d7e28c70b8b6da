# SPDX-License-Identifier: Apache-2.0
"""Opening tensor files as memory-mapped tensors: .npy, .safetensors and .pt."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksae.errors import UserError, first_line

SUFFIXES = (".npy", ".safetensors", ".pt")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped and not read. A lone tensor is named "x"."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give a {', '.join(SUFFIXES)} file or a cache folder"
        )
    try:
        if path.suffix == ".npy":
            # "c" (copy on write) keeps the file safe and gives torch the writable array it wants.
            return {"x": torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        elif path.suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            tensors = loaded if isinstance(loaded, dict) else {"x": loaded}
        else:
            raise UserError(f"{path}: must be one of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    except (SafetensorError, ValueError, TypeError, EOFError, RuntimeError, OSError) as error:
        raise UserError(
            f"{path}: truncated or not a {path.suffix} file: {first_line(error)}"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: must hold tensors only (it is read with weights_only)") from None
    bad = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if bad:
        raise UserError(f"{path}: must hold tensors only, got {bad[0]!r}")
    if len(tensors) == 1:
        return {"x": next(iter(tensors.values()))}
    return tensors
