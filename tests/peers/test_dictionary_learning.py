# SPDX-License-Identifier: Apache-2.0
"""ksae.interop.dictionary_learning beside dictionary-learning."""

from __future__ import annotations

import pytest
import torch
from agree import assert_agree, assert_same_curve, build, copies, data, gradients
from dictionary_learning.trainers.top_k import AutoEncoderTopK as Original
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

import ksae
from ksae.interop import dictionary_learning as ours
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


def test_what_the_librarys_script_writes_is_read(tmp_path):
    """trainSAE, the library's whole training: steps, checkpoints on the way, files at the end."""
    options = {"activation_dim": D, "dict_size": F, "k": K, "layer": 0, "lm_name": "none"}
    options |= {"steps": 60, "lr": 5e-3, "warmup_steps": 5, "seed": 0, "device": "cpu"}
    classes = Original, AutoEncoderTopK
    configs = [{"trainer": TopKTrainer, "dict_class": c, **options} for c in classes]
    configs.append({"trainer": ours.TopKTrainer, "fused": True, **options})
    batches = [data(256, D, seed=s) for s in range(61)]
    trainSAE(
        batches,
        configs,
        60,
        save_steps=[30],
        save_dir=str(tmp_path),
        device="cpu",
        normalize_activations=True,
    )
    x, outs = data(N, D, seed=99), []
    for i in range(3):
        folder = tmp_path / f"trainer_{i}"
        theirs, config = load_dictionary(str(folder), "cpu")
        model = ksae.load(folder)
        assert isinstance(theirs, Original) and config["trainer"]["dict_class"] == "AutoEncoderTopK"
        for name, value in (("W_enc", theirs.encoder.weight), ("W_dec", theirs.decoder.weight.T)):
            assert torch.equal(getattr(model, name), value), name
        torch.testing.assert_close(model(x).recon, theirs(x), rtol=1e-5, atol=1e-5)
        assert ksae.load(folder / "checkpoints" / "ae_30.pt").k == K
        outs.append((theirs(x) - x).square().sum())
    torch.testing.assert_close(outs[1:], outs[:1] * 2, rtol=0.02, atol=0)


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead latents"])
def test_the_fused_trainer_takes_the_steps_of_the_original(dead):
    trainers, curves = [], []
    for cls, options in ((TopKTrainer, {}), (ours.TopKTrainer, {"fused": True})):
        options |= {"lr": 5e-3, "warmup_steps": 5, "decay_start": 50, "seed": 0, "device": "cpu"}
        trainer = cls(100, D, F, K, 0, "none", threshold_start_step=10, **options)
        if dead:
            trainer.num_tokens_since_fired[::3] = trainer.dead_feature_threshold
        curves.append([trainer.update(s, data(256, D, seed=s)) for s in range(60)])
        trainers.append(trainer)
    assert_same_curve(curves)
    theirs, fused = trainers
    assert isinstance(fused, TopKTrainer) and fused.fused_step is not None
    assert fused.config == theirs.config
    assert fused.ae.state_dict().keys() == theirs.ae.state_dict().keys()
    for name in ("threshold", "encoder.weight", "decoder.weight", "b_dec"):
        expected, value = theirs.ae.state_dict()[name], fused.ae.state_dict()[name]
        assert (value - expected).norm() < 0.02 * expected.norm(), name
    for name in ("effective_l0", "dead_features"):
        assert abs(getattr(theirs, name) - getattr(fused, name)) <= 2, name
    for name, p in fused.fused_step.model.named_parameters():
        assert any(p.data_ptr() == q.data_ptr() for q in fused.ae.parameters()), name
    fused.ae.load_state_dict(theirs.ae.state_dict())  # the step works on these numbers from here
    x = data(256, D, seed=99)
    assert fused.update(60, x) == pytest.approx(theirs.loss(x, step=0).item(), rel=1e-3)


@pytest.mark.parametrize("auxk_alpha", [0.0, 5.0], ids=["plain", "AuxK"])
def test_three_fused_steps_move_as_those_of_the_original(auxk_alpha):
    states = []
    # Where pre-activations are not positive, top-k after a ReLU breaks ties in an order of its own,
    # and so revives other latents: with AuxK, the library's loop runs on our class.
    plain = {"dict_class": AutoEncoderTopK if auxk_alpha else Original}
    for cls, options in ((TopKTrainer, plain), (ours.TopKTrainer, {"fused": True})):
        options |= {"lr": 1e-2, "warmup_steps": 1, "seed": 0, "device": "cpu"}
        trainer = cls(9, D, F, K, 0, "none", auxk_alpha=auxk_alpha, **options)
        before = {name: p.detach().clone() for name, p in trainer.ae.named_parameters()}
        for s in range(3):
            trainer.num_tokens_since_fired[::3] = trainer.dead_feature_threshold
            trainer.update(s + 1, data(16, D, seed=s))
            assert auxk_alpha == 0 or trainer.dead_features > 0
        after = trainer.ae.named_parameters()
        states.append({name: p.detach() - before[name] for name, p in after})
    for name, moved in states[0].items():
        assert (states[1][name] - moved).norm() <= 1e-3 * moved.norm(), name


def test_the_fused_trainer_refuses_other_classes():
    with pytest.raises(ValueError, match="dict_class must be ksae's AutoEncoderTopK"):
        ours.TopKTrainer(9, D, F, K, 0, "none", Original, warmup_steps=1, device="cpu", fused=True)


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
