# SPDX-License-Identifier: Apache-2.0
"""Whole training steps through each library's own loop: its class against ours, interleaved.

    python bench/interop.py [--rounds 7] [--json FILE] [--only sparsify,...]

Needs the dependency group `peers`. Prints the median of each and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from torch import Tensor

LR = 1e-4
Step = Callable[[Tensor], Any]


def sparsify(ours: bool, d: int, F: int, k: int, *, fused: bool = False) -> Step:
    """The body of Trainer.fit for one module; its model comes from a language model."""
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder as Original

    from ksae.interop.sparsify import SparseCoder

    model = (SparseCoder if ours else Original)(d, SparseCoderConfig(num_latents=F, k=k))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=fused or None)
    fired = torch.zeros(F, dtype=torch.bool)
    since = torch.zeros(F, dtype=torch.long)

    def step(x: Tensor) -> None:
        model.set_decoder_norm_to_unit_norm()
        out = model(x)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        model.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since.add_(x.shape[0])
        since[fired] = 0
        fired.zero_()

    return step


def sparsify_fused(ours: bool, d: int, F: int, k: int) -> Step:
    """The same with torch's fused Adam in both."""
    return sparsify(ours, d, F, k, fused=True)


def dictionary_learning(ours: bool, d: int, F: int, k: int) -> Step:
    """TopKTrainer.update."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK as Original
    from dictionary_learning.trainers.top_k import TopKTrainer

    from ksae.interop.dictionary_learning import AutoEncoderTopK

    cls = AutoEncoderTopK if ours else Original
    trainer = TopKTrainer(
        10**9, d, F, k, 0, "none", dict_class=cls, lr=LR, warmup_steps=1, device="cpu"
    )
    return lambda x: trainer.update(1, x)


def sae_lens(ours: bool, d: int, F: int, k: int, *, fused: bool = False) -> Step:
    """SAETrainer.step."""
    from sae_lens import TopKTrainingSAE as Original
    from sae_lens import TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from ksae.interop.saelens import TopKTrainingSAE, fused_adam

    model = (TopKTrainingSAE if ours else Original)(TopKTrainingSAEConfig(d_in=d, d_sae=F, k=k))
    cfg = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=1, lr=LR, lr_end=LR
    )
    trainer = SAETrainer(cfg, model, data_provider=iter(()))
    return fused_adam(trainer).step if fused else trainer.step


def sae_lens_fused(ours: bool, d: int, F: int, k: int) -> Step:
    """The same with torch's fused Adam in both."""
    return sae_lens(ours, d, F, k, fused=True)


LOOPS = {
    f.__name__: f for f in (sparsify, sparsify_fused, dictionary_learning, sae_lens, sae_lens_fused)
}


def measure(name: str, rounds: int, shape: dict[str, int]) -> dict[str, Any]:
    """Seconds of one step, ours and the original's, one after the other in each round."""
    x = torch.randn(shape["N"], shape["d"], generator=torch.Generator().manual_seed(0))
    steps = []
    for ours in (False, True):
        torch.manual_seed(0)
        steps.append(LOOPS[name](ours, shape["d"], shape["F"], shape["k"]))
    times: list[list[float]] = [[], []]
    for r in range(rounds + 2):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step(x)
            if r >= 2:
                seconds.append(time.perf_counter() - start)
    theirs, own = times
    ratios = [a / b for a, b in zip(theirs, own, strict=True)]
    return {
        "loop": name,
        "original": statistics.median(theirs),
        "ksae": statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(LOOPS))
    parser.add_argument("--json", type=Path)
    for size, default in (("N", 2048), ("d", 768), ("F", 24576), ("k", 32)):
        parser.add_argument(f"--{size}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    shape = {size: getattr(a, size) for size in "NdFk"}
    rows = []
    for name in a.only.split(","):
        row = measure(name, a.rounds, shape)
        rows.append(row)
        print(
            f"{name:20} original {row['original']:.3f} s   ksae {row['ksae']:.3f} s"
            f"   {row['ratio']:.2f} x",
            flush=True,
        )
    if a.json is not None:
        machine = {"cpu": platform.processor(), "threads": a.threads, "torch": torch.__version__}
        a.json.write_text(json.dumps({"machine": machine, "shape": shape, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
