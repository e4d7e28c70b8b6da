# SPDX-License-Identifier: Apache-2.0
"""TopKSAE and Transcoder: losses, gradients, dead latents, dtypes, messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor

import ksae
from ksae.coders.coder import SparseCoder
from ksae.coders.output import Output
from ksae.coders.terms import total_variance

N, D, OUT, F, K = 23, 12, 10, 40, 4


def sae(**settings: Any) -> ksae.TopKSAE:
    torch.manual_seed(0)
    model = ksae.TopKSAE(D, F, K, **settings)
    with torch.no_grad():
        model.b_dec.copy_(randn(D, seed=1) * 0.3)
        model.b_enc.copy_(randn(F, seed=2) * 0.1)
    return model


def transcoder(**settings: Any) -> ksae.Transcoder:
    torch.manual_seed(0)
    model = ksae.Transcoder(D, OUT, F, K, **settings)
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=seed) * 0.5)
    return model


def given(out: Output, field: str) -> Tensor:
    value = getattr(out, field)
    assert isinstance(value, Tensor)
    return value


def kill(model: SparseCoder, step: int = 3) -> Tensor:
    """Declare every step-th latent dead; returns the mask."""
    dead = torch.arange(model.d_sae) % step == 0
    model.tokens_since_fired.copy_(torch.where(dead, model.dead_after + 1, model.dead_after))
    return dead


def latents(model: SparseCoder, x: Tensor) -> Tensor:
    """Pre-activations [N, F] by definition."""
    return (x - model.b_dec if model.centred else x) @ model.W_enc.T + model.b_enc


def chosen(u: Tensor, k: int) -> Tensor:
    """relu(u) at the k largest of each row, zero elsewhere."""
    indices = u.topk(k, dim=1).indices
    return torch.zeros_like(u).scatter(1, indices, u.gather(1, indices).relu())


def by_definition(
    model: SparseCoder, x: Tensor, y: Tensor, dead: Tensor | None = None
) -> dict[str, Tensor]:
    """Every loss of methods section 1, densely."""

    def decode(a: Tensor) -> Tensor:
        skip = 0 if model.W_skip is None else x @ model.W_skip.T
        return a @ model.W_dec + model.b_dec + skip

    u = latents(model, x)
    recon = decode(chosen(u, model.k))
    variance = (y - y.mean(0)).square().sum()
    denominator = variance if model.loss == "fvu" else torch.tensor(float(y.numel()))
    fvu = (y - recon).square().sum() / variance
    loss = (y - recon).square().sum() / denominator
    out = {"recon": recon, "fvu": fvu}
    if dead is not None:
        masked = torch.where(dead, u, -torch.inf)
        ehat = chosen(masked, min(model.k_aux, int(dead.sum()))) @ model.W_dec
        t = (y - recon).detach()
        out["auxk_loss"] = (ehat - t).square().sum() / (t - t.mean(0)).square().sum()
        loss = loss + model.auxk_alpha * out["auxk_loss"]
    if model.multi_topk:
        wide = decode(chosen(u, min(4 * model.k, model.d_sae)))
        out["multi_topk_loss"] = (y - wide).square().sum() / denominator
        loss = loss + out["multi_topk_loss"] / 8
    return out | {"loss": loss}


@pytest.mark.parametrize("loss", ["fvu", "mse"])
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize("multi", [False, True], ids=["one k", "multi"])
@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_losses_and_gradients_by_definition(kind: str, multi: bool, dead: bool, loss: str) -> None:
    """Float64 autograd of the dense formulas: the gradient of AuxK and of multi-TopK reaches the
    encoder, b_dec gets both paths, and the loss is the sum of its parts."""
    settings: dict[str, Any] = {
        "loss": loss,
        "multi_topk": multi,
        "dtype": torch.float64,
        "k_aux": 7,
    }
    model = sae(**settings) if kind == "sae" else transcoder(skip=kind == "skip", **settings)
    mask = kill(model) if dead else None
    x = randn(N, D, seed=11).double().requires_grad_()
    y = x if kind == "sae" else randn(N, OUT, seed=12).double()
    out = model(x) if kind == "sae" else model(x, y)
    want = by_definition(model, x, y, mask)
    for name, value in want.items():
        torch.testing.assert_close(given(out, name), value, rtol=1e-11, atol=1e-12, msg=name)
    if not dead:
        assert given(out, "auxk_loss") == 0
    named = dict(model.named_parameters()) | ({} if kind == "sae" else {"x": x})
    got = torch.autograd.grad(given(out, "loss"), list(named.values()))
    exact = torch.autograd.grad(want["loss"], list(named.values()))
    for name, g, e in zip(named, got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12, msg=name)


def test_the_gradient_of_x_when_x_is_the_target() -> None:
    """dx of a TopKSAE has the encoder's path and the target's."""
    model = sae(dtype=torch.float64, loss="mse")
    x = randn(N, D, seed=11).double().requires_grad_()
    (got,) = torch.autograd.grad(given(model(x), "loss"), x)
    (want,) = torch.autograd.grad(by_definition(model, x, x)["loss"], x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", ["auxk_loss", "multi_topk_loss"])
def test_auxiliary_losses_train_the_encoder(part: str) -> None:
    """A peer's fused encoder leaves these two without an encoder gradient."""
    model = sae(multi_topk=True, auxk_alpha=1.0)
    dead = kill(model)
    grads = torch.autograd.grad(
        given(model(randn(N, D)), part), [model.W_enc, model.b_enc, model.W_dec]
    )
    assert all(g.abs().sum() > 0 for g in grads)
    if part == "auxk_loss":
        assert all(g[~dead].abs().sum() == 0 for g in grads)  # and only that of dead latents


