# SPDX-License-Identifier: Apache-2.0
"""The drop-in classes without the libraries: shapes, meaning, lazily dense tensors."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch
from cases import assert_close, randn
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as nnf

from ksae.errors import UserError
from ksae.interop import accelerate, accelerated, lazy, libraries, openai, sparse
from ksae.interop.dictionary_learning import AutoEncoderTopK
from ksae.interop.sparsify import SparseCoder, SparseCoderConfig

N, D, F, K = 19, 16, 64, 4


# ------------------------------------------------------------------------------------ lazily dense


def pre_activations(relu, scaled=False, dtype=torch.float32):
    """A lazy tensor and the dense one, over weights that want gradients."""
    x = randn(N, D, seed=1).to(dtype)
    W, b, c = (randn(*s, seed=i).to(dtype) for i, s in enumerate([(F, D), (F,), (D,)], start=2))
    scale = randn(F, seed=6).abs().to(dtype) + 0.5 if scaled else None
    for t in (W, b, c):
        t.requires_grad_()
    u = nnf.linear(x - c, W, b)
    u = u if scale is None else u * scale
    return lazy.PreActivations(x, W, b, c, relu=relu, scale=scale), u.relu() if relu else u, W


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_dead_topk_is_that_of_the_dense_tensor(relu, scaled):
    mask = torch.arange(F) % 2 == 0
    got, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        u, dense, W = pre_activations(relu, scaled, dtype)
        for t in (u, dense):
            dead = torch.where(mask[None], t, -torch.inf)
            values, indices = dead.topk(5, sorted=False)
            code = torch.zeros_like(t).scatter_(-1, indices, values)
            got.append(code.clone())
            gradients.append(torch.autograd.grad(code.square().sum(), W)[0])
        assert not u.built
    assert_close("code", got[0], got[1], got[3])
    assert_close("gradient", gradients[0], gradients[1], gradients[3])


def test_entries_are_built_once_and_can_be_changed():
    u, dense, W = pre_activations(relu=False)
    assert isinstance(u, torch.Tensor) and not u.built
    assert u.shape == dense.shape and u.dtype == dense.dtype and u.requires_grad
    assert len(u) == N and u.numel() == N * F and not u.built
    assert torch.equal(u * 1, dense) and u.built
    u[0] = 7
    assert torch.equal(u[0], torch.full((F,), 7.0))
    assert torch.equal(torch.cat([u, u])[N:], u.dense())
    (u.sum()).backward()
    assert W.grad is not None


def test_a_code_counts_without_its_zeros():
    values, indices = randn(N, K, seed=1).relu(), torch.arange(N * K).reshape(N, K) % F
    code = lazy.code(values, indices, F)
    dense = torch.zeros(N, F).scatter(1, indices, values)
    fired = code.bool().float()
    assert torch.equal(fired.sum(-2), dense.bool().float().sum(-2))
    assert torch.equal((code > 0).sum(0), (dense > 0).sum(0))
    assert torch.equal(fired.sum(-1), dense.bool().float().sum(-1))
    assert not code.built and lazy.known(code) is not None
    assert torch.equal(code @ torch.eye(F), dense)
    assert lazy.known(code) is None  # somebody has seen it: it is an ordinary tensor from here


@pytest.mark.parametrize("threshold", [0, 0.25], ids=str)
def test_the_bookkeeping_of_loops_needs_no_zeros(threshold):
    values, indices = randn(N, K, seed=1), torch.arange(N * K).reshape(N, K) % F
    dense = torch.zeros(N, F).scatter(1, indices, values)
    kept = []
    for code in (lazy.code(values, indices, F), dense):
        answers = [
            (torch.abs(code) >= (threshold or 1e-6)).float().sum(0),
            torch.mean((code.abs() > threshold).float(), 0),
            torch.mean(code.abs(), dim=-1),
            (code > threshold).any(dim=0),
            (code.square() > threshold).any(),
            code.square().sum(),
            code.mean(),
        ]
        assert code is dense or not code.built
        kept.append(answers)
    for got, expected in zip(*kept, strict=True):
        torch.testing.assert_close(got, expected)
    code = lazy.code(values, indices, F)
    assert torch.equal(code >= 0, dense >= 0) and code.built  # zeros pass: they must be there


def test_pre_activations_of_changed_weights_are_refused():
    u, _, W = pre_activations(relu=True)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match="read before the weights change"):
        u.sum()


def test_code_below_python_gets_the_entries():
    u, dense, _ = pre_activations(relu=True)
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        assert torch.equal(torch.relu(u), dense)


# --------------------------------------------------------------------------------------- libraries


def test_a_version_outside_the_tested_range_warns_once(monkeypatch):
    monkeypatch.setitem(libraries.LIBRARIES, "torch", libraries.Library("torch", (0, 1), (0, 2)))
    monkeypatch.setattr(libraries, "_warned", set())
    with pytest.warns(UserWarning, match=r"torch must be of version >= 0\.1, < 0\.2"):
        assert libraries.installed("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert libraries.installed("torch")
    assert not libraries.installed("no_such_library")


def test_an_import_leaves_torchs_fake_tensors_alone(tmp_path, monkeypatch):
    """nnsight 0.3 changes them, and compiling then fails with today's torch."""
    (tmp_path / "meddler.py").write_text(
        "from torch._subclasses.fake_tensor import FakeTensor\n"
        "FakeTensor.__new__ = lambda cls, fake_mode, elem, device, constant=None: elem\n"
        "FakeTensor.__bool__ = lambda self: True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(vars(FakeTensor))
    assert libraries.module("meddler").FakeTensor is FakeTensor
    assert dict(vars(FakeTensor)) == before
    monkeypatch.delitem(sys.modules, "meddler")


# ----------------------------------------------------------------------------------------- SAELens


def test_saelens_needs_the_library(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("ksae.interop.saelens")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"ksae\.interop\.saelens: sae-lens must be installed"):
        importlib.import_module("ksae.interop.saelens")


def test_selection_by_decoder_norms():
    """By u * scale, values relu(u): NaN stays NaN, a latent of scale 0 has value 0."""
    x, W, b = randn(N, D, seed=1), randn(F, D, seed=2), randn(F, seed=3)
    x[3, 2] = torch.nan
    scale = randn(F, seed=4).abs()
    scale[::5] = 0
    outs = []
    for dtype in (torch.float32, torch.float64):
        u = nnf.linear(x.to(dtype), W.to(dtype), b.to(dtype))
        values, indices = (u * scale.to(dtype)).topk(K)
        values = torch.where(values == 0, 0, u.gather(1, indices)).relu()
        outs.append(torch.zeros_like(u).scatter(1, indices, values)[x.isfinite().all(1)])
    values, indices = sparse.scaled_topk(x, W, b, scale, K)
    assert values[3].isnan().all()
    code = sparse.scatter(values, indices, F)[x.isfinite().all(1)]
    assert_close("code", code, *outs)


# ---------------------------------------------------------------------------------------- sparsify


def test_sparsify_auxk_and_multi_topk_reach_the_encoder():
    torch.manual_seed(0)
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, multi_topk=True))
    x = randn(N, D, seed=1)
    for field in ("auxk_loss", "multi_topk_fvu"):
        sae.zero_grad()
        out = sae(x, dead_mask=torch.arange(F) % 2 == 0)
        getattr(out, field).backward()
        assert sae.encoder.weight.grad.abs().sum() > 0
        assert out.latent_acts.shape == (N, K)


