# SPDX-License-Identifier: Apache-2.0
"""Whole training steps through each library's own loop: its class against ours, interleaved.

    python -m ksae.bench.suites.interop [--rounds 7] [--json FILE] [--only sparsify,...]

Needs the dependency group `peers`. Prints for each loop the median time of a step with either
class, how much of it torch's optimizer took, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from torch import Tensor

from ksae.bench.harness.measure import machine

LR = 1e-4
Step = tuple[Callable[[Tensor], Any], torch.optim.Optimizer]


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

    return step, optimizer


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
    return lambda x: trainer.update(1, x), trainer.optimizer


def dictionary_learning_fused(ours: bool, d: int, F: int, k: int) -> Step:
    """The same against our trainer with fused=True, whose optimizer is part of its step."""
    if not ours:
        return dictionary_learning(False, d, F, k)
    from ksae.interop.dictionary_learning import TopKTrainer

    trainer = TopKTrainer(
        10**9, d, F, k, 0, "none", lr=LR, warmup_steps=1, device="cpu", fused=True
    )
    return lambda x: trainer.update(1, x), trainer.optimizer


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
    if fused:
        trainer = fused_adam(trainer)
    return trainer.step, trainer.optimizer


def sae_lens_fused(ours: bool, d: int, F: int, k: int) -> Step:
    """The same with torch's fused Adam in both."""
    return sae_lens(ours, d, F, k, fused=True)


def overcomplete(ours: bool, d: int, F: int, k: int) -> Step:
    """train_sae with a mean squared error, on one batch."""
    if "overcomplete.models" not in sys.modules:  # they want torchvision, which no step needs
        models = ModuleType("overcomplete.models")
        vars(models).update(
            dict.fromkeys(("DinoV2", "SigLIP", "ViT", "ResNet", "ConvNeXt"), object)
        )
        sys.modules["overcomplete.models"] = models
    from overcomplete.sae import TopKSAE as Original
    from overcomplete.sae import train_sae

    from ksae.interop.overcomplete import TopKSAE

    model = (TopKSAE if ours else Original)(d, F, k)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            train_sae(
                model, [x], lambda x, x_hat, *_: (x - x_hat).square().mean(), optimizer, nb_epochs=1
            )

    return step, optimizer


LOOPS = {
    f.__name__: f
    for f in (
        *(sparsify, sparsify_fused, dictionary_learning, dictionary_learning_fused),
        *(sae_lens, sae_lens_fused, overcomplete),
    )
}


def timed(optimizer: torch.optim.Optimizer) -> list[float]:
    """Seconds that each call of optimizer.step takes, from here on."""
    seconds: list[float] = []
    inner = optimizer.step

    @functools.wraps(inner)  # with the schedulers' marks
    def step(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    optimizer.step = step
    return seconds


def measure(name: str, rounds: int, shape: dict[str, int]) -> dict[str, Any]:
    """Seconds of one step, ours and the original's, one after the other in each round."""
    x = torch.randn(shape["N"], shape["d"], generator=torch.Generator().manual_seed(0))
    steps, optimizers = [], []
    for ours in (False, True):
        torch.manual_seed(0)
        step, optimizer = LOOPS[name](ours, shape["d"], shape["F"], shape["k"])
        steps.append(step)
        optimizers.append(timed(optimizer))
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 2):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step(x)
            seconds.append(time.perf_counter() - start)
    theirs, own = (seconds[2:] for seconds in times)
    ratios = [a / b for a, b in zip(theirs, own, strict=True)]
    return {
        "loop": name,
        "original": statistics.median(theirs),
        "ksae": statistics.median(own),
        "ratio": statistics.median(ratios),
        "original_optimizer": statistics.median(optimizers[0][2:]),
        "ksae_optimizer": statistics.median(optimizers[1][2:]),
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
        shown = [
            f"{row[who]:.3f} s ({row[f'{who}_optimizer'] / row[who]:.0%} optimizer)"
            for who in ("original", "ksae")
        ]
        print(f"{name:26} original {shown[0]}   ksae {shown[1]}   {row['ratio']:.2f} x", flush=True)
    if a.json is not None:
        record = {"machine": machine(threads=a.threads), "shape": shape, "rows": rows}
        a.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
