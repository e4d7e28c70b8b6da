# SPDX-License-Identifier: Apache-2.0
"""What the phases of a step exchange when the latents of a coder are spread over devices."""

from __future__ import annotations

from torch import Tensor


class OneDevice:
    """The communicator of a coder that lies whole on one device: every exchange is the identity.

    A communicator over shards of the latents replaces the methods; the phases stay as they are.
    """

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum over all shards of a partial sum or count, of any shape."""
        return part

    def exchange_keys(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """From the best k of each shard, values and indices [N, k], those of the best k of all that
        this shard holds."""
        return values, indices

    def exchange_rows(self, partial: Tensor) -> Tensor:
        """The sum over all shards of partial residual rows [N, columns]."""
        return partial
