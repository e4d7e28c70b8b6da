# SPDX-License-Identifier: Apache-2.0
"""The ops over latents in Triton: their outputs, workspaces and launches.

Names and meanings are those of `ksae.reference`. Triton is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bridge import guard


class Latents:
    """A code grouped by latent, sums of its groups, and the passes over the rows of a matrix."""

    def group_by_latent(self, values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
        from ..kernels.group_by_latent import group_by_latent

        with guard(values):
            return group_by_latent(values, indices, F)

    def latent_sums(
        self,
        values: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[Tensor],
        order: Sequence[Tensor],
        scales: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from ..kernels.latent_sums import latent_sums

        F = offsets[0].numel() - 1
        grad_b_enc, grad_dot_w = scales.new_empty(F), scales.new_empty(F)
        with guard(scales):
            latent_sums(values, grads, offsets, order, scales, grad_b_enc, grad_dot_w)
        return grad_b_enc, grad_dot_w

    def row_grad_sq(
        self,
        coefficients: Sequence[Tensor],
        offsets: Sequence[Tensor],
        order: Sequence[Tensor],
        rows: Sequence[Tensor],
        scales: Tensor,
        centre: Tensor | None,
        grad_dot_w: Tensor | None,
        W: Tensor,
        start: int,
        row_of: Sequence[Tensor] | None = None,
    ) -> Tensor:
        from ..kernels import row_pass as kernels
        from ..kernels.launch import registers

        F, d = W.shape
        grad_sq = scales.new_empty(F, dtype=torch.float64)
        with guard(W):
            groups = kernels.Groups(coefficients, offsets, order, rows, scales, centre, row_of)
            block, block_d = kernels.blocks(groups.columns, d)
            kernels.grad_sq_kernel[(F,)](
                *groups.arguments, scales, W if centre is None else centre,
                scales if grad_dot_w is None else grad_dot_w, W, grad_sq, d, groups.columns, start,
                GROUPS=groups.count, CENTRE=centre is not None, PROJECT=grad_dot_w is not None,
                CUT=kernels.CUT, BLOCK=block, BLOCK_D=block_d, num_warps=kernels.warps(block_d),
                **registers(kernels.REGISTERS),
            )  # fmt: skip
        return grad_sq

    def row_update(
        self,
        coefficients: Sequence[Tensor],
        offsets: Sequence[Tensor],
        order: Sequence[Tensor],
        rows: Sequence[Tensor],
        scales: Tensor,
        centre: Tensor | None,
        grad_dot_w: Tensor | None,
        grad_b_enc: Tensor | None,
        W: Tensor,
        master: Tensor | None,
        m: Tensor,
        v: Tensor,
        hyper: Tensor,
        grad_b_dec: Tensor | None,
        start: int,
        normalize: bool,
        W_bf16: Tensor | None = None,
        norms: Tensor | None = None,
        row_of: Sequence[Tensor] | None = None,
    ) -> None:
        from ..kernels import row_pass as kernels
        from ..kernels.launch import registers

        F, d = W.shape
        with guard(W):
            groups = kernels.Groups(coefficients, offsets, order, rows, scales, centre, row_of)
            if grad_b_dec is not None and grad_b_enc is not None:  # with W as it was
                kernels.centre_gradient(W, grad_b_enc, scales, groups.count, grad_b_dec)
            block, block_d = kernels.blocks(groups.columns, d)
            kernels.update_kernel[(F,)](
                *groups.arguments, scales, W if centre is None else centre,
                scales if grad_dot_w is None else grad_dot_w, W, W if master is None else master,
                m, v, hyper, W_bf16, norms, F, d, groups.columns, start, GROUPS=groups.count,
                CENTRE=centre is not None, PROJECT=grad_dot_w is not None, FIRST=start == 0,
                MASTER=master is not None, NORMALIZE=normalize, WHOLE=groups.columns == d,
                CUT=kernels.CUT, BLOCK=block, BLOCK_D=block_d, num_warps=kernels.warps(block_d),
                **registers(kernels.REGISTERS),
            )  # fmt: skip
