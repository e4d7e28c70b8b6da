# SPDX-License-Identifier: Apache-2.0
"""A coder inside of a language model, against hooks and passes written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_language_model import HOOK, VOCABULARY, D, contexts, llama

from ksae import SAE, BatchTopK, GradTopKSAE, TopKSAE, Transcoder
from ksae.activations import capture
from ksae.analysis.evaluate import evaluate_language_model
from ksae.coders.code import Code
from ksae.errors import UserError

F, K = 32, 4


def coder(seed: int = 0) -> TopKSAE:
    torch.manual_seed(seed)
    sae = TopKSAE(D, F, K)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.W_dec.normal_()
    return sae


def ids(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (2, 9), generator=generator)


def rerun(model: Any, inputs: Tensor, replace: Any) -> Tensor:
    """Logits with the last block's output replaced by a hook written here."""
    block = model.model.layers[-1]
    handle = block.register_forward_hook(lambda module, args, out: replace(out))
    try:
        return model(input_ids=inputs).logits  # type: ignore[no-any-return]
    finally:
        handle.remove()


def test_spliced_cross_entropy_is_that_of_the_evaluation() -> None:
    model, sae, text = llama(), coder(), contexts()
    total, count = 0.0, 0
    batches = []
    for begin in range(0, len(text), 8):
        part = slice(begin, begin + 8)
        batches.append((text.ids[part].long(), text.attended()[part].long()))
    with sae.attached(model, HOOK, exclude=text.special_ids), torch.no_grad():
        for inputs, mask in batches:
            logits = model(input_ids=inputs, attention_mask=mask).logits
            special = torch.isin(inputs, torch.tensor(text.special_ids))
            counted = mask[:, 1:].bool() & ~special[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][counted], inputs[:, 1:][counted], reduction="none"
            )
            total, count = total + float(losses.double().sum()), count + len(losses)
    expected = evaluate_language_model(sae, model, batches, HOOK, exclude=text.special_ids)
    assert count == expected["ce_tokens"]
    assert total / count == pytest.approx(expected["ce_sae"], rel=1e-6)
    assert abs(expected["ce_sae"] - expected["ce_clean"]) > 1e-3


@pytest.mark.parametrize("mode", ["record", "with_error"])
def test_the_model_is_left_as_it_is(mode: str) -> None:
    model, sae = llama(), coder()
    clean = model(input_ids=ids()).logits
    with sae.attached(model, HOOK, mode=mode) as site:
        assert torch.equal(model(input_ids=ids()).logits, clean)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids()).logits, clean)
        values, indices = sae.encode(capture(model, [HOOK], {"input_ids": ids()})[HOOK])
        assert site.code is not None and torch.equal(site.code.indices, indices)
        assert torch.equal(site.code.values, values)
        dense = sae.encode_dense(capture(model, [HOOK], {"input_ids": ids()})[HOOK])
        assert torch.equal(site.activations(5), dense[..., 5])
    with sae.attached(model, HOOK):
        assert not torch.equal(model(input_ids=ids()).logits, clean)
    assert torch.equal(model(input_ids=ids()).logits, clean)  # the hooks are gone


@pytest.mark.parametrize("mode", ["splice", "with_error"])
@torch.no_grad()
def test_edits_are_edits_of_the_dense_code(mode: str) -> None:
    model, sae = llama(), coder()
    clean = capture(model, [HOOK], {"input_ids": ids()})[HOOK]
    dense = sae.encode_dense(clean)
    changed = dense.clone()
    fires = int((dense > 0).sum((0, 1)).argmax())
    assert (dense[..., fires] > 0).any() and fires not in (1, 2)
    changed[..., fires] = 0
    changed[..., 1] = 3.0
    changed[..., 2] += torch.linspace(0, 1, 9)
    base = sae.b_dec if mode == "splice" else clean - dense @ sae.W_dec
    expected = rerun(model, ids(), lambda out: changed @ sae.W_dec + base)
    plain = model(input_ids=ids()).logits
    with sae.attached(model, HOOK, mode=mode) as site:
        site.ablate(fires)
        site.clamp(1, 3.0)
        site.steer(2, torch.linspace(0, 1, 9))
        got = model(input_ids=ids()).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, plain, atol=1e-2)
        site.clear()
        again = model(input_ids=ids()).logits
    torch.testing.assert_close(
        again, plain if mode == "with_error" else rerun(model, ids(), lambda out: sae(out).recon)
    )


