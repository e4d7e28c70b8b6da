# SPDX-License-Identifier: Apache-2.0
"""ksae.interop.saelens beside sae-lens."""

from __future__ import annotations

import pytest
import sae_lens
import torch
from agree import assert_agree, assert_same_curve, copies, data, gradients
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from ksae.interop import lazy, saelens

N, D, F, K = 40, 16, 128, 4
DEAD = torch.arange(F) % 3 == 0


def models(sparse=False, **settings):
    """Ours, the library's, the library's in float64: training classes of the same weights.

    The library's are dense: its sparse step cannot be differentiated where it rescales.
    """
    torch.manual_seed(0)
    cfg = {"d_in": D, "d_sae": F, "k": K, **settings}
    own = saelens.TopKTrainingSAEConfig(**cfg, use_sparse_activations=sparse)
    ours = saelens.TopKTrainingSAE(own)
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**cfg))
    exact = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(dtype="float64", **cfg))
    copies(theirs, ours)
    exact.load_state_dict(theirs.state_dict())
    return ours, theirs, exact


def step(model, dead):
    x = data(N, D).to(model.dtype)
    out = model.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    assert type(out) is TrainStepOutput
    torch.testing.assert_close(out.loss, sum(out.losses.values()))
    out.loss.backward()
    acts = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts * 1
    return {"out": out.sae_out, "acts": acts, **out.losses}, gradients(model), out


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "not centred"])
def test_a_training_step_is_the_originals(rescale, sparse, centred):
    options = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": centred}
    runs = [step(m, DEAD) for m in models(sparse, **options)]
    assert_agree("step", *(values for values, _, _ in runs))
    assert_agree("gradient", *(grads for _, grads, _ in runs))
    hidden = [out.hidden_pre * 1 for _, _, out in runs]
    assert_agree("hidden", *({"pre": h} for h in hidden))
    assert runs[0][2].feature_acts.is_sparse == sparse


def test_nothing_dense_is_built_in_a_step():
    ours, _, _ = models()
    x = data(N, D)
    out = ours.training_forward_pass(TrainStepInput(x, {}, DEAD, 0, False))
    out.loss.backward()
    assert isinstance(out.feature_acts, lazy.Code) and not out.feature_acts.built
    assert isinstance(out.hidden_pre, lazy.PreActivations) and not out.hidden_pre.built


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
def test_the_gradients_for_codes_and_pre_activations_are_the_originals(rescale):
    runs = []
    for model in models(rescale_acts_by_decoder_norm=rescale):
        step_input = TrainStepInput(data(N, D).to(model.dtype), {}, DEAD, 0, False)
        out = model.training_forward_pass(step_input)
        grads = torch.autograd.grad(out.loss, [out.feature_acts, out.hidden_pre])
        runs.append(dict(zip(("acts", "hidden"), grads, strict=True)))
        assert not isinstance(out.feature_acts, lazy.Code) or not out.feature_acts.built
    assert_agree("gradient", *runs)


HOOKS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]


def test_hooks_fire_and_change_what_follows():
    ours, theirs, exact = models()
    outs = []
    for model in (ours, theirs, exact):
        seen = {}

        def see(value, hook, seen=seen):
            seen[hook.name] = value.detach().clone()
            return value * 1.5

        names = [*HOOKS, "hook_sae_output"]
        x = data(N, D).to(model.dtype)
        out = model.run_with_hooks(x, fwd_hooks=[(n, see) for n in names])
        assert list(seen) == names
        outs.append({**seen, "out": out})
    assert_agree("hooked", *outs)


def trainer(model, **settings):
    cfg = SAETrainerConfig(
        total_training_samples=60 * 256,
        train_batch_size_samples=256,
        lr=5e-3,
        lr_end=5e-3,
        lr_warm_up_steps=5,
        dead_feature_window=5,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=3,
        **settings,
    )
    return SAETrainer(cfg, model, data_provider=iter(()))


def curve(own):
    """The loss of each step of the trainer's `fit`."""
    losses = []
    step = own.step

    def recorded(batch):
        out = step(batch)
        losses.append(float(out.loss.detach()))
        return out

    own.step = recorded
    own.data_provider = (data(256, D, seed=s) for s in range(1000))
    own.fit()
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "covariance_whitening"},
    ],
    ids=["plain", "scaled input", "whitened input"],
)
def test_the_trainer_has_the_curve_of_the_original(settings):
    ours, theirs, _ = models(**settings)
    curves, trainers = [], []
    for model in (theirs, ours):
        trainers.append(trainer(model))
        curves.append(curve(trainers[-1]))
    assert_same_curve(curves)
    a, b = trainers
    assert torch.allclose(a.act_freq_scores, b.act_freq_scores, rtol=0.05, atol=256)
    x = data(256, D, seed=1000)
    with torch.no_grad():  # what `fit` folded into the weights
        errors = [(model(x) - x).square().sum() for model in (theirs, ours)]
    torch.testing.assert_close(*errors, rtol=0.05, atol=0)


def test_under_autocast_the_curve_stays():
    """bfloat16 rounds each product to 3 digits, so that some selections differ."""
    curves = [curve(trainer(model, autocast=True)) for model in models()[:2]]
    worst = max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))
    assert worst < 0.05


