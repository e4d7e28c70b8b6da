# SPDX-License-Identifier: Apache-2.0
"""Sparse coders: activation, topology and objective."""

from .activation import Activation, BatchTopK, Gated, GradTopK, JumpReLU, ReLU, TopK
from .coder import SparseCoder
from .output import Output
from .topology import SAE, GradTopKSAE, GradTopKTranscoder, TopKSAE, Transcoder

__all__ = [
    "SAE",
    "Activation",
    "BatchTopK",
    "Gated",
    "GradTopK",
    "GradTopKSAE",
    "GradTopKTranscoder",
    "JumpReLU",
    "Output",
    "ReLU",
    "SparseCoder",
    "TopK",
    "TopKSAE",
    "Transcoder",
]
