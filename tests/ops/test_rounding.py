# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to bfloat16: its random bits, its mean, the training step that uses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import integers, randn, row_arguments

import ksae
from ksae import ops, reference


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter: tuple[int, ...], key: int, words: str) -> None:
    got = reference.rounding._philox(counter, torch.tensor(key))
    assert " ".join(f"{int(w):08x}" for w in got) == words


def rounded(x: torch.Tensor, *, seed: int = 5, step: int = 0, draw: int = 0, start: int = 0):
    rng_state = torch.tensor([seed, step])
    return reference.stochastic_bfloat16(x, rng_state, draw, start)


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    """In 4096 latents the mean is the number: the errors of 120 numbers in units of their standard
    error, which would be normal numbers, are at most 5, their mean square is 1 within 5 of its own
    standard deviations."""
    x = randn(127, seed=1) * 10.0 ** randn(127, seed=2)
    x[:7] = torch.tensor([1.0, -1.0, 0.0, -0.0, 3.0, 2.0**-126, 256.0])  # stay as they are
    below = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    above = ((x.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    latents = 4096
    y = rounded(x.expand(latents, -1)).float()
    assert ((y == below) | (y == above)).all() and (y[:, :7] == x[:7]).all()
    unit = above.double() - below
    share = ((x - below) / unit)[7:]
    error = ((y.double().mean(0) - x) / unit)[7:]
    z = error / (share * (1 - share) / latents).sqrt()
    assert z.abs().max() < 5
    assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5


def test_bits_are_a_matter_of_seed_step_draw_latent_and_column() -> None:
    x = torch.full((300, 64), 1 + 2.0**-8)  # half way: each rounds as a coin falls
    one = rounded(x)
    coins = (one > 1).double()
    assert abs(coins.mean() - 0.5) < 5 * 0.5 / coins.numel() ** 0.5
    others = {
        "seed": rounded(x, seed=6),
        "upper seed": rounded(x, seed=5 + 2**32),
        "step": rounded(x, step=1),
        **{f"draw {n}": rounded(x, draw=n) for n in (1, 2, 3)},
        "row": one.roll(1, 0),
        **{f"column + {n}": one.roll(n, 1) for n in (1, 2, 3, 4)},
    }
    for name, other in others.items():
        same = ((other > 1) == (one > 1)).double().mean()
        assert abs(same - 0.5) < 5 * 0.5 / coins.numel() ** 0.5, name
    assert torch.equal(rounded(x[:, 9:31], start=9), one[:, 9:31])


def test_infinities_and_nan_stay() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3.4e38]])
    got = torch.stack([rounded(x, step=n) for n in range(64)]).float()
    assert (got[:, 0, 0] == torch.inf).all() and (got[:, 0, 1] == -torch.inf).all()
    assert got[:, 0, 2].isnan().all() and got[:, 0, 3].isinf().any()


# ------------------------------------------------------------------------------------------- the op


def noisy() -> dict[str, Any]:
    a = row_arguments(torch.bfloat16, "encoder")
    a |= {"master": None, "m": a["m"].bfloat16(), "v": a["v"].bfloat16(), "W_bf16": None}
    return a | {"rng_state": torch.tensor([1, 2])}


def test_the_cpu_is_served_by_the_reference() -> None:
    a, want = noisy(), noisy()
    ops.row_update(*a.values())
    reference.row_update(*want.values())
    assert all(torch.equal(a[n], want[n]) for n in ("W", "m", "v", "grad_b_dec"))
    b = row_arguments(torch.float32, "decoder")
    plain = copy.deepcopy(b)
    ops.row_update(*b.values(), W_bf16 := torch.zeros_like(b["W"]).bfloat16())
    reference.row_update(*plain.values())
    assert torch.equal(b["W"], plain["W"]) and torch.equal(W_bf16, b["W"].bfloat16())
    assert W_bf16._version > 0


