# SPDX-License-Identifier: Apache-2.0
"""TopK transcoders in SAELens: beside dense autograd, and beside its classes where it has one."""

from __future__ import annotations

import pytest
import sae_lens
import torch
from agree import assert_agree, assert_same_curve, copies, data, gradients
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from sae_lens.training.sae_trainer import SAETrainer

import ksae
from ksae.interop import convert, lazy, saelens

N, D, OUT, F, K = 40, 16, 24, 128, 4
DEAD = torch.arange(F) % 3 == 0
KINDS = {
    "plain": (
        saelens.TopKTrainingTranscoder,
        saelens.TopKTrainingTranscoderConfig,
        saelens.TopKTranscoder,
        saelens.TopKTranscoderConfig,
        sae_lens.Transcoder,
        sae_lens.TranscoderConfig,
    ),
    "skip": (
        saelens.TopKTrainingSkipTranscoder,
        saelens.TopKTrainingSkipTranscoderConfig,
        saelens.TopKSkipTranscoder,
        saelens.TopKSkipTranscoderConfig,
        sae_lens.SkipTranscoder,
        sae_lens.SkipTranscoderConfig,
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def training(kind, **settings):
    """A training transcoder with random weights."""
    cls, config = KINDS[kind][:2]
    settings = {"d_in": D, "d_out": OUT, "d_sae": F, "k": K, **settings}
    model = cls(config(**settings))
    copies(model, model)
    return model


def batch(seed=0, N=N):
    return data(N, D + OUT, seed)


def dense(model, dtype, dead):
    """What a training step means: outputs, losses and gradients by dense autograd."""
    p = {n: t.detach().to(dtype).requires_grad_() for n, t in model.named_parameters()}
    x, y = batch().to(dtype).split([D, OUT], dim=-1)
    u = x @ p["W_enc"] + p["b_enc"]
    norm = p["W_dec"].norm(dim=-1) if model.cfg.rescale_acts_by_decoder_norm else torch.ones(F)
    norm = norm.to(dtype)

    def code(scores, k, act):
        values, indices = scores.topk(k)
        return torch.zeros_like(u).scatter(-1, indices, act(values))

    acts = code(u * norm, K, torch.relu)
    out = (acts / norm) @ p["W_dec"] + p["b_dec"]
    out = out + x @ p["W_skip"].T if "W_skip" in p else out
    losses = {"mse_loss": (out - y).square().sum(-1).mean()}
    count, k_aux = int(dead.sum()), OUT // 2
    aux = code(torch.where(dead, u * norm, -torch.inf), min(k_aux, count), lambda v: v)
    error = (aux / norm) @ p["W_dec"] - (y - out).detach()
    weight = min(count / k_aux, 1.0)
    losses["auxiliary_reconstruction_loss"] = weight * error.square().sum(-1).mean()
    grads = torch.autograd.grad(sum(losses.values()), list(p.values()))
    values = {"out": out, "acts": acts, "hidden": u * norm, **losses}
    return values, dict(zip(p, grads, strict=True))


@kinds
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("dead", [DEAD, torch.arange(F) < 5], ids=["many dead", "few dead"])
def test_a_training_step_is_that_of_dense_autograd(kind, rescale, sparse, dead):
    model = training(kind, rescale_acts_by_decoder_norm=rescale, use_sparse_activations=sparse)
    out = model.training_forward_pass(TrainStepInput(batch(), {}, dead, 0, False))
    assert type(out) is TrainStepOutput
    assert torch.equal(out.sae_in, batch()[:, D:])
    assert out.feature_acts.is_sparse == sparse
    assert not out.hidden_pre.built
    torch.testing.assert_close(out.loss, sum(out.losses.values()))
    out.loss.backward()
    acts = out.feature_acts.to_dense() if sparse else out.feature_acts * 1
    got = {"out": out.sae_out, "acts": acts, "hidden": out.hidden_pre * 1, **out.losses}
    (plain, plain_grads), (exact, exact_grads) = (
        dense(model, dtype, dead) for dtype in (torch.float32, torch.float64)
    )
    assert_agree("step", got, plain, exact)
    assert_agree("gradient", gradients(model), plain_grads, exact_grads)


def trainer(model, steps=60):
    cfg = SAETrainerConfig(
        total_training_samples=256 * steps,
        train_batch_size_samples=256,
        lr=5e-3,
        lr_end=5e-3,
        lr_warm_up_steps=5,
        dead_feature_window=5,
    )
    losses = []

    def provider(width):
        for seed in range(steps):
            x = data(256, D, seed)
            yield torch.cat([x, x], dim=-1) if width == 2 * D else x

    width = D + model.cfg.d_out if hasattr(model.cfg, "d_out") else D
    own = SAETrainer(cfg, model, data_provider=provider(width))
    step = own.step

    def recorded(rows):
        out = step(rows)
        losses.append(float(out.loss.detach()))
        return out

    own.step = recorded
    own.fit()
    return own, losses


def test_one_that_predicts_its_input_trains_as_the_librarys_sae():
    """SAELens has no TopK transcoder to compare with, but this one it has."""
    cfg = {"d_in": D, "d_sae": F, "k": K, "apply_b_dec_to_input": False}
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**cfg))
    ours = training("plain", d_out=D)
    copies(theirs, ours)
    curves, trainers = [], []
    for model in (theirs, ours):
        own, losses = trainer(model)
        curves.append(losses)
        trainers.append(own)
    assert_same_curve(curves)
    a, b = trainers
    assert torch.allclose(a.act_freq_scores, b.act_freq_scores, rtol=0.05, atol=256)
    assert a.build_train_step_log_dict(a.step(data(256, D)), 1).keys() == (
        b.build_train_step_log_dict(b.step(torch.cat([data(256, D)] * 2, -1)), 1).keys()
    )


