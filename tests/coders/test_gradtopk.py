# SPDX-License-Identifier: Apache-2.0
"""Modules and training steps that select by a downstream gradient."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_close, randn
from torch import Tensor

import ksae
from ksae.coders import SparseCoder
from ksae.coders.activation.grad_topk import GRAD_NORMS

N, D_IN, D_OUT, F, K = 96, 24, 16, 128, 6
KINDS = ("sae", "transcoder")


def make(kind: str = "sae", **options: Any) -> SparseCoder:
    torch.manual_seed(0)
    options = {"dead_after": 10**9, **options}
    if kind == "sae":
        return ksae.GradTopKSAE(D_IN, F, K, **options)
    model = ksae.GradTopKTranscoder(D_IN, D_OUT, F, K, **options)
    with torch.no_grad():
        model.W_dec.copy_(randn(F, D_OUT, seed=5) / 4)
    return model


def batch(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The arguments of a step: x, y for a transcoder, grad."""
    d_out = D_IN if kind == "sae" else D_OUT
    x = randn(N, D_IN, seed=seed, dtype=dtype)
    target = {} if kind == "sae" else {"y": randn(N, D_OUT, seed=seed + 100, dtype=dtype)}
    return {"x": x, **target, "grad": randn(N, d_out, seed=seed + 200, dtype=dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_training_selects_by_score_and_evaluation_by_u(kind: str) -> None:
    model, data = make(kind, beta=2.0, grad_norm="none"), batch(kind)
    b_dec = model.b_dec if kind == "sae" else None
    weights = (model.W_enc, model.b_enc)
    aware = ksae.grad_topk_encode(
        data["x"], data["grad"], *weights, model.W_dec, K, 2.0, "additive", b_dec
    )
    plain = ksae.topk_encode(data["x"], *weights, K, b_dec)
    assert not torch.equal(aware[1], plain[1])
    out = model(**data)
    assert torch.equal(out.indices, aware[1]) and torch.equal(out.values, aware[0])
    model.eval()
    grad = data.pop("grad")
    assert torch.equal(model(**data).indices, plain[1])
    assert torch.equal(model(**data, grad=grad).indices, aware[1])
    assert torch.equal(model.encode(data["x"])[1], plain[1])
    assert torch.equal(model.encode(data["x"], grad)[1], aware[1])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", KINDS)
def test_missing_gradient(kind: str, fused: bool) -> None:
    model, data = make(kind), batch(kind)
    data.pop("grad")
    for call in (model, ksae.TrainStep(model, fused=fused)):
        with pytest.raises(ValueError, match=r"grad must be given in training.*got None; eval"):
            call(**data)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.zeros(N - 1, D_IN), ValueError, r"of shape \[96, 24\] for x of shape .* \[95, 24\]"),
        (torch.zeros(N, D_IN + 1), ValueError, r"of shape \[96, 24\] for x of shape .* \[96, 25\]"),
        (torch.zeros(N, D_IN, requires_grad=True), ValueError, "detached"),
        (torch.zeros(N, D_IN, dtype=torch.int64), TypeError, "floating"),
        (torch.zeros(N, D_IN, device="meta"), ValueError, "on cpu, got meta"),
    ],
    ids=["rows", "width", "requires grad", "integers", "device"],
)
def test_bad_gradient(grad: Tensor, error: type[Exception], message: str) -> None:
    for norm in GRAD_NORMS:
        model = make(grad_norm=norm)
        before = copy.deepcopy(model.state_dict())
        for call in (model, ksae.TrainStep(model), ksae.TrainStep(model, fused=False)):
            with pytest.raises(error, match=f"GradTopKSAE: grad must be .*{message}"):
                call(randn(N, D_IN), grad=grad)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be a finite number >= 0, got -1.0"),
        ({"beta": float("nan")}, "beta must be a finite number >= 0, got nan"),
        ({"mode": "abs"}, "mode must be one of additive, multiplicative, signed, got 'abs'"),
        ({"grad_norm": "max"}, "grad_norm must be one of none, unit, rms, sqrt_d, got 'max'"),
    ],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else "",
)
def test_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GradTopKSAE: {message}"):
        make(**options)


def test_gradient_for_a_class_that_takes_none() -> None:
    sae, x = ksae.TopKSAE(D_IN, F, K), randn(N, D_IN)
    for call in (sae, ksae.TrainStep(sae)):
        with pytest.raises(ValueError, match=r"TopKSAE: grad must be None.*GradTopKSAE"):
            call(x, grad=x)


def test_zero_gradient_warns_once_and_is_topk() -> None:
    model, x = make(), randn(N, D_IN)
    plain = ksae.TopKSAE(D_IN, F, K)
    plain.load_state_dict(model.state_dict())
    none = torch.zeros_like(x)
    with pytest.warns(UserWarning, match="GradTopKSAE: grad is zero everywhere"):
        out = model(x, grad=none)
    assert torch.equal(out.indices, plain(x).indices)
    step = ksae.TrainStep(make())
    with pytest.warns(UserWarning, match="zero everywhere"):
        step(x, grad=none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, grad=none)
        model(x, grad=none)


