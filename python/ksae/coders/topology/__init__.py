# SPDX-License-Identifier: Apache-2.0
"""Topologies: what a coder reads and what it predicts."""

from .sae import SAE, GradTopKSAE, TopKSAE
from .transcoder import GradTopKTranscoder, Transcoder

__all__ = ["SAE", "GradTopKSAE", "GradTopKTranscoder", "TopKSAE", "Transcoder"]
