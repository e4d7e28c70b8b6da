# SPDX-License-Identifier: Apache-2.0
"""What a module counts over a whole batch, where each process has a part of its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..coders.coder import SparseCoder
from .layout import group_of
from .ranks import Ranks


class Peers:
    """The processes that hold other tokens of a batch.

    Args:
        ranks: these processes, or None: there are no others.
        global_variance: the variance in a loss is that of all tokens.
    """

    def __init__(self, ranks: Ranks | None, global_variance: bool = False) -> None:
        self.ranks, self.global_variance = ranks, global_variance

    def total(self, part: Tensor) -> Tensor:
        """The sum over all, of any shape, in their order."""
        return part if self.ranks is None else self.ranks.all_reduce(part, "counts")

    def variance(self, y: Tensor) -> Tensor:
        """What a loss divides the squares of this process's rows y [N, d] by: their total variance,
        or one process's share of that of all rows, so that the mean of the losses is the loss of
        the whole batch."""
        if self.ranks is None or not self.global_variance:
            return ops.total_variance(y)  # type: ignore[no-any-return]
        return self.ranks.variance(y) / self.ranks.size

    def observed(self, values: Tensor) -> Tensor:
        """Values whose smallest positive one is that of the values of all."""
        return values if self.ranks is None else self.ranks.observed(values)

    def mean_entries(self, E: int, N: int) -> float:
        """A token of all, of E on this process's N."""
        return E / max(N, 1) if self.ranks is None else self.ranks.mean_entries(E, N)


def count_over_ranks(
    sae: SparseCoder, mesh: Any = None, *, global_variance: bool = False
) -> SparseCoder:
    """Let a module count over the tokens of all processes, for `DistributedDataParallel` or
    `fully_shard`, which average gradients and know nothing of what else a forward pass keeps.

    In training every forward pass, which all processes take, then sums over them:
    `tokens_since_fired` (so dead latents are those of the whole batch, and the same on all),
    GradTopK's running norm, BatchTopK's threshold for use. Selection is each process's own:
    BatchTopK chooses N k of its N tokens. Sums are in the order of processes and have the same
    bits on all.

    Args:
        sae: changed in place, before or after it is wrapped.
        mesh: a DeviceMesh of one dimension, a process group, or None: all processes.
        global_variance: the FVU loss divides by the variance of the targets of all processes, each
            by its share, so that the mean of their losses, whose gradient these wrappers compute,
            is the loss of the whole batch. False: each by the variance of its own tokens.

    Returns:
        sae.

    Raises:
        ValueError: torch.distributed is not set up, mesh does not fit, or sae is spread over ranks
            by `shard`. TypeError: mesh is none.

    Example:
        >>> import torch, ksae  # doctest: +SKIP
        >>> sae = ksae.TopKSAE(d_in=768, d_sae=24576, k=32)  # doctest: +SKIP
        >>> ksae.count_over_ranks(sae, global_variance=True)  # doctest: +SKIP
        >>> model = torch.nn.parallel.DistributedDataParallel(sae)  # doctest: +SKIP
    """
    if sae.ranks is not None:
        raise ValueError("count_over_ranks: sae must be whole, got one that is spread over ranks")
    group = group_of("count_over_ranks", mesh)
    sae.peers = Peers(None if group.size() == 1 else Ranks(group), global_variance)
    return sae
