# SPDX-License-Identifier: Apache-2.0
"""Classes of libraries that are not there, beside their formulas and on their files."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, randn
from torch.nn import functional as nnf

from ksae.errors import UserError
from ksae.interop import circuit_tracer, convert, nvidia, overcomplete
from ksae.interop.formats import Coder

N, D, F, K = 19, 16, 64, 4


# ------------------------------------------------------------------------------------ overcomplete


def test_overcomplete_is_its_formula_without_the_library():
    torch.manual_seed(0)
    sae = overcomplete.TopKSAE(D, F, K, dictionary_params={"use_multiplier": True})
    x, outs = randn(N, D, seed=1), []
    with torch.no_grad():
        sae.dictionary.multiplier += 0.3
    for dtype in (torch.float32, torch.float64):
        p = {name: t.detach().to(dtype) for name, t in sae.state_dict().items()}
        rows = p["dictionary._weights"]
        rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-8) * p["dictionary.multiplier"].exp()
        W, b = p["encoder.final_block.0.weight"], p["encoder.final_block.0.bias"]
        u = x.to(dtype) @ W.T + b
        values, indices = u.topk(K)
        f = torch.zeros_like(u).scatter(1, indices, values.relu())
        outs.append((u, f, f @ rows))
    for got, plain, exact in zip(sae(x), *outs, strict=True):
        assert_close("overcomplete", got.clone(), plain, exact)
    assert torch.equal(sae.eval()(x)[2], sae.decode(sae(x)[1]))


@pytest.mark.parametrize("tie", [False, True], ids=["default", "tied"])
def test_overcomplete_hooks_on_the_encoder_fire(tie):
    torch.manual_seed(0)
    sae = overcomplete.TopKSAE(D, F, K)
    sae = sae.tied() if tie else sae
    x, seen = randn(N, D, seed=1), []
    expected = sae(x)
    sae.encoder.register_forward_hook(lambda m, args, out: seen.append(out[0].detach()))
    for got, value in zip(sae(x), expected, strict=True):
        torch.testing.assert_close(got.clone(), value.clone())
    assert len(seen) == 1 and seen[0].shape == (N, F)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": F + 1}, r"TopKSAE: top_k must be in \[1, 64\]"),
        ({"input_shape": (2, D)}, "TopKSAE: input_shape must be an integer for a linear encoder"),
        ({"dictionary_params": {"normalization": "l3"}}, "normalization must be a function or one"),
        ({"dictionary_params": {"initializer": torch.zeros(2, 2)}}, r"must be of shape \[64, 16\]"),
    ],
)
def test_overcomplete_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        overcomplete.TopKSAE(**{"input_shape": D, "nb_concepts": F, **arguments})


# ------------------------------------------------------------------------------- formats and files


def coder(**changes):
    sizes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {name: randn(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    return Coder(**{**tensors, "activation": "topk", "k": K, "centred": True, **changes})


def moved(t, dtype):
    return t.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("aggregate", [False, True], ids=["tokens", "batch"])
@pytest.mark.parametrize("normalize", [True, False], ids=["standardised", "plain"])
def test_nvidia_loads_its_file_and_is_its_formula(normalize, aggregate, tmp_path):
    kind = convert.FORMATS["nvidia"].STANDARDIZE if normalize else "none"
    convert.write(coder(normalization=kind), tmp_path / "a.pt", "nvidia")
    file = torch.load(tmp_path / "a.pt", weights_only=True)
    config = {**file["model_config"], "auxk": 5, "aggregate_loss": aggregate}
    sae = nvidia.TopKSAE(**{**config, "dead_tokens_threshold": 10})
    sae.load_state_dict(file["model_state_dict"])
    sae.stats_last_nonzero[::2] = 1000
    before, x, outs = sae.stats_last_nonzero.clone(), randn(N, D, seed=9), []

    def ratio(e, scale):
        if aggregate:
            return e.square().mean() / (scale.square().mean() + 1e-8)
        return (e.square().mean(-1) / (scale.square().mean(-1) + 1e-8)).mean()

    for dtype in (torch.float32, torch.float64):
        p = {name: moved(t, dtype) for name, t in sae.named_parameters()}
        y = x.to(dtype)
        mu, std = y.mean(-1, keepdim=True), y.std(-1, keepdim=True) + 1e-8
        z = (y - mu) / std if normalize else y
        u = ((z - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"]).relu()
        values, indices = u.topk(K)
        codes = torch.zeros_like(u).scatter(1, indices, values)
        inner = codes @ p["decoder.weight"].T + p["pre_bias"]
        recon = inner * std + mu if normalize else inner
        fired = (codes > 1e-3).any(0)
        since = torch.where(fired, 0, before + N)
        dead = u[:, since > 10]
        values, indices = dead.topk(5)
        dead = torch.zeros_like(dead).scatter(1, indices, values)
        residual = (z - inner).detach()
        aux = ratio(dead @ p["decoder.weight"].T[since > 10] - residual, residual)
        total = ratio(recon - y, y - p["pre_bias"]) + aux / 32
        total.backward()
        unexplained = (recon - y).var(0).sum() / (y.var(0).sum() + 1e-8)
        out = {"recon": recon, "codes": codes, "total": total, "aux": aux, "fvu": unexplained}
        out |= {"mse": (recon - y).square().mean(), "variance_explained": 1 - unexplained}
        out["sparsity"] = (codes != 0).sum(-1).to(dtype).mean()
        out["dead_pct"] = (since > 10).to(dtype).mean() * 100
        outs.append(out | {f"gradient of {name}": t.grad for name, t in p.items()})
    loss = sae.loss(x)
    loss["total"].backward()
    recon, codes = sae(x)
    got = {"recon": recon, "codes": codes.clone(), **loss}
    got |= {f"gradient of {name}": t.grad for name, t in sae.named_parameters()}
    assert got.keys() == outs[0].keys()
    for name, value in got.items():
        assert_close(f"nvidia {name}", value, outs[0][name], outs[1][name])
    assert torch.equal(sae.stats_last_nonzero, since)
    assert torch.equal(sae.encode(x), codes)
    sae.post_step()
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(F))
    assert nvidia.TopKSAE(**sae._get_config())._get_config() == sae._get_config()


def test_nvidia_starts_at_the_geometric_median():
    sae = nvidia.TopKSAE(D, F, K, normalize_input=False)
    points = randn(51, D, seed=1)
    points[0] = 1e6  # moves the mean, not the median
    sae.init_pre_bias_from_data(points, eps=1e-5)
    away = points - sae.pre_bias
    assert (away / away.norm(dim=1, keepdim=True)).sum(0).norm() < 0.05  # where forces balance


def test_nvidia_auxk_above_the_latents_takes_what_is_dead():
    torch.manual_seed(0)
    sae = nvidia.TopKSAE(D, F, K, auxk=F + 1)
    same = nvidia.TopKSAE(D, F, K, auxk=7)
    sae.stats_last_nonzero[:7] = 2 * sae.dead_tokens_threshold
    sae.latent_bias.data[:7] = -100  # they stay dead
    same.load_state_dict(sae.state_dict())
    x = randn(N, D, seed=1)
    assert torch.equal(sae.loss(x)["aux"], same.loss(x)["aux"])


@pytest.mark.parametrize("normalize", [True, False], ids=["standardised", "plain"])
def test_nvidia_shows_the_parts_of_its_forward_pass(normalize):
    torch.manual_seed(0)
    sae = nvidia.TopKSAE(D, F, K, normalize_input=normalize)
    sae.pre_bias.data = randn(D, seed=2)
    x = randn(N, D, seed=1)
    out = sae.forward_with_aux(x)
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8) if normalize else x
    u = nnf.linear(z - sae.pre_bias, sae.encoder.weight, sae.latent_bias)
    values, indices = u.topk(K)
    codes = torch.zeros_like(u).scatter(1, indices, values.relu())
    assert torch.equal(out["top_k_indices"], indices)
    torch.testing.assert_close(out["pre_act"].dense(), u)
    pre_act, info = sae.encode_pre_act(x)
    torch.testing.assert_close(pre_act.dense(), u)
    assert info.keys() == out["norm_info"].keys() == ({"mu", "std"} if normalize else set())
    product = nnf.linear(codes, sae.decoder.weight)
    torch.testing.assert_close(sae.decode_without_bias(out["codes"]), product)
    torch.testing.assert_close(sae.decode_without_bias(codes), product)
    torch.testing.assert_close(sae.decode(codes, info), out["recon"])
    torch.testing.assert_close(out["codes"].dense(), codes)


def test_nvidia_refuses():
    with pytest.raises(ValueError, match=r"TopKSAE: top_k must be in \[1, 64\], .* got 65"):
        nvidia.TopKSAE(D, F, F + 1)
    with pytest.raises(ValueError, match="TopKSAE: auxk must be at least 1, got 0"):
        nvidia.TopKSAE(D, F, K, auxk=0)
    with pytest.raises(ValueError, match="decoder_impl must be 'dense' or 'triton', got 'cuda'"):
        nvidia.TopKSAE(D, F, K, decoder_impl="cuda")


TRACED = {
    "topk": {},
    "negative": {"b_enc": randn(F, seed=1) - 8},  # fewer than k pre-activations are positive
    "skip": {"W_skip": randn(D, D, seed=8)},
    "jumprelu": {"activation": "jumprelu", "k": None, "threshold": randn(F, seed=7).abs()},
    "relu": {"activation": "relu", "k": None},
}


@pytest.mark.parametrize("lazily", [True, False], ids=["lazy", "loaded"])
@pytest.mark.parametrize("kind", TRACED)
def test_circuit_tracer_loads_its_file_and_is_its_formula(kind, lazily, tmp_path):
    written = coder(centred=False, **TRACED[kind])
    file = convert.write(written, tmp_path / "a", "circuit-tracer")
    topk = circuit_tracer.TopK(K) if written.activation == "topk" else None

    def load(path):
        lazy_ones = {"lazy_encoder": lazily, "lazy_decoder": lazily}
        return circuit_tracer.load_transcoder(path, 3, topk, **lazy_ones)

    own, x, outs = load(file), randn(N, D, seed=9), []
    for dtype in (torch.float32, torch.float64):
        p = {n: moved(getattr(written, n), dtype) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
        u = x.to(dtype) @ p["W_enc"].T + p["b_enc"]
        if topk is not None:  # no ReLU
            acts = torch.zeros_like(u).scatter(1, *reversed(u.topk(K)))
        else:
            acts = u * (u > (0 if written.threshold is None else written.threshold.to(dtype)))
        out = acts @ p["W_dec"] + p["b_dec"]
        if written.W_skip is not None:
            out = out + x.to(dtype) @ written.W_skip.to(dtype).T
        out.square().sum().backward()
        shown = torch.cat([torch.zeros(2, F, dtype=dtype), acts[2:]])
        parts = shown.to_sparse().coalesce()
        rows = p["W_dec"][parts.indices()[1]] * parts.values()[:, None]
        outs.append([u, acts, out, shown, p["W_enc"][parts.indices()[1]], rows, p["b_enc"].grad])
    code, encoders = own.encode_sparse(x, slice(0, 2))
    assert code.is_coalesced() and code._nnz() == outs[0][4].shape[0]
    result, acts = own(x), own.encode(x)
    result.square().sum().backward()
    got = [own.encode(x, apply_activation_function=False), acts, result, code.to_dense(), encoders]
    got += [own.decode_sparse(code, x)[1], own.b_enc.grad]
    assert kind != "negative" or (acts < 0).any()
    for value, plain, exact in zip(got, *outs, strict=True):
        assert_close(f"circuit-tracer {kind}", value, plain, exact)
    torch.testing.assert_close(own.decode(acts, x), result)
    torch.testing.assert_close(own.decode_sparse(acts.to_sparse(), x)[0], result)
    assert (own.device.type, own.dtype, own.layer_idx) == ("cpu", torch.float32, 3)
    own.to_safetensors(tmp_path / "b.safetensors")
    assert torch.equal(load(tmp_path / "b.safetensors")(x), own(x))


def test_circuit_tracer_reads_the_k_that_its_own_loader_refuses(tmp_path):
    from safetensors.torch import load_file, save_file

    file = convert.write(coder(centred=False), tmp_path, "circuit-tracer")
    save_file({**load_file(file), "k": torch.tensor(K)}, file)
    (tmp_path / "config.yaml").unlink()
    assert circuit_tracer.load_transcoder(file, 0).activation_function.k == K
    assert convert.load(file).k == K


def test_circuit_tracer_refuses(tmp_path):
    file = convert.write(coder(centred=False), tmp_path, "circuit-tracer")
    with pytest.raises(ValueError, match=r"SingleLayerTranscoder: k must be in \[1, 64\]"):
        circuit_tracer.SingleLayerTranscoder(D, F, circuit_tracer.TopK(F + 1), 0)
    with pytest.raises(ValueError, match="transcoder_path must be given"):
        circuit_tracer.SingleLayerTranscoder(D, F, circuit_tracer.TopK(K), 0, lazy_encoder=True)
    other = convert.write(coder(), tmp_path / "s", "sparsify")
    with pytest.raises(UserError, match="must hold the tensor b_enc"):
        circuit_tracer.load_transcoder(other, 0)
    transcoder = circuit_tracer.load_transcoder(file, 0, lazy_encoder=False)
    with pytest.raises(ValueError, match="W_skip must be there"):
        transcoder.compute_skip(torch.zeros(1, D))
