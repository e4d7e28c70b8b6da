# SPDX-License-Identifier: Apache-2.0
"""What ksae shares with other libraries: their classes on its kernels, and their files."""

from __future__ import annotations

from .swap import accelerate, accelerated

__all__ = ["accelerate", "accelerated"]
