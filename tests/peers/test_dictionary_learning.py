# SPDX-License-Identifier: Apache-2.0
"""ksae.interop.dictionary_learning beside dictionary-learning."""

from __future__ import annotations

import pytest
import torch
from agree import assert_agree, assert_same_curve, build, copies, data, gradients
from dictionary_learning.trainers.top_k import AutoEncoderTopK as Original
from dictionary_learning.trainers.top_k import TopKTrainer

from ksae.interop.dictionary_learning import AutoEncoderTopK

N, D, F, K = 40, 16, 128, 4


@pytest.fixture
def models():
    """The library's, ours, and the library's in float64."""
    theirs, ours = (build(lambda c=c: c(D, F, K)) for c in (Original, AutoEncoderTopK))
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    copies(theirs, ours)
    exact = Original(D, F, K).double()
    exact.load_state_dict(theirs.state_dict())
    return ours, theirs, exact


def test_outputs_and_gradients_are_the_originals(models):
    outs, grads = [], []
    for model in models:
        x = data(N, D).to(model.b_dec.dtype)
        x_hat, f = model(x, output_features=True)
        f_only = model.encode(x)
        (model(x) - x).square().sum().backward()
        outs.append({"x_hat": x_hat, "f": f, "encode": f_only, "forward": model(x)})
        grads.append(gradients(model))
    assert_agree("forward", *outs)
    assert_agree("gradient", *grads)
    assert isinstance(models[0], Original)


def test_the_trainers_calls_give_the_originals_numbers(models):
    outs = []
    for model in models:
        x = data(N, D).to(model.b_dec.dtype)
        f, acts, _, post_relu = model.encode(x, return_topk=True, use_threshold=False)
        outs.append({"x_hat": model.decode(f), "f": f * 1, "post_relu": post_relu * 1})
        outs[-1]["acts"] = acts.sort(-1).values
        model.threshold.fill_(0.3)
        outs[-1]["threshold"] = model.encode(x, use_threshold=True)
    assert_agree("encode", *outs)


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead latents"])
def test_the_trainer_has_the_curve_of_the_original(dead):
    curves = []
    for cls in (Original, AutoEncoderTopK):
        trainer = TopKTrainer(
            100,
            D,
            F,
            K,
            0,
            "none",
            dict_class=cls,
            lr=5e-3,
            warmup_steps=5,
            seed=0,
            device="cpu",
            threshold_start_step=10,
        )
        if dead:
            trainer.num_tokens_since_fired[::3] = trainer.dead_feature_threshold
        curves.append([trainer.update(s, data(256, D, seed=s)) for s in range(60)])
        assert not dead or trainer.dead_features >= 0
    assert_same_curve(curves)
    assert isinstance(trainer.ae, AutoEncoderTopK) and float(trainer.ae.threshold) > 0


def test_auxk_has_the_gradient_of_the_original(models):
    grads = []
    for model in models:
        trainer = TopKTrainer(
            100, D, F, K, 0, "none", dict_class=lambda *_, m=model: m, warmup_steps=5, device="cpu"
        )
        trainer.num_tokens_since_fired[::3] = trainer.dead_feature_threshold
        x = data(N, D).to(model.b_dec.dtype)
        *_, post_relu = model.encode(x, return_topk=True)
        residual = 0.5 * x
        trainer.get_auxiliary_loss(residual, post_relu).backward()
        grads.append(gradients(model))
    assert grads[0]["encoder.weight"].abs().sum() > 0
    # The trainer computes AuxK in float32 whatever the dtype.
    for name in grads[0]:
        scale = grads[2][name].abs().max()
        assert (grads[0][name] - grads[2][name]).abs().max() <= 1e-5 * scale, name


def test_files_are_read_both_ways(models, tmp_path):
    ours, theirs, _ = models
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    here = AutoEncoderTopK.from_pretrained(tmp_path / "theirs.pt")
    there = Original.from_pretrained(tmp_path / "ours.pt")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, here.state_dict()[name])
        assert torch.equal(value, there.state_dict()[name])
