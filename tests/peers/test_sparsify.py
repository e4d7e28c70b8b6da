# SPDX-License-Identifier: Apache-2.0
"""ksae.interop.sparsify beside eai-sparsify."""

from __future__ import annotations

import pytest
import sparsify.fused_encoder
import sparsify.utils
import torch
from agree import assert_agree, assert_same_curve, build, copies, data, dense, gradients
from sparsify.sparse_coder import SparseCoder as Original

from ksae.interop import sparsify as own
from ksae.interop.sparsify import ForwardOutput, SparseCoder, SparseCoderConfig

N, D, F, K = 40, 16, 128, 4
SETTINGS = {
    "sae": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "groupmax": {"activation": "groupmax"},
    "multi_topk": {"multi_topk": True},
}


def models(settings, compat):
    cfg = SparseCoderConfig(num_latents=F, k=K, **settings)
    theirs = build(lambda: Original(D, cfg))
    ours = build(lambda: SparseCoder(D, cfg, compat=compat))
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert all(
        torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True)
    )
    copies(theirs, ours)
    exact = Original(D, cfg, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    return theirs, ours, exact


def run(model, x, y, mask, weights):
    dtype = model.b_dec.dtype
    out = model(x.to(dtype), None if y is None else y.to(dtype), dead_mask=mask)
    loss = sum(w * t for w, t in zip(weights, out[3:], strict=True))
    loss.backward()
    result = {"sae_out": out.sae_out, "code": dense(out[1:3], F)}
    return result | dict(zip(ForwardOutput._fields[3:], out[3:], strict=True)), gradients(model)


@pytest.mark.parametrize("setting", SETTINGS)
def test_compat_has_the_outputs_and_gradients_of_the_original(setting):
    theirs, ours, exact = models(SETTINGS[setting], compat=True)
    x = data(N, D)
    y = data(N, D, seed=1) if "transcode" in SETTINGS[setting] else None
    mask = torch.arange(F) % 3 == 0
    runs = [run(m, x, y, mask, (1.0, 0.5, 0.125)) for m in (ours, theirs, exact)]
    assert_agree(setting, *(values for values, _ in runs))
    assert_agree(f"{setting} gradient", *(grads for _, grads in runs))
    assert isinstance(ours, Original) and isinstance(ours(x, y), ForwardOutput)
    assert ForwardOutput is sparsify.sparse_coder.ForwardOutput


@pytest.mark.parametrize("setting", ["sae", "skip", "groupmax"])
def test_the_main_loss_has_the_gradients_of_the_original(setting):
    theirs, ours, exact = models(SETTINGS[setting], compat=False)
    x, mask = data(N, D), torch.arange(F) % 3 == 0
    runs = [run(m, x, None, mask, (1.0, 0.0, 0.0)) for m in (ours, theirs, exact)]
    assert_agree(setting, *(values for values, _ in runs))
    assert_agree(f"{setting} gradient", *(grads for _, grads in runs))


def test_pre_acts_are_the_originals():
    theirs, ours, exact = models({}, compat=False)
    x = data(N, D)
    outs = [m.encode(x.to(m.b_dec.dtype)) for m in (ours, theirs, exact)]
    assert_agree("encode", *({"pre_acts": o.pre_acts.clone()} for o in outs))
    assert isinstance(outs[0], type(outs[1]))


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_the_librarys_functions_are_ours(activation):
    """Its seams: the encoder, and the decoder that its module picks when imported."""
    outs, grads = [], []
    x, W, b = data(N, D), data(F, D, seed=1), data(1, F, seed=2)[0]
    for encode, decode, dtype in (
        (own.fused_encoder, own.decoder_impl, torch.float32),
        (sparsify.fused_encoder.fused_encoder, sparsify.utils.eager_decode, torch.float32),
        (sparsify.fused_encoder.fused_encoder, sparsify.utils.eager_decode, torch.float64),
    ):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, W, b, W.flip(0))]
        acts, indices, pre_acts = encode(*leaves[:3], K, activation)
        out = decode(indices, acts, leaves[3].mT)
        out.square().sum().backward()
        code = dense((acts, indices), F)
        outs.append({"code": code, "out": out, "pre_acts": pre_acts.clone()})
        grads.append({str(i): t.grad for i, t in enumerate(leaves)})
    assert_agree(activation, *outs)
    assert_agree(f"{activation} gradient", *grads)


def trainer_step(model, optimizer, x):
    """The body of the library's Trainer.fit for one module, auxk_alpha 0."""
    model.set_decoder_norm_to_unit_norm()
    out = model(x)
    out.fvu.backward()
    model.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    return float(out.fvu.detach())


def test_the_training_loop_has_the_curve_of_the_original():
    theirs, ours, _ = models({}, compat=False)
    curves = []
    for model in (theirs, ours):
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        curves.append([trainer_step(model, optimizer, data(256, D, seed=s)) for s in range(60)])
    assert_same_curve(curves)


@pytest.mark.parametrize("settings", [{}, SETTINGS["skip"]], ids=["sae", "skip"])
def test_files_are_read_both_ways(settings, tmp_path):
    theirs, ours, _ = models(settings, compat=False)
    theirs.save_to_disk(tmp_path / "theirs" / "layers.1")
    ours.save_to_disk(tmp_path / "ours" / "layers.1")
    here = SparseCoder.load_many(str(tmp_path / "theirs"), local=True)
    there = Original.load_many(str(tmp_path / "ours"), local=True)
    for loaded in (here["layers.1"], there["layers.1"]):
        assert loaded.cfg == theirs.cfg
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])
