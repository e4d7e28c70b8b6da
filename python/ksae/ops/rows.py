# SPDX-License-Identifier: Apache-2.0
"""The check of row offsets, an argument of type `offsets(E)` (grammar.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import ENTRIES
from .grammar import Argument
from .messages import fail, text, wrong_type


class Offsets(NamedTuple):
    """The argument, the sizes that it ties, and the argument that has the entries."""

    name: str
    E: str
    N: str
    entries: str


def find(arguments: Sequence[Argument]) -> Offsets | None:
    """The row offsets of an op, if it takes any."""
    for a in arguments:
        if a.type.startswith("offsets("):
            E, N = a.type[8:-1], (a.dims or ("",))[0].removesuffix("+1")
            entries = next(b.name for b in arguments if b.dims and b.dims[0] == E)
            return Offsets(a.name, E, N, entries)
    return None


def settle(op: str, of: Offsets, values: dict[str, Any], dims: dict[Any, Any]) -> None:
    """Set the sizes E and N, of which the first argument has set one."""
    offsets: Tensor | None = values[of.name]
    if offsets is None:
        dims[of.E] = dims[of.N] = dims[of.E] if of.E in dims else dims[of.N]
        return
    entries: Tensor = values[of.entries]
    if offsets.dtype != torch.int64:
        raise wrong_type(op, of.name, "torch.int64", offsets)
    if offsets.device != entries.device:
        raise fail(op, of.name, f"on {entries.device}", offsets.device)
    shape = offsets.shape
    if len(shape) != 1 or shape[0] == 0 or dims.get(of.N, shape[0] - 1) != shape[0] - 1:
        want = dims[of.N] + 1 if of.N in dims else f"{of.N} + 1"
        raise fail(op, of.name, f"of shape [{want}]", text(shape))
    if entries.dim() != 2 or entries.shape[1] != 1:
        raise fail(op, of.entries, f"of shape [*, 1] with {of.name}", text(entries.shape))
    if entries.shape[0] > ENTRIES:
        raise fail(op, of.entries, f"of at most {ENTRIES} entries", text(entries.shape))
    dims[of.N], dims[of.E] = shape[0] - 1, entries.shape[0]
