# SPDX-License-Identifier: Apache-2.0
"""ksae.interop.overcomplete beside overcomplete."""

from __future__ import annotations

import pickle

import overcomplete
import pytest
import torch
from agree import assert_agree, assert_same_curve, build, copies, data, gradients
from overcomplete.sae import CosineScheduler, mse_l1, train_sae
from overcomplete.sae import TopKSAE as Original
from overcomplete.sae.losses import top_k_auxiliary_loss

from ksae.interop import accelerate, accelerated, lazy
from ksae.interop.overcomplete import DictionaryLayer, TopKSAE

N, D, F, K = 40, 16, 128, 4
SETTINGS = {
    "default": {},
    "multiplier": {"dictionary_params": {"use_multiplier": True, "normalization": "max_l2"}},
    "l1": {"dictionary_params": {"normalization": "l1"}},
    "mlp": {"encoder_module": "mlp_ln_1"},
    "tied": {},
    "untied": {},
}


def make(cls, setting):
    sae = build(lambda: cls(D, F, K, **SETTINGS[setting]))
    return getattr(sae, setting)(bias=setting == "tied") if setting.endswith("tied") else sae


def models(setting):
    """Ours, the library's, and the library's in float64."""
    theirs, ours, exact = make(Original, setting), make(TopKSAE, setting), make(Original, setting)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert vars(ours).keys() == vars(theirs).keys()
    copies(theirs, ours)
    exact.double().load_state_dict(theirs.state_dict())
    return ours, theirs, exact


def outputs(model):
    dtype = model.dictionary._weights.dtype
    x = data(N, D).to(dtype).requires_grad_()
    pre_codes, codes, x_hat = model(x)
    # AuxK reads pre-codes, codes and dictionary
    args = (x, x_hat, pre_codes, codes, model.get_dictionary())
    loss = mse_l1(*args, penalty=0.01) + top_k_auxiliary_loss(*args)
    loss.backward()
    result = {"pre_codes": pre_codes * 1, "codes": codes * 1, "x_hat": x_hat, "loss": loss}
    result |= dict(zip(("pre", "encode"), model.encode(x.detach()), strict=True))
    result["dictionary"] = model.get_dictionary()
    return {name: t.clone() for name, t in result.items()}, gradients(model) | {"x": x.grad}


@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_and_gradients_are_the_originals(setting):
    three = models(setting)
    runs = [outputs(model) for model in three]
    assert_agree(setting, *(values for values, _ in runs))
    assert_agree(f"{setting} gradient", *(grads for _, grads in runs))
    ours, theirs, _ = three
    assert isinstance(ours, Original) and isinstance(ours.dictionary, type(theirs.dictionary))
    assert isinstance(ours.encoder, type(theirs.encoder))
    assert runs[0][0]["codes"].count_nonzero(-1).max() <= K


def test_nothing_dense_is_built_where_nobody_looks():
    ours, _, _ = models("default")
    pre_codes, codes, x_hat = ours(data(N, D))
    x_hat.square().mean().backward()
    assert isinstance(pre_codes, lazy.PreActivations) and not pre_codes.built and not codes.built
    assert (codes > 0).any(dim=0).shape == (F,) and not codes.built


@pytest.mark.parametrize("setting", ["default", "multiplier"])
def test_eval_mode_is_the_originals_and_follows_the_weights(setting):
    three = models(setting)
    outs = []
    for model in three:
        model.eval()
        x = data(N, D).to(model.dictionary._weights.dtype)
        outs.append({"x_hat": model(x)[2], "decode": model.decode(model.encode(x)[1])})
    assert_agree("eval", *outs)
    ours = three[0]
    ours.load_state_dict(make(TopKSAE, setting).state_dict())
    assert torch.equal(ours.get_dictionary(), make(TopKSAE, setting).eval().get_dictionary())


def loader(steps=60):
    return [data(256, D, seed=s) for s in range(steps)]


@pytest.mark.parametrize("setting", ["default", "multiplier", "tied"])
def test_train_sae_has_the_curve_of_the_original(setting):
    curves, r2 = [], []
    for cls in (Original, TopKSAE):
        sae = make(cls, setting)
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
        scheduler = CosineScheduler(optimizer, 5e-3, 1e-4, 100)
        logs = train_sae(
            sae, loader(), mse_l1, optimizer, scheduler, nb_epochs=1, clip_grad=1.0, monitoring=2
        )
        curves.append(logs["step_loss"])
        r2.append([logs[name][-1] for name in ("r2", "z_sparsity", "dead_features", "z_l2")])
    assert_same_curve(curves)
    torch.testing.assert_close(torch.tensor(r2[1]), torch.tensor(r2[0]), rtol=0.02, atol=0.02)


def test_a_live_model_is_swapped_with_its_dictionary():
    model = make(Original, "default")
    exact = make(Original, "default")
    before = [id(p) for p in model.parameters()]
    assert accelerate(model) == {"": "ksae.interop.overcomplete.TopKSAE"} and not accelerate(model)
    assert type(model.dictionary) is DictionaryLayer
    assert before == [id(p) for p in model.parameters()]
    x = data(N, D)
    pre_codes, codes, x_hat = model(x)
    assert not pre_codes.built and not codes.built
    torch.testing.assert_close(x_hat, exact(x)[2], rtol=1e-5, atol=1e-5)


def test_a_script_gets_ours_and_the_names_come_back():
    with accelerated("overcomplete"):
        assert overcomplete.TopKSAE is overcomplete.sae.TopKSAE is TopKSAE
        assert type(make(overcomplete.TopKSAE, "mlp")) is TopKSAE
    assert overcomplete.TopKSAE is overcomplete.sae.TopKSAE is Original


@pytest.mark.parametrize("setting", SETTINGS)
def test_files_are_read_both_ways(setting, tmp_path):
    ours, theirs, _ = models(setting)
    path = tmp_path / "sae.pt"
    for one, other in ((theirs, make(TopKSAE, setting)), (ours, make(Original, setting))):
        torch.save(one.state_dict(), path)
        other.load_state_dict(torch.load(path, weights_only=True))
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_whole_models_are_saved_as_there():
    ours = make(TopKSAE, "default")
    again = pickle.loads(pickle.dumps(ours))
    x = data(N, D)
    assert torch.equal(again(x)[2], ours(x)[2])
