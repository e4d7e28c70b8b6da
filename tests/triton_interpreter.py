# SPDX-License-Identifier: Apache-2.0
"""Puts Triton 3.6 into interpreted mode; imported before anything that imports triton.

Its interpreter turns arrays of one element into loop bounds with int(), which NumPy 2.4 refuses.
"""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before it could be set to interpret")
os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_index
