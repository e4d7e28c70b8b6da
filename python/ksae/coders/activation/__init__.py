# SPDX-License-Identifier: Apache-2.0
"""Activations: how pre-activations become a sparse code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .abs_topk import AbsTopK
from .base import Activation
from .batch_topk import BatchTopK
from .gated import Gated
from .grad_topk import GradTopK
from .group_max import GroupMax
from .jump_relu import JumpReLU
from .matching_pursuit import MatchingPursuit
from .norm_topk import NormTopK
from .relu import ReLU
from .topk import TopK

__all__ = [
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "Gated",
    "GradTopK",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "NormTopK",
    "ReLU",
    "TopK",
]

_KINDS: tuple[Any, ...] = (
    TopK, GradTopK, BatchTopK, JumpReLU, ReLU, Gated, AbsTopK, GroupMax, NormTopK,
    MatchingPursuit,
)  # fmt: skip
_BY_NAME: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}


def from_fields(fields: Mapping[str, Any]) -> Activation:
    """The activation that `Activation.fields` describes.

    Raises:
        ValueError: no activation has that name. TypeError: it has no such arguments.
    """
    options = dict(fields)
    name = options.pop("name", None)
    if name not in _BY_NAME:
        wanted = ", ".join(_BY_NAME)
        raise ValueError(f"activation: name must be one of {wanted}, got {name!r}")
    made: Activation = _BY_NAME[name](**options)
    return made
