# SPDX-License-Identifier: Apache-2.0
"""Coders with JumpReLU: the formulas of the straight-through gradients, both steps, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from training import (
    assert_fused_is_unfused,
    assert_reads_back,
    assert_resumes,
    assert_same_bits_on_threads,
)

import ksae
from ksae.coders.coder import SparseCoder
from ksae.coders.file import describe
from ksae.files import container

N, D, OUT, F = 60, 17, 23, 97
BAND = 0.3
FUSED: dict[str, dict[str, Any]] = {
    "l0": {},
    "target_l0": {"penalty": "target_l0", "target": 6.0, "coefficient": 0.1},
    "aux": {"dead_after": 100, "k_aux": 4, "auxk_alpha": 0.5},
    "mse": {"loss": "mse", "normalize_decoder": False},
    "prefixes": {"prefixes": [20, F]},
    "skip": {"skip": True, "dead_after": 100, "k_aux": 4},
    "tanh": {"penalty": "tanh", "coefficient": 0.05},
    "tanh, norms": {"penalty": "tanh", "coefficient": 0.05, "normalize_decoder": False},
    "linear": {"parametrization": "linear"},
    "linear, target_l0": {
        "parametrization": "linear", "penalty": "target_l0", "target": 6.0, "coefficient": 0.1,
    },
    "linear, tanh": {"parametrization": "linear", "penalty": "tanh", "coefficient": 0.05},
}  # fmt: skip
UNFUSED: dict[str, dict[str, Any]] = {
    "pre_act": {"pre_act": 0.01, "dead_after": 100, "auxk_alpha": 0.0},
    "linear, pre_act": {
        "parametrization": "linear", "pre_act": 0.01, "dead_after": 100, "auxk_alpha": 0.0,
    },
}  # fmt: skip
CASES = FUSED | UNFUSED
OWN = ("penalty", "target", "coefficient", "pre_act", "parametrization")


def build(case: str, dtype: torch.dtype = torch.float64) -> SparseCoder:
    torch.manual_seed(0)
    options = dict(CASES[case])
    own = {name: options.pop(name) for name in OWN if name in options}
    activation = ksae.JumpReLU(bandwidth=BAND, theta=0.7, **own)
    if options.pop("skip", False):
        model: SparseCoder = ksae.Transcoder(D, OUT, F, activation=activation, skip=True, **options)
    else:
        model = ksae.SAE(D, F, activation, **options)
    with torch.no_grad():
        model.W_dec.copy_(randn(*model.W_dec.shape, seed=2))
        model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
        model.b_enc.copy_(randn(F, seed=3) * 0.3 - 0.2)
        model.b_dec.copy_(randn(*model.b_dec.shape, seed=4) * 0.1)
        shift = 0.3 * randn(F, seed=6)
        if activation.parametrization == "log":
            model.log_threshold.add_(shift)
        else:
            model.theta.mul_(shift.exp())
        if model.W_skip is not None:
            model.W_skip.copy_(randn(OUT, D, seed=5) * 0.1)
        model.tokens_since_fired[::3] = 1000
        model.get_buffer("mean_active").fill_(0.0)  # so that the first step is sparse too
    return model.to(dtype)


def batch(case: str, seed: int = 10) -> list[Tensor]:
    x = randn(N, D, seed=seed)
    return [x, randn(N, OUT, seed=seed + 1)] if case == "skip" else [x]


def by_formula(model: SparseCoder, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of x and all parameters, from dense pre-activations: f and the steps are
    leaves of autograd, and what they pass on is written out."""
    a: Any = model.activation
    names = dict(model.named_parameters())
    theta = model.theta if hasattr(model, "theta") else model.log_threshold.exp()
    u = (x - (model.b_dec if model.centred else 0)) @ model.W_enc.T + model.b_enc
    active, near = u > theta, (u - theta).abs() < BAND / 2
    f = torch.where(active, u, 0).detach().requires_grad_()
    step = active.double().requires_grad_()
    skipped = x @ model.W_skip.T if model.W_skip is not None else 0
    variance = (y - y.mean(0)).square().sum().detach()
    loss = torch.zeros((), dtype=x.dtype)
    widths = model.prefixes or (F,)
    for width in widths:
        recon = f[:, :width] @ model.W_dec[:width] + model.b_dec + skipped
        unit = variance if model.loss == "fvu" else y.numel()
        loss = loss + (recon - y).square().sum() / unit / len(widths)
    dead = model.dead
    if dead.any() and model.auxk_alpha:
        e = (y - recon).detach()
        at = torch.where(dead, u, -torch.inf).topk(model.k_aux).indices
        aux = torch.zeros_like(u).scatter(1, at, u.gather(1, at).relu()) @ model.W_dec
        loss = loss + model.auxk_alpha * (aux - e).square().sum() / (e - e.mean(0)).square().sum()
    l0, norm = step.sum() / N, model.W_dec.norm(dim=1)
    if a.penalty == "l0":
        loss = loss + a.coefficient * l0
    elif a.penalty == "target_l0":
        loss = loss + a.coefficient * (l0 / a.target - 1) ** 2
    else:
        loss = loss + a.coefficient * (a.tanh_scale * f * norm).tanh().sum() / N
    if a.pre_act:
        loss = loss + a.pre_act * ((theta - u).relu() * norm)[:, dead].sum() / N
    leaves = [x, *names.values()]
    g_f, g_step, *direct = torch.autograd.grad(loss, [f, step, *leaves], retain_graph=True,
                                               allow_unused=True)  # fmt: skip
    g_step = torch.zeros_like(f) if g_step is None else g_step
    through_u = torch.autograd.grad(
        u, leaves, torch.where(active, g_f, 0), retain_graph=True, allow_unused=True
    )
    g_theta = torch.where(near, -theta / BAND * g_f - g_step / BAND, 0).sum(0)
    through_theta = torch.autograd.grad(theta, leaves, g_theta, allow_unused=True)
    total = [
        sum((g for g in parts if g is not None), torch.zeros_like(leaf))
        for leaf, *parts in zip(leaves, direct, through_u, through_theta, strict=True)
    ]
    return loss, total


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formulas(case: str) -> None:
    model, data = build(case), [t.double() for t in batch(case)]
    x = data[0].requires_grad_()
    want_loss, want = by_formula(model, x, data[-1])
    out = model(*data)
    torch.testing.assert_close(out.loss, want_loss, rtol=1e-10, atol=0)
    got = torch.autograd.grad(out.loss, [x, *model.parameters()])
    for name, g, w in zip(["x", *dict(model.named_parameters())], got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11, msg=name)
    below = (out.values == 0).sum()
    assert 0 < below < len(out.values)


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("clip", [None, 0.01], ids=["", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_is_unfused(case: str, clip: float | None, dtype: torch.dtype) -> None:
    model = assert_fused_is_unfused(
        lambda fused: ksae.TrainStep(build(case, dtype), 1e-2, clip_norm=clip, fused=fused),
        [batch(case, seed) for seed in (10, 20)],
    )
    if dtype == torch.float64:
        learned = model.activation.learned
        ends = [of.get_parameter(learned) for of in (model, build(case))]
        assert ((ends[0] - ends[1]).abs() > 1e-3).sum() > F // 2


def test_a_step_has_the_same_bits_for_any_number_of_threads() -> None:
    assert_same_bits_on_threads(
        lambda: ksae.TrainStep(build("aux", torch.float32), 1e-2), batch("aux")
    )


def test_in_use_only_what_is_above_its_threshold() -> None:
    model, x = build("l0").eval(), batch("l0")[0].double()
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    dense = torch.where(u > model.log_threshold.exp(), u, 0)
    torch.testing.assert_close(model.encode_dense(x), dense)
    out = model(x)
    assert len(out.values) == (dense > 0).sum()
    torch.testing.assert_close(out.recon, dense @ model.W_dec + model.b_dec)
    assert float(out.loss.detach()) == pytest.approx(float(out.fvu))  # the penalty is training's


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thresholds_that_are_learned_themselves_stay_at_0_or_above(
    fused: bool, dtype: torch.dtype
) -> None:
    model = build("linear", dtype)
    with torch.no_grad():
        model.theta.copy_(torch.linspace(1e-3, 0.05, F))
        model.b_enc.fill_(-0.1)  # so that many values are near, and the gradients of both signs
    step = ksae.TrainStep(model, 0.1, fused=fused)
    step(*batch("linear"))
    held = [model.theta] if dtype == torch.float32 else [model.theta, step.masters["theta"]]
    for theta in held:
        assert theta.min() == 0 and 0 < (theta == 0).sum() < F
    at_zero = (model.theta == 0).clone()
    step(*batch("linear", 20))
    assert (model.theta >= 0).all() and (model.theta[at_zero] > 0).any()  # they come back


def test_a_threshold_below_0_counts_as_0_and_has_its_gradient() -> None:
    model, x = build("linear").train(), batch("linear")[0].double()
    with torch.no_grad():
        model.theta[:50] = -0.05
        at_zero = copy.deepcopy(model)
        at_zero.theta[:50] = 0.0
    for a, b in zip(*(torch.autograd.grad(m(x).loss, m.parameters()) for m in (model, at_zero)),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)
    assert model.activation.thresholds(model)[:50].eq(0).all()
    below, loss = model.theta.clone(), ksae.TrainStep(model)(x * torch.nan)["loss"]
    assert loss.isnan() and torch.equal(model.theta, below)  # a step that is not taken


def test_no_entry_at_all() -> None:
    model = build("l0", torch.float32)
    with torch.no_grad():
        model.log_threshold.fill_(10.0)
    metrics = ksae.TrainStep(model)(*batch("l0"))
    assert metrics["l0"] == 0 and metrics["loss"].isfinite()


@pytest.mark.parametrize("case", ["target_l0", "skip", "linear"])
def test_files(case: str, tmp_path: Path) -> None:
    model = build(case, torch.float32)
    assert_reads_back(model, tmp_path)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_step_resumes(fused: bool) -> None:
    assert_resumes(
        lambda: ksae.TrainStep(build("aux", torch.float32), fused=fused),
        [batch("aux", seed) for seed in range(4)],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "l1"}, "penalty must be one of l0, target_l0, tanh, got 'l1'"),
        ({"parametrization": "exp"}, "parametrization must be one of log, linear, got 'exp'"),
        ({"coefficient": -1.0}, "coefficient must be a finite number >= 0, got -1.0"),
        ({"theta": 0.0}, "theta must be a finite number > 0, got 0.0"),
        ({"theta": float("nan")}, "theta must be a finite number > 0, got nan"),
        ({"bandwidth": float("inf")}, "bandwidth must be a finite number > 0, got inf"),
        ({"penalty": "target_l0"}, "target must be a finite number > 0, got None"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SAE: {message}"):
        ksae.SAE(3, 9, ksae.JumpReLU(**options))


def test_the_fused_step_names_what_it_does_not_serve() -> None:
    with pytest.raises(ValueError, match="fused must be False with JumpReLU of pre_act > 0"):
        ksae.TrainStep(build("pre_act"))
    metrics = ksae.TrainStep(build("pre_act"), fused=False)(*batch("pre_act"))
    assert metrics["loss"].isfinite()
    model = ksae.SAE(D, F, ksae.JumpReLU(), auxk="batch_topk")
    with pytest.raises(ValueError, match="fused must be False with JumpReLU and auxk='batch_topk'"):
        ksae.TrainStep(model)
    model = ksae.SAE(D, F, ksae.JumpReLU(), dtype="bfloat16")
    with pytest.raises(ValueError, match="moments must be float32 with JumpReLU, got bfloat16"):
        ksae.TrainStep(model, moments="bfloat16")


def test_a_file_from_before_mean_active(tmp_path: Path) -> None:
    model = build("l0", torch.float32)
    tensors = {n: t for n, t in model.state_dict().items() if n != "mean_active"}
    container.write(tmp_path / "old.safetensors", tensors, describe(model, "model", None))
    back = ksae.load(tmp_path / "old.safetensors")
    assert back.mean_active == torch.inf
    assert torch.equal(back.log_threshold, model.log_threshold)