def test_auxk_does_not_reach_the_decoder_bias_as_an_output() -> None:
    """ehat has no bias: b_dec of a transcoder gets no gradient of AuxK."""
    model = transcoder(auxk_alpha=1.0)
    kill(model)
    loss = given(model(randn(N, D), randn(N, OUT, seed=1)), "auxk_loss")
    (g,) = torch.autograd.grad(loss, model.b_dec, allow_unused=True)
    assert g is None or g.abs().sum() == 0


def test_auxk_of_a_perfect_reconstruction_is_zero() -> None:
    """Its denominator is 0: no NaN in the loss nor in a gradient."""
    model = transcoder(auxk_alpha=1.0, dtype=torch.float64)
    kill(model)
    x = randn(N, D).double()
    y = model(x).recon.detach()
    out = model(x, y)
    assert given(out, "auxk_loss") == 0
    grads = torch.autograd.grad(given(out, "loss"), list(model.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_latents_that_never_exceed_zero_get_no_gradient() -> None:
    model = sae()
    with torch.no_grad():
        model.b_enc[::2] = -100.0
    out = model(randn(N, D))
    grads = torch.autograd.grad(given(out, "loss"), [model.W_enc, model.b_enc, model.W_dec])
    assert all(g[::2].abs().sum() == 0 and g[1::2].abs().sum() > 0 for g in grads)


def test_dead_latents_are_counted_in_tokens() -> None:
    model = sae(dead_after=2 * N)
    x = randn(N, D)
    fired = (model.encode_dense(x) > 0).any(0)
    assert 0 < fired.sum() < F and (model.tokens_since_fired == 0).all()  # encode does not count
    for steps in (1, 2, 3):
        model(x.reshape(1, N, D))
        assert torch.equal(model.tokens_since_fired, torch.where(fired, 0, steps * N))
        assert torch.equal(model.dead, ~fired & (steps * N > 2 * N))
    model.eval()
    model(x)
    assert model.tokens_since_fired.max() == 3 * N


def test_a_slot_at_zero_does_not_count_as_fired() -> None:
    model = sae()
    with torch.no_grad():
        model.b_enc.fill_(-100.0)
    out = model(randn(N, D))
    assert (out.values == 0).all() and (model.tokens_since_fired == N).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    """x of another dtype is cast to the parameters'; losses stay in float32 or float64."""
    model = sae(dtype=dtype, multi_topk=True)
    kill(model)
    x = randn(2, 5, D)
    out = model(x)
    assert {p.dtype for p in model.parameters()} == {out.recon.dtype, out.values.dtype} == {dtype}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("loss", "fvu", "auxk_loss", "multi_topk_loss"):
        assert given(out, name).dtype == acc and given(out, name).dim() == 0
    assert out.indices.dtype == torch.int64
    same = model.to(dtype)(x.to(dtype))
    assert torch.equal(same.recon, out.recon)
    given(out, "loss").backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 2), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    model, x, y = transcoder(skip=True), randn(*lead, D), randn(*lead, OUT)
    out = model(x, y)
    assert out.recon.shape == (*lead, OUT) and out.values.shape == out.indices.shape == (*lead, K)
    assert model.encode_dense(x).shape == (*lead, F)
    values, indices = model.encode(x)
    assert torch.equal(values, out.values) and torch.equal(indices, out.indices)
    torch.testing.assert_close(model.decode(values, indices, x), out.recon)
    flat = model(x.reshape(-1, D), y.reshape(-1, OUT)) if x.numel() else out
    assert torch.equal(flat.recon.reshape(out.recon.shape), out.recon)


def test_encode_dense_is_the_code_with_its_zeros() -> None:
    model, x = sae(dtype=torch.float64), randn(N, D).double()
    torch.testing.assert_close(model.encode_dense(x), chosen(latents(model, x), K))
    torch.testing.assert_close(model.encode_dense(x) @ model.W_dec + model.b_dec, model(x).recon)


def test_a_transcoder_without_a_target_has_no_loss() -> None:
    out = transcoder(multi_topk=True)(randn(N, D))
    assert out.values.shape == (N, K)
    assert out.loss is out.fvu is out.auxk_loss is out.multi_topk_loss is None


def test_an_autoencoder_may_have_another_target() -> None:
    model, x, y = sae(dtype=torch.float64), randn(N, D).double(), randn(N, D, seed=1).double()
    torch.testing.assert_close(given(model(x, y), "loss"), by_definition(model, x, y)["loss"])
    assert torch.equal(given(model(x, x), "loss"), given(model(x), "loss"))


def test_fvu_sees_a_constant_error_and_a_large_mean() -> None:
    y = randn(500, D) + 1e4  # activations have such dimensions
    torch.testing.assert_close(
        total_variance(y).double(),
        (y.double() - y.double().mean(0)).square().sum(),
        rtol=1e-5,
        atol=0,
    )
    model = transcoder(dtype=torch.float64)
    x = randn(N, D).double()
    y = model(x).recon.detach()
    fvu = given(model(x, y + 1), "fvu")
    torch.testing.assert_close(fvu, y.numel() / (y - y.mean(0)).square().sum())


def test_initial_state() -> None:
    model = ksae.TopKSAE(D, F, K)
    assert torch.equal(model.W_enc, model.W_dec) and model.W_skip is None
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(F))
    assert model.b_enc.abs().sum() == model.b_dec.abs().sum() == 0
    other = ksae.Transcoder(D, OUT, F, K, skip=True)
    torch.testing.assert_close(other.W_enc.norm(dim=1), torch.ones(F))
    assert (
        other.W_dec.shape == (F, OUT)
        and other.W_skip is not None
        and other.W_skip.shape == (OUT, D)
    )
    assert other.W_dec.abs().sum() == other.W_skip.abs().sum() == 0
    assert [n for n, _ in other.named_parameters()] == [
        "W_enc",
        "b_enc",
        "W_dec",
        "b_dec",
        "W_skip",
    ]
    assert list(dict(model.named_buffers())) == ["tokens_since_fired"]


