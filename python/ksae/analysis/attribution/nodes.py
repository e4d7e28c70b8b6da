# SPDX-License-Identifier: Apache-2.0
"""The nodes of a circuit: latents and errors at sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ksae.errors import UserError


@dataclass(frozen=True)
class Node:
    """A latent, or the error, at a site: at one position, or at all of them."""

    site: int  # its number
    position: int | None  # None: all
    latent: int | None  # None: the error
    effect: float = 0.0  # on the metric, summed over the examples
    activation: float | None = None  # in the inputs, summed over the examples; None of an error
    patched: float | None = None  # what it is changed to, likewise

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells nodes apart: site, position and latent, -1 for None."""
        position, latent = (-1 if v is None else v for v in (self.position, self.latent))
        return self.site, position, latent


class Members:
    """Which latents and errors of one site are in a set of nodes."""

    def __init__(self, nodes: Iterable[Node], site: int, F: int) -> None:
        mine = [node for node in nodes if node.site == site]
        self.by_position = any(node.position is not None for node in mine)
        self.F = F
        keys = [(n.position or 0) * F + n.latent for n in mine if n.latent is not None]
        self.keys = torch.tensor(sorted(keys), dtype=torch.int64)
        self.errors = torch.tensor(
            [n.position or 0 for n in mine if n.latent is None], dtype=torch.int64
        )

    def latents(self, indices: Tensor) -> Tensor:
        """[B, T, K] bool of indices [B, T, K]."""
        keys = indices
        if self.by_position:
            keys = indices + _places(indices.shape[-2], indices.device)[:, None] * self.F
        return torch.isin(keys, self.keys.to(indices.device))

    def error(self, T: int, device: torch.device) -> Tensor:
        """[T] bool: positions whose error is in the set."""
        if not self.by_position:
            return torch.full((T,), len(self.errors) > 0, device=device)
        return torch.isin(_places(T, device), self.errors.to(device))


def check_nodes(nodes: Sequence[Node], F: Sequence[int]) -> None:
    """Refuse nodes that are at no site, latents that do not exist, and sets in which some nodes
    have a position and others none.

    Args:
        F: latents of each site.

    Raises:
        UserError: any of these.
    """
    for node in nodes:
        if not 0 <= node.site < len(F):
            raise UserError(f"nodes: site must be in [0, {len(F)}), got {node.site}")
        if node.latent is not None and not 0 <= node.latent < F[node.site]:
            raise UserError(f"nodes: latent must be in [0, {F[node.site]}), got {node.latent}")
    if len({node.position is None for node in nodes}) > 1:
        raise UserError("nodes: all or none must have a position, got both kinds")


def summed(keys: Tensor, columns: Sequence[Tensor]) -> Iterator[tuple[int, list[float]]]:
    """Columns [E] added up by key [E], in float64: the key and the sums."""
    unique, inverse = torch.unique(keys, return_inverse=True)
    sums = [
        torch.zeros(len(unique), dtype=torch.float64, device=keys.device).index_add_(
            0, inverse, column.double()
        )
        for column in columns
    ]
    for key, *values in zip(unique.tolist(), *(s.tolist() for s in sums), strict=True):
        yield key, values


def _places(T: int, device: torch.device) -> Tensor:
    return torch.arange(T, device=device)
