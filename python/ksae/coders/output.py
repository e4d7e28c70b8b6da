# SPDX-License-Identifier: Apache-2.0
"""What the forward pass of a coder returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .code import Code


class Output(NamedTuple):
    """What a forward pass returns. Losses are 0-d float32 (float64), None without a target."""

    recon: Tensor  # [..., d_out]
    values: Tensor  # [..., k], or [E] with row_offsets
    indices: Tensor  # of the shape of values, int64
    loss: Tensor | None  # to be minimised: the weighted sum of all terms
    fvu: Tensor | None  # share of the target's variance that is not explained
    auxk_loss: Tensor | None  # 0 if no latent is dead
    multi_topk_loss: Tensor | None  # with other k, weighted mean; 0 without multi_topk or multi_k
    prefix_fvu: Tensor | None = None  # [P], by the latents of each prefix; None without prefixes
    row_offsets: Tensor | None = None  # [N+1] int64, of codes with a number of entries of each row

    @property
    def code(self) -> Code:
        """Values and indices as one."""
        return Code(self.values, self.indices, self.row_offsets)


# So that an exported module can be saved.
_register_namedtuple(Output, serialized_type_name="ksae.coders.coder.Output")
