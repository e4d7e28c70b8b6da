# SPDX-License-Identifier: Apache-2.0
"""Decoder norms in one's own training loop: two methods, a parametrisation, and TrainStep's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

import ksae

d, F, k = 8, 32, 4


def coder(kind: str = "sae", **options: object) -> ksae.SparseCoder:
    torch.manual_seed(0)
    if kind == "sae":
        return ksae.TopKSAE(d, F, k, **options)
    made = ksae.Transcoder(d, d, F, k, skip=True, normalize_decoder=True, **options)
    with torch.no_grad():
        made.W_dec.copy_(made.W_enc)
    return made


def target(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x,) if kind == "sae" else (x, x.roll(1, 1))


def loop(sae: ksae.SparseCoder, kind: str, before: Callable, after: Callable, n: int = 20) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    x = torch.randn(n, 64, d, generator=torch.Generator().manual_seed(1)).to(sae.b_enc.dtype)
    for batch in x:
        optimizer.zero_grad()
        sae(*target(kind, batch)).loss.backward()
        before()
        optimizer.step()
        after()


def norms(sae: ksae.SparseCoder) -> torch.Tensor:
    return sae.W_dec.detach().double().norm(dim=1)


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_two_calls_around_torchs_adam_keep_unit_rows_and_are_train_steps_update(kind: str):
    sae, stepped = coder(kind), coder(kind)
    loop(
        sae,
        kind,
        sae.remove_gradient_parallel_to_decoder_directions,
        sae.set_decoder_norm_to_unit_norm,
        n=3,
    )
    step = ksae.TrainStep(stepped, lr=1e-2, decoder_lr=1.0)
    for batch in torch.randn(3, 64, d, generator=torch.Generator().manual_seed(1)):
        step(*target(kind, batch))
    assert (norms(sae) - 1).abs().max() < 1e-6
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(
            parameter, dict(stepped.named_parameters())[name], atol=2e-5, rtol=1e-4
        )


def test_without_them_the_norms_drift():
    """Otherwise the tests here could not fail."""
    sae = coder()
    loop(sae, "sae", lambda: None, lambda: None)
    assert (norms(sae) - 1).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_parametrised_decoder_has_unit_rows_after_every_step(kind: str, dtype: torch.dtype):
    sae = coder(kind, dtype=dtype)
    parametrize.register_parametrization(sae, "W_dec", ksae.UnitRows())
    seen = []
    loop(sae, kind, lambda: None, lambda: seen.append(float((norms(sae) - 1).abs().max())))
    assert max(seen) < (1e-6 if dtype != torch.bfloat16 else 8e-3)
    free = sae.parametrizations.W_dec.original
    assert torch.equal(sae.W_dec, ksae.UnitRows()(free)) and not torch.equal(sae.W_dec, free)


def test_the_gradient_that_is_left_is_at_right_angles_to_the_rows():
    sae = coder(dtype=torch.float64)
    sae.W_dec.data[3] = 0  # has no direction: its gradient stays
    sae(torch.randn(64, d, dtype=torch.float64)).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_gradient_parallel_to_decoder_directions()
    w = sae.W_dec.detach()
    along = (before * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(sae.W_dec.grad, before - along * w)
    assert (sae.W_dec.grad * w).sum(1).abs().max() < 1e-15
    assert torch.equal(sae.W_dec.grad[3], before[3])
    sae.set_decoder_norm_to_unit_norm()
    assert not sae.W_dec[3].any()


def test_a_parametrised_model_is_saved_as_any_other(tmp_path: Path):
    sae = coder()
    parametrize.register_parametrization(sae, "W_dec", ksae.UnitRows())
    with torch.no_grad():
        sae.parametrizations.W_dec.original.mul_(3)
    sae.save(tmp_path / "sae.safetensors")
    back = ksae.load(tmp_path / "sae.safetensors")
    assert torch.equal(back.W_dec, sae.W_dec) and (norms(back) - 1).abs().max() < 1e-6
    x = torch.randn(5, d)
    assert torch.equal(back(x).recon, copy.deepcopy(sae)(x).recon)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match=r"TopKSAE: W_dec must have a gradient .*after backward"):
        coder().remove_gradient_parallel_to_decoder_directions()
    sae = coder()
    parametrize.register_parametrization(sae, "W_dec", ksae.UnitRows())
    with pytest.raises(ValueError, match="W_dec must be a parameter of its own"):
        ksae.TrainStep(sae)