def test_fused_adam_is_the_same_adam(tmp_path):
    """From the beginning, and from a checkpoint whose moments are laid out as the original's."""
    _, theirs, _ = models()
    first = trainer(theirs)
    for s in range(5):
        first.step(data(256, D, seed=s))
    first.save_trainer_state(tmp_path)
    curves = []
    for fused in (False, True):
        for resumed in (False, True):
            ours, _, _ = models()
            own = trainer(ours)
            if resumed:
                ours.load_state_dict(theirs.state_dict())
                own.load_trainer_state(tmp_path)
                own.n_training_samples = 0
            curves.append(curve(saelens.fused_adam(own) if fused else own))
    assert all(group["fused"] for group in own.optimizer.param_groups)
    for plain, fused in zip(curves[:2], curves[2:], strict=True):
        assert_same_curve([plain, fused])


def test_the_registry_and_files(tmp_path):
    ours, theirs, _ = models()
    x = data(N, D)
    ours.save_inference_model(tmp_path / "inference")
    ours.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "theirs")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert type(loaded) is sae_lens.TopKSAE
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training")
    assert type(again) is saelens.TopKTrainingSAE
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    want = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    assert torch.equal(loaded(x), want(x))
    torch.testing.assert_close(again(x), ours(x), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_inputs_normalized_by_token(normalization):
    runs = models(normalize_activations=normalization)
    assert_agree("normalized", *({"x": m(data(N, D).to(m.dtype))} for m in runs))
    x = data(N, D)
    with pytest.raises(ValueError, match="normalize_activations must leave the residual's scale"):
        runs[0].training_forward_pass(TrainStepInput(x, {}, DEAD, 0, False))
    with pytest.raises(ValueError, match="does not support activation normalization"):
        runs[1].training_forward_pass(TrainStepInput(x, {}, DEAD, 0, False))


@torch.no_grad()
def test_the_error_term_completes_the_output():
    ours, _, _ = models()
    with pytest.warns(DeprecationWarning):
        ours.use_error_term = True
    x = data(N, D)
    torch.testing.assert_close(ours(x), x)
    seen = {}
    ours.run_with_hooks(
        x, fwd_hooks=[("hook_sae_error", lambda t, hook: seen.update({hook.name: t}))]
    )
    assert list(seen) == ["hook_sae_error"]


@torch.no_grad()
def test_a_dense_code_is_decoded_as_any_other():
    runs = models()
    outs = []
    for model in runs:
        f = model.encode(data(N, D).to(model.dtype))
        lazily = model.encode_with_hidden_pre(data(N, D).to(model.dtype))[0].detach()
        outs.append(
            {
                "dense": model.decode(f),
                "sparse": model.decode(f.to_sparse()),
                "detached": model.decode(lazily),
            }
        )
    assert_agree("decode", *outs)


def test_a_latent_without_a_decoder_row_adds_nothing():
    ours, theirs, _ = models()
    for model in (ours, theirs):
        model.W_dec.data[5] = 0
    x = data(N, D)
    out = ours(x)
    out.square().sum().backward()
    assert all(g.isfinite().all() for g in gradients(ours).values())
    hooked = ours.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", lambda t, hook: t)])
    torch.testing.assert_close(out, hooked)
    assert theirs(x).isnan().any()  # 0 / 0


@torch.no_grad()
def test_decoder_norms_fold_in_training():
    outs = []
    for model in models():
        model.fold_W_dec_norm()
        x = data(N, D).to(model.dtype)
        outs.append({"x": model(x), **{n: p.detach() for n, p in model.named_parameters()}})
    assert_agree("folded", *outs)
    plain, theirs, _ = models(rescale_acts_by_decoder_norm=False)
    for model in (plain, theirs):
        with pytest.raises(NotImplementedError, match="not safe"):
            model.fold_W_dec_norm()


def test_inference_and_folding():
    _, theirs, _ = models()
    fast, plain, wide = (
        cls(config(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True, dtype=dtype))
        for cls, config, dtype in (
            (saelens.TopKSAE, saelens.TopKSAEConfig, "float32"),
            (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, "float32"),
            (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, "float64"),
        )
    )
    outs = []
    for model in (fast, plain, wide):
        model.load_state_dict(theirs.state_dict())
        x = data(N, D).reshape(2, N // 2, D).to(model.dtype)
        out = {"x": model(x), "f": model.encode(x)}
        model.fold_W_dec_norm()
        outs.append({**out, "folded": model(x), "W_enc": model.W_enc, "W_dec": model.W_dec})
    assert_agree("inference", *outs)
    assert isinstance(fast, sae_lens.TopKSAE)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
def test_a_sparse_code_of_the_training_output_has_its_gradient(rescale):
    """At the entries, what the lazy code has everywhere."""
    x, runs = data(N, D), []
    for sparse in (True, False):
        model = models(sparse, rescale_acts_by_decoder_norm=rescale)[0]
        out = model.training_forward_pass(TrainStepInput(x, {}, DEAD, 0, False))
        loss = (out.sae_out * x).sum()
        (got,) = torch.autograd.grad(loss, [out.feature_acts], allow_unused=True)
        runs.append(got.to_dense() if sparse else got)
        chosen = (out.feature_acts.to_dense() if sparse else out.feature_acts * 1) != 0
    torch.testing.assert_close(*(torch.where(chosen, t, 0) for t in runs))
