# SPDX-License-Identifier: Apache-2.0
"""Files of the installed libraries: written by them and read by ksae, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dictionary_learning.utils
import numpy as np
import pytest
import sae_lens
import sparsify
import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)

import ksae
from ksae.errors import UserError
from ksae.interop import convert

D, F, K = 16, 40, 4
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1))


def randomize(module: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / D**0.5)


def write_sparsify(path: Path, **options: bool) -> torch.nn.Module:
    config = sparsify.SparseCoderConfig(num_latents=F, k=K, **options)
    coder = sparsify.SparseCoder(D, config)
    randomize(coder)
    coder.save_to_disk(path)
    return coder


def read_sparsify(path: Path) -> torch.nn.Module:
    return sparsify.SparseCoder.load_from_disk(path)


def run_sparsify(coder: torch.nn.Module) -> torch.Tensor:
    # By hand: its forward takes the Triton decoder wherever triton is installed, for CPU tensors.
    acts, indices, _ = coder.encode(X)
    out = sparsify.utils.eager_decode(indices, acts, coder.W_dec.mT) + coder.b_dec
    return out if coder.W_skip is None else out + X @ coder.W_skip.mT


def write_saelens(path: Path, **options: bool) -> torch.nn.Module:
    config = sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=K, **options)
    sae = sae_lens.TopKSAE(config)
    randomize(sae)
    sae.save_model(path)
    return sae


def read_saelens(path: Path) -> torch.nn.Module:
    return sae_lens.SAE.load_from_disk(path)


def write_dl(path: Path) -> torch.nn.Module:
    ae = AutoEncoderTopK(D, F, K)
    randomize(ae)
    save_dl(path, ae)
    return ae


def save_dl(path: Path, ae: torch.nn.Module) -> None:
    path.mkdir()
    torch.save(ae.state_dict(), path / "ae.pt")
    trainer = {"dict_class": type(ae).__name__, "k": K, "lr": 1e-3, "layer": 3, "lm_name": "x"}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d": D}}))


def read_dl(path: Path) -> torch.nn.Module:
    return dictionary_learning.utils.load_dictionary(str(path), "cpu")[0]


def call(module: torch.nn.Module) -> torch.Tensor:
    return module(X)


LIBRARIES = {
    "sparsify": (write_sparsify, read_sparsify, run_sparsify),
    "saelens": (write_saelens, read_saelens, call),
    "dictionary-learning": (write_dl, read_dl, call),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LIBRARIES)
def test_written_by_the_library(name: str, tmp_path: Path) -> None:
    write, _, forward = LIBRARIES[name]
    original = write(tmp_path / "a")
    model = ksae.load(tmp_path / "a")
    assert (type(model), model.d_in, model.d_sae, model.k) == (ksae.TopKSAE, D, F, K)
    torch.testing.assert_close(model(X).recon, forward(original), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", LIBRARIES)
def test_loaded_by_the_library(name: str, tmp_path: Path) -> None:
    _, read, forward = LIBRARIES[name]
    model = ksae.TopKSAE(D, F, K)
    randomize(model)
    model.save(tmp_path / "a.safetensors")
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b", name)
    theirs = read(tmp_path / "b")
    torch.testing.assert_close(forward(theirs), model(X).recon, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("second", LIBRARIES)
@pytest.mark.parametrize("first", LIBRARIES)
def test_from_library_to_library(first: str, second: str, tmp_path: Path) -> None:
    original = LIBRARIES[first][0](tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", second)
    theirs = LIBRARIES[second][1](tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c", first)
    back = LIBRARIES[first][1](tmp_path / "c")
    for key, tensor in original.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    expected = LIBRARIES[first][2](original)
    torch.testing.assert_close(LIBRARIES[second][2](theirs), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sparsify_skip_transcoder(tmp_path: Path) -> None:
    original = write_sparsify(tmp_path / "a", transcode=True, skip_connection=True)
    model = ksae.load(tmp_path / "a")
    assert isinstance(model, ksae.Transcoder)
    torch.testing.assert_close(model(X).recon, run_sparsify(original), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c", "sparsify")
    torch.testing.assert_close(
        run_sparsify(read_sparsify(tmp_path / "c")), model(X).recon, rtol=1e-5, atol=1e-5
    )


def test_sparsify_default_width(tmp_path: Path) -> None:
    config = sparsify.SparseCoderConfig(expansion_factor=3, k=K)
    sparsify.SparseCoder(D, config).save_to_disk(tmp_path / "a")  # num_latents: 0
    assert ksae.load(tmp_path / "a").d_sae == 3 * D


@torch.no_grad()
def test_saelens_scaled_by_decoder_norms(tmp_path: Path) -> None:
    original = write_saelens(tmp_path / "a", rescale_acts_by_decoder_norm=True)
    with pytest.raises(UserError, match="scaling by decoder norms"):
        ksae.load(tmp_path / "a")
    model = ksae.load(tmp_path / "a", fold=True)
    torch.testing.assert_close(model(X).recon, original(X), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_saelens_without_subtracting_the_bias(tmp_path: Path) -> None:
    original = write_saelens(tmp_path / "a", apply_b_dec_to_input=False)
    model = ksae.load(tmp_path / "a")
    assert isinstance(model, ksae.Transcoder)
    torch.testing.assert_close(model(X).recon, original(X), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c", "saelens")
    torch.testing.assert_close(
        read_saelens(tmp_path / "c")(X), model(X).recon, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [BatchTopKSAE, MatryoshkaBatchTopKSAE])
def test_batchtopk_state_dicts(kind: type, tmp_path: Path) -> None:
    groups = ([10, 30],) if kind is MatryoshkaBatchTopKSAE else ()
    original = kind(D, F, K, *groups)
    randomize(original)
    original.threshold.fill_(0.3)
    save_dl(tmp_path / "a", original)
    sae = ksae.load(tmp_path / "a").eval()
    assert sae.activation == ksae.BatchTopK(K, "dictionary_learning")
    assert sae.prefixes == ((10, 40) if groups else ())
    torch.testing.assert_close(sae(X).recon, original(X), rtol=1e-5, atol=1e-5)
    sae.save(tmp_path / "own")
    for source in ("a", "own"):
        convert.convert(tmp_path / source, tmp_path / f"{source}.b", "dictionary-learning")
        back = read_dl(tmp_path / f"{source}.b")
        assert torch.equal(back(X), original(X))
        for key, tensor in original.state_dict().items():
            assert torch.equal(back.state_dict()[key], tensor), key
    model = ksae.load(tmp_path / "a", as_topk=True)
    dense = torch.relu(original.encode(X, use_threshold=False, return_active=True)[2])
    kept = torch.zeros_like(dense).scatter(1, dense.topk(K).indices, 1) * dense
    torch.testing.assert_close(model(X).recon, original.decode(kept), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batchtopk_becomes_the_jumprelu_of_saelens(tmp_path: Path) -> None:
    original = BatchTopKSAE(D, F, K)
    randomize(original)
    original.threshold.fill_(0.3)
    save_dl(tmp_path / "a", original)
    convert.convert(tmp_path / "a", tmp_path / "b", "saelens")
    torch.testing.assert_close(read_saelens(tmp_path / "b")(X), original(X), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_batchtopk_of_saelens_is_read_as_the_jumprelu_it_saves(kind: str, tmp_path: Path) -> None:
    sizes = {"d_in": D, "d_sae": F, "k": K}
    if kind == "batchtopk":
        original: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes))
    else:
        config = MatryoshkaBatchTopKTrainingSAEConfig(**sizes, matryoshka_widths=[10, F])
        original = MatryoshkaBatchTopKTrainingSAE(config)
    randomize(original)
    original.topk_threshold.fill_(0.3)
    original.save_inference_model(tmp_path / "a")
    theirs, model = read_saelens(tmp_path / "a"), ksae.load(tmp_path / "a").eval()
    assert isinstance(model, ksae.SAE) and isinstance(model.activation, ksae.JumpReLU)
    assert torch.equal(model.encode_dense(X) > 0, theirs.encode(X) > 0)
    torch.testing.assert_close(model(X).recon, theirs(X), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "own")
    convert.convert(tmp_path / "own", tmp_path / "b", "saelens")
    torch.testing.assert_close(read_saelens(tmp_path / "b")(X), theirs(X), rtol=1e-5, atol=1e-5)
    convert.convert(tmp_path / "a", tmp_path / "n", "ksae")
    convert.convert(tmp_path / "n", tmp_path / "c", "saelens")
    assert torch.equal(read_saelens(tmp_path / "c")(X), theirs(X))


@torch.no_grad()
@pytest.mark.parametrize("topology", ["sae", "transcoder"])
@pytest.mark.parametrize("prefixes", [None, [10, F]], ids=["batchtopk", "matryoshka"])
def test_batchtopk_of_ksae_in_saelens(
    prefixes: list[int] | None, topology: str, tmp_path: Path
) -> None:
    activation = ksae.BatchTopK(K)
    if topology == "sae":
        model: Any = ksae.SAE(D, F, activation, prefixes=prefixes)
    else:
        model = ksae.Transcoder(D, D, F, activation=activation, prefixes=prefixes)
    randomize(model)
    model.threshold.fill_(0.3)
    model.eval().save(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", "saelens")
    theirs = read_saelens(tmp_path / "b")
    assert theirs.cfg.architecture() == "jumprelu"
    assert torch.equal(theirs.encode(X) > 0, model.encode_dense(X) > 0)
    torch.testing.assert_close(theirs(X), model(X).recon, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_jumprelu_of_dictionary_learning(tmp_path: Path) -> None:
    original = JumpReluAutoEncoder(D, F)
    randomize(original)
    original.threshold.abs_()
    save_dl(tmp_path / "a", original)
    model = ksae.load(tmp_path / "a").eval()
    assert isinstance(model, ksae.Transcoder) and isinstance(model.activation, ksae.JumpReLU)
    assert torch.equal(model.encode_dense(X) > 0, original.encode(X) > 0)
    torch.testing.assert_close(model(X).recon, original(X), rtol=1e-5, atol=1e-5)
    convert.convert(tmp_path / "a", tmp_path / "n", "ksae")
    convert.convert(tmp_path / "n", tmp_path / "s", "saelens")
    convert.convert(tmp_path / "s", tmp_path / "b", "dictionary-learning")
    assert torch.equal(read_dl(tmp_path / "b")(X), original(X))
    assert torch.equal(read_saelens(tmp_path / "s")(X), original(X))


@torch.no_grad()
def test_gemma_scope_files_as_saelens_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = np.random.default_rng(0)
    sizes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    arrays = {n: g.standard_normal(s).astype(np.float32) / 4 for n, s in sizes.items()}
    arrays["threshold"] = np.abs(arrays["threshold"])
    np.savez(tmp_path / "params.npz", **arrays)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(tmp_path / "params.npz"))
    folder = "layer_20/width_16k/average_l0_71"
    config, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", folder
    )
    own = sae_lens.JumpReLUSAEConfig(
        d_in=D, d_sae=F, apply_b_dec_to_input=config["apply_b_dec_to_input"]
    )
    theirs = sae_lens.JumpReLUSAE(own)
    theirs.load_state_dict(state)
    model = ksae.load(tmp_path).eval()
    assert torch.equal(model.encode_dense(X) > 0, theirs.encode(X) > 0)
    torch.testing.assert_close(model(X).recon, theirs(X), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_saelens_transcoders_survive(skip: bool, tmp_path: Path) -> None:
    from sae_lens.saes.transcoder import (
        SkipTranscoder,
        SkipTranscoderConfig,
        Transcoder,
        TranscoderConfig,
    )

    kind, config = (
        (SkipTranscoder, SkipTranscoderConfig) if skip else (Transcoder, TranscoderConfig)
    )
    original = kind(config(d_in=D, d_out=D, d_sae=F, apply_b_dec_to_input=False))
    randomize(original)
    original.save_model(tmp_path / "a")
    torch.testing.assert_close(ksae.load(tmp_path / "a").eval()(X).recon, original(X))
    convert.convert(tmp_path / "a", tmp_path / "b", "circuit-tracer")
    convert.convert(tmp_path / "b", tmp_path / "c", "saelens")
    assert torch.equal(read_saelens(tmp_path / "c")(X), original(X))


OLD_SAELENS = {
    "topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "null": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_name": "a.b"}
    | {"normalize_activations": None},
    "topk in kwargs": {"architecture": "topk", "activation_fn_kwargs": {"k": K}},
    "standard": {"architecture": "standard", "normalize_activations": False},
    "no bias": {"activation_fn_str": "relu", "apply_b_dec_to_input": False},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OLD_SAELENS)
def test_old_folders_are_read_as_saelens_reads_them(name: str, tmp_path: Path) -> None:
    config = OLD_SAELENS[name]
    write_saelens(tmp_path / "a")
    sizes = {"d_in": D, "d_sae": F, "dtype": "float32", "sae_lens_version": "4.1.0"}
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(sizes | config))
    theirs = read_saelens(tmp_path / "a")
    coder = convert.read(tmp_path / "a")[1]
    convert.convert(tmp_path / "a", tmp_path / "b", "saelens")
    assert torch.equal(read_saelens(tmp_path / "b")(X), theirs(X))
    assert coder.activation == {"topk": "topk"}.get(theirs.cfg.architecture(), "relu")
    assert coder.centred == theirs.cfg.apply_b_dec_to_input
    if coder.activation == "topk":
        torch.testing.assert_close(
            ksae.load(tmp_path / "a")(X).recon, theirs(X), rtol=1e-5, atol=1e-5
        )
