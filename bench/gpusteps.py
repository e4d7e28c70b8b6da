# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on a GPU: time and memory of ksae's and its rivals', for gpu.py."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ksae.modules import TopKSAE
from ksae.step import TrainStep

from . import costs, gpurivals
from .gpumeasure import Inputs, Shape, Timer, Way, add_rows
from .gpureport import Record

LR = 1e-3


def measure_step(record: Record, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Each contestant alone, for memory, with the encoder's product between its steps."""
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    inputs = Inputs(shape, timer.device, dtype)

    def ours() -> Way:
        model = TopKSAE(d, F, k, dtype=dtype, device=timer.device)
        with torch.no_grad():
            for p, start in ((model.W_enc, inputs.W), (model.W_dec, inputs.W)):
                p.copy_(start)
            model.b_enc.zero_(), model.b_dec.zero_()
        step = TrainStep(model, lr=LR)
        return lambda: step(inputs.x)["loss"]

    contestants = {
        "ksae": ours,
        "Triton decoder": lambda: partial_step(gpurivals.Triton(inputs.W, k, dtype, LR), inputs.x),
        "dense torch": lambda: partial_step(gpurivals.Dense(inputs.W, k, dtype, LR), inputs.x),
    }
    cost = sum(costs.train_step(N, d, F, k, inputs.x.element_size()).values(), costs.Cost())
    first = None
    for name, make in contestants.items():
        if record.left() < 20:
            record.problem(f"no time for step {shape.name} of {name}")
            return
        step = loss = None
        try:
            step = make()
            step()
            step()
            before = memory(reset=True)
            loss = float(step())  # of the third step: gradients and Adam are in it
            extra = memory() - before
            first = loss if first is None else first
            if abs(loss - first) > 0.005 * abs(first):
                record.problem(f"step {shape.name} of {name}: loss {loss:.5g}, ksae's {first:.5g}")
            times = timer({name: step, "product alone": inputs.product})
            ratio = times[name].median / times.pop("product alone").median
            add_rows(record, shape, "step", times, cost)
            record.data["rows"][-1] |= {"products": ratio, "extra_bytes": extra, "loss": loss}
        except torch.OutOfMemoryError:
            record.row(shape=shape.name, op="step", way=name, note="out of memory")
        del step
        gc.collect()
        if timer.device == "cuda":
            torch.cuda.empty_cache()


def partial_step(rival: Any, x: Any) -> Way:
    return lambda: rival.step(x)


def memory(reset: bool = False) -> int:
    """Bytes allocated on the GPU: now, with `reset`; else the most since then."""
    if not torch.cuda.is_available():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()
