# SPDX-License-Identifier: Apache-2.0
"""Activations: how pre-activations become a sparse code."""

from .base import Activation
from .batch_topk import BatchTopK
from .grad_topk import GradTopK
from .topk import TopK

__all__ = ["Activation", "BatchTopK", "GradTopK", "TopK"]
