# SPDX-License-Identifier: Apache-2.0
"""The ops in a training loop of one's own, with torch's optimizer.

python examples/own_loop.py
"""

from __future__ import annotations

import torch

import ksae


def main() -> None:
    torch.manual_seed(0)
    N, d, F, k = 512, 64, 256, 8
    W_enc = torch.nn.Parameter(torch.randn(F, d) / d**0.5)  # [F, d]: one row a latent
    W_dec = torch.nn.Parameter(W_enc.detach().clone())
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(F)), torch.nn.Parameter(torch.zeros(d))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=3e-3)
    x = torch.randn(N, 16) @ torch.randn(16, d)
    for number in range(101):
        values, indices = ksae.topk_encode(x, W_enc, b_enc, k, b_dec)
        recon = ksae.sparse_decode(values, indices, W_dec, b_dec)
        loss = (recon - x).square().sum() / (x - x.mean(0)).square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if number % 50 == 0:
            print(f"step {number}: FVU {float(loss):.3f}")


if __name__ == "__main__":
    main()
