# SPDX-License-Identifier: Apache-2.0
"""The names of the package that need torch. Importing them registers torch.ops.ksae."""

from __future__ import annotations

from contextlib import AbstractContextManager
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

if TYPE_CHECKING:
    from .analysis.attached import Attachment

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
    "grad_topk_encode",
    "sparse_decode",
    "topk",
    "topk_encode",
]


def _attached(
    coder: SparseCoder, model: Any, hook: str, **options: Any
) -> AbstractContextManager[Attachment]:
    """The coder inside of a language model: `ksae.analysis.attached.attached`."""
    from .analysis.attached import attached

    return attached(coder, model, hook, **options)


SparseCoder.attached = _attached
