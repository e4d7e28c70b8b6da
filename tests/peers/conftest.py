# SPDX-License-Identifier: Apache-2.0
"""Tests beside the installed libraries: `pytest tests/peers`, with the dependency group `peers`."""

from __future__ import annotations

import os

# sparsify chooses its decoder when imported: with Triton installed it refuses CPU tensors.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
