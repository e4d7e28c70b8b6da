# SPDX-License-Identifier: Apache-2.0
"""TrainStep: fused against autograd with torch's Adam, and both against a float64 step."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from cases import Implementation, randn
from torch import Tensor
from training import (
    CASES,
    LR,
    METRICS,
    OUT,
    D,
    F,
    N,
    assert_at_most_twice_torchs_error,
    batch,
    build,
    one_step,
    results,
    warm,
)

import ksae
from ksae.coders.coder import SparseCoder


@pytest.mark.parametrize("case", CASES)
def test_fused_in_float64_is_autograd(oracle: dict[str, Any], case: str) -> None:
    exact, exact_metrics, exact_counts = oracle[case]
    got, metrics, counts = one_step(case, torch.float64, fused=True)
    assert metrics.keys() == exact_metrics.keys() and set(METRICS) <= metrics.keys()
    for name, value in exact_metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-11, atol=1e-13, msg=name)
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-13, msg=name)
    assert torch.equal(counts, exact_counts)


@pytest.mark.parametrize("case", CASES)
def test_one_step_has_at_most_twice_torchs_error(
    impl: Implementation,
    dtype: torch.dtype,
    oracle: dict[str, Any],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every parameter, moment and master."""
    if not impl.native:
        monkeypatch.setattr("ksae.step.fused.ops", impl)
        monkeypatch.setattr("ksae.parallel.one_device.ops", impl)
    assert_at_most_twice_torchs_error(case, dtype, oracle)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_the_first_step_from_zero_moments(fused: bool) -> None:
    """Adam written out: theta moves by lr g / (|g| + eps); moments (1 - b1) g, (1 - b2) g^2."""
    model, data = build("skip", torch.float64), [t.double() for t in batch("skip")]
    loss = model(*data).loss
    assert loss is not None
    parameters = dict(model.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    before = {n: p.detach().clone() for n, p in parameters.items()}
    step = ksae.TrainStep(model, LR, betas=(0.8, 0.95), eps=1e-6, fused=fused)
    step(*data)
    state = step.state_dict()
    for name, g in grads.items():
        moved = before[name] - LR * g / (g.abs() + 1e-6)
        torch.testing.assert_close(
            parameters[name].detach(), moved, rtol=1e-10, atol=1e-12, msg=name
        )
        torch.testing.assert_close(state[f"m.{name}"], 0.2 * g, rtol=1e-10, atol=1e-15, msg=name)
        torch.testing.assert_close(
            state[f"v.{name}"], 0.05 * g * g, rtol=1e-10, atol=1e-18, msg=name
        )
    assert state["t"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_steps_stay_together(dtype: torch.dtype) -> None:
    """Fused and unfused train to the same loss, below the first."""
    losses = {}
    for fused in (True, False):
        model = build("sae", dtype, dead_after=3 * N, k_aux=8, multi_topk=True)
        step = ksae.TrainStep(model, 5e-3, clip_norm=1.0, fused=fused)
        losses[fused] = [float(step(randn(N, D, seed=s))["loss"]) for s in range(20)]
    assert losses[True][-1] < 0.9 * losses[True][0]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses[True], losses[False], rtol=tolerance, atol=0)


def test_order_of_the_step() -> None:
    """Projected gradients enter the moments; rows have unit norm after the step."""
    model = build("sae", torch.float64)
    step = ksae.TrainStep(model, 0.1)
    assert step.order == "project-clip-adam-normalize"
    rows = model.W_dec.detach().clone()
    step(*(t.double() for t in batch("sae")))
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    along = (step.moments["W_dec"][0] * rows).sum(1)
    assert along.abs().max() < 1e-15  # the gradient in the first moment is projected
    free = build("transcoder", torch.float64)
    ksae.TrainStep(free, 0.1)(*(t.double() for t in batch("transcoder")))
    assert (free.W_dec.norm(dim=1) - 1).abs().max() > 0.1


def test_metrics_are_those_of_the_module() -> None:
    model, (x,) = build("sae", torch.float32, k_aux=8, multi_topk=True), batch("sae")
    model.tokens_since_fired[::4] = model.dead_after + 1
    out = copy.deepcopy(model)(x)
    metrics = ksae.TrainStep(model, clip_norm=1.0)(x)
    for name in ("loss", "fvu", "auxk_loss", "multi_topk_loss"):
        torch.testing.assert_close(metrics[name], getattr(out, name).detach(), rtol=1e-5, atol=0)
    assert metrics["l0"] == (out.values > 0).sum() / N
    torch.testing.assert_close(metrics["dead"], torch.tensor(25 / F))
    assert metrics["grad_norm"] > 0 and all(t.dim() == 0 for t in metrics.values())


@pytest.mark.parametrize("scale", [1.0, 2.0**-25, 2.0**25], ids=["usual", "tiny", "huge"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_clipping_always_gives_every_step_the_same_norm(fused: bool, scale: float) -> None:
    """Whatever the scale of the loss; grad_norm is the norm before."""
    model, (x,) = build("sae", torch.float32, loss="mse", auxk_alpha=0.0), batch("sae")
    with torch.no_grad():  # activations, values and gradients of the decoder scale along
        model.b_enc *= scale
        model.b_dec *= scale
    step = ksae.TrainStep(model, LR, clip_norm=0.5, clip="always", fused=fused, betas=(0.0, 0.9))
    metrics = step(x * scale)
    gradients = [m.double() for m, _ in step.moments.values()]  # beta1 = 0: the step's own
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    torch.testing.assert_close(norm, norm.new_tensor(0.5), rtol=1e-5, atol=0)
    above = ksae.TrainStep(build("sae", torch.float32, loss="mse", auxk_alpha=0.0), clip_norm=0.5)
    if scale == 1.0:
        torch.testing.assert_close(metrics["grad_norm"], above(x)["grad_norm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_clipping_always_leaves_gradients_of_zero_at_zero(fused: bool) -> None:
    """A perfect reconstruction: nothing moves, nothing becomes NaN."""
    model = build("transcoder", torch.float32, auxk_alpha=0.0, loss="mse")
    x = batch("transcoder")[0]
    with torch.no_grad():
        model.W_dec.zero_()
        model.b_dec.fill_(1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = ksae.TrainStep(model, LR, clip_norm=1.0, clip="always", fused=fused)
    metrics = step(x, torch.ones(N, OUT))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and step.t == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_the_decoder_moves_at_its_own_rate(fused: bool) -> None:
    """Of the same step W_dec moves decoder_lr as far, also at a rate set later, and nothing else
    does; free norms, so that no row is made to be of length 1 again."""
    moved = {}
    for rate in (1.0, 3.0, 0.0):
        model, (x,) = build("sae", torch.float64, normalize_decoder=False), batch("sae")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step = ksae.TrainStep(model, 1.0, decoder_lr=rate, fused=fused)
        step.lr = 1e-3
        step(x.double())
        moved[rate] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    for name, usual in moved[1.0].items():
        for rate in (3.0, 0.0):
            want = usual * rate if name == "W_dec" else usual
            torch.testing.assert_close(moved[rate][name], want, rtol=1e-9, atol=1e-15, msg=name)
    assert moved[1.0]["W_dec"].abs().max() > 0.9e-3


def test_the_rate_of_the_decoder_is_thrice_that_of_the_others_by_default() -> None:
    """Where it was measured: autoencoders with unit rows."""
    for kind, settings, want in (
        ("sae", {}, 3.0),
        ("sae", {"normalize_decoder": False}, 1.0),
        ("transcoder", {}, 1.0),
        ("transcoder", {"normalize_decoder": True}, 1.0),
    ):
        step = ksae.TrainStep(build(kind, torch.float32, **settings))
        assert step.decoder_lr == want, (kind, settings)
        assert ksae.TrainStep(step.model, decoder_lr=2.0).decoder_lr == 2.0


# ----------------------------------------------------------------------------- what must not change


def snapshot(model: SparseCoder, step: ksae.TrainStep) -> dict[str, Tensor]:
    return {
        n: t.detach().clone() for n, t in [*model.state_dict().items(), *step.state_dict().items()]
    }


@pytest.mark.parametrize("where", ["x", "y", "weight", "no variance", "no rows"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_loss_that_is_not_finite_changes_nothing(
    fused: bool, clip: float | None, where: str, dtype: torch.dtype
) -> None:
    model = build("skip", dtype, k_aux=8)
    model.tokens_since_fired[::4] = model.dead_after + 1
    step = warm(ksae.TrainStep(model, LR, clip_norm=clip, fused=fused))
    x, y = batch("skip")
    match where:
        case "x":
            x[3, 4] = torch.nan
        case "y":
            y[5, 0] = torch.inf
        case "weight":
            with torch.no_grad():
                model.W_enc[4, 4] = torch.nan
            step.state.adopt()
        case "no variance":
            y = y[:1].expand(N, OUT)
        case "no rows":
            x, y = x[:0], y[:0]
    before = snapshot(model, step)
    metrics = step(x, y)
    assert not metrics["loss"].isfinite()
    for name, t in snapshot(model, step).items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    if where != "weight":  # and the next step is as if nothing had happened
        good = build("skip", dtype, k_aux=8)
        good.tokens_since_fired[::4] = good.dead_after + 1
        other = warm(ksae.TrainStep(good, LR, clip_norm=clip, fused=fused))
        step(*batch("skip"))
        other(*batch("skip"))
        assert all(map(torch.equal, results(model, step).values(), results(good, other).values()))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ["sae", "skip"])
def test_state_dict_continues_bit_by_bit(kind: str, fused: bool, dtype: torch.dtype) -> None:
    def run(first: int, last: int, model: SparseCoder, step: ksae.TrainStep) -> None:
        for t in range(first, last):
            step.lr = 1e-3 * (1 + t)
            step(*batch(kind, seed=20 + t))

    settings: dict[str, Any] = {"dead_after": 2 * N, "k_aux": 8}
    model = build(kind, dtype, **settings)
    step = ksae.TrainStep(model, fused=fused, clip_norm=1.0)
    run(0, 3, model, step)
    saved = {"model": copy.deepcopy(model.state_dict()), "step": copy.deepcopy(step.state_dict())}
    run(3, 6, model, step)
    for step_first in (False, True):  # whichever is loaded first
        other = build(kind, dtype, **settings)
        again = ksae.TrainStep(other, fused=fused, clip_norm=1.0)
        again(*batch(kind))
        if step_first:
            again.load_state_dict(saved["step"])
        other.load_state_dict(saved["model"])
        if not step_first:
            again.load_state_dict(saved["step"])
        run(3, 6, other, again)
        for name, t in snapshot(other, again).items():
            assert torch.equal(t, snapshot(model, step)[name]), name


def test_fused_and_unfused_share_their_state() -> None:
    model = build("sae", torch.bfloat16)
    fused, unfused = ksae.TrainStep(model), ksae.TrainStep(copy.deepcopy(model), fused=False)
    fused(*batch("sae"))
    unfused.load_state_dict(fused.state_dict())
    assert all(map(torch.equal, fused.state_dict().values(), unfused.state_dict().values()))
    unfused(*batch("sae"))
    assert unfused.state_dict()["t"] == 2


def test_masters_follow_parameters_written_from_outside() -> None:
    model = build("sae", torch.bfloat16)
    step = ksae.TrainStep(model, LR)
    step(*batch("sae"))
    master = step.masters["W_enc"].clone()
    assert not torch.equal(master, model.W_enc.float())  # it has more digits
    with torch.no_grad():
        model.b_dec.fill_(1.5)
        model.W_enc[3] = 2.0
    step.state.adopt()
    assert (step.masters["b_dec"] == 1.5).all() and (step.masters["W_enc"][3] == 2).all()
    rest = torch.arange(F) != 3
    assert torch.equal(step.masters["W_enc"][rest], master[rest])


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    model = build("sae", torch.bfloat16, normalize_decoder=False)
    step = ksae.TrainStep(model, 1e-5)
    start = model.W_enc.detach().clone()
    for t in range(100):
        step(*batch("sae", seed=t % 3))
    moved = (model.W_enc != start).float().mean()
    assert (
        moved > 0.1
    )  # 1e-5 is far below half a unit of a weight near 0.25, a hundred of them are not


def test_the_fused_step_gives_the_same_bits(
    impl: Implementation, dtype: torch.dtype, threads: None
) -> None:
    """On every run, and natively for every number of threads."""
    outcomes = []
    for count in (1, 2, 3) if impl.native else (1, 1):
        torch.set_num_threads(count)
        model = build("sae", dtype, dead_after=N, k_aux=8, multi_topk=True)
        step = ksae.TrainStep(model, LR)
        for t in range(4):
            step(*batch("sae", seed=t))
        outcomes.append(snapshot(model, step))
    for other in outcomes[1:]:
        assert all(torch.equal(t, other[name]) for name, t in outcomes[0].items())


def test_any_leading_dimensions_and_dtype_of_the_input() -> None:
    models = [build("skip", torch.bfloat16) for _ in range(2)]
    x, y = batch("skip")
    ksae.TrainStep(models[0])(x, y)
    ksae.TrainStep(models[1])(
        x.reshape(4, 16, D).double(), y.bfloat16().T.contiguous().T.reshape(4, 16, OUT)
    )
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_the_input_is_left_alone_and_autocast_does_not_reach_the_step() -> None:
    models = [build("sae", torch.float32) for _ in range(2)]
    (x,) = batch("sae")
    kept = x.clone()
    ksae.TrainStep(models[0])(x)
    with torch.autocast("cpu", torch.bfloat16):
        ksae.TrainStep(models[1])(x)
    assert torch.equal(x, kept)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


# ----------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "TrainStep: lr must be a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, "TrainStep: lr must be a finite number >= 0, got nan"),
        ({"decoder_lr": -1.0}, "TrainStep: decoder_lr must be a finite number >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "TrainStep: betas must be in [0, 1), got (0.9, 1.0)"),
        ({"eps": 0.0}, "TrainStep: eps must be > 0, got 0.0"),
        (
            {"clip_norm": 1.0, "clip": "often"},
            "TrainStep: clip must be above or always, got 'often'",
        ),
        ({"clip_norm": 0.0}, "TrainStep: clip_norm must be > 0 or None, got 0.0"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else None,
)
def test_constructor_messages(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ksae.TrainStep(build("sae", torch.float32), **settings)


def test_messages() -> None:
    model = build("transcoder", torch.float32)
    step = ksae.TrainStep(model)
    x, y = batch("transcoder")
    before = snapshot(model, step)
    for call, message in (
        (lambda: step(x), "TrainStep: y must be given for a transcoder, got None"),
        (lambda: step(y, x), "Transcoder: x must be of shape [..., 17], got [64, 23]"),
        (
            lambda: step(x, y[1:]),
            "Transcoder: y must be of shape [64, 23] for x of shape [64, 17], got [63, 23]",
        ),
        (lambda: setattr(step, "lr", -2.0), "TrainStep: lr must be a finite number >= 0, got -2.0"),
        (
            lambda: step.load_state_dict({}),
            "TrainStep: state must have the entries of state_dict()",
        ),
        (
            lambda: step.load_state_dict(step.state_dict() | {"m.b_enc": torch.zeros(2)}),
            "TrainStep: state m.b_enc must be of shape [97], got [2]",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert all(torch.equal(t, before[n]) for n, t in snapshot(model, step).items())
    model.W_enc = torch.nn.Parameter(model.W_enc.detach().clone())
    with pytest.raises(
        ValueError, match="TrainStep: W_enc must be the parameter that the step was made for"
    ):
        step(x, y)
    model.b_enc = torch.nn.Parameter(model.b_enc.detach().half())
    with pytest.raises(
        ValueError,
        match=r"TrainStep: b_enc must be torch.float32 on cpu as W_enc, got torch.float16",
    ):
        ksae.TrainStep(model)


@pytest.mark.parametrize("dead", [0, 3, 40])
def test_auxk_with_masked_slots_is_auxk(dead: int) -> None:
    """A CUDA graph records AuxK with k_aux slots, however few latents are dead at the replay."""

    def after(padded: bool) -> dict[str, Tensor]:
        model = build("sae", torch.float32, k_aux=8, auxk_alpha=0.5)
        model.tokens_since_fired[: 2 * dead : 2] = model.dead_after + 1
        step = ksae.TrainStep(model, lr=LR)
        if padded:
            step._fused.asks_for_dead = False
        metrics = step(*batch("sae"))
        return snapshot(model, step) | metrics

    counted, padded = after(False), after(True)
    assert (counted["auxk_loss"] > 0) == (dead > 0)
    for name, t in counted.items():
        torch.testing.assert_close(padded[name], t, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", ["plain", "multi, dead", "skip"])
def test_column_sums_of_the_decode_kernel(case: str) -> None:
    """As on CUDA, where the residual's columns are summed by the kernel that forms it."""
    kind, settings, options = CASES[case]
    outcomes = []
    for fused_sums in (False, True):
        model = build(kind, torch.float64, **{n: v for n, v in settings.items() if n != "dead"})
        model.tokens_since_fired[::2] = model.dead_after + 1
        step = warm(ksae.TrainStep(model, LR, **options))
        step._fused.sums_in_decode = fused_sums
        step(*(t.double() for t in batch(kind)))
        outcomes.append(results(model, step))
    for name, want in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], want, rtol=1e-10, atol=1e-13, msg=name)


def test_column_sums_are_checked_and_marked_as_written() -> None:
    values, indices = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    code = (values, indices, torch.ones(5, 4), None, torch.ones(3, 4), 4)
    sums = torch.zeros(4)
    ksae.ops.sparse_residual(*code, sums)
    assert torch.equal(sums, torch.full((4,), 3.0)) and sums._version > 0
    for bad, message in (
        (torch.ones(3), r"of shape \[4\], got \[3\]"),
        (torch.ones(8)[::2], "con"),
    ):
        with pytest.raises(ValueError, match=f"sparse_residual: column_sums must be {message}"):
            ksae.ops.sparse_residual(*code, bad)
