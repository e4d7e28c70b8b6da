# SPDX-License-Identifier: Apache-2.0
"""The names of the package that need torch. Importing them registers torch.ops.ksae."""

from .coders import (
    SAE,
    BatchTopK,
    GradTopK,
    GradTopKSAE,
    GradTopKTranscoder,
    JumpReLU,
    Output,
    SparseCoder,
    TopK,
    TopKSAE,
    Transcoder,
)
from .coders.unit_rows import UnitRows
from .functional import (
    batch_topk_encode,
    grad_topk_encode,
    sparse_decode,
    threshold_encode,
    topk,
    topk_encode,
)
from .step.train_step import TrainStep

__all__ = [
    "SAE",
    "BatchTopK",
    "GradTopK",
    "GradTopKSAE",
    "GradTopKTranscoder",
    "JumpReLU",
    "Output",
    "SparseCoder",
    "TopK",
    "TopKSAE",
    "TrainStep",
    "Transcoder",
    "UnitRows",
    "batch_topk_encode",
    "grad_topk_encode",
    "sparse_decode",
    "threshold_encode",
    "topk",
    "topk_encode",
]