@pytest.mark.parametrize("kind", [ksae.TopKSAE, ksae.Transcoder])
def test_config_rebuilds_the_module(kind: type[SparseCoder]) -> None:
    sizes = (D, F, K) if kind is ksae.TopKSAE else (D, OUT, F, K)
    settings = {"loss": "mse", "auxk_alpha": 0.5, "k_aux": 3, "dead_after": 5, "multi_topk": True}
    model = kind(*sizes, **settings, dtype=torch.bfloat16)
    config = model.config()
    assert config.pop("class") == kind.__name__ and config["dtype"] == "bfloat16"
    assert all(isinstance(v, str | int | float | bool) for v in config.values())
    again = kind(**config)
    assert again.config() == model.config()
    again.load_state_dict(model.state_dict())
    x = randn(N, D)
    assert torch.equal(again(x).recon, model(x).recon)


def test_any_torch_optimizer_trains_it() -> None:
    model = sae()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    x = randn(64, D)
    first = float(given(model(x), "loss"))
    for _ in range(30):
        sgd.zero_grad()
        given(model(x), "loss").backward()
        sgd.step()
    assert float(given(model(x), "loss")) < 0.8 * first


def test_autocast() -> None:
    model = sae()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(randn(N, D))
    assert out.recon.dtype == out.values.dtype == torch.bfloat16
    assert given(out, "loss").dtype == torch.float32
    given(out, "loss").backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dead", ["none", "some", "fewer than k_aux"])
