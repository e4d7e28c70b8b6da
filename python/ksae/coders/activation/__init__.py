# SPDX-License-Identifier: Apache-2.0
"""Activations: how pre-activations become a sparse code."""

from .base import Activation
from .grad_topk import GradTopK
from .topk import TopK

__all__ = ["Activation", "GradTopK", "TopK"]