class Ragged(TopKSAE):
    """As an activation without a fixed k: the positive entries alone, and row offsets."""

    def encode(self, x, grad=None):
        values, indices = super().encode(x.flatten(0, -2))
        keep = values > 0
        offsets = torch.zeros(len(values) + 1, dtype=torch.int64)
        offsets[1:] = keep.sum(1).cumsum(0)
        return values[keep], indices[keep], offsets

    def decode(self, values, indices, x=None, row_offsets=None):
        return Code(values, indices, row_offsets).dense(F) @ self.W_dec + self.b_dec


@pytest.mark.parametrize("mode", ["splice", "with_error"])
@torch.no_grad()
def test_codes_with_row_offsets(mode: str) -> None:
    model, sae, ragged = llama(), coder(), Ragged(D, F, K)
    ragged.load_state_dict(sae.state_dict())
    with sae.attached(model, HOOK, mode=mode) as site:
        model(input_ids=ids())
        assert site.code is not None
        latent = int(site.code.indices[0, 3, 0])
        site.clamp(latent, 2.0)
        expected, acts = model(input_ids=ids()).logits, site.activations(latent)
    with ragged.attached(model, HOOK, mode=mode) as site:
        site.clamp(latent, 2.0)
        torch.testing.assert_close(model(input_ids=ids()).logits, expected)
        assert torch.equal(site.activations(latent), acts) and acts[0, 3] > 0


@torch.no_grad()
def test_a_batchtopk_coder() -> None:
    torch.manual_seed(0)
    model, sae = llama(), SAE(D, F, activation=BatchTopK(K)).eval()
    sae.b_enc.normal_()
    x = capture(model, [HOOK], {"input_ids": ids()})[HOOK]
    with sae.attached(model, HOOK) as site:
        got = model(input_ids=ids()).logits
        assert torch.equal(site.activations(5), sae.encode_dense(x)[..., 5])
    torch.testing.assert_close(got, rerun(model, ids(), lambda out: sae(out).recon))


@torch.no_grad()
def test_a_latent_is_patched_from_another_input() -> None:
    model, sae = llama(), coder()
    source = sae.encode_dense(capture(model, [HOOK], {"input_ids": ids(7)})[HOOK])
    clean = capture(model, [HOOK], {"input_ids": ids()})[HOOK]
    latent = int((source.sum((0, 1)) - sae.encode_dense(clean).sum((0, 1))).argmax())
    with sae.attached(model, HOOK, mode="with_error") as site:
        model(input_ids=ids(7))
        site.clamp(latent, site.activations(latent))
        got = model(input_ids=ids()).logits
    step = source[..., latent] - sae.encode_dense(clean)[..., latent]
    assert (step != 0).any()
    expected = rerun(model, ids(), lambda out: clean + step.unsqueeze(-1) * sae.W_dec[latent])
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_steering_in_generate_is_that_of_a_hook() -> None:
    model, sae = llama(), coder()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    plain = model.generate(ids(), **options)
    block = model.model.layers[-1]
    handle = block.register_forward_hook(lambda module, args, out: out + 6.0 * sae.W_dec[3])
    expected = model.generate(ids(), **options)
    handle.remove()
    with sae.attached(model, HOOK, mode="with_error") as site:
        site.steer(3, 6.0)
        got = model.generate(ids(), **options)
        assert site.code is not None and site.code.values.shape == (2, 1, K)  # of the last token
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    assert not torch.equal(got.sequences, plain.sequences)


@torch.no_grad()
def test_excluded_tokens_stay_as_they_are_in_generate_too() -> None:
    model, sae = llama(), coder()
    with sae.attached(model, HOOK, exclude=range(VOCABULARY)) as site:
        site.steer(3, 6.0)
        got = model.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got, plain)
    with (
        sae.attached(model, HOOK, exclude=[0]),
        pytest.raises(UserError, match="input_ids"),
    ):
        model(inputs_embeds=torch.zeros(1, 3, D))


