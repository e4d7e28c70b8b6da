# SPDX-License-Identifier: Apache-2.0
"""Mean ablation, against dense codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attribution_sites import METRIC, RESID, F, T, by_hand, coder, ids, two_sites
from attribution_sites import model as language_model
from torch import Tensor

from ksae.activations import capture
from ksae.analysis.attribution import Means, Site, curve, effects, means
from ksae.errors import UserError

HOOKS = (RESID, "layers.1.mlp_in", "layers.1.mlp_out")


def padded(seed: int) -> dict[str, Tensor]:
    """Some of the tokens are padding, and one is a special token of the model."""
    inputs = ids(seed, B=3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    inputs["input_ids"][1, 2] = 0  # the toy model's padding
    return inputs | {"attention_mask": mask}


@torch.no_grad()
def dense(model: Any, sites: list[Site], batches: list[dict[str, Tensor]]) -> Any:
    """Mean codes [F] and errors [d] of each site."""
    found = []
    for i, site in enumerate(sites):
        codes, errors = [], []
        for inputs in batches:
            acts = capture(model, HOOKS, inputs)
            x, y = (acts[HOOKS[0]],) * 2 if i == 0 else (acts[HOOKS[1]], acts[HOOKS[2]])
            used = (inputs["input_ids"] != 0) & inputs["attention_mask"].bool()
            codes.append(site.coder.encode_dense(x)[used])
            errors.append((y - site.coder.decode(*site.coder.encode(x), x))[used])
        found.append((torch.cat(codes).mean(0), torch.cat(errors).mean(0)))
    return found


def excluding() -> list[Site]:
    return [Site(s.coder, s.hook, s.target_hook, exclude=(0,)) for s in two_sites()]


def test_means_are_those_of_the_tokens_that_count() -> None:
    model, sites, batches = language_model(), excluding(), [padded(7), padded(8)]
    found = means(model, iter(batches), sites)
    for i, (code, error) in enumerate(dense(model, sites, batches)):
        got = torch.zeros(F, dtype=torch.float64)
        got[found.indices[i]] = found.values[i]
        torch.testing.assert_close(got, code, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.errors[i], error, rtol=1e-9, atol=1e-12)
        assert 3 < len(found.values[i]) < F and not torch.equal(error, torch.zeros_like(error))


def test_nodes_change_to_means() -> None:
    model, sites, batches = language_model(), excluding(), [padded(7), padded(8)]
    patch, expected = means(model, batches, sites), dense(model, sites, batches)
    found = effects(model, ids(), METRIC, sites, patch=patch)
    for here, (code, _) in zip(found.at, expected, strict=True):
        entry = (here.clean != 0) | (here.patch != 0)
        assert torch.equal(here.patch[entry] != 0, code[here.indices[entry]] != 0)
        torch.testing.assert_close(here.patch[entry], code[here.indices[entry]])
        # a latent has one entry a token
        key = here.indices.where(entry, torch.arange(entry.shape[-1]) + F).sort(-1).values
        assert (key[..., 1:] != key[..., :-1]).all()
    keep = [torch.zeros(T, F, dtype=torch.bool) for _ in sites]
    errors = [torch.zeros(T, dtype=torch.bool) for _ in sites]
    none = by_hand(model, sites, keep, errors, expected)
    nodes = [n for n in found.nodes() if n.latent is not None][:6]
    for node in nodes:
        keep[node.site][node.position, node.latent] = True
    alone = by_hand(model, sites, keep, errors, expected)
    empty, (six, *_) = (curve(model, ids(), METRIC, sites, nodes, [n], patch=patch) for n in (0, 6))
    assert empty[0].metric == pytest.approx(none, rel=1e-9)
    assert six.metric == pytest.approx(alone, rel=1e-9) and abs(alone - none) > 1e-6


def test_refusals() -> None:
    model, sites = language_model(), two_sites()
    with pytest.raises(UserError, match=f"a token that {RESID} does not exclude, got none"):
        means(model, [], sites)
    patch = means(model, [ids()], sites)
    assert isinstance(patch, Means)
    with pytest.raises(UserError, match="must hold the means of each site, got 2 for 1"):
        effects(model, ids(), METRIC, [Site(coder("topk"), RESID)], patch=patch)
