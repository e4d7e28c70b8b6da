# SPDX-License-Identifier: Apache-2.0
"""The effect of each latent, and of each error, on a metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ksae.analysis.attribution.changes import Patch, changed_to, same_shape
from ksae.analysis.attribution.nodes import Node, summed
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
class SiteEffects:
    """At one site. An entry is a latent that is active on a token in either input."""

    indices: Tensor  # [B, T, K] int64, latents
    clean: Tensor  # [B, T, K] activations in the inputs
    patch: Tensor  # [B, T, K] activations that they are changed to
    gradients: Tensor  # [B, T, K] of the metric, averaged over the steps
    error_clean: Tensor  # [B, T, d_out]
    error_patch: Tensor  # [B, T, d_out]
    error_gradients: Tensor  # [B, T, d_out]

    @property
    def effects(self) -> Tensor:
        """[B, T, K]."""
        return (self.patch - self.clean) * self.gradients

    @property
    def error_effects(self) -> Tensor:
        """[B, T]."""
        return ((self.error_patch - self.error_clean) * self.error_gradients).sum(-1)


@dataclass(frozen=True)
class Effects:
    """What `effects` finds.

    Attributes:
        sites: as given.
        at: one a site.
        clean, patch: the metric of the inputs and of what they are patched with, summed over the
            examples; patch is None where nodes are changed to means or zero.
    """

    sites: Sequence[Site]
    at: Sequence[SiteEffects]
    clean: float
    patch: float | None

    def nodes(
        self, n: int | None = None, *, positions: bool = True, errors: bool = True
    ) -> list[Node]:
        """The n nodes with the largest effects in size, the largest first; None: all that have one.

        Args:
            n: how many.
            positions: a node for each position, for one text or texts of one template; False: one
                for each latent, its effects summed over positions. Examples are summed over in
                either case.
            errors: whether errors are nodes.
        """
        found = [node for i in range(len(self.at)) for node in self._latents(i, positions)]
        if errors:
            found += [node for i in range(len(self.at)) for node in self._errors(i, positions)]
        found = [node for node in found if node.effect != 0]
        found.sort(key=lambda node: (-abs(node.effect), node.key))
        return found if n is None else found[:n]

    def _latents(self, number: int, positions: bool) -> Iterator[Node]:
        here, F = self.at[number], self.sites[number].coder.d_sae
        active = (here.clean != 0) | (here.patch != 0)
        place = torch.arange(here.indices.shape[-2], device=here.indices.device)[:, None]
        keys = (here.indices + (place * F if positions else 0))[active]
        columns = [t[active] for t in (here.effects, here.clean, here.patch)]
        for key, (effect, activation, patched) in summed(keys, columns):
            position = key // F if positions else None
            yield Node(number, position, key % F, effect, activation, patched)

    def _errors(self, number: int, positions: bool) -> Iterator[Node]:
        by_place = self.at[number].error_effects.double().sum(0)  # [T]
        if not positions:
            yield Node(number, None, None, float(by_place.sum()))
            return
        for position, effect in enumerate(by_place.tolist()):
            yield Node(number, position, None, effect)


def effects(
    model: nn.Module,
    inputs: Mapping[str, Any],
    metric: Metric,
    sites: Sequence[Site],
    *,
    patch: Patch = None,
    steps: int = 0,
) -> Effects:
    """How much the metric would change if each latent's activation, and each error, were that of
    other inputs, its mean, or zero (Sparse Feature Circuits, arXiv 2403.19647).

    The model itself is differentiated: an effect is that of the latent at its own site, through all
    that the model computes from it.

    Args:
        model: a Hugging Face model.
        inputs: keyword arguments of its forward, input_ids [B, T] among them.
        metric: of the model's output, [] or one number an example [B]; it is summed, so an example
            counts for itself.
        sites: where the nodes are, in the model's order.
        patch: inputs of the same shape that nodes are changed to, or their `means`; None: zero.
        steps: 0, the gradient at the inputs times the change, one pass for all sites; else
            integrated gradients (arXiv 1703.01365) at this many midpoints of the line from the
            inputs' code and error to the other one, a pass for each site and step. The effects of
            a site then add up to the change of the metric when all of its nodes change at once.

    Raises:
        UserError: no sites, two at one hook, sites out of order, a metric of another shape, patch
            inputs of another shape. ValueError: a coder's width is not that of its hook.

    Numerics: codes in the coders' dtype, gradients through the model in its own.

    Memory: per token and site, the active latents of both inputs and a row of the width.
    """
    check_sites(sites)
    if steps < 0:
        raise UserError(f"effects: steps must be >= 0, got {steps}")
    same_shape(inputs, patch)
    clean, value = record(model, inputs, sites, metric)
    others, other_value = changed_to(model, patch, sites, metric, clean)
    joined = [_join(a, b, s.coder.d_sae) for a, b, s in zip(clean, others, sites, strict=True)]
    if steps == 0:
        found = _direct(model, inputs, metric, sites, joined)
    else:
        found = [
            _integrated(model, inputs, metric, sites[i], here, steps)
            for i, here in enumerate(joined)
        ]
    total = float(value.double().sum())
    return Effects(tuple(sites), found, total, other_value)


def _join(a: Parts, b: Parts, F: int) -> SiteEffects:
    """Two codes over the latents of either, each latent in one entry where it is active."""
    of_a, alone = _matched(a, b, F)
    zeros = torch.zeros_like(alone)
    return SiteEffects(
        indices=torch.cat([a.indices, b.indices], -1),
        clean=torch.cat([a.values, zeros], -1),
        patch=torch.cat([of_a, alone], -1),
        gradients=torch.cat([zeros.new_zeros(a.values.shape), zeros], -1),
        error_clean=a.error,
        error_patch=b.error,
        error_gradients=torch.zeros_like(a.error),
    )


def _matched(a: Parts, b: Parts, F: int) -> tuple[Tensor, Tensor]:
    """The other value of each of a's entries, and b's values but for those: [B, T, k] each."""
    if b.values.numel() == 0:
        return torch.zeros_like(a.values), b.values
    rows = torch.arange(a.values.shape[:-1].numel(), device=a.indices.device) * F
    rows = rows.reshape(*a.values.shape[:-1], 1)
    key_a, key_b = (  # entries that are not active match none
        torch.where(p.values != 0, p.indices + rows, none).flatten()
        for p, none in ((a, -1), (b, -2))
    )
    ordered, order = key_b.sort()
    place = torch.searchsorted(ordered, key_a).clamp(max=len(ordered) - 1)
    hit, entry = ordered[place] == key_a, order[place]
    values = b.values.flatten()
    of_a = torch.where(hit, values[entry], 0).reshape(a.values.shape)
    alone = values.index_fill(0, entry[hit], 0).reshape(b.values.shape)
    return of_a, alone


def leaf(t: Tensor) -> Tensor:
    """A copy that gradients are taken of."""
    return t.detach().clone().requires_grad_()


@torch.enable_grad()
def _direct(
    model: nn.Module,
    inputs: Mapping[str, Any],
    metric: Metric,
    sites: Sequence[Site],
    joined: Sequence[SiteEffects],
) -> list[SiteEffects]:
    codes = [leaf(here.clean) for here in joined]
    errors = [leaf(here.error_clean) for here in joined]

    def change(i: int, x: Tensor, y: Tensor) -> Tensor:
        # y to the bit, with the gradient of its parts; those before it get the gradient of y
        parts = sites[i].rows(codes[i], joined[i].indices) + errors[i]
        return y + (parts - parts.detach())

    with at_sites(model, sites, change):
        total = run(model, inputs, metric).sum()
    grads = gradients(total, [*codes, *errors])
    return [
        replace(here, gradients=of_code, error_gradients=of_error)
        for here, of_code, of_error in zip(
            joined, grads[: len(joined)], grads[len(joined) :], strict=True
        )
    ]


@torch.enable_grad()
def _integrated(
    model: nn.Module,
    inputs: Mapping[str, Any],
    metric: Metric,
    site: Site,
    here: SiteEffects,
    steps: int,
) -> SiteEffects:
    of_code, of_error = torch.zeros_like(here.clean), torch.zeros_like(here.error_clean)
    for step in range(steps):
        share = (step + 0.5) / steps
        code = leaf(torch.lerp(here.clean, here.patch, share))
        error = leaf(torch.lerp(here.error_clean, here.error_patch, share))

        def change(
            _i: int, x: Tensor, _y: Tensor, code: Tensor = code, error: Tensor = error
        ) -> Tensor:
            return site.rows(code, here.indices) + site.rest(x.detach()) + error

        with at_sites(model, [site], change):
            total = run(model, inputs, metric).sum()
        for sums, grad in zip((of_code, of_error), gradients(total, [code, error]), strict=True):
            sums += grad / steps
    return replace(here, gradients=of_code, error_gradients=of_error)


def gradients(value: Tensor, leaves: Sequence[Tensor], *, retain: bool = False) -> list[Tensor]:
    """Of each leaf, zeros where the value does not depend on it; retain: the graph is kept."""
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    grads = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=retain)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