def test_sparsify_groupmax_takes_one_of_each_group():
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, activation="groupmax"))
    out = sae.encode(randn(N, D, seed=1))
    groups = out.top_indices // (F // K)
    assert torch.equal(groups, torch.arange(K).expand(N, K))
    assert torch.equal(out.top_acts, out.pre_acts.unflatten(-1, (K, -1)).amax(-1))


def test_sparsify_files(tmp_path):
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, skip_connection=True))
    sae.save_to_disk(tmp_path / "layers.10")
    sae.save_to_disk(tmp_path / "layers.9")
    loaded = SparseCoder.load_many(str(tmp_path), local=True)
    assert list(loaded) == ["layers.9", "layers.10"]
    encoder = SparseCoder.load_from_disk(tmp_path / "layers.9", decoder=False)
    assert encoder.W_dec is None
    x = randn(3, D, seed=1)
    assert torch.equal(loaded["layers.10"](x).sae_out, sae(x).sae_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": F + 1}, r"SparseCoder: k must be in \[1, 64\]"),
        ({"activation": "gelu"}, "SparseCoder: activation must be 'topk' or 'groupmax'"),
    ],
)
def test_sparsify_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseCoder(D, SparseCoderConfig(num_latents=F, **settings))


# --------------------------------------------------------------------------------------------- swap


def test_accelerate_leaves_other_modules_alone():
    assert accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2))) == {}
    with pytest.raises(TypeError, match=r"accelerate: module must be an nn\.Module, got int"):
        accelerate(3)


def test_accelerated_refuses():
    with (
        pytest.raises(ValueError, match="library must be one of sparsify, dictionary_learning"),
        accelerated("torch"),
    ):
        pass


# --------------------------------------------------------------------------------------------- DL


