# SPDX-License-Identifier: Apache-2.0
"""Autoencoders: a coder that predicts what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..activation import Activation, GradTopK, TopK
from ..activation.grad_topk import GradOptions
from ..coder import SparseCoder
from ..config import Options
from ..registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register()
class SAE(SparseCoder):
    """Sparse autoencoder (arXiv 2406.04093): reconstructs its input, which is centred by
    b_dec.

    Starts with random unit decoder rows, W_enc = W_dec, biases 0; see `initialize_from` for b_dec.

    Args:
        d_in: width of the input.
        d_sae: F, the number of latents.
        activation: `TopK(k)`, `BatchTopK(k)`, `JumpReLU(...)` or another of them.
        options: as `SparseCoder`.

    Example:
        >>> import torch, ksae
        >>> sae = ksae.SAE(d_in=8, d_sae=32, activation=ksae.TopK(4))
        >>> sae(torch.randn(5, 8)).recon.shape
        torch.Size([5, 8])
    """

    topology = "sae"
    centred = True

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation | Mapping[str, Any],
        **options: Unpack[Options],
    ) -> None:
        super().__init__(d_in, d_in, d_sae, activation, **options)
        with torch.no_grad():
            self.W_dec.copy_(self.W_enc)


@register(TopK)
class TopKSAE(SAE):
    """`SAE` with `TopK(k)`.

    Example:
        >>> import torch, ksae
        >>> sae = ksae.TopKSAE(d_in=8, d_sae=32, k=4)
        >>> sae(torch.randn(5, 8)).recon.shape
        torch.Size([5, 8])
    """

    def __init__(self, d_in: int, d_sae: int, k: int, **options: Unpack[Options]) -> None:
        super().__init__(d_in, d_sae, TopK(k), **options)


@register(GradTopK)
class GradTopKSAE(GradOptions, SAE):
    """`SAE` with `GradTopK(k, beta, mode, grad_norm)`: its k latents are chosen by their effect on
    a downstream loss too (gradient SAE, arXiv 2411.10397).

    `sae(x, grad=g)` and `TrainStep(sae)(x, grad=g)` select by `ksae.grad_topk_encode`. Training
    needs g; in eval mode `sae(x)` selects by u, and with g what it reports has used the labels.
    AuxK ranks the dead latents by u.

    Raises:
        ValueError: an option out of range; grad missing in training, not detached, or not of the
            shape of x. A first batch whose gradient is zero everywhere gives a warning.

    Example:
        >>> import torch, ksae
        >>> sae = ksae.GradTopKSAE(d_in=8, d_sae=32, k=4, beta=0.5)
        >>> x, grad = torch.randn(5, 8), torch.randn(5, 8)
        >>> sae(x, grad=grad).recon.shape, sae.eval()(x).recon.shape
        (torch.Size([5, 8]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        beta: float = 1.0,
        mode: str = "additive",
        grad_norm: str = "sqrt_d",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(d_in, d_sae, GradTopK(k, beta, mode, grad_norm), **options)
