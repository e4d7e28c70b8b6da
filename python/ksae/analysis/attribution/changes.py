# SPDX-License-Identifier: Apache-2.0
"""What nodes are changed to: those of other inputs, their means over a text, or zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ksae.activations.hooks import special_ids, used
from ksae.analysis.attribution.sites import Metric, Parts, Site, check_sites, record
from ksae.errors import UserError


@dataclass(frozen=True)
class Means:
    """The mean of each latent's activation and of the error, at each site."""

    values: tuple[Tensor, ...]  # each [M], of the M latents whose mean is not 0
    indices: tuple[Tensor, ...]  # each [M] int64
    errors: tuple[Tensor, ...]  # each [d_out]

    def at(self, number: int, like: Parts) -> Parts:
        """The same at every token of a site."""
        rows = like.values.shape[:-1]  # B, T
        values, indices = self.values[number], self.indices[number]
        error = self.errors[number].expand(like.error.shape)
        return Parts(values.expand(*rows, -1), indices.expand(*rows, -1), error)


Patch = Mapping[str, Any] | Means | None


def means(model: nn.Module, batches: Iterable[Mapping[str, Any]], sites: Sequence[Site]) -> Means:
    """The mean of every latent and of the error over the tokens of some text, for `effects`,
    `edges` and `curve` to change nodes to (mean ablation; Sparse Feature Circuits, arXiv
    2403.19647).

    Args:
        model: a Hugging Face model.
        batches: keyword arguments of its forward, input_ids [B, T] among them; padding, and tokens
            that a site excludes, do not count.
        sites: as for `effects`.

    Raises:
        UserError: as `effects`; no token that counts.

    Numerics: sums in float64, means in the coders' dtype. Memory: F numbers a site; where nodes are
    changed to means, each token has an entry for each of the M latents whose mean is not 0.
    """
    check_sites(sites)
    sums = [torch.zeros(site.coder.d_sae, dtype=torch.float64) for site in sites]
    errors = [torch.zeros(site.coder.d_out, dtype=torch.float64) for site in sites]
    counts = [0] * len(sites)
    for inputs in batches:
        found, _ = record(model, inputs, sites, lambda _: torch.zeros(()))
        for i, (site, parts) in enumerate(zip(sites, found, strict=True)):
            excluded = sorted(special_ids(model) if site.exclude is None else site.exclude)
            counted = used(site.name, excluded, (), dict(inputs)).to(parts.values.device)  # [B, T]
            values, indices = parts.values[counted].double().cpu(), parts.indices[counted].cpu()
            sums[i].index_add_(0, indices.flatten(), values.flatten())
            errors[i] += parts.error[counted].double().cpu().sum(0)
            counts[i] += int(counted.sum())
    if 0 in counts:
        name = sites[counts.index(0)].name
        raise UserError(f"means: batches must hold a token that {name} does not exclude, got none")
    likes = [site.coder.W_dec for site in sites]
    chosen = [total.nonzero()[:, 0] for total in sums]
    return Means(
        tuple((t[j] / n).to(W) for t, j, n, W in zip(sums, chosen, counts, likes, strict=True)),
        tuple(j.to(W.device) for j, W in zip(chosen, likes, strict=True)),
        tuple((e / n).to(W) for e, n, W in zip(errors, counts, likes, strict=True)),
    )


def changed_to(
    model: nn.Module,
    patch: Patch,
    sites: Sequence[Site],
    metric: Metric,
    clean: Sequence[Parts],
) -> tuple[list[Parts], float | None]:
    """What nodes are changed to, at each site, and the metric of it."""
    if patch is None:
        return [
            Parts(p.values[..., :0], p.indices[..., :0], torch.zeros_like(p.error)) for p in clean
        ], None
    if isinstance(patch, Means):
        if len(patch.values) != len(sites):
            got = f"{len(patch.values)} for {len(sites)}"
            raise UserError(f"attribution: patch must hold the means of each site, got {got}")
        return [patch.at(i, p) for i, p in enumerate(clean)], None
    others, value = record(model, patch, sites, metric)
    return others, float(value.double().sum())


def same_shape(clean: Mapping[str, Any], patch: Patch) -> None:
    """Refuse inputs that cannot be patched into each other.

    Raises:
        UserError: their ids have different shapes.
    """
    if not isinstance(patch, Mapping):
        return
    a, b = (inputs.get("input_ids") for inputs in (clean, patch))
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
        raise UserError(
            f"attribution: patch must have input_ids of shape {list(a.shape)} as the inputs, "
            f"got {list(b.shape)}"
        )