@torch.no_grad()
@kinds
def test_inference_is_the_librarys_with_its_topk(kind):
    _, _, cls, config, original, original_config = KINDS[kind]
    models = []
    for dtype in ("float32", "float64"):
        cfg = original_config(D, F, dtype=dtype, d_out=OUT, apply_b_dec_to_input=False)
        models.append(original(cfg))
        models[-1].activation_fn = TopK(K)
    plain, exact = models
    ours = cls(config(D, F, d_out=OUT, k=K))
    copies(plain, ours)
    exact.load_state_dict(plain.state_dict())
    assert isinstance(ours, original)
    assert ours.d_out == OUT
    outs = []
    for model in (ours, plain, exact):
        x = data(N, D).reshape(2, N // 2, D).to(model.dtype)
        out, acts = model.forward_with_activations(x)
        outs.append({"x": model(x), "f": model.encode(x), "out": out, "acts": acts})
    assert_agree("inference", *outs)
    assert not isinstance(outs[0]["acts"], lazy.LazyDense)
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm must be True"):
        ours.fold_W_dec_norm()


HOOKS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]


@torch.no_grad()
@kinds
def test_hooks_fire_and_change_what_follows(kind):
    _, _, cls, config, original, original_config = KINDS[kind]
    ours = cls(config(D, F, d_out=OUT, k=K))
    copies(ours, ours)
    outs = [ours]
    for dtype in ("float32", "float64"):
        cfg = original_config(D, F, dtype=dtype, d_out=OUT, apply_b_dec_to_input=False)
        outs.append(original(cfg))
        outs[-1].activation_fn = TopK(K)
        outs[-1].load_state_dict(ours.state_dict())
    for i, model in enumerate(outs):
        seen = {}

        def see(value, hook, seen=seen):
            seen[hook.name] = value.detach().clone()
            return value * 1.5

        x = data(N, D).to(model.dtype)
        out = model.run_with_hooks(x, fwd_hooks=[(name, see) for name in HOOKS])
        assert list(seen) == HOOKS
        outs[i] = {**seen, "out": out}
    assert_agree("hooked", *outs)
    assert "hook_sae_output" in ours.run_with_cache(data(N, D))[1]


