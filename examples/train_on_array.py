# SPDX-License-Identifier: Apache-2.0
"""Trains an SAE on an array of activations, measures it on held-out rows and saves it.

python examples/train_on_array.py
"""

from __future__ import annotations

import torch

import ksae
from ksae.activations import open_source
from ksae.analysis.evaluate import evaluate


def planted(rows: int, d: int, latents: int, active: float) -> torch.Tensor:
    """Sparse sums of random directions [rows, d]; replace them by your own activations."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(latents, d, generator=generator)
    codes = torch.rand(rows, latents, generator=generator)
    codes *= torch.rand(rows, latents, generator=generator) < active
    return codes @ directions


def main() -> None:
    x = planted(20_000, d=64, latents=256, active=0.03)
    train, held_out = open_source(x[:-2000]), x[-2000:]
    torch.manual_seed(0)
    sae = ksae.TopKSAE(d_in=64, d_sae=512, k=8)
    step = ksae.TrainStep(sae, lr=3e-3)
    for number, (batch, _) in zip(range(300), train.batches(512), strict=False):
        metrics = step(batch)
        if number % 100 == 0:
            print(f"step {number}: FVU {float(metrics['fvu']):.3f}")
    result = evaluate(sae, [held_out])
    print(f"held out: FVU {result.metrics['fvu']:.3f}, dead {result.metrics['dead']:.1%}")
    sae.save("sae.safetensors")


if __name__ == "__main__":
    main()
