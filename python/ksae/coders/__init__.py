# SPDX-License-Identifier: Apache-2.0
"""Sparse coders: activation, topology and objective."""

from . import pursuit
from .activation import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GradTopK,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    NormTopK,
    ReLU,
    TopK,
)
from .coder import SparseCoder
from .output import Output
from .topology import SAE, GradTopKSAE, GradTopKTranscoder, TopKSAE, Transcoder

__all__ = [
    "SAE",
    "AbsTopK",
    "Activation",
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
    "Transcoder",
    "pursuit",
]
