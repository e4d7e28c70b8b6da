# SPDX-License-Identifier: Apache-2.0
"""The bf16 copy of float32 weights, and what a training step keeps of it."""

from __future__ import annotations

import torch
from cases import assert_norms, assert_same
from torch import Tensor

import ksae
from ksae import reference


def bf16_copy_of(W: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 copy and norms of W [F, d]."""
    rounded = W.detach().bfloat16()
    return rounded, reference.bf16_norms(W.detach(), rounded)


def assert_kept(train: ksae.TrainStep) -> None:
    """What is kept is of the weights as they are."""
    W_bf16, norms = train.state.W_bf16
    W = train.model.W_enc.detach()
    assert_same("W_bf16", W_bf16, W.bfloat16())
    assert_norms(norms, W, W_bf16)


def write(train: ksae.TrainStep) -> None:
    with torch.no_grad():
        train.model.W_enc.mul_(-0.5)