SLICE = {"rows": [torch.zeros(19, 8).bfloat16()] * 2, "centre": None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"master": torch.zeros(33, 23)}, ValueError, "master must be None for torch.bfloat16 w"),
        ({"m": torch.zeros(33, 23)}, TypeError, "m must be torch.bfloat16, got torch.float32"),
        (
            {"rng_state": torch.zeros(2)},
            TypeError,
            "rng_state must be torch.int64, got torch.float32",
        ),
        (
            {"rng_state": torch.tensor([1])},
            ValueError,
            r"rng_state must be of shape \[2\], got \[1\]",
        ),
        (SLICE | {"start": 2}, ValueError, "start must be a multiple of 4 with rng_state, got 2"),
        (
            {"rng_state": None},
            ValueError,
            "master must be a tensor for torch.bfloat16 weights, got",
        ),
        ({"W_bf16": torch.zeros(33, 23)}, ValueError, "W_bf16 must be None for torch.bfloat16 w"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"row_update: {message}"):
        ops.row_update(*(noisy() | changes).values())
    a = row_arguments(torch.float32, "encoder")
    with pytest.raises(TypeError, match=r"W must be torch\.bfloat16 with rng_state"):
        ops.row_update(*a.values(), None, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"W_bf16 must be torch\.bfloat16, got"):
        ops.row_update(*a.values(), torch.zeros(33, 23), None)


# ----------------------------------------------------------------------------------- the whole step


def model(dtype: torch.dtype = torch.bfloat16) -> ksae.TopKSAE:
    torch.manual_seed(0)
    return ksae.TopKSAE(16, 64, 4).to(dtype)


def batch(seed: int) -> torch.Tensor:
    """Sums of few directions, so that there is something to learn."""
    weight = integers(128, 32, seed=seed, top=9).relu()
    return ((weight - 6).relu() @ randn(32, 16, seed=99)).bfloat16()


def train(steps: int, **options: Any) -> tuple[ksae.TopKSAE, ksae.TrainStep, list[float]]:
    sae = model()
    step = ksae.TrainStep(sae, 3e-3, **options)
    return sae, step, [float(step(batch(t % 8))["loss"]) for t in range(steps)]


def test_steps_with_bfloat16_moments_train_as_with_masters() -> None:
    sae, step, losses = train(120, moments="bfloat16")
    _, _, want = train(120)
    mean = lambda x: sum(x[-16:]) / 16
    assert mean(want) < 0.6 * want[0]
    assert abs(mean(losses) - mean(want)) < 0.1 * mean(want)
    assert step.masters.keys() == {"b_enc", "b_dec"}
    assert all(t.dtype == torch.bfloat16 for n in ("W_enc", "W_dec") for t in step.moments[n])
    assert step.moments["b_dec"][0].dtype == torch.float32
    assert (sae.W_dec.float().norm(dim=1) - 1).abs().max() < 2.0**-7


def test_small_updates_are_not_lost() -> None:
    """Rounded to nearest, a step of 1e-5 would never move a weight near 1/4."""
    sae = model()
    step = ksae.TrainStep(sae, 1e-5, moments="bfloat16")
    start = sae.W_enc.detach().float()
    for t in range(40):
        step(batch(t % 3))
    moved = (sae.W_enc.float() - start)[start.abs() > 2.0**-4]
    assert 0.05 < (moved != 0).double().mean() < 0.9


def test_state_dict_continues_bit_by_bit() -> None:
    sae, step, _ = train(3, moments="bfloat16", clip_norm=1.0)
    other = model()
    again = ksae.TrainStep(other, 3e-3, moments="bfloat16", clip_norm=1.0)
    other.load_state_dict(sae.state_dict())
    again.load_state_dict(copy.deepcopy(step.state_dict()))
    for t in range(3):
        step(batch(t))
        again(batch(t))
    pairs = zip(step.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(sae.W_enc, other.W_enc) and torch.equal(sae.W_dec, other.W_dec)


@pytest.mark.parametrize(
    ("dtype", "options", "got"),
    [
        (torch.float32, {"moments": "bfloat16"}, "bfloat16 with torch.float32 and fused=True"),
        (torch.bfloat16, {"moments": "bfloat16", "fused": False}, "bfloat16 with torch.bfloat16 a"),
        (torch.bfloat16, {"moments": "float8"}, "'float8'"),
    ],
)
def test_settings_that_do_not_fit(dtype: torch.dtype, options: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"TrainStep: moments must be float32.*, got {got}"):
        ksae.TrainStep(model(dtype), **options)
