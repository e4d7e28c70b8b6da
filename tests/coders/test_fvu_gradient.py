# SPDX-License-Identifier: Apache-2.0
"""The FVU's denominator is a constant: what its gradient with respect to the target leaves out."""

from __future__ import annotations

import torch

import ksae


def test_gradient_of_the_fvu_for_the_target_takes_the_variance_as_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    model = ksae.Transcoder(6, 4, 20, 3, auxk_alpha=0.0, dtype=torch.float64)
    with torch.no_grad():
        model.W_dec.copy_(torch.randn(20, 4, generator=generator, dtype=torch.float64))
    out = model(x, y)
    (got,) = torch.autograd.grad(out.loss, y)
    error = y.detach() - out.recon.detach()  # [N, d_out]
    variance = (y.detach() - y.detach().mean(0)).square().sum()
    torch.testing.assert_close(got, 2 * error / variance)
    whole = 2 * error / variance - 2 * out.loss.detach() / variance * (y - y.mean(0)).detach()
    assert not torch.allclose(got, whole)
