# SPDX-License-Identifier: Apache-2.0
"""sparsify's own Trainer, from a language model to files, on our class."""

from __future__ import annotations

import pytest
import sparsify
import torch
from agree import assert_same_curve
from datasets import Dataset
from sparsify.sparse_coder import SparseCoder as Original
from transformers import GPTNeoXConfig, GPTNeoXModel

import ksae
from ksae.interop import accelerated
from ksae.interop.sparsify import SparseCoder

D, F, K, CONTEXT, ROWS, STEPS = 32, 128, 4, 16, 16, 60
HOOK = "layers.0"


@pytest.fixture(scope="module")
def language_model():
    """Two layers of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2}
    cfg = GPTNeoXConfig(**sizes, num_attention_heads=2, vocab_size=64)
    return GPTNeoXModel(cfg).eval()


@pytest.fixture(autouse=True)
def precision():
    """`fit` lowers that of float32 products, for the whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def fit(language_model, folder, settings, **train):
    """A trained coder of the library's Trainer, and the loss of each step."""
    rows = torch.randint(64, (STEPS * ROWS, CONTEXT), generator=torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    cfg = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=F, k=K, **settings),
        batch_size=ROWS,
        hookpoints=[HOOK],
        lr=5e-3,
        lr_warmup_steps=5,
        dead_feature_threshold=2000,
        log_to_wandb=False,
        save_dir=str(folder),
        run_name="run",
        **train,
    )
    trainer = sparsify.Trainer(cfg, dataset, language_model)
    (coder,) = trainer.saes.values()
    # AuxK reaches the encoder of ours alone: there, the original is not what to compare with.
    coder.compat = cfg.auxk_alpha > 0
    losses, aux = [], []
    coder.register_forward_hook(lambda m, args, out: losses.append(float(out.fvu.detach())))
    coder.register_forward_hook(lambda m, args, out: aux.append(float(out.auxk_loss.detach())))
    trainer.fit()
    assert any(aux) == coder.compat
    return coder, losses


RUNS = {
    "adam": ({}, {"optimizer": "adam"}),
    "signum": ({}, {"optimizer": "signum"}),
    "skip transcoder": ({"transcode": True, "skip_connection": True}, {"optimizer": "adam"}),
    "chunks": ({}, {"optimizer": "adam", "micro_acc_steps": 2}),
    "AuxK": ({}, {"optimizer": "adam", "auxk_alpha": 1 / 32}),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_trainer_has_the_curve_of_the_original(run, language_model, tmp_path):
    settings, train = RUNS[run]
    theirs, curve = fit(language_model, tmp_path / "theirs", settings, **train)
    assert type(theirs) is Original
    with accelerated("sparsify"):
        ours, own = fit(language_model, tmp_path / "ours", settings, **train)
    assert type(ours) is SparseCoder
    assert_same_curve([curve, own])
    # Its files hold what `signum` averaged. The library reads those of ours, ksae those of both.
    for name in ("theirs", "ours"):
        coder = Original.load_from_disk(tmp_path / name / "run" / HOOK)
        model = ksae.load(tmp_path / name / "run" / HOOK)
        for own, value in (("W_enc", coder.encoder.weight), ("W_dec", coder.W_dec)):
            assert torch.equal(getattr(model, own), value), own
