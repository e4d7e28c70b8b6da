# SPDX-License-Identifier: Apache-2.0
"""The ops as torch calls them, one attribute each, on matrices: `ksae.ops.topk(x, k)`.

An op is a line in specs.py, its meaning in `ksae.reference`, and the kernels that serve it in
`ksae.backends`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import torch_version  # noqa: F401
from ..backends.product import product
from ..reference.dtypes import FLOATS, MODES, accumulator
from .messages import fail
from .numbers import score
from .register import OPS, serving

__all__ = ["FLOATS", "MODES", "accumulator", "fail", "product", "score", "serving"]


globals().update(OPS)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
