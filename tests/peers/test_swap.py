# SPDX-License-Identifier: Apache-2.0
"""accelerate and accelerated on the installed libraries."""

from __future__ import annotations

import dictionary_learning.trainers.top_k as dl
import pytest
import sae_lens
import sparsify
import torch
from agree import assert_same_curve, build, data
from sparsify.sparse_coder import SparseCoder as SparsifyCoder

from ksae.interop import accelerate, accelerated

D, F, K = 16, 128, 4


def coder():
    return SparsifyCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K))


def trained_by(model, optimizer, steps):
    losses = []
    for s in steps:
        x = data(256, D, seed=s)
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        loss = (out - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


MAKE = {
    "sparsify": (coder, "ksae.interop.sparsify.SparseCoder"),
    "dictionary_learning": (
        lambda: dl.AutoEncoderTopK(D, F, K),
        "ksae.interop.dictionary_learning.AutoEncoderTopK",
    ),
    "sae_lens": (
        lambda: sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)),
        "ksae.interop.saelens.topk.TopKTrainingSAE",
    ),
    "sae_lens inference": (
        lambda: sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=K)),
        "ksae.interop.saelens.topk.TopKSAE",
    ),
}


@pytest.mark.parametrize("library", MAKE)
def test_a_live_model_trains_on_with_its_optimizer(library):
    make, ours = MAKE[library]
    curves = []
    for swap in (False, True):
        model = torch.nn.ModuleDict({"a": build(make), "b": torch.nn.Linear(2, 2)})
        before = {name: id(p) for name, p in model.named_parameters()}
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        losses = trained_by(model["a"], optimizer, range(10))
        if swap:
            assert accelerate(model) == {"a": ours}
            assert accelerate(model) == {}
        losses += trained_by(model["a"], optimizer, range(10, 60))
        assert before == {name: id(p) for name, p in model.named_parameters()}
        curves.append(losses)
    assert_same_curve(curves)


def test_a_script_gets_ours_and_the_names_come_back():
    originals = sparsify.SparseCoder, dl.AutoEncoderTopK, sae_lens.TopKTrainingSAE
    cfg = sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    with accelerated("sparsify"), accelerated("dictionary_learning"), accelerated("sae_lens"):
        assert sparsify.SparseCoder.__module__ == "ksae.interop.sparsify"
        trainer = dl.TopKTrainer(10, D, F, K, 0, "none", warmup_steps=1, device="cpu")
        assert type(trainer.ae).__module__ == "ksae.interop.dictionary_learning"
        sae = sae_lens.TrainingSAE.from_dict(cfg.to_dict())
        assert type(sae).__module__ == "ksae.interop.saelens.topk"
    assert originals == (sparsify.SparseCoder, dl.AutoEncoderTopK, sae_lens.TopKTrainingSAE)
    trainer = dl.TopKTrainer(10, D, F, K, 0, "none", warmup_steps=1, device="cpu")
    assert type(trainer.ae) is dl.AutoEncoderTopK
    assert type(sae_lens.TrainingSAE.from_dict(cfg.to_dict())) is sae_lens.TopKTrainingSAE
