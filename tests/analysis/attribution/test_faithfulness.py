# SPDX-License-Identifier: Apache-2.0
"""Circuits alone and models without them, against hooks with dense codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attribution_sites import METRIC, RESID, WRITE, F, T, by_hand, ids, two_sites
from attribution_sites import model as language_model
from torch import Tensor
from toy_language_model import D

from ksae import TopKSAE
from ksae.activations import capture
from ksae.analysis.attribution import Node, Site, curve, effects
from ksae.errors import UserError


def others(model: Any, sites: list[Site]) -> list[tuple[Tensor, Tensor]]:
    """Dense codes and errors of another input."""
    hooks = (RESID, "layers.1.mlp_in", WRITE)
    acts = capture(model, hooks, ids(5))
    found = []
    with torch.no_grad():
        for site, name, x in zip(sites, (RESID, WRITE), (acts[RESID], acts[hooks[1]]), strict=True):
            recon = site.coder.decode(*site.coder.encode(x), x)
            found.append((site.coder.encode_dense(x), acts[name] - recon))
    return found


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("patched", [True, False])
def test_points_are_those_of_dense_codes(patched: bool, positions: bool) -> None:
    model, sites = language_model(), two_sites()
    patch = ids(5) if patched else None
    found = effects(model, ids(), METRIC, sites, patch=patch)
    ranked = found.nodes(positions=positions)
    nodes = [n for i in range(2) for n in [r for r in ranked if r.site == i][:4]]
    assert any(node.latent is None for node in nodes)
    keep = [torch.zeros(T, F, dtype=torch.bool) for _ in sites]
    errors = [torch.zeros(T, dtype=torch.bool) for _ in sites]
    for node in nodes:
        place = slice(None) if node.position is None else node.position
        if node.latent is None:
            errors[node.site][place] = True
        else:
            keep[node.site][place, node.latent] = True
    other = others(model, sites) if patched else None
    alone = by_hand(model, sites, keep, errors, other)
    rest = by_hand(model, sites, [~k for k in keep], [~e for e in errors], other)
    none = by_hand(model, sites, [k & False for k in keep], [e & False for e in errors], other)
    full = found.clean
    (point,) = curve(model, ids(), METRIC, sites, nodes, [8], patch=patch)
    assert (point.nodes, point.metric) == (8, pytest.approx(alone, rel=1e-9))
    assert point.faithfulness == pytest.approx((alone - none) / (full - none), rel=1e-6)
    assert point.completeness == pytest.approx((rest - none) / (full - none), rel=1e-6)
    assert len({round(v, 6) for v in (alone, rest, none, full)}) == 4, (alone, rest, none, full)


def test_errors_can_stay() -> None:
    model, sites = language_model(), two_sites()
    nodes = effects(model, ids(), METRIC, sites).nodes(5, errors=False)
    keep = [torch.zeros(T, F, dtype=torch.bool) for _ in sites]
    stay = [torch.ones(T, dtype=torch.bool) for _ in sites]
    none = by_hand(model, sites, keep, stay, None)
    for node in nodes:
        keep[node.site][node.position, node.latent] = True
    alone = by_hand(model, sites, keep, stay, None)
    with torch.no_grad():
        full = float(METRIC(model(**ids())).sum())
    (point,) = curve(model, ids(), METRIC, sites, nodes, [5], keep_errors=True)
    assert point.metric == pytest.approx(alone, rel=1e-9)
    assert point.faithfulness == pytest.approx((alone - none) / (full - none), rel=1e-6)


def test_all_nodes_are_the_model_and_none_the_patch() -> None:
    model, sites = language_model(), two_sites()
    found = effects(model, ids(), METRIC, sites, patch=ids(5))
    every = [Node(i, t, j) for i in range(2) for t in range(T) for j in (*range(F), None)]
    none, everything = curve(model, ids(), METRIC, sites, every, [0, len(every)], patch=ids(5))
    assert none.faithfulness == 0 and none.completeness == pytest.approx(1, rel=1e-6)
    assert everything.metric == pytest.approx(found.clean, rel=1e-9)
    assert everything.faithfulness == pytest.approx(1, rel=1e-6)
    assert everything.completeness == pytest.approx(0, abs=1e-6)


def test_mistakes() -> None:
    model, sites = language_model(), two_sites()
    for nodes, message in (
        ([Node(2, 0, 0)], r"site must be in \[0, 2\), got 2"),
        ([Node(0, 0, F)], r"latent must be in \[0, 32\), got 32"),
        ([Node(0, 0, 1), Node(0, None, 1)], "got both kinds"),
    ):
        with pytest.raises(UserError, match=message):
            curve(model, ids(), METRIC, sites, nodes, [1])
    with pytest.raises(UserError, match=r"of shape \[2, 7\] as the inputs, got \[2, 6\]"):
        curve(model, ids(), METRIC, sites, [], [0], patch=ids(T=6))
    far = Site(TopKSAE(D, F, 4).double(), RESID, exclude=range(40))
    with pytest.raises(UserError, match="must depend on the nodes"):
        curve(model, ids(), METRIC, [far], [], [0])
