# SPDX-License-Identifier: Apache-2.0
"""Unit decoder rows in one's own training loop, with any torch optimizer.

`TrainStep` keeps the rows of W_dec at length 1 where a module has normalize_decoder; an optimizer
of torch knows nothing of it, and the norms drift. Either two calls around its step do the same,

    loss.backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    sae.set_decoder_norm_to_unit_norm()

or W_dec is a function of a free parameter, whose gradient then has no part along the rows:

    torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", ksae.UnitRows())
    optimizer = torch.optim.Adam(sae.parameters())  # made after it
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import accumulator


class UnitRows(nn.Module):
    """A parametrisation for `torch.nn.utils.parametrize`: rows [F, d] of length 1; rows of zeros
    stay.

    Numerics: norms in float32 (float64 for float64).

    Example:
        >>> import torch, ksae
        >>> sae = ksae.TopKSAE(d_in=8, d_sae=32, k=4)
        >>> _ = torch.nn.utils.parametrize.register_parametrization(sae, "W_dec", ksae.UnitRows())
        >>> optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        >>> sae(torch.randn(64, 8)).loss.backward()
        >>> optimizer.step()
        >>> bool(((sae.W_dec.norm(dim=1) - 1).abs() < 1e-6).all())
        True
    """

    def forward(self, W: Tensor) -> Tensor:
        return unit_rows(W)

    def right_inverse(self, W: Tensor) -> Tensor:
        """What an assignment to the parametrised matrix stores."""
        return W


def unit_rows(W: Tensor) -> Tensor:
    """W [F, d] with rows of length 1, rows of zeros as they are."""
    wide = W.to(accumulator(W.dtype))
    norms = wide.norm(dim=1, keepdim=True)  # [F, 1]
    unit: Tensor = wide / torch.where(norms > 0, norms, 1)
    return unit.to(W.dtype)


@torch.no_grad()
def without_parallel(gradient: Tensor, W: Tensor) -> Tensor:
    """The gradient [F, d] without its component along each row of W [F, d], in its own dtype."""
    wide = accumulator(W.dtype)
    g, w = gradient.to(wide), W.to(wide)
    square = w.square().sum(1, keepdim=True)  # [F, 1]
    along = torch.where(square > 0, (g * w).sum(1, keepdim=True) / square, 0)
    return (g - along * w).to(gradient.dtype)
