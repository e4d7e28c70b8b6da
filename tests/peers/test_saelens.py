# SPDX-License-Identifier: Apache-2.0
"""ksae.interop.saelens beside sae-lens."""

from __future__ import annotations

import pytest
import sae_lens
import torch
from agree import assert_agree, assert_same_curve, copies, data, gradients
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from ksae.interop import lazy, saelens

N, D, F, K = 40, 16, 128, 4
DEAD = torch.arange(F) % 3 == 0


def models(sparse=False, **settings):
    """Ours, the library's, the library's in float64: training classes of the same weights.

    The library's are dense: its sparse step cannot be differentiated where it rescales.
    """
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


def trainer(model):
    cfg = SAETrainerConfig(
        total_training_samples=10**6,
        train_batch_size_samples=256,
        lr=5e-3,
        lr_end=5e-3,
        lr_warm_up_steps=5,
        dead_feature_window=5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg, model, data_provider=iter(()))


def test_the_trainer_has_the_curve_of_the_original():
    ours, theirs, _ = models()
    curves, trainers = [], []
    for model in (theirs, ours):
        own = trainer(model)
        curves.append([])
        for s in range(60):
            curves[-1].append(float(own.step(data(256, D, seed=s)).loss.detach()))
            own.n_training_steps += 1
        trainers.append(own)
    assert_same_curve(curves)
    a, b = trainers
    assert torch.allclose(a.act_freq_scores, b.act_freq_scores, rtol=0.05, atol=256)


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