def test_gradients_reach_the_code() -> None:
    """With respect to a latent: its decoder row times the gradient of the activation."""
    model, sae = llama(), coder()
    metric = lambda out: out.logits[0, -1, 3] - out.logits[0, -1, 4]
    with sae.attached(model, HOOK, mode="with_error") as site:
        value = metric(model(input_ids=ids()))
        assert site.code is not None
        (grad,) = torch.autograd.grad(value, site.code.values)
        fires = site.code.values > 0
    x = capture(model, [HOOK], {"input_ids": ids()})[HOOK].requires_grad_()
    (of_x,) = torch.autograd.grad(
        metric(type("Out", (), {"logits": rerun(model, ids(), lambda out: x)})), x
    )
    expected = (of_x.unsqueeze(-2) * sae.W_dec[site.code.indices]).sum(-1)
    assert fires[0, -1].any() and grad[0, -1].abs().max() > 0
    torch.testing.assert_close(grad[fires], expected[fires], rtol=1e-4, atol=1e-6)
    # and finite differences, by steering
    latent = int(site.code.indices[0, -1, 0])
    at = torch.zeros(2, 9)
    at[0, -1] = 1e-3
    with torch.no_grad(), sae.attached(model, HOOK, mode="with_error") as site:
        ends = []
        for sign in (1, -1):
            site.steer(latent, sign * at)
            ends.append(float(metric(model(input_ids=ids()))))
    slope = (ends[0] - ends[1]) / 2e-3
    assert slope == pytest.approx(float(expected[0, -1, 0].detach()), rel=1e-2)


def test_parameters_get_gradients_when_spliced_in() -> None:
    model, sae = llama(), coder().train()
    with sae.attached(model, HOOK):
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    assert (sae.tokens_since_fired == 0).all()  # not a training step


@torch.no_grad()
def test_several_sites_at_once() -> None:
    model, one, two = llama(), coder(0), coder(1)
    first = capture(model, ["layers.0.resid_post"], {"input_ids": ids()})["layers.0.resid_post"]
    with one.attached(model, "layers.0.resid_post"), two.attached(model, HOOK) as later:
        got = model(input_ids=ids()).logits
        seen = later.code
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: one(first).recon)
    x = capture(model, [HOOK], {"input_ids": ids()})[HOOK]
    expected = rerun(model, ids(), lambda out: two(x).recon)
    handle.remove()
    torch.testing.assert_close(got, expected)
    assert seen is not None and torch.equal(seen.indices, two.encode(x)[1])


@torch.no_grad()
def test_a_transcoder_stands_for_its_mlp() -> None:
    torch.manual_seed(0)
    model, sae = llama(), Transcoder(D, D, F, K, skip=True)
    for parameter in sae.parameters():
        parameter.normal_()
    mlp = model.model.layers[1].mlp
    x = capture(model, ["layers.1.mlp_in"], {"input_ids": ids()})["layers.1.mlp_in"]
    handle = mlp.register_forward_hook(lambda m, args, out: sae(args[0]).recon)
    expected = model(input_ids=ids()).logits
    handle.remove()
    hooks = {"target_hook": "layers.1.mlp_out"}
    with sae.attached(model, "layers.1.mlp_in", **hooks) as site:
        torch.testing.assert_close(model(input_ids=ids()).logits, expected)
        assert site.code is not None and torch.equal(site.code.indices, sae.encode(x)[1])
    wrong = sae.attached(model, "layers.1.mlp_out", target_hook="layers.1.mlp_in")
    with wrong, pytest.raises(UserError, match="must come after hook"):
        model(input_ids=ids())


def test_a_gradtopk_coder_selects_without_gradients() -> None:
    model = llama()
    sae = GradTopKSAE(D, F, K)
    with sae.attached(model, HOOK, mode="record") as site:
        model(input_ids=ids())
        assert site.code is not None and site.code.k == K


def test_mistakes() -> None:
    model, sae = llama(), coder()
    with pytest.raises(UserError, match="mode must be one of"), sae.attached(model, HOOK, mode="x"):
        pass
    with pytest.raises(UserError, match="valid are"), sae.attached(model, "layers.9.resid_post"):
        pass
    with (
        pytest.raises(UserError, match="for transcoders"),
        sae.attached(model, HOOK, target_hook=HOOK),
    ):
        pass
    lone = Transcoder(D, D, F, K)
    with (
        pytest.raises(UserError, match="must be given for a transcoder"),
        lone.attached(model, HOOK),
    ):
        pass
    with sae.attached(model, HOOK, mode="record") as site:
        with pytest.raises(UserError, match="must have run"):
            site.activations(0)
        with pytest.raises(UserError, match="to edit"):
            site.steer(0, 1.0)
        with pytest.raises(UserError, match=r"latent must be in \[0, 32\), got 32"):
            site.activations(F)
    wide = TopKSAE(D + 1, F, K)
    with wide.attached(model, HOOK), pytest.raises(ValueError, match=r"of shape \[\.\.\., 17\]"):
        model(input_ids=ids())
    assert not model.model.layers[-1]._forward_hooks
