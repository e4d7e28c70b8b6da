# SPDX-License-Identifier: Apache-2.0
"""Errors in one form: `<op>: <argument> must be <expected>, got <actual>`.

ValueError for values and shapes, TypeError for dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import env
from ..backends import cpu as native

_check_indices = env.read("KSAE_CHECK") == "1"  # on GPUs too


def text(shape: Sequence[int]) -> str:
    """A shape as the messages write it."""
    return "[" + ", ".join(str(n) for n in shape) + "]"


def fail(op: str, arg: str, expected: str, got: object) -> ValueError:
    """The error for a bad value."""
    return ValueError(f"{op}: {arg} must be {expected}, got {got}")


def wrong_type(op: str, arg: str, expected: str, t: Tensor) -> TypeError:
    """The error for a bad dtype."""
    return TypeError(f"{op}: {arg} must be {expected}, got {t.dtype}")


def offsets_range(op: str, name: str, offsets: Tensor, E: int) -> None:
    """Row offsets begin with 0, end with E and do not fall; looked at as indices are."""
    if offsets.device.type == "cpu" or _check_indices:
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != E:
            raise fail(op, name, f"from 0 to {E}", f"from {first} to {last}")
        if bool((offsets.diff() < 0).any()):
            raise fail(op, name, "in ascending order", "offsets that fall")


def index_range(op: str, indices: Tensor, F: int) -> None:
    """Latent numbers lie in [0, F).

    On a GPU the look would wait for the stream: it is taken under KSAE_CHECK=1 alone, and without
    it an index out of range is undefined behaviour.
    """
    if indices.is_cpu and native.in_range(indices, F):
        return
    if (indices.is_cpu or _check_indices) and indices.numel():
        low, high = (int(n) for n in indices.aminmax())
        if low < 0 or high >= F:
            raise fail(op, "indices", f"in [0, {F})", low if low < 0 else high)
