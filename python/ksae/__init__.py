# SPDX-License-Identifier: Apache-2.0
"""k-sparse autoencoders and transcoders, trained as fast as the hardware allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .coders import (
    SAE,
    GradTopK,
    GradTopKSAE,
    GradTopKTranscoder,
    Output,
    SparseCoder,
    TopK,
    TopKSAE,
    Transcoder,
)
from .functional import grad_topk_encode, sparse_decode, topk, topk_encode
from .step.train_step import TrainStep
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .files.checkpoint import load
    from .info import config

__all__ = [
    "SAE",
    "GradTopK",
    "GradTopKSAE",
    "GradTopKTranscoder",
    "Output",
    "SparseCoder",
    "TopK",
    "TopKSAE",
    "TrainStep",
    "Transcoder",
    "__version__",
    "config",
    "grad_topk_encode",
    "load",
    "sparse_decode",
    "topk",
    "topk_encode",
]


def __getattr__(name: str) -> Any:
    """`load` and `config` on first use: they import more than torch."""
    if name == "load":
        from .files.checkpoint import load

        return load
    if name == "config":
        from .info import config

        return config
    raise AttributeError(f"module 'ksae' has no attribute {name!r}")
