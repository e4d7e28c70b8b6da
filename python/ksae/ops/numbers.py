# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that are not tensors: ranges and words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..reference.dtypes import MODES
from .messages import fail, text


def is_number(kind: str) -> bool:
    """Whether arguments of this type may name a size."""
    return kind == "int" or (".." in kind and "inf" not in kind)


def number_check(op: str, name: str, kind: str) -> Callable[..., None] | None:
    """The check of an argument of this type; None where torch's own is enough."""
    if "|" in kind:
        return _word(op, name, kind)
    if "inf" in kind:
        return _positive(op, name, kind)
    if ".." in kind:
        return _range(op, name, kind)
    return _size(name) if kind == "int" else None


def _word(op: str, name: str, kind: str) -> Callable[..., None]:
    words = kind.split("|")

    def check(value: str, *_: Any) -> None:
        if value not in words:
            raise fail(op, name, f"one of {', '.join(words)}", repr(value))

    return check


def _positive(op: str, name: str, kind: str) -> Callable[..., None]:
    low = int(kind.split("..")[0])

    def check(value: float, *_: Any) -> None:
        if not (math.isfinite(value) and value >= low):
            raise fail(op, name, f"a finite number >= {low}", value)

    return check


def _range(op: str, name: str, kind: str) -> Callable[..., None]:
    bounds, _, of = kind.partition("@")
    low, high = bounds.split("..")
    first, last = int(low), int(high) if high.isdigit() else None

    def check(value: int, values: dict[str, Any], dims: dict[Any, Any], *_: Any) -> None:
        end = dims[high] if last is None else last
        if not first <= value <= end:
            shape = values[of].shape if of and isinstance(values[of], Tensor) else ()
            where = f" for {of} of shape {text(shape)}" if of else ""
            raise fail(op, name, f"in [{low}, {end}]{where}", value)
        dims[name] = value

    return check


def _size(name: str) -> Callable[..., None]:
    def check(value: int, values: dict[str, Any], dims: dict[Any, Any], *_: Any) -> None:
        dims[name] = value

    return check


def score(name: str, beta: float, mode: str) -> None:
    """Refuse a beta or mode that no gradient-aware score has, in the name of `name`."""
    _word(name, "mode", "|".join(MODES))(mode)
    _positive(name, "beta", "0..inf")(beta)