def test_dictionary_learning_parameters_stay_laid_out_by_latent():
    sae = AutoEncoderTopK(D, F, K)
    state = {name: t.clone() for name, t in sae.state_dict().items()}
    sae.load_state_dict(state, assign=True)  # other storage, of other strides
    sae.decoder.weight = torch.nn.Parameter(sae.decoder.weight.detach().contiguous())
    parameter = sae.decoder.weight
    x = randn(N, D, seed=1)
    f, _, _, post_relu = sae.encode(x, return_topk=True)
    sae.decode(f).square().sum().backward()
    assert sae.decoder.weight is parameter and parameter.T.is_contiguous()
    assert parameter.grad.T.is_contiguous() and parameter.grad.shape == (D, F)
    assert not f.built and not post_relu.built
    assert torch.equal(parameter.detach(), state["decoder.weight"])


def test_dictionary_learning_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"AutoEncoderTopK: k must be an integer in \[1, 64\]"):
        AutoEncoderTopK(D, F, 0)
    torch.save(AutoEncoderTopK(D, F, K).state_dict(), tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="AutoEncoderTopK: k must be 4"):
        AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt", k=5)


# ------------------------------------------------------------------------------------------- files


def sparsify_file(path):
    SparseCoder(D, SparseCoderConfig(num_latents=F, k=K)).save_to_disk(path)
    file = path / "sae.safetensors"
    return (
        load_file(file),
        lambda state: save_file(state, file),
        lambda: SparseCoder.load_from_disk(path),
    )


def dictionary_learning_file(path):
    file = path / "ae.pt"
    state = dict(AutoEncoderTopK(D, F, K).state_dict())
    return (
        state,
        lambda state: torch.save(state, file),
        lambda: AutoEncoderTopK.from_pretrained(file),
    )


@pytest.mark.parametrize("kind", [sparsify_file, dictionary_learning_file])
def test_a_bad_file_is_refused_by_name(kind, tmp_path):
    whole, store, load = kind(tmp_path)
    store(whole)
    load()
    for name in (n for n in whole if n not in ("k", "threshold")):
        store({n: t for n, t in whole.items() if n != name})
        with pytest.raises(UserError, match=f"must hold the tensor {name}, got none"):
            load()
    store(whole | {"strange": torch.zeros(1)})
    with pytest.raises(UserError, match="holds strange, which its format does not have"):
        load()
    store(whole | {"b_dec": torch.zeros(D + 1)})
    with pytest.raises(RuntimeError, match="size mismatch for b_dec"):
        load()


# ------------------------------------------------------------------------------------------ OpenAI


@pytest.mark.parametrize("normalize", [True, False], ids=["standardised", "plain"])
def test_openai_autoencoder_is_its_formula(normalize):
    torch.manual_seed(0)
    sae = openai.Autoencoder(F, D, openai.TopK(K), normalize=normalize)
    for p in sae.parameters():
        p.data = (p.data.T + 0.1 * randn(*p.T.shape, seed=3)).T if p.dim() == 2 else p + 0.1
    x = randn(N, D, seed=1)
    outs = []
    for dtype in (torch.float32, torch.float64):
        p = {name: t.detach().to(dtype) for name, t in sae.named_parameters()}
        y = x.to(dtype)
        mu, centred = y.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        std = centred.std(-1, keepdim=True)
        y = centred / (std + 1e-5) if normalize else y
        u = (y - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"]
        values, indices = u.topk(K)
        f = torch.zeros_like(u).scatter(1, indices, values.relu())
        out = f @ p["decoder.weight"].T + p["pre_bias"]
        outs.append((u, f, out * std + mu if normalize else out))
    for got, plain, exact in zip(sae(x), *outs, strict=True):
        assert_close("openai", got.clone(), plain, exact)
    latents, info = sae.encode(x)
    assert_close("decode", sae.decode(latents, info), outs[0][2], outs[1][2])


def test_openai_state_and_fast_autoencoder():
    sae = openai.Autoencoder(F, D, openai.TopK(K), normalize=True)
    again = openai.Autoencoder.from_state_dict(sae.state_dict())
    x = randn(N, D, seed=1)
    assert torch.equal(sae(x)[2], again(x)[2])
    fast = openai.FastAutoencoder(F, D, K, 6, 2)
    for _ in range(4):
        recons, info = fast(x)
    dead = fast.stats_last_nonzero > 2
    assert recons.shape == (N, D) and dead.any()
    assert dead[info["auxk_inds"][info["auxk_vals"] > 0]].all()
    info["auxk_vals"].sum().backward()
    assert fast.encoder.weight.grad.abs().sum() > 0


def test_openai_refuses():
    with pytest.raises(ValueError, match="Autoencoder: activation must be a TopK, got ReLU"):
        openai.Autoencoder(F, D, torch.nn.ReLU())
    with pytest.raises(ValueError, match="Autoencoder: tied must be False"):
        openai.Autoencoder(F, D, openai.TopK(K), tied=True)
