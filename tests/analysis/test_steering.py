# SPDX-License-Identifier: Apache-2.0
"""Steering on a model whose answer is known, choice of latents, evaluation with gradients."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from ksae import TopKSAE
from ksae.activations import capture_gradient
from ksae.analysis.evaluate import (
    LM_DEFINITIONS,
    ORACLE_DEFINITIONS,
    compare_language_model,
    evaluate,
    evaluate_language_model,
)
from ksae.analysis.steering import latents_by_rate, logit_shift, matched_latents

VOCABULARY, D = 6, 3


class Linear(nn.Module):
    """Embedding, one block that does nothing, and a head: logits are linear in the activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(num_hidden_layers=1)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList([nn.Identity()])
        self.head = nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return types.SimpleNamespace(logits=self.head(self.layers[0](self.embedding(input_ids))))


class Choosy(TopKSAE):
    """Selects with gradients by leaving every activation as it is, without by returning zero."""

    def forward(self, x, y=None, *, grad=None):
        out = super().forward(x, y)
        return out._replace(recon=torch.zeros_like(x) if grad is None else x + 0 * grad)


HOOK = "layers.0.resid_post"


def text() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.tensor([[0, 1, 2, 3, 4], [0, 5, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return [(ids[:1], mask[:1]), (ids[1:], mask[1:])]


def same(a: dict[str, float], b: dict[str, float]) -> bool:
    """Equal to the bit; a recovered share of no damage is NaN."""
    return a == pytest.approx(b, rel=0, abs=0, nan_ok=True)


def test_the_shift_of_a_linear_model_is_its_formula() -> None:
    lm = Linear()
    sae = TopKSAE(D, 8, 2)
    with torch.no_grad():
        sae.W_dec *= 5  # the length must not matter
    latents = torch.tensor([3, 0, 7])
    got = logit_shift(sae, lm, text(), HOOK, latents, 2.0, exclude=[0])
    rows = sae.W_dec[latents] / sae.W_dec[latents].norm(dim=1, keepdim=True)
    change = 2.0 * rows.double() @ lm.head.weight.double().T  # [L, vocabulary], at every token
    expected = (change - change.mean(1, keepdim=True)).square().mean(1).sqrt()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    twice = logit_shift(sae, lm, text(), HOOK, latents, 4.0)
    torch.testing.assert_close(twice, 2 * got, rtol=1e-5, atol=0)


def test_a_direction_that_moves_all_logits_alike_does_not_steer() -> None:
    lm, sae = Linear(), TopKSAE(D, 2, 1)
    with torch.no_grad():
        lm.head.weight[:, 0] = 1.0
        sae.W_dec.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    none, some = logit_shift(sae, lm, text(), HOOK, torch.arange(2), 3.0).tolist()
    assert none < 1e-6 < 0.1 < some


def test_steering_refuses_an_empty_text() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        logit_shift(TopKSAE(D, 4, 1), Linear(), [], HOOK, torch.arange(1), 1.0)


def test_matched_latents_have_equal_rates() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(400, generator=generator, dtype=torch.float64) ** 4
    b = torch.rand(300, generator=generator, dtype=torch.float64) ** 4
    a[:100] = 0  # dead
    b[::2] = 0
    chosen_a, chosen_b = matched_latents([a, b], 40)
    for rate, chosen in ((a, chosen_a), (b, chosen_b)):
        assert len(chosen.unique()) == 40 and (rate[chosen] > 0).all()
    ratio = (a[chosen_a] / b[chosen_b]).log().abs()
    assert ratio.median() < 0.1
    assert len(matched_latents([a, torch.zeros(5)], 40)[0]) == 0
    assert len(matched_latents([a, b], 1000)[0]) == int((b > 0).sum())


def test_latents_by_rate() -> None:
    rate = torch.tensor([0.0, 0.5, 0.05, 0.02, 0.04, 1.0, 2e-6])
    found = latents_by_rate(rate, 2)
    assert list(found) == ["0.01 to 0.1", "0.1 to 1"]
    assert found["0.1 to 1"].tolist() == [1, 5]
    assert len(found["0.01 to 0.1"]) == 2


def test_selection_with_gradients_is_measured_apart() -> None:
    lm, sae = Linear(), Choosy(D, 8, 2)
    got = evaluate_language_model(sae, lm, text(), HOOK, exclude=[0], oracle=True)
    assert set(got) == {*LM_DEFINITIONS, *ORACLE_DEFINITIONS, "ce_tokens"}
    assert got["ce_sae"] == got["ce_zero"] and got["kl_sae"] == got["kl_zero"] > 0
    assert got["ce_sae_oracle"] == got["ce_clean"] and got["kl_sae_oracle"] == 0
    assert got["kl_recovered_oracle"] == 1 and got["kl_recovered"] == 0
    assert got["ce_increase_oracle"] == 0 != got["ce_increase"]
    assert all(d.startswith("uses labels (oracle)") for d in ORACLE_DEFINITIONS.values())
    plain = evaluate_language_model(sae, lm, text(), HOOK, exclude=[0])
    assert same(plain, {name: got[name] for name in plain}) and "ce_sae_oracle" not in plain


def test_models_are_compared_on_the_same_passes() -> None:
    lm, one, two = Linear(), TopKSAE(D, 8, 2), Choosy(D, 8, 2)
    both = compare_language_model({"a": one, "b": two}, lm, text(), HOOK, oracle=["b"])
    assert same(both["a"], evaluate_language_model(one, lm, text(), HOOK))
    assert same(both["b"], evaluate_language_model(two, lm, text(), HOOK, oracle=True))


def test_the_oracle_is_given_the_gradient_of_its_own_rows() -> None:
    lm = Linear()
    seen: list[torch.Tensor] = []

    class Recorder(Choosy):
        def forward(self, x, y=None, *, grad=None):
            if grad is not None:
                seen.append(torch.cat([x, grad], 1))
            return super().forward(x, y, grad=grad)

    evaluate_language_model(Recorder(D, 8, 2), lm, text(), HOOK, exclude=[0], oracle=True)
    expected = []
    for ids, mask in text():
        keep = mask.bool() & (ids != 0)
        found, g = capture_gradient(lm, [HOOK], {"input_ids": ids, "attention_mask": mask}, keep)
        expected.append(torch.cat([found[HOOK], g], 2)[keep])
    torch.testing.assert_close(torch.cat(seen), torch.cat(expected))
    assert (torch.cat(seen)[:, D:] != 0).any()


def test_reconstruction_with_gradients() -> None:
    x, g = torch.randn(20, D), torch.randn(20, D)
    sae = Choosy(D, 8, 2)
    without = evaluate(sae, [x]).metrics["fvu"]
    parts = [(a, None, b) for a, b in zip(x.split(7), g.split(7), strict=True)]
    with_gradients = evaluate(sae, parts, max_tokens=15)
    assert with_gradients.tokens == 15 and with_gradients.metrics["fvu"] == 0 < without