@pytest.mark.parametrize("norm", GRAD_NORMS)
def test_scaling_by_name(norm: str) -> None:
    model = make(grad_norm=norm)
    x = randn(4, D_IN)
    grad = randn(4, D_IN, seed=1) * torch.tensor([1.0, 10.0, 0.0, 1e-30])[:, None]
    got = model.gradients(x, grad, training=True)
    norms = grad.double().norm(dim=1, keepdim=True)
    divisor = {
        "none": torch.ones(4, 1, dtype=torch.float64),
        "unit": norms,
        "sqrt_d": norms / D_IN**0.5,
        "rms": (norms.square().sum() / 3).sqrt(),  # a row of zeros does not count
    }[norm]
    want = torch.where(norms > 0, grad.double() / divisor, 0)
    assert_close("grad", got, want.float(), want)
    bad = grad.clone()
    bad[1, 3], bad[2, 5] = torch.inf, torch.nan
    finite = model.gradients(x, bad, training=True).isfinite().all(1)
    assert finite.tolist() == [True, False, False, True]


def test_running_norm_is_that_of_all_training_rows_and_is_saved(tmp_path: Path) -> None:
    model = make(grad_norm="rms", beta=0.25, mode="signed")
    step = ksae.TrainStep(model)
    data = [batch("sae", seed) for seed in range(3)]
    for b in data:
        step(b["x"], grad=b["grad"] * 5)
    every = torch.cat([b["grad"] * 5 for b in data])
    mean = every.double().square().sum(1).mean()
    assert int(model.grad_rows) == 3 * N
    assert float(model.grad_square) == pytest.approx(float(mean), rel=1e-6)
    model.eval()
    got = model.gradients(data[0]["x"], every[:N], training=False)
    torch.testing.assert_close(got, every[:N] / mean.sqrt().float())
    assert int(model.grad_rows) == 3 * N
    model.save(tmp_path / "m.safetensors")
    again = ksae.load(tmp_path / "m.safetensors")
    assert type(again) is ksae.GradTopKSAE and again.config() == model.config()
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    x, g = data[1]["x"], data[1]["grad"]
    assert torch.equal(again.eval()(x, grad=g).indices, model(x, grad=g).indices)


def test_transcoder_is_saved(tmp_path: Path) -> None:
    model = make("transcoder", skip=True)
    model.save(tmp_path / "m.safetensors")
    again = ksae.load(tmp_path / "m.safetensors")
    assert type(again) is ksae.GradTopKTranscoder and again.config() == model.config()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_norm": "rms", "mode": "multiplicative"},
        {"mode": "signed", "multi_topk": True},
        {"dead_after": 0, "auxk_alpha": 1.0, "grad_norm": "none"},
    ],
    ids=["default", "rms", "multi_topk", "auxk"],
)
@pytest.mark.parametrize("clip", [None, 0.1], ids=["free", "clipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_step_is_the_unfused_one(
    kind: str, clip: float | None, options: dict[str, Any]
) -> None:
    """From the same float64 start three steps of each kind; the unfused one is autograd's."""
    models = [make(kind, dtype="float64", **options) for _ in range(2)]
    steps = [
        ksae.TrainStep(m, lr=1e-3, clip_norm=clip, fused=fused)
        for m, fused in zip(models, (True, False), strict=True)
    ]
    for seed in range(3):
        data = batch(kind, seed, torch.float64)
        data["grad"][3, 0] = torch.nan
        got, want = (step(**data) for step in steps)
        assert int(got["nonfinite_grad_rows"]) == 1
        assert got.keys() == want.keys()
        for name, t in want.items():
            torch.testing.assert_close(got[name], t)
    for (name, t), u in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(t, u, msg=name)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_step_that_is_not_finite_changes_nothing(fused: bool) -> None:
    model = make(grad_norm="rms")
    step = ksae.TrainStep(model, fused=fused)
    step(randn(N, D_IN), grad=randn(N, D_IN, seed=1))
    before = copy.deepcopy({**model.state_dict(), **step.state_dict()})
    x = randn(N, D_IN, seed=2)
    x[0, 0] = torch.nan
    assert not step(x, grad=randn(N, D_IN, seed=3))["loss"].isfinite()
    for name, t in {**model.state_dict(), **step.state_dict()}.items():
        assert torch.equal(before[name], t), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_without_a_weight_is_that_of_topk(dtype: torch.dtype) -> None:
    model = make(beta=0.0, dtype=dtype)
    plain = ksae.TopKSAE(D_IN, F, K, dead_after=10**9, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    x, grad = randn(N, D_IN), randn(N, D_IN, seed=1) * 1e30  # float32, past what float16 holds
    metrics, want = ksae.TrainStep(model)(x, grad=grad), ksae.TrainStep(plain)(x)
    assert int(metrics["nonfinite_grad_rows"]) == 0
    for name, t in want.items():
        torch.testing.assert_close(metrics[name], t)


def test_auxk_ranks_by_u() -> None:
    """The dead latents' loss is that of plain TopK where the residual is the same."""
    model = make(dead_after=0, auxk_alpha=1.0, beta=0.0)
    plain = ksae.TopKSAE(D_IN, F, K, dead_after=0, auxk_alpha=1.0)
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        m.tokens_since_fired[::2] = 5
    x, grad = randn(N, D_IN), randn(N, D_IN, seed=1)
    want = float(plain(x).auxk_loss.detach())
    assert want > 0
    assert float(model(x, grad=grad).auxk_loss.detach()) == pytest.approx(want, rel=1e-5)


def test_compile_fullgraph() -> None:
    model, x, grad = make(), randn(N, D_IN), randn(N, D_IN, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got, want = compiled(x, grad=grad), model(x, grad=grad)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.loss, want.loss)
