# SPDX-License-Identifier: Apache-2.0
"""Opening activations: a tensor, an array, a file or a cache folder as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksae.activations.cache import META, open_cache
from ksae.activations.files import open_tensors
from ksae.activations.sources import BUFFER_TOKENS, ActivationSource, ArraySource
from ksae.errors import UserError


def open_source(
    spec: Any, target: Any = None, *, buffer_tokens: int = BUFFER_TOKENS
) -> ActivationSource:
    """Activations from a tensor, an array, a file or a cache folder; sources pass through.

    Args:
        spec: a torch tensor or NumPy array [N, d_in]; the path of a .npy, .safetensors or .pt file,
            memory-mapped, with one tensor or the keys "x" and, optionally, "y" and "g" (gradients
            of a loss at y, or at x without y); the path of a cache folder that `harvest` wrote; or
            an ActivationSource.
        target: the same for a transcoder's targets [N, d_out], row for row.
        buffer_tokens: rows in memory at a time for data on disk.
    """
    if isinstance(spec, ActivationSource):
        if target is not None:
            raise UserError("open_source: target must be None where the source is already open")
        return spec
    if isinstance(spec, str | Path) and Path(spec).is_dir():
        if target is not None:
            raise UserError(f"{spec}: target must be None, a cache folder holds its own targets")
        if not (Path(spec) / META).is_file() and (Path(spec) / "train" / META).is_file():
            raise UserError(f"{spec}: holds caches of a run: open its folder train or holdout")
        return open_cache(spec, buffer_tokens=buffer_tokens)
    x, y, g, mapped, name = _open_one(spec, "activations")
    if target is not None:
        y, _, _, target_mapped, target_name = _open_one(target, "target")
        mapped = mapped or target_mapped
        if y.dim() == x.dim() == 2 and len(y) != len(x):
            raise UserError(f"{target_name}: must have the {len(x)} rows of {name}, got {len(y)}")
    return ArraySource(
        [x],
        None if y is None else [y],
        None if g is None else [g],
        name=name,
        mapped=mapped,
        buffer_tokens=buffer_tokens,
    )


def _open_one(spec: Any, what: str) -> tuple[Tensor, Tensor | None, Tensor | None, bool, str]:
    """x, y, g, whether they are memory-mapped, and a name for messages."""
    if isinstance(spec, Tensor):
        return spec, None, None, False, what
    if isinstance(spec, np.ndarray):
        mapped = isinstance(spec, np.memmap)
        try:
            return torch.from_numpy(spec), None, None, mapped, what
        except TypeError:
            raise UserError(f"{what}: must be an array of floats, got {spec.dtype}") from None
    if isinstance(spec, str | Path):
        path = Path(spec)
        tensors = open_tensors(path)
        if "x" not in tensors:
            names = ", ".join(sorted(tensors)[:5])
            raise UserError(f'{path}: must hold one tensor or the keys "x" and "y", got {names}')
        return tensors["x"], tensors.get("y"), tensors.get("g"), True, str(path)
    raise UserError(f"{what}: must be a tensor, an array or a path, got {type(spec).__name__}")
