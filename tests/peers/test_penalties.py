# SPDX-License-Identifier: Apache-2.0
"""ReLU, Gated and GroupMax beside the libraries' own classes: their files both ways, their losses,
and dictionary_learning's annealing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dictionary_learning.utils
import pytest
import sae_lens
import sparsify
import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)

import ksae
from ksae.interop import convert

D, F, K = 16, 40, 4
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
TRAINERS = {AutoEncoder: "StandardTrainer", GatedAutoEncoder: "GatedSAETrainer"}


def randomize(module: torch.nn.Module) -> Any:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / D**0.5)
    return module


def saelens(kind: Any, config: Any) -> tuple[Callable[[Path], Any], Callable[[Path], Any]]:
    def write(path: Path) -> Any:
        sae = randomize(kind(config(d_in=D, d_sae=F)))
        sae.save_model(path)
        return sae

    return write, sae_lens.SAE.load_from_disk


def dl(kind: Any) -> tuple[Callable[[Path], Any], Callable[[Path], Any]]:
    def write(path: Path) -> Any:
        path.mkdir()
        sae = randomize(kind(D, F))
        torch.save(sae.state_dict(), path / "ae.pt")
        trainer = {"dict_class": kind.__name__, "trainer_class": TRAINERS[kind]}
        (path / "config.json").write_text(json.dumps({"trainer": trainer}))
        return sae

    def read(path: Path) -> Any:
        return dictionary_learning.utils.load_dictionary(str(path), device="cpu")[0]

    return write, read


LIBRARIES: dict[str, Any] = {
    "saelens standard": (*saelens(StandardSAE, StandardSAEConfig), ksae.ReLU, "saelens"),
    "saelens gated": (*saelens(GatedSAE, GatedSAEConfig), ksae.Gated, "saelens"),
    "dl standard": (*dl(AutoEncoder), ksae.ReLU, "dictionary-learning"),
    "dl gated": (*dl(GatedAutoEncoder), ksae.Gated, "dictionary-learning"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LIBRARIES)
def test_files(name: str, tmp_path: Path) -> None:
    write, read, kind, form = LIBRARIES[name]
    theirs = write(tmp_path / "a")
    ours = ksae.load(tmp_path / "a").eval()
    assert isinstance(ours.activation, kind) and ours.mean_active == torch.inf
    torch.testing.assert_close(ours(X).recon, theirs(X))
    torch.testing.assert_close(ours.encode_dense(X), theirs.encode(X))
    ours.save(tmp_path / "m")
    convert.convert(tmp_path / "m", tmp_path / "b", form)
    torch.testing.assert_close(read(tmp_path / "b")(X), theirs(X))


@torch.no_grad()
def test_sparsify_groupmax(tmp_path: Path) -> None:
    config = sparsify.SparseCoderConfig(num_latents=F, k=K, activation="groupmax")
    theirs = randomize(sparsify.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path / "a")
    ours = ksae.load(tmp_path / "a").eval()
    assert ours.activation == ksae.GroupMax(K)
    acts, indices, _ = theirs.encode(X)
    dense = torch.zeros(len(X), F).scatter(1, indices, acts)
    torch.testing.assert_close(ours.encode_dense(X), dense)
    ours.save(tmp_path / "m")
    convert.convert(tmp_path / "m", tmp_path / "b", "sparsify")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "b")
    torch.testing.assert_close(again.encode(X)[0], acts)


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_loss_of_saelens_standard() -> None:
    """Its sum over d, mean over tokens is ksae's mean over elements times d."""
    torch.manual_seed(0)
    theirs = randomize(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F)))
    ours = ksae.SAE(D, F, ksae.ReLU(0.3 / D), loss="mse", auxk_alpha=0.0)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            value = getattr(theirs, name)
            getattr(ours, name).copy_(value.T if name == "W_enc" else value)
    step = TrainStepInput(X, {"l1": 0.3}, None, 0, False)
    out = theirs.training_forward_pass(step)
    loss = ours(X).loss
    torch.testing.assert_close(D * loss, out.loss)
    want, got = gradients(out.loss, theirs), gradients(D * loss, ours)
    for name, g in got.items():
        torch.testing.assert_close(g, want[name].T if name == "W_enc" else want[name])


@pytest.mark.parametrize("kind", ["standard", "gated"])
def test_the_loss_of_dictionary_learning(kind: str) -> None:
    torch.manual_seed(0)
    common = {
        "steps": 10,
        "activation_dim": D,
        "dict_size": F,
        "layer": 0,
        "lm_name": "x",
        "warmup_steps": 0,
    }
    made = {"standard": StandardTrainer, "gated": GatedSAETrainer}[kind]
    trainer = made(**common, l1_penalty=0.3, sparsity_warmup_steps=None, device="cpu")
    theirs = randomize(trainer.ae)
    activation = {"standard": ksae.ReLU, "gated": ksae.Gated}[kind](0.3 / D, decoder_norm=False)
    ours = ksae.SAE(D, F, activation, loss="mse", auxk_alpha=0.0)
    names = {
        "standard": {"bias": "b_dec", "encoder.bias": "b_enc"},
        "gated": {
            "decoder_bias": "b_dec", "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag",
        },
    }[kind] | {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = parameter.T if name == "decoder.weight" else parameter
            getattr(ours, names[name]).copy_(value)
    want_loss, loss = trainer.loss(X, 1), ours(X).loss
    torch.testing.assert_close(D * loss, want_loss)
    want, got = gradients(want_loss, theirs), gradients(D * loss, ours)
    for name, g in want.items():
        torch.testing.assert_close(got[names[name]], g.T if name == "decoder.weight" else g)


@pytest.mark.parametrize("root", [True, False], ids=["Lp", "Lp^p"])
def test_annealing_is_panneals(root: bool) -> None:
    """Its penalty of every batch, of a dictionary that does not move."""
    trainer = PAnnealTrainer(
        steps=30, activation_dim=D, dict_size=F, layer=0, lm_name="x", device="cpu", warmup_steps=0,
        sparsity_warmup_steps=None, sparsity_function="Lp" if root else "Lp^p",
        initial_sparsity_penalty=0.3, anneal_start=4, anneal_end=22, p_start=1.0, p_end=0.4,
        n_sparsity_updates=5, sparsity_queue_length=3,
    )  # fmt: skip
    ae = randomize(trainer.ae)
    activation = ksae.ReLU(0.3, False, p_end=0.4, p_steps=(4, 22), updates=5, queue=3, root=root)
    ours = ksae.SAE(D, F, activation, loss="mse", auxk_alpha=0.0)
    with torch.no_grad():
        ours.W_enc.copy_(ae.encoder.weight)
        ours.W_dec.copy_(ae.decoder.weight.T)
        ours.b_enc.copy_(ae.encoder.bias)
        ours.b_dec.copy_(ae.bias)
    step = ksae.TrainStep(ours, lr=0.0)
    ours.set_decoder_norm_to_unit_norm()
    for t in range(30):
        x = torch.randn(50, D, generator=torch.Generator().manual_seed(t))
        trainer.loss(x, t)
        metrics = step(x)
        with torch.no_grad():
            error = (ours.eval()(x).recon - x).square().mean()
            ours.train()
        got = float(metrics["loss"] - error)
        assert got == pytest.approx(float(trainer.scaled_lp_loss.detach()), rel=1e-4), t
    assert trainer.p == pytest.approx(0.4)
