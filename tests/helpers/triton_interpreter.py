# SPDX-License-Identifier: Apache-2.0
"""Puts Triton 3.6 into interpreted mode; imported before anything that imports triton.

Its interpreter turns arrays of one element into loop bounds with int(), which NumPy 2.4 refuses,
and truncates float32 to bf16 where a GPU rounds to the nearest.
"""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before it could be set to interpret")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_index

_convert = interpreter._convert_float


def _convert_to_nearest(data, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.atleast_1d(data)).bfloat16().view(torch.int16).numpy()
        return rounded.view(np.uint16).reshape(data.shape)
    return _convert(data, source, target, rounding)


interpreter._convert_float = _convert_to_nearest
