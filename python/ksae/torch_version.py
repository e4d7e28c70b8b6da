# SPDX-License-Identifier: Apache-2.0
"""Refuses a torch that is too old, in one sentence, before something that it lacks is missed."""

from __future__ import annotations

import torch

from .errors import UserError

OLDEST = "2.11"  # as in pyproject.toml


class OldTorch(UserError, ImportError):
    """The torch that is installed is older than ksae can use."""


if torch.__version__ < OLDEST:  # a TorchVersion, which compares numbers
    raise OldTorch(
        f"ksae needs torch {OLDEST} or newer, got {torch.__version__}: pip install -U torch"
    )
