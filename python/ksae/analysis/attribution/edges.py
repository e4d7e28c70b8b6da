# SPDX-License-Identifier: Apache-2.0
"""Which latents of a circuit act on which others, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ksae.analysis.attribution.effects import Effects, SiteEffects, gradients, leaf
from ksae.analysis.attribution.frozen import frozen as frozen_gradients
from ksae.analysis.attribution.nodes import Node, check_nodes
from ksae.analysis.attribution.sites import Metric, Site, at_sites, run
from ksae.errors import UserError

OF = ("metric", "activation")


@dataclass(frozen=True)
class Edge:
    """From a node to one at a later site, or to the metric."""

    source: Node
    target: Node | None  # None: the metric
    weight: float


def edges(
    model: nn.Module,
    inputs: Mapping[str, Any],
    metric: Metric,
    found: Effects,
    nodes: Sequence[Node],
    *,
    of: str = "metric",
    frozen: bool = False,
) -> list[Edge]:
    """The edges between nodes, and from nodes to the metric, that are not zero.

    The weight of an edge is the change of the source, as in `found`, times the derivative of the
    target by the source along paths that pass through no other site: codes and errors of all other
    sites stay. With transcoders these paths are the residual stream, attention and skip
    connections, but no MLP that a site stands for (arXiv 2406.11944); between sites in the residual
    stream they are all of the model (arXiv 2403.19647).

    Args:
        model, inputs, metric: as given to `effects`.
        found: what `effects` found.
        nodes: of it.
        of: "activation", a weight is the change of the target's own activation, summed over
            examples; "metric", that times the metric's gradient at the target: the part of the
            source's effect that goes through this target first. An error has no activation: edges
            end in it with "metric" only. Edges to the metric are the same.
        frozen: attention patterns and the scales of norms are constants, see `frozen`. With
            transcoders at all MLPs the paths to latents are linear then.

    Returns:
        Edges of the nodes in their order of targets, the metric last.

    Raises:
        UserError: nodes that do not exist, `of` unknown, or `frozen` for an unknown attention.

    Cost: a forward pass, and a backward pass for each node that is a target.

    Numerics: a latent that is active in the inputs has the derivative of its pre-activation; a node
    that is active only in the patch has no edges that end in it.
    """
    if of not in OF:
        raise UserError(f"edges: of must be one of {', '.join(OF)}, got {of!r}")
    sites = found.sites
    check_nodes(nodes, [site.coder.d_sae for site in sites])
    held = _Held(sites, found.at)
    with torch.enable_grad(), frozen_gradients(model) if frozen else nullcontext():
        with at_sites(model, sites, held):
            value = run(model, inputs, metric).sum()
        made = []
        for target in [*nodes, None]:
            if target is not None and target.latent is None and of == "activation":
                continue
            goal = value if target is None else held.reached(target, of)
            made += _into(held, found, nodes, target, goal)
    return made


def _into(
    held: _Held, found: Effects, nodes: Sequence[Node], target: Node | None, goal: Tensor
) -> list[Edge]:
    """The edges that end in one target."""
    last = len(found.sites) if target is None else target.site
    grads = gradients(goal, [*held.codes, *held.errors], retain=True)
    made = []
    for number in range(last):
        of_code, of_error = grads[number], grads[len(held.codes) + number]
        here = found.at[number]
        codes = (here.patch - here.clean) * of_code
        errors = ((here.error_patch - here.error_clean) * of_error).sum(-1)
        for node in nodes:
            if node.site == number:
                weight = float(_part(node, found, codes, errors))
                if weight != 0:
                    made.append(Edge(node, target, weight))
    return made


def _part(node: Node, found: Effects, codes: Tensor, errors: Tensor) -> Tensor:
    """Of the weights of one site [B, T, K] and [B, T], those of a node, added up in float64."""
    place = slice(None) if node.position is None else slice(node.position, node.position + 1)
    if node.latent is None:
        return errors[:, place].double().sum()
    mine = found.at[node.site].indices[:, place] == node.latent
    return codes[:, place][mine].double().sum()


class _Held:
    """Each site gives its own code and error, whatever reaches it; what reaches it is kept."""

    def __init__(self, sites: Sequence[Site], at: Sequence[SiteEffects]) -> None:
        self.sites, self.at = sites, at
        self.codes = [leaf(here.clean) for here in at]
        self.errors = [leaf(here.error_clean) for here in at]
        self.live: dict[int, tuple[Tensor, Tensor]] = {}  # values and indices [B, T, k]
        self.live_error: dict[int, Tensor] = {}  # [B, T, d_out]

    def __call__(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        site, here = self.sites[i], self.at[i]
        self.live[i] = site.encode(x)
        self.live_error[i] = y - site.rows(*self.live[i]) - site.rest(x)
        parts = site.rows(self.codes[i], here.indices) + site.rest(x) + self.errors[i]
        return y.detach() + (parts - parts.detach())  # y to the bit: the codes are those of `found`

    def reached(self, target: Node, of: str) -> Tensor:
        """The activation of a node, or what it is worth to the metric, in the graph of the leaves
        before it."""
        values, indices = self.live[target.site]
        here = self.at[target.site]
        if target.latent is None:
            worth = (self.live_error[target.site] * here.error_gradients).sum(-1)
            return worth.sum() if target.position is None else worth[:, target.position].sum()
        live = torch.where((indices == target.latent) & (values.detach() != 0), values, 0).sum(-1)
        if of == "metric":
            entry = (here.indices == target.latent) & (here.clean != 0)
            live = live * torch.where(entry, here.gradients, 0).sum(-1)
        return live.sum() if target.position is None else live[:, target.position].sum()
