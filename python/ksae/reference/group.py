# SPDX-License-Identifier: Apache-2.0
"""A code's entries by row and by latent, and sums over each latent's entries.

What does not ask for an entry's row takes a code with row offsets as one of E tokens and k = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["group_by_latent", "latent_sums", "rows_of"]


def rows_of(row_offsets: Tensor, E: int) -> Tensor:
    """The row of each entry of a code with row_offsets [N+1]: [E] int32."""
    counts = row_offsets.diff()
    rows = torch.arange(counts.numel(), dtype=torch.int32, device=row_offsets.device)
    return torch.repeat_interleave(rows, counts, output_size=E)


def group_by_latent(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Entries [N, k] with value != 0, grouped by latent (CSC), in flat order n*k+j within a latent.

    Returns offsets [F+1] int32 and order [N*k] int32: the flat positions of latent i are
    order[offsets[i]:offsets[i+1]]; the unused tail of order is -1.
    """
    used = values.reshape(-1) != 0  # NaN counts
    latent = torch.where(used, indices.reshape(-1).long(), F)
    latent, order = latent.sort(stable=True)
    bounds = torch.arange(F + 1, device=values.device)
    offsets = torch.searchsorted(latent, bounds).int()
    return offsets, torch.where(latent < F, order, -1).int()


def _ungroup(offsets: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of group_by_latent: indices [N, k] int64, 0 for the entries that it left out."""
    entry = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    latent = torch.searchsorted(offsets, entry, right=True) - 1
    spare = order.numel()  # one more slot takes the unused tail
    indices = torch.zeros(spare + 1, dtype=torch.int64, device=order.device)
    position = torch.where(order >= 0, order.long(), spare)
    return indices.scatter_(0, position, latent)[:spare].reshape(shape)


def latent_sums(
    values: Sequence[Tensor],  # G of [N_g, k_g] T
    grads: Sequence[Tensor],  # G of [N_g, k_g] float32, from sparse_residual
    offsets: Sequence[Tensor],  # G of [F+1] int32, from group_by_latent
    order: Sequence[Tensor],  # G of [N_g*k_g] int32
    scales: Tensor,  # [G] float32
) -> tuple[Tensor, Tensor]:
    """Two sums over the groups and entries of a latent, [F] float32 each.

    Of scale * grad, which is the gradient of b_enc, and of scale * value * grad, which is
    <dW_dec[i], W_dec[i]>. Zeros if a scale is not finite.
    """
    F = offsets[0].numel() - 1
    bias = torch.zeros(F, dtype=torch.float64, device=scales.device)
    grad_dot_w = torch.zeros_like(bias)
    if bool(scales.isfinite().all()):
        for v, g, off, o, scale in zip(values, grads, offsets, order, scales, strict=True):
            latent = _ungroup(off, o, v.shape).reshape(-1)
            product = scale * g.double()
            bias.index_add_(0, latent, torch.where(v == 0, 0, product).reshape(-1))
            grad_dot_w.index_add_(0, latent, torch.where(v == 0, 0, v * product).reshape(-1))
    return bias.to(scales.dtype), grad_dot_w.to(scales.dtype)