def test_compile_fullgraph(dead: str) -> None:
    """AuxK is computed without a branch, and is exactly zero if nothing is dead."""
    torch.compiler.reset()
    eager, traced = (sae(k_aux=20, multi_topk=True) for _ in range(2))
    if dead != "none":
        for model in (eager, traced):
            kill(model, 2 if dead == "some" else 15)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x = randn(N, D)
    want, got = eager(x), compiled(x)
    for name in ("recon", "loss", "fvu", "auxk_loss", "multi_topk_loss"):
        torch.testing.assert_close(given(got, name), given(want, name), rtol=1e-5, atol=1e-6)
    if dead == "none":
        assert given(got, "auxk_loss") == 0
    given(want, "loss").backward()
    given(got, "loss").backward()
    for p, q in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(eager.tokens_since_fired, traced.tokens_since_fired)


# ----------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_in": 0}, "TopKSAE: d_in must be at least 1, got 0"),
        ({"d_sae": -1}, "TopKSAE: d_sae must be at least 1, got -1"),
        ({"k": 0}, "TopKSAE: k must be in [1, 40], the number of latents, got 0"),
        ({"k": 41}, "TopKSAE: k must be in [1, 40], the number of latents, got 41"),
        ({"loss": "l1"}, "TopKSAE: loss must be one of fvu, mse, got 'l1'"),
        ({"auxk_alpha": -1.0}, "TopKSAE: auxk_alpha must be a finite number >= 0, got -1.0"),
        ({"k_aux": 0}, "TopKSAE: k_aux must be at least 1, got 0"),
        ({"dead_after": -1}, "TopKSAE: dead_after must be at least 0, got -1"),
        ({"dtype": torch.int8}, "TopKSAE: dtype must be one of torch.float32, torch.bfloat16"),
        ({"dtype": "float13"}, "TopKSAE: dtype must be one of torch.float32, torch.bfloat16"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else None,
)
def test_constructor_messages(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        ksae.TopKSAE(**({"d_in": D, "d_sae": F, "k": K} | settings))


def test_forward_messages() -> None:
    model = transcoder(skip=True)
    for call, message in (
        (lambda: model(randn(N, D + 1)), "Transcoder: x must be of shape [..., 12], got [23, 13]"),
        (lambda: model(torch.tensor(1.0)), "Transcoder: x must be of shape [..., 12], got []"),
        (lambda: model(torch.zeros(N, D).int()), "Transcoder: x must be floating, got torch.int32"),
        (lambda: model(torch.zeros(N, D, device="meta")), "Transcoder: x must be on cpu, got meta"),
        (
            lambda: model(randn(N, D), randn(N, D)),
            "Transcoder: y must be of shape [..., 10], got [23, 12]",
        ),
        (
            lambda: model(randn(N, D), randn(N - 1, OUT)),
            "Transcoder: y must be of shape [23, 10] for x of shape [23, 12], got [22, 10]",
        ),
        (
            lambda: model.decode(*model.encode(randn(N, D))),
            "x must be given to decode with a skip connection",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            call()
