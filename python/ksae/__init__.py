# SPDX-License-Identifier: Apache-2.0
"""k-sparse autoencoders and transcoders, trained as fast as the hardware allows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING or "ksae_cli" not in sys.modules:
    # Importing these registers torch.ops.ksae. The console script imports them when a command
    # needs them: `ksae --help` answers without torch.
    from .api import *

if TYPE_CHECKING:
    from .info import config
    from .interop.load import load

__all__ = [
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "Gated",
    "GradTopK",
    "GradTopKSAE",
    "GradTopKTranscoder",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "NormTopK",
    "Output",
    "ReLU",
    "SparseCoder",
    "TopK",
    "TopKSAE",
    "TrainStep",
    "Transcoder",
    "__version__",
    "batch_topk_encode",
    "config",
    "count_over_ranks",
    "grad_topk_encode",
    "load",
    "pursuit",
    "shard",
    "sparse_decode",
    "threshold_encode",
    "topk",
    "topk_encode",
    "unshard",
]


def __getattr__(name: str) -> Any:
    """`load` and `config` on first use: they import more than torch; all names in the console
    script."""
    if name == "load":
        from .interop.load import load

        return load
    if name == "config":
        from .info import config

        return config
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'ksae' has no attribute {name!r}")
