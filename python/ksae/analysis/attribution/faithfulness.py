# SPDX-License-Identifier: Apache-2.0
"""How much of a metric a circuit accounts for (Sparse Feature Circuits, arXiv 2403.19647)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ksae.analysis.attribution.changes import Patch, changed_to, same_shape
from ksae.analysis.attribution.nodes import Members, Node, check_nodes
from ksae.analysis.attribution.sites import (
    Metric,
    Parts,
    Site,
    at_sites,
    check_sites,
    record,
    run,
)
from ksae.errors import UserError


@dataclass(frozen=True)
class Point:
    """A circuit of so many nodes."""

    nodes: int
    metric: float  # of the circuit alone
    faithfulness: float  # 1: the circuit alone does what the model does
    completeness: float  # faithfulness of all but the circuit; 0: nothing is left


@torch.no_grad()
def curve(
    model: nn.Module,
    inputs: Mapping[str, Any],
    metric: Metric,
    sites: Sequence[Site],
    nodes: Sequence[Node],
    sizes: Sequence[int],
    *,
    patch: Patch = None,
    keep_errors: bool = False,
) -> list[Point]:
    """Faithfulness and completeness of the circuits of the first nodes.

    With m(C) the metric when all nodes but those in C are those of the patch (or means, or zero), M
    all nodes and {} none: faithfulness is (m(C) - m({})) / (m(M) - m({})), and completeness the
    same of M without C. Nodes in C take the values that the changed nodes before them give.

    Args:
        model, inputs, metric, sites, patch: as for `effects`; the metric is summed over examples.
        nodes: the best first, as `Effects.nodes` gives them.
        sizes: numbers of nodes; more than there are is all of them.
        keep_errors: errors are no nodes, and stay in all three.

    Raises:
        UserError: as `effects`; nodes that do not exist; a metric that is the same with all nodes
            as with none.
    """
    check_sites(sites)
    check_nodes(nodes, [site.coder.d_sae for site in sites])
    same_shape(inputs, patch)
    clean, value = record(model, inputs, sites, metric)
    others, _ = changed_to(model, patch, sites, metric, clean)

    def m(kept: Sequence[Node], without: bool) -> float:
        change = _Ablation(sites, others, kept, without, keep_errors)
        with at_sites(model, sites, change):
            return float(run(model, inputs, metric).double().sum())

    full, empty = float(value.double().sum()), m([], False)
    if full == empty:
        raise UserError(
            f"curve: the metric must depend on the nodes, got {full:g} with and without"
        )
    points = []
    for size in sizes:
        chosen = nodes[:size]
        alone, rest = m(chosen, False), m(chosen, True)
        points.append(
            Point(
                len(chosen),
                alone,
                (alone - empty) / (full - empty),
                (rest - empty) / (full - empty),
            )
        )
    return points


class _Ablation:
    """Nodes outside of a set, or with `without` those in it, become those of the patch."""

    def __init__(
        self,
        sites: Sequence[Site],
        others: Sequence[Parts],
        nodes: Sequence[Node],
        without: bool,
        keep_errors: bool,
    ) -> None:
        self.sites, self.others, self.without = sites, others, without
        self.members = [Members(nodes, i, site.coder.d_sae) for i, site in enumerate(sites)]
        self.keep_errors = keep_errors

    def __call__(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        site, other, members = self.sites[i], self.others[i], self.members[i]
        values, indices = site.encode(x)
        error = y - site.rows(values, indices) - site.rest(x)
        stays = members.latents(indices) != self.without
        theirs = members.latents(other.indices) != self.without
        if not self.keep_errors:
            whose = members.error(y.shape[-2], y.device) != self.without  # [T]
            error = torch.where(whose[:, None], error, other.error)
        return (
            site.rows(values * stays, indices)
            + site.rows(other.values * ~theirs, other.indices)
            + site.rest(x)
            + error
        )