def test_the_output_is_a_function_of_the_returned_activations():
    model = training("skip")
    out, acts = model.forward_with_activations(data(N, D))
    (grad,) = torch.autograd.grad(out.sum(), acts)
    want = model.W_dec.sum(-1) / model.W_dec.norm(dim=-1)
    torch.testing.assert_close(grad, want.expand(N, F), rtol=1e-4, atol=1e-5)


@kinds
def test_the_registry_and_files(kind, tmp_path):
    cls, _, inference_cls = KINDS[kind][:3]
    ours = training(kind, hook_name_out="blocks.0.hook_mlp_out")
    ours.save_model(tmp_path / "training")
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training")
    assert type(again) is cls
    assert again.cfg.to_dict() == ours.cfg.to_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    ours.save_inference_model(tmp_path / "inference")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert type(loaded) is inference_cls
    assert loaded.cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out"
    x = data(N, D)
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))
        torch.testing.assert_close(loaded(x), ours(x), rtol=1e-5, atol=1e-5)
        loaded.fold_W_dec_norm()
        torch.testing.assert_close(loaded(x), ours(x), rtol=1e-5, atol=1e-5)
    assert type(sae_lens.TrainingSAE.from_dict(ours.cfg.to_dict())) is cls


@torch.no_grad()
@kinds
def test_files_go_to_ksae_and_come_back(kind, tmp_path):
    model = ksae.Transcoder(D, OUT, F, K, skip=kind == "skip")
    copies(model, model)
    x = data(N, D)
    model.save(tmp_path / "a.safetensors")
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b", "saelens")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "b")
    assert type(loaded) is KINDS[kind][2]
    torch.testing.assert_close(loaded(x), model(x).recon, rtol=1e-5, atol=1e-5)
    ours = training(kind, rescale_acts_by_decoder_norm=False)
    ours.save_inference_model(tmp_path / "c")
    torch.testing.assert_close(ksae.load(tmp_path / "c")(x).recon, ours(x), rtol=1e-5, atol=1e-5)
    ours = training(kind)
    ours.save_inference_model(tmp_path / "d")
    convert.convert(tmp_path / "d", tmp_path / "e.safetensors", "ksae", fold=True)
    loaded = ksae.load(tmp_path / "e.safetensors")
    torch.testing.assert_close(loaded(x).recon, ours(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused():
    config = saelens.TopKTrainingTranscoderConfig
    sizes = {"d_in": D, "d_out": OUT, "d_sae": F, "k": K}
    with pytest.raises(ValueError, match="apply_b_dec_to_input must be False"):
        config(**sizes, apply_b_dec_to_input=True)
    with pytest.raises(ValueError, match="normalize_activations must be 'none', got 'layer_norm'"):
        config(**sizes, normalize_activations="layer_norm")
    with pytest.raises(ValueError, match=r"sae_in must be of width d_in \+ d_out = 40.*\[40, 16\]"):
        training("plain").training_forward_pass(
            TrainStepInput(data(N, D), {}, None, 0, False),
        )


@pytest.mark.parametrize(
    ("cls", "config"),
    [*saelens.INFERENCE, *saelens.TRAINING],
    ids=lambda c: c.__name__ if "Config" not in c.__name__ else "",
)
def test_every_class_is_rebuilt_from_its_config(cls, config):
    transcodes = {"d_out": OUT} if hasattr(config(d_in=D, d_sae=F), "d_out") else {}
    model = cls(config(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True, **transcodes))
    again = cls.from_dict(model.cfg.to_dict())
    assert type(again) is cls and type(again.cfg) is config
    assert again.cfg.to_dict() == model.cfg.to_dict() and again.cfg.k == K
