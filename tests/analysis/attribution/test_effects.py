# SPDX-License-Identifier: Apache-2.0
"""Effects on a random language model, against finite differences and passes written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attribution_sites import METRIC, READ, RESID, WRITE, F, K, coder, ids, two_sites
from attribution_sites import model as language_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_language_model import D, llama

from ksae import TopKSAE
from ksae.activations import capture
from ksae.analysis.attribution import Site, effects
from ksae.errors import UserError


def with_added(model: Any, inputs: dict[str, Tensor], module: Any, step: Tensor) -> float:
    """The metric, summed, with a step added to a module's output by a hook written here."""
    handle = module.register_forward_hook(lambda _m, _a, out: out + step)
    try:
        with torch.no_grad():
            return float(METRIC(model(**inputs)).sum())
    finally:
        handle.remove()


def slope(model: Any, inputs: dict[str, Tensor], module: Any, direction: Tensor) -> float:
    h = 1e-5
    ends = [with_added(model, inputs, module, sign * h * direction) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * h)


def modules(model: Any) -> list[Any]:
    return [model.model.layers[0], model.model.layers[1].mlp]


@pytest.mark.parametrize("patched", [False, True])
def test_direct_effects_are_finite_differences(patched: bool) -> None:
    """Of the model itself, at both sites at once: latents of either input, and errors."""
    model, sites = language_model(), two_sites()
    inputs, patch = ids(), ids(5) if patched else None
    found = effects(model, inputs, METRIC, sites, patch=patch)
    only_in_patch = 0
    for site, here, module in zip(sites, found.at, modules(model), strict=True):
        changes = (here.patch != 0) | (here.clean != 0)
        only_in_patch += int((changes & (here.clean == 0) & (here.gradients != 0)).sum())
        some = (changes & (here.gradients != 0)).nonzero()
        none = (changes & (here.gradients == 0)).nonzero()
        assert len(some) > 3
        for b, t, e in [*some[:: max(1, len(some) // 12)].tolist(), *none[:2].tolist()]:
            direction = torch.zeros(*inputs["input_ids"].shape, D, dtype=torch.float64)
            direction[b, t] = site.coder.W_dec[here.indices[b, t, e]].detach()
            expected = slope(model, inputs, module, direction)
            got = float(here.gradients[b, t, e])
            assert got == pytest.approx(expected, rel=1e-2, abs=1e-10)
            assert abs(got) > 1e-7 or got == 0
        direction = torch.zeros(*inputs["input_ids"].shape, D, dtype=torch.float64)
        direction[1, -1] = (here.error_patch - here.error_clean)[1, -1]
        expected = slope(model, inputs, module, direction)
        assert abs(expected) > 1e-6
        assert float(here.error_effects[1, -1]) == pytest.approx(expected, rel=1e-2)
    assert (only_in_patch > 0) == patched


def test_an_effect_is_that_of_the_model_also_behind_other_sites() -> None:
    model, sites = language_model(), two_sites()
    both = effects(model, ids(), METRIC, sites)
    for i in range(2):
        alone = effects(model, ids(), METRIC, [sites[i]])
        torch.testing.assert_close(both.at[i].effects, alone.at[0].effects)
        torch.testing.assert_close(both.at[i].error_effects, alone.at[0].error_effects)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_integrated_effects_add_up(kind: str) -> None:
    """To the metric with the other input's activation at the site, from a hook written here."""
    model, site = language_model(), Site(coder(kind), RESID)
    inputs, patch = ids(), ids(5)
    other = capture(model, [RESID], patch)[RESID]
    block = model.model.layers[0]
    handle = block.register_forward_hook(lambda _m, _a, out: other)
    with torch.no_grad():
        expected = METRIC(model(**inputs)) - METRIC(language_model()(**inputs))  # [B]
    handle.remove()
    found = effects(model, inputs, METRIC, [site], patch=patch, steps=32)
    here = found.at[0]
    got = here.effects.sum((1, 2)) + here.error_effects.sum(1)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-9)
    direct = effects(model, inputs, METRIC, [site], patch=patch).at[0]
    first = direct.effects.sum((1, 2)) + direct.error_effects.sum(1)
    assert (first - expected).abs().max() > 10 * (got - expected).abs().max()
    assert found.patch == pytest.approx(float(METRIC(model(**patch)).sum()), rel=1e-9)


def test_tokens_that_are_excluded_have_no_effect() -> None:
    model = language_model()
    inputs = ids()
    inputs["input_ids"][:, 0] = 0  # the beginning of a text, by the model's configuration
    site = Site(coder("topk"), RESID)
    for steps in (0, 2):
        found = effects(model, inputs, METRIC, [site], steps=steps)
        assert (found.at[0].effects[:, 0] == 0).all()
        assert (found.at[0].error_effects[:, 0] == 0).all()
        assert all(node.position != 0 for node in found.nodes())
    everywhere = effects(model, inputs, METRIC, [Site(site.coder, RESID, exclude=())])
    assert (everywhere.at[0].effects[:, 0] != 0).any()


def test_nodes_add_effects_up() -> None:
    model, sites = language_model(), two_sites()
    found = effects(model, ids(), METRIC, sites, patch=ids(5))
    dense = torch.zeros(2, 7, F, dtype=torch.float64)
    here = found.at[1]
    dense.scatter_add_(2, here.indices, here.effects)
    by_place = {(n.position, n.latent): n.effect for n in found.nodes() if n.site == 1}
    for t in range(7):
        for latent in range(F):
            expected = float(dense[:, t, latent].sum())
            assert by_place.get((t, latent), 0.0) == pytest.approx(expected, abs=1e-12)
        expected = float(here.error_effects[:, t].sum())
        assert by_place.get((t, None), 0.0) == pytest.approx(expected, abs=1e-12)
    dense.zero_().scatter_add_(2, here.indices, here.patch)
    for node in (n for n in found.nodes() if n.site == 1 and n.latent is not None):
        expected = float(dense[:, node.position, node.latent].sum())
        assert node.patched == pytest.approx(expected, rel=1e-9)
    dense.zero_().scatter_add_(2, here.indices, here.effects)
    overall = {n.latent: n.effect for n in found.nodes(positions=False) if n.site == 1}
    for latent, effect in overall.items():
        expected = float(here.error_effects.sum() if latent is None else dense[..., latent].sum())
        assert effect == pytest.approx(expected, abs=1e-12)
    sizes = [abs(n.effect) for n in found.nodes(10)]
    assert len(sizes) == 10 and sizes == sorted(sizes, reverse=True)
    assert all(n.latent is not None for n in found.nodes(errors=False))


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "transcoder"])
def test_entries_are_the_codes_of_both_inputs(kind: str, patched: bool) -> None:
    """Each active latent once a token; also where rows have fewer positive entries than k, or a
    number of their own."""
    model, sae = language_model(), coder(kind)
    with torch.no_grad():
        sae.b_enc -= 0.2
    hook = READ if kind == "transcoder" else RESID
    site = Site(sae, hook, WRITE if kind == "transcoder" else None)
    here = effects(model, ids(), METRIC, [site], patch=ids(5) if patched else None).at[0]
    clean, patch = (sae.encode_dense(capture(model, [hook], ids(i))[hook]) for i in (2, 5))
    assert (clean > 0).any() and ((clean > 0) & (patch > 0)).any()
    for values, dense in ((here.clean, clean), (here.patch, patch if patched else 0 * patch)):
        got = torch.zeros_like(dense).scatter_add(2, here.indices, values)
        torch.testing.assert_close(got, dense)
    active = (here.clean != 0) | (here.patch != 0)
    times = torch.zeros_like(clean).scatter_add(2, here.indices, active.to(clean))
    assert times.max() == 1


