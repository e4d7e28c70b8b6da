# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on a GPU: time and memory of ksae's and its rivals', for gpu/run.py."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ksae.coders import TopKSAE
from ksae.step.train_step import TrainStep

from ..harness import costs
from ..harness.record import Row
from ..harness.session import Session
from ..suites import latents
from . import rivals
from .measure import Inputs, Shape, Timer, Way, add_rows, memory
from .report import SUITE

LR = 1e-3


def measure_step(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Each contestant alone, for memory, with the encoder's product between its steps."""
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    inputs = Inputs(shape, timer.device, dtype)

    def ours(auxk: bool = True, **options: Any) -> Way:
        alpha = {} if auxk else {"auxk_alpha": 0.0}
        model = TopKSAE(d, F, k, dtype=dtype, device=timer.device, **alpha)
        with torch.no_grad():
            for p, start in ((model.W_enc, inputs.W), (model.W_dec, inputs.W)):
                p.copy_(start)
            model.b_enc.zero_(), model.b_dec.zero_()
        step = TrainStep(model, lr=LR, decoder_lr=1.0, **options)  # as the rivals
        return lambda: step(inputs.x)["loss"]

    contestants = {
        "ksae": ours,
        "ksae in a CUDA graph": lambda: Recorded(ours(), timer.device),
        "ksae without AuxK": lambda: ours(auxk=False),  # as the rivals are
        "ksae, bfloat16 moments": lambda: ours(moments="bfloat16"),
        "Triton decoder": lambda: partial_step(rivals.Triton(inputs.W, k, dtype, LR), inputs.x),
        "dense torch": lambda: partial_step(rivals.Dense(inputs.W, k, dtype, LR), inputs.x),
    }
    if dtype != torch.bfloat16:
        del contestants["ksae, bfloat16 moments"]
    cost = sum(latents.train_step(N, d, F, k, inputs.x.element_size()).values(), costs.Cost())
    first = None
    for name, make in contestants.items():
        if session.left() < 20:
            session.problem(f"no time for step {shape.name} of {name}")
            return
        step = None
        try:
            step = make()
            step()
            step()
            before = memory(reset=True)
            loss = float(step())  # of the third step: gradients and Adam are in it
            extra = memory() - before
            first = loss if first is None else first
            compare_losses(session, shape, name, loss, first)
            ways = {name: step, "product alone": inputs.product}
            times = add_rows(session, timer, shape, "step", ways, cost)
            rows = session.suite.rows
            rows[:] = [r for r in rows if (r.op, r.way) != ("step", "product alone")]
            if {name, "product alone"} <= times.keys():
                ratio = times[name].median / times["product alone"].median
                rows[-1].peak = extra
                rows[-1].extra |= {"products": ratio, "loss": loss, "wall": timer.wall(step)}
                session.save()
        except Exception as error:  # the others can still be measured
            why = f"{type(error).__name__}: {str(error)[:300]}"
            session.add(Row(SUITE, shape.name, "step", "step", name, failure=why))
            if not isinstance(error, torch.OutOfMemoryError):
                session.problem(f"step {shape.name} of {name}: {why}")
            del error
            timer.wait()  # raises where the device does not survive it
        del step
        gc.collect()
        if timer.device == "cuda":
            torch.cuda.empty_cache()


def compare_losses(session: Session, shape: Any, name: str, loss: float, first: float) -> None:
    """A problem of the session if a contestant's loss is not near that of ksae, the first."""
    near = 0.05 if "moments" in name else 0.005  # these are rounded stochastically
    if not abs(loss - first) <= near * abs(first):
        session.problem(f"step {shape.name} of {name}: loss {loss:.5g}, ksae's {first:.5g}")


class Recorded:
    """A step that is recorded in a CUDA graph at its third call and replayed from then on."""

    def __init__(self, step: Way, device: str) -> None:
        self.step, self.calls, self.loss = step, 0, None
        self.graph = torch.cuda.CUDAGraph() if device == "cuda" else None

    def __call__(self) -> Any:
        self.calls += 1
        if self.graph is None:
            return self.step()
        if self.calls <= 2:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self.step()
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if self.loss is None:
            with torch.cuda.graph(self.graph):
                self.loss = self.step()
        self.graph.replay()
        return self.loss


def partial_step(rival: Any, x: Any) -> Way:
    return lambda: rival.step(x)


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "float32, clipped": {"dtype": torch.float32, "clip_norm": 1.0},
    "clipped": {"clip_norm": 1.0},
    **{f"{share:g} % dead": {"dead": share / 100} for share in (0.5, 2, 10)},
    "float32, 2 % dead": {"dtype": torch.float32, "dead": 0.02},
}


def variant(inputs: Inputs, dtype: torch.dtype, dead: float = 0, **options: Any) -> Way:
    """A step of ksae with so large a share of its latents dead."""
    shape = inputs.shape
    model = TopKSAE(shape.d, shape.F, shape.k, dtype=dtype, device=inputs.x.device)
    with torch.no_grad():
        for p in (model.W_enc, model.W_dec):
            p.copy_(inputs.W)
        model.b_dec.zero_()
    # they stay dead: their biases keep them from being chosen
    number = max(1, round(dead * shape.F)) if dead else 0
    with torch.no_grad():
        model.b_enc[:number] = -1e4
    model.tokens_since_fired[:number] = 2 * model.dead_after
    step, x = TrainStep(model, lr=LR, **options), inputs.x.to(dtype)
    return lambda: step(x)["loss"]


def measure_variants(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Steps that differ in one thing each, one model in memory at a time."""
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    inputs = Inputs(shape, timer.device, dtype)
    for name, options in VARIANTS.items():
        size = options.get("dtype", dtype).itemsize
        cost = sum(latents.train_step(N, d, F, k, size).values(), costs.Cost())
        if session.left() < 20:
            session.problem(f"no time for the step {name} of {shape.name}")
            return
        try:
            step = variant(inputs, **{"dtype": dtype, **options})
            for _ in range(6):  # more than the count of dead latents is late
                step()
        except Exception as error:
            timer.wait()
            session.problem(f"step {name} of {shape.name}: {type(error).__name__}: {error}"[:400])
            continue
        add_rows(session, timer, shape, "step variants", {name: step}, cost)
        del step
        gc.collect()
        if timer.device == "cuda":
            torch.cuda.empty_cache()


def measure_profile(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Every kernel of a step by name: calls and microseconds, of the device where there is one."""
    inputs = Inputs(shape, timer.device, dtype)
    kinds = torch.profiler.ProfilerActivity
    cuda = timer.device == "cuda"
    for T in (dtype, torch.float32):
        step = variant(inputs, T)
        for _ in range(6):
            step()
        timer.wait()
        with torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]
        ) as seen:
            step()
            timer.wait()
        spent = "self_device_time_total" if cuda else "self_cpu_time_total"
        found = [
            {"kernel": e.key[:120], "calls": e.count, "us": round(getattr(e, spent), 2)}
            for e in seen.key_averages()
            if getattr(e, spent) > 0
        ]
        found.sort(key=lambda e: -e["us"])
        session.fact("profile", **{f"{shape.name}, {T}": found[:60]})
        del step
        gc.collect()


SECTIONS = {"step": measure_step, "variants": measure_variants, "profile": measure_profile}
