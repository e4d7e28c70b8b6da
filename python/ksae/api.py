# SPDX-License-Identifier: Apache-2.0
"""The names of the package that need torch. Importing them registers torch.ops.ksae."""

from .coders.coder import Output, SparseCoder, TopKSAE, Transcoder
from .coders.gradtopk import GradTopKSAE, GradTopKTranscoder
from .functional import grad_topk_encode, sparse_decode, topk, topk_encode
from .step.train_step import TrainStep

__all__ = [
    "GradTopKSAE",
    "GradTopKTranscoder",
    "Output",
    "SparseCoder",
    "TopKSAE",
    "TrainStep",
    "Transcoder",
    "grad_topk_encode",
    "sparse_decode",
    "topk",
    "topk_encode",
]