def test_what_both_inputs_have_alike_counts_as_active() -> None:
    """Activations are summed over all positions, those before the inputs part among them."""
    model, sites = language_model(), two_sites()
    patch = ids(5)
    patch["input_ids"][:, :4] = ids()["input_ids"][:, :4]
    found = effects(model, ids(), METRIC, sites, patch=patch)
    for number, here in enumerate(found.at):
        alike = (here.clean != 0) & (here.clean == here.patch)
        assert alike[:, :4].any() and not alike[:, 4:].all()
        for node in found.nodes(positions=False, errors=False):
            if node.site == number:
                mine = here.indices == node.latent
                assert node.activation == pytest.approx(float(here.clean[mine].sum()))
                assert node.patched == pytest.approx(float(here.patch[mine].sum()))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_nothing_has_a_row_for_each_token_and_a_column_for_each_latent() -> None:
    from ksae.analysis.attribution import curve, edges

    model, many = llama(), 4096
    site = Site(TopKSAE(D, many, K), RESID)
    inputs, patch = ids(B=4, T=12), ids(5, B=4, T=12)
    with Largest() as seen:
        for steps in (0, 1):
            found = effects(model, inputs, METRIC, [site], patch=patch, steps=steps)
        nodes = found.nodes(4)
        edges(model, inputs, METRIC, found, nodes)
        curve(model, inputs, METRIC, [site], nodes, [2], patch=patch)
    assert 0 < seen.elements < 48 * many
    dense = 48 * many
    with Largest() as seen:
        site.coder.encode_dense(torch.zeros(48, D))
    assert seen.elements == dense  # the mode sees what is dense


def test_mistakes() -> None:
    model, sites = language_model(), two_sites()
    with pytest.raises(UserError, match="at least one, got none"):
        effects(model, ids(), METRIC, [])
    with pytest.raises(UserError, match="resid_post twice"):
        effects(model, ids(), METRIC, [sites[0], sites[0]])
    with pytest.raises(UserError, match=r"the model's order, which is layers\.0\.resid_post"):
        effects(model, ids(), METRIC, sites[::-1])
    with pytest.raises(UserError, match="steps must be >= 0, got -1"):
        effects(model, ids(), METRIC, sites, steps=-1)
    with pytest.raises(UserError, match=r"of shape \[2, 7\] as the inputs, got \[2, 8\]"):
        effects(model, ids(), METRIC, sites, patch=ids(T=8))
    with pytest.raises(UserError, match=r"metric must return .*, got \[2, 7, 40\]"):
        effects(model, ids(), lambda out: out.logits, sites)
    with pytest.raises(UserError, match="got float"):
        effects(model, ids(), lambda out: 1.0, sites)
    with pytest.raises(UserError, match="must be given for a transcoder"):
        Site(sites[1].coder, READ)
    with pytest.raises(UserError, match="for transcoders"):
        Site(sites[0].coder, READ, WRITE)
    with pytest.raises(UserError, match="must come after hook"):
        effects(model, ids(), METRIC, [Site(sites[1].coder, WRITE, READ)])
    with pytest.raises(UserError, match="valid are"):
        effects(model, ids(), METRIC, [Site(sites[0].coder, "layers.9.resid_post")])
    wide = TopKSAE(D + 1, F, K).double()
    with pytest.raises(ValueError, match=r"of shape \[\.\.\., 17\]"):
        effects(model, ids(), METRIC, [Site(wide, RESID)])
    assert not model.model.layers[0]._forward_hooks
